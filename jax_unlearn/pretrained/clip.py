"""CLIP: how well images fit texts, by the angle between their embeddings.

Two networks map images and texts to unit vectors in one space. Their cosines score generated
images against prompts, classify images by prompts without training, and the images' vectors are a
feature space for the distances of `jax_unlearn.metrics`.

References:
  Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
  Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning, 2021.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn.models import clip_text, clip_vision
from jax_unlearn.models.clip_encoder import NEUTRAL
from jax_unlearn.models.clip_text import CLIPTextConfig, CLIPTextModel
from jax_unlearn.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from jax_unlearn.models.config import is_number, listed_class, read_options
from jax_unlearn.models.files import read_json, shown
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained.clip_tokenizer import CLIPTokenizer, read_tokenizer
from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import find_model
from jax_unlearn.pretrained.networks import Network
from jax_unlearn.pretrained.weights import read_params, weight_files
from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = ["CLIP", "clip_score", "embed_images", "embed_texts", "load_clip", "zero_shot"]


class CLIP(NamedTuple):
    """Both towers, and what their inputs and outputs go through.

    Attributes:
      text: a `CLIPTextModelWithProjection`.
      vision: a `CLIPVisionModelWithProjection`, to the same number of values P.
      logit_scale: log of the factor of the cosines in the logits, a scalar.
      tokenizer: of the prompts.
      mean: of each channel of pixels in [0, 1], subtracted.
      std: of each channel, divided by.
    """

    text: Network
    vision: Network
    logit_scale: Array
    tokenizer: CLIPTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class _Options:
    """The keys of a `CLIPModel`'s config.json.

    The `..._dict` are of old files, where they win over the others.
    """

    text_config: Any = None
    vision_config: Any = None
    text_config_dict: Any = None
    vision_config_dict: Any = None
    projection_dim: Any = 512


def load_clip(
    path_or_name: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> CLIP:
    """Loads transformers' `CLIPModel`, without torch.

    Pixels are normalised as `preprocessor_config.json` says, or the `processor_config.json` of
    transformers 5. Without either, mean and standard deviation are 0.5: images in [-1, 1] enter
    as they are.

    Args:
      path_or_name: a folder, or `owner/name` on the Hugging Face hub, of which only json,
        safetensors and the tokenizer's merges are fetched.
      tokenizer: folder or name of the tokenizer; None is `path_or_name`.

    Returns:
      The model, its parameters in float32.

    Raises:
      ValueError: if there is no such model, if it is of another class, lacks a tower or needs an
        option or a treatment of images that is not supported, if its weights do not fit, see
        `load_network`, or if the tokenizer is not that of the text tower.
    """
    folder, fetch, _ = find_model(path_or_name)
    check_digests(folder, ())
    path = folder / "config.json"
    raw = read_json(path)
    try:
        sections = _sections(raw)
        text = CLIPTextConfig.from_transformers(sections["text"])
        vision = CLIPVisionConfig.from_transformers(sections["vision"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    mean, std = _normalisation(folder, vision)
    fetch(["model*.safetensors", "merges.txt"])
    check_digests(folder, ())
    tokenize = _load_tokenizer(folder, tokenizer, text)
    text_shapes, vision_shapes = clip_text.param_shapes(text), clip_vision.param_shapes(vision)
    scale = {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}
    files = weight_files(folder, "model", torch_class="transformers.CLIPModel")
    params = read_params({**text_shapes, **vision_shapes, **scale}, files)
    return CLIP(
        Network(
            CLIPTextModel(text), {name: params[name] for name in text_shapes}, sections["text"]
        ),
        Network(
            CLIPVisionModel(vision),
            {name: params[name] for name in vision_shapes},
            sections["vision"],
        ),
        params["logit_scale"],
        tokenize,
        mean,
        std,
    )


def embed_images(clip: CLIP, images: ArrayLike) -> Array:
    """The unit vectors of images.

    Images of another size are first resized so that their shorter side is the network's
    `image_size`, by bicubic interpolation that is antialiased where it shrinks, clipped to
    [-1, 1], and the middle square is taken, as CLIP's own preprocessing does up to its rounding
    to 8 bits.

    A call holds the activations of its whole batch in memory: give thousands of images in
    batches. It compiles once a shape.

    Args:
      clip: the model.
      images: floats [n, height, width, 3] in [-1, 1].

    Returns:
      [n, P], float32.

    Raises:
      ValueError: for images of another shape, or integers.
    """
    images = jnp.asarray(images)
    channels = clip.vision.module.config.num_channels
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape[1:3]:
        raise ValueError(
            f"this CLIP takes images [n, height, width, {channels}], not {images.shape}."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats in [-1, 1], not {images.dtype}.")
    images = images.astype(jnp.float32)
    return _embed_images(clip.vision.module, clip.mean, clip.std, clip.vision.params, images)


def embed_texts(clip: CLIP, prompts: Sequence[str]) -> Array:
    """The unit vectors of texts.

    Args:
      clip: the model.
      prompts: n texts.

    Returns:
      [n, P], float32.

    Raises:
      ValueError: if a prompt is too long, or if `prompts` is one text instead of several, or none.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of texts: pass [{prompts!r}].")
    if not len(prompts):
        raise ValueError("no prompts are given.")
    return _embed_tokens(clip.text.module, clip.text.params, clip.tokenizer(prompts))


def clip_score(clip: CLIP, images: ArrayLike, prompts: Sequence[str]) -> Array:
    """100 max(cos(image, prompt), 0) of each image and its own prompt.

    Hessel et al. have the factor 2.5; 100 is that of torchmetrics, which clips at 0 only after
    taking the mean.

    Args:
      clip: the model.
      images: [n, height, width, 3] in [-1, 1].
      prompts: n texts.

    Returns:
      [n], from 0 to 100.

    Raises:
      ValueError: as `embed_images` and `embed_texts`, or if the numbers of images and prompts
        differ.
    """
    images = jnp.asarray(images)
    if not isinstance(prompts, str) and len(images) != len(prompts):
        raise ValueError(
            f"every image needs a prompt: there are {len(images)} images and {len(prompts)} "
            "prompts."
        )
    texts = embed_texts(clip, prompts)
    return 100 * jnp.maximum((embed_images(clip, images) * texts).sum(-1), 0)


def zero_shot(clip: CLIP, prompts: Sequence[str]) -> JudgeFunctions:
    """A judge that names the prompt which fits an image best.

    Args:
      clip: the model.
      prompts: one a label, e.g. "a photo of a cat".

    Returns:
      logits: images -> exp(logit_scale) cos(image, prompt), [n, number of prompts];
      features: images -> `embed_images`, [n, P].

    Raises:
      ValueError: as `embed_texts`; the functions as `embed_images`.
    """
    texts = embed_texts(clip, prompts)

    def logits(images: ArrayLike) -> Array:
        return _logits(clip.logit_scale, embed_images(clip, images), texts)

    return JudgeFunctions(logits=logits, features=partial(embed_images, clip))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_images(
    module: Any, mean: tuple[float, ...], std: tuple[float, ...], params: Params, images: Array
) -> Array:
    pixels = (_square(images, module.config.image_size) + 1) / 2
    pixels = (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    return _unit(module.apply({"params": params}, pixels).pooled)


@partial(jax.jit, static_argnums=0)
def _embed_tokens(module: Any, params: Params, tokens: ArrayLike) -> Array:
    return _unit(module.apply({"params": params}, tokens).pooled)


@jax.jit
def _logits(logit_scale: Array, images: Array, texts: Array) -> Array:
    return jnp.exp(logit_scale) * images @ texts.T


def _unit(vectors: Array) -> Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _square(images: Array, size: int) -> Array:
    """The middle size×size pixels of the images, resized to `size` on their shorter side."""
    n, height, width, channels = images.shape
    if height == width == size:
        return images
    short = min(height, width)
    height, width = size * height // short, size * width // short
    images = jax.image.resize(images, (n, height, width, channels), "bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return jnp.clip(images[:, top : top + size, left : left + size], -1, 1)


def _sections(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config.json of each tower as a model of its own, with its projection."""
    name = listed_class(raw)
    if name != "CLIPModel":
        raise ValueError(f"is of class {shown(repr(name))}: expected 'CLIPModel'.")
    neutral = (*NEUTRAL, "logit_scale_init_value")
    options = _Options(**read_options(_Options, raw, name="CLIPModel", neutral=neutral))
    sections = {}
    for tower, config in (("text", CLIPTextConfig), ("vision", CLIPVisionConfig)):
        old = getattr(options, f"{tower}_config_dict")
        section = getattr(options, f"{tower}_config") if old is None else old
        if not isinstance(section, dict):
            raise ValueError(
                f"{tower}_config is no object, but {shown(repr(section))}: the tower is missing."
            )
        sections[tower] = section | {
            "architectures": [f"{config.network}WithProjection"],
            "projection_dim": options.projection_dim,
        }
    return sections


def _normalisation(
    folder: pathlib.Path, vision: CLIPVisionConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1]; ValueError for what is not supported."""
    path, options = folder / "processor_config.json", None
    if path.is_file():
        options = read_json(path).get("image_processor")
    if options is None:
        path = folder / "preprocessor_config.json"
        options = read_json(path) if path.is_file() else {"image_mean": [0.5], "image_std": [0.5]}
    if not isinstance(options, dict):
        raise ValueError(f"{path}: image_processor is no object, but {shown(repr(options))}.")
    side = vision.image_size
    allowed: dict[str, list[Any]] = {
        "size": [side, {"shortest_edge": side}],
        "crop_size": [side, {"height": side, "width": side}],
        "resample": [3],
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale"), [True]),
    }
    for name, values in allowed.items():
        if options.get(name) is not None and options[name] not in values:
            raise ValueError(
                f"{path}: {name} {shown(repr(options[name]))} is not supported: expected "
                f"{' or '.join(map(repr, values))}."
            )
    factor = options.get("rescale_factor", 1 / 255)
    if not is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(
            f"{path}: rescale_factor {shown(repr(factor))} is not supported: expected 1 / 255."
        )
    if not options.get("do_normalize", True):
        return (0.0,), (1.0,)
    moments = []
    for name in ("image_mean", "image_std"):
        values = options.get(name)
        if (
            not isinstance(values, list)
            or len(values) not in (1, vision.num_channels)
            or not all(is_number(value) for value in values)
            or (name == "image_std" and min(values) <= 0)
        ):
            raise ValueError(
                f"{path}: {name} must be a list of {vision.num_channels} numbers, those of "
                f"image_std positive, not {shown(repr(values))}."
            )
        moments.append(tuple(map(float, values)))
    return moments[0], moments[1]


def _load_tokenizer(
    folder: pathlib.Path, other: str | os.PathLike[str] | None, text: CLIPTextConfig
) -> CLIPTokenizer:
    """The tokenizer; ValueError if its tokens are not those that the text tower looks for."""
    if other is not None:
        folder, fetch, _ = find_model(other)
        fetch(["merges.txt"])
        check_digests(folder, ())
    tokenizer = read_tokenizer(folder)
    most = max(tokenizer.bpe.get_vocab().values())
    # 2 means the highest token, see CLIPTextConfig.
    end = most if text.eos_token_id == 2 else text.eos_token_id
    if most >= text.vocab_size or tokenizer.end != end:
        raise ValueError(
            f"the tokenizer in {folder} ends prompts with token {tokenizer.end} of {most + 1}, the "
            f"text tower expects {end} of {text.vocab_size}: pass its own tokenizer."
        )
    # Without a length of its own, the tokenizer has that of the released models.
    return tokenizer._replace(length=min(tokenizer.length, text.max_position_embeddings))
