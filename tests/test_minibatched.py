import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import multipliers
from jax_unlearn.formulations import reverse_kl, sample_trajectories
from jax_unlearn.minibatched import minibatched
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Losses, TrajectoryPoints

KEY = jax.random.key(0)
RNG = np.random.default_rng(4)
REFERENCE = jax.tree.map(jnp.float32, chains.gaussian([0.0, 1.0, -0.7], 0.5))
PARAMS = jax.tree.map(
    lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape).astype(np.float32), REFERENCE
)
OPTIONS = {"shape": (1,), "steps": 5}
PROBLEM = reverse_kl(chains.apply, chains.SCHEDULE, estimator="stop_gradient", **OPTIONS)
VISIT = sample_trajectories(chains.apply, chains.SCHEDULE, **OPTIONS)
MULTIPLIERS = jnp.array([0.5, 0.3])


def batch_of(kept=True):
    """Unlike rows, two targets on each row of `forget`."""
    each = jnp.tile(jnp.arange(2), (3, 1))
    forget = Conditions(jnp.array([0, 2, 0]), jnp.array([0, 2, 0]), jnp.array([[1, 2]] * 3), each)
    return Batch(Conditions(jnp.array([1, 2]), jnp.array([1, 2])) if kept else None, forget)


@jax.jit
def lagrangian_and_gradient(batch, key):
    """Of the rows' mean, where a row to forget has both constraints and a kept one none."""

    def lagrangian(params):
        got = PROBLEM.losses(params, REFERENCE, key, batch, MULTIPLIERS)
        values = jnp.zeros(2).at[got.index].add(got.values) / 3
        share = 3 / got.objective.shape[0]
        return got.objective.mean() - share * MULTIPLIERS @ values, values

    (total, values), gradient = jax.value_and_grad(lagrangian, has_aux=True)(PARAMS)
    return jnp.concatenate([total[None], values, gradient["gain"], gradient["bias"].ravel()])


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_the_points_of_a_whole_trajectory_have_the_on_policy_gradient(kept):
    batch = batch_of(kept)
    fresh = lagrangian_and_gradient(batch, KEY)
    path = VISIT(PARAMS, KEY, batch)

    def stored(step):
        return Batch(
            *(
                None if part is None else part._replace(x_t=part.x_t[step], step=part.step[step])
                for part in (path.kept, path.forget)
            )
        )

    np.testing.assert_array_equal(path.forget.step, np.tile(np.arange(5)[:, None], (1, 3)))
    other = jax.random.key(5)  # nothing random is left
    again = [lagrangian_and_gradient(stored(step), other) for step in range(5)]
    np.testing.assert_allclose(np.mean(again, axis=0), fresh, rtol=1e-4, atol=1e-5)
    assert np.std(again, axis=0).max() > 0.1


def on_the_whole_and_in_parts(parts, rate, dual, batch):
    """(state, info) after a step on whole trajectories, and after one in parts of the same."""
    optimizer = optax.sgd(rate)
    for algorithm in (
        primal_dual(PROBLEM, optimizer, dual, alternating=False),
        minibatched(PROBLEM, optimizer, dual, VISIT, parts=parts),
    ):
        state = algorithm.init(PARAMS, [0.5, 0.1], multipliers=MULTIPLIERS)
        yield jax.jit(algorithm.step)(KEY, state, REFERENCE, batch)


@pytest.mark.slow
def test_a_step_in_one_part_is_the_step_on_whole_trajectories():
    dual = multipliers.nu_pi(0.03, 0.1)
    (expected, told), (got, info) = on_the_whole_and_in_parts(1, 0.1, dual, batch_of())
    for a, b in zip(
        jax.tree.leaves((got._replace(dual_state=None), info)),
        jax.tree.leaves((expected._replace(dual_state=None), told)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    assert np.abs(got.params["bias"] - PARAMS["bias"]).max() > 0.01
    assert (np.abs(got.multipliers - MULTIPLIERS) > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_every_point_is_in_one_part(kept):
    """Small steps on the parts add up to as many on the whole, and the values are its own."""
    (expected, told), (got, info) = on_the_whole_and_in_parts(
        5, 1e-3, optax.sgd(0.1), batch_of(kept)
    )
    assert got.step == 1
    np.testing.assert_allclose(info.values, told.values, rtol=0.05)
    np.testing.assert_allclose(got.multipliers, expected.multipliers, rtol=0.05)
    np.testing.assert_array_equal(info.multipliers, got.multipliers)
    for name in ("gain", "bias"):
        moved, once = (np.asarray(each.params[name] - PARAMS[name]) for each in (got, expected))
        np.testing.assert_allclose(moved, 5 * once, rtol=0.1, atol=0.05 * np.abs(moved).max())


def dealt(losses, visit, parts, batch):
    """What a step reports on the points that a visit finds, of losses that no parameter is in."""

    def evaluate(params, reference, key, batch, current, *, axis_name=None):
        each = losses(batch)
        return Losses(each + 0 * params["bias"].sum(), 0 * each, jnp.zeros(each.shape, int))

    algorithm = minibatched(
        PROBLEM._replace(losses=evaluate), optax.sgd(0.1), optax.sgd(0.1), visit, parts=parts
    )
    _, info = jax.jit(algorithm.step)(KEY, algorithm.init(PARAMS, [0.5]), REFERENCE, batch)
    return info


def test_each_trajectory_is_dealt_in_an_order_of_its_own():
    def spread(batch):
        place = jnp.float32(batch.forget.step)
        return jnp.square(place - place.mean())

    assert dealt(spread, VISIT, 5, batch_of()).objective > 0.1


@pytest.mark.slow
def test_points_keep_their_steps_and_their_conditions():
    """x_t tells its row and its step; a part has as many points of each row."""
    parts = 3

    def visit(params, key, batch, *, axis_name=None):
        def points(conditions):
            place = jnp.broadcast_to(jnp.arange(6)[:, None], (6, conditions.cond.shape[0]))
            return TrajectoryPoints(conditions, (10 * conditions.cond + place)[..., None], place)

        return Batch(points(batch.kept), points(batch.forget))

    def mismatch(batch):
        """Zero, but for a point without its row or step, or a part with too many of one."""
        errors = []
        for part in (batch.kept, batch.forget):
            cond, rows = part.conditions.cond, 2 if part is batch.kept else 3
            errors.append(part.x_t[:, 0] - 10 * cond - part.step)
            counts = jnp.zeros(5).at[cond].add(1.0)
            errors.append(jnp.bincount(part.step, length=6) > rows)
            errors.append(counts[cond] - 6 // parts)
        return jnp.abs(jnp.concatenate(errors))

    forget = Conditions(
        jnp.array([2, 3, 4]), jnp.zeros(3, int), jnp.ones(3, int), jnp.zeros(3, int)
    )
    batch = Batch(Conditions(jnp.array([0, 1]), jnp.array([0, 1])), forget)
    assert dealt(mismatch, visit, parts, batch).objective == 0
    assert dealt(mismatch, visit, 2, batch).objective > 0  # it can tell


@pytest.mark.slow
def test_minibatches_reach_the_exact_multiplier():
    """λ = α/(1+α), (1+α)² D = b, at equal gains: D is the path KL that a gap of biases makes."""
    gap = REFERENCE["bias"][0] - REFERENCE["bias"][1]
    weights = np.array(
        [(a * chains.SIGMA[t] / chains.ALPHA[t]) ** 2 / (2 * scale)
         for t, a, _, _, scale in chains.steps_of(chains.ALL)][::-1]
    )  # fmt: skip
    distance = weights @ np.square(gap)
    optimizer = optax.adam(optax.exponential_decay(0.02, 1500, 0.1))
    dual = multipliers.nu_pi(0.06 / distance, 0.2 / distance)
    algorithm = minibatched(PROBLEM, optimizer, dual, VISIT, parts=5)
    zeros = jnp.zeros(8, int)
    batch = Batch(None, Conditions(zeros, zeros, zeros + 1, zeros))

    @jax.jit
    def solve(threshold):
        state = algorithm.init(REFERENCE, threshold)
        keys = jax.random.split(KEY, 800)
        return jax.lax.scan(
            lambda state, key: algorithm.step(key, state, REFERENCE, batch), state, keys
        )

    state, info = solve(2.0 * distance)
    alpha = np.sqrt(2.0) - 1
    assert info.multipliers[-200:].mean() == pytest.approx(alpha / (1 + alpha), rel=0.02)
    assert info.values[-200:].mean() == pytest.approx(2.0 * distance, rel=0.02)
    np.testing.assert_allclose(
        state.params["bias"][0], REFERENCE["bias"][0] + alpha * gap, atol=0.06
    )


@pytest.mark.slow
def test_merged_parameters_make_the_trajectories():
    """What trains is added to the reference: a step is that of the sum, by the same gradient."""
    dual = optax.sgd(0.1)

    def added(reference, change):
        return jax.tree.map(jnp.add, reference, change)

    def losses(change, reference, *rest, **names):
        return PROBLEM.losses(added(reference, change), reference, *rest, **names)

    change = jax.tree.map(jnp.subtract, PARAMS, REFERENCE)
    ends = []
    for problem, start, merge in (
        (PROBLEM, PARAMS, None),
        (PROBLEM._replace(losses=losses), change, added),
    ):
        algorithm = minibatched(problem, optax.sgd(0.1), dual, VISIT, parts=5, merge=merge)
        state = algorithm.init(start, [0.5, 0.1], multipliers=MULTIPLIERS)
        state, info = jax.jit(algorithm.step)(KEY, state, REFERENCE, batch_of())
        ends.append((state.params, state.multipliers, info))
    ends[1] = (added(REFERENCE, ends[1][0]), *ends[1][1:])
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.abs(ends[0][0]["bias"] - PARAMS["bias"]).max() > 0.01


def test_a_part_that_is_not_finite_leaves_the_state_as_it_was():
    algorithm = minibatched(PROBLEM, optax.sgd(0.1), optax.sgd(0.1), VISIT, parts=5)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, REFERENCE)
    state = algorithm.init(PARAMS, [0.5, 0.1], multipliers=MULTIPLIERS)
    got, info = jax.jit(algorithm.step)(KEY, state, broken, batch_of())
    assert not info.finite
    assert got.step == 1
    for a, b in zip(
        jax.tree.leaves(got._replace(step=0)), jax.tree.leaves(state._replace(step=0)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_part_is_left_out_alone_and_costs_its_batch_the_dual_step():
    """Then the next batch is as any: λ is held over its parts, and moves by their mean."""
    algorithm = minibatched(PROBLEM, optax.sgd(0.01), optax.sgd(0.1), VISIT, parts=5)
    step = jax.jit(algorithm.step)
    forget = jax.tree.map(lambda leaf: leaf[:1], batch_of().forget)
    broken = REFERENCE | {"gain": REFERENCE["gain"].at[2].set(jnp.nan)}
    start = algorithm.init(PARAMS, [0.5, 0.1], multipliers=MULTIPLIERS)
    state, info = step(KEY, start, broken, Batch(None, forget))
    assert not info.finite
    np.testing.assert_array_equal(state.multipliers, MULTIPLIERS)
    moved = np.abs(state.params["gain"] - PARAMS["gain"]) > 1e-4
    np.testing.assert_array_equal(moved, [True, True, False, True, True])
    anew = algorithm.init(state.params, [0.5, 0.1], multipliers=MULTIPLIERS)
    got, info = step(KEY, state, REFERENCE, Batch(None, forget))
    expected, told = step(KEY, anew, REFERENCE, Batch(None, forget))
    assert info.finite
    for a, b in zip(
        jax.tree.leaves((got.params, got.multipliers, info)),
        jax.tree.leaves((expected.params, expected.multipliers, told)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    violations = np.array([0.5, 0.1]) - told.values
    np.testing.assert_allclose(
        got.multipliers,
        PROBLEM.project(MULTIPLIERS + 0.1 * violations),
        rtol=1e-5,
    )


def test_mistakes_are_refused():
    batch = batch_of()
    path = VISIT(PARAMS, KEY, batch)
    points = Batch(
        *(part._replace(x_t=part.x_t[0], step=part.step[0]) for part in (path.kept, path.forget))
    )
    pathwise = reverse_kl(chains.apply, chains.SCHEDULE, estimator="pathwise", **OPTIONS)
    with pytest.raises(ValueError, match="no derivative"):
        pathwise.losses(PARAMS, REFERENCE, KEY, points, MULTIPLIERS)
    for parts in (0, 2):
        algorithm = minibatched(PROBLEM, optax.sgd(0.1), optax.sgd(0.1), VISIT, parts=parts)
        with pytest.raises(ValueError, match=f"5 time steps cannot .* {parts} minibatches"):
            algorithm.step(KEY, algorithm.init(PARAMS, [0.5, 0.1]), REFERENCE, batch)
