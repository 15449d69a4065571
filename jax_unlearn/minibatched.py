"""More than one primal step for each trajectory that is sampled.

At each x_t the regression of an estimator that holds trajectories fixed has a minimiser of its own,
which does not depend on how often x_t is visited. So points of trajectories that older parameters
made serve it too; only its weighting of points, and the constraint values, are then those of older
models. `minibatched` goes over each trajectory once and leaves it. Longer, a ring keeps them, and
multipliers should then move on fresh trajectories alone:

    visit = replay.trajectories(apply, schedule, shape=shape, steps=steps)
    algorithm = primal_dual(formulation, optimizer, dual_optimizer)
    held = primal_dual(formulation, optimizer, optax.set_to_zero())

    state, info = algorithm.step(key, state, conditions)
    buffer = replay.add(buffer, visit(state.params, visit_key, conditions))
    for again in keys:
        still = state._replace(dual_state=optax.EmptyState())
        after, _ = held.step(again, still, replay.sample(again, buffer))
        state = after._replace(dual_state=state.dual_state)

All are pure functions on arrays, for use inside a scan. A step on stored points runs the networks
once, one on a fresh trajectory once for each of its steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import schedules
from jax_unlearn.formulations import on_policy
from jax_unlearn.formulations.base import Formulation
from jax_unlearn.primal_dual import PrimalDual, PrimalDualInfo, PrimalDualState, primal_dual
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = [
    "Replay",
    "Trajectories",
    "Visit",
    "add",
    "init",
    "minibatched",
    "sample",
    "trajectories",
]

Visit = Callable[[Params, Array, on_policy.ConditionBatch], "Trajectories"]


class Trajectories(NamedTuple):
    """What `sample` draws from: x_t of kept rows (or None) and of `forget`, [steps, rows, ...]."""

    conditions: on_policy.ConditionBatch
    x_t: tuple[Any, Any]


class Replay(NamedTuple):
    """A ring of the last `Trajectories`, leaves [capacity, ...], and how many were ever added."""

    ring: Trajectories
    added: Array


def trajectories(
    apply: Denoiser, schedule: schedules.NoiseSchedule, *, shape: tuple[int, ...], steps: int
) -> Visit:
    """A function (params, key, conditions) -> Trajectories of the model's own chain.

    With the same key they are those of an on-policy estimator's losses, with the same shape and
    steps, whose errors it raises.
    """
    chain = on_policy.chain(schedule, shape, steps)

    def visit(params: Params, key: Array, conditions: on_policy.ConditionBatch) -> Trajectories:
        rows = on_policy.lay_out(conditions, key, None)
        x_t, _ = on_policy.run(
            lambda x_t, t: apply(params, x_t, t, rows.cond),
            lambda x_t, t, log_snr, epsilon: x_t,
            chain,
            rows.keys,
            bound=0.0,
        )
        kept = None if conditions.kept is None else x_t[:, : rows.kept]
        return Trajectories(conditions, (kept, x_t[:, rows.kept :]))

    return visit


def minibatched(
    formulation: Formulation,
    optimizer: optax.GradientTransformation,
    dual_optimizer: optax.GradientTransformation,
    visit: Visit,
    *,
    parts: int,
    merge: Callable[[Params, Params], Params] | None = None,
) -> PrimalDual:
    """The primal-dual algorithm with `parts` primal steps on the trajectories of each batch.

    A step samples trajectories of the model, deals the points of each, in random order, out to as
    many minibatches, and takes a primal step on each, λ held; then follows one dual step on
    their mean violation. That is the violation of whole trajectories, each part of it at the
    parameters that it met. A point costs no more passes through the networks than in a step of
    "stop_gradient" on whole trajectories, whose optimum this shares. A part that is not finite is
    left out, and told.

    Args:
      formulation: with an estimator that holds trajectories fixed.
      optimizer: for the parameters; it makes `parts` updates a step.
      dual_optimizer: for the multipliers, one update a step, fed with −violation.
      visit: `trajectories` of the same network, shape and number of time steps.
      parts: minibatches, a divisor of that number.
      merge: (reference, parameters that train) -> those of the network, where they are not the
        same: `lora_merge`.

    Returns:
      `init` and `step` as of `primal_dual`, for jit; what `step` reports are means over the parts,
      and it has no `dual_batch`. It raises ValueError for parts that do not divide the time steps.
    """
    # All parts are steps at one λ; the last of them moves it, by the mean of their violations.
    once = optax.MultiSteps(dual_optimizer, parts).gradient_transformation()
    algorithm = primal_dual(formulation, optimizer, once, alternating=False)

    def deal(key: Array, conditions: Any, x_t: Any) -> tuple[Any, Any, Any]:
        """Conditions, points and places in the chain, [parts, points of a part, ...]."""
        if x_t is None:
            return None, None, None
        steps, rows = x_t.shape[:2]
        order = jnp.tile(jnp.arange(steps)[:, None], rows)
        order = jax.random.permutation(key, order, axis=0, independent=True)
        shape = (parts, steps // parts * rows)
        repeated = jax.tree.map(
            lambda leaf: jnp.tile(leaf, (steps, *[1] * (jnp.ndim(leaf) - 1))).reshape(
                *shape, *jnp.shape(leaf)[1:]
            ),
            conditions,
        )
        points = x_t[order, jnp.arange(rows)].reshape(*shape, *x_t.shape[2:])
        return repeated, points, order.reshape(shape)

    def step(
        key: Array, state: PrimalDualState, batch: on_policy.ConditionBatch
    ) -> tuple[PrimalDualState, PrimalDualInfo]:
        visit_key, deal_key = jax.random.split(key)
        params = state.params if merge is None else merge(state.reference, state.params)
        visited = visit(params, visit_key, batch)
        steps = visited.x_t[1].shape[0]
        if parts < 1 or steps % parts:
            raise ValueError(f"{steps} time steps cannot be dealt out to {parts} minibatches.")
        dealt = [
            deal(*each)
            for each in zip(
                jax.random.split(deal_key), visited.conditions, visited.x_t, strict=True
            )
        ]
        (kept, forget), x_t, place = zip(*dealt, strict=True)
        points = on_policy.Stored(on_policy.ConditionBatch(kept, forget), x_t, place)

        def descend(moving: PrimalDualState, part: Any) -> tuple[PrimalDualState, PrimalDualInfo]:
            # Nothing random is left. The reference is not carried: a loop copies what it carries.
            whole = moving._replace(reference=state.reference)
            moved, info = algorithm.step(key, whole, part)
            return moved._replace(reference=None), info

        moved, infos = jax.lax.scan(descend, state._replace(reference=None), points)
        info = jax.tree.map(lambda leaf: leaf.mean(axis=0), infos)
        info = info._replace(multipliers=moved.multipliers, finite=infos.finite.all())
        return moved._replace(reference=state.reference, step=state.step + 1), info

    return PrimalDual(algorithm.init, step)


def init(capacity: int, example: Trajectories) -> Replay:
    """An empty ring for `capacity` such trajectories; `example` gives shapes and types alone.

    Raises:
      ValueError: for a capacity below one.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, not {capacity}.")
    ring = jax.tree.map(
        lambda leaf: jnp.zeros((capacity, *jnp.shape(leaf)), jnp.result_type(leaf)), example
    )
    return Replay(ring, jnp.zeros((), jnp.int32))


def add(replay: Replay, new: Trajectories) -> Replay:
    """Puts trajectories in place of the oldest."""
    capacity = jax.tree.leaves(replay.ring)[0].shape[0]
    place = replay.added % capacity
    ring = jax.tree.map(lambda ring, leaf: ring.at[place].set(leaf), replay.ring, new)
    return Replay(ring, replay.added + 1)


def sample(key: Array, replay: Replay) -> on_policy.Stored:
    """A batch of as many rows as were added at once, each at a uniform entry and time step.

    At least one must have been added.
    """
    capacity, steps = replay.ring.x_t[1].shape[:2]
    filled = jnp.minimum(replay.added, capacity)

    def draw(key: Array, conditions: Any, x_t: Any) -> tuple[Any, Any, Any]:
        if x_t is None:
            return None, None, None
        entry_key, step_key = jax.random.split(key)
        row = jnp.arange(x_t.shape[2])
        entry = jax.random.randint(entry_key, row.shape, 0, filled)
        step = jax.random.randint(step_key, row.shape, 0, steps)
        return jax.tree.map(lambda leaf: leaf[entry, row], conditions), x_t[entry, step, row], step

    parts = [
        draw(*each)
        for each in zip(jax.random.split(key), replay.ring.conditions, replay.ring.x_t, strict=True)
    ]
    (kept, forget), x_t, step = zip(*parts, strict=True)
    return on_policy.Stored(on_policy.ConditionBatch(kept, forget), x_t, step)
