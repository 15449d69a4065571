"""A replay of recent trajectories: more regressions for each trajectory that is sampled.

At each x_t the regression of an estimator that holds trajectories fixed has a minimiser of its own,
which does not depend on how often x_t is visited. So points of trajectories that older parameters
made serve it too; only its weighting of points, and the constraint values, are then those of older
models. Multipliers should therefore move on fresh trajectories alone:

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

from jax_unlearn import schedules
from jax_unlearn.formulations import on_policy
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["Replay", "Trajectories", "add", "init", "sample", "trajectories"]


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
) -> Callable[[Params, Array, on_policy.ConditionBatch], Trajectories]:
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
