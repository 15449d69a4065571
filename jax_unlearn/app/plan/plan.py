"""What a command costs, and what would make it fit: compiled in child processes, and a table."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from jax_unlearn import sharding
from jax_unlearn.app.files import replace_file
from jax_unlearn.app.options import ModelOptions
from jax_unlearn.app.plan.chips import Chip, Topology, larger, parse_topology
from jax_unlearn.app.plan.options import PlanOptions
from jax_unlearn.app.plan.worker import Job
from jax_unlearn.app.terminal import say

__all__ = ["NotPlanned", "Plan", "Roofline", "plan", "roofline", "table"]

Compile = Callable[[Job], dict[str, Any]]

# Changes are tried by compiling them where the first step took no more seconds.
CHEAP = 180.0
# Of a ring of n chips: how often its payload each chip sends.
_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
}


class NotPlanned(Exception):
    """The process that compiles ended without an answer."""


class Roofline(NamedTuple):
    """The least seconds that a step can take on each resource of a chip.

    Attributes:
      compute: its products.
      memory: what it reads and writes.
      interconnect: what it sends.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Of a step in which all three overlap perfectly."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """The resource that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


class Plan(NamedTuple):
    """What is written as json.

    Attributes: as the page on plans lists them.
    """

    command: str
    topology: str
    mesh: str
    chip: str
    chips: int
    memory: dict[str, Any]
    flops_per_step: float | None
    flops_per_chip: float | None
    bytes_per_chip: float | None
    collective_bytes: float | None
    collectives: dict[str, Any] | None
    roofline_seconds: dict[str, float] | None
    bound_by: str | None
    rates_timed_here: bool
    seconds_per_step: float | None
    steps: int
    chip_hours: float | None
    compile_seconds: float
    uncounted: list[str]
    suggestion: dict[str, Any] | None
    versions: dict[str, str]


def roofline(
    chip: Chip, chips: int, *, flops: float, moved: float, sent: dict[str, Any]
) -> Roofline:
    """Seconds a step, of what a chip does at its peak rates.

    Args:
      chip: its rates.
      chips: how many take part.
      flops: of products.
      moved: bytes from and to its memory.
      sent: payload in bytes of the collectives, {kind: {"bytes": ...}}.

    Example: 2 GB are summed over four chips, of which each sends 3 GB at 3 GB/s.
      >>> rates = {"name": "", "memory": 0, "flops": 4e9, "bandwidth": 2e9, "interconnect": 3e9}
      >>> found = roofline(
      ...     Chip(**rates), 4, flops=2e9, moved=1e9, sent={"all-reduce": {"bytes": 2e9}}
      ... )
      >>> found.seconds, found.bound_by
      (1.0, 'interconnect')
    """
    payload = sum(
        _SENT.get(kind, lambda n: 1.0)(chips) * one["bytes"] for kind, one in sent.items()
    )
    return Roofline(flops / chip.flops, moved / chip.bandwidth, payload / chip.interconnect)


def plan(
    asked: PlanOptions,
    options: ModelOptions,
    *,
    progress: bool = True,
    compile_in: Compile | None = None,
) -> Plan:
    """Compiles the step of a command for a topology, and if it does not fit, of what may.

    Args:
      asked: for what.
      options: of the planned command.
      progress: whether to show the seconds that a compilation takes.
      compile_in: what compiles; default a process of its own.

    Raises:
      ValueError: for options or devices that cannot be.
      NotPlanned: if the process that compiles dies.
    """
    compiled = compile_in or (lambda job: _in_child(job, progress))
    method = getattr(options, "method", "constrained")
    if method != "constrained":
        raise ValueError(f"plan is of constrained problems, not of --method {method}.")
    job = Job(options, parse_topology(asked.topology))
    if job.topology.devices is not None:
        sharding.mesh_sizes(job.topology.devices, **sharding.parse_mesh(options.mesh))
    found = compiled(job)
    made = _plan(asked, job, found)
    if not made.memory["fits"]:
        made = made._replace(suggestion=_suggest(asked, job, found, compiled))
    if asked.json is not None:
        replace_file(asked.json, (json.dumps(made._asdict(), indent=2) + "\n").encode())
    return made


def _plan(asked: PlanOptions, job: Job, found: dict[str, Any]) -> Plan:
    chip, chips, memory = Chip(**found["chip"]), found["chips"], found["memory"]
    limit = _limit(asked, found)
    bounds, sent = None, found.get("collectives")
    if sent is not None:
        bounds = roofline(chip, chips, flops=found["flops"], moved=found["bytes"], sent=sent)
    flops, seconds = found.get("flops"), None if bounds is None else bounds.seconds
    return Plan(
        command=asked.command,
        topology=asked.topology,
        mesh=",".join(f"{name}={size}" for name, size in found["mesh"].items()),
        chip=chip.name,
        chips=chips,
        memory={
            **{f"{name}_bytes": int(memory[name]) for name in memory},
            "chip_bytes": int(limit),
            "fits": bool(memory["peak"] <= limit) and flops is not None,
        },
        flops_per_step=None if flops is None else flops * chips,
        flops_per_chip=flops,
        bytes_per_chip=found.get("bytes"),
        collective_bytes=None if sent is None else sum(one["bytes"] for one in sent.values()),
        collectives=sent,
        roofline_seconds=None if bounds is None else bounds._asdict(),
        bound_by=None if bounds is None else bounds.bound_by,
        rates_timed_here=chip.measured,
        seconds_per_step=seconds,
        steps=job.options.steps,
        chip_hours=None if seconds is None else job.options.steps * seconds * chips / 3600,
        compile_seconds=round(found["compile_seconds"], 1),
        uncounted=list(found.get("uncounted", ())),
        suggestion=None,
        versions=found["versions"],
    )


def _limit(asked: PlanOptions, found: dict[str, Any]) -> float:
    given = asked.chip_memory
    return found["chip"]["memory"] if given is None else given * 1e9


# ---- what would fit


def _changes(job: Job, chips: int) -> Iterator[tuple[str, Job]]:
    """What may make a step fit, those that leave its result as it is first."""
    options = job.options
    if not options.remat:
        yield "--remat", job._replace(options=dataclasses.replace(options, remat=True))
    rows = options.batch_size, options.forget_batch_size
    if not options.mesh:
        # Parameters over as few chips as will do: what is sent grows with them.
        for fsdp in (2**power for power in range(1, chips.bit_length())):
            if chips % fsdp == 0:
                mesh = f"fsdp={fsdp}"
                yield (
                    f"--mesh {mesh}",
                    job._replace(options=dataclasses.replace(options, mesh=mesh)),
                )
    for topology in larger(job.topology):
        if not any(size % (topology.devices or 1) for size in rows):
            yield f"--topology {topology.text}", job._replace(topology=topology)
    smaller = options
    while all(size % (2 * chips) == 0 for size in (smaller.batch_size, smaller.forget_batch_size)):
        smaller = dataclasses.replace(
            smaller,
            batch_size=smaller.batch_size // 2,
            forget_batch_size=smaller.forget_batch_size // 2,
        )
        said = f"--batch-size {smaller.batch_size} --forget-batch-size {smaller.forget_batch_size}"
        yield said, job._replace(options=smaller)
    if options.train == "full":
        for train in ("cross-attention", "lora:8"):
            yield (
                f"--train {train}",
                job._replace(options=dataclasses.replace(options, train=train)),
            )


def _suggest(
    asked: PlanOptions, job: Job, found: dict[str, Any], compiled: Compile
) -> dict[str, Any] | None:
    """The first change that fits: compiled where that is cheap, else by adding arguments up.

    Whatever has arguments that do not fit is not compiled.
    """
    cheap = found["compile_seconds"] <= CHEAP
    before, tried = found["memory"], []
    rows = _rows_a_chip(job, found["chips"])
    for said, changed in _changes(job, found["chips"]):
        try:
            added = compiled(changed._replace(shapes_only=True))
        except ValueError:
            # A change that this model does not take, such as a part that it does not have.
            continue
        limit = _limit(asked, added)
        if added["arguments"] > limit:
            continue
        if cheap:
            after = compiled(changed)
            peak, fits = after["memory"]["peak"], "flops" in after
        elif changed.options.remat != job.options.remat:
            # What is stored for the backward pass, only a compiler knows.
            continue
        else:
            scale = _rows_a_chip(changed, added["chips"]) / rows
            peak, fits = added["arguments"] + scale * before["temporaries"], True
        tried.append(said)
        if fits and peak <= limit:
            how = "compiled" if cheap else "arithmetic"
            return {"change": said, "peak_bytes": int(peak), "by": how, "tried": tried}
    return None


def _rows_a_chip(job: Job, chips: int) -> float:
    return (job.options.batch_size + job.options.forget_batch_size) / chips


# ---- the child


def _in_child(job: Job, progress: bool) -> dict[str, Any]:
    """`worker.compile_job` in a process that has started no backend yet.

    Raises:
      ValueError: as that does.
      NotPlanned: if the process died, with the last that it said.
    """
    command = [sys.executable, "-m", "jax_unlearn.app.plan.worker"]
    what = "adding up" if job.shapes_only else "compiling"
    started = time.monotonic()
    with (
        subprocess.Popen(
            command,
            env=_environment(job.topology),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child,
        tqdm(
            desc=f"{what} for {job.topology.text}",
            bar_format="{desc} ... {elapsed}",
            disable=not progress or not sys.stderr.isatty(),
        ) as bar,
    ):
        if progress and bar.disable and not job.shapes_only:
            say(f"compiling for {job.topology.text} ...")
        try:
            given: bytes | None = pickle.dumps(job)
            while True:
                try:
                    answer, said = child.communicate(given, timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    given = None
                    bar.refresh()
        finally:
            # Nothing is left behind by a signal.
            child.kill()
    if child.returncode:
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
        how = f"status {child.returncode}"
        if child.returncode < 0:
            how = f"signal {-child.returncode} (this machine may lack the memory to compile in)"
        last = f" It last said: {lines[-1].strip()}" if lines else ""
        minutes = (time.monotonic() - started) / 60
        raise NotPlanned(f"{what} ended after {minutes:.1f} minutes with {how}.{last}")
    found = json.loads(answer)
    if "refused" in found:
        raise ValueError(found["refused"])
    return found


def _environment(topology: Topology) -> dict[str, str]:
    """That of the child: the same packages, and the platform that it plans on."""
    given = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if topology.is_tpu or topology.kind == "cpu":
        given["JAX_PLATFORMS"] = "cpu"
        flags = given.pop("XLA_FLAGS", "")
        if topology.kind == "cpu":
            # JAX takes the number of devices from one place alone.
            count = r"--xla_force_host_platform_device_count=\S*"
            given["XLA_FLAGS"] = re.sub(count, "", flags).strip()
    if topology.is_tpu:
        given |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return given


# ---- the table


def table(made: Plan) -> str:
    """A plan as it is printed."""
    memory, limit = made.memory, made.memory["chip_bytes"]
    rows = [
        ("devices", f"{made.chips} × {made.chip}, {made.mesh}"),
        ("memory a chip", ""),
        ("  arguments", _size(memory["arguments_bytes"])),
        ("  temporaries", _size(memory["temporaries_bytes"])),
        ("  outputs, not aliased", _size(memory["outputs_bytes"])),
    ]
    if memory["constants_bytes"] >= 1e6:
        rows.append(("  constants", _size(memory["constants_bytes"])))
    share = f"{memory['peak_bytes'] / limit:.0%} of {_size(limit)}"
    rows.append(("  peak", f"{_size(memory['peak_bytes'])}, {share}"))
    sent, bounds = made.collectives, made.roofline_seconds
    if sent is not None and bounds is not None:
        assert made.flops_per_chip is not None
        assert made.bytes_per_chip is not None
        rows += [
            ("flops a step and chip", f"{made.flops_per_chip:.3g}"),
            ("bytes moved", _size(made.bytes_per_chip)),
            *(
                (f"{kind}", f"{one['count']:,.0f} of {_size(one['bytes'])} in all")
                for kind, one in sent.items()
            ),
            (
                "least seconds a step",
                ", ".join(f"{name} {value:.2g}" for name, value in bounds.items()),
            ),
            ("bound by", f"{made.bound_by}: {made.seconds_per_step:.3g} s a step or more"),
            ("the whole command", f"{made.steps} steps: {made.chip_hours:.3g} chip-hours or more"),
        ]
    rows.append(("compiled in", f"{made.compile_seconds:.0f} s"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
    return "\n".join([*lines, "", *_remarks(made)])


def _remarks(made: Plan) -> list[str]:
    suggestion = made.suggestion
    if made.memory["fits"]:
        found = ["It fits."]
    elif suggestion is None:
        found = ["It does not fit, and none of the changes that were tried does."]
    else:
        by = "compiled" if suggestion["by"] == "compiled" else "by adding up, not compiled"
        found = [
            f"It does not fit. The nearest change that does: {suggestion['change']} "
            f"({_size(suggestion['peak_bytes'])} a chip; {by})."
        ]
    if made.seconds_per_step is not None:
        rates = "rates timed on this machine" if made.rates_timed_here else "peak rates"
        found.append(
            f"Times are a lower bound, of {rates}. Not in them: measuring and drawing before and "
            f"after, compiling, checkpoints."
        )
    if made.uncounted:
        found.append(f"Flops of {', '.join(made.uncounted)} are not known, and not counted.")
    return found


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
