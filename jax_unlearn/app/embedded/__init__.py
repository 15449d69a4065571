"""Complete small problems inside the package: diffusion models, their data and judges.

The model is a class-conditional DDPM of Fashion-MNIST in the diffusers layout. The images are a
balanced part of that data set (Zalando SE, MIT licence, in LICENSE.txt here): some that the
model was trained on, sixteen of which it saw 64 or 256 times as often, and some that neither the
model nor the judge has seen. Nothing is downloaded.
"""

import pathlib
from importlib import resources
from typing import NamedTuple

import numpy as np

from jax_unlearn.models.judge import JudgeFunctions, load_judge

__all__ = [
    "EmbeddedData",
    "LabelledImages",
    "clip_path",
    "judge",
    "load_data",
    "model_path",
    "text_judge",
    "text_model_path",
]


class LabelledImages(NamedTuple):
    """Grey images and what they show.

    Attributes:
      pixels: [n, 28, 28, 1], uint8; pixels / 127.5 − 1 is what the model and the judge take.
      labels: [n], int32 in [0, 10).
    """

    pixels: np.ndarray
    labels: np.ndarray


class EmbeddedData(NamedTuple):
    """The embedded images.

    Attributes:
      train: 6,000 images of the model's training set, 600 of each label.
      held_out: 3,000 images that the model and the judge have not seen, 300 of each label.
      repeated: where in `train` the repeated images are, [16]: the model saw the first eight
        64 times in each pass over its data, the others 256 times.
    """

    train: LabelledImages
    held_out: LabelledImages
    repeated: np.ndarray


def load_data() -> EmbeddedData:
    """Reads the embedded images into memory."""
    with (_folder() / "images.npz").open("rb") as file, np.load(file) as arrays:
        train, held_out = (
            LabelledImages(
                arrays[f"{name}_pixels"][..., None], arrays[f"{name}_labels"].astype(np.int32)
            )
            for name in ("train", "held_out")
        )
        return EmbeddedData(train, held_out, arrays["repeated"])


def model_path() -> pathlib.Path:
    """The folder of the embedded diffusion model, in the diffusers layout.

    Raises:
      FileNotFoundError: if this installation came without it.
    """
    return _model("model", "train_embedded_model.py")


def text_model_path() -> pathlib.Path:
    """The folder of the embedded text-to-image pipeline, of objects in styles (see `captions`).

    Raises:
      FileNotFoundError: if this installation came without it.
    """
    return _model("text_model", "train_text_model.py")


def clip_path() -> pathlib.Path:
    """The folder of the embedded CLIP, which knows the same images and captions."""
    return _folder() / "clip"


def text_judge() -> JudgeFunctions:
    """The embedded classifier of images [n, 32, 32, 3] in [−1, 1]: class 4 · object + style."""
    return load_judge(_folder() / "text_judge.safetensors")


def judge() -> JudgeFunctions:
    """The embedded classifier: (logits, features) of images [n, 28, 28, 1] in [−1, 1]."""
    return load_judge(_folder() / "judge.safetensors")


def _model(name: str, script: str) -> pathlib.Path:
    path = _folder() / name
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"no diffusion model in {path}: train one with examples/{script}.")
    return path


def _folder() -> pathlib.Path:
    folder = resources.files(__name__)
    if not isinstance(folder, pathlib.Path):
        raise FileNotFoundError(
            f"the embedded files are in {folder}, not in a folder: unpack the installation."
        )
    return folder
