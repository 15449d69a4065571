"""One step for many problems: thresholds, strengths and seeds in one compiled program.

The states of n problems are one state whose arrays have a leading axis of n, but for `step`: all
have taken as many steps. Thresholds and multipliers are part of a state, so that one step serves
every point of a front. Problems need nothing of each other: several devices share them, and send
nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_unlearn.primal_dual import PrimalDual, PrimalDualState
from jax_unlearn.sharding import AXIS
from jax_unlearn.typing import ArrayLike, Params

__all__ = ["sweep_devices", "sweep_init", "sweep_step"]

_STACKED = PrimalDualState(0, 0, 0, 0, 0, None)  # pyrefly: ignore


def sweep_init(
    algorithm: PrimalDual,
    params: Params,
    thresholds: ArrayLike,
    *,
    multipliers: ArrayLike | None = None,
    stacked: bool = False,
    mesh: Mesh | None = None,
) -> PrimalDualState:
    """The states of n problems, made where they are to lie.

    Args:
      algorithm: of `primal_dual`.
      params: that every problem starts from.
      thresholds: b of each problem, [n, m].
      multipliers: λ to start from, [n, m]; default 0.
      stacked: `params` have a leading axis of n: each problem starts from its own.
      mesh: whose axis `data` the problems are spread over; None is one device.

    Returns:
      A state whose arrays have a leading axis of n, but for `step`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_unlearn import Problem, multipliers, primal_dual
      >>> from jax_unlearn.sweep import sweep_init
      >>> problem = Problem(None, 1.0, multipliers.non_negative(), "any")
      >>> algorithm = primal_dual(problem, optax.sgd(0.1), optax.sgd(0.1))
      >>> states = sweep_init(algorithm, jnp.zeros(3), [[1.0], [2.0]])
      >>> states.params.shape, states.thresholds.tolist(), int(states.step)
      ((2, 3), [[1.0], [2.0]], 0)
    """
    thresholds = jnp.asarray(thresholds, float)
    start = jnp.zeros(()) if multipliers is None else jnp.asarray(multipliers, float)
    start = jnp.broadcast_to(start, thresholds.shape)

    def one(params: Params, thresholds: ArrayLike, start: ArrayLike) -> PrimalDualState:
        return algorithm.init(params, thresholds, multipliers=start)

    many = jax.vmap(one, in_axes=(0 if stacked else None, 0, 0), out_axes=_STACKED)
    if mesh is None:
        return jax.jit(many)(params, thresholds, start)
    each, whole = _shardings(mesh)
    where = PrimalDualState(each, each, each, each, each, whole)  # pyrefly: ignore
    return jax.jit(many, out_shardings=where)(params, thresholds, start)


def sweep_step(
    step: Callable[..., Any], mesh: Mesh | None = None, *, at_once: int = 1
) -> Callable[..., Any]:
    """A step of each of n problems, compiled as one program; the states are donated.

    (keys, states, reference, batches, which, each) -> (states, infos), where

    - `keys` are those of the problems, [n], and `states` those of `sweep_init`;
    - `reference` is one for all, and is not copied;
    - `batches` are stacked, [batches, ...], and problem i sees the one with the number `which[i]`:
      problems with the same seed share theirs;
    - `each` is a tuple of further arrays, [n, ...], that the step takes after the batch.

    On a device problems go one after the other, `at_once` of them together. On CPUs one at once is
    fastest for convolutions: of several networks they become grouped ones. Where problems are small
    for their device, more at once fill it. While a step is computed the states are there twice.

    Args:
      step: (key, state, reference, batch, *each) -> (state, info): that of `primal_dual`, or a
        function around it.
      mesh: whose axis `data` the problems are spread over; its other axes have one device. None is
        one device.
      at_once: a divisor of the problems of a device.

    Returns:
      The function. Its infos have a leading axis of n. It raises ValueError for problems that do
      not divide over the devices, or those of a device by `at_once`.

    Example: min ½(x − 2)² subject to x ≥ b for two b. The multipliers find the levels b − 2.
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_unlearn import Losses, Problem, multipliers, primal_dual
      >>> from jax_unlearn.sweep import sweep_init, sweep_step
      >>> def losses(x, reference, key, batch, multipliers, *, axis_name=None):
      ...     return Losses(0.5 * jnp.square(x - 2), x, jnp.array([0]))
      >>> problem = Problem(losses, 1.0, multipliers.non_negative(), "x at least b")
      >>> algorithm = primal_dual(problem, optax.sgd(0.2), optax.sgd(0.2))
      >>> states = sweep_init(algorithm, jnp.zeros(1), [[3.0], [4.0]])
      >>> step, keys = sweep_step(algorithm.step), jax.random.split(jax.random.key(0))
      >>> for _ in range(200):
      ...     states, infos = step(keys, states, None, None, jnp.array([0, 0]))
      >>> states.multipliers.ravel().round(3).tolist()
      [1.0, 2.0]
    """

    def many(
        keys: Any, states: PrimalDualState, reference: Params, batches: Any, which: Any, each: Any
    ) -> Any:
        count = which.shape[0]
        if at_once < 1 or count % at_once:
            raise ValueError(
                f"{count} problems of a device do not divide into groups of {at_once}."
            )
        done = states.step

        def one(key: Any, state: PrimalDualState, number: Any, own: Any) -> Any:
            batch = jax.tree.map(lambda leaf: leaf[number], batches)
            return step(key, state, reference, batch, *own)

        # `step` is not mapped, so that a dual step that is not due is left out for all.
        together = jax.vmap(one, in_axes=(0, _STACKED, 0, 0), out_axes=(_STACKED, 0))

        def group(parts: Any) -> Any:
            key, state, number, own = parts
            if at_once > 1:
                state, info = together(key, state._replace(step=done), number, own)
                return state._replace(step=None), info
            # Not mapped even over one: convolutions stay what they are.
            first = jax.tree.map(lambda leaf: leaf[0], (key, state, number, own))
            state, info = one(first[0], first[1]._replace(step=done), *first[2:])
            return jax.tree.map(lambda leaf: leaf[None], (state._replace(step=None), info))

        unmapped = states._replace(step=None)  # pyrefly: ignore
        given = keys, unmapped, which, each
        groups = jax.tree.map(
            lambda leaf: leaf.reshape(count // at_once, at_once, *leaf.shape[1:]), given
        )
        found = jax.lax.map(group, groups)
        moved, infos = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), found)
        return moved._replace(step=done + 1), infos

    if mesh is None:
        compiled = jax.jit(many, donate_argnums=1)
    else:
        own, whole = PartitionSpec(AXIS), PartitionSpec()
        states = PrimalDualState(own, own, own, own, own, whole)  # pyrefly: ignore
        spread = jax.shard_map(
            many,
            mesh=mesh,
            in_specs=(own, states, whole, whole, own, own),
            out_specs=(states, own),
            check_vma=False,
        )
        compiled = jax.jit(spread, donate_argnums=1)

    def stepped(
        keys: Any,
        states: PrimalDualState,
        reference: Params,
        batches: Any,
        which: Any,
        each: Any = (),
    ) -> Any:
        count = len(which)
        if mesh is not None and count % mesh.shape[AXIS]:
            raise ValueError(f"{count} problems do not divide over {mesh.shape[AXIS]} devices.")
        return compiled(keys, states, reference, batches, which, each)

    return stepped


def sweep_devices(problems: int, devices: Sequence[Any]) -> int:
    """The most devices, of those that there are, that a number of problems divides over.

    Example:
      >>> from jax_unlearn.sweep import sweep_devices
      >>> sweep_devices(15, range(8))
      5
    """
    return max(n for n in range(1, len(devices) + 1) if problems % n == 0)


def _shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Of what each problem has, and of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
