"""Denoisers composed as the closed forms say: unlearning with no training at all.

Each takes and returns closures (x_t [batch, ...], integer t [batch]) -> prediction, as
`samplers.sample` expects. They are written for ε, but hold for any prediction type that all the
closures share. For x_0 and v are affine in ε at given (x_t, t), and all three compositions are
weighted sums whose weights add up to one.
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

    Example:
      At λ = 1/2, α is 1: 1 + (1 − 3).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> reference, concept = (lambda x, t, value=value: value + 0 * x for value in (1.0, 3.0))
      >>> predict = duality.compose_reverse_kl(reference, [concept], [0.5])
      >>> predict(jnp.zeros((1, 1)), jnp.zeros(1, int)).tolist()
      [[-1.0]]
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

    p_λ = (q − Σ_i λ_i q_i)/(1−Λ) is linear in q and q_i, and so is noising. So this is the denoiser
    of p_λ exactly, at every noise level. Where Σ_i λ_i q_i ≤ q holds for the clean laws it holds
    for the noised ones. With approximate ratios the denominator can reach zero; nothing is
    clipped. Source of p_λ: arXiv 2605.30825.

    Args:
      reference: the denoiser of q.
      unlearn: those of the q_i, m of them.
      ratios: closures (x_t, t) -> q_i(x_t)/q(x_t) [batch], m of them.
      multipliers: λ ≥ 0 with Σ_i λ_i q_i ≤ q, [m].

    Raises:
      ValueError: for multipliers or ratios of another number or, unless traced, negative ones.

    Example:
      Two equal modes less all of the first is the second, at every noise level.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality, mixtures, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.04)
      >>> first, second = mixtures.select(q, 0), mixtures.select(q, 1)
      >>> predict = duality.compose_forward_kl(
      ...     mixtures.denoiser(q, schedule), [mixtures.denoiser(first, schedule)],
      ...     [mixtures.density_ratio(first, q, schedule)], [0.5],
      ... )
      >>> x_t, t = jnp.array([[0.3]]), jnp.array([40])
      >>> exact = mixtures.denoiser(second, schedule)(x_t, t)
      >>> bool(abs(predict(x_t, t) - exact)[0, 0] < 1e-4)
      True
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

    h_i = q_i/q is the posterior of concept i at x divided by its prior, and ∇h_i = h_i (s_i − s_q).
    So the score is s_q − Σ_i λ_i ∇h_i: guidance away from a concept in proportion to how likely
    it is at that x (arXiv 2605.30825). Scale λ where h is a posterior, h_i = π_i q_i/q.

    At noise level t the weight of p_λ is E[exp(−Σ λ_i h_i(x_0)) | x_t]. Here it is
    exp(−Σ λ_i E[h_i(x_0) | x_t]), since the ratio of the noised laws is the conditional mean of
    the clean one. The two agree to first order in λ and at vanishing noise; elsewhere this is
    not the law of noised samples of p_λ.

    Args:
      reference: the denoiser of q.
      unlearn: those of the q_i, m of them.
      odds: closures (x_t, t) -> h_i [batch], m of them.
      multipliers: λ ≥ 0, [m].

    Raises:
      ValueError: for multipliers or odds of another number or, unless traced, negative ones.

    Example:
      λ = 2, where the concept is half as likely as before seeing x: 1 + 2 · ½ (1 − 3).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> reference, concept = (lambda x, t, value=value: value + 0 * x for value in (1.0, 3.0))
      >>> odds = lambda x, t: jnp.full(x.shape[:1], 0.5)
      >>> predict = duality.compose_likelihood(reference, [concept], [odds], [2.0])
      >>> predict(jnp.zeros((1, 1)), jnp.zeros(1, int)).tolist()
      [[-1.0]]
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
