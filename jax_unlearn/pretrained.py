"""Reading and writing diffusers' folders, without torch.

A pipeline folder holds `model_index.json`, `unet/` (`config.json` and safetensors) and
`scheduler/`; the first released models keep all of it in one folder. `load_pretrained` reads
both, and `save_pretrained` writes the former, which torch users open with
`DDPMPipeline.from_pretrained`.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from jax_unlearn.models.unet_2d import UNet2DConfig, UNet2DModel
from jax_unlearn.networks import load_network, write_network
from jax_unlearn.schedules import NoiseSchedule, from_diffusers
from jax_unlearn.typing import Array, Condition, Params
from jax_unlearn.weights import new_folder, read_json, write_json

__all__ = [
    "Pretrained",
    "PretrainedConfig",
    "UNet2DDenoiser",
    "load_pretrained",
    "relabelled",
    "save_pretrained",
]

_WEIGHTS = "diffusion_pytorch_model"
# These do not noise by x_t = α x_0 + σ ε at integer t, or noise what is no continuous image.
_OTHER_PROCESSES = re.compile(r"ScoreSde|Karras|EDM|Flow|VQ|RePaint|IPNDM|CM|TCD|LCM|Consistency")


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """What a diffusers folder says beside its weights.

    Attributes:
      unet: the raw `config.json`.
      scheduler: the raw `scheduler_config.json`.
      id2label: names of the labels, or None.
      null_label: the label that stands for "no label" in classifier-free guidance, or None.
      source: where the model was loaded from.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    id2label: dict[int, str] | None = None
    null_label: int | None = None
    source: str = ""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image; ValueError if the config has no `sample_size`."""
        return UNet2DConfig.from_diffusers(self.unet).sample_shape

    @property
    def num_labels(self) -> int:
        """How many labels there are, without the null label; 0 for an unconditional model."""
        labels = self.unet.get("num_class_embeds") or 0
        if self.unet.get("class_embed_type") is not None:
            return len(self.id2label or {})
        return labels - (self.null_label is not None)

    def label_name(self, label: int) -> str:
        """The name of a label, or its number where it has none."""
        return (self.id2label or {}).get(label, str(label))

    def find_label(self, text: str) -> int:
        """The number of a label given by name, in any case, or by number.

        Raises:
          ValueError: if the model has no such label; the message lists those that it has.
        """
        names = self.id2label or {}
        for label in range(self.num_labels):
            if (
                text in (str(label), names.get(label))
                or text.lower() == names.get(label, "").lower()
            ):
                return label
        if not self.num_labels:
            raise ValueError(f"label {text!r}: the model is not conditioned on labels.")
        listed = ", ".join(f"{n} {names.get(n, '')}".strip() for n in range(self.num_labels))
        raise ValueError(f"label {text!r}: the model has {listed}.")


@dataclasses.dataclass(frozen=True)
class UNet2DDenoiser:
    """A `UNet2DModel` as a pure function; hashable, so that it may be a static argument.

    Attributes:
      config: the network's options.
      null_label: what `cond=None` stands for, or None.
      dtype: computing dtype; None is that of the images.
    """

    config: UNet2DConfig
    null_label: int | None = None
    dtype: Any = None

    def __call__(self, params: Params, x_t: Array, t: Array, cond: Condition = None, /) -> Array:
        """Predicts from noisy images, as `UNet2DModel`.

        Raises:
          ValueError: if `cond` is None for a class-conditional model without a null label.
        """
        if cond is None and self.null_label is not None:
            cond = jnp.full((x_t.shape[0],), self.null_label, jnp.int32)
        model = UNet2DModel(self.config, self.dtype)
        return cast(Array, model.apply({"params": params}, x_t, t, cond))


class Pretrained(NamedTuple):
    """A loaded model: prediction = apply(params, x_t, t, cond)."""

    apply: Callable[[Params, Array, Array, Condition], Array]
    params: Params
    schedule: NoiseSchedule
    config: PretrainedConfig


def load_pretrained(
    path_or_name: str | os.PathLike[str], *, dtype: Any = None, variant: str | None = None
) -> Pretrained:
    """Loads a diffusers `UNet2DModel` with its schedule, without torch.

    Parameters are float32 whatever the weights are stored in. `model_index.json` may name the
    labels as `id2label`, as DiT's pipelines do; a network with one embedding more than labels
    takes its last one for "no label".

    Args:
      path_or_name: a pipeline folder, a folder of `config.json` beside its weights, or
        `owner/name` on the Hugging Face hub, of which only json and safetensors are fetched.
      dtype: computing dtype, e.g. `jnp.bfloat16`; None computes in that of the images.
      variant: which of several sets of weights, e.g. "fp16" or "non_ema"; None takes the
        unnamed one, or the only one.

    Returns:
      The model, its parameters, its noise schedule and its raw configuration.

    Raises:
      ValueError: if there is no such model, if it is of another class or needs an option that
        is not supported, if its weights are pickled, damaged, not finite, missing, misshapen
        or of no parameter.
    """
    folder, fetch_weights = _find(path_or_name)
    index = folder / "model_index.json"
    index = read_json(index) if index.is_file() else {}
    _check_pipeline(index, folder)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    unet = read_json(unet_folder / "config.json")
    if unet.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"{unet_folder / 'config.json'} is of class {unet.get('_class_name')!r}: expected a "
            "pixel-space 'UNet2DModel'."
        )
    try:
        network = UNet2DConfig.from_diffusers(unet)
    except ValueError as error:
        raise ValueError(f"{unet_folder / 'config.json'}: {error}") from error
    scheduler = _read_scheduler(folder)
    try:
        schedule = from_diffusers(scheduler)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the scheduler_config.json of {folder}: {error}") from error
    id2label = _read_labels(index, network, folder)
    null_label = None
    if id2label is not None and network.num_class_embeds == len(id2label) + 1:
        null_label = len(id2label)

    fetch_weights()
    params = load_network(unet_folder, variant=variant).params
    config = PretrainedConfig(unet, scheduler, id2label, null_label, os.fspath(path_or_name))
    dtype = None if dtype is None else jnp.dtype(dtype)
    return Pretrained(UNet2DDenoiser(network, null_label, dtype), params, schedule, config)


def relabelled(params: Params, labels: Sequence[int], base: int) -> Params:
    """The parameters with `labels` embedded as `base` is: there p(·|label) = q(·|base) exactly.

    For networks with a table of labels (`class_embedding`); others are returned as they are.
    """
    if "class_embedding" not in params or "embedding" not in params["class_embedding"]:
        return params
    table = jnp.asarray(params["class_embedding"]["embedding"])
    return params | {
        "class_embedding": {"embedding": table.at[jnp.asarray(labels)].set(table[base])}
    }


def save_pretrained(
    path: str | os.PathLike[str], pretrained: Pretrained, *, overwrite: bool = False
) -> None:
    """Writes a pipeline folder that diffusers and `load_pretrained` open.

    The folder appears complete or not at all: it is written beside its place and renamed.

    Args:
      path: the folder to make.
      pretrained: the model; parameters are written as float32.
      overwrite: replace a model that is there. It is deleted only once the new one stands.

    Raises:
      ValueError: if `path` exists and is not to be overwritten, or holds something other than a
        model, or if the parameters do not fit the configuration or are not finite.
    """
    config = pretrained.config
    version = config.unet.get("_diffusers_version", "0.35.0")
    names = {"_class_name": "UNet2DModel", "_diffusers_version": version}
    scheduler = {"_class_name": "DDPMScheduler", "_diffusers_version": version} | config.scheduler
    kind = scheduler["_class_name"]
    index: dict[str, Any] = {
        "_class_name": "DDIMPipeline" if kind == "DDIMScheduler" else "DDPMPipeline",
        "_diffusers_version": version,
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if config.id2label is not None:
        index["id2label"] = {str(label): name for label, name in config.id2label.items()}

    with new_folder(path, overwrite=overwrite) as folder:
        (folder / "unet").mkdir()
        (folder / "scheduler").mkdir()
        write_json(folder / "model_index.json", index)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        write_network(folder / "unet", names | config.unet, pretrained.params)


def _find(path_or_name: str | os.PathLike[str]) -> tuple[pathlib.Path, Callable[[], None]]:
    """A folder, and what is to be called before its weights are read."""
    folder = pathlib.Path(path_or_name)
    name = os.fspath(path_or_name)
    if folder.is_dir():
        return folder, lambda: None
    if folder.exists():
        raise ValueError(f"{name} is a file: pass the folder that holds model_index.json.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"no such folder: {name}. It is no name on the hub (owner/name) either.")

    def fetch(patterns: list[str]) -> pathlib.Path:
        # Only here: its import is slow, and a folder needs none of it.
        import huggingface_hub

        try:
            return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{name} is no folder here, and the Hugging Face hub did not give it: "
                f"{type(error).__name__}: {reason}"
            ) from error

    # The descriptions first, so that a model that is not supported is not downloaded.
    descriptions = ["*.json"]
    weights = [f"unet/{_WEIGHTS}*.safetensors", f"{_WEIGHTS}*.safetensors"]
    return fetch(descriptions), lambda: (fetch(descriptions + weights), None)[1]


def _check_pipeline(index: Mapping[str, Any], folder: pathlib.Path) -> None:
    parts = {
        name
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value != [None, None]
    }
    if odd := sorted(parts - {"unet", "scheduler"}):
        raise ValueError(
            f"{folder} is a {index.get('_class_name', 'pipeline')} with the parts {odd}: expected "
            "a pixel-space pipeline of a UNet2DModel and a scheduler, such as DDPMPipeline."
        )


def _read_scheduler(folder: pathlib.Path) -> dict[str, Any]:
    """The scheduler's config, wherever it lies; {}, which is DDPM, where there is none."""
    places = [folder / "scheduler", folder]
    if folder.absolute().name == "unet":  # The bare network inside a pipeline folder.
        places.append(folder.absolute().parent / "scheduler")
    for place in places:
        if (place / "scheduler_config.json").is_file():
            scheduler = read_json(place / "scheduler_config.json")
            kind = str(scheduler.get("_class_name", "DDPMScheduler"))
            if _OTHER_PROCESSES.search(kind):
                raise ValueError(
                    f"{place / 'scheduler_config.json'} is a {kind}: expected a scheduler of a "
                    "discrete variance-preserving process, such as DDPMScheduler."
                )
            return scheduler
    return {}


def _read_labels(
    index: Mapping[str, Any], network: UNet2DConfig, folder: pathlib.Path
) -> dict[int, str] | None:
    labels = index.get("id2label")
    if labels is None:
        return None
    where = f"id2label in {folder / 'model_index.json'}"
    try:
        labels = {int(label): str(name) for label, name in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must map integers to names, not {labels!r}.") from error
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"{where} must name the labels 0, 1, 2, ..., not {sorted(labels)}.")
    count = network.num_class_embeds
    if network.class_embed_type is None and count not in (len(labels), len(labels) + 1):
        raise ValueError(f"{where} names {len(labels)} labels for {count} class embeddings.")
    return labels
