"""The step on more than one device: jit over a `data` mesh, or pmap."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_unlearn.primal_dual import PrimalDual

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

    Do this with the reference and with the first state, which are on one device: `jit_step` would
    compile once more when its own, replicated, state comes back.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def jit_step(step: Callable[..., Any], mesh: Mesh | None = None) -> Any:
    """A step (key, state, reference, batch) -> (state, info), compiled, its state donated.

    On a mesh the state and the reference are replicated and the batch split over "data"; the
    compiler inserts the reductions. The step is that of `primal_dual` built without an axis_name,
    or a function around it: for a dual batch, `lambda key, state, reference, both:
    algorithm.step(key, state, reference, *both)`, given `shard_batch((batch, dual_batch), mesh)`.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=1)
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.jit(
        step,
        in_shardings=(replicated, replicated, replicated, split),
        out_shardings=replicated,
        donate_argnums=1,
    )


def pmap_step(algorithm: PrimalDual, devices: Sequence[jax.Device] | None = None) -> Any:
    """The step of an algorithm under `jax.pmap` over the axis "data".

    The key, the state and the reference are given whole, and the state comes back whole; the batch
    has a leading axis of devices, [devices, batch / devices, ...].

    Raises:
      ValueError: for an algorithm that was built without `axis_name="data"`: each device would
        then move the parameters by its own part of the batch alone.
    """
    if algorithm.axis_name != AXIS:
        raise ValueError(
            f"pmap sums over the axis {AXIS!r}; the algorithm was built with "
            f"axis_name={algorithm.axis_name!r}: give primal_dual(..., axis_name={AXIS!r})."
        )
    return jax.pmap(
        algorithm.step,
        axis_name=AXIS,
        in_axes=(None, None, None, 0),
        out_axes=None,
        devices=devices,
    )
