"""Which parameters of a text-conditional UNet train: a part of them, or a low-rank change.

Cross-attention is `attn2` of each transformer block, which attends to the text. ESD (Gandikota et
al. 2023, 2303.07345) trains it alone (ESD-x), its keys and values alone (ESD-x-strict), or all but
it (ESD-u). LoRA is Hu et al. 2021 (2106.09685).
"""

import json
import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import check_folder
from jax_unlearn.pretrained.weights import (
    diffusers_key,
    new_folder,
    read_params,
    stored_shapes,
    write_params,
)
from jax_unlearn.problem import Evaluate, Losses, Problem
from jax_unlearn.typing import Array, Params

__all__ = [
    "Subset",
    "load_lora",
    "lora_attack",
    "lora_problem",
    "lora_init",
    "lora_merge",
    "parse_subset",
    "save_lora",
    "subset_problem",
    "subset_labels",
    "subset_optimizer",
    "subset_params",
]

_PARTS = ("full", "cross-attention", "cross-attention-kv", "no-cross-attention")
_ESD = {
    "esd-all": "full",
    "esd-x": "cross-attention",
    "esd-x-strict": "cross-attention-kv",
    "esd-u": "no-cross-attention",
}
_LORA_FILE = "pytorch_lora_weights.safetensors"
_LORA_METADATA = "lora_adapter_metadata"


class Subset(NamedTuple):
    """What trains.

    Attributes:
      part: "full", "cross-attention", "cross-attention-kv" or "no-cross-attention".
      rank: of a low-rank change of that part's kernels; None trains the part itself.
    """

    part: str
    rank: int | None = None


def parse_subset(text: str) -> Subset:
    """Reads PART, one of ESD's names for it, "lora:RANK" (of cross-attention) or "lora:RANK:PART".

    ESD's names are esd-all, esd-x, esd-x-strict and esd-u; its own code for the first and the last
    leaves norms as they are, which train here.

    Example:
      >>> parse_subset("lora:4:esd-x-strict")
      Subset(part='cross-attention-kv', rank=4)

    Raises:
      ValueError: for anything else.
    """
    lora, rank, *rest = text.split(":") if text.startswith("lora:") else ("", "", text)
    part = ":".join(rest) if rest else "cross-attention"
    part = _ESD.get(part, part)
    if part not in _PARTS or (lora and not (rank.isdecimal() and int(rank) > 0)):
        raise ValueError(
            f"{text!r} is no subset of the parameters: expected one of "
            f"{', '.join([*_PARTS, *_ESD])}, or lora:RANK, or lora:RANK:SUBSET."
        )
    return Subset(part, int(rank) if lora else None)


def subset_labels(params: Params, part: str) -> Params:
    """Labels each parameter "trained" or "frozen", as `optax.multi_transform` takes them.

    Args:
      params: of a `UNet2DConditionModel`.
      part: as in `Subset`.

    Raises:
      ValueError: for an unknown part, or one that the network does not have.
    """
    if part not in _PARTS:
        raise ValueError(f"part {part!r} is not one of {', '.join(_PARTS)}.")

    def label(path: tuple[Any, ...], _: Array) -> str:
        names = {entry.key for entry in path}
        crossed = "attn2" in names
        trained = {
            "full": True,
            "cross-attention": crossed,
            "cross-attention-kv": crossed and not names.isdisjoint({"to_k", "to_v"}),
            "no-cross-attention": not crossed,
        }[part]
        return "trained" if trained else "frozen"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "trained" not in jax.tree.leaves(labels):
        raise ValueError(f"the network has no {part}: it is not conditioned on text.")
    return labels


def subset_optimizer(
    optimizer: optax.GradientTransformation, part: str
) -> optax.GradientTransformation:
    """An optimizer of one part of the parameters, with no state for the others.

    It sees the gradient of that part alone, so that a clipping inside it does too. Use it with
    `subset_problem`, or `subset_params`, which spare the other derivatives.
    """
    return optax.multi_transform(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        partial(subset_labels, part=part),
    )


def subset_params(params: Params, part: str) -> Params:
    """The same values, of which those outside a part are constants to differentiation.

    Their derivatives are zero, and are not computed. Errors as `subset_labels`.
    """
    labels = subset_labels(params, part)
    return jax.tree.map(
        lambda leaf, label: leaf if label == "trained" else jax.lax.stop_gradient(leaf),
        params,
        labels,
    )


def _over(problem: Problem, whole: Callable[[Params, Params], Params]) -> Problem:
    """The same problem over what trains; whole(what trains, reference) -> all parameters."""

    def of(evaluate: Evaluate) -> Evaluate:
        def losses(params: Params, reference: Params, /, *rest: Any, **options: Any) -> Losses:
            return evaluate(whole(params, reference), reference, *rest, **options)

        return losses

    fresh = None if problem.fresh is None else of(problem.fresh)
    return problem._replace(losses=of(problem.losses), fresh=fresh)


def subset_problem(problem: Problem, part: str) -> Problem:
    """The same problem, differentiated in one part of the parameters: `subset_params`.

    `PrimalDualInfo.gradient_norm` is then that of the part.
    """
    return _over(problem, lambda params, reference: subset_params(params, part))


def lora_init(params: Params, key: Array, *, rank: int, part: str = "cross-attention") -> Params:
    """A low-rank change A B of each kernel of a part, which changes nothing yet.

    A is uniform in ±1/√(values that enter one output) and B = 0, as in peft.

    Args:
      params: of a `UNet2DConditionModel`.
      key: a PRNG key.
      rank: r, 1 or more.
      part: as in `Subset`; of it kernels are changed, and no biases and norms.

    Returns:
      A pytree of the modules' names that holds, in place of a kernel [..., m, n], `lora_A`
      [..., m, r] and `lora_B` [r, n] ([1, 1, r, n] for a convolution).

    Raises:
      ValueError: for a rank below 1, or a part that the network does not have.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}.")
    labels = _flat(subset_labels(params, part))
    kernels = {
        path: leaf.shape
        for path, leaf in _flat(params).items()
        if path[-1] == "kernel" and labels[path] == "trained"
    }
    # One draw for all: one a kernel compiles for each shape.
    sizes = [rank * int(np.prod(shape[:-1])) for shape in kernels.values()]
    draws = np.asarray(jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0))
    factors = {}
    for (path, shape), draw in zip(
        kernels.items(), np.split(draws, np.cumsum(sizes)[:-1]), strict=True
    ):
        *module, name = path
        down = draw.reshape(*shape[:-1], rank) / np.sqrt(np.prod(shape[:-1]))
        up = np.zeros((*(1,) * (len(shape) - 2), rank, shape[-1]))
        factors[*module, "lora_A", name] = jnp.asarray(down, jnp.float32)
        factors[*module, "lora_B", name] = jnp.asarray(up, jnp.float32)
    return traverse_util.unflatten_dict(factors)


def lora_merge(params: Params, lora: Params) -> Params:
    """W + A B for each kernel that `lora` changes; other parameters are those of `params`.

    Raises:
      ValueError: if `lora` changes a kernel that the parameters do not have, or of another shape.
    """
    merged = _flat(params)
    factors = _flat(lora)
    for (*module, factor, name), down in factors.items():
        if factor == "lora_B":
            continue
        path, up = (*module, name), factors[*module, "lora_B", name]
        shape = (*down.shape[:-1], up.shape[-1])
        if path not in merged or merged[path].shape != shape:
            raise ValueError(f"lora changes a {'.'.join(path)} {shape}, which is not there.")
        merged[path] = merged[path] + jnp.matmul(down, up, precision="highest")
    return traverse_util.unflatten_dict(merged)


def lora_problem(problem: Problem) -> Problem:
    """The same problem over a low-rank change of the reference's parameters.

    Its losses take a `lora` in place of the parameters, which are `lora_merge(reference, lora)`: no
    second copy of them trains. `primal_dual(...).init(lora, ...)` starts it.
    """
    return _over(problem, lambda lora, reference: lora_merge(reference, lora))


def lora_attack(attack_loss: Callable[..., Array]) -> Callable[..., Array]:
    """The same attack on a low-rank change of the reference: for `against_pool`."""

    def of(lora: Params, reference: Params, /, *rest: Any, **options: Any) -> Array:
        return attack_loss(lora_merge(reference, lora), reference, *rest, **options)

    return of


def save_lora(
    folder: str | os.PathLike[str], lora: Params, *, base_model: str = "", overwrite: bool = False
) -> None:
    """Writes a folder that diffusers' `load_lora_weights` opens.

    The header of its file holds what diffusers writes there: under "lora_adapter_metadata", as
    json, the arguments of peft's `LoraConfig`. Its `lora_alpha` is the rank, the scale 1 therefore,
    as in `lora_merge`.

    Args:
      folder: to make; it appears complete or not at all.
      lora: a change of a pipeline's UNet.
      base_model: name on the hub of what it changes; "" says nothing of it.
      overwrite: replace a model that is there.

    Raises:
      ValueError: if `folder` exists and is not to be overwritten, or holds something other than a
        model, or if the change is not finite.
    """
    with new_folder(folder, overwrite=overwrite) as new:
        unet = {"unet": lora}
        write_params(new / _LORA_FILE, unet, unet, _lora_metadata(lora, base_model))


def _lora_metadata(lora: Params, base_model: str) -> dict[str, str]:
    """What the header of the file says, each value a text."""
    down = {path[:-2]: leaf for path, leaf in _flat(lora).items() if path[-2] == "lora_A"}
    (rank,) = {leaf.shape[-1] for leaf in down.values()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(
            diffusers_key((*path, "kernel")).removesuffix(".weight") for path in down
        ),
    }
    if base_model:
        config["base_model_name_or_path"] = base_model
    named = {f"unet.{name}": value for name, value in config.items()}
    return {_LORA_METADATA: json.dumps(named, sort_keys=True)}


def load_lora(path: str | os.PathLike[str], params: Params) -> Params:
    """Reads a change that `save_lora`, or peft for a UNet, has written.

    Args:
      path: the folder, or its safetensors file.
      params: of the network that it changes.

    Returns:
      What `lora_merge` takes; float32.

    Raises:
      ValueError: if there is no such file, it is damaged, or it is not of this network: it changes
        a kernel that is not there, or one of another shape; or as `check_folder` and
        `check_digests`.
    """
    file = pathlib.Path(path)
    if os.path.isdir(file):
        check_folder(file, ())
        file = file / _LORA_FILE
    if not os.path.lexists(file):
        raise ValueError(f"{path} has no low-rank change: expected {_LORA_FILE}.")
    check_digests(file.parent, ())
    stored, shapes = stored_shapes(file), {}
    for (*module, name), leaf in _flat(params).items():
        down = stored.get(diffusers_key(("unet", *module, "lora_A", name)))
        if name == "kernel" and down:
            *first, last = leaf.shape
            both = {"A": (*first, down[0]), "B": (*(1,) * (leaf.ndim - 2), down[0], last)}
            for factor, shape in both.items():
                shapes[*module, f"lora_{factor}", name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        return read_params({"unet": traverse_util.unflatten_dict(shapes)}, [file])["unet"]
    except ValueError as error:
        raise ValueError(f"{file} is no low-rank change of this network: {error}") from error


def _flat(params: Params) -> dict[tuple[str, ...], Any]:
    return cast(dict[tuple[str, ...], Any], traverse_util.flatten_dict(params))
