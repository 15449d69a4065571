"""More than one primal step for each trajectory that is sampled.

At each x_t the regression of an estimator that holds trajectories fixed has a minimiser of its own,
which does not depend on how often x_t is visited. So the points of one trajectory may be dealt out
to several primal steps: only their weighting, and the constraint values, are then those of the
parameters that sampled it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import losses
from jax_unlearn.formulations.trajectories import Visit
from jax_unlearn.primal_dual import PrimalDual, PrimalDualInfo, PrimalDualState, primal_dual
from jax_unlearn.problem import Batch, Problem, TrajectoryPoints
from jax_unlearn.typing import Array, Params

__all__ = ["minibatched"]


def minibatched(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    dual_optimizer: optax.GradientTransformation,
    visit: Visit,
    *,
    parts: int,
    merge: Callable[[Params, Params], Params] | None = None,
    axis_name: str | None = None,
) -> PrimalDual:
    """The primal-dual algorithm with `parts` primal steps on the trajectories of each batch.

    A step samples trajectories of the model, deals the points of each, in random order, out to as
    many minibatches, and takes a primal step on each, λ held; then follows one dual step on
    their mean violation. That is the violation of whole trajectories, each part of it at the
    parameters that it met. A point costs no more passes through the networks than in a step of
    "stop_gradient" on whole trajectories, whose optimum this shares. A part that is not finite is
    left out, and told; its batch then moves no multiplier.

    Args:
      problem: with an estimator that holds trajectories fixed.
      optimizer: for the parameters; it makes `parts` updates a step.
      dual_optimizer: for the multipliers, one update a step, fed with −violation.
      visit: `formulations.sample_trajectories` of the same network, shape and number of time steps.
      parts: minibatches, a divisor of that number.
      merge: (reference, parameters that train) -> those of the network, where they are not the
        same: `pretrained.subsets.lora_merge`.
      axis_name: as in `primal_dual`.

    Returns:
      `init` and `step` as of `primal_dual`; what `step` reports are means over the parts, and it
      has no `dual_batch`. It raises ValueError for parts that do not divide the time steps.
    """
    # All parts are steps at one λ; the last of them moves it, by the mean of their violations.
    once = optax.MultiSteps(dual_optimizer, parts)
    algorithm = primal_dual(problem, optimizer, once, alternating=False, axis_name=axis_name)

    def deal(key: Array, points: TrajectoryPoints | None) -> TrajectoryPoints | None:
        """Points and their conditions, [parts, points of a part, ...]."""
        if points is None:
            return None
        steps, rows = points.x_t.shape[:2]
        # An order for each trajectory, by its own key: a batch spread over devices has the same.
        keys = losses.example_keys(key, rows, axis_name=axis_name)
        order = jax.vmap(lambda key: jax.random.permutation(key, steps), out_axes=1)(keys)
        shape = (parts, steps // parts * rows)
        repeated = jax.tree.map(
            lambda leaf: jnp.tile(leaf, (steps, *[1] * (jnp.ndim(leaf) - 1))).reshape(
                *shape, *jnp.shape(leaf)[1:]
            ),
            points.conditions,
        )
        x_t = points.x_t[order, jnp.arange(rows)].reshape(*shape, *points.x_t.shape[2:])
        return TrajectoryPoints(repeated, x_t, order.reshape(shape))

    def step(
        key: Array, state: PrimalDualState, reference: Params, batch: Batch
    ) -> tuple[PrimalDualState, PrimalDualInfo]:
        visit_key, deal_key = jax.random.split(key)
        params = state.params if merge is None else merge(reference, state.params)
        visited = visit(params, visit_key, batch, axis_name=axis_name)
        steps = visited.forget.x_t.shape[0]
        if parts < 1 or steps % parts:
            raise ValueError(f"{steps} time steps cannot be dealt out to {parts} minibatches.")
        kept_key, forget_key = jax.random.split(deal_key)
        points = Batch(deal(kept_key, visited.kept), deal(forget_key, visited.forget))

        def descend(moving: PrimalDualState, part: Any) -> tuple[PrimalDualState, PrimalDualInfo]:
            # Nothing random is left.
            return algorithm.step(key, moving, reference, part)

        # A part that was left out in the step before was not counted, nor was there a dual step.
        anew = state.dual_state._replace(mini_step=jnp.zeros((), jnp.int32))
        moved, infos = jax.lax.scan(descend, state._replace(dual_state=anew), points)
        info = jax.tree.map(lambda leaf: leaf.mean(axis=0), infos)
        info = info._replace(multipliers=moved.multipliers, finite=infos.finite.all())
        return moved._replace(step=state.step + 1), info

    return PrimalDual(algorithm.init, step, axis_name)
