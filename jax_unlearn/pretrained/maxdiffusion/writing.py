"""A checkpoint that maxdiffusion opens, of a pipeline of diffusers'."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_unlearn.models.files import shown
from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig
from jax_unlearn.pretrained.hub import is_hub_name
from jax_unlearn.pretrained.maxdiffusion.layout import (
    CLASSES,
    TAKEN,
    check_stored,
    copy_files,
    flax_config,
    stored,
    tokenizers,
)
from jax_unlearn.pretrained.networks import kind_of, read_network
from jax_unlearn.pretrained.saving import fetch_parts
from jax_unlearn.pretrained.unet import TEXT_TO_IMAGE, Pretrained, PretrainedConfig
from jax_unlearn.pretrained.weights import listed, new_folder
from jax_unlearn.typing import Params

__all__ = ["check_writable", "save_maxdiffusion"]


def save_maxdiffusion(
    path: str | os.PathLike[str], pretrained: Pretrained, *, overwrite: bool = False
) -> None:
    """Writes a checkpoint that maxdiffusion and `maxdiffusion:PATH` open, as step 0.

    The UNet's item is a whole train state with a new AdamW of maxdiffusion's, so that maxdiffusion
    samples from it and trains it on. The other parts come from `config.source`, as in
    `save_pretrained`. The tokenizers lie beside the step. maxdiffusion finds them by the name in
    the checkpoint: that of the hub's model, or else `path`, which is then not to be moved.

    Args:
      path: the folder to make; it appears complete or not at all.
      pretrained: the denoiser of a pipeline from text to image.
      overwrite: replace a model that is there. It is deleted only once the new one stands.

    Raises:
      ValueError: as `save_pretrained` and `check_writable`.
    """
    # Only here: its import is slow.
    import orbax.checkpoint as ocp

    config = pretrained.config
    check_writable(config)
    others = [part for part in TEXT_TO_IMAGE[config.pipeline["_class_name"]] if part != "unet"]
    source = fetch_parts(config, others)
    networks = {part: read_network(source / part) for part in others if part in CLASSES}
    states = {part: _named(part, network.params) for part, network in networks.items()}
    states["unet"] = _train_state(config.unet, pretrained.params)
    configs = {part: network.config for part, network in networks.items()}
    configs["unet"] = {"_class_name": "UNet2DConditionModel"} | config.unet
    configs["scheduler"] = {"_class_name": "DDPMScheduler"} | config.scheduler
    place = config.source if is_hub_name(config.source) else os.path.abspath(path)
    items: dict[str, Any] = {"tokenizer_config": ocp.args.JsonSave({"path": place})}
    for part, raw in configs.items():
        items[f"{part}_config"] = ocp.args.JsonSave(flax_config(part, raw))
    for part, state in states.items():
        items[f"{part}_state"] = ocp.args.PyTreeSave(state)
    with new_folder(path, overwrite=overwrite) as folder:
        for part in tokenizers(states):
            (folder / part).mkdir()
            copy_files(source / part, folder / part)
        here = jax.process_index()  # Of many processes only this one may be saving.
        options = ocp.CheckpointManagerOptions(
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix="maxdiffusion"
            ),
        )
        names = tuple(items)
        with ocp.CheckpointManager(folder, item_names=names, options=options) as manager:
            manager.save(0, args=ocp.args.Composite(**items))


def check_writable(config: PretrainedConfig) -> None:
    """Refuses a model that `save_maxdiffusion` cannot write.

    Raises:
      ValueError: for one that is no pipeline from text to image, and for an option of its UNet
        that maxdiffusion would pass over.
    """
    if config.pipeline.get("_class_name") not in TEXT_TO_IMAGE:
        raise ValueError(
            f"maxdiffusion has no such model: expected one of {', '.join(TEXT_TO_IMAGE)}."
        )
    unet = UNet2DConditionConfig.from_diffusers(config.unet)
    passed = [
        field.name
        for field in dataclasses.fields(unet)
        if field.name not in TAKEN and getattr(unet, field.name) != field.default
    ]
    if passed:
        raise ValueError(f"maxdiffusion's UNet has not this model's options {shown(passed)}.")


def _named(part: str, params: Params) -> dict[str, Any]:
    """A state of parameters alone, by maxdiffusion's names."""
    given = {key: np.asarray(leaf, np.float32) for key, leaf in stored(part, params).items()}
    return {"params": unflatten_dict(given)}


def _train_state(config: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """A UNet's parameters, checked, before the first step of maxdiffusion's AdamW."""
    state = _named("unet", params)
    given: Any = flatten_dict(state["params"])
    kind = kind_of(config)
    wanted = stored("unet", kind.param_shapes(kind.read_config(config)))
    check_stored(wanted, {key: (leaf.shape, leaf.dtype) for key, leaf in given.items()})
    if broken := ["/".join(key) for key, leaf in given.items() if not np.isfinite(leaf).all()]:
        raise ValueError(f"these parameters cannot be saved: {listed({'not finite': broken})}.")
    # Its rate is a schedule, whose count is part of the state.
    optimizer = jax.eval_shape(optax.adamw(optax.constant_schedule(0.0)).init, state["params"])
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), optimizer)
    return {"step": np.zeros((), np.int32), **state, "opt_state": fresh}
