"""Calibrated posteriors: a choice of h whose mean is the share of samples that show each concept.

  E_p[h̃_i] ≤ ε_i,   h̃ = (h − e)(S − e)⁻¹,   S_ij = E[h_j | shows i],   e_j = E[h_j | shows none]

Values are rows. A classifier h that takes a fraction f of all else for a concept never finds less
than f of it. Its *confusion*, S and e, is known from samples whose concepts are known. A law p
that shows the concepts in the shares π, and each as it looks in those samples, is

  p = Σ_i π_i p(·|i) + (1 − Σ_i π_i) p(·|none),   so that   E_p[h] = e + π (S − e),

and E_p[h̃] = π, without bias. This is the adjusted count of quantification (Forman 2008), with
posteriors in place of decisions (Bella et al. 2010), of several concepts at once. The assumption
is that of label shift (Saerens et al. 2002): shares move, and how each concept looks does not.

**It is still a likelihood constraint.** h̃ is affine in h, and no more than another h. Of all p with
E_p[h̃] ≤ ε the nearest to q is p_λ ∝ q exp(−λᵀh̃), which is the tilt by h with λ′ = (S − e)⁻¹ λ.
Entries of λ′ may be negative where those of λ are not. Less of one concept may then take more of
what h mistakes for another.

**It is right on average only.** Values of a single sample may be negative or above 1. What needs
h ≥ 0, as `duality.solve_likelihood`, takes h̃_i + c and ε_i + c instead: p_λ is the same.

**Where it is biased.** Label shift holds where samples are reweighted by their concept,
p(x, c) ∝ q(x, c) exp(−λ_c). It does not where they are reweighted by h̃(x): such a p_λ keeps those
samples of a concept that h sees least. There λᵀE_p[h̃] ≤ λᵀπ, so that the shares read low. For
weights that are a function of x alone an exact posterior needs no calibration: E_p[h] = π.

References:
  Forman, "Quantifying counts and costs via classification", Data Mining and Knowledge Discovery
    17, 2008: the adjusted count.
  Bella, Ferri, Hernández-Orallo and Ramírez-Quintana, "Quantification via probability
    estimators", ICDM 2010.
  Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a priori
    probabilities: a simple procedure", Neural Computation 14, 2002.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "FORMULA",
    "Confusion",
    "calibrate",
    "calibrated_posterior",
    "confusion",
    "share_variance",
]

FORMULA = "E_p[h̃ᵢ(x)] ≤ εᵢ, h̃ = (h − e)(S − e)⁻¹, the calibrated posterior"
"""The constraint in one line, as reports print it: S is `Confusion.shown`, e `.elsewhere`."""

# The least difference between what a classifier finds where a concept is and where none is.
LEAST_CONTRAST = 0.02


class Confusion(NamedTuple):
    """What a classifier finds, on average, in samples that show a concept and in those that do not.

    Attributes:
      shown: S_ij = E[h_j | the sample shows i], [m, m].
      elsewhere: e_j = E[h_j | the sample shows none], [m].
      shown_covariance: of each row of `shown`, as an estimate, [m, m, m].
      elsewhere_covariance: of `elsewhere`, [m, m].
    """

    shown: np.ndarray
    elsewhere: np.ndarray
    shown_covariance: np.ndarray
    elsewhere_covariance: np.ndarray


def confusion(values: ArrayLike, labels: ArrayLike) -> Confusion:
    """S_ij = mean of h_j over the samples that show i, and e_j over those that show none.

    One sample that the classifier gets right is added to each mean, so that none is empty.

    Args:
      values: h_i(x_n), [n, m].
      labels: 1 where sample n shows concept i, else 0, at most one each, [n, m].

    Returns:
      The means, with their covariances as estimates, float32 on the host.

    Raises:
      ValueError: for shapes that differ, labels of two concepts, or a classifier that does not
        tell the concepts apart.

    Example:
      >>> found = confusion([[0.75], [0.5], [0.25], [0.5]], [[1], [1], [0], [0]])
      >>> found.shown.tolist(), found.elsewhere.tolist()
      ([[0.75]], [0.25])
    """
    values, labels = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    if values.ndim != 2 or values.shape != labels.shape:
        raise ValueError(
            f"expected values and labels [n, m], got {list(values.shape)} and {list(labels.shape)}."
        )
    none = 1 - labels.sum(axis=1)
    if not np.isin(labels, (0, 1)).all() or (none < 0).any():
        raise ValueError("labels must be 0 or 1, and name one concept of a sample at most.")
    right = np.eye(values.shape[1])
    of_each = [_mean_with(values[labels[:, i] == 1], right[i]) for i in range(len(right))]
    shown, shown_covariance = (np.stack(part) for part in zip(*of_each, strict=True))
    elsewhere, elsewhere_covariance = _mean_with(values[none == 1], 0 * right[0])
    parts = (shown, elsewhere, shown_covariance, elsewhere_covariance)
    found = Confusion(*(part.astype(np.float32) for part in parts))
    _inverse(found)  # Refuses what does not tell the concepts apart.
    return found


def calibrate(values: ArrayLike, confusion: Confusion) -> Array:
    """h̃ = (h − e)(S − e)⁻¹ of values h(x_n): their mean estimates the share of each concept.

    Args:
      values: h_i(x_n), [n, m].
      confusion: of h; not traced.

    Returns:
      h̃_i(x_n), [n, m]; single values may be negative or above 1.

    Raises:
      ValueError: for shapes that do not fit, or a confusion that does not tell concepts apart.

    Example:
      A classifier that sees a concept in 80 % of what shows it and in 10 % of all else:

      >>> seen = Confusion(*map(np.asarray, ([[0.8]], [0.1], [[[0.0]]], [[0.0]])))
      >>> a_third_shows_it = [[0.8], [0.1], [0.1]]
      >>> round(float(calibrate(a_third_shows_it, seen).mean()), 6)
      0.333333
    """
    inverse, values = _inverse(confusion), jnp.asarray(values)
    if values.ndim != 2 or values.shape[1] != len(inverse):
        raise ValueError(f"expected values [n, {len(inverse)}], got {list(values.shape)}.")
    dtype = jnp.result_type(values, float)
    centred = values - jnp.asarray(confusion.elsewhere, dtype)
    return jnp.matmul(centred, jnp.asarray(inverse, dtype), precision="highest")


def calibrated_posterior(
    h: Callable[[Array], Array], confusion: Confusion
) -> Callable[[Array], Array]:
    """h̃(x) = (h(x) − e)(S − e)⁻¹: a function of samples whose mean is the share of each concept.

    Pass it where a likelihood constraint takes h. As h, it can be jitted and differentiated:
    ∇h̃ = ∇h (S − e)⁻¹.

    Args:
      h: samples x_0 [n, ...] to values h_i(x_0), [n, m].
      confusion: of h, as `confusion` makes it; not traced.

    Returns:
      A function of samples x_0 [n, ...] to values h̃_i(x_0), [n, m].

    Raises:
      ValueError: as `calibrate`, for the confusion now and for h when it is called.

    Example:
      >>> seen = Confusion(*map(np.asarray, ([[0.8]], [0.1], [[[0.0]]], [[0.0]])))
      >>> shares = calibrated_posterior(lambda x: 0.1 + 0.7 * (x > 0), seen)
      >>> x_0 = jnp.array([[1.0], [-2.0], [3.0], [-1.0]])
      >>> round(float(shares(x_0).mean()), 6)
      0.5
    """
    _inverse(confusion)  # Refuses it here, rather than where h is first called.
    return lambda x_0: calibrate(h(x_0), confusion)


def share_variance(shares: ArrayLike, confusion: Confusion) -> np.ndarray:
    """The diagonal of Aᵀ((1 − Σπ)² Cov(e) + Σ_i π_i² Cov(S_i))A,   A = (S − e)⁻¹.

    What the error of the confusion adds to the variance of shares π, by the delta method. It does
    not shrink with the number of samples judged: add it to the variance of their mean. Of one
    concept it is the term of the two rates in the variance of Rogan and Gladen, "Estimating
    prevalence from the results of a screening test", American Journal of Epidemiology 107, 1978.

    Args:
      shares: π, the mean of calibrated values, [m].
      confusion: what they were calibrated with.

    Returns:
      The variance of each share, float64 on the host, [m].

    Raises:
      ValueError: for shapes that do not fit, or a confusion that does not tell concepts apart.

    Example:
      >>> seen = Confusion(*map(np.asarray, ([[0.8]], [0.1], [[[0.0]]], [[0.0049]])))
      >>> share_variance([0.5], seen).round(6).tolist()
      [0.0025]
    """
    inverse, shares = _inverse(confusion), np.asarray(shares, np.float64)
    if shares.shape != inverse.shape[:1]:
        raise ValueError(f"expected shares [{len(inverse)}], got {list(shares.shape)}.")
    found = (1 - shares.sum()) ** 2 * np.asarray(confusion.elsewhere_covariance, np.float64)
    found = found + np.einsum("i,ijk->jk", shares**2, confusion.shown_covariance)
    return np.diag(inverse.T @ found @ inverse)


def _inverse(confusion: Confusion) -> np.ndarray:
    """A = (S − e)⁻¹, [m, m], in float64."""
    shown, elsewhere = (np.asarray(part, np.float64) for part in confusion[:2])
    if shown.ndim != 2 or shown.shape != 2 * elsewhere.shape:
        raise ValueError(
            "expected a confusion of shown [m, m] and elsewhere [m], got "
            f"{list(shown.shape)} and {list(elsewhere.shape)}."
        )
    contrast = shown - elsewhere
    if not np.isfinite(contrast).all():
        raise ValueError(f"the confusion is not finite: shown {shown}, elsewhere {elsewhere}.")
    if np.linalg.svd(contrast, compute_uv=False).min() < LEAST_CONTRAST:
        raise ValueError(
            "the classifier does not tell the concepts apart: it finds them in "
            f"{', '.join(f'{100 * value:.2g}' for value in np.diag(shown))} % of samples that show "
            f"them and {', '.join(f'{100 * value:.2g}' for value in elsewhere)} % of all others."
        )
    return np.linalg.inv(contrast)


def _mean_with(values: np.ndarray, one_more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of rows and one more, and the covariance of that mean."""
    values = np.concatenate([values, one_more[None]])
    mean = values.mean(axis=0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) * max(len(values) - 1, 1))
