"""Path KL between two denoisers and the negative ELBO of images, in nats."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = [
    "Chain",
    "NelboTerms",
    "bits_per_dim",
    "chain",
    "nelbo_terms",
    "path_kl",
    "path_kl_weights",
    "prior_kl",
    "reconstruction",
]


def path_kl_weights(schedule: schedules.NoiseSchedule, variance: str = "fixed_small") -> Array:
    """w_t such that Σ_t w_t E‖ε_p − ε_q‖² is the KL of two ancestral chains, in nats, [T].

    The chains take unit steps t → t−1 with equal variances, and x_t follows the first one. By the
    variance of `samplers.ancestral_variance` the weights are:

    - "fixed_small": w_t = ½ expm1(logSNR_{t−1} − logSNR_t) (Kingma et al. 2021, eq. 14).
    - "fixed_large": w_t = β_t/(2 α_t (1−ᾱ_t)), which is β_t²/(2σ_t² α_t (1−ᾱ_t)) at σ_t² = β_t
      (Ho et al. 2020, eq. 12).
    - "fixed_geometric": the geometric mean of the two.

    At t = 0 the posterior variance vanishes. As Ho et al. do, v_1, that of t = 1, stands in for
    it: w_0 = β_0²/(2 v_1 α_0 (1−ᾱ_0)). At a zero terminal SNR, where ε carries no image, the last
    weight is infinite. Computed in float64 on the host: the schedule must not be traced.

    By the data-processing inequality the path KL bounds the KL of what the two chains generate
    from above: "path KL ≥ b" is weaker than "KL ≥ b". For exact denoisers and ever finer steps
    it tends to the KL of the two image distributions, ½ ∫ E‖ε_p − ε_q‖² d logSNR. With few
    steps it does not equal it. We measured a mixture of Gaussians against one of its components,
    in 40 steps of 1/3 in log-SNR. "fixed_small" gave 19 % more than the KL, "fixed_large" 10 %
    less and "fixed_geometric" 3 % more.

    Args:
      schedule: not traced.
      variance: of the two chains: "fixed_small", "fixed_large" or "fixed_geometric".

    Raises:
      ValueError: for another variance.

    Example:
      The SNR falls from 1 to 1/3: w_1 = ½ (3 − 1).

      >>> from jax_unlearn import divergences, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> round(float(divergences.path_kl_weights(schedule)[1]), 3)
      1.0
    """
    log_snr = np.asarray(schedule.log_snr, np.float64)
    log_alphas = -np.logaddexp(0.0, -log_snr)
    previous = np.concatenate([[0.0], log_alphas[:-1]])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        beta = -np.expm1(log_alphas - previous)
        alpha = np.exp(log_alphas - previous)
        one_minus = -np.expm1(log_alphas)
        posterior = beta * -np.expm1(previous) / one_minus
        posterior[0] = posterior[1]
        small = 0.5 * np.expm1(np.concatenate([[0.0], log_snr[:-1]]) - log_snr)
        small[0] = beta[0] ** 2 / (2 * posterior[0] * alpha[0] * one_minus[0])
        large = beta / (2 * alpha * one_minus)
    weights = {
        "fixed_small": small,
        "fixed_large": large,
        "fixed_geometric": np.sqrt(small * large),
    }
    if variance not in weights:
        raise ValueError(f"variance {variance!r} is not one of {list(weights)}.")
    return jnp.asarray(weights[variance], jnp.float32)


class Chain(NamedTuple):
    """An ancestral chain: the shape of an event, its time steps, log-SNRs and path-KL weights.

    Attributes:
      schedule: whose time steps it visits.
      shape: of one example, without the batch axis.
      times: integer, falling, [steps].
      log_snr: at these, [steps].
      following: after each step, [steps]; the last is +∞, the clean image.
      weights: w of Σ_t w_t ‖ε_p − ε_q‖², in nats, [steps].
    """

    schedule: schedules.NoiseSchedule
    shape: tuple[int, ...]
    times: Array
    log_snr: Array
    following: Array
    weights: Array


def chain(schedule: schedules.NoiseSchedule, shape: tuple[int, ...], steps: int) -> Chain:
    """The ancestral chain on `steps` of the schedule's time steps, with its path-KL weights.

    They are `path_kl_weights` of the sub-grid. For posterior variances that is
    ½ expm1(logSNR_s − logSNR_t) from t to the next s. The last step adds no noise; its weight is
    that of a step with the variance of the one before it.

    Raises:
      ValueError: for fewer than 2 steps or too many, or a zero terminal SNR.

    Example:
      >>> from jax_unlearn import divergences, schedules
      >>> schedule = schedules.noise_schedule("linear", num_steps=1000)
      >>> found = divergences.chain(schedule, (28, 28, 1), 4)
      >>> found.times.tolist()
      [750, 500, 250, 0]
    """
    if steps < 2:
        raise ValueError(f"a chain with path-KL weights takes at least 2 steps, not {steps}.")
    times = schedules.timesteps(schedule, steps)
    log_snr = np.asarray(schedule.log_snr)[times]
    if np.isneginf(log_snr[0]):
        raise ValueError(
            "the chain starts at a zero terminal SNR, where ε carries no image and the path KL is "
            "infinite: use spacing='leading' with fewer steps than the schedule has."
        )
    # On the host: a chain may be made while a function around it is traced.
    rising: Any = log_snr[::-1]
    grid = dataclasses.replace(schedule, log_snr=rising)
    weights = path_kl_weights(grid, schedule.variance_type)[::-1]
    following = np.append(log_snr[1:], np.float32(np.inf))
    arrays = (jnp.asarray(part) for part in (times, log_snr, following, weights))
    return Chain(schedule, tuple(shape), *arrays)


def path_kl(
    apply: Denoiser,
    params: Params,
    reference: Params,
    schedule: schedules.NoiseSchedule,
    *,
    x_t: Array,
    t: Array,
    cond: Condition,
    weighting: losses.TimeWeighting,
) -> Array:
    """(w_t/π_t) ‖ε_θ(x_t, t) − ε_ref(x_t, t)‖² -> [batch], in nats under `path_kl_weights`.

    With x_t from noised samples of the reference model its mean is the forward path KL
    KL(q‖p_θ); with x_t from trajectories of p_θ it is the reverse one, KL(p_θ‖q).

    Args:
      apply: the denoiser.
      params: θ.
      reference: the reference model's parameters.
      schedule: its noise schedule.
      x_t: noisy images [batch, ...].
      t: integer time steps [batch].
      cond: the condition of each image.
      weighting: weights and probabilities of the time steps.

    Example:
      Two networks whose ε differ by 3 everywhere, at a step that weighs 1 and is drawn half the
      time: 1/0.5 · 3².

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import divergences, losses, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.time_weighting(divergences.path_kl_weights(schedule))
      >>> kl = divergences.path_kl(
      ...     lambda params, x_t, t, cond: params * jnp.ones_like(x_t), 4.0, 1.0, schedule,
      ...     x_t=jnp.zeros((1, 1)), t=jnp.array([1]), cond=None, weighting=weighting,
      ... )
      >>> round(float(kl[0]), 2)
      18.0
    """
    ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond)
    theirs = losses.predict_epsilon(apply, reference, schedule, x_t=x_t, t=t, cond=cond)
    return losses.importance(weighting, t) * losses.squared_error(ours, theirs)


def prior_kl(schedule: schedules.NoiseSchedule, x_0: Array) -> Array:
    """KL(q(x_T|x_0) ‖ N(0, 1)) = ½ Σ (ᾱ x_0² − ᾱ − log(1−ᾱ)) in nats -> [batch].

    Args:
      schedule: gives ᾱ, that of its last step.
      x_0: clean images [batch, ...].

    Example:
      ᾱ = 1/4 and one pixel of 1: ½ (1/4 − 1/4 − log(3/4)).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import divergences, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> round(float(divergences.prior_kl(schedule, jnp.ones((1, 1)))[0]), 4)
      0.1438
    """
    last = schedule.log_snr[-1]
    alpha_cumprod = jax.nn.sigmoid(last)
    terms = alpha_cumprod * jnp.square(x_0) - alpha_cumprod + jax.nn.softplus(last)
    return 0.5 * terms.sum(axis=tuple(range(1, x_0.ndim)))


def reconstruction(
    schedule: schedules.NoiseSchedule, x_0: Array, mean: Array, *, discrete: bool = True
) -> Array:
    """−log p(x_0 | x at t = 0) in nats -> [batch].

    p is a Gaussian around `mean`, the network's estimate of x_0 at t = 0, with the posterior
    variance of t = 1. For 8-bit images in [−1, 1] it is discretised to the 256 grey levels, in bins
    of width 2/255, the outer two open (Ho et al. 2020, eq. 13). Otherwise, for latents, it is
    the density, which may exceed one.

    Args:
      schedule: gives the variance.
      x_0: clean images [batch, ...].
      mean: of the shape of x_0.
      discrete: whether x_0 are 8-bit images.

    Example:
      ᾱ = 1/2, then 1/4, so that the variance is 1/2 · (1/2)/(3/4) = 1/3. At the mean the density is
      1/√(2π/3), and its negative logarithm ½ log(2π/3).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import divergences, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> x_0 = jnp.zeros((1, 1))
      >>> nats = divergences.reconstruction(schedule, x_0, mean=x_0, discrete=False)
      >>> round(float(nats[0]), 4)
      0.3696
    """
    first, second = schedule.log_snr[:2]
    deviation = jnp.sqrt(samplers.ancestral_variance(second, first))
    dimensions = tuple(range(1, x_0.ndim))
    if not discrete:
        return -jax.scipy.stats.norm.logpdf(x_0, mean, deviation).sum(axis=dimensions)
    upper = (x_0 - mean + 1 / 255) / deviation
    lower = (x_0 - mean - 1 / 255) / deviation
    # log(Φ(u) − Φ(l)), on the side of the tail where both are small.
    flip = (upper + lower) > 0
    high, low = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    inside = log_ndtr(high) + jnp.log(-jnp.expm1(log_ndtr(low) - log_ndtr(high)))
    log_p = jnp.where(
        x_0 < -1 + 1 / 255,
        log_ndtr(upper),
        jnp.where(x_0 > 1 - 1 / 255, log_ndtr(-lower), inside),
    )
    return -log_p.sum(axis=dimensions)


class NelboTerms(NamedTuple):
    """The three parts of the negative ELBO, each [batch], in nats."""

    prior: Array
    diffusion: Array
    reconstruction: Array

    @property
    def total(self) -> Array:
        """The negative ELBO, an upper bound of −log p(x_0), in nats, [batch]."""
        return self.prior + self.diffusion + self.reconstruction


def nelbo_terms(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: Array,
    cond: Condition,
    draws: int = 1,
    probabilities: Array | None = None,
    discrete: bool = True,
) -> NelboTerms:
    """An unbiased estimate of the negative ELBO of images under the ancestral sampler.

    −log p(x_0) ≤ KL(q(x_T|x_0)‖N(0,1)) + Σ_{t≥1} ½(SNR_{t−1} − SNR_t) E‖x_0 − x̂_0(x_t, t)‖²
    − E log p(x_0|x at 0), with posterior ("fixed_small") variances (Ho et al. 2020, eq. 5;
    Kingma et al. 2021, eq. 14). x̂_0 is clipped where the schedule's samplers clip it: it is
    the bound of the chain that is sampled. Without clipping the middle sum is that of
    `path_kl_weights` and ε. Written in x_0 it is finite at a zero terminal SNR too.

    Args:
      apply: the denoiser.
      params: its parameters.
      schedule: its noise schedule; T and the weights come from it.
      key: a PRNG key; the same key gives the same noise and time steps for every params.
      x_0: images [batch, height, width, channels] on the 256 levels of [−1, 1], or latents.
      cond: the condition of each image.
      draws: time steps drawn for each image; each draw is stratified over the images.
      probabilities: of t, [T]; None draws in proportion to √((SNR_{t−1} − SNR_t)/(1 + SNR_t)).
      discrete: whether x_0 are 8-bit images, and p(x_0) their probability; or, for latents,
        their density (`reconstruction`).

    Returns:
      The three terms, [batch] each, in nats.

    Example:
      A network that knows that all images are 0 leaves nothing to the steps between. The ends cost
      what `prior_kl` and `reconstruction` say.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import divergences, schedules
      >>> schedule = schedules.noise_schedule(
      ...     trained_betas=[0.5, 0.5], prediction_type="sample"
      ... )
      >>> terms = divergences.nelbo_terms(
      ...     lambda params, x_t, t, cond: jnp.zeros_like(x_t), None, schedule, jax.random.key(0),
      ...     x_0=jnp.zeros((1, 1)), cond=None, discrete=False,
      ... )
      >>> [round(float(term[0]), 4) for term in terms], round(float(terms.total[0]), 4)
      ([0.0188, 0.0, 0.3696], 0.3885)
    """
    snr = np.exp(np.asarray(schedule.log_snr, np.float64))
    drop = np.concatenate([[0.0], snr[:-1] - snr[1:]])
    if probabilities is None:
        spread = np.sqrt(drop / (1 + snr))
        probabilities = jnp.asarray(spread / spread.sum(), jnp.float32)
    weighting = losses.TimeWeighting(jnp.asarray(drop / 2, jnp.float32), probabilities)
    diffusion_key, last_key = jax.random.split(key)

    def x_0_of(x_t: Array, t: Array) -> Array:
        prediction = apply(params, x_t, t, cond)
        return schedules.clipped(prediction, schedule, x_t=x_t, log_snr=schedule.log_snr[t]).x_0

    def one(draw_key: Array) -> Array:
        drawn = losses.draw(draw_key, x_0, probabilities)
        x_t = schedules.add_noise(x_0=x_0, noise=drawn.noise, log_snr=schedule.log_snr[drawn.t])
        error = losses.squared_error(x_0_of(x_t, drawn.t), x_0)
        return losses.importance(weighting, drawn.t) * error

    diffusion = jax.lax.map(one, jax.random.split(diffusion_key, draws)).mean(axis=0)
    first = jnp.zeros(x_0.shape[:1], jnp.int32)
    noise = jax.random.normal(last_key, x_0.shape, x_0.dtype)
    x_first = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[first])
    return NelboTerms(
        prior=prior_kl(schedule, x_0),
        diffusion=diffusion,
        reconstruction=reconstruction(schedule, x_0, x_0_of(x_first, first), discrete=discrete),
    )


def bits_per_dim(nats: Array, dimensions: int) -> Array:
    """Bits per dimension: nats / (d log 2).

    Example:
      Eight bits for each of three pixels of 256 equally likely levels.

      >>> import numpy as np
      >>> from jax_unlearn import divergences
      >>> round(float(divergences.bits_per_dim(3 * np.log(256), 3)), 6)
      8.0
    """
    return nats / (dimensions * np.log(2.0))
