"""Constrained unlearning for diffusion models in JAX (arXiv 2605.30825).

The core is here at once, and needs jax, optax and numpy alone. What loads networks is imported
when it is first asked for: `jax_unlearn.load_pretrained(...)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_unlearn import (
    attacks,
    baselines,
    divergences,
    duality,
    formulations,
    likelihoods,
    losses,
    metrics,
    mixtures,
    multipliers,
    quantification,
    samplers,
    schedules,
    sharding,
    sweep,
)
from jax_unlearn.accumulated import accumulated
from jax_unlearn.formulations import (
    distill_likelihood,
    distill_posterior,
    distill_reverse_kl,
    forward_kl,
    likelihood,
    mixed,
    reverse_kl,
)
from jax_unlearn.minibatched import minibatched
from jax_unlearn.primal_dual import (
    PrimalDual,
    PrimalDualInfo,
    PrimalDualState,
    certificate,
    primal_dual,
)
from jax_unlearn.problem import (
    Batch,
    Conditions,
    Images,
    Losses,
    NoisyPoints,
    Problem,
    Samples,
    TrajectoryPoints,
    lagrangian,
    violations,
)
from jax_unlearn.schedules import NoiseSchedule

if TYPE_CHECKING:
    from jax_unlearn.pretrained import (
        CLIP,
        Pretrained,
        TextToImage,
        clip_score,
        decode_latents,
        embed_images,
        embed_texts,
        encode_images,
        encode_prompts,
        load_clip,
        load_pretrained,
        load_text_to_image,
        save_pretrained,
        zero_shot,
    )

__version__ = "0.8.0"

_LAZY = (
    "CLIP",
    "Pretrained",
    "TextToImage",
    "clip_score",
    "decode_latents",
    "embed_images",
    "embed_texts",
    "encode_images",
    "encode_prompts",
    "load_clip",
    "load_pretrained",
    "load_text_to_image",
    "save_pretrained",
    "zero_shot",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("jax_unlearn.pretrained"), name)
    if name in ("app", "models", "pretrained"):
        return importlib.import_module(f"jax_unlearn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
