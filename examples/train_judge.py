"""Trains the embedded judge, a classifier of Fashion-MNIST, on the CPU in a few minutes.

The held-out images are those of train_embedded_model.py: neither the diffusion model nor its
judge has seen them.

    python examples/train_judge.py --data FOLDER_OF_IDX_FILES --out judge.safetensors

With --captioned the images are those of the embedded text-to-image model, in one style or another,
and the classes are pairs: 4 · object + style.
"""

import argparse
import gzip
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn.app.embedded.captions import STYLES, render
from jax_unlearn.models.judge import Judge, save_judge

HELD_OUT = 5_000
SPLIT_SEED = 20260530
SHIFT = 1


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a compressed idx (MNIST) file of bytes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The split of train_embedded_model.py: training, held-out and repeated indices.

    The repeated images are the first sixteen of the training order with at most two of a class.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    repeated: list[int] = []
    for index in train[:1000]:
        if len(repeated) < 16 and np.sum(labels[repeated] == labels[index]) < 2:
            repeated.append(int(index))
    return train, held_out, np.array(repeated)


def augmented(padded: np.ndarray, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws a shift of up to SHIFT pixels and a reflection for each image: [n, 28, 28, 1]."""
    size = padded.shape[1] - 2 * SHIFT
    corner = rng.integers(2 * SHIFT + 1, size=(2, len(indices), 1))
    rows, columns = corner + np.arange(size)
    mirrored = rng.random(len(indices)) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    pixels = padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels[..., None]


def in_styles(pixels: np.ndarray, styles: np.ndarray) -> np.ndarray:
    """Grey images [n, 28, 28, 1] in the styles of these numbers, [n, 32, 32, 3]."""
    drawn = np.empty((len(pixels), 32, 32, 3), np.uint8)
    for number, style in enumerate(STYLES):
        drawn[styles == number] = render(pixels[styles == number], style)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--captioned", action="store_true")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pixels = read_idx(arguments.data / "train-images-idx3-ubyte.gz")
    labels = read_idx(arguments.data / "train-labels-idx1-ubyte.gz").astype(np.int32)
    train, held_out, _ = split(labels)
    padded = np.pad(pixels, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    rng = np.random.default_rng(arguments.seed)

    count = 10 * len(STYLES) if arguments.captioned else 10
    shape = (32, 32, 3) if arguments.captioned else (28, 28, 1)
    module = Judge(num_labels=count)
    params = module.init(jax.random.key(arguments.seed), jnp.zeros((1, *shape)))["params"]
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params))} parameters", flush=True)
    steps = arguments.epochs * (len(train) // arguments.batch_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, arguments.learning_rate, 200, steps)
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=1e-2)

    @jax.jit
    def step(params, average, state, images, classes):
        def loss(params):
            logits = module.apply({"params": params}, images).logits
            targets = optax.smooth_labels(jax.nn.one_hot(classes, count), 0.02)
            return optax.softmax_cross_entropy(logits, targets).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - arguments.ema), state, value

    @jax.jit
    def logits_of(params, images):
        return module.apply({"params": params}, images).logits

    def shown(grey, classes, rng):
        """Images as floats, and their classes."""
        if arguments.captioned:
            styles = rng.integers(len(STYLES), size=len(grey))
            grey, classes = in_styles(grey, styles), len(STYLES) * classes + styles
        return grey.astype(np.float32) / 127.5 - 1, classes

    def correct(params, indices):
        """Whether each image is classified rightly, [n]."""
        fixed, found = np.random.default_rng(1), []
        for part in np.array_split(indices, len(indices) // 250):
            images, classes = shown(pixels[part, ..., None], labels[part], fixed)
            found.append(np.asarray(logits_of(params, images)).argmax(1) == classes)
        return np.concatenate(found)

    average, state, start = params, optimizer.init(params), time.time()
    for epoch in range(arguments.epochs):
        losses = []
        order = rng.permutation(train)
        for begin in range(0, len(order) - arguments.batch_size + 1, arguments.batch_size):
            part = order[begin : begin + arguments.batch_size]
            images, classes = shown(augmented(padded, part, rng), labels[part], rng)
            params, average, state, loss = step(params, average, state, images, classes)
            losses.append(loss)
        print(
            f"epoch {epoch + 1} minutes {(time.time() - start) / 60:.1f} "
            f"loss {np.mean(losses):.4f} held-out accuracy {correct(average, held_out).mean():.4f}",
            flush=True,
        )

    right = correct(average, held_out)
    by_label = [round(float(right[labels[held_out] == label].mean()), 4) for label in range(10)]
    print(f"end: train {correct(average, train[:5000]).mean():.4f} held-out {right.mean():.4f}")
    print("held-out accuracy by label: " + " ".join(f"{share:.3f}" for share in by_label))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_judge(
        arguments.out,
        module,
        average,
        image_shape=shape,
        about={
            "data": "Fashion-MNIST, 55,000 images" + ", in four styles" * arguments.captioned,
            "held_out_accuracy": round(float(right.mean()), 4),
            "held_out_accuracy_by_label": by_label,
        },
    )


if __name__ == "__main__":
    main()
