"""Whether parameters fit into memory, before any of them is read."""

import math
import os
import pathlib
import sys

import jax

from jax_unlearn.typing import Params

__all__ = ["check_parameters", "machine_memory"]

_CGROUPS = pathlib.Path("/sys/fs/cgroup")


def machine_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's limit.

    Where neither is known, as on Windows, it is `sys.maxsize`.
    """
    sizes = [sys.maxsize]
    if hasattr(os, "sysconf"):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _limits():
        try:
            text = path.read_text().strip()
        except OSError:  # Most groups have no limit, or are not of this kind.
            continue
        if text.isdecimal():  # Not "max".
            sizes.append(int(text))
    return min(size for size in sizes if size > 0)


def check_parameters(shapes: Params, where: str) -> None:
    """Refuses a network whose parameters would not fit into this machine's memory in float32.

    Args:
      shapes: a pytree of `jax.ShapeDtypeStruct`.
      where: what describes the network, for the message.

    Raises:
      ValueError: saying how many parameters there are, what they need and what there is.
    """
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    memory = machine_memory()
    if 4 * count > memory:
        raise ValueError(
            f"{where} describes {count:,} parameters, which need {4 * count / 1e9:,.1f} GB: this "
            f"machine has {memory / 1e9:,.1f} GB."
        )


def _limits() -> list[pathlib.Path]:
    """Files that hold the limits of this process's control group and of those above it."""
    try:
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # Not Linux.
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):  # Version 2, version 1.
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            below = pathlib.PurePath(group.lstrip("/"))
            found += [root / part / name for part in (below, *below.parents)]
    return found
