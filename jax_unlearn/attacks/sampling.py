"""Attacks on how a network is sampled: other starts, other noise, known pixels, a classifier."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import samplers, schedules
from jax_unlearn.typing import Array, ArrayLike

__all__ = ["guided_by", "inpaint", "invert_noise", "stochastic"]


def _following(schedule: schedules.NoiseSchedule, times: ArrayLike) -> tuple[Array, Array]:
    """The log-SNR at each of some falling times, and where DDIM's step from there leads."""
    log_snr = schedule.log_snr[jnp.asarray(times)]
    final = jnp.inf if schedule.final_alpha_cumprod_one else schedule.log_snr[0]
    return log_snr, jnp.append(log_snr[1:], final)


def invert_noise(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    x_0: ArrayLike,
    times: ArrayLike,
    *,
    iterations: int = 1,
) -> Array:
    """DDIM inversion: the noise from which deterministic DDIM goes to given images, [batch, ...].

    DDIM's step from t to the less noisy s is undone by x_t = α_t (x_s − σ_s ε̂)/α_s + σ_t ε̂. The
    ε̂ is that at (x_t, t), which is not known yet. So ε̂(x_s, t) takes its place, and the error
    falls as one over the number of steps. Each further iteration of the fixed point puts the x_t
    found into ε̂. It converges where (σ_t − α_t σ_s/α_s) ε̂ has a slope below 1.

    Args:
      predict: (x_t, integer t [batch]) -> prediction, in the schedule's prediction type.
      schedule: noise schedule.
      x_0: clean images [batch, ...].
      times: those of the sampler, falling as `schedules.timesteps` gives them, [steps]. Inversion
        goes through them backwards.
      iterations: network evaluations a step; 1 is the usual approximation.

    Returns:
      x_t at times[0], which `samplers.denoise` takes back to x_0.

    Raises:
      ValueError: for times that do not fall, or no iterations.

    References:
      Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, section 4.3.
      Mokady et al., "Null-text inversion for editing real images", 2023.

    Example:
      A standard normal needs no flow: its images are their own noise.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks, mixtures, schedules
      >>> schedule = schedules.noise_schedule()
      >>> predict = mixtures.denoiser(mixtures.gaussian_mixture([[0.0]], 1.0), schedule)
      >>> times = schedules.timesteps(schedule, 100)
      >>> x_t = attacks.invert_noise(predict, schedule, jnp.array([[0.7]]), times)
      >>> round(float(x_t[0, 0]), 1)
      0.7
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}.")
    x_0, times = jnp.asarray(x_0), jnp.asarray(times)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times must be time steps [steps], at least one, not {times.shape}.")
    if not isinstance(times, jax.core.Tracer) and not (np.diff(np.asarray(times)) < 0).all():
        raise ValueError("times must fall, from the noise to the image.")
    log_snr, following = _following(schedule, times)

    def body(x_s: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, log_snr_t, log_snr_s = inputs
        alpha_t, sigma_t = schedules.alpha_sigma(log_snr_t, x_s)
        alpha_s, sigma_s = schedules.alpha_sigma(log_snr_s, x_s)

        def iterate(_: Array, x_t: Array) -> Array:
            prediction = predict(x_t, jnp.full(x_t.shape[:1], t))
            epsilon = schedules.clipped(prediction, schedule, x_t=x_t, log_snr=log_snr_t).epsilon
            return alpha_t / alpha_s * (x_s - sigma_s * epsilon) + sigma_t * epsilon

        return jax.lax.fori_loop(0, iterations, iterate, x_s), None

    return jax.lax.scan(body, x_0, (times, log_snr, following), reverse=True)[0]


def inpaint(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: ArrayLike,
    mask: ArrayLike,
    steps: int,
    repeats: int = 1,
) -> Array:
    """Completes images of which a part is known, by deterministic DDIM with replacement.

    At every step the known part of x_t is α x_0 + σ ε, with the noise ε that x_t began from. The
    rest is denoised beside it. This is not exact, since the rest sees the known part in noise
    alone. Of two Gaussian pixels with correlation 0.9 one follows the other by half of what it
    should. Repeats mend this, as in RePaint: x_s is noised back to x_t and denoised once more.
    Five make it 0.80 of 0.90. A part that is independent of the known one needs none.

    Args:
      predict: (x_t, integer t [batch]) -> prediction, in the schedule's prediction type.
      schedule: noise schedule; its spacing decides which time steps are visited.
      key: a PRNG key, of ε and of the noise of repeats.
      x_0: images [batch, ...]; what the mask hides is not read.
      mask: 1 or true where x_0 is known; its shape broadcasts to that of x_0.
      steps: how many time steps, 1 to T.
      repeats: network evaluations at each of them; 1 is replacement alone.

    Returns:
      The completed images, the shape of x_0, with the known part as it was given.

    Raises:
      ValueError: for a mask that does not fit, or a wrong number of steps or repeats.

    References:
      Song et al., "Score-based generative modeling through stochastic differential equations",
      2021, appendix I.2.
      Lugmayr et al., "RePaint: inpainting using denoising diffusion probabilistic models", 2022.

    Example:
      Two modes, (−1, −1) and (1, 1). The known half decides which of them it is.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks, mixtures, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> law = mixtures.gaussian_mixture([[-1.0, -1.0], [1.0, 1.0]], 1e-3)
      >>> x_0 = attacks.inpaint(
      ...     mixtures.denoiser(law, schedule), schedule, jax.random.key(0),
      ...     x_0=jnp.array([[1.0, 0.0], [-1.0, 0.0]]), mask=jnp.array([True, False]), steps=50,
      ... )
      >>> [[round(float(x)) for x in row] for row in x_0]
      [[1, 1], [-1, -1]]
    """
    x_0, mask = jnp.asarray(x_0), jnp.asarray(mask, bool)
    # Of too many axes, or sizes other than 1 and the image's.
    sizes = zip(reversed(mask.shape), reversed(x_0.shape), strict=False)
    if mask.ndim > x_0.ndim or any(given not in (1, size) for given, size in sizes):
        raise ValueError(f"the mask {mask.shape} does not broadcast to the images {x_0.shape}.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    times = jnp.asarray(schedules.timesteps(schedule, steps))
    noise_key, repeat_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x_0.shape, x_0.dtype)

    def body(x_t: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, log_snr_t, log_snr_s = inputs
        known = schedules.add_noise(x_0=x_0, noise=noise, log_snr=log_snr_t)
        ratio = jax.nn.sigmoid(log_snr_t) / jax.nn.sigmoid(log_snr_s)

        def repeat(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x_t = jnp.where(mask, known, carry[0])
            x_s = samplers.ddim_step(
                predict(x_t, jnp.full(x_t.shape[:1], t)),
                x_t=x_t,
                log_snr_t=log_snr_t,
                log_snr_s=log_snr_s,
                schedule=schedule,
            )
            fresh_key = jax.random.fold_in(jax.random.fold_in(repeat_key, t), number)
            fresh = jax.random.normal(fresh_key, x_t.shape, x_t.dtype)
            return jnp.sqrt(ratio) * x_s + jnp.sqrt(1 - ratio) * fresh, x_s

        return jax.lax.fori_loop(0, repeats, repeat, (x_t, x_t))[1], None

    found = jax.lax.scan(body, noise, (times, *_following(schedule, times)))[0]
    return jnp.where(mask, x_0, found)


def guided_by(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    log_likelihood: Callable[[Array], Array],
    scale: ArrayLike,
) -> Callable[[Array, Array], Array]:
    """Classifier guidance: ε̂ − scale σ_t ∇_{x_t} log p(y | x̂_0(x_t)), as a denoiser.

    The classifier sees the network's estimate of the clean image, so that it need not know noisy
    ones. The estimate is clipped where the schedule says so. For one Gaussian and a log p that is
    linear, the result is the denoiser of q(x) p(y | x)^scale exactly. A step of no signal, α = 0,
    is left as it is: there no likelihood of x̂_0 follows from x_t.

    Args:
      predict: (x_t, integer t [batch]) -> prediction, in the schedule's prediction type. Each row
        depends on its own x_t alone.
      schedule: noise schedule.
      log_likelihood: x̂_0 [batch, ...] -> log p(y | x̂_0), [batch], differentiable.
      scale: 1 is Bayes' rule, 0 no guidance.

    Returns:
      A function (x_t, t) -> prediction in the schedule's prediction type, for `samplers.sample`.

    References:
      Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", 2021, algorithm 2.
      Chung et al., "Diffusion posterior sampling for general noisy inverse problems", 2023.

    Example:
      N(0, 1) tilted by exp(2x) is N(2, 1).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks, mixtures, schedules
      >>> schedule = schedules.noise_schedule()
      >>> normal, shifted = (
      ...     mixtures.denoiser(mixtures.gaussian_mixture([[mean]], 1.0), schedule)
      ...     for mean in (0.0, 2.0)
      ... )
      >>> guided = attacks.guided_by(normal, schedule, lambda x_0: 2 * x_0[:, 0], 1.0)
      >>> x_t, t = jnp.array([[0.3]]), jnp.array([200])
      >>> bool(jnp.allclose(guided(x_t, t), shifted(x_t, t), atol=1e-5))
      True
    """

    def guided(x_t: Array, t: Array) -> Array:
        log_snr = schedule.log_snr[t]

        def total(x_t: Array) -> tuple[Array, Array]:
            prediction = predict(x_t, t)
            x_0 = schedules.clipped(prediction, schedule, x_t=x_t, log_snr=log_snr).x_0
            return log_likelihood(x_0).sum(), prediction

        gradient, prediction = jax.grad(total, has_aux=True)(x_t)
        alpha, sigma = schedules.alpha_sigma(log_snr, x_t)
        # x_t is given, and so ε + δ is x_0 − δ σ/α and v + δ/α.
        slope = {"epsilon": alpha, "sample": -sigma, "v_prediction": jnp.ones_like(alpha)}
        share = slope[schedule.prediction_type] / jnp.where(alpha > 0, alpha, 1.0)
        change = -(scale * sigma) * gradient * share
        return prediction + jnp.where(alpha > 0, change, 0.0).astype(prediction.dtype)

    return guided


def stochastic(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    key: Array,
    x_start: ArrayLike,
    *,
    steps: int,
    eta: ArrayLike,
    variance: ArrayLike = 1.0,
) -> Array:
    """DDIM with more noise than it asks for: x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−v) ε̂ + √(f v) z.

    v is η² times the posterior's variance, as in `samplers.ddim_step`, for any η ≥ 0, and f the
    factor of the variance. Beyond η = 1, where 1−ᾱ_s−v would be negative, it is taken as 0. Noise
    that is too large leads the chain off the paths that unlearning closed.

    Args:
      predict: (x_t, integer t [batch]) -> prediction, in the schedule's prediction type.
      schedule: noise schedule; its spacing decides which time steps are visited.
      key: a PRNG key. At f = 1 the draws are those of `samplers.sample`.
      x_start: standard normal noise [batch, ...].
      steps: how many network evaluations, 1 to T.
      eta: η; 0 is deterministic, 1 the ancestral sampler.
      variance: f ≥ 0.

    Returns:
      The images, [batch, ...].

    Raises:
      ValueError: for a wrong number of steps, or a negative η or f.

    Example:
      One point is where all noise goes in the end.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks, mixtures, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> predict = mixtures.denoiser(mixtures.gaussian_mixture([[0.5]], 1e-12), schedule)
      >>> x_0 = attacks.stochastic(
      ...     predict, schedule, jax.random.key(0), jnp.array([[-2.0]]), steps=20, eta=1.4,
      ...     variance=1.02,
      ... )
      >>> round(float(x_0[0, 0]), 3)
      0.5
    """
    for name, value in (("eta", eta), ("variance", variance)):
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) >= 0):
            raise ValueError(f"{name} must not be negative, got {value}.")
    x_start, times = jnp.asarray(x_start), jnp.asarray(schedules.timesteps(schedule, steps))
    deviation = jnp.sqrt(jnp.asarray(variance, x_start.dtype))

    def body(x_t: Array, inputs: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        t, log_snr_t, log_snr_s, step_key = inputs
        x_s = samplers.ddim_step(
            predict(x_t, jnp.full(x_t.shape[:1], t)),
            x_t=x_t,
            noise=deviation * jax.random.normal(step_key, x_t.shape, x_t.dtype),
            log_snr_t=log_snr_t,
            log_snr_s=log_snr_s,
            schedule=schedule,
            eta=eta,
        )
        return x_s, None

    inputs = (times, *_following(schedule, times), jax.random.split(key, steps))
    return jax.lax.scan(body, x_start, inputs)[0]
