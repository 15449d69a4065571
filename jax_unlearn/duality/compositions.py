"""Denoisers composed as the closed forms say: unlearning with no training at all.

Each takes and returns closures (x_t [batch, ...], integer t [batch]) -> prediction, as
`samplers.sample` expects. They are written for ε. All three are weighted sums whose weights add
up to one, and x_0 and v are affine in ε at given (x_t, t), so that they hold unchanged for any
prediction type that all the closures share.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import schedules
from jax_unlearn.typing import Array, ArrayLike

__all__ = ["compose_forward_kl", "compose_likelihood", "compose_reverse_kl"]

Predict = Callable[[Array, Array], Array]


def _multipliers(unlearn: Sequence[Predict], multipliers: ArrayLike, most: float = np.inf) -> Array:
    shape = np.shape(multipliers)
    if shape != (len(unlearn),):
        raise ValueError(
            f"expected one multiplier for each of {len(unlearn)} denoisers, got the shape {shape}."
        )
    if not isinstance(multipliers, jax.core.Tracer):
        values = np.asarray(multipliers)
        if not (values >= 0).all():
            raise ValueError(f"multipliers must not be negative, got {values}.")
        if not values.sum() < most:
            raise ValueError(f"multipliers must sum to less than {most}, not to {values.sum()}.")
    return jnp.asarray(multipliers)


def compose_reverse_kl(
    reference: Predict, unlearn: Sequence[Predict], multipliers: ArrayLike
) -> Predict:
    """ε = ε_q + Σ_i α_i (ε_q − ε_i), α_i = λ_i/(1−Λ): the RU score at every noise level.

    s_q + Σ_i α_i (s_q − s_i) is the score of p_λ ∝ q Π_i (q/q_i)^{α_i} when q and the q_i are
    the clean laws. At noise level t this composition tilts the *noised* laws, which is not the
    law of noised samples of p_λ: tilting and noising do not commute, and what it samples is
    not p_λ. With one concept it is negative guidance of strength α (arXiv 2605.30825).

    Args:
      reference: the denoiser of q.
      unlearn: those of the q_i, m of them.
      multipliers: λ ≥ 0 with Λ < 1, [m].

    Raises:
      ValueError: for multipliers of another shape or, unless traced, outside the domain.
    """
    multipliers = _multipliers(unlearn, multipliers, most=1.0)
    strengths = multipliers / (1.0 - multipliers.sum())

    def predict(x_t: Array, t: Array) -> Array:
        base = reference(x_t, t)
        pushes = (a * (base - other(x_t, t)) for a, other in zip(strengths, unlearn, strict=True))
        return base + sum(pushes)

    return predict


def compose_forward_kl(
    reference: Predict,
    unlearn: Sequence[Predict],
    ratios: Sequence[Predict],
    multipliers: ArrayLike,
) -> Predict:
    """ε = (ε_q − Σ_i λ_i ρ_i ε_i) / (1 − Σ_i λ_i ρ_i), ρ_i = q_i/q of the noised laws at (x_t, t).

    p_λ = (q − Σ_i λ_i q_i)/(1−Λ) is linear in q and q_i, and so is noising: this is the denoiser of
    p_λ exactly, at every noise level, and where Σ_i λ_i q_i ≤ q holds for the clean laws it holds
    for the noised ones. With approximate ratios the denominator can reach zero; nothing is
    clipped. Source of p_λ: arXiv 2605.30825.

    Args:
      reference: the denoiser of q.
      unlearn: those of the q_i, m of them.
      ratios: closures (x_t, t) -> q_i(x_t)/q(x_t) [batch], m of them.
      multipliers: λ ≥ 0 with Σ_i λ_i q_i ≤ q, [m].

    Raises:
      ValueError: for multipliers or ratios of another number or, unless traced, negative ones.
    """
    multipliers = _multipliers(unlearn, multipliers)
    if len(ratios) != len(unlearn):
        raise ValueError(f"got {len(ratios)} ratios for {len(unlearn)} denoisers.")

    def predict(x_t: Array, t: Array) -> Array:
        numerator, denominator = reference(x_t, t), jnp.ones(())
        for multiplier, other, ratio in zip(multipliers, unlearn, ratios, strict=True):
            weight = multiplier * schedules.expand(ratio(x_t, t), x_t)
            numerator = numerator - weight * other(x_t, t)
            denominator = denominator - weight
        return numerator / denominator

    return predict


def compose_likelihood(
    reference: Predict,
    unlearn: Sequence[Predict],
    odds: Sequence[Predict],
    multipliers: ArrayLike,
) -> Predict:
    """ε = ε_q + Σ_i λ_i h_i (ε_q − ε_i), h_i = q_i/q of the noised laws at (x_t, t).

    For h_i = q_i/q, the odds of concept i after against before seeing x (its posterior divided
    by its prior), ∇h_i = h_i (s_i − s_q), so that this is s_q − Σ_i λ_i ∇h_i: guidance away
    from a concept in proportion to how likely it is at that x (arXiv 2605.30825). Scale λ where
    h is a posterior, h_i = π_i q_i/q. At noise level t the weight of p_λ is
    E[exp(−Σ λ_i h_i(x_0)) | x_t]; here it is exp(−Σ λ_i E[h_i(x_0) | x_t]), since the ratio of
    the noised laws is the conditional mean of the clean one. The two agree to first order in λ
    and at vanishing noise; elsewhere this is not the law of noised samples of p_λ.

    Args:
      reference: the denoiser of q.
      unlearn: those of the q_i, m of them.
      odds: closures (x_t, t) -> h_i [batch], m of them.
      multipliers: λ ≥ 0, [m].

    Raises:
      ValueError: for multipliers or odds of another number or, unless traced, negative ones.
    """
    multipliers = _multipliers(unlearn, multipliers)
    if len(odds) != len(unlearn):
        raise ValueError(f"got {len(odds)} odds for {len(unlearn)} denoisers.")

    def predict(x_t: Array, t: Array) -> Array:
        base = reference(x_t, t)
        epsilon = base
        for multiplier, other, likelihood in zip(multipliers, unlearn, odds, strict=True):
            weight = multiplier * schedules.expand(likelihood(x_t, t), x_t)
            epsilon = epsilon + weight * (base - other(x_t, t))
        return epsilon

    return predict
