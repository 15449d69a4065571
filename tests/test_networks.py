import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_unlearn import sharding
from jax_unlearn.pretrained.networks import load_network, save_network
from jax_unlearn.pretrained.weights import write_params

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "stable_diffusion"
FOLDERS = {
    "diffusers.UNet2DConditionModel": FOLDER / "unet" / "tiny",
    "diffusers.AutoencoderKL": FOLDER / "vae",
    "transformers.CLIPTextModel": FOLDER / "text_encoder",
    "transformers.CLIPTextModelWithProjection": FOLDER / "text_encoder_2",
}


def assert_same(params, other):
    jax.tree.map(np.testing.assert_array_equal, params, other)


@pytest.fixture(params=FOLDERS)
def name(request):
    return request.param


@pytest.fixture
def network(name):
    return load_network(FOLDERS[name])


@pytest.fixture
def folder(network, tmp_path):
    """A saved network whose files may be changed."""
    save_network(tmp_path / "saved", network)
    (tmp_path / "saved" / "model.sha256").unlink()
    return tmp_path / "saved"


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def test_save_then_load_changes_nothing(network, folder):
    loaded = load_network(folder)
    assert_same(network.params, loaded.params)
    assert loaded.module == network.module
    assert hash(loaded.module) == hash(network.module)
    dtype = {"dtype": "float32"} if "dtype" in network.config else {}
    assert loaded.config == network.config | dtype
    with pytest.raises(ValueError, match="overwrite=True"):
        save_network(folder, network)
    doubled = network._replace(params=jax.tree.map(lambda x: 2 * x, network.params))
    save_network(folder, doubled, overwrite=True)
    assert_same(doubled.params, load_network(folder).params)
    assert list(folder.parent.iterdir()) == [folder]


def test_saved_weights_are_those_of_the_safetensors_library(network, folder, tmp_path):
    stored = safetensors.numpy.load_file(weights(folder))
    theirs = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(stored, theirs, metadata={"format": "pt"})
    assert weights(folder).read_bytes() == theirs.read_bytes()
    assert weights(folder).stat().st_mode == (folder / "config.json").stat().st_mode


def test_parameters_on_several_devices_are_saved(network, folder, tmp_path):
    mesh = sharding.device_mesh()
    assert mesh.size > 1
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = sharding.replicate(network.params, mesh)
    for name, params in {
        "replicated": replicated,
        "spread": jax.tree.map(
            lambda x: x if x.shape[0] % mesh.size else jax.device_put(x, spread), replicated
        ),
        "numpy": jax.tree.map(np.asarray, network.params),
    }.items():
        save_network(tmp_path / name, network._replace(params=params))
        assert weights(tmp_path / name).read_bytes() == weights(folder).read_bytes()


@pytest.mark.parametrize("spread", [False, True])
def test_writing_holds_one_tensor_at_a_time(tmp_path, spread):
    params = {f"layers_{i}": {"kernel": jnp.full((256, 256), i, jnp.float32)} for i in range(40)}
    if spread:
        axis = jax.sharding.PartitionSpec("data")
        params = jax.device_put(params, jax.sharding.NamedSharding(sharding.device_mesh(), axis))
    tracemalloc.start()  # NumPy tells it what arrays take.
    try:
        write_params(tmp_path / "weights.safetensors", params, params)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tensor = 256 * 256 * 4
    assert left < 4 * tensor
    assert peak < 8 * tensor  # of 40
    written = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
    assert [int(written[f"layers.{i}.weight"].mean()) for i in range(40)] == list(range(40))


def test_headers_are_checked_before_any_tensor_is_read(network, folder, monkeypatch):
    tensors = safetensors.numpy.load_file(weights(folder))
    tensors.pop(max(tensors))
    safetensors.numpy.save_file(tensors, weights(folder))
    monkeypatch.setattr(np, "fromfile", None)
    with pytest.raises(ValueError, match="1 missing"):
        load_network(folder)


def test_shards_of_a_variant(network, folder):
    single = weights(folder)
    tensors = safetensors.numpy.load_file(single)
    stem = single.name.removesuffix(".safetensors")
    single.unlink()
    weight_map = {}
    for shard in (1, 2):
        name = f"{stem}.fp16-0000{shard}-of-00002.safetensors"
        part = {key: tensors[key].astype(np.float16) for key in sorted(tensors)[shard - 1 :: 2]}
        safetensors.numpy.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    # The stored weights are those of float16.
    assert_same(network.params, load_network(folder, variant="fp16").params)
    with pytest.raises(ValueError, match=r"variant 'ema': choose one of \['fp16'\]"):
        load_network(folder, variant="ema")


def test_bfloat16_weights_load_as_float32(network, folder):
    tensors = safetensors.numpy.load_file(weights(folder))
    cast = {key: values.astype(ml_dtypes.bfloat16) for key, values in tensors.items()}
    safetensors.numpy.save_file(cast, weights(folder))
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), network.params
    )
    assert_same(rounded, load_network(folder).params)


def test_computing_dtype(network, folder):
    assert network.module.dtype is None
    assert load_network(folder, dtype="bfloat16").module.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("name", [n for n in FOLDERS if n.startswith("diffusers")], indirect=True)
def test_old_attention_names(network, folder):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.numpy.load_file(weights(folder))
    for key in [key for key in tensors if ".attentions." in key]:
        for new, old in names.items():
            if f".{new}." in key:
                tensors[key.replace(f".{new}.", f".{old}.")] = tensors.pop(key)
    assert any(".proj_attn." in key for key in tensors)
    safetensors.numpy.save_file(tensors, weights(folder))
    assert_same(network.params, load_network(folder).params)


def test_pickles_are_refused_with_the_way_to_convert(name, folder):
    weights(folder).rename(weights(folder).with_suffix(".bin"))
    package, _, name = name.partition(".")
    with pytest.raises(ValueError, match=f"pickled.*from {package} import {name} as U; .*=False"):
        load_network(folder)


def test_parameters_that_do_not_fit_are_not_saved(network, tmp_path):
    first = next(iter(network.params))
    params = {key: value for key, value in network.params.items() if key != first}
    with pytest.raises(ValueError, match=r"cannot be saved: \d+ missing"):
        save_network(tmp_path / "new", network._replace(params=params))
    assert list(tmp_path.iterdir()) == []


def test_other_classes_and_options_are_refused(network, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(network.config | {"new_option": 1}))
    with pytest.raises(ValueError, match=r"config.json: unknown .*'new_option'"):
        load_network(folder)
    path.write_text(json.dumps(network.config | {"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="config.json: is of class 'FluxTransformer2DModel': exp"):
        load_network(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is of class None: expected one of"):
        load_network(folder)


@pytest.mark.parametrize("name", ["transformers.CLIPTextModel"], indirect=True)
def test_published_names_of_text_encoders(network, folder):
    # The prefix that later versions drop, and numbers that they do not store.
    tensors = safetensors.numpy.load_file(weights(folder))
    assert all(key.startswith("text_model.") for key in tensors)
    tensors["text_model.embeddings.position_ids"] = np.arange(10)[None]
    safetensors.numpy.save_file(tensors, weights(folder))
    assert_same(network.params, load_network(folder).params)
    stored = safetensors.numpy.load_file(weights(FOLDERS["transformers.CLIPTextModel"]))
    assert not any(key.startswith("text_model.") for key in stored)


@pytest.mark.torch
def test_torch_opens_what_is_saved(name, folder):
    torch = pytest.importorskip("torch")
    package, _, kind = name.partition(".")
    from_pretrained = getattr(pytest.importorskip(package), kind).from_pretrained
    variant = {"variant": "fp16"} if package == "diffusers" else {}
    stored = from_pretrained(FOLDERS[name], **variant)
    saved, info = from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tensors = saved.state_dict()
    assert tensors.keys() == stored.state_dict().keys()
    for key, values in stored.state_dict().items():
        assert tensors[key].dtype == torch.float32
        assert torch.equal(values.float(), tensors[key])
