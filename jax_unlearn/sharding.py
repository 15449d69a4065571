"""The step on more than one device: jit over a mesh of data, fsdp and tensor, or pmap.

| axis | what is split over it |
|---|---|
| `data` | rows of the batch |
| `fsdp` | rows of the batch; parameters, reference and optimizer state |
| `tensor` | channels and heads of the layers that `TENSOR_RULES` lists |

The compiler inserts what has to be sent. All processes of a run hold one mesh of all their devices.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_unlearn.primal_dual import PrimalDual

__all__ = [
    "TENSOR_RULES",
    "batch_ways",
    "check_rows",
    "device_mesh",
    "jit_step",
    "keep_rows",
    "mesh_sizes",
    "parse_mesh",
    "pmap_step",
    "put",
    "replicate",
    "shard_batch",
    "shardings",
    "split_batch",
]

AXIS = "data"
AXES = (AXIS, "fsdp", "tensor")
ROWS = (AXIS, "fsdp")

TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"to_(q|k|v)/kernel|(q|k|v)_proj/kernel", -1),
    (r"to_out_0/kernel|out_proj/kernel", -2),
    (r"net_0/proj/kernel|fc1/kernel", -1),
    (r"net_2/kernel|fc2/kernel", -2),
    (r"resnets_\d+/conv1/kernel", -1),
    (r"resnets_\d+/conv2/kernel", -2),
)
"""Ends of parameters' paths, and the dimension that `tensor` splits.

They come in pairs: heads or channels are made on different devices by the first layer (−1, its
outputs), and summed by the second (−2, its inputs). What no rule names is not split over `tensor`.
The names are those of the UNets, the text encoder and the autoencoder of diffusers.
"""

_SMALLEST = 2**11  # Elements. Biases and scales are cheaper to keep whole than to gather.


def device_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    dcn_data: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`; −1 for one of them is what is left.

    Args:
      data: devices that batches alone are split over, in each of the `dcn_data` slices.
      fsdp: devices that parameters, too, are split over.
      tensor: devices that layers are split over: those with the fastest links.
      dcn_data: slices, or where devices have none processes, joined by a network alone. Only
        gradients cross it: they join the axis `data`, which is then dcn_data · data long.
      devices: default: all of them, of all processes.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.

    Example:
      >>> import jax
      >>> from jax_unlearn import sharding
      >>> dict(sharding.device_mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    asked = {AXIS: data, "fsdp": fsdp, "tensor": tensor}
    sizes = mesh_sizes(len(devices), dcn_data=dcn_data, **asked)
    if dcn_data == 1:
        many = mesh_utils.create_device_mesh(sizes, devices)
    else:
        slices = {getattr(device, "slice_index", 0) for device in devices}
        many = mesh_utils.create_hybrid_device_mesh(
            sizes, (dcn_data, 1, 1), devices, process_is_granule=len(slices) == 1
        )
    return Mesh(many, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(
    count: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1, dcn_data: int = 1
) -> tuple[int, int, int]:
    """The sizes of a slice's axes where there are `count` devices, −1 filled in.

    Raises:
      ValueError: as `device_mesh`.

    Example:
      >>> from jax_unlearn import sharding
      >>> sharding.mesh_sizes(16, fsdp=4)
      (4, 4, 1)
    """
    asked, slices = {AXIS: data, "fsdp": fsdp, "tensor": tensor}, dcn_data
    text = ", ".join(f"{name}={size}" for name, size in asked.items())
    text = text if slices == 1 else f"dcn_data={slices}, {text}"
    if any(size < 1 and size != -1 for size in asked.values()) or slices < 1:
        raise ValueError(f"a mesh of {text}: sizes are at least 1, or -1 for what is left.")
    if list(asked.values()).count(-1) > 1:
        raise ValueError(f"a mesh of {text}: only one size may be -1.")
    known = slices * math.prod(size for size in asked.values() if size != -1)
    left, remainder = divmod(count, known)
    if remainder or (known != count and -1 not in asked.values()):
        raise ValueError(
            f"a mesh of {text} does not fit the {count} devices: its sizes must multiply to that."
        )
    first, second, third = (left if size == -1 else size for size in asked.values())
    return first, second, third


def parse_mesh(text: str) -> dict[str, Any]:
    """The arguments of `device_mesh` from a text such as "data=4,fsdp=2"; {} from none.

    `data` takes what is left where the text names neither it nor a −1.

    Raises:
      ValueError: if it is something else.

    Example:
      >>> from jax_unlearn import sharding
      >>> sharding.parse_mesh("fsdp=2,tensor=2")
      {'fsdp': 2, 'tensor': 2}
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(dcn_data|data|fsdp|tensor)=(-1|[1-9]\d{0,8})\s*", part)
        if match is None or match[1] in found:
            raise ValueError(
                f"a mesh is given as data=N,fsdp=N,tensor=N (dcn_data=N too), each at most once "
                f"and -1 for what is left, not {text!r}."
            )
        found[match[1]] = int(match[2])
    if -1 in (found.get("fsdp"), found.get("tensor")):
        found.setdefault(AXIS, 1)
    return found


def batch_ways(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[name] for name in ROWS)


def _of_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(ROWS))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How parameters, or a state or an optimizer's state of them, lie on a mesh.

    `TENSOR_RULES` split a parameter over `tensor`. Of its other dimensions, `fsdp` splits the
    largest that it divides. Arrays of fewer than 2,048 elements are whole on every device.

    Args:
      tree: arrays, or their shapes; paths end as the parameters' do.
      mesh: of `device_mesh`.

    Returns:
      A tree of `NamedSharding` like the given one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import sharding
      >>> mesh = sharding.device_mesh(data=1, fsdp=-1)
      >>> layer = {"to_q": {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}}
      >>> found = sharding.shardings(layer, mesh)["to_q"]
      >>> tuple(found["kernel"].spec), tuple(found["bias"].spec)
      ((None, 'fsdp'), ())
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def _name(path: Any) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) < _SMALLEST:
        return PartitionSpec()
    for pattern, dimension in TENSOR_RULES:
        if (
            mesh.shape["tensor"] > 1
            and re.search(rf"(^|/)({pattern})$", name)
            and len(shape) >= 2
            and shape[dimension] % mesh.shape["tensor"] == 0
        ):
            spec[dimension] = "tensor"
            break
    free = [
        place
        for place, size in enumerate(shape)
        if spec[place] is None and size % mesh.shape["fsdp"] == 0
    ]
    if free:
        spec[max(free, key=lambda place: shape[place])] = "fsdp"
    return PartitionSpec(*spec)


def put(tree: Any, shardings: Any) -> Any:
    """Puts arrays, whole in every process, where the shardings say, a tree or one for all.

    Unlike `jax.device_put` it takes typed keys and sends nothing on meshes of many processes: each
    takes its own parts of what it holds.
    """
    if isinstance(shardings, NamedSharding):
        where = shardings
        shardings = jax.tree.map(lambda leaf: where, tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        raw = _put(jax.random.key_data(leaf), sharding)
        return jax.jit(lambda raw: jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf)))(
            raw
        )
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of arrays on the mesh, every leading axis split over `data` and `fsdp`.

    Where a run has many processes, each is given the whole batch and keeps its own rows.

    Raises:
      ValueError: if a leading axis is not a multiple of the number of devices.
    """
    for leaf in jax.tree.leaves(batch):
        check_rows(leaf.shape[0], batch_ways(mesh))
    return put(batch, _of_rows(mesh))


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
    compile once more when its own, replicated, state comes back. Where parameters are split:
    `put(tree, shardings(tree, mesh))`.
    """
    return put(tree, NamedSharding(mesh, PartitionSpec()))


def jit_step(step: Callable[..., Any], mesh: Mesh | None = None, *, like: Any = None) -> Any:
    """A step (key, state, reference, batch) -> (state, info), compiled, its state donated.

    On a mesh the batch is split over `data` and `fsdp`; the compiler inserts the reductions. The
    step is that of `primal_dual` built without an axis_name, or a function around it: for a dual
    batch, `lambda key, state, reference, both: algorithm.step(key, state, reference, *both)`,
    given `shard_batch((batch, dual_batch), mesh)`.

    Args:
      step: the function.
      mesh: of `device_mesh`; None is one device.
      like: (state, reference), arrays or shapes, that lie as `shardings` says; None: both are
        whole on every device.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=1)
    whole = NamedSharding(mesh, PartitionSpec())
    state, reference = (whole, whole) if like is None else shardings(like, mesh)

    @functools.wraps(step)
    def on_mesh(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # For `keep_rows`.
            return step(*args)

    return jax.jit(
        on_mesh,
        in_shardings=(whole, state, reference, _of_rows(mesh)),
        out_shardings=(state, whole),
        donate_argnums=1,
    )


def keep_rows(tree: Any) -> Any:
    """Arrays whose rows stay split over `data` and `fsdp` inside a step of `jit_step`.

    Where parameters are split, the compiler is free to split activations as they are, and then
    sends activations instead of parameters. A denoiser that passes what it is given and what it
    returns through this leaves no such choice; those of `pretrained` do. Rows that do not divide
    stay as they are, and so does everything outside of `jit_step`, or on a mesh of `data` alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES or mesh.size == mesh.shape[AXIS]:
        return tree
    ways = math.prod(mesh.shape[name] for name in ROWS)

    def keep(leaf: Any) -> Any:
        if leaf.ndim == 0 or leaf.shape[0] % ways:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(ROWS))

    return jax.tree.map(keep, tree)


def split_batch(batch: Any, devices: int) -> Any:
    """A batch of arrays [rows, ...] for `pmap_step`: [devices, rows / devices, ...].

    Raises:
      ValueError: if the rows are not a multiple of the number of devices.
    """
    for leaf in jax.tree.leaves(batch):
        check_rows(leaf.shape[0], devices)
    return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


def pmap_step(algorithm: PrimalDual, devices: Sequence[jax.Device] | None = None) -> Any:
    """The step of an algorithm under `jax.pmap` over the axis "data".

    The key, the state and the reference are given whole, and the state comes back whole; the batch
    has a leading axis of devices, of `split_batch`.

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
