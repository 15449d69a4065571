"""What attacks share: how images are drawn under given conditions, and how they are counted."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.app import data
from jax_unlearn.app.audit.drawing import NOISE, drawer
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject import Concept, Subject, Target
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.pretrained.text_to_image import encode_images

__all__ = [
    "SHOWN",
    "Attack",
    "Attempt",
    "Drawn",
    "Row",
    "Tools",
    "encoded",
    "make_tools",
    "sampled",
    "seed_of",
    "spread",
]

SHOWN = 8


class Row(NamedTuple):
    """What an attack came to.

    Attributes:
      settings: of it, by name.
      budget: what it was given; see `BUDGETS`.
      hits: images that show the concept, as the judge says.
      count: images.
    """

    settings: dict[str, Any]
    budget: float
    hits: int
    count: int


class Attempt(NamedTuple):
    """Rows of an attack on one target, and some images of its last one, uint8."""

    rows: list[Row]
    images: np.ndarray


class Drawn(NamedTuple):
    """What one setting of an attack makes.

    Attributes:
      settings: of it, by name.
      budget: what it was given; see `BUDGETS`.
      images: uint8 [n, height, width, channels].
      before: which of them count whatever they show, [n]; or None.
    """

    settings: dict[str, Any]
    budget: float
    images: np.ndarray
    before: np.ndarray | None = None


Attack = Callable[[Target, Concept], Iterator[Drawn]]


class Tools(NamedTuple):
    """What attacks share: compiled once for all targets.

    Attributes:
      subject: what is audited.
      options: how.
      draw: see `drawer`.
      named: uint8 images [n, ...] -> the judge's class of each, [n]; −1 without a judge.
    """

    subject: Subject
    options: AuditOptions
    draw: Any
    named: Callable[[np.ndarray], np.ndarray]

    def shows(self, images: np.ndarray, concept: Concept) -> np.ndarray:
        """Which images show a concept: as the judge names them, or as copies of its images, [n]."""
        if concept.copies is not None:
            return concept.copies.among(images)
        return np.isin(self.named(images), concept.lost)

    def judged(self, drawn: Iterable[Drawn], concept: Concept) -> Attempt:
        """Judges all that an attack makes."""
        rows, images = [], None
        for one in drawn:
            shows, images = self.shows(one.images, concept), one.images[:SHOWN]
            if one.before is not None:
                shows = shows | one.before
            rows.append(Row(one.settings, one.budget, int(shows.sum()), len(shows)))
        assert images is not None
        return Attempt(rows, images)

    def forgotten(self, concept: Concept) -> np.ndarray:
        """Conditions that name it, in turn, as many as there are samples."""
        return np.resize(np.asarray(concept.forgotten, np.int32), self.options.samples)


def make_tools(subject: Subject, options: AuditOptions) -> Tools:
    """Prepares what attacks and other measurements share."""
    conditions = subject.conditions
    draw = drawer(
        subject.apply,
        subject.schedule,
        conditions.decode,
        shape=subject.shape,
        steps=options.sampling_steps,
    )
    logits = None if subject.judge is None else jax.jit(subject.judge.logits)

    def named(images: np.ndarray) -> np.ndarray:
        if logits is None:
            return np.full(len(images), -1)
        found = in_batches(
            lambda _, x: logits(data.to_unit_range(x)),
            jax.random.key(0),
            images,
            size=batch_rows(conditions.image_shape),
        )
        return found.argmax(axis=1)

    return Tools(subject, options, draw, named)


def spread(e: Any, count: int) -> Any:
    """One condition as that of `count` rows."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), e)


def seed_of(tools: Tools, name: str) -> tuple[int, int]:
    """The seed of noise of its own for each name of `NOISE`."""
    return tools.options.seed, NOISE[name]


def sampled(tools: Tools, target: Target, e: Any, name: str, **changed: Any) -> np.ndarray:
    """Guided samples of conditions e [n, ...], from noise of its own for each name of `NOISE`."""
    count = len(jax.tree.leaves(e)[0])
    given = {"scale": tools.options.guidance, "seed": seed_of(tools, name)} | changed
    params = given.pop("params", target.params)
    return tools.draw(params, e, tools.subject.free(target, count), **given)


def encoded(tools: Tools, images: np.ndarray) -> np.ndarray:
    """Images as the denoiser has them."""
    text = tools.subject.targets["reference"].text
    if text is None:
        return np.asarray(data.to_unit_range(images))
    return in_batches(
        lambda _, x: encode_images(text, data.to_unit_range(x)),
        jax.random.key(0),
        images,
        size=batch_rows(images.shape[1:]),
    )
