"""Forgetting images by forward KL, as a task: thresholds, formulation, batches, pictures."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_unlearn import multipliers
from jax_unlearn.app import data, report
from jax_unlearn.app.checks import parse_threshold
from jax_unlearn.app.options import ImageOptions
from jax_unlearn.app.tasks import images
from jax_unlearn.app.tasks.base import Measured, Setup, Task, controller, seeded
from jax_unlearn.app.tasks.drawing import CAPTIONS, sample_grids
from jax_unlearn.app.tasks.evaluation import Evaluation, evaluator, make_weighting
from jax_unlearn.app.tasks.image_methods import image_method
from jax_unlearn.app.tasks.images import ImageRequest
from jax_unlearn.app.tasks.methods import by_method, with_strength
from jax_unlearn.formulations import forward_kl
from jax_unlearn.losses import TimeWeighting
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.problem import Batch
from jax_unlearn.typing import Estimate

__all__ = ["image_setup", "image_task"]


def image_task(request: ImageRequest, options: ImageOptions, judge: JudgeFunctions | None) -> Task:
    """Measures the reference model and sets up the forward-KL request."""
    pretrained = request.pretrained
    weighting = make_weighting(request, options)
    evaluation = evaluator(request, options, weighting, judge)
    before, calibration = evaluation.measure(pretrained.params)
    values = np.asarray(before.constraints.value)
    replaced = image_method(request, options, weighting, _prepare)
    simple = options.weighting == "simple"
    dimensions = int(np.prod(pretrained.config.sample_shape))
    unit = "mean squared error a dimension" if simple else "nats an image"
    bits = "bits/dim" if request.captions is None else "bits/dim of the latents' density"

    def at(threshold: str | None = None, strength: float | None = None) -> Task:
        asked, own = request, with_strength(options, strength)
        if threshold is not None:
            constraints = [one._replace(threshold=threshold) for one in request.constraints]
            asked = request._replace(constraints=tuple(constraints))
        setup = image_setup(asked, own, weighting, values)
        task = Task(
            pretrained=pretrained,
            params=pretrained.params,
            names=tuple(constraint.name for constraint in request.constraints),
            problem=setup.problem,
            dual=setup.dual,
            thresholds=_thresholds(asked, values, calibration),
            multipliers=setup.multipliers,
            reference_values=values,
            batch=setup.batch,
            prepare=setup.prepare,
            before=before,
            measure=lambda params: evaluation.measure(params)[0],
            asked=_asked(request),
            units=(unit, unit),
            formula=setup.formula,
            objective="path KL from the reference model to the unlearned one, on held-out images "
            "under their own labels"
            + (f", divided by {dimensions} dimensions and weighted evenly over time" * simple),
            captions=CAPTIONS | {"nelbo": {"unit": bits}},
            grids=lambda after: _grids(request, evaluation, before, after),
            at=at,
        )
        return by_method(task, own, replaced)

    return at()


def image_setup(
    request: ImageRequest, options: ImageOptions, weighting: TimeWeighting, values: np.ndarray
) -> Setup:
    """The forward-KL problem of a request; `values` are the reference's of the constraints, [m]."""
    # "And no less": where images are forgotten and not a whole label, a calibrated threshold is
    # approached from both sides. A label is given to the kept images instead, and its own may
    # become as unlikely as that makes them.
    calibrated = all(one.threshold == "calibrated" for one in request.constraints)
    equal = calibrated and not request.forgotten_labels
    domain = multipliers.l1_ball if equal else multipliers.capped_simplex
    problem = forward_kl(
        request.pretrained.apply,
        request.pretrained.schedule,
        weighting,
        mixing=0.5 if options.estimator == "importance" else None,
        project=domain(1 - options.max_multiplier),
        reference_values=jnp.asarray(values, jnp.float32),
    )
    return Setup(
        problem,
        controller(options, lambda _: values),
        0.0,
        seeded(partial(images.batch, request), options),
        "minimise KL(q‖p) subject to KL(qᵢ‖p) ≥ bᵢ: denoising losses of the images, each KL up to "
        "a constant of the data",
        (),
        prepare=_prepare,
    )


def _grids(
    request: ImageRequest, evaluation: Evaluation, before: Measured, after: Measured
) -> list[report.Grid]:
    first, last = before.reconstructions, after.reconstructions
    assert first is not None
    assert last is not None
    return [
        *sample_grids(
            request.conditions,
            before.samples,
            after.samples,
            _groups(request),
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


def _groups(request: ImageRequest) -> dict[str, Sequence[int]]:
    forgotten = request.lost
    kept = [c for c in request.conditions.drawn if c not in forgotten]
    groups: dict[str, Sequence[int]] = {"Forgotten": forgotten} if forgotten else {}
    return groups | {"Retained": kept}


def _thresholds(request: ImageRequest, values: np.ndarray, calibration: Estimate) -> np.ndarray:
    """The thresholds as numbers, [m], from the reference model's own values, [m].

    "calibrated" asks of a set of images that its mean loss become that of held-out images. Where
    each image of the set is a constraint, all are raised in the same proportion, since some
    images are harder to denoise than others, seen or not:
    b_i = value_i · (mean of held-out images) / (mean of the set).
    """
    sources = np.array([constraint.source for constraint in request.constraints])
    numbers = []
    for constraint, own in zip(request.constraints, values, strict=True):
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


def _asked(request: ImageRequest) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for constraint in request.constraints:
        counts[constraint.source] = counts.get(constraint.source, 0) + len(constraint.indices)
    return {
        "forget": [
            {"name": source, "source": source, "images": count, "label": None}
            for source, count in counts.items()
        ],
        "retain": [
            {"name": "retained, trained on", "images": len(request.retain.pixels)},
            {"name": "retained, held out", "images": len(request.held_out.pixels)},
        ],
        "notes": list(request.notes),
    }
