import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, relative_error

from jax_unlearn.models import blocks
from jax_unlearn.models.unet_2d import UNet2DConfig, UNet2DModel, init_params, param_shapes
from jax_unlearn.pretrained import UNet2DDenoiser, load_pretrained

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "unet_2d"
SILENT = json.loads((FOLDER / "silent_options.json").read_text())
NETWORKS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def tiny():
    model = load_pretrained(FOLDER / "tiny")
    given = np.load(FOLDER / "tiny" / "expected.npz")
    outputs = dict(np.load(FOLDER / "silent_options.npz"))
    return model, {name: given[name] for name in given.files}, outputs


def apply_tiny(tiny, options, x_t=None):
    model, given, _ = tiny
    config = UNet2DConfig.from_diffusers(model.config.unet | options)
    params = model.params
    if not config.add_attention:
        mid = {k: v for k, v in params["mid_block"].items() if not k.startswith("attentions")}
        params = params | {"mid_block": mid}
    x_t = given["x_t"] if x_t is None else x_t
    # Not jitted: operations compiled for one option serve all others.
    return UNet2DModel(config).apply({"params": params}, x_t, given["t"], given["cond"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_output_equals_torch(name):
    model = load_pretrained(FOLDER / name)
    given = np.load(FOLDER / name / "expected.npz")
    cond = given["cond"] if "cond" in given.files else None
    output = model.apply(model.params, given["x_t"], given["t"], cond)
    assert relative_error(output, given["output"]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", SILENT)
def test_silent_option_equals_torch(tiny, name):
    _, given, outputs = tiny
    assert relative_error(given["output"], outputs[name]) > 10 * TOLERANCE
    assert relative_error(apply_tiny(tiny, SILENT[name]), outputs[name]) < TOLERANCE


def test_missing_head_dim_is_eight(tiny):
    model, _, _ = tiny
    config = dict(model.config.unet)
    del config["attention_head_dim"]
    assert UNet2DConfig.from_diffusers(config).attention_head_dim == 8
    assert UNet2DConfig.from_diffusers(config | {"attention_head_dim": None}) != (
        UNet2DConfig.from_diffusers(config)
    )


def test_large_mean_loses_no_digits(tiny):
    _, given, outputs = tiny
    output = apply_tiny(tiny, {}, x_t=given["x_t"] + 30)
    assert relative_error(output, outputs["large_mean"]) < TOLERANCE


def test_jit_equals_eager(tiny):
    model, given, _ = tiny
    apply = jax.jit(model.apply)
    output = apply(model.params, given["x_t"], given["t"], given["cond"])
    assert relative_error(output, given["output"]) < TOLERANCE


@pytest.mark.slow
def test_bfloat16_computes_close_and_keeps_float32_outside(tiny):
    model, given, _ = tiny
    apply = jax.jit(UNet2DDenoiser(model.apply.config, dtype=jnp.dtype(jnp.bfloat16)))
    output = apply(model.params, given["x_t"], given["t"], given["cond"])
    assert output.dtype == jnp.float32
    assert 1e-4 < relative_error(output, given["output"]) < 0.1


def test_one_time_step_for_all_images(tiny):
    model, given, _ = tiny
    network = UNet2DModel(model.apply.config)
    variables, rest = {"params": model.params}, given["cond"]
    one = network.apply(variables, given["x_t"], 7, rest)
    each = network.apply(variables, given["x_t"], jnp.array([7, 7]), rest)
    np.testing.assert_array_equal(one, each)


def test_labels_outside_the_table_are_not_replaced(tiny):
    model, given, _ = tiny
    for label in (-1, 4):
        labels = np.array([label, 0])
        output = model.apply(model.params, given["x_t"], given["t"], labels)
        assert np.isnan(output[0]).all()
        assert np.isfinite(output[1]).all()


def test_wrong_arguments_are_refused(tiny):
    model, given, _ = tiny
    x_t, t, cond = given["x_t"], given["t"], given["cond"]
    apply = model.apply
    with pytest.raises(ValueError, match="multiples of 2, not"):
        apply(model.params, np.zeros((2, 8, 7, 2), np.float32), t, cond)
    with pytest.raises(ValueError, match=r"height, width, 2\], not"):
        apply(model.params, np.zeros((2, 8, 8, 3), np.float32), t, cond)
    with pytest.raises(ValueError, match="class-conditional"):
        apply(model.params, x_t, t, None)
    with pytest.raises(ValueError, match=r"shape \(2,\), not \(3,\)"):
        apply(model.params, x_t, t, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="must be integers"):
        apply(model.params, x_t, t, np.zeros(2, np.float32))
    unconditional = load_pretrained(FOLDER / "unconditional")
    with pytest.raises(ValueError, match="no class embedding"):
        unconditional.apply(unconditional.params, x_t, t, cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_magic": True}, r"unknown UNet2DModel options \['use_magic'\]"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["AttnUpBlock2D", "KUpBlock2D"]}, "KUpBlock2D"),
        ({"block_out_channels": [8, 16, 16]}, "one length, not 3, 2 and 2"),
        ({"block_out_channels": [8, 18]}, "does not divide the 18"),
        ({"block_out_channels": 8}, "block_out_channels is malformed"),
        ({"block_out_channels": []}, "block_out_channels is malformed"),
        ({"layers_per_block": [1, 2]}, "layers_per_block is malformed"),
        ({"attention_head_dim": 32}, "leaves no head"),
        ({"attention_head_dim": 0}, "attention_head_dim is malformed"),
        ({"norm_num_groups": None}, "norm_num_groups is malformed"),
        ({"downsample_padding": 2}, "downsample_padding 2 is not supported"),
        ({"act_fn": "tanh"}, "act_fn 'tanh'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor is malformed"),
        ({"time_embedding_type": "learned"}, "time_embedding_type 'learned'"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"sample_size": [8, 8, 8]}, "sample_size is malformed"),
        ({"flip_sin_to_cos": "yes"}, "flip_sin_to_cos is malformed"),
    ],
)
def test_unsupported_config_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConfig.from_diffusers(tiny[0].config.unet | options)


def test_neutral_keys_and_old_block_names_are_accepted(tiny):
    config = tiny[0].config.unet
    old = {
        "_name_or_path": "somewhere",
        "a_later_option": None,
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        "downsample_type": None,
    }
    assert UNet2DConfig.from_diffusers(config | old) == UNet2DConfig.from_diffusers(config)


def test_sample_shape(tiny):
    config = UNet2DConfig.from_diffusers(tiny[0].config.unet | {"sample_size": [8, 12]})
    assert config.sample_shape == (8, 12, 2)
    with pytest.raises(ValueError, match="no sample_size"):
        _ = UNet2DConfig().sample_shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "fourier", "class_identity", "class_timestep"])
def test_init_params_fills_every_parameter(name):
    config = json.loads((FOLDER / name / "config.json").read_text())
    params = init_params(config, jax.random.key(0))
    shapes = param_shapes(UNet2DConfig.from_diffusers(config))
    fits = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, params, shapes)
    assert all(jax.tree.leaves(fits))
    assert np.std(params["conv_in"]["kernel"]) == pytest.approx(1 / np.sqrt(18), rel=0.3)
    assert (np.asarray(params["conv_norm_out"]["scale"]) == 1).all()
    other = init_params(config, jax.random.key(1))
    assert not np.array_equal(params["conv_in"]["kernel"], other["conv_in"]["kernel"])


def test_fourier_frequencies_are_not_trained():
    module = blocks.FourierProjection(4)
    variables = {"params": {"weight": jnp.arange(1.0, 5.0)}}
    gradient = jax.grad(lambda v: module.apply(v, jnp.array([5])).sum())(variables)
    assert not np.any(gradient["params"]["weight"])


def test_sinusoidal_embedding_of_odd_width():
    t = jnp.array([0, 3])
    embedding = blocks.sinusoidal_embedding(t, 5, flip_sin_to_cos=True, freq_shift=1)
    angles = np.array([[0, 0], [3, 3e-4]])
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((2, 1))], axis=1)
    np.testing.assert_allclose(embedding, expected, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_finite_and_the_same_with_rematerialisation():
    given = np.load(FOLDER / "no_mid_block" / "expected.npz")

    def gradient(remat):
        model = load_pretrained(FOLDER / "no_mid_block", remat=remat)

        def loss(params):
            return jnp.sum(model.apply(params, given["x_t"], given["t"], given["cond"]) ** 2)

        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(model.params))) == remat
        return jax.jit(jax.grad(loss))(model.params)

    ours, again = gradient(False), gradient(True)
    # Biases before a norm have no gradient but rounding.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(ours))
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(again), strict=True):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)
        np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-6 * largest)


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {"sample_size": 16, "downsample_padding": 0, "act_fn": "gelu", "freq_shift": 1},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
        {"time_embedding_type": "fourier", "upsample_type": "resnet"},
        {"mid_block_type": None, "dropout": 0.3, "center_input_sample": True},
    ],
)
def test_live_torch(options, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(FOLDER.parent)
    import write_unet_fixtures as torch_side

    config = torch_side.SMALLEST | options
    network = torch_side.torch_unet(config, seed=11)
    network.save_pretrained(tmp_path)
    given = torch_side.inputs(config, seed=12)
    model = load_pretrained(tmp_path)
    output = model.apply(model.params, given["x_t"], given["t"], given["cond"])
    assert relative_error(output, torch_side.torch_output(network, given)) < TOLERANCE
