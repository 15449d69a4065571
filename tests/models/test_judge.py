import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.signal import correlate

from jax_unlearn.models.judge import Judge, load_judge, save_judge


@pytest.fixture(scope="module")
def small():
    module = Judge(num_labels=3, widths=(4, 5), num_features=6)
    images = jax.random.uniform(jax.random.key(0), (2, 9, 12, 2), minval=-1.0)
    params = module.init(jax.random.key(1), images)["params"]
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    return module, params, images


def _conv(image, kernel, bias, stride):
    """Cross-correlation [height, width, in] with [k, k, in, out], zeros around."""
    out = []
    for number in range(kernel.shape[-1]):
        pad = kernel.shape[0] // 2
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        out.append(correlate(padded, kernel[..., number], "valid")[..., 0] + bias[number])
    return np.stack(out, -1)[::stride, ::stride]


def test_forward_pass_agrees_with_scipy(small):
    module, params, images = small
    output = module.apply({"params": params}, images)
    p = jax.tree.map(np.float64, params)
    for image, logits, features in zip(np.float64(images), *output, strict=True):
        hidden = np.maximum(_conv(image, p["conv_0"]["kernel"], p["conv_0"]["bias"], 2), 0)
        hidden = np.maximum(_conv(hidden, p["conv_1"]["kernel"], p["conv_1"]["bias"], 1), 0)
        height, width = hidden.shape[0] // 2, hidden.shape[1] // 2
        pooled = [
            [hidden[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for j in range(width)]
            for i in range(height)
        ]
        dense = np.ravel(pooled) @ p["features"]["kernel"] + p["features"]["bias"]
        dense = np.maximum(dense, 0)
        np.testing.assert_allclose(features, dense, atol=1e-5)
        expected = dense @ p["logits"]["kernel"] + p["logits"]["bias"]
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_default_judge_is_small():
    module = Judge()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) <= 150_000
    output = jax.eval_shape(module.apply, shapes, jnp.zeros((3, 28, 28, 1)))
    assert output.logits.shape == (3, 10)
    assert output.features.shape == (3, 64)


@pytest.mark.parametrize("shape", [(2, 9, 12), (2, 3, 12, 2)])
def test_refuses_other_images(small, shape):
    with pytest.raises(ValueError, match="at least 4 pixels"):
        small[0].init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 0), (ml_dtypes.bfloat16, 0.05)])
def test_round_trip(tmp_path, small, dtype, tolerance):
    module, params, images = small
    path = tmp_path / "small.safetensors"
    save_judge(path, module, params, image_shape=(9, 12, 2), dtype=dtype, about={"data": "none"})
    assert {value.dtype for value in load_file(path).values()} == {np.dtype(dtype)}
    logits, features = load_judge(path)
    output = jax.jit(module.apply)({"params": params}, images)
    np.testing.assert_allclose(logits(images), output.logits, atol=tolerance)
    np.testing.assert_allclose(features(np.asarray(images)), output.features, atol=tolerance)
    assert logits(images).dtype == jnp.float32
    assert json.loads(path.with_suffix(".json").read_text())["about"] == {"data": "none"}
    with pytest.raises(ValueError, match="takes images"):
        logits(jnp.zeros((2, 12, 9, 2)))


def test_refuses_files_that_are_no_judge(tmp_path, small):
    module, params, _ = small
    path = tmp_path / "judge.safetensors"
    with pytest.raises(ValueError, match="safetensors file"):
        save_judge(tmp_path / "judge.bin", module, params, image_shape=(9, 12, 2))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        save_judge(path, module, params, image_shape=(9, 12, 2), dtype=np.float16)
    save_judge(path, module, params, image_shape=(9, 12, 2))

    tensors = load_file(path)
    save_file({**tensors, "logits.bias": np.zeros(4, np.float32)}, path)
    with pytest.raises(ValueError, match="json file describes"):
        load_judge(path)
    del tensors["conv_0.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="json file describes"):
        load_judge(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="write judges with save_judge"):
        load_judge(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"has no judge\.json"):
        load_judge(path)
