"""Images from folders, files, npz and idx, and the captions beside them.

Nothing is dropped, rescaled or relabelled unasked: what does not fit is refused by its name. What
a file declares is compared with its bytes and with the machine's memory before it is read.
"""

import functools
import gzip
import io
import math
import os
import re
import stat
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageOps

from jax_unlearn.app.data.images import Images, to_pixels
from jax_unlearn.models.files import check_file, shown
from jax_unlearn.models.memory import machine_memory

__all__ = ["Source", "fold", "parse_source", "read_captions", "read_images", "read_text"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Named, so that a file's content cannot call up another decoder (EPS would start Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_IDX = re.compile(r"idx\d-ubyte(\.gz)?$")
_MODES = {1: "L", 3: "RGB"}
# Decoded by Pillow to 8 bits a channel without a word: the low byte would be lost.
_DEEP = re.compile(r"(L|LA|RGB|RGBA|RGBX|RGBa|CMYK)X*;16")

# Of an image file: 64 megapixels, which is what 8192 x 8192 has, and 512 MB.
_MAX_PIXELS = 2**26
_MAX_FILE = 2**29
_MAX_CAPTION = 2**16
_MAX_FOLDERS = 64
# Deflate makes up to 1032 bytes of one; real sets of images reach 120. Small ones may be blank.
_MAX_RATIO = 500
_SMALL = 2**26
# Bytes that Python keeps for the name of an image, beside its letters.
_NAME = 120
# NumPy's own limit is 10,000 bytes, but it reads the header before it looks.
_HEADER = 2**14
_STEP = 2**20
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class _TooLarge(ValueError):
    """A file whose content would not fit, or whose claim cannot be true."""


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


class _Found(NamedTuple):
    """Images before selection; where `arrays` is None, the names are files to decode."""

    names: tuple[str, ...]
    labels: np.ndarray | None = None
    arrays: np.ndarray | None = None
    kind: str = "the source"


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


def _check_memory(what: str | Path, count: int, size: int, name: int = _NAME) -> None:
    """Refuses `count` images of `size` bytes each, and their names, that would fill the memory."""
    need, most = count * (size + name), machine_memory() // 2
    if need > most:
        raise _TooLarge(
            f"{what} holds {count} images, which take {need / 1e9:,.1f} GB: expected at most half "
            f"of this machine's memory, {most / 1e9:,.1f} GB."
        )


def _check_ratio(path: Path, declared: int, compressed: int) -> None:
    if declared > max(_SMALL, _MAX_RATIO * compressed):
        raise _TooLarge(
            f"{path} says that {compressed} bytes hold {declared}: no set of images is compressed "
            f"by more than {_MAX_RATIO}."
        )


def _said(error: Exception) -> str:
    return str(error).removesuffix(".") or type(error).__name__


def _fill(file: BinaryIO | gzip.GzipFile, size: int) -> np.ndarray:
    """The next `size` bytes, or as many as there are: a claim takes no memory before they come."""
    content, filled = np.empty(size, np.uint8), 0
    while filled < size and (part := file.read(min(_STEP, size - filled))):
        content[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
        filled += len(part)
    return content[:filled]


def _list_folder(folder: Path, labels: _Labels) -> _Found:
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
        return _Found(names)
    tops = [file.parts[0] if len(file.parts) > 1 else "" for file in files]
    known = {top: labels.find(top) for top in tops}
    if set(known.values()) == {None}:
        held = shown(", ".join(filter(None, known))) or "none"
        return _Found(names, kind=f"the folder, with sub-folders {held},")
    if None in known.values():
        stray = next(name for name, top in zip(names, tops, strict=True) if known[top] is None)
        raise ValueError(
            f"folder {folder} holds folders named for labels, but {stray} is in none of them: "
            f"{labels.describe()}. Move it, or give each folder as its own PATH:LABEL."
        )
    return _Found(names, np.array([known[top] for top in tops]))


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz, once its header, the archive's directory and the memory agree."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is neither stored nor deflated, as NumPy writes arrays")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(_HEADER))
    version = np.lib.format.read_magic(head)
    if version not in _READ_HEADER:
        raise ValueError(f"{name} has a header of version {version}")
    shape, _, dtype = _READ_HEADER[version](head)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    size = math.prod(shape) * dtype.itemsize
    if head.tell() + size != info.file_size:
        raise ValueError(f"{name} should have {head.tell() + size} bytes, not {info.file_size}")
    _check_ratio(path, info.file_size, min(info.compress_size, path.stat().st_size))
    count = shape[0] if shape else 1
    _check_memory(path, count, size // max(count, 1), _NAME + len(str(path)))
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_npz(path: Path) -> _Found:
    check_file(path)
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # Of Python's parser, about a header.
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {
                name: _read_member(path, archive, f"{name}.npy")
                for name in ("images", "labels")
                if f"{name}.npy" in archive.namelist()
            }
    except _TooLarge:
        raise
    except Exception as error:  # Damage shows as any of a dozen errors of zip, zlib and NumPy.
        why = shown(_said(error))
        raise ValueError(f"{path} is not a readable .npz file: {why}.") from error
    held = shown(", ".join(names)) or "nothing"
    images, labels = arrays.get("images", np.empty(0)), arrays.get("labels")
    if images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{path} needs `images` [n, height, width] or [n, height, width, channels]; it holds "
            f"{held}, with images of shape {images.shape}."
        )
    given = shown(str(images.dtype))
    if images.dtype.kind == "f":
        low, high = float(images.min()), float(images.max())
        given += f" from {low:g} to {high:g}"
        # Floats without a negative value could as well lie in [0, 1], and would come out half grey.
        images = to_pixels(images) if -1 <= low < 0 and high <= 1 else images
    if images.dtype != np.uint8:
        raise ValueError(
            f"`images` of {path} are {given}: expected uint8, or floats in [-1, 1] with negative "
            "values (others are ambiguous)."
        )
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise ValueError(
            f"`labels` of {path} are {shown(str(labels.dtype))} of shape {labels.shape}: expected "
            f"integers, one for each of the {len(images)} images."
        )
    names = tuple(f"{path}[{i}]" for i in range(len(images)))
    return _Found(names, labels, images.reshape(*images.shape[:3], -1), f"the .npz, with {held},")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    check_file(path)
    stored, packed = path.stat().st_size, path.suffix == ".gz"
    content = np.empty(0, np.uint8)
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            magic = file.read(4)
            if magic != (expected := bytes((0, 0, 8, dimensions))):
                raise ValueError(
                    f"{path} starts with {magic.hex()!r}, not idx magic {expected.hex()}."
                )
            sizes = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            size, held = math.prod(sizes), stored - 4 - 4 * dimensions
            if packed:
                _check_ratio(path, size, stored)
            if packed or held == size:
                _check_memory(path, sizes[0], size // max(sizes[0], 1), _NAME + len(str(path)))
                content = _fill(file, size)
                held = len(content) + len(file.read(_STEP))
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is not a readable idx file: {_said(error)}.") from error
    if held != size or not held:
        held = f"{'at least ' * (held == size + _STEP)}{held}"
        raise ValueError(f"{path} is damaged: its header says {sizes} bytes, and {held} follow.")
    return content.reshape(sizes)


def _find_idx(path: Path) -> _Found:
    pixels = _read_idx(path, 3)
    names = tuple(f"{path}[{i}]" for i in range(len(pixels)))
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for sibling in (path.with_name(stem), path.with_name(stem + ".gz")):
        if os.path.lexists(sibling) and sibling.name != path.name:
            labels = _read_idx(sibling, 1)
            if len(labels) == len(pixels):
                return _Found(names, labels, pixels[..., None])
            raise ValueError(f"{sibling} has {len(labels)} labels for {len(pixels)} images.")
    return _Found(names, None, pixels[..., None], f"the idx file, with no {stem}[.gz] beside,")


def _decode(path: str) -> Image.Image:
    check_file(path, _MAX_FILE)
    try:
        with warnings.catch_warnings():
            # Decompression bombs, damaged metadata and truncated files are mere warnings at first.
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if math.prod(image.size) > _MAX_PIXELS:
                    raise ValueError(
                        f"it has {image.width} x {image.height} pixels, and {_MAX_PIXELS} in all "
                        "are read at most"
                    )
                raw = [t.args[0] if isinstance(t.args, tuple) else t.args for t in image.tile]
                frames = 1 if image.format in ("GIF", "MPO") else getattr(image, "n_frames", 1)
                decoded = ImageOps.exif_transpose(image)
                decoded.load()
    except Exception as error:  # A decoder fed with damage raises whatever it trips over.
        raise ValueError(f"{path} cannot be decoded as an image: {shown(_said(error))}.") from error
    if any(_DEEP.match(str(mode)) for mode in raw):
        raise ValueError(f"{path} has 16 bits a channel: convert it to 8 bits.")
    if frames > 1:
        raise ValueError(f"{path} has {frames} frames: save the one to use on its own.")
    return decoded


def _conform(image: Image.Image, name: str, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    """The pixels of an image in the model's shape; without `resize`, exact or refused."""
    height, width, channels = shape
    alpha = image.has_transparency_data
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if alpha or (deep % 257).any():  # v·257 is how 8 bits are written in 16.
            raise ValueError(f"{name} has 16 bits a pixel: convert it to 8 bits.")
        image = Image.fromarray((deep // 257).astype(np.uint8))
    if image.mode in ("I", "F") or channels not in _MODES:
        raise ValueError(
            f"{name} has mode {image.mode} and the model {channels} channels: images have 8 bits, "
            "and 1 or 3 channels; give an .npz."
        )
    if alpha and resize:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode in ("1", "P") and not alpha:
        rgb = np.asarray(image.convert("RGB"))
        grey = image.mode == "1" or (channels == 1 and np.ptp(rgb, axis=-1).max() == 0)
        image = Image.fromarray(rgb[..., 0] if grey else rgb)
    mode = _MODES[channels]
    if resize and image.mode != "LAB":  # Pillow alone does not convert these to RGB.
        image = ImageOps.fit(image.convert(mode), (width, height), Image.Resampling.LANCZOS)
    elif alpha or image.mode != mode or image.size != (width, height):
        given = f"{image.height} x {image.width} {image.mode}" + " with transparency" * alpha
        raise ValueError(
            f"{name} is {given}: the model takes {height} x {width} {mode} (height x width). Give "
            "--resize to convert the channels, crop to the centre and resample."
        )
    return np.asarray(image, np.uint8).reshape(shape)


def _load(found: _Found, chosen: np.ndarray, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    names, arrays = [found.names[i] for i in chosen], found.arrays
    _check_memory(f"the source of {names[0]}", len(names), math.prod(shape))
    if arrays is not None and arrays.shape[1:] == shape:
        return arrays[chosen]
    if arrays is None:
        images = map(_decode, names)
    elif 1 <= arrays.shape[3] <= 4 and shape[2] in _MODES:
        images = (Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays[chosen])
    else:
        raise ValueError(
            f"{names[0]} is {' x '.join(map(str, arrays.shape[1:]))}: the model takes "
            f"{' x '.join(map(str, shape))} (height x width x channels)."
        )
    return np.stack([_conform(*pair, shape, resize) for pair in zip(images, names, strict=True)])


def _choose(found: _Found, source: Source, labels: _Labels) -> tuple[np.ndarray, np.ndarray | None]:
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
        found = _Found((str(path),), kind="an image")
    elif path.suffix.lower() == ".npz":
        found = _read_npz(path)
    elif _IDX.search(path.name):
        found = _find_idx(path)
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
