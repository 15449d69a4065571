"""What a sweep found: its problems, their fronts and hypervolumes, and the floor under them."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_unlearn import metrics
from jax_unlearn.app.checks import parse_threshold
from jax_unlearn.app.files import replace_file
from jax_unlearn.app.options import ModelOptions
from jax_unlearn.app.report.folder import finite
from jax_unlearn.app.sweep.figure import draw_fronts
from jax_unlearn.app.sweep.options import Point, SweepOptions
from jax_unlearn.app.tasks.base import Task
from jax_unlearn.typing import Estimate

__all__ = ["describe", "table", "write_fronts"]

LEVEL = 0.95


def describe(
    points: Sequence[Point],
    tasks: Sequence[Task],
    found: Sequence[Mapping[str, Any]],
    asked: SweepOptions,
    options: ModelOptions,
) -> dict[str, Any]:
    """What fronts.json says of the problems.

    Args:
      points: the problems.
      tasks: of each.
      found: measured of each, or why it was "lost".
      asked: the sweep.
      options: of its command.
    """
    first, many = tasks[0], len(tasks[0].names) > 1
    problems = []
    for point, task, one in zip(points, tasks, found, strict=True):
        unit = _unit(point, task, options)
        own: dict[str, Any] = {
            "name": point.name,
            "threshold": point.threshold,
            "strength": point.strength,
            "seed": point.seed,
        }
        if "lost" not in one:
            values = [Estimate(c["value"], c["stderr"]) for c in one["constraints"]]
            own["forgotten"] = _worst(task, values, unit)._asdict()
        problems.append(own | dict(one))
    before = first.before.constraints
    at_reference = _worst(
        first,
        [Estimate(*pair) for pair in zip(before.value, before.stderr, strict=True)],
        _unit(points[0], first, options),
    )
    measured = [one for one in problems if "lost" not in one]
    sign = _sign(first)
    for one in measured:
        beside = [other for other in measured if other["seed"] == one["seed"]]
        one["dominated"] = not _front(beside, sign)[beside.index(one)]
    return {
        "kind": "sweep",
        "command": f"sweep {asked.command}",
        "method": None if first.baseline is None else first.baseline.about,
        "formulation": first.problem.name,
        "formula": first.formula,
        "axes": {
            "forgotten": {
                "unit": f"times {_unit_name(points[0], options)}" if many else first.units[1],
                "description": "the constraint's value"
                if not many
                else "of the constraints' values, each over its own unit, the one that is least "
                "forgotten",
                "more_is": "larger" if sign > 0 else "smaller",
            },
            "objective": {"unit": first.units[0], "description": first.objective},
        },
        "reference": {
            "forgotten": at_reference._asdict(),
            "objective": {
                "value": float(first.before.objective.value),
                "stderr": float(first.before.objective.stderr),
            },
        },
        "problems": problems,
        "curve": _curve(points, measured, sign),
        "floor": _floors(points, tasks, found, options),
        "hypervolume": _hypervolume(asked, measured, at_reference, sign),
        "seeds": "of what trains: batches and noise; all models are measured on the same images "
        f"and noise, those of --seed {options.seed}",
    }


def _sign(task: Task) -> float:
    """1 where a larger value is more forgotten, −1 where a smaller one is."""
    return float(np.ravel(np.asarray(task.problem.sign))[0])


def _texts(point: Point, options: ModelOptions) -> tuple[str, ...]:
    return (point.threshold,) if point.threshold is not None else options.threshold  # pyrefly: ignore


def _unit(point: Point, task: Task, options: ModelOptions) -> np.ndarray:
    """What the value of each constraint is counted in, [m].

    It makes one number of many constraints, such that all are met where the worst is: what a ratio
    is of, or the threshold itself where it was calibrated. One constraint keeps its own unit.
    """
    texts, count = _texts(point, options), len(task.names)
    asked = parse_threshold(texts[0])
    if count == 1 or (len(texts) == 1 and asked.kind == "absolute"):
        return np.ones(count)
    if len(texts) == 1 and asked.number is not None:
        return np.asarray(task.thresholds) / asked.number
    return np.asarray(task.thresholds)


def _unit_name(point: Point, options: ModelOptions) -> str:
    texts = _texts(point, options)
    kind = parse_threshold(texts[0]).kind if len(texts) == 1 else ""
    return {"absolute": "1", "relative": "the reference's own value"}.get(kind, "the threshold")


def _worst(task: Task, values: Sequence[Estimate], unit: np.ndarray) -> Estimate:
    """The least forgotten constraint's value, in its unit."""
    scaled = [
        Estimate(float(one.value / size), float(one.stderr / size))
        for one, size in zip(values, unit, strict=True)
    ]
    sign = _sign(task)
    return min(scaled, key=lambda one: sign * one.value)


def _costs(measured: Sequence[Mapping[str, Any]], sign: float) -> np.ndarray:
    costs = [[-sign * one["forgotten"]["value"], one["objective"]["value"]] for one in measured]
    return np.asarray(costs, np.float64)


def _front(measured: Sequence[Mapping[str, Any]], sign: float) -> list[bool]:
    return metrics.pareto_front(_costs(measured, sign)).tolist()


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    found = metrics.mean_interval(np.asarray(values), LEVEL)
    one = found.count == 1
    return {
        "value": found.value,
        "low": None if one else found.low,
        "high": None if one else found.high,
    }


def _curve(
    points: Sequence[Point], measured: Sequence[Mapping[str, Any]], sign: float
) -> list[dict[str, Any]]:
    """Means over seeds at each threshold or strength, with Student's intervals."""
    curve = []
    for swept in dict.fromkeys(point.swept for point in points):
        own = [one for one in measured if swept in (one["threshold"], one["strength"])]
        if own:
            curve.append(
                {
                    "swept": swept,
                    "seeds": len(own),
                    "feasible": sum(one["feasible"] for one in own),
                    **{
                        axis: _interval([one[axis]["value"] for one in own])
                        for axis in ("forgotten", "objective")
                    },
                }
            )
    for one, best in zip(curve, _front(curve, sign), strict=True):
        one["dominated"] = not best
    return curve


def _floors(
    points: Sequence[Point],
    tasks: Sequence[Task],
    found: Sequence[Mapping[str, Any]],
    options: ModelOptions,
) -> list[dict[str, Any]]:
    """What no model that has forgotten as much as each threshold asks can pay less than."""
    floors = {}
    for point, task, one in zip(points, tasks, found, strict=True):
        if one.get("floor") is not None:
            asked = [Estimate(b, 0.0) for b in task.thresholds]
            place = _worst(task, asked, _unit(point, task, options)).value
            floors[place] = {"forgotten": place, "threshold": point.threshold, **one["floor"]}
    return [floors[place] for place in sorted(floors)]


def _hypervolume(
    asked: SweepOptions, measured: Sequence[Mapping[str, Any]], reference: Estimate, sign: float
) -> dict[str, Any] | None:
    """Of the front of each seed, and their mean with Student's interval."""
    if not measured:
        return None
    largest = max(one["objective"]["value"] for one in measured)
    forgotten, objective = asked.reference_point or (reference.value, largest)
    by_seed = {
        seed: metrics.hypervolume(
            _costs([one for one in measured if one["seed"] == seed], sign),
            np.array([-sign * forgotten, objective]),
        )
        for seed in dict.fromkeys(one["seed"] for one in measured)
    }
    return {
        **_interval([*by_seed.values()]),
        "level": LEVEL,
        "interval": "Student's t over the hypervolumes of the seeds",
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
        "reference_point": {"forgotten": forgotten, "objective": objective},
        "chosen": "before" if asked.reference_point else "from these problems",
    }


def write_fronts(out: pathlib.Path, fronts: Mapping[str, Any]) -> None:
    """Writes fronts.png and fronts.json, the latter last."""
    if (picture := draw_fronts(fronts)) is not None:
        replace_file(out / "fronts.png", picture)
    text = json.dumps(finite(fronts), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(out / "fronts.json", text.encode() + b"\n")


def table(fronts: Mapping[str, Any]) -> str:
    """The curve as it is printed, and the hypervolume."""
    rows = [("", "forgotten", "objective", "feasible", "")]
    for one in fronts["curve"]:
        swept = "" if one["swept"] is None else f"{one['swept']}"
        rows.append(
            (
                swept,
                _shown(one["forgotten"]),
                _shown(one["objective"]),
                f"{one['feasible']} of {one['seeds']}",
                "dominated" if one["dominated"] else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)) for row in rows]
    lost = [f"{one['name']}: {one['lost']}" for one in fronts["problems"] if "lost" in one]
    volume = fronts["hypervolume"]
    if volume is not None:
        at = volume["reference_point"]
        lines.append(
            f"hypervolume {_shown(volume)} up to ({at['forgotten']:.3g}, {at['objective']:.3g}), "
            f"chosen {volume['chosen']}"
        )
    return "\n".join(line.rstrip() for line in [*lines, *lost])


def _shown(interval: Mapping[str, Any]) -> str:
    value = f"{interval['value']:.4g}"
    if interval["low"] is None:
        return value
    return f"{value} ({interval['low']:.3g} to {interval['high']:.3g})"
