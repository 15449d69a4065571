"""Forgetting images: from images and options to constraints, conditions, batches, and the task."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_unlearn import data, embedded, schedules
from jax_unlearn.formulations import Batch, Examples, Forget
from jax_unlearn.options import DataOptions, DemoOptions, ImageOptions
from jax_unlearn.pretrained import Pretrained

__all__ = [
    "Constraint",
    "Problem",
    "batch",
    "from_embedded",
    "from_paths",
    "make_problem",
    "under_null",
]


class Constraint(NamedTuple):
    """One thing to forget: a name, where it came from, and its images by index."""

    name: str
    source: str
    threshold: str
    indices: np.ndarray


class Problem(NamedTuple):
    """What is to be forgotten and what is to be kept, checked and ready.

    Attributes:
      pretrained: the model.
      forget: all images to forget.
      constraints: which of these belong to which constraint.
      retain: images to train on.
      held_out: retained images that nothing is trained on.
      forgotten_labels: labels that only images to forget have.
      notes: what was done to the input that its owner should know.
    """

    pretrained: Pretrained
    forget: data.Images
    constraints: tuple[Constraint, ...]
    retain: data.Images
    held_out: data.Images
    forgotten_labels: tuple[int, ...]
    notes: tuple[str, ...]


def make_problem(
    pretrained: Pretrained,
    forget: Sequence[tuple[str, str, data.Images]],
    retain: data.Images,
    held_out: data.Images | None,
    options: ImageOptions,
) -> Problem:
    """Makes a problem of sets (name, source, images) to forget and images to retain.

    Images to forget that also stand among the retained or held-out ones are removed from
    those. Without held-out images a share of the retained ones is held out.

    Raises:
      ValueError: if nothing is left to retain.
    """
    notes = []
    # Refused now and not after minutes of work.
    schedules.timesteps(pretrained.schedule, options.sampling_steps)
    sets = [images for _, _, images in forget]
    retain, removed = data.remove_overlap(retain, sets)
    if removed:
        notes.append(
            f"{removed} retained images are also to be forgotten (the same pixels): "
            "removed from the retained ones."
        )
    if held_out is None:
        retain, held_out = data.split_held_out(
            retain, fraction=options.held_out_share, seed=options.seed, maximum=5_000
        )
    else:
        held_out, removed = data.remove_overlap(held_out, [*sets, retain])
        if removed:
            notes.append(f"{removed} held-out images also stand elsewhere: removed.")
    thresholds = options.threshold * (len(forget) if len(options.threshold) == 1 else 1)
    constraints, start = [], 0
    for (name, source, images), threshold in zip(forget, thresholds, strict=True):
        indices = np.arange(start, start + len(images.pixels))
        start += len(indices)
        if options.per_image:
            constraints += [
                Constraint(image, source, threshold, np.array([index]))
                for image, index in zip(images.names, indices, strict=True)
            ]
        else:
            constraints.append(Constraint(name, source, threshold, indices))
    together = data.concatenate(sets)
    forgotten: tuple[int, ...] = ()
    if together.labels is not None and retain.labels is not None:
        forgotten = tuple(int(label) for label in np.setdiff1d(together.labels, retain.labels))
    if options.estimator == "importance" and options.forget_batch_size > _base_rows(
        options, bool(forgotten)
    ):
        raise ValueError(
            f"the importance estimator pairs each of --forget-batch-size "
            f"{options.forget_batch_size} images with a retained one, and the batch has "
            f"{_base_rows(options, bool(forgotten))} to pair: lower it, or raise --batch-size."
        )
    return Problem(
        pretrained, together, tuple(constraints), retain, held_out, forgotten, tuple(notes)
    )


def from_paths(pretrained: Pretrained, options: DataOptions) -> Problem:
    """Reads the images that the options name.

    Raises:
      ValueError: for anything wrong with them; see `data.read_images`.
    """
    config = pretrained.config
    if config.pipeline:
        raise ValueError(
            f"{config.source} works on latents: `data` takes pixel-space models; `concept` forgets "
            "prompts."
        )

    def read(text: str) -> data.Images:
        return data.read_images(
            text,
            shape=config.sample_shape,
            id2label=config.id2label,
            num_labels=config.num_labels or None,
            resize=options.resize,
        )

    forget = [(text, text, read(text)) for text in options.forget]
    retain = data.concatenate([read(text) for text in options.retain])
    held_out = (
        data.concatenate([read(text) for text in options.held_out]) if options.held_out else None
    )
    return make_problem(pretrained, forget, retain, held_out, options)


def from_embedded(pretrained: Pretrained, options: DemoOptions) -> tuple[Problem, DemoOptions]:
    """The embedded data with the labels, or the repeated images, that the options name.

    Returns:
      The problem, and the options: "repeated" makes each image a constraint.

    Raises:
      ValueError: for a label that the model does not have, or "repeated" together with one.
    """
    stored = embedded.load_data()

    def images(part: embedded.LabelledImages, name: str) -> data.Images:
        names = tuple(f"{name} {number}" for number in range(len(part.labels)))
        return data.Images(part.pixels, part.labels, names)

    train, held_out = images(stored.train, "image"), images(stored.held_out, "held-out image")
    if "repeated" in options.forget:
        if len(options.forget) > 1:
            raise ValueError("--forget repeated stands alone: give labels or 'repeated', not both.")
        options = dataclasses.replace(options, per_image=True)
        forget = [("repeated", "repeated images", data.take(train, stored.repeated))]
        return make_problem(pretrained, forget, train, held_out, options), options
    labels = [pretrained.config.find_label(text) for text in options.asked]
    names = pretrained.config.id2label or {}
    forget = [
        (names[label], names[label], data.take(train, np.flatnonzero(stored.train.labels == label)))
        for label in labels
    ]
    kept = data.take(held_out, np.flatnonzero(~np.isin(stored.held_out.labels, labels)))
    return make_problem(pretrained, forget, train, kept, options), options


def _base_rows(options: ImageOptions, forgotten: bool) -> int:
    return round(options.base_share * options.batch_size) if forgotten else options.batch_size


def under_null(
    labels: np.ndarray | None, null_label: int | None, share: float, rng: np.random.Generator
) -> np.ndarray | None:
    """The labels, a share of them replaced by the null label, where there is one."""
    if labels is None:
        return None
    labels = labels.astype(np.int32)
    if null_label is None:
        return labels
    hidden = rng.permutation(len(labels)) < round(share * len(labels))
    return np.where(hidden, np.int32(null_label), labels)


def batch(problem: Problem, options: ImageOptions, step: int) -> Batch:
    """The batch of a step: a pure function of the seed and the step, images as bytes.

    Kept rows are shown under their own labels; where no label is forgotten, a share of them
    under the null label. Where labels are forgotten, base rows show retained images under the
    null label and under the forgotten labels. Images to forget are shown under their own
    labels and, a share of them, under the null label.
    """
    seed, null = options.seed, problem.pretrained.config.null_label
    rng = np.random.default_rng([seed, step, 1])
    rows = data.batch_indices(
        seed=seed, step=step, size=options.batch_size, count=len(problem.retain.pixels)
    )
    chosen = data.take(problem.retain, rows)
    based = _base_rows(options, True) if problem.forgotten_labels else 0
    base = None
    if based:
        under = rng.choice(np.asarray(problem.forgotten_labels, np.int32), size=based)
        base = Examples(chosen.pixels[:based], under_null(under, null, options.null_share, rng))
    labels = None if chosen.labels is None else chosen.labels[based:]
    kept = None
    if based < options.batch_size:
        share = 0.0 if based else options.null_share
        kept = Examples(chosen.pixels[based:], under_null(labels, null, share, rng))
    constraint, image = data.balanced_indices(
        seed=seed,
        step=step,
        size=options.forget_batch_size,
        counts=[len(one.indices) for one in problem.constraints],
    )
    index = np.array(
        [problem.constraints[c].indices[i] for c, i in zip(constraint, image, strict=True)]
    )
    forget = data.take(problem.forget, index)
    return Batch(
        kept,
        base,
        Forget(
            forget.pixels,
            under_null(forget.labels, null, options.null_share, rng),
            constraint.astype(np.int32),
        ),
    )
