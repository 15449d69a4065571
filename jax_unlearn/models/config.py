"""What the configurations of all networks share: reading a `config.json`, and checks of values."""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

from jax_unlearn.models.files import shown

__all__ = [
    "MAX_TRANSFORMERS",
    "is_count",
    "is_number",
    "listed_class",
    "read_options",
    "require",
    "require_choices",
]

_MAX_LEVELS = 16
_MAX_INTEGER = 2**16
_MOST = {
    "layers_per_block": 32,
    "transformer_layers_per_block": 64,
    "num_hidden_layers": 256,
    "conv_in_kernel": 2**6,
    "conv_out_kernel": 2**6,
    "sample_size": 2**14,
    "image_size": 2**12,
    "intermediate_size": 2**20,
    "projection_class_embeddings_input_dim": 2**20,
    "num_class_embeds": 2**21,
    "vocab_size": 2**21,
    "num_train_timesteps": 10**6,
    "eos_token_id": 2**31 - 1,
}
"""The largest integers in options, where it is not `_MAX_INTEGER`: far beyond released models.

Larger ones are typing errors or attacks, and would take hours or all memory to notice.
"""

MAX_TRANSFORMERS = 1024
"""Transformer blocks of a UNet; SDXL has 70."""


def read_options(
    cls: type, config: Mapping[str, Any], *, name: str, neutral: Collection[str] = ()
) -> dict[str, Any]:
    """The options of the dataclass `cls` in a raw `config.json`, lists as tuples.

    Args:
      cls: the dataclass.
      config: the raw file.
      name: of the network, for messages.
      neutral: keys without a meaning for the output, ignored as those that start with `_` are.

    Raises:
      ValueError: for any other key that `cls` does not have, unless it holds null.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(
        key
        for key, value in config.items()
        if key not in known and key not in neutral and not key.startswith("_") and value is not None
    )
    if unknown:
        raise ValueError(
            f"unknown {name} options {shown(unknown)}: an option that is not understood may "
            "change the output, so remove them only if you know that they do not."
        )
    return {key: _frozen(value) for key, value in config.items() if key in known}


def listed_class(config: Mapping[str, Any]) -> Any:
    """The first of `architectures`, by which transformers names a network's class, or None."""
    architectures = config.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else None


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and finite as a float."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def require(config: Any, checks: Mapping[str, bool], *, name: str) -> None:
    """Refuses the first option of the network `name` whose check failed.

    Every option is also held to what any may be: a finite number of a sane size, a text, a flag,
    null, or a tuple of these.

    Raises:
      ValueError: naming the option and its value.
    """
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for option, value in options.items():
        if not checks.get(option, True) or not _is_plain(value):
            raise ValueError(f"{name} option {option} is malformed: {shown(repr(value))}.")
        items, most = value if isinstance(value, tuple) else (value,), _MOST.get(option)
        most = _MAX_INTEGER if most is None else most
        if len(items) > _MAX_LEVELS:
            raise ValueError(
                f"{name} option {option} has {len(items)} entries: expected {_MAX_LEVELS} at most."
            )
        for item in items:
            if isinstance(item, int) and abs(item) > most:
                raise ValueError(
                    f"{name} option {option} is {shown(repr(item))}: expected {most} at most."
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(not isinstance(item, tuple) and _is_plain(item) for item in value)
    return value is None or isinstance(value, bool | str) or is_number(value)


def require_choices(config: Any, choices: Mapping[str, Collection[Any]]) -> None:
    """Raises ValueError for the first option, or item of an option, that is none of its choices."""
    for option, allowed in choices.items():
        value, several = getattr(config, option), isinstance(getattr(type(config), option), tuple)
        for item in value if several and isinstance(value, tuple) else (value,):
            if item not in allowed:
                raise ValueError(
                    f"{option} {shown(repr(item))} is not supported: expected one of "
                    f"{tuple(allowed)}."
                )
