import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest
from scipy import optimize

from jax_unlearn import formulations, lagrangian, multipliers
from jax_unlearn.formulations import likelihood, mixed, reverse_kl
from jax_unlearn.primal_dual import certificate, primal_dual
from jax_unlearn.problem import Batch, Conditions, Samples
from jax_unlearn.typing import Estimate

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
REFERENCE = chains.gaussian([0.0, 1.0, -0.7], 0.5)
PARAMS = jax.tree.map(lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape), REFERENCE)
CENTRES = np.array([0.8, -0.5])
MULTIPLIERS = np.array([0.45, 0.3, 0.6, 0.15])
THRESHOLDS = np.array([2.0, 3.0, 0.3, 0.6])
SIGNS = np.array([1.0, 1.0, -1.0, -1.0])


def squares(x):
    return 0.5 * jnp.square(x - jnp.float32(CENTRES))


def single(tree):
    return jax.tree.map(jnp.float32, tree)


ON_POLICY = functools.partial(
    mixed, chains.apply, chains.SCHEDULE, squares, (2, 2), shape=(1,), steps=5
)


def batch_of(rows=2):
    """A kept condition; rows of label 0, each with two targets and two likelihoods."""
    zeros, each = jnp.zeros(rows, int), jnp.tile(jnp.arange(2), (rows, 1))
    return Batch(
        kept=Conditions(jnp.array([1]), jnp.array([1])),
        forget=Conditions(zeros, zeros, 1 + each, each, each),
    )


def exact_values(params, along=None):
    """Objective and the four values, in numpy."""
    kl = functools.partial(chains.path_kl, params, reference=REFERENCE, along=along)
    _, (mean, variance) = chains.moments(params, 0)
    h = 0.5 * ((mean - CENTRES) ** 2 + variance)
    separated = [kl(label=0, other=1), kl(label=0, other=2)]
    return (kl(label=1, other=1) + 2 * kl(label=0, other=0)) / 3, np.array([*separated, *h])


def averages(problem):
    return chains.averages(problem, PARAMS, REFERENCE, batch_of(), MULTIPLIERS, THRESHOLDS, 20_000)


@pytest.mark.slow
def test_pathwise_values_and_gradient_against_exact_chains():
    def mean_over_rows(params):
        """Of the Lagrangian of each row by itself."""
        kept, forgotten = (chains.path_kl(params, i, REFERENCE, i) for i in (1, 0))
        forgotten += (SIGNS * MULTIPLIERS) @ (THRESHOLDS - exact_values(params)[1])
        return (kept + forgotten + forgotten) / 3

    mean, error = averages(ON_POLICY())
    objective, values = exact_values(PARAMS)
    gradient = chains.differences(mean_over_rows, PARAMS)
    exact = np.concatenate([[mean_over_rows(PARAMS), objective], values, gradient])
    assert (np.abs(mean - exact) < 4.5 * error + 1e-5).all()
    assert (error < 0.06).all()


def test_stop_gradient_against_exact_chains():
    """The gradient at given x_t: of path KLs, and of a regression whose target is linear here."""
    alpha, sigma = chains.ALPHA, chains.SIGMA
    current = MULTIPLIERS[2:]
    gain, bias = REFERENCE["gain"], REFERENCE["bias"][0]
    slope, offset = (1 - sigma * gain) / alpha, -sigma * bias / alpha
    guide = {
        "gain": gain + sigma * current.sum() * slope**2,
        "bias": (bias + sigma * slope * (current @ (offset - CENTRES[:, None])))[None],
    }

    def objective(params):
        held = chains.path_kl(params, 1, REFERENCE, 1, along=PARAMS)
        return (held + 2 * chains.path_kl(params, 0, guide, 0, along=PARAMS)) / 3

    def mean_over_rows(params):
        """Without the part of the h_j: two of three rows are separated."""
        _, values = exact_values(params, along=PARAMS)
        return objective(params) + 2 / 3 * MULTIPLIERS[:2] @ (THRESHOLDS - values)[:2]

    mean, error = averages(ON_POLICY(estimator="stop_gradient"))
    values = exact_values(PARAMS)[1]
    value = mean_over_rows(PARAMS) + 2 / 3 * MULTIPLIERS[2:] @ (values - THRESHOLDS)[2:]
    gradient = chains.differences(mean_over_rows, PARAMS)
    exact = np.concatenate([[value, objective(PARAMS)], values, gradient])
    assert (np.abs(mean - exact) < 4.5 * error + 1e-5).all()


def gradients_by_hand(estimator, current, bound):
    """Of six rows in float64: the package's, by hand, and what was shortened there."""
    with jax.enable_x64(True):
        rng, rows, centre = np.random.default_rng(2), 6, CENTRES[0]
        params = jax.tree.map(lambda leaf: leaf + 0.4 * rng.normal(size=leaf.shape), REFERENCE)
        reference, at = (jax.tree.map(jnp.asarray, tree) for tree in (REFERENCE, params))
        zeros = jnp.zeros(rows, int)
        batch = Batch(None, Conditions(zeros, zeros, zeros + 2, zeros, zeros))
        options = {"shape": (2,), "steps": 5}
        problem = mixed(
            chains.apply,
            chains.SCHEDULE,
            lambda x: 0.5 * jnp.square(x - centre).sum(axis=1, keepdims=True),
            (1, 1),
            estimator=estimator,
            **options,
        )

        def value(params):
            return lagrangian(problem, params, reference, KEY, batch, current, [1.0, 0.3])[0]

        found = jax.jit(jax.grad(value))(at)
        visit = formulations.sample_trajectories(chains.apply, chains.SCHEDULE, **options)
        points = np.asarray(jax.jit(visit)(at, KEY, batch).forget.x_t)
    each = [
        chains.by_hand(
            params, REFERENCE, points[:, row], 0, (0, 2), (1.0, -current[0]), bound,
            at_end=lambda x: current[1] * (x - centre),
        )
        for row in range(rows)
    ]  # fmt: skip
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(one for one, _ in each))
    return found, expected, np.array([share for _, share in each])


@pytest.mark.slow
def test_gradient_of_a_trajectory_by_hand():
    found, expected, _ = gradients_by_hand("pathwise", [0.4, 4.0], np.inf)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected
    )


def test_bounded_is_refused():
    with pytest.raises(ValueError, match="'bounded' is not one of"):
        ON_POLICY(estimator="bounded")


@pytest.mark.slow
def test_it_is_both_kinds_on_the_same_trajectories():
    """With the same key, the values of `reverse_kl` and of `likelihood`, to rounding."""
    batch, arguments = batch_of(), (single(PARAMS), single(REFERENCE), KEY)
    forget = batch.forget._replace(likelihood=None)
    options = {"shape": (1,), "steps": 5}
    ru = reverse_kl(chains.apply, chains.SCHEDULE, **options)
    lu = likelihood(chains.apply, chains.SCHEDULE, squares, **options)
    one = jax.jit(ON_POLICY().losses)(*arguments, batch, jnp.zeros(4))
    first = jax.jit(ru.losses)(*arguments, batch._replace(forget=forget), jnp.zeros(2))
    second = jax.jit(lu.losses)(
        *arguments, batch._replace(forget=forget._replace(target=None)), jnp.zeros(2)
    )
    np.testing.assert_allclose(one.objective, first.objective, rtol=1e-5)
    expected = np.concatenate([first.values, second.values])
    np.testing.assert_allclose(one.values, expected, rtol=1e-5)
    np.testing.assert_array_equal(one.index, [0, 1, 0, 1, 2, 3, 2, 3])
    np.testing.assert_allclose(one.share, np.full(4, 2 / 3), rtol=1e-6)


def exact_optimum(thresholds):
    """The best chain of one label by SLSQP on its exact path KLs and moments, from several starts.

    Returns the price, the values and the multipliers (by least squares of the gradients).
    """

    def values(vector):
        params = chains.unflat(vector)
        _, (mean, variance) = chains.moments(params, 0)
        h = 0.5 * ((mean - CENTRES[0]) ** 2 + variance)
        return np.array([chains.path_kl(params, 0, REFERENCE, 1), h])

    def price(vector):
        return chains.path_kl(chains.unflat(vector), 0, REFERENCE, 0)

    def slack(vector):
        return np.array([1.0, -1.0]) * (values(vector) - thresholds)

    start = np.concatenate([REFERENCE["gain"], REFERENCE["bias"][0]])
    found = [
        optimize.minimize(
            price,
            start + 0.1 * RNG.normal(size=start.shape),
            method="SLSQP",
            constraints={"type": "ineq", "fun": slack},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        for _ in range(4)
    ]
    best = min((f for f in found if (slack(f.x) > -1e-7).all()), key=lambda f: f.fun)
    steps = 1e-5 * np.eye(len(start))

    def gradients(function):
        return np.array([(function(best.x + e) - function(best.x - e)) / 2e-5 for e in steps])

    current = np.linalg.lstsq(gradients(slack), gradients(price), rcond=None)[0]
    return best.fun, values(best.x), current


@pytest.mark.slow
def test_primal_dual_reaches_the_exact_optimum():
    thresholds = (2.8, 0.55)
    price, values, current = exact_optimum(np.array(thresholds))
    assert (current > 0.02).all()  # both constraints bind
    np.testing.assert_allclose(values, thresholds, rtol=1e-4)
    zeros = jnp.zeros(32, int)
    batch = Batch(None, Conditions(zeros, zeros, zeros + 1, zeros, zeros))
    problem = mixed(
        chains.apply,
        chains.SCHEDULE,
        lambda x: squares(x)[:, :1],
        (1, 1),
        shape=(1,),
        steps=5,
    )
    decay = optax.exponential_decay(1.0, 1000, 0.1)
    algorithm = primal_dual(
        problem,
        optax.chain(optax.adam(0.02), optax.scale_by_schedule(decay)),
        optax.chain(multipliers.nu_pi(jnp.array([0.02, 0.2]), 0.1), optax.scale_by_schedule(decay)),
    )

    @jax.jit
    def solve(thresholds):
        return jax.lax.scan(
            lambda state, key: algorithm.step(key, state, single(REFERENCE), batch),
            algorithm.init(single(REFERENCE), thresholds),
            jax.random.split(KEY, 2500),
        )

    _, info = solve(jnp.float32(thresholds))
    final = jax.tree.map(lambda leaf: np.asarray(leaf)[-300:].mean(axis=0), info)
    np.testing.assert_allclose(final.values, thresholds, rtol=0.02)
    np.testing.assert_allclose(final.objective, price, rtol=0.03)
    np.testing.assert_allclose(final.multipliers, current, rtol=0.05)


def test_every_constraint_has_its_own_side_and_domain():
    problem = ON_POLICY()
    got = certificate(
        problem,
        objective=Estimate(jnp.array(0.5), jnp.array(0.01)),
        values=Estimate(jnp.array([1.0, 1.0, 1.0, 1.0]), jnp.zeros(4)),
        thresholds=[2.0, 0.5, 2.0, 0.5],
        multipliers=[0.5, 0.0, 0.0, 4.0],
    )
    np.testing.assert_allclose(got.violations, [1.0, -0.5, -1.0, 0.5])
    np.testing.assert_array_equal(got.satisfied, [False, True, True, False])
    projected = problem.project(jnp.array([2.0, -1.0, -1.0, 40.0]))
    np.testing.assert_allclose(projected, [0.98, 0.0, 0.0, 40.0], rtol=1e-6)
    own = ON_POLICY(project=multipliers.box(0.98)).project(jnp.array([2.0, 0.9, -1.0, 40.0]))
    np.testing.assert_allclose(own, [0.98, 0.9, 0.0, 40.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "options", "word"),
    [
        ((2, 2), {"estimator": "tilt"}, "tilt"),
        ((0, 2), {}, "both kinds"),
        ((2, 0), {}, "both kinds"),
        ((2, 2), {"steps": 1}, "at least 2"),
    ],
)
def test_bad_options_are_refused(counts, options, word):
    arguments = {"shape": (1,), "steps": 5} | options
    with pytest.raises(ValueError, match=word):
        mixed(chains.apply, chains.SCHEDULE, squares, counts, **arguments)


def test_batches_of_another_problem_are_refused():
    batch, options = batch_of(), {"shape": (1,), "steps": 5}

    def losses_of(problem, batch, count):
        arguments = single(PARAMS), single(REFERENCE), KEY, batch, jnp.zeros(count)
        jax.eval_shape(lambda: problem.losses(*arguments))

    lu = likelihood(chains.apply, chains.SCHEDULE, squares, **options)
    with pytest.raises(ValueError, match="has no target"):
        losses_of(lu, batch, 2)
    ru = reverse_kl(chains.apply, chains.SCHEDULE, **options)
    for forget in (batch.forget, batch.forget._replace(target=None, likelihood=None)):
        with pytest.raises(ValueError, match="problem has none"):
            losses_of(ru, batch._replace(forget=forget), 2)
    three = mixed(chains.apply, chains.SCHEDULE, squares, (2, 1), **options)
    with pytest.raises(ValueError, match=r"\[2, 1\], not \[2, 2\]"):
        losses_of(three, batch, 3)
    zeros = jnp.zeros(2, int)
    samples = Samples(jnp.zeros((2, 1)), zeros, zeros, jnp.zeros(2), zeros)
    with pytest.raises(ValueError, match="got Conditions and Samples"):
        losses_of(ON_POLICY(), batch._replace(forget=samples), 4)
