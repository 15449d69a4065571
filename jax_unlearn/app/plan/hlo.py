r"""What a compiled program costs: products, bytes moved and collectives, read from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once. Here a loop's body counts as often as it
runs. Counted are a chip's own part of the program, since the text is that of one chip.

flops     2 multiply-adds of matrix products and convolutions, at places inside the image alone
bytes     what each kernel reads from and writes to the chip's main memory; a slice counts itself
transfers payload of the collectives: what each leaves on a chip, or for a reduce-scatter takes
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Cost", "Transfer", "cost_of"]


class Transfer(NamedTuple):
    """Collectives of one kind in a step: how often, and the bytes of all of them on a chip."""

    count: float
    bytes: float


class Cost(NamedTuple):
    """What a chip does in a step.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: to and from the chip's main memory.
      transfers: by kind, such as "all-reduce".
      uncounted: kernels of other libraries, whose flops are not known.
    """

    flops: float
    bytes: float
    transfers: dict[str, Transfer]
    uncounted: tuple[str, ...] = ()


class _Array(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    near: bool  # in a memory of the chip's that is not its main one

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _BITS.get(self.kind, 0) / 8


class _Instruction(NamedTuple):
    name: str
    arrays: tuple[_Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str  # from the operands on
    root: bool


_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_ASSIGNED = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_TRANSFERS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# These move nothing themselves: names for what is there, or what others do.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while", "call",
    "conditional", "partition-id", "replica-id", "opt-barrier", "iota", "add-dependency", "domain",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def cost_of(text: str, *, rare_share: float = 1.0) -> Cost:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Args:
      text: scheduled HLO.
      rare_share: how often of all times a conditional takes the dearer of its branches.

    Returns:
      What a chip does when the program runs once.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def ten_products(x, y):
      ...     return jax.lax.scan(lambda x, _: (x @ y, None), x, length=10)[0]
      >>> square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
      >>> cost_of(jax.jit(ten_products).lower(square, square).compile().as_text()).flops
      10240.0
    """
    return _Program(text, rare_share).cost()


class _Program:
    """The computations of a program by name, and what each of them costs."""

    def __init__(self, text: str, rare_share: float) -> None:
        self.rare_share = rare_share
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry, self.seen = "", {}
        inside: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if line and not line[0].isspace():
                if match := _COMPUTATION.match(line):
                    inside = self.computations.setdefault(match[1], {})
                    self.entry = match[1] if line.startswith("ENTRY") else self.entry
            elif (found := _instruction(line)) is not None:
                inside[found.name] = found
        if not self.entry:
            raise ValueError("the text is no HLO module: it has no ENTRY computation.")

    def cost(self) -> Cost:
        """Of the entry computation."""
        channels: dict[str, tuple[str, float, float]] = {}
        uncounted: set[str] = set()
        flops, moved = self._walk(self.entry, 1.0, channels, uncounted)
        transfers: dict[str, Transfer] = {}
        for kind, times, size in channels.values():
            before = transfers.get(kind, Transfer(0, 0))
            transfers[kind] = Transfer(before.count + times, before.bytes + times * size)
        return Cost(flops, moved, transfers, tuple(sorted(uncounted)))

    def _walk(
        self,
        name: str,
        times: float,
        channels: dict[str, tuple[str, float, float]],
        uncounted: set[str],
        fused: bool = False,
    ) -> tuple[float, float]:
        """Flops and bytes of one call of a computation; transfers are collected on the way."""
        flops = moved = 0.0
        inside = self.computations[name]
        for one in inside.values():
            kind = one.opcode.removesuffix("-start")
            if kind in _TRANSFERS and not one.opcode.endswith("-done"):
                channel = re.search(r"channel_id=(\d+)", one.text)
                # Compilers write the parts of one asynchronous transfer down one by one.
                key = channel[1] if channel else f"{name}/{one.name}"
                size = _payload(one, inside)
                _, before, least = channels.get(key, ("", 0.0, 0.0))
                channels[key] = kind, max(before, times), max(least, size)
            if one.opcode == "while":
                body, condition = (_called(one, word)[0] for word in ("body", "condition"))
                trips = self._trips(one, condition)
                found = self._walk(body, times * trips, channels, uncounted)
                flops, moved = flops + trips * found[0], moved + trips * found[1]
                continue
            if one.opcode == "conditional":
                branches = [
                    self._walk(branch, times, channels, uncounted) for branch in _branches(one)
                ]
                low, high = min(branches), max(branches)
                flops += low[0] + self.rare_share * (high[0] - low[0])
                moved += low[1] + self.rare_share * (high[1] - low[1])
                continue
            flops += _products(one, inside)
            if one.opcode == "custom-call":
                library = re.search(r'custom_call_target="(__cu\w+\$\w+)"', one.text)
                if library and not _products(one, inside):
                    uncounted.add(library[1])
            whole = one.opcode in ("call", "async-start")
            for called in _called(one, "calls") + (_called(one, "to_apply") if whole else []):
                found = self._walk(called, times, channels, uncounted, fused or not whole)
                flops, moved = flops + found[0], moved + found[1]
            if not fused and not whole:
                moved += self._moved(one, inside)
        return flops, moved

    def _trips(self, loop: _Instruction, condition: str) -> float:
        """How often a loop runs: as the compiler says, or the number that its counter is below."""
        if known := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.text):
            return float(known[1])
        numbers = [
            float(match[1])
            for one in self.computations[condition].values()
            if one.opcode == "constant" and (match := re.match(r"(\d+)\)", one.text))
        ]
        return max(numbers, default=1.0)

    def _moved(self, one: _Instruction, inside: dict[str, _Instruction]) -> float:
        """Bytes of main memory that one kernel reads and writes."""
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0.0
        written = sum(array.bytes for array in one.arrays if not array.near)
        if one.opcode in _SLICES:
            return 2 * written
        if one.opcode == "dynamic-update-slice":
            return 2 * _far(inside, one.operands[1])
        read = [_far(inside, operand) for operand in one.operands]
        if one.opcode.endswith("-start"):
            # Its result names the operands once more.
            return 2 * sum(read) if one.opcode == "copy-start" else sum(read)
        if one.opcode == "fusion":
            for place, part in self._parts(one, read):
                if place < 0:
                    written = min(written, part)
                else:
                    read[place] = min(read[place], part)
        return sum(read) + written

    def _parts(self, fusion: _Instruction, read: list[float]) -> Iterator[tuple[int, float]]:
        """The operands (by place) and the result (−1) of which a fusion touches only a part."""
        inside = self.computations[_called(fusion, "calls")[0]]
        users: dict[str, list[_Instruction]] = {}
        for one in inside.values():
            for operand in one.operands:
                users.setdefault(operand, []).append(one)
        for one in inside.values():
            if one.opcode == "parameter":
                using, place = users.get(one.name, []), int(one.text.split(")")[0])
                if place < len(read) and using:
                    sliced = [
                        use.opcode in _SLICES and use.operands[0] == one.name for use in using
                    ]
                    changed = [
                        use.opcode == "dynamic-update-slice" and use.operands[0] == one.name
                        for use in using
                    ]
                    if all(a or b for a, b in zip(sliced, changed, strict=True)):
                        taken = [u.arrays[0].bytes for u, a in zip(using, sliced, strict=True) if a]
                        yield place, sum(taken)
            if one.root and one.opcode == "dynamic-update-slice":
                yield -1, sum(array.bytes for array in inside[one.operands[1]].arrays)


def _instruction(line: str) -> _Instruction | None:
    found = _ASSIGNED.match(line)
    opcode = found and _OPCODE.search(line, found.end() - 1)
    if not found or not opcode:
        return None
    kinds, text = line[found.end() : opcode.start()], line[opcode.end() :]
    arrays = tuple(
        _Array(match[1], tuple(map(int, match[2].split(","))) if match[2] else (), _near(match[3]))
        for match in _ARRAY.finditer(kinds)
    )
    end = text.find("), ")
    operands = _NAME.findall(text[: end if end >= 0 else None])
    return _Instruction(found[2], arrays, opcode[1], tuple(operands), text, bool(found[1]))


def _near(layout: str | None) -> bool:
    return layout is not None and re.search(r"S\([1-9]\)", layout) is not None


def _far(inside: dict[str, _Instruction], name: str) -> float:
    return sum(array.bytes for array in inside[name].arrays if not array.near)


def _called(one: _Instruction, word: str) -> list[str]:
    return re.findall(rf"\b{word}=%?([\w.-]+)", one.text)


def _branches(one: _Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.text)
    if listed:
        return _NAME.findall(listed[1])
    return _called(one, "true_computation") + _called(one, "false_computation")


def _payload(one: _Instruction, inside: dict[str, _Instruction]) -> float:
    given = sum(array.bytes for name in one.operands for array in inside[name].arrays)
    left = sum(array.bytes for array in one.arrays)
    if not one.opcode.startswith("all-gather"):
        return given
    return left - given if one.opcode.endswith("-start") else left


def _products(one: _Instruction, inside: dict[str, _Instruction]) -> float:
    """Flops of one matrix product or convolution, 0 of anything else."""
    if one.opcode == "dot":
        return _dot(one, inside, r"lhs_contracting_dims=\{([\d,]*)\}")
    if one.opcode == "convolution":
        image, kernel = (inside[name].arrays[0].shape for name in one.operands[:2])
        return _convolution(one.text, image, kernel, one.arrays[0].shape)
    if one.opcode == "custom-call":
        target = re.search(r'custom_call_target="__(cublas|cudnn)\$(\w+)', one.text)
        if target and target[1] == "cublas":
            return _dot(one, inside, r'lhs_contracting_dimensions":\[([^\]]*)\]')
        if target and target[2].startswith("conv"):
            first, second = (inside[name].arrays[0].shape for name in one.operands[:2])
            result = one.arrays[0].shape
            # All three kinds are described as the forward convolution that they belong to.
            roles = {"convBackwardInput": (result, second, first),
                     "convBackwardFilter": (first, result, second)}  # fmt: skip
            return _convolution(one.text, *roles.get(target[2], (first, second, result)))
    return 0.0


def _dot(one: _Instruction, inside: dict[str, _Instruction], contracted: str) -> float:
    found = re.search(contracted, one.text)
    first = inside[one.operands[0]].arrays[0].shape
    axes = [int(text) for text in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * math.prod(one.arrays[0].shape) * math.prod(first[axis] for axis in axes)


def _convolution(
    text: str, image: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]
) -> float:
    """2 · images · out channels · in channels a group · pairs of a pixel and a kernel's entry."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None, text
    options = {
        word: re.findall(r"-?\d+(?:_-?\d+)*", match[1])
        for word in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
        if (match := re.search(rf"[{{ ]{word}=([\dx_-]+)", text))
    }
    pairs = 1.0
    for axis in range(len(labels[1]) - 2):

        def size(labels: str, shape: tuple[int, ...], axis: int = axis) -> int:
            return shape[labels.index(str(axis))]

        stride, inner, outer = (
            int(options[word][axis]) if word in options else 1
            for word in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(options["pad"][axis].split("_")[0]) if "pad" in options else 0
        sizes = size(labels[1], image), size(labels[2], kernel), size(labels[3], result)
        pairs *= _pairs(*sizes, stride, inner, outer, before)
    channels = kernel[labels[2].index("i")]
    batch, features = (result[labels[3].index(name)] for name in "bf")
    return 2.0 * batch * features * channels * pairs


@functools.cache
def _pairs(
    size: int, width: int, places: int, stride: int, inner: int, outer: int, before: int
) -> int:
    """Pairs of a place in the result and one in the kernel that meet a pixel, along one axis."""
    reach, count = (size - 1) * inner + 1, 0
    for place in range(places):
        for entry in range(width):
            at = place * stride + entry * outer - before
            count += 0 <= at < reach and at % inner == 0
    return count
