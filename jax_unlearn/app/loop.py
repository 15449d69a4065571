"""The loop of a run: steps, rows, checkpoints, and signals that stop it between two steps."""

import pathlib
import signal
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

from jax_unlearn.app import processes
from jax_unlearn.app.checkpoint import Checkpoints
from jax_unlearn.app.rows import RowLog, rows_digest
from jax_unlearn.app.stopping import Interrupted, StopSignals
from jax_unlearn.primal_dual import PrimalDualState
from jax_unlearn.typing import Array

__all__ = ["Loop", "restore", "train"]


class Loop(NamedTuple):
    """What the loop needs of the compiled step and of the run around it.

    Attributes:
      step: (state, placed batch) -> (state, info).
      batch: step -> the batch, where the compiled step takes it.
      record: what is done with the info of a step: (its number, info) -> None.
      checkpoints: of the run.
      log: its rows.
      digest: of its identity.
      stop: the signals that it was sent.
      again: the command that goes on with it.
      anyone: of many processes: whether one was told to stop.
    """

    step: Callable[[PrimalDualState, Any], Any]
    batch: Callable[[int], Any]
    record: Callable[[int, Any], None]
    checkpoints: Checkpoints
    log: RowLog
    digest: str
    stop: StopSignals
    again: str
    anyone: Callable[[bool], Array] | None = None


def train(
    loop: Loop, state: PrimalDualState, *, steps: int, every: int
) -> tuple[PrimalDualState, float]:
    """Runs the remaining steps; the final state and the seconds that the first step took.

    Args:
      loop: the run.
      state: to go on from.
      steps: of the whole run.
      every: steps between checkpoints.

    Raises:
      Interrupted: after a signal, once the state is saved.
    """
    first, started = int(state.step), time.monotonic()
    first_step = 0.0
    pending, asked, stopping = None, None, False
    for number in range(first + 1, steps + 1):
        batch = loop.batch(number - 1)
        if loop.anyone is not None:
            # Processes stop after the same step: one after that in which the first was told.
            stopping = asked is not None and bool(asked)
            asked = loop.anyone(bool(loop.stop.received))
        state, info = loop.step(state, batch)
        # The step before is logged while this one runs.
        if pending is not None:
            loop.record(*pending)
        pending = (number, info)
        if number == first + 1:
            jax.block_until_ready(info)
            first_step = time.monotonic() - started
        if loop.anyone is None:
            stopping = bool(loop.stop.received)
        if stopping or number % every == 0 or number == steps:
            loop.record(*pending)
            pending = None
            loop.log.sync()
            counted = {"rows": loop.log.count, "rows_digest": loop.log.digest}
            loop.checkpoints.save(state, {"identity": loop.digest, **counted})
        if stopping:
            loop.checkpoints.wait()
            raise Interrupted(
                f"stopped after step {number}; saved. Go on with: {loop.again}"
                if processes.is_main()
                else "",  # One process tells.
                next(iter(loop.stop.received), signal.SIGTERM),
            )
    return state, first_step


def restore(
    checkpoints: Checkpoints,
    out: pathlib.Path,
    state: PrimalDualState,
    *,
    known: Collection[str],
    steps: int,
    tell: Callable[[str], None],
) -> PrimalDualState | None:
    """The last whole state of a run; None if there is none.

    Args:
      checkpoints: of the run.
      out: its folder.
      state: of the shapes, types and devices that are wanted.
      known: digests of the identities that the run has had.
      steps: of the whole run.
      tell: says what was passed over.

    Raises:
      ValueError: if there is no whole one, or it is of another run.
    """
    path = out / "metrics.jsonl"

    def beside(record: Mapping[str, Any]) -> str | None:
        if record["identity"] not in known:
            raise ValueError(f"the checkpoints of {out} are not of the run in its run.json.")
        if rows_digest(path, record["rows"]) != record["rows_digest"]:
            return f"the first {record['rows']} rows of {path} are not those that it counts on"
        return None

    found = checkpoints.restore(state, beside)
    for passed in checkpoints.passed_over:
        tell(f"note: a checkpoint is damaged and was passed over: {passed}")
    if found is None:
        return None
    restored, _ = found
    done = int(restored.step)
    if done > steps:
        raise ValueError(f"--steps {steps} is below the {done} that are done.")
    tell(f"resuming after step {done}")
    return restored
