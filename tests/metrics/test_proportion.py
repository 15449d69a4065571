import numpy as np
import pytest
from scipy.stats import binomtest

from jax_unlearn.metrics import proportion


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (7, 20), (1, 1)])
def test_standard_error_is_wilsons(right, n):
    result = proportion(right, n)
    assert result.value == pytest.approx(right / n)
    one_sigma = 0.6826894921370859
    interval = binomtest(right, n).proportion_ci(one_sigma, method="wilson")
    # scipy cuts the interval at 0 and 1, which it only reaches at these ends.
    np.testing.assert_allclose(result.stderr, (interval.high - interval.low) / 2, rtol=1e-5)


def test_what_was_never_asked_for_has_no_share():
    result = proportion(np.array([1, 0]), np.array([2, 0]))
    np.testing.assert_array_equal(np.isnan(result.value), [False, True])
    np.testing.assert_array_equal(np.isnan(result.stderr), [False, True])
