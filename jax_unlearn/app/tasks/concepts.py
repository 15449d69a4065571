"""Forgetting concepts of a conditional model by reverse-KL or likelihood constraints.

The model is a family p(·|c), and the problem one over condition and image jointly:

  min Σ_c π(c) KL(p(·|c) ‖ q(·|base_c))   subject to every concept i, mean over forgotten c,
      KL(p(·|c) ‖ q(·|i_c)) ≥ b_i    or    E_{p(·|c)}[h_i] ≤ ε_i.

base_c is c itself for kept conditions. The concept i is a label; or a name, which makes i_c the
prompt that has the name in the template of c. All concepts constrain every forgotten condition, so
that none may show another. Likelihoods come from a classifier, h its posterior; with
--target-steps it is corrected for its confusion on stored samples, so that E[h_i] is the share of
samples that show i (`quantification.Confusion`). π(c) is the frequency of c in the batches: the
kept conditions have equal shares of `batch_size` of all rows, the forgotten ones of
`forget_batch_size`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_unlearn.app.options import ConceptOptions, parse_threshold
from jax_unlearn.app.tasks.base import Measured, Task, estimate
from jax_unlearn.app.tasks.concept_evaluation import (
    Raw,
    classifier,
    evaluator,
    likelihoods_of_samples,
)
from jax_unlearn.app.tasks.concept_formulations import (
    corrections,
    likelihood_problem,
    reverse_kl_problem,
    stored_samples,
)
from jax_unlearn.app.tasks.concept_problem import Problem
from jax_unlearn.app.tasks.drawing import CAPTIONS, drawing, sample_grids
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.typing import Estimate, Params

__all__ = ["concept_task"]

# More kept conditions than twice as many are not all shown, but the nearest and the farthest.
SHOWN = 6


def concept_task(problem: Problem, options: ConceptOptions, judge: JudgeFunctions | None) -> Task:
    """Measures the reference model and sets up the problem."""
    pretrained, conditions = problem.pretrained, problem.conditions
    reverse = options.formulation == "reverse-kl"
    pool = None if reverse else stored_samples(problem, options)
    shows = None
    if pool is not None:
        shows = likelihoods_of_samples(
            problem, options, classifier(problem, options, pool.confusion)
        )
    evaluate = evaluator(problem, options, shows)
    raw = evaluate(pretrained.params)
    drawn = drawing(pretrained, conditions, options, judge, problem.forgotten, problem.shown)
    real = problem.real
    if real is None and judge is not None and options.samples:
        # KID and FID are then of samples of what is kept from other noise.
        other = drawn.draw(pretrained.params, 1)
        kept = [place for place, c in enumerate(drawn.drawn) if c in problem.kept]
        real = None if other is None else other[kept].reshape(-1, *conditions.image_shape)
    bases = {one.base for one in problem.separated}
    at_base = raw.values[np.isin(raw.valued, list(bases))] if pool is None else pool.values
    at_anchor = raw.values[np.isin(raw.valued, [c for c, _ in problem.anchors])]
    # Without anchors no threshold is calibrated on them.
    anchored = at_anchor.mean(axis=0) if len(at_anchor) else at_base.mean(axis=0)
    if pool is not None:
        # Laplace's rule of succession: n samples do not show a probability below about 1/n.
        anchored = (np.maximum(at_anchor.sum(axis=0), 0) + 1) / (len(at_anchor) + 2)
    thresholds = _thresholds(options, at_base.mean(axis=0), anchored)
    total = options.batch_size + options.forget_batch_size
    share = options.forget_batch_size / total
    if pool is None:
        posed = reverse_kl_problem(problem, options, thresholds, share)
    else:
        posed = likelihood_problem(problem, options, pool, thresholds, share)
    separated = [one.cond for one in problem.separated]
    shares = dict.fromkeys(problem.kept, (1 - share) / len(problem.kept))
    shares |= dict.fromkeys(separated, share / len(separated))

    def measured(raw: Raw, params: Params) -> Measured:
        found: dict[str, Any] = {
            "path_kl": {
                conditions.names[c]: estimate(raw.path_kl[raw.cond == c])
                for c in (*separated, *problem.kept, *problem.shown)
            },
            "violation": {
                conditions.names[c]: {
                    concept: estimate(
                        posed.formulation.sign * (thresholds[i] - raw.values[raw.valued == c, i])
                    )
                    for i, concept in enumerate(problem.concepts)
                }
                for c in separated
            },
        }
        samples = drawn.draw(params)
        if samples is not None:
            found |= drawn.judge(samples, real)
        each = [
            _average(raw.values[:, i], raw.valued, dict.fromkeys(separated, 1.0))
            for i in range(len(problem.concepts))
        ]
        value, stderr = np.array([(one.value, one.stderr) for one in each]).T
        if pool is not None and pool.confusion is not None:
            stderr = np.sqrt(stderr**2 + pool.confusion.variance(value))
        return Measured(
            objective=_average(raw.path_kl, raw.cond, shares),
            constraints=Estimate(value, stderr),
            metrics=found,
            paired={},
            samples=samples,
            reconstructions=None,
        )

    before = measured(raw, pretrained.params)
    held_to = _held_to(problem)
    corrected = pool is not None and pool.confusion is not None
    unit = "nats" if reverse else "share of samples" if corrected else "mean probability"
    distances = _distances(problem, options, raw) if before.samples is not None else {}
    return Task(
        pretrained=pretrained,
        params=problem.start,
        names=problem.concepts,
        formulation=posed.formulation,
        dual=posed.dual,
        thresholds=thresholds,
        multipliers=posed.multipliers,
        reference_values=np.asarray(before.constraints.value),
        batch=posed.batch,
        prepare=lambda brought: brought,
        before=before,
        measure=lambda params: measured(evaluate(params), params),
        asked={
            "forget": [
                {"name": conditions.names[c], "images": None, "source": "condition"}
                for c in problem.forgotten
            ],
            "retain": [
                {"name": conditions.names[c], "images": None, "source": "condition"}
                for c in problem.kept
            ],
            "shown": [conditions.names[c] for c in problem.shown],
            "notes": [*problem.notes, *posed.notes, _law(problem, options, held_to)],
        },
        units=("nats", unit),
        objective="path KL from the unlearned model to what each condition is held to, over its "
        f"own trajectories of {options.chain_steps} steps, averaged over conditions as in "
        "training",
        captions=CAPTIONS
        | {
            "path_kl": {
                "unit": "nats",
                "description": "Of p(·|condition) from the reference at what the condition is held "
                f"to: {held_to} for what is forgotten, itself for the others.",
            },
            "violation": {
                "unit": unit,
                "description": "Of each constraint (the second name) under each condition that "
                "must not show it (the first); at most 0 is satisfied.",
            },
        },
        grids=lambda after: sample_grids(
            conditions,
            before.samples,
            after.samples,
            {
                "Forgotten": problem.forgotten,
                **_nearest_first([c for c in conditions.drawn if c in problem.kept], distances),
                "Shown, not trained on": problem.shown,
            },
            {c: f"{value:.3g} nats from what is forgotten" for c, value in distances.items()},
        ),
        visit=posed.visit,
        corrections={}
        if shows is None or pool is None
        else corrections(problem, options, pool, shows, thresholds, share),
    )


def _distances(problem: Problem, options: ConceptOptions, raw: Raw) -> dict[int, float]:
    """Of each kept condition c: path KL of the reference, min_i KL(q(·|c) ‖ q(·|i_c)), in nats.

    Where it was not measured anyway, only if not all kept conditions are shown.
    """
    if options.formulation != "reverse-kl":
        if len(problem.kept) <= 2 * SHOWN:
            return {}
        few = dataclasses.replace(options, evaluation_images=1)
        raw = evaluator(problem, few, None)(problem.pretrained.params)
    return {
        c: float(raw.values[raw.valued == c].mean(axis=0).min())
        for c in problem.kept
        if c != problem.conditions.null
    }


def _nearest_first(kept: Sequence[int], distances: dict[int, float]) -> dict[str, Sequence[int]]:
    """Kept conditions in the groups that the report shows, by their distance if it is known."""
    kept = sorted(kept, key=lambda c: distances.get(c, 0.0))
    if len(kept) <= 2 * SHOWN:
        return {"Retained": kept}
    return {"Retained, nearest": kept[:SHOWN], "Retained, farthest": kept[-SHOWN:]}


def _held_to(problem: Problem) -> str:
    bases = dict.fromkeys(problem.conditions.names[one.base] for one in problem.separated)
    return " or ".join(bases)


def _law(problem: Problem, options: ConceptOptions, held_to: str) -> str:
    total = options.batch_size + options.forget_batch_size
    return (
        f"What is forgotten is held to {held_to}. Of the objective, {options.forget_batch_size} "
        f"parts of {total} are of forgotten conditions ({len(problem.separated)}), in equal "
        f"shares, and the rest is of kept ones ({len(problem.kept)})."
    )


def _average(values: np.ndarray, cond: np.ndarray, shares: dict[int, float]) -> Estimate:
    """Σ_c π(c) mean over rows of c, and its standard error; the shares are normalised."""
    total = sum(shares.values())
    parts = [(share / total, estimate(values[cond == c])) for c, share in shares.items()]
    variance = sum((share * part.stderr) ** 2 for share, part in parts)
    value = sum(share * part.value for share, part in parts)
    return Estimate(np.asarray(value), np.sqrt(np.asarray(variance)))


def _thresholds(options: ConceptOptions, at_base: np.ndarray, at_anchor: np.ndarray) -> np.ndarray:
    texts = options.threshold * (len(options.forget) if len(options.threshold) == 1 else 1)
    numbers = []
    for text, base, anchor in zip(texts, at_base, at_anchor, strict=True):
        asked = parse_threshold(text)
        unit = {"absolute": 1.0, "relative": base, "calibrated": anchor}[asked.kind]
        if not unit > 0:
            raise ValueError(f"--threshold {text}: the base has {unit:.3g}; give a number.")
        numbers.append(unit * (1.0 if asked.number is None else asked.number))
    return np.asarray(numbers, np.float32)
