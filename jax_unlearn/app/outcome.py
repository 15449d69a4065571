"""What a finished run says: the contents of report.json."""

import pathlib
from typing import Any

import jax
import numpy as np

from jax_unlearn.app.identity import versions
from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.run_file import plain_options
from jax_unlearn.app.tasks.base import Measured, Task, estimate
from jax_unlearn.duality import Floor
from jax_unlearn.pretrained import PretrainedConfig
from jax_unlearn.pretrained.hub import license_of
from jax_unlearn.primal_dual import Certificate
from jax_unlearn.typing import Estimate

__all__ = ["certified_parts", "describe", "device", "metrics_of"]


def describe(
    task: Task,
    options: RunOptions,
    command: str,
    after: Measured,
    certified: Certificate,
    floor: Floor | None,
    mean_multipliers: np.ndarray,
    timing: dict[str, float],
) -> dict[str, Any]:
    """The contents of report.json, but for what the page adds.

    Args:
      task: what was to be done, and the measurements of the reference model.
      options: of the run.
      command: that repeats it.
      after: measurements of the unlearned model.
      certified: the certificate.
      floor: the dual value under it, in the objective's unit.
      mean_multipliers: over the steps, [m].
      timing: seconds by part; "all" of them, those before a resume included.
    """
    method = {} if task.baseline is None else {"method": task.baseline.about}
    saved, folder = plain_options(options), task.pretrained.config.folder
    return {
        "asked": {
            "command": f"jax-unlearn {command} --config {options.out / 'run.json'} --out NEW",
            "model": task.pretrained.config.name or task.pretrained.config.source,
            "commit": task.pretrained.config.commit,
            "pipeline_tag": _pipeline_tag(task.pretrained.config),
            "license": license_of(pathlib.Path(folder)) if folder else {},
            **task.asked,
            "thresholds": ", ".join(saved["threshold"]),
            "options": {
                name: ", ".join(value) if isinstance(value, list) else value
                for name, value in saved.items()
            },
        },
        "formulation": task.problem.name,
        "formula": task.formula,
        **method,
        **certified_parts(task, certified, floor, mean_multipliers),
        "complementary_slackness": float(np.abs(certified.complementary_slackness).max())
        if _weighed(task)
        else None,
        "metrics": metrics_of(task, after),
        "steps": options.steps,
        "seconds": round(timing["all"], 2),
        "timing": {name: round(value, 2) for name, value in timing.items() if name != "all"},
        "seed": options.seed,
        "device": device(),
        "versions": versions(),
    }


def metrics_of(task: Task, after: Measured) -> dict[str, Any]:
    """What a report says of a model but for its certificate, before and after: plain values.

    Args:
      task: with the measurements of the reference.
      after: measurements of the model.
    """
    before = task.before
    metrics: dict[str, Any] = {
        name: task.captions.get(name, {})
        | {"before": _plain(before.metrics.get(name)), "after": _plain(value)}
        for name, value in after.metrics.items()
    }
    for name, parts in after.paired.items():
        metrics[name] = dict(task.captions.get(name, {}))
        for part, values in parts.items():
            first = before.paired[name][part]
            metrics[name][part] = {
                "before": _plain(estimate(first)),
                "after": _plain(estimate(values)),
                "change": _plain(estimate(values - first)),
            }
    return metrics


def certified_parts(
    task: Task, certified: Certificate, floor: Floor | None, mean_multipliers: np.ndarray
) -> dict[str, Any]:
    """Objective, floor and gap, constraints, and whether these hold: plain values.

    Args:
      task: what was to be done.
      certified: the certificate.
      floor: the dual value under it, in the objective's unit.
      mean_multipliers: over the steps, [m].
    """
    weighed = _weighed(task)
    return {
        "objective": {
            **_plain(certified.objective),
            "unit": task.units[0],
            "description": task.objective,
        },
        **_gap(certified, floor, task.units[0]),
        "constraints": [
            {
                "name": name,
                "value": float(certified.values.value[i]),
                "stderr": float(certified.values.stderr[i]),
                "unit": task.units[1],
                "threshold": float(certified.thresholds[i]),
                "reference_value": float(task.reference_values[i]),
                "slack": -float(certified.violations[i]),
                "multiplier": float(certified.multipliers[i]) if weighed else None,
                "mean_multiplier": float(mean_multipliers[i]) if weighed else None,
                "satisfied": bool(certified.satisfied[i]),
            }
            for i, name in enumerate(task.names)
        ],
        "feasible": bool(certified.feasible),
    }


def _weighed(task: Task) -> bool:
    """Whether constraints have a price: a baseline's own loss weighs none."""
    return task.baseline is None or task.baseline.about["multipliers"]


def _pipeline_tag(config: PretrainedConfig) -> str | None:
    """The hub's name for what a model does; None where it has none, as for labels."""
    if config.text_conditional:
        return "text-to-image"
    return None if config.num_labels else "unconditional-image-generation"


def device() -> str:
    """How many devices of which kind compute."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def _gap(certified: Certificate, floor: Floor | None, unit: str) -> dict[str, Any]:
    """The floor under the objective and the gap to it, where there is a floor."""
    if floor is None or certified.gap is None:
        return {}
    beside = {"unit": unit, "effective": floor.effective}
    bound = {} if floor.lower is None else {"lower": floor.lower}
    return {
        "floor": {"value": floor.value, "stderr": floor.stderr, **bound, **beside},
        "gap": {**_plain(certified.gap), **beside},
    }


def _plain(value: Any) -> Any:
    """Estimates as {"value", "stderr"}, at any depth."""
    if isinstance(value, Estimate):
        return {"value": float(value.value), "stderr": float(value.stderr)}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value
