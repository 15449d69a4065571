"""The primal-dual algorithm: gradient descent on parameters, projected ascent on multipliers.

L(θ, λ) = objective(θ) + Σ_i λ_i violation_i(θ), with violation_i = sign · (b_i − value_i(θ)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn.formulations import Formulation
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
    """What the algorithm carries.

    Attributes:
      params: the network being trained.
      opt_state: of the primal optimizer.
      multipliers: λ, [m].
      dual_state: of the dual optimizer.
      thresholds: b, [m]; data, so that one compiled step serves every threshold and the
        step can be vmapped over them and differentiated in them.
      reference: the frozen parameters of the pretrained model.
      step: how many steps were taken.
    """

    params: Params
    opt_state: Any
    multipliers: Array
    dual_state: Any
    thresholds: Array
    reference: Params
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
      diagnostics: of the formulation.
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
      init: (params, thresholds, *, multipliers=None, reference=None, copy=True) ->
        PrimalDualState.
      step: (key, state, batch, dual_batch=None) -> (PrimalDualState, PrimalDualInfo).
    """

    init: Callable[..., PrimalDualState]
    step: Callable[..., tuple[PrimalDualState, PrimalDualInfo]]


def primal_dual(
    formulation: Formulation,
    optimizer: optax.GradientTransformation,
    dual_optimizer: optax.GradientTransformation,
    *,
    alternating: bool = True,
    axis_name: str | None = None,
) -> PrimalDual:
    """Builds the primal-dual algorithm for a formulation (arXiv 2605.30825, alg. 1).

    λ_{k+1} = Π[λ_k + dual_optimizer(violations(θ_k))]
    θ_{k+1} = θ_k − optimizer(∇objective(θ_k) + Σ λ_i ∇violation_i(θ_k))

    with λ = λ_{k+1} in the second line when `alternating`, else λ_k. Either way the network is
    evaluated once: the multipliers enter the backward pass only as cotangents. Everything else
    is an optax transformation: N primal steps for each dual one is
    `optax.MultiSteps(dual, N)` (on their mean violation), smoothed violations are
    `optax.ema(decay)` chained before it, and `optax.set_to_zero()` holds the multipliers
    fixed, which is the weight-based baseline. `multipliers.nu_pi` is a PI controller.

    Both functions are pure and meant to be jitted by the caller with the state donated
    (`jax.jit(step, donate_argnums=1)`), vmapped over states, or put on several devices
    by `sharding`. To differentiate through several steps with Adam give it an `eps_root`: its √v
    has no derivative where a parameter's gradient is zero.

    `init` copies the parameters and the reference, since who donates the state gives away what is
    in it. For a model too large for that, `init(params, ..., reference=reference, copy=False)`
    takes both as they are: `params` are then the state's, and gone after a donated step, while
    the reference stays the caller's under `sharding.jit_step`, which donates all but it.

    Args:
      formulation: losses, sign and dual domain.
      optimizer: for the parameters.
      dual_optimizer: for the multipliers, fed with −violation.
      alternating: see above.
      axis_name: the pmap or shard_map axis that batches are spread over, if any. States must
        be the same on all of it; sums go over it, so that results are those of one device.

    Returns:
      The functions `init` and `step`. A `dual_batch` given to `step` takes the place of
      `batch` in the violations that move the multipliers, at the price of one more forward
      pass. A step whose losses or gradient are not finite leaves the state as it was, but for
      the count, and says so in `info.finite`. `init` raises ValueError if it is not to copy, and
      parameters and reference share an array.
    """

    def total(values: Array) -> Array:
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    def shares(
        params: Params, reference: Params, multipliers: Array, key: Array, batch: Any
    ) -> tuple[tuple[Array, Array], tuple[Array, dict[str, Array]]]:
        """What this shard adds to the objective and to the m constraint values."""
        count = multipliers.shape[0]
        terms = formulation.losses(params, reference, key, batch, axis_name, multipliers)
        examples = total(jnp.asarray(terms.objective.shape[0], jnp.float32))
        seen = total(jnp.zeros((count,)).at[terms.index].add(1.0))
        sums = jnp.zeros((count,)).at[terms.index].add(terms.constraint)
        objective = terms.objective.sum() / examples
        return (objective, sums / jnp.maximum(seen, 1.0)), (seen, terms.diagnostics)

    def violations_of(state: PrimalDualState, values: Array, seen: Array) -> Array:
        violations = formulation.sign * (state.thresholds - values)
        return jnp.where(seen > 0, violations, 0.0)

    def init(
        params: Params,
        thresholds: ArrayLike,
        *,
        multipliers: ArrayLike | None = None,
        reference: Params | None = None,
        copy: bool = True,
    ) -> PrimalDualState:
        reference = params if reference is None else reference
        if not copy:
            frozen = {id(leaf) for leaf in jax.tree.leaves(reference)}
            shared = sum(id(leaf) in frozen for leaf in jax.tree.leaves(params))
            if shared:
                raise ValueError(
                    f"copy=False: {shared} arrays of params are the reference's own, and would be "
                    "donated with the state. Give params of their own, or copy=True."
                )
        thresholds = jnp.atleast_1d(jnp.asarray(thresholds, dtype=float))
        if multipliers is None:
            multipliers = jnp.zeros_like(thresholds)
        multipliers = jnp.broadcast_to(jnp.asarray(multipliers, thresholds.dtype), thresholds.shape)
        # The state may be donated, and the caller keeps the originals.
        taken = jnp.copy if copy else jnp.asarray
        return PrimalDualState(
            params=jax.tree.map(taken, params),
            opt_state=optimizer.init(params),
            multipliers=formulation.project(multipliers),
            dual_state=dual_optimizer.init(multipliers),
            thresholds=jnp.copy(thresholds),
            reference=jax.tree.map(taken, reference),
            step=jnp.zeros((), jnp.int32),
        )

    def step(
        key: Array, state: PrimalDualState, batch: Any, dual_batch: Any = None
    ) -> tuple[PrimalDualState, PrimalDualInfo]:
        key, dual_key = jax.random.split(key)
        (objective, values), vjp, (seen, diagnostics) = jax.vjp(
            lambda params: shares(params, state.reference, state.multipliers, key, batch),
            state.params,
            has_aux=True,
        )
        objective, values = total(objective), total(values)
        violations = violations_of(state, values, seen)
        moving = violations
        if dual_batch is not None:
            (_, others), (others_seen, _) = shares(
                state.params, state.reference, state.multipliers, dual_key, dual_batch
            )
            moving = violations_of(state, total(others), others_seen)
        dual_updates, dual_state = dual_optimizer.update(
            -moving, state.dual_state, state.multipliers
        )
        multipliers = formulation.project(
            optax.apply_updates(state.multipliers, dual_updates)  # pyrefly: ignore
        )
        weights = multipliers if alternating else state.multipliers
        one, cotangent = jnp.ones_like(objective), -formulation.sign * weights
        if formulation.balance is None:
            (gradient,) = vjp((one, cotangent))
            gradient = jax.tree.map(total, gradient)
        else:
            (kept,) = vjp((one, jnp.zeros_like(cotangent)))
            (forgotten,) = vjp((jnp.zeros_like(one), cotangent))
            kept, forgotten = jax.tree.map(total, (kept, forgotten))
            norm = optax.tree.norm(forgotten)
            limit = formulation.balance * optax.tree.norm(kept)
            scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
            gradient = jax.tree.map(lambda a, b: a + scale * b, kept, forgotten)
        gradient_norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        moved = (optax.apply_updates(state.params, updates), opt_state, multipliers, dual_state)
        finite = (
            jnp.isfinite(objective)
            & jnp.isfinite(gradient_norm)
            & (jnp.isfinite(violations).all() & jnp.isfinite(moving).all())
        )
        stayed = (state.params, state.opt_state, state.multipliers, state.dual_state)
        params, opt_state, multipliers, dual_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), moved, stayed
        )
        new_state = state._replace(
            params=params,
            opt_state=opt_state,
            multipliers=multipliers,
            dual_state=dual_state,
            step=state.step + 1,
        )
        info = PrimalDualInfo(
            objective=objective,
            values=jnp.where(seen > 0, values, jnp.nan),
            violations=violations,
            multipliers=multipliers,
            gradient_norm=gradient_norm,
            finite=finite,
            diagnostics=diagnostics,
        )
        return new_state, info

    return PrimalDual(init, step)


class Certificate(NamedTuple):
    """What a run may claim, [m] arrays for the constraints.

    Attributes:
      objective: estimate of the objective.
      values: estimates of the constraint values.
      thresholds: b.
      violations: sign · (b − value); positive is violated.
      multipliers: λ.
      complementary_slackness: λ_i · violation_i, zero at a saddle point.
      satisfied: violation ≤ z · stderr: not violated beyond the error of the estimate.
      feasible: all of them are.
    """

    objective: Estimate
    values: Estimate
    thresholds: Array
    violations: Array
    multipliers: Array
    complementary_slackness: Array
    satisfied: Array
    feasible: Array


def certificate(
    formulation: Formulation,
    *,
    objective: Estimate,
    values: Estimate,
    thresholds: ArrayLike,
    multipliers: ArrayLike,
    z: float = 2.0,
) -> Certificate:
    """Judges estimates of the objective and the constraints against the thresholds.

    The estimates should come from examples and noise that training has not seen. A constraint
    counts as satisfied if its violation is at most z standard errors; z = 0 is strict.
    """
    thresholds, multipliers = jnp.asarray(thresholds), jnp.asarray(multipliers)
    violations = formulation.sign * (thresholds - values.value)
    satisfied = violations <= z * values.stderr
    return Certificate(
        objective=objective,
        values=values,
        thresholds=thresholds,
        violations=violations,
        multipliers=multipliers,
        complementary_slackness=multipliers * violations,
        satisfied=satisfied,
        feasible=satisfied.all(),
    )
