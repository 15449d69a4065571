"""The step on more than one device: jit over a `data` mesh, or pmap."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["check_rows", "data_mesh", "jit_step", "pmap_step", "replicate", "shard_batch"]

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh named "data" over the devices (default: all of them)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of arrays on the mesh, every leading axis split over "data".

    Raises:
      ValueError: if a leading axis is not a multiple of the number of devices.
    """
    for leaf in jax.tree.leaves(batch):
        check_rows(leaf.shape[0], mesh.size)
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))


def check_rows(rows: int, devices: int) -> None:
    """Raises ValueError if a batch of so many rows does not divide over so many devices."""
    if rows % devices:
        raise ValueError(
            f"a batch of {rows} does not divide over {devices} devices: choose a multiple of "
            f"{devices}."
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays whole on every device of the mesh.

    Do this with the first state, which is on one device: `jit_step` would take it as it is, and
    compile once more when its own, replicated, state comes back.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def jit_step(step: Callable[..., Any], mesh: Mesh | None = None) -> Callable[..., Any]:
    """A step (key, state, batch) -> (state, info), compiled, its state donated but the reference.

    On a mesh the state is replicated and the batch split over "data"; the compiler inserts
    the reductions. The step is that of `primal_dual` built without an axis_name, or a
    function around it: for a dual batch, `lambda key, state, both: algorithm.step(key, state,
    *both)`, given `shard_batch((batch, dual_batch), mesh)`. So too for `pmap_step`.
    """

    def apart(key: Any, moving: Any, reference: Any, batch: Any) -> tuple[Any, Any]:
        state, info = step(key, moving._replace(reference=reference), batch)
        return state._replace(reference=None), info

    if mesh is None:
        compiled = jax.jit(apart, donate_argnums=1)
    else:
        replicated = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec(AXIS))
        compiled = jax.jit(
            apart,
            in_shardings=(replicated, replicated, replicated, split),
            out_shardings=replicated,
            donate_argnums=1,
        )

    def call(key: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        moved, info = compiled(key, state._replace(reference=None), state.reference, batch)
        return moved._replace(reference=state.reference), info

    return call


def pmap_step(step: Callable[..., Any], devices: Sequence[jax.Device] | None = None) -> Any:
    """The same step under `jax.pmap` over the axis "data".

    The step is that of `primal_dual` built with axis_name="data". The key and the state are given
    whole and come back whole; the batch has a leading axis of devices, [devices,
    batch / devices, ...].
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices)
