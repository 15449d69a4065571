"""Compiles one step in a process of its own, for devices that this machine need not have.

It reads a pickled `Job` and writes json. The number of CPU devices, the platform and libtpu's
variables are settled when a process starts its first backend, and who asks may have one. JAX
is told that there are as many CPU devices as are planned for. So whatever asks for the number of
devices, or for a GPU that picks its own kernels, gets the answer of the planned machine.
"""

import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import sys
import time
from typing import Any, NamedTuple

from jax_unlearn.app.options import ModelOptions
from jax_unlearn.app.plan.chips import CHIPS, Chip, Topology, gpu_of

__all__ = ["Job", "compile_job", "main"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Job(NamedTuple):
    """A step to compile.

    Attributes:
      options: of the planned command.
      topology: the devices.
      shapes_only: only add the arguments up; nothing is compiled.
    """

    options: ModelOptions
    topology: Topology
    shapes_only: bool = False


def compile_job(job: Job) -> dict[str, Any]:
    """What the compiler says of a job, as json has it.

    Raises:
      ValueError: for options that the command would refuse, or devices that cannot be planned for.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    devices, chip = _devices(job.topology)

    from jax_unlearn import sharding
    from jax_unlearn.app.plan.hlo import cost_of
    from jax_unlearn.app.plan.without_weights import step_of

    mesh = sharding.device_mesh(**sharding.parse_mesh(job.options.mesh), devices=devices)
    ways = sharding.batch_ways(mesh)
    step = step_of(job.options, ways)
    key, state, reference, brought = step.arguments
    like = state, reference
    parts_of = jax.tree.map(_part, like, sharding.shardings(like, mesh))
    arguments = _bytes((key, parts_of)) + _bytes(brought) / ways
    names = ("jax", "libtpu") if job.topology.is_tpu else ("jax",)
    versions = {name: importlib.metadata.version(name) for name in names}
    found: dict[str, Any] = {"chip": chip._asdict(), "chips": len(devices), "versions": versions}
    found["mesh"] = dict(mesh.shape)
    if job.shapes_only:
        return found | {"arguments": arguments}
    traced = sharding.jit_step(step.function, mesh, like=like).trace(*step.arguments)
    constants = sum(getattr(one, "nbytes", 0) for one in traced.jaxpr.consts)
    lowered = traced.lower()
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except Exception as error:
        used = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        # The compiler gives no program that does not fit, but says how much it would need.
        peak = float(used[1]) * _UNITS[used[2]]
        memory = {"arguments": arguments, "temporaries": max(peak - arguments, 0), "outputs": 0}
        memory |= {"constants": constants, "peak": peak}
        return found | {"memory": memory, "compile_seconds": time.monotonic() - started}
    seconds = time.monotonic() - started
    said: Any = compiled.memory_analysis()
    cost = cost_of(compiled.as_text(), rare_share=step.dual_share or 1.0)
    parts = {
        "arguments": said.argument_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "outputs": said.output_size_in_bytes - said.alias_size_in_bytes,
        "constants": constants,
    }
    # On a TPU temporaries take each other's place, and that of arguments; the peak that is told for
    # CPUs leaves them out.
    told = said.peak_memory_in_bytes + constants if job.topology.is_tpu else sum(parts.values())
    return found | {
        "memory": parts | {"peak": told},
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collectives": {kind: one._asdict() for kind, one in sorted(cost.transfers.items())},
        "uncounted": cost.uncounted,
        "compile_seconds": seconds,
    }


def _devices(topology: Topology) -> tuple[list[Any], Chip]:
    """The devices to compile for, and what one of them is."""
    import jax

    if topology.is_tpu:
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                "planning for a TPU needs its compiler, libtpu: "
                'pip install "jax_unlearn[tpu-plan]".'
            )
        from jax.experimental.topologies import get_topology_desc

        try:
            found = get_topology_desc(topology.text, "tpu").devices
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"--topology {topology.text}: libtpu says: {reason}") from error
        jax.config.update("jax_num_cpu_devices", len(found))
        return list(found), CHIPS[topology.kind]
    if topology.kind == "cpu":
        assert topology.devices is not None
        jax.config.update("jax_num_cpu_devices", topology.devices)
    try:
        devices = jax.devices("gpu" if topology.kind == "gpu" else None)
    except RuntimeError as error:
        raise ValueError(f"--topology {topology.text}: JAX finds no GPU here.") from error
    return devices, _chip_here(devices)


def _chip_here(devices: list[Any]) -> Chip:
    """One of this machine's devices: its memory, and the rates that are known or timed."""
    from jax_unlearn.models.memory import machine_memory

    one = devices[0]
    if one.platform == "cpu":
        shared = len(devices)
        flops, bandwidth = _timed()
        rates = flops / shared, bandwidth / shared, bandwidth / shared
        return Chip(f"1/{shared} of this CPU", machine_memory() // shared, *rates, measured=True)
    kind = one.device_kind
    stats = one.memory_stats() or {}
    listed = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    known = gpu_of(kind) if one.platform == "gpu" else CHIPS.get(listed.get(kind, ""))
    if known is None:
        flops, bandwidth = _timed()
        known = Chip(kind, machine_memory(), flops, bandwidth, bandwidth, measured=True)
    # JAX takes a part of a GPU's memory, and a run has no more.
    return known._replace(name=kind, memory=float(stats.get("bytes_limit", known.memory)))


def _timed() -> tuple[float, float]:
    """Flops and bytes a second of the first device: the best of a few products and copies."""
    import jax
    import jax.numpy as jnp

    side, length = 1024, 2**25
    square, long = jnp.ones((side, side)), jnp.ones(length)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)

    def best(function: Any, argument: Any) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(function(argument))
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return 2 * side**3 / best(product, square), 8 * length / best(copy, long)


def _part(leaf: Any, sharding: Any) -> Any:
    """The shape of what one device has of an array."""
    import jax

    return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def _bytes(tree: Any) -> float:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Answers the job on standard input by json; a mistake in it as {"refused": the line}."""
    # Whatever else prints goes to standard error.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = pickle.load(sys.stdin.buffer)
    try:
        found = compile_job(job)
    except ValueError as error:
        found = {"refused": str(error)}
    json.dump(found, answer)
    answer.close()


if __name__ == "__main__":
    main()
