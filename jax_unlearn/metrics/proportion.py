"""A share of samples with its standard error: how often a classifier sees what was asked for."""

import jax
import jax.numpy as jnp

from jax_unlearn.typing import ArrayLike, Estimate

__all__ = ["proportion"]


@jax.jit
def proportion(hits: ArrayLike, count: ArrayLike) -> Estimate:
    """The share r = hits/n, n = count, and the half-width of Wilson's interval at one σ.

    The half-width is √(r(1−r)/n + 1/(4n²)) / (1 + 1/n). Unlike the binomial √(r(1−r)/n) it is not 0
    at r = 0 or 1, where unlearning wants to end up. The value is the plain share r, not Wilson's
    centre. Both are nan where count is 0.

    Args:
      hits: samples that are what was asked for, of any shape.
      count: samples asked for, of the same shape or a scalar.

    References:
      Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Example:
      None of 10 samples shows the forgotten class. The share is 0, and its error
      √(1/400) / 1.1 = 0.0455 instead of 0.

      >>> from jax_unlearn import metrics
      >>> share = metrics.proportion(0, 10)
      >>> float(share.value), round(float(share.stderr), 4)
      (0.0, 0.0455)
    """
    count = jnp.asarray(count, float)
    n = jnp.where(count > 0, count, jnp.nan)
    rate = jnp.asarray(hits, float) / n
    stderr = jnp.sqrt(rate * (1 - rate) / n + 1 / (4 * jnp.square(n))) / (1 + 1 / n)
    return Estimate(rate, stderr)
