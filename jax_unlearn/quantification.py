"""Calibrated posteriors: how large a share of a law's samples shows a concept."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_unlearn.typing import Array, ArrayLike

__all__ = ["Confusion", "confusion"]

# The least difference between what a classifier finds where a concept is and where none is.
LEAST_CONTRAST = 0.02


class Confusion(NamedTuple):
    """What a classifier finds, on average, in images that show a concept and in those that do not.

    Attributes:
      shown: E[h_j | the image shows i], [m, m].
      elsewhere: E[h_j | the image shows none], [m].
      shown_covariance: of each row of `shown`, as an estimate, [m, m, m].
      elsewhere_covariance: of `elsewhere`, [m, m].
    """

    shown: np.ndarray
    elsewhere: np.ndarray
    shown_covariance: np.ndarray
    elsewhere_covariance: np.ndarray

    def shares(self, values: Array) -> Array:
        """h(x_n) [n, m] -> numbers [n, m] whose mean estimates the share of each concept.

        (h − elsewhere)(shown − elsewhere)⁻¹. Where a law p shows the concepts in the shares π, and
        what it shows of each looks as it did, E_p[h] = elsewhere + π (shown − elsewhere): the mean
        is π without bias, though one image's numbers may be negative or above 1. This is the
        adjusted count of quantification ("label shift"; Bella et al. 2010). A classifier that
        takes a share f of all else for a concept never finds less than f, however little there is.
        """
        inverse = np.linalg.inv(self.shown - self.elsewhere)
        return jnp.matmul(values - self.elsewhere, inverse, precision="highest")

    def variance(self, shares: ArrayLike) -> np.ndarray:
        """Of shares π [m], what the estimate of the confusion itself adds to their variance, [m].

        By the delta method: the diagonal of A'((1 − Σπ)² Cov(elsewhere) + Σ_i π_i² Cov(shown_i))A,
        A = (shown − elsewhere)⁻¹. It does not shrink with the number of samples judged.
        """
        shares = np.asarray(shares, np.float64)
        inverse = np.linalg.inv(self.shown - self.elsewhere)
        found = (1 - shares.sum()) ** 2 * self.elsewhere_covariance
        found = found + np.einsum("i,ijk->jk", shares**2, self.shown_covariance)
        return np.diag(inverse.T @ found @ inverse)


def confusion(values: ArrayLike, labels: ArrayLike) -> Confusion:
    """The confusion of a classifier, from images whose concepts are known.

    Args:
      values: h_i(x_n), [n, m].
      labels: 1 where image n shows concept i, else 0, at most one each, [n, m].

    Returns:
      Averages, with one image added to each that the classifier gets right, so that none is empty.

    Raises:
      ValueError: for shapes that differ, labels of two concepts, or a classifier that does not
        tell the concepts apart.
    """
    values, labels = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    if values.ndim != 2 or values.shape != labels.shape:
        raise ValueError(
            f"expected values and labels [n, m], got {list(values.shape)} and {list(labels.shape)}."
        )
    none = 1 - labels.sum(axis=1)
    if not np.isin(labels, (0, 1)).all() or (none < 0).any():
        raise ValueError("labels must be 0 or 1, and name one concept of an image at most.")
    right = np.eye(values.shape[1])
    of_each = [_mean_with(values[labels[:, i] == 1], right[i]) for i in range(len(right))]
    shown, shown_covariance = (np.stack(part) for part in zip(*of_each, strict=True))
    elsewhere, elsewhere_covariance = _mean_with(values[none == 1], 0 * right[0])
    if np.linalg.svd(shown - elsewhere, compute_uv=False).min() < LEAST_CONTRAST:
        raise ValueError(
            "the classifier does not tell the concepts apart: it finds them in "
            f"{', '.join(f'{100 * value:.2g}' for value in np.diag(shown))} % of images that show "
            f"them and {', '.join(f'{100 * value:.2g}' for value in elsewhere)} % of all others."
        )
    found = (shown, elsewhere, shown_covariance, elsewhere_covariance)
    return Confusion(*(part.astype(np.float32) for part in found))


def _mean_with(values: np.ndarray, one_more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of rows and one more, and the covariance of that mean."""
    values = np.concatenate([values, one_more[None]])
    mean = values.mean(axis=0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) * max(len(values) - 1, 1))
