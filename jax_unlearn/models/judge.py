"""A small convolutional classifier whose opinion of generated images is measured.

It plays the part that an Inception network plays for photographs: its logits say which class
a sample shows, its penultimate layer is a feature space for the distances of
`jax_unlearn.metrics`. On disk a judge is a safetensors file and, beside it, a json file of the
same stem with the module's options.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file, save

from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = ["Judge", "JudgeFunctions", "JudgeOutput", "load_judge", "save_judge"]

_FORMAT = "jax_unlearn.judge/1"


class JudgeOutput(NamedTuple):
    """What the judge says of a batch.

    Attributes:
      logits: unnormalised log-probabilities of the labels, [n, num_labels].
      features: the penultimate layer after its activation, [n, num_features].
    """

    logits: Array
    features: Array


class Judge(nn.Module):
    """A 5×5 convolution of stride 2, 3×3 convolutions with 2×2 maxima, and two dense layers.

    The dense layers see every position, so the parameters belong to one size of images:
    initialise with images of the size wanted, at least 2^len(widths) a side.

    Attributes:
      num_labels: number of classes.
      widths: channels of the convolutions, the strided one first.
      num_features: width of the penultimate layer.
    """

    num_labels: int = 10
    widths: Sequence[int] = (32, 48, 64)
    num_features: int = 64

    @nn.compact
    def __call__(self, images: Array) -> JudgeOutput:
        """Judges images [n, height, width, channels] in [-1, 1].

        Raises:
          ValueError: if the images are not of rank four, or too small for the convolutions.
        """
        side = 2 ** len(self.widths)
        if images.ndim != 4 or min(images.shape[1:3]) < side:
            raise ValueError(
                f"the judge takes images [n, height, width, channels] of at least {side} pixels "
                f"a side, not {images.shape}."
            )
        stem, *widths = self.widths
        conv = nn.Conv(stem, (5, 5), strides=2, padding=((2, 2), (2, 2)), name="conv_0")
        hidden = nn.relu(conv(images))
        for number, width in enumerate(widths, start=1):
            conv = nn.Conv(width, (3, 3), padding=((1, 1), (1, 1)), name=f"conv_{number}")
            hidden = _maximum_2x2(nn.relu(conv(hidden)))
        hidden = hidden.reshape(len(hidden), -1)
        features = nn.relu(nn.Dense(self.num_features, name="features")(hidden))
        return JudgeOutput(nn.Dense(self.num_labels, name="logits")(features), features)


class JudgeFunctions(NamedTuple):
    """A loaded judge as two pure functions of images [n, height, width, channels] in [-1, 1].

    Attributes:
      logits: images -> [n, num_labels].
      features: images -> [n, num_features].
    """

    logits: Callable[[ArrayLike], Array]
    features: Callable[[ArrayLike], Array]


def save_judge(
    path: str | os.PathLike[str],
    module: Judge,
    params: Params,
    *,
    image_shape: Sequence[int],
    dtype: Any = np.float32,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes the parameters to `path`, a safetensors file, and the options to the json beside it.

    Args:
      path: where to, ending in ".safetensors".
      module: the judge.
      params: its parameters, as `module.init(...)["params"]`.
      image_shape: (height, width, channels) of the images that it judges.
      dtype: type on disk, float32 or bfloat16.
      about: kept in the json file: what it was trained on, its accuracy, ...

    Raises:
      ValueError: if the path does not end in ".safetensors", or for another dtype.
    """
    path = _checked(path)
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"a judge is stored as float32 or bfloat16, not {dtype}.")
    tensors = {
        name: np.ascontiguousarray(np.asarray(value).astype(jnp.dtype(dtype)))
        for name, value in traverse_util.flatten_dict(params, sep=".").items()
    }
    options = {
        "format": _FORMAT,
        "image_shape": list(image_shape),
        "num_labels": module.num_labels,
        "widths": list(module.widths),
        "num_features": module.num_features,
        "about": dict(about or {}),
    }
    # save_file would leave a file that only its owner can read.
    path.write_bytes(save(tensors))
    path.with_suffix(".json").write_text(json.dumps(options, indent=2) + "\n")


def load_judge(path: str | os.PathLike[str]) -> JudgeFunctions:
    """Loads a judge from a safetensors file and the json file beside it.

    The functions are jitted and compute in float32 whatever the type on disk. A call holds the
    activations of its whole batch in memory: give thousands of images at a time, not millions.

    Returns:
      (logits, features), two functions of images.

    Raises:
      ValueError: if the path is no safetensors file, the json file is not a judge's, or the
        tensors are not those of the module that it describes.
      FileNotFoundError: if a file is missing.
    """
    path = _checked(path)
    options = json.loads(path.with_suffix(".json").read_text())
    if options.get("format") != _FORMAT:
        raise ValueError(
            f"{path.with_suffix('.json')} has format {options.get('format')!r}, not {_FORMAT!r}: "
            "write judges with save_judge."
        )
    shape = tuple(options["image_shape"])
    module = Judge(
        num_labels=options["num_labels"],
        widths=tuple(options["widths"]),
        num_features=options["num_features"],
    )
    stored = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    expected = jax.tree.map(jnp.shape, traverse_util.flatten_dict(variables["params"], sep="."))
    found = {name: value.shape for name, value in stored.items()}
    if found != expected:
        raise ValueError(f"{path} holds {found}, but its json file describes {expected}.")
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(stored, sep="."))

    @jax.jit
    def apply(params: Params, images: Array) -> JudgeOutput:
        output: Any = module.apply({"params": params}, images)
        return output

    def judge(images: ArrayLike) -> JudgeOutput:
        images = jnp.asarray(images, jnp.float32)
        if images.shape[1:] != shape:
            raise ValueError(
                f"this judge takes images [n, {', '.join(map(str, shape))}], not {images.shape}."
            )
        return apply(params, images)

    return JudgeFunctions(
        logits=lambda images: judge(images).logits, features=lambda images: judge(images).features
    )


def _maximum_2x2(images: Array) -> Array:
    """The maximum of each 2×2 block [n, height // 2, width // 2, channels].

    The gradient of `nn.max_pool` is several times slower on a CPU than that of a reduction.
    """
    n, height, width, channels = images.shape
    height, width = height // 2, width // 2
    blocks = images[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels)
    return blocks.max(axis=(2, 4))


def _checked(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a judge is a .safetensors file with a .json file beside it, not {path}.")
    return path
