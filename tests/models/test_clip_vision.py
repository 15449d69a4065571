import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from clip_vocabulary import write_tokenizer
from parity import TOLERANCE, assert_near, relative_error

from jax_unlearn.models.clip_vision import CLIPVisionConfig, CLIPVisionModel, param_shapes
from jax_unlearn.pretrained.clip import load_clip
from jax_unlearn.pretrained.networks import load_network, save_network

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
GIVEN = dict(np.load(FIXTURES / "clip" / "expected.npz"))
# One option each, which changes no shape.
SILENT = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-2,
    "num_attention_heads": 3,
    "image_size": 11,
}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_clip(FIXTURES / "clip", tokenizer).vision


def assert_same(params, other):
    jax.tree.map(np.testing.assert_array_equal, params, other)


def outputs(network, images):
    encoding = jax.jit(network.module.apply)({"params": network.params}, images)
    return {"hidden": encoding.hidden_states, "pooled": encoding.pooled}


def with_options(network, **options):
    module = CLIPVisionModel(CLIPVisionConfig.from_transformers(network.config | options))
    return network._replace(module=module)


def test_output_equals_torch(network):
    found = outputs(network, GIVEN["images"])
    assert_near(found, GIVEN)
    assert found["hidden"].shape == (3, 5, 12)
    assert found["pooled"].shape == (3, 6)


@pytest.mark.parametrize("name", SILENT)
def test_silent_option_equals_torch(network, name):
    changed = with_options(network, **{name: SILENT[name]})
    expected, images = GIVEN[f"pooled-{name}"], GIVEN[f"images-{name}"]
    assert relative_error(outputs(changed, images)["pooled"], expected) < TOLERANCE
    # And the option matters.
    assert relative_error(GIVEN["pooled"], expected) > 1e-4


def test_without_projection_the_pooled_state_is_the_normed_class_token(network):
    plain = with_options(network, architectures=["CLIPVisionModel"])
    found = outputs(plain, GIVEN["images"])
    assert found["pooled"].shape == (3, 12)
    kernel = network.params["visual_projection"]["kernel"]
    assert relative_error(found["pooled"] @ kernel, GIVEN["pooled"]) < TOLERANCE


def test_rest_that_fills_no_patch_is_not_seen(network):
    images = GIVEN["images"].copy()
    images[:, 8:] = 0
    images[:, :, 8:] = 0
    assert_near(outputs(network, images), GIVEN)
    images[:, 7, 7] += 1
    assert relative_error(outputs(network, images)["pooled"], GIVEN["pooled"]) > 1e-3


def test_bfloat16_computes_close_and_keeps_float32_outside(network):
    network = network._replace(module=CLIPVisionModel(network.module.config, dtype=jnp.bfloat16))
    for name, values in outputs(network, GIVEN["images"]).items():
        assert values.dtype == jnp.float32
        assert 1e-4 < relative_error(values, GIVEN[name]) < 0.1


def test_save_then_load_changes_nothing(network, tmp_path):
    save_network(tmp_path / "saved", network)
    loaded = load_network(tmp_path / "saved")
    assert loaded.module == network.module
    assert_same(loaded.params, network.params)


def test_published_names(network, tmp_path):
    # The prefix that later versions drop, and numbers that they do not store.
    plain = with_options(network, architectures=["CLIPVisionModel"])
    params = {"vision_model": network.params["vision_model"]}
    config = network.config | {"architectures": ["CLIPVisionModel"]}
    save_network(tmp_path / "saved", plain._replace(params=params, config=config))
    (tmp_path / "saved" / "model.sha256").unlink()
    path = tmp_path / "saved" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    ids = {"vision_model.embeddings.position_ids": np.arange(5)[None]}
    safetensors.numpy.save_file(tensors | ids, path)
    assert_same(load_network(tmp_path / "saved").params, params)
    short = {name.removeprefix("vision_model."): values for name, values in tensors.items()}
    assert "embeddings.class_embedding" in short
    safetensors.numpy.save_file(short, path)
    assert_same(load_network(tmp_path / "saved").params, params)


@pytest.mark.parametrize("shape", [(2, 10, 10, 1), (2, 11, 10, 3), (10, 10, 3)])
def test_images_of_another_shape_are_refused(network, shape):
    with pytest.raises(ValueError, match=r"must be \[batch, 10, 10, 3\], not"):
        outputs(network, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_magic": 1}, r"unknown CLIPVisionModel options \['use_magic'\]"),
        ({"vocab_size": 3}, r"unknown CLIPVisionModel options \['vocab_size'\]"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 does not divide hidden_size 768"),
        ({"image_size": [224, 224]}, r"CLIPVisionModel option image_size is malformed: \(224"),
        ({"patch_size": 0}, "patch_size is malformed"),
        ({"patch_size": 300}, "patch_size 300 is larger than image_size 224"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is malformed"),
    ],
)
def test_unsupported_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig.from_transformers(options)


FULL = {
    "clip-vit-base-patch32": {},
    "clip-vit-large-patch14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


def count(name):
    config = FULL[name] | {"architectures": ["CLIPVisionModelWithProjection"]}
    shapes = param_shapes(CLIPVisionConfig.from_transformers(config))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("clip-vit-base-patch32", 87_849_216), ("clip-vit-large-patch14", 303_966_208)],
)
def test_number_of_parameters_at_full_size(name, expected):
    # torch's, see test_published_networks_have_as_many_in_torch.
    assert count(name) == expected


@pytest.mark.torch
@pytest.mark.parametrize("name", FULL)
def test_published_networks_have_as_many_in_torch(name, clip_side):
    import torch

    with torch.device("meta"):
        config = clip_side.CLIPVisionConfig(**FULL[name])
        model = clip_side.CLIPVisionModelWithProjection(config)
    assert count(name) == sum(values.numel() for values in model.parameters())


@pytest.mark.torch
def test_defaults_are_those_of_transformers(clip_side):
    config, expected = CLIPVisionConfig(), clip_side.CLIPVisionConfig()
    for name in set(vars(config)) - {"with_projection"}:
        assert getattr(config, name) == getattr(expected, name)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("with_projection", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        *({name: value} for name, value in SILENT.items()),
        {"image_size": 8, "patch_size": 2},
        {"num_channels": 1},
        {"num_hidden_layers": 1, "projection_dim": 9},
    ],
    ids=str,
)
def test_live_torch(options, with_projection, clip_side, tmp_path):
    model = clip_side.torch_vision(options, seed=11, with_projection=with_projection)
    model.save_pretrained(tmp_path)
    images = clip_side.random_images(
        options.get("image_size", 10), channels=options.get("num_channels", 3)
    )
    found = outputs(load_network(tmp_path), images)
    assert_near(found, clip_side.vision_outputs(model, images))
    width = options.get("projection_dim", 6) if with_projection else 12
    assert found["pooled"].shape == (3, width)


@pytest.mark.torch
def test_torch_opens_what_is_saved(network, clip_side, tmp_path):
    save_network(tmp_path / "saved", network)
    model = clip_side.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "saved").eval()
    expected = clip_side.vision_outputs(model, GIVEN["images"])
    assert_near(expected, GIVEN)


@pytest.mark.torch
def test_keys_that_old_files_hold_change_nothing(clip_side):
    # What transformers wrote in 2022: every option of generation and of classification.
    options = {
        name: value
        for name, value in clip_side.CLIPVisionConfig().to_dict().items()
        if value is not None
    }
    old = {"is_decoder": False, "id2label": {"0": "LABEL_0"}, "top_k": 50, "_name_or_path": ""}
    assert CLIPVisionConfig.from_transformers(options | old) == CLIPVisionConfig()
