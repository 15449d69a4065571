"""Projections of multipliers onto the dual domains, and dual transformations.

A dual transformation is an optax transformation fed with −violation, as if the dual were
minimised: `optax.sgd(rate)` is then projected gradient ascent, λ ← Π[λ + rate · violation].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from jax_unlearn.typing import Array, ArrayLike

__all__ = ["NuPIState", "box", "capped_simplex", "l1_ball", "non_negative", "nu_pi"]

Projection = Callable[[Array], Array]


def non_negative() -> Projection:
    """λ_i ← max(λ_i, 0): the dual domain of likelihood constraints."""
    return optax.projections.projection_non_negative


def box(maximum: ArrayLike) -> Projection:
    """λ_i ← min(max(λ_i, 0), maximum_i): non-negative, and bounded for safety.

    A multiplier that stays at its maximum means that the constraint was not met at that
    price; it is a sign of infeasibility, not a solution.
    """
    return lambda multipliers: jnp.clip(multipliers, 0.0, maximum)


def capped_simplex(margin: float = 1e-3) -> Projection:
    """Euclidean projection onto {λ ≥ 0, Σ λ_i ≤ 1 − margin}: the domain of reverse KL.

    At Σ λ_i → 1 the power 1/(1−Σλ) of the reverse-KL tilt diverges.

    Raises:
      ValueError: unless 0 < margin < 1.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie inside (0, 1), not be {margin}.")

    def project(multipliers: Array) -> Array:
        positive = jnp.maximum(multipliers, 0.0)
        on_face = optax.projections.projection_simplex(multipliers, 1.0 - margin)
        return jnp.where(positive.sum() <= 1.0 - margin, positive, on_face)

    return project


def l1_ball(margin: float = 1e-3) -> Projection:
    """Euclidean projection onto {Σ |λ_i| ≤ 1 − margin}: the capped simplex for equalities.

    With it value_i = b_i is asked in place of value_i ≥ b_i: a negative multiplier draws a value
    that lies beyond its threshold back to it.

    Raises:
      ValueError: unless 0 < margin < 1.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie inside (0, 1), not be {margin}.")
    return lambda multipliers: optax.projections.projection_l1_ball(multipliers, 1.0 - margin)


class NuPIState(NamedTuple):
    """ξ_{k−1}, the smoothed violations, and which constraints have had one."""

    smoothed: Array
    seen: Array


def nu_pi(
    integral: ArrayLike, proportional: ArrayLike, nu: ArrayLike = 0.0
) -> optax.GradientTransformation:
    """The νPI controller of dual variables (Sohrabi et al. 2024, alg. 1).

    ξ_k = ν ξ_{k−1} + (1−ν) e_k, ξ_0 = e_0;  λ_{k+1} = λ_k + κ_i e_k + κ_p (ξ_k − ξ_{k−1}), where
    e_k is the violation. κ_p = 0 is gradient ascent; κ_p > 0 damps the multiplier's
    oscillations about the boundary, as a PI controller does. A violation of exactly 0 is that
    of a constraint without an example in the batch: its ξ and λ stay as they are.

    Args:
      integral: κ_i ≥ 0.
      proportional: κ_p ≥ 0.
      nu: ν in [0, 1), the smoothing of the proportional part.
    """

    def init(multipliers: Array) -> NuPIState:
        return NuPIState(jnp.zeros_like(multipliers), jnp.zeros(multipliers.shape, bool))

    def update(
        updates: Array, state: NuPIState, params: Array | None = None
    ) -> tuple[Array, NuPIState]:
        del params
        share, present = jnp.asarray(nu), updates != 0
        previous = jnp.where(state.seen, state.smoothed, updates)
        smoothed = jnp.where(present, share * previous + (1 - share) * updates, state.smoothed)
        change = jnp.asarray(integral) * updates + jnp.where(
            present, jnp.asarray(proportional) * (smoothed - previous), 0.0
        )
        return -change, NuPIState(smoothed, state.seen | present)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore
