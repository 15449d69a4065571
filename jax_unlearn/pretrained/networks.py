"""One network's folder: its `config.json` and safetensors, read and written without torch."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jax_unlearn.models import autoencoder_kl, clip_text, clip_vision, unet_2d, unet_2d_condition
from jax_unlearn.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jax_unlearn.models.clip_text import CLIPTextConfig, CLIPTextModel
from jax_unlearn.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from jax_unlearn.models.config import listed_class
from jax_unlearn.models.files import read_json, shown
from jax_unlearn.models.unet_2d import UNet2DConfig, UNet2DModel
from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import check_folder
from jax_unlearn.pretrained.weights import (
    new_folder,
    read_params,
    weight_files,
    write_json,
    write_params,
)
from jax_unlearn.typing import Params

__all__ = [
    "Kind",
    "Network",
    "kind_of",
    "load_network",
    "read_network",
    "read_weights",
    "save_network",
    "write_network",
]


class Network(NamedTuple):
    """A network: output = module.apply({"params": params}, ...).

    Attributes:
      module: a linen module; hashable, with its options as `module.config`.
      params: its parameters, float32.
      config: the raw `config.json`.
    """

    module: nn.Module
    params: Params
    config: dict[str, Any]


class Kind(NamedTuple):
    """How to make a network of one class from its folder.

    Attributes:
      torch_class: package and name of the class in torch.
      module: the linen module, of a config.
      read_config: from the json to the config.
      param_shapes: of a config.
      stem: of the names of weight files.
    """

    torch_class: str
    module: Callable[..., nn.Module]
    read_config: Callable[[Mapping[str, Any]], Any]
    param_shapes: Callable[[Any], Params]
    stem: str = "diffusion_pytorch_model"


_KINDS = {
    kind.torch_class.partition(".")[2]: kind
    for kind in (
        Kind(
            "diffusers.UNet2DModel", UNet2DModel, UNet2DConfig.from_diffusers, unet_2d.param_shapes
        ),
        Kind(
            "diffusers.UNet2DConditionModel",
            UNet2DConditionModel,
            UNet2DConditionConfig.from_diffusers,
            unet_2d_condition.param_shapes,
        ),
        Kind(
            "diffusers.AutoencoderKL",
            AutoencoderKL,
            AutoencoderKLConfig.from_diffusers,
            autoencoder_kl.param_shapes,
        ),
        *(
            Kind(
                f"transformers.{config.network}{suffix}",
                module,
                config.from_transformers,
                param_shapes,
                stem="model",
            )
            for module, config, param_shapes in (
                (CLIPTextModel, CLIPTextConfig, clip_text.param_shapes),
                (CLIPVisionModel, CLIPVisionConfig, clip_vision.param_shapes),
            )
            for suffix in ("", "WithProjection")
        ),
    )
}


def load_network(
    folder: str | os.PathLike[str], *, dtype: Any = None, variant: str | None = None
) -> Network:
    """Loads a network from the folder of its `config.json`.

    Classes: `UNet2DModel`, `UNet2DConditionModel`, `AutoencoderKL`, `CLIPTextModel`,
    `CLIPVisionModel`, and the last two with their projection, `...WithProjection`.

    Args:
      folder: of `config.json` beside safetensors: a file, or shards with their index.
      dtype: computing dtype, e.g. `jnp.bfloat16`; None computes in that of the inputs.
      variant: which of several sets of weights, e.g. "fp16"; None takes the unnamed one, or the
        only one.

    Returns:
      The network, its parameters in float32 whatever they are stored in.

    Raises:
      ValueError: if there is no such network, if it is of another class or needs an option that
        is not supported, if its weights are pickled, damaged, not finite, missing, misshapen,
        of no parameter or too many for this machine, or as `check_folder` and `check_digests`.
    """
    folder = pathlib.Path(folder)
    check_folder(folder)
    check_digests(folder)
    return read_network(folder, dtype=dtype, variant=variant)


def read_network(folder: pathlib.Path, *, dtype: Any = None, variant: str | None = None) -> Network:
    """As `load_network`, from a folder that was checked."""
    raw = read_json(folder / "config.json")
    try:
        kind = kind_of(raw)
        config = kind.read_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    module = kind.module(config, dtype=None if dtype is None else jnp.dtype(dtype))
    shapes = kind.param_shapes(config)
    return Network(module, read_weights(folder, shapes, raw, variant=variant), raw)


def read_weights(
    folder: pathlib.Path,
    shapes: Params,
    config: Mapping[str, Any],
    *,
    variant: str | None = None,
) -> Params:
    """The parameters, of these shapes, of the network in a folder with this `config.json`."""
    kind = kind_of(config)
    return read_params(
        shapes, weight_files(folder, kind.stem, variant, torch_class=kind.torch_class)
    )


def save_network(
    folder: str | os.PathLike[str], network: Network, *, overwrite: bool = False
) -> None:
    """Writes a folder that torch's `from_pretrained` and `load_network` open.

    Args:
      folder: to make; it appears complete or not at all.
      network: `config` and `params` are written, the latter as float32.
      overwrite: replace a network that is there. It is deleted only once the new one stands.

    Raises:
      ValueError: if `folder` exists and is not to be overwritten, or holds no network, or if the
        parameters do not fit the configuration or are not finite.
    """
    with new_folder(folder, overwrite=overwrite) as new:
        write_network(new, network.config, network.params)


def write_network(folder: pathlib.Path, config: Mapping[str, Any], params: Params) -> None:
    """Writes config and parameters into a folder that is there; errors as `save_network`."""
    kind = kind_of(config)
    shapes = kind.param_shapes(kind.read_config(config))
    # transformers would otherwise round what it reads to the type that was stored before.
    stored = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    write_json(folder / "config.json", {**config, **stored})
    write_params(folder / f"{kind.stem}.safetensors", shapes, params)


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The network's class: diffusers and transformers name it by different keys."""
    name = config.get("_class_name", listed_class(config))
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"is of class {shown(repr(name))}: expected one of {sorted(_KINDS)}.")
    return _KINDS[name]
