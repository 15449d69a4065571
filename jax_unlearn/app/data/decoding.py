"""An image file decoded, exactly or not at all."""

import math
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

from jax_unlearn.models.files import check_file, shown

__all__ = ["MODES", "conform", "decode", "said"]

# Named, so that a file's content cannot call up another decoder (EPS would start Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Of Pillow, by the number of channels.
MODES = {1: "L", 3: "RGB"}
# Decoded by Pillow to 8 bits a channel without a word: the low byte would be lost.
_DEEP = re.compile(r"(L|LA|RGB|RGBA|RGBX|RGBa|CMYK)X*;16")
# Of an image file: 64 megapixels, which is what 8192 x 8192 has, and 512 MB.
_MAX_PIXELS = 2**26
_MAX_FILE = 2**29


def said(error: Exception) -> str:
    """What an error says, or else its name."""
    return str(error).removesuffix(".") or type(error).__name__


def decode(path: str) -> Image.Image:
    """The image in a file, EXIF orientation applied; the first frame of a GIF.

    Raises:
      ValueError: for damage, many frames, 16 bits a channel, or too many pixels or bytes.
    """
    check_file(path, _MAX_FILE)
    try:
        with warnings.catch_warnings():
            # Decompression bombs, damaged metadata and truncated files are mere warnings at first.
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if math.prod(image.size) > _MAX_PIXELS:
                    raise ValueError(
                        f"it has {image.width} x {image.height} pixels, and {_MAX_PIXELS} in all "
                        "are read at most"
                    )
                raw = [t.args[0] if isinstance(t.args, tuple) else t.args for t in image.tile]
                frames = 1 if image.format in ("GIF", "MPO") else getattr(image, "n_frames", 1)
                decoded = ImageOps.exif_transpose(image)
                decoded.load()
    except Exception as error:  # A decoder fed with damage raises whatever it trips over.
        raise ValueError(f"{path} cannot be decoded as an image: {shown(said(error))}.") from error
    if any(_DEEP.match(str(mode)) for mode in raw):
        raise ValueError(f"{path} has 16 bits a channel: convert it to 8 bits.")
    if frames > 1:
        raise ValueError(f"{path} has {frames} frames: save the one to use on its own.")
    return decoded


def conform(image: Image.Image, name: str, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    """The pixels of an image in the model's shape; without `resize`, exact or refused."""
    height, width, channels = shape
    alpha = image.has_transparency_data
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if alpha or (deep % 257).any():  # v·257 is how 8 bits are written in 16.
            raise ValueError(f"{name} has 16 bits a pixel: convert it to 8 bits.")
        image = Image.fromarray((deep // 257).astype(np.uint8))
    if image.mode in ("I", "F") or channels not in MODES:
        raise ValueError(
            f"{name} has mode {image.mode} and the model {channels} channels: images have 8 bits, "
            "and 1 or 3 channels; give an .npz."
        )
    if alpha and resize:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode in ("1", "P") and not alpha:
        rgb = np.asarray(image.convert("RGB"))
        grey = image.mode == "1" or (channels == 1 and np.ptp(rgb, axis=-1).max() == 0)
        image = Image.fromarray(rgb[..., 0] if grey else rgb)
    mode = MODES[channels]
    if resize and image.mode != "LAB":  # Pillow alone does not convert these to RGB.
        image = ImageOps.fit(image.convert(mode), (width, height), Image.Resampling.LANCZOS)
    elif alpha or image.mode != mode or image.size != (width, height):
        given = f"{image.height} x {image.width} {image.mode}" + " with transparency" * alpha
        raise ValueError(
            f"{name} is {given}: the model takes {height} x {width} {mode} (height x width). Give "
            "--resize to convert the channels, crop to the centre and resample."
        )
    return np.asarray(image, np.uint8).reshape(shape)
