"""Forgetting concepts of a conditional model by reverse-KL or likelihood constraints.

The model is a family p(·|c), and the problem one over condition and image jointly:

  min Σ_c π(c) KL(p(·|c) ‖ q(·|base_c))   subject to every concept i, mean over forgotten c,
      KL(p(·|c) ‖ q(·|i_c)) ≥ b_i    or    E_{p(·|c)}[h_i] ≤ ε_i.

base_c is c itself for kept conditions. The concept i is a label; or a name, which makes i_c the
prompt that has the name in the template of c. All concepts constrain every forgotten condition, so
that none may show another. π(c) is the frequency of c in the batches: the kept conditions have
equal shares of `batch_size` of all rows, the forgotten ones of `forget_batch_size`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import data, dual_first, likelihoods, losses, multipliers, samplers
from jax_unlearn.formulations import (
    ConditionBatch,
    Examples,
    Formulation,
    Held,
    SampleBatch,
    Samples,
    Separated,
    likelihood,
    reverse_kl,
)
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.options import ConceptOptions, parse_threshold
from jax_unlearn.tasks.base import Measured, Task, batch_rows, estimate, in_batches
from jax_unlearn.tasks.concept_problem import Problem
from jax_unlearn.tasks.drawing import CAPTIONS, drawing, sample_grids
from jax_unlearn.typing import Array, Estimate, Params

__all__ = ["concept_task"]

LEAST_ROWS = 8
# More kept conditions than twice as many are not all shown, but the nearest and the farthest.
SHOWN = 6


class Raw(NamedTuple):
    """What was measured, a row each.

    Attributes:
      cond: of each trajectory, [n].
      path_kl: in nats, [n].
      valued: the condition of each value, [v]: that of the trajectories; for likelihoods that of
        samples, of separated conditions and of anchors whose values thresholds are calibrated on.
      values: of the constraints, [v, m].
    """

    cond: np.ndarray
    path_kl: np.ndarray
    valued: np.ndarray
    values: np.ndarray


def concept_task(problem: Problem, options: ConceptOptions, judge: JudgeFunctions | None) -> Task:
    """Measures the reference model and sets up the problem."""
    pretrained, conditions = problem.pretrained, problem.conditions
    reverse = options.formulation == "reverse-kl"
    h = None if reverse else _classifier(problem, options)
    evaluate = _evaluator(problem, options, h)
    raw = evaluate(pretrained.params)
    drawn = drawing(pretrained, conditions, options, judge, problem.forgotten, problem.shown)
    real = problem.real
    if real is None and judge is not None and options.samples:
        # KID and FID are then of samples of what is kept from other noise.
        other = drawn.draw(pretrained.params, 1)
        kept = [place for place, c in enumerate(drawn.drawn) if c in problem.kept]
        real = None if other is None else other[kept].reshape(-1, *conditions.image_shape)
    pool = None if h is None else _stored(problem, options, h)
    bases = {one.base for one in problem.separated}
    at_base = raw.values[np.isin(raw.valued, list(bases))] if pool is None else pool.values
    at_anchor = raw.values[np.isin(raw.valued, [c for c, _ in problem.anchors])]
    # Without anchors no threshold is calibrated on them.
    anchored = at_anchor.mean(axis=0) if len(at_anchor) else at_base.mean(axis=0)
    if pool is not None:
        # Laplace's rule of succession: n samples do not show a probability below about 1/n.
        anchored = (at_anchor.sum(axis=0) + 1) / (len(at_anchor) + 2)
    thresholds = _thresholds(options, at_base.mean(axis=0), anchored)
    total = options.batch_size + options.forget_batch_size
    share = options.forget_batch_size / total
    if pool is None:
        formulation, dual, start = _reverse_kl(problem, options, thresholds, share)
        batch, notes = partial(_conditions, problem, options), problem.notes
    else:
        formulation, dual, start, note = _likelihood(problem, options, pool, thresholds, share)
        batch, notes = partial(_samples, problem, options, pool), (*problem.notes, note)
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
                        formulation.sign * (thresholds[i] - raw.values[raw.valued == c, i])
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
        return Measured(
            objective=_average(raw.path_kl, raw.cond, shares),
            constraints=Estimate(
                np.array([one.value for one in each]), np.array([one.stderr for one in each])
            ),
            metrics=found,
            paired={},
            samples=samples,
            reconstructions=None,
        )

    before = measured(raw, pretrained.params)
    held_to = _held_to(problem)
    distances = _distances(problem, options, raw) if before.samples is not None else {}
    return Task(
        pretrained=pretrained,
        params=problem.start,
        names=problem.concepts,
        formulation=formulation,
        dual=dual,
        thresholds=thresholds,
        multipliers=start,
        reference_values=np.asarray(before.constraints.value),
        batch=batch,
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
            "notes": [*notes, _law(problem, options, held_to)],
        },
        units=("nats", "nats" if reverse else "mean probability"),
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
                "unit": "nats" if reverse else "mean probability",
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
    )


def _distances(problem: Problem, options: ConceptOptions, raw: Raw) -> dict[int, float]:
    """Of each kept condition c: path KL of the reference, min_i KL(q(·|c) ‖ q(·|i_c)), in nats.

    Where it was not measured anyway, only if not all kept conditions are shown.
    """
    if options.formulation != "reverse-kl":
        if len(problem.kept) <= 2 * SHOWN:
            return {}
        few = dataclasses.replace(options, evaluation_images=1)
        raw = _evaluator(problem, few, None)(problem.pretrained.params)
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
        f"What is forgotten is held to {held_to}. Of the objective, "
        f"{options.forget_batch_size} parts of {total} are the {len(problem.separated)} forgotten "
        f"conditions' and the rest that of the {len(problem.kept)} kept ones, in equal shares."
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
        numbers.append(unit * (1.0 if asked.number is None else asked.number))
    return np.asarray(numbers, np.float32)


def _classifier(problem: Problem, options: ConceptOptions) -> Callable[[Array], Array]:
    """x_0 -> h [n, concepts], the reference's own posterior of each concept."""
    apply, reference, schedule, _ = problem.pretrained
    members = jnp.asarray(problem.members, jnp.float32)

    def h(x_0: Array) -> Array:
        posterior = likelihoods.diffusion_classifier(
            apply,
            reference,
            schedule,
            jax.random.key(options.seed),
            x_0=x_0,
            concepts=jnp.asarray(problem.candidates),
            draws=options.classifier_draws,
            weights=likelihoods.noised_weights(schedule, options.classifier_noise),
        )
        return jnp.matmul(jnp.exp(posterior.value), members.T, precision="highest")

    return h


def _evaluator(
    problem: Problem, options: ConceptOptions, h: Callable[[Array], Array] | None
) -> Callable[[Params], Raw]:
    """Trajectories, and for likelihoods samples, of every condition; the same noise every time."""
    apply, reference, schedule, config = problem.pretrained
    count = len(problem.concepts)
    formulation = reverse_kl(
        apply,
        schedule,
        estimator="stop_gradient",
        shape=config.sample_shape,
        steps=options.chain_steps,
    )

    @jax.jit
    def along(
        params: Params, key: Array, cond: Array, base: Array, target: Array
    ) -> tuple[Array, Array]:
        # Likelihoods are of samples: along trajectories the concepts need not be evaluated.
        shape = (cond.shape[0], count if h is None else 0)
        constraint = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        rows = Separated(cond, base, target if h is None else None, constraint)
        found = formulation.losses(
            params, reference, key, ConditionBatch(None, rows), None, jnp.zeros(count)
        )
        return found.objective, found.constraint.reshape(shape)

    @jax.jit
    def shows(params: Params, key: Array, cond: Array) -> Array:
        assert h is not None
        return h(_draw(problem, options, params, key, cond))

    batched = partial(in_batches, size=batch_rows(config.sample_shape))
    rows = _compared(problem)
    each = max(options.evaluation_images // len(rows), LEAST_ROWS)
    # Rows of all conditions in every batch, which also share its noise.
    cond = np.tile(np.array(list(rows), np.int32), each)
    base = np.tile(np.array([base for base, _ in rows.values()], np.int32), each)
    target = np.tile(np.array([targets for _, targets in rows.values()], np.int32), (each, 1))
    key = jax.random.key(options.seed + 1)

    judged = [one.cond for one in problem.separated]
    if "calibrated" in options.threshold:
        judged += [c for c, _ in problem.anchors]
    rows_each = max(options.evaluation_images // len(judged), LEAST_ROWS)
    valued = cond if h is None else np.tile(np.array(judged, np.int32), rows_each)

    def evaluate(params: Params) -> Raw:
        path_kl, values = batched(partial(along, params), key, cond, base, target)
        if h is not None:
            values = batched(partial(shows, params), key, valued)
        return Raw(cond, path_kl, valued, values)

    return evaluate


def _compared(problem: Problem) -> dict[int, tuple[int, tuple[int, ...]]]:
    """What every condition is held to, and the concepts that it is measured against.

    Those are of its own template: a base's are those of what is held to it.
    """
    own = {one.base: one.targets for one in reversed(problem.separated)} | dict(problem.anchors)
    first = problem.separated[0].targets
    separated = {one.cond: (one.base, one.targets) for one in problem.separated}
    others = (*problem.kept, *problem.shown)
    return separated | {c: (c, own.get(c, first)) for c in others}


def _reverse_kl(
    problem: Problem, options: ConceptOptions, thresholds: np.ndarray, share: float
) -> tuple[Formulation, optax.GradientTransformation, float]:
    """On its own trajectories. The domain is Σ λ_i < share, as each λ_i meets 1/share there."""
    apply, _, schedule, config = problem.pretrained
    formulation = reverse_kl(
        apply,
        schedule,
        estimator=options.estimator,
        shape=config.sample_shape,
        steps=options.chain_steps,
    )
    project = multipliers.capped_simplex(1 - options.max_multiplier * share)
    scale = share / np.maximum(thresholds, 1e-12) / len(thresholds)
    dual = multipliers.nu_pi(
        integral=jnp.asarray(options.dual_learning_rate * scale, jnp.float32),
        proportional=jnp.asarray(options.dual_damping * scale, jnp.float32),
        nu=0.9,
    )
    return formulation._replace(project=project), dual, 0.0


def _conditions(problem: Problem, options: ConceptOptions, step: int) -> ConditionBatch:
    """The conditions of a step: each as often as any other, give or take one."""
    kept, separated = (
        data.batch_indices(seed=options.seed, step=step, size=size, count=len(conditions))
        for conditions, size in (
            (problem.kept, options.batch_size),
            (problem.separated, options.forget_batch_size),
        )
    )
    held = np.asarray(problem.kept, np.int32)[kept]
    cond, base, targets = _rows(problem, separated)
    constraint = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    return ConditionBatch(Held(held, held), Separated(cond, base, targets, constraint))


def _rows(problem: Problem, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Condition [n], base [n] and targets [n, concepts] of separated conditions."""
    cond, base, targets = (
        np.asarray(part, np.int32) for part in zip(*problem.separated, strict=True)
    )
    return cond[which], base[which], targets[which]


class Pool(NamedTuple):
    """Stored samples of the reference: of the bases, with h [n, m], and of the kept conditions.

    `separated` says whose base each of the first was drawn from, `cond` what the others show.
    """

    base: np.ndarray
    values: np.ndarray
    separated: np.ndarray
    kept: np.ndarray
    cond: np.ndarray


def _draw(
    problem: Problem, options: ConceptOptions, params: Params, key: Array, cond: Array
) -> Array:
    """Unguided samples of p(·|cond) by DDIM: the few steps of an ancestral chain leave noise."""
    apply, _, schedule, config = problem.pretrained
    noise_key, key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (cond.shape[0], *config.sample_shape))
    return samplers.sample(
        lambda x_t, t: apply(params, x_t, t, cond),
        schedule,
        key,
        noise,
        steps=options.sampling_steps,
    ).x_0


def _stored(problem: Problem, options: ConceptOptions, h: Callable[[Array], Array]) -> Pool:
    """Unguided samples of the reference model: q itself is what the problem is about."""
    draw = jax.jit(partial(_draw, problem, options, problem.pretrained.params))
    base_key, kept_key = jax.random.split(jax.random.key(options.seed + 2))
    cond = np.resize(np.asarray(problem.kept, np.int32), options.stored_samples)
    separated = np.resize(np.arange(len(problem.separated)), options.stored_samples)
    batched = partial(in_batches, size=batch_rows(problem.pretrained.config.sample_shape))
    base = batched(draw, base_key, _rows(problem, separated)[1])
    judged = jax.jit(h)
    values = batched(lambda _, x: judged(x), base_key, base)
    return Pool(base, values, separated, batched(draw, kept_key, cond), cond)


def _likelihood(
    problem: Problem, options: ConceptOptions, pool: Pool, thresholds: np.ndarray, share: float
) -> tuple[Formulation, optax.GradientTransformation, np.ndarray, str]:
    """Dual first: λ* on the stored samples, then weighted denoising with it held fixed.

    Raises:
      ValueError: for a threshold below what any stored sample has.
    """
    apply, _, schedule, config = problem.pretrained
    bases = np.array([one.base for one in problem.separated])
    first = dual_first.likelihood_multipliers(
        pool.values,
        thresholds,
        groups=bases[pool.separated],
        key=jax.random.key(options.seed),
    )
    if not bool(first.solution.attained):
        least = ", ".join(f"{value:.3g}" for value in first.solution.largest_thresholds)
        raise ValueError(
            f"no reweighting of {len(pool.base)} stored samples meets the thresholds "
            f"{', '.join(f'{b:.3g}' for b in thresholds)}: the least they can show are {least}."
        )
    assert first.interval is not None
    shown = "; ".join(
        f"{concept} {value:.3g} ({low:.3g} to {high:.3g})"
        for concept, value, low, high in zip(
            problem.concepts, first.multipliers, *first.interval, strict=True
        )
    )
    note = (
        f"Multipliers from {len(pool.base)} stored samples, for one forgotten condition alone, "
        f"with 95 % bootstrap intervals: {shown}. They leave {float(first.effective):.0%} of the "
        f"samples' effective number. In the certificate they are times {share:.3g}, the forgotten "
        "conditions' part of the objective."
    )
    dimensions = int(np.prod(config.sample_shape))
    formulation = likelihood(
        apply,
        schedule,
        estimator="tilt",
        weighting=losses.time_weighting(
            losses.noise_to_signal_weights(schedule.log_snr, dimensions)
        ),
        control_variate=True,
    )
    return formulation, optax.set_to_zero(), np.asarray(first.multipliers) * share, note


def _samples(problem: Problem, options: ConceptOptions, pool: Pool, step: int) -> SampleBatch:
    """The stored samples of a step, each as often as any other."""
    kept, chosen, which = (
        data.batch_indices(seed=options.seed, step=step, size=size, count=count)
        for size, count in (
            (options.batch_size, len(pool.kept)),
            (options.forget_batch_size, len(pool.base)),
            (options.forget_batch_size, len(problem.separated)),
        )
    )
    if len({one.base for one in problem.separated}) > 1:
        which = pool.separated[chosen]
    cond, base, _ = _rows(problem, which)
    values = pool.values[chosen]
    return SampleBatch(
        Examples(pool.kept[kept], pool.cond[kept]),
        Samples(
            pool.base[chosen],
            cond,
            base,
            values,
            np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape),
        ),
    )
