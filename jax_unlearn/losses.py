"""Denoising losses, one value an example, and the importance-sampled mixture of two of them.

Every loss has the form Σ_t w_t E‖ε − ε_θ(x_t, t)‖², the square summed over an example's
dimensions. The weights w say which: `simple_weights` is the mean squared error of Ho et al.
(2020), `divergences.path_kl_weights` the path KL in nats. One draw of t ∼ π estimates the sum
by (w_t/π_t) ‖·‖², so π is free to follow where the loss is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import schedules
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = [
    "Draws",
    "Mixture",
    "TimeWeighting",
    "denoising_loss",
    "draw",
    "effective_sample_size",
    "example_keys",
    "importance",
    "mixture",
    "noise_to_signal_weights",
    "predict_epsilon",
    "simple_weights",
    "squared_error",
    "time_weighting",
]


class TimeWeighting(NamedTuple):
    """Weights w_t [T] of a loss and the probabilities π_t [T] with which t is drawn."""

    weights: Array
    probabilities: Array


def simple_weights(num_steps: int, dimensions: int) -> Array:
    """w_t = 1/(T d): with it the loss is the mean squared error of ε, a dimension and step."""
    return jnp.full((num_steps,), 1.0 / (num_steps * dimensions))


def noise_to_signal_weights(log_snr: Array, dimensions: int, most: float = 10.0) -> Array:
    """w_t ∝ min(σ_t/α_t, most), [T], with the sum 1/d of `simple_weights`.

    Between the losses of ε, w = 1, and of x_0, w = σ²/α². A tilt p_λ ∝ q w_λ of whole images moves
    x̂_0 where x_t leaves undecided which image it will be, and nowhere else: under uniform weights
    steps of little noise bring their own noise to the gradient, and nothing of what is asked.

    Args:
      log_snr: of the schedule, [T].
      dimensions: d, of one example.
      most: the largest ratio, > 0.
    """
    ratios = jnp.minimum(jnp.exp(-0.5 * log_snr), most)
    return ratios / (ratios.sum() * dimensions)


def time_weighting(
    weights: ArrayLike, errors: ArrayLike | None = None, *, uniform: float = 0.1
) -> TimeWeighting:
    """Pairs weights with probabilities: π_t ∝ w_t e_t, mixed with `uniform` of the uniform.

    With e_t near the typical ‖ε − ε_θ‖² at t each draw contributes about the same amount,
    which is what keeps the estimate's variance low when w spans decades. No importance
    weight exceeds T/uniform times a uniform draw's.

    Args:
      weights: w_t ≥ 0, [T].
      errors: e_t > 0, [T]; None draws t uniformly.
      uniform: the defensive share, in (0, 1].
    """
    weights = np.asarray(weights, np.float64)
    flat = np.full(weights.shape, 1.0 / weights.size)
    if errors is None:
        probabilities = flat
    else:
        focus = weights * np.asarray(errors, np.float64)
        probabilities = (1 - uniform) * focus / focus.sum() + uniform * flat
    return TimeWeighting(jnp.asarray(weights, jnp.float32), jnp.asarray(probabilities, jnp.float32))


class Draws(NamedTuple):
    """The randomness of a batch: noise like x_0, integer t [batch], uniform in [0, 1) [batch]."""

    noise: Array
    t: Array
    uniform: Array


def _positions(count: int, axis_name: str | None) -> tuple[Array, int]:
    """The place of each of this shard's examples among all, [count], and how many all are."""
    if axis_name is None:
        return jnp.arange(count), count
    offset = jax.lax.axis_index(axis_name) * count
    return offset + jnp.arange(count), count * jax.lax.axis_size(axis_name)


def example_keys(key: Array, count: int, *, axis_name: str | None = None) -> Array:
    """fold_in(key, j) for example j, [count]; j counts over all shards of `axis_name`."""
    index, _ = _positions(count, axis_name)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def draw(key: Array, x_0: Array, probabilities: Array, *, axis_name: str | None = None) -> Draws:
    """Draws noise and stratified time steps for a batch, whatever devices it is spread over.

    Example j of n gets its own key fold_in(key, j) and u_j = frac((j + U_j)/n + U), each u_j
    uniform in [0, 1) and one in every n-th of it; t is the π-quantile of u_j. Inside a pmap or
    shard_map over `axis_name`, j counts over all shards, so that a sharded batch sees exactly
    the noise of the same batch on one device.
    """
    index, total = _positions(x_0.shape[0], axis_name)
    time_key, example_key = jax.random.split(key)
    keys = example_keys(example_key, x_0.shape[0], axis_name=axis_name)

    def one(example: Array) -> tuple[Array, Array]:
        noise_key, uniform_key = jax.random.split(example)
        noise = jax.random.normal(noise_key, x_0.shape[1:], x_0.dtype)
        return noise, jax.random.uniform(uniform_key, (2,))

    noise, uniform = jax.vmap(one)(keys)
    u = ((index + uniform[:, 0]) / total + jax.random.uniform(time_key)) % 1.0
    cumulative = jnp.cumsum(probabilities)
    t = jnp.searchsorted(cumulative, u * cumulative[-1], side="right")
    t = jnp.minimum(t, probabilities.shape[0] - 1).astype(jnp.int32)
    return Draws(noise, t, uniform[:, 1])


def squared_error(x: Array, y: Array) -> Array:
    """‖x − y‖², summed over all but the first axis, -> [batch]."""
    return jnp.sum(jnp.square(x - y), axis=tuple(range(1, x.ndim)))


def predict_epsilon(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    *,
    x_t: Array,
    t: Array,
    cond: Condition,
    clip: bool = False,
) -> Array:
    """ε_θ(x_t, t), whatever the network predicts.

    With `clip` it is that of the samplers' own chain, which clips x̂_0 where the schedule says so.
    """
    return schedules.convert(
        apply(params, x_t, t, cond),
        x_t=x_t,
        log_snr=schedule.log_snr[t],
        prediction_type=schedule.prediction_type,
        clip_range=schedule.clip_range if clip else None,
    ).epsilon


def denoising_loss(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    *,
    x_0: Array,
    cond: Condition,
    draws: Draws,
    weighting: TimeWeighting,
    clip: bool = False,
) -> Array:
    """(w_t/π_t) ‖ε − ε_θ(α x_0 + σ ε, t)‖² -> [batch], in the unit of the weights.

    Its mean over draws is Σ_t w_t E‖ε − ε_θ‖². With `clip`, ε_θ is that of the clipping chain.
    """
    x_t = schedules.add_noise(x_0=x_0, noise=draws.noise, log_snr=schedule.log_snr[draws.t])
    epsilon = predict_epsilon(apply, params, schedule, x_t=x_t, t=draws.t, cond=cond, clip=clip)
    return importance(weighting, draws.t) * squared_error(epsilon, draws.noise)


def importance(weighting: TimeWeighting, t: Array) -> Array:
    """w_t/π_t -> [batch]."""
    return weighting.weights[t] / weighting.probabilities[t]


class Mixture(NamedTuple):
    """Noisy images from a mixture of two noised images, and what each needs to use them.

    Attributes:
      x_t: [batch, ...].
      noise_x: the noise that would have led from x to x_t, (x_t − α x)/σ.
      noise_a: the same from a.
      weight_x: q(x_t|x) / mixture density, [batch].
      weight_a: q(x_t|a) / mixture density, [batch].
    """

    x_t: Array
    noise_x: Array
    noise_a: Array
    weight_x: Array
    weight_a: Array


def mixture(
    *, x: Array, a: Array, noise: Array, choose_a: Array, log_snr: Array, mixing: ArrayLike
) -> Mixture:
    """One noisy image for two losses: importance sampling from a defensive mixture.

    x_t ∼ (1−γ) q(·|x) + γ q(·|a), with γ = mixing, and
    weight_x = 1/((1−γ) + γ e^{d_x − d_a}), weight_a = 1/((1−γ) e^{d_a − d_x} + γ),
    d_• = ‖x_t − α •‖²/(2σ²). Then E[weight_x f(x_t)] = E_{q(·|x)} f and likewise for a, in
    one forward pass of the network instead of two (Alberti et al. 2025, SISS). In high
    dimension one weight is ~0 and the other ~1/γ: see `effective_sample_size`.

    Args:
      x: kept images [batch, ...].
      a: images to forget [batch, ...].
      noise: standard normal, like x.
      choose_a: whether x_t comes from a, boolean [batch], true with probability γ.
      log_snr: at t, [batch].
      mixing: γ in (0, 1).
    """
    alpha, sigma = schedules.alpha_sigma(log_snr, x)
    chosen = choose_a.reshape(choose_a.shape + (1,) * (x.ndim - 1))
    x_t = alpha * jnp.where(chosen, a, x) + sigma * noise
    noise_x, noise_a = (x_t - alpha * x) / sigma, (x_t - alpha * a) / sigma
    zeros = jnp.zeros_like(x)
    difference = 0.5 * (squared_error(noise_a, zeros) - squared_error(noise_x, zeros))
    log_x, log_a = jnp.log1p(-jnp.asarray(mixing)), jnp.log(jnp.asarray(mixing))
    return Mixture(
        x_t=x_t,
        noise_x=noise_x,
        noise_a=noise_a,
        weight_x=jnp.exp(-jnp.logaddexp(log_x, log_a - difference)),
        weight_a=jnp.exp(-jnp.logaddexp(log_x + difference, log_a)),
    )


def effective_sample_size(weights: Array, *, axis_name: str | None = None) -> Array:
    """(Σ w)²/(n Σ w²) in (0, 1]: the share of independent samples that weighted ones equal."""
    sums = jnp.stack([weights.sum(), jnp.square(weights).sum(), jnp.asarray(1.0 * weights.size)])
    first, second, count = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return jnp.square(first) / (count * second)
