"""Likelihoods of images under a diffusion model, in nats: of a concept, or of the image itself."""

from jax_unlearn.likelihoods.classifier import (
    Likelihood,
    concept_energies,
    count_concepts,
    diffusion_classifier,
    for_rows,
    log_odds,
    noised_weights,
)
from jax_unlearn.likelihoods.ode import log_likelihood, log_ratio
from jax_unlearn.likelihoods.path_ratios import path_log_ratios
from jax_unlearn.likelihoods.posteriors import (
    PosteriorPath,
    mixture_shares,
    path_times,
    path_weighting,
    posterior_path,
)
from jax_unlearn.likelihoods.rest import RestPath, rest_path

__all__ = [
    "Likelihood",
    "PosteriorPath",
    "RestPath",
    "concept_energies",
    "count_concepts",
    "diffusion_classifier",
    "for_rows",
    "log_likelihood",
    "log_odds",
    "log_ratio",
    "mixture_shares",
    "noised_weights",
    "path_log_ratios",
    "path_times",
    "path_weighting",
    "posterior_path",
    "rest_path",
]
