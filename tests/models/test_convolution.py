"""The convolution and its derivatives against sums over windows and against XLA's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn.models.convolution import convolve

CASES = [
    {"stride": 1, "padding": (1, 1)},
    {"stride": 2, "padding": (1, 1)},
    {"stride": 2, "padding": (0, 1)},
    {"stride": 1, "padding": (0, 0)},
    {"stride": 3, "padding": (2, 0)},
]


def data(height=7, width=10, kernel=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, 3)).astype(np.float32)
    return x, rng.standard_normal((kernel, kernel, 3, 4)).astype(np.float32)


def windows(x, kernel, stride, padding):
    """The sum of the docstring, in numpy and float64."""
    k = kernel.shape[0]
    x = np.pad(np.float64(x), ((0, 0), padding, padding, (0, 0)))
    rows, columns = ((size - k) // stride + 1 for size in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for h in range(rows):
        for w in range(columns):
            patch = x[:, stride * h : stride * h + k, stride * w : stride * w + k]
            y[:, h, w] = np.einsum("bijc,ijco->bo", patch, kernel)
    return y


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_it_is_the_sum_over_windows(options, kernel):
    x, k = data(kernel=kernel)
    np.testing.assert_allclose(convolve(x, k, **options), windows(x, k, **options), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_derivatives_agree_with_finite_differences(options, kernel):
    def weighted(x, k):
        y = convolve(x, k, **options)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    with jax.enable_x64(True):
        arguments = [jnp.asarray(a, jnp.float64) for a in data(kernel=kernel)]
        for order in (1, 2):
            chex.assert_numerical_grads(weighted, arguments, order=order)


@pytest.mark.parametrize("options", CASES)
def test_inside_a_scan_gradients_are_those_outside(options):
    x, k = data()

    def step(k, scale):
        return jnp.square(convolve(scale * x, k, **options)).sum()

    def scanned(k):
        return jax.lax.scan(lambda s, a: (s + step(k, a), None), 0.0, jnp.arange(1.0, 4.0))[0]

    direct = jax.grad(lambda k: sum(step(k, a) for a in (1.0, 2.0, 3.0)))(k)
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(k), direct, rtol=1e-5, atol=1e-3)


def test_vmap_over_either_argument_and_over_gradients():
    x, k = data()
    xs, ks = (jnp.stack([a, 2 * a, -a]) for a in (x, k))
    options = CASES[1]
    one = windows(x, k, **options)
    for over, many in (((0, None), (xs, k)), ((None, 0), (x, ks))):
        y = jax.vmap(lambda x, k: convolve(x, k, **options), in_axes=over)(*many)
        np.testing.assert_allclose(y, np.stack([one, 2 * one, -one]), atol=1e-4)
    gradient = jax.grad(lambda k: convolve(x, k, **options).sum())
    np.testing.assert_allclose(jax.vmap(gradient)(ks), np.stack([gradient(k)] * 3), atol=1e-4)


def test_on_a_cpu_the_derivatives_have_the_form_of_the_fast_kernels():
    x, k = data()
    gradient = jax.jit(jax.grad(lambda x, k: convolve(x, k, padding=(1, 1)).sum() ** 2, (0, 1)))
    lowered = gradient.trace(x, k).lower(lowering_platforms=("cpu",)).as_text()
    forms = [line for line in lowered.splitlines() if "stablehlo.convolution" in line]
    assert len(forms) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in forms)
    assert not any("reverse = [true" in line for line in forms)
