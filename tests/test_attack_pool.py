"""Restarted Adam against `optax.adam`, run for each row and each life of it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import attacks

RATE = 0.1


def tree(seed, rows):
    """A condition of two leaves."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "text": jax.random.normal(first, (rows, 2, 3)),
        "pooled": jax.random.normal(second, (rows,)),
    }


def row_of(pool, row):
    return jax.tree.map(lambda leaf: leaf[row], pool)


def flat(pool):
    """Leaves [rows, ...] -> [rows, dimensions], in numpy."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(pool)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def run(optimizer, pool, steps, compiled=True, gradients=None):
    """What is seen before each step and after the last: pools, states; and the gradients."""

    def step(pool, state, gradient):
        updates, state = optimizer.update(gradient, state, pool)
        return optax.apply_updates(pool, updates), state

    step = jax.jit(step) if compiled else step
    if gradients is None:
        rows = len(jax.tree.leaves(pool)[0])
        gradients = [tree(100 + number, rows) for number in range(steps)]
    pools, states = [pool], [optimizer.init(pool)]
    for gradient in gradients:
        pool, state = step(pools[-1], states[-1], gradient)
        pools.append(pool)
        states.append(state)
    return pools, states, gradients


def restarts_of(offset, period, steps):
    """The updates, from 0, that start a row anew which begins with the age `offset`."""
    return [number for number in range(steps) if (number + offset) % (period + 1) == period]


@pytest.mark.slow
def test_between_restarts_each_row_is_a_run_of_adam_alone():
    rows, period, steps = 5, 4, 17
    starts = tree(0, 3)
    optimizer = attacks.restarted_adam(starts, learning_rate=RATE, period=period, b1=0.8, b2=0.95)
    pools, states, gradients = run(optimizer, attacks.pool_of(starts, rows), steps)
    # Each row written out: its own optimizer, begun again where the pool says that it began.
    alone, lives = optax.adam(RATE, b1=0.8, b2=0.95), 0
    update = jax.jit(alone.update)
    for row in range(rows):
        anew = restarts_of(row * period // rows, period, steps)
        current, state = row_of(pools[0], row), alone.init(row_of(pools[0], row))
        for number in range(steps):
            if number in anew:
                current = row_of(pools[number + 1], row)
                state, lives = alone.init(current), lives + 1
            else:
                change, state = update(row_of(gradients[number], row), state)
                current = optax.apply_updates(current, change)
            jax.tree.map(
                lambda seen, expected: np.testing.assert_allclose(
                    seen, expected, rtol=1e-6, atol=1e-6
                ),
                (row_of(pools[number + 1], row), row_of(states[number + 1].mu, row)),
                (current, state[0].mu),
            )
            jax.tree.map(
                lambda seen, expected: np.testing.assert_allclose(seen, expected, rtol=1e-5),
                row_of(states[number + 1].nu, row),
                state[0].nu,
            )
    assert lives == 3 * rows + 1  # Three each, and a fourth of the oldest row.


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "period"), [(6, 3), (4, 8), (3, 1), (1, 2)])
def test_rows_start_anew_at_their_own_steps(rows, period):
    steps = 2 * period + 3
    starts = tree(1, 4)
    optimizer = attacks.restarted_adam(starts, learning_rate=RATE, period=period)
    pools, states, _ = run(optimizer, attacks.pool_of(starts, rows), steps)
    offsets = [row * period // rows for row in range(rows)]
    assert states[0].age.tolist() == offsets
    seen = set()
    for number in range(steps):
        anew = [row for row in range(rows) if number in restarts_of(offsets[row], period, steps)]
        state = states[number + 1]
        assert int(state.count) == number + 1
        assert np.flatnonzero(np.asarray(state.age) == 0).tolist() == anew
        for row in range(rows):
            distance = np.abs(flat(pools[number + 1])[row] - flat(starts)).max(axis=1)
            assert (distance.min() < 1e-6) == (row in anew)
            assert (flat(state.mu)[row] == 0).all() == (row in anew)
            assert (flat(state.nu)[row] == 0).all() == (row in anew)
            if row in anew:
                seen.add(int(distance.argmin()))
    assert len(seen) > 1  # Not always the same start.


def test_ages_are_spread_evenly():
    """No age more than once more often than any other, and restarts as evenly."""
    starts = jnp.ones((1, 1))
    for rows, period in [(1000, 7), (7, 1000), (12, 12), (3, 2**31 - 1)]:
        state = attacks.restarted_adam(starts, period=period).init(jnp.ones((rows, 1)))
        age = np.asarray(state.age, np.int64)
        assert age.min() == 0
        assert age.max() < period
        if rows >= period:
            assert np.ptp(np.bincount(age, minlength=period)) <= 1
        else:
            assert np.ptp(np.diff(np.append(age, period))) <= 1


def test_without_restarts_the_pool_is_adam():
    """The head start of a row is no reason for less bias correction."""
    pool = tree(2, 6)
    optimizer = attacks.restarted_adam(pool, learning_rate=RATE, period=2**31 - 1, eps=1e-4)
    pools, states, gradients = run(optimizer, pool, 12)
    expected, expected_states, _ = run(optax.adam(RATE, eps=1e-4), pool, 12, gradients=gradients)
    for number in range(13):
        np.testing.assert_allclose(flat(pools[number]), flat(expected[number]), 1e-6, 1e-6)
        np.testing.assert_allclose(
            flat(states[number].mu), flat(expected_states[number][0].mu), 1e-6, 1e-6
        )


@pytest.mark.slow
def test_compiled_it_is_the_same():
    starts = tree(3, 3)
    pool = attacks.pool_of(starts, 5)
    optimizer = attacks.restarted_adam(starts, learning_rate=RATE, period=2)
    compiled, eager = (run(optimizer, pool, 7, compiled)[:2] for compiled in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6), compiled, eager)


def test_draws_depend_on_the_seed_and_the_count_alone():
    starts = jnp.arange(50.0)[:, None]

    def restarted(seed, number=0, rate=RATE):
        """All rows are old: the whole pool starts anew at once."""
        optimizer = attacks.restarted_adam(starts, period=5, seed=seed, learning_rate=rate)
        pool = jnp.zeros((20, 1))
        state = optimizer.init(pool)._replace(
            count=jnp.asarray(number), age=jnp.full(20, 5, jnp.int32)
        )
        return optax.apply_updates(pool, optimizer.update(pool + 1, state, pool)[0]).tolist()

    first = restarted(0)
    assert first == restarted(0, rate=0.3)
    assert all(row in starts.tolist() for row in first)
    assert len({row for (row,) in first}) > 10  # Rows are drawn one by one.
    assert first != restarted(1)
    assert first != restarted(0, number=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_restart_is_as_near_its_start_as_digits_allow(dtype, compiled):
    """One unit in the last place of the larger of the two, whatever their sizes."""
    rng = np.random.default_rng(0)
    size = (4000, 2)
    rows, starts = rng.normal(size=(2, *size)) * 10.0 ** rng.uniform(-6, 6, (2, *size))
    starts[:1000] = rows[:1000] * rng.uniform(0.51, 1.99, (1000, 2))
    rows[1000:1100] = 0.0
    # A start a row: its own optimizer, so that it is known which one is drawn.
    rows, starts = jnp.asarray(rows, dtype), jnp.asarray(starts, dtype)

    def restart(row, start):
        optimizer = attacks.restarted_adam(start[None], period=1)
        state = optimizer.init(row[None])._replace(age=jnp.ones(1, jnp.int32))
        updates, _ = optimizer.update(jnp.full_like(row[None], jnp.nan), state, row[None])
        return optax.apply_updates(row[None], updates)[0]

    restart = jax.vmap(restart)
    found = np.asarray((jax.jit(restart) if compiled else restart)(rows, starts))
    assert found.dtype == dtype
    # In float64, where the differences are exact enough.
    found, rows, starts = (np.asarray(part, np.float64) for part in (found, rows, starts))
    larger = np.maximum(np.abs(rows), np.abs(starts))
    unit = 2.0 ** np.floor(np.log2(larger)) * float(jnp.finfo(dtype).eps)
    assert (np.abs(found - starts) <= unit).all()
    np.testing.assert_array_equal(found[:1100], starts[:1100])


def test_updates_have_the_type_of_the_pool():
    pool = jnp.ones((3, 2), jnp.bfloat16)
    optimizer = attacks.restarted_adam(np.ones((1, 2)), learning_rate=np.float32(RATE))
    updates, state = optimizer.update(pool, optimizer.init(pool), pool)
    assert updates.dtype == state.mu.dtype == state.nu.dtype == jnp.bfloat16
    assert state.age.dtype == state.count.dtype == jnp.int32


def test_a_pool_has_each_start_as_often():
    starts = {"a": jnp.arange(7), "b": jnp.arange(7.0)[:, None]}
    pools = [attacks.pool_of(starts, rows, seed=seed) for rows, seed in [(24, 0), (24, 0), (24, 1)]]
    for pool in pools:
        counts = np.bincount(pool["a"], minlength=7)
        assert sorted(counts) == [3] * 4 + [4] * 3
        assert pool["b"][:, 0].tolist() == pool["a"].tolist()
        assert pool["a"][:7].tolist() != pool["a"][7:14].tolist()  # Not in turn.
    assert pools[0]["a"].tolist() == pools[1]["a"].tolist() != pools[2]["a"].tolist()
    # Of few rows too, which starts they are is chance.
    few = [set(attacks.pool_of(starts, 3, seed=seed)["a"].tolist()) for seed in range(20)]
    assert all(len(chosen) == 3 for chosen in few)
    assert set.union(*few) == set(range(7))


@pytest.mark.parametrize("period", [0, -3, 1.5, float("nan"), float("inf"), 2**31])
def test_a_period_is_a_positive_integer(period):
    with pytest.raises(ValueError, match="period must be an integer from 1"):
        attacks.restarted_adam(jnp.ones((1, 1)), period=period)


@pytest.mark.parametrize(
    "starts", [{}, jnp.ones((0, 3)), jnp.ones(()), {"a": jnp.ones((2, 1)), "b": jnp.ones(3)}]
)
def test_there_must_be_starts(starts):
    for begin in (attacks.restarted_adam, lambda starts: attacks.pool_of(starts, 2)):
        with pytest.raises(ValueError, match="the starts must be arrays of one first axis"):
            begin(starts)


def test_a_pool_has_rows():
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        attacks.pool_of(jnp.ones((2, 1)), 0)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (jnp.ones((2, 3)), "must be made like the starts"),
        ({"b": jnp.ones((2, 3))}, "must be made like the starts"),
        ({"a": jnp.ones((2, 4))}, r"the shapes of a start, \[\[3\]\], not \[\[4\]\]"),
        ({"a": jnp.ones((0, 3))}, "rows of the pool must be"),
    ],
)
def test_a_pool_is_made_like_the_starts(pool, message):
    starts = {"a": jnp.ones((2, 3))}
    optimizer = attacks.restarted_adam(starts)
    with pytest.raises(ValueError, match=message):
        optimizer.init(pool)
    with pytest.raises(ValueError, match=message):
        optimizer.update(pool, optimizer.init(starts), pool)


def test_an_update_needs_the_pool():
    pool = jnp.ones((2, 3))
    optimizer = attacks.restarted_adam(pool)
    with pytest.raises(ValueError, match="must be given as params"):
        optimizer.update(pool, optimizer.init(pool))
