"""Files that may hold anything: what is checked before one is read."""

import json
import os
import pathlib
import stat
from typing import Any

__all__ = ["MAX_BYTES", "check_file", "parse_json", "read_json", "shown"]

MAX_BYTES = 2**26
"""Of a json or text file that is read whole; the largest of released models have 4 MB."""

# Of brackets in json: configurations have four levels.
_MAX_DEPTH = 64
_SHOWN = 100


def shown(value: Any) -> str:
    r"""A value in a message: on one line, without control characters, and not long.

    Example:
      >>> shown("conv_in.bias"), shown("a\x1b[31m"), shown(["b"] * 1000)[:12]
      ('conv_in.bias', "'a\\x1b[31m'", "['b', 'b', '")
    """
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_file(path: str | os.PathLike[str], most: int | None = None) -> None:
    """Refuses what is no file that can be read, without waiting for it.

    Args:
      path: the file.
      most: its size in bytes at most; None for any.

    Raises:
      ValueError: if there is no such file, if it is a folder, a pipe or a device, if it cannot be
        opened, or if it is too large.
    """
    path = pathlib.Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # To open a pipe would wait for whoever writes it.
            raise ValueError(f"{path} is {_kind(found.st_mode)}: expected a file.")
        with path.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ValueError(f"{path} is a link to nothing.") from None
        raise ValueError(f"{path.parent} has no {path.name}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if most is not None and found.st_size > most:
        raise ValueError(f"{path} has {found.st_size} bytes: expected at most {most}.")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a json file.

    Raises:
      ValueError: if there is none, or one too large or too deep to be a configuration.
    """
    path = pathlib.Path(path)
    check_file(path, MAX_BYTES)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_json(text, os.fspath(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in a text; errors as `read_json`, naming `where`."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no readable json: {shown(str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a json object, not a {type(content).__name__}.")
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            value
            for node in level
            for value in (node.values() if isinstance(node, dict) else node)
            if isinstance(value, dict | list)
        ]
    if level:  # Whatever walks through it, and prints it, would fail.
        raise ValueError(f"{where} is nested too deep: expected at most {_MAX_DEPTH} levels.")
    return content


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "no file")
