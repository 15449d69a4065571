"""Distances and shares of samples; feature extractors are arguments."""

from jax_unlearn.metrics.fid import frechet_distance
from jax_unlearn.metrics.kid import kernel_distance
from jax_unlearn.metrics.proportion import proportion
from jax_unlearn.metrics.similarity import cosine_similarity, nearest_neighbours, reconstruct

__all__ = [
    "cosine_similarity",
    "frechet_distance",
    "kernel_distance",
    "nearest_neighbours",
    "proportion",
    "reconstruct",
]
