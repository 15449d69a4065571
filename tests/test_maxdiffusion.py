"""maxdiffusion's checkpoints against the diffusers folders of the same weights."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from maxdiffusion_checkpoints import configs, flax_params, states, write_checkpoint
from pipelines import write_pipeline

from jax_unlearn.app import cli
from jax_unlearn.pretrained import (
    load_pretrained,
    load_text_to_image,
    save_maxdiffusion,
    save_pretrained,
)
from jax_unlearn.pretrained.clip_tokenizer import read_tokenizer
from jax_unlearn.pretrained.digests import folder_digests
from jax_unlearn.pretrained.hub import find_model
from jax_unlearn.pretrained.text_to_image import encode_prompts, is_text_to_image

SD2 = {
    "unet": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
    "text_encoder": {"hidden_act": "gelu"},
}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def halved(params):
    """As saved with `weights_dtype: bfloat16`."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def spread(params):
    """As saved by a run over several devices: split along the last axis where it divides."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))

    def put(leaf):
        last = "fsdp" if leaf.shape[-1] % 2 == 0 else None
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), last)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, params)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jax_unlearn" / "maxdiffusion"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    made = {
        "sd1": write_pipeline(root / "sd1"),
        "sd2": write_pipeline(root / "sd2", **SD2),
        "xl": write_pipeline(root / "xl", xl=True),
    }
    path = made["sd2"] / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return made


@pytest.fixture(scope="module")
def models(folders):
    return {kind: load_text_to_image(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """A checkpoint of Stable Diffusion 1 at step 40."""
    return write_checkpoint(tmp_path_factory.mktemp("sd1") / "run", folders["sd1"], step=40)


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def networks(model):
    return [(model.pretrained.apply, model.pretrained.params)] + [
        (network.module, network.params) for network in (model.vae, *model.text_encoders)
    ]


def assert_same(model, other, rounded=lambda leaf: leaf):
    for (module, params), (expected, values) in zip(networks(model), networks(other), strict=True):
        assert module == expected
        assert jax.tree.structure(params) == jax.tree.structure(values)
        jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(rounded, values))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.pretrained.params)} == {jnp.dtype("f4")}
    for name in ("alphas_cumprod", "prediction_type"):
        found = getattr(model.pretrained.schedule, name)
        np.testing.assert_array_equal(found, getattr(other.pretrained.schedule, name))


def assert_same_unet(path, model, rounded=lambda leaf: leaf):
    params, expected = load_pretrained(f"maxdiffusion:{path}").params, model.pretrained.params
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(rounded, expected))


def fetched(path, *parts):
    """The folder that a checkpoint is converted into, with some of its parts."""
    found = find_model(f"maxdiffusion:{path}")
    found.fetch([f"{part}/*" for part in parts])
    return found.folder


def refused(path, message, *parts):
    with pytest.raises(ValueError, match=message) as caught:
        fetched(path, *parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "save", "put"),
    [
        ("sd1", ocp.args.PyTreeSave, None),
        ("sd2", ocp.args.StandardSave, halved),
        ("xl", ocp.args.PyTreeSave, spread),
    ],
)
def test_it_is_the_diffusers_folder_of_the_same_weights(folders, models, tmp_path, kind, save, put):
    put = put or (lambda params: params)
    path = write_checkpoint(tmp_path / "run", folders[kind], save=save, put=put)
    assert is_text_to_image(f"maxdiffusion:{path}")
    model, other = load_text_to_image(f"maxdiffusion:{path}"), models[kind]
    if put is halved:
        assert_same(model, other, lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32))
        return
    assert_same(model, other)
    # The second of SDXL's tokenizers pads in another way than the first.
    prompts = ["the cat", None]
    given, expected = encode_prompts(model, prompts), encode_prompts(other, prompts)
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    noise = jax.random.normal(jax.random.key(0), (2, *other.pretrained.config.sample_shape))
    found, wanted = (
        jax.jit(one.pretrained.apply)(one.pretrained.params, noise, jnp.arange(2), given)
        for one in (model, other)
    )
    np.testing.assert_array_equal(found, wanted)


def test_the_saved_model_is_diffusers(models, saved, tmp_path):
    pretrained = load_pretrained(f"maxdiffusion:{saved}")
    for name, one in (("from", pretrained), ("as", models["sd1"].pretrained)):
        save_pretrained(tmp_path / name, one)
    files = {path.relative_to(tmp_path / "as") for path in (tmp_path / "as").rglob("*")}
    assert {path.relative_to(tmp_path / "from") for path in (tmp_path / "from").rglob("*")} == files
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    for path in files:
        if path.suffix in (".safetensors", ".txt"):
            assert (tmp_path / "from" / path).read_bytes() == (tmp_path / "as" / path).read_bytes()


def test_the_latest_step_is_taken_or_the_one_that_is_named(folders, models, copy):
    write_checkpoint(
        copy, folders["sd1"], step=100, put=lambda params: jax.tree.map(lambda x: 2 * x, params)
    )
    (copy / "700.orbax-checkpoint-tmp-3").mkdir()
    assert_same_unet(copy, models["sd1"], lambda leaf: 2 * leaf)
    assert_same_unet(copy / "40", models["sd1"])


def test_nothing_is_converted_before_it_is_asked_for_nor_twice(saved, cache, monkeypatch):
    found = find_model(f"maxdiffusion:{saved}")
    assert found.folder.parent == cache
    assert not list(found.folder.rglob("*.safetensors"))
    found.fetch(["vae/*.safetensors", "model*.safetensors"])
    assert [path.parent.name for path in found.folder.rglob("*.safetensors")] == ["vae"]
    parts = "text_encoder", "tokenizer", "vae"
    before = folder_digests(fetched(saved, *parts))
    assert len(before) == 11
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "PyTreeCheckpointHandler", None)
        assert folder_digests(fetched(saved, *parts)) == before
    # Elsewhere, and at another time, it is the same model.
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    other = fetched(shutil.copytree(saved, cache / "run"), *parts)
    assert other != found.folder
    assert folder_digests(other) == before
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_the_optimizer_is_not_read(folders, models, copy):
    """In the layout without OCDBT, where each array has files of its own that can be broken."""
    item = copy / "40" / "unet_state"
    shutil.rmtree(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
        writer.save(item.absolute(), args=ocp.args.PyTreeSave(states(folders["sd1"])["unet"]))
    moments = [path for path in item.glob("opt_state.0.*/*") if path.name != ".zarray"]
    assert len(moments) > 100
    for path in moments:
        path.write_bytes(b"broken")
    assert_same_unet(copy, models["sd1"])


@pytest.mark.parametrize("kind", ["sd2", "xl"])
def test_writing_is_the_inverse_of_reading(folders, models, tmp_path, kind):
    save_maxdiffusion(tmp_path / "out", models[kind].pretrained)
    model = load_text_to_image(f"maxdiffusion:{tmp_path / 'out'}")
    assert_same(model, models[kind])
    tokens = [[one(["the cat"]) for one in each.tokenizers] for each in (model, models[kind])]
    np.testing.assert_array_equal(*tokens)
    parts = [part for part in PARTS if (folders[kind] / part).is_dir()]
    written = configs(folders[kind], parts, "")
    for part in parts:
        path = tmp_path / "out" / "0" / f"{part}_config" / "metadata"
        found = json.loads((folders[kind] / part / "config.json").read_text())
        if "_class_name" in found:
            found["_class_name"] = written[part]["_class_name"]
        assert json.loads(path.read_text()) == found

    # As maxdiffusion restores it: whole states to train on, and parameters alone to sample from.
    wanted = states(folders[kind])
    with ocp.CheckpointManager(
        tmp_path / "out", item_names=[f"{part}_state" for part in parts]
    ) as manager:
        assert manager.latest_step() == 0
        for part in parts:
            abstract = jax.eval_shape(lambda part=part: wanted[part])
            item = {f"{part}_state": ocp.args.PyTreeRestore(item=abstract)}
            found = manager.restore(0, args=ocp.args.Composite(**item))[f"{part}_state"]
            jax.tree.map(np.testing.assert_array_equal, found, wanted[part])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        flax_params(folders[kind], "unet"),
    )
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(
            tmp_path / "out" / "0" / "unet_state",
            item={"params": abstract},
            transforms={},
            restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract)},
        )["params"]
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {device}
    jax.tree.map(np.testing.assert_array_equal, found, flax_params(folders[kind], "unet"))
    named = json.loads((tmp_path / "out" / "0" / "tokenizer_config" / "metadata").read_text())
    assert pathlib.Path(named["path"], "tokenizer", "merges.txt").is_file()


def test_what_maxdiffusion_has_not_is_not_written(tiny_model, models, tmp_path):
    out, pretrained = tmp_path / "out", models["sd1"].pretrained
    with pytest.raises(ValueError, match="no such model: expected one of StableDiffusionPipeline"):
        save_maxdiffusion(out, load_pretrained(tiny_model))
    unet = pretrained.config.unet | {"act_fn": "gelu", "upcast_attention": True}
    odd = dataclasses.replace(pretrained.config, unet=unet)
    with pytest.raises(ValueError, match=r"has not this model's options \['act_fn'\]"):
        save_maxdiffusion(out, pretrained._replace(config=odd))
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, pretrained.params)
    with pytest.raises(ValueError, match="cannot be saved: .* not finite"):
        save_maxdiffusion(out, pretrained._replace(params=params))
    assert not out.exists()
    save_maxdiffusion(out, pretrained)
    with pytest.raises(ValueError, match="exists"):
        save_maxdiffusion(out, pretrained)
    save_maxdiffusion(out, pretrained, overwrite=True)


def test_tokenizers_are_looked_for_beside_the_step_first(folders, copy):
    described = copy / "40" / "tokenizer_config" / "metadata"

    def length():
        return read_tokenizer(fetched(copy, "tokenizer") / "tokenizer").length

    for named in ("gs://bucket/model", "/nowhere", None):
        described.write_text(json.dumps({"path": named}))
        refused(copy, "names its tokenizer as .*: put the folder `tokenizer` of its", "tokenizer")
    for named in (folders["sd1"], folders["sd1"] / "tokenizer"):
        described.write_text(json.dumps({"path": str(named)}))
        assert length() == 77
    shutil.copytree(folders["sd1"] / "tokenizer", copy / "tokenizer")
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 50}))
    assert length() == 50


def test_a_tokenizer_on_the_hub_is_fetched(folders, copy, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, *, revision, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folders["sd1"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    path = copy / "40" / "tokenizer_config" / "metadata"
    path.write_text(json.dumps({"path": "owner/name"}))
    assert read_tokenizer(fetched(copy, "tokenizer") / "tokenizer").length == 77
    assert {name for name, _ in asked} == {"owner/name"}
    assert "tokenizer/merges.txt" in asked[-1][1]
    assert not [one for one in asked[-1][1] if "safetensors" in one]


def without(*items):
    return lambda step: [shutil.rmtree(step / item) for item in items]


def described(part, **changes):
    def change(step):
        path = step / f"{part}_config" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def restated(change):
    """Another tree in place of the state of the autoencoder."""

    def write(step):
        folder = json.loads((step / "tokenizer_config" / "metadata").read_text())["path"]
        shutil.rmtree(step / "vae_state")
        with ocp.PyTreeCheckpointer() as writer:
            tree = {"params": flax_params(pathlib.Path(folder), "vae")}
            writer.save(step / "vae_state", change(tree))

    return write


def with_params(change):
    return lambda tree: {**tree, "params": change(tree["params"])}


def cut(step):
    for path in (step / "vae_state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-20])


def linked(step):
    path = next(path for path in (step / "unet_state").rglob("*") if path.is_file())
    target = step.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "has no checkpoint of maxdiffusion's: expected folders named by their"),
        (without("vae_state"), r"has no vae_state: expected a Stable Diffusion 1, 2 or XL that"),
        (without("unet_config", "unet_state"), "has no unet_config, unet_state: expected a Stable"),
        (described("unet", _class_name="FluxTransformer"), "of class 'FluxTransformer': expected"),
        (described("unet", lora_rank=4), r"unknown UNet2DConditionModel options \['lora_rank'\]"),
        (described("vae", block_out_channels=[4, 16]), r"vae_state: .* \d+ misshapen \("),
        (described("text_encoder", num_hidden_layers=4), r"text_encoder_state: .* missing \(text_"),
        (
            described("text_encoder", num_hidden_layers=2),
            "text_encoder_state: .* of no parameter",
        ),
        (restated(lambda tree: tree["params"]), "vae_state: no train state with params can"),
        (
            restated(with_params(lambda tree: tree | {"lora-a": {"kernel": np.ones(2)}})),
            r"vae_state: its params do not fit its configuration: 1 of no parameter \(lora-a/ker",
        ),
        (
            restated(with_params(lambda t: t | {"quant_conv": {"kernel": 1, "bias": 2}})),
            r"vae_state: .*2 misshapen \(quant_conv/bias \[\] instead.*; 2 not of floats \(quant",
        ),
        (
            restated(with_params(lambda t: jax.tree.map(lambda x: x * np.nan, t))),
            "vae_state: these parameters cannot be saved: .* not finite",
        ),
        (cut, "vae_state: no train state with params can be read: "),
        (linked, "is a link, or no file: put a copy there"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(copy, damage, message):
    damage(copy / "40")
    refused(copy, message, *(part for part in PARTS if f"{part}_state" in message))


def test_no_folder(saved, tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", "nowhere is no folder: maxdiffusion: takes that of its checkp")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "12").symlink_to(saved / "40")
    refused(tmp_path / "run", "12 is a link: give maxdiffusion: the folder that it leads to")
    with pytest.raises(ValueError, match="only a name on the hub has revisions"):
        load_text_to_image(f"maxdiffusion:{saved}", revision="40")
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved / "40" / "_CHECKPOINT_METADATA"))
    refused(saved, "cannot be written: Not a directory. Set XDG_CACHE_HOME to another folder")


def test_a_model_of_labels_is_refused_before_the_run(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["concept", "--model", str(tiny_model), "--out", str(out), "--forget", "cat"]
    assert cli.main([*arguments, "--save", "maxdiffusion"]) == 2
    assert "maxdiffusion has no such model" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_run_in_and_out(folders, saved, tmp_path):
    sizes = [
        "--steps=1", "--batch-size=8", "--forget-batch-size=8", "--samples=2", "--sampling-steps=2",
        "--evaluation-images=16", "--chain-steps=2", "--forget=cat", "--retain=dog",
        "--threshold=2x",
    ]  # fmt: skip
    digests = {}
    for name, model in (("in", f"maxdiffusion:{saved}"), ("folder", folders["sd1"])):
        out = tmp_path / name
        arguments = ["concept", "--model", str(model), "--out", str(out), *sizes]
        assert cli.main([*arguments, "--save=maxdiffusion"]) == 0
        assert (out / "model" / "0" / "unet_state" / "_METADATA").is_file()
        run = json.loads((out / "run.json").read_text())
        assert "unet/config.json" in run["identity"]["model"]["files"]
        digests[name] = run["identity"]["model"]["parameters"]
        card = (out / "model" / "README.md").read_text()
        assert 'load_text_to_image("maxdiffusion:PATH OF THIS MODEL")' in card
        assert str(tmp_path) not in card
        assert cli.main(["verify", str(out)]) == 0
    assert digests["in"] == digests["folder"]
    first, second = (
        load_text_to_image(f"maxdiffusion:{tmp_path / name / 'model'}") for name in digests
    )
    assert_same(first, second)
    # Once more, on what was saved.
    arguments = [f"--model=maxdiffusion:{tmp_path / 'in' / 'model'}", "--samples=1", "--steps=2"]
    grid = tmp_path / "grid.png"
    assert cli.main(["sample", *arguments, "--prompts=a cat", f"--out={grid}"]) == 0
    assert grid.is_file()
