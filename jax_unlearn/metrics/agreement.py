"""How often a classifier sees in a sample the class that was asked for."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_unlearn.typing import Array, ArrayLike, Estimate

__all__ = ["AgreementByClass", "agreement", "proportion"]


class AgreementByClass(NamedTuple):
    """Agreement of a classifier with the labels that were asked for, by label.

    Attributes:
      rate: share of the label's samples that are classified as it, [k]; nan without samples.
      stderr: one-σ half-width of Wilson's interval, [k]; nan without samples.
      count: samples of each label, [k].
      confusion: counts [k, k], the label asked for by the label seen.
    """

    rate: Array
    stderr: Array
    count: Array
    confusion: Array


def proportion(hits: ArrayLike, count: ArrayLike) -> Estimate:
    """The share r = hits / count, and the half-width of Wilson's interval at one σ.

    √(r(1−r)/n + 1/(4n²)) / (1 + 1/n) for n = count: unlike the binomial √(r(1−r)/n) it is not 0 at
    r = 0 or 1, where unlearning wants to end up. The value is the plain share r, not Wilson's
    centre; both are nan where count is 0.

    References:
      Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    n = jnp.where(jnp.asarray(count) > 0, count, jnp.nan)
    rate = jnp.asarray(hits) / n
    stderr = jnp.sqrt(rate * (1 - rate) / n + 1 / (4 * jnp.square(n))) / (1 + 1 / n)
    return Estimate(rate, stderr)


def agreement(logits: ArrayLike, labels: ArrayLike, num_labels: int) -> AgreementByClass:
    """The confusion of judged samples, and the agreement r = confusion_cc / count_c by label.

    The standard error is that of `proportion`. The unlearning accuracy of a forgotten label is
    1 − r. Labels are checked, so call it outside jit.

    Args:
      logits: the judge's, [n, num_labels].
      labels: the labels that the samples were drawn for, integers [n].
      num_labels: k.

    Raises:
      ValueError: if the shapes do not match, or a label is not an integer in [0, num_labels).
    """
    logits, labels = jnp.asarray(logits), np.asarray(labels)
    if labels.ndim != 1 or logits.shape != (len(labels), num_labels):
        raise ValueError(
            f"logits must be [n, {num_labels}] and labels [n], not {logits.shape} and "
            f"{labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or np.any((labels < 0) | (labels >= num_labels)):
        raise ValueError(f"labels must be integers in [0, {num_labels}), not {np.unique(labels)}.")
    confusion = jnp.zeros((num_labels, num_labels), int).at[labels, logits.argmax(axis=1)].add(1)
    count = confusion.sum(axis=1)
    rate, stderr = proportion(jnp.diagonal(confusion), count)
    return AgreementByClass(rate, stderr, count, confusion)
