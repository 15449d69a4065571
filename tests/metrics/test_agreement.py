import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from jax_unlearn.metrics import agreement


def test_confusion_agrees_with_sklearn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 4)), rng.integers(4, size=300)
    result = agreement(logits, labels, 4)
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(4))
    np.testing.assert_array_equal(result.confusion, expected)
    np.testing.assert_array_equal(result.count, np.bincount(labels))
    np.testing.assert_allclose(
        result.rate, confusion_matrix(labels, logits.argmax(1), normalize="true").diagonal(), 1e-6
    )


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (7, 20), (1, 1)])
def test_standard_error_is_wilsons(right, n):
    logits = np.eye(2)[(np.arange(n) >= right).astype(int)]
    result = agreement(logits, np.zeros(n, int), 2)
    one_sigma = 0.6826894921370859
    interval = binomtest(right, n).proportion_ci(one_sigma, method="wilson")
    # scipy cuts the interval at 0 and 1, which it only reaches at these ends.
    np.testing.assert_allclose(result.stderr[0], (interval.high - interval.low) / 2, rtol=1e-5)


def test_a_label_without_samples_has_no_rate():
    result = agreement(np.eye(3), np.array([0, 1, 1]), 3)
    np.testing.assert_array_equal(result.count, [1, 2, 0])
    np.testing.assert_array_equal(result.confusion, [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert np.isnan(result.rate[2])
    assert np.isnan(result.stderr[2])


@pytest.mark.parametrize(
    ("shape", "labels", "match"),
    [
        ((3, 4), np.zeros(3, int), r"\[n, 5\]"),
        ((3, 5), np.zeros(2, int), r"\[n, 5\]"),
        ((3, 5), np.array([0, 1, 5]), r"in \[0, 5\)"),
        ((3, 5), np.array([0, -1, 2]), r"in \[0, 5\)"),
        ((3, 5), np.array([0.0, 1.0, 2.0]), "integers"),
    ],
)
def test_refuses_wrong_arguments(shape, labels, match):
    with pytest.raises(ValueError, match=match):
        agreement(jnp.zeros(shape), labels, 5)
