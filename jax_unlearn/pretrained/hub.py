"""Where a model's files lie: in a folder here, or on the Hugging Face hub."""

import contextlib
import os
import pathlib
import re
import stat
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

__all__ = [
    "MAXDIFFUSION",
    "SUFFIXES",
    "FoundModel",
    "check_folder",
    "find_model",
    "is_hub_name",
    "is_plain_name",
    "license_of",
    "model_files",
]

SUFFIXES = (".json", ".txt", ".safetensors")
"""Of what a model is read from; the rest of a folder are pickles and other frameworks' files."""

MAXDIFFUSION = "maxdiffusion:"
"""What the name of a folder of maxdiffusion's checkpoints begins with."""

_CARD = "README.md"
_CARD_BYTES = 2**16
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_LICENSE = re.compile(
    r"""(license(?:_name|_link)?):[ \t]*(["']?)([\w.+:/-]{1,200})\2[ \t]*""", re.ASCII
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class FoundModel(NamedTuple):
    """Where a model lies.

    Attributes:
      folder: on this disk, with all json files.
      fetch: to be called with the patterns of other files, e.g. `unet/*.safetensors`, before these
        are read. It does nothing for a folder that was here.
      commit: of the hub's repository that the folder is a copy of; "" for a folder that was here.
    """

    folder: pathlib.Path
    fetch: Callable[[list[str]], None]
    commit: str


def is_hub_name(path_or_name: str | os.PathLike[str]) -> bool:
    """Whether a text is no path of anything here, and looks like a name on the hub, owner/name."""
    name = os.fspath(path_or_name)
    return not os.path.lexists(name) and _HUB_NAME.fullmatch(name) is not None


def is_plain_name(name: str) -> bool:
    """Whether a name is one part of a path, not that of another folder, and can be printed."""
    return (
        pathlib.PurePath(name).name == name
        and name not in ("", "..")
        and name.isprintable()
        and "\\" not in name
    )


def find_model(path_or_name: str | os.PathLike[str], revision: str | None = None) -> FoundModel:
    """Finds a model's folder, and fetches its descriptions if it is on the hub.

    Args:
      path_or_name: a folder, `owner/name` on the hub, or `maxdiffusion:FOLDER`, the checkpoints
        that maxdiffusion saved of a Stable Diffusion: the latest, or that whose folder it is.
      revision: branch, tag or commit on the hub; None is its main branch. Everything is fetched
        from the commit that it is at first.

    Returns:
      The folder, `check_folder` passed, and how to fetch its other files. Those of
      `maxdiffusion:FOLDER` are converted into the user's cache.

    Raises:
      ValueError: if there is no such model, if a revision of a folder here is asked for, or as
        `check_folder` and `maxdiffusion.find_checkpoint`.
    """
    name = os.fspath(path_or_name)
    if not is_hub_name(name):
        converted = name.startswith(MAXDIFFUSION)
        folder = pathlib.Path(name) if converted else _local(name)
        if revision is not None:
            raise ValueError(
                f"revision {revision} is given for {name}, a folder here: only a name on the hub "
                "has revisions."
            )
        if converted:
            # Only here: it opens the tokenizers of its models by this function.
            from jax_unlearn.pretrained.maxdiffusion import find_checkpoint

            return find_checkpoint(name.removeprefix(MAXDIFFUSION))
        check_folder(folder)
        return FoundModel(folder, lambda patterns: None, "")

    # The descriptions first, so that a model that is not supported is not downloaded.
    descriptions = ["*.json", _CARD]
    folder = _fetch(name, revision, descriptions)
    commit = folder.name if folder.parent.name == "snapshots" else ""

    def fetch(patterns: list[str]) -> None:
        # The commit, since a branch may have moved.
        check_folder(_fetch(name, commit or revision, descriptions + patterns))

    check_folder(folder)
    return FoundModel(folder, fetch, commit)


def model_files(folder: pathlib.Path, parts: Collection[str] | None = None) -> list[str]:
    """The files that a model may be read from, relative to its folder, sorted.

    Args:
      folder: of the model.
      parts: the sub-folders of which files are wanted, beside the folder's own; None is all.
    """
    with _readable():
        paths = [p for p in _entries(folder, parts) if p.suffix in SUFFIXES and p.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def license_of(folder: pathlib.Path) -> dict[str, str]:
    """What a model's own card says of its licence, of the keys that the hub knows.

    Args:
      folder: of the model; its card is `README.md`.

    Returns:
      Of "license", "license_name" and "license_link" those that the card's first lines give as one
      word each; {} without a card.
    """
    path = folder / _CARD
    if not (path.is_file() and os.access(path, os.R_OK)):
        return {}
    with path.open("rb") as file:
        text = file.read(_CARD_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    front = _FRONT_MATTER.match(text)
    lines = front[1].split("\n") if front else []
    found = [match for line in lines if (match := _LICENSE.fullmatch(line))]
    return {match[1]: match[3] for match in found}


def check_folder(folder: pathlib.Path, parts: Collection[str] | None = None) -> None:
    """Refuses a model's folder that leads out of itself, or that does not hold plain files.

    Links are followed only to where the folder itself is, and from the hub's cache,
    `snapshots/COMMIT/NAME`, to the `blobs/HASH` beside `snapshots`. What else a link leads to
    would be read, and copied into what is saved.

    Args:
      folder: of the model: its entries and those of its sub-folders are looked at.
      parts: the sub-folders that matter, beside the folder's own files; None is all.

    Raises:
      ValueError: naming the link or the file.
    """
    root = pathlib.Path(os.path.realpath(folder))
    with _readable():
        for path in _entries(folder, parts):
            if not is_plain_name(path.name):
                raise ValueError(f"{folder} has a file whose name is not plain: {path.name!r}.")
            if path.is_symlink():
                _check_link(path, root)
            if path.suffix in SUFFIXES and not stat.S_ISREG(path.stat().st_mode):
                raise ValueError(f"{path} is no file: remove it from the model's folder.")


def _check_link(path: pathlib.Path, root: pathlib.Path) -> None:
    target = pathlib.Path(os.path.realpath(path))
    if not path.exists():
        raise ValueError(f"{path} is a link to nothing: put the file there, or remove it.")
    caches = [above.parent.parent for above in (root, *root.parents) if _is_snapshot(above)]
    if root not in target.parents and target.parent not in [cache / "blobs" for cache in caches]:
        raise ValueError(
            f"{path} is a link out of the model's folder, to {target}: replace it by a copy of "
            "what it leads to."
        )


def _is_snapshot(folder: pathlib.Path) -> bool:
    return folder.parent.name == "snapshots"


def _entries(folder: pathlib.Path, parts: Collection[str] | None) -> Iterator[pathlib.Path]:
    """What is in a folder, but for the sub-folders that are none of `parts`, and in the others."""
    for path in folder.iterdir():
        inside = path.is_dir()
        if inside and parts is not None and path.name not in parts:
            continue
        yield path
        if inside:
            yield from path.iterdir()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Makes one line of what the system says against reading."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _local(name: str) -> pathlib.Path:
    """The folder of this name; ValueError if there is none."""
    folder = pathlib.Path(name)
    try:
        if stat.S_ISDIR(folder.stat().st_mode):
            return folder
    except (FileNotFoundError, NotADirectoryError, ValueError):  # A name with NUL is no path.
        if os.path.islink(name):
            raise ValueError(f"{name} is a link to nothing.") from None
        raise ValueError(
            f"no such folder: {name}. It is no name on the hub (owner/name) either."
        ) from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    raise ValueError(f"{name} is a file: pass the folder that holds model_index.json.")


def _fetch(name: str, revision: str | None, patterns: list[str]) -> pathlib.Path:
    # Only here: its import is slow, and a folder needs none of it.
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no folder here, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {reason}"
        ) from error
