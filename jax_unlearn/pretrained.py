"""Reading and writing diffusers' folders, without torch.

A pipeline folder holds `model_index.json`, `unet/` (`config.json` and safetensors) and
`scheduler/`; the first released models keep all of it in one folder. `load_pretrained` reads
both, and `save_pretrained` writes the former, which torch users open with
`DDPMPipeline.from_pretrained`.
"""

import dataclasses
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes  # Also names bfloat16 for NumPy, without which safetensors cannot return it.
import numpy as np
import safetensors
import safetensors.numpy

from jax_unlearn.models.unet_2d import UNet2DConfig, UNet2DModel, param_shapes
from jax_unlearn.schedules import NoiseSchedule, from_diffusers
from jax_unlearn.typing import Array, Condition, Params

__all__ = [
    "Pretrained",
    "PretrainedConfig",
    "UNet2DDenoiser",
    "diffusers_key",
    "load_pretrained",
    "relabelled",
    "save_pretrained",
]

_WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
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
    index = _read_json(folder / "model_index.json") if _exists(folder, "model_index.json") else {}
    _check_pipeline(index, folder)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    unet = _read_json(unet_folder / "config.json")
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
    params = _read_params(network, _weight_files(unet_folder, variant))
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
    target = pathlib.Path(path).absolute()
    if os.path.lexists(target):
        if not overwrite:
            raise ValueError(f"{path} exists: choose another folder, or pass overwrite=True.")
        if not (_exists(target, "model_index.json") or _exists(target, "config.json")):
            raise ValueError(f"{path} exists and holds no model: it is not overwritten.")
    config = pretrained.config
    network = UNet2DConfig.from_diffusers(config.unet)
    tensors = _tensors(network, pretrained.params)
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

    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    new, old = (target.with_name(f".{target.name}.{state}-{mark}") for state in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        (new / "unet").mkdir(parents=True)
        (new / "scheduler").mkdir()
        _write_json(new / "model_index.json", index)
        _write_json(new / "unet" / "config.json", names | config.unet)
        _write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        weights = new / "unet" / f"{_WEIGHTS}.safetensors"
        safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
        # safetensors makes it readable to its owner only.
        weights.chmod((new / "unet" / "config.json").stat().st_mode)
        if os.path.lexists(target):
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
        else:
            new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if os.path.lexists(old):
        shutil.rmtree(old)


def diffusers_key(path: tuple[str, ...]) -> str:
    """The name of a parameter in a diffusers checkpoint.

    Example:
      >>> diffusers_key(("down_blocks_0", "resnets_1", "conv1", "kernel"))
      'down_blocks.0.resnets.1.conv1.weight'
    """
    lists = r"(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|to_out)_(\d+)"
    modules = [re.sub(f"^{lists}$", r"\1.\2", name) for name in path[:-1]]
    return ".".join([*modules, "bias" if path[-1] == "bias" else "weight"])


def _exists(folder: pathlib.Path, name: str) -> bool:
    return (folder / name).is_file()


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


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: is it a diffusers model?") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no readable json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a json object, not a {type(content).__name__}.")
    return content


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
        if _exists(place, "scheduler_config.json"):
            scheduler = _read_json(place / "scheduler_config.json")
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


def _weight_files(folder: pathlib.Path, variant: str | None) -> list[pathlib.Path]:
    """The safetensors of one variant: a file, or the shards that an index lists."""
    single = re.compile(rf"{_WEIGHTS}(?:\.([\w-]+))?\.safetensors")
    shards = re.compile(rf"{_WEIGHTS}(?:\.([\w-]+))?\.safetensors\.index(?:\.([\w-]+))?\.json")
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
            raise ValueError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code and are "
                'not read. Convert them where torch is: python -c "from diffusers import '
                f"UNet2DModel as U; U.from_pretrained('{folder}', use_safetensors=False)"
                ".save_pretrained('CONVERTED')\""
            )
        raise ValueError(f"{folder} has no {_WEIGHTS}.safetensors.")
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
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from names to files.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if pathlib.PurePath(name).name != name or not _exists(folder, name):
            raise ValueError(f"{path} lists {name!r}, which is not a file beside it.")
    return [folder / name for name in names]


def _describe(problems: Mapping[str, list[str]]) -> str:
    """The first few of every kind of problem, and how many there are."""
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    )


def _read_tensors(files: list[pathlib.Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the files, one in memory at a time."""
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)
        except (safetensors.SafetensorError, OSError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def _leaves(config: UNet2DConfig) -> tuple[dict[str, jax.ShapeDtypeStruct], Any]:
    """The parameters by diffusers' names, in the order of the tree, and the tree."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    return {diffusers_key(tuple(part.key for part in path)): leaf for path, leaf in leaves}, tree


def _is_kernel(key: str, shape: tuple[int, ...]) -> bool:
    """Whether torch has the axes in another order: every tensor but vectors and label tables."""
    return len(shape) == 4 or (len(shape) == 2 and key != "class_embedding.weight")


def _read_params(config: UNet2DConfig, files: list[pathlib.Path]) -> Params:
    """Fills every parameter with a tensor, and uses every tensor."""
    expected, tree = _leaves(config)
    old_names = {}
    for key in expected:
        for new, old in _OLD_ATTENTION.items():
            if ".attentions." in key and f".{new}." in key:
                old_names[key.replace(f".{new}.", f".{old}.")] = key
    params: dict[str, Array] = {}
    extra, misshapen, doubled = [], [], []
    for name, values in _read_tensors(files):
        key = old_names.get(name, name)
        if key not in expected:
            extra.append(name)
            continue
        if key in params:
            doubled.append(name)
            continue
        shape = expected[key].shape
        if values.dtype not in _FLOATS:
            raise ValueError(f"tensor {name} is of dtype {values.dtype}: expected a float.")
        if _is_kernel(key, shape):
            wanted = tuple(shape[i] for i in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))
        else:
            wanted = shape
        if values.shape != wanted:
            misshapen.append(f"{name} {list(values.shape)} instead of {list(wanted)}")
            continue
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name} holds values that are not finite.")
        if _is_kernel(key, shape):
            values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T
        params[key] = jnp.asarray(np.ascontiguousarray(values))
    where = files[0].parent
    bad = {name.partition(" ")[0] for name in misshapen}
    bad = {old_names.get(name, name) for name in bad}
    missing = [key for key in expected if key not in params and key not in bad]
    problems = {
        "missing": missing,
        "of no parameter": sorted(extra),
        "misshapen": misshapen,
        "given twice": doubled,
    }
    if any(problems.values()):
        raise ValueError(f"tensors in {where} do not fit its config.json: {_describe(problems)}.")
    return jax.tree.unflatten(tree, [params[key] for key in expected])


def _tensors(config: UNet2DConfig, params: Params) -> dict[str, np.ndarray]:
    """The parameters as diffusers names and lays them out."""
    expected, _ = _leaves(config)
    given = {
        diffusers_key(tuple(str(getattr(part, "key", part)) for part in path)): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    problems = {
        "missing": [key for key in expected if key not in given],
        "not of this network": [key for key in given if key not in expected],
        "misshapen": [
            f"{key} {list(given[key].shape)} instead of {list(leaf.shape)}"
            for key, leaf in expected.items()
            if key in given and given[key].shape != leaf.shape
        ],
        "not finite": [key for key, values in given.items() if not np.isfinite(values).all()],
    }
    if any(problems.values()):
        raise ValueError(f"these parameters cannot be saved: {_describe(problems)}.")
    tensors = {}
    for key in expected:
        values = given[key].astype(np.float32)
        if _is_kernel(key, values.shape):
            values = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values.T
        tensors[key] = np.ascontiguousarray(values)
    return tensors
