"""Packs the images that come with jax_unlearn: a small, balanced part of Fashion-MNIST.

6,000 images that the embedded model was trained on, among them the sixteen that it saw
64 or 256 times, and 3,000 that neither it nor the judge has seen.

    python examples/pack_embedded_data.py --data IDX_FOLDER --out jax_unlearn/app/embedded
"""

import argparse
import pathlib
import shutil

import numpy as np
from train_judge import read_idx, split

TRAIN_PER_LABEL = 600
HELD_OUT_PER_LABEL = 300


def balanced(labels: np.ndarray, candidates: np.ndarray, per_label: int) -> np.ndarray:
    """The first `per_label` candidates of each of the ten labels, in the candidates' order."""
    rank = np.empty(len(candidates), int)
    for label in range(10):
        (places,) = np.nonzero(labels[candidates] == label)
        rank[places] = np.arange(len(places))
    chosen = candidates[rank < per_label]
    if len(chosen) != 10 * per_label:
        raise ValueError(f"a label has fewer than {per_label} images.")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()

    pixels = read_idx(arguments.data / "train-images-idx3-ubyte.gz")
    labels = read_idx(arguments.data / "train-labels-idx1-ubyte.gz")
    train, held_out, repeated = split(labels)
    # The repeated images come early in the training order, so the first 600 of a label hold them.
    train = balanced(labels, train, TRAIN_PER_LABEL)
    held_out = balanced(labels, held_out, HELD_OUT_PER_LABEL)
    places = np.array([np.nonzero(train == index)[0].item() for index in repeated])

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "images.npz"
    np.savez_compressed(
        path,
        train_pixels=pixels[train],
        train_labels=labels[train],
        held_out_pixels=pixels[held_out],
        held_out_labels=labels[held_out],
        repeated=places.astype(np.int32),
    )
    shutil.copyfile(arguments.data / "LICENSE.txt", arguments.out / "LICENSE.txt")
    print(f"{path}: {path.stat().st_size} bytes, repeated images at {places.tolist()}")


if __name__ == "__main__":
    main()
