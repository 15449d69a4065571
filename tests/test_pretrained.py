import json
import pathlib
import pickle
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jax_unlearn.pretrained.weights as stored
from jax_unlearn.models.unet_2d import UNet2DConfig, init_params
from jax_unlearn.pretrained import (
    Pretrained,
    PretrainedConfig,
    UNet2DDenoiser,
    load_pretrained,
    save_pretrained,
)
from jax_unlearn.pretrained.weights import diffusers_key
from jax_unlearn.schedules import from_diffusers

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "unet_2d"
# The smallest network there is: these tests read and write it, few run it.
UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.35.0",
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4],
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": None,
    "num_class_embeds": 3,
}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}


@pytest.fixture(scope="module")
def model():
    params = init_params(UNET, jax.random.key(0))
    config = PretrainedConfig(UNET, SCHEDULER, {0: "cat", 1: "dog"}, 2, "")
    denoiser = UNet2DDenoiser(UNet2DConfig.from_diffusers(UNET), 2)
    return Pretrained(denoiser, params, from_diffusers(SCHEDULER), config)


@pytest.fixture
def folder(model, tmp_path):
    """A saved model whose files may be changed."""
    save_pretrained(tmp_path / "model", model)
    (tmp_path / "model" / "model.sha256").unlink()
    return tmp_path / "model"


def weights(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def edit_weights(folder, edit):
    tensors = safetensors.numpy.load_file(weights(folder))
    edit(tensors)
    safetensors.numpy.save_file(tensors, weights(folder))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(params, other):
    jax.tree.map(np.testing.assert_array_equal, params, other)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other))


def test_save_then_load_changes_nothing(model, folder):
    loaded = load_pretrained(folder)
    assert_same(model.params, loaded.params)
    assert loaded.apply == model.apply
    assert hash(loaded.apply) == hash(model.apply)
    np.testing.assert_array_equal(loaded.schedule.log_snr, model.schedule.log_snr)
    assert loaded.config.unet == UNET
    assert loaded.config.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert loaded.config.null_label == 2
    assert loaded.config.num_labels == 2
    assert loaded.config.sample_shape == (4, 4, 1)
    assert loaded.config.source == str(folder)


def test_saved_folder_is_the_one_of_diffusers(model, tmp_path):
    folder = tmp_path / "model"
    save_pretrained(folder, model)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "model.sha256",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["id2label"] == {"0": "cat", "1": "dog"}
    keys = safetensors.numpy.load_file(weights(folder)).keys()
    assert "down_blocks.0.attentions.0.to_out.0.weight" in keys
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_no_label_is_the_null_label(model):
    x_t, t = jnp.ones((2, 4, 4, 1)), jnp.array([1, 2])
    apply = jax.jit(lambda apply, *rest: apply(model.params, *rest), static_argnums=0)
    none = apply(model.apply, x_t, t, None)
    np.testing.assert_allclose(none, apply(model.apply, x_t, t, jnp.array([2, 2])), rtol=1e-5)


def test_no_label_without_a_null_label_is_refused(folder):
    index = folder / "model_index.json"
    edit_json(index, id2label={"0": "a", "1": "b", "2": "c"})
    loaded = load_pretrained(folder)
    assert loaded.config.null_label is None
    assert loaded.config.num_labels == 3
    shapes = (jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32), jnp.array([1, 2]))
    with pytest.raises(ValueError, match="class-conditional"):
        jax.eval_shape(loaded.apply, loaded.params, *shapes, None)
    edit_json(index, id2label=None)
    loaded = load_pretrained(folder)
    assert loaded.config.id2label is None
    assert loaded.config.null_label is None


def test_bare_folder_with_and_without_scheduler(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder / "unet", bare)
    loaded = load_pretrained(bare)
    assert loaded.config.scheduler == {}
    np.testing.assert_array_equal(loaded.schedule.log_snr, from_diffusers({}).log_snr)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", bare)
    assert load_pretrained(bare).config.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    # The first released pipelines have everything in one folder.
    shutil.copy(folder / "model_index.json", bare)
    assert load_pretrained(bare).config.null_label == 2
    assert load_pretrained(folder / "unet").config.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    save_pretrained(tmp_path / "again", loaded)
    again = load_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again.schedule.log_snr, loaded.schedule.log_snr)


def test_a_scheduler_that_is_given_replaces_what_is_found(folder, tmp_path):
    file = tmp_path / "noise.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_end": 0.01}))
    shutil.copytree(folder / "scheduler", tmp_path / "other")
    edit_json(tmp_path / "other" / "scheduler_config.json", num_train_timesteps=50)
    for given, expected in (
        (file, {"beta_end": 0.01}),
        (str(file), {"beta_end": 0.01}),
        (tmp_path / "other", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}),
        ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        (folder, SCHEDULER),
    ):
        loaded = load_pretrained(folder, scheduler=given)
        assert expected.items() <= loaded.config.scheduler.items()
        schedule = from_diffusers(expected)
        np.testing.assert_array_equal(loaded.schedule.log_snr, schedule.log_snr)
        assert loaded.schedule.prediction_type == schedule.prediction_type
    # What is saved has the noise that was given.
    given = load_pretrained(folder, scheduler=file)
    save_pretrained(tmp_path / "saved", given)
    again = load_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.schedule.log_snr, given.schedule.log_snr)
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["_class_name"] == "DDIMPipeline"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("empty", "scheduler .*empty has no scheduler_config.json"),
        ("nowhere", "no such folder: .*nowhere"),
        (from_diffusers({}), "a path or a mapping, not .*NoiseSchedule"),
        ({"_class_name": "EDMEulerScheduler"}, "^scheduler: is of class 'EDMEulerScheduler'"),
        ({"beta_schedule": "sigmoid"}, "^scheduler: beta_schedule 'sigmoid'"),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_refused(folder, tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    given = tmp_path / given if isinstance(given, str) else given
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, scheduler=given)


def test_old_attention_names(model, folder):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for key in [key for key in tensors if ".attentions." in key]:
            for new, old in names.items():
                if f".{new}." in key:
                    tensors[key.replace(f".{new}.", f".{old}.")] = tensors.pop(key)

    edit_weights(folder, rename)
    assert any(".proj_attn." in key for key in safetensors.numpy.load_file(weights(folder)))
    assert_same(model.params, load_pretrained(folder).params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_load_as_float32(model, folder, dtype):
    def cast(tensors):
        tensors |= {key: values.astype(dtype) for key, values in tensors.items()}

    edit_weights(folder, cast)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), model.params)
    assert_same(rounded, load_pretrained(folder).params)


def test_variants(model, folder):
    unnamed = weights(folder)
    half = unnamed.with_name("diffusion_pytorch_model.fp16.safetensors")
    tensors = safetensors.numpy.load_file(unnamed)
    safetensors.numpy.save_file({k: v.astype(np.float16) for k, v in tensors.items()}, half)
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16).astype(np.float32), model.params
    )
    assert_same(model.params, load_pretrained(folder).params)
    assert_same(rounded, load_pretrained(folder, variant="fp16").params)
    with pytest.raises(ValueError, match=r"variant 'ema': choose one of \['None', 'fp16'\]"):
        load_pretrained(folder, variant="ema")
    unnamed.unlink()
    assert_same(rounded, load_pretrained(folder).params)
    shutil.copy(half, half.with_name("diffusion_pytorch_model.ema.safetensors"))
    with pytest.raises(ValueError, match=r"variant None: choose one of \['ema', 'fp16'\]"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("index_name", "shard_name"),
    [
        ("{}.safetensors.index.json", "{}-0000{}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}.fp16-0000{}-of-00002.safetensors"),
        ("{}.fp16.safetensors.index.json", "{}-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_shards(model, folder, index_name, shard_name):
    stem = "diffusion_pytorch_model"
    tensors = safetensors.numpy.load_file(weights(folder))
    weights(folder).unlink()
    weight_map = {}
    for shard in (1, 2):
        name = shard_name.format(stem, shard)
        part = {key: tensors[key] for key in sorted(tensors)[shard - 1 :: 2]}
        safetensors.numpy.save_file(part, folder / "unet" / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / "unet" / index_name.format(stem)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(model.params, load_pretrained(folder).params)

    (folder / "unet" / name).unlink()
    with pytest.raises(ValueError, match="is not a file beside it"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="'../elsewhere.safetensors', which is not a file beside"):
        load_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        load_pretrained(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    def edit(tensors):
        del tensors["conv_in.bias"]
        tensors["conv_out.weight"] = np.zeros((2, 4, 3, 3), np.float32)
        tensors |= {f"extra.{i}": np.zeros(1, np.float32) for i in range(6)}

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_pretrained(folder)
    message = str(caught.value)
    assert "1 missing (conv_in.bias)" in message
    assert "6 of no parameter (extra.0, extra.1, extra.2, extra.3, ...)" in message
    assert "1 misshapen (conv_out.weight [2, 4, 3, 3] instead of [1, 4, 3, 3])" in message


def test_a_tensor_under_both_names_is_refused(folder):
    def edit(tensors):
        new = "down_blocks.0.attentions.0.to_q.bias"
        tensors[new.replace("to_q", "query")] = tensors[new]

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match="1 given twice"):
        load_pretrained(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(folder, value):
    def edit(tensors):
        tensors["conv_in.bias"][0] = value

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=r"conv_in\.bias holds values that are not finite"):
        load_pretrained(folder)


def test_integer_weights_are_refused(folder):
    def edit(tensors):
        tensors["conv_in.bias"] = np.zeros(4, np.int32)

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=r"conv_in\.bias is of dtype int32"):
        load_pretrained(folder)


@pytest.mark.parametrize("content", ["", "short", "truncated", "garbage", "html"])
def test_damaged_weights_are_refused(folder, content):
    good = weights(folder).read_bytes()
    bad = {
        "": b"",
        "short": good[:5],
        "truncated": good[: len(good) // 2],
        "garbage": b"\xff" * len(good),
        "html": b"<html><body>404</body></html>",
    }
    weights(folder).write_bytes(bad[content])
    with pytest.raises(ValueError, match="is damaged, or no safetensors file") as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt"])
def test_pickles_are_refused_with_the_way_to_convert(folder, suffix):
    weights(folder).unlink()
    pickled = weights(folder).with_suffix(f".{suffix}")
    pickled.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=f"model.{suffix}.*use_safetensors=False") as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_no_weights(folder):
    weights(folder).unlink()
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_pretrained(folder)


def test_no_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file: pass the folder"):
        load_pretrained(weights(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no config\.json"):
        load_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "no readable json"), (b"\xff\xfe", "no readable json"), (b"[]", "not a list")],
)
def test_malformed_json(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{pathlib.Path(name).name}.*{message}"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", None])
def test_other_networks_are_refused(folder, name):
    edit_json(folder / "unet" / "config.json", _class_name=name)
    with pytest.raises(ValueError, match=f"class {name!r}: expected"):
        load_pretrained(folder)


def test_other_pipelines_are_refused(folder):
    edit_json(
        folder / "model_index.json",
        _class_name="StableDiffusion3Pipeline",
        transformer=["diffusers", "SD3Transformer2DModel"],
        safety_checker=[None, None],
    )
    with pytest.raises(
        ValueError, match=r"StableDiffusion3Pipeline with the parts \['transformer'"
    ):
        load_pretrained(folder)


def test_options_that_are_not_understood_are_refused(folder):
    edit_json(folder / "unet" / "config.json", new_option=1)
    with pytest.raises(ValueError, match=r"config.json: unknown .*'new_option'"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "is of class 'ScoreSdeVeScheduler': expected"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of class 'FlowMatch"),
        ({"beta_schedule": "sigmoid"}, "scheduler_config.json: beta_schedule 'sigmoid'"),
        ({"prediction_type": "flow"}, "scheduler_config.json: prediction_type 'flow'"),
    ],
)
def test_other_processes_are_refused(folder, change, message):
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat"], "must map integers to names"),
        ({"one": "cat"}, "must map integers to names"),
        ({"1": "cat", "2": "dog"}, "labels 0, 1, 2"),
        ({"0": "cat"}, "names 1 labels for 3 class embeddings"),
    ],
)
def test_malformed_labels(folder, labels, message):
    edit_json(folder / "model_index.json", id2label=labels)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_hub_failure_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"google/ddpm .*OSError: no route$"):
        load_pretrained("google/ddpm")


def test_hub_fetches_json_then_safetensors(monkeypatch, folder):
    calls = []

    def fetch(name, *, revision, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_pretrained("owner/name").config.source == "owner/name"
    assert [name for name, _ in calls] == ["owner/name"] * 2
    assert calls[0][1] == ["*.json", "README.md"]
    assert all(pattern.endswith((".json", ".md", ".safetensors")) for pattern in calls[1][1])
    calls.clear()
    edit_json(folder / "unet" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        load_pretrained("owner/name")
    assert len(calls) == 1


def test_existing_folder_is_not_overwritten(model, folder):
    before = weights(folder).read_bytes()
    with pytest.raises(ValueError, match="overwrite=True"):
        save_pretrained(folder, model)
    assert weights(folder).read_bytes() == before
    doubled = model._replace(params=jax.tree.map(lambda x: 2 * x, model.params))
    save_pretrained(folder, doubled, overwrite=True)
    assert_same(doubled.params, load_pretrained(folder).params)
    assert list(folder.parent.iterdir()) == [folder]


def test_only_a_model_is_overwritten(model, tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter").write_text("dear")
    with pytest.raises(ValueError, match="holds no model"):
        save_pretrained(precious, model, overwrite=True)
    assert (precious / "letter").read_text() == "dear"


def test_failed_save_leaves_the_old_model_and_nothing_else(model, folder, monkeypatch):
    before, on_host, asked = weights(folder).read_bytes(), stored._on_host, []
    count = len(jax.tree.leaves(model.params))

    def fail(leaf):
        if len(asked) == count + 5:  # all were checked, and five are written
            raise OSError("disk full")
        asked.append(leaf)
        return on_host(leaf)

    monkeypatch.setattr(stored, "_on_host", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(folder, model, overwrite=True)
    assert weights(folder).read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_parameters_that_do_not_fit_are_not_saved(model, tmp_path):
    params = dict(model.params)
    conv_in = params.pop("conv_in")
    with pytest.raises(ValueError, match=r"2 missing \(conv_in.bias, conv_in.weight\)"):
        save_pretrained(tmp_path / "new", model._replace(params=params))
    params["conv_in"] = conv_in | {"bias": jnp.full((4,), jnp.nan)}
    with pytest.raises(ValueError, match=r"1 not finite \(conv_in.bias\)"):
        save_pretrained(tmp_path / "new", model._replace(params=params))
    params["conv_in"] = conv_in | {"bias": jnp.zeros(5)}
    with pytest.raises(ValueError, match=r"1 misshapen \(conv_in.bias \[5\] instead of \[4\]\)"):
        save_pretrained(tmp_path / "new", model._replace(params=params))
    assert list(tmp_path.iterdir()) == []


def test_diffusers_key():
    path = ("up_blocks_1", "attentions_0", "to_out_0", "kernel")
    assert diffusers_key(path) == "up_blocks.1.attentions.0.to_out.0.weight"
    assert diffusers_key(("time_embedding", "linear_1", "bias")) == "time_embedding.linear_1.bias"


@pytest.mark.torch
def test_torch_opens_what_is_saved(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    loaded = load_pretrained(FOLDER / "tiny")
    save_pretrained(tmp_path / "saved", loaded)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    given = np.load(FOLDER / "tiny" / "expected.npz")
    with torch.no_grad():
        output = network(
            torch.from_numpy(given["x_t"]).permute(0, 3, 1, 2),
            torch.from_numpy(given["t"]),
            torch.from_numpy(given["cond"]),
        ).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(output, given["output"], rtol=1e-4, atol=1e-6)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "saved")
    assert pipeline.scheduler.config.num_train_timesteps == 1000


@pytest.mark.torch
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_torch_saves_loads(tmp_path, variant, sharded):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(**{k: v for k, v in UNET.items() if k[0] != "_"})
    size = {"max_shard_size": "5KB"} if sharded else {}
    network.save_pretrained(tmp_path, variant=variant, **size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not sharded
    loaded = load_pretrained(tmp_path)
    expected = network.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded.params["conv_in"]["kernel"], expected)
