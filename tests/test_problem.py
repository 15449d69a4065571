import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import multipliers
from jax_unlearn.formulations import reverse_kl
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Losses, Problem, lagrangian, violations

KEY = jax.random.key(0)
RNG = np.random.default_rng(7)
SIGN, SHARE = np.array([1.0, -1.0, 1.0]), np.array([0.25, 1.0, 0.5])
X, MULTIPLIERS = np.array([0.4, -0.8]), np.array([0.6, 1.4, 0.9])
THRESHOLDS = np.array([1.5, -0.2, 0.3])


class Rows(NamedTuple):
    """Points a of the objective ½‖x − a‖²; c and i of constraint values sin(c·x)."""

    points: np.ndarray
    slopes: np.ndarray
    index: np.ndarray


def rows_of(index):
    """Two objective rows for each value."""
    count = len(index)
    points, slopes = RNG.normal(size=(2 * count, 2)), RNG.normal(size=(count, 2))
    return Rows(points, slopes, np.asarray(index))


def evaluate(params, reference, key, batch, current, *, axis_name=None):
    return Losses(
        objective=0.5 * jnp.square(params - batch.points).sum(axis=1),
        values=jnp.sin(batch.slopes @ params),
        index=batch.index,
        share=jnp.asarray(SHARE),
    )


PROBLEM = Problem(evaluate, jnp.asarray(SIGN), multipliers.free(), "three sines")


def written_out(x, weights, thresholds, rows):
    """(L, values, stderr, violations) by a loop; a constraint without a row adds nothing."""
    total = np.mean([0.5 * ((x - a) ** 2).sum() for a in rows.points])
    values, stderr, excess = np.full(3, np.nan), np.full(3, np.nan), np.zeros(3)
    for i in range(3):
        own = np.array(
            [np.sin(c @ x) for c, j in zip(rows.slopes, rows.index, strict=True) if j == i]
        )
        if own.size:
            values[i] = own.mean()
            excess[i] = SIGN[i] * (thresholds[i] - values[i])
            total += SHARE[i] * weights[i] * excess[i]
        if own.size > 1:
            stderr[i] = own.std(ddof=1) / np.sqrt(own.size)
    return total, values, stderr, excess


@pytest.mark.parametrize("index", [[0, 1, 2, 0, 0, 1], [1, 1, 2, 1], [0, 0]])
def test_the_lagrangian_written_out(index):
    """With every constraint, with one of a single row and one of none, and with one alone."""
    rows = rows_of(index)
    total, values, stderr, excess = written_out(X, MULTIPLIERS, THRESHOLDS, rows)
    got, found = jax.jit(functools.partial(lagrangian, PROBLEM))(
        jnp.float32(X), None, KEY, jax.tree.map(jnp.asarray, rows), MULTIPLIERS, THRESHOLDS
    )
    assert got.shape == ()
    np.testing.assert_allclose(got, total, rtol=1e-5)
    assert found.objective == pytest.approx(
        np.mean([0.5 * ((X - a) ** 2).sum() for a in rows.points]), rel=1e-5
    )
    np.testing.assert_allclose(found.values, values, rtol=1e-5)
    np.testing.assert_allclose(found.stderr, stderr, rtol=1e-4)
    np.testing.assert_allclose(found.violations, excess, rtol=1e-5, atol=1e-7)
    assert np.isnan(found.values).any() == (len(set(index)) < 3)


@pytest.mark.slow
@pytest.mark.parametrize("index", [[0, 1, 2, 0, 0, 1], [1, 1, 2, 1]])
def test_gradients_in_parameters_multipliers_and_thresholds(index):
    """Against central differences of the written-out value, in float64."""
    rows, width = rows_of(index), 1e-6
    point = np.concatenate([X, MULTIPLIERS, THRESHOLDS])

    def at(point):
        return written_out(point[:2], point[2:5], point[5:], rows)[0]

    numeric = [(at(point + e) - at(point - e)) / (2 * width) for e in width * np.eye(8)]
    with jax.enable_x64(True):
        got = jax.grad(
            lambda x, weights, thresholds: lagrangian(
                PROBLEM, x, None, KEY, rows, weights, thresholds
            )[0],
            argnums=(0, 1, 2),
        )(*(jnp.asarray(part) for part in (X, MULTIPLIERS, THRESHOLDS)))
    got = [np.asarray(part) for part in got]
    np.testing.assert_allclose(np.concatenate(got), numeric, rtol=1e-7, atol=1e-9)
    absent = np.isin(np.arange(3), index, invert=True)
    np.testing.assert_array_equal(got[1] == 0, absent)
    np.testing.assert_array_equal(got[2] == 0, absent)


def test_one_number_stands_for_all_multipliers():
    rows = rows_of([0, 1, 2])
    alone = PROBLEM._replace(sign=1.0)
    got, _ = lagrangian(alone, jnp.float32(X), None, KEY, rows, 0.5, THRESHOLDS)
    each, _ = lagrangian(alone, jnp.float32(X), None, KEY, rows, [0.5, 0.5, 0.5], THRESHOLDS)
    np.testing.assert_array_equal(got, each)


def test_violations_are_positive_where_violated():
    found = violations(PROBLEM, [1.0, 1.0, 4.0], [1.5, 0.25, 3.0])
    np.testing.assert_array_equal(found, [0.5, 0.75, -1.0])


@pytest.mark.slow
def test_it_is_the_mean_over_rows_of_each_rows_own_lagrangian():
    """Kept rows have no constraint; the rows to forget have one of two, or other targets too."""
    reference = jax.tree.map(jnp.float32, chains.gaussian([0.0, 1.0, -0.7], 0.5))
    params = jax.tree.map(
        lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape).astype(np.float32), reference
    )
    problem = reverse_kl(chains.apply, chains.SCHEDULE, shape=(1,), steps=5)
    kept = jnp.array([0, 1, 2, 1, 0])
    cond, each = jnp.array([1, 2, 1]), jnp.array([[0, 2], [1, 2], [0, 2]])
    forget = Conditions(cond, 0 * cond, jnp.stack([cond, 0 * cond], axis=1), each)
    batch = Batch(Conditions(kept, kept), forget)
    weights, thresholds = np.array([0.3, 0.5, 0.2]), np.array([1.0, 0.7, 0.4])
    got, _ = lagrangian(problem, params, reference, KEY, batch, weights, thresholds)
    found = problem.losses(params, reference, KEY, batch, jnp.float32(weights))
    values = dict(zip(np.ndindex(3, 2), np.asarray(found.values), strict=True))
    rows = [float(value) for value in found.objective]
    for (row, place), value in values.items():
        i = each[row, place]
        rows[5 + row] += weights[i] * (thresholds[i] - value)
    np.testing.assert_allclose(got, np.mean(rows), rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_sums_over_devices_are_those_of_the_whole_batch():
    """Values and gradients; constraint 2 is on the last device alone, and 0 not on it."""
    rows = jax.tree.map(jnp.float32, rows_of([0, 1] * 7 + [2, 2]))
    rows = rows._replace(index=rows.index.astype(int))
    split = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), rows)

    def value(arguments, rows, axis_name=None):
        x, weights, thresholds = arguments
        return lagrangian(PROBLEM, x, None, KEY, rows, weights, thresholds, axis_name=axis_name)

    def summed(arguments, rows):
        (part, found), gradient = jax.value_and_grad(value, has_aux=True)(arguments, rows, "data")
        return jax.lax.psum((part, gradient), "data"), found

    arguments = tuple(jnp.float32(part) for part in (X, MULTIPLIERS, THRESHOLDS))
    (whole, found), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(arguments, rows)
    got = jax.pmap(summed, axis_name="data", in_axes=(None, 0))(arguments, split)
    jax.tree.map(
        lambda leaf, expected: np.testing.assert_allclose(
            leaf, np.broadcast_to(expected, leaf.shape), rtol=2e-5, atol=1e-6
        ),
        got,
        ((whole, gradient), found),
    )


@pytest.mark.parametrize("alternating", [True, False])
def test_primal_dual_descends_its_gradient(alternating):
    """At λ after the dual step if alternating, before it if not."""
    rows = jax.tree.map(jnp.asarray, rows_of([0, 1, 0, 1]))
    algorithm = primal_dual(PROBLEM, optax.sgd(0.1), optax.sgd(0.3), alternating=alternating)
    start = algorithm.init(jnp.float32(X), THRESHOLDS, multipliers=MULTIPLIERS)
    state, info = jax.jit(algorithm.step)(KEY, start, None, rows)
    value = jax.value_and_grad(functools.partial(lagrangian, PROBLEM), has_aux=True)
    used = state.multipliers if alternating else start.multipliers
    (_, found), gradient = value(start.params, None, KEY, rows, used, start.thresholds)
    np.testing.assert_allclose(state.params, start.params - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(
        state.multipliers, start.multipliers + 0.3 * found.violations, rtol=1e-6
    )
    assert np.abs(state.multipliers - start.multipliers)[:2].min() > 1e-2
    for name in ("objective", "values", "violations"):
        np.testing.assert_allclose(getattr(info, name), getattr(found, name), rtol=1e-6)
