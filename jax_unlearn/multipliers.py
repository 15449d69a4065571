"""Projections of multipliers onto the dual domains, and dual transformations.

A dual transformation is an optax transformation fed with −violation, as if the dual were
minimised: `optax.sgd(rate)` is then projected gradient ascent, λ ← Π[λ + rate · violation].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn.duality import stored_samples
from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "NuPIState",
    "box",
    "capped_simplex",
    "free",
    "l1_ball",
    "non_negative",
    "nu_pi",
    "stored_dual",
]

Projection = Callable[[Array], Array]


def free() -> Projection:
    """λ_i ← λ_i: the dual domain of equality constraints, all real numbers.

    With it E_p[h_i] = ε_i is asked in place of E_p[h_i] ≤ ε_i: a negative multiplier draws a value
    below its threshold back up to it. Reverse KL has `l1_ball` for this.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> multipliers.free()(jnp.array([-1.0, 2.0])).tolist()
      [-1.0, 2.0]
    """
    return lambda multipliers: multipliers


def non_negative() -> Projection:
    """λ_i ← max(λ_i, 0): the dual domain of likelihood constraints.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> multipliers.non_negative()(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return optax.projections.projection_non_negative


def box(maximum: ArrayLike) -> Projection:
    """λ_i ← min(max(λ_i, 0), maximum_i): non-negative, and bounded for safety.

    A multiplier that stays at its maximum means that the constraint was not met at that
    price; it is a sign of infeasibility, not a solution.

    Args:
      maximum: a number for all, or [m].

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> multipliers.box(1.5)(jnp.array([-1.0, 0.5, 2.0])).tolist()
      [0.0, 0.5, 1.5]
    """
    return lambda multipliers: jnp.clip(multipliers, 0.0, maximum)


def capped_simplex(margin: float = 1e-3) -> Projection:
    """Euclidean projection onto {λ ≥ 0, Σ λ_i ≤ 1 − margin}: the domain of reverse KL.

    At Σ λ_i → 1 the power 1/(1−Σλ) of the reverse-KL tilt diverges.

    Args:
      margin: what Σ λ_i stays below 1 by.

    Raises:
      ValueError: unless 0 < margin < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> multipliers.capped_simplex(0.5)(jnp.array([-1.0, 0.25])).tolist()
      [0.0, 0.25]
      >>> multipliers.capped_simplex(0.5)(jnp.array([0.75, 0.5])).tolist()
      [0.375, 0.125]
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie inside (0, 1), not be {margin}.")

    def project(multipliers: Array) -> Array:
        positive = jnp.maximum(multipliers, 0.0)
        # The face's projection does not see a shift of all; without one, large λ lose digits.
        shifted = multipliers - multipliers.max()
        on_face = optax.projections.projection_simplex(shifted, 1.0 - margin)
        return jnp.where(positive.sum() <= 1.0 - margin, positive, on_face)

    return project


def l1_ball(margin: float = 1e-3) -> Projection:
    """Euclidean projection onto {Σ |λ_i| ≤ 1 − margin}: the capped simplex for equalities.

    With it value_i = b_i is asked in place of value_i ≥ b_i: a negative multiplier draws a value
    that lies beyond its threshold back to it.

    Args:
      margin: what Σ |λ_i| stays below 1 by.

    Raises:
      ValueError: unless 0 < margin < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> multipliers.l1_ball(0.5)(jnp.array([0.75, -0.5])).tolist()
      [0.375, -0.125]
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
    """The νPI controller of dual variables (Sohrabi et al. 2024, algorithm 1).

    ξ_k = ν ξ_{k−1} + (1−ν) e_k, ξ_0 = e_0;  λ_{k+1} = λ_k + κ_i e_k + κ_p (ξ_k − ξ_{k−1}), where
    e_k is the violation. κ_p = 0 is gradient ascent; κ_p > 0 damps the multiplier's
    oscillations about the boundary, as a PI controller does. A violation of exactly 0 is that
    of a constraint without an example in the batch: its ξ and λ stay as they are.

    Args:
      integral: κ_i ≥ 0.
      proportional: κ_p ≥ 0.
      nu: ν in [0, 1), the smoothing of the proportional part.

    Example:
      A violation of 2 that stays: P acts on its change alone, so that λ rises by κ_i · 2 a step.

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_unlearn import multipliers
      >>> controller = multipliers.nu_pi(0.25, proportional=1.0)
      >>> current, violations = jnp.zeros(1), jnp.array([2.0])
      >>> state = controller.init(current)
      >>> for _ in range(3):
      ...     change, state = controller.update(-violations, state, current)
      ...     current = optax.apply_updates(current, change)
      >>> current.tolist()
      [1.5]
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


def stored_dual(
    stored: ArrayLike, *, groups: ArrayLike | None = None, margin: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Dual ascent preconditioned by the dual function of stored samples of q.

    λ ← λ + g (λ*(ε) − λ*(E_p[h] + margin · stderr)), g = max(1, |λ|₁ / |λ*(E_p[h])|₁), where λ*(·)
    is the maximiser that `stored_samples.likelihood_solver` finds. No λ_i falls by more than half,
    or rises by more than max(λ_i, 1).

    A network that has distilled only a part of p_λ shows what p_λ′ does, λ′ = λ*(E_p[h]). g says
    how much more λ it takes than p_λ would. If it keeps following as large a part, one step is all.

    With g = 1 this is dual-space preconditioned descent (Maddison et al. 2021, SIAM J. Optim. 31).
    The preconditioner is the Bregman divergence of the stored samples' price P*(ε), since λ* is
    −∇P*. A gradient step in λ knows no scale; this one has the dual function's own.

    λ is differentiable in ε through λ*(ε) and in the violations through λ*(E_p[h]). A derivative is
    nan where one of these is not attained: see `DualSolution`.

    Args:
      stored: h_i(x_n) at samples x_n of q, [n, m]. Likelihoods in the paper; any finite h will do.
      groups: k of each stored sample, integers [n]: the law q(·|k) that p must keep the share of.
      margin: standard errors to add to E_p[h], so that constraints hold beyond chance.

    Returns:
      A transformation without state. `update(updates, state, params, *, thresholds, stderr=None)`
      takes −violation = ε − E_p[h] [m], λ ≥ 0 [m], ε [m] and the standard error of E_p[h] [m], or
      None for no error. E_p[h] should be a mean over fresh samples of the model, from new noise.
      The change is nan in all m if a value or an error is not finite: reject that step.

    Raises:
      ValueError: for stored samples that are not finite, shapes that do not fit, or a negative
        margin. `update` raises it without params, or for shapes other than [m].

    Example:
      One stored sample in five shows a concept, and one in ten may. The model shows it in 0.15
      at λ = 0.5, more than p_λ would; at the λ that is found, it is to show it in 0.1.

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_unlearn import multipliers
      >>> dual = multipliers.stored_dual([[1.0], [0.0], [0.0], [0.0], [0.0]])
      >>> current, thresholds = jnp.array([0.5]), jnp.array([0.1])
      >>> violations = jnp.array([0.15]) - thresholds
      >>> change, _ = dual.update(-violations, dual.init(current), current, thresholds=thresholds)
      >>> f"{optax.apply_updates(current, change)[0]:.3f}"
      '1.164'
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a number of standard errors, 0 or more, not {margin}.")
    solve = jax.vmap(stored_samples.likelihood_solver(stored, groups=groups))

    def init(multipliers: Array) -> optax.EmptyState:
        del multipliers
        return optax.EmptyState()

    def update(
        updates: Array,
        state: optax.EmptyState,
        params: Array | None = None,
        *,
        thresholds: Array,
        stderr: Array | None = None,
        **extra: Any,
    ) -> tuple[Array, optax.EmptyState]:
        del extra
        if params is None:
            raise ValueError("the multipliers must be given as params.")
        given = (updates, params, thresholds, jnp.zeros_like(updates) if stderr is None else stderr)
        updates, params, thresholds, error = map(jnp.asarray, given)
        shapes = [list(part.shape) for part in (updates, params, thresholds, error)]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                "expected updates, multipliers, thresholds and errors of one shape [m], got "
                f"{', '.join(map(str, shapes[:3]))} and {shapes[3]}."
            )
        value = thresholds - updates
        bounds = jnp.stack([thresholds, value, value + margin * error])
        asked, followed, reached = solve(bounds).multipliers
        # A model that shows no less than q has followed nothing: the longest step.
        least = jnp.finfo(followed.dtype).eps
        gain = jnp.maximum(params.sum() / jnp.maximum(followed.sum(), least), 1.0)
        step = gain * (asked - reached)
        change = jnp.clip(step, -0.5 * params, jnp.maximum(params, 1.0))
        # From nan the solver returns where it started, which would pass for a solution.
        change = jnp.where(jnp.isfinite(value + error).all(), change, jnp.nan)
        return change.astype(params.dtype), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore
