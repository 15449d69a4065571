"""Formulations along the model's own trajectories: reverse KL, likelihoods, and both at once."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from jax_unlearn import divergences, multipliers, schedules
from jax_unlearn.formulations import trajectories
from jax_unlearn.problem import Problem
from jax_unlearn.typing import Array, Denoiser

__all__ = ["likelihood", "mixed", "reverse_kl"]

# How long derivatives through a trajectory may be; see `trajectories.run`.
BOUNDS = {"pathwise": math.inf, "bounded": 1.0, "stop_gradient": 0.0}


def _bound(estimator: str, allowed: tuple[str, ...] = tuple(BOUNDS)) -> float:
    if estimator not in allowed:
        raise ValueError(f"estimator {estimator!r} is not one of {allowed}.")
    return BOUNDS[estimator]


# A step's own derivative is of the path KLs alone, and 0 at the reference: "bounded" would shorten
# that of h to nothing.
_WITH_LIKELIHOODS = ("pathwise", "stop_gradient")


def reverse_kl(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    *,
    shape: tuple[int, ...],
    steps: int,
    estimator: str = "pathwise",
    reference_apply: Denoiser | None = None,
    project: multipliers.Projection | None = None,
) -> Problem:
    """RU: min KL(p‖q) subject to KL(p‖q_i) ≥ b_i, for denoisers of q and q_i.

    A conditional model is a family p(·|c), and the problem one over condition and image jointly:
    the objective is the mean of KL(p(·|cond)‖q(·|base)) over all rows of a batch, constraint
    i that of KL(p(·|cond)‖q(·|target)) over its own. For a model without conditions, and for
    the null condition of one that has them, all rows are rows of `forget` with one and the
    same cond and base. The optimum is p_λ ∝ q Π_i (q/q_i)^{α_i}, α_i = λ_i/(1−Λ), at each
    condition with the λ_i of its own constraints (arXiv 2605.30825).

    **Unit.** Nats. The divergences are path KLs of the ancestral chain on `steps` time steps,
    Σ_t w_t E_{x_t∼p} ‖ε_p − ε_q‖² with `divergences.path_kl_weights` of that sub-grid. A path KL
    bounds that of the generated images from above. The objective is therefore safe to read, but
    a constraint "path KL ≥ b" is weaker than "KL ≥ b" on images: on few steps with
    "fixed_small" variances by a fifth or more. A schedule with `variance_type`
    "fixed_geometric" is much closer. The two agree in the limit of many steps where both chains
    reverse the same noising of their images.

    **Estimators** of the gradient; all take the same batch.

    | estimator | derivatives through the sampler | stationary at |
    |---|---|---|
    | "pathwise" | whole; each step is run again in the backward pass | the optimum: unbiased |
    | "bounded" | at each step no longer than the step's own | between the other two |
    | "stop_gradient" | none: trajectories are held fixed | s_q + Σ α_i (s_q − s_i) at every x_t |

    "pathwise": on short chains of networks a few trajectories amplify what is done to them, and
    their derivatives are most of the gradient: its noise is then many times its mean. "bounded"
    shortens these, row by row and step by step; where nothing is amplified it is "pathwise". To
    differentiate through several steps of the algorithm take "pathwise": "bounded" would bound
    those derivatives too, and has no forward mode. "stop_gradient" is what erasure by negative
    guidance does. It ignores how θ moves p's trajectories: the score that it ends at is not that
    of noised samples of p_λ. Objective and constraint values are right for what it makes, yet it
    pays more for the same separation. It also takes stored `TrajectoryPoints` (`minibatched`).

    **Domain.** Λ < 1 for the constraints of one condition; beyond it the Lagrangian is unbounded
    below. The default projects all multipliers onto Λ ≤ 0.98, as where every condition has
    every constraint. Where each constraint has conditions of its own, give
    `project=multipliers.box(0.98)`.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule; gives the sampler's spacing, variance and clipping of x̂_0
        (the path KL is then that of the clipping chains, exactly).
      shape: of one example, without the batch axis.
      steps: of the chain, at least 2.
      estimator: see above.
      reference_apply: the denoiser of q and q_i, called with the reference's parameters;
        default `apply`.
      project: onto the dual domain; default `multipliers.capped_simplex(0.02)`.

    Returns:
      A Problem over `Batch(kept, forget)` of `Conditions`, its losses in nats.

    Raises:
      ValueError: for an unknown estimator, fewer than 2 steps or too many, or a zero terminal SNR.

    Example: a network whose images of label c are all θ_c. The path KL of this chain is 11/6 of
      the squared distance. Label 1 is held to label 0 of the reference, and moved from its own.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> alpha, sigma = schedules.alpha_sigma(schedule.log_snr, jnp.zeros((2, 1)))
      >>> apply = lambda theta, x_t, t, cond: (x_t - alpha[t] * theta[cond][:, None]) / sigma[t]
      >>> problem = formulations.reverse_kl(apply, schedule, shape=(1,), steps=2)
      >>> concept, reference, theta = jnp.ones(3, int), jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])
      >>> rows = Conditions(concept, base=0 * concept, target=concept, constraint=0 * concept)
      >>> value, found = lagrangian(
      ...     problem, theta, reference, jax.random.key(0), Batch(None, rows), [0.5], [3.0]
      ... )
      >>> [round(float(x) * 6 / 11, 3) for x in (found.objective, found.values[0])]
      [4.0, 1.0]
    """
    evaluate = trajectories.path_losses(
        apply,
        apply if reference_apply is None else reference_apply,
        divergences.chain(schedule, shape, steps),
        bound=_bound(estimator),
    )
    project = multipliers.capped_simplex(0.02) if project is None else project
    return Problem(evaluate, sign=1.0, project=project, name="reverse_kl")


def likelihood(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    likelihoods: Callable[[Array], Array],
    *,
    shape: tuple[int, ...],
    steps: int,
    estimator: str = "pathwise",
    reference_apply: Denoiser | None = None,
    gradients: Callable[[Array, Array], Array] | None = None,
) -> Problem:
    """LU: min KL(p‖q) subject to E_p[h_i(x_0)] ≤ ε_i, for h_i a likelihood of q_i.

    The objective is the mean of KL(p(·|cond)‖q(·|base)) over all rows of a batch, constraint i
    that of h_i(x_0), x_0 ∼ p(·|cond), over its own rows: those conditions whose images should
    not be what h_i tells. The optimum is p_λ ∝ q exp(−Σ_i λ_i h_i) at each condition
    (arXiv 2605.30825). h ≥ 0 there; a calibrated posterior (`quantification`) is another h.

    "pathwise": path KL, as in `reverse_kl`, and h_i(x_0), both differentiated
    through the sampler. h must be differentiable: one that is flat gives no gradient.

    "stop_gradient": trajectories are held fixed, and the objective regresses on
    ε_q + σ_t Σ_i λ_i ∇h_i, the score s_q − Σ_i λ_i ∇h_i. The gradient is taken at x_t of
    h_i(x̂_0(x_t)), x̂_0 the reference's, or given. Exact only as the noise vanishes: noising p_λ
    gives ∇ log E[w_λ(x_0) | x_t] in its place. The constraint values are h_i at the
    trajectories' ends, the model's own; diagnostics `path_kl` is the path KL in nats,
    which the objective, a regression, is not. It also takes stored `TrajectoryPoints`.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule; gives the sampler's spacing, variance and clipping.
      likelihoods: x_0 [n, ...] -> h [n, m].
      shape: of one example, without the batch axis.
      steps: of the chain, at least 2.
      estimator: "pathwise" or "stop_gradient".
      reference_apply: the denoiser of q, called with the reference's parameters; default
        `apply`.
      gradients: (x_t [f, ...], t [f]) -> ∇h at the rows of `forget`, [f, m, ...]
        ("stop_gradient").

    Returns:
      A Problem over `Batch(kept, forget)` of `Conditions` without targets; the multipliers are
      non-negative, in nats per unit of h.

    Raises:
      ValueError: as `reverse_kl`.

    Example: a network whose images are all θ = 2, and h = x².
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> alpha, sigma = schedules.alpha_sigma(schedule.log_snr, jnp.zeros((2, 1)))
      >>> apply = lambda theta, x_t, t, cond: (x_t - alpha[t] * theta) / sigma[t]
      >>> problem = formulations.likelihood(apply, schedule, jnp.square, shape=(1,), steps=2)
      >>> rows = Conditions(None, None, constraint=jnp.zeros(3, int))
      >>> value, found = lagrangian(
      ...     problem, 2.0, 2.0, jax.random.key(0), Batch(None, rows), [0.5], [1.0]
      ... )
      >>> [round(float(x), 3) for x in (value, found.objective, found.values[0])]
      [1.5, 0.0, 4.0]
    """
    evaluate = trajectories.path_losses(
        apply,
        apply if reference_apply is None else reference_apply,
        divergences.chain(schedule, shape, steps),
        likelihoods,
        gradients,
        bound=_bound(estimator, _WITH_LIKELIHOODS),
    )
    return Problem(evaluate, sign=-1.0, project=multipliers.non_negative(), name="likelihood")


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
    project: multipliers.Projection | None = None,
) -> Problem:
    """Finds min KL(p‖q) subject to KL(p‖q_i) ≥ b_i, i ≤ k, and E_p[h_j(x_0)] ≤ ε_j, j ≤ l.

    Objective, path KLs and their domain are those of `reverse_kl`, the h_j those of `likelihood`,
    all of them on the same trajectories. Thresholds and multipliers are (b_1 … b_k, ε_1 … ε_l)
    and (λ_1 … λ_k, μ_1 … μ_l). With Λ = Σ_i λ_i < 1 the Lagrangian is
    (1−Λ) KL(p‖p_{λ,μ}) up to what does not depend on p, so that the optimum is the tilt
    p_{λ,μ} ∝ q Π_i (q/q_i)^{λ_i/(1−Λ)} exp(−Σ_j μ_j h_j/(1−Λ)): the sum of the two kinds'
    exponents, with μ too divided by 1−Λ. The exact solution on a finite space is
    `duality.solve_mixed`.

    "stop_gradient" regresses the objective on ε_q + σ_t Σ_j μ_j ∇h_j, as that of `likelihood`
    does. It is stationary at the score s_q + (Σ_i λ_i (s_q − s_i) − Σ_j μ_j ∇h_j)/(1−Λ).

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule.
      likelihoods: x_0 [n, ...] -> h [n, l].
      counts: (k, l), the numbers of constraints of the two kinds.
      shape: of one example, without the batch axis.
      steps: of the chain, at least 2.
      estimator: "pathwise" or "stop_gradient".
      reference_apply: the denoiser of q and q_i; default `apply`.
      gradients: (x_t [f, ...], t [f]) -> ∇h at the rows of `forget`, [f, l, ...]
        ("stop_gradient").
      project: of the k multipliers of path KLs; default `multipliers.capped_simplex(0.02)`.

    Returns:
      A Problem over `Batch(kept, forget)` of `Conditions`, each row of `forget` with targets, their
      `constraint`, and `likelihood`.

    Raises:
      ValueError: for counts below one, or as `reverse_kl`.

    Example: a network whose images of label c are all θ_c, its path KL to another, and h = x².
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> alpha, sigma = schedules.alpha_sigma(schedule.log_snr, jnp.zeros((2, 1)))
      >>> apply = lambda theta, x_t, t, cond: (x_t - alpha[t] * theta[cond][:, None]) / sigma[t]
      >>> problem = formulations.mixed(
      ...     apply, schedule, jnp.square, counts=(1, 1), shape=(1,), steps=2
      ... )
      >>> zeros, theta = jnp.zeros(3, int), jnp.array([0.0, 1.0])
      >>> rows = Conditions(zeros + 1, zeros, target=zeros, constraint=zeros, likelihood=zeros)
      >>> value, found = lagrangian(
      ...     problem, theta, theta, jax.random.key(0), Batch(None, rows), [0.0, 0.0], [2.0, 0.5]
      ... )
      >>> [round(float(x), 3) for x in found.values]
      [1.833, 1.0]
    """
    separations, others = counts
    if separations < 1 or others < 1:
        raise ValueError(
            f"a mixed problem has constraints of both kinds, not {counts}: "
            "use reverse_kl or likelihood."
        )
    on_simplex = multipliers.capped_simplex(0.02) if project is None else project
    positive = multipliers.non_negative()

    def projection(current: Array) -> Array:
        parts = on_simplex(current[:separations]), positive(current[separations:])
        return jnp.concatenate(parts)

    evaluate = trajectories.path_losses(
        apply,
        apply if reference_apply is None else reference_apply,
        divergences.chain(schedule, shape, steps),
        likelihoods,
        gradients,
        bound=_bound(estimator, _WITH_LIKELIHOODS),
        separations=separations,
    )
    sign = jnp.array([1.0] * separations + [-1.0] * others)
    return Problem(evaluate, sign, projection, name="mixed")
