import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, assert_near, relative_error

from jax_unlearn.models.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLConfig,
    Gaussian,
    param_shapes,
    sample_latents,
)
from jax_unlearn.pretrained.networks import load_network

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "stable_diffusion"


@pytest.fixture(scope="module")
def vae():
    return load_network(FOLDER / "vae"), dict(np.load(FOLDER / "vae" / "expected.npz"))


def outputs(network, given):
    variables = {"params": network.params}
    posterior = network.module.apply(variables, given["x"], method="encode")
    decoded = network.module.apply(variables, given["z"], method="decode")
    return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}


def test_output_equals_torch(vae):
    network, given = vae
    assert_near(outputs(network, given), given)


def test_call_decodes_the_mean(vae):
    network, given = vae
    variables = {"params": network.params}
    decoded = network.module.apply(variables, given["mean"], method="decode")
    assert relative_error(network.module.apply(variables, given["x"]), decoded) < TOLERANCE


@pytest.mark.slow
def test_bfloat16_computes_close_and_keeps_float32_outside(vae):
    network, given = vae
    network = network._replace(module=AutoencoderKL(network.module.config, dtype=jnp.bfloat16))
    for name, values in outputs(network, given).items():
        assert values.dtype == jnp.float32
        assert 1e-4 < relative_error(values, given[name]) < 0.1


def test_samples_have_the_mean_and_the_variance():
    mean, logvar = np.array([[[[-1.0, 2.0]]]]), np.log([[[[0.25, 4.0]]]])
    posterior = Gaussian(*(jnp.broadcast_to(x, (40_000, 1, 1, 2)) for x in (mean, logvar)))
    samples = np.asarray(sample_latents(jax.random.key(0), posterior)).reshape(-1, 2)
    # Within five standard errors.
    np.testing.assert_array_less(np.abs(samples.mean(0) - [-1, 2]), [0.0125, 0.05])
    np.testing.assert_allclose(samples.var(0), [0.25, 4.0], rtol=5 * np.sqrt(2 / 40_000))
    again = sample_latents(jax.random.key(0), posterior)
    np.testing.assert_array_equal(np.asarray(again).reshape(-1, 2), samples)


def test_log_variance_is_clipped_as_in_torch(vae):
    network, given = vae
    bias = network.params["quant_conv"]["bias"].at[4:].set(jnp.array([50, -50, 50, -50]))
    params = network.params | {"quant_conv": network.params["quant_conv"] | {"bias": bias}}
    logvar = outputs(network._replace(params=params), given)["logvar"]
    np.testing.assert_array_equal(np.unique(logvar), [-30, 20])


def test_number_of_parameters_at_full_size():
    # torch's, see test_published_network_has_as_many_in_torch.
    config = AutoencoderKLConfig.from_diffusers(FULL)
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) == 83_653_863
    assert config.factor == 8


FULL = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_magic": 1}, r"unknown AutoencoderKL options \['use_magic'\]"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "'DownBlock2D' is not supported"),
        ({"block_out_channels": [128]}, "one length, not 1, 4 and 4"),
        ({"norm_num_groups": 48}, "does not divide the 128"),
        ({"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
        ({"latents_mean": [0.0]}, r"latents_mean \(0.0,\) is not supported"),
        ({"scaling_factor": 0}, "scaling_factor is malformed"),
        ({"use_quant_conv": None}, "use_quant_conv is malformed"),
        ({"act_fn": "tanh"}, "act_fn 'tanh'"),
    ],
)
def test_unsupported_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_diffusers(FULL | options)


def test_wrong_arguments_are_refused(vae):
    network, given = vae
    with pytest.raises(ValueError, match=r"height, width, 3\], not"):
        outputs(network, given | {"x": given["x"][..., :2]})
    with pytest.raises(ValueError, match="multiples of 2, not"):
        outputs(network, given | {"x": given["x"][:, :7]})
    with pytest.raises(ValueError, match=r"height, width, 4\], not"):
        outputs(network, given | {"z": given["z"][..., :3]})


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {"use_quant_conv": False, "act_fn": "gelu"},
        {"use_post_quant_conv": False, "norm_num_groups": 4, "layers_per_block": 2},
        {"mid_block_add_attention": False, "latent_channels": 3},
    ],
)
def test_live_torch(options, torch_side, tmp_path):
    config = torch_side.AUTOENCODER | options
    model = torch_side.torch_autoencoder(config, seed=11)
    given = torch_side.autoencoder_inputs(config, seed=12)
    model.save_pretrained(tmp_path)
    expected = torch_side.autoencoder_outputs(model, given)
    assert_near(outputs(load_network(tmp_path), given), expected)


@pytest.mark.torch
def test_published_network_has_as_many_in_torch(torch_side):
    import torch

    with torch.device("meta"):
        model = torch_side.AutoencoderKL(**FULL)
    shapes = param_shapes(AutoencoderKLConfig.from_diffusers(FULL))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(values.numel() for values in model.parameters())
