"""Captioned images of the embedded data in folders, to forget from the embedded pipeline.

Forty blueprints of bags to forget, and five hundred images in all styles to retain, each with its
caption in a .txt file of the same name:

    python examples/captioned_images.py captioned
    jax-unlearn data --model embedded-text --forget captioned/forget --retain captioned/retain \
        --threshold 1.3x --steps 60 --batch-size 32 --forget-batch-size 16 --learning-rate 2e-4 \
        --evaluation-images 128 --samples 4 --sampling-steps 15 --out unlearned
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from jax_unlearn.app import embedded
from jax_unlearn.app.embedded.captions import OBJECTS, STYLES, caption, render

BAG = OBJECTS.index("bag")


def write(folder, pixels, labels, styles):
    folder.mkdir(parents=True)
    for number, (image, label, style) in enumerate(zip(pixels, labels, styles, strict=True)):
        Image.fromarray(render(image[None], style)[0]).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption(OBJECTS[label], style))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    pixels, labels = embedded.load_data().train
    rng = np.random.default_rng(0)
    bags = np.flatnonzero(labels == BAG)[:40]
    write(folder / "forget", pixels[bags], labels[bags], ["blueprint"] * len(bags))
    others, styles = rng.permutation(len(labels))[:500], rng.choice(STYLES, 500)
    kept = (labels[others] != BAG) | (styles != "blueprint")
    others, styles = others[kept], styles[kept]
    write(folder / "retain", pixels[others], labels[others], styles)


if __name__ == "__main__":
    main()
