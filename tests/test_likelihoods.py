import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jax_unlearn import divergences, likelihoods, schedules

LINEAR = schedules.noise_schedule()
COSINE = schedules.noise_schedule("squaredcos_cap_v2")
SCALED = schedules.noise_schedule("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHORT = schedules.noise_schedule(trained_betas=np.linspace(0.02, 0.6, 9))


def mixtures(log_weights, means, deviations):
    """Concepts c, each a mixture of axis-aligned Gaussians k in d dimensions: [c, k(, d)]."""
    parts = {"log_weights": log_weights, "means": means, "deviations": deviations}
    return {name: jnp.float32(value) for name, value in parts.items()}


def gaussians(means, deviations):
    """Concepts [c, d], each one Gaussian."""
    means, deviations = np.broadcast_arrays(means, deviations)
    return mixtures(np.zeros((len(means), 1)), means[:, None], deviations[:, None])


def log_density(params, concept, x, alpha_cumprod):
    """log q_t of one concept at x [batch, d], in float64."""
    log_weights, means, deviations = (
        np.float64(params[name][concept]) for name in ("log_weights", "means", "deviations")
    )
    variance = alpha_cumprod * deviations**2 + 1 - alpha_cumprod
    center = np.sqrt(alpha_cumprod) * means
    terms = stats.norm.logpdf(np.float64(x)[:, None], center, np.sqrt(variance)).sum(axis=-1)
    weights = log_weights - special.logsumexp(log_weights)
    return special.logsumexp(terms + weights, axis=1)


def epsilon(log_weights, means, deviations, x_t, alpha_cumprod, numpy=jnp):
    """E[ε | x_t] = −σ ∇ log q_t for arguments [batch, k(, d)], x_t [batch, d]."""
    ab = alpha_cumprod[:, None, None]
    variance = ab * deviations**2 + 1 - ab
    offset = x_t[:, None] - numpy.sqrt(ab) * means
    log_parts = log_weights - 0.5 * (offset**2 / variance + numpy.log(variance)).sum(axis=-1)
    parts = numpy.exp(log_parts - log_parts.max(axis=1, keepdims=True))
    parts = parts / parts.sum(axis=1, keepdims=True)
    return numpy.sqrt(1 - alpha_cumprod)[:, None] * (parts[..., None] * offset / variance).sum(1)


def denoiser_of(schedule):
    """The exact denoiser of `mixtures`, conditioned on the label of the concept."""

    def apply(params, x_t, t, cond):
        assert jnp.issubdtype(t.dtype, jnp.integer)
        log_snr = schedule.log_snr[t]
        fields = (params[name][cond] for name in ("log_weights", "means", "deviations"))
        flat = x_t.reshape(len(x_t), -1)
        exact = epsilon(*fields, flat, jax.nn.sigmoid(log_snr)).reshape(x_t.shape)
        exact = schedules.convert(
            exact, x_t=x_t, log_snr=log_snr, prediction_type="epsilon"
        )._asdict()
        names = {"sample": "x_0", "v_prediction": "velocity", "epsilon": "epsilon"}
        return exact[names[schedule.prediction_type]]

    return apply


def flow_of(params, schedule, concept=0):
    """The same as a function (x_t, t) for one concept."""
    apply = denoiser_of(schedule)
    return lambda x_t, t: apply(params, x_t, t, jnp.full(x_t.shape[:1], concept))


def alphas(schedule):
    return special.expit(np.float64(schedule.log_snr))


def gaussian_flow_log_p(x, means, deviations, first, last):
    """log of N(0, 1) at `last` moved by the affine flow of Gaussian data, summed, in float64.

    The flow keeps (x − √ᾱ m)/√(ᾱ s² + 1 − ᾱ), and the model differs from the data in that it
    begins at N(0, 1) whatever the data's law at `last` is.
    """
    scales = [np.sqrt(ab * deviations**2 + 1 - ab) for ab in (first, last)]
    end = np.sqrt(last) * means + (x - np.sqrt(first) * means) * scales[1] / scales[0]
    return (stats.norm.logpdf(end) + np.log(scales[1] / scales[0])).sum(axis=-1)


def bits(nats, dimensions):
    return np.abs(np.asarray(nats, np.float64)).max() / (dimensions * np.log(2))


def spread(means, deviations, schedule, scores):
    first = alphas(schedule)[0]
    deviation = np.sqrt(first * deviations**2 + 1 - first)
    return jnp.float32(np.sqrt(first) * means + np.multiply.outer(scores, deviation))


@pytest.mark.parametrize(
    ("schedule", "means", "deviations"),
    [
        (LINEAR, [0.4], [0.3]),
        (COSINE, [-0.5, -0.5], [1.0, 1.0]),
        (LINEAR, [0.4, -0.7, 0.2], [0.1, 0.5, 1.5]),
        (COSINE, [0.4, -0.7, 0.2], [0.05, 0.5, 1.5]),
        (SCALED, [0.4, -0.7, 0.2], [0.1, 0.5, 1.5]),
    ],
)
def test_log_likelihood_of_gaussians(schedule, means, deviations):
    """Within 1e-3 bits a dimension in 30 steps, out to two standard deviations."""
    means, deviations = np.array(means), np.array(deviations)
    x = spread(means, deviations, schedule, [-2.0, -0.7, 0.0, 1.1, 2.0])
    predict = flow_of(gaussians(means[None], deviations[None]), schedule)
    got = jax.jit(lambda x: likelihoods.log_likelihood(predict, schedule, x, steps=30))(x)
    ab = alphas(schedule)
    last = np.flatnonzero(ab >= 1 / 200**2)[-1]  # earlier than T − 1 for the cosine schedule
    assert (last < 999) == (schedule is COSINE)
    exact = gaussian_flow_log_p(np.float64(x), means, deviations, ab[0], ab[last])
    assert got.value.shape == got.stderr.shape == (5,)
    assert bits(got.value - exact, len(means)) < 1e-3
    assert (got.stderr == 0).all()


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_log_likelihood_of_other_predictions(prediction_type):
    """With a zero terminal SNR, where ε says nothing and the flow has no bias at the end."""
    schedule = schedules.noise_schedule(
        prediction_type=prediction_type, rescale_betas_zero_snr=prediction_type == "v_prediction"
    )
    means, deviations = np.array([0.4, -0.3]), np.array([0.5, 0.2])
    x = spread(means, deviations, schedule, [-1.0, 0.5, 2.0])

    def predict(x_t, t):
        ab = jax.nn.sigmoid(schedule.log_snr[t])[:, None]
        total = ab * deviations**2 + 1 - ab
        offset = x_t - jnp.sqrt(ab) * means
        x_0 = means + jnp.sqrt(ab) * deviations**2 / total * offset
        velocity = jnp.sqrt(ab * (1 - ab)) * (1 - deviations**2) / total * offset
        velocity = velocity - jnp.sqrt(1 - ab) * means
        return jnp.float32(velocity if prediction_type == "v_prediction" else x_0)

    got = likelihoods.log_likelihood(predict, schedule, x, steps=30).value
    ab = alphas(schedule)
    exact = gaussian_flow_log_p(np.float64(x), means, deviations, ab[0], ab[-1])
    assert bits(got - exact, 2) < 1e-3


def test_prior_at_an_earlier_step():
    means, deviations = np.array([0.4]), np.array([0.5])
    x = spread(means, deviations, COSINE, [-1.0, 0.5, 2.0])
    predict = flow_of(gaussians(means[None], deviations[None]), COSINE)
    got = likelihoods.log_likelihood(predict, COSINE, x, steps=30, last=900).value
    ab = alphas(COSINE)
    exact = gaussian_flow_log_p(np.float64(x), means, deviations, ab[0], ab[900])
    assert bits(got - exact, 1) < 1e-3


def test_solver_is_of_fourth_order():
    """Halving the steps of a smooth flow divides the error by about 16; in float64."""
    with jax.enable_x64(True):
        means, deviations = np.array([0.4]), np.array([1.5])
        schedule = schedules.NoiseSchedule(jnp.linspace(8.0, -8.0, 4001))
        assert schedule.log_snr.dtype == jnp.float64
        x = jnp.asarray(means + np.multiply.outer(np.array([-2.0, 1.0]), deviations))
        ab = alphas(schedule)
        exact = gaussian_flow_log_p(np.float64(x), means, deviations, ab[0], ab[-1])

        def predict(x_t, t):
            a = jnp.asarray(ab)[t][:, None]
            total = a * deviations**2 + 1 - a
            return jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * means) / total

        errors = [
            np.abs(likelihoods.log_likelihood(predict, schedule, x, steps=k).value - exact).max()
            for k in (10, 20)
        ]
    assert 10 < errors[0] / errors[1] < 26


MIXTURE_1D = mixtures(np.log([[0.3, 0.7]]), [[[-0.8], [0.6]]], [[[0.15], [0.4]]])


def test_log_likelihood_of_a_mixture_by_its_quantiles():
    """In 1-D the flow maps quantiles of q_0 to those of q_T: p(x) = N(y) q_0(x)/q_T(y)."""
    schedule, ab = LINEAR, alphas(LINEAR)
    weights, means, deviations = np.array([0.3, 0.7]), np.array([-0.8, 0.6]), np.array([0.15, 0.4])

    def cdf(x, a):
        return stats.norm.cdf(x, np.sqrt(a) * means, np.sqrt(a * deviations**2 + 1 - a)) @ weights

    x = np.linspace(-1.1, 1.5, 12)
    y = []
    for point in x:
        low, high = -8.0, 8.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if cdf(middle, ab[-1]) < cdf(point, ab[0]) else (low, middle)
        y.append(low)
    x, y = x[:, None], np.array(y)[:, None]
    exact = (
        stats.norm.logpdf(y[:, 0])
        + log_density(MIXTURE_1D, 0, x, ab[0])
        - log_density(MIXTURE_1D, 0, y, ab[-1])
    )
    predict = flow_of(MIXTURE_1D, schedule)
    got = likelihoods.log_likelihood(predict, schedule, x, steps=30).value
    assert bits(got - exact, 1) < 1e-3


def test_density_integrates_to_one():
    x = jnp.linspace(-2.5, 3.0, 1101)[:, None]
    log_p = likelihoods.log_likelihood(flow_of(MIXTURE_1D, LINEAR), LINEAR, x, steps=30).value
    mass = np.trapezoid(np.exp(np.float64(log_p)), np.float64(x[:, 0]))
    assert mass == pytest.approx(1.0, abs=3e-4)


MIXTURE_2D = mixtures(
    np.log([[0.2, 0.5, 0.3]]),
    [[[-0.8, 0.2], [0.6, 0.5], [0.1, -0.6]]],
    [[[0.3, 0.15], [0.2, 0.4], [0.5, 0.2]]],
)
POINTS_2D = jnp.array([[-0.9, 0.3], [0.5, 0.1], [0.0, 0.0], [0.3, -0.7], [-0.2, 0.9]])


@pytest.mark.slow
def test_log_likelihood_of_a_mixture_in_two_dimensions():
    """ᾱ_{T−1} = 2e-9: the model's law is the data's noised to t = 0. Its gradient, the score."""
    ab = alphas(COSINE)[0]
    predict = flow_of(MIXTURE_2D, COSINE)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def log_p(x):
        value = likelihoods.log_likelihood(predict, COSINE, x, steps=40, last=999).value
        return value.sum(), value

    (_, got), score = log_p(POINTS_2D)
    assert bits(got - log_density(MIXTURE_2D, 0, POINTS_2D, ab), 2) < 1e-3
    fields = [np.float64(MIXTURE_2D[k]) for k in ("log_weights", "means", "deviations")]
    exact = epsilon(*fields, np.float64(POINTS_2D), np.full(5, ab), np) / -np.sqrt(1 - ab)
    np.testing.assert_allclose(score, exact, rtol=0.01, atol=0.02)


@pytest.mark.slow
def test_gradient_in_parameters():
    """d log p/dm of a Gaussian, through the solver, against the closed form's differences."""
    x = jnp.array([[0.9], [-0.2]])
    ab = alphas(LINEAR)

    def exact(mean):
        return gaussian_flow_log_p(np.float64(x), np.array([mean]), np.array([0.5]), ab[0], ab[-1])

    params = gaussians([[0.4]], [[0.5]])

    def of_means(means):
        predict = flow_of({**params, "means": means}, LINEAR)
        return likelihoods.log_likelihood(predict, LINEAR, x, steps=20).value

    got = jax.jit(jax.jacrev(of_means))(params["means"]).reshape(2)
    np.testing.assert_allclose(got, (exact(0.4 + 1e-5) - exact(0.4 - 1e-5)) / 2e-5, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_error_honest(divergence):
    predict = flow_of(MIXTURE_2D, LINEAR)
    exact = jax.jit(lambda x: likelihoods.log_likelihood(predict, LINEAR, x, steps=15).value)(
        POINTS_2D
    )

    @jax.jit
    @jax.vmap
    def estimate(key):
        return likelihoods.log_likelihood(
            predict, LINEAR, POINTS_2D, key, steps=15, divergence=divergence, probes=4
        )

    got = estimate(jax.random.split(jax.random.key(0), 600))
    deviation = got.value.std(axis=0, ddof=1)
    assert (np.abs(got.value.mean(axis=0) - exact) < 4.5 * deviation / np.sqrt(600)).all()
    assert (deviation > 0.01).all()
    np.testing.assert_allclose(np.sqrt((got.stderr**2).mean(axis=0)), deviation, rtol=0.15)


@pytest.mark.slow
def test_rademacher_probes_are_exact_where_dimensions_do_not_interact():
    predict = flow_of(gaussians([[0.4, -0.7]], [[0.3, 0.5]]), LINEAR)
    exact = jax.jit(lambda x: likelihoods.log_likelihood(predict, LINEAR, x, steps=15).value)(
        POINTS_2D
    )
    got = likelihoods.log_likelihood(
        predict, LINEAR, POINTS_2D, jax.random.key(0), steps=15, divergence="rademacher", probes=3
    )
    np.testing.assert_allclose(got.value, exact, atol=2e-5)
    np.testing.assert_allclose(got.stderr, 0.0, atol=1e-5)


@pytest.mark.slow
def test_images_and_their_batch():
    """The shape of an image does not matter, nor who else is in the batch."""
    predict = flow_of(MIXTURE_2D, LINEAR)

    @jax.jit
    def log_p(x):
        return likelihoods.log_likelihood(predict, LINEAR, x, steps=10).value

    flat = log_p(POINTS_2D)
    np.testing.assert_allclose(log_p(POINTS_2D.reshape(5, 1, 2, 1)), flat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_p(POINTS_2D[2:3])[0], flat[2], rtol=1e-5, atol=1e-5)


def test_log_ratio():
    means, deviations = np.array([[0.4, -0.2], [0.1, 0.3]]), np.array([[0.5, 0.8], [0.4, 0.9]])
    params, ab = gaussians(means, deviations), alphas(LINEAR)
    q, q_i = (flow_of(params, LINEAR, c) for c in (0, 1))
    x = POINTS_2D
    exact = [
        gaussian_flow_log_p(np.float64(x), m, s, ab[0], ab[-1])
        for m, s in zip(means, deviations, strict=True)
    ]
    got = jax.jit(lambda x: likelihoods.log_ratio(q, q_i, LINEAR, x, steps=30))(x)
    assert bits(got.value - (exact[0] - exact[1]), 2) < 1e-3
    assert (got.stderr == 0).all()


@pytest.mark.slow
def test_log_ratio_shares_its_probes():
    """Two near denoisers: the noise of the difference is far below that of either."""
    near = {**MIXTURE_2D, "means": MIXTURE_2D["means"] + jnp.array([0.03, -0.02])}
    q, q_i = flow_of(MIXTURE_2D, LINEAR), flow_of(near, LINEAR)
    options = {"steps": 15, "divergence": "gaussian", "probes": 64}
    key = jax.random.key(1)

    @jax.jit
    def compare(x):
        return (
            likelihoods.log_ratio(q, q_i, LINEAR, x, key, **options),
            likelihoods.log_ratio(q, q_i, LINEAR, x, steps=15).value,
            likelihoods.log_likelihood(q, LINEAR, x, key, **options).stderr,
        )

    ratio, exact, alone = compare(POINTS_2D)
    assert (ratio.stderr < 0.5 * alone).all()
    assert np.sqrt(np.mean(ratio.stderr**2) / np.mean(alone**2)) < 0.25
    assert (np.abs(ratio.value - exact) < 4.5 * ratio.stderr + 1e-4).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must be in \[1, 4\], not 0"),
        ({"steps": 5}, r"steps must be in \[1, 4\], not 5"),
        ({"steps": 4, "last": 6}, r"steps must be in \[1, 3\], not 4"),
        ({"steps": 1, "last": 9}, r"last must be in \[2, 8\], not 9"),
        ({"steps": 1, "divergence": "skilling"}, "'skilling' is not one of"),
        ({"steps": 1, "divergence": "gaussian"}, "pass a key"),
        ({"steps": 1, "divergence": "gaussian", "probes": 1}, "at least 2 probes, not 1"),
    ],
)
def test_log_likelihood_refuses(options, message):
    predict = flow_of(MIXTURE_2D, SHORT)
    with pytest.raises(ValueError, match=message):
        likelihoods.log_likelihood(predict, SHORT, POINTS_2D, **options)
    with pytest.raises(ValueError, match=message):
        likelihoods.log_ratio(predict, predict, SHORT, POINTS_2D, **options)


# The diffusion classifier.

CONCEPTS_1D = mixtures(
    np.log([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]),
    [[[-0.8], [0.0]], [[0.2], [0.9]], [[0.4], [-0.6]]],
    [[[0.3], [0.2]], [[0.4], [0.5]], [[0.8], [0.3]]],
)


def exact_energies(params, schedule, x_0, weights):
    """Σ_t w_t E‖ε − ε_c‖² of 1-D concepts -> [batch, concepts], by quadrature in float64."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(120)
    mass = mass / mass.sum()
    log_weights, means, deviations = (
        np.float64(params[k]) for k in ("log_weights", "means", "deviations")
    )
    energies = np.zeros((len(x_0), len(means)))
    for w, ab in zip(np.float64(weights), alphas(schedule), strict=True):
        for row, x in enumerate(np.float64(x_0)):
            x_t = np.sqrt(ab) * x + np.sqrt(1 - ab) * nodes[:, None]
            for c in range(len(means)):
                fields = (log_weights[c][None], means[c][None], deviations[c][None])
                got = epsilon(*fields, x_t, np.full(len(nodes), ab), np)
                energies[row, c] += w * mass @ (nodes - got[:, 0]) ** 2
    return energies


@pytest.mark.parametrize("given", [False, True])
def test_energies_are_unbiased(given):
    x_0 = jnp.array([[-0.7], [0.1], [1.2]])
    weights = probabilities = None
    if given:
        weights, probabilities = np.linspace(1.0, 0.1, 9), np.full(9, 1 / 9)
    apply = denoiser_of(SHORT)

    @jax.jit
    @jax.vmap
    def estimate(key):
        return likelihoods.concept_energies(
            apply,
            CONCEPTS_1D,
            SHORT,
            key,
            x_0=x_0,
            concepts=jnp.arange(3),
            draws=4,
            weights=weights,
            probabilities=probabilities,
        )

    values = np.float64(estimate(jax.random.split(jax.random.key(0), 6000))).mean(axis=1)
    stderr = values.std(axis=0) / np.sqrt(6000)
    stated = divergences.path_kl_weights(SHORT) if weights is None else weights
    exact = exact_energies(CONCEPTS_1D, SHORT, x_0, stated)
    assert (np.abs(values.mean(axis=0) - exact) < 4.5 * stderr).all()
    assert (stderr < 0.02 * exact).all()


def chain_log_p(x, mean, deviation, betas):
    """log p(x) of the ancestral chain of Gaussian data with posterior variances, in float64."""
    ab = np.cumprod(1 - betas)
    center, variance = 0.0, 1.0
    for t in range(len(betas) - 1, -1, -1):
        before = ab[t - 1] if t else 1.0
        v = betas[t] * (1 - before) / (1 - ab[t])
        total = ab[t] * deviation**2 + 1 - ab[t]
        # x̂_0 = m + gain (x_t − √ᾱ m); x_{t−1} = pull x̂_0 + keep x_t + √v z.
        gain = np.sqrt(ab[t]) * deviation**2 / total
        pull = np.sqrt(before) * betas[t] / (1 - ab[t])
        keep = np.sqrt(1 - betas[t]) * (1 - before) / (1 - ab[t])
        slope = pull * gain + keep
        center = slope * center + pull * (mean - gain * np.sqrt(ab[t]) * mean)
        variance = slope**2 * variance + (v if t else betas[1] * (1 - ab[0]) / (1 - ab[1]))
    return stats.norm.logpdf(x, center, np.sqrt(variance))


def two_gaussians():
    """Points, and means, deviations and parameters of two concepts."""
    means, deviations = np.array([-0.4, 0.3]), np.array([0.3, 0.6])
    params = gaussians(means[:, None], deviations[:, None])
    return np.array([[-0.7], [0.1], [1.2]]), means, deviations, params


def test_energies_bound_the_chains_log_likelihood():
    """E_c + prior KL + ½ log(2π v_1) ≥ −log p_c(x): the gap closes between concepts alone."""
    x_0, means, deviations, params = two_gaussians()
    differences = []
    for steps in (100, 1000):
        betas = np.linspace(0.1, 20.0, steps) / steps
        schedule = schedules.noise_schedule(trained_betas=betas)
        energies = exact_energies(params, schedule, x_0, divergences.path_kl_weights(schedule))
        ab = np.cumprod(1 - betas)
        variance = betas[1] * (1 - ab[0]) / (1 - ab[1])
        prior = np.float64(divergences.prior_kl(schedule, jnp.float32(x_0)))[:, None]
        bound = energies + prior + 0.5 * np.log(2 * np.pi * variance)
        pairs = zip(means, deviations, strict=True)
        gap = bound + np.stack([chain_log_p(x_0[:, 0], m, s, betas) for m, s in pairs], axis=1)
        assert (gap > 0).all()
        differences.append(np.abs(gap[:, 0] - gap[:, 1]))
    assert (gap > 0.5).all()  # of the first steps, whatever their number
    assert (differences[1] < 0.3 * differences[0]).all()
    assert differences[1].max() < 0.03


@pytest.mark.parametrize("noise", [0.3, 0.7])
def test_noised_weights_are_those_of_the_noised_image(noise):
    """Between concepts, E_c is the mean of −log q_c(x_s) over x_s ∼ q(x_s|x_0), for many steps."""
    x_0, means, deviations, params = two_gaussians()
    off = []
    for steps in (100, 1000):
        betas = np.linspace(0.1, 20.0, steps) / steps
        schedule = schedules.noise_schedule(trained_betas=betas)
        weights = likelihoods.noised_weights(schedule, noise)
        energies = exact_energies(params, schedule, x_0, weights)
        ab = np.cumprod(1 - betas)
        s = np.flatnonzero(np.sqrt(1 - ab) < noise)[-1]
        assert (np.asarray(weights) > 0).sum() == steps - s - 1
        variance = ab[s] * deviations**2 + 1 - ab[s]
        squares = ab[s] * (x_0 - means) ** 2 + 1 - ab[s]
        exact = 0.5 * (squares / variance + np.log(variance))
        got, wanted = energies[:, 1] - energies[:, 0], exact[:, 1] - exact[:, 0]
        off.append(np.abs(got - wanted).max() / np.abs(wanted).max())
    assert off[1] < 0.25 * off[0]
    assert off[1] < 0.02


def test_noised_weights_leave_nothing_or_not_everything_out():
    all_of_them = likelihoods.noised_weights(SHORT, 0.0)
    np.testing.assert_array_equal(all_of_them, divergences.path_kl_weights(SHORT))
    with pytest.raises(
        ValueError, match=r"no step has noise of 1.0 or more: the last one's is 0\."
    ):
        likelihoods.noised_weights(SHORT, 1.0)
    with pytest.raises(ValueError, match="infinite at its zero terminal SNR"):
        likelihoods.noised_weights(schedules.noise_schedule(rescale_betas_zero_snr=True), 0.5)


CONCEPTS_2D = gaussians(
    [[-0.5, 0.2], [0.4, 0.5], [0.2, -0.5]], [[0.5, 0.4], [0.4, 0.6], [0.6, 0.5]]
)
LOG_PRIOR = np.log([0.2, 0.5, 0.3])


def classify(key=None, x=POINTS_2D, draws=64, schedule=LINEAR, params=CONCEPTS_2D, **options):
    return likelihoods.diffusion_classifier(
        denoiser_of(schedule),
        params,
        schedule,
        jax.random.key(0) if key is None else key,
        x_0=x,
        concepts=jnp.arange(3),
        draws=draws,
        **{"log_prior": LOG_PRIOR, **options},
    )


@pytest.mark.slow
def test_classifier_of_a_mixture_is_bayes_rule():
    """Exact denoisers of 1000 steps: the gaps of concepts differ by hundredths of a nat."""
    got = jax.jit(functools.partial(classify, draws=20_000))()
    joint = np.stack([log_density(CONCEPTS_2D, c, POINTS_2D, 1.0) for c in range(3)], axis=1)
    exact = special.log_softmax(joint + LOG_PRIOR, axis=1)
    assert got.stderr.max() < 0.08
    assert (np.abs(got.value - exact) < 4 * got.stderr + 0.05).all()
    assert np.abs(np.exp(got.value) - np.exp(exact)).max() < 0.02
    np.testing.assert_allclose(np.exp(got.value).sum(axis=1), 1.0, rtol=1e-5)
    # Without the prior it is another posterior, by Bayes' rule again.
    flat = jax.jit(functools.partial(classify, log_prior=None, draws=20_000))()
    np.testing.assert_allclose(
        jax.nn.log_softmax(flat.value + jnp.float32(LOG_PRIOR)), got.value, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_log_odds_against_a_base_and_their_gradient():
    """The base is the mixture of all concepts; the gradient is the difference of two scores."""
    every = {k: np.asarray(v) for k, v in CONCEPTS_2D.items()}
    params = mixtures(
        np.concatenate([np.where(np.eye(3), 0.0, -np.inf), LOG_PRIOR[None]]),
        np.broadcast_to(every["means"][:, 0], (4, 3, 2)),
        np.broadcast_to(every["deviations"][:, 0], (4, 3, 2)),
    )
    apply = denoiser_of(LINEAR)

    def odds(x):
        return likelihoods.log_odds(
            apply,
            params,
            LINEAR,
            jax.random.key(1),
            x_0=x,
            concepts=jnp.arange(2),
            base=3,
            draws=20_000,
        )

    got = jax.jit(odds)(POINTS_2D)
    densities = np.stack([log_density(params, c, POINTS_2D, 1.0) for c in (0, 1, 3)], axis=1)
    assert got.stderr.max() < 0.08
    exact = densities[:, :2] - densities[:, 2:]
    assert (np.abs(got.value - exact) < 4 * got.stderr + 0.05).all()

    slopes = jax.jit(jax.grad(lambda x: odds(x).value[:, 0].sum()))(POINTS_2D)
    fields = [np.float64(params[k]) for k in ("log_weights", "means", "deviations")]
    scores = [
        -epsilon(*(f[c][None] for f in fields), np.float64(POINTS_2D), np.full(5, a), np)
        / np.sqrt(1 - a)
        for c in (0, 3)
        for a in [alphas(LINEAR)[0]]
    ]
    np.testing.assert_allclose(slopes, scores[0] - scores[1], atol=0.25)


@pytest.mark.slow
def test_gradient_in_images_by_finite_differences():
    """The same key is the same function of x."""
    direction = jax.random.normal(jax.random.key(2), POINTS_2D.shape)

    @jax.jit
    def value(step):
        return classify(x=POINTS_2D + step * direction, draws=16).value

    step = 0.01
    got = jax.jit(jax.jacrev(value))(0.0)
    exact = (value(step) - value(-step)) / (2 * step)
    np.testing.assert_allclose(got, exact, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_standard_errors_err_upwards_and_not_by_much():
    keys = jax.random.split(jax.random.key(3), 400)
    got = jax.jit(jax.vmap(functools.partial(classify, draws=256)))(keys)
    deviation, stated = got.value.std(axis=0), np.sqrt((got.stderr**2).mean(axis=0))
    assert (deviation < 1.15 * stated).all()
    assert (deviation > 0.4 * stated).all()


def test_shared_noise_reduces_the_variance_of_log_odds():
    """E_0 − E_1 from shared against independent (t, ε): less than a fifth of the variance."""
    keys = jax.random.split(jax.random.key(4), (200, 2))

    @jax.jit
    @jax.vmap
    def energies(pair):
        one, two = (
            likelihoods.concept_energies(
                denoiser_of(LINEAR),
                CONCEPTS_2D,
                LINEAR,
                key,
                x_0=POINTS_2D,
                concepts=jnp.arange(2),
                draws=16,
            ).mean(axis=0)
            for key in pair
        )
        return one[:, 0] - one[:, 1], one[:, 0] - two[:, 1]

    shared, independent = energies(keys)
    assert (shared.var(axis=0) < 0.2 * independent.var(axis=0)).all()


@pytest.mark.slow
def test_concepts_may_be_split_over_forward_passes():
    whole = jax.jit(functools.partial(classify, draws=8))()
    for at_once in (1, 2):
        got = jax.jit(functools.partial(classify, draws=8, concepts_at_once=at_once))()
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), whole, got)
    mapped = jax.jit(jax.vmap(lambda x: classify(draws=8, x=x)))(POINTS_2D[None])
    assert mapped.value.shape == (1, 5, 3)
    np.testing.assert_allclose(mapped.value[0], whole.value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_of_gradients_is_that_of_one_draw():
    x = jnp.zeros((64, 16))
    params = gaussians(np.zeros((3, 16)), np.ones((3, 16)))

    def temporaries(draws):
        def total(x):
            return classify(x=x, params=params, draws=draws).value[:, 0].sum()

        compiled = jax.jit(jax.grad(total)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Four bytes for each draw, image and concept, in a few copies; not sixteen times as many.
    assert temporaries(130) - temporaries(2) < 128 * 64 * 3 * 4 * 8


@pytest.mark.slow
def test_concepts_may_be_embeddings():
    """A condition may be any pytree, here the parameters of the concept themselves."""
    apply = denoiser_of(LINEAR)

    def by_value(params, x_t, t, cond):
        labels = jnp.arange(len(x_t))
        return apply(cond, x_t, t, labels)

    got = likelihoods.diffusion_classifier(
        by_value,
        None,
        LINEAR,
        jax.random.key(0),
        x_0=POINTS_2D,
        concepts=CONCEPTS_2D,
        draws=8,
        log_prior=LOG_PRIOR,
    )
    np.testing.assert_allclose(got.value, classify(draws=8).value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 1}, "at least 2 draws, not 1"),
        ({"log_prior": np.zeros(2)}, r"log_prior must be \[3\], not \[2\]"),
        ({"weights": np.ones(3)}, r"weights must be \[1000\], not \[3\]"),
        ({"probabilities": np.ones((1, 1000))}, r"probabilities must be \[1000\], not \[1, 1000\]"),
        (
            {"schedule": schedules.noise_schedule(rescale_betas_zero_snr=True)},
            "infinite at its zero terminal SNR",
        ),
    ],
)
def test_classifier_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        classify(**options)


@pytest.mark.parametrize(
    "concepts", [jnp.int32(3), {"a": jnp.zeros(2), "b": jnp.zeros(3)}, None, {"a": jnp.int32(0)}]
)
def test_concepts_need_one_leading_axis(concepts):
    with pytest.raises(ValueError, match="share one leading axis"):
        likelihoods.concept_energies(
            denoiser_of(LINEAR),
            CONCEPTS_2D,
            LINEAR,
            jax.random.key(0),
            x_0=POINTS_2D,
            concepts=concepts,
            draws=2,
        )
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        likelihoods.concept_energies(
            denoiser_of(LINEAR),
            CONCEPTS_2D,
            LINEAR,
            jax.random.key(0),
            x_0=POINTS_2D,
            concepts=jnp.arange(2),
            draws=0,
        )
