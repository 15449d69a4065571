"""The options of `sweep` itself."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import tyro

from jax_unlearn.app import methods
from jax_unlearn.app.checks import check_numbers, parse_threshold
from jax_unlearn.app.options import ModelOptions

__all__ = ["Point", "SweepOptions"]

# Of one run: where to lay it out, what to write beside it, and other numbers from a step on.
_OF_ONE = ("go_on", "tensorboard", "push_to_hub", "coordinator")
_FLAGS = {"go_on": "--continue"}


class Point(NamedTuple):
    """What a problem of a sweep has of its own.

    Attributes:
      threshold: as --threshold takes it; None for that of the command.
      strength: of a baseline; None for a method without one.
      seed: of its training.
    """

    threshold: str | None
    strength: float | None
    seed: int

    @property
    def swept(self) -> str | float | None:
        """The threshold or the strength; None where only seeds differ."""
        return self.strength if self.threshold is None else self.threshold

    @property
    def name(self) -> str:
        """For tables and folders."""
        parts = [f"threshold-{self.threshold}" if self.threshold is not None else ""]
        parts += [f"strength-{self.strength}" if self.strength is not None else ""]
        return "-".join([*filter(None, parts), f"seed-{self.seed}"])


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Runs a command at many thresholds or strengths: jax-unlearn sweep COMMAND, then its options.

    The reference is measured once, and all problems train in one compiled program. What each ends
    with is measured on the same images and noise. OUT has the numbers, fronts.json, and a figure.
    """

    command: tyro.conf.Positional[Literal["concept", "data"]] = "concept"
    """The command that is swept; its options follow, as they are given to it."""
    thresholds: tuple[str, ...] = ()
    """Thresholds, one after the other, each for all constraints of a problem and as --threshold
    takes it: all numbers, or all ratios, or "calibrated" alone."""
    strengths: tuple[float, ...] = ()
    """Strengths of a --method that has one, in place of thresholds."""
    seeds: tuple[int, ...] = ()
    """Seeds of what trains: batches and noise. Default: the command's --seed, which stays the seed
    of all that is measured, and of samples that are stored."""
    at_once: int = 1
    """Problems of a device that are computed together; 1 is fastest on CPUs, more fill an
    accelerator. A divisor of their number. Not saved."""
    reference_point: tuple[float, ...] = ()
    """Corner of the hypervolumes: a value of what is forgotten and one of the objective. Default:
    what the reference itself has forgotten, and the largest objective of the sweep. Fronts are
    compared at one point."""
    keep_models: bool = False
    """Save the model of each problem, in OUT/models, as --save says."""

    def validate(self) -> None:
        """Checks what can be checked before the command's own options are read.

        Raises:
          ValueError: naming the option.
        """
        if self.thresholds and self.strengths:
            raise ValueError(
                "--thresholds are of constraints and --strengths of a --method: sweep one of them."
            )
        asked = [parse_threshold(text) for text in self.thresholds]
        for name, values in (
            ("thresholds", asked), ("strengths", self.strengths), ("seeds", self.seeds)
        ):  # fmt: skip
            for place, value in enumerate(values):
                if value in values[:place]:
                    raise ValueError(f"--{name}: {getattr(self, name)[place]} is given twice.")
        if len({one.kind for one in asked}) > 1:
            raise ValueError(
                "--thresholds are all numbers, all ratios such as 0.5x, or calibrated alone, not "
                f"{' '.join(self.thresholds)}."
            )
        for seed in self.seeds:
            check_numbers(Point(None, None, seed))
        if self.at_once < 1:
            raise ValueError(f"--at-once must be 1 or more, not {self.at_once}.")
        if len(self.reference_point) not in (0, 2) or not all(
            map(math.isfinite, self.reference_point)
        ):
            raise ValueError(
                "--reference-point takes two finite numbers: a value of what is forgotten, and one "
                "of the objective."
            )

    def applied(self, options: ModelOptions) -> ModelOptions:
        """The command's options with the first point of the sweep.

        Raises:
          ValueError: for a command that cannot be swept so.
        """
        for name in _OF_ONE:
            if getattr(options, name):
                given = _FLAGS.get(name, f"--{name.replace('_', '-')}")
                raise ValueError(f"{given} is of one run: leave it out of a sweep.")
        if options.parallel != "jit":
            raise ValueError(
                "--parallel pmap is of one run: a sweep spreads problems over devices."
            )
        method = getattr(options, "method", methods.CONSTRAINED)
        weighed = method != methods.CONSTRAINED and methods.METHODS[method].default is not None
        if method == methods.CONSTRAINED:
            if self.strengths:
                raise ValueError("--strengths are of a --method: constraints have --thresholds.")
            if not self.thresholds:
                raise ValueError("--thresholds is missing: see jax-unlearn sweep --help.")
        elif self.thresholds:
            raise ValueError(
                f"--thresholds are of constraints, which --method {method} does not see: sweep its "
                "--strengths."
            )
        elif weighed and not self.strengths:
            raise ValueError(f"--strengths is missing: --method {method} has one.")
        every = [_with(options, point) for point in self.points(options)]
        for one in every:
            one.validate()
        return dataclasses.replace(every[0], seed=options.seed)

    def points(self, options: ModelOptions) -> list[Point]:
        """All problems: the seeds of each threshold or strength one after the other."""
        seeds = self.seeds or (options.seed,)
        if self.thresholds:
            return [Point(text, None, seed) for text in self.thresholds for seed in seeds]
        strengths: tuple[float | None, ...] = self.strengths or (None,)
        return [Point(None, strength, seed) for strength in strengths for seed in seeds]


def _with(options: ModelOptions, point: Point) -> ModelOptions:
    """The command's options at a point."""
    changed: dict[str, Any] = {"strength": point.strength, "seed": point.seed}
    if point.threshold is not None:
        changed["threshold"] = (point.threshold,)
    return dataclasses.replace(options, **changed)
