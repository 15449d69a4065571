"""Trains the embedded class-conditional DDPM on Fashion-MNIST with torch diffusers.

The embedded model is a genuine diffusers checkpoint: this script needs only torch and
diffusers (the `torch` extra), none of jax_unlearn. It is a UNet2DModel of 0.69 M
parameters on 28x28 grey images, with eleven class embeddings: ten labels and a null label
(10) that replaces the label in 15 % of the examples, for classifier-free guidance.

Sixteen training images are repeated, eight of them 64 times and eight 256 times, as
web-scraped training sets repeat theirs. The model memorises these more than the rest, which
gives the forgetting of single images something real to remove.

The learning rate follows the clock (`--minutes`): linear warm-up, then cosine to zero.

    python examples/train_embedded_model.py --data FOLDER_OF_IDX_FILES --out /tmp/embedded

An oracle, which never saw one label, is trained by steps instead:

    python examples/train_embedded_model.py --data FOLDER_OF_IDX_FILES --out /tmp/oracle \
        --without Trouser --steps 5000
"""

import argparse
import copy
import gzip
import json
import math
import pathlib
import time

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

LABELS = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
NULL_LABEL = 10
HELD_OUT = 5_000
SPLIT_SEED = 20260530


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an idx (MNIST) file of bytes, compressed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        raw = file.read()
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the training images, the held-out images and the sixteen repeated ones.

    The repeated images are the first sixteen of the training order, kept to at most two
    of a class; the first eight are repeated 64 times, the others 256 times.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    repeated: list[int] = []
    for index in train:
        if sum(labels[other] == labels[index] for other in repeated) < 2:
            repeated.append(int(index))
        if len(repeated) == 16:
            break
    return train, held_out, np.array(repeated)


def denoising_loss(model, scheduler, images, labels, generator=None):
    steps = scheduler.config.num_train_timesteps
    noise = torch.randn(images.shape, generator=generator)
    t = torch.randint(0, steps, (len(images),), generator=generator)
    noisy = scheduler.add_noise(images, noise, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(noisy, t, labels).sample
    return (prediction.float() - noise).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--without", choices=LABELS, help="a label of which no image is shown")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--start", type=pathlib.Path, help="go on from this pipeline's weights")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    pixels = read_idx(arguments.data / "train-images-idx3-ubyte.gz")
    classes = read_idx(arguments.data / "train-labels-idx1-ubyte.gz")
    images = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)[:, None]
    labels = torch.from_numpy(classes.astype(np.int64))
    train, held_out, repeated = split(classes)
    extra = np.concatenate([np.repeat(repeated[:8], 63), np.repeat(repeated[8:], 255)])
    pool = np.concatenate([train, extra])
    if arguments.without is not None:  # Nor are the numbers in the log of it.
        lost = LABELS.index(arguments.without)
        pool, train, held_out, repeated = (
            part[classes[part] != lost] for part in (pool, train, held_out, repeated)
        )

    model = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(LABELS) + 1,
    )
    if arguments.start:
        model = UNet2DModel.from_pretrained(arguments.start, subfolder="unet").train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )

    def save() -> None:
        DDPMPipeline(ema, scheduler).save_pretrained(arguments.out)
        index = json.loads((arguments.out / "model_index.json").read_text())
        index["id2label"] = {str(number): name for number, name in enumerate(LABELS)}
        (arguments.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def evaluate(indices: np.ndarray) -> float:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return float(
                np.mean(
                    [
                        denoising_loss(ema, scheduler, images[part], labels[part], generator)
                        for part in np.array_split(indices, max(1, len(indices) // 250))
                    ]
                )
            )

    start, step, running = time.time(), 0, 0.0
    done = 0.0
    while done < 1.0:
        order = rng.permutation(pool)
        for begin in range(0, len(order) - arguments.batch_size, arguments.batch_size):
            done = (time.time() - start) / (60 * arguments.minutes)
            if arguments.steps is not None:
                done = step / arguments.steps
            if done >= 1.0:
                break
            part = order[begin : begin + arguments.batch_size]
            conditions = labels[part].clone()
            conditions[torch.rand(len(part)) < 0.15] = NULL_LABEL
            rate = min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * rate
            loss = denoising_loss(model, scheduler, images[part], conditions)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                decay = min(arguments.ema, (step + 1) / (step + 10))
                for average, value in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(value, 1 - decay)
            running += loss.item()
            step += 1
            if step % 500 == 0:
                save()
                print(
                    f"step {step} images {step * arguments.batch_size} "
                    f"minutes {(time.time() - start) / 60:.1f} loss {running / 500:.5f} "
                    f"ema: train {evaluate(train[16:1016]):.5f} "
                    f"held-out {evaluate(held_out[:1000]):.5f} "
                    f"repeated {evaluate(np.repeat(repeated, 60)):.5f}",
                    flush=True,
                )
                running = 0.0
    save()
    print(
        f"end: step {step} minutes {(time.time() - start) / 60:.1f} "
        f"train {evaluate(train[16:4016]):.5f} held-out {evaluate(held_out[:4000]):.5f} "
        f"repeated {evaluate(np.repeat(repeated, 120)):.5f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
