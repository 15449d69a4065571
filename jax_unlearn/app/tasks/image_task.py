"""Forgetting images by forward KL, as a task: thresholds, formulation, batches, pictures."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_unlearn import multipliers
from jax_unlearn.app import data, report
from jax_unlearn.app.options import ImageOptions, parse_threshold
from jax_unlearn.app.tasks import images
from jax_unlearn.app.tasks.base import Measured, Task
from jax_unlearn.app.tasks.drawing import CAPTIONS, sample_grids
from jax_unlearn.app.tasks.evaluation import Evaluation, evaluator, make_weighting
from jax_unlearn.app.tasks.images import Problem
from jax_unlearn.formulations import Batch, forward_kl
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.typing import Estimate

__all__ = ["image_task"]


def image_task(problem: Problem, options: ImageOptions, judge: JudgeFunctions | None) -> Task:
    """Measures the reference model and sets up the forward-KL problem."""
    pretrained = problem.pretrained
    weighting = make_weighting(problem, options)
    evaluation = evaluator(problem, options, weighting, judge)
    before, calibration = evaluation.measure(pretrained.params)
    thresholds = _thresholds(problem, before, calibration)
    # Violations relative to the reference's values, averaged over the constraints: one rate
    # serves every unit and every number of constraints.
    scale = 1.0 / np.maximum(before.constraints.value, 1e-12) / len(thresholds)
    # "And no less": where images are forgotten and not a whole label, a calibrated threshold is
    # approached from both sides. A label is given to the kept images instead, and its own may
    # become as unlikely as that makes them.
    calibrated = all(one.threshold == "calibrated" for one in problem.constraints)
    equal = calibrated and not problem.forgotten_labels
    domain = multipliers.l1_ball if equal else multipliers.capped_simplex
    simple = options.weighting == "simple"
    dimensions = int(np.prod(pretrained.config.sample_shape))
    unit = "mean squared error a dimension" if simple else "nats an image"
    bits = "bits/dim" if problem.captions is None else "bits/dim of the latents' density"
    return Task(
        pretrained=pretrained,
        params=pretrained.params,
        names=tuple(constraint.name for constraint in problem.constraints),
        formulation=forward_kl(
            pretrained.apply,
            pretrained.schedule,
            weighting,
            estimator=options.estimator,
            balance=options.balance,
            project=domain(1 - options.max_multiplier),
            reference_values=jnp.asarray(before.constraints.value, jnp.float32),
        ),
        dual=multipliers.nu_pi(
            integral=jnp.asarray(options.dual_learning_rate * scale, jnp.float32),
            proportional=jnp.asarray(options.dual_damping * scale, jnp.float32),
            nu=0.9,
        ),
        thresholds=thresholds,
        multipliers=0.0,
        reference_values=np.asarray(before.constraints.value),
        batch=lambda step: images.batch(problem, options, step),
        prepare=_prepare,
        before=before,
        measure=lambda params: evaluation.measure(params)[0],
        asked=_asked(problem),
        units=(unit, unit),
        objective="path KL from the reference model to the unlearned one, on held-out images under "
        "their own labels"
        + (f", divided by {dimensions} dimensions and weighted evenly over time" if simple else ""),
        captions=CAPTIONS | {"nelbo": {"unit": bits}},
        grids=lambda after: _grids(problem, evaluation, before, after),
    )


def _grids(
    problem: Problem, evaluation: Evaluation, before: Measured, after: Measured
) -> list[report.Grid]:
    first, last = before.reconstructions, after.reconstructions
    assert first is not None
    assert last is not None
    return [
        *sample_grids(
            problem.conditions,
            before.samples,
            after.samples,
            _groups(problem),
        ),
        report.Grid(
            "Forgotten images, noised and denoised",
            "Images to forget with noise to 60 % of the way, denoised again: a model that knows "
            "an image returns it.",
            first,
            last,
            min(8, len(first)),
        ),
    ]


def _groups(problem: Problem) -> dict[str, Sequence[int]]:
    forgotten = problem.lost
    kept = [c for c in problem.conditions.drawn if c not in forgotten]
    groups: dict[str, Sequence[int]] = {"Forgotten": forgotten} if forgotten else {}
    return groups | {"Retained": kept}


def _thresholds(problem: Problem, before: Measured, calibration: Estimate) -> np.ndarray:
    """The thresholds as numbers, [m], from the reference model's own values.

    "calibrated" asks of a set of images that its mean loss become that of held-out images. Where
    each image of the set is a constraint, all are raised in the same proportion, since some
    images are harder to denoise than others, seen or not:
    b_i = value_i · (mean of held-out images) / (mean of the set).
    """
    values = np.asarray(before.constraints.value)
    sources = np.array([constraint.source for constraint in problem.constraints])
    numbers = []
    for constraint, own in zip(problem.constraints, values, strict=True):
        asked = parse_threshold(constraint.threshold)
        if asked.kind == "absolute":
            numbers.append(asked.number)
            continue
        together = values[sources == constraint.source].mean()
        ratio = asked.number if asked.kind == "relative" else calibration.value / together
        numbers.append(own * ratio)
    return np.asarray(numbers, np.float32)


def _prepare(raw: Batch) -> Batch:
    """Bytes to [−1, 1]."""
    return raw._replace(
        kept=raw.kept and raw.kept._replace(x_0=data.to_x_0(raw.kept.x_0)),
        base=raw.base and raw.base._replace(x_0=data.to_x_0(raw.base.x_0)),
        forget=raw.forget._replace(x_0=data.to_x_0(raw.forget.x_0)),
    )


def _asked(problem: Problem) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for constraint in problem.constraints:
        counts[constraint.source] = counts.get(constraint.source, 0) + len(constraint.indices)
    return {
        "forget": [
            {"name": source, "source": source, "images": count, "label": None}
            for source, count in counts.items()
        ],
        "retain": [
            {"name": "retained, trained on", "images": len(problem.retain.pixels)},
            {"name": "retained, held out", "images": len(problem.held_out.pixels)},
        ],
        "notes": list(problem.notes),
    }
