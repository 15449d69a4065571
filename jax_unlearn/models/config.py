"""What the configurations of all networks share: reading a `config.json`, and checks of values."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["is_count", "is_number", "read_options", "require", "require_choices"]


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
            f"unknown {name} options {unknown}: an option that is not understood may change the "
            "output, so remove them only if you know that they do not."
        )
    return {key: _frozen(value) for key, value in config.items() if key in known}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require(config: Any, checks: Mapping[str, bool], *, name: str) -> None:
    """Raises ValueError for the first option of the network `name` whose check failed."""
    for option, passed in checks.items():
        if not passed:
            raise ValueError(f"{name} option {option} is malformed: {getattr(config, option)!r}.")


def require_choices(config: Any, choices: Mapping[str, Collection[Any]]) -> None:
    """Raises ValueError for the first option, or item of an option, that is none of its choices."""
    for option, allowed in choices.items():
        value = getattr(config, option)
        for item in value if isinstance(value, tuple) else (value,):
            if item not in allowed:
                raise ValueError(
                    f"{option} {item!r} is not supported: expected one of {tuple(allowed)}."
                )
