"""One run by many processes: how they meet, what they agree on, and who writes.

Each process has the devices of one machine, and all run the same program. Process 0 writes and
prints. The others write into folders of their own that are deleted, and to the checkpoints, which
Orbax has all processes save together.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_unlearn import sharding
from jax_unlearn.app.folder import claim
from jax_unlearn.app.options import RunOptions

__all__ = [
    "agreed", "any_of", "fetch", "is_main", "over_devices", "own_options", "share", "start", "wait",
    "whole",
]  # fmt: skip

T = TypeVar("T")
_NOTHING_WON = ("cpu",)
_LONGEST = 2048  # Bytes of a message that is sent.
_HEARTBEAT_S = 30  # A process that is silent for longer is dead.


def start(options: RunOptions) -> None:
    """Meets the other processes, where the options say that there are some.

    Raises:
      ValueError: if they cannot be found, or do not come.
    """
    if not options.coordinator:
        return
    given: dict[str, Any] = {}
    if options.coordinator != "auto":
        given = {
            "coordinator_address": options.coordinator,
            "num_processes": options.num_processes,
            "process_id": options.process_id,
        }
    # `stop_signals` answers SIGTERM, and the processes agree on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT_S)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--coordinator {options.coordinator}: the processes did not meet: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until every process is here.

    Args:
      name: of the place, the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(work: Callable[[], T], *, main_only: bool = False) -> T | None:
    """Does something in each process; where one refuses, all do.

    Args:
      work: what may raise a ValueError.
      main_only: whether only process 0 does it; the others then return None.

    Raises:
      ValueError: that of the first process that raised one.
    """
    if jax.process_count() == 1:
        return work()
    found, mine = None, b""
    if is_main() or not main_only:
        try:
            found = work()
        except ValueError as error:
            mine = str(error).encode()[:_LONGEST] or b"refused"
    sent = np.zeros(_LONGEST, np.uint8)
    sent[: len(mine)] = np.frombuffer(mine, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(sent))
    for number, row in enumerate(everyone):
        text = row.tobytes().rstrip(b"\0").decode(errors="ignore")
        if text:
            raise ValueError(text if number == 0 else f"process {number}: {text}")
    return found


def share(count: int, one: Callable[[int], Any]) -> list[Any]:
    """[one(0), …, one(count − 1)], each computed by one process, known to all.

    Args:
      count: how many.
      one: number -> a tree of arrays, the shapes the same for all numbers.
    """
    processes, rank = jax.process_count(), jax.process_index()
    rounds = -(-count // processes)
    mine = [jax.device_get(one(min(rank + r * processes, count - 1))) for r in range(rounds)]
    if processes == 1:
        return mine
    everyone = multihost_utils.process_allgather(
        jax.tree.map(lambda *leaves: np.stack(leaves), *mine), tiled=False
    )
    return [
        jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n % processes, n // processes]), everyone)
        for n in range(count)
    ]


def whole(rows: int) -> int:
    """Rows rounded up to what the accelerators of this process share evenly."""
    devices = len(_sharing())
    return -(-rows // devices) * devices


def _sharing() -> list[jax.Device]:
    """Those that share a batch. On CPUs one: they are parts of one machine and win nothing."""
    devices = jax.local_devices()
    return devices[:1] if devices[0].platform in _NOTHING_WON else devices


def over_devices(tree: Any) -> Any:
    """Arrays [rows, ...] split over the accelerators of this process, for what is measured.

    There are as many rows as `whole` says. Where one device has them all they stay as they are.
    """
    devices = _sharing()
    if len(devices) == 1:
        return tree
    mesh = sharding.device_mesh(devices=devices)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(sharding.AXIS)))


def fetch(leaf: Any) -> np.ndarray:
    """The values of an array that may lie on devices of other processes."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def any_of(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """A function of one flag a process, to be called by all: whether one is set.

    What it returns is on the devices, so that nobody waits for it before reading it.
    """
    each = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    found = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda flag: found(sharding.put(np.full(mesh.size, flag), each))


@contextlib.contextmanager
def own_options(options: RunOptions) -> Iterator[RunOptions]:
    """The options with the folder that this process writes into, claimed by process 0.

    Those of the other processes have a folder that is deleted in the end, with what is needed of
    a run that is resumed.

    Raises:
      ValueError: in all processes, as `claim` does.
    """
    with contextlib.ExitStack() as stack:
        agreed(lambda: stack.enter_context(claim(options)), main_only=True)
        mine = options
        if not is_main():
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name in ("run.json", "metrics.jsonl"):
                if (options.out / name).is_file():
                    shutil.copy(options.out / name, folder / name)
            mine = dataclasses.replace(options, out=folder)
        wait("the folder is claimed")
        yield mine
