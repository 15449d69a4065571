"""A checkpoint of maxdiffusion's as a pipeline's folder of diffusers'.

`find_model` opens `maxdiffusion:FOLDER` as it opens a name on the hub. What is asked for of a
checkpoint is written once, as diffusers' files, into the user's cache; everything after that is as
with any other folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_unlearn.models.files import read_json, shown
from jax_unlearn.models.memory import check_parameters
from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import FoundModel, check_folder, find_model, is_hub_name
from jax_unlearn.pretrained.maxdiffusion.layout import (
    CLASSES,
    check_stored,
    copy_files,
    stored,
    tokenizers,
    torch_config,
)
from jax_unlearn.pretrained.networks import kind_of
from jax_unlearn.pretrained.quiet import quiet_orbax
from jax_unlearn.pretrained.weights import write_json, write_params
from jax_unlearn.typing import Params

__all__ = ["find_checkpoint"]

_FORMAT = 1  # Of what is written into the cache.


def find_checkpoint(path: str) -> FoundModel:
    """Finds a checkpoint of maxdiffusion's; of a folder of several the latest.

    Args:
      path: the folder of the steps, or that of one step.

    Returns:
      A pipeline's folder in the cache, with its json, and how to fill the parts of it. Of a train
      state the parameters alone are read, without the optimizer's.

    Raises:
      ValueError: if there is none, if it is of another model or lacks an item, or if it holds a
        link or what is no file. From `fetch` also if parameters are damaged, missing, misshapen,
        not finite or of no parameter, or if the tokenizer that it names is not at hand.
    """
    step = _step_of(pathlib.Path(os.path.expanduser(path)))
    identity = json.dumps([_FORMAT, os.path.realpath(step), _files(step)])
    described = _descriptions(step)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    cache = cache / "jax_unlearn" / "maxdiffusion"
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not folder.is_dir():
        with _scratch(cache) as new:
            _write_descriptions(new, described)
            _take_place(new, folder)

    def fetch(patterns: list[str]) -> None:
        for part in sorted({pattern.partition("/")[0] for pattern in patterns}):
            known = part in described and part in CLASSES
            if known and any((folder / part).glob("*.safetensors")):
                continue
            with _scratch(cache) as new:
                if known:
                    _write_weights(new, step, part, described[part])
                elif part in tokenizers(described):
                    copy_files(_tokenizer_folder(step, part), new)
                for made in new.iterdir():
                    os.replace(made, folder / part / made.name)

    return FoundModel(folder, fetch, "")


def _step_of(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself, if it is that of a step, or that of the latest step in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: maxdiffusion: takes that of its checkpoints.")
    with _explained():
        if any(folder.glob("*_config")):
            return folder
        steps = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    if not steps:
        raise ValueError(
            f"{folder} has no checkpoint of maxdiffusion's: expected folders named by their steps."
        )
    step = max(steps, key=lambda path: int(path.name))
    if step.is_symlink():
        raise ValueError(f"{step} is a link: give maxdiffusion: the folder that it leads to.")
    return step


def _files(step: pathlib.Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file; ValueError for a link or what is no file."""
    found = []
    with _explained():
        for path in sorted(step.rglob("*")):
            entry = path.lstat()
            if stat.S_ISREG(entry.st_mode):
                name = path.relative_to(step).as_posix()
                found.append((name, entry.st_size, entry.st_mtime_ns))
            elif not stat.S_ISDIR(entry.st_mode):
                raise ValueError(f"{path} is a link, or no file: put a copy there.")
    return found


def _item(step: pathlib.Path, name: str) -> pathlib.Path:
    """Where Orbax writes an item of json."""
    return step / f"{name}_config" / "metadata"


def _descriptions(step: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The configurations of a checkpoint's parts, as diffusers has them."""
    parts = [part for part in CLASSES if part != "text_encoder_2"]
    if (step / "text_encoder_2_config").is_dir():
        parts.append("text_encoder_2")
    items = [f"{part}_config" for part in (*parts, "scheduler", "tokenizer")]
    items += [f"{part}_state" for part in parts]
    if missing := [item for item in items if not (step / item).is_dir()]:
        raise ValueError(
            f"{step} has no {', '.join(missing)}: expected a Stable Diffusion 1, 2 or XL that "
            "maxdiffusion saved, with all its items."
        )
    found = {}
    for part in (*parts, "scheduler"):
        raw = read_json(_item(step, part))
        try:
            found[part] = torch_config(part, raw)
            if part in CLASSES:
                kind_of(found[part]).read_config(found[part])
        except ValueError as error:
            raise ValueError(f"{_item(step, part)}: {error}") from error
    return found


def _write_descriptions(folder: pathlib.Path, described: Mapping[str, dict[str, Any]]) -> None:
    """Writes a pipeline's folder without weights and tokenizers."""
    xl = "text_encoder_2" in described
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
    }
    if not xl:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for part, config in described.items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(folder / part / name, config)
        package = "transformers" if part.startswith("text_encoder") else "diffusers"
        index[part] = [package, CLASSES.get(part, config.get("_class_name"))]
    for part in tokenizers(described):
        (folder / part).mkdir()
        index[part] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "model_index.json", index)


def _write_weights(
    folder: pathlib.Path, step: pathlib.Path, part: str, config: dict[str, Any]
) -> None:
    """Writes one network's safetensors into a folder."""
    kind, item = kind_of(config), step / f"{part}_state"
    shapes = kind.param_shapes(kind.read_config(config))
    check_parameters(shapes, os.fspath(_item(step, part)))
    try:
        params = _read_params(item, part, shapes)
        write_params(folder / f"{kind.stem}.safetensors", shapes, params)
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from error


def _read_params(item: pathlib.Path, part: str, shapes: Params) -> Params:
    """The parameters of a train state, in this machine's memory as float32."""
    # Only here: its import is slow, and the descriptions need none of it.
    import orbax.checkpoint as ocp
    from etils import epath

    quiet_orbax()
    wanted, path = stored(part, shapes), epath.Path(item.absolute())
    to_host = ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.dtype("float32"))
    args = ocp.args.PyTreeRestore(
        item={"params": unflatten_dict(wanted)},
        restore_args={"params": unflatten_dict(dict.fromkeys(wanted, to_host))},
        partial_restore=True,
    )
    # The handler alone waits for no other process: each fills its own cache.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        with _whole():
            tree: Any = handler.metadata(path).tree
            found: Any = flatten_dict(dict(tree)["params"])
            found = {key: (tuple(one.shape), np.dtype(one.dtype)) for key, one in found.items()}
        check_stored(wanted, found)
        with _whole():
            values = flatten_dict(handler.restore(path, args=args)["params"])
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[key] for key in wanted])


def _tokenizer_folder(step: pathlib.Path, part: str) -> pathlib.Path:
    """Where a tokenizer lies: beside the steps, or where the checkpoint says."""
    named, roots = read_json(_item(step, "tokenizer")).get("path"), [step.parent]
    if isinstance(named, str) and not (step.parent / "tokenizer").is_dir():
        if is_hub_name(named):
            found = find_model(named)
            names = ("tokenizer", "tokenizer_2")
            found.fetch([f"{name}/{file}" for name in names for file in ("*.json", "merges.txt")])
            roots.append(found.folder)
        elif os.path.isdir(named):
            roots.append(pathlib.Path(named))
    # SDXL's second pads in its own way. maxdiffusion itself takes the first for both.
    for folder in (root / name for name in (part, "tokenizer", ".") for root in roots):
        if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
            check_folder(folder)
            check_digests(folder)
            return folder
    raise ValueError(
        f"{step} names its tokenizer as {shown(repr(named))}, which is no folder here and no name "
        "on the hub that has one: put the folder `tokenizer` of its pipeline beside the step, in "
        f"{step.parent}."
    )


@contextlib.contextmanager
def _scratch(cache: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder in the cache, that is gone after the block or has been renamed."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        new = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix="."))
    except OSError as error:
        raise ValueError(
            f"{cache}, where checkpoints are converted, cannot be written: {error.strerror}. Set "
            "XDG_CACHE_HOME to another folder."
        ) from error
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _take_place(new: pathlib.Path, folder: pathlib.Path) -> None:
    try:
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # Where there is one, another process was quicker.
            raise


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Makes one line of what the system says against reading."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from error


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Makes one line of what Orbax raises, which is whatever it trips over in what is damaged."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"no train state with params can be read: {type(error).__name__}: {shown(first)}"
        ) from error
