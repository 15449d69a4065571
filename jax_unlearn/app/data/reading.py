"""Images from folders, files, npz and idx, and the captions beside them.

Nothing is dropped, rescaled or relabelled unasked: what does not fit is refused by its name. What
a file declares is compared with its bytes and with the machine's memory before it is read.
"""

import functools
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image

from jax_unlearn.app.data.arrays import Found, check_memory, read_idx_set, read_npz
from jax_unlearn.app.data.decoding import MODES, conform, decode
from jax_unlearn.app.data.images import Images
from jax_unlearn.models.files import check_file, shown

__all__ = ["Source", "fold", "parse_source", "read_captions", "read_images", "read_text"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_IDX = re.compile(r"idx\d-ubyte(\.gz)?$")
_MAX_CAPTION = 2**16
_MAX_FOLDERS = 64


class Source(NamedTuple):
    """Where images are read from, and the label that was written behind the path, if any."""

    path: Path
    label: str | None


class _Labels(NamedTuple):
    """The labels of a model; `count` is None for a model that takes none."""

    count: int | None
    names: Mapping[int, str]

    def describe(self) -> str:
        if self.count is None:
            return "the model takes no labels"
        known = [self.names[i] for i in range(self.count) if i in self.names]
        listed = ": " + ", ".join(map(shown, known[:12])) + (", ..." if len(known) > 12 else "")
        return f"the model has {self.count}, 0..{self.count - 1}" + (listed if known else "")

    def find(self, text: str) -> int | None:
        """The label that `text` writes, by number or by name; None if the model has no such."""
        fold = functools.partial(re.sub, r"[\s/\\_-]+", "-")
        named = {i for i, name in self.names.items() if fold(name.lower()) == fold(text.lower())}
        if re.fullmatch(r"[0-9]+", text):
            named.add(int(text))
        named = {i for i in named if self.count is None or 0 <= i < self.count}
        if len(named) > 1:
            meant = " or ".join(f"{i} ({self.names.get(i, 'no name')})" for i in sorted(named))
            raise ValueError(f"label {text!r} is ambiguous: it may mean {meant}.")
        return named.pop() if named else None


def parse_source(text: str) -> Source:
    r"""Reads `PATH` or `PATH:LABEL`, LABEL being a number or a name of the model's labels.

    A path that exists is always the path, colons and all. Otherwise the longest existing path
    before a colon wins, else the text before the last colon; `C:\images` is never split. Raises
    ValueError for an empty path or label.
    """
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    colons = [i for i in range(len(text) - 1, drive - 1, -1) if text[i] == ":"]
    if text.strip() and (not colons or os.path.exists(text)):
        return Source(Path(text), None)
    colon = next((i for i in colons if os.path.exists(text[:i])), max(colons, default=0))
    path, label = text[:colon], text[colon + 1 :].strip()
    if not path or not label:
        raise ValueError(f"image source {text!r} is not of the form PATH or PATH:LABEL.")
    fold(label, f"image source {text!r}")
    return Source(Path(path), label)


def fold(text: str, where: str) -> str:
    """A text to show or to encode: blanks and line breaks folded, and all else as it was.

    Args:
      text: a label, a caption or a prompt.
      where: what holds it, for the message.

    Raises:
      ValueError: for control characters, and for bytes that are no UTF-8.
    """
    folded = " ".join(text.split())
    for letter in folded:
        if unicodedata.category(letter) in ("Cc", "Cs"):
            raise ValueError(f"{where} holds the control character {letter!r}: remove it.")
    return folded


def read_text(path: Path, most: int) -> str:
    """The text of a small file, UTF-8.

    Raises:
      ValueError: if there is no such file, it has more than `most` bytes, or it is no text.
    """
    check_file(path, most)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def _list_folder(folder: Path, labels: _Labels) -> Found:
    def refuse(error: OSError) -> NoReturn:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}.") from error

    files, others, seen = [], Counter(), set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            raise ValueError(f"folder {parent} is reached twice, through a link: remove the link.")
        seen.add(real)
        if len(Path(parent).parts) - len(folder.parts) > _MAX_FOLDERS:
            raise ValueError(f"folder {folder} has folders more than {_MAX_FOLDERS} deep.")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            if file.suffix.lower() in _SUFFIXES:
                files.append(file.relative_to(folder))
            else:
                others[file.suffix.lower() or "no suffix"] += 1
    if not files:
        held = ", ".join(f"{suffix} ({n})" for suffix, n in sorted(others.items())) or "no files"
        kinds = ", ".join(_SUFFIXES)
        raise ValueError(f"folder {folder} holds no images ({kinds}) but {shown(held)}.")
    files.sort(key=lambda file: file.parts)
    names = tuple(str(folder / file) for file in files)
    if labels.count is None:
        return Found(names)
    tops = [file.parts[0] if len(file.parts) > 1 else "" for file in files]
    known = {top: labels.find(top) for top in tops}
    if set(known.values()) == {None}:
        held = shown(", ".join(filter(None, known))) or "none"
        return Found(names, kind=f"the folder, with sub-folders {held},")
    if None in known.values():
        stray = next(name for name, top in zip(names, tops, strict=True) if known[top] is None)
        raise ValueError(
            f"folder {folder} holds folders named for labels, but {stray} is in none of them: "
            f"{labels.describe()}. Move it, or give each folder as its own PATH:LABEL."
        )
    return Found(names, np.array([known[top] for top in tops]))


def _load(found: Found, chosen: np.ndarray, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    names, arrays = [found.names[i] for i in chosen], found.arrays
    check_memory(f"the source of {names[0]}", len(names), math.prod(shape))
    if arrays is not None and arrays.shape[1:] == shape:
        return arrays[chosen]
    if arrays is None:
        images = map(decode, names)
    elif 1 <= arrays.shape[3] <= 4 and shape[2] in MODES:
        images = (Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays[chosen])
    else:
        raise ValueError(
            f"{names[0]} is {' x '.join(map(str, arrays.shape[1:]))}: the model takes "
            f"{' x '.join(map(str, shape))} (height x width x channels)."
        )
    return np.stack([conform(*pair, shape, resize) for pair in zip(images, names, strict=True)])


def _choose(found: Found, source: Source, labels: _Labels) -> tuple[np.ndarray, np.ndarray | None]:
    """Which images the source means, and the label of each, [k] and [k] or None."""
    chosen, bears = np.arange(len(found.names)), found.labels
    if bears is not None and labels.count is not None:
        for i in np.flatnonzero((bears < 0) | (bears >= labels.count)):
            raise ValueError(f"label {bears[i]} of {found.names[i]}: {labels.describe()}.")
    if source.label is not None:
        given = f"{source.path}:{source.label}"
        if bears is None and labels.count is None:
            raise ValueError(f"{given}: the model takes no labels, give the path alone.")
        if (wanted := labels.find(source.label)) is None:
            raise ValueError(f"label {source.label!r} is unknown: {labels.describe()}.")
        bears = np.full(len(chosen), wanted) if bears is None else bears
        chosen = np.flatnonzero(bears == wanted)
        if not len(chosen):
            held = ", ".join(map(str, np.unique(bears)[:12]))
            raise ValueError(f"{given} selects nothing: no image has label {wanted}, only {held}.")
    if labels.count is None:
        return chosen, None
    if bears is None:
        raise ValueError(
            f"{source.path}: labels are missing, {found.kind} gives none, and {labels.describe()}. "
            "Name sub-folders for labels, put `labels` in an .npz, or write PATH:LABEL."
        )
    return chosen, bears[chosen].astype(np.int32)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ValueError(f"{path} is a link to nothing.") from None
        raise ValueError(
            f"{path} does not exist: expected a folder, an image, .npz or idx file."
        ) from None
    except (OSError, ValueError) as error:  # The latter for a NUL.
        why = getattr(error, "strerror", error)
        raise ValueError(f"{path} cannot be read: {why}.") from error


def read_images(
    source: Source | str,
    *,
    shape: tuple[int, int, int],
    id2label: Mapping[int, str] | None = None,
    num_labels: int | None = None,
    resize: bool = False,
) -> Images:
    """Reads the images of a source, in sorted order, exactly or not at all.

    A path is a folder of images, nested too (hidden files and other suffixes are passed over), an
    image (EXIF orientation applied; the first frame of a GIF), an .npz (`images` [n, h, w] or
    [n, h, w, c], uint8 or floats in [-1, 1], rounded to 8 bits; perhaps `labels` [n]), or an
    `*-images-idx3-ubyte[.gz]`, perhaps with its `*-labels-idx1-ubyte[.gz]` beside it.

    A folder's own sub-folders are labels when named by number or name; case, and which of "/",
    "_", "-" and space parts the words, do not matter. `PATH:LABEL` selects that label where images
    have labels, and labels all images where they have none. For a model without labels, those of
    an .npz or idx file serve to select and are not handed on.

    Sizes are taken from headers before any pixel is decoded. An image file has at most 2²⁶ pixels
    (8192 x 8192) and 512 MB. A set takes at most half of the machine's memory, and is compressed
    by at most 500 where it has more than 64 MB. Pipes, sockets and devices are not opened.

    Args:
      source: what `parse_source` returns, or its text.
      shape: (height, width, channels) of the model.
      id2label: names of the model's labels.
      num_labels: how many labels the model has; None for a model that takes none.
      resize: convert channels (transparency on white), crop to the centre, resample (Lanczos).

    Raises:
      ValueError: for a path, file, size, mode or label that does not fit, saying which.
    """
    source = parse_source(source) if isinstance(source, str) else source
    path, labels = source.path, _Labels(num_labels, id2label or {})
    if _is_folder(path):
        found = _list_folder(path, labels)
    elif path.name.lower().endswith(_SUFFIXES):
        found = Found((str(path),), kind="an image")
    elif path.suffix.lower() == ".npz":
        found = read_npz(path)
    elif _IDX.search(path.name):
        found = read_idx_set(path)
    else:
        kinds = f"a folder, {', '.join(_SUFFIXES)}, .npz, or *-images-idx3-ubyte[.gz]"
        raise ValueError(f"{path} is no kind of file that is read: expected {kinds}.")
    chosen, bears = _choose(found, source, labels)
    pixels = _load(found, chosen, tuple(shape), resize)
    return Images(pixels, bears, tuple(found.names[i] for i in chosen))


def read_captions(names: Sequence[str]) -> list[str] | None:
    """The captions that lie beside image files: of "a.png" the text of "a.txt", blanks folded.

    Args:
      names: files of images, as `Images.names` has them.

    Returns:
      One text an image; None where no image has one, as for images inside an archive.

    Raises:
      ValueError: if some have one and others not, or one is empty, has more than 64 KB or control
        characters, or cannot be read.
    """
    paths = [Path(name).with_suffix(".txt") for name in names]
    there = [os.path.lexists(path) for path in paths]
    if not any(there):
        return None
    if not all(there):
        lacking = names[there.index(False)]
        raise ValueError(
            f"{lacking} has no caption beside it ({Path(lacking).stem}.txt), and other images of "
            "its source have: give all of them one, or none."
        )
    captions = [fold(read_text(path, _MAX_CAPTION), f"caption {path}") for path in paths]
    if "" in captions:
        raise ValueError(f"caption {paths[captions.index('')]} is empty.")
    return captions
