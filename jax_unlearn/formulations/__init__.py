"""Constrained formulations of unlearning, each a `Problem`.

| function | the model is sampled | rows to forget | |
|---|---|---|---|
| `forward_kl` | no | `Images` | KL(q_i‖p) ≥ b_i, q_i given by images |
| `reverse_kl` | at every step | `Conditions` | KL(p‖q_i) ≥ b_i |
| `likelihood` | at every step | `Conditions` | E_p[h_i] ≤ ε_i |
| `mixed` | at every step | `Conditions` | both kinds |
| `distill_reverse_kl` | no | `Samples` of q | the optimum of `reverse_kl`, by weighted denoising |
| `distill_likelihood` | no | `Samples` of q | the optimum of `likelihood`, by weighted denoising |
| `distill_posterior` | no | `NoisyPoints` of samples of q | the same, by regression on its score |
| `without` | no | `NoisyPoints` of what is forgotten | ‖ε_θ − ε̄_i‖² ≤ τ_i under any condition |

`robust` makes of each the problem whose constraints hold at the worst condition of a ball,
and `against_pool` at conditions that are trained against the model.
"""

from jax_unlearn.formulations.distill import (
    distill_likelihood,
    distill_posterior,
    distill_reverse_kl,
    sampled,
)
from jax_unlearn.formulations.forward_kl import forward_kl
from jax_unlearn.formulations.on_policy import likelihood, mixed, reverse_kl
from jax_unlearn.formulations.pooled import (
    AttackLoss,
    Pooled,
    against_pool,
    denoising_attack,
    optimizer_pair,
)
from jax_unlearn.formulations.robust import kept_starts, looked_up, robust, worst_conditions
from jax_unlearn.formulations.trajectories import sample_trajectories
from jax_unlearn.formulations.without import without

__all__ = [
    "AttackLoss",
    "Pooled",
    "against_pool",
    "denoising_attack",
    "distill_likelihood",
    "distill_posterior",
    "distill_reverse_kl",
    "forward_kl",
    "kept_starts",
    "likelihood",
    "looked_up",
    "mixed",
    "optimizer_pair",
    "reverse_kl",
    "robust",
    "sampled",
    "sample_trajectories",
    "without",
    "worst_conditions",
]
