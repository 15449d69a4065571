"""Which images are copies of given ones: spaces that distances are taken in, and thresholds."""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jax_unlearn import metrics
from jax_unlearn.app.audit.sscd import USUAL, load_sscd
from jax_unlearn.app.tasks.drawing import features_of
from jax_unlearn.models.judge import JudgeFunctions

__all__ = ["Copies", "Space", "copies_of", "distances", "spaces"]

_BATCH = 64


class Space(NamedTuple):
    """Where distances between images are taken.

    Attributes:
      name: of it.
      features: uint8 images [n, height, width, channels] -> [n, d]. Their Euclidean distance is
        the root mean square difference of pixels, as a share of their range; of unit vectors it
        is √(2 − 2 cos).
      cosine: whether they are unit vectors.
    """

    name: str
    features: Callable[[np.ndarray], np.ndarray]
    cosine: bool


class Copies(NamedTuple):
    """What makes an image a copy of one of a set.

    Attributes:
      space: where distances are taken.
      bank: features of the set, [n, d].
      threshold: how near makes a copy; rate nan and count 0 where nothing calibrates it.
    """

    space: Space
    bank: np.ndarray
    threshold: metrics.CopyThreshold

    def among(self, images: np.ndarray) -> np.ndarray:
        """Which images are copies, bool [n]."""
        return distances(self.space, images, self.bank) < self.threshold.distance


def spaces(judge: JudgeFunctions | None, sscd: pathlib.Path | None) -> tuple[Space, ...]:
    """The spaces that there are; the first decides what a copy is: SSCD, or else pixels.

    Raises:
      ValueError: as `load_sscd`.
    """
    found = [] if sscd is None else [Space("SSCD", load_sscd(sscd), True)]
    found.append(Space("pixels", _pixels, False))
    if judge is not None:
        of_judge = features_of(judge)
        found.append(Space("the judge's features", lambda images: _unit(of_judge(images)), True))
    return tuple(found)


def copies_of(space: Space, images: np.ndarray, unseen: np.ndarray | None, rate: float) -> Copies:
    """What makes a copy of some images, so that at most a share `rate` of unseen ones would be.

    Without unseen images it is the usual threshold of SSCD.

    Raises:
      ValueError: for too few unseen images.
    """
    bank = space.features(images)
    if unseen is None:
        return Copies(space, bank, metrics.CopyThreshold(USUAL, float("nan"), 0))
    return Copies(space, bank, metrics.copy_threshold(distances(space, unseen, bank), rate))


def distances(space: Space, images: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """The distance of each image to the nearest of a bank of features, [n]."""
    return np.concatenate(
        [metrics.nearest_distances(space.features(part), bank)[0] for part in _parts(images)]
    )


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


def _pixels(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    return flat / np.float32(255 * np.sqrt(flat.shape[1]))


def _unit(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)
