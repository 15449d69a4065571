"""Diffusers folders as pure functions and parameters, and back, without torch."""

from jax_unlearn.pretrained.clip import (
    CLIP,
    clip_score,
    embed_images,
    embed_texts,
    load_clip,
    zero_shot,
)
from jax_unlearn.pretrained.maxdiffusion import save_maxdiffusion
from jax_unlearn.pretrained.saving import save_pretrained, save_unet
from jax_unlearn.pretrained.text_to_image import (
    TextToImage,
    decode_latents,
    encode_images,
    encode_prompts,
    load_text_to_image,
)
from jax_unlearn.pretrained.unet import (
    Pretrained,
    PretrainedConfig,
    UNet2DDenoiser,
    load_pretrained,
    relabelled,
)

__all__ = [
    "CLIP",
    "Pretrained",
    "PretrainedConfig",
    "TextToImage",
    "UNet2DDenoiser",
    "clip_score",
    "decode_latents",
    "embed_images",
    "embed_texts",
    "encode_images",
    "encode_prompts",
    "load_clip",
    "load_pretrained",
    "load_text_to_image",
    "relabelled",
    "save_maxdiffusion",
    "save_pretrained",
    "save_unet",
    "zero_shot",
]
