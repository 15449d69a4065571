"""Constrained formulations of unlearning: reverse KL, forward KL, likelihood, and mixed."""

from jax_unlearn.formulations.base import Examples, Formulation, Losses
from jax_unlearn.formulations.forward_kl import ESTIMATORS, Batch, Forget, forward_kl
from jax_unlearn.formulations.likelihood import likelihood
from jax_unlearn.formulations.mixed import mixed
from jax_unlearn.formulations.on_policy import ConditionBatch, Held, Separated, Stored
from jax_unlearn.formulations.posterior import Points, PosteriorBatch
from jax_unlearn.formulations.reverse_kl import reverse_kl
from jax_unlearn.formulations.tilt import SampleBatch, Samples

__all__ = [
    "ESTIMATORS",
    "Batch",
    "ConditionBatch",
    "Examples",
    "Forget",
    "Formulation",
    "Held",
    "Losses",
    "Points",
    "PosteriorBatch",
    "SampleBatch",
    "Samples",
    "Separated",
    "Stored",
    "forward_kl",
    "likelihood",
    "mixed",
    "reverse_kl",
]
