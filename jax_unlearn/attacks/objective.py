"""What attacks by optimisation minimise: the denoising loss of images of a concept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_unlearn import losses, schedules
from jax_unlearn.baselines.base import mean_loss
from jax_unlearn.problem import Images
from jax_unlearn.typing import Array, Condition, Denoiser

__all__ = ["checked", "drawn_loss"]


def checked(x_0: Any, cond: Condition, batch: int) -> Images:
    """The images under their conditions, as arrays.

    Raises:
      ValueError: for no images, conditions of another number, or an empty batch.

    Example:
      >>> import numpy as np
      >>> from jax_unlearn.attacks.objective import checked
      >>> checked([[1.0], [2.0]], np.array([0, 1]), batch=4).x_0.shape
      (2, 1)
    """
    images = Images(jnp.asarray(x_0), jax.tree.map(jnp.asarray, cond))
    shape = images.x_0.shape
    if len(shape) < 2 or shape[0] == 0:
        raise ValueError(f"x_0 must be images [n, ...], at least one, not of shape {shape}.")
    for leaf in jax.tree.leaves(images.cond):
        if leaf.shape[:1] != shape[:1]:
            raise ValueError(f"cond has the shape {leaf.shape} for {shape[0]} images.")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}.")
    return images


def drawn_loss(
    apply: Denoiser, schedule: schedules.NoiseSchedule, batch: int
) -> Callable[[Any, Array, Images], Array]:
    """(params, key, images) -> ‖ε − ε̂(x_t, t)‖²/d, the mean of a batch drawn by the key, a scalar.

    The batch is drawn with replacement. Its time steps are uniform, and ε̂ is not clipped, as in
    training: where x̂_0 is clipped there is no gradient.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      batch: how many images are drawn.

    Example:
      A network that always says 0 misses all of the noise, whose mean square is 1.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import schedules
      >>> from jax_unlearn.attacks.objective import drawn_loss
      >>> from jax_unlearn.problem import Images
      >>> silent = lambda params, x_t, t, cond: jnp.zeros_like(x_t)
      >>> loss = drawn_loss(silent, schedules.noise_schedule(), 20_000)
      >>> round(float(loss(None, jax.random.key(0), Images(jnp.ones((3, 2)), None))), 1)
      1.0
    """

    def loss(params: Any, key: Array, images: Images) -> Array:
        row_key, draw_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (batch,), 0, images.x_0.shape[0])
        total = schedule.num_steps
        weighting = losses.TimeWeighting(
            losses.simple_weights(total, images.x_0[0].size), jnp.full(total, 1 / total)
        )
        drawn = jax.tree.map(lambda leaf: leaf[rows], images)
        return mean_loss(apply, schedule, weighting)(params, draw_key, drawn)

    return loss
