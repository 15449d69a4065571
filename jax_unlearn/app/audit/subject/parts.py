"""What an audit is of, as its measurements see it: models, conditions, and what was forgotten."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jax_unlearn.app.audit.copies import Copies, Space
from jax_unlearn.app.tasks.conditions import NamedConditions
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained.text_to_image import TextToImage
from jax_unlearn.schedules import NoiseSchedule
from jax_unlearn.typing import Denoiser, Params

__all__ = ["Concept", "Domains", "Subject", "Target"]


class Target(NamedTuple):
    """A model that attacks are made on.

    Attributes:
      name: "model", "reference" or "oracle".
      params: of the denoiser.
      table: what it is conditioned on, a tree of arrays [conditions, ...]. An unconditional model
        has one condition of no numbers, which it does not see.
      text: the pipeline that encodes prompts; None for labels.
    """

    name: str
    params: Params
    table: Any
    text: TextToImage | None


class Concept(NamedTuple):
    """Something that was to be forgotten.

    Attributes:
      name: of it.
      forgotten: conditions that name it, or that its images are shown under.
      lost: classes of the judge that show it; none where images are what was to be forgotten.
      images: of it, uint8 [n, height, width, channels].
      x_0: those that attacks are given, as the denoiser has them, [k, ...].
      cond: the condition that each of these is shown under, [k].
      unseen: images that the reference was not trained on, as x_0; None where there are none.
      unseen_cond: as `cond`.
      source: where the images came from.
      copies: what makes a sample a copy, where images are what was to be forgotten; else None.
      control: the same of images that no model saw: what an attack brings up without memory.
    """

    name: str
    forgotten: tuple[int, ...]
    lost: tuple[int, ...]
    images: np.ndarray
    x_0: np.ndarray
    cond: np.ndarray
    unseen: np.ndarray | None
    unseen_cond: np.ndarray | None
    source: str
    copies: Copies | None = None
    control: "Concept | None" = None


class Domains(NamedTuple):
    """Which classes of the judge are right for a condition, in two domains.

    Attributes:
      inner: condition -> the concept of it in the domain of what was forgotten, and its classes.
      cross: the same in the other domain, as that of styles where an object was forgotten.
    """

    inner: dict[int, tuple[str, tuple[int, ...]]]
    cross: dict[int, tuple[str, tuple[int, ...]]]


class Subject(NamedTuple):
    """Everything that an audit is of.

    Attributes:
      apply: (params, x_t, t, e) -> prediction, conditioned on rows e of a `Target.table`.
      schedule: its noise schedule, of variance "fixed_geometric".
      shape: of what is denoised.
      targets: "model" and "reference", and "oracle" where there is one.
      conditions: by number, as `Target.table` has them.
      concepts: what was to be forgotten.
      kept: conditions to keep, without the free branch where there are others.
      shown: paraphrases.
      null: the free branch of guidance; None where there is none.
      start: the condition that inversion starts from: what stands in place of the concept.
      judge: names what images show; None where nobody does.
      spaces: where distances of images are taken; the first decides what a copy is.
      domains: what IRA and CRA are of; None where nothing says which prompts are of which.
    """

    apply: Denoiser
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    targets: dict[str, Target]
    conditions: NamedConditions
    concepts: tuple[Concept, ...]
    kept: tuple[int, ...]
    shown: tuple[int, ...]
    null: int | None
    start: int
    judge: JudgeFunctions | None
    spaces: tuple[Space, ...]
    domains: Domains | None = None

    @property
    def of_images(self) -> bool:
        """Whether images were to be forgotten, and no concept that a judge would name."""
        return any(one.copies is not None for one in self.concepts)

    @property
    def conditioned(self) -> bool:
        """Whether the models see a condition."""
        return any(np.size(leaf) for leaf in jax.tree.leaves(self.targets["reference"].table))

    @property
    def uncaptioned(self) -> bool:
        """Whether no image, forgotten or unseen, has a condition to be guided by."""
        return all(
            set(one.forgotten) == {self.null}
            for concept in self.concepts
            for _, one in self.sides(concept).values()
        )

    def sides(self, concept: Concept) -> dict[str, tuple[Target, Concept]]:
        """What attacks are made on, by name; "unseen" is the model with images it never saw."""
        found = {name: (target, concept) for name, target in self.targets.items()}
        if concept.control is not None:
            found["unseen"] = self.targets["model"], concept.control
        return found

    def rows(self, target: Target, cond: np.ndarray) -> Any:
        """What conditions [n] are to a target, [n, ...]."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[cond], target.table)

    def free(self, target: Target, count: int) -> Any:
        """The free branch of guidance, [count, ...]; None where there is none."""
        if self.null is None:
            return None
        return self.rows(target, np.full(count, self.null, np.int32))
