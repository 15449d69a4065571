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
    "time_quantiles",
    "time_weighting",
]


class TimeWeighting(NamedTuple):
    """Weights w_t [T] of a loss and the probabilities π_t [T] with which t is drawn.

    Example:
      A loss of two steps that weigh alike, the first drawn three times as often as the second. A
      draw then counts w_t/π_t, and the mean over draws is that of the weights.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses
      >>> weighting = losses.TimeWeighting(jnp.array([0.5, 0.5]), jnp.array([0.75, 0.25]))
      >>> [round(float(ratio), 3) for ratio in losses.importance(weighting, jnp.arange(2))]
      [0.667, 2.0]
    """

    weights: Array
    probabilities: Array


def simple_weights(num_steps: int, dimensions: int) -> Array:
    """w_t = 1/(T d), [T]: the loss is then the mean squared error of ε over steps and dimensions.

    Args:
      num_steps: T.
      dimensions: d, of one example.

    Example:
      >>> from jax_unlearn import losses
      >>> losses.simple_weights(2, 4).tolist()
      [0.125, 0.125]
    """
    return jnp.full((num_steps,), 1.0 / (num_steps * dimensions))


def noise_to_signal_weights(log_snr: Array, dimensions: int, most: float = 10.0) -> Array:
    """w_t ∝ min(σ_t/α_t, most), [T], with the sum 1/d of `simple_weights`.

    It lies between the losses of ε, w = 1, and of x_0, w = σ²/α². A tilt p_λ ∝ q w_λ of whole
    images moves x̂_0 where x_t leaves undecided which image it will be, and nowhere else. Under
    uniform weights steps of little noise bring their own noise to the gradient, and nothing of
    what is asked.

    Args:
      log_snr: of the schedule, [T].
      dimensions: d, of one example.
      most: the largest ratio, > 0.

    Example:
      ᾱ = 0.8, 0.5, 0.2 has σ/α = 0.5, 1, 2, scaled to add up to one.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import losses
      >>> weights = losses.noise_to_signal_weights(logit(jnp.array([0.8, 0.5, 0.2])), 1)
      >>> [round(float(weight), 3) for weight in weights]
      [0.143, 0.286, 0.571]
    """
    ratios = jnp.minimum(jnp.exp(-0.5 * log_snr), most)
    return ratios / (ratios.sum() * dimensions)


def time_weighting(
    weights: ArrayLike, errors: ArrayLike | None = None, *, uniform: float = 0.1
) -> TimeWeighting:
    """Pairs weights with probabilities: π_t ∝ w_t e_t, mixed with `uniform` of the uniform.

    With e_t near the typical ‖ε − ε_θ‖² at t each draw contributes about the same amount. That
    keeps the estimate's variance low when w spans decades. No importance weight w_t/π_t exceeds
    1/uniform times the T w_t of a uniform draw.

    Args:
      weights: w_t ≥ 0, [T].
      errors: e_t > 0, [T]; None draws t uniformly.
      uniform: the defensive share, in (0, 1].

    Example:
      The second step matters three times as much: π = 0.9 (1/4, 3/4) + 0.1 (1/2, 1/2).

      >>> from jax_unlearn import losses
      >>> weighting = losses.time_weighting([1.0, 3.0], errors=[1.0, 1.0])
      >>> [round(float(p), 3) for p in weighting.probabilities]
      [0.275, 0.725]
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
    """fold_in(key, j) for example j, [count]; j counts over all shards of `axis_name`.

    Example:
      The keys of a large batch begin with those of a small one.

      >>> import jax
      >>> from jax_unlearn import losses
      >>> small, large = (losses.example_keys(jax.random.key(0), n) for n in (2, 4))
      >>> bool((jax.random.key_data(small) == jax.random.key_data(large)[:2]).all())
      True
    """
    index, _ = _positions(count, axis_name)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def time_quantiles(probabilities: Array, u: Array) -> Array:
    """The π-quantile of u: the first t with Σ_{s≤t} π_s > u, integers [batch].

    Uniform u make draws of π, and stratified u, one in each part of [0, 1), stratified draws.

    Args:
      probabilities: π_t, [T]; scaled to add up to one.
      u: in [0, 1), [batch].

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses
      >>> u = jnp.array([0.1, 0.3, 0.9])
      >>> losses.time_quantiles(jnp.array([0.25, 0.25, 0.5]), u).tolist()
      [0, 1, 2]
    """
    cumulative = jnp.cumsum(probabilities)
    t = jnp.searchsorted(cumulative, u * cumulative[-1], side="right")
    # u · cumulative[-1] may round to cumulative[-1], which lies beyond the last step.
    return jnp.minimum(t, probabilities.shape[0] - 1).astype(jnp.int32)


def draw(key: Array, x_0: Array, probabilities: Array, *, axis_name: str | None = None) -> Draws:
    """Draws noise and stratified time steps for a batch, whatever devices it is spread over.

    Example j of n gets its own key fold_in(key, j) and u_j = frac((j + U_j)/n + U). Each u_j is
    uniform in [0, 1), with one in every n-th of it, and t is the π-quantile of u_j. Inside a pmap
    or shard_map over `axis_name`, j counts over all shards. So a sharded batch sees exactly the
    noise of the same batch on one device.

    Args:
      key: a PRNG key.
      x_0: images [batch, ...], of which only shape and dtype are read.
      probabilities: π_t of the time steps, [T].
      axis_name: of the mapped axis that the batch is spread over; None is one device.

    Example:
      Eight examples fall evenly on four steps, give or take one.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses
      >>> x_0, probabilities = jnp.zeros((8, 2)), jnp.full(4, 0.25)
      >>> drawn = jax.jit(losses.draw)(jax.random.key(0), x_0, probabilities)
      >>> bool((abs(jnp.bincount(drawn.t, length=4) - 2) <= 1).all()), drawn.noise.shape
      (True, (8, 2))
    """
    index, total = _positions(x_0.shape[0], axis_name)
    time_key, example_key = jax.random.split(key)
    keys = example_keys(example_key, x_0.shape[0], axis_name=axis_name)

    def one(example: Array) -> tuple[Array, Array]:
        noise_key, uniform_key = jax.random.split(example)
        noise = jax.random.normal(noise_key, x_0.shape[1:], x_0.dtype)
        return noise, jax.random.uniform(uniform_key, (2,))

    noise, uniform = jax.vmap(one)(keys)
    u = ((index.astype(uniform.dtype) + uniform[:, 0]) / total + jax.random.uniform(time_key)) % 1.0
    return Draws(noise, time_quantiles(probabilities, u), uniform[:, 1])


def squared_error(x: Array, y: Array) -> Array:
    """‖x − y‖², summed over all but the first axis, -> [batch].

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses
      >>> losses.squared_error(jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))).tolist()
      [25.0]
    """
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
    """ε_θ(x_t, t), whatever the network predicts, of the shape of x_t.

    Args:
      apply: the denoiser.
      params: its parameters.
      schedule: its noise schedule.
      x_t: noisy images [batch, ...].
      t: integer time steps [batch].
      cond: the condition of each image.
      clip: take that of the samplers' own chain, which clips x̂_0 where the schedule says so.

    Example:
      The network says x_0 = 1. At ᾱ = 0.36 the noise in x_t = 2.2 is (2.2 − 0.6 · 1)/0.8.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses, schedules
      >>> schedule = schedules.noise_schedule(
      ...     trained_betas=[0.64, 0.5], prediction_type="sample"
      ... )
      >>> epsilon = losses.predict_epsilon(
      ...     lambda params, x_t, t, cond: jnp.ones_like(x_t), None, schedule,
      ...     x_t=jnp.array([[2.2]]), t=jnp.array([0]), cond=None,
      ... )
      >>> round(float(epsilon[0, 0]), 3)
      2.0
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

    Its mean over draws is Σ_t w_t E‖ε − ε_θ‖².

    Args:
      apply: the denoiser.
      params: its parameters.
      schedule: its noise schedule.
      x_0: clean images [batch, ...].
      cond: the condition of each image.
      draws: of `draw` with the weighting's probabilities.
      weighting: weights and probabilities of the time steps.
      clip: whether ε_θ is that of the clipping chain, as in `predict_epsilon`.

    Example:
      A network that always says 0 misses all of the noise, ‖ε‖² = 25, at a step that weighs 1 and
      is drawn half the time.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses, schedules
      >>> loss = losses.denoising_loss(
      ...     lambda params, x_t, t, cond: jnp.zeros_like(x_t), None,
      ...     schedules.noise_schedule(trained_betas=[0.5, 0.5]), x_0=jnp.zeros((1, 2)), cond=None,
      ...     draws=losses.Draws(jnp.array([[3.0, 4.0]]), jnp.array([1]), jnp.array([0.5])),
      ...     weighting=losses.time_weighting([1.0, 1.0]),
      ... )
      >>> loss.tolist()
      [50.0]
    """
    x_t = schedules.add_noise(x_0=x_0, noise=draws.noise, log_snr=schedule.log_snr[draws.t])
    epsilon = predict_epsilon(apply, params, schedule, x_t=x_t, t=draws.t, cond=cond, clip=clip)
    return importance(weighting, draws.t) * squared_error(epsilon, draws.noise)


def importance(weighting: TimeWeighting, t: Array) -> Array:
    """w_t/π_t -> [batch]: what one drawn step counts for.

    Example:
      >>> from jax_unlearn import losses
      >>> weighting = losses.time_weighting([2.0, 6.0])  # drawn uniformly, π = 1/2
      >>> losses.importance(weighting, 1).item()
      12.0
    """
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
    """x_t ∼ (1−γ) q(·|x) + γ q(·|a), γ = mixing: one noisy image for two losses.

    weight_x = 1/((1−γ) + γ e^{d_x − d_a}) and weight_a = 1/((1−γ) e^{d_a − d_x} + γ), with
    d_• = ‖x_t − α •‖²/(2σ²). Then E[weight_x f(x_t)] = E_{q(·|x)} f and likewise for a. It is
    importance sampling from a defensive mixture, in one forward pass of the network instead of
    two (Alberti et al. 2025, SISS). In high dimension one weight is ~0 and the other ~1/γ: see
    `effective_sample_size`.

    Args:
      x: kept images [batch, ...].
      a: images to forget [batch, ...].
      noise: standard normal, like x.
      choose_a: whether x_t comes from a, boolean [batch], true with probability γ.
      log_snr: at t, [batch].
      mixing: γ in (0, 1).

    Example:
      x_t = 0 lies in the middle between α x and α a. Both weights are then 1, and the noises that
      lead there are opposite: ∓0.6 · 0.5/0.8.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import losses
      >>> x, a = jnp.array([[0.5]]), jnp.array([[-0.5]])
      >>> found = losses.mixture(
      ...     x=x, a=a, noise=jnp.array([[-0.375]]), choose_a=jnp.array([False]),
      ...     log_snr=logit(jnp.array([0.36])), mixing=0.5,
      ... )
      >>> [round(value.item(), 3) for value in (found.noise_x, found.noise_a)]
      [-0.375, 0.375]
      >>> [round(value.item(), 3) for value in (found.weight_x, found.weight_a)]
      [1.0, 1.0]
    """
    alpha, sigma = schedules.alpha_sigma(log_snr, x)
    x_t = alpha * jnp.where(schedules.expand(choose_a, x), a, x) + sigma * noise
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
    """(Σ w)²/(n Σ w²) in (0, 1]: the share of independent samples that weighted ones equal.

    Args:
      weights: w ≥ 0, [n] or any shape of n values.
      axis_name: of the mapped axis that the samples are spread over; None is one device.

    Example:
      One of four samples has all the weight: a quarter is left.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import losses
      >>> float(losses.effective_sample_size(jnp.array([4.0, 0.0, 0.0, 0.0])))
      0.25
    """
    sums = jnp.stack([weights.sum(), jnp.square(weights).sum(), jnp.asarray(1.0 * weights.size)])
    first, second, count = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return jnp.square(first) / (count * second)
