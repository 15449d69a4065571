import dataclasses
import fnmatch
import json
import os
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from parity import TOLERANCE, relative_error
from pipelines import SCHEDULER, UNET, UNET_XL, write_pipeline

from jax_unlearn import samplers
from jax_unlearn.pretrained import load_pretrained, save_pretrained, save_unet
from jax_unlearn.pretrained.text_to_image import (
    decode_latents,
    encode_images,
    encode_prompts,
    is_text_to_image,
    load_text_to_image,
)
from jax_unlearn.schedules import from_diffusers

PROMPTS = ["the cat", "a dog!"]
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "stable_diffusion"
SDXL = FIXTURES / "unet" / "stable-diffusion-xl-base-1.0"


def assert_same(params, other):
    jax.tree.map(np.testing.assert_array_equal, params, other)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {xl: write_pipeline(root / ("xl" if xl else "sd"), xl=xl) for xl in (False, True)}


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def xl(request):
    return request.param


@pytest.fixture(scope="module")
def model(folders, xl):
    return load_text_to_image(folders[xl])


@pytest.fixture
def folder(folders, tmp_path):
    return pathlib.Path(shutil.copytree(folders[False], tmp_path / "copy"))


def prediction(pretrained, cond):
    rows = len(jax.tree.leaves(cond)[0])
    noise = jax.random.normal(jax.random.key(0), (rows, *pretrained.config.sample_shape))
    return jax.jit(pretrained.apply)(pretrained.params, noise, jnp.arange(rows), cond)


def perturbed(pretrained):
    return pretrained._replace(params=jax.tree.map(lambda x: 1.1 * x + 0.01, pretrained.params))


@pytest.mark.slow
def test_denoiser_takes_encoded_prompts(model, folders, xl):
    pretrained = load_pretrained(folders[xl])
    assert_same(pretrained.params, model.pretrained.params)
    assert pretrained.apply == model.pretrained.apply
    assert pretrained.config.sample_shape == (8, 8, 4)
    assert pretrained.config.num_labels == 0
    assert model.image_shape == (16, 16, 3)
    cond = encode_prompts(model, PROMPTS)
    both = prediction(pretrained, cond)
    assert both.shape == (2, 8, 8, 4)
    # It listens: other prompts give other predictions, and rows do not mix.
    swapped = prediction(pretrained, encode_prompts(model, ["the cat", "the cat"]))
    np.testing.assert_allclose(both[0], swapped[0], atol=1e-5)
    assert np.abs(both[1] - swapped[1]).max() > 1e-3


def test_no_prompt(model, xl):
    none, empty = (encode_prompts(model, [given]) for given in (None, ""))
    if not xl:
        np.testing.assert_array_equal(none, empty)
        return
    zeros = {"encoder_hidden_states": (1, 77, 20), "text_embeds": (1, 10)}
    for name, shape in zeros.items():
        np.testing.assert_array_equal(none[name], np.zeros(shape))
        assert np.abs(empty[name]).min() > 0
    np.testing.assert_array_equal(none["time_ids"], [[16, 16, 0, 0, 16, 16]])
    sized = encode_prompts(model, PROMPTS, image_size=(24, 8))
    np.testing.assert_array_equal(sized["time_ids"], [[24, 8, 0, 0, 24, 8]] * 2)
    config = model.pretrained.config
    config = dataclasses.replace(
        config, pipeline=config.pipeline | {"force_zeros_for_empty_prompt": False}
    )
    kept = encode_prompts(
        model._replace(pretrained=model.pretrained._replace(config=config)), [None]
    )
    np.testing.assert_array_equal(kept["text_embeds"], empty["text_embeds"])


def test_one_text_is_no_sequence(model):
    with pytest.raises(ValueError, match=r"pass \['cat'\]"):
        encode_prompts(model, "cat")


@pytest.mark.slow
def test_latents_are_scaled(model):
    images = jnp.linspace(-1, 1, 2 * 16 * 16 * 3).reshape(2, 16, 16, 3)
    variables = {"params": model.vae.params}
    posterior = model.vae.module.apply(variables, images, method="encode")
    latents = encode_images(model, images)
    np.testing.assert_allclose(latents, 0.5 * posterior.mean, atol=1e-5)
    drawn = encode_images(model, images, jax.random.key(1))
    noise = (drawn - latents) / (0.5 * jnp.exp(0.5 * posterior.logvar))
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.2
    decoded = model.vae.module.apply(variables, posterior.mean, method="decode")
    np.testing.assert_allclose(decode_latents(model, latents), decoded, atol=1e-4)
    assert decoded.shape == images.shape


@pytest.mark.slow
@pytest.mark.parametrize("hard_links", [False, True])
def test_saved_pipeline_has_every_part(folders, xl, tmp_path, hard_links):
    pretrained = perturbed(load_pretrained(folders[xl]))
    save_pretrained(tmp_path / "saved", pretrained, hard_links=hard_links)
    before, after = (
        {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
        for root in (folders[xl], tmp_path / "saved")
    )
    assert before.keys() | {"model.sha256"} == after.keys()
    for name, path in before.items():
        if name.endswith("json"):
            assert (
                json.loads(path.read_text()).items() <= json.loads(after[name].read_text()).items()
            )
        else:
            changed = name.startswith("unet/")
            assert (path.read_bytes() != after[name].read_bytes()) == changed
            assert path.samefile(after[name]) == (hard_links and not changed)
    loaded = load_text_to_image(tmp_path / "saved")
    assert_same(pretrained.params, loaded.pretrained.params)
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_saving_over_the_source(folder):
    pretrained = perturbed(load_pretrained(folder))
    save_pretrained(folder, pretrained, overwrite=True)
    assert_same(pretrained.params, load_text_to_image(folder).pretrained.params)
    assert list(folder.parent.iterdir()) == [folder]


def test_only_what_is_read_is_copied(folder, tmp_path):
    vae, encoder = folder / "vae", folder / "text_encoder"
    shutil.copy(
        vae / "diffusion_pytorch_model.safetensors", vae / "diffusion_pytorch_model.zz.safetensors"
    )
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"everything again")
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    named = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    (vae / "diffusion_pytorch_model.zz.safetensors").write_bytes(b"damaged")
    save_pretrained(tmp_path / "saved", load_pretrained(folder))
    parts = {
        str(path.relative_to(tmp_path / "saved")): path
        for path in (tmp_path / "saved").rglob("*")
        if path.suffix not in (".json", ".txt", ".sha256", "")
    }
    assert parts.keys() == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert parts["vae/diffusion_pytorch_model.safetensors"].read_bytes() == named


def test_failed_saves_leave_nothing(folder, tmp_path, monkeypatch):
    pretrained = load_pretrained(folder)

    def fail(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(ValueError, match=r"cross-device link\): save without hard_links"):
        save_pretrained(tmp_path / "saved", pretrained, hard_links=True)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="copy/vae, which the model was loaded with, is gone"):
        save_pretrained(tmp_path / "saved", pretrained)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no such folder"):
        save_pretrained(tmp_path / "saved", pretrained)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("FluxPipeline", {"transformer": ["diffusers", "FluxTransformer2DModel"]}),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3Transformer2DModel"]}),
        ("TextToVideoSDPipeline", {}),
        ("StableDiffusionInpaintPipeline", {}),
    ],
)
def test_other_pipelines_are_refused(folder, kind, parts):
    edit_json(folder / "model_index.json", _class_name=kind, **parts)
    for load in (load_pretrained, load_text_to_image):
        with pytest.raises(
            ValueError, match=f"is a {kind} with .* expected one of Stable"
        ) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_labels_are_no_text(tiny_model):
    with pytest.raises(
        ValueError, match="model is not conditioned on text: expected one of Stable"
    ):
        load_text_to_image(tiny_model)


def test_networks_that_also_take_images_are_refused(tmp_path):
    write_pipeline(tmp_path / "model", unet={"in_channels": 9})
    with pytest.raises(ValueError, match="in_channels 9 and out_channels 4 differ: .* inpainting"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_parts_are_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(
        ValueError, match=rf"StableDiffusionPipeline without the folders \['{part}'\]"
    ):
        load_pretrained(folder)
    edit_json(folder / "model_index.json", **{part: [None, None]})
    with pytest.raises(ValueError, match=rf"model_index.json does not name \['{part}'\]"):
        load_pretrained(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_refused(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=f"{part} has only pickled weights") as caught:
        load_text_to_image(folder)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ a UNet alone


@pytest.fixture
def alone(folders, xl, tmp_path):
    """The UNet of a pipeline, in a folder that nothing lies beside."""
    return pathlib.Path(shutil.copytree(folders[xl] / "unet", tmp_path / "alone"))


def weights(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def test_a_unet_alone_is_that_of_its_pipeline(model, folders, xl):
    found = load_pretrained(folders[xl] / "unet")
    assert_same(found.params, model.pretrained.params)
    assert found.apply == model.pretrained.apply
    assert hash(found.apply) == hash(model.pretrained.apply)
    np.testing.assert_array_equal(found.schedule.log_snr, model.pretrained.schedule.log_snr)
    assert found.config.scheduler == SCHEDULER
    assert found.config.sample_shape == (8, 8, 4)
    assert found.config.num_labels == 0
    assert found.config.text_conditional
    assert found.config.pipeline == {}
    cond = encode_prompts(model, PROMPTS)
    np.testing.assert_array_equal(prediction(found, cond), prediction(model.pretrained, cond))


def test_a_unet_alone_equals_torch():
    # Written by torch, with what torch's network makes of the same inputs.
    given = dict(np.load(SDXL / "expected.npz"))
    found = load_pretrained(SDXL, scheduler={"prediction_type": "v_prediction"})
    assert found.schedule.prediction_type == "v_prediction"
    cond = {name: given[name] for name in ("encoder_hidden_states", "text_embeds", "time_ids")}
    x_t, t = (given[name] for name in list(given)[:2])
    actual = jax.jit(found.apply)(found.params, x_t, t, cond)
    assert relative_error(actual, given["output"]) < TOLERANCE


@pytest.mark.slow
def test_a_unet_alone_needs_a_scheduler(alone, folders, xl):
    with pytest.raises(
        ValueError, match="alone is a UNet2DConditionModel without .* pass scheduler="
    ) as caught:
        load_pretrained(alone)
    assert "\n" not in str(caught.value)
    noise = from_diffusers(SCHEDULER).log_snr
    scheduler = folders[xl] / "scheduler"
    for given in (folders[xl], scheduler, scheduler / "scheduler_config.json", SCHEDULER):
        found = load_pretrained(alone, scheduler=given)
        np.testing.assert_array_equal(found.schedule.log_snr, noise)
        assert found.config.scheduler == SCHEDULER
    (alone / "scheduler").mkdir()
    for place in (alone, alone / "scheduler"):
        shutil.copy(scheduler / "scheduler_config.json", place)
        np.testing.assert_array_equal(load_pretrained(alone).schedule.log_snr, noise)
        (place / "scheduler_config.json").unlink()
    given = {"beta_schedule": "squaredcos_cap_v2"}
    found = load_pretrained(folders[xl] / "unet", scheduler=given)
    np.testing.assert_array_equal(found.schedule.log_snr, from_diffusers(given).log_snr)


@pytest.mark.slow
def test_a_unet_alone_is_saved_alone(alone, tmp_path):
    found = perturbed(load_pretrained(alone, scheduler=SCHEDULER))
    save_pretrained(tmp_path / "saved", found)
    files = {
        str(path.relative_to(tmp_path / "saved"))
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    network = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files == network | {"scheduler/scheduler_config.json", "model.sha256"}
    again = load_pretrained(tmp_path / "saved")
    assert_same(again.params, found.params)
    assert again.apply == found.apply
    assert again.config.scheduler == SCHEDULER
    save_pretrained(tmp_path / "saved", perturbed(again), overwrite=True)
    assert_same(load_pretrained(tmp_path / "saved").params, perturbed(again).params)

    save_unet(tmp_path / "unet", found)
    assert {path.name for path in (tmp_path / "unet").iterdir()} == network | {"model.sha256"}
    given = tmp_path / "saved"
    assert_same(load_pretrained(tmp_path / "unet", scheduler=given).params, found.params)


def test_variants_and_shards_of_a_unet_alone(alone):
    tensors = safetensors.numpy.load_file(weights(alone))
    half = {name: values.astype(np.float16) for name, values in tensors.items()}
    safetensors.numpy.save_file(half, alone / "diffusion_pytorch_model.fp16.safetensors")
    whole = load_pretrained(alone, scheduler=SCHEDULER).params
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), whole)
    assert_same(load_pretrained(alone, scheduler=SCHEDULER, variant="fp16").params, rounded)

    weights(alone).unlink()
    weight_map = {}
    for shard in (1, 2):
        name = f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard - 1 :: 2]}
        safetensors.numpy.save_file(part, alone / name)
        weight_map |= dict.fromkeys(part, name)
    index = alone / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_pretrained(alone, scheduler=SCHEDULER).params, whole)
    (alone / name).unlink()
    with pytest.raises(ValueError, match="is not a file beside it"):
        load_pretrained(alone, scheduler=SCHEDULER)


def test_a_unet_alone_is_no_pipeline(alone, folders, xl, tiny_model):
    for path in (alone, folders[xl] / "unet"):
        with pytest.raises(
            ValueError, match="has no model_index.json, .* expected the folder of one of Stable"
        ) as caught:
            load_text_to_image(path)
        assert "\n" not in str(caught.value)
        assert is_text_to_image(path)
    assert is_text_to_image(folders[xl])
    assert not is_text_to_image(tiny_model)
    assert not is_text_to_image(tiny_model / "unet")
    assert not is_text_to_image(folders[xl] / "vae")
    assert not is_text_to_image(folders[xl] / "scheduler")


def test_a_unet_alone_takes_no_labels(folders, xl):
    found = load_pretrained(folders[xl] / "unet")
    x_t = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    for cond in (None, jnp.array([0, 1])):
        with pytest.raises(ValueError, match="cond must be a|the hidden states of the text must"):
            jax.eval_shape(found.apply, found.params, x_t, jnp.array([1, 2]), cond)


def test_a_unet_alone_that_also_takes_images_is_refused(alone):
    edit_json(alone / "config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"config.json: in_channels 9 .* differ: .* inpainting"):
        load_pretrained(alone, scheduler=SCHEDULER)


def test_a_unet_alone_on_the_hub(monkeypatch, alone):
    calls = []

    def fetch(name, *, revision, allow_patterns):
        calls.append((name, allow_patterns))
        return str(alone)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="owner/name is a UNet2DCond.* pass scheduler="):
        load_pretrained("owner/name")
    # Nothing large for a model without its noise.
    assert calls == [("owner/name", ["*.json", "README.md"])]
    found = load_pretrained("owner/name", scheduler=SCHEDULER)
    assert found.config.source == "owner/name"
    (alone / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    calls.clear()
    load_pretrained(alone, scheduler="owner/pipeline")
    assert calls == [("owner/pipeline", ["*.json", "README.md"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("xl", "changes", "message"),
    [
        (False, {"vae": {"latent_channels": 3}}, "make 3 channels of the latents, .* takes 4"),
        (False, {"text_encoder": {"hidden_size": 10}}, "make 10 channels of the enc.* takes 8"),
        (True, {"text_encoder_2": {"projection_dim": 7}}, "make 55 values of the .* takes 58"),
        (True, {"unet": UNET | {"cross_attention_dim": 20, "addition_embed_type": None}},
         "the unet takes None"),
        (False, {"unet": UNET_XL | {"cross_attention_dim": 8}}, "the unet takes text_time"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(tmp_path, xl, changes, message):
    write_pipeline(tmp_path / "model", xl=xl, **changes)
    with pytest.raises(ValueError, match=message):
        load_text_to_image(tmp_path / "model")


@pytest.mark.slow
def test_hub_fetches_parts_when_they_are_read(monkeypatch, folder, tmp_path):
    calls = []

    def fetch(name, *, revision, allow_patterns):
        calls.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = load_pretrained("owner/name")
    assert not any(pattern.startswith(("vae", "text")) for call in calls for pattern in call)
    calls.clear()
    save_pretrained(tmp_path / "saved", loaded)
    assert {"vae/*.safetensors", "tokenizer/*.txt"} <= set(calls[-1])
    calls.clear()
    load_text_to_image("owner/name")
    assert calls[0] == ["*.json", "README.md"]
    assert {"vae/*.safetensors", "tokenizer/merges.txt"} <= set(calls[-1])
    assert not any(pattern.endswith(".bin") for call in calls for pattern in call)
    with pytest.raises(ValueError, match="no weights of variant 'fp16'"):
        load_pretrained("owner/name", variant="fp16")
    names = [
        f"unet/diffusion_pytorch_model{part}" for part in (".fp16", "", ".fp16-00001-of-00002")
    ]
    wanted = [
        any(fnmatch.fnmatch(f"{name}.safetensors", pattern) for pattern in calls[-1])
        for name in names
    ]
    assert wanted == [True, False, True]


# ------------------------------------------------------------------ diffusers


@pytest.fixture(scope="module")
def written_by_torch(folders, xl, tmp_path_factory):
    """The same networks as diffusers writes them, so that its files are read too."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("torch") / "pipeline"
    diffusers.DiffusionPipeline.from_pretrained(folders[xl]).save_pretrained(folder)
    return folder


@pytest.mark.torch
def test_prompts_as_diffusers_encodes_them(written_by_torch, xl):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    model = load_text_to_image(written_by_torch)
    pipe = diffusers.DiffusionPipeline.from_pretrained(written_by_torch)
    assert type(pipe).__name__ == model.pretrained.config.pipeline["_class_name"]
    with torch.no_grad():
        found = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    cond, free = encode_prompts(model, PROMPTS), encode_prompts(model, [None] * 2)
    ours = (cond, free)
    if xl:
        ours = [pair[name] for name in ("encoder_hidden_states", "text_embeds") for pair in ours]
    for mine, theirs in zip(ours, found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.torch
def test_latents_as_diffusers_has_them(written_by_torch):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    model = load_text_to_image(written_by_torch)
    pipe = diffusers.DiffusionPipeline.from_pretrained(written_by_torch)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = pipe.vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mean
        theirs = theirs * pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample
    ours = encode_images(model, images)
    assert relative_error(ours, theirs.permute(0, 2, 3, 1)) < 1e-5
    assert relative_error(decode_latents(model, ours), decoded.permute(0, 2, 3, 1)) < 1e-5


@pytest.mark.slow
@pytest.mark.torch
def test_diffusers_draws_the_same_from_what_is_saved(written_by_torch, tmp_path, xl):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    model = load_text_to_image(written_by_torch)
    pretrained = perturbed(model.pretrained)
    save_pretrained(tmp_path / "saved", pretrained)
    noise = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)

    kind = getattr(diffusers, pretrained.config.pipeline["_class_name"])
    pipe = kind.from_pretrained(tmp_path / "saved")
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=4.0,
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        output_type="latent",
    ).images.permute(0, 2, 3, 1)

    @jax.jit
    def draw(params, cond, free):
        predict = samplers.guided(pretrained.apply, params, cond, unconditional=free, scale=4.0)
        key = jax.random.key(0)
        return samplers.sample(predict, pretrained.schedule, key, jnp.asarray(noise), steps=10).x_0

    cond, free = encode_prompts(model, PROMPTS), encode_prompts(model, [None] * 2)
    ours = draw(pretrained.params, cond, free)
    assert relative_error(ours, theirs) < 1e-4
    # And not those of the model before.
    assert relative_error(draw(model.pretrained.params, cond, free), theirs) > 1e-2


@pytest.mark.torch
def test_diffusers_opens_a_unet_alone(written_by_torch, tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    model = load_text_to_image(written_by_torch)
    found = perturbed(load_pretrained(written_by_torch / "unet"))
    save_pretrained(tmp_path / "saved", found)
    save_unet(tmp_path / "unet", found)
    cond = encode_prompts(model, PROMPTS)
    ours = prediction(found, cond)
    x_t = jax.random.normal(jax.random.key(0), ours.shape)  # as `prediction` draws it
    given = cond if isinstance(cond, dict) else {"encoder_hidden_states": cond}
    x_t, *rest = (torch.tensor(np.asarray(values)) for values in (x_t, *given.values()))
    text, *added = rest
    added = dict(zip(list(given)[1:], added, strict=True)) or None
    for place in ("saved", "unet"):
        network = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / place)
        with torch.no_grad():
            theirs = network(
                x_t.permute(0, 3, 1, 2), torch.arange(2), text, added_cond_kwargs=added
            ).sample.permute(0, 2, 3, 1)
        assert relative_error(ours, theirs) < TOLERANCE
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    np.testing.assert_allclose(
        scheduler.alphas_cumprod, found.schedule.alphas_cumprod, rtol=1e-4, atol=1e-6
    )


@pytest.mark.torch
@pytest.mark.parametrize(("variant", "sharded"), [(None, True), ("fp16", False), ("fp16", True)])
def test_what_diffusers_saves_of_a_unet_alone_loads(tmp_path, variant, sharded):
    diffusers = pytest.importorskip("diffusers")
    options = {name: value for name, value in UNET.items() if name[0] != "_"}
    network = diffusers.UNet2DConditionModel(**options)
    size = {"max_shard_size": "20KB"} if sharded else {}
    network.save_pretrained(tmp_path, variant=variant, **size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    found = load_pretrained(tmp_path, scheduler=SCHEDULER, variant=variant)
    expected = network.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found.params["conv_in"]["kernel"], expected)
