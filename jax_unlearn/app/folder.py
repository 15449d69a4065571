"""The output folder of a run: whether it is free, whose it is, and what a dead run left there."""

import contextlib
import os
import pathlib
import re
import socket
from collections.abc import Iterator
from typing import IO, Any, Protocol

from jax_unlearn.pretrained.weights import clean_leftovers

try:
    import fcntl
except ImportError:  # Windows, where a folder is not locked.
    fcntl = None

__all__ = ["check_folder", "claim"]

_LOCK = ".lock"


class Claims(Protocol):
    """What a command's options say of its folder."""

    @property
    def out(self) -> pathlib.Path:
        """The folder."""
        ...

    @property
    def resume(self) -> bool:
        """Whether to go on in it."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether to move what is there aside."""
        ...


_LEFTOVER = re.compile(r"\..+\.(\d+)\.tmp|\.model\.(new|old)-.+|\.lock")


def _contents(out: pathlib.Path) -> list[pathlib.Path]:
    """What is in a folder, but for what a killed run leaves before it has begun."""
    return [path for path in out.iterdir() if not _LEFTOVER.fullmatch(path.name)]


def _in_use(out: pathlib.Path) -> bool:
    return os.path.lexists(out) and (not out.is_dir() or bool(_contents(out)))


def check_folder(options: Claims) -> None:
    """Refuses what `claim` would refuse, and changes nothing.

    Raises:
      ValueError: if the folder is in use and neither resume nor overwrite was asked for, if there
        is nothing to resume, if another process has it, or if it cannot be read.
    """
    out = options.out
    try:
        if options.resume:
            if not (out / "run.json").is_file():
                raise ValueError(f"nothing to resume: {out} has no run.json.")
        elif _in_use(out) and not options.overwrite:
            raise ValueError(
                f"{out} is in use: choose another --out, or --resume, or --overwrite (which moves "
                "it aside)."
            )
        place = next(one for one in (out, *out.absolute().parents) if os.path.lexists(one))
        if place != out and not place.is_dir():
            raise ValueError(f"cannot make the folder {out}: {place} is not a folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write into the folder {place}: Permission denied.")
        if (out / _LOCK).is_file():
            with (out / _LOCK).open("r+") as file:
                _lock(file, out)
    except OSError as error:
        raise ValueError(f"cannot use the folder {out}: {error.strerror}.") from error


@contextlib.contextmanager
def claim(options: Claims) -> Iterator[None]:
    """Makes room for the outputs and keeps every other process out of them inside the block.

    The lock is released by the process's death too. Files that a killed process left half written
    are removed.

    Raises:
      ValueError: as `check_folder`, or if the folder cannot be made.
    """
    check_folder(options)
    out = options.out
    with contextlib.ExitStack() as stack:
        try:
            if options.overwrite and not options.resume and _in_use(out):
                _move_aside(out)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(out))
            if not options.resume and _in_use(out):  # Somebody was quicker.
                raise ValueError(f"{out} is in use: another process has just begun there.")
            clean_leftovers(out / "model")
            for path in out.iterdir():
                if path.name != _LOCK and path.is_file() and _LEFTOVER.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise ValueError(f"cannot make the folder {out}: {error.strerror}.") from error
        yield


def _move_aside(out: pathlib.Path) -> None:
    with _locked(out) if out.is_dir() else contextlib.nullcontext():
        number = 1
        while os.path.lexists(aside := out.with_name(f"{out.name}.previous-{number}")):
            number += 1
        out.rename(aside)
    (aside / _LOCK).unlink(missing_ok=True)


def _lock(file: IO[Any], out: pathlib.Path) -> None:
    """Locks an open file until it is closed; ValueError if another process has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read().strip() or "another process"
        raise ValueError(
            f"{out} is being written by {holder}: wait for it, or stop it, or choose another --out."
        ) from None
    except OSError:  # A file system without locks: as good as it can be had.
        pass


@contextlib.contextmanager
def _locked(out: pathlib.Path) -> Iterator[None]:
    path = out / _LOCK
    while True:
        file = path.open("a+")
        try:
            file.seek(0)
            _lock(file, out)
            # Its last holder may have removed it between these two lines.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
