import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_unlearn import mixtures, samplers, schedules


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


MEANS = np.array([[-2.0, 0.0], [2.0, 0.5], [0.0, 3.0]])
VARIANCES = np.array([0.49, 0.2, 1.3])
WEIGHTS = np.array([0.5, 0.2, 0.3])
POINTS = np.random.default_rng(0).normal(size=(7, 2)) * 2
LOG_SNRS = np.array([-6.0, -2.0, 0.0, 1.0, 3.0, 8.0, np.inf])


@pytest.fixture(name="mixture")
def _mixture():
    return mixtures.gaussian_mixture(MEANS, VARIANCES, WEIGHTS)


def alphas_cumprod(log_snr):
    return 1 / (1 + np.exp(-log_snr))


def density(x, alpha_cumprod):
    """The law of x_t by scipy."""
    return sum(
        w
        * stats.multivariate_normal(
            np.sqrt(alpha_cumprod) * m, alpha_cumprod * v + 1 - alpha_cumprod
        ).pdf(x)
        for w, m, v in zip(WEIGHTS, MEANS, VARIANCES, strict=True)
    )


def test_log_density_with_one_noise_level_an_example(mixture):
    found = mixtures.log_density(mixture, POINTS, LOG_SNRS)
    expected = [
        np.log(density(x, alphas_cumprod(s))) for x, s in zip(POINTS, LOG_SNRS, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    clean = mixtures.log_density(mixture, POINTS)
    np.testing.assert_allclose(clean, np.log(density(POINTS, 1.0)), rtol=1e-12)
    noised = mixtures.log_density(mixtures.diffused(mixture, -2.0), POINTS)
    np.testing.assert_allclose(noised, np.log(density(POINTS, alphas_cumprod(-2.0))), rtol=1e-12)


@pytest.mark.slow
def test_score_is_the_gradient_of_the_log_density(mixture):
    def single(x, log_snr):
        return mixtures.log_density(mixture, x[None], log_snr)[0]

    expected = jax.vmap(jax.grad(single))(jnp.asarray(POINTS), jnp.asarray(LOG_SNRS))
    np.testing.assert_allclose(mixtures.score(mixture, POINTS, LOG_SNRS), expected, rtol=1e-9)


@pytest.mark.parametrize("log_snr", [-3.0, 0.0, 2.5])
def test_predictions_are_conditional_means(mixture, log_snr):
    """E[x_0 | x_t] by quadrature over x_0, which does not use that the mixture is Gaussian."""
    cut = mixtures.grid([(-11.0, 11.0)] * 2, 400)
    x_0 = np.asarray(cut.x)
    prior = density(x_0, 1.0)
    ab = alphas_cumprod(log_snr)
    found = mixtures.predictions(mixture, POINTS, log_snr)
    for i, x_t in enumerate(POINTS):
        kernel = np.exp(-((x_t - np.sqrt(ab) * x_0) ** 2).sum(axis=1) / (2 * (1 - ab)))
        mean = (kernel * prior) @ x_0 / (kernel @ prior)
        np.testing.assert_allclose(found.x_0[i], mean, atol=1e-6)
        epsilon = (x_t - np.sqrt(ab) * mean) / np.sqrt(1 - ab)
        np.testing.assert_allclose(found.epsilon[i], epsilon, atol=1e-5)
    converted = schedules.convert(
        found.epsilon, x_t=POINTS, log_snr=jnp.asarray(log_snr), prediction_type="epsilon"
    )
    for ours, theirs in zip(found, converted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("event", [(3,), (2, 2, 1)])
def test_a_sampler_with_the_denoiser_gives_the_mixture(prediction_type, event):
    """Deterministic DDIM from noise: shares of the components, means and variances."""
    centre = np.linspace(1.0, 1.5, int(np.prod(event))).reshape(event)
    q = mixtures.gaussian_mixture([centre, -centre], [0.04, 0.09], [0.7, 0.3])
    schedule = schedules.noise_schedule(
        num_steps=200, beta_start=1e-4, beta_end=0.1, prediction_type=prediction_type
    )
    start = jax.random.normal(jax.random.key(0), (3000, *event))
    predict = mixtures.denoiser(q, schedule)
    x_0 = samplers.sample(predict, schedule, jax.random.key(1), start, steps=200).x_0
    share = mixtures.responsibilities(q, x_0)
    np.testing.assert_allclose(share.mean(axis=0), [0.7, 0.3], atol=0.03)
    first = np.asarray(x_0)[np.asarray(share[:, 0]) > 0.5]
    np.testing.assert_allclose(first.mean(axis=0), centre, atol=0.03)
    np.testing.assert_allclose(first.var(axis=0), 0.04, rtol=0.15)


def test_samples_have_the_moments_of_the_mixture(mixture):
    x = np.asarray(mixtures.sample(mixture, jax.random.key(0), 200_000))
    mean = WEIGHTS @ MEANS
    covariance = sum(
        w * (v * np.eye(2) + np.outer(m - mean, m - mean))
        for w, m, v in zip(WEIGHTS, MEANS, VARIANCES, strict=True)
    )
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.05)
    shares = mixtures.responsibilities(mixture, x).mean(axis=0)
    np.testing.assert_allclose(shares, WEIGHTS, atol=0.005)


def test_subtraction_and_selection(mixture):
    multipliers = np.array([0.4, 0.0, 0.3])
    found = mixtures.log_density(mixtures.subtract(mixture, multipliers), POINTS)
    parts = [np.exp(mixtures.log_density(mixtures.select(mixture, k), POINTS)) for k in range(3)]
    expected = density(POINTS, 1.0) - sum(
        weight * part for weight, part in zip(multipliers, parts, strict=True)
    )
    np.testing.assert_allclose(np.exp(found), expected / 0.3, rtol=1e-10)
    pair = mixtures.select(mixture, [0, 2])
    np.testing.assert_allclose(
        np.exp(mixtures.log_density(pair, POINTS)), (0.5 * parts[0] + 0.3 * parts[2]) / 0.8
    )


@pytest.mark.parametrize("dimensions", [1, 2])
def test_quadrature(dimensions):
    q = mixtures.gaussian_mixture([[0.5] * dimensions], 0.8)
    cut = mixtures.grid([(-6.0, 7.0)] * dimensions, 150)
    assert cut.x.shape == (150**dimensions, dimensions)
    masses = np.exp(mixtures.log_masses(q, cut))
    raw = np.exp(mixtures.log_density(q, cut.x) + cut.log_volume)
    np.testing.assert_allclose(raw.sum(), 1, atol=1e-8)
    np.testing.assert_allclose(masses @ cut.x, 0.5, atol=1e-8)
    np.testing.assert_allclose(masses @ np.square(cut.x - 0.5), 0.8, atol=1e-6)
    entropy = -masses @ np.log(raw) + cut.log_volume
    np.testing.assert_allclose(
        entropy, dimensions * 0.5 * np.log(2 * np.pi * np.e * 0.8), atol=1e-6
    )


@pytest.mark.slow
def test_density_ratio_is_the_conditional_mean_of_the_clean_ratio(mixture):
    schedule = schedules.noise_schedule(num_steps=50, beta_end=0.2)
    part = mixtures.select(mixture, 0)
    cut = mixtures.grid([(-8.0, 8.0)] * 2, 400)
    prior = density(np.asarray(cut.x), 1.0)
    clean = np.exp(mixtures.log_density(part, cut.x) - mixtures.log_density(mixture, cut.x))
    found = mixtures.density_ratio(part, mixture, schedule)(POINTS, jnp.full(7, 20))
    ab = float(schedule.alphas_cumprod[20])
    for ratio, x_t in zip(found, POINTS, strict=True):
        kernel = np.exp(-((x_t - np.sqrt(ab) * cut.x) ** 2).sum(axis=1) / (2 * (1 - ab)))
        np.testing.assert_allclose(ratio, (kernel * prior) @ clean / (kernel @ prior), rtol=1e-4)


def test_mistakes_are_refused(mixture):
    with pytest.raises(ValueError, match="means must be"):
        mixtures.gaussian_mixture([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="for 2 components"):
        mixtures.gaussian_mixture([[1.0], [2.0]], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="must be positive"):
        mixtures.gaussian_mixture([[1.0], [2.0]], [1.0, 0.0])
    with pytest.raises(ValueError, match="must lie between"):
        mixtures.subtract(mixture, [0.6, 0.0, 0.0])
    with pytest.raises(ValueError, match="expected multipliers"):
        mixtures.subtract(mixture, [0.1])
    with pytest.raises(ValueError, match="lower < upper"):
        mixtures.grid([(1.0, 1.0)], 10)
    with pytest.raises(ValueError, match="too many"):
        mixtures.grid([(0.0, 1.0)] * 3, 401)
