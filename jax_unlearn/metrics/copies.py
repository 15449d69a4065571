"""Copies: how near the nearest image is, and how near makes a copy at a stated error."""

from typing import NamedTuple

import numpy as np

from jax_unlearn.typing import ArrayLike

__all__ = ["CopyThreshold", "copy_threshold", "nearest_distances"]

# Elements of the differences that are held at once.
_ELEMENTS = 2**24


class CopyThreshold(NamedTuple):
    """How near makes a copy.

    Fields:
      distance: what is nearer than this is a copy.
      rate: at most this share of unseen images is taken for a copy.
      count: unseen images that it was set on.
    """

    distance: float
    rate: float
    count: int


def copy_threshold(unseen: ArrayLike, rate: float) -> CopyThreshold:
    """τ = d_(k), the k-th smallest of m unseen distances, k = ⌊rate (m + 1)⌋.

    A further unseen image is as likely to take any place among these m as any other. So it is
    nearer than τ with probability at most k/(m + 1) ≤ rate. This holds for every law of
    distances, over the draw of the m images too (split conformal prediction). Of images that
    differ from the unseen ones in kind it says nothing.

    Computed on the host in float64.

    Args:
      unseen: [m] distances of images that no training saw to what was to be forgotten.
      rate: the false-positive rate, in (0, 1).

    Returns:
      The threshold; its rate is k/(m + 1).

    Raises:
      ValueError: for another shape, nan, a rate not in (0, 1), or fewer than 1/rate − 1 distances.

    References:
      Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005.

    Example:
      Two of twenty places are below the second smallest of 19 distances.

      >>> from jax_unlearn import metrics
      >>> metrics.copy_threshold(range(1, 20), 0.1)
      CopyThreshold(distance=2.0, rate=0.1, count=19)
    """
    distances = np.asarray(unseen, np.float64)
    if distances.ndim != 1 or np.isnan(distances).any():
        raise ValueError(f"distances of unseen images are numbers [m], not {distances.shape}.")
    if not 0 < rate < 1:
        raise ValueError(f"a false-positive rate lies in (0, 1), not {rate}.")
    count = len(distances)
    # 0.01 · 100 may fall below 1 in floats.
    place = int(rate * (count + 1) + 1e-9)
    if not place:
        raise ValueError(
            f"{count} unseen images set no threshold at a false-positive rate of {rate:g}: that "
            f"takes {int(np.ceil(1 / rate - 1e-9)) - 1}."
        )
    return CopyThreshold(float(np.sort(distances)[place - 1]), place / (count + 1), count)


def nearest_distances(queries: ArrayLike, bank: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """min_j ‖x_i − y_j‖ over the rows of a bank, and the first j that attains it.

    Exact, by all differences, a block of them at a time. Computed on the host.

    Args:
      queries: x, [n, d].
      bank: y, [m, d], m ≥ 1.

    Returns:
      (distances [n], float64; indices [n]).

    Raises:
      ValueError: if the shapes do not match, or the bank is empty.

    Example:
      >>> from jax_unlearn import metrics
      >>> distance, index = metrics.nearest_distances([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0]])
      >>> distance.tolist(), index.tolist()
      ([1.0], [1])
    """
    x, y = np.asarray(queries), np.asarray(bank)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(y):
        raise ValueError(
            f"queries and bank are rows [n, d] and [m, d], m at least 1, not {x.shape} and "
            f"{y.shape}."
        )
    step = max(1, _ELEMENTS // max(y.shape[1], 1))
    squares, index = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
    for start in range(0, len(y), step):
        rows = y[start : start + step]
        for i, one in enumerate(x):
            every = np.square(rows - one, dtype=np.float64).sum(axis=1)
            place = int(every.argmin())
            if every[place] < squares[i]:
                squares[i], index[i] = every[place], start + place
    return np.sqrt(squares), index
