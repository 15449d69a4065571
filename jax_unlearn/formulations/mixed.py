"""Both kinds of constraint in one problem: KL(p‖q_i) ≥ b_i and E_p[h_j] ≤ ε_j."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from jax_unlearn import multipliers, schedules
from jax_unlearn.formulations import on_policy
from jax_unlearn.formulations.base import Formulation
from jax_unlearn.formulations.reverse_kl import domain
from jax_unlearn.typing import Array, ArrayLike, Denoiser

__all__ = ["mixed"]

ESTIMATORS = ("pathwise", "stop_gradient")


def mixed(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    likelihoods: Callable[[Array], Array],
    counts: tuple[int, int],
    *,
    shape: tuple[int, ...],
    steps: int,
    estimator: str = "pathwise",
    reference_apply: Denoiser | None = None,
    gradients: Callable[[Array, Array], Array] | None = None,
    shares: ArrayLike | None = None,
    margin: float = 0.02,
) -> Formulation:
    """Finds min KL(p‖q) subject to KL(p‖q_i) ≥ b_i, i ≤ k, and E_p[h_j(x_0)] ≤ ε_j, j ≤ l.

    Objective, path KLs and their domain are those of `reverse_kl`, the h_j those of `likelihood`,
    all of them on the same trajectories. Thresholds and multipliers are (b_1 … b_k, ε_1 … ε_l)
    and (λ_1 … λ_k, μ_1 … μ_l). With Λ = Σ_i λ_i < 1 the Lagrangian is
    (1−Λ) KL(p‖p_{λ,μ}) up to what does not depend on p, so that the optimum is the tilt
    p_{λ,μ} ∝ q Π_i (q/q_i)^{λ_i/(1−Λ)} exp(−Σ_j μ_j h_j/(1−Λ)): the sum of the two kinds'
    exponents, with μ too divided by 1−Λ. The exact solution on a finite space is
    `duality.solve_mixed`.

    Estimators:
      "pathwise": through the sampler, unbiased, as in `reverse_kl` and `likelihood`.
      "stop_gradient": trajectories are held fixed. Path KLs are those of `reverse_kl`, and the
        objective regresses on ε_q + σ_t Σ_j μ_j ∇h_j, as "guidance" of `likelihood` does; see
        there for h's gradient, and for the diagnostics `path_kl`. Stationary at the score
        s_q + (Σ_i λ_i (s_q − s_i) − Σ_j μ_j ∇h_j)/(1−Λ), and biased as those two are.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule.
      likelihoods: x_0 [n, ...] -> h [n, l].
      counts: (k, l), the numbers of constraints of the two kinds.
      shape: of one example, without the batch axis.
      steps: of the chain, at least 2.
      estimator: see above.
      reference_apply: the denoiser of q and q_i; default `apply`.
      gradients: (x_t [f, ...], t [f]) -> ∇h at the rows of `forget`, [f, l, ...]
        ("stop_gradient").
      shares: N_i/N of the k path KLs, [k], or None; see `reverse_kl`.
      margin: distance that is kept from the edge Λ = 1, in (0, 1).

    Returns:
      A Formulation over `ConditionBatch`, each row of `forget` with targets, their
      `constraint`, and `likelihood`.

    Raises:
      ValueError: for an unknown estimator, counts below one, or as `reverse_kl`.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {ESTIMATORS}.")
    separations, others = counts
    if min(counts) < 1:
        raise ValueError(
            f"a mixed problem has constraints of both kinds, not {counts}: "
            "use reverse_kl or likelihood."
        )
    on_simplex, positive = domain(shares, margin), multipliers.non_negative()

    def project(current: Array) -> Array:
        parts = on_simplex(current[:separations]), positive(current[separations:])
        return jnp.concatenate(parts)

    evaluate = on_policy.path_losses(
        apply,
        apply if reference_apply is None else reference_apply,
        on_policy.chain(schedule, shape, steps),
        likelihoods,
        gradients,
        bound=math.inf if estimator == "pathwise" else 0.0,
        separations=separations,
    )
    sign = jnp.array([1.0] * separations + [-1.0] * others)
    return Formulation(evaluate, sign, project, balance=None, name="mixed")
