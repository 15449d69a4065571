"""Forgetting concepts, labels of a conditional model, by reverse-KL or likelihood constraints.

The model is a family p(·|c), and the problem one over condition and image jointly:

  min Σ_c π(c) KL(p(·|c) ‖ q(·|base_c))   subject to every concept i, mean over forgotten c,
      KL(p(·|c) ‖ q(·|i)) ≥ b_i    or    E_{p(·|c)}[h_i] ≤ ε_i.

base_c is c itself for kept conditions. All concepts constrain every forgotten condition, so that no
forgotten label may show another. π(c) is the frequency of c in the batches: the kept conditions
have equal shares of `batch_size` of all rows, the forgotten ones of `forget_batch_size`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import data, dual_first, likelihoods, losses, multipliers, samplers, schedules
from jax_unlearn.formulations import (
    ConditionBatch,
    Examples,
    Formulation,
    Held,
    SampleBatch,
    Samples,
    Separated,
    likelihood,
    on_policy,
    reverse_kl,
)
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.options import ConceptOptions, parse_threshold
from jax_unlearn.pretrained import Pretrained, relabelled
from jax_unlearn.tasks.base import Measured, Task, estimate, in_batches
from jax_unlearn.tasks.drawing import CAPTIONS, drawing, sample_grids
from jax_unlearn.typing import Array, Estimate, Params

__all__ = ["Problem", "concept_task", "make_problem"]

LEAST_ROWS = 8


class Problem(NamedTuple):
    """Conditions, checked and by number.

    Attributes:
      pretrained: the model; its schedule's variance is "fixed_geometric". Path KLs are those of
        that chain: on ten steps of the embedded model they are within a factor of about two of
        the limit of many steps, those of "fixed_small" forty times as large.
      forget: the concepts, labels.
      base: what forgotten conditions are held to.
      separated: conditions that must not show the concepts: `forget`, and the null label if
        asked for.
      kept: conditions held to what they were.
      anchors: kept labels that calibrated thresholds are measured on.
      real: images that samples are compared with, uint8; None for samples of the reference.
      notes: what the owner should know.
    """

    pretrained: Pretrained
    forget: tuple[int, ...]
    base: int
    separated: tuple[int, ...]
    kept: tuple[int, ...]
    anchors: tuple[int, ...]
    real: np.ndarray | None
    notes: tuple[str, ...] = ()

    def name(self, condition: int) -> str:
        """Of a condition, the null label included."""
        config = self.pretrained.config
        return "null label" if condition == config.null_label else config.label_name(condition)


def make_problem(
    pretrained: Pretrained, options: ConceptOptions, real: np.ndarray | None = None
) -> Problem:
    """Checks the options against the model, before any expensive work.

    Raises:
      ValueError: for a model without labels, a label that it does not have, a base or anchor
        that is to be forgotten, nothing left to keep, or more steps than the schedule has.
    """
    config, null = pretrained.config, pretrained.config.null_label
    forget = tuple(config.find_label(text) for text in options.forget)
    if len(set(forget)) < len(forget):
        raise ValueError(f"--forget names a label twice: {', '.join(options.forget)}.")
    if options.base is None and null is None:
        raise ValueError("the model has no null label to hold what is forgotten to: give --base.")
    base = null if options.base is None else config.find_label(options.base)
    assert base is not None
    for flag, text in (("base", options.base), ("anchor", options.anchor)):
        if text is not None and config.find_label(text) in forget:
            raise ValueError(f"--{flag} {text} is also to be forgotten.")
    separated, kept = forget, tuple(c for c in range(config.num_labels) if c not in forget)
    if options.separate_null:
        if null is None or base != null:
            raise ValueError("--separate-null needs a null label, and it as --base.")
        separated = (*separated, null)
    elif null is not None:
        kept = (*kept, null)
    if not kept:
        raise ValueError("nothing is left to keep: every label is to be forgotten.")
    labels = tuple(c for c in kept if c != null)
    anchors = labels if options.anchor is None else (config.find_label(options.anchor),)
    if not anchors and "calibrated" in options.threshold:
        raise ValueError("no kept label to calibrate on: give --threshold numbers.")
    schedule = dataclasses.replace(pretrained.schedule, variance_type="fixed_geometric")
    schedules.timesteps(schedule, options.sampling_steps)
    on_policy.chain(schedule, config.sample_shape, options.chain_steps)
    return Problem(
        pretrained._replace(schedule=schedule), forget, base, separated, kept, anchors, real
    )


class Raw(NamedTuple):
    """One row for each trajectory: its condition, its path KL in nats, its constraints' values."""

    cond: np.ndarray
    path_kl: np.ndarray
    values: np.ndarray


def concept_task(problem: Problem, options: ConceptOptions, judge: JudgeFunctions | None) -> Task:
    """Measures the reference model and sets up the problem."""
    pretrained = problem.pretrained
    reverse = options.formulation == "reverse-kl"
    h = None if reverse else _classifier(problem, options)
    evaluate = _evaluator(problem, options, h)
    raw = evaluate(pretrained.params)
    drawn = drawing(pretrained, options, judge, problem.forget)
    real = problem.real
    if real is None and judge is not None and options.samples:
        # KID and FID are then of samples of the kept labels from other noise.
        other = drawn.draw(pretrained.params, 1)
        kept = [label for label in drawn.labels if label not in problem.forget]
        real = None if other is None else other[kept].reshape(-1, *pretrained.config.sample_shape)
    pool = None if h is None else _stored(problem, options, h)
    at_base = raw.values[raw.cond == problem.base] if pool is None else pool.values
    at_anchor = raw.values[np.isin(raw.cond, problem.anchors)]
    anchored = at_anchor.mean(axis=0)
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
    shares = dict.fromkeys(problem.kept, (1 - share) / len(problem.kept))
    shares |= dict.fromkeys(problem.separated, share / len(problem.separated))

    def measured(raw: Raw, params: Params) -> Measured:
        found: dict[str, Any] = {
            "path_kl": {
                problem.name(c): estimate(raw.path_kl[raw.cond == c])
                for c in (*problem.separated, *problem.kept)
            },
            "violation": {
                problem.name(c): {
                    problem.name(concept): estimate(
                        formulation.sign * (thresholds[i] - raw.values[raw.cond == c, i])
                    )
                    for i, concept in enumerate(problem.forget)
                }
                for c in problem.separated
            },
        }
        samples = drawn.draw(params)
        if samples is not None:
            found |= drawn.judge(samples, real)
        each = [
            _average(raw.values[:, i], raw.cond, dict.fromkeys(problem.separated, 1.0))
            for i in range(len(problem.forget))
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
    return Task(
        pretrained=pretrained,
        params=relabelled(pretrained.params, problem.forget, problem.base),
        names=tuple(problem.name(concept) for concept in problem.forget),
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
                {"name": problem.name(c), "label": c, "images": None, "source": "label"}
                for c in problem.forget
            ],
            "retain": [
                {"name": problem.name(c), "label": c, "images": None, "source": "condition"}
                for c in problem.kept
            ],
            "notes": [*notes, _prompt_law(problem, options)],
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
                f"to: {problem.name(problem.base)} for what is forgotten, itself for the others.",
            },
            "violation": {
                "unit": "nats" if reverse else "mean probability",
                "description": "Of each constraint (the second name) under each condition that "
                "must not show it (the first); at most 0 is satisfied.",
            },
        },
        grids=lambda after: sample_grids(
            pretrained, drawn, before.samples, after.samples, problem.forget
        ),
    )


def _prompt_law(problem: Problem, options: ConceptOptions) -> str:
    total = options.batch_size + options.forget_batch_size
    return (
        f"What is forgotten is held to {problem.name(problem.base)}. Of the objective, "
        f"{options.forget_batch_size} parts of {total} are the forgotten conditions' and the "
        f"rest that of the {len(problem.kept)} kept ones, in equal shares."
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
    """x_0 -> h [n, concepts], the reference's own posterior of each concept among its labels."""
    apply, reference, schedule, config = problem.pretrained
    places = jnp.asarray(problem.forget)

    def h(x_0: Array) -> Array:
        posterior = likelihoods.diffusion_classifier(
            apply,
            reference,
            schedule,
            jax.random.key(options.seed),
            x_0=x_0,
            concepts=jnp.arange(config.num_labels),
            draws=options.classifier_draws,
        )
        return jnp.exp(posterior.value[:, places])

    return h


def _evaluator(
    problem: Problem, options: ConceptOptions, h: Callable[[Array], Array] | None
) -> Callable[[Params], Raw]:
    """Trajectories, and for likelihoods samples, of every condition; the same noise every time."""
    apply, reference, schedule, config = problem.pretrained
    count = len(problem.forget)
    formulation = reverse_kl(
        apply,
        schedule,
        estimator="stop_gradient",
        shape=config.sample_shape,
        steps=options.chain_steps,
    )

    @jax.jit
    def along(params: Params, key: Array, cond: Array, base: Array) -> tuple[Array, Array]:
        shape = (cond.shape[0], count)
        rows = Separated(
            cond,
            base,
            jnp.broadcast_to(jnp.asarray(problem.forget), shape),
            jnp.broadcast_to(jnp.arange(count), shape),
        )
        found = formulation.losses(
            params, reference, key, ConditionBatch(None, rows), None, jnp.zeros(count)
        )
        if h is None:
            return found.objective, found.constraint.reshape(shape)
        return found.objective, h(_draw(problem, options, params, key, cond))

    conditions = np.array([*problem.separated, *problem.kept], np.int32)
    each = max(options.evaluation_images // len(conditions), LEAST_ROWS)
    # Rows of all conditions in every batch, which also share its noise.
    cond = np.tile(conditions, each)
    base = np.where(np.isin(cond, problem.separated), np.int32(problem.base), cond)
    key = jax.random.key(options.seed + 1)

    def evaluate(params: Params) -> Raw:
        return Raw(cond, *in_batches(partial(along, params), key, cond, base))

    return evaluate


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
        np.asarray(conditions, np.int32)[
            data.batch_indices(seed=options.seed, step=step, size=size, count=len(conditions))
        ]
        for conditions, size in (
            (problem.kept, options.batch_size),
            (problem.separated, options.forget_batch_size),
        )
    )
    shape = (len(separated), len(problem.forget))
    return ConditionBatch(
        Held(kept, kept),
        Separated(
            separated,
            np.full_like(separated, problem.base),
            np.broadcast_to(np.asarray(problem.forget, np.int32), shape),
            np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        ),
    )


class Pool(NamedTuple):
    """Stored samples of the reference: of the base, with h [n, m], and of the kept conditions."""

    base: np.ndarray
    values: np.ndarray
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
    base = in_batches(draw, base_key, np.full(options.stored_samples, problem.base, np.int32))
    values = in_batches(lambda _, x: jax.jit(h)(x), base_key, base)
    return Pool(base, values, in_batches(draw, kept_key, cond), cond)


def _likelihood(
    problem: Problem, options: ConceptOptions, pool: Pool, thresholds: np.ndarray, share: float
) -> tuple[Formulation, optax.GradientTransformation, np.ndarray, str]:
    """Dual first: λ* on the stored samples, then weighted denoising with it held fixed.

    Raises:
      ValueError: for a threshold below what any stored sample has.
    """
    apply, _, schedule, config = problem.pretrained
    first = dual_first.likelihood_multipliers(
        pool.values, thresholds, key=jax.random.key(options.seed)
    )
    if not bool(first.solution.attained):
        least = ", ".join(f"{value:.3g}" for value in first.solution.largest_thresholds)
        raise ValueError(
            f"no reweighting of {len(pool.base)} stored samples meets the thresholds "
            f"{', '.join(f'{b:.3g}' for b in thresholds)}: the least they can show are {least}."
        )
    assert first.interval is not None
    shown = "; ".join(
        f"{problem.name(concept)} {value:.3g} ({low:.3g} to {high:.3g})"
        for concept, value, low, high in zip(
            problem.forget, first.multipliers, *first.interval, strict=True
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
        weighting=losses.time_weighting(losses.simple_weights(schedule.num_steps, dimensions)),
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
    cond = np.asarray(problem.separated, np.int32)[which]
    values = pool.values[chosen]
    return SampleBatch(
        Examples(pool.kept[kept], pool.cond[kept]),
        Samples(
            pool.base[chosen],
            cond,
            np.full_like(cond, problem.base),
            values,
            np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape),
        ),
    )
