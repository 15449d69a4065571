"""Checkpoints of a whole run with Orbax: what is needed to go on bit for bit."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jax_unlearn.primal_dual import PrimalDualState

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder of asynchronous checkpoints of (state, host state).

    The state holds parameters, optimizer, multipliers, thresholds and the step. Batches and PRNG
    keys are pure functions of the seed and the step: these two integers are the data iterator and
    the key. A checkpoint is written beside and renamed when complete: a run that is killed
    while writing goes on from the one before.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2) -> None:
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    @property
    def latest(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: PrimalDualState, host: dict[str, Any]) -> None:
        """Starts to save under the state's step; the arrays are copied before this returns."""
        step = int(state.step)
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                host=ocp.args.JsonSave(host),
            ),
        )

    def restore(self, like: PrimalDualState) -> tuple[PrimalDualState, dict[str, Any]]:
        """Reads the last complete checkpoint into the shapes, types and devices of `like`.

        Raises:
          ValueError: if there is none, or if it is of another network or problem.
        """
        if self.latest is None:
            raise ValueError(f"no complete checkpoint in {self._manager.directory}.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        try:
            restored = self._manager.restore(
                self.latest,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint in {self._manager.directory} does not fit this run: {error}"
            ) from error
        return PrimalDualState(**restored["state"]), restored["host"]

    def wait(self) -> None:
        """Waits until everything that was started is on disk, and raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the manager's threads."""
        self._manager.close()
