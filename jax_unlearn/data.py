"""Images from folders, files, npz and idx; and batches that are pure functions of (seed, step).

Pixels stay uint8 on the host. Nothing is dropped, rescaled or relabelled unless it was asked for:
what does not fit the model is refused with the file's name.
"""

import functools
import gzip
import hashlib
import math
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "Images",
    "Source",
    "balanced_indices",
    "batch_indices",
    "concatenate",
    "content_hashes",
    "find_overlap",
    "parse_source",
    "read_images",
    "remove_overlap",
    "split_held_out",
    "take",
    "to_pixels",
    "to_unit_range",
]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Named, so that a file's content cannot call up another decoder (EPS would start Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_IDX = re.compile(r"idx\d-ubyte(\.gz)?$")
_MODES = {1: "L", 3: "RGB"}
# Decoded by Pillow to 8 bits a channel without a word: the low byte would be lost.
_DEEP = re.compile(r"(L|LA|RGB|RGBA|RGBX|RGBa|CMYK)X*;16")


class Images(NamedTuple):
    """Images in memory.

    Attributes:
      pixels: uint8 [n, height, width, channels].
      labels: int32 [n], or None for a model that takes no labels.
      names: where each image came from, "folder/a.png" or "file.npz[3]", n of them.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]


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
        listed = ": " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        return f"the model has {self.count}, 0..{self.count - 1}" + (listed if known else "")

    def find(self, text: str) -> int | None:
        """The label that `text` writes, by number or by name; None if it writes none."""
        wanted = _fold(text)
        named = {label for label, name in self.names.items() if _fold(name) == wanted}
        if re.fullmatch(r"-?[0-9]+", text):
            named.add(int(text))
        if len(named) > 1:
            meant = " or ".join(f"{i} ({self.names.get(i, 'no name')})" for i in sorted(named))
            raise ValueError(f"label {text!r} is ambiguous: it may mean {meant}.")
        return self.check(named.pop()) if named else None

    def check(self, label: int, name: str = "") -> int:
        if self.count is not None and not 0 <= label < self.count:
            where = f" of {name}" if name else ""
            raise ValueError(f"label {label}{where}: {self.describe()}.")
        return label


class _Found(NamedTuple):
    """Images not yet decoded (`arrays` is None: the names are files), with the labels they bear."""

    names: tuple[str, ...]
    labels: np.ndarray | None = None
    arrays: np.ndarray | None = None
    kind: str = "the source"


def _fold(name: str) -> str:
    return re.sub(r"[\s/\\_-]+", "-", name.strip().casefold())


def parse_source(text: str) -> Source:
    r"""Reads `PATH` or `PATH:LABEL`, LABEL being a number or a name of the model's labels.

    A path that exists is always the path, colons and all. Otherwise the longest existing path
    before a colon wins, else the text before the last colon; `C:\images` is never split.

    Raises:
      ValueError: for an empty path or an empty label.
    """
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    colons = [i for i in range(len(text) - 1, drive - 1, -1) if text[i] == ":"]
    if text.strip() and (not colons or os.path.exists(text)):
        return Source(Path(text), None)
    colon = next((i for i in colons if os.path.exists(text[:i])), max(colons, default=0))
    path, label = text[:colon], text[colon + 1 :].strip()
    if not path or not label:
        raise ValueError(f"image source {text!r} is not of the form PATH or PATH:LABEL.")
    return Source(Path(path), label)


def _list_folder(folder: Path, labels: _Labels, *, explicit: bool) -> _Found:
    def refuse(error: OSError) -> NoReturn:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}.") from error

    files, others, seen = [], Counter(), set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            raise ValueError(f"folder {parent} is reached twice, through a link: remove the link.")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name).relative_to(folder)
            if file.suffix.lower() in _SUFFIXES and not name.startswith("."):
                files.append(file)
            elif not name.startswith("."):
                others[file.suffix.lower() or "no suffix"] += 1
    if not files:
        held = ", ".join(f"{suffix} ({n})" for suffix, n in sorted(others.items())) or "no files"
        raise ValueError(
            f"folder {folder} holds no images: found {held}; expected {', '.join(_SUFFIXES)} "
            "(give an .npz or idx file by its own path)."
        )
    files.sort(key=lambda file: file.parts)
    names = tuple(str(folder / file) for file in files)
    tops = [file.parts[0] if len(file.parts) > 1 else "" for file in files]
    if labels.count is None:
        return _Found(names)
    known: dict[str, int | None] = {}
    for top in dict.fromkeys(tops):
        try:
            known[top] = labels.find(top)
        except ValueError as error:
            if not explicit:  # With PATH:LABEL a folder called 2024 may be just that.
                raise ValueError(f"folder {folder / top}: {error}") from error
            known[top] = None
    if all(label is None for label in known.values()):
        return _Found(names, kind=f"the folder, with sub-folders {', '.join(known) or 'none'},")
    for name, top in zip(names, tops, strict=True):
        if known[top] is None:
            raise ValueError(
                f"folder {folder} holds folders named for labels, but {name} is in none of them: "
                f"{labels.describe()}. Move it, or give each folder as its own PATH:LABEL."
            )
    return _Found(names, np.array([known[top] for top in tops]))


def _read_npz(path: Path) -> _Found:
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            held = ", ".join(archive.files) or "nothing"  # A lone array has no `files`.
            images = archive["images"] if "images" in archive.files else None
            labels = archive["labels"] if "labels" in archive.files else None
    except Exception as error:  # Damage shows as any of a dozen errors of zip, zlib and NumPy.
        why = error or "damaged"
        if "Object arrays" in str(error):
            why = "it holds pickled objects, which are never loaded"
        raise ValueError(f"{path} is not a readable .npz file: {why}.") from error
    if images is None or images.ndim not in (3, 4) or not images.size:
        given = "none" if images is None else f"one of shape {images.shape}"
        raise ValueError(
            f"{path} needs an array `images` [n, height, width] or [n, height, width, channels], "
            f"not {given}: it holds {held}."
        )
    if images.dtype.kind == "f":
        # Floats without a negative value could as well lie in [0, 1], and would come out half grey.
        low, high = float(images.min()), float(images.max())
        if not (-1 <= low < 0 and high <= 1):
            raise ValueError(
                f"`images` of {path} are floats from {low:g} to {high:g}: expected [-1, 1] with "
                "negative values (others are ambiguous), or uint8 from 0 to 255."
            )
        images = to_pixels(images)
    if images.dtype != np.uint8:
        raise ValueError(f"`images` of {path} are {images.dtype}: expected uint8, or floats.")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise ValueError(
            f"`labels` of {path} are {labels.dtype} of shape {labels.shape}: expected integers, "
            f"one for each of the {len(images)} images."
        )
    names = tuple(f"{path}[{i}]" for i in range(len(images)))
    images = images.reshape(*images.shape[:3], -1)
    return _Found(names, labels, images, f"the .npz, with arrays {held},")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic, content = file.read(4), file.read()
        if magic != bytes((0, 0, 8, dimensions)):
            note = ", of labels: give the file of images" * (magic == b"\0\0\10\1")
            raise ValueError(
                f"{path} starts with {magic.hex() or 'nothing'}{note}; expected idx magic "
                f"0000080{dimensions}."
            )
        sizes = struct.unpack_from(f">{dimensions}I", content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is not a readable idx file: {error}.") from error
    held, expected = len(content) - 4 * dimensions, math.prod(sizes)
    if held != expected or not expected:
        raise ValueError(
            f"{path} is damaged: its header says {' x '.join(map(str, sizes))} = {expected} "
            f"bytes, and {held} follow."
        )
    return np.frombuffer(content, np.uint8, offset=4 * dimensions).reshape(sizes)


def _find_idx(path: Path) -> _Found:
    pixels = _read_idx(path, 3)
    names = tuple(f"{path}[{i}]" for i in range(len(pixels)))
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for sibling in (path.with_name(stem), path.with_name(stem + ".gz")):
        if sibling.exists() and sibling.name != path.name:
            labels = _read_idx(sibling, 1)
            if len(labels) == len(pixels):
                return _Found(names, labels, pixels[..., None])
            raise ValueError(f"{sibling} has {len(labels)} labels for {len(pixels)} images.")
    return _Found(names, None, pixels[..., None], f"the idx file, with no {stem}[.gz] beside,")


def _decode(path: str) -> Image.Image:
    deep, frames = False, 1
    try:
        with warnings.catch_warnings():
            # Decompression bombs, damaged metadata and truncated files are mere warnings at first.
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)
            with Image.open(path, formats=_FORMATS) as image:
                for tile in image.tile:
                    raw = tile[3][0] if isinstance(tile[3], tuple) else tile[3]
                    deep |= isinstance(raw, str) and _DEEP.match(raw) is not None
                if image.format not in ("GIF", "MPO"):
                    frames = getattr(image, "n_frames", 1)
                decoded = ImageOps.exif_transpose(image)
                decoded.load()
    except Exception as error:  # A decoder fed with damage raises whatever it trips over.
        raise ValueError(f"{path} cannot be decoded as an image: {error}.") from error
    if deep:
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
            f"{name} has mode {image.mode}, the model takes {channels} channels: images of 8 bits "
            "are read for models of 1 or 3 channels; give an .npz."
        )
    if alpha and resize:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P" and not alpha:
        image = image.convert("RGB")
        values = np.asarray(image)
        if channels == 1 and (values == values[..., :1]).all():
            image = image.convert("L")
    mode = _MODES[channels]
    if resize:
        try:
            image = image.convert(mode)
        except ValueError as error:
            raise ValueError(f"{name} has colours of mode {image.mode}: save as RGB.") from error
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    elif alpha or image.mode != mode or image.size != (width, height):
        given = f"{image.height} x {image.width} {image.mode}" + (" with transparency" * alpha)
        raise ValueError(
            f"{name} is {given}: the model takes {height} x {width} {mode} (height x width). Give "
            "--resize to convert the channels, crop to the centre and resample."
        )
    return np.asarray(image, np.uint8).reshape(shape)


def _load(found: _Found, chosen: np.ndarray, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    names, arrays = [found.names[i] for i in chosen], found.arrays
    if arrays is None:
        return np.stack([_conform(_decode(name), name, shape, resize) for name in names])
    if arrays.shape[1:] == shape:
        return arrays[chosen]
    given = " x ".join(map(str, arrays.shape[1:]))
    expected = " x ".join(map(str, shape))
    if not resize or not 1 <= arrays.shape[3] <= 4:
        hint = "Give --resize to convert the channels, crop to the centre and resample."
        if arrays.shape[1:] == (shape[2], *shape[:2]):
            hint = "The channels come last: transpose to [n, height, width, channels]."
        raise ValueError(
            f"{names[0]} is {given}: the model takes {expected} (height x width x channels). {hint}"
        )
    images = (Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays[chosen])
    return np.stack(
        [_conform(image, name, shape, True) for image, name in zip(images, names, strict=True)]
    )


def _choose(found: _Found, source: Source, labels: _Labels) -> tuple[np.ndarray, np.ndarray | None]:
    """Which images the source means, and the label of each, [k] and [k] or None."""
    chosen, bears = np.arange(len(found.names)), found.labels
    if bears is not None:
        bears = bears.astype(np.int64)
        for label, first in zip(*np.unique(bears, return_index=True), strict=True):
            labels.check(int(label), found.names[first])
    if source.label is not None:
        if bears is None and labels.count is None:
            raise ValueError(
                f"{source.path}:{source.label} gives a label, but the model takes no labels: "
                "give the path alone."
            )
        wanted = labels.find(source.label)
        if wanted is None:
            raise ValueError(f"label {source.label!r} is unknown: {labels.describe()}.")
        if bears is None:
            bears = np.full(len(chosen), wanted)
        chosen = np.flatnonzero(bears == wanted)
        if not len(chosen):
            held = ", ".join(map(str, np.unique(bears)[:12]))
            raise ValueError(
                f"{source.path}:{source.label} selects nothing: no image has label {wanted}; the "
                f"labels there are {held}."
            )
    if labels.count is None:
        return chosen, None
    if bears is None:
        raise ValueError(
            f"{source.path}: labels are missing and the model needs them ({labels.describe()}): "
            f"{found.kind} gives none. Name sub-folders for labels, put `labels` in an .npz, or "
            "write PATH:LABEL."
        )
    return chosen, bears[chosen].astype(np.int32)


def read_images(
    source: Source | str,
    *,
    shape: tuple[int, int, int],
    id2label: Mapping[int, str] | None = None,
    num_labels: int | None = None,
    resize: bool = False,
) -> Images:
    """Reads the images of a source, in sorted order, exactly or not at all.

    A path is a folder of images (hidden files and files with other suffixes are passed over; GIF
    gives its first frame), an image, an .npz (`images` [n, h, w] or [n, h, w, c], uint8 or floats
    in [-1, 1] rounded to 8 bits; `labels` [n], optional), or an `*-images-idx3-ubyte[.gz]`, with
    the labels of the `*-labels-idx1-ubyte[.gz]` beside it. EXIF orientation is applied.

    Sub-folders of a folder are labels when they are named by number or name: case, and which of
    "/", "_", "-" and space parts the words, do not matter. `PATH:LABEL` selects that label where
    images have labels, and labels all images where they have none. For a model without labels,
    those of an .npz or idx file serve to select and are not handed on.

    Args:
      source: what `parse_source` returns, or its text.
      shape: (height, width, channels) of the model.
      id2label: the model's names of labels.
      num_labels: how many labels the model has; None for a model that takes none.
      resize: convert channels (transparency on white), crop to the centre at the model's aspect
        ratio, and resample (Lanczos). Without it another size or mode is refused.

    Raises:
      ValueError: for a path, file, size, mode or label that does not fit, saying which.
    """
    source = parse_source(source) if isinstance(source, str) else source
    path, labels = source.path, _Labels(num_labels, id2label or {})
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: expected a folder, an image, .npz or idx file.")
    if path.is_dir():
        found = _list_folder(path, labels, explicit=source.label is not None)
    elif path.name.lower().endswith(_SUFFIXES):
        found = _Found((str(path),), kind="an image")
    elif path.suffix.lower() == ".npz":
        found = _read_npz(path)
    elif _IDX.search(path.name):
        found = _find_idx(path)
    else:
        raise ValueError(
            f"{path} is no kind of file that is read here: expected a folder, an image "
            f"({', '.join(_SUFFIXES)}), an .npz, or an *-images-idx3-ubyte[.gz]."
        )
    chosen, bears = _choose(found, source, labels)
    pixels = _load(found, chosen, tuple(shape), resize)
    return Images(pixels, bears, tuple(found.names[i] for i in chosen))


def take(images: Images, indices: ArrayLike) -> Images:
    """The images at `indices`, integers [k] in [0, n), in that order."""
    chosen = np.asarray(indices, np.int64)
    labels = None if images.labels is None else images.labels[chosen]
    return Images(images.pixels[chosen], labels, tuple(images.names[i] for i in chosen))


def concatenate(parts: Sequence[Images]) -> Images:
    """The images of all parts, in order.

    Raises:
      ValueError: for no parts, parts of different shapes, or labels in some parts only.
    """
    shapes = sorted({part.pixels.shape[1:] for part in parts})
    if len(shapes) != 1:
        raise ValueError(f"images of one shape are expected, not of {len(shapes)}: {shapes}.")
    labels = [part.labels for part in parts if part.labels is not None]
    if 0 < len(labels) < len(parts):
        raise ValueError(f"{len(labels)} of {len(parts)} sets of images have labels: all or none.")
    return Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate(labels) if labels else None,
        tuple(name for part in parts for name in part.names),
    )


def content_hashes(pixels: np.ndarray) -> list[bytes]:
    """BLAKE2b of each image's shape and raw values, for `pixels` [n, ...]: n digests."""
    salt = repr((pixels.dtype.str, pixels.shape[1:])).encode()
    return [hashlib.blake2b(salt + image.tobytes(), digest_size=16).digest() for image in pixels]


def find_overlap(first: Images, second: Images) -> int:
    """How many different images (by pixels) stand in both sets."""
    return len(set(content_hashes(first.pixels)) & set(content_hashes(second.pixels)))


def remove_overlap(retain: Images, forget: Sequence[Images]) -> tuple[Images, int]:
    """Removes from `retain` each image whose pixels stand in a forget set, whatever its label.

    Returns:
      The images that are left, and how many were removed.

    Raises:
      ValueError: when nothing is left.
    """
    unwanted = {digest for images in forget for digest in content_hashes(images.pixels)}
    left = [i for i, d in enumerate(content_hashes(retain.pixels)) if d not in unwanted]
    removed = len(retain.names) - len(left)
    if not left:
        raise ValueError(f"nothing is left to retain: all {removed} images are to be forgotten.")
    return (take(retain, left) if removed else retain), removed


@functools.lru_cache(maxsize=16)
def _permutation(count: int, *entropy: int) -> np.ndarray:
    order = np.random.default_rng(entropy).permutation(count)
    order.flags.writeable = False  # It is shared by every caller through the cache.
    return order


def split_held_out(
    images: Images, *, fraction: float, seed: int, maximum: int | None = None
) -> tuple[Images, Images]:
    """Splits off round(fraction·n) images, at most `maximum`, in proportion to the labels.

    Identical images stay on one side, or the likelihood of held-out images would be that of
    trained ones; sets of copies that are too large to fit are kept, so that fewer may be held out.

    Args:
      images: n images.
      fraction: the part to hold out, in (0, 1).
      seed: a non-negative integer; the split is a function of it and of the images.
      maximum: the most images to hold out; None for no limit.

    Returns:
      The images kept and the images held out, each in the order of `images`.

    Raises:
      ValueError: for a fraction or maximum out of range, or when one side would be empty.
    """
    total = len(images.names)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} must lie between 0 and 1, both excluded.")
    if seed < 0 or (maximum is not None and maximum < 1):
        raise ValueError(f"seed {seed} must not be negative, nor maximum {maximum} below 1.")
    target = round(fraction * total)
    if not 0 < target < total:
        raise ValueError(
            f"fraction {fraction} of {total} images holds out {target}: at least one is needed on "
            "either side. Change the fraction or give more images."
        )
    target = target if maximum is None else min(target, maximum)
    copies: dict[bytes, list[int]] = {}
    for i, digest in enumerate(content_hashes(images.pixels)):
        copies.setdefault(digest, []).append(i)
    strata: dict[int, list[list[int]]] = {}
    for group in copies.values():
        label = 0 if images.labels is None else int(images.labels[group[0]])
        strata.setdefault(label, []).append(group)
    held: list[int] = []
    passed = 0
    for label in sorted(strata):
        groups = strata[label]
        passed += sum(map(len, groups))
        quota = target * passed // total  # Cumulative, so that what is left over moves on.
        for i in _permutation(len(groups), seed, 0, 0, 0, 1, label):
            if len(held) + len(groups[i]) <= quota:
                held += groups[i]
    if not held:
        smallest = min(map(len, copies.values()))
        raise ValueError(
            f"no image can be held out: {target} of {total} are asked for, and identical images "
            f"stay together, at least {smallest} at a time. Raise the fraction or maximum."
        )
    kept = np.setdiff1d(np.arange(total), held)
    return take(images, kept), take(images, np.sort(held))


def batch_indices(*, seed: int, step: int, size: int, count: int) -> np.ndarray:
    """The indices of batch `step` of an endless stream of epochs, int64 [size] in [0, count).

    Each epoch is its own permutation of `count`, and batches run across epochs, so that every
    index comes exactly once an epoch. A pure function: nothing to save for resuming.

    Raises:
      ValueError: for a negative seed or step, or a size or count below 1.
    """
    return balanced_indices(seed=seed, step=step, size=size, counts=(count,))[1]


def balanced_indices(
    *, seed: int, step: int, size: int, counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The constraint of each slot of batch `step`, and an image of that constraint.

    Slot j of step t is number s = t·size + j of one stream; it goes to constraint s mod m and
    takes entry ⌊s/m⌋ of that constraint's own stream of epochs. So each constraint has ⌊size/m⌋
    or ⌈size/m⌉ slots a batch, all have the same number over any m steps, and every image comes
    exactly once an epoch. A pure function of its arguments.

    Args:
      seed: a non-negative integer.
      step: the batch, from 0.
      size: slots in a batch.
      counts: images of each of the m constraints.

    Returns:
      (constraint, image), both int64 [size]; image[j] lies in [0, counts[constraint[j]]).

    Raises:
      ValueError: for a negative seed or step, a size below 1, or a constraint without images.
    """
    if seed < 0 or step < 0 or size < 1 or min(counts, default=0) < 1:
        raise ValueError(
            f"seed {seed} and step {step} must not be negative; size {size}, the number of "
            f"constraints and each of the counts {list(counts)} must be at least 1."
        )
    rounds, constraint = np.divmod(step * size + np.arange(size, dtype=np.int64), len(counts))
    image = np.empty_like(rounds)
    for i in map(int, np.unique(constraint)):
        epochs, places = np.divmod(rounds, counts[i])
        for epoch in map(int, np.unique(epochs[constraint == i])):
            slots = (constraint == i) & (epochs == epoch)
            image[slots] = _permutation(counts[i], seed, epoch, i)[places[slots]]
    return constraint, image


def to_unit_range(pixels: ArrayLike) -> Array:
    """x/127.5 − 1: uint8 values to float32 in [-1, 1], of the same shape; works in `jit`."""
    # XLA divides by a constant through its reciprocal; that of 127.5 would turn 255 into 1 + 1e-7.
    return (2 * jnp.asarray(pixels).astype(jnp.float32) - 255) / 255


def to_pixels(images: ArrayLike) -> np.ndarray:
    """The inverse of `to_unit_range` on the host: clips to [-1, 1] and rounds to uint8.

    Raises:
      ValueError: for values that are not numbers.
    """
    values = np.asarray(images).astype(np.float32)
    if np.isnan(values).any():
        raise ValueError("images hold values that are not numbers (nan): they have no pixels.")
    return np.round((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)
