"""Distances and shares of samples, fronts of two costs; feature extractors are arguments."""

from jax_unlearn.metrics.copies import CopyThreshold, copy_threshold, nearest_distances
from jax_unlearn.metrics.coverage import Coverage, coverage
from jax_unlearn.metrics.fid import frechet_distance
from jax_unlearn.metrics.fronts import hypervolume, pareto_front
from jax_unlearn.metrics.intervals import Interval, binomial_interval, mean_interval
from jax_unlearn.metrics.kid import kernel_distance
from jax_unlearn.metrics.membership import Membership, membership
from jax_unlearn.metrics.proportion import proportion
from jax_unlearn.metrics.similarity import cosine_similarity, nearest_neighbours, reconstruct
from jax_unlearn.metrics.summaries import harmonic_mean

__all__ = [
    "CopyThreshold",
    "Coverage",
    "Interval",
    "Membership",
    "binomial_interval",
    "copy_threshold",
    "cosine_similarity",
    "coverage",
    "frechet_distance",
    "harmonic_mean",
    "hypervolume",
    "kernel_distance",
    "mean_interval",
    "membership",
    "nearest_distances",
    "nearest_neighbours",
    "pareto_front",
    "proportion",
    "reconstruct",
]
