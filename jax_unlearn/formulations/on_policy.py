"""Reverse KL: p stays near q and moves away from each q_i, along its own trajectories."""

import math

import jax.numpy as jnp

from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.formulations import on_policy, tilt
from jax_unlearn.formulations.base import Formulation
from jax_unlearn.typing import Array, ArrayLike, Denoiser

__all__ = ["reverse_kl"]

# Of the on-policy ones: how long derivatives through a trajectory may be; see `on_policy.run`.
BOUNDS = {"pathwise": math.inf, "bounded": 1.0, "stop_gradient": 0.0}
ESTIMATORS = (*BOUNDS, "tilt")


def domain(shares: ArrayLike | None, margin: float) -> multipliers.Projection:
    """The projection onto the domain that `reverse_kl` describes."""
    if shares is None:
        return multipliers.capped_simplex(margin)
    shares = jnp.asarray(shares, dtype=float)
    if not bool(((shares > 0) & (shares <= 1)).all()):
        raise ValueError(f"shares of the batch's rows must lie in (0, 1], got {shares}.")
    return multipliers.box((1.0 - margin) * shares)


def reverse_kl(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    *,
    estimator: str = "pathwise",
    shape: tuple[int, ...] | None = None,
    steps: int | None = None,
    weighting: losses.TimeWeighting | None = None,
    reference_apply: Denoiser | None = None,
    shares: ArrayLike | None = None,
    margin: float = 0.02,
    control_variate: bool = False,
) -> Formulation:
    """RU: min KL(p‖q) subject to KL(p‖q_i) ≥ b_i, for denoisers of q and q_i.

    A conditional model is a family p(·|c), and the problem one over condition and image jointly:
    the objective is the mean of KL(p(·|cond)‖q(·|base)) over all rows of a batch, constraint
    i that of KL(p(·|cond)‖q(·|target)) over its own. For a model without conditions, and for
    the null condition of one that has them, all rows are rows of `forget` with one and the
    same cond and base.

    **Unit.** Nats. The divergences are path KLs of the ancestral chain on `steps` time steps,
    Σ_t w_t E_{x_t∼p} ‖ε_p − ε_q‖² with `divergences.path_kl_weights` of that sub-grid. A path KL
    bounds that of the generated images from above. The objective is therefore safe to read, but
    a constraint "path KL ≥ b" is weaker than "KL ≥ b" on images: on few steps with
    "fixed_small" variances by a fifth or more. A schedule with `variance_type`
    "fixed_geometric" is much closer. The two agree in the limit of many steps where both chains
    reverse the same noising of their images.

    Estimators:
      "pathwise": the derivative goes through the sampler (each step run again in the backward
        pass), which makes it the unbiased gradient of the path KLs. On short chains of networks a
        few trajectories amplify what is done to them, and their derivatives are most of the
        gradient: its noise is then many times its mean. Batch: `ConditionBatch`.
      "bounded": the same, but at each step of each trajectory the derivative that reaches the
        network through later steps is shortened, where need be, to the length of the step's
        own: each is at most twice as long as that of "stop_gradient", and where nothing is
        amplified it is that of "pathwise". What it is stationary at lies between theirs; of
        Gaussians, which "pathwise" solves, nearer to "stop_gradient". To differentiate
        through several steps of the algorithm take "pathwise": here that would be bounded
        too, and has no forward mode. Batch: `ConditionBatch`.
      "stop_gradient": trajectories are held fixed, as by the erasure methods that regress on
        negative guidance. That ignores how θ moves p's trajectories. At every noise level it
        is stationary at the score s_q + Σ α_i (s_q − s_i), α_i = λ_i/(1−Λ), which is not that of
        noised samples of p_λ ∝ q Π_i (q/q_i)^{α_i}: objective and constraint values are right
        for what it makes, yet it pays more for the same separation. Derivatives in thresholds or
        multipliers through several steps of the algorithm miss the same thing: how earlier
        parameters move later trajectories. Batch: `ConditionBatch`, or `Stored` points of
        recent trajectories (`formulations.replay`).
      "tilt": weighted denoising of stored samples x of q(·|base), min_θ E_q w_λ ‖ε − ε_θ‖²
        with w_λ = Π_i (q/q_i)^{α_i}, whose exact minimiser is the denoiser of p_λ. Needs
        log q/q_i at the samples; batch, objective and constraint values: see `SampleBatch`.

    **Domain.** Beyond λ_i Σ N/N_i = 1, summed over the constraints of one condition, with N_i
    of the N rows of a batch those of constraint i, the Lagrangian is unbounded below. Where all
    rows have one condition that is Λ < 1; the multipliers are projected onto Λ ≤ 1 − margin, so
    that α ≤ 1/margin − 1. Where every constraint has conditions of its own, give their
    `shares` N_i/N: the domain is then λ_i ≤ (1 − margin) N_i/N. For anything between, replace
    `Formulation.project`. Source of p_λ and the domain: arXiv 2605.30825.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule; gives the sampler's spacing, variance and clipping of x̂_0
        (the path KL is then that of the clipping chains, exactly).
      estimator: see above.
      shape: of one example, without the batch axis (on-policy estimators).
      steps: of the chain, at least 2 (on-policy estimators).
      weighting: of the denoising loss ("tilt").
      reference_apply: the denoiser of q and q_i, called with the reference's parameters;
        default `apply`.
      shares: N_i/N, [m], or None; see above.
      margin: distance that is kept from the edge of the domain, in (0, 1).
      control_variate: "tilt" regresses on the reference, corrected by w_λ − 1 times the
        regression on noise; see `SampleBatch`.

    Returns:
      A Formulation over `ConditionBatch` or `SampleBatch`, its losses in nats.

    Raises:
      ValueError: for an unknown estimator, a margin outside (0, 1), shares outside (0, 1], or
        what the estimator needs and was not given.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {ESTIMATORS}.")
    project = domain(shares, margin)
    reference_apply = apply if reference_apply is None else reference_apply
    if estimator == "tilt":

        def log_weights(reached: Array, log_ratios: Array) -> Array:
            rest = jnp.maximum(1.0 - reached.sum(axis=1), 0.5 * margin)
            return (reached * log_ratios).sum(axis=1) / rest

        evaluate = tilt.losses_of(
            apply,
            reference_apply,
            schedule,
            weighting,
            log_weights=log_weights,
            values=lambda log_p, log_ratios: log_p[:, None] + log_ratios,
            control_variate=control_variate,
        )
    else:
        chain = on_policy.chain(schedule, shape, steps)
        bound = BOUNDS[estimator]
        evaluate = on_policy.path_losses(apply, reference_apply, chain, bound=bound)
    return Formulation(evaluate, sign=1.0, project=project, balance=None, name="reverse_kl")
