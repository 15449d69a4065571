import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from pipelines import UNET, shapes, write_pipeline

from jax_unlearn import multipliers
from jax_unlearn.app.checkpoint import Checkpoints
from jax_unlearn.formulations import reverse_kl
from jax_unlearn.models.initialisation import random_params
from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionDenoiser
from jax_unlearn.pretrained import load_pretrained, subsets
from jax_unlearn.pretrained.subsets import Subset, parse_subset
from jax_unlearn.pretrained.text_to_image import encode_prompts, load_text_to_image
from jax_unlearn.pretrained.weights import diffusers_key
from jax_unlearn.primal_dual import PrimalDualState, primal_dual
from jax_unlearn.problem import Batch, Conditions, Losses, Problem

APPLY = UNet2DConditionDenoiser(UNet2DConditionConfig.from_diffusers(UNET))
GIVEN = (
    jax.random.normal(jax.random.key(1), (2, 8, 8, 4)),
    jnp.array([3, 700]),
    jax.random.normal(jax.random.key(2), (2, 5, 8)),
)


@pytest.fixture(scope="module")
def params():
    return random_params(shapes("unet", UNET), jax.random.key(0))


def leaves(tree):
    """By their names in torch."""
    return {
        diffusers_key(tuple(entry.key for entry in path)): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def changed(lora, key=3):
    """A change that changes something: B is drawn too."""
    rng = np.random.default_rng(key)
    return jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), lora)


@pytest.mark.parametrize(
    ("text", "part", "rank"),
    [
        ("full", "full", None),
        ("esd-all", "full", None),
        ("esd-x", "cross-attention", None),
        ("esd-u", "no-cross-attention", None),
        ("esd-x-strict", "cross-attention-kv", None),
        ("lora:4", "cross-attention", 4),
        ("lora:16:esd-u", "no-cross-attention", 16),
    ],
)
def test_names_of_subsets(text, part, rank):
    assert parse_subset(text) == Subset(part, rank)


@pytest.mark.parametrize(
    "text", ["", "esd", "lora", "lora:", "lora:0", "lora:-1", "lora:x", "lora:4:", "lora:4:x:full"]
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="is no subset .*esd-x-strict, .*lora:RANK"):
        parse_subset(text)


def test_parts_partition_the_parameters(params):
    labels = {part: leaves(subsets.subset_labels(params, part)) for part in subsets._PARTS}
    trained = {
        part: {name for name, label in found.items() if label == "trained"}
        for part, found in labels.items()
    }
    assert trained["full"] == leaves(params).keys()
    assert trained["cross-attention"] == {name for name in trained["full"] if ".attn2." in name}
    assert trained["no-cross-attention"] == trained["full"] - trained["cross-attention"]
    # One transformer block below, one in the middle, two above.
    block = "transformer_blocks.0.attn2"
    places = ["down_blocks.0.attentions.0", "mid_block.attentions.0"]
    places += [f"up_blocks.1.attentions.{i}" for i in range(2)]
    kv = {f"{place}.{block}.{name}.weight" for place in places for name in ("to_k", "to_v")}
    assert trained["cross-attention-kv"] == kv


def test_parts_that_are_not_there_are_refused(params):
    with pytest.raises(ValueError, match="no cross-attention: it is not conditioned on text"):
        subsets.subset_labels({"conv_in": params["conv_in"]}, "cross-attention")
    with pytest.raises(ValueError, match="part 'esd-x' is not one of full, "):
        subsets.subset_labels(params, "esd-x")
    with pytest.raises(ValueError, match="rank must be 1 or more, not 0"):
        subsets.lora_init(params, jax.random.key(0), rank=0)


def test_optimizer_moves_its_part_alone(params):
    part = "cross-attention-kv"
    labels = leaves(subsets.subset_labels(params, part))
    # The clipped norm is that of the part: the others' gradients, a thousand times as large, and
    # decay leave no trace.
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.0), optax.sgd(1.0)
    )
    optimizer = subsets.subset_optimizer(inner, part)
    scale = {name: 1.0 if label == "trained" else 1000.0 for name, label in labels.items()}
    grads = jax.tree.unflatten(
        jax.tree.structure(params),
        [jnp.full(x.shape, scale[name]) for name, x in leaves(params).items()],
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    count = sum(leaves(params)[name].size for name, label in labels.items() if label == "trained")
    for name, update in leaves(updates).items():
        expected = -1 / np.sqrt(count) if labels[name] == "trained" else 0.0
        np.testing.assert_allclose(update, np.full(update.shape, expected), rtol=1e-5)
    moments = jax.tree.leaves(subsets.subset_optimizer(optax.adam(1e-3), part).init(params))
    assert sum(leaf.size for leaf in moments) == 2 * count + 1


def squares(params, *_):
    found = jnp.square(APPLY(params, *GIVEN)).mean(axis=(1, 2, 3))
    return Losses(found, found[:0], jnp.zeros(0, int))


WHOLE = Problem(squares, 1.0, multipliers.non_negative(), "squares", fresh=squares)


@pytest.mark.slow
def test_problem_differentiates_its_part_alone(params):
    part = "cross-attention"

    def compiled(problem):
        def loss(params):
            return problem.losses(params, None).objective.sum()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    full, less = compiled(WHOLE), compiled(subsets.subset_problem(WHOLE, part))
    labels, expected = leaves(subsets.subset_labels(params, part)), leaves(full(params))
    for name, gradient in leaves(less(params)).items():
        scale = 1.0 if labels[name] == "trained" else 0.0
        tolerance = 1e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, scale * expected[name], atol=tolerance * scale)
    # Of a forward pass, the cotangents of activations and those of weights, about the last third.
    flops = [program.cost_analysis()["flops"] for program in (less, full)]
    assert flops[0] < 0.8 * flops[1]


@pytest.mark.slow
def test_losses_and_fresh_values_are_of_the_whole_network(params):
    lora = changed(subsets.lora_init(params, jax.random.key(0), rank=1))
    evaluate = jax.jit(lambda params: squares(params).objective)
    merged = evaluate(subsets.lora_merge(params, lora))
    low_rank = subsets.lora_problem(WHOLE)
    part = subsets.subset_problem(WHOLE, "cross-attention")
    for problem, trained, expected in (
        (low_rank, lora, merged),
        (part, params, evaluate(params)),
    ):
        for losses in (problem.losses, problem.fresh):
            found = jax.jit(lambda x, losses=losses: losses(x, params).objective)(trained)
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.abs(merged / evaluate(params) - 1).max() > 0.01
    assert subsets.lora_problem(WHOLE._replace(fresh=None)).fresh is None


def test_lora_starts_at_the_reference(params):
    lora = subsets.lora_init(params, jax.random.key(0), rank=2, part="full")
    merged = subsets.lora_merge(params, lora)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    kernels = {name for name, x in leaves(params).items() if x.ndim > 1}
    assert {name.replace(".lora_A", "") for name in leaves(lora) if "lora_A" in name} == kernels
    conv = lora["conv_in"]
    assert conv["lora_A"]["kernel"].shape == (3, 3, 4, 2)
    assert conv["lora_B"]["kernel"].shape == (1, 1, 2, 8)
    # Uniform on ±1/√(3·3·4): a variance of a third of the square.
    assert jnp.abs(conv["lora_A"]["kernel"]).max() <= 1 / 6
    np.testing.assert_allclose(conv["lora_A"]["kernel"].std(), 1 / 6 / np.sqrt(3), rtol=0.2)
    draws = [np.asarray(x).ravel()[:4] for name, x in leaves(lora).items() if "lora_A" in name]
    assert len(np.unique(np.stack(draws).round(6), axis=0)) == len(draws)


def test_lora_changes_by_rank_and_by_its_part_alone(params):
    lora = changed(subsets.lora_init(params, jax.random.key(0), rank=2, part="cross-attention"))
    labels = leaves(subsets.subset_labels(params, "cross-attention"))
    merged = leaves(subsets.lora_merge(params, lora))
    factors = leaves(lora)
    for name, before in leaves(params).items():
        change = np.asarray(merged[name] - before, np.float64)
        if labels[name] == "frozen" or name.endswith("bias"):
            assert not change.any()
            continue
        sums = np.einsum(
            "ir,ro->io",
            *(factors[name.replace("weight", f"lora_{x}.weight")] for x in "AB"),
        )
        np.testing.assert_allclose(change, sums, atol=1e-6)
        assert np.linalg.matrix_rank(change, tol=1e-4) == 2


@pytest.mark.slow
def test_lora_is_differentiable_alone(params):
    lora = changed(subsets.lora_init(params, jax.random.key(0), rank=1))

    @jax.jit
    def loss(lora):
        prediction = APPLY(subsets.lora_merge(params, lora), *GIVEN)
        return jnp.mean(prediction**2)

    direction = changed(lora, key=4)

    def along(step):
        return loss(jax.tree.map(lambda x, d: x + step * d, lora, direction))

    gradient = jax.grad(loss)(lora)
    assert jax.tree.structure(gradient) == jax.tree.structure(lora)
    slope = sum(
        jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
    )
    np.testing.assert_allclose(slope, (along(1e-3) - along(-1e-3)) / 2e-3, rtol=2e-2)


@pytest.mark.slow
def test_lora_forgets_a_prompt(tmp_path):
    model = load_text_to_image(write_pipeline(tmp_path / "model", xl=True))
    apply, params, schedule, config = model.pretrained
    cat, dog, free = (encode_prompts(model, [text] * 2) for text in ("the cat", "a dog", None))
    batch = Batch(Conditions(dog, dog), Conditions(cat, free, cat, jnp.zeros(2, jnp.int32)))

    whole = reverse_kl(
        apply, schedule, estimator="stop_gradient", shape=config.sample_shape, steps=2
    )
    algorithm = primal_dual(subsets.lora_problem(whole), optax.adam(2e-3), optax.set_to_zero())
    step = jax.jit(algorithm.step)
    lora = subsets.lora_init(params, jax.random.key(0), rank=2)
    state = algorithm.init(lora, [1.0])
    infos = []
    for _ in range(8):
        state, info = step(jax.random.key(1), state, params, batch)
        infos.append(info)
    # At first p is q: its samples of the forgotten prompt are exactly q's. Then it leaves them,
    # and so nears what is held up to it.
    assert infos[0].values[0] == 0
    assert infos[-1].values[0] > 0.01 * infos[0].objective
    assert infos[-1].objective < 0.99 * infos[0].objective


def test_lora_of_another_network_is_refused(params):
    lora = subsets.lora_init(params, jax.random.key(0), rank=1, part="full")
    others = {name: params[name] for name in params if name != "conv_in"}
    with pytest.raises(ValueError, match=r"a conv_in.kernel \(3, 3, 4, 8\), which is not there"):
        subsets.lora_merge(others, lora)
    with pytest.raises(ValueError, match=r"a conv_in.kernel \(3, 3, 4, 8\), which is not there"):
        subsets.lora_merge(params | {"conv_in": {"kernel": jnp.zeros((3, 3, 4, 1))}}, lora)


def test_checkpoints_hold_what_trains(params, tmp_path):
    lora = changed(subsets.lora_init(params, jax.random.key(0), rank=1))
    adam = optax.adam(1e-3)
    for i, (trained, optimizer) in enumerate(
        [(lora, adam), (params, subsets.subset_optimizer(adam, "cross-attention"))]
    ):
        state = PrimalDualState(
            trained, optimizer.init(trained), jnp.ones(1), (), jnp.ones(1), jnp.int32(3)
        )
        checkpoints = Checkpoints(tmp_path / str(i))
        checkpoints.save(state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
        checkpoints.close()
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_saved_lora(params, tmp_path):
    lora = changed(subsets.lora_init(params, jax.random.key(0), rank=2, part="full"))
    subsets.save_lora(tmp_path / "lora", lora)
    saved = safetensors.numpy.load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in saved)
    # In torch's orientation the change of a weight [out, in] is B A.
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    merged = leaves(subsets.lora_merge(params, lora))[f"{name}.weight"]
    down, up = (saved[f"unet.{name}.lora_{x}.weight"] for x in "AB")
    assert down.shape == (2, 16)
    change = merged - leaves(params)[f"{name}.weight"]
    np.testing.assert_allclose(up @ down, change.T, atol=1e-6)
    assert saved["unet.conv_in.lora_A.weight"].shape == (2, 4, 3, 3)
    assert saved["unet.conv_in.lora_B.weight"].shape == (8, 2, 1, 1)
    with pytest.raises(ValueError, match="exists"):
        subsets.save_lora(tmp_path / "lora", lora)
    for path in (tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"):
        read = subsets.load_lora(path, params)
        jax.tree.map(np.testing.assert_array_equal, read, lora)


@pytest.mark.parametrize("base", ["", "owner/name"])
def test_the_header_of_a_lora_says_what_peft_reads(params, tmp_path, base):
    lora = subsets.lora_init(params, jax.random.key(0), rank=2, part="cross-attention-kv")
    subsets.save_lora(tmp_path / "lora", lora, base_model=base)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
        changed = {name.removeprefix("unet.").split(".lora_")[0] for name in opened.keys()}  # noqa: SIM118
    assert metadata.keys() == {"format", "lora_adapter_metadata"}
    assert metadata["format"] == "pt"
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert set(config["unet.target_modules"]) == changed
    assert all(name.endswith(("to_k", "to_v")) for name in changed)
    assert config.get("unet.base_model_name_or_path", "") == base


@pytest.mark.parametrize("change", ["absent", "wider", "narrower"])
def test_a_saved_lora_of_another_base_is_refused(params, tmp_path, change):
    lora = subsets.lora_init(params, jax.random.key(0), rank=2, part="full")
    subsets.save_lora(tmp_path / "lora", lora)
    kernel = params["conv_in"]["kernel"]
    conv_in = {
        "absent": {},
        "wider": {"kernel": jnp.zeros((*kernel.shape[:-1], 9))},
        "narrower": {"kernel": jnp.zeros((3, 3, 1, kernel.shape[-1]))},
    }[change]
    with pytest.raises(ValueError, match=r"no low-rank change of this network.*conv_in"):
        subsets.load_lora(tmp_path / "lora", params | {"conv_in": conv_in})
    with pytest.raises(ValueError, match="has no low-rank change"):
        subsets.load_lora(tmp_path, params)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # Those of peft's own.
@pytest.mark.parametrize(("xl", "part"), [(False, "full"), (True, "cross-attention")])
def test_diffusers_loads_the_lora(tmp_path, part, xl):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pretrained = load_pretrained(write_pipeline(tmp_path / "model", xl=xl))
    lora = changed(subsets.lora_init(pretrained.params, jax.random.key(0), rank=3, part=part))
    subsets.save_lora(tmp_path / "lora", lora, base_model="owner/name")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")

    rng = np.random.default_rng(0)
    x_t = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    hidden = rng.normal(size=(2, 5, 20 if xl else 8)).astype(np.float32)
    added = {
        "text_embeds": rng.normal(size=(2, 10)).astype(np.float32),
        "time_ids": np.tile(np.float32([16, 24, 0, 0, 16, 24]), (2, 1)),
    }

    def theirs():
        with torch.no_grad():
            return pipe.unet(
                torch.tensor(x_t).permute(0, 3, 1, 2),
                torch.tensor([3, 700]),
                torch.tensor(hidden),
                added_cond_kwargs={name: torch.tensor(x) for name, x in added.items()}
                if xl
                else None,
            ).sample.permute(0, 2, 3, 1)

    before = theirs()
    pipe.load_lora_weights(tmp_path / "lora")
    (read,) = pipe.unet.peft_config.values()
    assert (read.r, read.lora_alpha, read.base_model_name_or_path) == (3, 3, "owner/name")
    cond = {"encoder_hidden_states": hidden} | added if xl else hidden

    @jax.jit
    def apply(lora, *inputs):
        return pretrained.apply(subsets.lora_merge(pretrained.params, lora), *inputs)

    ours = apply(lora, x_t, np.array([3, 700]), cond)
    np.testing.assert_allclose(ours, theirs(), atol=1e-4)
    assert np.abs(ours - before.numpy()).max() > 0.01
    pipe.fuse_lora()
    np.testing.assert_allclose(ours, theirs(), atol=1e-4)
