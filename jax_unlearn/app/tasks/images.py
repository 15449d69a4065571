"""Forgetting images: from images and options to constraints, conditions, batches, and the task."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_unlearn import schedules
from jax_unlearn.app import data, embedded
from jax_unlearn.app.options import DataOptions, DemoOptions, ImageOptions
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.conditions import NamedConditions, of_labels, of_prompts, table_of
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.pretrained.text_to_image import TextToImage, encode_images
from jax_unlearn.problem import Batch, Images
from jax_unlearn.typing import Condition

__all__ = [
    "Captions",
    "Constraint",
    "ImageRequest",
    "batch",
    "forgotten_rows",
    "from_captioned",
    "from_embedded",
    "from_paths",
    "make_request",
    "under_null",
]

# Captions of what is forgotten, and of what is kept, that samples are drawn of.
DRAWN = 8


class Constraint(NamedTuple):
    """One thing to forget: a name, where it came from, and its images by index."""

    name: str
    source: str
    threshold: str
    indices: np.ndarray


class Captions(NamedTuple):
    """The captions that images of a model from text to image are labelled by.

    Attributes:
      table: what the denoiser is conditioned on under each, the last being no prompt; a tree of
        arrays [captions + 1, ...].
      texts: the captions themselves, in the order of the table; the last is None.
      sampled: the model with a denoiser that takes the numbers of the drawn conditions.
    """

    table: Any
    texts: tuple[str | None, ...]
    sampled: Pretrained


class ImageRequest(NamedTuple):
    """What is to be forgotten and what is to be kept, checked and ready.

    Attributes:
      pretrained: the model.
      forget: all images to forget.
      constraints: which of these belong to which constraint.
      retain: images to train on.
      held_out: retained images that nothing is trained on.
      forgotten_labels: labels that only images to forget have, and that are given to the retained
        images; none of a model from text to image, where a caption is one image's.
      conditions: what samples are drawn of.
      lost: those of them that only images to forget are shown under.
      captions: of a model from text to image; None where labels are the model's own.
      notes: what was done to the input that its owner should know.
      known: samples of the reference that the runs of one command share; see `drawing`.
    """

    pretrained: Pretrained
    forget: data.Images
    constraints: tuple[Constraint, ...]
    retain: data.Images
    held_out: data.Images
    forgotten_labels: tuple[int, ...]
    conditions: NamedConditions
    lost: tuple[int, ...]
    captions: Captions | None
    notes: tuple[str, ...]
    known: dict[Any, np.ndarray] | None = None

    @property
    def null(self) -> int | None:
        """The label that stands for none."""
        if self.captions is None:
            return self.pretrained.config.null_label
        return len(jax.tree.leaves(self.captions.table)[0]) - 1

    def cond(self, labels: np.ndarray | None) -> Condition:
        """What the denoiser takes for the labels [n] of images."""
        if self.captions is None:
            return labels
        return jax.tree.map(lambda leaf: leaf[labels], self.captions.table)


def make_request(
    pretrained: Pretrained,
    forget: Sequence[tuple[str, str, data.Images]],
    retain: data.Images,
    held_out: data.Images | None,
    options: ImageOptions,
) -> ImageRequest:
    """Makes a request of sets (name, source, images) to forget and images to retain.

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
    if (
        not pretrained.config.text_conditional
        and together.labels is not None
        and retain.labels is not None
    ):
        forgotten = tuple(int(label) for label in np.setdiff1d(together.labels, retain.labels))
    if options.estimator == "importance" and options.forget_batch_size > _base_rows(
        options, bool(forgotten)
    ):
        raise ValueError(
            f"the importance estimator pairs each of --forget-batch-size "
            f"{options.forget_batch_size} images with a retained one, and the batch has "
            f"{_base_rows(options, bool(forgotten))} to pair: lower it, or raise --batch-size."
        )
    return ImageRequest(
        pretrained,
        together,
        tuple(constraints),
        retain,
        held_out,
        forgotten,
        of_labels(pretrained),
        forgotten,
        None,
        tuple(notes),
    )


def from_paths(pretrained: Pretrained, options: DataOptions) -> ImageRequest:
    """Reads the images that the options name, for a model in pixel space.

    Raises:
      ValueError: for anything wrong with them, see `data.read_images`, or an option of models from
        text to image.
    """
    config = pretrained.config
    options.refuse(("train", "clip"), "models that are conditioned on prompts")

    def read(text: str) -> data.Images:
        return data.read_images(
            text,
            shape=config.sample_shape,
            id2label=config.id2label,
            num_labels=config.num_labels or None,
            resize=options.resize,
        )

    return _make_request(pretrained, options, *(map(read, part) for part in _sources(options)))


def from_captioned(model: TextToImage, options: DataOptions) -> ImageRequest:
    """Reads images and their captions for a model on latents, and encodes each of them once.

    The latents of an image are one draw of the autoencoder's law of them, as in training. Images
    are labelled by the numbers of their captions; see `DataOptions` for where these come from.

    Raises:
      ValueError: for anything wrong with them; see `data.read_images` and `data.read_captions`.
    """
    options.refuse(("judge",), "models that are conditioned on labels; give --clip")
    numbers: dict[str | None, int] = {}

    def read(text: str) -> data.Images:
        path, given = data.parse_source(text)
        shape = model.image_shape
        images = data.read_images(data.Source(path, None), shape=shape, resize=options.resize)
        count = len(images.names)
        given = given and " ".join(given.split())  # as those that are read
        found = [given] * count if given else data.read_captions(images.names) or [None] * count
        labels = [numbers.setdefault(one, len(numbers)) for one in found]
        return images._replace(labels=np.array(labels, np.int32))

    request = _make_request(
        model.pretrained, options, *([*map(read, part)] for part in _sources(options))
    )
    every = list(numbers)
    captions = [caption for caption in every if caption is not None]
    table = table_of(model, captions)
    of_forget, of_retain = (
        list(dict.fromkeys(caption for label in part.labels if (caption := every[label])))
        for part in (request.forget, request.retain)
        if part.labels is not None
    )
    drawn = list(dict.fromkeys(of_forget[:DRAWN] + of_retain[:DRAWN]))
    sampled, conditions = of_prompts(model, drawn)
    if not drawn:
        assert conditions.null is not None
        conditions = conditions._replace(drawn=(conditions.null,), shown_as=(-1,))
    kept = set(of_retain)
    # No prompt is the last row of the table.
    place = {caption: row for row, caption in enumerate(captions)}
    rows = np.array([len(captions) if one is None else place[one] for one in every], np.int32)

    def encoded(part: data.Images, number: int) -> data.Images:
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        labels = part.labels
        assert labels is not None
        return part._replace(
            labels=rows[labels],
            latents=in_batches(
                lambda key, pixels: encode_images(model, data.to_unit_range(pixels), key),
                key,
                part.pixels,
                size=batch_rows(model.image_shape),
            ),
        )

    return request._replace(
        forget=encoded(request.forget, 0),
        retain=encoded(request.retain, 1),
        held_out=encoded(request.held_out, 2),
        conditions=conditions,
        lost=tuple(number for number, caption in enumerate(drawn) if caption not in kept),
        captions=Captions(table, (*captions, None), sampled),
    )


def _sources(options: DataOptions) -> tuple[tuple[str, ...], ...]:
    return options.forget, options.retain, options.held_out


def _make_request(
    pretrained: Pretrained,
    options: DataOptions,
    forget: Iterable[data.Images],
    retain: Iterable[data.Images],
    held_out: Iterable[data.Images],
) -> ImageRequest:
    sets = [(text, text, images) for text, images in zip(options.forget, forget, strict=True)]
    kept, others = data.concatenate([*retain]), [*held_out]
    return make_request(
        pretrained, sets, kept, data.concatenate(others) if others else None, options
    )


def from_embedded(pretrained: Pretrained, options: DemoOptions) -> tuple[ImageRequest, DemoOptions]:
    """The embedded data with the labels, or the repeated images, that the options name.

    Returns:
      The request, and the options: "repeated" makes each image a constraint.

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
        return make_request(pretrained, forget, train, held_out, options), options
    labels = [pretrained.config.find_label(text) for text in options.asked]
    names = pretrained.config.id2label or {}
    forget = [
        (names[label], names[label], data.take(train, np.flatnonzero(stored.train.labels == label)))
        for label in labels
    ]
    kept = data.take(held_out, np.flatnonzero(~np.isin(stored.held_out.labels, labels)))
    return make_request(pretrained, forget, train, kept, options), options


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


def batch(request: ImageRequest, options: ImageOptions, step: int) -> Batch:
    """The batch of a step: a pure function of the seed and the step, images as bytes.

    Kept rows are shown under their own labels; where no label is forgotten, a share of them
    under the null label. Where labels are forgotten, base rows show retained images under the
    null label and under the forgotten labels. Images to forget are shown under their own
    labels and, a share of them, under the null label. Captions are labels, and no prompt the null
    label; latents take the images' place.
    """
    seed, null, cond = options.seed, request.null, request.cond
    rng = np.random.default_rng([seed, step, 1])
    rows = data.batch_indices(
        seed=seed, step=step, size=options.batch_size, count=len(request.retain.pixels)
    )
    chosen = data.take(request.retain, rows)
    based = _base_rows(options, True) if request.forgotten_labels else 0
    base = None
    if based:
        under = rng.choice(np.asarray(request.forgotten_labels, np.int32), size=based)
        under = under_null(under, null, options.null_share, rng)
        base = Images(chosen.stored[:based], cond(under))
    labels = None if chosen.labels is None else chosen.labels[based:]
    kept = None
    if based < options.batch_size:
        share = 0.0 if based else options.null_share
        kept = Images(chosen.stored[based:], cond(under_null(labels, null, share, rng)))
    forget, constraint = forgotten_rows(request, options, step)
    return Batch(
        kept,
        Images(
            forget.stored,
            cond(under_null(forget.labels, null, options.null_share, rng)),
            constraint,
        ),
        base,
    )


def forgotten_rows(
    request: ImageRequest, options: ImageOptions, step: int
) -> tuple[data.Images, np.ndarray]:
    """The images to forget of a step, and the constraint of each, int32 [n]."""
    constraint, image = data.balanced_indices(
        seed=options.seed,
        step=step,
        size=options.forget_batch_size,
        counts=[len(one.indices) for one in request.constraints],
    )
    index = np.array(
        [request.constraints[c].indices[i] for c, i in zip(constraint, image, strict=True)]
    )
    return data.take(request.forget, index), constraint.astype(np.int32)
