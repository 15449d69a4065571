import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from jax_unlearn import mixtures, multipliers

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


def test_free_multipliers_are_all_numbers():
    np.testing.assert_array_equal(multipliers.free()(jnp.float32(POINTS)), jnp.float32(POINTS))


def stepped(dual, value, thresholds, current, stderr=None):
    """λ after one step, fed as `primal_dual` feeds every dual transformation."""
    value, thresholds, current = (jnp.asarray(x, float) for x in (value, thresholds, current))
    more = {} if stderr is None else {"stderr": jnp.asarray(stderr, float)}
    state = dual.init(current)
    change, _ = dual.update(thresholds - value, state, current, thresholds=thresholds, **more)
    return optax.apply_updates(current, change)


@pytest.mark.slow
def test_a_step_is_scaled_by_what_the_model_has_followed():
    """h of 0 and 1, where p_λ has odds e^−λ times those of q, in each of two groups alike."""
    stored = np.repeat([[1.0], [0.0], [1.0], [0.0]], (20, 80, 10, 40), axis=0)
    groups = np.repeat([0, 1], (100, 50))

    def multiplier(share):
        return np.log(0.2 / 0.8) - np.log(share / (1 - share))

    for margin in (0.0, 1.0):
        dual = multipliers.stored_dual(stored, groups=groups, margin=margin)
        for current, gain in ((2.0, 2.0 / multiplier(0.1)), (0.5, 1.0)):
            reached = 0.1 + margin * 0.03
            expected = current + gain * (multiplier(0.08) - multiplier(reached))
            found = stepped(dual, [0.1], [0.08], [current], stderr=[0.03])
            np.testing.assert_allclose(found, [expected], rtol=1e-4)
        # A model that shows it no less than q has followed nothing: the longest step.
        np.testing.assert_allclose(stepped(dual, [0.9], [0.1], [2.0]), [4.0])


@pytest.mark.slow
def test_a_step_has_bounds():
    dual = multipliers.stored_dual(np.repeat(np.eye(3)[:, :2], (20, 20, 60), axis=0))
    current = np.array([3.0, 2.0])
    np.testing.assert_allclose(stepped(dual, [0.1, 0.1], [0.01, 0.01], current), 2 * current)
    # Shares below 0, as a corrected classifier may give, are less than any λ leaves.
    np.testing.assert_allclose(
        stepped(dual, [-0.1, 0.1], [0.05, 0.01], current), [1.5, 4.0], rtol=1e-4
    )
    np.testing.assert_allclose(stepped(dual, [0.1, 0.3], [0.01, 0.3], np.zeros(2)), [1.0, 0.0])


def test_negative_values_pose_the_same_problem():
    """h − c and ε − c for h and ε: the same step, with more samples of it below 0 than above."""
    stored = np.repeat(np.eye(3)[:, :2], (20, 20, 60), axis=0)
    lower, current = np.array([0.7, 0.05]), np.array([1.0, 0.5])
    value, thresholds = np.array([0.09, 0.12]), np.array([0.06, 0.14])
    plain = stepped(multipliers.stored_dual(stored), value, thresholds, current)
    moved = multipliers.stored_dual(stored - lower)
    np.testing.assert_allclose(
        stepped(moved, value - lower, thresholds - lower, current), plain, rtol=1e-4
    )
    assert np.abs(plain - current).min() > 0.1


def test_what_is_not_finite_gives_no_multipliers():
    dual = multipliers.stored_dual(np.repeat(np.eye(3)[:, :2], (20, 20, 60), axis=0))
    step = jax.jit(lambda value, stderr: stepped(dual, value, [0.1, 0.1], [1.0, 1.0], stderr))
    for bad in (np.nan, np.inf, -np.inf):
        assert np.isnan(step(jnp.array([0.15, bad]), jnp.zeros(2))).all()
        assert np.isnan(step(jnp.array([0.15, 0.15]), jnp.array([bad, 0.0]))).all()
    assert np.isfinite(step(jnp.array([0.15, 0.15]), jnp.zeros(2))).all()


@pytest.mark.parametrize(
    ("stored", "options", "word"),
    [
        (np.full((5, 1), np.nan), {}, "finite"),
        (np.full((5, 1), np.inf), {}, "finite"),
        (np.ones(5), {}, r"\[n, m\]"),
        (np.ones((5, 1)), {"groups": np.zeros(4, int)}, "groups"),
        (np.ones((5, 1)), {"margin": -1.0}, "margin"),
        (np.ones((5, 1)), {"margin": np.nan}, "margin"),
    ],
)
def test_bad_stored_samples_are_refused(stored, options, word):
    with pytest.raises(ValueError, match=word):
        multipliers.stored_dual(stored, **options)


def test_updates_that_do_not_fit_are_refused():
    dual = multipliers.stored_dual(np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"one shape \[m\], got \[2\], \[3\], \[2\] and \[2\]"):
        stepped(dual, [0.1, 0.1], [0.1, 0.1], np.ones(3))
    with pytest.raises(ValueError, match=r"\[5, 2\] and \[3\]"):
        stepped(dual, np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="params"):
        dual.update(jnp.ones(2), dual.init(jnp.ones(2)), thresholds=jnp.ones(2))


# Samples of q, and two constraints that matter to each other.
STORED = np.random.default_rng(2).gamma(1.0, 1.0, (300, 2)) @ np.array([[1.0, 0.4], [0.0, 1.0]])
LEVELS = np.array([0.6, 0.9])


def of_tilt(current, h=STORED):
    """E_{p_λ}[h] on the stored samples."""
    weights = np.exp(-h @ np.asarray(current, np.float64))
    return weights @ h / weights.sum()


def exact_multipliers(thresholds):
    """λ with E_{p_λ}[h] = ε, by a root of the moments: both constraints are active."""
    found = optimize.root(lambda current: of_tilt(current) - thresholds, np.ones(2), tol=1e-12)
    assert found.success
    assert (found.x > 0.1).all()
    return found.x


@pytest.mark.slow
def test_a_step_from_samples_of_the_tilt_lands_on_the_solution():
    dual, exact = multipliers.stored_dual(STORED), exact_multipliers(LEVELS)
    for start in (0.7 * exact, exact * [1.4, 0.9], exact):
        np.testing.assert_allclose(stepped(dual, of_tilt(start), LEVELS, start), exact, rtol=2e-4)


@pytest.mark.parametrize("followed", [0.6, 0.25, 1.5])
def test_a_model_that_follows_in_part_is_led_to_the_constraint(followed):
    """p_{cλ} meets the constraints at λ*/c: in a step or two where c < 1, which g allows for."""
    dual, exact = multipliers.stored_dual(STORED), exact_multipliers(LEVELS)
    step = jax.jit(lambda value, current: stepped(dual, value, LEVELS, current))
    current = np.asarray(exact)
    for _ in range(3 if followed < 1 else 15):
        current = step(of_tilt(followed * current), current)
    np.testing.assert_allclose(of_tilt(followed * current), LEVELS, rtol=1e-3)
    np.testing.assert_allclose(current, exact / followed, rtol=1e-3)


def test_a_model_that_is_no_tilt_is_led_to_the_constraint():
    """(1−a) q + a p_λ meets them where E_{p_λ}[h] = (ε − (1−a) E_q[h])/a; E h from samples."""
    dual, kept = multipliers.stored_dual(STORED), 0.15
    mean = STORED.mean(axis=0)
    goal = exact_multipliers((LEVELS - kept * mean) / (1 - kept))
    step = jax.jit(lambda value, current: stepped(dual, value, LEVELS, current))
    rng, current, count = np.random.default_rng(0), exact_multipliers(LEVELS), 20_000
    path = []
    for _ in range(30):
        weights = np.exp(-STORED @ np.asarray(current, np.float64))
        p = kept / len(STORED) + (1 - kept) * weights / weights.sum()
        current = step(STORED[rng.choice(len(STORED), count, p=p)].mean(axis=0), current)
        path.append(current)
    average = np.mean(path[10:], axis=0)
    np.testing.assert_allclose(average, goal, rtol=0.02)
    shown = kept * mean + (1 - kept) * of_tilt(average)
    np.testing.assert_allclose(shown, LEVELS, rtol=0.01)


@pytest.mark.slow
def test_steps_from_samples_of_a_mixture_of_gaussians():
    """Steps on samples of p_λ itself, redrawn for each λ, and on those of a weaker p."""
    law = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], 0.49)
    x = mixtures.sample(law, jax.random.key(0), 20_000)
    parts = [mixtures.select(law, [0]), mixtures.select(law, [2])]
    h = np.stack([np.exp(mixtures.log_density(part, x)) for part in parts], axis=1)
    thresholds, rng = np.array([0.02, 0.04]), np.random.default_rng(0)
    exact = optimize.root(lambda current: of_tilt(current, h) - thresholds, [10.0, 10.0]).x
    dual = multipliers.stored_dual(h)
    step = jax.jit(lambda value, stderr, current: stepped(dual, value, thresholds, current, stderr))

    def after(current, followed):
        weights = np.exp(-h @ (followed * current))
        drawn = h[rng.choice(len(h), len(h), p=weights / weights.sum())]
        return step(drawn.mean(axis=0), drawn.std(axis=0) / np.sqrt(len(drawn)), current)

    # One step is enough, within the samples' own error, if λ need not double.
    np.testing.assert_allclose(after(0.7 * exact, 1.0), exact, rtol=0.1)
    # A model that follows λ half of the way meets the same constraints at twice the λ.
    np.testing.assert_allclose(after(1.2 * exact, 0.5), 2 * exact, rtol=0.1)
    np.testing.assert_allclose(after(3 * exact, 0.5), 2 * exact, rtol=0.1)


@pytest.mark.slow
def test_derivatives_of_a_step():
    """In ε, with E h held, in E h and in λ, against finite differences of the formula in scipy.

    λ*(·) is attained at ε and at E h, g is above 1, and no bound is active.
    """
    current, value = 1.6 * exact_multipliers(LEVELS), np.array([0.66, 0.95])

    def formula(thresholds, value, current):
        asked, followed = exact_multipliers(thresholds), exact_multipliers(value)
        return current + current.sum() / followed.sum() * (asked - followed)

    with jax.enable_x64(True):
        dual = multipliers.stored_dual(STORED)

        def new(thresholds, value, current):
            return stepped(dual, value, thresholds, current)

        given, length = (LEVELS, value, current), 1e-5
        np.testing.assert_allclose(new(*given), formula(*given), rtol=1e-7)
        assert (np.abs(new(*given) - current) < 0.45 * current).all()
        assert current.sum() > 1.1 * exact_multipliers(value).sum()
        for jacobian in (jax.jacfwd, jax.jacrev):
            found = jax.jit(jacobian(new, argnums=(0, 1, 2)))(*given)
            for place, got in enumerate(found):
                columns = []
                for e in np.eye(2) * length:
                    ends = [
                        formula(*given[:place], given[place] + side * e, *given[place + 1 :])
                        for side in (1, -1)
                    ]
                    columns.append((ends[0] - ends[1]) / (2 * length))
                np.testing.assert_allclose(got, np.column_stack(columns), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_step_runs_under_every_transformation_of_programs():
    """jit, vmap, scan, cond and pmap give the steps that are taken one by one, in float32."""
    dual = optax.with_extra_args_support(
        optax.chain(optax.identity(), multipliers.stored_dual(STORED, margin=0.5))
    )
    count = len(jax.local_devices())
    shown = jnp.float32(LEVELS * np.linspace(0.9, 1.3, count)[:, None])
    levels = jnp.float32(LEVELS * np.linspace(1.0, 1.1, count)[:, None])
    start, error = jnp.float32([1.0, 0.5]), jnp.float32([0.02, 0.03])
    step = jax.jit(lambda value, bound: stepped(dual, value, bound, start, error))
    alone = np.stack([step(value, bound) for value, bound in zip(shown, levels, strict=True)])
    assert step(shown[0], levels[0]).dtype == jnp.float32
    assert len(np.unique(alone.round(3))) > count
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(jax.vmap(step)(shown, levels), alone, **tolerance)
    np.testing.assert_allclose(jax.pmap(step)(shown, levels), alone, **tolerance)

    def every_second(current, given):
        index, value, bound = given
        state = dual.init(current)

        def move():
            return dual.update(bound - value, state, current, thresholds=bound, stderr=error)[0]

        change = jax.lax.cond(index % 2 == 0, move, lambda: jnp.zeros_like(current))
        return optax.apply_updates(current, change), None

    expected = start
    for value, bound in zip(shown[::2], levels[::2], strict=True):
        expected = stepped(dual, value, bound, expected, error)
    scanned = jax.jit(lambda: jax.lax.scan(every_second, start, (jnp.arange(count), shown, levels)))
    np.testing.assert_allclose(scanned()[0], expected, **tolerance)
    assert "callback" not in str(jax.make_jaxpr(step)(shown[0], levels[0]))
