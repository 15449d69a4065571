"""Each attack on one target: what the judge sees, against what the attack was given.

An attack draws images, setting by setting, and the judge counts those that show the concept. The
same attack on the reference and on an oracle says what its success means.
"""

from collections.abc import Callable

from jax_unlearn.app.audit.attacks import conditions, images, weights
from jax_unlearn.app.audit.attacks.tools import (
    SHOWN,
    Attack,
    Attempt,
    Drawn,
    Row,
    Tools,
    make_tools,
    seed_of,
)
from jax_unlearn.app.audit.subject import Subject

__all__ = [
    "SHOWN",
    "Attack",
    "Attempt",
    "Drawn",
    "Row",
    "Tools",
    "attempts",
    "make_tools",
    "seed_of",
    "unavailable",
]


def attempts(tools: Tools) -> dict[str, Attack]:
    """The chosen attacks: name -> a function of (target, concept).

    Raises:
      ValueError: for one that was named and that the model does not allow.
    """
    subject, options = tools.subject, tools.options
    for name, why in unavailable(subject).items():
        if name in options.attacks:
            raise ValueError(f"--attacks {name}: {why}.")
    chosen = [name for name in options.chosen if name not in unavailable(subject)]
    functions: dict[str, Callable[[Tools], Attack]] = {
        "inversion": conditions.inversion,
        "unlearndiffatk": conditions.unlearndiffatk,
        "noise": images.noise,
        "stochasticity": images.stochasticity,
        "inpainting": images.inpainting,
        "guidance": images.guidance,
        "relearning": weights.relearning,
        "rounding": weights.rounding,
    }
    return {name: functions[name](tools) for name in chosen}


def unavailable(subject: Subject) -> dict[str, str]:
    """Attacks that the model or the request does not allow, and why."""
    text, found = subject.targets["reference"].text, {}
    if text is None:
        takes = "labels" if subject.conditioned else "no condition"
        found["unlearndiffatk"] = f"it changes tokens of a prompt, and this model takes {takes}"
    elif not conditions.one_encoder(text):
        found["unlearndiffatk"] = "it is for models with one text encoder"
    elif subject.of_images:
        found["unlearndiffatk"] = "it is for prompts that name a concept, and these are images"
    if not subject.conditioned:
        found["inversion"] = "it fits a condition, and this model takes none"
    if subject.of_images:
        found["guidance"] = "it follows a judge of classes, and copies are told by their distance"
    return found
