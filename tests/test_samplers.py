import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn import samplers, schedules

MEAN, DEVIATION = 0.6, 0.35  # of the Gaussian data


def gaussian_denoiser(schedule, mean=MEAN, deviation=DEVIATION):
    """ε*(x_t, t) = E[ε | x_t] for x_0 ∼ N(m, s²), as a function for `sample`."""
    alphas_cumprod = jax.nn.sigmoid(schedule.log_snr)

    def predict(x_t, t):
        ab = alphas_cumprod[t].reshape(-1, 1)
        total = ab * deviation**2 + 1 - ab
        return jnp.sqrt(1 - ab) * (x_t - jnp.sqrt(ab) * mean) / total

    return predict


def exact_posterior_mean(x_t, alphas_cumprod, mean=MEAN, deviation=DEVIATION):
    """E[x_0 | x_t], by conditioning of a joint Gaussian, in float64."""
    gain = np.sqrt(alphas_cumprod) * deviation**2
    gain = gain / (alphas_cumprod * deviation**2 + 1 - alphas_cumprod)
    return mean + gain * (x_t - np.sqrt(alphas_cumprod) * mean)


def ancestral_moments(alphas_cumprod, times, large):
    """Mean and variance of x_0 at the end of the ancestral chain from N(0, 1), in float64."""
    mean, variance = 0.0, 1.0
    following = [alphas_cumprod[t] for t in times[1:]] + [1.0]
    for t, after in zip(times, following, strict=True):
        now = alphas_cumprod[t]
        ratio = now / after
        # q(x_s | x_t, x_0) for jointly Gaussian x_s, x_t given x_0, by conditioning:
        gain = np.sqrt(ratio) * (1 - after) / (1 - now)
        noise = (1 - after) * (1 - ratio) / (1 - now)
        if large and after < 1:
            noise = 1 - ratio
        zero, one = (exact_posterior_mean(x, now) for x in (0.0, 1.0))
        offset = (np.sqrt(after) - gain * np.sqrt(now)) * zero
        slope = gain + (np.sqrt(after) - gain * np.sqrt(now)) * (one - zero)
        mean, variance = slope * mean + offset, slope**2 * variance + noise
    return mean, variance


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ancestral_chain_of_gaussian_data(variance_type):
    betas = np.linspace(0.01, 0.5, 12)
    schedule = schedules.noise_schedule(trained_betas=betas, variance_type=variance_type)
    times = [11, 8, 5, 2]
    # leading steps 0, 3, 6, 9 shifted by 2
    schedule = schedules.noise_schedule(
        trained_betas=betas, variance_type=variance_type, steps_offset=2
    )
    count = 40_000
    x = jax.random.normal(jax.random.key(0), (count, 1))
    got = samplers.sample(
        gaussian_denoiser(schedule), schedule, jax.random.key(1), x, steps=4, method="ddpm"
    ).x_0
    mean, variance = ancestral_moments(np.cumprod(1 - betas), times, variance_type == "fixed_large")
    assert abs(got.mean() - mean) < 4 * np.sqrt(variance / count)
    assert abs(got.var() / variance - 1) < 4 * np.sqrt(2 / count)


def test_ancestral_chain_ends_at_the_data():
    """Oracle of the oracle: the recursion itself must find the data's law as T grows."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    for large, tolerance in ((False, 0.02), (True, 0.02)):
        mean, variance = ancestral_moments(alphas_cumprod, range(999, -1, -1), large)
        assert mean == pytest.approx(MEAN, abs=1e-2)
        assert np.sqrt(variance) == pytest.approx(DEVIATION, rel=tolerance)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fixed_geometric"])
def test_one_ancestral_step_is_the_posterior_of_two_gaussians(variance_type):
    """x̂_0 known: mean and variance of x_s given x_t and x_0, by conditioning in float64."""
    schedule = schedules.noise_schedule(
        "squaredcos_cap_v2", prediction_type="sample", variance_type=variance_type
    )
    ab = np.cos((np.array([301, 701]) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    ab_s, ab_t = ab / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    x_t, x_0 = 0.8, -0.3
    # Given x_0: x_s ~ N(√ᾱ_s x_0, 1−ᾱ_s), x_t | x_s ~ N(√r x_s, 1−r) with r = ᾱ_t/ᾱ_s.
    ratio = ab_t / ab_s
    precision = 1 / (1 - ab_s) + ratio / (1 - ratio)
    mean = (np.sqrt(ab_s) * x_0 / (1 - ab_s) + np.sqrt(ratio) * x_t / (1 - ratio)) / precision
    variance = {"fixed_small": 1 / precision, "fixed_large": 1 - ratio}
    variance["fixed_geometric"] = np.sqrt(variance["fixed_small"] * variance["fixed_large"])
    variance = variance[variance_type]

    def step(noise):
        return samplers.ddpm_step(
            jnp.full((1, 1), x_0),
            x_t=jnp.full((1, 1), x_t),
            noise=jnp.full((1, 1), noise),
            log_snr_t=schedule.log_snr[700],
            log_snr_s=schedule.log_snr[300],
            schedule=schedule,
        )[0, 0]

    assert step(0.0) == pytest.approx(mean, rel=1e-5)
    assert step(1.0) - step(0.0) == pytest.approx(np.sqrt(variance), rel=1e-5)


def test_no_noise_is_added_to_the_clean_image():
    for variance_type in ("fixed_small", "fixed_large", "fixed_geometric"):
        schedule = schedules.noise_schedule(prediction_type="sample", variance_type=variance_type)
        out = samplers.ddpm_step(
            jnp.full((1, 1), 0.25),
            x_t=jnp.ones((1, 1)),
            noise=jnp.full((1, 1), 100.0),
            log_snr_t=schedule.log_snr[30],
            log_snr_s=jnp.float32(jnp.inf),
            schedule=schedule,
        )
        assert out[0, 0] == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_at_eta_one_is_ddpm(prediction_type):
    """Song et al. 2021, sec. 4.1, for any pair of times."""
    schedule = schedules.noise_schedule(prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    prediction, x_t, noise = jnp.float32(rng.normal(size=(3, 4, 2)))
    for t, s in ((999, 500), (400, 399), (20, 0)):
        arguments = {
            "x_t": x_t,
            "noise": noise,
            "log_snr_t": schedule.log_snr[t],
            "log_snr_s": schedule.log_snr[s],
            "schedule": schedule,
        }
        np.testing.assert_allclose(
            samplers.ddim_step(prediction, eta=1.0, **arguments),
            samplers.ddpm_step(prediction, **arguments),
            rtol=2e-4,
            atol=2e-4,
        )


@pytest.mark.slow
def test_ddim_converges_to_the_probability_flow():
    """Gaussian data: the flow maps quantiles to quantiles, with an error that falls as 1/steps."""
    betas = np.linspace(1e-4, 0.02, 1000)
    last = np.cumprod(1 - betas)[-1]
    schedule = schedules.noise_schedule(spacing="trailing")
    z = jnp.array([[-2.0], [-0.5], [0.0], [1.0], [2.5]])
    scale = np.sqrt(last * DEVIATION**2 + 1 - last)
    exact = MEAN + DEVIATION * (np.asarray(z) - np.sqrt(last) * MEAN) / scale
    errors = []
    for steps in (10, 40, 160):
        got = samplers.sample(
            gaussian_denoiser(schedule), schedule, jax.random.key(0), z, steps=steps
        )
        errors.append(np.abs(got.x_0 - exact).max())
    assert errors[-1] < 0.03
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_final_alpha_leaves_the_noise_of_the_first_step():
    """Without ᾱ = 1 at the end, DDIM's last x is √ᾱ_0 x̂_0 + √(1−ᾱ_0) ε̂."""
    ends = {}
    for one in (True, False):
        schedule = schedules.noise_schedule(
            trained_betas=[0.19, 0.3, 0.4], final_alpha_cumprod_one=one
        )
        ends[one] = samplers.sample(
            lambda x, t: jnp.full_like(x, 0.5),
            schedule,
            jax.random.key(0),
            jnp.ones((1, 1)),
            steps=1,
        ).x_0[0, 0]
    # One leading step, at t = 0: ᾱ_0 = 0.81.
    clean = (1 - np.sqrt(0.19) * 0.5) / 0.9
    assert ends[True] == pytest.approx(clean, rel=1e-5)
    assert ends[False] == pytest.approx(0.9 * clean + np.sqrt(0.19) * 0.5, rel=1e-5)


def test_clipping_bounds_the_estimate_of_the_image():
    schedule = schedules.noise_schedule(prediction_type="sample", clip_range=0.5)
    for method in ("ddim", "ddpm"):
        out = samplers.sample(
            lambda x, t: 7.0 * jnp.sign(x),
            schedule,
            jax.random.key(0),
            jnp.array([[1.0], [-1.0]]),
            steps=1,
            method=method,
        ).x_0
        np.testing.assert_allclose(out, [[0.5], [-0.5]], rtol=1e-6)


def test_ddim_takes_the_noise_that_fits_the_clipped_image():
    """x_t = α x̂_0 + σ ε̂ must hold of the clipped x̂_0, of which x_s is the new mixture."""
    schedule = schedules.noise_schedule(trained_betas=[0.19, 0.5, 0.7], clip_range=0.5)
    alphas_cumprod = np.array([0.81, 0.405])
    (alpha_s, alpha_t), (sigma_s, sigma_t) = np.sqrt([alphas_cumprod, 1 - alphas_cumprod])
    x_t = np.array([[1.5], [0.2], [-2.0]])
    x_0 = np.clip((x_t - sigma_t * 0.4) / alpha_t, -0.5, 0.5)
    assert (np.abs(x_0) == 0.5).sum() == 2
    expected = alpha_s * x_0 + sigma_s * (x_t - alpha_t * x_0) / sigma_t
    got = samplers.ddim_step(
        jnp.full((3, 1), 0.4),
        x_t=jnp.float32(x_t),
        noise=jnp.full((3, 1), jnp.pi),
        log_snr_t=schedule.log_snr[1],
        log_snr_s=schedule.log_snr[0],
        schedule=schedule,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_trajectory_holds_the_inputs_of_every_step(method):
    schedule = schedules.noise_schedule(num_steps=30, beta_end=0.3, spacing="linspace")
    x = jax.random.normal(jax.random.key(0), (2, 3))
    seen = []

    def predict(x_t, t):
        jax.debug.callback(lambda *pair: seen.append(pair), x_t, t, ordered=True)
        return 0.3 * x_t

    path = samplers.sample(predict, schedule, jax.random.key(1), x, steps=5, method=method)
    jax.effects_barrier()
    assert path.x.shape == (5, 2, 3)
    np.testing.assert_array_equal(path.t, schedules.timesteps(schedule, 5))
    np.testing.assert_array_equal(path.x[0], x)
    for k, (x_t, t) in enumerate(seen):
        np.testing.assert_array_equal(x_t, path.x[k])
        np.testing.assert_array_equal(t, np.full(2, path.t[k]))
    assert len(seen) == 5
    if method == "ddim":  # each deterministic step leads to the next entry
        for k, after in enumerate([*path.x[1:], path.x_0]):
            log_snr_s = schedule.log_snr[path.t[k + 1]] if k < 4 else jnp.float32(jnp.inf)
            step = samplers.ddim_step(
                0.3 * path.x[k],
                x_t=path.x[k],
                noise=jnp.full_like(x, jnp.pi),
                log_snr_t=schedule.log_snr[path.t[k]],
                log_snr_s=log_snr_s,
                schedule=schedule,
            )
            np.testing.assert_allclose(step, after, rtol=1e-5, atol=1e-6)


def test_the_key_decides_the_noise():
    schedule = schedules.noise_schedule(num_steps=10, beta_end=0.3)

    def ends(**options):
        def end(key):
            x = jnp.ones((2, 2))
            return samplers.sample(lambda x, t: 0.1 * x, schedule, key, x, steps=3, **options).x_0

        seeds = jnp.array([0, 1, 0])
        return jax.vmap(end)(jax.vmap(jax.random.key)(seeds))

    deterministic = ends()
    np.testing.assert_array_equal(deterministic[0], deterministic[1])
    for options in ({"method": "ddpm"}, {"eta": 1.0}):
        first, second, again = ends(**options)
        np.testing.assert_array_equal(first, again)
        assert (np.abs(first - second) > 1e-3).all()
        assert not np.allclose(first[0], first[1])


def test_gradients_flow_through_the_sampler():
    """The derivative of DDIM's x_0 in a gain of the denoiser, against finite differences."""
    schedule = schedules.noise_schedule(num_steps=20, beta_end=0.3)

    def end(gain):
        def predict(x_t, t):
            return jnp.tanh(gain * x_t)

        path = samplers.sample(predict, schedule, jax.random.key(0), jnp.ones((1, 1)), steps=4)
        return path.x_0[0, 0]

    step = 1e-2
    low, high = jax.vmap(end)(0.5 + jnp.array([-step, step]))
    assert jax.grad(end)(0.5) == pytest.approx(float(high - low) / (2 * step), rel=2e-3)


def test_guidance_is_two_forward_passes():
    weights = jax.random.normal(jax.random.key(0), (3, 4))

    def network(params, x_t, t, cond):
        return jnp.tanh(x_t * params[cond["label"]]) + 0.1 * t[:, None] * cond["strength"]

    cond = {"label": jnp.array([0, 1]), "strength": jnp.ones((2, 1))}
    free = {"label": jnp.array([2, 2]), "strength": jnp.zeros((2, 1))}
    x_t, t = jax.random.normal(jax.random.key(1), (2, 4)), jnp.array([3, 3])
    conditional, unconditional = network(weights, x_t, t, cond), network(weights, x_t, t, free)
    for scale in (0.0, 1.0, 7.5):
        predict = samplers.guided(network, weights, cond, unconditional=free, scale=scale)
        expected = (1 - scale) * unconditional + scale * conditional
        np.testing.assert_allclose(predict(x_t, t), expected, rtol=1e-5, atol=1e-5)


def test_denoising_from_the_middle_ends_where_the_whole_sample_does():
    schedule = schedules.noise_schedule(num_steps=50, final_alpha_cumprod_one=False)
    predict = gaussian_denoiser(schedule)
    x = jax.random.normal(jax.random.key(0), (4, 1))
    whole = samplers.sample(predict, schedule, jax.random.key(1), x, steps=10)
    rest = samplers.denoise(predict, schedule, whole.x[6], whole.t[6:])
    np.testing.assert_allclose(rest.x_0, whole.x_0, rtol=1e-6)
    np.testing.assert_allclose(rest.x, whole.x[6:], rtol=1e-6)


@pytest.mark.parametrize("options", [{"method": "ddpm"}, {"eta": 0.5}])
def test_what_draws_noise_needs_a_key(options):
    schedule = schedules.noise_schedule()
    with pytest.raises(ValueError, match="pass a key"):
        samplers.denoise(gaussian_denoiser(schedule), schedule, jnp.ones((1, 1)), [5], **options)


def test_bad_calls_are_refused():
    schedule, x = schedules.noise_schedule(), jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="euler"):
        samplers.sample(lambda x, t: x, schedule, jax.random.key(0), x, steps=2, method="euler")
    with pytest.raises(ValueError, match="steps"):
        samplers.sample(lambda x, t: x, schedule, jax.random.key(0), x, steps=0)


# ------------------------------------------------------------------ diffusers


def pair_of_schedulers(name, **options):
    torch = pytest.importorskip("torch")
    theirs = getattr(pytest.importorskip("diffusers"), name)(**options)
    return torch, theirs, schedules.from_diffusers(theirs.config)


@pytest.mark.torch
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("variance_type", "prediction_type"),
    [("fixed_small", "epsilon"), ("fixed_large", "v_prediction"), ("fixed_small_log", "sample")],
)
def test_ddpm_step_of_diffusers(variance_type, prediction_type, clip):
    torch, theirs, ours = pair_of_schedulers(
        "DDPMScheduler",
        variance_type=variance_type,
        prediction_type=prediction_type,
        clip_sample=clip,
        clip_sample_range=0.8,
    )
    rng = np.random.default_rng(0)
    output, x_t = np.float32(rng.normal(size=(2, 2, 1, 3, 3)))
    for t in (999, 500, 1, 0):
        expected = theirs.step(
            torch.tensor(output), t, torch.tensor(x_t), generator=torch.Generator().manual_seed(t)
        ).prev_sample
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t)).numpy()
        got = samplers.ddpm_step(
            output,
            x_t=x_t,
            noise=noise,
            log_snr_t=ours.log_snr[t],
            log_snr_s=ours.log_snr[t - 1] if t else jnp.float32(jnp.inf),
            schedule=ours,
        )
        # diffusers' own 1 − ᾱ has few digits left at small t.
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=3e-4)


@pytest.mark.torch
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": True},
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": False, "prediction_type": "v_prediction"},
        {"clip_sample": True, "prediction_type": "sample", "clip_sample_range": 0.5},
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_ddim_step_of_diffusers(options, eta):
    torch, theirs, ours = pair_of_schedulers("DDIMScheduler", **options)
    theirs.set_timesteps(20)
    rng = np.random.default_rng(0)
    output, x_t, noise = np.float32(rng.normal(size=(3, 2, 1, 3, 3)))
    times = schedules.timesteps(ours, 20)
    final = jnp.float32(jnp.inf) if ours.final_alpha_cumprod_one else ours.log_snr[0]
    for k in (0, 10, 19):
        expected = theirs.step(
            torch.tensor(output),
            int(times[k]),
            torch.tensor(x_t),
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=torch.tensor(noise) if eta else None,
        ).prev_sample
        got = samplers.ddim_step(
            output,
            x_t=x_t,
            noise=noise,
            log_snr_t=ours.log_snr[times[k]],
            log_snr_s=ours.log_snr[times[k + 1]] if k < 19 else final,
            schedule=ours,
            eta=eta,
        )
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=3e-4)


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": True, "timestep_spacing": "trailing"},
    ],
    ids=["stable-diffusion", "trailing"],
)
def test_whole_ddim_chain_of_diffusers(options):
    torch, theirs, ours = pair_of_schedulers("DDIMScheduler", **options)
    theirs.set_timesteps(10)
    x = np.float32(np.random.default_rng(0).normal(size=(2, 1, 2, 2)))
    expected = torch.tensor(x)
    for t in theirs.timesteps:
        output = torch.tanh(0.8 * expected)
        step = theirs.step(output, int(t), expected, use_clipped_model_output=True)
        expected = step.prev_sample
    got = samplers.sample(
        lambda x_t, t: jnp.tanh(0.8 * x_t), ours, jax.random.key(0), jnp.asarray(x), steps=10
    )
    np.testing.assert_allclose(got.x_0, expected.numpy(), rtol=1e-3, atol=3e-4)
