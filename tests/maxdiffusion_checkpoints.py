"""Checkpoints as maxdiffusion writes them, made of a diffusers folder by Orbax and flax alone.

Names and shapes follow what maxdiffusion does with torch's: indices join their lists by `_`, the
attention of the autoencoder has its first names, and kernels are transposed. Its text encoders are
those of transformers' Flax models, whose layers are numbered one level down.
"""

import json
import re
from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import safetensors.numpy
from flax.training import train_state
from flax.traverse_util import unflatten_dict

FIRST_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
# The options that its Flax classes have beside those of torch's, as its config's json holds them.
UNET_OWN = {
    "attention_kernel": "dot_product", "flash_block_sizes": None, "flash_min_seq_length": 4096,
    "num_attention_heads": None, "split_head_dim": True, "use_memory_efficient_attention": False,
    "dropout": 0.0, "only_cross_attention": False, "addition_embed_type_num_heads": 64,
}  # fmt: skip


@flax.struct.dataclass
class InferenceState:
    apply_fn: Any = flax.struct.field(pytree_node=False)
    params: Any = None


def flax_params(folder, part):
    """The parameters of a part of a diffusers folder, as maxdiffusion has them."""
    (file,) = (folder / part).glob("*.safetensors")
    found = {}
    for name, values in safetensors.numpy.load_file(file).items():
        if not part.startswith("text"):
            name = re.sub(r"\.(\d+)", r"_\1", name)
        *path, last = name.split(".")
        if part == "vae":
            path = [FIRST_NAMES.get(one, one) for one in path]
        if last == "weight":
            if path[-1].endswith("_embedding") and part.startswith("text"):
                last = "embedding"
            elif values.ndim == 1:
                last = "scale"
            else:
                last = "kernel"
                values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T
        found[*path, last] = jnp.asarray(values)
    return unflatten_dict(found)


def optimizer():
    return optax.adamw(optax.join_schedules([optax.constant_schedule(1e-7)] * 2, [0]))


def states(folder, put=lambda params: params):
    """The train states by part: the UNet's with its optimizer's, of the others parameters."""
    apply = jnp.tanh
    parts = [part for part in ("vae", "text_encoder", "text_encoder_2") if (folder / part).is_dir()]
    found: dict[str, Any] = {
        part: InferenceState(apply, put(flax_params(folder, part))) for part in parts
    }
    params = put(flax_params(folder, "unet"))
    found["unet"] = train_state.TrainState.create(apply_fn=apply, params=params, tx=optimizer())
    return found


def configs(folder, parts, tokenizer):
    """The items of json."""

    def read(part, file="config.json"):
        return json.loads((folder / part / file).read_text())

    scheduler = read("scheduler", "scheduler_config.json")
    found = {part: read(part) for part in parts}
    found["unet"] = UNET_OWN | found["unet"] | {"_class_name": "FlaxUNet2DConditionModel"}
    found["vae"] |= {"_class_name": "FlaxAutoencoderKL"}
    found["scheduler"] = scheduler | {"_class_name": "FlaxDDPMScheduler"}
    for part in ("unet", "vae", "scheduler"):
        found[part]["_diffusers_version"] = "0.2.0"
    return found | {"tokenizer": {"path": str(tokenizer)}}


def write_checkpoint(
    path, folder, *, step=0, save=ocp.args.PyTreeSave, put=lambda params: params, tokenizer=None
):
    """Writes FOLDER/STEP of a diffusers folder, whose tokenizers it names by default."""
    trees = states(folder, put)
    described = configs(folder, list(trees), folder if tokenizer is None else tokenizer)
    items: dict[str, Any] = {f"{part}_state": save(tree) for part, tree in trees.items()}
    items |= {f"{part}_config": ocp.args.JsonSave(found) for part, found in described.items()}
    options = ocp.CheckpointManagerOptions(create=True, save_interval_steps=1)
    with ocp.CheckpointManager(path, item_names=tuple(items), options=options) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
    return path
