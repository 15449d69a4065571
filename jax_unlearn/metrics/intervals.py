"""Intervals that hold at small counts: of a share of samples, and of a mean over runs."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from jax_unlearn.typing import ArrayLike

__all__ = ["Interval", "binomial_interval", "mean_interval"]

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


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean of n values, say one a seed, with Student's interval.

      mean ± t s/√n,  P(|T| ≤ t) = level for Student's T of n − 1 degrees of freedom,

    where s is the sample's standard deviation. It holds the mean that further seeds would have as
    often as `level` says if values are normal, at any n. One value has no interval: nan.

    Computed on the host in float64.

    Args:
      values: independent values, [n, ...]; the mean is over the first axis.
      level: how often the interval holds the mean, in (0, 1).

    Returns:
      An Interval of Python numbers, or of arrays where values have further axes.

    Raises:
      ValueError: for no value, or a level outside (0, 1).

    References:
      Student, "The probable error of a mean", 1908.

    Example: of two values t is 12.7 at 95 %.
      >>> from jax_unlearn import metrics
      >>> [round(number, 3) for number in metrics.mean_interval([1.0, 3.0])]
      [2.0, -10.706, 14.706, 2]
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a probability in (0, 1), not {level}.")
    many = np.asarray(values, np.float64)
    if many.ndim == 0 or not len(many):
        raise ValueError("a mean needs at least one value.")
    count, mean = len(many), many.mean(axis=0)
    half = np.full_like(mean, np.nan)
    if count > 1:
        half = _student_quantile(level, count - 1) * many.std(axis=0, ddof=1) / math.sqrt(count)
    value, low, high = (
        field.item() if mean.ndim == 0 else field for field in (mean, mean - half, mean + half)
    )
    return Interval(value, low, high, count)


def _student_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = level, by bisection of its angle θ = arctan(t/√freedom)."""
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        angle = (low + high) / 2
        below = _student_within(angle, freedom) < level
        low, high = (angle, high) if below else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _student_within(angle: float, freedom: int) -> float:
    """P(|T| ≤ √freedom tan θ): a finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if freedom % 2 else total


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
