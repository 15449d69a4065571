"""The options of `jax-unlearn audit`."""

import dataclasses
import pathlib
from typing import Literal

from jax_unlearn.app.checks import check_numbers, check_texts, flag

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
_MOST_RESTARTS = 64


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """Measures what a model that was made to forget still shows, and what brings it back.

    The two models may come from anywhere: diffusers checkpoints of one architecture, conditioned
    on labels, on prompts or on nothing. What was to be forgotten is what --forget names, or without
    it the images themselves.
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
    several that mean the same: "sneaker|trainer". "repeated" names the repeated images of the
    embedded model. None, where --images are what was to be forgotten."""
    template: tuple[str, ...] = ()
    """Prompts: what names are put into, in place of {}, as those of `concept`. Of the embedded
    model their default are its own captions, as are those of --retain and --show."""
    retain: tuple[str, ...] = ()
    """Prompts to keep, or @FILE with one a line; of labels all others are."""
    cross: tuple[str, ...] = ()
    """More prompts to keep, of another domain: of objects where a style is forgotten. Accuracy is
    then told apart: IRA of --retain, CRA of these."""
    show: tuple[str, ...] = ()
    """Paraphrases of the prompts to forget, or @FILE with one a line: relearning is judged by
    these."""
    images: tuple[str, ...] = ()
    """Images of what was forgotten, which attacks use: a folder, an image, an .npz or an idx file;
    of several concepts PATH:NAME. Default: those of the embedded data, or else samples of the
    reference. Without --forget they are what was to be forgotten, given as `data` takes them:
    with labels, PATH:LABEL, PATH:CAPTION, or captions beside them."""
    unseen: tuple[str, ...] = ()
    """Images of the same kind that the reference was not trained on, in the same forms."""
    sscd: pathlib.Path | None = None
    """ONNX file of SSCD, a copy-detection network: copies are told by it, not by pixels. Needs
    onnxruntime: pip install 'jax-unlearn[sscd]'."""
    copy_rate: float = 0.01
    """Images without --forget: the share of --unseen that may be taken for copies, in (0, 1)."""
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
    """Samples that each reported share is counted in; of each kept condition a quarter, or more
    where they are few."""
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
    restarts: int = 1
    """Starting points of inversion and of UnlearnDiffAtk, side by side."""
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
        check_texts(self, ("forget", "template", "retain", "cross", "show"))
        for name in ("reference", "model"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: see jax-unlearn audit --help.")
        if not self.forget and not self.images:
            raise ValueError("--forget is missing, or --images: see jax-unlearn audit --help.")
        if not 0 < self.copy_rate < 1:
            raise ValueError(f"--copy-rate must lie in (0, 1), not {self.copy_rate}.")
        if not 1 <= self.restarts <= _MOST_RESTARTS:
            raise ValueError(f"--restarts must lie in [1, {_MOST_RESTARTS}], not {self.restarts}.")
        for name in ("samples", "attack_images"):
            value = getattr(self, name)
            if not LEAST <= value <= _MOST:
                raise ValueError(f"{flag(name)} must lie in [{LEAST}, {_MOST}], not {value}.")
        if self.inversion_steps % 8:
            raise ValueError(
                f"--inversion-steps must be a multiple of 8, not {self.inversion_steps}."
            )
