"""Attacks that try to bring back what a diffusion model forgot, as pure functions."""

from jax_unlearn.attacks.inversion import (
    Inversion,
    in_ball,
    invert,
    nearest_tokens,
    onto_vocabulary,
    straight_through,
)
from jax_unlearn.attacks.pool import RestartedAdamState, pool_of, restarted_adam
from jax_unlearn.attacks.sampling import guided_by, inpaint, invert_noise, stochastic
from jax_unlearn.attacks.weights import Relearning, RelearningState, relearning, rounded

__all__ = [
    "Inversion",
    "Relearning",
    "RelearningState",
    "RestartedAdamState",
    "guided_by",
    "in_ball",
    "inpaint",
    "invert",
    "invert_noise",
    "nearest_tokens",
    "onto_vocabulary",
    "pool_of",
    "relearning",
    "restarted_adam",
    "rounded",
    "stochastic",
    "straight_through",
]
