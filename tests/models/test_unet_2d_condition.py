import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, relative_error

from jax_unlearn.models.initialisation import random_params
from jax_unlearn.models.unet_2d_condition import (
    UNet2DConditionConfig,
    UNet2DConditionDenoiser,
    UNet2DConditionModel,
    param_shapes,
)
from jax_unlearn.pretrained.networks import load_network

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "stable_diffusion"
ARCHITECTURES = json.loads((FOLDER / "architectures.json").read_text())
SILENT = json.loads((FOLDER / "silent_options.json").read_text())
NETWORKS = sorted(path.name for path in (FOLDER / "unet").iterdir())
SDXL = "stable-diffusion-xl-base-1.0"


def load(name):
    given = dict(np.load(FOLDER / "unet" / name / "expected.npz"))
    output = given.pop("output")
    network = load_network(FOLDER / "unet" / name)
    return network, given, output


def split(given):
    """x_t, t and the condition as networks take them."""
    x_t, t, *names = given
    cond = {name: given[name] for name in names if name != "output_of_half_size"}
    return given[x_t], given[t], cond if len(cond) > 1 else cond["encoder_hidden_states"]


def apply(network, given, params=None):
    params = network.params if params is None else params
    return network.module.apply({"params": params}, *split(given))


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_output_equals_torch(name):
    network, given, output = load(name)
    assert relative_error(apply(network, given), output) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", SILENT)
def test_silent_option_equals_torch(tiny, name):
    network, given, output = tiny
    expected = np.load(FOLDER / "silent_options.npz")[name]
    assert relative_error(output, expected) > 10 * TOLERANCE
    config = UNet2DConditionConfig.from_diffusers(network.config | SILENT[name])
    actual = apply(network._replace(module=UNet2DConditionModel(config)), given)
    assert relative_error(actual, expected) < TOLERANCE


def test_time_ids_equal_torch():
    network, given, output = load(SDXL)
    expected = given["output_of_half_size"]
    assert relative_error(output, expected) > 10 * TOLERANCE
    halved = given | {"time_ids": given["time_ids"] // 2}
    assert relative_error(apply(network, halved), expected) < TOLERANCE


def test_every_published_config_is_read():
    configs = {
        name: UNet2DConditionConfig.from_diffusers(config) for name, config in ARCHITECTURES.items()
    }
    assert configs["stable-diffusion-v1-4"] == configs["stable-diffusion-v1-5"]
    assert configs["stable-diffusion-v1-5"].sample_shape == (64, 64, 4)
    assert configs["stable-diffusion-2-1"].context_dim == 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("stable-diffusion-v1-4", 859_520_964),
        ("stable-diffusion-v1-5", 859_520_964),
        ("stable-diffusion-2-1-base", 865_910_724),
        ("stable-diffusion-2-1", 865_910_724),
        (SDXL, 2_567_463_684),
        ("bk-sdm-tiny", 323_384_964),
    ],
)
def test_number_of_parameters_at_full_size(name, count):
    # torch's, of networks without storage: see test_published_networks_have_as_many_in_torch.
    shapes = param_shapes(UNet2DConditionConfig.from_diffusers(ARCHITECTURES[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.slow
def test_bfloat16_computes_close_and_keeps_float32_outside(tiny):
    network, given, output = tiny
    denoiser = UNet2DConditionDenoiser(network.module.config, dtype=jnp.dtype(jnp.bfloat16))
    actual = jax.jit(denoiser)(network.params, *split(given))
    assert actual.dtype == jnp.float32
    assert 1e-4 < relative_error(actual, output) < 0.1


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    config = UNet2DConditionConfig(
        block_out_channels=(4,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=3,
        attention_head_dim=1,
        norm_num_groups=2,
    )
    params = random_params(param_shapes(config), jax.random.key(0))
    rng = np.random.default_rng(0)
    x_t = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
    context = rng.normal(size=(1, 2, 3)).astype(np.float32)

    def gradient(remat):
        denoiser = UNet2DConditionDenoiser(config, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.mean(denoiser(p, x_t, jnp.ones(1), context) ** 2)))

    # Three resnets and one transformer block.
    assert str(jax.make_jaxpr(gradient(True))(params)).count("remat") >= 4
    assert "remat" not in str(jax.make_jaxpr(gradient(False))(params))
    actual, expected = gradient(True)(params), gradient(False)(params)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.any(other)
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_wrong_arguments_are_refused(tiny):
    network, given, _ = tiny
    x_t, t, cond = split(given)

    def call(x_t, cond, network=network):
        network.module.apply({"params": network.params}, x_t, t, cond)

    with pytest.raises(ValueError, match="multiples of 2, not"):
        call(np.zeros((2, 8, 7, 4), np.float32), cond)
    with pytest.raises(ValueError, match=r"height, width, 4\], not"):
        call(np.zeros((2, 8, 8, 3), np.float32), cond)
    with pytest.raises(ValueError, match=r"\[2, tokens, 8\], not \(2, 7, 9\)"):
        call(x_t, np.zeros((2, 7, 9), np.float32))
    with pytest.raises(ValueError, match=r"\[2, tokens, 8\], not \(2, 8\)"):
        call(x_t, np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="must be an array, not a dict"):
        call(x_t, {"encoder_hidden_states": cond})
    with pytest.raises(ValueError, match="must be an array, not <class 'NoneType'>"):
        call(x_t, None)
    network, given, _ = load(SDXL)
    x_t, t, cond = split(given)
    with pytest.raises(ValueError, match=r"dict of \['encoder_hidden_states', 'text_embeds', 'ti"):
        call(x_t, cond["encoder_hidden_states"], network)
    with pytest.raises(ValueError, match=r"not a dict of \['encoder_hidden_states'\]"):
        call(x_t, {"encoder_hidden_states": cond["encoder_hidden_states"]}, network)
    with pytest.raises(ValueError, match=r"53 values P \+ 8·n .* not \(2, 5\) and \(2, 5\)"):
        call(x_t, cond | {"time_ids": cond["time_ids"][:, :5]}, network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_magic": True}, r"unknown UNet2DConditionModel options \['use_magic'\]"),
        ({"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "KDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "AttnUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"block_out_channels": [8, 8, 8]}, "each of the 3 levels of block_out_channels, not 2"),
        ({"attention_head_dim": [2, 2, 2]}, "attention_head_dim must have one entry"),
        ({"attention_head_dim": 3}, "it is the number of heads, not the channels of one"),
        ({"attention_head_dim": None}, "attention_head_dim is malformed"),
        ({"norm_num_groups": 3}, "does not divide the 8"),
        ({"norm_num_groups": None}, "norm_num_groups is malformed"),
        ({"cross_attention_dim": [8, 9]}, "must be one width"),
        ({"transformer_layers_per_block": [[1], [1]]}, "transformer_layers_per_block is malf"),
        ({"only_cross_attention": 1}, "only_cross_attention is malformed"),
        ({"conv_in_kernel": 4}, "conv_in_kernel is malformed"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection' is not supported"),
        ({"encoder_hid_dim": 7}, "encoder_hid_dim 7 is not supported"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is not supported"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image' is not supported"),
        ({"addition_embed_type": "text_time"}, "needs projection_class_embeddings_input_dim"),
        ({"attention_type": "gated"}, "attention_type 'gated' is not supported"),
        ({"dual_cross_attention": True}, "dual_cross_attention True is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' is not supported"),
        ({"time_embedding_act_fn": "tanh"}, "time_embedding_act_fn 'tanh'"),
        (
            {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
            | {"mid_block_type": None},
            "of which there must be one",
        ),
    ],
)
def test_unsupported_config_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionConfig.from_diffusers(tiny[0].config | options)


def test_options_without_effect_are_kept(tiny):
    neutral = {"upcast_attention": True, "dropout": 0.1, "a_later_option": None, "_name": "x"}
    config = UNet2DConditionConfig.from_diffusers(tiny[0].config | neutral)
    assert config.upcast_attention
    assert UNet2DConditionConfig().context_dim == 1280
    with pytest.raises(ValueError, match="no sample_size"):
        _ = UNet2DConditionConfig().sample_shape


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", [*ARCHITECTURES, "loud"])
def test_live_torch(name, torch_side, tmp_path):
    if name == "loud":
        config = torch_side.TINY | torch_side.LOUD
    else:
        config = torch_side.shrunk(ARCHITECTURES[name])
    model, given = torch_side.torch_unet(config, seed=11), torch_side.inputs(config, seed=12)
    model.save_pretrained(tmp_path)
    actual = apply(load_network(tmp_path), given)
    assert relative_error(actual, torch_side.torch_output(model, given)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_networks_have_as_many_in_torch(name, torch_side):
    import torch

    config = {k: v for k, v in ARCHITECTURES[name].items() if not k.startswith("_")}
    with torch.device("meta"):
        model = torch_side.UNet2DConditionModel(**config)
    shapes = param_shapes(UNet2DConditionConfig.from_diffusers(config))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(values.numel() for values in model.parameters())
