"""Constrained unlearning for diffusion models in JAX (arXiv 2605.30825)."""

__version__ = "0.1.0"

from jax_unlearn.clip import (
    CLIP,
    clip_score,
    embed_images,
    embed_texts,
    load_clip,
    zero_shot,
)
from jax_unlearn.formulations import (
    Batch,
    ConditionBatch,
    Examples,
    Forget,
    Formulation,
    Held,
    Points,
    PosteriorBatch,
    SampleBatch,
    Samples,
    Separated,
    forward_kl,
    likelihood,
    mixed,
    reverse_kl,
)
from jax_unlearn.pretrained import Pretrained, load_pretrained, save_pretrained
from jax_unlearn.primal_dual import (
    PrimalDual,
    PrimalDualInfo,
    PrimalDualState,
    certificate,
    primal_dual,
)
from jax_unlearn.schedules import NoiseSchedule
from jax_unlearn.text_to_image import (
    TextToImage,
    decode_latents,
    encode_images,
    encode_prompts,
    load_text_to_image,
)

__all__ = [
    "CLIP",
    "Batch",
    "ConditionBatch",
    "Examples",
    "Forget",
    "Formulation",
    "Held",
    "NoiseSchedule",
    "Pretrained",
    "PrimalDual",
    "PrimalDualInfo",
    "PrimalDualState",
    "Points",
    "PosteriorBatch",
    "SampleBatch",
    "Samples",
    "Separated",
    "TextToImage",
    "certificate",
    "clip_score",
    "decode_latents",
    "embed_images",
    "embed_texts",
    "encode_images",
    "encode_prompts",
    "forward_kl",
    "likelihood",
    "load_clip",
    "load_pretrained",
    "load_text_to_image",
    "mixed",
    "primal_dual",
    "reverse_kl",
    "save_pretrained",
    "zero_shot",
]
