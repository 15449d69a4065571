"""Many problems in one program: each as if it were alone, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import formulations, losses, multipliers, schedules, sharding
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Images, Losses, Problem
from jax_unlearn.sweep import sweep_devices, sweep_init, sweep_step

DEVICES = 8
SCHEDULE = schedules.noise_schedule("squaredcos_cap_v2", num_steps=50)

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason=f"needs XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}",
)


def mesh_of(count):
    return None if count == 1 else sharding.device_mesh(devices=jax.devices()[:count])


def analytic():
    """min ½‖x − noise‖² subject to x_i ≥ b_i, the noise drawn by the key and moved by the batch."""

    def evaluate(x, reference, key, batch, current, *, axis_name=None):
        target = reference + batch.mean() + 0.1 * jax.random.normal(key, x.shape)
        return Losses(0.5 * jnp.square(x - target), x, jnp.arange(len(x)))

    problem = Problem(evaluate, 1.0, multipliers.non_negative(), "at least")
    return primal_dual(problem, optax.adam(0.05), optax.sgd(0.3)), jnp.zeros(2)


def network(params, x_t, t, cond):
    hidden = jnp.tanh(x_t.reshape(len(x_t), -1) @ params["in"] + params["time"][t])
    return (hidden @ params["out"]).reshape(x_t.shape)


def of_network():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (4, 16), "time": (50, 16), "out": (16, 4)}
    params = {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    weighting = losses.time_weighting(losses.simple_weights(50, 4), np.linspace(1.0, 0.1, 50))
    problem = formulations.forward_kl(network, SCHEDULE, weighting)
    dual = multipliers.nu_pi(0.2, proportional=0.3)
    return primal_dual(problem, optax.adam(1e-2), dual), params


def image_batch(seed):
    kept, forget = jax.random.normal(jax.random.key(100 + seed), (2, 8, 2, 2, 1))
    return Batch(Images(kept, None), Images(forget + 1, None, jnp.arange(8) % 2))


CASES = {
    "analytic": (analytic, lambda seed: jnp.linspace(-1.0, seed / 100, 3), 1.0),
    "network": (of_network, image_batch, 1.5),
}


def alone(algorithm, params, thresholds, start, key, batches):
    """One problem by the plain step."""
    step = jax.jit(algorithm.step)
    state = algorithm.init(params, thresholds, multipliers=start)
    for number, batch in enumerate(batches):
        state, info = step(jax.random.fold_in(key, number), state, params, batch)
    return state, info


def close(ours, theirs, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
    )


@pytest.fixture(scope="module", params=CASES)
def single(request):
    """Eight problems, of four thresholds and two seeds, each by the plain step."""
    make, batch, least = CASES[request.param]
    algorithm, params = make()
    thresholds = least + np.repeat(np.linspace(0.0, 0.6, 4), 2)[:, None] * np.array([1.0, 0.5])
    start = np.linspace(0.0, 0.2, 8)[:, None] * np.ones(2)
    keys = [jax.random.key(seed) for seed in (3, 4)]
    batches = [[batch(100 * seed + n) for n in range(20)] for seed in (1, 2)]
    ends = [
        alone(algorithm, params, thresholds[i], start[i], keys[i % 2], batches[i % 2])
        for i in range(8)
    ]
    return algorithm, params, thresholds, start, keys, batches, ends


@pytest.mark.parametrize(("devices", "at_once"), [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)])
def test_each_problem_is_that_of_the_plain_step(single, devices, at_once):
    algorithm, params, thresholds, start, keys, batches, ends = single
    mesh = mesh_of(devices)
    states = sweep_init(algorithm, params, thresholds, multipliers=start, mesh=mesh)
    step = sweep_step(algorithm.step, mesh, at_once=at_once)
    which, reference = np.arange(8) % 2, params
    for number in range(20):
        folded = jnp.stack([jax.random.fold_in(keys[i % 2], number) for i in range(8)])
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), batches[0][number], batches[1][number])
        states, infos = step(folded, states, reference, both, which)
    assert int(states.step) == 20
    if devices > 1:
        assert len(jax.tree.leaves(states.params)[0].sharding.device_set) == devices
    for leaf in jax.tree.leaves(reference):  # Not donated.
        assert not leaf.is_deleted()
    for i, (state, info) in enumerate(ends):
        own = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), states._replace(step=()))
        close(own, jax.tree.map(np.asarray, state._replace(step=())))
        close(jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), infos), info)
    moved = np.ptp(np.asarray(states.multipliers), axis=0)
    assert (moved > 1e-2).all()


def test_the_program_is_compiled_once_and_its_states_are_given_away():
    algorithm, params = analytic()
    count = []

    def step(*given):
        count.append(1)
        return algorithm.step(*given)

    states = sweep_init(algorithm, params, np.ones((4, 2)))
    many = sweep_step(step, at_once=2)
    for number in range(3):
        before = states
        keys = jax.random.split(jax.random.key(number), 4)
        states, _ = many(keys, states, params, jnp.zeros((1, 3)), np.zeros(4, int))
        assert before.params.is_deleted()
    assert len(count) == 1


def test_problems_start_from_their_own_parameters_and_see_their_own_arrays():
    """x ← x − ½(x − s): the weights s are of each problem, and the batch is of all."""

    def evaluate(x, reference, key, batch, current, *, axis_name=None):
        return Losses(0.5 * jnp.square(x - batch), jnp.zeros(0), jnp.zeros(0, int))

    problem = Problem(evaluate, 1.0, multipliers.non_negative(), "towards")
    algorithm = primal_dual(problem, optax.sgd(0.5), optax.set_to_zero())

    def step(key, state, reference, batch, strength):
        return algorithm.step(key, state, reference, strength * batch)

    start, strengths = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([1.0, 10.0, 100.0])
    states = sweep_init(algorithm, start, np.zeros((3, 1)), stacked=True)
    keys = jax.random.split(jax.random.key(0), 3)
    which, batches = np.array([0, 1, 0]), jnp.array([[2.0], [3.0]])
    states, infos = sweep_step(step)(keys, states, None, batches, which, (strengths,))
    assert states.params.ravel().tolist() == [1.0, 15.5, 101.0]
    assert infos.objective.tolist() == [2.0, 420.5, 19602.0]
    assert start.tolist() == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_dual_step_that_is_not_due_is_not_computed(at_once):
    """All problems are at one step, so that what is not due is skipped and not selected away."""
    called = []

    def evaluate(x, reference, key, batch, current, *, axis_name=None):
        return Losses(0.5 * jnp.square(x - 2), x, jnp.array([0]))

    def fresh(x, reference, key, batch, current, *, axis_name=None):
        jax.debug.callback(lambda: called.append(1))
        return evaluate(x, reference, key, batch, current)

    problem = Problem(evaluate, 1.0, multipliers.non_negative(), "at least", fresh=fresh)
    algorithm = primal_dual(
        problem, optax.sgd(0.1), optax.sgd(0.1), dual_schedule=lambda done: done == 1
    )

    def step(key, state, reference, batch):
        return algorithm.step(key, state, reference, None, batch)

    states = sweep_init(algorithm, jnp.zeros(1), [[3.0], [4.0]])
    many = sweep_step(step, at_once=at_once)
    keys, which = jax.random.split(jax.random.key(0), 2), np.zeros(2, int)
    counts, found = [], []
    for _ in range(3):
        states, _ = many(keys, states, None, jnp.zeros((1, 1)), which)
        jax.effects_barrier()
        counts.append(len(called))
        found.append(states.multipliers.ravel().tolist())
    # Once a group: it depends on nothing that groups are made of.
    assert counts == [0, 2 // at_once, 2 // at_once]
    assert found[0] == [0.0, 0.0]
    assert found[1] == found[2]
    assert found[1][1] - found[1][0] == pytest.approx(0.1)


def test_numbers_that_do_not_divide_are_refused():
    algorithm, params = analytic()
    keys, which, batches = (
        jax.random.split(jax.random.key(0), 6),
        np.zeros(6, int),
        jnp.zeros((1, 3)),
    )

    def take(mesh, at_once):
        states = sweep_init(algorithm, params, np.ones((6, 2)))
        return sweep_step(algorithm.step, mesh, at_once=at_once)(
            keys, states, params, batches, which
        )

    with pytest.raises(ValueError, match="6 problems do not divide over 4 devices"):
        take(mesh_of(4), 1)
    with pytest.raises(ValueError, match="3 problems of a device do not divide into groups of 2"):
        take(mesh_of(2), 2)
    assert [sweep_devices(n, jax.devices()) for n in (1, 7, 9, 11, 12, 16)] == [1, 7, 3, 1, 6, 8]
