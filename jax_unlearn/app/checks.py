"""What numbers, texts and thresholds of every command must be."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax_unlearn.app.data import fold
from jax_unlearn.models.files import shown

__all__ = [
    "Threshold",
    "check_numbers",
    "check_texts",
    "check_thresholds",
    "flag",
    "parse_threshold",
]

_MOST = 2**31 - 1  # What JAX's indices and counters hold.
_LARGEST = 3.4e38  # Of float32; NaN is not below it either.
# JAX's keys have 32 bits of a seed: larger ones would repeat the noise of smaller ones.
_SEEDS = 2**32
_DOMAINS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("steps", "batch_size", "forget_batch_size", "evaluation_images", "sampling_steps",
         "checkpoint_every", "chain_steps", "minibatches", "accumulate", "classifier_draws",
         "stored_samples", "attack_images", "attack_steps", "inversion_steps", "relearning_steps"),
        lambda value: 1 <= value <= _MOST,
        f"lie in [1, {_MOST}]",
    ),
    (
        ("samples", "target_steps", "corrections"),
        lambda value: 0 <= value <= _MOST,
        f"lie in [0, {_MOST}]",
    ),
    (("seed",), lambda value: 0 <= value < _SEEDS, f"lie in [0, {_SEEDS - 1}]"),
    (
        ("learning_rate", "inversion_rate", "relearning_rate"),
        lambda value: 0 < value <= _LARGEST,
        "be positive and finite",
    ),
    (
        ("dual_learning_rate", "dual_damping", "guidance"),
        lambda value: 0 <= value <= _LARGEST,
        "be 0 or more, and finite",
    ),
    (("base_share", "null_share"), lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    (("classifier_noise",), lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (("held_out_share", "max_multiplier"), lambda value: 0 < value < 1, "lie in (0, 1)"),
)  # fmt: skip


def check_numbers(options: Any) -> None:
    """Checks every number of a command against its domain.

    Raises:
      ValueError: naming the option, what was given and what is allowed.
    """
    for names, allowed, must in _DOMAINS:
        for name in names:
            value = getattr(options, name, None)
            if name == "steps" and getattr(options, "method", "") == "uce":
                continue  # A closed form has none.
            if value is not None and not allowed(value):
                raise ValueError(f"{flag(name)} must {must}, not {shown(str(value))}.")


def flag(name: str) -> str:
    """The option of a field on the command line."""
    return "--" + name.replace("_", "-")


def check_texts(options: Any, names: Sequence[str]) -> None:
    """Refuses labels and prompts with control characters, which nobody can have meant."""
    for name in names:
        given = getattr(options, name)
        for text in (given,) if isinstance(given, str) else given or ():
            fold(text, f"{flag(name)} {text!r}")


def check_thresholds(threshold: tuple[str, ...], forget: tuple[str, ...]) -> None:
    """Checks that there is one threshold, or one for each --forget, and that all can be read."""
    for text in threshold:
        parse_threshold(text)
    if len(threshold) not in (1, len(forget)):
        raise ValueError(
            f"{len(threshold)} thresholds for {len(forget)} --forget: give one for all, or one "
            "each."
        )


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A threshold as it was asked for.

    Attributes:
      kind: "absolute", "relative" (times the reference model's value) or "calibrated".
      number: of the first two; None for "calibrated".
    """

    kind: Literal["absolute", "relative", "calibrated"]
    number: float | None = None


def parse_threshold(text: str) -> Threshold:
    """Reads "calibrated", "2x" or "0.1".

    Raises:
      ValueError: for anything else, and for numbers that are not positive and finite.
    """
    if text == "calibrated":
        return Threshold("calibrated")
    relative = text.endswith("x")
    try:
        number = float(text[:-1] if relative else text)
    except ValueError:
        raise ValueError(
            f"threshold {text!r} is not a number, a ratio such as 2x, or 'calibrated'."
        ) from None
    if not 0 < number <= _LARGEST:
        raise ValueError(f"threshold {text!r} must be positive and finite: losses are.")
    return Threshold("relative" if relative else "absolute", number)
