"""Sets of images: selected, joined, compared, split, and turned into what is diffused."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_unlearn.app.data.batches import permutation
from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "Images",
    "NotNumbers",
    "concatenate",
    "content_hashes",
    "find_overlap",
    "remove_overlap",
    "split_held_out",
    "take",
    "to_pixels",
    "to_unit_range",
    "to_x_0",
]


class Images(NamedTuple):
    """Images, what they show, and where they came from.

    Attributes:
      pixels: uint8 [n, height, width, channels].
      labels: int32 [n]; for models from text to image the numbers of captions; or None.
      names: "a.png" or "a.npz[3]".
      latents: float32 [n, ...], the images as a model on latents has them; None in pixel space.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]
    latents: np.ndarray | None = None

    @property
    def stored(self) -> np.ndarray:
        """What is diffused, as `to_x_0` takes it: the latents, or else the pixels."""
        return self.pixels if self.latents is None else self.latents


def take(images: Images, indices: ArrayLike | Sequence[int]) -> Images:
    """The images at `indices`, integers [k] in [0, n), in that order."""
    chosen = np.asarray(indices, np.int64)
    labels, latents = (
        None if part is None else part[chosen] for part in (images.labels, images.latents)
    )
    return Images(images.pixels[chosen], labels, tuple(images.names[i] for i in chosen), latents)


def concatenate(parts: Sequence[Images]) -> Images:
    """The images of all parts, in order.

    Raises ValueError for no parts, different shapes, or labels in some parts only.
    """
    shapes = sorted({part.pixels.shape[1:] for part in parts})
    labels = [part.labels for part in parts if part.labels is not None]
    if len(shapes) != 1 or 0 < len(labels) < len(parts):
        raise ValueError(
            f"{len(parts)} sets of images have shapes {shapes}, and {len(labels)} have labels: "
            "expected one shape, and labels in all or none."
        )
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
    """What is left of `retain` without the pixels of any forget set, and how many were removed.

    Raises ValueError when nothing is left.
    """
    unwanted = {digest for images in forget for digest in content_hashes(images.pixels)}
    left = [i for i, d in enumerate(content_hashes(retain.pixels)) if d not in unwanted]
    removed = len(retain.names) - len(left)
    if not left:
        raise ValueError(f"nothing is left to retain: all {removed} images are to be forgotten.")
    return (take(retain, left) if removed else retain), removed


def split_held_out(
    images: Images, *, fraction: float, seed: int, maximum: int | None = None
) -> tuple[Images, Images]:
    """Holds out round(fraction·n) images, at most `maximum`, in proportion to the labels.

    Identical images stay on one side, or the likelihood of held-out images would be that of
    trained ones; copies that do not fit are kept, so that fewer may be held out. The same images
    and seed give the same split: (kept, held out), each in the order of `images`.

    Raises ValueError unless seed ≥ 0, maximum ≥ 1 and neither side is empty.
    """
    total = len(images.names)
    target = round(fraction * total)
    if not 0 < target < total or seed < 0 or (maximum is not None and maximum < 1):
        raise ValueError(
            f"fraction {fraction} of {total} images holds out {target}, with seed {seed} and "
            f"maximum {maximum}: each side needs an image, seed >= 0 and maximum >= 1."
        )
    target = min(target, maximum or target)
    copies: dict[bytes, list[int]] = {}
    for i, digest in enumerate(content_hashes(images.pixels)):
        copies.setdefault(digest, []).append(i)
    strata: dict[int, list[list[int]]] = {}
    for group in copies.values():
        label = 0 if images.labels is None else int(images.labels[group[0]])
        strata.setdefault(label, []).append(group)
    held, passed = [], 0
    for label, groups in sorted(strata.items()):
        passed += sum(map(len, groups))
        quota = target * passed // total  # Cumulative, so that what is left over moves on.
        for i in permutation(len(groups), seed, 0, 0, 0, 1, label):
            held += groups[i] if len(held) + len(groups[i]) <= quota else []
    if not held:
        raise ValueError(
            f"no image can be held out: {target} of {total} are asked for, and identical images "
            f"stay together, at least {min(map(len, copies.values()))} at a time."
        )
    return take(images, np.setdiff1d(np.arange(total), held)), take(images, np.sort(held))


def to_unit_range(pixels: ArrayLike) -> Array:
    """x/127.5 − 1: uint8 values to float32 in [-1, 1], of the same shape; works in `jit`."""
    # XLA divides by a constant through its reciprocal; that of 127.5 would turn 255 into 1 + 1e-7.
    return (2 * jnp.asarray(pixels).astype(jnp.float32) - 255) / 255


def to_x_0(stored: ArrayLike) -> Array:
    """What is diffused: `to_unit_range` of uint8, and latents as they are; works in `jit`."""
    stored = jnp.asarray(stored)
    return to_unit_range(stored) if stored.dtype == jnp.uint8 else stored


class NotNumbers(ValueError):
    """Images that hold nan."""


def to_pixels(images: ArrayLike) -> np.ndarray:
    """The inverse of `to_unit_range` on the host: clips, rounds to uint8; NotNumbers for nan."""
    values = np.asarray(images).astype(np.float32)
    if np.isnan(values).any():
        raise NotNumbers("images hold values that are not numbers (nan): they have no pixels.")
    return np.round((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)
