"""The options of `jax-unlearn audit`."""

import dataclasses
import pathlib
from typing import Literal

from jax_unlearn.app.options import check_numbers, check_texts, flag

__all__ = ["ATTACKS", "LEAST", "AuditOptions"]

Attack = Literal[
    "inversion", "unlearndiffatk", "noise", "stochasticity", "inpainting", "guidance", "relearning",
    "rounding",
]  # fmt: skip
ATTACKS: tuple[Attack, ...] = (
    "inversion", "unlearndiffatk", "noise", "stochasticity", "inpainting", "guidance", "relearning",
    "rounding",
)  # fmt: skip
"""Their names, in the order in which they run."""
LEAST = 4
"""Images or samples of which an interval still says something."""
_MOST = 4096


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """Measures what a model that was made to forget still shows, and what brings it back.

    The two models may come from anywhere: diffusers checkpoints of one architecture, conditioned
    on labels or on prompts.
    """

    reference: str = ""
    """The model before: pipeline folder, model folder or name on the hub; "embedded" and
    "embedded-text" are the embedded models."""
    model: str = ""
    """The model after, in the same forms; or its UNet alone."""
    oracle: str = ""
    """A model of the same architecture that was trained without what was to be forgotten, or its
    UNet alone: what an attack makes of it is no memory."""
    out: pathlib.Path = pathlib.Path("audit")
    """Folder for the results; refused if it exists, unless --resume or --overwrite."""
    resume: bool = False
    """Go on with an audit that was stopped: what it has measured is not measured again."""
    overwrite: bool = False
    """Move an existing --out aside (to OUT.previous-N) and start anew."""
    forget: tuple[str, ...] = ()
    """Concepts that were to be forgotten: labels, by name or number; or for prompts a name, or
    several that mean the same: "sneaker|trainer"."""
    template: tuple[str, ...] = ()
    """Prompts: what names are put into, in place of {}, as those of `concept`. Of the embedded
    model their default are its own captions, as are those of --retain and --show."""
    retain: tuple[str, ...] = ()
    """Prompts to keep, or @FILE with one a line; of labels all others are."""
    show: tuple[str, ...] = ()
    """Paraphrases of the prompts to forget, or @FILE with one a line: relearning is judged by
    these."""
    images: tuple[str, ...] = ()
    """Images of what was forgotten, which attacks use: a folder, an image, an .npz or an idx file;
    of several concepts PATH:NAME. Default: those of the embedded data, or else samples of the
    reference."""
    unseen: tuple[str, ...] = ()
    """Images of the same concepts that the reference was not trained on, in the same forms."""
    resize: bool = False
    """Crop and resize images, and convert their channels, to what the model takes."""
    clip: pathlib.Path | None = None
    """Prompts: folder of a CLIP, which names what samples show among the prompts."""
    judge: pathlib.Path | None = None
    """Labels: folder of a classifier (judge.json, judge.safetensors) that names what samples
    show."""
    attacks: tuple[Attack, ...] = ()
    """Which attacks to make; default all that the model allows."""
    samples: int = 64
    """Samples that each reported share is counted in, of each kept condition at most a quarter."""
    attack_images: int = 64
    """Images of a concept, at most, that an attack is given."""
    sampling_steps: int = 25
    """DDIM steps of a sample, 1 to the number of training steps."""
    chain_steps: int = 10
    """Steps of the ancestral chain along which path KLs are measured."""
    guidance: float = 2.5
    """Classifier-free guidance scale of the samples."""
    inversion_steps: int = 400
    """Steps of concept inversion, a multiple of 8."""
    inversion_rate: float = 3e-2
    """Adam's step size of concept inversion."""
    relearning_steps: int = 64
    """Steps of relearning, at most."""
    relearning_rate: float = 5e-4
    """Adam's step size of relearning."""
    seed: int = 0
    """Seed of everything random, 0 to 4294967295."""

    @property
    def chosen(self) -> tuple[Attack, ...]:
        """The attacks, in order; all where none were named."""
        return tuple(one for one in ATTACKS if not self.attacks or one in self.attacks)

    def validate(self) -> None:
        """Checks that the job is complete, and every number.

        Raises:
          ValueError: naming the option.
        """
        check_numbers(self)
        check_texts(self, ("forget", "template", "retain", "show"))
        for name in ("reference", "model", "forget"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: see jax-unlearn audit --help.")
        for name in ("samples", "attack_images"):
            value = getattr(self, name)
            if not LEAST <= value <= _MOST:
                raise ValueError(f"{flag(name)} must lie in [{LEAST}, {_MOST}], not {value}.")
        if self.inversion_steps % 8:
            raise ValueError(
                f"--inversion-steps must be a multiple of 8, not {self.inversion_steps}."
            )
