"""What maxdiffusion's items are called, and what stands in them."""

import pathlib
import re
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jax_unlearn.models.files import shown
from jax_unlearn.pretrained.hub import SUFFIXES
from jax_unlearn.pretrained.weights import listed
from jax_unlearn.typing import Params

__all__ = [
    "CLASSES",
    "TAKEN",
    "check_stored",
    "copy_files",
    "flax_config",
    "stored",
    "tokenizers",
    "torch_config",
]

CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""The networks of a checkpoint, and their classes in torch."""

TAKEN = (
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types",
    "only_cross_attention", "block_out_channels", "layers_per_block", "attention_head_dim",
    "cross_attention_dim", "dropout", "use_linear_projection", "flip_sin_to_cos", "freq_shift",
    "transformer_layers_per_block", "addition_embed_type", "addition_time_embed_dim",
    "addition_embed_type_num_heads", "projection_class_embeddings_input_dim", "norm_num_groups",
    "upcast_attention", "resnet_skip_time_act", "resnet_out_scale_factor",
    "mid_block_only_cross_attention",
)  # fmt: skip
"""The options that maxdiffusion's UNet has, and those that change no output here."""

# Of how maxdiffusion computes, not of what.
_OWN = (
    "attention_kernel", "dtype", "flash_block_sizes", "flash_min_seq_length", "from_pt", "mesh",
    "precision", "quant", "split_head_dim", "torch_dtype", "use_memory_efficient_attention",
    "weights_dtype",
)  # fmt: skip
_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
_LAYER = re.compile(r"layers_(\d+)")


def torch_config(part: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as diffusers and transformers write it.

    Raises:
      ValueError: for that of another class.

    Example:
      >>> torch_config("scheduler", {"_class_name": "FlaxDDPMScheduler", "dtype": "float32"})
      {'_class_name': 'DDPMScheduler', '_diffusers_version': '0.35.0'}
    """
    config = {name: value for name, value in raw.items() if name not in _OWN}
    if part.startswith("text_encoder"):
        return {"model_type": "clip_text_model"} | config | {"architectures": [CLASSES[part]]}
    name = str(config.get("_class_name"))
    kind = name.removeprefix("Flax")
    if kind != CLASSES.get(part, kind):
        raise ValueError(f"is of class {shown(repr(name))}: expected 'Flax{CLASSES[part]}'.")
    # maxdiffusion writes its own version there, which diffusers would take for an old one of its.
    return config | {"_class_name": kind, "_diffusers_version": "0.35.0"}


def flax_config(part: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `torch_config`, but for how maxdiffusion computes."""
    if part.startswith("text_encoder"):
        return dict(raw)
    return {**raw, "_class_name": f"Flax{raw['_class_name']}"}


def stored(part: str, params: Params) -> dict[tuple[str, ...], Any]:
    """Leaves by where maxdiffusion has them, in the order of the tree.

    Example:
      >>> stored("vae", {"mid_block": {"attentions_0": {"to_q": {"bias": 1.0}}}})
      {('mid_block', 'attentions_0', 'query', 'bias'): 1.0}
      >>> stored("text_encoder", {"encoder": {"layers_3": {"mlp": 2.0}}})
      {('encoder', 'layers', '3', 'mlp'): 2.0}
    """
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(key.key for key in keys)
        if part == "vae":
            path = tuple(_ATTENTION.get(name, name) for name in path)
        elif part != "unet":
            path = tuple("/".join(_LAYER.sub(r"layers/\1", name) for name in path).split("/"))
        found[path] = leaf
    return found


def check_stored(wanted: Mapping[Any, Any], found: Mapping[Any, Any]) -> None:
    """Refuses parameters of other names, shapes or kinds than a network has.

    Args:
      wanted: arrays, or their shapes, by their names.
      found: (shape, dtype) by their names.

    Raises:
      ValueError: with the first few of each kind.
    """
    name = {key: "/".join(map(str, key)) for key in (*wanted, *found)}
    both = [key for key in wanted if key in found]
    problems = {
        "missing": [name[key] for key in wanted if key not in found],
        "of no parameter": [shown(name[key]) for key in found if key not in wanted],
        "misshapen": [
            f"{name[key]} {shown(repr(list(found[key][0])))} instead of {list(wanted[key].shape)}"
            for key in both
            if found[key][0] != wanted[key].shape
        ],
        "not of floats": [
            name[key] for key in both if not jax.numpy.issubdtype(found[key][1], np.floating)
        ],
    }
    if any(problems.values()):
        raise ValueError(f"its params do not fit its configuration: {listed(problems)}.")


def tokenizers(parts: Collection[str]) -> list[str]:
    """The tokenizers' folders beside these parts."""
    return ["tokenizer", *(["tokenizer_2"] if "text_encoder_2" in parts else [])]


def copy_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what a tokenizer is read from."""
    for path in source.iterdir():
        if path.suffix in SUFFIXES and path.is_file():
            shutil.copyfile(path, target / path.name)
