"""What every formulation and every baseline keeps to, on one table of cases.

Losses of one value a row, finite gradients, a step that is the same under jit, vmap and on several
devices, and compiles once.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import baselines, formulations, losses, sharding
from jax_unlearn.baselines import Anchored, Remembered
from jax_unlearn.minibatched import minibatched
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Images, NoisyPoints, Samples

DEVICES = 8
ROWS = 8  # of each part of a batch: one on each device
RNG = np.random.default_rng(3)
REFERENCE = jax.tree.map(jnp.float32, chains.gaussian([0.0, 1.0, -0.7, 0.4], 0.5))
PARAMS = jax.tree.map(
    lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape).astype(np.float32), REFERENCE
)
WEIGHTING = losses.TimeWeighting(jnp.array([0.1, 0.2, 0.1, 0.05, 0.2]), jnp.full(5, 0.2))
CHAIN = {"shape": (1,), "steps": 5}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
DUAL = optax.sgd(0.05)
THRESHOLDS, MULTIPLIERS = jnp.array([0.5, 0.4]), jnp.array([0.3, 0.2])
KEYS = jax.random.split(jax.random.key(0), 3)


def squares(x):
    return jnp.concatenate([0.5 * jnp.square(x - 1), 0.5 * jnp.square(x + 1)], axis=1)


def build(make, *given, **options):
    return make(chains.apply, chains.SCHEDULE, *given, **options)


def normal(seed, *shape):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


# Two constraints, each on every other row.
EACH = jnp.arange(ROWS) % 2
KEPT, NULL, LABEL = jnp.full(ROWS, 3), jnp.zeros(ROWS, int), 1 + EACH


def images(seed):
    def part(seed, cond, constraint=None):
        return Images(normal(seed, ROWS, 1), cond, constraint)

    return Batch(part(seed, KEPT), part(seed + 1, LABEL, EACH), part(seed + 2, LABEL))


def conditions(seed):
    return Batch(Conditions(KEPT - seed, KEPT - seed), Conditions(LABEL, NULL, LABEL, EACH))


def likely(seed):
    batch = conditions(seed)
    return batch._replace(forget=batch.forget._replace(target=None))


def both(seed):
    batch = conditions(seed)
    return batch._replace(forget=batch.forget._replace(constraint=0 * EACH, likelihood=0 * EACH))


def samples(seed):
    values = jnp.abs(normal(seed, ROWS))
    return Batch(images(seed).kept, Samples(normal(seed, ROWS, 1), LABEL, NULL, values, EACH))


def noisy(seed):
    x_t, epsilon, push = normal(seed, 3, ROWS, 1)
    t, h = jnp.arange(ROWS) % 5, jnp.abs(normal(seed + 1, ROWS, 1)) % 1
    points = NoisyPoints(x_t, t, LABEL, epsilon, h, push[:, None], h, EACH[:, None])
    return Batch(images(seed).kept, points)


def one_each(seed):
    batch = noisy(seed)
    return batch._replace(forget=batch.forget._replace(constraint=EACH))


class Case(NamedTuple):
    """A problem, batches for it by a seed, the values of a batch, and what its diagnostics are."""

    problem: Any
    batch: Any
    values: int = ROWS
    diagnostics: tuple[str, ...] = ()
    parts: int = 0


ESTIMATORS = ("pathwise", "bounded", "stop_gradient")
WITH_LIKELIHOODS = ("pathwise", "stop_gradient")
RU, LU, MIXED = formulations.reverse_kl, formulations.likelihood, formulations.mixed
TILT, PATH = ("ess", "tilt_kl"), ("path_kl",)
FORMULATIONS = {
    "forward_kl": Case(build(formulations.forward_kl, WEIGHTING), images),
    "forward_kl mixing": Case(
        build(formulations.forward_kl, WEIGHTING, mixing=0.5),
        images,
        diagnostics=("ess_forget", "ess_retain"),
    ),
    **{
        f"reverse_kl {name}": Case(build(RU, estimator=name, **CHAIN), conditions)
        for name in ESTIMATORS
    },
    **{
        f"likelihood {name}": Case(
            build(LU, squares, estimator=name, **CHAIN),
            likely,
            diagnostics=PATH if name == "stop_gradient" else (),
        )
        for name in WITH_LIKELIHOODS
    },
    **{
        f"mixed {name}": Case(
            build(MIXED, lambda x: squares(x)[:, :1], (1, 1), estimator=name, **CHAIN),
            both,
            values=2 * ROWS,
            diagnostics=PATH if name == "stop_gradient" else (),
        )
        for name in ("pathwise", "stop_gradient")
    },
    "distill_reverse_kl": Case(
        build(formulations.distill_reverse_kl, WEIGHTING), samples, diagnostics=TILT
    ),
    "distill_likelihood": Case(
        build(formulations.distill_likelihood, WEIGHTING), samples, diagnostics=TILT
    ),
    "distill_likelihood control_variate": Case(
        build(formulations.distill_likelihood, WEIGHTING, control_variate=True),
        samples,
        diagnostics=TILT,
    ),
    "distill_posterior": Case(
        build(formulations.distill_posterior, WEIGHTING), noisy, diagnostics=TILT
    ),
    "without": Case(build(formulations.without), one_each),
    "minibatched": Case(build(RU, estimator="stop_gradient", **CHAIN), conditions, parts=5),
}


def algorithm_of(case, axis_name=None):
    if not case.parts:
        return primal_dual(case.problem, OPTIMIZER, DUAL, alternating=False, axis_name=axis_name)
    visit = build(formulations.sample_trajectories, **CHAIN)
    return minibatched(case.problem, OPTIMIZER, DUAL, visit, parts=case.parts, axis_name=axis_name)


@functools.cache
def whole(name):
    """The algorithm, and its step compiled for one device."""
    algorithm = algorithm_of(FORMULATIONS[name])
    return algorithm, jax.jit(algorithm.step)


def start_of(algorithm, thresholds=THRESHOLDS, multipliers=MULTIPLIERS):
    return algorithm.init(PARAMS, thresholds, multipliers=multipliers)


def close(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def moves(params):
    chex.assert_tree_all_finite(params)
    return np.abs(chains.flat(params) - chains.flat(PARAMS)).max() > 1e-3


# Each of these shares its lines with others of the table.
SLOW = {
    "distill_likelihood",
    "likelihood pathwise",
    "mixed stop_gradient",
    "reverse_kl bounded",
}
each_formulation = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FORMULATIONS],
)


@each_formulation
def test_losses_are_one_value_a_row(name):
    case = FORMULATIONS[name]
    batch = case.batch(1)
    # Kept and forgotten; kept and base, or kept alone, where what is forgotten has no objective.
    rows = ROWS if name == "without" else 2 * ROWS
    got = jax.eval_shape(case.problem.losses, PARAMS, REFERENCE, KEYS[0], batch, MULTIPLIERS)
    assert (got.objective.shape, got.objective.dtype) == ((rows,), jnp.float32)
    assert (got.values.shape, got.values.dtype) == ((case.values,), jnp.float32)
    assert got.index.shape == (case.values,)
    assert jnp.issubdtype(got.index.dtype, jnp.integer)
    assert jnp.shape(got.share) in ((), (2,))
    assert tuple(sorted(got.diagnostics)) == case.diagnostics
    for value in got.diagnostics.values():
        assert (value.shape, value.dtype) == ((), jnp.float32)
    multipliers = case.problem.project(jnp.array([-1.0, 0.5]))
    np.testing.assert_array_equal(multipliers, [0.0, 0.5])
    assert jnp.shape(case.problem.sign) in ((), (2,))


@pytest.mark.slow
@each_formulation
def test_a_compiled_step_is_the_eager_one_and_compiles_once(name):
    """The eager one is descent by hand, on the mean over rows of each row's own Lagrangian."""
    case, (algorithm, step) = FORMULATIONS[name], whole(name)
    start, batch, key = start_of(algorithm), case.batch(0), KEYS[0]
    state, info = step(key, start, REFERENCE, batch)
    assert info.finite
    assert moves(state.params)
    if case.parts:
        close(algorithm.step(key, start, REFERENCE, batch), (state, info))
    else:
        draw = jax.random.split(key)[0]

        def value(params):
            found = case.problem.losses(params, REFERENCE, draw, batch, MULTIPLIERS)
            sign = jnp.broadcast_to(case.problem.sign, (2,))[found.index]
            rows = MULTIPLIERS[found.index] * sign * (THRESHOLDS[found.index] - found.values)
            # Where only kept rows have an objective, a constraint is a mean over its own rows.
            own = name.startswith(("forward", "without"))
            count = jnp.bincount(found.index) if own else None
            count = found.objective.shape[0] if count is None else count[found.index]
            return found.objective.mean() + (rows / count).sum(), found

        gradient, found = jax.grad(value, has_aux=True)(PARAMS)
        shorter = min(1.0, 1.0 / float(optax.tree.norm(gradient)))
        close(
            state.params,
            jax.tree.map(lambda leaf, slope: leaf - 0.1 * shorter * slope, PARAMS, gradient),
        )
        means = [np.mean(found.values[found.index == i]) for i in range(2)]
        close((info.objective, info.values), (found.objective.mean(), jnp.array(means)))
    step(KEYS[1], state, REFERENCE, case.batch(1))
    assert step._cache_size() == 1


@pytest.mark.slow
@each_formulation
def test_vmap_over_seeds_and_thresholds_is_a_loop(name):
    case, (algorithm, step) = FORMULATIONS[name], whole(name)
    thresholds = THRESHOLDS * jnp.array([[0.5], [1.0], [2.0]])
    multipliers = MULTIPLIERS * jnp.array([[0.0], [1.0], [0.5]])
    states = jax.vmap(functools.partial(start_of, algorithm))(thresholds, multipliers)
    batch = case.batch(1)
    together = jax.jit(jax.vmap(algorithm.step, (0, 0, None, None)))(KEYS, states, REFERENCE, batch)
    apart = [
        step(key, start_of(algorithm, b, start), REFERENCE, batch)
        for key, b, start in zip(KEYS, thresholds, multipliers, strict=True)
    ]
    close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart))
    assert np.ptp(np.asarray(together[0].multipliers), axis=0).min() > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < DEVICES, reason=f"needs {DEVICES} devices")
@each_formulation
def test_a_batch_on_several_devices_is_the_whole_one(name):
    case, (algorithm, step) = FORMULATIONS[name], whole(name)
    mesh = sharding.device_mesh()

    def split(batch):
        return jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), batch)

    ways = {
        "one": (step, lambda tree: tree, lambda batch: batch),
        "jit": (
            sharding.jit_step(algorithm.step, mesh),
            functools.partial(sharding.replicate, mesh=mesh),
            functools.partial(sharding.shard_batch, mesh=mesh),
        ),
        "pmap": (sharding.pmap_step(algorithm_of(case, "data")), lambda tree: tree, split),
    }
    ends = {}
    for way, (step, put, spread) in ways.items():
        state, reference = put(start_of(algorithm)), put(REFERENCE)
        for seed in range(2):
            state, info = step(KEYS[seed], state, reference, spread(case.batch(seed)))
        ends[way] = jax.tree.map(np.asarray, (state, info))
    assert ways["jit"][0]._cache_size() == 1
    close(ends["jit"], ends["one"])
    close(ends["pmap"], ends["one"])
    assert moves(ends["one"][0].params)


class Method(NamedTuple):
    """A baseline, batches for it by a seed, and what it takes as the reference."""

    loss: Any
    batch: Any
    reference: Any = REFERENCE
    optimizer: Any = OPTIMIZER


def pairs(seed):
    return images(seed)._replace(base=None)


def anchored(seed):
    return Anchored(normal(seed, ROWS, 1), LABEL, NULL)


FISHER = jax.tree.map(lambda leaf: jnp.float32(RNG.uniform(0.5, 2.0, leaf.shape)), PARAMS)
MASK = baselines.saliency_mask(jax.tree.map(jnp.subtract, PARAMS, REFERENCE))
SISS = functools.partial(build, baselines.siss, WEIGHTING, norm=0.9)
ABLATION = functools.partial(build, baselines.concept_ablation, WEIGHTING)
NEG_GRAD = build(baselines.neg_grad, WEIGHTING, scale=0.3)
BASELINES = {
    "naive_deletion": Method(build(baselines.naive_deletion, WEIGHTING), images),
    "neg_grad": Method(NEG_GRAD, images),
    "siss importance": Method(SISS(estimator="importance"), pairs),
    "siss two_term": Method(SISS(estimator="two_term"), pairs),
    "erase_diff": Method(build(baselines.erase_diff, WEIGHTING, eta=0.5), images),
    "selective_amnesia": Method(
        build(baselines.selective_amnesia, WEIGHTING, strength=2.0),
        images,
        Remembered(REFERENCE, FISHER),
    ),
    "esd": Method(build(baselines.esd, **CHAIN), lambda seed: conditions(seed).forget),
    "concept_ablation model": Method(ABLATION(variant="model"), anchored),
    "concept_ablation noise": Method(ABLATION(variant="noise"), anchored),
    "saliency": Method(NEG_GRAD, images, optimizer=baselines.masked(OPTIMIZER, MASK)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_steps_of_baselines(name):
    """Scalar losses; jit is eager, vmap over seeds is a loop, and a step compiles once."""
    loss, batch_of, reference, optimizer = BASELINES[name]
    batch, key, train = batch_of(0), KEYS[0], baselines.train_step(loss, optimizer)
    value, slope = jax.value_and_grad(loss)(PARAMS, reference, key, batch)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(slope, PARAMS)
    start = optimizer.init(PARAMS)
    updates, _ = optimizer.update(slope, start, PARAMS)
    step = jax.jit(train)
    params, opt_state, told = step(key, PARAMS, start, reference, batch)
    close((params, told), (optax.apply_updates(PARAMS, updates), value))
    assert moves(params)
    step(KEYS[1], params, opt_state, reference, batch_of(1))
    together = jax.jit(jax.vmap(train, (0, None, None, None, None)))(
        KEYS, PARAMS, start, reference, batch
    )
    apart = [step(key, PARAMS, start, reference, batch) for key in KEYS]
    assert step._cache_size() == 1
    for got, *expected in zip(together, *apart, strict=True):
        close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))
    assert np.ptp(np.asarray(together[2])) > 1e-3
