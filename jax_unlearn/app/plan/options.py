"""The options of `plan` itself."""

import dataclasses
import pathlib
from typing import Literal

import tyro

__all__ = ["PlanOptions"]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Says what a command will cost before it is run: jax-unlearn plan COMMAND, then its options.

    The command's real step is compiled, of shapes alone: no weights are read, and a TPU is planned
    for without one. Printed are memory a chip, flops, bytes and collectives, the time that these
    take at least, and whether it fits; if not, the nearest change that does.
    """

    command: tyro.conf.Positional[Literal["concept", "data"]] = "concept"
    """The command that is planned; its options follow, as they are given to it."""
    topology: str = "local"
    """What it is to run on: v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1 and their other
    shapes, cpu:8 (so many devices of this machine), gpu, or local: whatever JAX finds here."""
    chip_memory: float | None = None
    """GB a chip, in place of what is known of it."""
    json: pathlib.Path | None = None
    """File to write the numbers to."""

    def validate(self) -> None:
        """Checks what can be checked before the planned command is read.

        Raises:
          ValueError: naming the option.
        """
        from jax_unlearn.app.plan.chips import parse_topology

        parse_topology(self.topology)
        if self.chip_memory is not None and not 0 < self.chip_memory < 1e6:
            raise ValueError(
                f"--chip-memory must be GB, above 0 and below a million, not {self.chip_memory}."
            )
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ValueError(f"--json {self.json}: its folder is not there.")
