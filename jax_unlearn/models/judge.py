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
from safetensors.numpy import save

from jax_unlearn.models.config import is_count
from jax_unlearn.models.files import read_json, shown
from jax_unlearn.models.memory import check_parameters
from jax_unlearn.models.tensors import read_header, read_tensor
from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = ["Judge", "JudgeFunctions", "JudgeOutput", "load_judge", "save_judge"]

_FORMAT = "jax_unlearn.judge/1"
# The largest numbers of a judge that is read; a side of an image, a width, labels, features.
_MOST = 2**16
_MOST_LAYERS = 16


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

    The path may also be that of a folder, of judge.safetensors and judge.json.

    The functions are jitted and compute in float32 whatever the type on disk. A call holds the
    activations of its whole batch in memory: give thousands of images at a time, not millions.

    Returns:
      (logits, features), two functions of images.

    Raises:
      ValueError: if a file is missing, cannot be read or is damaged, if the json file is not a
        judge's, or if the tensors are not those of the module that it describes.
    """
    path = pathlib.Path(path)
    path = _checked(path / "judge.safetensors" if path.is_dir() else path)
    module, shape = _read_options(path.with_suffix(".json"))
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    check_parameters(variables, os.fspath(path.with_suffix(".json")))
    stored = read_header(path)
    expected = jax.tree.map(jnp.shape, traverse_util.flatten_dict(variables["params"], sep="."))
    if differing := [
        f"{shown(name)} {stored[name].shape if name in stored else None} instead of "
        f"{expected.get(name)}"
        for name in sorted({*stored, *expected})
        if name not in stored or stored[name].shape != expected.get(name)
    ]:
        raise ValueError(
            f"{path} does not hold what its json file describes: {len(differing)} tensors differ, "
            f"the first is {differing[0]}."
        )
    values = {name: jax.device_put(read_tensor(name, one)) for name, one in stored.items()}
    params = traverse_util.unflatten_dict(values, sep=".")

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


def _read_options(path: pathlib.Path) -> tuple[Judge, tuple[int, int, int]]:
    """The module, and the shape of its images; ValueError for what is no judge's json file."""
    options = read_json(path)
    if options.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {shown(repr(options.get('format')))}, not {_FORMAT!r}: write "
            "judges with save_judge."
        )

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(is_count(item) and item <= _MOST for item in value)

    checks: dict[str, Callable[[Any], bool]] = {
        "image_shape": lambda value: counts(value) and len(value) == 3,
        "num_labels": lambda value: counts([value]),
        "widths": lambda value: counts(value) and 1 <= len(value) <= _MOST_LAYERS,
        "num_features": lambda value: counts([value]),
    }
    for name, check in checks.items():
        if not check(options.get(name)):
            raise ValueError(f"{path} has a malformed {name}: {shown(repr(options.get(name)))}.")
    height, width, channels = options["image_shape"]
    module = Judge(options["num_labels"], tuple(options["widths"]), options["num_features"])
    if min(height, width) < 2 ** len(module.widths):
        raise ValueError(
            f"{path} has images {height}×{width} too small for {len(module.widths)} convolutions."
        )
    return module, (height, width, channels)


def _checked(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a judge is a .safetensors file with a .json file beside it, not {path}.")
    return path
