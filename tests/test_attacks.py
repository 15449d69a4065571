"""Attacks against exact denoisers, and against optimizers written out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import attacks, mixtures, samplers, schedules

MEAN, DEVIATION = 0.6, 0.35  # of the Gaussian data
TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULE = schedules.noise_schedule(num_steps=10, beta_end=0.3)

# Compiled as a whole: an operation at a time they take twice as long.
invert = jax.jit(
    attacks.invert,
    static_argnames=("predict", "steps", "batch", "learning_rate", "every", "project"),
)
inpaint = jax.jit(attacks.inpaint, static_argnames=("predict", "steps", "repeats"))


def gaussian_law(mean=MEAN, deviation=DEVIATION):
    return mixtures.gaussian_mixture(jnp.reshape(mean, (1, -1)), deviation**2)


def mean_network(schedule, deviation=0.5):
    """The exact denoiser of a Gaussian whose mean is the condition."""

    def predict(mean, x_t, t):
        return mixtures.denoiser(gaussian_law(mean, deviation), schedule)(x_t, t)

    return predict


def offset_network(schedule, target):
    """Of images that are all 0: its error is variable − target, whatever is drawn."""

    def predict(variable, x_t, t):
        return x_t / jnp.sqrt(jax.nn.sigmoid(-schedule.log_snr[t]))[:, None] + (variable - target)

    return predict


def linear_network(variable, x_t, t):
    """Its loss depends on all that is drawn: images, noise and time steps."""
    return variable["slope"] * x_t + variable["offset"] * (1.0 + t)[:, None]


# ------------------------------------------------------------------ inversion


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_finds_the_mean_of_the_images(prediction_type):
    """The loss is quadratic in the mean, and least at that of the images at every time step."""
    schedule = schedules.noise_schedule(
        num_steps=100, beta_end=0.2, prediction_type=prediction_type
    )
    x_0 = jnp.array([[0.9, -0.2], [1.1, -0.6], [0.4, -0.4], [1.6, 0.0]])
    found = invert(
        mean_network(schedule),
        schedule,
        jax.random.key(0),
        x_0=x_0,
        start=jnp.array([-1.0, 1.0]),
        steps=400,
        batch=64,
        learning_rate=optax.cosine_decay_schedule(0.05, 400),
    )
    np.testing.assert_array_equal(found.found[0], [-1.0, 1.0])
    np.testing.assert_allclose(found.found[-1], x_0.mean(axis=0), atol=0.03)
    assert found.steps.tolist() == [0, 400]


@pytest.mark.slow
def test_inversion_in_a_ball_finds_the_projected_mean():
    """The loss is the same in every direction: in a ball it is least at the nearest point."""
    schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
    mean, centre, radius = jnp.array([1.0, -0.3]), jnp.array([-1.0, 0.5]), 0.8
    found = invert(
        mean_network(schedule),
        schedule,
        jax.random.key(0),
        x_0=mean[None],
        start=centre,
        steps=300,
        batch=64,
        every=10,
        learning_rate=optax.cosine_decay_schedule(0.05, 300),
        project=attacks.in_ball(centre, radius),
    ).found
    distance = np.linalg.norm(found - centre, axis=1)
    assert (distance <= radius * (1 + 1e-5)).all()
    assert distance[0] == 0
    direction = (mean - centre) / jnp.linalg.norm(mean - centre)
    np.testing.assert_allclose(found[-1], centre + radius * direction, atol=0.02)


def adamw_by_hand(variable, gradient, steps, rate, decay):
    """Adam with decoupled weight decay (Loshchilov and Hutter), in float64."""
    path, first, second = [variable], np.zeros_like(variable), np.zeros_like(variable)
    for k in range(1, steps + 1):
        slope = gradient(variable)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        update = first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
        variable = variable - rate * (update + decay * variable)
        path.append(variable)
    return np.stack(path)


def test_inversion_is_adamw():
    schedule = schedules.noise_schedule(trained_betas=[0.3, 0.4, 0.5])
    target, start = np.array([1.0, -2.0, 0.5]), np.array([0.5, 0.0, 3.0])

    predict = offset_network(schedule, jnp.asarray(target))
    for decay in (0.0, 0.1):
        found = invert(
            predict,
            schedule,
            jax.random.key(0),
            x_0=jnp.zeros((5, 3)),
            start=start,
            steps=12,
            batch=4,
            every=3,
            learning_rate=0.1,
            weight_decay=decay,
        )
        path = adamw_by_hand(start, lambda x: 2 * (x - target) / 3, 12, 0.1, decay)
        np.testing.assert_allclose(found.found, path[::3], rtol=1e-4, atol=1e-5)
        losses = ((path[:12] - target) ** 2).mean(axis=1)
        expected = [losses[0], *losses.reshape(4, 3).mean(axis=1)]
        np.testing.assert_allclose(found.loss, expected, rtol=1e-4)


@pytest.mark.slow
def test_the_straight_through_gradient_is_that_at_the_projection():
    """By hand: the network sees the rounded variable, and the variable itself moves."""
    schedule = schedules.noise_schedule(trained_betas=[0.3, 0.4, 0.5])
    target, start = np.array([2.3, -1.6]), np.array([0.1, 0.2])
    found = invert(
        offset_network(schedule, jnp.asarray(target)),
        schedule,
        jax.random.key(0),
        x_0=jnp.zeros((1, 2)),
        start=start,
        steps=40,
        batch=2,
        every=1,
        learning_rate=0.07,
        project=attacks.straight_through(jnp.round),
    )
    path = adamw_by_hand(start, lambda x: np.round(x) - target, 40, 0.07, 0.0)
    np.testing.assert_array_equal(found.found, np.round(path))
    assert len(np.unique(found.found, axis=0)) > 3


BALL = attacks.in_ball({"slope": jnp.ones(2), "offset": jnp.zeros(())}, 0.5)


def inversion_of_the_linear_network(key, start, steps, every):
    return invert(
        linear_network,
        SCHEDULE,
        key,
        x_0=jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]),
        start=start,
        steps=steps,
        batch=2,
        every=every,
        project=BALL,
    )


@pytest.mark.slow
def test_records_are_shorter_runs():
    start = {"slope": jnp.ones(2), "offset": jnp.zeros(())}
    whole = inversion_of_the_linear_network(jax.random.key(0), start, 9, 3)
    assert whole.steps.tolist() == [0, 3, 6, 9]
    assert whole.loss.shape == (4,)
    short = inversion_of_the_linear_network(jax.random.key(0), start, 6, None)
    assert short.steps.tolist() == [0, 6]
    for name, values in whole.found.items():
        np.testing.assert_allclose(values[2], short.found[name][1], rtol=1e-5, atol=1e-6)
        assert (np.diff(values, axis=0) != 0).all()


@pytest.mark.slow
def test_vmapped_restarts_equal_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    starts = {"slope": jnp.ones((3, 2)), "offset": jnp.array([-0.1, 0.0, 3.0])}
    run = partial(inversion_of_the_linear_network, steps=6, every=3)
    together, alone = jax.jit(jax.vmap(run))(keys, starts), run
    assert together.found["slope"].shape == (3, 3, 2)
    for k in range(3):
        one = alone(keys[k], jax.tree.map(lambda leaf, k=k: leaf[k], starts))
        for name, values in one.found.items():
            np.testing.assert_allclose(together.found[name][k], values, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together.loss[k], one.loss, rtol=1e-4)
    assert len(np.unique(together.loss)) == 9


def nearest_by_hand(embeddings, vocabulary, allowed):
    return [
        max(
            np.flatnonzero(allowed),
            key=lambda j: e @ vocabulary[j] / np.linalg.norm(e) / np.linalg.norm(vocabulary[j]),
        )
        for e in embeddings
    ]


def test_nearest_tokens_by_brute_force():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(9, 5))
    vocabulary = rng.normal(size=(40, 5)) * rng.lognormal(0, 2, (40, 1))
    allowed = rng.random(40) < 0.5
    everything = nearest_by_hand(embeddings, vocabulary, np.full(40, True))
    among = nearest_by_hand(embeddings, vocabulary, allowed)
    assert everything != among
    np.testing.assert_array_equal(attacks.nearest_tokens(embeddings, vocabulary), everything)
    found = attacks.nearest_tokens(embeddings, vocabulary, allowed)
    np.testing.assert_array_equal(found, among)
    project = attacks.onto_vocabulary(vocabulary, allowed)
    tokens, pulled = jax.vjp(jax.jit(project), jnp.float32(embeddings))
    np.testing.assert_array_equal(tokens, np.float32(vocabulary[among]))
    np.testing.assert_array_equal(pulled(tokens)[0], tokens)


def test_a_token_of_zeros_is_never_nearest_to_another():
    vocabulary = np.array([[0.0, 0.0], [1.0, 0.2], [-1.0, 0.0]])
    assert attacks.nearest_tokens([[1.0, 0.0], [0.0, 0.0]], vocabulary).tolist() == [1, 0]


@pytest.mark.slow
def test_projected_inversion_finds_the_right_tokens():
    """Two tokens whose sum is the mean of the images; each part has a vocabulary of its own."""
    schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
    angles = 2 * np.pi * np.arange(12) / 12
    vocabulary = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    scales = jnp.array([1.0, 3.0])  # a sum of two directions then tells which is which
    chosen = [7, 2]
    mean = scales @ vocabulary[jnp.array(chosen)]
    found = invert(
        lambda tokens, x_t, t: mean_network(schedule)(scales @ tokens, x_t, t),
        schedule,
        jax.random.key(0),
        x_0=mean[None],
        start=vocabulary[jnp.array([9, 0])],
        steps=400,
        batch=32,
        learning_rate=optax.cosine_decay_schedule(0.03, 400),
        project=attacks.onto_vocabulary(vocabulary),
    )
    assert attacks.nearest_tokens(found.found[0], vocabulary).tolist() == [9, 0]
    assert attacks.nearest_tokens(found.found[-1], vocabulary).tolist() == chosen
    np.testing.assert_allclose(found.found[-1], vocabulary[jnp.array(chosen)], rtol=1e-6)
    assert float(found.loss[-1]) < float(found.loss[0])


def test_a_ball_is_over_all_leaves():
    centre = {"a": jnp.array([1.0]), "b": jnp.array([[0.0, 2.0]])}
    variable = {"a": jnp.array([4.0]), "b": jnp.array([[4.0, 14.0]])}  # away by 3, 4, 12: 13
    found = attacks.in_ball(centre, 1.3)(variable)
    np.testing.assert_allclose(found["a"], [1.3], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [[0.4, 3.2]], rtol=1e-6)
    inside = attacks.in_ball(centre, 13.5)(variable)
    for name in centre:
        np.testing.assert_array_equal(inside[name], variable[name])
    half = attacks.in_ball(jnp.zeros(2, jnp.bfloat16), jnp.float32(1.0))(jnp.ones(2, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_a_ball_of_no_radius_is_its_centre():
    project = attacks.in_ball(jnp.array([1.0, 2.0]), 0.0)
    for x in ([1.0, 2.0], [-3.0, 0.0]):
        np.testing.assert_array_equal(project(jnp.array(x)), [1.0, 2.0])
    slope = jax.jacobian(attacks.in_ball(jnp.zeros(2), 1.0))(jnp.zeros(2))
    np.testing.assert_array_equal(slope, np.eye(2))


# ------------------------------------------------------------------ sampling


def flow_backwards(x_0, log_snr):
    """The probability flow of Gaussian data keeps the quantile."""
    signal = 1 / (1 + np.exp(-np.float64(log_snr)))
    deviation = np.sqrt(signal * DEVIATION**2 + 1 - signal)
    return np.sqrt(signal) * MEAN + deviation * (np.asarray(x_0) - MEAN) / DEVIATION


@pytest.mark.slow
def test_inverted_noise_converges_to_the_probability_flow():
    schedule = schedules.noise_schedule(spacing="trailing")
    predict = mixtures.denoiser(gaussian_law(), schedule)
    x_0 = jnp.array([[-0.4], [0.3], [0.6], [1.2]])
    exact = flow_backwards(x_0, schedule.log_snr[999])
    errors, returns = [], []
    for steps in (50, 100, 200):
        times = schedules.timesteps(schedule, steps)
        x_t = attacks.invert_noise(predict, schedule, x_0, times)
        errors.append(np.abs(x_t - exact).max())
        returns.append(np.abs(samplers.denoise(predict, schedule, x_t, times).x_0 - x_0).max())
    for found in (errors, returns):
        assert 1.6 < found[0] / found[1] < 2.6
        assert 1.6 < found[1] / found[2] < 2.6
    assert errors[-1] < 0.05


@pytest.mark.parametrize(
    ("prediction_type", "one"), [("epsilon", True), ("sample", False), ("v_prediction", False)]
)
def test_iterated_inversion_is_exact(prediction_type, one):
    """The fixed point is the step's inverse, at any number of steps: sampling returns x_0."""
    schedule = schedules.noise_schedule(
        num_steps=100,
        beta_end=0.2,
        prediction_type=prediction_type,
        final_alpha_cumprod_one=one,
        clip_range=2.0,
    )
    predict = mixtures.denoiser(gaussian_law(jnp.array([0.6, -0.2])), schedule)
    x_0 = jnp.array([[-0.4, 0.0], [1.2, -0.3]])
    times = schedules.timesteps(schedule, 20)

    def returned(iterations):
        x_t = attacks.invert_noise(predict, schedule, x_0, times, iterations=iterations)
        return samplers.denoise(predict, schedule, x_t, times).x_0

    np.testing.assert_allclose(returned(60), x_0, atol=2e-4)
    assert np.abs(returned(1) - x_0).max() > 1e-2


CORRELATION = 0.9


def correlated_network(schedule, correlation):
    covariance = jnp.array([[1.0, correlation], [correlation, 1.0]])

    def predict(x_t, t):
        signal = jax.nn.sigmoid(schedule.log_snr[t])[:, None, None]
        noised = signal * covariance + (1 - signal) * jnp.eye(2)
        return jnp.sqrt(1 - signal[:, 0]) * jnp.linalg.solve(noised, x_t[..., None])[..., 0]

    return predict


def inpainted_by_hand(alphas_cumprod, times, correlation, repeats):
    """What one value found is: its slope in the known one, and its deviation from noise."""
    covariance = np.array([[1.0, correlation], [correlation, 1.0]])
    # Coefficients of the known value, its noise and the other's first noise; variance of repeats.
    known, other, fresh = np.zeros(3), np.array([0.0, 0.0, 1.0]), 0.0
    following = [*alphas_cumprod[list(times[1:])], 1.0]
    for now, after in zip(alphas_cumprod[list(times)], following, strict=True):
        known[:2] = np.sqrt(now), np.sqrt(1 - now)
        of_known, own = np.linalg.inv(now * covariance + (1 - now) * np.eye(2))[1]
        to_noise = np.sqrt(1 - now) * np.array([of_known, own])
        to_image = (np.array([0.0, 1.0]) - np.sqrt(1 - now) * to_noise) / np.sqrt(now)
        slope_known, slope = np.sqrt(after) * to_image + np.sqrt(1 - after) * to_noise
        for number in range(repeats):
            if number:
                ratio = now / after
                other, fresh = np.sqrt(ratio) * other, ratio * fresh + 1 - ratio
            other, fresh = slope_known * known + slope * other, slope**2 * fresh
    return other[0], np.sqrt(other[1] ** 2 + other[2] ** 2 + fresh)


@pytest.mark.slow
@pytest.mark.parametrize(("repeats", "least"), [(1, 0.4), (5, 0.75)])
def test_inpainting_of_correlated_gaussians(repeats, least):
    """Each step is linear in the known value and the noises, and is worked out by hand.

    Replacement is not exact. The slope lies between 0, no knowledge, and that of E[x | known].
    """
    betas = np.linspace(1e-4, 0.2, 100)
    schedule = schedules.noise_schedule(trained_betas=betas)
    count, known = 20_000, 1.5
    x_0 = jnp.stack([jnp.full(count, known), jnp.full(count, jnp.nan)], axis=1)
    found = inpaint(
        correlated_network(schedule, CORRELATION),
        schedule,
        jax.random.key(0),
        x_0=x_0,
        mask=jnp.array([1, 0]),
        steps=20,
        repeats=repeats,
    )
    np.testing.assert_array_equal(found[:, 0], x_0[:, 0])
    slope, deviation = inpainted_by_hand(
        np.cumprod(1 - betas), range(95, -1, -5), CORRELATION, repeats
    )
    assert abs(found[:, 1].mean() - slope * known) < 4 * deviation / np.sqrt(count)
    assert abs(found[:, 1].std() / deviation - 1) < 4 / np.sqrt(2 * count)
    assert least < slope < CORRELATION


def test_inpainting_of_independent_parts_is_sampling():
    schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
    predict = mixtures.denoiser(gaussian_law(jnp.array([0.5, -0.5])), schedule)
    key, shape = jax.random.key(0), (6, 2)
    mask = np.array([[1, 0], [0, 1], [0, 0], [1, 1], [0, 1], [1, 0]])
    x_0 = jnp.full(shape, 5.0)
    found = inpaint(predict, schedule, key, x_0=x_0, mask=mask, steps=20)
    free = inpaint(predict, schedule, key, x_0=x_0, mask=0 * mask, steps=20)
    np.testing.assert_array_equal(found[mask == 1], 5.0)
    np.testing.assert_allclose(found[mask == 0], free[mask == 0], rtol=1e-5, atol=1e-6)
    noise = jax.random.normal(jax.random.split(key)[0], shape)
    expected = samplers.sample(predict, schedule, key, noise, steps=20).x_0
    np.testing.assert_allclose(free, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_guidance_by_a_linear_likelihood_is_exact(prediction_type):
    """N(m, v) tilted by exp(s b·x) is N(m + s v b, v)."""
    schedule = schedules.noise_schedule(num_steps=50, beta_end=0.3, prediction_type=prediction_type)
    mean, direction = jnp.array([0.6, -0.2, 0.1]), jnp.array([1.0, -2.0, 0.5])
    predict = mixtures.denoiser(gaussian_law(mean), schedule)
    t = jnp.arange(0, 50, 7)
    x_t = jax.random.normal(jax.random.key(0), (len(t), 3))

    @jax.jit
    def both(scale):
        guided = attacks.guided_by(predict, schedule, lambda x_0: x_0 @ direction, scale)
        tilted = gaussian_law(mean + scale * DEVIATION**2 * direction)
        return guided(x_t, t), mixtures.denoiser(tilted, schedule)(x_t, t)

    for scale in (0.0, 1.0, 2.5):
        found, expected = both(scale)
        # Where α is small x̂_0 = (x_t − σ ε̂)/α loses digits.
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_guidance_sees_the_clipped_image_and_leaves_the_rest():
    """Where x̂_0 is clipped its gradient is 0, and a step without signal is not guided."""
    schedule = schedules.noise_schedule(
        num_steps=20,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_range=1.0,
    )
    seen = []

    def log_likelihood(x_0):
        jax.debug.callback(lambda x_0: seen.append(x_0), x_0)
        return 3 * x_0[:, 0]

    def predict(x_t, t):
        return 0.1 * x_t

    x_t, t = jnp.array([[0.2], [9.0], [0.2]]), jnp.array([5, 5, 19])
    guided = np.asarray(attacks.guided_by(predict, schedule, log_likelihood, 1.0)(x_t, t))
    jax.effects_barrier()
    assert np.abs(seen[0]).max() == 1
    plain = predict(x_t, t)
    np.testing.assert_array_equal(guided[1:], plain[1:])
    alpha, sigma = (float(v[0, 0]) for v in schedules.alpha_sigma(schedule.log_snr[t[:1]], x_t))
    # x̂_0 = (α − 0.1 σ) x_t, and v moves by −σ ∇/α.
    expected = plain[0, 0] - sigma / alpha * 3 * (alpha - 0.1 * sigma)
    assert guided[0, 0] == pytest.approx(float(expected), rel=1e-5)


def test_guided_samples_follow_the_tilted_law():
    schedule = schedules.noise_schedule(num_steps=200, beta_end=0.1)
    guided = attacks.guided_by(
        mixtures.denoiser(gaussian_law(), schedule), schedule, lambda x_0: 4 * x_0[:, 0], 1.0
    )
    start = jax.random.normal(jax.random.key(0), (2000, 1))
    x_0 = samplers.sample(guided, schedule, jax.random.key(1), start, steps=100).x_0
    assert x_0.mean() == pytest.approx(MEAN + 4 * DEVIATION**2, abs=0.04)
    assert x_0.std() == pytest.approx(DEVIATION, rel=0.08)


@pytest.mark.slow
def test_stochastic_sampling_at_variance_one_is_ddim():
    schedule = schedules.noise_schedule(
        num_steps=50, beta_end=0.3, steps_offset=1, final_alpha_cumprod_one=False
    )
    predict = mixtures.denoiser(gaussian_law(), schedule)
    x, key = jax.random.normal(jax.random.key(0), (4, 1)), jax.random.key(1)
    ours = jax.jit(partial(attacks.stochastic, predict, schedule, steps=10))
    theirs = jax.jit(partial(samplers.sample, predict, schedule, steps=10))
    for eta in (0.0, 0.7, 1.0):
        found = ours(key, x, eta=eta)
        np.testing.assert_allclose(found, theirs(key, x, eta=eta).x_0, rtol=1e-5, atol=1e-6)
        other = ours(jax.random.key(2), x, eta=eta)
        assert (found == other).all() == (eta == 0)
    deterministic = samplers.sample(predict, schedule, key, x, steps=10).x_0
    np.testing.assert_allclose(ours(key, x, eta=0.0), deterministic, rtol=1e-5, atol=1e-6)


def stochastic_moments(alphas_cumprod, times, eta, factor):
    """Mean and variance of x_0 at the end of the chain from N(0, 1), in float64."""
    mean, variance = 0.0, 1.0
    following = [*alphas_cumprod[list(times[1:])], 1.0]
    clamped = 0
    for now, after in zip(alphas_cumprod[list(times)], following, strict=True):
        v = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        clamped += v > 1 - after
        total = now * DEVIATION**2 + 1 - now
        # ε̂ = √(1−ᾱ) (x_t − √ᾱ m)/total and x̂_0 = (x_t − √(1−ᾱ) ε̂)/√ᾱ, as slope and offset.
        epsilon = np.sqrt(1 - now) / total * np.array([1.0, -np.sqrt(now) * MEAN])
        x_0 = (np.array([1.0, 0.0]) - np.sqrt(1 - now) * epsilon) / np.sqrt(now)
        slope, offset = np.sqrt(after) * x_0 + np.sqrt(max(1 - after - v, 0)) * epsilon
        mean, variance = slope * mean + offset, slope**2 * variance + factor * v
    return mean, variance, clamped


@pytest.mark.parametrize(("eta", "factor"), [(1.0, 1.0), (1.0, 1.3), (1.85, 1.04)])
def test_stochastic_sampling_of_gaussian_data(eta, factor):
    betas = np.linspace(0.01, 0.4, 24)
    schedule = schedules.noise_schedule(trained_betas=betas)
    predict = mixtures.denoiser(gaussian_law(), schedule)
    count = 40_000
    x = jax.random.normal(jax.random.key(0), (count, 1))
    found = jax.jit(attacks.stochastic, static_argnames=("predict", "steps"))(
        predict, schedule, jax.random.key(1), x, steps=8, eta=eta, variance=factor
    )
    mean, variance, clamped = stochastic_moments(
        np.cumprod(1 - betas), range(21, -1, -3), eta, factor
    )
    assert (clamped > 0) == (eta > 1)
    assert abs(found.mean() - mean) < 4 * np.sqrt(variance / count)
    assert abs(found.var() / variance - 1) < 4 * np.sqrt(2 / count)
    if eta == factor == 1:
        theirs = samplers.sample(
            predict, schedule, jax.random.key(2), x, steps=8, method="ddpm"
        ).x_0
        assert abs(theirs.mean() - found.mean()) < 4 * np.sqrt(2 * variance / count)
        assert abs(theirs.var() / found.var() - 1) < 4 * np.sqrt(4 / count)


# ------------------------------------------------------------------ weights


def table_network(params, x_t, t, cond):
    """ε̂ = w x_t + b_c: the loss is quadratic in the parameters."""
    return params["weight"] * x_t + params["bias"][cond["row"]]


START = {"weight": jnp.array([0.3, -0.2]), "bias": jnp.zeros((6, 2))}


def relearning_of(schedule, apply=table_network, optimizer=None):
    x_0 = jax.random.normal(jax.random.key(7), (6, 2))
    optimizer = optax.sgd(0.2, momentum=0.5) if optimizer is None else optimizer
    attack = attacks.relearning(
        apply, schedule, optimizer, x_0=x_0, cond={"row": jnp.arange(6)}, batch=4
    )
    return attack, np.float64(x_0)


def test_relearning_is_gradient_descent_on_the_denoising_loss():
    """What the network was shown is recorded, and the descent is done again by hand."""
    schedule = schedules.noise_schedule(trained_betas=[0.3, 0.4, 0.5])
    shown = []

    def recorded(params, x_t, t, cond):
        jax.debug.callback(lambda *call: shown.append(call), x_t, t, cond["row"], ordered=True)
        return table_network(params, x_t, t, cond)

    attack, x_0 = relearning_of(schedule, recorded)
    state = attack.advance(attack.init(START), jax.random.key(0), 10)
    jax.effects_barrier()
    assert len(shown) == 10
    weight, bias = np.float64(START["weight"]), np.zeros((6, 2))
    velocities = [np.zeros_like(weight), np.zeros_like(bias)]
    alphas_cumprod = np.cumprod([0.7, 0.6, 0.5])
    for x_t, t, row in shown:
        signal = alphas_cumprod[t][:, None]
        noise = (x_t - np.sqrt(signal) * x_0[row]) / np.sqrt(1 - signal)
        error = weight * x_t + bias[row] - noise
        slope_bias = np.zeros_like(bias)
        np.add.at(slope_bias, row, 2 * error / error.size)
        slopes = [(2 * error * x_t).sum(axis=0) / error.size, slope_bias]
        velocities = [0.5 * v + slope for v, slope in zip(velocities, slopes, strict=True)]
        weight, bias = weight - 0.2 * velocities[0], bias - 0.2 * velocities[1]
    np.testing.assert_allclose(state.params["weight"], weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.params["bias"], bias, rtol=1e-4, atol=1e-5)
    rows = np.concatenate([row for _, _, row in shown])
    times = np.concatenate([t for _, t, _ in shown])
    assert set(rows) == set(range(6))
    assert (np.bincount(times, minlength=3) >= 8).all()  # of 40 draws, in stratified fours


def test_learning_in_pieces_is_learning_at_once():
    traced = []

    def counted(*call):
        traced.append(call)
        return table_network(*call)

    attack, _ = relearning_of(SCHEDULE, counted, optax.adam(0.05))
    key = jax.random.key(3)
    whole = attack.advance(attack.init(START), key, 9)
    pieces = attack.init(START)
    for steps in (4, 0, 5):
        pieces = attack.advance(pieces, key, steps)
    assert int(whole.step) == int(pieces.step) == 9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, pieces)
    again = attack.advance(attack.advance(attack.init(START), key, 4), jax.random.key(4), 5)
    assert (again.params["weight"] != whole.params["weight"]).all()
    assert len(traced) == 1  # any number of steps is the same program


@pytest.mark.slow
def test_relearning_of_several_models_at_once():
    """And without conditions, with the images themselves mapped over."""
    schedule = schedules.noise_schedule(num_steps=20, beta_end=0.3)

    def run(key, params, x_0):
        attack = attacks.relearning(
            lambda params, x_t, t, cond: params * x_t,
            schedule,
            optax.sgd(0.1),
            x_0=x_0,
            cond=None,
            batch=2,
        )
        return attack.advance(attack.init(params), key, 5).params

    keys = jax.random.split(jax.random.key(0), 3)
    params, x_0 = jnp.array([0.0, 0.5, 1.0]), jax.random.normal(jax.random.key(1), (3, 4, 2))
    together, alone = jax.jit(jax.vmap(run))(keys, params, x_0), jax.jit(run)
    for k in range(3):
        np.testing.assert_allclose(together[k], alone(keys[k], params[k], x_0[k]), rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_rounding_is_to_the_nearest_of_a_grid(bits):
    rng = np.random.default_rng(0)
    kernel = np.float32(rng.normal(size=(3, 3, 4, 5)) * [0.01, 0.1, 1.0, 10.0, 0.0])
    params = {
        "kernel": jnp.asarray(kernel),
        "bias": jnp.asarray(np.float32(rng.normal(size=5))),
        "scale": jnp.float32(0.123),
        "table": jnp.array([[3, 4], [5, 7]]),
    }
    found = attacks.rounded(params, bits)
    for name in ("bias", "scale", "table"):
        np.testing.assert_array_equal(found[name], params[name])
    assert (found["kernel"][..., 4] == 0).all()
    levels = 2 ** (bits - 1) - 1
    for channel in range(4):
        weights = np.float64(kernel[..., channel])
        step = np.abs(weights).max() / levels
        got = np.float64(found["kernel"][..., channel])
        assert np.abs(got - weights).max() <= 0.5 * step * (1 + 1e-2)
        np.testing.assert_allclose(got / step, np.round(got / step), atol=1e-2)
        assert np.abs(got).max() == np.abs(weights).max()
        assert len(np.unique(got)) <= 2 * levels + 1
    again = attacks.rounded(found, bits)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_rounding_of_half_precision():
    """Integers up to 127 and their ratios are worked out in float32."""
    kernel = jax.random.normal(jax.random.key(0), (64, 2)).astype(jnp.bfloat16)
    found = attacks.rounded(kernel, 8)
    assert found.dtype == jnp.bfloat16
    wide = np.float32(kernel)
    scale = np.abs(wide).max(axis=0) / 127
    expected = jnp.asarray(np.round(wide / scale) * scale).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=2**-8)


# ------------------------------------------------------------------ wrong input

KEY, IMAGES = jax.random.key(0), jnp.zeros((3, 2))


def never(*args):
    raise AssertionError("the network was called")


def invert_with(**changes):
    options = {"x_0": IMAGES, "start": jnp.zeros(2), "steps": 4, "batch": 2} | changes
    return attacks.invert(never, SCHEDULE, KEY, **options)


def relearn_with(**changes):
    options = {"x_0": IMAGES, "cond": None, "batch": 2} | changes
    return attacks.relearning(never, SCHEDULE, optax.sgd(0.1), **options)


def inpaint_with(mask, **changes):
    options = {"steps": 2} | changes
    return attacks.inpaint(never, SCHEDULE, KEY, x_0=IMAGES, mask=mask, **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: invert_with(x_0=jnp.zeros((0, 2))), r"at least one, not of shape \(0, 2\)"),
        (lambda: invert_with(x_0=jnp.zeros(2)), r"images \[n, ...\]"),
        (lambda: invert_with(steps=0), "steps must be at least 1, not 0"),
        (lambda: invert_with(batch=0), "batch must be at least 1, not 0"),
        (lambda: invert_with(every=3), "every must divide the 4 steps, not be 3"),
        (lambda: invert_with(every=0), "every must divide the 4 steps, not be 0"),
        (lambda: attacks.nearest_tokens([[1.0]], [[1.0, 2.0]]), r"embeddings are \[k, 2\]"),
        (lambda: attacks.nearest_tokens([1.0, 2.0], [[1.0, 2.0]]), r"not \(2,\)"),
        (lambda: attacks.nearest_tokens([[1.0]], [1.0]), r"a vocabulary is \[v, d\]"),
        (lambda: attacks.nearest_tokens([[1.0]], jnp.zeros((0, 1))), "at least one token"),
        (lambda: attacks.onto_vocabulary([[1.0]], [True, False]), "each of 1 tokens"),
        (lambda: attacks.onto_vocabulary([[1.0]], [False]), "none of the 1 tokens is allowed"),
        (lambda: attacks.in_ball(jnp.zeros(2), -1.0), "radius must not be negative, got -1.0"),
        (lambda: attacks.in_ball(jnp.zeros(2), np.nan), "radius must not be negative, got nan"),
        (lambda: attacks.invert_noise(never, SCHEDULE, IMAGES, [1, 5]), "times must fall"),
        (lambda: attacks.invert_noise(never, SCHEDULE, IMAGES, []), "at least one"),
        (
            lambda: attacks.invert_noise(never, SCHEDULE, IMAGES, [5, 1], iterations=0),
            "iterations must be at least 1, not 0",
        ),
        (lambda: inpaint_with(jnp.ones((3, 3))), r"the mask \(3, 3\) does not broadcast"),
        (lambda: inpaint_with(jnp.ones((1, 3, 2))), r"the mask \(1, 3, 2\) does not broadcast"),
        (lambda: inpaint_with(jnp.ones(2), steps=11), "1 to 10 steps, not 11"),
        (lambda: inpaint_with(jnp.ones(2), repeats=0), "repeats must be at least 1, not 0"),
        (
            lambda: attacks.stochastic(never, SCHEDULE, KEY, IMAGES, steps=2, eta=-0.1),
            "eta must not be negative, got -0.1",
        ),
        (
            lambda: attacks.stochastic(
                never, SCHEDULE, KEY, IMAGES, steps=2, eta=1.0, variance=-1.0
            ),
            "variance must not be negative, got -1.0",
        ),
        (
            lambda: attacks.stochastic(never, SCHEDULE, KEY, IMAGES, steps=0, eta=1.0),
            "1 to 10 steps, not 0",
        ),
        (lambda: relearn_with(batch=0), "batch must be at least 1, not 0"),
        (lambda: relearn_with(x_0=jnp.zeros((0, 2))), "at least one"),
        (lambda: relearn_with(cond={"row": jnp.arange(4)}), r"shape \(4,\) for 3 images"),
        (lambda: relearn_with(cond=jnp.zeros(())), r"shape \(\) for 3 images"),
        (
            lambda: relearn_with().advance(relearn_with().init(jnp.zeros(1)), KEY, -1),
            "steps must not be negative, got -1",
        ),
        (lambda: attacks.rounded({}, 1), "an integer from 2 to 16, not 1"),
        (lambda: attacks.rounded({}, 17), "an integer from 2 to 16, not 17"),
        (lambda: attacks.rounded({}, 4.5), "an integer from 2 to 16, not 4.5"),
    ],
)
def test_wrong_input_is_refused_in_a_line(call, said):
    with pytest.raises(ValueError, match=said) as raised:
        call()
    assert "\n" not in str(raised.value)
