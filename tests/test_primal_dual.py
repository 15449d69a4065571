import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

from jax_unlearn import multipliers, sharding
from jax_unlearn.primal_dual import certificate, primal_dual
from jax_unlearn.problem import Losses, Problem
from jax_unlearn.typing import Estimate

CENTER = np.array([1.0, -0.5])  # a: the minimiser of the objective ½‖x − a‖²
NORMAL = np.array([[-1.0, 1.0], [1.0, 1.0]])
KEY = jax.random.key(0)


def problem(kind, sign=1.0, calls=None):
    """½‖x − a‖² with the constraint value c_i·x ("linear") or ‖x‖² ("square")."""

    def losses(params, reference, key, batch, multipliers, *, axis_name=None):
        if calls is not None:
            calls.append(kind)
        index = batch["index"]
        if kind == "linear":
            value = jnp.asarray(NORMAL, params.dtype)[index] @ params
        else:
            value = jnp.broadcast_to(params @ params, index.shape)
        objective = 0.5 * jnp.square(params - batch["points"]).sum(axis=1)
        return Losses(objective, value * batch["scale"], index)

    return Problem(losses, sign, multipliers.non_negative(), kind)


def batch_of(index=(0,), scale=1.0):
    # Two points about a: their mean squared distance adds a constant to the objective.
    points = jnp.float32(CENTER + np.array([[0.5, 0.0], [-0.5, 0.0]]))
    return {
        "points": points,
        "index": jnp.array(index),
        "scale": jnp.full(len(index), scale, jnp.float32),
    }


def solve(algorithm, state, batch, steps):
    def body(state, _):
        return algorithm.step(KEY, state, None, batch)

    state, infos = jax.jit(lambda s: jax.lax.scan(body, s, None, length=steps))(state)
    return state, jax.tree.map(lambda leaf: leaf[-1], infos)


DUALS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(optax.exponential_decay(0.05, 100, 0.7)),
    "nu_pi": multipliers.nu_pi(0.1, 0.5, 0.3),
}


@pytest.mark.parametrize(
    ("dual", "alternating"), [("sgd", True), ("sgd", False), ("adam", True), ("nu_pi", True)]
)
def test_linear_constraint(dual, alternating):
    """min ½‖x − a‖² s.t. c·x ≥ b: x* = a + λ* c, λ* = (b − c·a)/‖c‖²."""
    threshold = 0.7
    multiplier = (threshold - NORMAL[0] @ CENTER) / 2
    algorithm = primal_dual(problem("linear"), optax.sgd(0.2), DUALS[dual], alternating=alternating)
    state, info = solve(algorithm, algorithm.init(jnp.zeros(2), threshold), batch_of(), 600)
    np.testing.assert_allclose(state.params, CENTER + multiplier * NORMAL[0], atol=1e-3)
    np.testing.assert_allclose(state.multipliers, [multiplier], atol=1e-3)
    np.testing.assert_allclose(info.values, [threshold], atol=1e-3)
    np.testing.assert_allclose(info.violations, [0.0], atol=1e-3)
    assert info.objective == pytest.approx(multiplier**2 + 0.125, abs=1e-3)
    assert info.gradient_norm < 2e-3
    assert state.step == 600
    assert info.finite


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_quadratic_constraint(sign):
    """‖x‖² ≤ ε (convex): x* = a/(1+2λ); ‖x‖² ≥ b (not convex): x* = a/(1−2λ), λ* < ½."""
    norm = np.linalg.norm(CENTER)
    threshold = 0.5 if sign < 0 else 2.5
    multiplier = -sign * (norm / np.sqrt(threshold) - 1) / 2
    assert 0 < multiplier < 0.5
    algorithm = primal_dual(problem("square", sign), optax.sgd(0.1), optax.sgd(0.1))
    state, info = solve(algorithm, algorithm.init(jnp.ones(2), threshold), batch_of(), 1500)
    np.testing.assert_allclose(state.params, CENTER * np.sqrt(threshold) / norm, atol=2e-3)
    np.testing.assert_allclose(state.multipliers, [multiplier], atol=2e-3)


def test_one_active_and_one_inactive_constraint():
    threshold = np.array([0.7, -1.0])
    multiplier = (threshold[0] - NORMAL[0] @ CENTER) / 2
    solution = CENTER + multiplier * NORMAL[0]
    assert NORMAL[1] @ solution > threshold[1]
    algorithm = primal_dual(problem("linear"), optax.sgd(0.2), optax.sgd(0.1))
    start = algorithm.init(jnp.zeros(2), threshold, multipliers=1.0)
    np.testing.assert_array_equal(start.multipliers, [1.0, 1.0])
    state, info = solve(algorithm, start, batch_of((0, 1, 1)), 600)
    np.testing.assert_allclose(state.params, solution, atol=1e-3)
    np.testing.assert_allclose(state.multipliers, [multiplier, 0.0], atol=1e-3)
    assert state.multipliers[1] == 0
    np.testing.assert_allclose(info.values, NORMAL @ solution, atol=2e-3)
    slackness = np.asarray(info.multipliers * info.violations)
    np.testing.assert_allclose(slackness, 0, atol=1e-3)
    assert info.violations[1] < -1


def test_fixed_multipliers_are_gradient_descent_on_the_weighted_loss():
    weights, x = np.array([0.4, 0.9]), np.zeros(2)
    for _ in range(30):
        x = x - 0.1 * ((x - CENTER) - weights @ NORMAL)
    algorithm = primal_dual(problem("linear"), optax.sgd(0.1), optax.set_to_zero())
    start = algorithm.init(jnp.zeros(2), [5.0, -5.0], multipliers=weights)
    state, _ = solve(algorithm, start, batch_of((0, 1)), 30)
    np.testing.assert_allclose(state.params, x, rtol=1e-5)
    np.testing.assert_allclose(state.multipliers, weights, rtol=1e-6)


@pytest.mark.parametrize("alternating", [True, False])
def test_one_step_by_hand(alternating):
    """Which multiplier moves the parameters, and that the report precedes the move."""
    x, multiplier, threshold = np.array([0.2, 0.1]), 0.5, 2.0
    violation = threshold - NORMAL[0] @ x
    after = multiplier + 0.3 * violation
    used = after if alternating else multiplier
    algorithm = primal_dual(
        problem("linear"), optax.sgd(0.1), optax.sgd(0.3), alternating=alternating
    )
    start = algorithm.init(jnp.float32(x), threshold, multipliers=multiplier)
    state, info = jax.jit(algorithm.step)(KEY, start, None, batch_of())
    gradient = (x - CENTER) - used * NORMAL[0]
    np.testing.assert_allclose(state.params, x - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(state.multipliers, [after], rtol=1e-6)
    np.testing.assert_allclose(info.multipliers, [after], rtol=1e-6)
    np.testing.assert_allclose(info.values, [NORMAL[0] @ x], rtol=1e-5)
    np.testing.assert_allclose(info.violations, [violation], rtol=1e-6)
    assert info.objective == pytest.approx(0.5 * ((x - CENTER) ** 2).sum() + 0.125, rel=1e-5)
    assert info.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)


def test_multipliers_move_once_in_n_steps():
    dual = optax.MultiSteps(optax.sgd(0.3), 3)
    algorithm = primal_dual(problem("linear"), optax.sgd(0.1), dual)
    state = algorithm.init(jnp.zeros(2), 2.0, multipliers=0.5)
    step, violations, path = jax.jit(algorithm.step), [], []
    for _ in range(6):
        state, info = step(KEY, state, None, batch_of())
        violations.append(float(info.violations[0]))
        path.append(float(state.multipliers[0]))
    first = 0.5 + 0.3 * np.mean(violations[:3])
    expected = [0.5, 0.5, first, first, first, first + 0.3 * np.mean(violations[3:])]
    np.testing.assert_allclose(path, expected, rtol=1e-5)
    assert len(set(violations)) == 6  # the parameters moved all the while


def test_dual_batch_moves_the_multipliers_and_nothing_else():
    algorithm = primal_dual(problem("linear"), optax.sgd(0.1), optax.sgd(0.3), alternating=False)
    start = algorithm.init(jnp.array([0.0, 0.4]), 2.0, multipliers=0.5)
    step = jax.jit(algorithm.step)
    plain, info = step(KEY, start, None, batch_of())
    state, other = step(KEY, start, None, batch_of(), batch_of(scale=3.0))
    np.testing.assert_allclose(state.multipliers, [0.5 + 0.3 * (2.0 - 3 * 0.4)], rtol=1e-6)
    np.testing.assert_array_equal(state.params, plain.params)
    np.testing.assert_array_equal(other.values, info.values)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_dual_optimizer_is_told_thresholds_and_standard_errors(accumulated):
    """Those of the dual batch, std/√n in numpy; through `optax.MultiSteps` too."""

    def update(updates, state, params=None, *, thresholds, stderr, **extra):
        return thresholds + stderr, state

    dual = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    dual = optax.MultiSteps(dual, 2) if accumulated else dual
    algorithm = primal_dual(problem("linear"), optax.sgd(0.0), dual)
    x, scale, index = np.array([0.3, 0.4]), np.array([1.0, 4.0, 2.0, 0.5]), (0, 1, 0, 1)
    errors = [np.std(scale[i::2] * (NORMAL[i] @ x), ddof=1) / np.sqrt(2) for i in range(2)]
    dual_batch = batch_of(index) | {"scale": jnp.float32(scale)}
    state = algorithm.init(jnp.float32(x), [2.0, 3.0], multipliers=0.5)
    step = jax.jit(algorithm.step)
    for _ in range(1 + accumulated):
        np.testing.assert_array_equal(state.multipliers, [0.5, 0.5])
        state, _ = step(KEY, state, None, batch_of((0, 1)), dual_batch)
    np.testing.assert_allclose(state.multipliers, np.add([2.5, 3.5], errors), rtol=1e-5)


def counting(problem, evaluations):
    """The problem with a `fresh` that says when it runs, and takes half of the scale."""

    def fresh(params, reference, key, batch, current, *, axis_name=None):
        io_callback(lambda: evaluations.append(1), None)
        half = batch | {"scale": 0.5 * batch["scale"]}
        return problem.losses(params, reference, key, half, current, axis_name=axis_name)

    return problem._replace(fresh=fresh)


def test_fresh_evaluates_dual_batches_and_no_other():
    evaluations = []
    algorithm = primal_dual(
        counting(problem("linear"), evaluations), optax.sgd(0.1), optax.sgd(0.3), alternating=False
    )
    start = algorithm.init(jnp.array([0.0, 0.4]), 2.0, multipliers=0.5)
    step = jax.jit(algorithm.step)
    plain, info = step(KEY, start, None, batch_of())
    jax.effects_barrier()
    assert not evaluations
    np.testing.assert_allclose(plain.multipliers, [0.5 + 0.3 * (2.0 - 0.4)], rtol=1e-6)
    state, other = step(KEY, start, None, batch_of(), batch_of(scale=3.0))
    jax.effects_barrier()
    assert len(evaluations) == 1
    np.testing.assert_allclose(state.multipliers, [0.5 + 0.3 * (2.0 - 1.5 * 0.4)], rtol=1e-6)
    np.testing.assert_array_equal(state.params, plain.params)
    np.testing.assert_array_equal(other.values, info.values)


def test_the_dual_moves_when_its_schedule_says():
    """Elsewhere λ and the dual state stay, and the dual batch is not evaluated."""
    evaluations = []
    posed = counting(problem("linear"), evaluations)
    primal, dual = optax.sgd(0.1), optax.adam(0.2)
    algorithm = primal_dual(posed, primal, dual, dual_schedule=lambda steps: steps % 3 == 2)
    always, never = (primal_dual(posed, primal, way) for way in (dual, optax.set_to_zero()))
    step, moving, resting = (jax.jit(each.step) for each in (algorithm, always, never))
    state = algorithm.init(jnp.zeros(2), 2.0, multipliers=0.5)
    for i in range(7):
        evaluations.clear()
        after, info = step(KEY, state, None, batch_of(), batch_of(scale=3.0))
        jax.effects_barrier()
        assert len(evaluations) == (i % 3 == 2)
        if i % 3 == 2:
            expected = moving(KEY, state, None, batch_of(), batch_of(scale=3.0))
            assert after.multipliers != state.multipliers
        else:
            still = state._replace(dual_state=optax.EmptyState())
            expected, told = resting(KEY, still, None, batch_of())
            expected = expected._replace(dual_state=state.dual_state), told
        chex.assert_trees_all_close((after, info), expected, rtol=1e-6)
        state = after
    assert state.dual_state[0].count == 2
    assert step._cache_size() == 1


def test_a_dual_batch_that_is_not_looked_at_may_be_anything():
    """Where the multipliers rest a step is one without a dual batch, and finite."""
    algorithm = primal_dual(
        problem("linear"), optax.adam(0.1), optax.sgd(0.3), dual_schedule=lambda steps: steps == 1
    )
    step, bad = jax.jit(algorithm.step), batch_of(scale=jnp.nan)
    start = algorithm.init(jnp.zeros(2), 2.0, multipliers=0.5)
    state, info = step(KEY, start, None, batch_of(), bad)
    assert info.finite
    expected, _ = step(KEY, start, None, batch_of(), batch_of())
    chex.assert_trees_all_equal(state, expected)
    after, info = step(KEY, state, None, batch_of(), bad)
    assert not info.finite
    chex.assert_trees_all_equal(after._replace(step=state.step), state)


def test_absent_constraints_keep_their_multipliers():
    algorithm = primal_dual(problem("linear"), optax.sgd(0.1), optax.sgd(0.3))
    start = algorithm.init(jnp.zeros(2), [2.0, 2.0, -9.0], multipliers=[0.5, 0.7, 0.2])
    state, info = jax.jit(algorithm.step)(KEY, start, None, batch_of((1, 1, 1)))
    np.testing.assert_allclose(state.multipliers, [0.5, 0.7 + 0.3 * 2, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(info.values), [True, False, True])
    np.testing.assert_allclose(info.violations, [0.0, 2.0, 0.0])
    # Their multipliers pull at nothing either.
    np.testing.assert_allclose(state.params, 0.1 * (CENTER + 1.3 * NORMAL[1]), rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "name", "value"),
    [("primal", "points", jnp.nan), ("primal", "scale", jnp.inf), ("dual", "scale", jnp.inf),
     ("dual", "scale", jnp.nan)],
)  # fmt: skip
def test_non_finite_losses_leave_the_state(batch, name, value):
    algorithm = primal_dual(problem("linear"), optax.adam(0.1), optax.adam(0.3))
    step = jax.jit(algorithm.step)
    start, _ = step(KEY, algorithm.init(jnp.zeros(2), 2.0), None, batch_of(), batch_of())
    bad = batch_of()
    bad[name] = bad[name].at[0].set(value)
    pair = (batch_of(), bad) if batch == "dual" else (bad, batch_of())
    state, info = step(KEY, start, None, *pair)
    assert not info.finite
    assert state.step == start.step + 1
    chex.assert_trees_all_equal(state._replace(step=start.step), start)
    state, info = step(KEY, state, None, batch_of(), batch_of())
    assert info.finite
    assert np.isfinite(state.params).all()


def test_one_trace_serves_every_threshold_and_step():
    calls = []
    algorithm = primal_dual(problem("linear", calls=calls), optax.adam(0.1), optax.sgd(0.3))
    step = jax.jit(algorithm.step, donate_argnums=1)
    for threshold in (0.5, 2.0, jnp.array([3.0])):
        state = algorithm.init(jnp.zeros(2), threshold, multipliers=0.1)
        for i in range(4):
            state, _ = step(jax.random.fold_in(KEY, i), state, None, batch_of())
    assert calls == ["linear"]
    assert step._cache_size() == 1


def test_donation_spares_the_callers_arrays():
    algorithm = primal_dual(problem("linear"), optax.sgd(0.1), optax.sgd(0.3))
    params, thresholds, given = jnp.zeros(2), jnp.array([1.0]), jnp.array([0.5])
    state = algorithm.init(params, thresholds, multipliers=given)
    step = jax.jit(algorithm.step, donate_argnums=1)
    for _ in range(2):
        previous = state
        state, _ = step(KEY, state, None, batch_of())
    assert previous.params.is_deleted()  # so that the test says something
    for array in (params, thresholds, given):
        assert not array.is_deleted()
    np.testing.assert_array_equal(params, [0.0, 0.0])


def test_without_copies_the_parameters_are_given_away_and_the_reference_stays():
    # What a step does not read cannot be donated: let the losses read the reference.
    alone = problem("linear")
    both = alone._replace(
        losses=lambda params, reference, *rest, **names: alone.losses(
            params + reference, reference, *rest, **names
        )
    )
    algorithm = primal_dual(both, optax.sgd(0.1), optax.sgd(0.3))
    params, reference = jnp.zeros(2), jnp.ones(2)
    copied, state = algorithm.init(params, 1.0), algorithm.init(params, 1.0, copy=False)
    assert state.params is params
    assert copied.params is not params
    step = sharding.jit_step(algorithm.step)
    for _ in range(3):
        state, info = step(KEY, state, reference, batch_of())
        copied, expected = jax.jit(algorithm.step)(KEY, copied, reference, batch_of())
    chex.assert_trees_all_equal(state, copied)
    chex.assert_trees_all_equal(info, expected)
    assert params.is_deleted()
    np.testing.assert_array_equal(reference, [1.0, 1.0])


def test_init_projects_and_copies():
    algorithm = primal_dual(problem("linear"), optax.sgd(0.1), optax.sgd(0.3))
    state = algorithm.init(jnp.zeros(2), [1, 2], multipliers=[-1.0, 3.0])
    np.testing.assert_array_equal(state.multipliers, [0.0, 3.0])
    np.testing.assert_array_equal(state.thresholds, [1.0, 2.0])
    assert algorithm.init(jnp.zeros(2), 1).thresholds.dtype == jnp.float32
    assert state.step == 0


def test_vmap_over_thresholds_and_multipliers_is_separate_runs():
    algorithm = primal_dual(problem("square"), optax.adam(0.05), multipliers.nu_pi(0.1, 0.2))

    def run(threshold, multiplier):
        state = algorithm.init(jnp.ones(2), threshold, multipliers=multiplier)
        return jax.lax.scan(
            lambda s, k: algorithm.step(k, s, None, batch_of()), state, jax.random.split(KEY, 40)
        )

    thresholds, starts = jnp.array([[1.5], [2.5], [4.0]]), jnp.array([[0.0], [0.3], [0.1]])
    together = jax.jit(jax.vmap(run))(thresholds, starts)
    single = jax.jit(run)
    apart = [single(b, start) for b, start in zip(thresholds, starts, strict=True)]
    apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    chex.assert_trees_all_close(together, apart, rtol=1e-5, atol=1e-6)
    assert np.ptp(np.asarray(together[0].params)[:, 0]) > 0.1


@pytest.mark.slow
def test_derivative_in_the_threshold_through_unrolled_steps():
    """d x_k / d b against central differences, all in float64."""
    with jax.enable_x64(True):
        algorithm = primal_dual(problem("square"), optax.adam(0.1), optax.sgd(0.4))
        batch = jax.tree.map(
            lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, batch_of()
        )

        @jax.jit
        def end(threshold):
            state = algorithm.init(jnp.ones(2), threshold)
            assert state.multipliers.dtype == jnp.float64
            for i in range(5):
                state, _ = algorithm.step(jax.random.fold_in(KEY, i), state, None, batch)
            return jnp.append(state.params, state.multipliers)

        derivative = jax.jit(jax.jacfwd(end))(2.5)
        reverse = jax.jit(jax.jacrev(end))(2.5)
        step = 1e-5
        finite = (end(2.5 + step) - end(2.5 - step)) / (2 * step)
    np.testing.assert_allclose(derivative, finite, rtol=1e-6)
    np.testing.assert_allclose(reverse, finite, rtol=1e-6)
    assert (np.abs(finite) > 1e-2).all()


def test_certificate_of_a_lower_bound():
    values = Estimate(jnp.array([1.0, 1.9, 3.0]), jnp.array([0.1, 0.1, 0.1]))
    got = certificate(
        problem("linear"),
        objective=Estimate(jnp.array(0.5), jnp.array(0.01)),
        values=values,
        thresholds=[2.0, 2.0, 2.0],
        multipliers=[0.5, 0.25, 0.0],
    )
    np.testing.assert_allclose(got.violations, [1.0, 0.1, -1.0], rtol=1e-5)
    np.testing.assert_allclose(got.complementary_slackness, [0.5, 0.025, 0.0], rtol=1e-5)
    np.testing.assert_array_equal(got.satisfied, [False, True, True])
    assert not got.feasible
    assert got.values is values


@pytest.mark.parametrize(("z", "feasible"), [(0.0, False), (2.0, True)])
def test_certificate_of_an_upper_bound(z, feasible):
    got = certificate(
        problem("square", sign=-1.0),
        objective=Estimate(jnp.array(0.5), jnp.array(0.01)),
        values=Estimate(jnp.array([0.1, 0.25]), jnp.array([0.05, 0.05])),
        thresholds=jnp.array([0.2, 0.2]),
        multipliers=jnp.array([0.0, 2.0]),
        z=z,
    )
    np.testing.assert_allclose(got.violations, [-0.1, 0.05], rtol=1e-5)
    np.testing.assert_allclose(got.complementary_slackness, [0.0, 0.1], rtol=1e-5)
    assert got.feasible == feasible
    np.testing.assert_array_equal(got.satisfied, [True, feasible])


def test_certificate_is_not_given_for_a_missing_value():
    got = certificate(
        problem("linear"),
        objective=Estimate(jnp.array(0.5), jnp.array(0.01)),
        values=Estimate(jnp.array([jnp.nan]), jnp.array([jnp.nan])),
        thresholds=[0.0],
        multipliers=[0.0],
    )
    assert not got.feasible
