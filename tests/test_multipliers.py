import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from jax_unlearn import multipliers

POINTS = np.random.default_rng(0).normal(scale=1.2, size=(12, 4))
MAXIMUM = np.array([0.5, 1.0, 0.1, 2.0])
MARGIN = 0.05
PROJECTIONS = {
    "non_negative": (multipliers.non_negative(), [(0, None)] * 4, np.inf),
    "box": (multipliers.box(MAXIMUM), [(0, high) for high in MAXIMUM], np.inf),
    "scalar box": (multipliers.box(0.7), [(0, 0.7)] * 4, np.inf),
    "capped_simplex": (multipliers.capped_simplex(MARGIN), [(0, None)] * 4, 1 - MARGIN),
}


def nearest(point, bounds, total):
    """The quadratic programme that defines the projection, by SLSQP."""
    result = optimize.minimize(
        lambda x: 0.5 * ((x - point) ** 2).sum(),
        np.full(4, 0.05),
        jac=lambda x: x - point,
        bounds=bounds,
        constraints=[{"type": "ineq", "fun": lambda x: min(total, 1e3) - x.sum()}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 200},
    )
    assert result.success
    return result.x


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_the_nearest_points(name):
    project, bounds, total = PROJECTIONS[name]
    got = jax.jit(jax.vmap(project))(jnp.float32(POINTS))
    expected = np.array([nearest(point, bounds, total) for point in POINTS])
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(jax.vmap(project)(got), got, atol=1e-6)  # idempotent
    assert (got >= 0).all()
    assert (got.sum(axis=1) <= total + 1e-6).all()


def test_capped_simplex_leaves_feasible_points_alone():
    project = multipliers.capped_simplex(0.1)
    for point in ([0.0, 0.0], [0.3, 0.4], [0.45, 0.45]):
        np.testing.assert_allclose(project(jnp.array(point)), point, atol=1e-7)
    np.testing.assert_allclose(project(jnp.array([5.0])), [0.9], rtol=1e-6)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_derivatives_of_projections(name):
    """Against finite differences of the quadratic programme's solution."""
    project, bounds, total = PROJECTIONS[name]
    jacobian = jax.jit(jax.vmap(jax.jacobian(project)))(jnp.float32(POINTS[:3]))
    for point, got in zip(POINTS[:3], jacobian, strict=True):
        step = 1e-3
        columns = [
            (nearest(point + step * e, bounds, total) - nearest(point - step * e, bounds, total))
            / (2 * step)
            for e in np.eye(4)
        ]
        np.testing.assert_allclose(got, np.column_stack(columns), atol=1e-3)


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.1, 2.0])
def test_capped_simplex_refuses_margins(margin):
    with pytest.raises(ValueError, match="margin"):
        multipliers.capped_simplex(margin)


VIOLATIONS = np.random.default_rng(1).normal(size=(20, 2))


def run(transformation):
    state, path = transformation.init(jnp.zeros(2)), [jnp.zeros(2)]
    update = jax.jit(transformation.update)
    for violation in VIOLATIONS:
        updates, state = update(-jnp.float32(violation), state, path[-1])
        path.append(path[-1] + updates)
    return np.array(path)


@pytest.mark.parametrize(("integral", "proportional", "nu"), [(0.1, 2.0, 0.0), (0.3, 0.5, 0.9)])
def test_nu_pi_is_the_controller_of_the_paper(integral, proportional, nu):
    """Sohrabi et al. 2024: with ξ_0 = e_0, P acts on ξ's change and I on the error."""
    multiplier, smoothed, expected = np.zeros(2), VIOLATIONS[0], [np.zeros(2)]
    for error in VIOLATIONS:
        before, smoothed = smoothed, nu * smoothed + (1 - nu) * error
        multiplier = multiplier + integral * error + proportional * (smoothed - before)
        expected.append(multiplier)
    got = run(multipliers.nu_pi(integral, proportional, nu))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # Summed up: λ_k = κ_i Σ e + κ_p (ξ_k − e_0), a PI controller.
    closed = integral * VIOLATIONS.sum(axis=0) + proportional * (smoothed - VIOLATIONS[0])
    np.testing.assert_allclose(got[-1], closed, atol=1e-5)


def test_nu_pi_without_its_proportional_part_is_gradient_ascent():
    got = run(multipliers.nu_pi(0.3, 0.0, 0.5))
    np.testing.assert_allclose(got, run(optax.sgd(0.3)), atol=1e-6)
    np.testing.assert_allclose(got[-1], 0.3 * VIOLATIONS.sum(axis=0), atol=1e-5)


def test_nu_pi_leaves_a_constraint_without_examples_alone():
    controller = multipliers.nu_pi(0.1, 0.5, 0.3)
    both, alone = controller.init(jnp.zeros(2)), controller.init(jnp.zeros(1))
    for first, second in [(0.0, 1.0), (2.0, 0.0), (1.5, 0.0), (0.0, 3.0), (-1.0, 2.0)]:
        change, both = controller.update(-jnp.array([first, second]), both)
        if first:
            expected, alone = controller.update(-jnp.array([first]), alone)
            np.testing.assert_allclose(change[0], expected[0], rtol=1e-6)
        else:
            assert change[0] == 0
    np.testing.assert_allclose(both.smoothed[0], alone.smoothed[0], rtol=1e-6)


def test_l1_ball_is_the_nearest_point():
    rng = np.random.default_rng(5)
    for scale in (0.1, 1.0, 4.0):
        point = scale * rng.normal(size=4)
        got = np.asarray(multipliers.l1_ball(0.2)(jnp.asarray(point, jnp.float32)))
        # In positive and negative parts the ball is a simplex, which SLSQP handles.
        found = optimize.minimize(
            lambda z, point=point: ((z[:4] - z[4:] - point) ** 2).sum(),
            np.full(8, 0.01),
            bounds=[(0, None)] * 8,
            constraints={"type": "ineq", "fun": lambda z: 0.8 - z.sum()},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        np.testing.assert_allclose(got, found.x[:4] - found.x[4:], atol=2e-4)
    with pytest.raises(ValueError, match="margin"):
        multipliers.l1_ball(1.0)
