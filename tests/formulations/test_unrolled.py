"""Derivatives through several primal-dual steps, against central differences in float64."""

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import losses, mixtures
from jax_unlearn.formulations import (
    distill_likelihood,
    distill_reverse_kl,
    forward_kl,
    mixed,
    reverse_kl,
)
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Images, Samples

KEY = jax.random.key(0)
SCHEDULE = chains.SCHEDULE
WEIGHTING = losses.TimeWeighting(jnp.array([1.0, 2.0, 1.0, 0.5, 2.0]), jnp.full(5, 0.2))
ON_POLICY = {"shape": (1,), "steps": 5}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def network(params, x_t, t, cond):
    label = jnp.zeros(len(x_t), int) if cond is None else cond
    hidden = jnp.tanh(x_t * params["in"] + params["time"][t] + params["label"][label])
    return hidden @ params["out"]


def params_of(key):
    shapes = {"in": (4,), "time": (5, 4), "label": (2, 4), "out": (4, 1)}
    keys = jax.random.split(key, 4)
    return {
        name: 0.7 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def log_ratio(x):
    """Of a mixture of two Gaussians to its first component."""
    q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.3)
    first = mixtures.select(q, 0)
    return mixtures.log_density(q, x) - mixtures.log_density(first, x)


def squares(x):
    return 0.5 * jnp.square(x - 1.0)


def problem(kind):
    """A problem, a batch for it, and thresholds that its first values are near."""
    x = mixtures.sample(mixtures.gaussian_mixture([[-1.0], [1.0]], 0.3), KEY, 12)
    zeros = jnp.zeros(12, int)
    if kind == "forward_kl":
        batch = Batch(Images(x[:6], zeros[:6]), Images(x[6:], zeros[6:] + 1, zeros[6:]))
        return forward_kl(network, SCHEDULE, WEIGHTING), batch, [9.0]
    if kind.startswith("distill"):
        values = log_ratio(x) if kind == "distill_reverse_kl" else squares(x)[:, 0]
        batch = Batch(None, Samples(x, zeros, zeros, values, zeros))
        if kind == "distill_reverse_kl":
            return distill_reverse_kl(network, SCHEDULE, WEIGHTING), batch, [5.0]
        return distill_likelihood(network, SCHEDULE, WEIGHTING), batch, [0.3]
    forget = Conditions(zeros[:4], zeros[:4], zeros[:4] + 1, zeros[:4])
    if kind == "mixed pathwise":
        batch = Batch(None, forget._replace(likelihood=zeros[:4]))
        return mixed(network, SCHEDULE, squares, (1, 1), **ON_POLICY), batch, [2.0, 0.3]
    stopped = reverse_kl(network, SCHEDULE, estimator="stop_gradient", **ON_POLICY)
    return stopped, Batch(None, forget), [2.0]


def end_of(kind):
    """Thresholds -> parameters and multipliers after four steps, weighed into one number."""
    posed, batch, thresholds = problem(kind)
    algorithm = primal_dual(posed, optax.adam(0.05, eps_root=1e-12), optax.sgd(0.02))
    start, reference = params_of(KEY), params_of(jax.random.key(1))
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape)), start
    )

    def end(thresholds):
        state = algorithm.init(start, thresholds, multipliers=0.1)
        state, _ = jax.lax.scan(
            lambda state, key: algorithm.step(key, state, reference, batch),
            state,
            jax.random.split(KEY, 4),
        )
        moved = sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(state.params), strict=True)
        )
        return jnp.append(state.multipliers, moved)

    return jax.jit(end), jnp.asarray(thresholds)


def derivatives(kind):
    """By reverse mode, forward mode and central differences, [outputs, thresholds]."""
    end, thresholds = end_of(kind)
    outputs = len(thresholds) + 1

    @jax.jit
    def exact(thresholds):
        rows = [jax.grad(lambda b, i=i: end(b)[i])(thresholds) for i in range(outputs)]
        columns = [
            jax.jvp(end, (thresholds,), (direction,))[1] for direction in jnp.eye(len(thresholds))
        ]
        return jnp.stack(rows), jnp.stack(columns, axis=1)

    width = 1e-5 * np.eye(len(thresholds))
    numeric = [(end(thresholds + e) - end(thresholds - e)) / 2e-5 for e in width]
    assert (end(thresholds)[:-1] > 1e-3).all()  # inside the dual domain
    return *exact(thresholds), np.stack(numeric, axis=1)


@pytest.mark.parametrize(
    "kind",
    [
        "forward_kl",
        "distill_likelihood",
        pytest.param("distill_reverse_kl", marks=pytest.mark.slow),
        pytest.param("mixed pathwise", marks=pytest.mark.slow),
    ],
)
def test_derivatives_in_the_thresholds(kind):
    reverse, forward, numeric = derivatives(kind)
    np.testing.assert_allclose(reverse, numeric, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(forward, numeric, rtol=1e-5, atol=1e-9)
    assert (np.abs(numeric).max(axis=1) > 1e-4).all()


@pytest.mark.slow
def test_stop_gradient_misses_how_parameters_move_later_trajectories():
    reverse, forward, numeric = derivatives("reverse_kl stop_gradient")
    np.testing.assert_allclose(reverse, forward, rtol=1e-6)
    assert (np.abs(reverse - numeric) > 1e-3 * np.abs(numeric)).all()
