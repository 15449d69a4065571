"""The rest's prediction, the problem that holds the model to it, and pools that attack it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import losses, mixtures, primal_dual, schedules, sharding
from jax_unlearn.formulations import (
    Pooled,
    against_pool,
    denoising_attack,
    robust,
    without,
    worst_conditions,
)
from jax_unlearn.likelihoods import path_times, path_weighting, rest_path
from jax_unlearn.problem import Batch, Conditions, Images, NoisyPoints, lagrangian

KEY = jax.random.key(3)
LONG = schedules.noise_schedule()
# The last component is forgotten: it lies away from the rest, and has not their width.
LAW = mixtures.gaussian_mixture(
    [[-1.0, 0.3], [0.2, -0.4], [1.1, 0.6], [0.2, 0.9]],
    [0.1, 0.2, 0.15, 0.05],
    [0.4, 0.2, 0.1, 0.3],
)
REST = mixtures.select(LAW, [0, 1, 2])
FORGOTTEN = mixtures.sample(mixtures.select(LAW, 3), jax.random.key(1), 64)


def exact(schedule):
    """The denoiser of the component that each row's condition names."""

    def apply(params, x_t, t, cond):
        del params
        each = [mixtures.denoiser(mixtures.select(LAW, c), schedule)(x_t, t) for c in range(4)]
        return jnp.take_along_axis(jnp.stack(each), cond["of"][None, :, None], axis=0)[0]

    return apply


def follow(times, schedule=LONG, rest=(0, 1, 2), **options):
    options = {"log_prior": REST.log_weights, **options}
    concepts = {"of": jnp.array(rest)}
    return jax.jit(
        lambda x, t: rest_path(
            exact(schedule), None, schedule, KEY, x_0=x, times=t, concepts=concepts, **options
        )
    )(FORGOTTEN, times)


def times_of(steps):
    return path_times(path_weighting(LONG), steps, np.random.default_rng(0))


def of_rest(path, times, law=REST):
    """(ε of the rest's own denoiser, its posteriors) at every point of a path."""
    points = [(x, LONG.log_snr[t]) for x, t in zip(path.x_t, times, strict=True)]
    epsilon = np.stack([mixtures.predictions(law, *point).epsilon for point in points])
    return epsilon, np.stack([mixtures.responsibilities(law, *point) for point in points])


@pytest.mark.slow
def test_the_rest_predicts_what_one_would_that_knew_it_alone():
    errors, apart = [], []
    for steps in (8, 64):
        times = times_of(steps)
        path = follow(times)
        expected, posterior = of_rest(path, times)
        assert path.epsilon.shape == path.x_t.shape == (steps, 64, 2)
        assert path.posterior.shape == (steps, 64, 3)
        errors.append(np.sqrt(np.mean((path.epsilon - expected) ** 2)))
        apart.append(np.abs(path.posterior - posterior).mean())
    assert errors[1] < 0.4 * errors[0]
    assert apart[1] < 0.4 * apart[0]
    # One who knows the forgotten component too, or takes the prior for the posterior, is far off.
    others, _ = of_rest(path, times, LAW)
    assert np.sqrt(np.mean((others - expected) ** 2)) > 10 * errors[1]
    prior = np.exp(REST.log_weights)
    each = np.stack([of_rest(path, times, mixtures.select(LAW, c))[0] for c in range(3)], axis=-1)
    assert np.sqrt(np.mean((each @ prior - expected) ** 2)) > 10 * errors[1]


def test_of_one_concept_the_rest_is_that_one():
    times = times_of(5)
    path = follow(times, rest=(1,), log_prior=None)
    expected, _ = of_rest(path, times, mixtures.select(LAW, 1))
    np.testing.assert_allclose(path.epsilon, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(path.posterior, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_the_rest_is_that_of_noise_whatever_the_network_predicts(kind):
    times = times_of(6)
    other = schedules.noise_schedule(prediction_type=kind)
    np.testing.assert_allclose(
        follow(times, other).epsilon, follow(times).epsilon, rtol=1e-3, atol=1e-4
    )


def test_what_the_rest_predicts_is_not_clipped():
    """A clip moves the means that posteriors compare, and not the predictions that they weigh."""
    times = times_of(6)
    path = follow(times, schedules.noise_schedule(clip_range=0.5))
    each = np.stack([of_rest(path, times, mixtures.select(LAW, c))[0] for c in range(3)], axis=-1)
    expected = np.einsum("sbdc,sbc->sbd", each, path.posterior)
    np.testing.assert_allclose(path.epsilon, expected, rtol=1e-4, atol=1e-5)


def test_rest_path_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="share one leading axis"):
        rest_path(
            exact(LONG), None, LONG, KEY, x_0=FORGOTTEN, times=times_of(2), concepts=jnp.array(1)
        )
    with pytest.raises(ValueError, match="3 concepts take"):
        follow(times_of(2), log_prior=jnp.zeros(4))


SHORT = schedules.noise_schedule(num_steps=20, beta_end=0.3, clip_range=0.1)
KINDS = ("epsilon", "sample", "v_prediction")


def linear(theta, x_t, t, cond):
    """W x_t + V c + b_t, which is no network's time embedding but is known."""
    return x_t @ theta["w"] + cond @ theta["v"] + theta["b"][t]


def theta_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 3), "v": (2, 3), "b": (20, 3)}
    return {name: jnp.float32(0.4 * rng.normal(size=shape)) for name, shape in shapes.items()}


PARAMS, REFERENCE = theta_of(0), theta_of(1)


def batch_of(kept=8, rows=6, seed=2):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    points = NoisyPoints(
        normal(rows, 3), jnp.asarray(rng.integers(20, size=rows)), normal(rows, 2), normal(rows, 3),
        posterior=None, push=None, values=None, constraint=jnp.arange(rows) % 2,
    )  # fmt: skip
    return Batch(Images(normal(kept, 3), normal(kept, 2)), points)


def conversion(kind, x_t, t):
    """(how ε depends on a prediction f, ε − scale · f)."""
    alpha_bar = 1 / (1 + np.exp(-np.asarray(SHORT.log_snr, np.float64)[t]))
    alpha, sigma = np.sqrt(alpha_bar)[:, None], np.sqrt(1 - alpha_bar)[:, None]
    return {
        "epsilon": (np.ones_like(alpha), 0 * x_t),
        "sample": (-alpha / sigma, x_t / sigma),
        "v_prediction": (alpha, sigma * x_t),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradient_are_those_by_hand(kind):
    schedule = schedules.noise_schedule(
        num_steps=20, beta_end=0.3, clip_range=0.1, prediction_type=kind
    )
    batch, weights, thresholds = batch_of(), np.array([0.7, 1.3]), np.array([0.5, 0.2])
    problem = without(linear, schedule)
    call = jax.jit(
        jax.value_and_grad(
            lambda params: lagrangian(problem, params, REFERENCE, KEY, batch, weights, thresholds),
            has_aux=True,
        )
    )
    (value, found), gradient = call(PARAMS)

    def predict(theta, x_t, t, cond):
        return x_t @ theta["w"] + cond @ theta["v"] + np.asarray(theta["b"])[t]

    kept, points = jax.tree.map(lambda leaf: np.asarray(leaf), batch[:2])
    drawn = losses.draw(KEY, kept.x_0, jnp.full(20, 0.05))
    t = np.asarray(drawn.t)
    alpha_bar = 1 / (1 + np.exp(-np.asarray(SHORT.log_snr, np.float64)[t]))[:, None]
    x_t = np.sqrt(alpha_bar) * kept.x_0 + np.sqrt(1 - alpha_bar) * np.asarray(drawn.noise)
    scale, rest = conversion(kind, x_t, t)
    off = scale * (predict(PARAMS, x_t, t, kept.cond) - predict(REFERENCE, x_t, t, kept.cond))
    objective = np.mean(off**2, axis=1)
    np.testing.assert_allclose(found.objective, objective.mean(), rtol=1e-4)
    scale_there, rest = conversion(kind, points.x_t, points.t)
    there = scale_there * predict(PARAMS, points.x_t, points.t, points.cond) + rest - points.epsilon
    values = np.array([np.mean(there[i::2] ** 2) for i in range(2)])
    np.testing.assert_allclose(found.values, values, rtol=1e-4)
    np.testing.assert_allclose(found.violations, values - thresholds, rtol=1e-4, atol=1e-4)
    expected = objective.mean() + weights @ (values - thresholds)
    np.testing.assert_allclose(value, expected, rtol=1e-4)

    pull_kept = 2 * scale * off / off.size
    pull_there = 2 * scale_there * there / 9 * np.tile(weights, 3)[:, None]
    bias = np.zeros((20, 3))
    np.add.at(bias, t, pull_kept)
    np.add.at(bias, points.t, pull_there)
    by_hand = {
        "w": x_t.T @ pull_kept + points.x_t.T @ pull_there,
        "v": kept.cond.T @ pull_kept + points.cond.T @ pull_there,
        "b": bias,
    }
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4),
        gradient,
        by_hand,
    )


@pytest.mark.slow
def test_values_that_are_small_are_feasible():
    batch = batch_of()
    points = batch.forget
    points = points._replace(epsilon=linear(PARAMS, points.x_t, points.t, points.cond))
    problem = without(linear, SHORT)
    for shift, sign in ((0.0, -1), (1.0, 1)):
        moved = batch._replace(forget=points._replace(epsilon=points.epsilon + shift))
        _, found = lagrangian(problem, PARAMS, PARAMS, KEY, moved, [1.0, 1.0], [0.25, 0.25])
        assert (np.sign(found.violations) == sign).all()
        np.testing.assert_allclose(found.values, shift, atol=1e-6)
        np.testing.assert_allclose(found.objective, 0.0, atol=1e-12)
    np.testing.assert_array_equal(problem.project(jnp.array([-1.0, 2.0])), [0.0, 2.0])


def test_the_reference_may_be_another_network():
    problem = without(linear, SHORT, reference_apply=lambda *_: 0.0 * batch_of().kept.x_0)
    ours = without(linear, SHORT)
    silent = jax.tree.map(jnp.zeros_like, PARAMS)
    arguments = KEY, batch_of(), [1.0, 1.0], [0.1, 0.1]
    np.testing.assert_allclose(
        lagrangian(problem, PARAMS, None, *arguments)[0],
        lagrangian(ours, PARAMS, silent, *arguments)[0],
        rtol=1e-6,
    )


def gain(theta, x_t, t, cond):
    del t, cond
    return theta * jnp.ones_like(x_t)


@pytest.mark.parametrize("threshold", [0.04, 0.36])
def test_primal_dual_ends_where_the_multiplier_is_known(threshold):
    """min (θ − 1)² subject to θ² ≤ τ: θ = √τ, and 2 (θ − 1) + 2 λ θ = 0."""
    points = batch_of().forget._replace(
        epsilon=jnp.zeros((6, 3)), constraint=jnp.zeros(6, int), cond=None
    )
    batch = Batch(Images(jnp.zeros((8, 3)), None), points)
    algorithm = primal_dual(without(gain, SHORT), optax.sgd(0.05), optax.sgd(0.5))
    step = jax.jit(algorithm.step)
    state = algorithm.init(jnp.array(1.0), threshold)
    for key in jax.random.split(KEY, 2000):
        state, info = step(key, state, jnp.array(1.0), batch)
    root = np.sqrt(threshold)
    np.testing.assert_allclose(state.params, root, rtol=1e-3)
    np.testing.assert_allclose(state.multipliers, [(1 - root) / root], rtol=1e-2)
    np.testing.assert_allclose(info.objective, (1 - root) ** 2, rtol=1e-2)


def test_points_are_attacked_by_the_adversary_of_robust_problems():
    """ε = θ c, and images whose noise is 0 on average: the worst condition is the nearest to 0."""

    def apply(theta, x_t, t, cond):
        return theta * cond + 0 * x_t

    plainly = schedules.noise_schedule(num_steps=20, beta_end=0.3)  # a clip has no slope
    adversary = worst_conditions(
        apply, plainly, radius=0.5, steps=8, shape=(3,), aim="images", images=jnp.zeros((2, 4, 3))
    )
    points = batch_of().forget._replace(cond=jnp.full((6, 3), 2.0), epsilon=jnp.zeros((6, 3)))
    batch = Batch(Images(jnp.zeros((8, 3)), jnp.zeros((8, 3))), points)
    arguments = jnp.array(1.0), jnp.array(1.0), KEY, batch, [1.0, 1.0], [0.1, 0.1]
    problem = without(apply, plainly)
    _, plain = lagrangian(problem, *arguments)
    _, moved = lagrangian(robust(problem, adversary), *arguments)
    np.testing.assert_allclose(plain.values, 4.0, rtol=1e-6)
    assert (moved.values < 3.6).all()  # (2 − ½/√3)² = 2.93 at best
    assert (moved.values > 2.9).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kept": None}, "Images that are kept and NoisyPoints"),
        ({"forget": batch_of().kept}, "got Images and Images"),
        ({"base": batch_of().kept}, "no base"),
        ({"forget": batch_of().forget._replace(constraint=None)}, "have a constraint each, not"),
        (
            {"forget": batch_of().forget._replace(constraint=jnp.zeros((6, 1), int))},
            "constraint each",
        ),
        ({"forget": batch_of().forget._replace(cond=jnp.zeros((6, 4)))}, "of one kind"),
        ({"forget": batch_of().forget._replace(cond=jnp.zeros((6, 2), int))}, "of one kind"),
        ({"forget": batch_of().forget._replace(cond=None)}, "of one kind"),
    ],
)
def test_without_refuses_other_rows(change, word):
    batch = batch_of()._replace(**change)
    with pytest.raises(ValueError, match=word):
        without(linear, SHORT).losses(PARAMS, REFERENCE, KEY, batch, jnp.zeros(2))


IMAGES = jnp.float32(np.random.default_rng(5).normal(size=(4, 3)))
POOL = jnp.float32(np.random.default_rng(6).normal(size=(6, 2)))
ATTACK = denoising_attack(linear, SHORT, IMAGES[None])


@pytest.mark.slow
def test_a_pool_has_the_gradient_of_its_attack_and_the_model_that_of_the_problem():
    seen = []

    def attack_loss(params, reference, key, pool, *, axis_name=None):
        seen.append(key)
        # Of all that an attack may read, the pool alone is to have a slope.
        value = ATTACK(params, reference, key, pool, axis_name=axis_name)
        return value * (1 + jnp.square(params["w"]).sum() + jnp.square(reference["w"]).sum())

    batch, plain = batch_of(), without(linear, SHORT)
    plain = plain._replace(fresh=plain.losses)
    problem = against_pool(plain, attack_loss)
    under = batch._replace(forget=batch.forget._replace(cond=POOL))
    weights, thresholds = [0.7, 1.3], [0.5, 0.2]

    def value(both):
        # What the batch says of conditions is not read.
        lost = batch._replace(forget=batch.forget._replace(cond=None))
        return lagrangian(problem, both, REFERENCE, KEY, lost, weights, thresholds)

    def by_itself(params):
        return lagrangian(plain, params, REFERENCE, KEY, under, weights, thresholds)

    def differentiated(function, at):
        return jax.jit(jax.value_and_grad(function, has_aux=True))(at)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    (got, found), slope = differentiated(value, Pooled(PARAMS, POOL))
    (want, expected), gradient = differentiated(by_itself, PARAMS)
    jax.tree.map(close, (got, found, slope.params), (want, expected, gradient))
    measured = problem.fresh(Pooled(PARAMS, POOL), REFERENCE, KEY, batch, jnp.zeros(2))
    alone = plain.losses(PARAMS, REFERENCE, KEY, under, jnp.zeros(2))
    np.testing.assert_array_equal(measured.values, alone.values)
    key = seen[-1]  # of the call that was not compiled; noise of its own
    assert (jax.random.key_data(key) != jax.random.key_data(KEY)).any()
    attacked = jax.jit(jax.grad(lambda pool: attack_loss(PARAMS, REFERENCE, key, pool).sum()))(POOL)
    np.testing.assert_allclose(slope.pool, attacked, rtol=1e-4)
    assert (np.abs(slope.pool) > 1e-4).all()
    assert against_pool(without(linear, SHORT), ATTACK).fresh is None


@pytest.mark.slow
def test_two_devices_have_the_result_of_one():
    problem = against_pool(without(linear, SHORT), ATTACK)
    batch = batch_of()
    optimizer = optax.partition(
        {"model": optax.sgd(0.3), "adversary": optax.sgd(0.7)}, Pooled("model", "adversary")
    )
    thresholds = jnp.array([0.5, 0.2])
    ends = []
    for axis_name in (None, "data"):
        algorithm = primal_dual(problem, optimizer, optax.sgd(0.2), axis_name=axis_name)
        placed, step = batch, jax.jit(algorithm.step)
        if axis_name is not None:
            placed = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
            step = sharding.pmap_step(algorithm, jax.devices()[:2])
        state = algorithm.init(Pooled(PARAMS, POOL), thresholds, multipliers=0.5)
        for key in jax.random.split(KEY, 5):
            state, info = step(key, state, REFERENCE, placed)
        ends.append(jax.tree.map(np.asarray, (state.params, state.multipliers, info)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *ends)
    assert (np.abs(ends[0][0].pool - POOL) > 1e-3).all()


@pytest.mark.slow
def test_an_adversary_and_a_model_that_train_together_meet():
    """ε = θ + c: noise of mean 0 draws c to −θ, where points that ask for ε = 1 have 2 λ of slope.

    Kept rows, c = 0, ask for θ = ½: 2 (θ − ½) = 2 λ, so that λ = 1 ends in θ = 1.5, c = −1.5.
    """

    def apply(theta, x_t, t, cond):
        return theta + cond + 0 * x_t

    attack = denoising_attack(apply, SHORT, jnp.zeros((1, 4, 3)))
    points = batch_of().forget._replace(epsilon=jnp.ones((6, 3)), constraint=jnp.zeros(6, int))
    batch = Batch(Images(jnp.zeros((8, 3)), jnp.zeros((8, 1))), points)
    optimizer = optax.partition(
        {"model": optax.sgd(0.02), "adversary": optax.sgd(0.02)}, Pooled("model", "adversary")
    )
    problem = against_pool(without(apply, SHORT), attack)
    algorithm = primal_dual(problem, optimizer, optax.set_to_zero())
    step = jax.jit(algorithm.step)
    start = Pooled(jnp.array(0.5), jnp.full((6, 1), 3.0))
    state = algorithm.init(start, 0.1, multipliers=1.0)
    for key in jax.random.split(KEY, 800):
        state, info = step(key, state, jnp.array(0.5), batch)
    np.testing.assert_allclose(state.params.params, 1.5, atol=0.15)
    np.testing.assert_allclose(state.params.pool, -1.5, atol=0.4)  # each row has noise of its own
    np.testing.assert_allclose(state.params.pool.mean(), -1.5, atol=0.15)
    np.testing.assert_allclose(info.values, 1.0, atol=0.2)


def test_the_attack_is_the_denoising_loss_under_the_pool():
    """W = 0 and V c = m in each dimension: ‖ε − m‖²/d has the mean 1 + m²."""
    theta = {"w": jnp.zeros((3, 3)), "v": jnp.ones((2, 3)), "b": jnp.zeros((20, 3))}
    pool = jnp.repeat(jnp.array([[0.0, 0.0], [0.5, 1.0]]), 20_000, axis=0)
    found = np.asarray(jax.jit(ATTACK)(theta, None, KEY, pool))
    np.testing.assert_allclose(found.reshape(2, -1).mean(axis=1), [1.0, 3.25], rtol=0.02)
    # With four images a row the mean stays, and its variance is a quarter.
    four = jax.jit(denoising_attack(linear, SHORT, IMAGES[None], each=4))
    fewer = np.asarray(four(theta, None, KEY, pool))
    np.testing.assert_allclose(fewer.reshape(2, -1).mean(axis=1), [1.0, 3.25], rtol=0.02)
    variances = [each.reshape(2, -1).var(axis=1) for each in (found, fewer)]
    np.testing.assert_allclose(variances[0] / variances[1], 4, rtol=0.1)
    with pytest.raises(ValueError, match="at least 1 image"):
        denoising_attack(linear, SHORT, IMAGES[None], each=0)


def test_the_attack_knows_its_images():
    """(x_t − α m)/σ is the noise of the only image m, at every step; of another it is not."""

    def apply(image, x_t, t, cond):
        alpha, sigma = schedules.alpha_sigma(SHORT.log_snr[t], x_t)
        return (x_t - alpha * image) / sigma + 0 * cond

    pool = jnp.zeros((32, 1))
    among = jax.jit(denoising_attack(apply, SHORT, IMAGES[None]))
    hit = np.stack([among(image, None, KEY, pool) < 1e-6 for image in IMAGES])
    np.testing.assert_array_equal(hit.sum(axis=0), 1)  # each row has one of them
    assert (hit.sum(axis=1) > 0).all()  # and none is left out
    # Of as many concepts as images, each row attacks for its own, in turn.
    own = jax.jit(denoising_attack(apply, SHORT, IMAGES[:, None]))
    hit = np.stack([own(image, None, KEY, pool) < 1e-6 for image in IMAGES])
    np.testing.assert_array_equal(hit.argmax(axis=0), np.arange(32) % len(IMAGES))


@pytest.mark.slow
def test_points_count_where_the_concept_is_denoised_better_than_by_the_rest():
    """ε_θ = c, ε̄ = 0, ε_i = 1: c counts c² between 0 and 2, where it is nearer to 1 than 0 is."""
    problem = without(lambda theta, x_t, t, cond: theta * cond + 0 * x_t, SHORT)
    at = jnp.array([0.5, -0.5, 1.9, 2.5, 0.1, 3.0])[:, None]
    nothing, one = jnp.zeros((6, 3)), jnp.ones((6, 3))
    points = batch_of().forget._replace(cond=at, epsilon=nothing, concept=one)
    batch = Batch(Images(jnp.zeros((4, 3)), jnp.zeros((4, 1))), points)

    def values(theta):
        return problem.losses(theta, jnp.array(1.0), KEY, batch, jnp.zeros(2)).values

    expected = [0.25, 0.0, 3.61, 0.0, 0.01, 0.0]
    np.testing.assert_allclose(values(jnp.array(1.0)), expected, rtol=1e-5, atol=1e-7)
    # The gate has no slope: what counts is drawn to the rest, d(θ² c²)/dθ = 2 c².
    slope = jax.grad(lambda theta: values(theta).sum())(jnp.array(1.0))
    np.testing.assert_allclose(slope, 2 * sum(expected), rtol=1e-5)


def test_kept_rows_are_held_to_their_base():
    """ε_θ = θ c at c = 2 against ε_q = c' at the base 5: (2θ − 5)²; or at c itself: (2θ − 2)²."""
    problem = without(lambda theta, x_t, t, cond: theta * cond + 0 * x_t, SHORT)
    kept, points = Images(jnp.zeros((4, 3)), jnp.full((4, 1), 2.0)), batch_of().forget
    points = points._replace(cond=jnp.zeros((6, 1)))
    for base, expected in ((jnp.full((4, 1), 5.0), 16.0), (None, 1.0)):
        batch = Batch(kept._replace(base=base), points)
        found = problem.losses(jnp.array(0.5), jnp.array(1.0), KEY, batch, jnp.zeros(2))
        np.testing.assert_allclose(found.objective, expected, rtol=1e-6)


def test_refuses_pools_and_images_that_do_not_fit():
    problem = against_pool(without(linear, SHORT), ATTACK)
    for pool in (POOL[:5], jnp.concatenate([POOL, POOL]), None, (POOL, POOL[:5])):
        with pytest.raises(ValueError, match="for each of 6 rows to forget"):
            problem.losses(Pooled(PARAMS, pool), REFERENCE, KEY, batch_of(), jnp.zeros(2))
    for images in (jnp.zeros((1, 0, 3)), jnp.zeros((4, 3))):
        with pytest.raises(ValueError, match="at least one"):
            denoising_attack(linear, SHORT, images)


def test_a_pool_may_stand_for_conditions_alone():
    """Whatever the rows are, if they have a `cond`: here conditions of an on-policy problem."""
    seen = []

    def evaluate(params, reference, key, batch, current, *, axis_name=None):
        seen.append(batch.forget)
        return without(linear, SHORT).losses(params, reference, key, batch_of(), current)

    problem = without(linear, SHORT)._replace(losses=evaluate)
    rows = Conditions(jnp.zeros((6, 2)), jnp.ones((6, 2)))
    against_pool(problem, ATTACK).losses(
        Pooled(PARAMS, POOL), REFERENCE, KEY, Batch(None, rows), jnp.zeros(2)
    )
    np.testing.assert_array_equal(seen[0].cond, POOL)
    np.testing.assert_array_equal(seen[0].base, rows.base)
