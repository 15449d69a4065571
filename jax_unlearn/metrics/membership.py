"""Membership: whether forgotten images are told from unseen ones by their losses."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_unlearn.metrics.intervals import Interval, binomial_interval
from jax_unlearn.typing import ArrayLike

__all__ = ["Membership", "membership"]


class Membership(NamedTuple):
    """How well losses tell forgotten images from unseen ones, on both sides.

    Fields:
      auc: P(loss of a forgotten image < loss of an unseen one) + ½ P(equal), over n + m images.
      at_low_rates: from a false-positive rate to the share of forgotten images that are *more*
        likely than all but that share of the unseen: still remembered.
      too_forgotten_at: the same for *less* likely than all but that share of the unseen.
    """

    auc: Interval
    at_low_rates: dict[float, Interval]
    too_forgotten_at: dict[float, Interval]


def membership(
    forgotten: ArrayLike,
    unseen: ArrayLike,
    *,
    level: float = 0.95,
    rates: Sequence[float] = (0.01, 0.05),
) -> Membership:
    """What an attacker with the losses learns: images still remembered, or too forgotten.

      AUC = Σ_ij ([f_i < u_j] + ½ [f_i = u_j]) / (nm)

    of losses f of n forgotten images and u of m unseen ones. At ½ nobody can tell them apart.
    Above ½ the forgotten are still more likely than images never seen. Below ½ they are less
    likely, which gives away that they were deleted.

    The interval is Wilson's, at the number N of independent pairs that are worth as much:

      (AUC − θ)² = z² θ(1 − θ)/N at both ends θ,  N = AUC (1 − AUC)/s²,

    with DeLong's variance s² = Var_i(Σ_j c_ij/m)/n + Var_j(Σ_i c_ij/n)/m of the comparisons c.
    It stays in [0, 1], and unlike AUC ± z s it does not shrink to a point at AUC 0 and 1. There
    s² is far too small for the few pairs out of order, so N is held in [min(n, m), 4nm/(n+m)].
    No law has fewer than min(n, m); 4nm/(n+m) is about that of exponential losses, n = m, as the
    AUC tends to 1. Where s² is 0 it says nothing about the law, and N is min(n, m). In simulations
    of normal losses of equal and unequal spread, n, m from 10 to 200, AUC from ½ to 0.995, 95 %
    intervals held the AUC in 92 to 100 % of cases; those of AUC ± z s in as few as 18 %. Where
    one image in two hundred alone was told apart, it was 90 %.

    At a false-positive rate r, the threshold is the loss that r·m of the unseen lie below. The
    share of forgotten below it has an exact binomial interval *given* the threshold: how the
    threshold itself varies with the unseen images is not in it. Where r·m < 1 there are too few
    unseen images to set a threshold: the value is nan, in [0, 1], with count 0.

    Computed on the host in float64.

    Args:
      forgotten: [n] losses, n ≥ 2, higher for less likely images; infinite ones are allowed.
      unseen: [m] losses of images that no training saw, m ≥ 2, of the same kind.
      level: of the intervals, in (0, 1).
      rates: false-positive rates in (0, ½].

    Raises:
      ValueError: if a shape, a size, a loss (nan), the level or a rate is not as above.

    References:
      DeLong, DeLong, Clarke-Pearson, "Comparing the areas under two or more correlated receiver
      operating characteristic curves", 1988 (the variance).
      Birnbaum, Klose, "Bounds for the variance of the Mann-Whitney statistic", 1957 (min(n, m)).
      Carlini et al., "Membership inference attacks from first principles", 2022 (low rates).

    Example:
      Of the 12 pairs of 3 forgotten and 4 unseen losses, 10 are in order and one is equal. So the
      AUC is 10.5/12. At the rate ¼ one unseen image lies below the threshold 3, with 2 of the
      forgotten ones, and one above the threshold 5, with none.

      >>> from jax_unlearn import metrics
      >>> told = metrics.membership([1.0, 2.0, 3.0], [2.5, 3.0, 5.0, 6.0], rates=(0.25,))
      >>> round(told.auc.value, 3), told.auc.count
      (0.875, 7)
      >>> round(told.at_low_rates[0.25].value, 3), told.too_forgotten_at[0.25].value
      (0.667, 0.0)
    """
    f, u = np.asarray(forgotten, np.float64), np.asarray(unseen, np.float64)
    if f.ndim != 1 or u.ndim != 1 or min(len(f), len(u)) < 2:
        raise ValueError(
            "membership compares at least two losses of forgotten images, [n], with at least "
            f"two of unseen ones, [m], not {f.shape} with {u.shape}."
        )
    if np.isnan(f).any() or np.isnan(u).any():
        raise ValueError(
            f"losses are numbers, but {np.isnan(f).sum()} of the forgotten and "
            f"{np.isnan(u).sum()} of the unseen images have nan."
        )
    if not 0 < level < 1:
        raise ValueError(f"level is a probability in (0, 1), not {level}.")
    if not all(0 < rate <= 0.5 for rate in rates):
        raise ValueError(f"rates are false-positive rates in (0, 1/2], not {tuple(rates)}.")
    f, u = np.sort(f), np.sort(u)

    def shares(f: np.ndarray, u: np.ndarray) -> dict[float, Interval]:
        """Forgotten below the lowest losses of the unseen, by rate; both are sorted."""
        found = {}
        for rate in rates:
            # 0.29 · 100 is 28.999999999999996 in floats.
            allowed = int(rate * len(u) + 1e-9)
            hits, count = (int((f < u[allowed]).sum()), len(f)) if allowed else (0, 0)
            found[float(rate)] = binomial_interval(hits, count, level)
        return found

    return Membership(_area(f, u, level), shares(f, u), shares(-f[::-1], -u[::-1]))


def _area(f: np.ndarray, u: np.ndarray, level: float) -> Interval:
    """The AUC of sorted losses, by ranks in O(n log m), with Wilson's interval."""
    n, m = len(f), len(u)
    by_forgotten = 1 - (np.searchsorted(u, f) + np.searchsorted(u, f, "right")) / (2 * m)
    by_unseen = (np.searchsorted(f, u) + np.searchsorted(f, u, "right")) / (2 * n)
    auc = float(by_forgotten.mean())
    variance = float(by_forgotten.var(ddof=1) / n + by_unseen.var(ddof=1) / m)
    pairs = float(min(n, m))
    if variance > 0:
        pairs = min(max(auc * (1 - auc) / variance, pairs), 4 * n * m / (n + m))
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    weight = z**2 / pairs
    centre = (auc + weight / 2) / (1 + weight)
    half = (weight * auc * (1 - auc) + weight**2 / 4) ** 0.5 / (1 + weight)
    # Rounding must not leave the AUC outside at 0 and 1.
    return Interval(
        auc, max(min(centre - half, auc), 0.0), min(max(centre + half, auc), 1.0), n + m
    )
