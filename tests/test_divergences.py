import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_unlearn import divergences, losses, samplers, schedules

BETAS = np.linspace(0.02, 0.6, 9)
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)
STEPS = len(BETAS)
LEVELS = np.arange(256) / 127.5 - 1


def schedule_of(variance="fixed_small"):
    return schedules.noise_schedule(trained_betas=BETAS, variance_type=variance)


def exact_epsilon(x_t, t, mean, deviation):
    """E[ε | x_t] for data N(m, s²), in numpy float64."""
    ab = ALPHAS_CUMPROD[t]
    total = ab * deviation**2 + 1 - ab
    return np.sqrt(1 - ab) * (x_t - np.sqrt(ab) * mean) / total


def gaussian_denoiser(params, x_t, t, cond):
    ab = jnp.asarray(ALPHAS_CUMPROD, jnp.float32)[t].reshape((-1,) + (1,) * (x_t.ndim - 1))
    total = ab * params["deviation"] ** 2 + 1 - ab
    return jnp.sqrt(1 - ab) * (x_t - jnp.sqrt(ab) * params["mean"]) / total


def kernel(t, mean, deviation, variance):
    """p(x_{t−1} | x_t) = N(slope x_t + offset, v) of the chain with the exact denoiser."""
    ab, before = ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[t - 1] if t else 1.0
    alpha = ab / before
    beta = 1 - alpha

    def average(x_t):
        epsilon = exact_epsilon(x_t, t, mean, deviation)
        return (x_t - beta / np.sqrt(1 - ab) * epsilon) / np.sqrt(alpha)  # Ho et al., eq. 11

    if t:
        v = (1 - before) / (1 - ab) * beta
    else:  # that of t = 1
        v = (1 - ALPHAS_CUMPROD[0]) / (1 - ALPHAS_CUMPROD[1]) * BETAS[1]
    if variance == "fixed_large":
        v = beta
    elif variance == "fixed_geometric":
        v = np.sqrt(v * beta)
    return average(1.0) - average(0.0), average(0.0), v


def chain(mean, deviation, variance):
    """Mean and variance of x_t for t = T−1, ..., 0 and of the image, from N(0, 1)."""
    moments = [(0.0, 1.0)]
    for t in range(STEPS - 1, -1, -1):
        slope, offset, v = kernel(t, mean, deviation, variance)
        center, spread = moments[-1]
        moments.append((slope * center + offset, slope**2 * spread + v))
    return moments


def gaussian_kl(mean_p, var_p, mean_q, var_q):
    return 0.5 * (np.log(var_q / var_p) + (var_p + (mean_p - mean_q) ** 2) / var_q - 1)


P, Q = (0.5, 0.4), (-0.2, 0.7)  # (mean, deviation) of two data laws


def chain_kl(variance):
    """KL(chain of P ‖ chain of Q), a KL of Gaussian kernels at every step."""
    total, parts = 0.0, []
    for t, (center, spread) in zip(range(STEPS - 1, -1, -1), chain(*P, variance), strict=False):
        slope_p, offset_p, v = kernel(t, *P, variance)
        slope_q, offset_q, _ = kernel(t, *Q, variance)
        nodes, mass = np.polynomial.hermite_e.hermegauss(20)
        x_t = center + np.sqrt(spread) * nodes
        kl = gaussian_kl(slope_p * x_t + offset_p, v, slope_q * x_t + offset_q, v)
        parts.append((mass * kl).sum() / mass.sum())
        total += parts[-1]
    return total, parts[::-1]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "fixed_geometric"])
def test_path_kl_weights_are_those_of_gaussian_kernels(variance):
    """At a point, the KL of two kernels is the weight times the squared difference of ε."""
    weights = divergences.path_kl_weights(schedule_of(), variance)
    expected = []
    for t in range(STEPS):
        slope_p, offset_p, v = kernel(t, *P, variance)
        slope_q, offset_q, _ = kernel(t, *Q, variance)
        x_t = 0.9
        kl = gaussian_kl(slope_p * x_t + offset_p, v, slope_q * x_t + offset_q, v)
        expected.append(kl / (exact_epsilon(x_t, t, *P) - exact_epsilon(x_t, t, *Q)) ** 2)
    np.testing.assert_allclose(weights, expected, rtol=2e-5)


def test_path_kl_weights_of_a_thousand_steps():
    betas = np.linspace(1e-4, 0.02, 1000)
    ab = np.cumprod(1 - betas)
    posterior = betas[1:] * (1 - ab[:-1]) / (1 - ab[1:])
    expected = betas[1:] ** 2 / (2 * posterior * (1 - betas[1:]) * (1 - ab[1:]))
    got = divergences.path_kl_weights(schedules.noise_schedule())
    np.testing.assert_allclose(got[1:], expected, rtol=3e-4)
    assert np.isfinite(got).all()


def test_zero_terminal_snr_makes_only_the_last_weight_infinite():
    schedule = schedules.noise_schedule(rescale_betas_zero_snr=True)
    for variance in ("fixed_small", "fixed_large", "fixed_geometric"):
        weights = divergences.path_kl_weights(schedule, variance)
        assert np.isfinite(weights[:-1]).all()
        assert weights[-1] == np.inf


def test_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="learned"):
        divergences.path_kl_weights(schedule_of(), "learned")


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_path_kl_of_two_gaussian_chains(variance):
    """Its mean along the first chain is the exact KL, which bounds that of the images."""
    exact, parts = chain_kl(variance)
    nodes, mass = np.polynomial.hermite_e.hermegauss(20)
    mass = mass / mass.sum()
    moments = chain(*P, variance)[STEPS - 1 :: -1]  # of x_t for t = 0, ..., T−1
    x_t = np.array([center + np.sqrt(spread) * nodes for center, spread in moments])
    t = np.repeat(np.arange(STEPS), 20)
    probabilities = np.linspace(1, 3, STEPS) / np.linspace(1, 3, STEPS).sum()
    values = divergences.path_kl(
        gaussian_denoiser,
        {"mean": P[0], "deviation": P[1]},
        {"mean": Q[0], "deviation": Q[1]},
        schedule_of(variance),
        x_t=jnp.float32(x_t).reshape(-1, 1),
        t=jnp.asarray(t),
        cond=None,
        weighting=losses.TimeWeighting(
            divergences.path_kl_weights(schedule_of(), variance), jnp.float32(probabilities)
        ),
    )
    by_time = np.asarray(values).reshape(STEPS, 20) @ mass * probabilities
    np.testing.assert_allclose(by_time, parts, rtol=1e-4)
    assert by_time.sum() == pytest.approx(exact, rel=1e-4)
    images = gaussian_kl(*chain(*P, variance)[-1], *chain(*Q, variance)[-1])
    assert 0.1 < images < by_time.sum()


def test_prior_kl():
    ab = ALPHAS_CUMPROD[-1]
    x_0 = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 1))
    exact = gaussian_kl(np.sqrt(ab) * x_0, 1 - ab, 0.0, 1.0).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(
        divergences.prior_kl(schedule_of(), jnp.float32(x_0)), exact, rtol=1e-4
    )
    # And the definition, E_q[log q − log p], by a dense sum.
    q, grid = stats.norm(np.sqrt(ab) * 0.7, np.sqrt(1 - ab)), np.linspace(-9, 9, 20_001)
    integral = (q.pdf(grid) * (q.logpdf(grid) - stats.norm.logpdf(grid))).sum() * (18 / 20_000)
    assert divergences.prior_kl(schedule_of(), jnp.full((1, 1), 0.7))[0] == pytest.approx(
        integral, rel=1e-3
    )


def test_prior_vanishes_at_zero_terminal_snr():
    schedule = schedules.noise_schedule(rescale_betas_zero_snr=True)
    assert divergences.prior_kl(schedule, jnp.ones((1, 4)))[0] == 0


def exact_deviation():
    return np.sqrt(BETAS[1] * (1 - ALPHAS_CUMPROD[0]) / (1 - ALPHAS_CUMPROD[1]))


def bin_log_probability(x_0, center, deviation):
    """log of the mass of N(center, deviation²) in the grey level's bin, by scipy."""
    law = stats.norm(center, deviation)
    lower = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255)
    upper = np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255)
    # On the side where both tails are small.
    right = lower > center
    big, small = (
        np.where(right, law.logsf(lower), law.logcdf(upper)),
        np.where(right, law.logsf(upper), law.logcdf(lower)),
    )
    return big + np.log(-np.expm1(small - big))


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.6, 1.0])
def test_reconstruction_is_a_law_on_the_grey_levels(mean):
    got = divergences.reconstruction(
        schedule_of(), jnp.float32(LEVELS)[:, None], jnp.full((256, 1), mean)
    )
    assert np.exp(-np.asarray(got, np.float64)).sum() == pytest.approx(1, abs=1e-4)
    exact = -bin_log_probability(LEVELS, mean, exact_deviation())
    np.testing.assert_allclose(got, exact, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_reconstruction_sums_over_the_image_and_stays_finite_far_away():
    schedule = schedules.noise_schedule()  # a deviation of about a hundredth
    x_0, mean = jnp.array([[0.6, -1.0], [1.0, -1.0]]), jnp.array([[-1.0, 1.0], [-1.0, -1.0]])
    got = divergences.reconstruction(schedule, x_0, mean)
    assert np.isfinite(got).all()
    betas = np.linspace(1e-4, 0.02, 1000)
    ab = np.cumprod(1 - betas)
    deviation = np.sqrt(betas[1] * (1 - ab[0]) / (1 - ab[1]))
    exact = -bin_log_probability(np.array(x_0, np.float64), np.array(mean), deviation).sum(axis=1)
    np.testing.assert_allclose(got, exact, rtol=1e-3)
    slope = jax.grad(lambda m: divergences.reconstruction(schedule, x_0, m).sum())(mean)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("mean", [-1.3, 0.2])
def test_reconstruction_of_latents_is_a_density(mean):
    x_0 = jnp.linspace(-3, 3, 24).reshape(4, 6)
    got = divergences.reconstruction(schedule_of(), x_0, jnp.full((4, 6), mean), discrete=False)
    exact = -stats.norm(mean, exact_deviation()).logpdf(np.asarray(x_0, np.float64)).sum(axis=1)
    np.testing.assert_allclose(got, exact, rtol=1e-4)


def test_bits_per_dim():
    assert divergences.bits_per_dim(jnp.float32(12 * np.log(256.0)), 12) == pytest.approx(8)


def exact_nelbo_terms(x_0, mean, deviation):
    """The three parts for one grey level, in float64, from kernels and quadrature."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(100)
    mass = mass / mass.sum()
    ab = ALPHAS_CUMPROD[-1]
    prior = gaussian_kl(np.sqrt(ab) * x_0, 1 - ab, 0.0, 1.0)
    diffusion = 0.0
    for t in range(1, STEPS):
        ab, before = ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[t - 1]
        x_t = np.sqrt(ab) * x_0 + np.sqrt(1 - ab) * nodes
        # q(x_{t−1} | x_t, x_0) by Bayes, against the chain's kernel.
        precision = 1 / (1 - before) + (1 - BETAS[t]) / BETAS[t]
        center = np.sqrt(before) * x_0 / (1 - before) + np.sqrt(1 - BETAS[t]) * x_t / BETAS[t]
        slope, offset, v = kernel(t, mean, deviation, "fixed_small")
        assert v == pytest.approx(1 / precision)
        diffusion += (mass * gaussian_kl(center / precision, v, slope * x_t + offset, v)).sum()
    ab = ALPHAS_CUMPROD[0]
    x_t = np.sqrt(ab) * x_0 + np.sqrt(1 - ab) * nodes
    slope, offset, _ = kernel(0, mean, deviation, "fixed_small")
    log_p = bin_log_probability(np.full(100, x_0), slope * x_t + offset, exact_deviation())
    return np.array([prior, diffusion, -(mass * log_p).sum()])


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_nelbo_of_gaussian_data(dimensions):
    """Unbiased, and above −log p of the sampler, which is Gaussian up to the last rounding."""
    mean, deviation = 0.2, 0.35
    levels = np.random.default_rng(dimensions).choice(LEVELS[60:220], (3, dimensions))
    exact = np.zeros((3, 3))
    log_p = np.zeros(3)
    # The last kernel has the variance of t = 1, as the discretised Gaussian around x̂_0.
    center, variance = chain(mean, deviation, "fixed_small")[-1]
    for row in range(3):
        for x_0 in levels[row]:
            exact[row] += exact_nelbo_terms(x_0, mean, deviation)
            log_p[row] += bin_log_probability(x_0, center, np.sqrt(variance))

    x_0 = jnp.float32(levels).reshape(3, dimensions, 1, 1)
    params, schedule = {"mean": mean, "deviation": deviation}, schedule_of()

    @functools.partial(jax.jit, static_argnums=1)
    def estimate(keys, probabilities):
        def one(key):
            return divergences.nelbo_terms(
                gaussian_denoiser,
                params,
                schedule,
                key,
                x_0=x_0,
                cond=None,
                draws=2,
                probabilities=None if probabilities is None else jnp.array(probabilities),
            )

        return jax.vmap(one)(keys)

    for probabilities in (None, (1 / STEPS,) * STEPS)[: 2 if dimensions == 2 else 1]:
        terms = estimate(jax.random.split(jax.random.key(0), 8000), probabilities)
        values = np.asarray(terms, np.float64)  # [3 terms, keys, batch]
        stderr = values.std(axis=1) / np.sqrt(values.shape[1])
        assert (np.abs(values.mean(axis=1).T - exact) < 4.5 * stderr.T + 1e-4).all()
        assert (stderr.T < 0.03 * exact.sum(axis=1, keepdims=True)).all()
        np.testing.assert_allclose(terms.total, values.sum(axis=0), rtol=1e-4, atol=1e-4)
    assert (exact.sum(axis=1) > -log_p).all()
    assert (exact.sum(axis=1) + log_p < dimensions).all()  # and by less than a nat a dimension


def test_the_same_key_compares_two_models_on_the_same_noise():
    def constant(params, x_t, t, cond):
        return params * jnp.ones_like(x_t)

    x_0, key = jnp.zeros((2, 3)), jax.random.key(0)

    schedule = schedule_of()

    @jax.jit
    def terms(params):
        return divergences.nelbo_terms(constant, params, schedule, key, x_0=x_0, cond=None)

    first, again, other = terms(0.3), terms(0.3), terms(0.4)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    # With independent noise the two would differ by their spread, of order one and more.
    assert (np.abs(first.diffusion - other.diffusion) < 0.5 * first.diffusion).all()
    np.testing.assert_array_equal(first.prior, other.prior)


@pytest.mark.slow
def test_nelbo_of_the_clipped_chain_at_zero_terminal_snr():
    """x̂_0 far out of range: KL of the posterior to the sampler's own step, summed over t."""
    schedule = schedules.NoiseSchedule(
        log_snr=jnp.log(jnp.array([90.0, 8.0, 1.5, 0.0])),
        prediction_type="v_prediction",
        clip_range=1.0,
    )
    x_0, guess = jnp.full((2, 3), 0.2), 7.0

    def far(params, x_t, t, cond):
        alpha, sigma = schedules.alpha_sigma(schedule.log_snr[t], x_t)
        return (alpha * x_t - guess) / sigma  # the v whose x̂_0 is `guess`

    expected = 0.0
    for t in (1, 2, 3):
        ab_t, ab_s = (float(schedule.alphas_cumprod[i]) for i in (t, t - 1))
        step = ab_t / ab_s  # α_t of Ho et al.
        variance = (1 - step) * (1 - ab_s) / (1 - ab_t)
        x_t = jnp.full((1, 1), 0.4)
        mean = samplers.ddpm_step(
            far(None, x_t, jnp.array([t]), None),
            x_t=x_t,
            noise=jnp.zeros((1, 1)),
            log_snr_t=schedule.log_snr[t],
            log_snr_s=schedule.log_snr[t - 1],
            schedule=schedule,
        )
        posterior = (np.sqrt(ab_s) * (1 - step) * 0.2 + np.sqrt(step) * (1 - ab_s) * 0.4) / (
            1 - ab_t
        )
        expected += 3 * (posterior - float(mean[0, 0])) ** 2 / (2 * variance)
    snr = np.array([90.0, 8.0, 1.5, 0.0])
    drop = np.concatenate([[0.0], snr[:-1] - snr[1:]])
    terms = divergences.nelbo_terms(
        far,
        None,
        schedule,
        jax.random.key(0),
        x_0=x_0,
        cond=None,
        probabilities=jnp.asarray(drop / drop.sum(), jnp.float32),  # leaves no variance
    )
    np.testing.assert_allclose(terms.diffusion, expected, rtol=1e-4)
    plain = divergences.nelbo_terms(far, None, schedule, jax.random.key(0), x_0=x_0, cond=None)
    assert np.isfinite(plain.total).all()
