"""Samples under conditions that are given as arrays, whatever they were made from."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import attacks, samplers
from jax_unlearn.app import data
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.schedules import NoiseSchedule
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["NOISE", "Draw", "drawer"]

NOISE = {
    "forgotten": 1,
    "kept": 2,
    "kept again": 4,
    "images": 9,
    "inversion": 11,
    "images of unlearndiffatk": 12,
    "tokens of unlearndiffatk": 13,
    "unlearndiffatk": 14,
    "stochasticity": 15,
    "guidance": 16,
    "relearning": 17,
    "rounding": 18,
    "starts of inversion": 19,
}
"""What has noise of its own, of the seed (--seed, number)."""


class Draw(Protocol):
    """(params, e, free, *, scale, seed, eta=0, variance=1) -> uint8 [n, height, width, channels].

    The samples are of conditions e [n, ...], guided away from `free` [n, ...], or not guided where
    that is None. Equal seeds give equal noise.
    """

    def __call__(
        self,
        params: Params,
        e: Any,
        free: Any,
        *,
        scale: float,
        seed: tuple[int, ...],
        eta: float = 0.0,
        variance: float = 1.0,
    ) -> np.ndarray:
        """Draws."""
        ...


def drawer(
    apply: Denoiser,
    schedule: NoiseSchedule,
    decode: Callable[[Array], Array],
    *,
    shape: tuple[int, ...],
    steps: int,
) -> Draw:
    """Prepares drawing by DDIM; it compiles once for each number of samples.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      decode: from what is denoised to images.
      shape: of what is denoised.
      steps: of the sampler.
    """

    @jax.jit
    def one_batch(
        params: Params, scalars: Any, key: Array, noise: Array, e: Any, free: Any
    ) -> Array:
        scale, eta, variance = scalars
        if free is None:

            def predict(x_t: Array, t: Array) -> Array:
                return apply(params, x_t, t, e)

        else:
            predict = samplers.guided(apply, params, e, unconditional=free, scale=scale)
        found = attacks.stochastic(
            predict, schedule, key, noise, steps=steps, eta=eta, variance=variance
        )
        return decode(found)

    def draw(
        params: Params,
        e: Any,
        free: Any,
        *,
        scale: float,
        seed: tuple[int, ...],
        eta: float = 0.0,
        variance: float = 1.0,
    ) -> np.ndarray:
        count = len(jax.tree.leaves(e)[0])
        noise = np.random.default_rng(seed).standard_normal((count, *shape), np.float32)
        scalars = tuple(jnp.float32(one) for one in (scale, eta, variance))
        found = in_batches(
            lambda key, *rows: one_batch(params, scalars, key, *rows),
            jax.random.key(int(np.random.default_rng([*seed, 1]).integers(2**32))),
            noise,
            e,
            None if scale == 1 else free,
            size=batch_rows(shape),
        )
        return data.to_pixels(found)

    return draw
