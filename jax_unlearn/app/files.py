"""Files that appear complete or not at all, and disks that are full."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DiskFull", "explained_if_full", "is_full", "replace_file"]

_FULL = ("No space left on device", "Disk quota exceeded")


class DiskFull(Exception):
    """The disk is full: nothing was wrong with the input, and no finished file was damaged."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error: libraries wrap what the system said."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or any(text in str(cause) for text in _FULL)
        for cause in _causes(error)
    )


@contextlib.contextmanager
def explained_if_full(out: Path, again: str) -> Iterator[None]:
    """Makes one line of what a full disk breaks.

    Args:
      out: the folder that is written.
      again: the command that goes on.

    Raises:
      DiskFull: in place of the error.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFull(
            f"the disk of {out} is full: free some space, then {again}. No finished file was "
            "damaged."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames into place: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Or a power cut could leave an empty file under its name.
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
