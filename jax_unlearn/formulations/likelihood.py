"""Likelihood constraints: p stays near q and E_p[h_i] falls to ε_i."""

import math
from collections.abc import Callable

from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.formulations import on_policy, posterior, tilt
from jax_unlearn.formulations.base import Formulation
from jax_unlearn.typing import Array, Denoiser

__all__ = ["likelihood"]

ESTIMATORS = ("tilt", "posterior", "guidance", "pathwise")


def likelihood(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    likelihoods: Callable[[Array], Array] | None = None,
    *,
    estimator: str = "tilt",
    shape: tuple[int, ...] | None = None,
    steps: int | None = None,
    weighting: losses.TimeWeighting | None = None,
    reference_apply: Denoiser | None = None,
    gradients: Callable[[Array, Array], Array] | None = None,
    control_variate: bool = False,
) -> Formulation:
    """LU: min KL(p‖q) subject to E_p[h_i(x_0)] ≤ ε_i, for h_i ≥ 0 a likelihood of q_i.

    The objective is the mean of KL(p(·|cond)‖q(·|base)) over all rows of a batch, constraint i
    that of h_i(x_0), x_0 ∼ p(·|cond), over its own rows: those conditions whose images should
    not be what h_i tells. The optimum is p_λ ∝ q exp(−Σ_i λ_i h_i) (arXiv 2605.30825); with N_i
    of the N rows those of constraint i, λ_i N/N_i stands for λ_i at their conditions.

    Estimators:
      "tilt": weighted denoising of stored samples x of q(·|base), min_θ E_q w_λ ‖ε − ε_θ‖² with
        w_λ = exp(−Σ_i λ_i h_i), whose exact minimiser is the denoiser of p_λ. h is read from the
        batch and never differentiated; batch, objective and constraint values: see `SampleBatch`.
      "posterior": regression on the score of p_λ where each h_i is 0 or 1 (else on that of a law
        of images and concepts jointly: see `PosteriorBatch`), from posteriors of the concepts at
        stored points (`posteriors`): no Monte-Carlo noise, and known where p_λ has no samples.
        Batch and constraint values: see `PosteriorBatch`.
      "guidance": along the model's own trajectories, held fixed, regression on
        ε_q + σ_t Σ_i λ_i ∇h_i, the score s_q − Σ_i λ_i ∇h_i. The gradient is taken at x_t of
        h_i(x̂_0(x_t)), x̂_0 the reference's, or given. Exact only as the noise vanishes: noising p_λ
        gives ∇ log E[w_λ(x_0) | x_t] in its place. The constraint values are h_i at the
        trajectories' ends, the model's own; diagnostics `path_kl` is the path KL in nats,
        which the objective, a regression, is not. Batch: `ConditionBatch`, target None, or
        `Stored` points of recent trajectories (`formulations.replay`).
      "pathwise": path KL, as in `reverse_kl`, and h_i(x_0), both differentiated through the
        sampler; unbiased. h must be differentiable: one that is flat gives no gradient.
        Batch: `ConditionBatch`, target None.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule; gives the sampler's spacing, variance and clipping.
      likelihoods: x_0 [n, ...] -> h [n, m] ("pathwise", "guidance").
      estimator: see above.
      shape: of one example, without the batch axis ("pathwise", "guidance").
      steps: of the chain, at least 2 ("pathwise", "guidance").
      weighting: of the denoising loss ("tilt", "posterior").
      reference_apply: the denoiser of q, called with the reference's parameters; default
        `apply`.
      gradients: (x_t [f, ...], t [f]) -> ∇h at the rows of `forget`, [f, m, ...] ("guidance").
      control_variate: of "tilt"; see `SampleBatch`.

    Returns:
      A Formulation over `SampleBatch`, `PosteriorBatch` or `ConditionBatch`; the multipliers are
      non-negative, in nats per unit of h.

    Raises:
      ValueError: for an unknown estimator, or what it needs and was not given.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {ESTIMATORS}.")
    reference_apply = apply if reference_apply is None else reference_apply
    if estimator == "tilt":
        evaluate = tilt.losses_of(
            apply,
            reference_apply,
            schedule,
            weighting,
            log_weights=lambda reached, h: -(reached * h).sum(axis=1),
            values=lambda log_p, h: h,
            control_variate=control_variate,
        )
    elif estimator == "posterior":
        evaluate = posterior.losses_of(apply, reference_apply, schedule, weighting)
    else:
        if likelihoods is None:
            raise ValueError(f"the {estimator} estimator needs likelihoods, x_0 -> h [n, m].")
        evaluate = on_policy.path_losses(
            apply,
            reference_apply,
            on_policy.chain(schedule, shape, steps),
            likelihoods,
            gradients,
            bound=math.inf if estimator == "pathwise" else 0.0,
        )
    project = multipliers.non_negative()
    return Formulation(evaluate, sign=-1.0, project=project, balance=None, name="likelihood")
