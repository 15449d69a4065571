"""Fronts by brute force, areas by counting cells, Student's t by scipy."""

import numpy as np
import pytest
import scipy.stats

from jax_unlearn import metrics

RNG = np.random.default_rng(0)


def counted(points, reference, cells=400):
    """The area by the centres of a grid over [0, reference]."""
    axes = [(np.arange(cells) + 0.5) * top / cells for top in reference]
    x, y = np.meshgrid(*axes, indexing="ij")
    hit = np.zeros(x.shape, bool)
    for point in points:
        hit |= (x >= point[0]) & (y >= point[1])
    return hit.mean() * np.prod(reference)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_a_hypervolume_is_the_area_that_is_dominated(count):
    points, reference = RNG.uniform(0, 1.3, (count, 2)), np.array([1.0, 1.2])
    found = metrics.hypervolume(points, reference)
    # The border of the area crosses at most two rows and columns of cells.
    assert found == pytest.approx(counted(points, reference), abs=2 * 1.2 / 400)
    assert metrics.hypervolume(RNG.permutation(points), reference) == pytest.approx(found)
    front = metrics.pareto_front(points)
    assert metrics.hypervolume(points[front], reference) == pytest.approx(found)
    worse = points[0] + np.array([0.01, 0.02])
    assert metrics.hypervolume([*points, worse], reference) == pytest.approx(found)
    assert metrics.hypervolume([*points, points[0]], reference) == pytest.approx(found)
    better = metrics.hypervolume([*points, [0.0, 0.0]], reference)
    assert better == pytest.approx(1.2)


def test_points_beyond_the_reference_add_nothing():
    assert metrics.hypervolume([[2.0, 0.0], [0.0, 1.0]], [1.0, 1.0]) == 0.0
    assert metrics.hypervolume([], [1.0, 1.0]) == 0.0
    assert metrics.hypervolume([[-1.0, -1.0], [2.0, -5.0]], [0.0, 0.0]) == 1.0


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_front_is_what_no_point_dominates(columns):
    points = RNG.integers(0, 5, (60, columns)).astype(float)  # With ties, and points twice.

    def dominated(p):
        return any(all(q <= p) and any(q < p) for q in points)

    expected = [not dominated(p) for p in points]
    assert metrics.pareto_front(points).tolist() == expected
    order = RNG.permutation(60)
    assert metrics.pareto_front(points[order]).tolist() == [expected[i] for i in order]


def test_of_no_points_there_is_no_front():
    assert metrics.pareto_front([]).tolist() == []


@pytest.mark.parametrize(
    ("points", "reference", "message"),
    [
        ([1.0, 2.0], [1.0, 1.0], r"\[n, 2\], not of shape \[2\]"),
        ([[1.0, 2.0, 3.0]], [1.0, 1.0], r"\[n, 2\]"),
        ([[1.0, np.nan]], [1.0, 1.0], "finite"),
        ([[1.0, 1.0]], [1.0, np.inf], "finite"),
        ([[1.0, 1.0]], [1.0], r"\[n, 2\]"),
    ],
)
def test_points_that_make_no_front_are_refused(points, reference, message):
    with pytest.raises(ValueError, match=message):
        metrics.hypervolume(points, reference)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 11, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_a_mean_s_interval_is_student_s(count, level):
    values = RNG.normal(3.0, 2.0, (count, 4))
    found = metrics.mean_interval(values, level)
    low, high = scipy.stats.t.interval(
        level, count - 1, values.mean(axis=0), scipy.stats.sem(values, axis=0)
    )
    np.testing.assert_allclose(found.value, values.mean(axis=0))
    np.testing.assert_allclose(found.low, low, rtol=1e-9)
    np.testing.assert_allclose(found.high, high, rtol=1e-9)
    assert found.count == count


def test_one_value_has_no_interval():
    found = metrics.mean_interval([2.0])
    assert found.value == 2.0
    assert np.isnan([found.low, found.high]).all()
    with pytest.raises(ValueError, match="at least one value"):
        metrics.mean_interval([])
    with pytest.raises(ValueError, match="level"):
        metrics.mean_interval([1.0], level=1.0)
