"""The few types that every module shares."""

from typing import Any, NamedTuple, Protocol

from jax import Array
from jax.typing import ArrayLike

__all__ = ["Array", "ArrayLike", "Condition", "Denoiser", "Estimate", "Params"]

Params = Any
"""A pytree of arrays."""

Condition = Any
"""What a denoiser is conditioned on: labels [batch], an embedding [batch, ...], or None."""


class Denoiser(Protocol):
    """A denoising network as a pure function, in the network's own prediction type.

    Args of a call:
      params: the network's parameters, any pytree.
      x_t: noisy images [batch, height, width, channels]; clean images lie in [-1, 1].
      t: integer time steps [batch], 0 the least noisy.
      cond: labels [batch], an embedding [batch, ...], or None.

    Returns:
      The prediction, of the shape of `x_t`.
    """

    def __call__(self, params: Params, x_t: Array, t: Array, cond: Condition, /) -> Array:
        """Predicts the noise, the clean image or the velocity from `x_t`."""
        ...


class Estimate(NamedTuple):
    """A Monte Carlo estimate: a mean and the standard error of that mean, on device or host."""

    value: Any
    stderr: Any
