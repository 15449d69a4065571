import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import write_tiny_model

from jax_unlearn import formulations, losses, schedules, sharding
from jax_unlearn.minibatched import minibatched
from jax_unlearn.pretrained import load_pretrained, unet
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
        "pmap": (
            sharding.pmap_step(mapped),
            lambda tree: tree,
            functools.partial(sharding.split_batch, devices=DEVICES),
        ),
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 1}
    placed = sharding.shard_batch({"x": np.arange(8.0), "none": None}, mesh)
    assert placed["none"] is None
    assert len(placed["x"].sharding.device_set) == 4
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed["x"], np.arange(8.0))


def test_indivisible_batches_are_refused():
    batch = {"x": jnp.zeros((16, 2)), "y": jnp.zeros(12)}
    with pytest.raises(ValueError, match=r"a batch of 12 .* 8 devices"):
        sharding.shard_batch(batch, sharding.device_mesh())
    with pytest.raises(ValueError, match=r"a batch of 12 .* 8 devices"):
        sharding.split_batch(batch, 8)
    sharding.shard_batch(batch, sharding.device_mesh(fsdp=2, tensor=2))  # Four ways.


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_sizes_of_a_mesh(sizes, expected):
    mesh = sharding.device_mesh(**sizes)
    assert tuple(mesh.shape.values()) == expected
    assert sorted(device.id for device in mesh.devices.flat) == [*range(8)]
    assert sharding.batch_ways(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not fit the 8 devices"),
        ({"data": 2, "fsdp": 2}, "does not fit the 8 devices"),
        ({"fsdp": 3}, "does not fit the 8 devices"),
        ({"fsdp": -1}, "only one size may be -1"),
        ({"fsdp": 0}, "at least 1"),
        ({"dcn_data": 3}, "dcn_data=3.*does not fit"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.device_mesh(**sizes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("data=4,fsdp=2", {"data": 4, "fsdp": 2}),
        ("fsdp=-1", {"fsdp": -1, "data": 1}),
        (" dcn_data=2, tensor=2 ", {"dcn_data": 2, "tensor": 2}),
    ],
)
def test_meshes_as_text(text, expected):
    assert sharding.parse_mesh(text) == expected


@pytest.mark.parametrize("text", ["data", "data=0", "data=x", "rows=2", "data=2,data=4", "data=-2"])
def test_texts_that_are_no_mesh_are_refused(text):
    with pytest.raises(ValueError, match="data=N,fsdp=N,tensor=N"):
        sharding.parse_mesh(text)


def test_where_parameters_lie():
    mesh = sharding.device_mesh(data=1, fsdp=4, tensor=2)
    shapes = {
        "attn1": {"to_q": {"kernel": (64, 96), "bias": (96,)}, "to_out_0": {"kernel": (96, 64)}},
        "resnets_0": {"conv1": {"kernel": (3, 3, 32, 64)}, "conv2": {"kernel": (3, 3, 64, 30)}},
        "conv_in": {"kernel": (3, 3, 4, 64)},
        "odd": {"kernel": (63, 65)},
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    state = optax.adam(1e-3).init(params)
    for tree in (params, state[0].mu):  # An optimizer's state lies as the parameters do.
        found = jax.tree.map(lambda one: tuple(one.spec), sharding.shardings(tree, mesh))
        assert found == {
            "attn1": {
                "to_q": {"kernel": ("fsdp", "tensor"), "bias": ()},
                "to_out_0": {"kernel": ("tensor", "fsdp")},
            },
            "resnets_0": {
                "conv1": {"kernel": (None, None, "fsdp", "tensor")},
                # 30 channels do not divide over 4.
                "conv2": {"kernel": (None, None, "tensor", None)},
            },
            "conv_in": {"kernel": (None, None, None, "fsdp")},
            "odd": {"kernel": (None, None)},
        }
    assert not sharding.shardings(state, mesh)[0].count.spec
    placed = sharding.put(params, sharding.shardings(params, mesh))
    sizes = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed["attn1"])]
    assert sizes == [96 * 64 // 8, 96, 64 * 96 // 8]


def wide(params, x_t, t, cond):
    """A network whose parameters are large enough to be split, by the names of the rules."""
    x_t, t, cond = sharding.keep_rows((x_t, t, cond))
    hidden = x_t.reshape(len(x_t), -1) @ params["attn1"]["to_q"]["kernel"]
    hidden = jnp.tanh(hidden + params["label"][cond] + t[:, None] / 50)
    out = (hidden @ params["attn1"]["to_out_0"]["kernel"]).reshape(x_t.shape)
    return sharding.keep_rows(out)


def wide_params(key):
    keys = jax.random.split(key, 3)
    return {
        "attn1": {
            "to_q": {"kernel": 0.3 * jax.random.normal(keys[0], (4, 1024))},
            "to_out_0": {"kernel": 0.03 * jax.random.normal(keys[1], (1024, 4))},
        },
        "label": 0.3 * jax.random.normal(keys[2], (3, 1024)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("formulation", ["forward_kl", "reverse_kl"])
def test_split_parameters_give_the_result_of_one_device(formulation):
    if formulation == "forward_kl":
        weighting = losses.time_weighting(losses.simple_weights(50, 4), np.linspace(1.0, 0.1, 50))
        problem, batch = formulations.forward_kl(wide, SCHEDULE, weighting), batch_of(KEY)
    else:
        problem = formulations.reverse_kl(
            wide, SCHEDULE, estimator="stop_gradient", shape=(2, 2, 1), steps=4
        )
        label, null = jnp.ones(8, int), jnp.zeros(8, int)
        batch = Batch(
            Conditions(jnp.full(16, 2), jnp.full(16, 2)), Conditions(label, null, label, null)
        )
    # Adam would amplify the round-off of gradients that begin at zero.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    algorithm = primal_dual(problem, optimizer, optax.sgd(3e-3))
    params, ends = wide_params(KEY), {}
    for name, sizes in {
        "one": None,
        "data": {},
        "fsdp": {"fsdp": 4},
        "tensor": {"fsdp": 2, "tensor": 2},
    }.items():
        mesh = None if sizes is None else sharding.device_mesh(**sizes)
        state = algorithm.init(params, jnp.array([1.5, 2.0, 1.8]), multipliers=0.1)
        reference, placed, like = params, batch, None
        if mesh is not None:
            like = sharding.shardings((state, reference), mesh)
            state, reference = sharding.put((state, reference), like)
            like, placed = (state, reference), sharding.shard_batch(batch, mesh)
        step = sharding.jit_step(algorithm.step, mesh, like=like)
        for key in jax.random.split(KEY, 20):
            state, _ = step(key, state, reference, placed)
        assert step._cache_size() == 1
        if name in ("fsdp", "tensor"):
            kernel = state.params["attn1"]["to_q"]["kernel"]
            assert kernel.addressable_shards[0].data.size == kernel.size // 4
        ends[name] = jax.tree.map(np.asarray, (state.params, state.multipliers))
    for name in ("data", "fsdp", "tensor"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            ends["one"],
            ends[name],
        )
    moved = np.abs(ends["one"][0]["label"] - params["label"]).max()
    assert moved > 3e-4


@pytest.mark.slow
def test_activations_stay_split_by_rows(tmp_path, monkeypatch):
    """Else the compiler splits activations as the parameters are, and sends them many times."""
    network = load_pretrained(write_tiny_model(tmp_path / "model", 16, levels=2))
    weighting = losses.time_weighting(losses.simple_weights(50, 64))
    problem = formulations.forward_kl(network.apply, network.schedule, weighting)
    algorithm = primal_dual(problem, optax.sgd(0.1), optax.sgd(0.1))
    mesh = sharding.device_mesh(fsdp=4)
    like = jax.eval_shape(lambda: (algorithm.init(network.params, [0.5]), network.params))
    images = jax.ShapeDtypeStruct((16, 8, 8, 1), np.float32)
    numbers = jax.ShapeDtypeStruct((16,), np.int32)
    batch = Batch(kept=Images(images, numbers), forget=Images(images, numbers, numbers))

    def all_reduces():
        jax.clear_caches()
        step = sharding.jit_step(algorithm.step, mesh, like=like)
        text = step.lower(KEY, *like, batch).compile().as_text()
        return len(re.findall(r" all-reduce(?:-start)?\(", text))

    kept = all_reduces()
    monkeypatch.setattr(unet, "keep_rows", lambda tree: tree)
    free = all_reduces()
    assert 0 < kept < free / 2
    rows = jnp.zeros((16, 4))
    assert sharding.keep_rows(rows) is rows  # Outside of a step.


@pytest.mark.slow
def test_a_step_on_shapes_alone_is_compiled():
    mesh = sharding.device_mesh(fsdp=8, data=1)
    params = wide_params(KEY)
    problem = formulations.forward_kl(
        wide, SCHEDULE, losses.time_weighting(losses.simple_weights(50, 4))
    )
    algorithm = primal_dual(problem, optax.sgd(0.1), optax.sgd(0.1))
    state = jax.eval_shape(lambda: algorithm.init(params, jnp.ones(3)))
    shapes = (state, jax.eval_shape(lambda: params))
    step = sharding.jit_step(algorithm.step, mesh, like=shapes)
    compiled = step.lower(KEY, *shapes, jax.eval_shape(lambda: batch_of(KEY))).compile()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert compiled.memory_analysis().argument_size_in_bytes < total / 4
