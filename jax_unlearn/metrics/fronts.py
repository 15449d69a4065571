"""Fronts of two costs: which points are not dominated, and the area that they dominate."""

import numpy as np

from jax_unlearn.typing import ArrayLike

__all__ = ["hypervolume", "pareto_front"]


def pareto_front(points: ArrayLike) -> np.ndarray:
    """Which points no other dominates: none is as good in every cost, and better in one.

    Equal points do not dominate each other. Cost is what is to be small: of a value that is to be
    large, give its negative.

    Args:
      points: costs, [n, k].

    Returns:
      Booleans, [n].

    Raises:
      ValueError: for points that are not [n, k], or not finite.

    Example: the third is worse than the second in both.
      >>> from jax_unlearn import metrics
      >>> metrics.pareto_front([[0.0, 3.0], [1.0, 1.0], [2.0, 2.0]]).tolist()
      [True, True, False]
    """
    costs = _checked(points)
    no_worse = (costs[:, None] <= costs).all(axis=-1)
    better = (costs[:, None] < costs).any(axis=-1)
    return np.logical_not((no_worse & better).any(axis=0))


def hypervolume(points: ArrayLike, reference_point: ArrayLike) -> float:
    """The area of {z: p ≤ z ≤ r for some point p}: what the points dominate up to r.

    Computed exactly, on the host in float64. Points that are no better than r in both costs add
    nothing. It compares fronts only where r is the same, and r is best chosen before they are seen.

    Args:
      points: two costs each, [n, 2]; both are to be small.
      reference_point: r, [2].

    Returns:
      The area; 0 for no points.

    Raises:
      ValueError: for points that are not [n, 2] or numbers that are not finite.

    References:
      Zitzler, Thiele, "Multiobjective optimization using evolutionary algorithms", 1998.

    Example: two rectangles of 3 and 4, which share 2.
      >>> from jax_unlearn import metrics
      >>> metrics.hypervolume([[0.0, 2.0], [1.0, 1.0]], [3.0, 3.0])
      5.0
    """
    costs = _checked(points, columns=2)
    worst = _checked(np.asarray(reference_point)[None], columns=2)[0]
    costs = costs[(costs < worst).all(axis=1)]
    costs = costs[np.lexsort((costs[:, 1], costs[:, 0]))]
    # From left to right each point adds what lies below all before it.
    below = np.minimum.accumulate(np.concatenate([worst[1:], costs[:, 1]]))
    return float(((worst[0] - costs[:, 0]) * (below[:-1] - below[1:])).sum())


def _checked(points: ArrayLike, columns: int | None = None) -> np.ndarray:
    costs = np.asarray(points, np.float64)
    if costs.size == 0 and costs.ndim < 3:
        return costs.reshape(0, columns or 0)
    if costs.ndim != 2 or columns not in (None, costs.shape[1]):
        raise ValueError(f"points are [n, {columns or 'k'}], not of shape {list(costs.shape)}.")
    if not np.isfinite(costs).all():
        raise ValueError("points must be finite: leave out those that are not.")
    return costs
