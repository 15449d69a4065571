"""One number for several shares that must all be high."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.typing import Array, ArrayLike

__all__ = ["harmonic_mean"]


def harmonic_mean(*shares: ArrayLike) -> Array:
    """The harmonic mean K / Σ_k 1/s_k of K shares; 0 where one of them is 0.

    The lowest share rules: the mean is at most K times it. Of forgetting, retention and robustness
    it is the score ERR.

    Args:
      *shares: in [0, 1], of shapes that broadcast. Traced ones are not checked.

    Returns:
      The mean, of their common shape.

    Raises:
      ValueError: if there is no share, or one is not in [0, 1].

    Example:
      Forgotten and retained in full, but half of it comes back: 3 / (1 + 1 + 2).

      >>> from jax_unlearn import metrics
      >>> float(metrics.harmonic_mean(1.0, 1.0, 0.5))
      0.75
    """
    if not shares:
        raise ValueError("a harmonic mean needs at least one share.")
    for share in shares:
        if isinstance(share, jax.core.Tracer):
            continue
        values = np.asarray(share)
        valid = (values >= 0) & (values <= 1)
        if not valid.all():
            raise ValueError(f"shares are in [0, 1], not {values[~valid][0]}.")
    stacked = jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(share, float) for share in shares)))
    # Derivatives stay finite where a share is 0.
    inverse = 1 / jnp.where(stacked == 0, 1.0, stacked)
    return jnp.where((stacked == 0).any(axis=0), 0.0, len(shares) / inverse.sum(axis=0))
