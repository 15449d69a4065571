"""Checkpoints of a whole run with Orbax: what is needed to go on bit for bit."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from jax_unlearn.app import processes
from jax_unlearn.app.identity import digest_of, leaf_digests, leaf_kinds
from jax_unlearn.pretrained.quiet import quiet_orbax
from jax_unlearn.primal_dual import PrimalDualState

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder of asynchronous checkpoints of (state, record).

    The state holds parameters, optimizer, multipliers, thresholds and the step. Batches and PRNG
    keys are pure functions of the seed and the step. The record is what the caller says of the
    state, with a digest of each of its leaves. A checkpoint is written beside and renamed when
    complete: a run that is killed while writing goes on from the one before.

    Attributes:
      passed_over: the checkpoints that are not whole, and why.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2) -> None:
        """Opens the folder, or makes it.

        Raises:
          ValueError: if it is no folder, or cannot be opened.
        """
        self._folder = folder.absolute()
        self.passed_over: list[str] = []
        self._moved: dict[pathlib.Path, pathlib.Path] = {}
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{folder} is not a folder of checkpoints.")
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name.isdigit() and not path.is_dir():
                    self._set_aside(path, "it is not a folder")
        quiet_orbax()
        processes.wait("the folder of checkpoints is looked through")
        try:
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, enable_async_checkpointing=True
                ),
            )
        except Exception as error:  # Orbax raises whatever it trips over in a damaged folder.
            raise ValueError(f"{folder} cannot be opened: {_first_line(error)}") from error

    @property
    def latest(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: PrimalDualState, record: Mapping[str, Any]) -> None:
        """Starts to save under the state's step; the arrays are copied before this returns."""
        step = int(state.step)
        if step == self.latest:
            return
        tree = state._asdict()
        content = {**record, "step": step, "kinds": leaf_kinds(tree), "leaves": leaf_digests(tree)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave({"content": content, "digest": digest_of(content)}),
            ),
        )

    def restore(
        self,
        like: PrimalDualState,
        beside: Callable[[Mapping[str, Any]], str | None] = lambda record: None,
    ) -> tuple[PrimalDualState, dict[str, Any]] | None:
        """Reads the last whole checkpoint into the shapes, types and devices of `like`.

        Later ones that are damaged are moved to `damaged_checkpoints` beside the folder.

        Args:
          like: a state.
          beside: record -> what is wrong with a file beside the checkpoints that it counts on,
            or None; a ValueError that it raises is raised.

        Returns:
          The state and the record; None if there is no checkpoint.

        Raises:
          ValueError: if none is whole, or if it is of another network or problem.
        """
        tree = like._asdict()
        passed: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, record = self._read(step, tree, beside)
            except _Damaged as error:
                passed[step] = str(error)
                continue
            for other, reason in passed.items():
                self._set_aside(self._folder / str(other), reason)
            processes.wait("damaged checkpoints are set aside")
            self._manager.reload()
            return PrimalDualState(**state), record
        if passed or self.passed_over:
            for place, path in self._moved.items():  # A refusal changes nothing.
                place.rename(path)
                with contextlib.suppress(OSError):  # Others may lie there.
                    place.parent.rmdir()
            reasons = [*self.passed_over, *(f"step {n}: {why}" for n, why in passed.items())]
            raise ValueError(
                f"no checkpoint in {self._folder} is whole ({'; '.join(reasons)}). --overwrite "
                "moves this run aside and starts anew."
            )
        return None

    def _read(
        self,
        step: int,
        tree: dict[str, Any],
        beside: Callable[[Mapping[str, Any]], str | None],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        record = self._record(step)
        if record["kinds"] != leaf_kinds(tree):
            raise ValueError(
                f"the checkpoint in {self._folder} does not fit this run: it is of another network "
                "or problem."
            )
        if (problem := beside(record)) is not None:
            raise _Damaged(problem)
        return self._state(step, tree, record), record

    def _record(self, step: int) -> dict[str, Any]:
        try:
            stored = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )["record"]
            content, digest = stored["content"], stored["digest"]
        except Exception as error:  # Orbax raises whatever it trips over.
            raise _Damaged(f"its record cannot be read: {_first_line(error)}") from error
        if digest_of(content) != digest or content["step"] != step:
            raise _Damaged("its record is not the one that was saved")
        return content

    def _state(self, step: int, tree: dict[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        except Exception as error:
            raise _Damaged(f"its arrays cannot be read: {_first_line(error)}") from error
        found = leaf_digests(restored)
        wrong = [path for path, digest in record["leaves"].items() if found.get(path) != digest]
        if wrong:
            raise _Damaged(
                f"{len(wrong)} of {len(found)} arrays are not those that were saved ({wrong[0]})"
            )
        return restored

    def _set_aside(self, path: pathlib.Path, reason: str) -> None:
        self.passed_over.append(f"step {path.name}: {reason}")
        if not processes.is_main():
            return
        aside = self._folder.with_name("damaged_checkpoints")
        aside.mkdir(exist_ok=True)
        number = 1
        while (place := aside / f"{path.name}.{number}").exists():
            number += 1
        path.rename(place)
        self._moved[place] = path

    def drop_from(self, step: int) -> None:
        """Deletes the checkpoints of `step` and later: their states are ruined."""
        self.wait()
        for other in self._manager.all_steps():
            if other >= step:
                self._manager.delete(other)

    def wait(self) -> None:
        """Waits until everything that was started is on disk, and raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the manager's threads."""
        self._manager.close()


class _Damaged(Exception):
    """A checkpoint that is not whole, and why."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
