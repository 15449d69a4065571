"""Precision, recall, density and coverage: how two sets of features lie in each other."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_unlearn.typing import ArrayLike

__all__ = ["Coverage", "coverage"]

# Rows of distances that are held at a time.
_BLOCK = 256
# A float64 product of two features is off by far less than this times their squared lengths.
_SLACK = 1e-12


class Coverage(NamedTuple):
    """How generated features lie among real ones; shares in [0, 1], but for the density.

    Fields:
      precision: generated ones inside any ball of the real ones: those that look real.
      recall: real ones inside any ball of the generated ones: those that could be made.
      density: balls of the real ones that hold a generated one, over k, on average.
      coverage: real ones whose ball holds any generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def coverage(real: ArrayLike, generated: ArrayLike, *, k: int = 5) -> Coverage:
    """Precision, recall, density and coverage of generated features y among real ones x.

      precision = Σ_j [y_j in any B(x_i)] / m        recall = Σ_i [x_i in any B(y_j)] / n
      density = Σ_ij [y_j in B(x_i)] / (km)          coverage = Σ_i [any y_j in B(x_i)] / n

    The closed ball B of a feature reaches to its k-th nearest neighbour in its own set, itself
    excluded. When both sets come from one continuous law, the density is 1 on average. The
    coverage is then 1 − Π_{j=1}^{k} (n−j)/(n+m−j) on average, which is why values are compared at
    equal n, m and k alone. A far outlier has a large ball, which raises precision and recall;
    density and coverage hardly change.

    Distances are Euclidean, in float64 on the host, by blocks of rows: time O((n + m)² d), memory
    O(n + m) times the block. Distances that differ by rounding alone count as equal.

    Args:
      real: [n, d] features.
      generated: [m, d] features, by the same extractor.
      k: which neighbour gives the radius, 1 ≤ k < min(n, m).

    Raises:
      ValueError: if the features are not finite, not [n, d] and [m, d], or k not as above.

    References:
      Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models",
      2019. Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.

    Example:
      With k = 1 the balls of 0, 1 and 10 have the radii 1, 1 and 9. The point 0.5 lies in the first
      two and 1.5 in the last two: density 4/2. Their own balls hold 0 and 1, and 10 lies in none.

      >>> from jax_unlearn import metrics
      >>> found = metrics.coverage([[0.0], [1.0], [10.0]], [[0.5], [1.5]], k=1)
      >>> found.precision, round(found.recall, 3), found.density, found.coverage
      (1.0, 0.667, 2.0, 1.0)
    """
    x, y = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"coverage takes features [n, d] and [m, d], not {x.shape} and {y.shape}.")
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(
            f"k must be at least 1 and below the number of features of either set, {len(x)} and "
            f"{len(y)}, not {k}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features must be finite, but some are nan or infinite.")
    # Distances are the same from any origin, and rounded least from a near one.
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    reach_x, reach_y = _reach(x, k), _reach(y, k)
    precise, held = 0, 0
    covered, recalled = np.zeros(len(x), bool), np.zeros(len(x), bool)
    for rows, squared in _squared_distances(y, x, _SLACK):
        inside = squared <= reach_x
        precise += int(inside.any(axis=1).sum())
        held += int(inside.sum())
        covered |= inside.any(axis=0)
        recalled |= (squared <= reach_y[rows, None]).any(axis=0)
    m = len(y)
    return Coverage(precise / m, float(recalled.mean()), held / (k * m), float(covered.mean()))


def _reach(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance from each feature to its k-th nearest other one."""
    reach = np.empty(len(x))
    for rows, squared in _squared_distances(x, x, 0.0):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        reach[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return reach


def _squared_distances(
    a: np.ndarray, b: np.ndarray, slack: float
) -> Iterator[tuple[slice, np.ndarray]]:
    """‖a_i − b_j‖², less a share of ‖a_i‖² + ‖b_j‖² that covers rounding, by blocks of rows."""
    lengths_a, lengths_b = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(a)))
        lengths = lengths_a[rows, None] + lengths_b
        yield rows, (1 - slack) * lengths - 2 * (a[rows] @ b.T)
