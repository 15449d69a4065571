"""Reading diffusers' folders, without torch.

A pipeline folder holds `model_index.json`, `unet/` (`config.json` and safetensors) and
`scheduler/`, and for text to image also what encodes prompts and images; the first released models
keep all of it in one folder. A network alone is a folder of its `config.json` and safetensors.
`load_pretrained` reads the denoiser of each; `saving` writes it again.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from jax_unlearn.models import unet_2d, unet_2d_condition
from jax_unlearn.models.files import read_json, shown
from jax_unlearn.models.unet_2d import UNet2DConfig, UNet2DModel
from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionDenoiser
from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import (
    FoundModel,
    check_folder,
    find_model,
    is_plain_name,
)
from jax_unlearn.pretrained.networks import read_weights
from jax_unlearn.schedules import NoiseSchedule, from_diffusers
from jax_unlearn.sharding import keep_rows
from jax_unlearn.typing import Array, Condition, Params

__all__ = [
    "Pretrained",
    "PretrainedConfig",
    "TEXT_TO_IMAGE",
    "UNet2DDenoiser",
    "describe_denoiser",
    "load_denoiser",
    "load_pretrained",
    "pipeline_parts",
    "relabelled",
    "unet_folder",
]

TEXT_TO_IMAGE = {
    "StableDiffusionPipeline": ("text_encoder", "tokenizer", "unet", "vae"),
    "StableDiffusionXLPipeline": (
        "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae",
    ),
}  # fmt: skip
"""The pipelines from text to image, and the parts that they must have."""

_TEXT_NETWORK = "UNet2DConditionModel"
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
      name: what reports call it; "" is its source.
      pipeline: the raw `model_index.json` of a pipeline from text to image; {} for others, and
        for a `UNet2DConditionModel` alone.
      revision: of the hub's repository, as it was asked for; "" is its main branch.
      commit: of the hub's repository, to which the revision led; "" for a folder that was here.
      folder: where it was read from on this disk; "" for a model that was not read.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    id2label: dict[int, str] | None = None
    null_label: int | None = None
    source: str = ""
    pipeline: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    revision: str = ""
    commit: str = ""
    folder: str = ""

    @property
    def text_conditional(self) -> bool:
        """Whether the denoiser takes encoded prompts as its condition, not labels or nothing."""
        return self.unet.get("_class_name") == _TEXT_NETWORK

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what is denoised: an image, or latents.

        Raises:
          ValueError: if the config has no `sample_size`.
        """
        network = UNet2DConditionConfig if self.text_conditional else UNet2DConfig
        return network.from_diffusers(self.unet).sample_shape

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
      remat: as that of `UNet2DModel`.
    """

    config: UNet2DConfig
    null_label: int | None = None
    dtype: Any = None
    remat: bool = False

    def __call__(self, params: Params, x_t: Array, t: Array, cond: Condition = None, /) -> Array:
        """Predicts from noisy images, as `UNet2DModel`.

        Raises:
          ValueError: if `cond` is None for a class-conditional model without a null label.
        """
        if cond is None and self.null_label is not None:
            cond = jnp.full((x_t.shape[0],), self.null_label, jnp.int32)
        model = UNet2DModel(self.config, self.dtype, self.remat)
        rows = keep_rows((x_t, t, cond))
        return cast(Array, keep_rows(model.apply({"params": params}, *rows)))


class Pretrained(NamedTuple):
    """A loaded model: prediction = apply(params, x_t, t, cond)."""

    apply: Callable[[Params, Array, Array, Condition], Array]
    params: Params
    schedule: NoiseSchedule
    config: PretrainedConfig


def load_pretrained(
    path_or_name: str | os.PathLike[str],
    *,
    scheduler: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: Any = None,
    variant: str | None = None,
    remat: bool = False,
    revision: str | None = None,
) -> Pretrained:
    """Loads the denoiser of a diffusers pipeline, or one alone, with its schedule, without torch.

    A `UNet2DModel` denoises pixels, and `cond` are labels [batch] or None. A
    `UNet2DConditionModel`, that of `StableDiffusionPipeline` and `StableDiffusionXLPipeline`,
    denoises latents. Its `cond` are encoded prompts: hidden states [batch, tokens, dim], or for
    SDXL the dict that `UNet2DConditionModel` documents. `text_to_image.load_text_to_image` loads
    a pipeline with what makes these.

    Parameters are float32 whatever the weights are stored in. `model_index.json` may name the
    labels as `id2label`, as DiT's pipelines do; a network with one embedding more than labels
    takes its last one for "no label".

    A network alone is a folder of `config.json` beside its weights. Its `scheduler_config.json` is
    looked for beside them, in `scheduler/`, and, if the folder is named `unet`, in the
    `scheduler/` next to it. Without one a `UNet2DModel` is taken for a DDPM with diffusers'
    defaults. A `UNet2DConditionModel` has no such default: its scheduler must be given.

    Args:
      path_or_name: a pipeline folder, a network alone, or `owner/name` of either on the Hugging
        Face hub, of which only json and safetensors are fetched.
      scheduler: in place of the one that is found: the content of a `scheduler_config.json`, its
        path, that of its folder, or a pipeline's folder or name on the hub.
      dtype: computing dtype, e.g. `jnp.bfloat16`; None computes in that of the images.
      variant: which of several sets of weights, e.g. "fp16" or "non_ema"; None takes the
        unnamed one, or the only one.
      remat: compute each block again in backward passes: a third more time, and a fraction of the
        memory.
      revision: branch, tag or commit of a model on the hub; None is its main branch.

    Returns:
      The model, its parameters, its noise schedule and its raw configuration.

    Raises:
      ValueError: if there is no such model, if it is of another class, lacks a part or needs an
        option that is not supported, if its weights are pickled, damaged, not finite, missing,
        misshapen, of no parameter or too many for this machine, if a `UNet2DConditionModel` alone
        has no scheduler, if the folder has links out of itself, or if files are not those that
        its `model.sha256` lists.

    Example:
      A UNet alone, inside the folder of its pipeline:

      >>> from jax_unlearn.app import embedded
      >>> model = load_pretrained(embedded.text_model_path() / "unet")
      >>> model.config.sample_shape, model.config.text_conditional
      ((8, 8, 4), True)
      >>> given = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
      >>> load_pretrained(embedded.model_path(), scheduler=given).schedule.num_steps
      50
    """
    found = find_model(path_or_name, revision)
    return load_denoiser(
        found,
        os.fspath(path_or_name),
        scheduler=scheduler,
        dtype=dtype,
        variant=variant,
        remat=remat,
        revision=revision,
    )


def load_denoiser(
    model: FoundModel,
    source: str,
    *,
    scheduler: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: Any = None,
    variant: str | None = None,
    remat: bool = False,
    revision: str | None = None,
) -> Pretrained:
    """As `load_pretrained`, of a model that was found under the name `source`."""
    read_parts = ("unet", "scheduler")
    check_digests(model.folder, read_parts)
    described = describe_denoiser(
        model, source, scheduler=scheduler, dtype=dtype, remat=remat, revision=revision
    )
    only = f".{variant}" if variant else ""
    stem = f"diffusion_pytorch_model*{only}*.safetensors"
    model.fetch([f"unet/{stem}", stem])
    check_digests(model.folder, read_parts)
    folder = unet_folder(model.folder)
    params = read_weights(folder, described.params, described.config.unet, variant=variant)
    return described._replace(params=params)


def describe_denoiser(
    model: FoundModel,
    source: str,
    *,
    scheduler: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: Any = None,
    remat: bool = False,
    revision: str | None = None,
) -> Pretrained:
    """As `load_denoiser`, of the json files alone: parameters are `jax.ShapeDtypeStruct`."""
    folder, _, commit = model
    index = folder / "model_index.json"
    index = read_json(index) if index.is_file() else {}
    _check_pipeline(index, folder)
    network_folder = unet_folder(folder)
    unet = read_json(network_folder / "config.json")
    try:
        network = _read_network(unet, index)
    except ValueError as error:
        raise ValueError(f"{network_folder / 'config.json'}: {error}") from error
    found, where = _find_scheduler(folder) if scheduler is None else _given_scheduler(scheduler)
    of_text = isinstance(network, UNet2DConditionConfig)
    if found is None and of_text:
        raise ValueError(
            f"{source} is a {_TEXT_NETWORK} without a scheduler_config.json, so "
            "that its noise is unknown: pass scheduler=, the path of its pipeline or of its "
            "scheduler_config.json, or what that holds."
        )
    read = {} if found is None else found
    try:
        schedule = _read_schedule(read)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    dtype = None if dtype is None else jnp.dtype(dtype)
    id2label, null_label = None, None
    if isinstance(network, UNet2DConditionConfig):
        shapes = unet_2d_condition.param_shapes(network)
        apply = UNet2DConditionDenoiser(network, dtype, remat)
    else:
        id2label = _read_labels(index, network, folder)
        if id2label is not None and network.num_class_embeds == len(id2label) + 1:
            null_label = len(id2label)
        shapes = unet_2d.param_shapes(network)
        apply = UNet2DDenoiser(network, null_label, dtype, remat)
    config = PretrainedConfig(
        unet,
        read,
        id2label,
        null_label,
        source,
        pipeline=index if of_text else {},
        revision=revision or "",
        commit=commit,
        folder=os.fspath(folder),
    )
    return Pretrained(apply, shapes, schedule, config)


def unet_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where the denoiser of a model's folder lies: in `unet/`, or in the folder itself."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


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


def pipeline_parts(index: Mapping[str, Any]) -> set[str]:
    """The parts that a `model_index.json` names, each in the folder of its name.

    Raises:
      ValueError: for a name that is the path of another folder.
    """
    parts = {
        name
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value != [None, None]
    }
    if odd := sorted(name for name in parts if not is_plain_name(name)):
        raise ValueError(
            f"model_index.json names a part {shown(repr(odd[0]))}: expected the name of a folder "
            "beside it."
        )
    return parts


def _check_pipeline(index: Mapping[str, Any], folder: pathlib.Path) -> None:
    try:
        parts, kind = pipeline_parts(index), index.get("_class_name")
    except ValueError as error:
        raise ValueError(f"{folder / 'model_index.json'}: {error}") from error
    kind = shown(kind) if isinstance(kind, str) else None
    if kind not in TEXT_TO_IMAGE:
        if odd := sorted(parts - {"unet", "scheduler"}):
            raise ValueError(
                f"{folder} is a {kind or 'pipeline'} with the parts {shown(odd)}: expected one of "
                f"{', '.join(TEXT_TO_IMAGE)}, or a pixel-space pipeline of a UNet2DModel and a "
                "scheduler, such as DDPMPipeline."
            )
        return
    if missing := sorted({*TEXT_TO_IMAGE[kind], "scheduler"} - parts):
        raise ValueError(f"{folder} is a {kind} whose model_index.json does not name {missing}.")
    if missing := sorted(part for part in parts if not (folder / part).is_dir()):
        raise ValueError(f"{folder} is a {kind} without the folders {missing}.")


def _read_network(
    unet: Mapping[str, Any], index: Mapping[str, Any]
) -> UNet2DConfig | UNet2DConditionConfig:
    """The options in a `config.json`, of the class that the pipeline has, if it is in one."""
    expected = ["UNet2DModel", _TEXT_NETWORK]
    if index:
        expected = expected[1:] if index.get("_class_name") in TEXT_TO_IMAGE else expected[:1]
    kind = unet.get("_class_name")
    if kind not in expected:
        raise ValueError(
            f"is of class {shown(repr(kind))}: expected {' or '.join(map(repr, expected))}."
        )
    if kind != _TEXT_NETWORK:
        return UNet2DConfig.from_diffusers(unet)
    network = UNet2DConditionConfig.from_diffusers(unet)
    if network.in_channels != network.out_channels:
        raise ValueError(
            f"in_channels {network.in_channels} and out_channels {network.out_channels} "
            "differ: networks that also take an image, as for inpainting, are not supported."
        )
    return network


def _find_scheduler(folder: pathlib.Path) -> tuple[dict[str, Any] | None, str]:
    """The scheduler's config, wherever it lies, or None; and where that is."""
    for place in (folder / "scheduler", folder):
        path = place / "scheduler_config.json"
        if path.is_file():
            return read_json(path), os.fspath(path)
    above = folder.absolute().parent
    path = above / "scheduler" / "scheduler_config.json"
    if folder.absolute().name == "unet" and path.is_file():
        # The bare network inside a pipeline's folder, of which no more was looked at.
        check_folder(above, ["scheduler"])
        check_digests(above, ["scheduler"])
        return read_json(path), os.fspath(path)
    return None, f"the scheduler_config.json of {folder}"


def _given_scheduler(
    scheduler: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """The config that the argument `scheduler` holds or leads to, and where that is."""
    if isinstance(scheduler, Mapping):
        return dict(scheduler), "scheduler"
    if not isinstance(scheduler, str | os.PathLike):
        raise ValueError(f"scheduler must be a path or a mapping, not {type(scheduler)}.")
    path = pathlib.Path(scheduler)
    if path.is_file():
        return read_json(path), os.fspath(path)
    folder = find_model(scheduler).folder
    check_digests(folder, ["scheduler"])
    found, where = _find_scheduler(folder)
    if found is None:
        raise ValueError(f"scheduler {os.fspath(scheduler)} has no scheduler_config.json.")
    return found, where


def _read_schedule(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    kind = str(scheduler.get("_class_name", "DDPMScheduler"))
    if _OTHER_PROCESSES.search(kind):
        raise ValueError(
            f"is of class {shown(repr(kind))}: expected a scheduler of a discrete "
            "variance-preserving process, such as 'DDPMScheduler'."
        )
    return from_diffusers(scheduler)


def _read_labels(
    index: Mapping[str, Any], network: UNet2DConfig, folder: pathlib.Path
) -> dict[int, str] | None:
    labels = index.get("id2label")
    if labels is None:
        return None
    where = f"id2label in {folder / 'model_index.json'}"
    try:
        labels = {int(label): str(name) for label, name in labels.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} must map integers to names, not {shown(labels)}.") from error
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"{where} must name the labels 0, 1, 2, ..., not {shown(sorted(labels))}.")
    count = network.num_class_embeds
    if network.class_embed_type is None and count not in (len(labels), len(labels) + 1):
        raise ValueError(f"{where} names {len(labels)} labels for {count} class embeddings.")
    return labels
