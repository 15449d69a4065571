"""SSCD, a network that tells copies of images, where the user has it as an ONNX file."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from jax_unlearn.models.files import check_file, shown

__all__ = ["USUAL", "load_sscd"]

USUAL = 1.0
"""Distance of unit vectors whose cosine is 1/2, the usual threshold of copies (Somepalli et al.)"""
# The shorter side that SSCD's authors evaluate with, and the statistics of ImageNet.
_SIDE = 288
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
# What the format can hold in one file.
_MOST = 2**31


def load_sscd(path: str | os.PathLike[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a copy-detection network: uint8 images [n, height, width, 1 or 3] -> unit vectors.

    The network takes float32 [batch, 3, height, width], and returns a vector an image. Images are
    resized to the height and width that it declares, or else so that the shorter side has 288
    pixels; they are normalised by the statistics of ImageNet.

    Args:
      path: an ONNX file, such as `sscd_disc_mixup` exported from its TorchScript file. All of its
        weights are in it.

    Raises:
      ValueError: without onnxruntime, or for a file that is no such network.

    References:
      Pizzi et al., "A self-supervised descriptor for image copy detection", 2022.
      Somepalli et al., "Diffusion art or digital forgery?", 2023 (a similarity of 1/2).
    """
    path = pathlib.Path(path)
    check_file(path, _MOST)
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("--sscd needs onnxruntime: pip install 'jax-unlearn[sscd]'.") from None
    try:
        # From bytes: a file cannot name others to be read.
        session = onnxruntime.InferenceSession(
            path.read_bytes(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # The runtime raises a dozen kinds of its own.
        said = shown(str(error).splitlines()[0])
        raise ValueError(f"--sscd {path} is not a readable ONNX file: {said}") from error
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] != 3 or inputs[0].type != "tensor(float)":
        raise ValueError(
            f"--sscd {path} takes {', '.join(f'{one.type} {one.shape}' for one in inputs)}: "
            "expected float32 images [batch, 3, height, width]."
        )
    batch, _, height, width = (side if isinstance(side, int) else None for side in shape)
    size = None if height is None or width is None else (width, height)
    output = session.get_outputs()[0].name

    def run(part: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(session.run([output], {inputs[0].name: part})[0])
        except Exception as error:
            said = shown(str(error).splitlines()[0])
            raise ValueError(f"--sscd {path} does not run: {said}") from error

    def features(images: np.ndarray) -> np.ndarray:
        prepared = np.stack([_prepared(image, size) for image in images])
        # A network that was exported for one size of batches takes no other: the last is padded.
        rows = batch or len(prepared)
        parts = []
        for start in range(0, len(prepared), rows):
            part = prepared[np.arange(start, start + rows) % len(prepared)]
            parts.append(run(part))
        found = np.concatenate(parts)[: len(images)]
        if found.ndim != 2 or not np.isfinite(found).all():
            raise ValueError(
                f"--sscd {path} returns {found.shape} for {len(images)} images: expected a vector "
                "of finite numbers for each."
            )
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    features(np.zeros((1, 8, 8, 3), np.uint8))
    return features


def _prepared(pixels: np.ndarray, size: tuple[int, int] | None) -> Any:
    """An image as the network takes it, float32 [3, height, width]."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    if size is None:
        share = _SIDE / min(image.size)
        size = round(share * image.width), round(share * image.height)
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32) / 255
    return ((resized - _MEAN) / _STD).transpose(2, 0, 1)
