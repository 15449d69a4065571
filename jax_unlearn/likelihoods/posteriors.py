"""Posteriors of concepts at every noise level of an image, and the scores of what they reweight.

Of a mixture q = Σ_c π_c q_c the posterior p(c|x_t) is a martingale along noising and denoising:
E[p(c|x_0) | x_t] = p(c|x_t). So ∇ log E[w(x_0) | x_t] is known without noise for any w that is
linear in the posteriors. Tracking them along a path is due to Koulischer et al. 2025 ("Dynamic
negative guidance of diffusion models", 2410.14398).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.likelihoods.classifier import count_concepts, for_rows
from jax_unlearn.typing import Array, ArrayLike, Denoiser, Params

__all__ = [
    "PosteriorPath",
    "mixture_shares",
    "path_times",
    "path_weighting",
    "posterior_path",
]


class PosteriorPath(NamedTuple):
    """Points of one noising path of each image, the noisiest first.

    Attributes:
      x_t: [steps, batch, ...].
      posterior: u_i(x_t), the probability of set i of concepts at x_t, [steps, batch, sets].
      push: σ_t ∇u_i(x_t) = u_i Σ_c p_c ε_c − Σ_{c∈i} p_c ε_c, [steps, batch, sets, ...].
      log_posterior: of each concept at the least noisy point, [batch, concepts].
      epsilon: Σ_c p_c ε_c(x_t), not clipped, [steps, batch, ...].
    """

    x_t: Array
    posterior: Array
    push: Array
    log_posterior: Array
    epsilon: Array


def posterior_path(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: Array,
    times: Array,
    concepts: Any,
    members: ArrayLike,
    log_prior: ArrayLike | None = None,
) -> PosteriorPath:
    """Noises each image along one path and follows the posterior of the concepts back down it.

    p(c|x_s) = p(c|x_t) N(x_s; μ_c(x_t), v) / Z. μ_c is the `samplers.ancestral_mean` of the step
    from t to the less noisy s, and v its "fixed_geometric" variance. For exact denoisers and ever
    finer steps that is so for every path, without noise. The draws of
    `likelihoods.diffusion_classifier` are independent, and only the average of many has a limit.
    Memory is that of all concepts' forward passes at one time step.

    Args:
      apply: the conditional denoiser.
      params: its parameters.
      schedule: its noise schedule.
      key: a PRNG key.
      x_0: clean images [batch, ...].
      times: integer time steps, falling strictly, [steps].
      concepts: conditions with a leading axis [concepts, ...].
      members: which concepts are in which set, [sets, concepts], 0 or 1.
      log_prior: [batch, concepts] or [concepts], up to a constant; None is uniform.

    Raises:
      ValueError: for concepts without one common leading axis, or members or a prior that do
        not fit them.

    Example:
      The concepts are the points −1 and 1: network c predicts (x_t − α c)/σ. In the noise both are
      equally likely; further down the path the image 1 is known to be the second.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> def apply(params, x_t, t, cond):
      ...     alpha, sigma = schedules.alpha_sigma(schedule.log_snr[t], x_t)
      ...     return (x_t - alpha * cond[:, None]) / sigma
      >>> path = likelihoods.posterior_path(
      ...     apply, None, schedule, jax.random.key(0), x_0=jnp.ones((1, 1)),
      ...     times=jnp.array([99, 60, 30, 5]), concepts=jnp.array([-1.0, 1.0]), members=jnp.eye(2),
      ... )
      >>> [[round(float(u), 2) for u in path.posterior[k, 0]] for k in (0, -1)]
      [[0.5, 0.5], [0.0, 1.0]]
    """
    members = jnp.asarray(members, jnp.float32)
    count = count_concepts(concepts)
    prior = jnp.zeros(count) if log_prior is None else jnp.asarray(log_prior, jnp.float32)
    if members.ndim != 2 or members.shape[1] != count or prior.shape[-1] != count:
        raise ValueError(
            f"{count} concepts take members [sets, {count}] and a prior [..., {count}], not "
            f"{list(members.shape)} and {list(prior.shape)}."
        )
    x_0, times = jnp.asarray(x_0), jnp.asarray(times)
    batch, steps = x_0.shape[0], times.shape[0]
    log_snr = schedule.log_snr[times]

    def noised(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> Any:
        x, before = carry
        noise_key, now = inputs
        # x_t given x_s of less noise: √(ᾱ_t/ᾱ_s) x_s and the noise that is missing.
        ratio = jax.nn.sigmoid(now) / jax.nn.sigmoid(before)
        x = jnp.sqrt(ratio) * x + jnp.sqrt(1 - ratio) * jax.random.normal(noise_key, x.shape)
        return (x, now), x

    keys = jax.random.split(key, steps)
    clean = jnp.asarray(jnp.inf, log_snr.dtype)
    _, path = jax.lax.scan(noised, (x_0, clean), (keys, log_snr), reverse=True)

    def step(log_posterior: Array, inputs: tuple[Array, ...]) -> Any:
        x_t, x_s, time, at, following = inputs
        t, at_each = jnp.full((batch,), time), jnp.full((batch,), at)
        variance = samplers.ancestral_variance(at, following, "fixed_geometric")

        def one(concept: Any) -> tuple[Array, Array, Array]:
            prediction = apply(params, x_t, t, for_rows(concept, batch))
            found = schedules.clipped(prediction, schedule, x_t=x_t, log_snr=at_each)
            mean = samplers.ancestral_mean(found.x_0, x_t=x_t, log_snr_t=at, log_snr_s=following)
            gained = -losses.squared_error(x_s, mean) / (2 * variance)
            kind = schedule.prediction_type
            own = schedules.convert(prediction, x_t=x_t, log_snr=at_each, prediction_type=kind)
            return found.epsilon, gained, own.epsilon

        epsilon, gained, unclipped = jax.lax.map(one, concepts, batch_size=count)
        p = jnp.exp(log_posterior)
        mean, whole = (
            jnp.einsum("bc,cb...->b...", p, each, precision="highest")
            for each in (epsilon, unclipped)
        )
        posterior = jnp.matmul(p, members.T, precision="highest")
        shown = jnp.einsum("bc,ic,cb...->bi...", p, members, epsilon, precision="highest")
        push = jnp.einsum("bi,b...->bi...", posterior, mean) - shown
        found = posterior, push, log_posterior, whole
        return jax.nn.log_softmax(log_posterior + gained.T), found

    start = jnp.broadcast_to(jax.nn.log_softmax(prior), (batch, count))
    following = jnp.concatenate([path[1:], path[-1:]])
    # The last point has no successor: a step of its own length stands in, and is not used.
    after = jnp.append(log_snr[1:], log_snr[-1] + 1.0)
    _, (posterior, push, log_posteriors, whole) = jax.lax.scan(
        step, start, (path, following, times, log_snr, after)
    )
    return PosteriorPath(path, posterior, push, log_posteriors[-1], whole)


def mixture_shares(log_posterior: ArrayLike, *, iterations: int = 100) -> np.ndarray:
    """The shares π of the mixture Σ_c π_c q_c that fit samples best, by EM, [concepts].

    Args:
      log_posterior: log p(c|x_n) under equal shares, up to a constant for each sample,
        [samples, concepts].
      iterations: of EM, each of which raises the likelihood.

    Returns:
      Shares that sum to 1, with one sample's worth of equal shares added, so that none is 0.

    Raises:
      ValueError: for no samples, or another shape.

    Example:
      Three samples are surely of the first concept and one of the second: (3 + ½)/5 and (1 + ½)/5.

      >>> import numpy as np
      >>> from jax_unlearn import likelihoods
      >>> log_posterior = np.log([[1.0, 1e-9]] * 3 + [[1e-9, 1.0]])
      >>> likelihoods.mixture_shares(log_posterior).round(3).tolist()
      [0.7, 0.3]
    """
    log_posterior = np.asarray(log_posterior, np.float64)
    if log_posterior.ndim != 2 or not log_posterior.size:
        raise ValueError(f"expected [samples, concepts], got {list(log_posterior.shape)}.")
    likelihood = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True))
    samples, count = likelihood.shape
    shares = np.full(count, 1 / count)
    for _ in range(iterations):
        weighted = likelihood * shares
        shares = (weighted / weighted.sum(axis=1, keepdims=True)).mean(axis=0)
    return (samples * shares + 1 / count) / (samples + 1)


def path_weighting(
    schedule: schedules.NoiseSchedule, *, cleanest: float = 4.0
) -> losses.TimeWeighting:
    """Time steps drawn evenly in log-SNR, weighted so that ‖ε_p − ε_q‖² is a path KL in nats.

    w_t = ½ (logSNR_{t−1} − logSNR_t), the limit of `divergences.path_kl_weights` for fine steps,
    and π_t ∝ w_t. Both are zero above a log-SNR of `cleanest`, where what a network predicts hardly
    depends on its condition.

    Args:
      schedule: not traced.
      cleanest: the largest log-SNR.

    Raises:
      ValueError: for a zero terminal SNR, or one above `cleanest`.

    Example:
      The log-SNR 6 is left out, and the steps down to 2 and to 0 count 4/2 and 2/2.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.NoiseSchedule(jnp.array([6.0, 2.0, 0.0]))
      >>> weighting = likelihoods.path_weighting(schedule)
      >>> weighting.weights.tolist(), [round(float(p), 3) for p in weighting.probabilities]
      ([0.0, 2.0, 1.0], [0.0, 0.667, 0.333])
    """
    log_snr = np.asarray(schedule.log_snr, np.float64)
    if not np.isfinite(log_snr).all() or log_snr[-1] > cleanest:
        raise ValueError(
            f"log-SNRs from {log_snr[0]:.3g} to {log_snr[-1]:.3g} are not finite and below "
            f"{cleanest:.3g} in the end: no law of time steps."
        )
    widths = -0.5 * np.diff(log_snr, prepend=2 * log_snr[0] - log_snr[1])
    widths = np.where(log_snr <= cleanest, widths, 0.0)
    return losses.TimeWeighting(
        jnp.asarray(widths, jnp.float32), jnp.asarray(widths / widths.sum(), jnp.float32)
    )


def path_times(weighting: losses.TimeWeighting, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Time steps for `posterior_path`: one drawn in each of `steps` equal parts of π, falling.

    Args:
      weighting: its probabilities are π.
      steps: how many.
      rng: numpy's generator, of which `steps` uniforms are drawn.

    Raises:
      ValueError: for more steps than have a probability.

    Example:
      As many as have a probability are all of them.

      >>> import numpy as np
      >>> from jax_unlearn import likelihoods, losses
      >>> weighting = losses.TimeWeighting(np.ones(3), np.array([0.0, 0.7, 0.3]))
      >>> likelihoods.path_times(weighting, 2, np.random.default_rng(0)).tolist()
      [2, 1]
    """
    probabilities = np.asarray(weighting.probabilities, np.float64)
    possible = np.flatnonzero(probabilities)
    if not 1 <= steps <= len(possible):
        raise ValueError(f"steps must be 1 to {len(possible)}, not {steps}.")
    cumulative = np.cumsum(probabilities[possible])
    drawn = (np.arange(steps) + rng.uniform(size=steps)) / steps * cumulative[-1]
    places, order = np.searchsorted(cumulative, drawn, side="right"), np.arange(steps)
    # Where a step has more than one part, its neighbours stand in.
    places = np.maximum.accumulate(places - order) + order
    return possible[np.minimum(places, len(possible) - steps + order)][::-1].astype(np.int32)
