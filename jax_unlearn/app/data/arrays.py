"""Sets of images in one file: npz and idx. Claims are compared with bytes and memory first."""

import gzip
import io
import math
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jax_unlearn.app.data.decoding import said
from jax_unlearn.app.data.images import to_pixels
from jax_unlearn.models.files import check_file, shown
from jax_unlearn.models.memory import machine_memory

__all__ = ["Found", "check_memory", "read_idx_set", "read_npz"]

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


class Found(NamedTuple):
    """Images before selection; where `arrays` is None, the names are files to decode."""

    names: tuple[str, ...]
    labels: np.ndarray | None = None
    arrays: np.ndarray | None = None
    kind: str = "the source"


def check_memory(what: str | Path, count: int, size: int, name: int = _NAME) -> None:
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


def _fill(file: BinaryIO | gzip.GzipFile, size: int) -> np.ndarray:
    """The next `size` bytes, or as many as there are: a claim takes no memory before they come."""
    content, filled = np.empty(size, np.uint8), 0
    while filled < size and (part := file.read(min(_STEP, size - filled))):
        content[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
        filled += len(part)
    return content[:filled]


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
    check_memory(path, count, size // max(count, 1), _NAME + len(str(path)))
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def read_npz(path: Path) -> Found:
    """The `images` of an .npz, and its `labels` if it has any.

    Raises:
      ValueError: for damage, pickled objects, another dtype or shape, or too much of it.
    """
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
        why = shown(said(error))
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
    return Found(names, labels, images.reshape(*images.shape[:3], -1), f"the .npz, with {held},")


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
                check_memory(path, sizes[0], size // max(sizes[0], 1), _NAME + len(str(path)))
                content = _fill(file, size)
                held = len(content) + len(file.read(_STEP))
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is not a readable idx file: {said(error)}.") from error
    if held != size or not held:
        held = f"{'at least ' * (held == size + _STEP)}{held}"
        raise ValueError(f"{path} is damaged: its header says {sizes} bytes, and {held} follow.")
    return content.reshape(sizes)


def read_idx_set(path: Path) -> Found:
    """The images of an idx file, and their labels where such a file lies beside it.

    Raises:
      ValueError: for damage, or too much of it.
    """
    pixels = _read_idx(path, 3)
    names = tuple(f"{path}[{i}]" for i in range(len(pixels)))
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for sibling in (path.with_name(stem), path.with_name(stem + ".gz")):
        if os.path.lexists(sibling) and sibling.name != path.name:
            labels = _read_idx(sibling, 1)
            if len(labels) == len(pixels):
                return Found(names, labels, pixels[..., None])
            raise ValueError(f"{sibling} has {len(labels)} labels for {len(pixels)} images.")
    return Found(names, None, pixels[..., None], f"the idx file, with no {stem}[.gz] beside,")
