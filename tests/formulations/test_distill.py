"""Tilts of Gaussians, whose denoisers are linear, and reweighted mixtures, both known exactly."""

import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import lagrangian, losses, mixtures, multipliers, schedules
from jax_unlearn.duality import stored_samples
from jax_unlearn.formulations import (
    distill_likelihood,
    distill_posterior,
    distill_reverse_kl,
    sampled,
)
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Images, NoisyPoints, Samples

KEY = jax.random.key(0)
VARIANCE, CENTRE = 0.5, 0.8
REFERENCE = chains.gaussian([0.0, 1.0, -0.7, 0.4], VARIANCE)
WEIGHTING = losses.TimeWeighting(jnp.array([1.0, 2.0, 1.0, 0.5, 2.0]), jnp.full(5, 0.2))
REVERSE_KL = functools.partial(distill_reverse_kl, chains.apply, chains.SCHEDULE, WEIGHTING)
LIKELIHOOD = functools.partial(distill_likelihood, chains.apply, chains.SCHEDULE, WEIGHTING)


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def ratio_batch(count, centre=CENTRE, seed=3):
    """Samples of label 0's N(0, s²) under it, with log-ratios to N(a, s²)."""
    x = np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(seed), (count, 1))
    ratio = ((x - centre) ** 2 - x**2) / (2 * VARIANCE)
    zeros = jnp.zeros(count, int)
    return Batch(None, Samples(x, zeros, zeros, ratio[:, 0], zeros))


def square(x):
    """h = (x − a)²/2: tilts of a Gaussian by exp(−λ h) are Gaussian."""
    return 0.5 * jnp.square(x - CENTRE)


def tilted_by_square(current):
    """Mean and variance of p_λ, of precision 1/s² + λ, and E h under it."""
    variance = 1 / (1 / VARIANCE + current)
    mean = variance * current * CENTRE
    return mean, variance, 0.5 * (variance + (mean - CENTRE) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("control_variate", [False, True])
def test_reverse_kl_distils_the_closed_form(control_variate):
    """p_λ = N(−α a, s²), KL(p_λ‖q_1) = (1+α)² a²/2s² and KL(p_λ‖q) = α² a²/2s²."""
    current = 0.3
    alpha = current / (1 - current)
    solved, values, diagnostics = chains.minimiser(
        REVERSE_KL(control_variate=control_variate),
        single(REFERENCE),
        ratio_batch(100_000),
        [current],
    )
    exact = chains.gaussian([-alpha * CENTRE], VARIANCE)
    np.testing.assert_allclose(solved[0], exact["gain"], atol=0.035)
    np.testing.assert_allclose(solved[1], exact["bias"][0], atol=0.035)
    nats = CENTRE**2 / (2 * VARIANCE)
    assert values.mean() == pytest.approx((1 + alpha) ** 2 * nats, rel=0.03)
    assert diagnostics["tilt_kl"] == pytest.approx(alpha**2 * nats, rel=0.05)
    # E_q w² / (E_q w)² of this tilt is exp(α² a²/s²).
    assert diagnostics["ess"] == pytest.approx(np.exp(-(alpha**2) * 2 * nats), rel=0.05)


@pytest.mark.slow
def test_multipliers_are_those_of_one_condition_and_the_lagrangian_weighs_its_share():
    """A quarter of the rows is forgotten: λ itself acts there, and nothing on kept rows."""
    count, current, threshold = 40_000, 0.4, 2.0
    alpha = current / (1 - current)
    forget = ratio_batch(count).forget._replace(cond=jnp.full(count, 2))
    kept = Images(jax.random.normal(KEY, (3 * count, 1)), jnp.full(3 * count, 1))
    problem, batch = REVERSE_KL(), Batch(kept, forget)
    reference = single(REFERENCE)
    got = jax.jit(problem.losses)(reference, reference, KEY, batch, jnp.float32([current]))
    nats = CENTRE**2 / (2 * VARIANCE)
    assert got.values.mean() == pytest.approx((1 + alpha) ** 2 * nats, rel=0.03)
    assert got.diagnostics["tilt_kl"] == pytest.approx(alpha**2 * nats / 4, rel=0.05)
    np.testing.assert_array_equal(got.objective[: 3 * count], 0)  # the reference itself
    assert got.objective.shape == (4 * count,)
    np.testing.assert_allclose(got.share, [0.25])
    value, found = jax.jit(
        lambda key: lagrangian(problem, reference, reference, key, batch, current, threshold)
    )(KEY)
    weighed = found.objective + 0.25 * current * (threshold - got.values.mean())
    assert value == pytest.approx(float(weighed), rel=1e-5)


def test_control_variate_leaves_the_reference_alone_without_multipliers():
    problem, batch = REVERSE_KL(control_variate=True), ratio_batch(64)

    def objective(params):
        got = problem.losses(params, single(REFERENCE), KEY, batch, jnp.zeros(1))
        return got.objective.sum()

    value, gradient = jax.jit(jax.value_and_grad(objective))(single(REFERENCE))
    assert abs(value) < 1e-5
    assert all(np.abs(leaf).max() < 1e-4 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_likelihood_distils_the_closed_form():
    """p_λ has precision 1/s² + λ and mean λ a / (1/s² + λ)."""
    current = 1.5
    x = np.sqrt(VARIANCE) * jax.random.normal(KEY, (100_000, 1))
    zeros = jnp.zeros(100_000, int)
    batch = Batch(None, Samples(x, zeros, zeros, square(x), zeros[:, None]))
    solved, values, diagnostics = chains.minimiser(
        LIKELIHOOD(), single(REFERENCE), batch, [current]
    )
    mean, variance, expected = tilted_by_square(current)
    exact = chains.gaussian([mean], variance)
    np.testing.assert_allclose(solved[0], exact["gain"], atol=0.025)
    np.testing.assert_allclose(solved[1], exact["bias"][0], atol=0.025)
    assert values.mean() == pytest.approx(expected, rel=0.02)
    kl = 0.5 * (variance / VARIANCE + mean**2 / VARIANCE - 1 - np.log(variance / VARIANCE))
    assert diagnostics["tilt_kl"] == pytest.approx(kl, rel=0.03)


@pytest.mark.slow
def test_stored_multipliers_and_a_distillation_are_the_whole_solution():
    """λ* of E_{p_λ} h = ε from samples, held fixed; the trained chain then meets ε by itself."""
    threshold, count = 0.25, 20_000
    x = np.sqrt(VARIANCE) * jax.random.normal(KEY, (count, 1))
    first = stored_samples.likelihood_multipliers(square(x), [threshold], key=KEY)
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = tilted_by_square(middle)[2] > threshold
        low, high = (middle, high) if above else (low, middle)
    assert first.interval[0, 0] < low < first.interval[1, 0]
    assert first.multipliers[0] == pytest.approx(low, rel=0.03)
    assert first.attained == 1

    zeros = jnp.zeros(count, int)
    samples = Samples(x, zeros, zeros, square(x)[:, 0], zeros)
    algorithm = primal_dual(
        LIKELIHOOD(),
        optax.adam(optax.exponential_decay(0.02, 300, 0.2)),
        optax.set_to_zero(),
    )
    state = algorithm.init(single(REFERENCE), threshold, multipliers=first.multipliers)

    @jax.jit
    def train(state):
        def body(state, key):
            rows = jax.random.randint(key, (512,), 0, count)
            chosen = jax.tree.map(lambda leaf: leaf[rows], samples)
            return algorithm.step(key, state, single(REFERENCE), Batch(None, chosen))

        return jax.lax.scan(body, state, jax.random.split(KEY, 800))

    state, info = train(state)
    assert info.values[-400:].mean() == pytest.approx(threshold, rel=0.02)
    np.testing.assert_array_equal(state.multipliers, first.multipliers)
    mean, variance, _ = tilted_by_square(low)
    target = chains.gaussian([mean], variance)
    np.testing.assert_allclose(state.params["gain"], target["gain"], atol=0.05)
    np.testing.assert_allclose(state.params["bias"][0], target["bias"][0], atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("margin", [1e-3, 0.02])
def test_the_step_stays_finite_at_the_edge_of_the_domain(margin):
    """With thresholds out of reach λ sits at the cap; no update is lost and λ comes back."""
    batch = ratio_batch(512)
    options = {} if margin == 0.02 else {"project": multipliers.capped_simplex(margin)}
    algorithm = primal_dual(REVERSE_KL(**options), optax.adam(1e-2), optax.sgd(1.0))

    @jax.jit
    def go(state):
        return jax.lax.scan(
            lambda state, key: algorithm.step(key, state, single(REFERENCE), batch),
            state,
            jax.random.split(KEY, 100),
        )

    state, info = go(algorithm.init(single(REFERENCE), 1e4, multipliers=2.0))
    assert info.finite.all()
    np.testing.assert_allclose(info.multipliers, 1 - margin, rtol=1e-5)
    state, info = go(state._replace(thresholds=jnp.array([-10.0])))
    assert info.finite.all()
    assert state.multipliers[0] == 0


def test_problems_are_the_paper_s():
    assert (REVERSE_KL().sign, REVERSE_KL().name) == (1, "reverse_kl")
    np.testing.assert_allclose(REVERSE_KL().project(jnp.array([2.0, -1.0])), [0.98, 0], rtol=1e-6)
    own = REVERSE_KL(project=multipliers.box(0.98)).project(jnp.array([0.9, 0.9]))
    np.testing.assert_allclose(own, [0.9, 0.9], rtol=1e-6)
    for problem in (LIKELIHOOD(), distill_posterior(chains.apply, chains.SCHEDULE, WEIGHTING)):
        assert (problem.sign, problem.name) == (-1, "likelihood")
        np.testing.assert_array_equal(problem.project(jnp.array([-1.0, 40.0])), [0.0, 40.0])


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_sharded_batches_give_the_result_of_one_device():
    kept = Images(jax.random.normal(KEY, (32, 1)), jnp.full(32, 1))

    def algorithm_of(axis_name):
        return primal_dual(REVERSE_KL(), optax.sgd(0.05), optax.sgd(0.01), axis_name=axis_name)

    batch = Batch(kept, ratio_batch(16).forget)
    chains.check_devices(algorithm_of, single(REFERENCE), batch, [3.0])


IMAGES = Images(jnp.zeros((2, 1)), jnp.zeros(2, int), jnp.zeros(2, int))
ROWS = Conditions(*[jnp.zeros(2, int)] * 4)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"forget": IMAGES}, "Samples to forget .* got Images"),
        ({"kept": ROWS}, "Images that are kept.* and Conditions"),
        ({"base": IMAGES}, "no base"),
    ],
)
@pytest.mark.parametrize("make", [REVERSE_KL, LIKELIHOOD])
def test_rows_of_another_type_are_refused(make, parts, word):
    arguments = single(REFERENCE), single(REFERENCE), KEY, ratio_batch(2)._replace(**parts)
    evaluate = make().losses
    with pytest.raises(ValueError, match=word):
        evaluate(*arguments, jnp.zeros(1))


def test_values_that_do_not_fit_their_constraints_are_refused():
    batch = ratio_batch(2)
    bad = batch._replace(forget=batch.forget._replace(values=jnp.zeros((2, 2))))
    evaluate = REVERSE_KL().losses
    with pytest.raises(ValueError, match="one shape"):
        evaluate(single(REFERENCE), single(REFERENCE), KEY, bad, jnp.zeros(1))


# Of h that are 0 or 1 p_λ is a reweighted mixture, whose exact denoiser is known.
SCHEDULE = schedules.noise_schedule(trained_betas=np.linspace(0.02, 0.6, 9))
LAW = mixtures.gaussian_mixture(
    [[-1.0, 0.3], [0.2, -0.4], [1.1, 0.6], [0.0, 1.5]],
    [0.1, 0.2, 0.15, 0.3],
    [0.4, 0.2, 0.25, 0.15],
)
FORGOTTEN = np.array([[1, 0, 1, 0], [0, 0, 0, 1]])
LAMBDAS = np.array([1.7, 0.6])
COUNT, KEPT = 300, 100


def mixture_denoiser(log_weights, x_t, t, cond):
    """The exact denoiser of the mixture with the condition's own weights."""

    def one(x, time, weights):
        law = LAW._replace(log_weights=jax.nn.log_softmax(weights))
        return mixtures.predictions(law, x[None], SCHEDULE.log_snr[time]).epsilon[0]

    return jax.vmap(one)(x_t, t, log_weights[cond])


POSTERIOR = distill_posterior(
    mixture_denoiser,
    SCHEDULE,
    losses.TimeWeighting(jnp.linspace(1, 3, 9), jnp.full(9, 1 / 9)),
)


@functools.cache
def points():
    """Points of q, with the closed forms of u and of its gradient by autodiff."""
    return jax.jit(_points)()


def _points():
    x_0 = mixtures.sample(LAW, jax.random.key(1), COUNT)
    t = jnp.arange(COUNT) % 9
    noise = jax.random.normal(jax.random.key(2), x_0.shape)
    x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=SCHEDULE.log_snr[t])

    def posterior(x, time):
        return mixtures.responsibilities(LAW, x[None], SCHEDULE.log_snr[time])[0] @ FORGOTTEN.T

    _, sigma = schedules.alpha_sigma(SCHEDULE.log_snr[t], x_t)
    push = sigma[..., None] * jax.vmap(jax.jacobian(posterior))(x_t, t)
    zeros = jnp.zeros(COUNT, int)
    return NoisyPoints(
        x_t, t, zeros, mixture_denoiser(LAW.log_weights[None], x_t, t, zeros),
        jax.vmap(posterior)(x_t, t), push, mixtures.responsibilities(LAW, x_0) @ FORGOTTEN.T,
        np.broadcast_to(np.arange(2), (COUNT, 2)),
    )  # fmt: skip


@jax.jit
def posterior_losses(params, lambdas, kept, forget):
    reference = jnp.stack([LAW.log_weights, LAW.log_weights])
    return POSTERIOR.losses(params, reference, KEY, Batch(kept, forget), lambdas)


def losses_at(params, lambdas, kept=None, forget=None):
    forget = points() if forget is None else forget
    return posterior_losses(params, jnp.float32(lambdas), kept, forget)


@pytest.mark.parametrize("lambdas", [LAMBDAS, [0.0, 0.0], [12.0, 0.3]])
def test_the_posterior_target_is_the_denoiser_of_p_lambda(lambdas):
    tilted = LAW.log_weights - np.asarray(lambdas) @ FORGOTTEN
    found = losses_at(jnp.stack([tilted, LAW.log_weights]), lambdas)
    assert found.objective.shape == (COUNT,)
    np.testing.assert_allclose(found.objective, 0, atol=1e-6)
    other = losses_at(jnp.stack([tilted + jnp.array([0, 0.5, 0, 0]), LAW.log_weights]), lambdas)
    assert other.objective.mean() > 1e-3


def test_kept_rows_share_the_batch_and_are_held_to_the_reference():
    """300 of 400 rows are forgotten: λ itself acts there."""
    kept = Images(jax.random.normal(KEY, (KEPT, 2)), jnp.ones(KEPT, int))
    tilted = LAW.log_weights - LAMBDAS @ FORGOTTEN
    exact = losses_at(jnp.stack([tilted, LAW.log_weights]), LAMBDAS, kept)
    np.testing.assert_allclose(exact.objective, 0, atol=1e-6)
    np.testing.assert_allclose(exact.share, [0.75, 0.75])
    changed = LAW.log_weights + jnp.array([1.0, 0, 0, 0])
    moved = losses_at(jnp.stack([tilted, changed]), LAMBDAS, kept)
    assert moved.objective[:KEPT].mean() > 1e-3  # not held to itself
    np.testing.assert_allclose(moved.objective[KEPT:], 0, atol=1e-6)


def test_rows_are_weighted_by_time_and_values_by_p_lambda():
    found = losses_at(jnp.stack([LAW.log_weights] * 2), LAMBDAS)
    batch = points()
    target = mixture_denoiser((LAW.log_weights - LAMBDAS @ FORGOTTEN)[None], *batch[:3])
    squares = np.square(np.asarray(target) - np.asarray(batch.epsilon)).sum(axis=1)
    expected = 9 * np.linspace(1, 3, 9)[np.asarray(batch.t)] * squares
    np.testing.assert_allclose(found.objective, expected, rtol=1e-3, atol=1e-6)
    weights = np.exp(-np.asarray(batch.values, np.float64) @ LAMBDAS)
    weights /= weights.sum()
    np.testing.assert_allclose(
        found.values.reshape(COUNT, 2).mean(axis=0), weights @ np.asarray(batch.values),
        rtol=1e-4,
    )  # fmt: skip
    expected_kl = weights @ np.log(COUNT * weights)
    assert found.diagnostics["tilt_kl"] == pytest.approx(expected_kl, rel=1e-4)
    assert (found.index.reshape(COUNT, 2) == np.arange(2)).all()


def test_points_that_do_not_fit_are_refused():
    batch = points()
    with pytest.raises(ValueError, match="one shape"):
        losses_at(LAW.log_weights[None], LAMBDAS, forget=batch._replace(values=batch.values[:, 0]))
    with pytest.raises(ValueError, match="NoisyPoints to forget .* got Images"):
        losses_at(LAW.log_weights[None], LAMBDAS, forget=IMAGES)


# Under DDIM a linear denoiser takes noise z to slope z + offset.
CENTRES = np.array([0.8, -0.5, 0.1])
PARAMS = jax.tree.map(
    lambda leaf: leaf + 0.15 * np.random.default_rng(2).normal(size=leaf.shape), REFERENCE
)


def to_centres(reference, x):
    """h_i = (x − a_i)²/2, times what the reference says."""
    return 0.5 * jnp.square(x - jnp.float32(CENTRES)) * reference["gain"].shape[0]


def line(label):
    return chains.ddim_lines(PARAMS["gain"], PARAMS["bias"][label])[1]


def fresh_values(batch, at_once=64):
    evaluate = sampled(
        chains.apply, chains.SCHEDULE, to_centres, shape=(1,), steps=5, at_once=at_once
    )
    arguments = single(PARAMS), single(REFERENCE)
    return jax.jit(evaluate)(*arguments, KEY, batch, jnp.zeros(3))


def test_sampled_values_are_expectations_over_the_model_s_own_samples():
    """E h_i = ((offset − a_i)² + slope²)/2 at each label, and the mean over the labels' rows."""
    count = 20_000
    label = jnp.arange(count) % 3 + 1
    each = jnp.tile(jnp.array([2, 0]), (count, 1))
    got = fresh_values(Batch(None, Conditions(label, label, None, each)), at_once=3000)
    np.testing.assert_array_equal(got.index, each.reshape(-1))
    np.testing.assert_array_equal(got.objective, np.zeros(count))
    for i in (0, 2):
        values = np.asarray(got.values, np.float64)[np.asarray(got.index) == i]
        exact = [
            5 * 0.5 * ((offset - CENTRES[i]) ** 2 + slope**2)
            for slope, offset in map(line, (1, 2, 3))
        ]
        error = values.std() / np.sqrt(count)
        assert abs(values.mean() - np.mean(exact)) < 4.5 * error
        assert error < 0.02 * np.mean(exact)


@pytest.mark.parametrize(("at_once", "width"), [(1, None), (3, 2), (4, 1), (10, 2), (64, None)])
def test_a_row_has_its_own_noise_condition_and_constraints_however_many_are_sampled_at_once(
    at_once, width
):
    """Ten rows: whole parts, padded ones, and one that has room for all."""
    label = np.array([0, 1, 2, 3, 1, 0, 2, 2, 3, 0])
    shape = (10,) if width is None else (10, width)
    index = np.random.default_rng(1).integers(0, 3, shape)
    got = fresh_values(Batch(None, Conditions(label, label, None, index)), at_once)
    keys = losses.example_keys(KEY, 10)
    noise = np.array([jax.random.normal(key, (1,))[0] for key in keys], np.float64)
    slope, offset = np.array([line(i) for i in label]).T
    h = 5 * 0.5 * (slope * noise + offset - CENTRES[:, None]).T ** 2
    expected = np.take_along_axis(h, index.reshape(10, -1), axis=1)
    np.testing.assert_allclose(got.values, expected.reshape(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.index, index.reshape(-1))


def test_sampled_values_have_no_derivative_and_need_no_condition():
    evaluate = sampled(
        lambda params, x_t, t, cond: chains.apply(params, x_t, t, None),
        chains.SCHEDULE,
        to_centres,
        shape=(1,),
        steps=5,
    )
    batch = Batch(None, Conditions(None, None, None, jnp.zeros(6, int)))

    def total(params):
        return evaluate(params, single(REFERENCE), KEY, batch, jnp.zeros(3)).values.sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(single(PARAMS))
    label = jnp.zeros(6, int)
    same = fresh_values(Batch(None, Conditions(label, label, None, label)))
    assert value == pytest.approx(float(same.values.sum()), rel=1e-5)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_fresh_samples_move_the_multipliers_and_stored_ones_the_parameters():
    evaluate = sampled(
        chains.apply, chains.SCHEDULE, lambda reference, x: square(x), shape=(1,), steps=5
    )
    x = np.sqrt(VARIANCE) * jax.random.normal(KEY, (64, 1))
    zeros = jnp.zeros(64, int)
    batch = Batch(None, Samples(x, zeros, zeros, square(x)[:, 0], zeros))
    label = jnp.full(4096, 1)
    dual_batch = Batch(None, Conditions(label, label, None, 0 * label))
    problem = LIKELIHOOD()._replace(fresh=evaluate)
    algorithm = primal_dual(problem, optax.sgd(0.1), optax.sgd(0.5))
    state = algorithm.init(single(PARAMS), 0.1, multipliers=0.7)
    new, info = jax.jit(algorithm.step)(KEY, state, single(REFERENCE), batch, dual_batch)
    slope, offset = line(1)
    exact = 0.5 * ((offset - CENTRE) ** 2 + slope**2)
    spread = np.sqrt(0.5 * slope**4 + slope**2 * (offset - CENTRE) ** 2)  # of h, in closed form
    error = 0.5 * 4.5 * spread / 64
    assert abs(float(new.multipliers[0]) - (0.7 + 0.5 * (exact - 0.1))) < error
    # What is reported, and what the primal step sees, is of the stored samples.
    h = np.asarray(square(x)[:, 0], np.float64)
    stored = np.exp(-0.7 * h) @ h / np.exp(-0.7 * h).sum()
    np.testing.assert_allclose(info.values[0], stored, rtol=1e-4)
    assert abs(0.5 * (stored - exact)) > 3 * error
    assert np.abs(new.params["gain"] - state.params["gain"]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_sampled_values_are_the_same_on_several_devices():
    label = jnp.arange(24) % 4
    batch = Batch(None, Conditions(label, label, None, label % 3))
    evaluate = sampled(chains.apply, chains.SCHEDULE, to_centres, shape=(1,), steps=5, at_once=2)

    def on_device(batch):
        arguments = single(PARAMS), single(REFERENCE), KEY, batch, jnp.zeros(3)
        return evaluate(*arguments, axis_name="data").values

    spread = jax.tree.map(lambda leaf: leaf.reshape(8, 3), batch)
    found = jax.pmap(on_device, axis_name="data")(spread)
    np.testing.assert_allclose(found.reshape(-1), fresh_values(batch).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "word"),
    [
        (Batch(None, IMAGES), "Conditions to forget .* got Images"),
        (ratio_batch(2), "Conditions to forget .* got Samples"),
        (Batch(None, ROWS, IMAGES), "no base"),
        (Batch(IMAGES, ROWS), "Conditions that are kept.* and Images"),
        (Batch(None, ROWS._replace(constraint=None)), "number of their constraint"),
    ],
)
def test_sampled_refuses_other_rows(batch, word):
    with pytest.raises(ValueError, match=word):
        fresh_values(batch)
