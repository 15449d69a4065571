"""SHA-256 of a model's files: written beside what is saved, compared when it is loaded.

The safetensors format has no checksum, so that damage to it is other weights. `model.sha256` in a
model's folder is the list that `sha256sum -c` checks. The hub's cache names large files by their
digests.
"""

import hashlib
import os
import pathlib
import re
import time
from collections.abc import Collection

from jax_unlearn.models.files import MAX_BYTES, check_file, shown
from jax_unlearn.pretrained.hub import model_files

__all__ = ["DIGESTS_FILE", "check_digests", "file_digest", "folder_digests", "write_digests"]

DIGESTS_FILE = "model.sha256"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")
# A file that changed so recently may change again without another time of change.
_SETTLED = 2_000_000_000
_known: dict[tuple[int, ...], str] = {}


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in hexadecimal digits.

    It is remembered in this process as long as the file's inode, size and times stay.

    Raises:
      ValueError: if the file cannot be read.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            times = found.st_mtime_ns, found.st_ctime_ns
            key = found.st_dev, found.st_ino, found.st_size, *times
            if key in _known:
                return _known[key]
            settled = time.time_ns() - max(times) > _SETTLED
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    if settled:
        _known[key] = digest
    return digest


def folder_digests(
    folder: str | os.PathLike[str], parts: Collection[str] | None = None
) -> dict[str, str]:
    """The SHA-256 of each file that a model is read from, by its path relative to the folder.

    Args:
      folder: of the model.
      parts: the sub-folders of which files are wanted, beside the folder's own; None is all.

    Raises:
      ValueError: if a file cannot be read.
    """
    folder = pathlib.Path(folder)
    return {name: file_digest(folder / name) for name in model_files(folder, parts)}


def write_digests(folder: str | os.PathLike[str]) -> None:
    """Writes `model.sha256` into a model's folder, of all its other files.

    `sha256sum -c model.sha256` in that folder checks it.

    Raises:
      ValueError: for a file whose name does not fit on a line.
    """
    folder = pathlib.Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    lines = []
    for name in sorted(files):
        if name == DIGESTS_FILE or not files[name].is_file():
            continue
        if not name.isprintable() or "\\" in name:
            raise ValueError(f"{folder} has a file whose name is not plain: {name!r}.")
        lines.append(f"{file_digest(files[name])}  {name}\n")
    (folder / DIGESTS_FILE).write_text("".join(lines), encoding="utf-8")


def check_digests(folder: str | os.PathLike[str], parts: Collection[str] | None = None) -> None:
    """Compares a model's files with `model.sha256`, and those in the hub's cache with their names.

    For a part of a pipeline the `model.sha256` of the pipeline, in the folder above, serves too.
    Files that are not listed are not compared.

    Args:
      folder: of the model.
      parts: the sub-folders that are read, beside the folder's own files; None is all.

    Raises:
      ValueError: naming the file that is another one, or if `model.sha256` is malformed.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    where, listed = _listed(folder)
    for name in model_files(folder, parts):
        path = folder / name
        if name in listed:
            wanted, source, remedy = listed[name], DIGESTS_FILE, f"Remove {where} to accept it."
        elif (blob := _blob_digest(path)) is not None:
            wanted, source = blob, "the hub"
            remedy = "Remove it from the cache to fetch it again."
        else:
            continue
        if (found := file_digest(path)) != wanted:
            raise ValueError(
                f"{path} is not the file that {source} lists (sha256 {found:.12}… instead of "
                f"{wanted:.12}…): it was damaged or changed. {remedy}"
            )


def _listed(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
    """The list that is about a folder, and its digests by their paths relative to the folder."""
    for place, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        path = place / DIGESTS_FILE
        if os.path.lexists(path):
            listed = _read(path).items()
            found = {n.removeprefix(prefix): value for n, value in listed if n.startswith(prefix)}
            if found or not prefix:
                return path, found
    return folder / DIGESTS_FILE, {}


def _read(path: pathlib.Path) -> dict[str, str]:
    """The digests in a list, by name; ValueError if it is malformed."""
    check_file(path, MAX_BYTES)
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read: {shown(str(error))}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path} is malformed in line {number}: expected a sha256, two spaces and a name."
            )
        name, parts = match[2], match[2].split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or not name.isprintable():
            raise ValueError(
                f"{path} lists {shown(repr(name))}, which is no path inside the model's folder."
            )
        if name in found:
            raise ValueError(f"{path} lists {shown(repr(name))} twice.")
        found[name] = match[1].lower()
    return found


def _blob_digest(path: pathlib.Path) -> str | None:
    """What the hub's cache says of a file: it names large ones by their digests."""
    target = pathlib.Path(os.path.realpath(path))
    named = target.parent.name == "blobs" and _BLOB.fullmatch(target.name)
    return target.name if path.is_symlink() and named else None
