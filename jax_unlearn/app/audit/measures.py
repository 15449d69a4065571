"""What is measured without an attack: what is shown, what is likely, and what was harmed."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import divergences, losses, metrics, schedules
from jax_unlearn.app.audit.attacks import Drawn, Tools, seed_of
from jax_unlearn.app.audit.options import LEAST
from jax_unlearn.app.audit.subject import Concept, Target
from jax_unlearn.app.tasks.base import batch_rows, estimate, in_batches
from jax_unlearn.app.tasks.drawing import features_of
from jax_unlearn.formulations import sample_trajectories
from jax_unlearn.problem import Batch, Conditions
from jax_unlearn.typing import Array, Params

__all__ = ["forgotten", "harmed", "kept_samples", "likelihoods", "named_as", "nearest", "path_kls"]

_SCALES = (0.0, 1.0, 2.5, 5.0, 7.5)
_DRAWS = 16
_TRAJECTORIES = 64
# Samples whose distances are taken at once.
_AT_ONCE = 64


def forgotten(tools: Tools, target: Target, concept: Concept) -> Iterator[Drawn]:
    """Samples under the forgotten conditions and their paraphrases, over scales of guidance.

    Scale 0 is the free branch, which no condition reaches; scale 1 is without guidance.
    """
    subject, count = tools.subject, tools.options.samples
    own = "the conditions of the images" if subject.of_images else "the forgotten conditions"
    groups = {own: concept.forgotten, "paraphrases": subject.shown}
    free_alone = subject.null is None or subject.uncaptioned
    asked = 1.0 if free_alone else tools.options.guidance
    # The pictures are those of the last: under the conditions themselves, as the options guide.
    scales = [*(one for one in _SCALES if one != asked and not free_alone), asked]
    for what, conditions in reversed(groups.items()):
        if not conditions:
            continue
        e = subject.rows(target, np.resize(np.asarray(conditions, np.int32), count))
        free = subject.free(target, count)
        for scale in scales:
            drawn = tools.draw(
                target.params, e, free, scale=scale, seed=seed_of(tools, "forgotten")
            )
            yield Drawn({"what": what}, scale, drawn)


def nearest(
    tools: Tools, concept: Concept, images: np.ndarray
) -> tuple[dict[str, list[float]], np.ndarray]:
    """How near the nearest of some samples is to each image of a concept.

    Returns:
      The distances in each space, [n] by its name; and in the first space the nearest samples.
    """
    found, pictures = {}, concept.images[:0]
    for space in tools.subject.spaces:
        asked = space.features(concept.images)
        distance, index = np.full(len(asked), np.inf), np.zeros(len(asked), int)
        for start in range(0, len(images), _AT_ONCE):
            part = space.features(images[start : start + _AT_ONCE])
            near, place = metrics.nearest_distances(asked, part)
            index = np.where(near < distance, start + place, index)
            distance = np.minimum(near, distance)
        if not found:
            pictures = images[index]
        found[space.name] = distance.tolist()
    return found, pictures


def named_as(tools: Tools, cond: np.ndarray, images: np.ndarray) -> dict[str, list[int]]:
    """The judge's classes of samples, by the number of the condition that each was asked for."""
    named = tools.named(images)
    return {str(c): named[cond == c].tolist() for c in dict.fromkeys(cond.tolist())}


def likelihoods(tools: Tools, target: Target, concept: Concept) -> dict[str, list[float]]:
    """NELBO in bits a dimension, of images of the concept and of unseen ones, one a row."""
    subject = tools.subject
    discrete = target.text is None
    dimensions = int(np.prod(subject.shape))

    @jax.jit
    def nelbo(params: Params, key: Array, x_0: Array, e: Any) -> Array:
        terms = divergences.nelbo_terms(
            subject.apply,
            params,
            subject.schedule,
            key,
            x_0=x_0,
            cond=e,
            draws=_DRAWS,
            discrete=discrete,
        )
        return divergences.bits_per_dim(terms.total, dimensions)

    sets = {"forgotten": (concept.x_0, concept.cond)}
    if concept.unseen is not None and concept.unseen_cond is not None:
        sets["unseen"] = concept.unseen, concept.unseen_cond
    found = {}
    for name, (x_0, cond) in sets.items():
        values = in_batches(
            lambda key, *rows: nelbo(target.params, key, *rows),
            jax.random.key(tools.options.seed),
            x_0,
            subject.rows(target, cond),
            size=batch_rows(subject.shape),
        )
        found[name] = np.asarray(values, np.float64).tolist()
    return found


def kept_samples(tools: Tools, target: Target, seed: int) -> np.ndarray:
    """Guided samples of every kept condition, uint8 [kept, samples, height, width, channels]."""
    subject, count = tools.subject, tools.options.samples
    each = max(count // 4, LEAST, -(-count // len(subject.kept)))
    cond = np.repeat(np.asarray(subject.kept, np.int32), each)
    drawn = tools.draw(
        target.params,
        subject.rows(target, cond),
        subject.free(target, len(cond)),
        scale=tools.options.guidance,
        seed=(tools.options.seed, seed),
    )
    return drawn.reshape(len(subject.kept), each, *drawn.shape[1:])


def path_kls(
    tools: Tools, target: Target, others: Sequence[Target], conditions: Sequence[int]
) -> dict[str, Any]:
    """Path KL of a target to others under the same conditions, by condition and by time step.

    Along the target's own ancestral chain, in nats.

    Returns:
      "times", and by the name of each other: "by_condition", a value and its standard error by
      name, and "by_time", a list.
    """
    subject, steps = tools.subject, tools.options.chain_steps
    chain = divergences.chain(subject.schedule, subject.shape, steps)
    visit = sample_trajectories(subject.apply, subject.schedule, shape=subject.shape, steps=steps)

    def epsilon(params: Params, x_t: Array, place: Array, e: Any) -> Array:
        t = jnp.full(x_t.shape[:1], chain.times[place])
        prediction = subject.apply(params, x_t, t, e)
        log_snr = jnp.full(x_t.shape[:1], chain.log_snr[place])
        return schedules.clipped(prediction, subject.schedule, x_t=x_t, log_snr=log_snr).epsilon

    @jax.jit
    def along(params: Params, theirs: Any, key: Array, number: Array, e: Any, other: Any) -> Array:
        rows = Conditions(e, e, None, jnp.zeros(number.shape, jnp.int32))
        points = visit(params, key, Batch(None, rows)).forget

        def at(place: Array) -> Array:
            x_t = points.x_t[place]
            ours = epsilon(params, x_t, place, e)
            return jnp.stack(
                [
                    chain.weights[place]
                    * losses.squared_error(ours, epsilon(one, x_t, place, rows_of))
                    for one, rows_of in zip(theirs, other, strict=True)
                ]
            )

        return jnp.moveaxis(jax.lax.map(at, jnp.arange(steps)), -1, 0)

    each = max(_TRAJECTORIES // len(conditions), LEAST)
    cond = np.tile(np.asarray(conditions, np.int32), each)
    values = in_batches(
        lambda key, *rows: along(target.params, [one.params for one in others], key, *rows),
        jax.random.key(tools.options.seed + 3),
        cond,
        subject.rows(target, cond),
        [subject.rows(one, cond) for one in others],
        size=batch_rows(subject.shape),
    )
    found: dict[str, Any] = {"times": np.asarray(chain.times).tolist()}
    for place, one in enumerate(others):
        own = values[:, :, place]
        total = own.sum(axis=1)
        by_condition = {}
        for c in conditions:
            mean = estimate(total[cond == c])
            by_condition[subject.conditions.names[c]] = {
                "value": float(mean.value), "stderr": float(mean.stderr),
            }  # fmt: skip
        found[one.name] = {"by_condition": by_condition, "by_time": own.mean(axis=0).tolist()}
    return found


def harmed(
    tools: Tools, samples: dict[str, np.ndarray], again: np.ndarray, oracle: np.ndarray | None
) -> dict[str, Any]:
    """How the kept conditions compare with the reference's.

    Args:
      tools: what is audited.
      samples: of "model" and "reference", from the same noise; see `kept_samples`.
      again: of the reference from other noise.
      oracle: of the oracle, or None.
    """
    subject = tools.subject
    shape = (-1, *subject.conditions.image_shape)
    features_of_images = features_of(subject.judge)
    shown_as = dict(zip(subject.conditions.drawn, subject.conditions.shown_as, strict=True))
    found: dict[str, Any] = {"agreement": {}, "conditions": {}, "named": {}}
    features = {name: features_of_images(one.reshape(shape)) for name, one in samples.items()}
    base = features_of_images(again.reshape(shape))
    judged = samples | ({} if oracle is None else {"oracle": oracle})
    for name, drawn in judged.items() if subject.judge is not None else ():
        cond = np.repeat(np.asarray(subject.kept), drawn.shape[1])
        found["named"][name] = named_as(tools, cond, drawn.reshape(shape))
        named = np.array([found["named"][name][str(c)] for c in subject.kept])
        right = named == np.array([shown_as[c] for c in subject.kept])[:, None]
        found["agreement"][name] = (int(right.sum()), right.size)
        for c, row in zip(subject.kept, right, strict=True):
            entry = found["conditions"].setdefault(subject.conditions.names[c], {})
            entry[name] = (int(row.sum()), len(row))
    for name, own in features.items():
        distance = metrics.kernel_distance(own, base)
        near = metrics.coverage(base, own, k=min(5, len(base) - 1))
        found[f"kid_{name}"] = {"value": float(distance.value), "stderr": float(distance.stderr)}
        found[f"neighbours_{name}"] = near._asdict()
    if oracle is not None:
        theirs = features_of_images(oracle.reshape(shape))
        distance = metrics.kernel_distance(features["model"], theirs)
        found["kid_to_oracle"] = {
            "value": float(distance.value), "stderr": float(distance.stderr),
        }  # fmt: skip
    return found
