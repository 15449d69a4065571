"""Constrained unlearning for diffusion models in JAX (arXiv 2605.30825)."""

__version__ = "0.1.0"

from jax_unlearn.formulations import Batch, Examples, Forget, Formulation, forward_kl
from jax_unlearn.pretrained import Pretrained, load_pretrained, save_pretrained
from jax_unlearn.primal_dual import (
    PrimalDual,
    PrimalDualInfo,
    PrimalDualState,
    certificate,
    primal_dual,
)
from jax_unlearn.schedules import NoiseSchedule

__all__ = [
    "Batch",
    "Examples",
    "Forget",
    "Formulation",
    "NoiseSchedule",
    "Pretrained",
    "PrimalDual",
    "PrimalDualInfo",
    "PrimalDualState",
    "certificate",
    "forward_kl",
    "load_pretrained",
    "primal_dual",
    "save_pretrained",
]
