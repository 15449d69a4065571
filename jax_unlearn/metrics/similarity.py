"""Similarity of generated to forgotten images in a feature space.

The protocol of the SSCD score of memorisation has two steps. `reconstruct` adds noise to a
forgotten image up to step t and denoises it with the model. Then `cosine_similarity` compares the
features of the result with those of the original, or `nearest_neighbours` with those of a set. A
model that remembers the image completes it; one that has forgotten it makes another of its kind.
The feature extractor is the caller's.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_unlearn import samplers
from jax_unlearn.schedules import NoiseSchedule, add_noise
from jax_unlearn.typing import Array, ArrayLike

__all__ = ["cosine_similarity", "nearest_neighbours", "reconstruct"]


def cosine_similarity(x: ArrayLike, y: ArrayLike) -> Array:
    """x·y / (‖x‖ ‖y‖) of features [..., d], over the last axis: [...], in [−1, 1].

    A vector of zeros has similarity 0 with everything.

    Raises:
      ValueError: if the shapes differ.

    Example:
      The angle between (1, 0) and (1, 1) is 45°, and cos 45° = 0.707.

      >>> from jax_unlearn import metrics
      >>> round(float(metrics.cosine_similarity([1.0, 0.0], [1.0, 1.0])), 3)
      0.707
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape != y.shape or x.ndim == 0:
        raise ValueError(
            f"cosine_similarity compares features one by one, not {x.shape} with "
            f"{y.shape}: use nearest_neighbours to search a set."
        )
    return _cosine(x, y)


def nearest_neighbours(queries: ArrayLike, bank: ArrayLike, *, k: int = 1) -> tuple[Array, Array]:
    """The k features of a bank with the greatest cosine similarity to each query.

    Exact, by all n·m similarities: memory O(nm).

    Args:
      queries: [n, d].
      bank: [m, d].
      k: how many neighbours.

    Returns:
      (similarity [n, k], decreasing along k; index into the bank [n, k]). Of equal ones the lower
      index comes first.

    Raises:
      ValueError: if the shapes do not match, or k is not in [1, m].

    Example:
      The direction counts and the length does not: (5, 5) points as (1, 1) does.

      >>> from jax_unlearn import metrics
      >>> bank = [[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]]
      >>> similarity, index = metrics.nearest_neighbours([[1.0, 1.0]], bank)
      >>> round(float(similarity[0, 0]), 3), int(index[0, 0])
      (1.0, 1)
    """
    queries, bank = jnp.asarray(queries), jnp.asarray(bank)
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries and bank are features [n, d] and [m, d], not {queries.shape} and "
            f"{bank.shape}."
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be 1 to {len(bank)}, the size of the bank, not {k}.")
    similarity = jnp.matmul(
        _normalised(queries), _normalised(bank).T, precision=lax.Precision.HIGHEST
    )
    return lax.top_k(similarity, k)


def reconstruct(
    predict_epsilon: Callable[[Array, Array], Array],
    schedule: NoiseSchedule,
    x_0: ArrayLike,
    noise: ArrayLike,
    *,
    start: int,
    steps: int,
) -> Array:
    """Noises images to a step and denoises them again, by deterministic DDIM (η = 0).

      x_start = √ᾱ_start x_0 + √(1−ᾱ_start) noise,
      x_s = √ᾱ_s x̂_0(x_t) + √(1−ᾱ_s) ε̂(x_t, t),

    at `steps` times spread evenly from `start` down to 0, then to the clean image (ᾱ = 1, or ᾱ_0
    where the schedule says so). As the steps grow finer this is the probability-flow map.

    Args:
      predict_epsilon: (x_t, integer t [batch]) -> ε̂ of the shape of x_t, parameters and
        condition closed over. It is ε̂ whatever the schedule's prediction type.
      schedule: gives ᾱ, the clipping of x̂_0, and the last step.
      x_0: clean images [batch, ...].
      noise: standard normal, the shape of x_0.
      start: time step of the noised image, 0 the least noisy.
      steps: network evaluations, 1 to start + 1.

    Returns:
      The reconstructions, the shape of x_0.

    Raises:
      ValueError: if start is not in [0, T), steps not in [1, start + 1], or the shapes differ.

    References:
      Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, eq. 12.
      Pizzi et al., "A self-supervised descriptor for image copy detection", 2022 (SSCD).

    Example:
      A model that knows two points, −1 and 1, gets 0.9 with noise: it completes 1.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import metrics, mixtures, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> model = mixtures.denoiser(mixtures.gaussian_mixture([[-1.0], [1.0]], 1e-6), schedule)
      >>> x_0, noise = jnp.full((1, 1), 0.9), jnp.full((1, 1), 0.3)
      >>> found = metrics.reconstruct(model, schedule, x_0, noise, start=40, steps=10)
      >>> round(float(found[0, 0]), 2)
      1.0
    """
    x_0, noise = jnp.asarray(x_0), jnp.asarray(noise)
    if x_0.shape != noise.shape:
        raise ValueError(f"noise has the shape of the images, {x_0.shape}, not {noise.shape}.")
    if not 0 <= start < schedule.num_steps:
        raise ValueError(f"start must be in [0, {schedule.num_steps}), not {start}.")
    if not 1 <= steps <= start + 1:
        raise ValueError(f"from step {start} there are 1 to {start + 1} steps, not {steps}.")
    x_start = add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[start])
    times = np.linspace(start, 0, steps).round().astype(np.int32)
    schedule = dataclasses.replace(schedule, prediction_type="epsilon")
    return samplers.denoise(predict_epsilon, schedule, x_start, times).x_0


@jax.jit
def _cosine(x: Array, y: Array) -> Array:
    return (_normalised(x) * _normalised(y)).sum(axis=-1)


def _normalised(features: Array) -> Array:
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.where(norm == 0, 1.0, norm)
