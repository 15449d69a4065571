"""run.json: a command's options as they were, written and read back."""

import dataclasses
import json
import pathlib
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax_unlearn
from jax_unlearn.app.checks import flag
from jax_unlearn.app.files import replace_file
from jax_unlearn.models.files import read_json, shown

__all__ = ["fitted", "load_run", "plain_options", "save_run"]


def _plain(value: Any) -> Any:
    if isinstance(value, pathlib.Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


# How a command is started, not what it does.
_STARTING = (
    "resume", "go_on", "overwrite", "push_to_hub", "mesh", "parallel", "coordinator",
    "num_processes", "process_id",
)  # fmt: skip


def plain_options(options: Any) -> dict[str, Any]:
    """The options that a run is repeated by, as json has them."""
    fields = [field.name for field in dataclasses.fields(options) if field.name not in _STARTING]
    return {name: _plain(getattr(options, name)) for name in fields}


def save_run(path: pathlib.Path, command: str, options: Any, **beside: Any) -> None:
    """Writes the resolved options of a command, and what is to stand beside them, as run.json."""
    text = {
        "command": command,
        "version": jax_unlearn.__version__,
        "options": plain_options(options),
        **beside,
    }
    replace_file(path, (json.dumps(text, indent=2) + "\n").encode())


_TAKEN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    pathlib.Path: "a path",
    types.NoneType: "null",
}


def _taken(kind: Any) -> str:
    """What an option of a type takes, in words."""
    if kind in _TAKEN:
        return _TAKEN[kind]
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return f"a list, each entry {_taken(parts[0])}"
    return " or ".join(repr(part) if isinstance(part, str) else _taken(part) for part in parts)


def _fitted(value: Any, kind: Any) -> Any:
    """A value of json as an option of a type takes it; TypeError if it is of another."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal and isinstance(value, str) and value in parts:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_fitted(one, parts[0]) for one in value)
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return _fitted(value, part)
            except TypeError:
                continue
    if (kind, type(value)) in ((pathlib.Path, str), (float, int)):
        return kind(value)
    if type(value) is kind:  # True is no whole number here.
        return value
    raise TypeError


def load_run(path: pathlib.Path, command: str, kind: type) -> Any:
    """Reads options back from run.json.

    Raises:
      ValueError: if there is no such file, it is not of this command, an option is unknown, or
        it has what the command line would not take.
    """
    run = read_json(path)
    saved, given = run.get("command"), run.get("options")
    if not isinstance(saved, str) or not isinstance(given, dict):
        raise ValueError(f"{path} is not the run.json of a run.")
    if saved != command:
        raise ValueError(f"{path} is of `jax-unlearn {shown(saved)}`, not `jax-unlearn {command}`.")
    # Nor may a file that somebody gives start an upload, or move a folder.
    return fitted(path, given, kind, without=_STARTING)


def fitted(path: pathlib.Path, given: Any, kind: type, without: Collection[str] = ()) -> Any:
    """A dataclass of options from the values in a file, as json has them.

    Args:
      path: of the file.
      given: name -> value.
      kind: the dataclass.
      without: options that no file may give.

    Raises:
      ValueError: if an option is unknown, or has what the command line would not take.
    """
    kinds = get_type_hints(kind)
    if not isinstance(given, dict):
        raise ValueError(f"{path} has no options of this command.")
    if unknown := sorted(set(given) - set(kinds) | set(given) & set(without)):
        raise ValueError(f"{path} has unknown options: {shown(', '.join(unknown))}.")
    fields = {}
    for name, value in given.items():
        try:
            fields[name] = _fitted(value, kinds[name])
        except (TypeError, OverflowError):
            raise ValueError(
                f"{path}: {flag(name)} takes {_taken(kinds[name])}, not {shown(json.dumps(value))}."
            ) from None
    return kind(**fields)
