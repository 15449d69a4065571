import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_unlearn import schedules

NAMES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TYPES = ("epsilon", "sample", "v_prediction")


def exact_alphas_cumprod(name, steps=1000, start=1e-4, end=0.02):
    """ᾱ in float64, from the definitions of the papers."""
    if name == "squaredcos_cap_v2":  # ᾱ = f(t+1)/f(0), but for the capped last beta
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        alphas_cumprod = f[1:] / f[0]
        alphas_cumprod[-1] = alphas_cumprod[-2] * 0.001
        return alphas_cumprod
    index = np.arange(steps) / (steps - 1)
    if name == "linear":
        betas = start + (end - start) * index
    else:
        betas = (np.sqrt(start) + (np.sqrt(end) - np.sqrt(start)) * index) ** 2
    return np.cumprod(1 - betas)


@pytest.mark.parametrize("name", NAMES)
def test_schedule_is_that_of_the_papers(name):
    schedule = schedules.noise_schedule(name, beta_start=8.5e-4, beta_end=0.012)
    exact = exact_alphas_cumprod(name, start=8.5e-4, end=0.012)
    assert schedule.num_steps == 1000
    np.testing.assert_allclose(schedule.alphas_cumprod, exact, rtol=3e-6)
    np.testing.assert_allclose(
        schedule.log_snr, np.log(exact) - np.log(1 - exact), rtol=1e-6, atol=1e-6
    )
    assert schedule.log_snr.dtype == jnp.float32


def test_trained_betas_take_the_place_of_a_name():
    betas = [0.1, 0.3, 0.5, 0.7]
    schedule = schedules.noise_schedule("no such name", trained_betas=betas)
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.63, 0.315, 0.0945], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    plain = np.sqrt(exact_alphas_cumprod(name))
    schedule = schedules.noise_schedule(name, rescale_betas_zero_snr=True)
    assert schedule.log_snr[-1] == -np.inf
    assert schedule.alphas_cumprod[-1] == 0
    # An affine map of √ᾱ that keeps the first and sends the last to zero.
    slope, intercept = np.polyfit(plain[[0, -1]], [plain[0], 0.0], 1)
    np.testing.assert_allclose(
        np.sqrt(schedule.alphas_cumprod), slope * plain + intercept, rtol=3e-6, atol=1e-7
    )
    assert np.isfinite(schedule.log_snr[:-1]).all()
    assert (np.diff(schedule.log_snr) < 0).all()


def test_both_ends_are_exact_where_one_minus_alpha_is_not():
    log_snr = jnp.array([-60.0, -25.0, 25.0, 60.0])
    alpha, sigma = schedules.alpha_sigma(log_snr, log_snr)
    exact = np.exp(np.array([-60.0, -25.0, 25.0, 60.0]))
    np.testing.assert_allclose(alpha, np.sqrt(exact / (1 + exact)), rtol=1e-5)
    np.testing.assert_allclose(sigma, np.sqrt(1 / (1 + exact)), rtol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_conversions_recover_every_coordinate(prediction_type):
    rng = np.random.default_rng(0)
    x_0, noise = rng.normal(size=(2, 5, 3, 2, 1))
    log_snr = np.linspace(-4, 4, 5)
    signal = 1 / (1 + np.exp(-log_snr))[:, None, None, None]
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    x_t, velocity = alpha * x_0 + sigma * noise, alpha * noise - sigma * x_0
    truth = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}

    inputs = {"x_0": jnp.float32(x_0), "noise": jnp.float32(noise), "log_snr": jnp.float32(log_snr)}
    np.testing.assert_allclose(schedules.add_noise(**inputs), x_t, atol=1e-6)
    got = schedules.convert(
        jnp.float32(truth[prediction_type]),
        x_t=jnp.float32(x_t),
        log_snr=jnp.float32(log_snr),
        prediction_type=prediction_type,
    )
    np.testing.assert_allclose(got.epsilon, noise, atol=2e-5)
    np.testing.assert_allclose(got.x_0, x_0, atol=2e-5)
    np.testing.assert_allclose(got.velocity, velocity, atol=2e-5)
    np.testing.assert_allclose(got.score, -noise / sigma, atol=2e-4)


def test_scalar_log_snr_serves_the_whole_batch():
    x_0, noise = jnp.ones((3, 2, 2, 1)), jnp.full((3, 2, 2, 1), 2.0)
    one = schedules.add_noise(x_0=x_0, noise=noise, log_snr=jnp.float32(0.5))
    many = schedules.add_noise(x_0=x_0, noise=noise, log_snr=jnp.full(3, 0.5))
    np.testing.assert_array_equal(one, many)


def test_velocity_stays_exact_at_zero_snr():
    x_t, velocity = jnp.array([[0.3]]), jnp.array([[-0.7]])
    got = schedules.convert(
        velocity, x_t=x_t, log_snr=jnp.array([-jnp.inf]), prediction_type="v_prediction"
    )
    np.testing.assert_allclose([got.x_0[0, 0], got.epsilon[0, 0]], [0.7, 0.3], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("log_snr", [2.0, -9.0, -np.inf])
def test_clipped_predictions_are_those_of_the_clipped_image(log_snr, prediction_type):
    """ε' is the noise that leads from clip(x̂_0) to x_t, wherever x̂_0 was."""
    schedule = schedules.NoiseSchedule(
        jnp.float32([log_snr]), prediction_type=prediction_type, clip_range=1.0
    )
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
    x_t, guess = np.array([[0.3, -0.4, 1.7]]), np.array([[0.5, -30.0, 4.0]])
    noise = (x_t - alpha * guess) / sigma
    output = {"epsilon": noise, "sample": guess, "v_prediction": alpha * noise - sigma * guess}

    @jax.jit
    def clipped(prediction, schedule=schedule):
        return schedules.clipped(
            prediction, schedule, x_t=jnp.float32(x_t), log_snr=schedule.log_snr
        )

    prediction = jnp.float32(output[prediction_type])
    x_0, got = np.array([[0.5, -1.0, 1.0]]), clipped(prediction)
    epsilon = (x_t - alpha * x_0) / sigma
    np.testing.assert_allclose(got.epsilon, epsilon, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.score, -epsilon / sigma, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda prediction: clipped(prediction).epsilon.sum())(prediction)
    assert np.isfinite(slope).all()
    if alpha > 0:
        np.testing.assert_array_equal(slope[0, 1:], 0)
    if prediction_type != "epsilon" or alpha > 0:
        np.testing.assert_allclose(got.x_0, x_0, rtol=2e-4)
        velocity = alpha * epsilon - sigma * x_0
        np.testing.assert_allclose(got.velocity, velocity, rtol=2e-4, atol=1e-6)
    free = clipped(prediction, dataclasses.replace(schedule, clip_range=None))
    np.testing.assert_allclose(free.epsilon, noise, rtol=1e-5, atol=1e-6)


def test_score_of_noised_gaussian_data():
    mean, deviation, log_snr = 0.4, 0.3, np.array([-3.0, -0.5, 2.0])
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
    law = stats.norm(alpha * mean, np.sqrt(alpha**2 * deviation**2 + sigma**2))
    x_t = np.array([-1.0, 0.2, 1.4])
    # Tweedie: the posterior mean of the noise, by quadrature over the noise.
    nodes = np.linspace(-9, 9, 20_001)
    weights = stats.norm.pdf(nodes)
    x_0 = (x_t[:, None] - sigma[:, None] * nodes) / alpha[:, None]
    posterior = weights * np.exp(-0.5 * ((x_0 - mean) / deviation) ** 2)
    epsilon = (posterior * nodes).sum(1) / posterior.sum(1)
    got = schedules.convert(
        jnp.float32(epsilon)[:, None],
        x_t=jnp.float32(x_t)[:, None],
        log_snr=jnp.float32(log_snr),
        prediction_type="epsilon",
    )
    step = 1e-4
    score = (law.logpdf(x_t + step) - law.logpdf(x_t - step)) / (2 * step)
    np.testing.assert_allclose(got.score[:, 0], score, rtol=1e-4)


@pytest.mark.parametrize(
    ("spacing", "offset", "steps", "expected"),
    [
        ("leading", 0, 4, [750, 500, 250, 0]),
        ("leading", 1, 4, [751, 501, 251, 1]),
        ("leading", 0, 3, [666, 333, 0]),
        ("trailing", 0, 4, [999, 749, 499, 249]),
        ("trailing", 0, 3, [999, 666, 332]),
        ("linspace", 0, 4, [999, 666, 333, 0]),
        ("linspace", 0, 2, [999, 0]),
    ],
)
def test_timesteps(spacing, offset, steps, expected):
    schedule = schedules.noise_schedule(spacing=spacing, steps_offset=offset)
    np.testing.assert_array_equal(schedules.timesteps(schedule, steps), expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_all_timesteps_are_all_of_the_schedule(spacing):
    schedule = schedules.noise_schedule(num_steps=37, spacing=spacing)
    for steps in range(1, 38):
        times = schedules.timesteps(schedule, steps)
        assert times.shape == (steps,)
        assert (np.diff(times) < 0).all()
        assert times[0] < 37
        assert times[-1] >= 0
    np.testing.assert_array_equal(times, np.arange(36, -1, -1))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"beta_schedule": "cosine"}, "cosine"),
        ({"trained_betas": [0.1, 1.0]}, "betas"),
        ({"trained_betas": [0.0, 0.5]}, "betas"),
        ({"trained_betas": [0.1, np.nan]}, "betas"),
        ({"trained_betas": [0.1]}, "betas"),
        ({"trained_betas": [[0.1, 0.2]]}, "betas"),
        ({"beta_end": 1.5}, "betas"),
        ({"prediction_type": "eps"}, "prediction_type"),
        ({"variance_type": "learned"}, "variance_type"),
        ({"spacing": "karras"}, "spacing"),
    ],
)
def test_bad_schedules_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        schedules.noise_schedule(**options)


@pytest.mark.parametrize(("steps", "offset"), [(0, 0), (1001, 0), (-1, 0), (1000, 1), (1, 1000)])
def test_bad_numbers_of_steps_are_refused(steps, offset):
    with pytest.raises(ValueError, match="steps"):
        schedules.timesteps(schedules.noise_schedule(steps_offset=offset), steps)


def test_unknown_prediction_types_are_refused():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="flow"):
        schedules.convert(x, x_t=x, log_snr=jnp.zeros(1), prediction_type="flow")


def test_schedule_is_a_pytree_of_one_array():
    schedule = schedules.noise_schedule("linear", prediction_type="v_prediction", clip_range=2.0)
    (leaf,) = jax.tree.leaves(schedule)
    assert leaf is schedule.log_snr
    doubled = jax.jit(lambda s: dataclasses.replace(s, log_snr=2 * s.log_snr))(schedule)
    assert doubled.prediction_type == "v_prediction"
    np.testing.assert_array_equal(doubled.log_snr, 2 * schedule.log_snr)


SD_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_from_diffusers_reads_stable_diffusion():
    schedule = schedules.from_diffusers(SD_CONFIG)
    exact = exact_alphas_cumprod("scaled_linear", start=0.00085, end=0.012)
    np.testing.assert_allclose(schedule.alphas_cumprod, exact, rtol=3e-6)
    assert schedule.clip_range is None
    assert schedule.steps_offset == 1
    assert schedule.final_alpha_cumprod_one is False
    assert schedule.prediction_type == "epsilon"
    assert schedule.spacing == "leading"


def test_from_diffusers_takes_its_defaults():
    schedule = schedules.from_diffusers({"_class_name": "DDPMScheduler"})
    np.testing.assert_array_equal(schedule.log_snr, schedules.noise_schedule("linear").log_snr)
    assert schedule.clip_range == 1.0
    assert schedule.variance_type == "fixed_small"
    assert schedule.final_alpha_cumprod_one is True
    wide = schedules.from_diffusers({"clip_sample_range": 3, "variance_type": "fixed_small_log"})
    assert wide.clip_range == 3.0
    assert wide.variance_type == "fixed_small"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"thresholding": True}, "thresholding"),
        ({"variance_type": "learned_range"}, "learned_range"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"timestep_spacing": "karras"}, "karras"),
    ],
)
def test_from_diffusers_refuses_what_it_does_not_know(config, word):
    with pytest.raises(ValueError, match=word):
        schedules.from_diffusers(config)


def diffusers_scheduler(name, **options):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(**options)


@pytest.mark.torch
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_alphas_cumprod_of_diffusers(name, rescale):
    theirs = diffusers_scheduler(
        "DDPMScheduler", beta_schedule=name, rescale_betas_zero_snr=rescale
    )
    ours = schedules.from_diffusers(theirs.config)
    # Theirs is a float32 product of a thousand factors.
    np.testing.assert_allclose(
        ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7
    )


@pytest.mark.torch
@pytest.mark.parametrize("prediction_type", TYPES)
def test_conversions_of_diffusers(prediction_type):
    torch = pytest.importorskip("torch")
    theirs = diffusers_scheduler(
        "DDPMScheduler", prediction_type=prediction_type, clip_sample=False
    )
    ours = schedules.from_diffusers(theirs.config)
    rng = np.random.default_rng(1)
    x_0, noise = np.float32(rng.normal(size=(2, 1, 1, 3, 3)))
    for t in (0, 1, 400, 999):
        at = torch.tensor([t])
        log_snr = ours.log_snr[jnp.array([t])]
        x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=log_snr)
        expected = theirs.add_noise(torch.tensor(x_0), torch.tensor(noise), at).numpy()
        np.testing.assert_allclose(x_t, expected, atol=2e-5)
        alpha, sigma = schedules.alpha_sigma(log_snr, x_0)
        expected = theirs.get_velocity(torch.tensor(x_0), torch.tensor(noise), at).numpy()
        np.testing.assert_allclose(alpha * noise - sigma * x_0, expected, atol=2e-5)
        output = np.float32(rng.normal(size=x_0.shape))
        got = schedules.convert(
            output, x_t=x_t, log_snr=log_snr, prediction_type=prediction_type
        ).x_0
        step = theirs.step(torch.tensor(output), t, torch.tensor(np.asarray(x_t)))
        np.testing.assert_allclose(got, step.pred_original_sample.numpy(), rtol=2e-4, atol=2e-4)


@pytest.mark.torch
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    ("spacing", "offset"),
    [("leading", 0), ("leading", 1), ("trailing", 0), ("trailing", 1), ("linspace", 0)],
)
def test_timesteps_of_diffusers(scheduler, spacing, offset):
    theirs = diffusers_scheduler(scheduler, timestep_spacing=spacing, steps_offset=offset)
    ours = schedules.from_diffusers(theirs.config)
    for steps in (1, 2, 7, 30, 50, 333, 999):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(schedules.timesteps(ours, steps), theirs.timesteps.numpy())


@pytest.mark.parametrize(
    ("kind", "clips", "spacing", "final_one"),
    [
        ("DDPMScheduler", True, "leading", True),
        ("DDIMScheduler", True, "leading", True),
        ("PNDMScheduler", False, "leading", False),
        ("EulerDiscreteScheduler", False, "linspace", True),
    ],
)
def test_missing_options_take_the_defaults_of_the_class(kind, clips, spacing, final_one):
    schedule = schedules.from_diffusers({"_class_name": kind})
    assert (schedule.clip_range is not None) == clips
    assert schedule.spacing == spacing
    assert schedule.final_alpha_cumprod_one == final_one


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_the_defaults_of_the_class_are_those_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, kind)().config
    ours = schedules.from_diffusers({"_class_name": kind})
    full = schedules.from_diffusers({"_class_name": kind, **theirs})
    assert ours.spacing == theirs["timestep_spacing"] == full.spacing
    assert (ours.clip_range is not None) == bool(theirs.get("clip_sample", False))
    assert ours.final_alpha_cumprod_one == theirs.get("set_alpha_to_one", True)
