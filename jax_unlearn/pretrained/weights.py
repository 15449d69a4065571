"""A folder of torch's tensors ↔ a pytree of parameters.

Modules are named as in diffusers and transformers, with `_` for the `.` before an index, so that
a path of parameters maps to a tensor by rule. Every tensor is used and every parameter filled.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_unlearn.models.files import read_json, shown
from jax_unlearn.models.memory import check_parameters
from jax_unlearn.models.tensors import StoredTensor, check_float, read_header, read_tensor
from jax_unlearn.pretrained.digests import DIGESTS_FILE, write_digests
from jax_unlearn.pretrained.hub import is_plain_name
from jax_unlearn.typing import Array, Params

__all__ = [
    "clean_leftovers",
    "diffusers_key",
    "listed",
    "new_folder",
    "read_params",
    "weight_files",
    "write_json",
    "write_params",
]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_LISTS = re.compile(
    r"(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|transformer_blocks|to_out"
    r"|net|layers)_(\d+)"
)
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# Old encoders of CLIP store the numbers 0, 1, 2, ... beside their parameters.
_NO_PARAMETER = re.compile(r"((text|vision)_model\.)?embeddings\.position_ids")
_TOWERS = ("text_model.", "vision_model.")
# Parameters that torch has not as the weight of a module, but by a name of their own.
_OWN_NAMES = ("bias", "class_embedding", "logit_scale")


def diffusers_key(path: tuple[str, ...]) -> str:
    """The name of a parameter in a torch checkpoint.

    Example:
      >>> diffusers_key(("down_blocks_0", "resnets_1", "conv1", "kernel"))
      'down_blocks.0.resnets.1.conv1.weight'
    """
    modules = [
        f"{match[1]}.{match[2]}" if (match := _LISTS.fullmatch(name)) else name
        for name in path[:-1]
    ]
    return ".".join([*modules, path[-1] if path[-1] in _OWN_NAMES else "weight"])


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_MODEL_FILES = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors", DIGESTS_FILE)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill that takes its place when the block ends without an error.

    It appears complete or not at all, with the digests of its files in `model.sha256`. A model
    that it replaces is deleted only then.

    Raises:
      ValueError: if `path` exists and is not to be overwritten, holds something other than a
        model, or cannot be made.
      OSError: if the disk is full.
    """
    target = pathlib.Path(path).absolute()
    if os.path.lexists(target):
        if not os.path.exists(target):
            raise ValueError(f"{path} is a link to nothing: remove it, or choose another folder.")
        if not overwrite:
            raise ValueError(f"{path} exists: choose another folder, or pass overwrite=True.")
        if not any(os.path.isfile(target / name) for name in _MODEL_FILES):
            raise ValueError(f"{path} exists and holds no model: it is not overwritten.")
    # The host too, since process numbers say nothing of those on other machines.
    mark = f"{os.getpid()}-{_host()}-{secrets.token_hex(4)}"
    new, old = (target.with_name(f".{target.name}.{state}-{mark}") for state in ("new", "old"))
    try:
        with _explained(path):
            new.mkdir(parents=True)
        yield new
        write_digests(new)
        with _explained(path):
            _replace(new, target, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if os.path.lexists(old):
        shutil.rmtree(old)


def _replace(new: pathlib.Path, target: pathlib.Path, old: pathlib.Path) -> None:
    """Renames `new` to `target`, and what is there to `old`."""
    if not os.path.lexists(target):
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes one line of what the system says against a folder; a full disk is no wrong input."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"the folder {path} cannot be made: {error.strerror}.") from error


def clean_leftovers(target: str | os.PathLike[str]) -> None:
    """Removes what killed processes left of `new_folder` beside a folder.

    If one was killed between its two renames, the folder is missing: the model that was to be
    replaced then returns to its place. What a process that still lives, or one on another host,
    has there stays.

    Args:
      target: the folder that was to be made.
    """
    target = pathlib.Path(target).absolute()
    if os.name == "nt" or not target.parent.is_dir():  # Windows cannot ask without ending it.
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(new|old)-(\d+)-(?:([0-9a-f]{{8}})-)?\w+")
    left = {path: pattern.fullmatch(path.name) for path in target.parent.iterdir()}
    left = {
        path: match[1]
        for path, match in left.items()
        if match and match[3] in (None, _host()) and not _lives(int(match[2]))
    }
    before = [path for path, state in left.items() if state == "old"]
    if before and not os.path.lexists(target):
        max(before, key=lambda path: path.stat().st_mtime_ns).rename(target)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _lives(process: int) -> bool:
    """Whether there is such a process here."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # It is another user's.
        return True
    return True


def weight_files(
    folder: pathlib.Path, stem: str, variant: str | None = None, *, torch_class: str
) -> list[pathlib.Path]:
    """The safetensors of one variant: a file, or the shards that an index lists.

    Args:
      folder: of the network.
      stem: what the files' names begin with.
      variant: e.g. "fp16"; None is the unnamed one, or the only one.
      torch_class: what opens the folder in torch, e.g. "diffusers.UNet2DModel".

    Raises:
      ValueError: if there are none, or only pickled ones, or not of this variant.
    """
    single = re.compile(rf"{stem}(?:\.([\w-]+))?\.safetensors")
    shards = re.compile(rf"{stem}(?:\.([\w-]+))?\.safetensors\.index(?:\.([\w-]+))?\.json")
    found: dict[str | None, pathlib.Path] = {}
    for pattern in (single, shards):  # An index goes before a single file, as in diffusers.
        for path in sorted(folder.iterdir()):
            name = re.sub(r"-\d{5}-of-\d{5}", "-shard", path.name)
            match = pattern.fullmatch(name)
            if match and "-shard" not in name:
                found[next((group for group in match.groups() if group), None)] = path
    if not found:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            package, name = torch_class.split(".")
            raise ValueError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code and are "
                f'not read. Convert them where torch is: python -c "from {package} import '
                f"{name} as U; U.from_pretrained('{folder}', use_safetensors=False)"
                ".save_pretrained('CONVERTED')\""
            )
        raise ValueError(f"{folder} has no {stem}.safetensors.")
    if variant not in found:
        if variant is not None or len(found) > 1:
            raise ValueError(
                f"{folder} has no weights of variant {variant!r}: choose one of "
                f"{sorted(map(str, found))}."
            )
        (variant,) = found
    path = found[variant]
    if path.suffix != ".json":
        return [path]
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from names to files.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_plain_name(name) or not (folder / name).is_file():
            raise ValueError(f"{path} lists {shown(repr(name))}, which is not a file beside it.")
    return [folder / name for name in names]


def read_params(shapes: Params, files: list[pathlib.Path]) -> Params:
    """Fills every parameter with a tensor, and uses every tensor.

    Headers are checked before any tensor is read, and tensors are read one at a time: beside the
    parameters no more than a few copies of the largest one are held.

    Args:
      shapes: a pytree of `jax.ShapeDtypeStruct`, as from a network's `param_shapes`.
      files: the safetensors; old names of attention and of text encoders are understood.

    Returns:
      The parameters in float32, whatever they are stored in.

    Raises:
      ValueError: if a file is damaged, or a tensor is missing, misshapen, given twice, of no
        parameter, not of floats or not finite.
    """
    check_parameters(shapes, f"the configuration of {files[0].parent}")
    leaves = _leaves(shapes)
    renamed = {other: key for key in leaves for other in _other_names(key)}
    found: dict[str, tuple[str, StoredTensor]] = {}
    extra, misshapen, doubled = [], [], []
    for name, stored in ((n, t) for file in files for n, t in read_header(file).items()):
        key = renamed.get(name, name)
        if key not in leaves:
            if not _NO_PARAMETER.fullmatch(name):
                extra.append(shown(name))
            continue
        if key in found:
            doubled.append(shown(name))
            continue
        check_float(name, stored)
        wanted = _torch_shape(*leaves[key])
        if stored.shape != wanted:
            misshapen.append(
                f"{shown(name)} {shown(repr(list(stored.shape)))} instead of {list(wanted)}"
            )
        found[key] = name, stored
    problems = {
        "missing": [key for key in leaves if key not in found],
        "of no parameter": sorted(extra),
        "misshapen": misshapen,
        "given twice": doubled,
    }
    if any(problems.values()):
        raise ValueError(
            f"tensors in {files[0].parent} do not fit its config.json: {listed(problems)}."
        )
    params: dict[str, Array] = {}
    for key, (name, stored) in found.items():
        values = np.asarray(_from_torch(leaves[key][0], read_tensor(name, stored)), order="C")
        # Otherwise copies to the device wait in a queue, each with its array here.
        params[key] = jax.block_until_ready(jax.device_put(values))
    return jax.tree.unflatten(jax.tree.structure(shapes), [params[key] for key in leaves])


def stored_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, as in torch, by name; ValueError for a damaged file."""
    return {name: stored.shape for name, stored in read_header(path).items()}


def write_params(
    path: pathlib.Path, shapes: Params, params: Params, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes float32 safetensors, byte for byte as the library of that name does.

    Everything is checked before the file is made, and written one tensor at a time: beside the
    parameters no more than a few copies of the largest one are held.

    Args:
      path: the file.
      shapes: what the parameters must be, as from a network's `param_shapes`.
      params: the parameters.
      metadata: what the header says beside "format".

    Raises:
      ValueError: if the parameters have other names or shapes, or are not finite.
    """
    expected, given = _leaves(shapes), _leaves(params)
    problems = {
        "missing": [key for key in expected if key not in given],
        "not of this network": [key for key in given if key not in expected],
        "misshapen": [
            f"{key} {list(np.shape(given[key][1]))} instead of {list(leaf.shape)}"
            for key, (_, leaf) in expected.items()
            if key in given and np.shape(given[key][1]) != leaf.shape
        ],
        "not finite": [
            key for key, (_, leaf) in given.items() if not np.isfinite(_on_host(leaf)).all()
        ],
    }
    if any(problems.values()):
        raise ValueError(f"these parameters cannot be saved: {listed(problems)}.")
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key in sorted(expected):
        shape = _torch_shape(*expected[key])
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in sorted(expected):
            names, leaf = given[key]
            values = np.asarray(_to_torch(names, _on_host(leaf)), "<f4", order="C")
            file.write(values.reshape(-1).data)


def _leaves(params: Params) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Paths and leaves by their names in torch, in the order of the tree."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = tuple(str(getattr(part, "key", part)) for part in path)
        leaves[diffusers_key(names)] = names, leaf
    return leaves


def _to_torch(path: tuple[str, ...], values: np.ndarray) -> np.ndarray:
    """[in, out] → [out, in] and [h, w, in, out] → [out, in, h, w] for kernels."""
    if path[-1] != "kernel":
        return values
    return values.transpose(3, 2, 0, 1) if values.ndim == 4 else values.T


def _torch_shape(path: tuple[str, ...], leaf: Any) -> tuple[int, ...]:
    shape = leaf.shape
    if path[-1] != "kernel":
        return shape
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _from_torch(path: tuple[str, ...], values: np.ndarray) -> np.ndarray:
    """The inverse of `_to_torch`."""
    if path[-1] != "kernel":
        return values
    return values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T


def _other_names(key: str) -> list[str]:
    """Names that other versions of diffusers and transformers give the same parameter."""
    for tower in _TOWERS:
        if key.startswith(tower):
            return [key.removeprefix(tower)]
    return [
        key.replace(f".{new}.", f".{old}.")
        for new, old in _OLD_ATTENTION.items()
        if ".attentions." in key and f".{new}." in key
    ]


def listed(problems: Mapping[str, list[str]]) -> str:
    """The first few of every kind of problem, and how many there are."""
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    )


def _on_host(leaf: Any) -> np.ndarray:
    """The values of an array."""
    if isinstance(leaf, jax.Array):
        # An array keeps what it once fetched from its devices: another one of the same buffers.
        shards = [shard.data for shard in leaf.addressable_shards]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return np.asarray(leaf)
