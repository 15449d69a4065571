import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jax_unlearn.metrics import frechet_distance


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 7), (60, 500, 30)])
def test_agrees_with_the_matrix_square_root_of_scipy(n, m, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 1.0
    y = rng.normal(size=(m, d)) @ rng.normal(size=(d, d))
    s, r = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s @ r).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + r - 2 * root)
    np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-4)


def test_one_dimension():
    rng = np.random.default_rng(1)
    x, y = 3 * rng.normal(size=(50, 1)) + 1, rng.normal(size=(80, 1))
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-5)


def test_diagonal_covariances():
    # The corners of a box have means of 0 and a diagonal covariance exactly.
    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    scale_x, scale_y = np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.5, 3.0])
    expected = 2.0**2 + 8 / 7 * np.square(scale_x - scale_y).sum()
    value = frechet_distance(corners * scale_x + [2, 0, 0], corners * scale_y)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_more_dimensions_than_samples():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(10, 100)), rng.normal(size=(12, 100))
    assert abs(float(frechet_distance(x, x))) < 1e-3
    product = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(9 * 11)
    expected = (
        np.square(x.mean(0) - y.mean(0)).sum()
        + x.var(axis=0, ddof=1).sum()
        + y.var(axis=0, ddof=1).sum()
        - 2 * np.linalg.svd(product, compute_uv=False).sum()
    )
    np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-4)


def test_bias_is_as_the_docstring_says():
    n, m, d = 400, 600, 12

    def one(key):
        key_x, key_y = jax.random.split(key)
        return frechet_distance(jax.random.normal(key_x, (n, d)), jax.random.normal(key_y, (m, d)))

    values = jax.lax.map(one, jax.random.split(jax.random.key(0), 100))
    expected = (1 / n + 1 / m) * (d + d * (d + 1) / 4)
    np.testing.assert_allclose(values.mean(), expected, rtol=0.05)


@pytest.mark.parametrize("shapes", [((1, 2), (9, 2)), ((9, 2), (9, 3)), ((9,), (9,))])
def test_refuses_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="n and m at least 2"):
        frechet_distance(jnp.ones(shapes[0]), jnp.ones(shapes[1]))
