import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import minibatched as replay
from jax_unlearn import multipliers
from jax_unlearn.formulations import ConditionBatch, Held, Losses, Separated, Stored, reverse_kl
from jax_unlearn.primal_dual import primal_dual

KEY = jax.random.key(0)
RNG = np.random.default_rng(4)
REFERENCE = jax.tree.map(jnp.float32, chains.gaussian([0.0, 1.0, -0.7], 0.5))
PARAMS = jax.tree.map(
    lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape).astype(np.float32), REFERENCE
)
OPTIONS = {"shape": (1,), "steps": 5}
FORMULATION = reverse_kl(chains.apply, chains.SCHEDULE, estimator="stop_gradient", **OPTIONS)
VISIT = replay.trajectories(chains.apply, chains.SCHEDULE, **OPTIONS)
MULTIPLIERS = jnp.array([0.3, 0.2])


def batch_of(kept=True):
    """Unlike rows, two targets on each row of `forget`."""
    each = jnp.tile(jnp.arange(2), (3, 1))
    forget = Separated(jnp.array([0, 2, 0]), jnp.array([0, 2, 0]), jnp.array([[1, 2]] * 3), each)
    return ConditionBatch(Held(jnp.array([1, 2]), jnp.array([1, 2])) if kept else None, forget)


@jax.jit
def lagrangian_and_gradient(batch, key):
    def lagrangian(params):
        got = FORMULATION.losses(params, REFERENCE, key, batch, None, MULTIPLIERS)
        values = jnp.zeros(2).at[got.index].add(got.constraint) / 3
        return got.objective.mean() - MULTIPLIERS @ values, values

    (total, values), gradient = jax.value_and_grad(lagrangian, has_aux=True)(PARAMS)
    return jnp.concatenate([total[None], values, gradient["gain"], gradient["bias"].ravel()])


@pytest.mark.parametrize("kept", [True, False])
def test_a_whole_trajectory_replayed_is_the_on_policy_gradient(kept):
    batch = batch_of(kept)
    fresh = lagrangian_and_gradient(batch, KEY)
    path = VISIT(PARAMS, KEY, batch)

    def stored(step):
        x_t = tuple(None if part is None else part[step] for part in path.x_t)
        steps = tuple(None if x is None else jnp.full(len(x), step) for x in x_t)
        return Stored(path.conditions, x_t, steps)

    other = jax.random.key(5)  # nothing random is left
    again = [lagrangian_and_gradient(stored(step), other) for step in range(5)]
    np.testing.assert_allclose(np.mean(again, axis=0), fresh, rtol=1e-4, atol=1e-5)
    assert np.std(again, axis=0).max() > 0.1


def test_samples_of_the_ring_have_the_gradient_of_its_trajectories_on_average():
    batch = batch_of()
    keys = jax.random.split(KEY, 3)
    buffer = replay.init(3, jax.eval_shape(VISIT, PARAMS, KEY, batch))
    for key in keys:
        buffer = replay.add(buffer, VISIT(PARAMS, key, batch))
    expected = np.mean([lagrangian_and_gradient(batch, key) for key in keys], axis=0)

    @jax.jit
    @jax.vmap
    def one(key):
        return lagrangian_and_gradient(replay.sample(key, buffer), key)

    got = np.asarray(one(jax.random.split(KEY, 20_000)), np.float64)
    error = got.std(axis=0) / np.sqrt(len(got))
    assert (np.abs(got.mean(axis=0) - expected) < 4.5 * error + 1e-5).all()
    assert (error < 0.05).all()


@pytest.mark.parametrize("added", [1, 2, 3])
def test_the_ring_keeps_the_last_and_a_row_its_condition(added):
    batch = batch_of()

    def entry(i):
        """x_t tells its entry, step and row, conditions their entry and row."""

        def points(rows):
            code = 100 * i + 10 * np.arange(5)[:, None] + np.arange(rows)
            return jnp.float32(code)[..., None]

        marked = jax.tree.map(lambda leaf: 100 * i + leaf, batch)
        row = jnp.arange(3)
        forget = marked.forget._replace(cond=100 * i + row)
        return replay.Trajectories(marked._replace(forget=forget), (points(2), points(3)))

    buffer, add = replay.init(2, entry(0)), jax.jit(replay.add)
    for i in range(added):
        buffer = add(buffer, entry(i))
    got = jax.vmap(replay.sample, (0, None))(jax.random.split(KEY, 500), buffer)
    kept, forget = (np.asarray(x)[..., 0].astype(int) for x in got.x_t)
    expected = {1: {0}, 2: {0, 1}, 3: {1, 2}}[added]
    assert set(np.unique(kept // 100)) == set(np.unique(forget // 100)) == expected
    for code, step in zip((kept, forget), got.step, strict=True):
        np.testing.assert_array_equal(code // 10 % 10, step)
        assert set(np.unique(step)) == set(range(5))
        assert (code % 10 == np.arange(code.shape[1])).all()
    cond = np.asarray(got.conditions.forget.cond)
    np.testing.assert_array_equal(cond, forget // 100 * 100 + forget % 10)
    np.testing.assert_array_equal(np.asarray(got.conditions.kept.cond) // 100, kept // 100)


def gap_and_distance():
    """ε_0 − ε_1 where the biases alone differ, and the path KL D that it makes."""
    gap = REFERENCE["bias"][0] - REFERENCE["bias"][1]
    weights = np.array(
        [(a * chains.SIGMA[t] / chains.ALPHA[t]) ** 2 / (2 * scale)
         for t, a, _, _, scale in chains.steps_of(chains.ALL)][::-1]
    )  # fmt: skip
    return gap, weights @ np.square(gap)


def test_replay_reaches_the_exact_multiplier():
    """As on fresh trajectories alone: λ = α/(1+α), (1+α)² D = b, at equal gains."""
    gap, distance = gap_and_distance()
    optimizer = optax.adam(optax.exponential_decay(0.02, 1500, 0.1))
    dual = multipliers.nu_pi(0.03 / distance, 0.1 / distance)
    algorithm = primal_dual(FORMULATION, optimizer, dual)
    held = primal_dual(FORMULATION, optimizer, optax.set_to_zero())
    zeros = jnp.zeros(8, int)
    batch = ConditionBatch(None, Separated(zeros, zeros, zeros + 1, zeros))

    def step(carry, key):
        state, buffer = carry
        fresh, visited, *rest = jax.random.split(key, 5)
        state, info = algorithm.step(fresh, state, batch)
        buffer = replay.add(buffer, VISIT(state.params, visited, batch))
        for again in rest:
            still = state._replace(dual_state=optax.EmptyState())
            after, _ = held.step(again, still, replay.sample(again, buffer))
            state = after._replace(dual_state=state.dual_state)
        return (state, buffer), info

    @jax.jit
    def solve(threshold):
        state = algorithm.init(REFERENCE, threshold)
        buffer = replay.init(4, VISIT(REFERENCE, KEY, batch))
        return jax.lax.scan(step, (state, buffer), jax.random.split(KEY, 1000))

    (state, buffer), info = solve(2.0 * distance)
    alpha = np.sqrt(2.0) - 1
    assert buffer.added == 1000
    assert state.step == 4000
    assert info.multipliers[-200:].mean() == pytest.approx(alpha / (1 + alpha), rel=0.02)
    assert info.values[-200:].mean() == pytest.approx(2.0 * distance, rel=0.02)
    bias = REFERENCE["bias"][0] + alpha * gap
    np.testing.assert_allclose(state.params["bias"][0], bias, atol=0.06)


def on_the_whole_and_in_parts(parts, rate, dual, batch):
    """(state, info) after a step on whole trajectories, and after one in parts of the same."""
    optimizer = optax.sgd(rate)
    for algorithm in (
        primal_dual(FORMULATION, optimizer, dual, alternating=False),
        replay.minibatched(FORMULATION, optimizer, dual, VISIT, parts=parts),
    ):
        state = algorithm.init(PARAMS, [0.5, 0.1], multipliers=MULTIPLIERS, reference=REFERENCE)
        yield jax.jit(algorithm.step)(KEY, state, batch)


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
        moved, once = (np.asarray(one.params[name] - PARAMS[name]) for one in (got, expected))
        np.testing.assert_allclose(moved, 5 * once, rtol=0.1, atol=0.05 * np.abs(moved).max())


def test_each_trajectory_is_dealt_in_an_order_of_its_own():
    def spread(params, reference, key, batch, *rest):
        place = jnp.float32(batch.step[1])
        return Losses(
            jnp.square(place - place.mean()) + 0 * params["bias"].sum(), 0 * place,
            jnp.zeros(place.shape, int), {},
        )  # fmt: skip

    dealt = replay.minibatched(
        FORMULATION._replace(losses=spread), optax.sgd(0.1), optax.sgd(0.1), VISIT, parts=5
    )
    _, info = jax.jit(dealt.step)(KEY, dealt.init(PARAMS, [0.5]), batch_of())
    assert info.objective > 0.1


def test_minibatches_reach_the_exact_multiplier():
    gap, distance = gap_and_distance()
    optimizer = optax.adam(optax.exponential_decay(0.02, 1500, 0.1))
    dual = multipliers.nu_pi(0.06 / distance, 0.2 / distance)
    algorithm = replay.minibatched(FORMULATION, optimizer, dual, VISIT, parts=5)
    zeros = jnp.zeros(8, int)
    batch = ConditionBatch(None, Separated(zeros, zeros, zeros + 1, zeros))

    @jax.jit
    def solve(threshold):
        state = algorithm.init(REFERENCE, threshold)
        keys = jax.random.split(KEY, 800)
        return jax.lax.scan(lambda state, key: algorithm.step(key, state, batch), state, keys)

    state, info = solve(2.0 * distance)
    alpha = np.sqrt(2.0) - 1
    assert info.multipliers[-200:].mean() == pytest.approx(alpha / (1 + alpha), rel=0.02)
    assert info.values[-200:].mean() == pytest.approx(2.0 * distance, rel=0.02)
    np.testing.assert_allclose(
        state.params["bias"][0], REFERENCE["bias"][0] + alpha * gap, atol=0.06
    )


def test_a_part_that_is_not_finite_leaves_the_state_as_it_was():
    algorithm = replay.minibatched(FORMULATION, optax.sgd(0.1), optax.sgd(0.1), VISIT, parts=5)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, REFERENCE)
    state = algorithm.init(PARAMS, [0.5, 0.1], multipliers=MULTIPLIERS, reference=broken)
    got, info = jax.jit(algorithm.step)(KEY, state, batch_of())
    assert not info.finite
    assert got.step == 1
    for a, b in zip(
        jax.tree.leaves(got._replace(step=0, reference=None)),
        jax.tree.leaves(state._replace(step=0, reference=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_mistakes_are_refused():
    batch = batch_of()
    path = VISIT(PARAMS, KEY, batch)
    with pytest.raises(ValueError, match="capacity"):
        replay.init(0, path)
    buffer = replay.add(replay.init(1, path), path)
    formulation = reverse_kl(chains.apply, chains.SCHEDULE, estimator="pathwise", **OPTIONS)
    with pytest.raises(ValueError, match="no derivative"):
        formulation.losses(PARAMS, REFERENCE, KEY, replay.sample(KEY, buffer), None)
    for parts in (0, 2):
        algorithm = replay.minibatched(
            FORMULATION, optax.sgd(0.1), optax.sgd(0.1), VISIT, parts=parts
        )
        with pytest.raises(ValueError, match=f"5 time steps cannot .* {parts} minibatches"):
            algorithm.step(KEY, algorithm.init(PARAMS, [0.5, 0.1]), batch)
