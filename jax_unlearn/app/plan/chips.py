"""Chips that a step can be planned for: memory, peak rates, and how they are put together.

Figures are those of Google's pages on each TPU (cloud.google.com/tpu/docs/v5e and its neighbours)
and of NVIDIA's data sheets (A100, H100 SXM, H200 SXM): dense bfloat16, main memory, and what a chip
can send over all of its links at once, one way. A TPU7x chip is two devices of JAX's, each with
half of it.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["CHIPS", "Chip", "Topology", "gpu_of", "larger", "parse_topology"]

_GIB = 2**30


class Chip(NamedTuple):
    """A device's limits.

    Attributes:
      name: as it is printed.
      memory: bytes.
      flops: products and sums a second, of bfloat16.
      bandwidth: bytes a second from and to its memory.
      interconnect: bytes a second that it can send to others.
      measured: whether the rates were timed on this machine, and are no maker's figures.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    interconnect: float
    measured: bool = False


CHIPS = {
    "v4": Chip("TPU v4", 32 * _GIB, 275e12, 1.2e12, 300e9),
    "v5e": Chip("TPU v5e", 16 * _GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95 * _GIB, 459e12, 2.765e12, 600e9),
    "v6e": Chip("TPU v6e", 32 * _GIB, 918e12, 1.6e12, 400e9),
    "tpu7x": Chip("TPU7x, half a chip", 96 * _GIB, 1153e12, 3.69e12, 300e9),
}
"""By the first part of a topology's name."""

# By a part of `device_kind`, the first that fits.
_GPUS = {
    "H200": Chip("NVIDIA H200", 141e9, 989e12, 4.8e12, 450e9),
    "H100": Chip("NVIDIA H100", 80e9, 989e12, 3.35e12, 450e9),
    "A100-SXM4-80GB": Chip("NVIDIA A100 80 GB", 80e9, 312e12, 2.039e12, 300e9),
    "A100": Chip("NVIDIA A100", 40e9, 312e12, 1.555e12, 300e9),
}
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SHAPES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT, "tpu7x": _DEEP}
_MOST_CPUS = 1024


class Topology(NamedTuple):
    """What is planned for.

    Attributes:
      text: its name.
      kind: a key of `CHIPS`, "cpu", "gpu", or "local", what JAX takes by itself.
      devices: how many; None where only the machine knows.
    """

    text: str
    kind: str
    devices: int | None

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it, without a TPU."""
        return self.kind in CHIPS


def parse_topology(text: str) -> Topology:
    """Reads "v5e:4x4", "cpu:8", "gpu" or "local".

    Example:
      >>> parse_topology("v5e:4x4").devices, parse_topology("tpu7x:2x2x1").devices
      (16, 8)

    Raises:
      ValueError: for another name, or a shape that the chip does not come in.
    """
    kind, colon, shape = text.partition(":")
    if not colon and kind in ("gpu", "local"):
        return Topology(text, kind, None)
    if kind == "cpu" and re.fullmatch("[1-9][0-9]{0,3}", shape) and int(shape) <= _MOST_CPUS:
        return Topology(text, kind, int(shape))
    if kind not in _SHAPES:
        raise ValueError(
            f"--topology {text!r} is none: expected CHIP:SHAPE with a chip of {', '.join(CHIPS)}, "
            "such as v5e:4x4, or cpu:8, gpu or local."
        )
    if shape not in _SHAPES[kind]:
        raise ValueError(f"--topology {text}: {kind} comes as {', '.join(_SHAPES[kind])}.")
    return Topology(text, kind, _devices(kind, shape))


def larger(topology: Topology) -> Sequence[Topology]:
    """The topologies of the same chip that have more devices, the next one first."""
    if topology.kind == "cpu":
        assert topology.devices is not None
        counts = (topology.devices * 2**power for power in range(1, 4))
        return [parse_topology(f"cpu:{n}") for n in counts if n <= _MOST_CPUS]
    here = topology.devices or 0
    shapes = _SHAPES.get(topology.kind, ())
    every = [parse_topology(f"{topology.kind}:{shape}") for shape in shapes]
    return [one for one in every if (one.devices or 0) > here]


def gpu_of(device_kind: str) -> Chip | None:
    """The figures of a GPU by JAX's name for it, or None."""
    return next((chip for part, chip in _GPUS.items() if part in device_kind), None)


def _devices(kind: str, shape: str) -> int:
    chips = math.prod(map(int, shape.split("x")))
    return 2 * chips if kind == "tpu7x" else chips
