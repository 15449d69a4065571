import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn.models import blocks

CASES = {
    "same": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1, "padding": (0, 0)},
    "stride": {"kernel_size": 3, "stride": 2},
    "uneven_padding": {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
    "no_padding": {"kernel_size": 3, "padding": (0, 0)},
}


def values(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def given(kernel_size, channels=8, features=16, batch=3, size=6, dtype=jnp.float32, **_):
    x = jnp.asarray(values(batch, size, size, channels, seed=0), dtype)
    kernel = values(kernel_size, kernel_size, channels, features, seed=1)
    bias = values(features, seed=2)
    return x, {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def conv(params, x, dtype=None, **options):
    features = params["bias"].shape[0]
    return blocks.Conv(features, dtype=dtype, **options).apply({"params": params}, x)


def by_sums(params, x, kernel_size, stride=1, padding=(1, 1)):
    """The formula in the docstring of `Conv`, term by term in float64."""
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    x = np.pad(np.asarray(x, np.float64), ((0, 0), padding, padding, (0, 0)))
    side = (x.shape[1] - kernel_size) // stride + 1
    y = np.zeros((x.shape[0], side, side, bias.size))
    for h in range(side):
        for w in range(side):
            rows = slice(stride * h, stride * h + kernel_size)
            columns = slice(stride * w, stride * w + kernel_size)
            y[:, h, w] = np.tensordot(x[:, rows, columns], kernel, 3) + bias
    return y


def by_lax(params, x, kernel_size, stride=1, padding=(1, 1)):
    del kernel_size
    y = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params["bias"]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_conv_is_its_formula(options):
    x, params = given(**options)
    expected = by_sums(params, x, **options)
    np.testing.assert_allclose(conv(params, x, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_conv_computes_in_bfloat16(options):
    x, params = given(**options, dtype=jnp.bfloat16)
    y = conv(params, x, dtype=jnp.bfloat16, **options)
    assert y.dtype == jnp.bfloat16
    expected = by_sums(params, x, **options)
    assert np.abs(np.asarray(y, np.float64) - expected).max() < 0.02 * np.abs(expected).max()
    gradient = jax.grad(lambda p: conv(p, x, dtype=jnp.bfloat16, **options).sum())(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def _nonlinear(forward, options):
    def loss(params, x):
        return jnp.sum(jnp.tanh(forward(params, x, **options) / 8))

    return loss


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_gradients_equal_those_of_lax(options):
    x, params = given(**options)
    actual, expected = (
        jax.grad(_nonlinear(forward, options), argnums=(0, 1))(params, x)
        for forward in (conv, by_lax)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["same", "uneven_padding"])
def test_second_derivatives_equal_those_of_lax(name):
    options = CASES[name]
    x, params = given(**options)
    direction = jax.tree.map(
        lambda leaf: jnp.asarray(values(*leaf.shape, seed=3), leaf.dtype), (params, x)
    )

    def reverse_over_reverse(loss):
        def along(*point):
            gradient = jax.grad(loss, argnums=(0, 1))(*point)
            products = jax.tree.map(lambda a, b: jnp.vdot(a, b), gradient, direction)
            return sum(jax.tree.leaves(products))

        return jax.grad(along, argnums=(0, 1))(params, x)

    def forward_over_reverse(loss):
        return jax.jvp(jax.grad(loss, argnums=(0, 1)), (params, x), direction)[1]

    expected = reverse_over_reverse(_nonlinear(by_lax, options))
    for derivative in (reverse_over_reverse, forward_over_reverse):
        actual = derivative(_nonlinear(conv, options))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), actual, expected
        )


def test_gradient_equals_finite_differences():
    options = CASES["same"]
    x, params = given(**options, batch=2)
    direction = values(*params["kernel"].shape, seed=4)
    cotangent = values(2, 6, 6, 16, seed=5)

    def along(step):
        moved = {**params, "kernel": np.asarray(params["kernel"], np.float64) + step * direction}
        return np.vdot(by_sums(moved, x, **options), cotangent)

    gradient = jax.grad(lambda p: jnp.vdot(conv(p, x, **options), cotangent))(params)
    slope = np.vdot(np.asarray(gradient["kernel"], np.float64), direction)
    np.testing.assert_allclose(slope, (along(1e-2) - along(-1e-2)) / 2e-2, rtol=1e-5)


def test_conv_vmaps_over_kernels():
    x, params = given(3)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def gradient(params):
        return jax.grad(_nonlinear(conv, {"kernel_size": 3}))(params, x)

    actual = jax.vmap(gradient)(many)
    expected = [gradient(jax.tree.map(lambda leaf, i=i: leaf[i], many)) for i in range(2)]
    jax.tree.map(
        lambda a, *b: np.testing.assert_allclose(a, np.stack(b), rtol=1e-4, atol=1e-5),
        actual,
        *expected,
    )


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "head_dim", "keys", "flash"),
    [
        ("NVIDIA H100", "9.0", jnp.bfloat16, 160, 256, True),
        ("NVIDIA A100", "8.0", jnp.float16, 40, 4096, True),
        ("NVIDIA A100", "8.0", jnp.bfloat16, 160, 256, False),
        ("NVIDIA V100", "7.0", jnp.bfloat16, 40, 256, False),
        ("NVIDIA H100", "9.0", jnp.float32, 40, 256, False),
        ("NVIDIA H100", "9.0", jnp.bfloat16, 40, 77, False),
        ("NVIDIA H100", "9.0", jnp.bfloat16, 42, 256, False),
        ("AMD Instinct MI300X", "gfx942", jnp.bfloat16, 40, 256, False),
    ],
)
def test_flash_kernel_where_there_is_one(
    monkeypatch, kind, capability, dtype, head_dim, keys, flash
):
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    (cpu, *_) = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert blocks._kernel(jnp.dtype(dtype), head_dim, keys) == ("cudnn" if flash else None)
    with jax.default_device(cpu):
        assert blocks._kernel(jnp.dtype(dtype), head_dim, keys) is None


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU with cuDNN")
@pytest.mark.parametrize("head_dim", [40, 160])
def test_flash_kernel_is_attention(head_dim):
    assert blocks._kernel(jnp.bfloat16, head_dim, 256) == "cudnn"
    x, weight = jax.random.normal(jax.random.key(1), (2, 2, 256, 8 * head_dim))

    def loss(params, dtype):
        module = blocks.Attention(heads=8, head_dim=head_dim, residual=False, dtype=dtype)
        return (weight * module.apply(params, x)).sum()

    params = blocks.Attention(heads=8, head_dim=head_dim).init(jax.random.key(0), x)
    found = jax.grad(loss)(params, jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        expected = jax.grad(loss)(params, jnp.float32)
    for part, name in itertools.product(expected["params"], ("kernel", "bias")):
        value, exact = (gradient["params"][part][name] for gradient in (found, expected))
        # The softmax takes no notice of the keys' bias: its derivative is zero.
        scale = expected["params"]["to_q"][name] if part == "to_k" else exact
        assert jnp.linalg.norm(value - exact) < 0.03 * jnp.linalg.norm(scale)
