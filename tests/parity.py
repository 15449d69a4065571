"""How near an output is to torch's."""

import numpy as np

TOLERANCE = 1e-5


def relative_error(actual, expected):
    """Root mean square of the difference, relative to that of what is expected."""
    expected = np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def assert_near(actual, expected):
    """Compares each output of a dict with the one of the same name."""
    for name, values in actual.items():
        assert relative_error(values, expected[name]) < TOLERANCE, name
