"""What a finished run says: the contents of report.json, and the pictures of the report."""

import dataclasses
import sys
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

import jax_unlearn
from jax_unlearn import report
from jax_unlearn.evaluation import Evaluation, Measured, estimate
from jax_unlearn.options import RunOptions
from jax_unlearn.primal_dual import Certificate
from jax_unlearn.problem import Problem
from jax_unlearn.typing import Estimate

__all__ = ["describe", "grids"]


def describe(
    problem: Problem,
    options: RunOptions,
    command: str,
    before: Measured,
    after: Measured,
    certified: Certificate,
    mean_multipliers: np.ndarray,
    timing: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """The contents of report.json, but for what the page adds.

    Args:
      problem: what was to be forgotten.
      options: of the run.
      command: that repeats it.
      before: measurements of the reference model.
      after: of the unlearned model, on the same images and noise.
      certified: the certificate.
      mean_multipliers: over the steps, [m].
      timing: seconds by part.
      seconds: all of them, those before a resume included.
    """
    dimensions = int(np.prod(problem.pretrained.config.sample_shape))
    simple = options.weighting == "simple"
    unit = "mean squared error a dimension" if simple else "nats an image"
    saved = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}

    def plain(one: Estimate) -> dict[str, float]:
        return {"value": float(one.value), "stderr": float(one.stderr)}

    def sides(name: str) -> dict[str, Any]:
        pair = {"before": before.metrics[name], "after": after.metrics[name]}
        return {
            side: plain(value) if isinstance(value, Estimate) else value
            for side, value in pair.items()
        }

    metrics = {name: sides(name) for name in before.metrics}
    metrics["nelbo"] = {
        "unit": "bits/dim",
        **{
            name: {
                "before": plain(estimate(before.nelbo[name])),
                "after": plain(estimate(after.nelbo[name])),
                "change": plain(estimate(after.nelbo[name] - before.nelbo[name])),
            }
            for name in before.nelbo
        },
    }
    if "agreement" in metrics:
        metrics["agreement"]["description"] = (
            "Share of the samples of each label that the judge names so; the forgotten labels "
            "should fall, the others should not."
        )
    constraints = [
        {
            "name": constraint.name,
            "value": float(certified.values.value[i]),
            "stderr": float(certified.values.stderr[i]),
            "unit": unit,
            "threshold": float(certified.thresholds[i]),
            "reference_value": float(before.constraints.value[i]),
            "slack": -float(certified.violations[i]),
            "multiplier": float(certified.multipliers[i]),
            "mean_multiplier": float(mean_multipliers[i]),
            "satisfied": bool(certified.satisfied[i]),
        }
        for i, constraint in enumerate(problem.constraints)
    ]
    source = problem.pretrained.config.source
    sources = {
        constraint.source: {
            "name": constraint.source,
            "source": constraint.source,
            "images": sum(
                len(one.indices) for one in problem.constraints if one.source == constraint.source
            ),
            "label": None,
        }
        for constraint in problem.constraints
    }
    return {
        "asked": {
            "command": f"jax-unlearn {command} --config {options.out / 'run.json'} --out NEW",
            "model": source,
            "forget": list(sources.values()),
            "retain": [
                {"name": "retained, trained on", "images": len(problem.retain.pixels)},
                {"name": "retained, held out", "images": len(problem.held_out.pixels)},
            ],
            "notes": list(problem.notes),
            "thresholds": ", ".join(options.threshold),
            "options": {
                name: ", ".join(value) if isinstance(value, tuple) else value
                for name, value in saved.items()
            },
        },
        "formulation": "forward_kl",
        "objective": {
            **plain(after.objective),
            "unit": unit,
            "description": "path KL from the reference model to the unlearned one, on held-out "
            "images under their own labels"
            + (
                f", divided by {dimensions} dimensions and weighted evenly over time steps"
                if simple
                else ""
            ),
        },
        "constraints": constraints,
        "feasible": bool(certified.feasible),
        "complementary_slackness": float(np.abs(certified.complementary_slackness).max()),
        "metrics": metrics,
        "steps": options.steps,
        "seconds": round(seconds, 2),
        "timing": {name: round(value, 2) for name, value in timing.items()},
        "seed": options.seed,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {
            "jax_unlearn": jax_unlearn.__version__,
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        },
    }


def grids(
    problem: Problem, evaluation: Evaluation, before: Measured, after: Measured
) -> list[report.Grid]:
    """Pictures before and after, from the same noise: forgotten, retained, reconstructed."""
    config = problem.pretrained.config
    shown = []
    if before.samples is not None and after.samples is not None:
        count = min(8, before.samples.shape[1])

        def rows(labels: list[int], title: str, caption: str) -> report.Grid:
            where = [evaluation.labels.index(label) for label in labels] if labels else [0]
            shape = (-1, *config.sample_shape)
            pair = [
                samples[where][:, :count].reshape(shape)
                for samples in (before.samples, after.samples)
                if samples is not None
            ]
            return report.Grid(title, caption, pair[0], pair[1], count)

        forgotten = list(problem.forgotten_labels)
        if forgotten:
            asked = ", ".join(config.label_name(label) for label in forgotten)
            shown.append(rows(forgotten, f"Forgotten: {asked}", f"Samples asked for as {asked}."))
        kept = [label for label in evaluation.labels if label not in forgotten]
        named = ", ".join(config.label_name(label) for label in kept)
        shown.append(rows(kept, "Retained", f"A row each: {named}." if kept else "Samples."))
    shown.append(
        report.Grid(
            "Forgotten images, noised and denoised",
            "Images to forget with noise to 60 % of the way, denoised again: a model that knows "
            "an image returns it.",
            before.reconstructions,
            after.reconstructions,
            min(8, len(before.reconstructions)),
        )
    )
    return shown
