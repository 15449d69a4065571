"""Forgetting concepts of a conditional model by reverse-KL or likelihood constraints.

The model is a family p(·|c), and the request one over condition and image jointly:

  min Σ_c π(c) KL(p(·|c) ‖ q(·|base_c))   subject to every concept i, mean over forgotten c,
      KL(p(·|c) ‖ q(·|i_c)) ≥ b_i    or    E_{p(·|c)}[h_i] ≤ ε_i.

base_c is c itself for kept conditions. The concept i is a label; or a name, which makes i_c the
prompt that has the name in the template of c. All concepts constrain every forgotten condition, so
that none may show another. Likelihoods come from a classifier, h its posterior; with
--target-steps it is calibrated on stored samples (`quantification`), so that E[h_i] is the share of
samples that show i. A third formulation holds predictions instead of laws: see `any_condition`.
π(c) is the frequency of c in the batches: the kept conditions have equal
shares of `batch_size` of all rows, the forgotten ones of `forget_batch_size`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_unlearn import duality, quantification
from jax_unlearn.app.checks import parse_threshold
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.any_condition import (
    CAPTION,
    FRESH,
    any_condition_setup,
    point_maker,
    under_attack,
)
from jax_unlearn.app.tasks.base import Measured, Setup, Task, estimate
from jax_unlearn.app.tasks.concept_evaluation import (
    Measurements,
    evaluator,
    judging,
    likelihoods_of_samples,
    repeated,
)
from jax_unlearn.app.tasks.concept_formulations import (
    floor_of,
    has_floor,
    likelihood_setup,
    path_log_ratios,
    reverse_kl_setup,
    stored_samples,
)
from jax_unlearn.app.tasks.concept_methods import concept_method
from jax_unlearn.app.tasks.concept_request import ConceptRequest
from jax_unlearn.app.tasks.drawing import CAPTIONS, drawing, sample_grids
from jax_unlearn.app.tasks.methods import by_method, with_strength
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.typing import Estimate, Params

__all__ = ["concept_task"]

# More kept conditions than twice as many are not all shown, but the nearest and the farthest.
SHOWN = 6


class _Found(NamedTuple):
    """What was measured of parameters, but for samples."""

    measurements: Measurements
    objective: Estimate
    constraints: Estimate
    metrics: dict[str, Any]


class _At(NamedTuple):
    """What thresholds make of a formulation.

    Attributes:
      setup: what the algorithm runs.
      thresholds: [m].
      found: what is said of measured parameters.
      floor: as `Task.floor`.
    """

    setup: Setup
    thresholds: np.ndarray
    found: Callable[[Any], _Found]
    floor: Callable[[], duality.Floor] | None


class _Kind(NamedTuple):
    """What sets a formulation apart.

    Attributes:
      reference: what was measured of the reference.
      measure: the same of other parameters.
      at: --threshold -> what it makes of this.
      units: of the objective and of the constraints.
      objective: what it is, in words.
      captions: of its own metrics.
    """

    reference: Any
    measure: Callable[[Params], Any]
    at: Callable[[tuple[str, ...]], _At]
    units: tuple[str, str]
    objective: str
    captions: dict[str, dict[str, str]]


def _on_trajectories(request: ConceptRequest, options: ConceptOptions) -> _Kind:
    """Reverse KL and likelihoods: path KLs, and constraints by condition."""
    conditions = request.conditions
    reverse = options.formulation == "reverse-kl"
    stored = shows = None
    if not reverse:
        judged = judging(request, options)
        stored = stored_samples(request, options, judged)
        shows = likelihoods_of_samples(request, judged, stored.confusion)
    evaluate = evaluator(request, options, shows)
    at_reference = evaluate(request.pretrained.params)
    bases = {one.base for one in request.separated}
    values, valued = at_reference.values, at_reference.valued
    at_base = values[np.isin(valued, list(bases))] if stored is None else stored.values
    anchors = [c for c, _ in request.anchors]
    # Without anchors no threshold is calibrated on them.
    anchored = at_base.mean(axis=0)
    if stored is None and anchors:
        anchored = values[np.isin(valued, anchors)].mean(axis=0)
    elif shows is not None and anchors and "calibrated" in options.threshold:
        key = jax.random.key(options.seed + 1)
        at_anchor = shows(request.pretrained.params, key, repeated(anchors, options))
        # Laplace's rule of succession: n samples do not show a probability below about 1/n.
        anchored = (np.maximum(at_anchor.sum(axis=0), 0) + 1) / (len(at_anchor) + 2)
    share = options.forget_batch_size / (options.batch_size + options.forget_batch_size)
    separated = [one.cond for one in request.separated]
    shares = dict.fromkeys(request.kept, (1 - share) / len(request.kept))
    shares |= dict.fromkeys(separated, share / len(separated))
    calibrated = None if stored is None else stored.confusion

    sign = 1.0 if reverse else -1.0
    ratios = cache(partial(path_log_ratios, request, options))

    def found(thresholds: np.ndarray, measurements: Measurements) -> _Found:
        violation = {
            conditions.names[c]: {
                concept: estimate(
                    sign * (thresholds[i] - measurements.values[measurements.valued == c, i])
                )
                for i, concept in enumerate(request.concepts)
            }
            for c in separated
        }
        each = [
            _average(measurements.values[:, i], measurements.valued, dict.fromkeys(separated, 1.0))
            for i in range(len(request.concepts))
        ]
        value, stderr = np.array([(one.value, one.stderr) for one in each]).T
        if calibrated is not None:
            stderr = np.sqrt(stderr**2 + quantification.share_variance(value, calibrated))
        return _Found(
            measurements,
            _average(measurements.path_kl, measurements.cond, shares),
            Estimate(value, stderr),
            {"violation": violation},
        )

    def at(texts: tuple[str, ...]) -> _At:
        thresholds = _thresholds(texts, request, at_base.mean(axis=0), anchored)
        if stored is None:
            setup = reverse_kl_setup(request, options)
        else:
            setup = likelihood_setup(request, options, stored, thresholds)
        floor = None
        if has_floor(stored):
            floor = partial(floor_of, request, options, thresholds, share, stored, ratios)
        return _At(setup, thresholds, partial(found, thresholds), floor)

    unit = "nats" if reverse else "mean probability" if calibrated is None else "share of samples"
    return _Kind(
        at_reference,
        evaluate,
        at,
        ("nats", unit),
        "path KL from the unlearned model to what each condition is held to, over its own "
        f"trajectories of {options.chain_steps} steps, averaged over conditions as in training",
        {
            "violation": {
                "unit": unit,
                "description": "Of each constraint (the second name) under each condition that "
                "must not show it (the first); at most 0 is satisfied.",
            }
        },
    )


def _under_any_condition(request: ConceptRequest, options: ConceptOptions) -> _Kind:
    """Squared errors of predictions, constrained under what attackers find."""
    make = point_maker(request, options)
    points = make(options.stored_samples, options.stored_samples, 7)
    fresh = make(options.evaluation_images, min(options.evaluation_images, FRESH), 8)
    attacked = under_attack(request, options, points, fresh)
    evaluate = evaluator(request, options, None)

    def found(params: Params) -> _Found:
        of = attacked(params)
        by_steps = {
            concept: {
                f"{steps} steps": Estimate(each.value[i], each.stderr[i])
                for steps, each in of.by_steps.items()
            }
            for i, concept in enumerate(request.concepts)
        }
        return _Found(evaluate(params), of.objective, of.values, {"under_attack": by_steps})

    reference = found(request.pretrained.params)
    values = np.asarray(reference.constraints.value)

    def at(texts: tuple[str, ...]) -> _At:
        setup = any_condition_setup(request, options, points)
        thresholds = _thresholds(texts, request, values, values)
        return _At(setup, thresholds, lambda measured: measured, None)

    unit = "squared error a dimension"
    return _Kind(
        reference,
        found,
        at,
        (unit, unit),
        "distance of the unlearned model's prediction of noise from the reference's, over noised "
        "samples of what each condition is held to",
        {"under_attack": CAPTION},
    )


def concept_task(
    request: ConceptRequest, options: ConceptOptions, judge: JudgeFunctions | None
) -> Task:
    """Measures the reference model and sets up the request."""
    pretrained, conditions = request.pretrained, request.conditions
    of = _under_any_condition if options.formulation == "without" else _on_trajectories
    kind = of(request, options)
    replaced = concept_method(request, options)
    drawn = drawing(
        pretrained,
        conditions,
        options,
        judge,
        request.forgotten,
        request.shown,
        known=request.known,
    )
    real = request.real
    if real is None and judge is not None and options.samples:
        # KID and FID are then of samples of what is kept from other noise.
        other = drawn.draw(pretrained.params, 1)
        kept = [place for place, c in enumerate(drawn.drawn) if c in request.kept]
        real = None if other is None else other[kept].reshape(-1, *conditions.image_shape)
    separated = [one.cond for one in request.separated]

    def measured(of: _Found, params: Params) -> Measured:
        found: dict[str, Any] = {
            "path_kl": {
                conditions.names[c]: estimate(of.measurements.path_kl[of.measurements.cond == c])
                for c in (*separated, *request.kept, *request.shown)
            },
            **of.metrics,
        }
        samples = drawn.draw(params)
        if samples is not None:
            found |= drawn.judge(samples, real)
        return Measured(
            objective=of.objective,
            constraints=of.constraints,
            metrics=found,
            paired={},
            samples=samples,
            reconstructions=None,
        )

    first = kind.at(options.threshold)
    at_reference = first.found(kind.reference)
    before = measured(at_reference, pretrained.params)
    held_to = _held_to(request)
    distances = {}
    if before.samples is not None:
        distances = _distances(request, options, at_reference.measurements)

    def at(threshold: str | None = None, strength: float | None = None) -> Task:
        own = first if threshold is None else kind.at((threshold,))
        return by_method(task_of(own), with_strength(options, strength), replaced)

    about_price = (
        "Of p(·|condition) from the reference at what the condition is held to: "
        f"{held_to} for what is forgotten, itself for the others."
    )

    def task_of(of: _At) -> Task:
        setup = of.setup
        return Task(
            pretrained=pretrained,
            params=request.start,
            names=request.concepts,
            problem=setup.problem,
            dual=setup.dual,
            thresholds=of.thresholds,
            multipliers=setup.multipliers,
            reference_values=np.asarray(before.constraints.value),
            batch=setup.batch,
            prepare=setup.prepare,
            before=before,
            measure=lambda params: measured(of.found(kind.measure(params)), params),
            asked={
                "forget": [
                    {"name": conditions.names[c], "images": None, "source": "condition"}
                    for c in request.forgotten
                ],
                "retain": [
                    {"name": conditions.names[c], "images": None, "source": "condition"}
                    for c in request.kept
                ],
                "shown": [conditions.names[c] for c in request.shown],
                "notes": [*request.notes, *setup.notes, _law(request, options, held_to)],
            },
            units=kind.units,
            objective=kind.objective,
            captions=CAPTIONS
            | kind.captions
            | {
                "path_kl": {
                    "unit": "nats",
                    "description": about_price,
                },
            },
            grids=lambda after: sample_grids(
                conditions,
                before.samples,
                after.samples,
                {
                    "Forgotten": request.forgotten,
                    **_nearest_first([c for c in conditions.drawn if c in request.kept], distances),
                    "Shown, not trained on": request.shown,
                },
                {c: f"{value:.3g} nats from what is forgotten" for c, value in distances.items()},
            ),
            formula=setup.formula,
            floor=of.floor,
            visit=setup.visit,
            dual_batch=setup.dual_batch,
            dual_steps=setup.dual_steps,
            adversary=setup.adversary,
            at=at,
        )

    return at()


def _distances(
    request: ConceptRequest, options: ConceptOptions, measurements: Measurements
) -> dict[int, float]:
    """Of each kept condition c: path KL of the reference, min_i KL(q(·|c) ‖ q(·|i_c)), in nats.

    Where it was not measured anyway, only if not all kept conditions are shown.
    """
    if options.formulation == "likelihood":
        if len(request.kept) <= 2 * SHOWN:
            return {}
        few = dataclasses.replace(options, evaluation_images=1)
        measurements = evaluator(request, few, None)(request.pretrained.params)
    return {
        c: float(measurements.values[measurements.valued == c].mean(axis=0).min())
        for c in request.kept
        if c != request.conditions.null
    }


def _nearest_first(kept: Sequence[int], distances: dict[int, float]) -> dict[str, Sequence[int]]:
    """Kept conditions in the groups that the report shows, by their distance if it is known."""
    kept = sorted(kept, key=lambda c: distances.get(c, 0.0))
    if len(kept) <= 2 * SHOWN:
        return {"Retained": kept}
    return {"Retained, nearest": kept[:SHOWN], "Retained, farthest": kept[-SHOWN:]}


def _held_to(request: ConceptRequest) -> str:
    bases = dict.fromkeys(request.conditions.names[one.base] for one in request.separated)
    return " or ".join(bases)


def _law(request: ConceptRequest, options: ConceptOptions, held_to: str) -> str:
    if options.formulation == "without":
        return f"What is forgotten is held to {held_to}; all conditions have equal shares."
    total = options.batch_size + options.forget_batch_size
    return (
        f"What is forgotten is held to {held_to}. Of the objective, {options.forget_batch_size} "
        f"parts of {total} are of forgotten conditions ({len(request.separated)}), in equal "
        f"shares, and the rest is of kept ones ({len(request.kept)})."
    )


def _average(values: np.ndarray, cond: np.ndarray, shares: dict[int, float]) -> Estimate:
    """Σ_c π(c) mean over rows of c, and its standard error; the shares are normalised."""
    total = sum(shares.values())
    parts = [(share / total, estimate(values[cond == c])) for c, share in shares.items()]
    variance = sum((share * part.stderr) ** 2 for share, part in parts)
    value = sum(share * part.value for share, part in parts)
    return Estimate(np.asarray(value), np.sqrt(np.asarray(variance)))


def _thresholds(
    texts: tuple[str, ...], request: ConceptRequest, at_base: np.ndarray, at_anchor: np.ndarray
) -> np.ndarray:
    texts = texts * (len(request.concepts) if len(texts) == 1 else 1)
    numbers = []
    for text, base, anchor in zip(texts, at_base, at_anchor, strict=True):
        asked = parse_threshold(text)
        unit = {"absolute": 1.0, "relative": base, "calibrated": anchor}[asked.kind]
        if not unit > 0:
            raise ValueError(f"--threshold {text}: the base has {unit:.3g}; give a number.")
        numbers.append(unit * (1.0 if asked.number is None else asked.number))
    return np.asarray(numbers, np.float32)
