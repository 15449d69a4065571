"""Gaussian mixtures with closed-form diffusion: an oracle whose every quantity is known.

Components are isotropic: noising stays within the family, and no matrix is inverted. An event
may have any shape, points [d] or images [height, width, channels]. x is [batch, *event]
throughout, as in `samplers`. Densities are with respect to Lebesgue measure, in nats.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import schedules
from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "GaussianMixture",
    "Grid",
    "denoiser",
    "density_ratio",
    "diffused",
    "gaussian_mixture",
    "grid",
    "log_density",
    "log_masses",
    "predictions",
    "responsibilities",
    "sample",
    "score",
    "select",
    "subtract",
]


class GaussianMixture(NamedTuple):
    """Σ_k π_k N(μ_k, v_k I).

    Attributes:
      log_weights: log π_k, [k].
      means: μ_k, [k, *event].
      variances: v_k of every dimension, [k].
    """

    log_weights: Array
    means: Array
    variances: Array


def gaussian_mixture(
    means: ArrayLike, variances: ArrayLike, weights: ArrayLike | None = None
) -> GaussianMixture:
    """Σ_k π_k N(μ_k, v_k I), with the weights scaled to add up to one.

    Args:
      means: μ_k, [k, *event].
      variances: v_k > 0, [k] or one for all.
      weights: π_k ≥ 0, [k]; None makes them equal.

    Raises:
      ValueError: for shapes that do not fit, or variances that are not positive.

    Example:
      Two modes on the line, the second three times as heavy.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.04, weights=[1.0, 3.0])
      >>> [round(float(w), 3) for w in jnp.exp(q.log_weights)], q.means.shape, q.variances.shape
      ([0.25, 0.75], (2, 1), (2,))
    """
    if not isinstance(variances, jax.core.Tracer) and not (np.asarray(variances) > 0).all():
        raise ValueError(f"variances must be positive, got {variances}.")
    dtype = jnp.result_type(float)
    means = jnp.asarray(means, dtype)
    if means.ndim < 2:
        raise ValueError(f"means must be [k, *event], not of shape {means.shape}.")
    count = means.shape[0]
    weights = jnp.ones(count, dtype) if weights is None else jnp.asarray(weights, dtype)
    variances = jnp.asarray(variances, dtype)
    if weights.shape != (count,) or variances.shape not in ((), (count,)):
        raise ValueError(
            f"expected weights and variances for {count} components, got the shapes "
            f"{weights.shape} and {variances.shape}."
        )
    variances = jnp.broadcast_to(variances, (count,))
    return GaussianMixture(jnp.log(weights / weights.sum()), means, variances)


def select(mixture: GaussianMixture, components: ArrayLike) -> GaussianMixture:
    """The mixture given that the component is one of these, integers [j]: a concept of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[-1.0], [0.0], [1.0]], 0.04, weights=[0.2, 0.6, 0.2])
      >>> concept = mixtures.select(q, [0, 1])
      >>> [round(float(w), 3) for w in jnp.exp(concept.log_weights)]
      [0.25, 0.75]
    """
    chosen = jnp.atleast_1d(jnp.asarray(components))
    log_weights = jax.nn.log_softmax(mixture.log_weights[chosen])
    return GaussianMixture(log_weights, mixture.means[chosen], mixture.variances[chosen])


def subtract(mixture: GaussianMixture, multipliers: ArrayLike) -> GaussianMixture:
    """(q − Σ_k λ_k N_k)/(1−Λ): the forward-KL tilt where each q_i is a component of q.

    It remains a mixture, of weights (π_k − λ_k)/(1−Λ); λ_k = π_k is q without component k. The
    edge of the dual domain Σ_k λ_k N_k ≤ q lies at λ_k = π_k wherever no component has a
    larger variance than k. Source: arXiv 2605.30825.

    Args:
      mixture: q.
      multipliers: λ of each component, 0 ≤ λ_k ≤ π_k, [k].

    Raises:
      ValueError: for a wrong shape or, unless traced, values outside that range.

    Example:
      Half of the first mode's mass is taken away: (0.25, 0.5)/0.75.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.04)
      >>> p = mixtures.subtract(q, [0.25, 0.0])
      >>> [round(float(w), 3) for w in jnp.exp(p.log_weights)]
      [0.333, 0.667]
    """
    log_weights = mixture.log_weights
    if np.shape(multipliers) != log_weights.shape:
        raise ValueError(f"expected multipliers {log_weights.shape}, got {np.shape(multipliers)}.")
    if not any(isinstance(values, jax.core.Tracer) for values in (multipliers, log_weights)):
        values, most = np.asarray(multipliers), np.exp(log_weights)
        if not ((values >= 0) & (values <= most * (1 + 1e-6))).all():
            raise ValueError(f"multipliers must lie between 0 and {most}, got {values}.")
    multipliers = jnp.asarray(multipliers, log_weights.dtype)
    rest = jnp.maximum(jnp.exp(log_weights) - multipliers, 0.0)
    return mixture._replace(log_weights=jnp.log(rest) - jnp.log(rest.sum()))


def _components(mixture: GaussianMixture, x_t: Array, log_snr: ArrayLike) -> tuple[Array, ...]:
    """x_t − α μ_k [batch, k, *event]; v_k ᾱ + 1−ᾱ and log π_k N_k(x_t), both [batch, k]."""
    log_snr = jnp.broadcast_to(jnp.asarray(log_snr, x_t.dtype), x_t.shape[:1])
    alpha, _ = schedules.alpha_sigma(log_snr, x_t)
    offsets = x_t[:, None] - alpha[:, None] * mixture.means
    signal = jax.nn.sigmoid(log_snr)[:, None]
    variances = signal * mixture.variances + jax.nn.sigmoid(-log_snr)[:, None]
    squares = jnp.square(offsets).sum(axis=tuple(range(2, offsets.ndim)))
    dimensions = mixture.means[0].size
    log_joint = mixture.log_weights - 0.5 * (
        squares / variances + dimensions * jnp.log(2 * np.pi * variances)
    )
    return offsets, variances, log_joint


def log_density(mixture: GaussianMixture, x_t: Array, log_snr: ArrayLike = jnp.inf) -> Array:
    """The log density of x_t = α x_0 + σ ε: log Σ_k π_k N(x_t; α μ_k, ᾱ v_k + 1 − ᾱ), [batch].

    Args:
      mixture: the law of x_0.
      x_t: [batch, *event].
      log_snr: of x_t, [batch] or a scalar; +∞ is no noise.

    Example:
      A standard normal has the density 1/√(2π) at 0, noised or not.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[0.0]], 1.0)
      >>> for log_snr in (jnp.inf, 0.0):
      ...     log_p = mixtures.log_density(q, jnp.zeros((1, 1)), log_snr)
      ...     print(round(float(jnp.exp(log_p[0])), 4))
      0.3989
      0.3989
    """
    return jax.nn.logsumexp(_components(mixture, x_t, log_snr)[2], axis=1)


def responsibilities(mixture: GaussianMixture, x_t: Array, log_snr: ArrayLike = jnp.inf) -> Array:
    """P(component k | x_t), [batch, k]. Args: as `log_density`.

    Example:
      At x = 0 two equal modes are equally likely. At x = 0.1 the log odds are 2 · 0.1/0.04 = 5.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.04)
      >>> shares = mixtures.responsibilities(q, jnp.array([[0.0], [0.1]]))
      >>> [[round(float(share), 3) for share in row] for row in shares]
      [[0.5, 0.5], [0.007, 0.993]]
    """
    return jax.nn.softmax(_components(mixture, x_t, log_snr)[2], axis=1)


def score(mixture: GaussianMixture, x_t: Array, log_snr: ArrayLike = jnp.inf) -> Array:
    """∇ log q_t(x_t) = −Σ_k P(k | x_t) (x_t − α μ_k)/(ᾱ v_k + 1 − ᾱ), the shape of x_t.

    Args: as `log_density`.

    Example:
      One Gaussian: −(1.5 − 1)/0.25.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[1.0]], 0.25)
      >>> round(float(mixtures.score(q, jnp.array([[1.5]]))[0, 0]), 3)
      -2.0
    """
    return predictions(mixture, x_t, log_snr).score


def predictions(mixture: GaussianMixture, x_t: Array, log_snr: ArrayLike) -> schedules.Predictions:
    """The exact E[ε | x_t], E[x_0 | x_t], velocity and score, each of the shape of x_t.

    E[x_0 | x_t, k] = μ_k + α v_k (x_t − α μ_k)/(ᾱ v_k + 1 − ᾱ), averaged over P(k | x_t), and
    E[ε | x_t] = −σ score: each in closed form, with no division by α or σ.

    Args: as `log_density`.

    Example:
      A standard normal at ᾱ = 0.36: x_t = 1 is 0.6 of image and 0.8 of noise, on average.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[0.0]], 1.0)
      >>> found = mixtures.predictions(q, jnp.ones((1, 1)), logit(0.36))
      >>> round(float(found.x_0[0, 0]), 3), round(float(found.epsilon[0, 0]), 3)
      (0.6, 0.8)
    """
    offsets, variances, log_joint = _components(mixture, x_t, log_snr)
    shares = jax.nn.softmax(log_joint, axis=1)
    log_snr = jnp.broadcast_to(jnp.asarray(log_snr, x_t.dtype), x_t.shape[:1])
    alpha, sigma = schedules.alpha_sigma(log_snr, x_t)
    slope = shares / variances
    score = -jnp.einsum("bk,bk...->b...", slope, offsets)
    pulled = jnp.einsum("bk,bk...->b...", slope * mixture.variances, offsets)
    x_0 = jnp.einsum("bk,k...->b...", shares, mixture.means) + alpha * pulled
    epsilon = -sigma * score
    return schedules.Predictions(epsilon, x_0, alpha * epsilon - sigma * x_0, score)


def denoiser(
    mixture: GaussianMixture, schedule: schedules.NoiseSchedule
) -> Callable[[Array, Array], Array]:
    """The ideal network: (x_t [batch, *event], integer t [batch]) -> prediction.

    In the schedule's prediction type, so that `samplers.sample` takes it as it is. Clipping of
    x_0 (`clip_range`) suits images; for points make the schedule with none.

    Example:
      A standard normal at ᾱ = 0.36, as in `predictions`.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.64, 0.5])
      >>> predict = mixtures.denoiser(mixtures.gaussian_mixture([[0.0]], 1.0), schedule)
      >>> round(float(predict(jnp.ones((1, 1)), jnp.array([0]))[0, 0]), 3)
      0.8
    """
    field = {"epsilon": "epsilon", "sample": "x_0", "v_prediction": "velocity"}

    def predict(x_t: Array, t: Array) -> Array:
        exact = predictions(mixture, x_t, schedule.log_snr[t])
        return getattr(exact, field[schedule.prediction_type])

    return predict


def density_ratio(
    numerator: GaussianMixture, denominator: GaussianMixture, schedule: schedules.NoiseSchedule
) -> Callable[[Array, Array], Array]:
    """(x_t [batch, *event], integer t [batch]) -> ratio of the two laws of x_t, [batch].

    It is E[ρ(x_0) | x_t] under the denominator, with ρ the ratio of the clean laws.

    Example:
      A mode of weight 1/2, where it is alone, has twice the density of the whole.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100)
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.04)
      >>> ratio = mixtures.density_ratio(mixtures.select(q, 0), q, schedule)
      >>> t = jnp.zeros(3, int)
      >>> [round(float(value), 3) for value in ratio(jnp.array([[-1.0], [0.0], [1.0]]), t)]
      [2.0, 1.0, 0.0]
    """

    def ratio(x_t: Array, t: Array) -> Array:
        log_snr = schedule.log_snr[t]
        difference = log_density(numerator, x_t, log_snr) - log_density(denominator, x_t, log_snr)
        return jnp.exp(difference)

    return ratio


def diffused(mixture: GaussianMixture, log_snr: ArrayLike) -> GaussianMixture:
    """The law of x_t = α x_0 + σ ε at one log-SNR: means α μ_k, variances ᾱ v_k + 1 − ᾱ.

    Example:
      ᾱ = 0.36: the mean 0.6 · 2, the variance 0.36 · 0.5 + 0.64.

      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import mixtures
      >>> noised = mixtures.diffused(mixtures.gaussian_mixture([[2.0]], 0.5), logit(0.36))
      >>> round(float(noised.means[0, 0]), 3), round(float(noised.variances[0]), 3)
      (1.2, 0.82)
    """
    log_snr = jnp.asarray(log_snr, mixture.means.dtype)
    alpha, _ = schedules.alpha_sigma(log_snr, mixture.means)
    signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    variances = signal * mixture.variances + noise
    return GaussianMixture(mixture.log_weights, alpha * mixture.means, variances)


def sample(mixture: GaussianMixture, key: Array, count: int) -> Array:
    """Independent samples, [count, *event].

    Example:
      A quarter of them is of the first mode.

      >>> import jax
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.01, weights=[1.0, 3.0])
      >>> x = mixtures.sample(q, jax.random.key(0), 10_000)
      >>> x.shape, bool(abs((x < 0).mean() - 0.25) < 0.02)
      ((10000, 1), True)
    """
    component_key, noise_key = jax.random.split(key)
    chosen = jax.random.categorical(component_key, mixture.log_weights, shape=(count,))
    means = mixture.means[chosen]
    deviations = jnp.sqrt(mixture.variances[chosen])
    noise = jax.random.normal(noise_key, means.shape, means.dtype)
    return means + schedules.expand(deviations, means) * noise


class Grid(NamedTuple):
    """Cell centres x [n, d], the last dimension fastest, and log of the volume of one cell."""

    x: Array
    log_volume: Array


def grid(bounds: Sequence[tuple[float, float]], cells: int) -> Grid:
    """Cuts a box into cells^d equal cells: quadrature by midpoints, for one or two dimensions.

    Args:
      bounds: (lower, upper) of each dimension.
      cells: number of cells along each dimension.

    Raises:
      ValueError: for an empty box, no cells, or more than 10⁷ cells.

    Example:
      Four cells of width 1/2, by their centres.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> cells = mixtures.grid([(-1.0, 1.0)], 4)
      >>> cells.x[:, 0].tolist(), round(float(jnp.exp(cells.log_volume)), 3)
      ([-0.75, -0.25, 0.25, 0.75], 0.5)
    """
    if not bounds or any(not lower < upper for lower, upper in bounds) or cells < 1:
        raise ValueError(f"expected lower < upper and at least a cell, got {bounds}, {cells}.")
    if cells ** len(bounds) > 10**7:
        raise ValueError(f"{cells}^{len(bounds)} cells are too many: at most 10^7.")
    steps = [(upper - lower) / cells for lower, upper in bounds]
    axes = [
        lower + step * (np.arange(cells) + 0.5)
        for (lower, _), step in zip(bounds, steps, strict=True)
    ]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)
    dtype = jnp.result_type(float)
    return Grid(jnp.asarray(points, dtype), jnp.asarray(np.log(steps).sum(), dtype))


def log_masses(mixture: GaussianMixture, cells: Grid) -> Array:
    """Log masses of the grid's cells, density times volume scaled to add up to one, [n].

    What the scaling hides, log Σ density · volume, must be near 0: the box has to hold the
    mixture, and a cell be small against its deviations.

    Example:
      Half of the mass lies on either side of the middle of two equal modes.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import mixtures
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.04)
      >>> masses = jnp.exp(mixtures.log_masses(q, mixtures.grid([(-3.0, 3.0)], 300)))
      >>> round(float(masses.sum()), 3), round(float(masses[:150].sum()), 3)
      (1.0, 0.5)
    """
    return jax.nn.log_softmax(log_density(mixture, cells.x))
