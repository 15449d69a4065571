"""Batches in parts against the same batches whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import formulations, losses, multipliers, schedules, sharding
from jax_unlearn.accumulated import accumulated
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Images, Losses, Problem, row_shares

KEY = jax.random.key(0)


def features(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def evaluate(params, reference, key, batch, current, *, axis_name=None):
    """A regression whose rows' losses need no noise, so that parts and the whole must agree."""
    kept, forget, index = batch
    wide = jnp.sin(features(params, kept)[:, None] * jnp.linspace(0.1, 1.0, 64)).mean(axis=1)
    value = jnp.square(features(params, forget))
    share = row_shares(index, current.shape[0], len(kept), axis_name)
    return Losses(jnp.square(wide - kept[:, 0]), value, index, share, {"mean": jnp.mean(value)})


def parameters():
    keys = jax.random.split(KEY)
    return {
        "in": jax.random.normal(keys[0], (4, 8)),
        "out": jax.random.normal(keys[1], (8,)),
    }


def batch_of(rows=32):
    kept, forget = jax.random.normal(jax.random.key(1), (2, rows, 4))
    return kept, forget[: rows // 2], jnp.arange(rows // 2) % 3


def algorithm_of(parts, axis_name=None):
    problem = Problem(evaluate, 1.0, multipliers.non_negative(), "regression")
    return primal_dual(
        accumulated(problem, parts), optax.sgd(0.05), optax.sgd(0.1), axis_name=axis_name
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one", "mesh", "pmap"])
def test_parts_make_the_steps_of_the_whole(way):
    ends = {}
    for parts in (1, 2):
        algorithm = algorithm_of(parts, "data" if way == "pmap" else None)
        state, batch = algorithm.init(parameters(), [3.0, 2.0, 4.0]), batch_of()
        if way == "one":
            step = sharding.jit_step(algorithm.step)
        elif way == "pmap":
            step, batch = sharding.pmap_step(algorithm), sharding.split_batch(batch, 8)
        else:
            mesh = sharding.device_mesh()
            step, batch = sharding.jit_step(algorithm.step, mesh), sharding.shard_batch(batch, mesh)
            state = sharding.replicate(state, mesh)
        for key in jax.random.split(KEY, 20):
            state, info = step(key, state, None, batch)
        ends[parts] = jax.tree.map(np.asarray, (state.params, state.multipliers, info))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *ends.values()
    )
    assert np.abs(ends[2][0]["in"] - parameters()["in"]).max() > 1e-2
    assert ends[2][1].max() > 1e-2


@pytest.mark.slow
def test_a_part_takes_the_memory_of_a_part():
    def temporary(parts):
        algorithm = algorithm_of(parts)
        state = algorithm.init(parameters(), [3.0, 2.0, 4.0])
        step = sharding.jit_step(algorithm.step).lower(KEY, state, None, batch_of(32 * 1024))
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 2


def test_parts_draw_noise_of_their_own():
    schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=50)
    weighting = losses.time_weighting(losses.simple_weights(50, 4))
    problem = formulations.forward_kl(
        lambda params, x_t, t, cond: params * x_t, schedule, weighting
    )
    same = Images(jnp.ones((8, 2, 2, 1)), None)
    batch = Batch(kept=same, forget=same._replace(constraint=jnp.zeros(8, int)))
    found = accumulated(problem, 4).losses(jnp.ones(()), jnp.zeros(()), KEY, batch, jnp.zeros(1))
    assert found.objective.shape == found.values.shape == found.index.shape == (8,)
    assert len(np.unique(found.values)) == 8


def test_parts_that_rows_do_not_divide_into_are_refused():
    with pytest.raises(ValueError, match="at least one part, not 0"):
        algorithm_of(0)
    algorithm = algorithm_of(3)
    state = algorithm.init(parameters(), [3.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="32 rows of a batch do not divide into 3 parts"):
        algorithm.step(KEY, state, None, batch_of())
