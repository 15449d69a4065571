"""Pipelines from text to image: prompts to conditions, and images to latents and back.

A loaded `TextToImage` holds the denoiser as `pretrained`, which works on latents and is
conditioned on encoded prompts. Encode prompts once and keep what comes of it: the text encoders
are then no longer needed.
"""

import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models.autoencoder_kl import AutoencoderKL, Gaussian, sample_latents
from jax_unlearn.models.clip_text import CLIPTextModel, TextEncoding
from jax_unlearn.models.files import read_json
from jax_unlearn.pretrained.clip_tokenizer import CLIPTokenizer, read_tokenizer
from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import find_model
from jax_unlearn.pretrained.networks import Network, read_network
from jax_unlearn.pretrained.unet import TEXT_TO_IMAGE, Pretrained, load_denoiser, unet_folder
from jax_unlearn.typing import Array, Condition, Params

__all__ = [
    "TextToImage",
    "decode_latents",
    "encode_images",
    "encode_prompts",
    "is_text_to_image",
    "load_text_to_image",
]


class TextToImage(NamedTuple):
    """A pipeline from text to image.

    Attributes:
      pretrained: the denoiser, on latents of `pretrained.config.sample_shape`.
      tokenizers: of each text encoder.
      text_encoders: one, or SDXL's two.
      vae: the autoencoder, an `AutoencoderKL`.
    """

    pretrained: Pretrained
    tokenizers: tuple[CLIPTokenizer, ...]
    text_encoders: tuple[Network, ...]
    vae: Network

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image, in pixels."""
        height, width, _ = self.pretrained.config.sample_shape
        config = self.vae.module.config
        return height * config.factor, width * config.factor, config.out_channels


def is_text_to_image(path_or_name: str | os.PathLike[str], *, revision: str | None = None) -> bool:
    """Whether a folder or hub name is a model from text to image.

    That is a pipeline that `load_text_to_image` takes, or the `UNet2DConditionModel` of one alone.
    For the latter `load_text_to_image` says what is missing. `revision` is as there.

    Raises:
      ValueError: if there is no such model, or its json is malformed.
    """
    folder = find_model(path_or_name, revision).folder
    index, network = folder / "model_index.json", unet_folder(folder) / "config.json"
    if index.is_file():
        return read_json(index).get("_class_name") in list(TEXT_TO_IMAGE)
    return network.is_file() and read_json(network).get("_class_name") == "UNet2DConditionModel"


def load_text_to_image(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    variant: str | None = None,
    remat: bool = False,
    revision: str | None = None,
) -> TextToImage:
    """Loads a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, without torch.

    Args:
      path_or_name: a pipeline folder, or `owner/name` on the Hugging Face hub, of which only
        json, safetensors and the tokenizers' merges are fetched.
      dtype: computing dtype of the denoiser; the encoders compute in float32.
      variant: which of several sets of the denoiser's weights, e.g. "fp16"; of the other parts the
        unnamed ones, or the only ones, are taken.
      remat: compute the denoiser's blocks again in backward passes, as `load_pretrained`.
      revision: branch, tag or commit of a model on the hub; None is its main branch.

    Returns:
      The pipeline; all parameters are float32.

    Raises:
      ValueError: as `load_pretrained`, if the model is not one from text to image, or if its parts
        do not fit one another.
    """
    found = find_model(path_or_name, revision)
    folder = found.folder
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{os.fspath(path_or_name)} has no model_index.json, so nothing that encodes prompts "
            f"and images: expected the folder of one of {', '.join(TEXT_TO_IMAGE)}. A UNet alone "
            "is for load_pretrained, and takes prompts that are encoded."
        )
    pretrained = load_denoiser(
        found,
        os.fspath(path_or_name),
        dtype=dtype,
        variant=variant,
        remat=remat,
        revision=revision,
    )
    kind = pretrained.config.pipeline.get("_class_name")
    if kind not in TEXT_TO_IMAGE:
        raise ValueError(
            f"{os.fspath(path_or_name)} is not conditioned on text: expected one of "
            f"{', '.join(TEXT_TO_IMAGE)}."
        )
    parts = [part for part in TEXT_TO_IMAGE[kind] if part != "unet"]
    found.fetch([f"{part}/{files}" for part in parts for files in ("*.safetensors", "merges.txt")])
    check_digests(folder, parts)
    # "text_encoder" before "text_encoder_2", whose hidden states are joined in this order.
    tokenizers = [read_tokenizer(folder / part) for part in parts if part[:5] == "token"]
    encoders = [_part(folder / part, CLIPTextModel) for part in parts if part[:5] == "text_"]
    model = TextToImage(
        pretrained,
        tuple(map(_fitted, tokenizers, encoders)),
        tuple(encoders),
        _part(folder / "vae", AutoencoderKL),
    )
    _check_widths(model, os.fspath(path_or_name))
    return model


def encode_prompts(
    model: TextToImage,
    prompts: Sequence[str | None],
    *,
    image_size: tuple[int, int] | None = None,
) -> Condition:
    """What the denoiser is conditioned on, as diffusers' pipelines make it of prompts.

    Args:
      model: a pipeline.
      prompts: B texts. None is no prompt, the free branch of classifier-free guidance: the empty
        text or, where the pipeline says `force_zeros_for_empty_prompt`, zeros.
      image_size: (height, width) in pixels that SDXL is told, as an image that was neither
        resized nor cropped; default `model.image_shape`. Other models are not told.

    Returns:
      Hidden states of the text [B, N, D]; for SDXL a dict of these as `encoder_hidden_states`,
      `text_embeds` [B, P] and `time_ids` [B, 6].

    Raises:
      ValueError: if a prompt is too long, or if `prompts` is one text instead of several.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of texts: pass [{prompts!r}].")
    texts = ["" if prompt is None else prompt for prompt in prompts]
    two = len(model.text_encoders) == 2
    encodings = [
        _encode_tokens(network.module, two, network.params, tokenizer(texts))
        for tokenizer, network in zip(model.tokenizers, model.text_encoders, strict=True)
    ]
    hidden = jnp.concatenate([encoding.hidden_states for encoding in encodings], axis=-1)
    if not two:
        return hidden
    pooled = encodings[-1].pooled
    if model.pretrained.config.pipeline.get("force_zeros_for_empty_prompt", True):
        given = jnp.asarray([prompt is not None for prompt in prompts])
        hidden = jnp.where(given[:, None, None], hidden, 0.0)
        pooled = jnp.where(given[:, None], pooled, 0.0)
    height, width = image_size or model.image_shape[:2]
    time_ids = jnp.tile(
        jnp.array([height, width, 0, 0, height, width], jnp.float32), (len(texts), 1)
    )
    return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": time_ids}


def encode_images(model: TextToImage, images: Array, key: Array | None = None) -> Array:
    """Latents of images: s (μ + exp(log σ² / 2) ε), s the autoencoder's `scaling_factor`.

    Args:
      model: a pipeline.
      images: [B, H, W, 3] in [-1, 1]; H and W multiples of the autoencoder's `factor`.
      key: of ε, standard normal; None takes ε = 0.

    Returns:
      [B, H / factor, W / factor, C], what the denoiser was trained on.

    Raises:
      ValueError: for images of another shape.
    """
    posterior = _encode_images(model.vae.module, model.vae.params, images)
    latents = posterior.mean if key is None else sample_latents(key, posterior)
    return model.vae.module.config.scaling_factor * latents


def decode_latents(model: TextToImage, latents: Array) -> Array:
    """Images [B, H, W, 3], about in [-1, 1], of latents as the denoiser has them.

    Raises:
      ValueError: for latents of another shape.
    """
    scaled = latents / model.vae.module.config.scaling_factor
    return _decode_latents(model.vae.module, model.vae.params, scaled)


@partial(jax.jit, static_argnums=(0, 1))
def _encode_tokens(
    module: nn.Module, penultimate: bool, params: Params, tokens: Array
) -> TextEncoding:
    options = {"skip": int(penultimate), "final_norm": not penultimate}
    return cast(TextEncoding, module.apply({"params": params}, tokens, **options))


@partial(jax.jit, static_argnums=0)
def _encode_images(module: nn.Module, params: Params, images: Array) -> Gaussian:
    return cast(Gaussian, module.apply({"params": params}, images, method="encode"))


@partial(jax.jit, static_argnums=0)
def _decode_latents(module: nn.Module, params: Params, latents: Array) -> Array:
    return cast(Array, module.apply({"params": params}, latents, method="decode"))


def _part(folder: pathlib.Path, kind: type[nn.Module]) -> Network:
    """The network in a folder; ValueError if it is of another kind."""
    network = read_network(folder)
    if not isinstance(network.module, kind):
        found = type(network.module).__name__
        raise ValueError(f"{folder} holds a network {found}: expected {kind.__name__}.")
    return network


def _fitted(tokenizer: CLIPTokenizer, encoder: Network) -> CLIPTokenizer:
    """A tokenizer whose prompts are no longer than the text encoder takes."""
    config: Any = encoder.module.config
    return tokenizer._replace(length=min(tokenizer.length, config.max_position_embeddings))


def _check_widths(model: TextToImage, name: str) -> None:
    """What one part hands to another must be as wide as that takes, or it would fail late."""
    unet: Any = model.pretrained.apply
    encoders = [network.module.config for network in model.text_encoders]
    pairs = {
        "channels of the latents": (
            model.vae.module.config.latent_channels,
            unet.config.in_channels,
        ),
        "channels of the encoded text": (
            sum(encoder.hidden_size for encoder in encoders),
            unet.config.context_dim,
        ),
    }
    if len(encoders) == 2:
        last = encoders[-1]
        pooled = last.projection_dim if last.with_projection else last.hidden_size
        pairs["values of the pooled text and the sizes"] = (
            pooled + 6 * (unet.config.addition_time_embed_dim or 0),
            unet.config.projection_class_embeddings_input_dim,
        )
    pairs["embeddings of sizes"] = (
        "text_time" if len(encoders) == 2 else None,
        unet.config.addition_embed_type,
    )
    for what, (made, taken) in pairs.items():
        if made != taken:
            raise ValueError(f"{name}: the encoders make {made} {what}, the unet takes {taken}.")
