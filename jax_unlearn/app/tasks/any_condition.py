"""Constraints under any condition: what is stored for `without`, who attacks, what is measured.

    min E_c ‖ε_θ(x_t, t, c) − ε_q(x_t, t, base_c)‖²/d
    subject to E_i g ‖ε_θ(x_t, t, e) − ε̄_i(x_t, t)‖²/d ≤ τ_i under conditions e that attackers found

c are the conditions that are kept, base_c = c, and the forgotten ones. E_i is over noised samples
of concept i. ε̄_i is what the reference predicts of them from the kept conditions that explain them
best, mixed by the shares that do. g is 1 where the model denoises the concept better than that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import attacks, likelihoods, losses
from jax_unlearn.app import data
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import (
    Adversary,
    Setup,
    batch_rows,
    controller,
    estimate,
    in_batches,
    seeded,
    unmeasured,
)
from jax_unlearn.app.tasks.concept_evaluation import classifier, draw, log_posterior
from jax_unlearn.app.tasks.concept_request import ConceptRequest
from jax_unlearn.app.tasks.conditions import by_vectors
from jax_unlearn.formulations import denoising_attack, without
from jax_unlearn.problem import Batch, Images, NoisyPoints
from jax_unlearn.typing import Array, Estimate, Params

__all__ = [
    "CAPTION",
    "FRESH",
    "Points",
    "UnderAttack",
    "any_condition_setup",
    "point_maker",
    "under_attack",
    "unmeasured_points",
]

# Kept conditions that stand for the rest, and samples of a concept that they are chosen by.
REST, CHOSEN_BY = 8, 16
# Conditions that attackers start from, of more a part.
STARTS = 64
# Attackers that measure a model, for each concept; images that each sees in a step, and records.
RESTARTS, ATTACK_BATCH, RECORDS = 8, 8, 4
# Training asks for this part of each threshold: new attackers find more than those of the pool.
TRAINED_TO = 0.2
# Images that each attacker of the pool sees in a step.
SEEN = 4
# Images of the concepts that attackers are judged on, each at --target-steps levels of noise.
FRESH = 32
# Of the samples of each kept condition.
LEAST_SAMPLES = 4

FORMULA = (
    "minimise E‖ε_p − ε_q‖²/d over noised samples of what is kept, subject to "
    "E g‖ε_p(x_t, e) − ε̄ᵢ(x_t)‖²/d ≤ τᵢ over noised samples of each concept, under conditions e "
    "that attackers found; ε̄ᵢ is what the reference predicts from the rest alone, and g = 1 where "
    "p denoises the concept better than that, else 0"
)
CAPTION = {
    "unit": "squared error a dimension",
    "description": "Of each concept: the distance from the rest's prediction under conditions that "
    f"{RESTARTS} attackers found against this model, by the steps that they took. The constraint "
    "is their mean.",
}


class Points(NamedTuple):
    """Samples of the reference, drawn once.

    Attributes:
      kept: images of what each condition is held to, [n, ...].
      cond: the condition, [n].
      base: what it is held to, [n].
      images: of each concept, [m, k, ...].
      x_t: noised ones, [m, p, ...].
      t: integers, [m, p].
      epsilon: what the rest predicts there, [m, p, ...].
      concept: what the reference predicts there of the concept, [m, p, ...].
    """

    kept: np.ndarray
    cond: np.ndarray
    base: np.ndarray
    images: np.ndarray
    x_t: np.ndarray
    t: np.ndarray
    epsilon: np.ndarray
    concept: np.ndarray


class UnderAttack(NamedTuple):
    """What was measured of a model.

    Attributes:
      objective: of the kept points.
      values: of the constraints, mean over attackers after a quarter to all of their steps, [m].
      by_steps: number of steps -> value of each constraint, [m].
    """

    objective: Estimate
    values: Estimate
    by_steps: dict[int, Estimate]


def point_maker(
    request: ConceptRequest, options: ConceptOptions
) -> Callable[[int, int, int], Points]:
    """(kept, shown, seed) -> samples of what is kept and of each concept, and what the rest says.

    About `kept` samples are of what is kept, and `shown` of the concepts. A base, such as the null
    condition, shows the concept in some of its samples. Those that the reference's own classifier
    takes for it are left out: what is held there is the rest.

    Another seed gives other samples. A call raises ValueError if all samples of a base show a
    concept.
    """
    apply, reference, schedule, config = request.pretrained
    size, steps = batch_rows(config.sample_shape), options.target_steps
    mixed = {one.base for one in request.separated} | {request.conditions.null}
    rest = [c for c in request.kept if c not in mixed] or list(request.kept)
    sample = jax.jit(partial(draw, request, options))
    judged = jax.jit(classifier(request, options))
    posterior = jax.jit(log_posterior(request, options, np.asarray(rest)))
    nearest: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @jax.jit
    def follow(
        reference: Params, key: Array, x_0: Array, times: Array, own: Array, rest: Any
    ) -> Any:
        concepts, log_prior = rest
        path = likelihoods.rest_path(
            apply, reference, schedule, key,
            x_0=x_0, times=times, concepts=concepts, log_prior=log_prior,
        )  # fmt: skip

        def predict(point: tuple[Array, Array]) -> Array:
            x_t, t = point[0], jnp.full(own.shape, point[1])
            return losses.predict_epsilon(apply, reference, schedule, x_t=x_t, t=t, cond=own)

        concept = jax.lax.map(predict, (path.x_t, times))
        return tuple(part.swapaxes(0, 1) for part in (path.x_t, path.epsilon, concept))

    def nearest_to(target: int, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the rest, what explains a target's images best, and the log of the shares that do."""
        if target not in nearest:
            log_p = in_batches(
                lambda _, x: posterior(reference, x), jax.random.key(0), images[:CHOSEN_BY]
            )
            best = np.sort(np.argsort(-log_p.mean(axis=0))[:REST])
            shares = likelihoods.mixture_shares(log_p[:, best])
            nearest[target] = np.asarray(rest)[best], np.log(shares).astype(np.float32)
        return nearest[target]

    def noised(target: int, images: np.ndarray, rng: np.random.Generator) -> tuple:
        """x_t, t, ε̄ and ε_i of a path of each image, [n, steps, ...]."""
        explained = nearest_to(target, images)

        def path(key: Array, x_0: Array) -> Any:
            # A step in each of as many equal parts of all, from the noisiest on.
            places = np.arange(steps)[::-1] + rng.uniform(size=steps)
            times = (places * schedule.num_steps / steps).astype(np.int32)
            own = np.full(len(x_0), target, np.int32)
            x_t, epsilon, concept = follow(reference, key, x_0, times, own, explained)
            return x_t, np.broadcast_to(times, (len(x_0), steps)), epsilon, concept

        return in_batches(path, jax.random.key(int(rng.integers(2**31))), images, size=size)

    def make(many_kept: int, many_shown: int, seed: int) -> Points:
        rng, key = np.random.default_rng([options.seed, seed]), jax.random.key(options.seed)

        def samples(cond: np.ndarray) -> np.ndarray:
            noise = rng.standard_normal((len(cond), *config.sample_shape), np.float32)
            return in_batches(
                lambda _, *rows: sample(reference, *rows), key, noise, cond, size=size
            )

        each = _each(many_kept, len(request.kept))
        laws = list(dict.fromkeys((*request.kept, *(one.base for one in request.separated))))
        of_law = np.repeat(np.asarray(laws, np.int32), each)
        drawn = samples(of_law)
        rows = {c: np.flatnonzero(of_law == c) for c in laws}
        for c in (c for c in laws if c in mixed):
            shown = in_batches(lambda _, x: judged(reference, x), key, drawn[rows[c]], size=size)
            rows[c] = rows[c][shown.max(axis=1) <= 0.5]
            if not len(rows[c]):
                raise ValueError(
                    f"all {each} samples of {request.conditions.names[c]} show what is to be "
                    "forgotten: give another --base, or more --stored-samples."
                )
        held = _held(request)
        chosen = np.concatenate([np.resize(rows[base], each) for _, base in held])
        cond, base = np.repeat(np.asarray(held, np.int32), each, axis=0).T
        of_concepts = []
        for number in range(len(request.concepts)):
            targets = _targets(request, number)
            many = _each(many_shown, len(request.concepts) * len(targets))
            images = [samples(np.full(many, target, np.int32)) for target in targets]
            paths = [noised(*one, rng) for one in zip(targets, images, strict=True)]
            x_t, t, epsilon, concept = (
                np.concatenate(part).reshape(-1, *part[0].shape[2:])
                for part in zip(*paths, strict=True)
            )
            of_concepts.append((np.concatenate(images), x_t, t, epsilon, concept))
        return Points(drawn[chosen], cond, base, *map(np.stack, zip(*of_concepts, strict=True)))

    return make


def _each(many: int, parts: int) -> int:
    return max(many // parts, LEAST_SAMPLES)


def _held(request: ConceptRequest) -> list[tuple[int, int]]:
    """Every condition of the run, and what it is held to."""
    held = [(c, c) for c in request.kept]
    return held + [(one.cond, one.base) for one in request.separated]


def _targets(request: ConceptRequest, number: int) -> list[int]:
    """The conditions that show a concept."""
    return list(dict.fromkeys(one.targets[number] for one in request.separated))


def unmeasured_points(request: ConceptRequest, options: ConceptOptions) -> Points:
    """Of the shapes of the stored points: for a step that is only compiled.

    The images of the concepts are noise, since they become constants of the step; the rest takes
    no memory.
    """
    many, shape = options.stored_samples, request.pretrained.config.sample_shape
    concepts, held = len(request.concepts), _held(request)
    targets = len(_targets(request, 0))
    shown = targets * _each(many, concepts * targets)
    rows = _each(many, len(request.kept))
    cond, base = np.repeat(np.asarray(held, np.int32), rows, axis=0).T
    points = unmeasured(concepts, shown * options.target_steps, *shape)
    return Points(
        unmeasured(len(cond), *shape),
        cond,
        base,
        np.random.default_rng(0).standard_normal((concepts, shown, *shape), np.float32),
        points,
        unmeasured(*points.shape[:2], dtype=np.int32),
        points,
        points,
    )


def any_condition_setup(request: ConceptRequest, options: ConceptOptions, points: Points) -> Setup:
    """The problem, its batches, and a pool of attackers of all ages, as many for each concept."""
    apply, table = by_vectors(request.pretrained)
    shown = by_vectors(request.pretrained._replace(params=request.start))[1]
    starts = _starts(request, options, table)
    concepts = len(request.concepts)
    pool = options.forget_batch_size
    constraint = np.arange(pool, dtype=np.int32) % concepts

    def batch(options: ConceptOptions, step: int) -> Batch:
        i, j = (
            data.batch_indices(seed=options.seed, step=step, size=size, count=count)
            for size, count in (
                (options.batch_size, len(points.cond)),
                (pool // concepts, points.t.shape[1]),
            )
        )
        kept = Images(points.kept[i], points.cond[i], base=points.base[i])
        at = constraint, np.repeat(j, concepts)
        forget = NoisyPoints(
            points.x_t[at], points.t[at], None, points.epsilon[at], None, None, None, constraint,
            concept=points.concept[at],
        )  # fmt: skip
        return Batch(kept, forget)

    def prepare(brought: Batch) -> Batch:
        """Looks conditions up on the device: encoded prompts are large, and numbers are not."""
        kept = brought.kept
        cond, base = (
            jax.tree.map(lambda leaf, at=at: jnp.asarray(leaf)[at], rows)
            for rows, at in ((shown, kept.cond), (table, kept.base))
        )
        return brought._replace(kept=kept._replace(cond=cond, base=base))

    def tightened(updates: Any, state: Any, params: Any, *, thresholds: Any, **extra: Any) -> Any:
        """−violation of the part of the threshold that training asks for."""
        return updates - (1 - TRAINED_TO) * thresholds, state

    adversary = Adversary(
        denoising_attack(apply, request.pretrained.schedule, points.images, each=SEEN),
        attacks.pool_of(starts, pool, seed=options.seed),
        attacks.restarted_adam(starts, period=options.attack_steps, seed=options.seed),
    )
    return Setup(
        without(apply, request.pretrained.schedule),
        optax.chain(
            optax.GradientTransformationExtraArgs(
                optax.init_empty_state,
                tightened,  # pyrefly: ignore
            ),
            controller(options, lambda thresholds: TRAINED_TO * thresholds),
        ),
        np.ones(concepts, np.float32),
        seeded(batch, options),
        FORMULA,
        (
            f"{pool} attackers train beside the model, each for {options.attack_steps} steps from "
            f"one of {len(jax.tree.leaves(starts)[0])} conditions. Training asks for "
            f"{TRAINED_TO:g} of each threshold: new attackers find more.",
        ),
        prepare=prepare,
        adversary=adversary,
    )


def _look_up(table: Any, numbers: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[numbers], table)


def _starts(request: ConceptRequest, options: ConceptOptions, table: Any) -> Any:
    """Conditions of the run that attackers start from: all, or as many of each kind as there is."""
    forgotten, kept = request.forgotten, [*request.kept, *request.shown]
    rng = np.random.default_rng(options.seed)
    chosen = [*forgotten, *kept]
    if len(chosen) > STARTS:
        first = rng.permutation(np.asarray(forgotten))[: STARTS // 2]
        chosen = [*first, *rng.permutation(np.asarray(kept))[: STARTS - len(first)]]
    return _look_up(table, np.asarray(chosen))


def under_attack(
    request: ConceptRequest, options: ConceptOptions, points: Points, fresh: Points
) -> Callable[[Params], UnderAttack]:
    """Measures parameters: new attackers learn on the stored images, and are judged on fresh ones.

    Args:
      request: whose conditions.
      options: how long an attacker takes.
      points: whose images attackers see.
      fresh: what the kept rows and the constraints are measured on.
    """
    apply, table = by_vectors(request.pretrained)
    shown = by_vectors(request.pretrained._replace(params=request.start))[1]
    reference, schedule = request.pretrained.params, request.pretrained.schedule
    size = batch_rows(request.pretrained.config.sample_shape)
    key = jax.random.fold_in(jax.random.key(options.seed), 11)
    starts = attacks.pool_of(_starts(request, options, table), RESTARTS, seed=options.seed + 1)
    every = max(options.attack_steps // RECORDS, 1)
    steps = every * RECORDS
    losses_of = jax.jit(without(apply, schedule).losses)

    @jax.jit
    def attack(params: Params, images: Array) -> Any:
        def one(key: Array, start: Any) -> Any:
            def predict(e: Any, x_t: Array, t: Array) -> Array:
                cond = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x_t), *leaf.shape)), e)
                return apply(params, x_t, t, cond)

            return attacks.invert(
                predict, schedule, key, x_0=images, start=start,
                steps=steps, batch=ATTACK_BATCH, every=every,
            ).found  # fmt: skip

        return jax.vmap(one)(jax.random.split(key, RESTARTS), starts)

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[:1], tree)

    everything = Images(fresh.kept, _look_up(shown, fresh.cond))
    everything = everything._replace(base=_look_up(table, fresh.base))
    nothing = jnp.zeros(len(request.concepts))

    def points_of(number: int, place: np.ndarray, cond: Any) -> NoisyPoints:
        x_t, t, epsilon, concept = (
            part[number][place] for part in (fresh.x_t, fresh.t, fresh.epsilon, fresh.concept)
        )
        constraint = np.full(len(place), number, np.int32)
        return NoisyPoints(x_t, t, cond, epsilon, None, None, None, constraint, concept)

    def kept_error(params: Params) -> np.ndarray:
        one = points_of(0, np.zeros(1, int), first(everything.cond))

        def rows(key: Array, kept: Images) -> Array:
            return losses_of(params, reference, key, Batch(kept, one), nothing).objective

        return in_batches(rows, key, everything, size=size)

    def values(params: Params, number: int) -> np.ndarray:
        """[restarts, records], of one concept: every attacker is judged on all fresh points."""
        found = attack(params, points.images[number])
        count = len(fresh.t[number])
        place = np.tile(np.arange(count), RESTARTS * RECORDS)
        by = np.repeat(np.arange(RESTARTS * RECORDS), count)
        cond = jax.tree.map(
            lambda leaf: np.asarray(leaf)[:, 1:].reshape(-1, *leaf.shape[2:])[by], found
        )
        attacked = points_of(number, place, cond)

        def rows(key: Array, points: NoisyPoints) -> Array:
            return losses_of(
                params, reference, key, Batch(first(everything), points), nothing
            ).values

        each = in_batches(rows, key, attacked, size=size)
        return each.reshape(RESTARTS, RECORDS, count).mean(axis=2)

    def measure(params: Params) -> UnderAttack:
        every_value = [values(params, number) for number in range(len(request.concepts))]
        each = np.stack(every_value, axis=-1)  # [restarts, records, m]
        return UnderAttack(
            estimate(kept_error(params)),
            estimate(each.mean(axis=1)),
            {every * (b + 1): estimate(each[:, b]) for b in range(RECORDS)},
        )

    return measure
