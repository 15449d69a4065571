"""Intervals that hold at small counts: an exact one for a share of samples."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from jax_unlearn.typing import ArrayLike

__all__ = ["Interval", "binomial_interval"]

# Halvings of [0, 1] until its parts are below float64's spacing at 1/2.
_HALVINGS = 60


class Interval(NamedTuple):
    """A value with its interval and how many samples it rests on; plain numbers or arrays."""

    value: Any
    low: Any
    high: Any
    count: Any


def binomial_interval(hits: ArrayLike, count: ArrayLike, level: float = 0.95) -> Interval:
    """The share h/n of h hits in n samples, with the exact interval of Clopper and Pearson.

      P(X ≥ h | low) = P(X ≤ h | high) = (1 − level)/2,  X binomial of n samples,

    where low is 0 at h = 0, and high is 1 at h = n. It holds the true share at least as often as
    `level` says, at any n and any share. Where count is 0 nothing is known: nan in [0, 1].

    Computed on the host in float64.

    Args:
      hits: h, whole numbers of any shape.
      count: n, whole numbers of the same shape or one that broadcasts.
      level: how often the interval holds the true share, in (0, 1).

    Returns:
      An Interval of Python numbers, or of arrays where hits or count is one.

    Raises:
      ValueError: if hits is not whole or not in [0, count], or level not in (0, 1).

    References:
      Clopper, Pearson, "The use of confidence or fiducial limits illustrated in the case of the
      binomial", 1934.

    Example:
      None of 10 samples shows the concept. A share p leaves no hit with probability (1 − p)^10,
      which is 2.5 % at p = 1 − 0.025^(1/10) = 0.3085.

      >>> from jax_unlearn import metrics
      >>> share = metrics.binomial_interval(0, 10)
      >>> share.value, share.low, round(share.high, 4), share.count
      (0.0, 0.0, 0.3085, 10)
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a probability in (0, 1), not {level}.")
    h, n = np.broadcast_arrays(np.asarray(hits), np.asarray(count))
    valid = (h >= 0) & (h <= n) & (h == np.floor(h)) & (n == np.floor(n)) & np.isfinite(n)
    if not valid.all():
        raise ValueError(
            "hits are whole numbers in [0, count] of a whole number count, not "
            f"{h[~valid][0]} of {n[~valid][0]}."
        )
    tail, whole = (1 - level) / 2, n.astype(np.int64)
    a, b = np.stack([h, h + 1.0]), np.stack([n - h + 1.0, n - h])
    target = np.reshape([tail, 1 - tail], (2,) + (1,) * h.ndim)
    low, high = _beta_quantile(target, np.maximum(a, 1), np.maximum(b, 1))
    low, high = np.where(h == 0, 0.0, low), np.where(h == n, 1.0, high)
    value = np.where(n == 0, np.nan, h / np.maximum(n, 1))
    fields = (value, low, high, whole)
    return Interval(*(field.item() if h.ndim == 0 else field for field in fields))


def _beta_quantile(probability: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x at which I_x(a, b) is a probability, by bisection; a and b whole, at least 1."""
    log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
    log_beta = log_gamma(a) + log_gamma(b) - log_gamma(a + b)
    low, high = np.zeros_like(a), np.ones_like(a)
    for _ in range(_HALVINGS):
        x = (low + high) / 2
        below = _incomplete_beta(x, a, b, log_beta) < probability
        low, high = np.where(below, x, low), np.where(below, high, x)
    return (low + high) / 2


def _incomplete_beta(
    x: np.ndarray, a: np.ndarray, b: np.ndarray, log_beta: np.ndarray
) -> np.ndarray:
    """I_x(a, b) in (0, 1) by its continued fraction (DLMF 8.17.22), with Lentz's method.

    The fraction converges fast for x below the mean; above it, I_x(a, b) = 1 − I_{1−x}(b, a).
    There every denominator is positive where a and b are at least 1 and whole.
    """
    swap = x > (a + 1) / (a + b + 2)
    a, b, x = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, 1 - x, x)
    fraction, upper, lower = np.ones_like(x), np.ones_like(x), np.zeros_like(x)
    for j in itertools.count():
        odd, even = a + j, a + 2 * j
        steps = [-odd * (odd + b) * x / (even * (even + 1))]
        steps.append((j + 1) * (b - j - 1) * x / ((even + 1) * (even + 2)))
        before = fraction
        for step in steps:
            upper, lower = 1 + step / upper, 1 / (1 + step * lower)
            fraction = fraction * upper * lower
        if not (np.abs(fraction - before) > 1e-14 * fraction).any():
            break
    # Far in a tail x or 1 − x may round to 0: the probability there is 0 too.
    with np.errstate(divide="ignore"):
        logarithm = a * np.log(x) + b * np.log1p(-x) - log_beta
    value = np.exp(logarithm) / (a * fraction)
    return np.where(swap, 1 - value, value)
