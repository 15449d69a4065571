"""Writing what was loaded, a pipeline or its denoiser alone, for `from_pretrained` of diffusers."""

import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import SUFFIXES, find_model, is_hub_name
from jax_unlearn.pretrained.networks import write_network
from jax_unlearn.pretrained.unet import Pretrained, PretrainedConfig, pipeline_parts
from jax_unlearn.pretrained.weights import new_folder, write_json

__all__ = ["fetch_parts", "save_pretrained", "save_unet"]


def save_pretrained(
    path: str | os.PathLike[str],
    pretrained: Pretrained,
    *,
    overwrite: bool = False,
    hard_links: bool = False,
) -> None:
    """Writes a folder that diffusers and `load_pretrained` open.

    It is a pipeline folder. Only a `UNet2DConditionModel` that was loaded alone is written alone,
    with its `scheduler/`: there is nothing else to make a pipeline of.

    The folder appears complete or not at all: it is written beside its place and renamed. The
    parts of a pipeline from text to image that are not trained come from `config.source`; of
    their weights those without a variant's name, or else the only ones under that name.

    Args:
      path: the folder to make.
      pretrained: the model; parameters are written as float32.
      overwrite: replace a model that is there. It is deleted only once the new one stands.
      hard_links: link the files of parts that are not trained instead of copying them. Nothing
        is then stored twice, and who edits one of them in place edits both.

    Raises:
      ValueError: if `path` exists and is not to be overwritten, or holds something other than a
        model, if the parameters do not fit the configuration or are not finite, or if the
        source is gone or cannot be linked.
    """
    config = pretrained.config
    alone = config.text_conditional and not config.pipeline
    names = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": config.unet.get("_diffusers_version", "0.35.0"),
    }
    scheduler = names | {"_class_name": "DDPMScheduler"} | config.scheduler
    kind = scheduler["_class_name"]
    index: dict[str, Any] = config.pipeline or names | {
        "_class_name": "DDIMPipeline" if kind == "DDIMScheduler" else "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
    }
    index = index | {"scheduler": ["diffusers", kind]}
    if config.id2label is not None:
        index["id2label"] = {str(label): name for label, name in config.id2label.items()}

    with new_folder(path, overwrite=overwrite) as folder:
        network = folder if alone else folder / "unet"
        network.mkdir(exist_ok=True)
        (folder / "scheduler").mkdir()
        if not alone:
            write_json(folder / "model_index.json", index)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        write_network(network, names | config.unet, pretrained.params)
        if unchanged := sorted(pipeline_parts(config.pipeline) - {"unet", "scheduler"}):
            source = fetch_parts(config, unchanged)
            for part in unchanged:
                _copy_part(source / part, folder / part, hard_links)


def fetch_parts(config: PretrainedConfig, parts: Sequence[str]) -> pathlib.Path:
    """The folder that a pipeline was read from, with these parts of it, checked.

    Raises:
      ValueError: if it is gone, or as `check_digests`.
    """
    # The commit, since a branch may have moved.
    at = (config.commit or config.revision) if is_hub_name(config.source) else None
    source, fetch, _ = find_model(config.source, at or None)
    fetch([f"{part}/*{suffix}" for part in parts for suffix in SUFFIXES])
    check_digests(source, parts)
    return source


def save_unet(
    path: str | os.PathLike[str], pretrained: Pretrained, *, overwrite: bool = False
) -> None:
    """Writes the denoiser alone, a folder that `UNet2DConditionModel.from_pretrained` opens.

    Its noise is not in it: `load_pretrained` takes such a folder with `scheduler=`.

    Raises:
      ValueError: as `save_pretrained`.
    """
    with new_folder(path, overwrite=overwrite) as folder:
        write_network(folder, pretrained.config.unet, pretrained.params)


def _copy_part(source: pathlib.Path, target: pathlib.Path, hard_links: bool) -> None:
    if not source.is_dir():
        raise ValueError(f"{source}, which the model was loaded with, is gone: it cannot be saved.")
    target.mkdir()
    chosen = {}
    # An unnamed file, which has the shorter name, takes the place of its variants.
    for path in sorted(source.iterdir(), key=lambda path: (-len(path.name), path.name)):
        if path.suffix in SUFFIXES and path.is_file():
            chosen[re.sub(r"\.\w+\.safetensors$", ".safetensors", path.name)] = path
    for name, path in chosen.items():
        if not hard_links:
            shutil.copyfile(path, target / name)
            continue
        try:
            os.link(path.resolve(), target / name)  # The hub's cache is one of symbolic links.
        except OSError as error:
            raise ValueError(
                f"{path} cannot be linked into {target.parent} ({error.strerror}): save without "
                "hard_links."
            ) from error
