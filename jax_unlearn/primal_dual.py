"""The primal-dual algorithm: gradient descent on parameters, projected ascent on multipliers.

    λ ← Π[λ + dual optimizer(violations(θ))]
    θ ← θ − optimizer(∇_θ L(θ, λ))

with the Lagrangian L of `problem.lagrangian` and the projection Π onto the dual domain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import problem as problems
from jax_unlearn.problem import Problem
from jax_unlearn.typing import Array, ArrayLike, Estimate, Params

__all__ = [
    "Certificate",
    "PrimalDual",
    "PrimalDualInfo",
    "PrimalDualState",
    "certificate",
    "primal_dual",
]


class PrimalDualState(NamedTuple):
    """What changes from step to step.

    Attributes:
      params: the network being trained.
      opt_state: of the primal optimizer.
      multipliers: λ, [m].
      dual_state: of the dual optimizer.
      thresholds: b, [m]; data, so that one compiled step serves every threshold and the
        step can be vmapped over them and differentiated in them.
      step: how many steps were taken.
    """

    params: Params
    opt_state: Any
    multipliers: Array
    dual_state: Any
    thresholds: Array
    step: Array


class PrimalDualInfo(NamedTuple):
    """What one step reports, all of it evaluated before the parameters moved.

    Attributes:
      objective: mean over the batch.
      values: of the constraints, [m]; NaN for one with no example in the batch.
      violations: sign · (threshold − value), [m]; 0 for one with no example.
      multipliers: after the dual step, [m].
      gradient_norm: of the gradient in the parameters that the optimizer is given.
      finite: whether losses and gradient were; if not, the state was left as it was.
      diagnostics: of the losses.
    """

    objective: Array
    values: Array
    violations: Array
    multipliers: Array
    gradient_norm: Array
    finite: Array
    diagnostics: dict[str, Array]


class PrimalDual(NamedTuple):
    """An algorithm as two pure functions.

    Attributes:
      init: (params, thresholds, *, multipliers=None, copy=True) -> PrimalDualState.
      step: (key, state, reference, batch, dual_batch=None) -> (PrimalDualState, PrimalDualInfo).
      axis_name: the pmap axis that the step sums over; None for jit.
    """

    init: Callable[..., PrimalDualState]
    step: Callable[..., tuple[PrimalDualState, PrimalDualInfo]]
    axis_name: str | None = None


def primal_dual(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    dual_optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    alternating: bool = True,
    dual_schedule: Callable[[Array], Array] | None = None,
    axis_name: str | None = None,
) -> PrimalDual:
    """Builds the primal-dual algorithm for a problem (arXiv 2605.30825, algorithm 1).

    λ_{k+1} = Π[λ_k + dual_optimizer(violations(θ_k))]
    θ_{k+1} = θ_k − optimizer(∇_θ L(θ_k, λ))

    with λ = λ_{k+1} in the second line when `alternating`, else λ_k. Either way the network is
    evaluated once: the multipliers enter the backward pass only as cotangents. Everything else
    is an optax transformation: N primal steps for each dual one is
    `optax.MultiSteps(dual, N)` (on their mean violation), smoothed violations are
    `optax.ema(decay)` chained before it, and `optax.set_to_zero()` holds the multipliers
    fixed, which is the weight-based baseline. `multipliers.nu_pi` is a PI controller.

    Both functions are pure and meant to be jitted by the caller with the state donated
    (`jax.jit(step, donate_argnums=1)`), vmapped over states, or put on several devices
    by `sharding`. The reference is an argument of its own, and is never donated. To differentiate
    through several steps with Adam give it an `eps_root`: its √v has no derivative where a
    parameter's gradient is zero.

    `init` copies the parameters, since who donates the state gives away what is in it. With
    `copy=False` it takes them as they are: they are then the state's, gone after a donated step,
    and must share no array with the reference.

    A `dual_batch` given to `step` takes the place of `batch` in the violations that move the
    multipliers. It is evaluated by `problem.fresh`, or else by one more pass of `problem.losses`.

    Args:
      problem: losses, sign and dual domain.
      optimizer: for the parameters.
      dual_optimizer: for the multipliers, fed with −violation, and told `thresholds` and the
        `stderr` of the values if it takes extra arguments.
      alternating: see above.
      dual_schedule: steps done -> whether the multipliers move in this step; None moves them in
        all. Where they do not, the dual batch is not evaluated (but under vmap it is).
      axis_name: the pmap or shard_map axis that batches are spread over, if any. States must
        be the same on all of it; sums go over it, so that results are those of one device.

    Returns:
      The functions `init` and `step`. A step whose losses or gradient are not finite leaves the
      state as it was, but for the count, and says so in `info.finite`.

    Example: min ½(x − 2)² subject to x ≥ 3. The multiplier finds its level, x − 2 = 1.
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_unlearn import multipliers
      >>> def losses(x, reference, key, batch, multipliers, *, axis_name=None):
      ...     return problems.Losses(0.5 * jnp.square(x - 2), x, jnp.array([0]))
      >>> problem = Problem(losses, 1.0, multipliers.non_negative(), "x at least three")
      >>> algorithm = primal_dual(problem, optax.sgd(0.2), optax.sgd(0.2))
      >>> state, key = algorithm.init(jnp.zeros(1), [3.0]), jax.random.key(0)
      >>> for _ in range(200):
      ...     state, info = algorithm.step(key, state, None, None)
      >>> round(float(state.params[0]), 3), round(float(state.multipliers[0]), 3)
      (3.0, 1.0)
    """
    if isinstance(dual_optimizer, optax.MultiSteps):
        # It hands extra arguments on, and does not say so by its type: they would be dropped.
        dual_optimizer = optax.GradientTransformationExtraArgs(
            dual_optimizer.init,
            dual_optimizer.update,  # pyrefly: ignore
        )
    dual_optimizer = optax.with_extra_args_support(dual_optimizer)

    def init(
        params: Params,
        thresholds: ArrayLike,
        *,
        multipliers: ArrayLike | None = None,
        copy: bool = True,
    ) -> PrimalDualState:
        thresholds = jnp.atleast_1d(jnp.array(thresholds, dtype=float))
        if multipliers is None:
            multipliers = jnp.zeros_like(thresholds)
        multipliers = jnp.broadcast_to(jnp.asarray(multipliers, thresholds.dtype), thresholds.shape)
        return PrimalDualState(
            params=jax.tree.map(jnp.copy if copy else jnp.asarray, params),
            opt_state=optimizer.init(params),
            multipliers=problem.project(multipliers),
            dual_state=dual_optimizer.init(multipliers),
            thresholds=thresholds,
            step=jnp.zeros((), jnp.int32),
        )

    def step(
        key: Array, state: PrimalDualState, reference: Params, batch: Any, dual_batch: Any = None
    ) -> tuple[PrimalDualState, PrimalDualInfo]:
        key, dual_key = jax.random.split(key)
        thresholds, count = state.thresholds, state.thresholds.shape[0]

        def means(params: Params) -> tuple[problems.Means, problems.Counted]:
            found = problem.losses(
                params, reference, key, batch, state.multipliers, axis_name=axis_name
            )
            return problems.means_of(found, count, axis_name)

        own, pull_back, counted = jax.vjp(means, state.params, has_aux=True)
        found = problems.evaluation(problem, own, counted, thresholds, axis_name)

        def measured() -> problems.Evaluation:
            """What moves the multipliers."""
            if dual_batch is None:
                return found
            losses = problem.losses if problem.fresh is None else problem.fresh
            others = losses(
                state.params, reference, dual_key, dual_batch, state.multipliers,
                axis_name=axis_name,
            )  # fmt: skip
            means, beside = problems.means_of(others, count, axis_name)
            return problems.evaluation(problem, means, beside, thresholds, axis_name)

        def ascend() -> tuple[Array, Any, Array]:
            moving = measured()
            updates, dual_state = dual_optimizer.update(
                -moving.violations,
                state.dual_state,
                state.multipliers,
                thresholds=thresholds,
                stderr=moving.stderr,
            )
            moved: Any = optax.apply_updates(state.multipliers, updates)
            return problem.project(moved), dual_state, jnp.isfinite(moving.violations).all()

        def stay() -> tuple[Array, Any, Array]:
            return state.multipliers, state.dual_state, jnp.ones((), bool)

        if dual_schedule is None:
            multipliers, dual_state, measurable = ascend()
        else:
            multipliers, dual_state, measurable = jax.lax.cond(
                dual_schedule(state.step), ascend, stay
            )

        weights = multipliers if alternating else state.multipliers
        cotangents = jax.grad(problems.weighed, argnums=1)(
            problem, own, counted, weights, thresholds, axis_name
        )
        gradient = problems.psum(pull_back(cotangents)[0], axis_name)
        gradient_norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        finite = (
            jnp.isfinite(found.objective)
            & jnp.isfinite(gradient_norm)
            & jnp.isfinite(found.violations).all()
            & jnp.isfinite(multipliers).all()
            & measurable
        )
        moved = PrimalDualState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            multipliers=multipliers,
            dual_state=dual_state,
            thresholds=thresholds,
            step=state.step,
        )
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        info = PrimalDualInfo(
            objective=found.objective,
            values=found.values,
            violations=found.violations,
            multipliers=new.multipliers,
            gradient_norm=gradient_norm,
            finite=finite,
            diagnostics=found.diagnostics,
        )
        return new._replace(step=state.step + 1), info

    return PrimalDual(init, step, axis_name)


class Certificate(NamedTuple):
    """What a run may claim, [m] arrays for the constraints.

    Attributes:
      objective: estimate of the objective, the price of what was forgotten.
      values: estimates of the constraint values.
      thresholds: b.
      violations: sign · (b − value); positive is violated.
      multipliers: λ.
      complementary_slackness: λ_i · violation_i, zero at a saddle point.
      satisfied: violation ≤ z · stderr: not violated beyond the error of the estimate.
      feasible: all of them are.
      floor: what no model that meets the thresholds could pay less than, by weak duality
        (`duality.likelihood_floor`, `duality.reverse_kl_floor`); None where there is none.
      gap: objective − floor, with the error of both; None without a floor.
    """

    objective: Estimate
    values: Estimate
    thresholds: Array
    violations: Array
    multipliers: Array
    complementary_slackness: Array
    satisfied: Array
    feasible: Array
    floor: Estimate | None = None
    gap: Estimate | None = None


def certificate(
    problem: Problem,
    *,
    objective: Estimate,
    values: Estimate,
    thresholds: ArrayLike,
    multipliers: ArrayLike,
    floor: Estimate | None = None,
    z: float = 2.0,
) -> Certificate:
    """Judges estimates of the objective and the constraints against the thresholds.

    The estimates should come from examples and noise that training has not seen. A constraint
    counts as satisfied if its violation is at most z standard errors; z = 0 is strict. For any λ
    in the dual domain and any p that meets the thresholds, objective(p) ≥ g(λ): the floor. So the
    gap, objective − floor, bounds what any other model could save.

    Args:
      problem: gives the sign of the constraints.
      objective: with its standard error.
      values: of the constraints, [m] each.
      thresholds: b, [m].
      multipliers: λ, [m].
      floor: a dual value, in the unit of the objective, with its standard error.
      z: see above.

    Example: a value of 0.9 ± 0.1 where 1 is asked, at a price of 0.5 ± 0.03 over 0.4 ± 0.04.
      >>> from jax_unlearn import multipliers
      >>> problem = Problem(None, 1.0, multipliers.non_negative(), "at least")
      >>> values = Estimate(jnp.array([0.9]), jnp.array([0.1]))
      >>> found = certificate(problem, objective=Estimate(0.5, 0.03), values=values,
      ...     thresholds=[1.0], multipliers=[0.2], floor=Estimate(0.4, 0.04))
      >>> bool(found.feasible), [round(float(part), 2) for part in found.gap]
      (True, [0.1, 0.05])
    """
    thresholds, multipliers = jnp.asarray(thresholds), jnp.asarray(multipliers)
    violations = problems.violations(problem, values.value, thresholds)
    satisfied = violations <= z * values.stderr
    gap = None
    if floor is not None:
        error = jnp.hypot(jnp.asarray(objective.stderr), jnp.asarray(floor.stderr))
        gap = Estimate(objective.value - floor.value, error)
    return Certificate(
        objective=objective,
        values=values,
        thresholds=thresholds,
        violations=violations,
        multipliers=multipliers,
        complementary_slackness=multipliers * violations,
        satisfied=satisfied,
        feasible=satisfied.all(),
        floor=floor,
        gap=gap,
    )
