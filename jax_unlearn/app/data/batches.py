"""Batches of indices that are pure functions of (seed, step): nothing to save for resuming."""

import functools
from collections.abc import Sequence

import numpy as np

__all__ = ["balanced_indices", "batch_indices", "permutation"]


@functools.lru_cache(maxsize=32)
def permutation(count: int, *entropy: int) -> np.ndarray:
    """A permutation of `count`, read-only, int64 [count]; a pure function of its arguments."""
    order = np.random.default_rng(entropy).permutation(count)
    order.flags.writeable = False  # It is shared by every caller through the cache.
    return order


def batch_indices(*, seed: int, step: int, size: int, count: int) -> np.ndarray:
    """The indices of batch `step` of an endless stream of epochs, int64 [size] in [0, count).

    Each epoch is its own permutation of `count`, and batches run across epochs, so that every
    index comes exactly once an epoch. A pure function: nothing to save for resuming. Raises
    ValueError for a negative seed or step, or a size or count below 1.
    """
    return balanced_indices(seed=seed, step=step, size=size, counts=(count,))[1]


def balanced_indices(
    *, seed: int, step: int, size: int, counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The constraint of each slot of batch `step`, and an image of it: both int64 [size].

    Slot j of step t is number s = t·size + j of one stream; it goes to constraint s mod m and
    takes entry ⌊s/m⌋ of that constraint's own stream of epochs over its `counts[s mod m]` images.
    So each of the m constraints has ⌊size/m⌋ or ⌈size/m⌉ slots a batch, all have the same number
    over any m steps, and every image comes exactly once an epoch. A pure function. Raises
    ValueError for a negative seed or step, a size below 1, or a constraint without images.
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
            image[slots] = permutation(counts[i], seed, epoch, i)[places[slots]]
    return constraint, image
