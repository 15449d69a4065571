import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from jax_unlearn.metrics import kernel_distance


def _features(seed, n, m, d=5, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + shift


def _double_loop(x, y, degree=3, gamma=None, coef0=1.0):
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def kernel(a, b):
        return (gamma * float(a @ b) + coef0) ** degree

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    between = sum(kernel(a, b) for a in x for b in y)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)


@pytest.mark.parametrize(
    "options", [{}, {"degree": 2, "gamma": 0.3, "coef0": 0.5}, {"degree": 1, "coef0": 0.0}]
)
def test_value_is_the_double_loop_of_the_definition(options):
    x, y = _features(0, 17, 23, shift=0.4)
    value = kernel_distance(x, y, **options).value
    np.testing.assert_allclose(value, _double_loop(x, y, **options), rtol=2e-5, atol=2e-6)


def test_value_agrees_with_the_kernel_of_sklearn():
    x, y = _features(1, 300, 200, d=16, shift=0.2)
    k_xx, k_yy, k_xy = polynomial_kernel(x), polynomial_kernel(y), polynomial_kernel(x, y)
    expected = (
        (k_xx.sum() - np.trace(k_xx)) / (300 * 299)
        + (k_yy.sum() - np.trace(k_yy)) / (200 * 199)
        - 2 * k_xy.mean()
    )
    np.testing.assert_allclose(kernel_distance(x, y).value, expected, rtol=1e-4)


@pytest.mark.slow
def test_degree_one_is_the_unbiased_squared_distance_of_the_means():
    x, y = _features(2, 50, 40, shift=1.0)
    squared = np.square(x.mean(0) - y.mean(0)).sum()
    noise = x.var(axis=0, ddof=1).sum() / 50 + y.var(axis=0, ddof=1).sum() / 40
    value = kernel_distance(x, y, degree=1, gamma=1.0).value
    np.testing.assert_allclose(value, squared - noise, rtol=1e-4)


def _draws(n, m, d, shift, repeats=800):
    def one(key):
        key_x, key_y = jax.random.split(key)
        x = jax.random.normal(key_x, (n, d))
        y = shift + (1 + 0.5 * shift) * jax.random.normal(key_y, (m, d))
        return kernel_distance(x, y)

    return jax.jit(lambda keys: jax.lax.map(one, keys))(
        jax.random.split(jax.random.key(7), repeats)
    )


def test_mean_over_draws_of_one_distribution_is_zero():
    values = np.asarray(_draws(40, 60, 8, 0.0).value)
    assert abs(values.mean()) < 3 * values.std(ddof=1) / np.sqrt(len(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "m", "shift"), [(60, 90, 0.0), (40, 40, 0.0), (60, 90, 0.2), (60, 40, 1.0)]
)
def test_standard_error_is_the_spread_over_draws(n, m, shift):
    estimate = _draws(n, m, 8, shift)
    spread = np.asarray(estimate.value).std(ddof=1)
    typical = np.sqrt(np.square(np.asarray(estimate.stderr)).mean())
    assert 0.8 < typical / spread < 1.25


@pytest.mark.slow
def test_variance_terms_of_a_linear_kernel_are_exact():
    # Under k(a, b) = ab the statistic of x ~ N(μ, 1) and y ~ N(0, 1), d = 1, has
    # A = μ² on both sides and B = 1 in all three terms.
    n, m, mean = 4000, 3000, 2.0
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(n, 1)) + mean, rng.normal(size=(m, 1))
    stderr = kernel_distance(x, y, degree=1, coef0=0.0).stderr
    variance = 4 * mean**2 * (1 / n + 1 / m) + 2 / n**2 + 2 / m**2 + 4 / (n * m)
    np.testing.assert_allclose(stderr, np.sqrt(variance), rtol=0.05)


@pytest.mark.slow
def test_a_constant_in_the_kernel_changes_nothing_and_sets_swap():
    x, y = _features(3, 30, 20, shift=0.5)
    one = kernel_distance(x, y, degree=1, coef0=1.0)
    for other in (kernel_distance(x, y, degree=1, coef0=50.0), kernel_distance(y, x, degree=1)):
        np.testing.assert_allclose(other.value, one.value, rtol=1e-3)
        np.testing.assert_allclose(other.stderr, one.stderr, rtol=1e-3)


@pytest.mark.slow
def test_float32_keeps_its_digits_over_thousands_of_samples():
    x, y = _features(4, 1500, 1500, d=8, shift=0.02)
    single = kernel_distance(x + 1, y + 1)
    with jax.enable_x64(True):
        double = kernel_distance(x + 1, y + 1)
    assert abs(float(single.value) - float(double.value)) < 0.05 * float(double.stderr)
    np.testing.assert_allclose(single.stderr, double.stderr, rtol=1e-3)


@pytest.mark.parametrize("shapes", [((3, 2), (9, 2)), ((9, 2), (9, 3)), ((9,), (9,))])
def test_refuses_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="n and m at least 4"):
        kernel_distance(jnp.ones(shapes[0]), jnp.ones(shapes[1]))
