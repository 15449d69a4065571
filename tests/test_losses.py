import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy import stats

from jax_unlearn import losses, schedules

BETAS = (0.1, 0.3, 0.5, 0.7)
ALPHAS_CUMPROD = np.cumprod(1 - np.array(BETAS))
WEIGHTS = np.array([5.0, 1.0, 0.4, 0.1])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4])


def small_schedule(**options):
    return schedules.noise_schedule(trained_betas=BETAS, **options)


def linear_denoiser(params, x_t, t, cond):
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    return params["gain"][t].reshape(shape) * x_t + params["bias"][t].reshape(shape)


@jax.jit
def many_batches(seed, probabilities):
    """t of 4000 batches of 8 rows."""
    keys = jax.random.split(jax.random.key(seed), 4000)
    return jax.vmap(lambda key: losses.draw(key, jnp.zeros((8, 1)), probabilities).t)(keys)


def test_time_steps_follow_any_probabilities():
    """χ² of t over many batches; the marginal of every row, not of the batch alone."""
    probabilities = np.array([0.4, 0.0, 0.2, 0.05, 0.25, 0.02, 0.08, 0.0])
    t = np.asarray(many_batches(0, jnp.float32(probabilities)))
    positive = probabilities > 0
    for row in range(8):  # rows of one batch are dependent, batches are not
        counts = np.bincount(t[:, row], minlength=8)
        assert (counts[~positive] == 0).all()
        assert stats.chisquare(counts[positive], 4000 * probabilities[positive]).pvalue > 1e-4


def test_time_steps_are_stratified():
    """n rows, n equal strata: with uniform π every time step comes up about equally often."""
    t = np.asarray(many_batches(1, jnp.full(8, 1 / 8)))
    for batch in t[:100]:
        assert np.bincount(batch, minlength=8).max() <= 2
    assert stats.chisquare(np.bincount(t[:, 3], minlength=8)).pvalue > 1e-4
    independent = np.sqrt((64 - 1) / 12 / 8)  # deviation of the mean of 8 independent draws
    assert t.mean(axis=1).std() < 0.5 * independent


def test_zero_probability_ends_are_never_drawn():
    probabilities = jnp.array([0.0, 0.3, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert set(np.unique(many_batches(2, probabilities))) == {1, 2}


def test_noise_is_standard_normal_and_independent():
    noise, _, uniform = jax.jit(losses.draw)(
        jax.random.key(3), jnp.zeros((4000, 2, 3, 1)), jnp.ones(4) / 4
    )
    flat = np.asarray(noise).reshape(4000, 6)
    assert stats.kstest(flat.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(flat.T), np.eye(6), atol=5 / np.sqrt(4000))
    assert abs(np.mean(flat[1:] * flat[:-1])) < 5 / np.sqrt(24_000)
    assert stats.kstest(np.asarray(uniform), "uniform").pvalue > 1e-3
    assert noise.dtype == jnp.float32


@pytest.mark.parametrize("how", ["shard_map", "pmap", "vmap"])
def test_a_sharded_batch_gets_the_noise_of_a_whole_one(how):
    x_0, probabilities, key = jnp.zeros((8, 2, 1)), jnp.array([0.1, 0.2, 0.7]), jax.random.key(4)
    whole = jax.jit(losses.draw)(key, x_0, probabilities)

    def draw(shard):
        return losses.draw(key, shard, probabilities, axis_name="data")

    if how == "shard_map":
        mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
        spec = PartitionSpec("data")
        parts = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=spec, out_specs=spec))(x_0)
    else:
        rows = x_0.reshape(4, 2, 2, 1)
        if how == "pmap":
            parts = jax.pmap(draw, axis_name="data")(rows)
        else:
            parts = jax.jit(jax.vmap(draw, axis_name="data"))(rows)
        parts = jax.tree.map(lambda a: a.reshape(8, *a.shape[2:]), parts)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_more_rows_keep_the_noise_of_the_first():
    draw = jax.jit(losses.draw)
    few = draw(jax.random.key(5), jnp.zeros((2, 3)), jnp.ones(4) / 4)
    many = draw(jax.random.key(5), jnp.zeros((6, 3)), jnp.ones(4) / 4)
    np.testing.assert_array_equal(few.noise, many.noise[:2])


def test_time_weighting():
    plain = losses.time_weighting(WEIGHTS)
    np.testing.assert_allclose(plain.weights, WEIGHTS, rtol=1e-6)
    np.testing.assert_allclose(plain.probabilities, np.full(4, 0.25), rtol=1e-6)
    errors = np.array([0.1, 1.0, 2.0, 4.0])  # w e = .5, 1, .8, .4, of 2.7
    focused = losses.time_weighting(WEIGHTS, errors, uniform=0.2)
    expected = 0.8 * np.array([0.5, 1.0, 0.8, 0.4]) / 2.7 + 0.05
    np.testing.assert_allclose(focused.probabilities, expected, rtol=1e-6)
    np.testing.assert_allclose(
        losses.importance(focused, jnp.array([3, 0])),
        [0.1 / expected[3], 5 / expected[0]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(losses.simple_weights(4, 6), np.full(4, 1 / 24), rtol=1e-6)


def test_noise_to_signal_weights():
    alphas_cumprod = np.array([0.999, 0.8, 0.5, 0.1, 0.001])
    log_snr = jnp.log(alphas_cumprod / (1 - alphas_cumprod))
    got = np.asarray(losses.noise_to_signal_weights(log_snr, 6, most=10.0), np.float64)
    np.testing.assert_allclose(got.sum(), 1 / 6, rtol=1e-5)
    ratios = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    np.testing.assert_allclose(got / got[2], [*ratios[:4], 10.0], rtol=1e-5)


def every_draw(nodes, count):
    """All pairs of (t, node) as draws, and the probability that goes with each."""
    points, mass = np.polynomial.hermite_e.hermegauss(nodes)
    mass = mass / mass.sum()
    t, index = np.meshgrid(np.arange(count), np.arange(nodes), indexing="ij")
    return t.ravel(), points[index.ravel()], mass[index.ravel()]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_denoising_loss_of_the_exact_denoiser(prediction_type):
    """Σ_t w_t E‖ε − ε*‖² = Σ_t w_t Var(ε|x_t), by Gauss–Hermite quadrature over ε and x_0."""
    mean, deviation = 0.5, 0.4
    schedule = small_schedule(prediction_type=prediction_type)
    ab = ALPHAS_CUMPROD
    exact = (WEIGHTS * ab * deviation**2 / (ab * deviation**2 + 1 - ab)).sum()

    def denoiser(params, x_t, t, cond):
        a = jnp.asarray(ab, jnp.float32)[t][:, None]
        posterior = jnp.sqrt(a) * deviation**2 / (a * deviation**2 + 1 - a)
        x_0 = mean + posterior * (x_t - jnp.sqrt(a) * mean)
        epsilon = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        velocity = jnp.sqrt(a) * epsilon - jnp.sqrt(1 - a) * x_0
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": velocity}[prediction_type]

    t, noise, mass = every_draw(4, 4)
    for probabilities in (np.full(4, 0.25), PROBABILITIES):
        total = 0.0
        for x, share in zip(*np.polynomial.hermite_e.hermegauss(4), strict=True):
            values = losses.denoising_loss(
                denoiser,
                None,
                schedule,
                x_0=jnp.full((len(t), 1), mean + deviation * x),
                cond=None,
                draws=losses.Draws(jnp.float32(noise)[:, None], jnp.asarray(t), jnp.zeros(len(t))),
                weighting=losses.TimeWeighting(jnp.float32(WEIGHTS), jnp.float32(probabilities)),
            )
            assert values.shape == (len(t),)
            total += share / np.sqrt(2 * np.pi) * (probabilities[t] * mass * values).sum()
        assert total == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("probabilities", [np.full(4, 0.25), PROBABILITIES], ids=["flat", "not"])
def test_denoising_loss_is_unbiased(probabilities):
    """Draws by `draw`: E over t and ε, in closed form for a linear denoiser, image by image."""
    gain, bias = np.array([0.9, 0.5, 0.2, -0.3]), np.array([0.1, 0.0, -0.2, 0.4])
    images = np.array([[0.3, -0.8], [0.9, 0.0]])
    alpha, sigma = np.sqrt(ALPHAS_CUMPROD), np.sqrt(1 - ALPHAS_CUMPROD)
    residual = gain * alpha * images[..., None] + bias  # [batch, d, T]
    exact = (WEIGHTS * ((1 - gain * sigma) ** 2 + residual**2)).sum(axis=(1, 2))
    params = {"gain": jnp.float32(gain), "bias": jnp.float32(bias)}
    weighting = losses.TimeWeighting(jnp.float32(WEIGHTS), jnp.float32(probabilities))
    x_0 = jnp.float32(images)[:, None, :, None]

    def one(key):
        draws = losses.draw(key, x_0, weighting.probabilities)
        return losses.denoising_loss(
            linear_denoiser, params, small_schedule(), x_0=x_0, cond=None, draws=draws,
            weighting=weighting,
        )  # fmt: skip

    values = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(6), 40_000)))
    stderr = values.std(axis=0) / np.sqrt(len(values))
    assert (np.abs(values.mean(axis=0) - exact) < 4 * stderr).all()
    assert (stderr < 0.02 * exact).all()


def test_squared_error_sums_over_the_image():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_allclose(losses.squared_error(x, x - 2), [24.0, 24.0])


def mixture_of(x, a, key, log_snr, mixing, count):
    noise_key, choice_key = jax.random.split(key)
    x, a = (jnp.broadcast_to(jnp.float32(y), (count, *np.shape(y))) for y in (x, a))
    return jax.jit(losses.mixture)(
        x=x,
        a=a,
        noise=jax.random.normal(noise_key, x.shape),
        choose_a=jax.random.uniform(choice_key, (count,)) < mixing,
        log_snr=jnp.full(count, log_snr),
        mixing=mixing,
    )


@pytest.mark.parametrize("mixing", [0.5, 0.2])
def test_mixture_weights_are_ratios_of_densities(mixing):
    x, a, log_snr = np.array([[0.4], [-0.2]]), np.array([[-0.5], [0.1]]), -0.3
    got = mixture_of(x, a, jax.random.key(7), log_snr, mixing, 50)
    signal = 1 / (1 + np.exp(-log_snr))
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    x_t = np.asarray(got.x_t, np.float64)
    log_x = stats.norm(alpha * x, sigma).logpdf(x_t).sum(axis=(1, 2))
    log_a = stats.norm(alpha * a, sigma).logpdf(x_t).sum(axis=(1, 2))
    density = (1 - mixing) * np.exp(log_x) + mixing * np.exp(log_a)
    np.testing.assert_allclose(got.weight_x, np.exp(log_x) / density, rtol=1e-5)
    np.testing.assert_allclose(got.weight_a, np.exp(log_a) / density, rtol=1e-5)
    np.testing.assert_allclose(got.noise_x, (x_t - alpha * x) / sigma, atol=1e-5)
    np.testing.assert_allclose(got.noise_a, (x_t - alpha * a) / sigma, atol=1e-5)


@pytest.mark.parametrize("mixing", [0.5, 0.2])
def test_mixture_estimates_both_expectations(mixing):
    """E[weight f] = E_{q(·|x)} f for f = 1, x_t, ‖x_t‖², whose Gaussian moments are known."""
    x, a, log_snr, count = np.array([0.8, -0.2]), np.array([-0.5, 0.6]), 0.4, 100_000
    got = mixture_of(x, a, jax.random.key(8), log_snr, mixing, count)
    signal = 1 / (1 + np.exp(-log_snr))
    x_t = np.asarray(got.x_t, np.float64)
    for clean, weight in ((x, got.weight_x), (a, got.weight_a)):
        mean = np.sqrt(signal) * clean
        exact = np.array([1.0, *mean, (mean**2).sum() + 2 * (1 - signal)])
        f = np.column_stack([np.ones(count), x_t, (x_t**2).sum(1)]) * np.asarray(weight)[:, None]
        stderr = f.std(axis=0) / np.sqrt(count)
        assert (np.abs(f.mean(axis=0) - exact) < 4.5 * stderr).all()
        assert weight.max() <= 1 / (1 - mixing if clean is x else mixing) * (1 + 1e-6)


def test_mixture_weights_saturate_without_overflow():
    x, a = np.full(4000, 1.0), np.full(4000, -1.0)
    got = mixture_of(x, a, jax.random.key(9), 8.0, 0.25, 64)
    from_a = np.asarray(got.weight_a > 1)
    assert 4 < from_a.sum() < 28
    np.testing.assert_allclose(got.weight_a, np.where(from_a, 4.0, 0.0), rtol=1e-6)
    np.testing.assert_allclose(got.weight_x, np.where(from_a, 0.0, 4 / 3), rtol=1e-6)
    # The other noise belongs to a huge displacement, and the own one is the drawn one.
    assert np.abs(np.where(from_a[:, None], got.noise_a, got.noise_x)).max() < 6


def test_effective_sample_size():
    assert losses.effective_sample_size(jnp.full(7, 0.3)) == pytest.approx(1.0)
    assert losses.effective_sample_size(jnp.array([0.0, 5.0, 0.0, 0.0])) == pytest.approx(0.25)
    weights = np.array([0.2, 1.5, 3.0, 0.1, 0.7, 2.2])
    exact = weights.sum() ** 2 / (6 * (weights**2).sum())
    assert losses.effective_sample_size(jnp.float32(weights)) == pytest.approx(exact, rel=1e-6)
    sharded = jax.vmap(
        lambda w: losses.effective_sample_size(w, axis_name="data"), axis_name="data"
    )(jnp.float32(weights).reshape(3, 2))
    np.testing.assert_allclose(sharded, np.full(3, exact), rtol=1e-6)


@pytest.mark.parametrize("log_snr", [2.0, -9.0, -np.inf])
def test_clipped_loss_is_that_of_the_clipped_image(log_snr):
    """α(clip(x̂_0) − x_0)/σ is what is left of the noise; nothing at zero SNR, whatever ε says."""
    schedule = schedules.NoiseSchedule(log_snr=jnp.float32([log_snr]), clip_range=1.0)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
    x_0, guesses = np.array([[0.3, -0.4, 0.9]]), np.array([[0.5, -30.0, 4.0]])
    noise = np.array([[0.2, -1.0, 0.6]])
    epsilon = noise + alpha * (x_0 - guesses) / sigma
    loss = losses.denoising_loss(
        lambda params, x_t, t, cond: jnp.float32(epsilon),
        None,
        schedule,
        x_0=jnp.float32(x_0),
        cond=None,
        draws=losses.Draws(jnp.float32(noise), jnp.array([0]), jnp.zeros(1)),
        weighting=losses.time_weighting([2.0]),
        clip=True,
    )
    expected = 2 * np.square(alpha * (np.array([[0.5, -1.0, 1.0]]) - x_0) / sigma).sum(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-10)
