import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import formulations, losses, schedules, sharding
from jax_unlearn import minibatched as replay
from jax_unlearn.formulations import (
    Batch,
    ConditionBatch,
    Examples,
    Forget,
    Held,
    Separated,
    reverse_kl,
)
from jax_unlearn.primal_dual import primal_dual

DEVICES = 8
SCHEDULE = schedules.noise_schedule("squaredcos_cap_v2", num_steps=50)
KEY = jax.random.key(0)

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason=f"needs XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}",
)


def network(params, x_t, t, cond):
    hidden = jnp.tanh(
        x_t.reshape(len(x_t), -1) @ params["in"] + params["time"][t] + params["label"][cond]
    )
    return (hidden @ params["out"]).reshape(x_t.shape)


def params_of(key):
    keys = jax.random.split(key, 4)
    shapes = {"in": (4, 16), "time": (50, 16), "label": (3, 16), "out": (16, 4)}
    return {
        name: 0.3 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def batch_of(key):
    kept, base, forget = jax.random.normal(key, (3, 16, 2, 2, 1))
    return Batch(
        # Twice as many kept images: parts of unequal size.
        Examples(jnp.concatenate([kept, kept + 1]), jnp.zeros(32, int)),
        Examples(base, jnp.ones(16, int)),
        # Constraint 2 has examples on one device only.
        Forget(forget + 1, jnp.full(16, 2), jnp.array([0, 1] * 7 + [2, 2])),
    )


def algorithm_of(estimator, axis_name=None):
    weighting = losses.time_weighting(losses.simple_weights(50, 4), np.linspace(1.0, 0.1, 50))
    formulation = formulations.forward_kl(network, SCHEDULE, weighting, estimator=estimator)
    return primal_dual(formulation, optax.sgd(0.3), optax.sgd(0.2), axis_name=axis_name)


def split(batch):
    return jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), batch)


@pytest.mark.parametrize(
    ("estimator", "dual"),
    [*((name, False) for name in formulations.ESTIMATORS), ("two_term", True)],
)
def test_jit_and_pmap_give_the_result_of_one_device(estimator, dual):
    mesh = sharding.data_mesh()
    assert mesh.size == DEVICES
    single = algorithm_of(estimator)

    def step_of(algorithm):
        if dual:
            return lambda key, state, both: algorithm.step(key, state, *both)
        return algorithm.step

    ways = {
        "one": (sharding.jit_step(step_of(single)), lambda batch: batch),
        "jit": (
            sharding.jit_step(step_of(single), mesh),
            functools.partial(sharding.shard_batch, mesh=mesh),
        ),
        "pmap": (sharding.pmap_step(step_of(algorithm_of(estimator, "data"))), split),
    }
    params, batch, ends = params_of(KEY), batch_of(KEY), {}
    if dual:
        batch = batch, batch_of(jax.random.key(2))
    keys = jax.random.split(KEY, 20)
    for name, (step, put) in ways.items():
        state = single.init(params, jnp.array([1.5, 2.0, 1.8]), multipliers=0.1)
        placed = put(batch)
        for key in keys:
            state, info = step(key, state, placed)
        ends[name] = jax.tree.map(np.asarray, (state.params, state.multipliers, info))
    for other in ("jit", "pmap"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            ends["one"],
            ends[other],
        )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ends["one"][0], params)
    assert all(change > 1e-3 for change in moved.values())
    assert (np.abs(ends["one"][1] - 0.1) > 1e-2).all()
    for leaf in jax.tree.leaves(params):  # the donated state was a copy
        assert not leaf.is_deleted()


def test_minibatches_of_trajectories_are_those_of_one_device():
    chain = {"shape": (2, 2, 1), "steps": 4}
    formulation = reverse_kl(network, SCHEDULE, estimator="stop_gradient", **chain)
    visit = replay.trajectories(network, SCHEDULE, **chain)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))
    algorithm = replay.minibatched(formulation, optimizer, optax.sgd(1e-3), visit, parts=2)
    label, null = jnp.ones(8, int), jnp.zeros(8, int)
    batch = ConditionBatch(
        Held(jnp.full(16, 2), jnp.full(16, 2)), Separated(label, null, label, null)
    )
    params, mesh, ends = params_of(KEY), sharding.data_mesh(), []
    for over in (None, mesh):
        step = sharding.jit_step(algorithm.step, over)
        state = algorithm.init(params, jnp.array([1.5]), multipliers=0.1)
        placed = batch if over is None else sharding.shard_batch(batch, over)
        for key in jax.random.split(KEY, 5):
            state, info = step(key, state, placed)
        ends.append(jax.tree.map(np.asarray, (state.params, state.multipliers, info)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *ends)
    moved = np.abs(ends[0][0]["out"] - params["out"]).max()
    assert 1e-3 < moved < 0.3
    assert np.abs(ends[0][1] - 0.1).max() > 1e-3


def test_batches_are_split_over_the_mesh():
    mesh = sharding.data_mesh(jax.devices()[:4])
    assert mesh.axis_names == ("data",)
    placed = sharding.shard_batch({"x": np.arange(8.0), "none": None}, mesh)
    assert placed["none"] is None
    assert len(placed["x"].sharding.device_set) == 4
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed["x"], np.arange(8.0))


def test_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match=r"a batch of 12 .* 8 devices"):
        sharding.shard_batch({"x": jnp.zeros((16, 2)), "y": jnp.zeros(12)}, sharding.data_mesh())
