import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import formulations, losses, schedules, sharding
from jax_unlearn.minibatched import minibatched
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Images

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
        kept=Images(jnp.concatenate([kept, kept + 1]), jnp.zeros(32, int)),
        # Constraint 2 has images on one device only.
        forget=Images(forget + 1, jnp.full(16, 2), jnp.array([0, 1] * 7 + [2, 2])),
        base=Images(base, jnp.ones(16, int)),
    )


def algorithm_of(mixing, axis_name=None):
    weighting = losses.time_weighting(losses.simple_weights(50, 4), np.linspace(1.0, 0.1, 50))
    problem = formulations.forward_kl(network, SCHEDULE, weighting, mixing=mixing)
    return primal_dual(problem, optax.sgd(0.3), optax.sgd(0.2), axis_name=axis_name)


def with_dual_batch(algorithm):
    """The algorithm whose batches are pairs, of a batch and a dual batch."""
    return algorithm._replace(
        step=lambda key, state, reference, both: algorithm.step(key, state, reference, *both)
    )


def split(batch):
    return jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), batch)


def ends_of(algorithm, mapped, params, batch, thresholds, multipliers, count):
    """(params, multipliers, info) after some steps, on one device, on a mesh and under pmap."""
    mesh = sharding.device_mesh()
    assert mesh.size == DEVICES
    ways = {
        "one": (sharding.jit_step(algorithm.step), lambda tree: tree, lambda batch: batch),
        "jit": (
            sharding.jit_step(algorithm.step, mesh),
            functools.partial(sharding.replicate, mesh=mesh),
            functools.partial(sharding.shard_batch, mesh=mesh),
        ),
        "pmap": (sharding.pmap_step(mapped), lambda tree: tree, split),
    }
    ends = {}
    for name, (step, whole, put) in ways.items():
        state = whole(algorithm.init(params, thresholds, multipliers=multipliers))
        placed, reference = put(batch), whole(params)
        for key in jax.random.split(KEY, count):
            state, info = step(key, state, reference, placed)
        ends[name] = jax.tree.map(np.asarray, (state.params, state.multipliers, info))
        for leaf in jax.tree.leaves((reference, params)):  # the donated state was a copy
            assert not leaf.is_deleted()
    assert ways["jit"][0]._cache_size() == 1
    for other in ("jit", "pmap"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            ends["one"],
            ends[other],
        )
    return ends["one"]


@pytest.mark.parametrize(("mixing", "dual"), [(None, False), (0.5, False), (None, True)])
def test_jit_and_pmap_give_the_result_of_one_device(mixing, dual):
    params, batch = params_of(KEY), batch_of(KEY)
    single, mapped = algorithm_of(mixing), algorithm_of(mixing, "data")
    if dual:
        single, mapped = with_dual_batch(single), with_dual_batch(mapped)
        batch = batch, batch_of(jax.random.key(2))
    thresholds = jnp.array([1.5, 2.0, 1.8])
    end, multipliers, _ = ends_of(single, mapped, params, batch, thresholds, 0.1, 20)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), end, params)
    assert all(change > 1e-3 for change in moved.values())
    assert (np.abs(multipliers - 0.1) > 1e-2).all()


def test_minibatches_of_trajectories_are_those_of_one_device():
    chain = {"shape": (2, 2, 1), "steps": 4}
    problem = formulations.reverse_kl(network, SCHEDULE, estimator="stop_gradient", **chain)
    visit = formulations.sample_trajectories(network, SCHEDULE, **chain)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))
    single, mapped = (
        minibatched(problem, optimizer, optax.sgd(3e-3), visit, parts=2, axis_name=axis_name)
        for axis_name in (None, "data")
    )
    label, null = jnp.ones(8, int), jnp.zeros(8, int)
    batch = Batch(
        Conditions(jnp.full(16, 2), jnp.full(16, 2)), Conditions(label, null, label, null)
    )
    params = params_of(KEY)
    end, multipliers, _ = ends_of(single, mapped, params, batch, jnp.array([1.5]), 0.3, 5)
    moved = np.abs(end["out"] - params["out"]).max()
    assert 1e-3 < moved < 0.3
    assert np.abs(multipliers - 0.3).max() > 3e-3


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_pmap_refuses_an_algorithm_that_does_not_sum_over_its_axis(axis_name):
    chain = {"shape": (2, 2, 1), "steps": 4}
    problem = formulations.reverse_kl(network, SCHEDULE, estimator="stop_gradient", **chain)
    visit = formulations.sample_trajectories(network, SCHEDULE, **chain)
    algorithms = (
        algorithm_of(None, axis_name),
        minibatched(problem, optax.sgd(0.1), optax.sgd(0.1), visit, parts=2, axis_name=axis_name),
    )
    for algorithm in algorithms:
        with pytest.raises(ValueError, match=f"axis 'data'.*axis_name={axis_name!r}"):
            sharding.pmap_step(algorithm)


def test_batches_are_split_over_the_mesh():
    mesh = sharding.device_mesh(devices=jax.devices()[:4])
    assert mesh.axis_names == ("data",)
    placed = sharding.shard_batch({"x": np.arange(8.0), "none": None}, mesh)
    assert placed["none"] is None
    assert len(placed["x"].sharding.device_set) == 4
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed["x"], np.arange(8.0))


def test_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match=r"a batch of 12 .* 8 devices"):
        sharding.shard_batch({"x": jnp.zeros((16, 2)), "y": jnp.zeros(12)}, sharding.device_mesh())
