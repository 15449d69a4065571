"""The rows of metrics.jsonl as scalars for TensorBoard, where tensorboardX is installed."""

import contextlib
import importlib
import importlib.util
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["check_tensorboard", "event_log", "scalars"]

_PARTS = ("values", "violations", "multipliers", "thresholds")
_APART = ("step", "seconds")


def check_tensorboard() -> None:
    """Refuses to write events where nothing can.

    Raises:
      ValueError: if tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "--tensorboard needs tensorboardX: pip install 'jax-unlearn[tensorboard]'."
        )


def scalars(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The numbers of a row by their tags, each constraint's under its name.

    What is not finite, which rows have as null, is left out.

    Args:
      row: of metrics.jsonl.
      names: of the constraints; one that comes again is told apart by its place.

    Example:
      >>> scalars({"step": 1, "objective": 0.5, "values": [2.0], "seconds": 3.0}, ["cat"])
      {'objective': 0.5, 'values/cat': 2.0}
    """
    distinct = [n if n not in names[:i] else f"{n} ({i + 1})" for i, n in enumerate(names)]
    found = {name: row[name] for name in row if name not in (*_PARTS, *_APART)}
    for part in _PARTS:
        if part in row:
            found |= {f"{part}/{n}": v for n, v in zip(distinct, row[part], strict=True)}
    return {tag: v for tag, v in found.items() if v is not None and math.isfinite(v)}


@contextlib.contextmanager
def event_log(
    folder: pathlib.Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A file of events that begins with the rows so far, and takes the place of older ones.

    A run that goes on from a checkpoint takes steps again: written anew, none is there twice.

    Args:
      folder: for the file; made if it is not there.
      names: of the constraints.
      rows: of metrics.jsonl so far.

    Yields:
      What to call with each further row.
    """
    # Only here: whoever does not ask for events need not have it.
    parts = ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
    writers, events, summaries = (importlib.import_module(f"tensorboardX.{p}") for p in parts)

    folder.mkdir(exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = writers.EventsWriter(str(folder / "events"))
    rows = list(rows)
    began = time.time() - (rows[-1]["seconds"] if rows else 0.0)

    def add(row: Mapping[str, Any]) -> None:
        found = scalars(row, names).items()
        values = [summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in found]
        summary = summaries.Summary(value=values)
        wall_time = began + row["seconds"]
        writer.write_event(events.Event(wall_time=wall_time, step=row["step"], summary=summary))
        writer.flush()

    with contextlib.closing(writer):
        for row in rows:
            add(row)
        yield add
