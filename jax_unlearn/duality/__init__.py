"""The exact side of constrained unlearning: closed forms, dual problems, composed denoisers."""

from jax_unlearn.duality.closed_forms import (
    dual_forward_kl,
    dual_likelihood,
    dual_reverse_kl,
    tilt_forward_kl,
    tilt_likelihood,
    tilt_reverse_kl,
)
from jax_unlearn.duality.compositions import (
    compose_forward_kl,
    compose_likelihood,
    compose_reverse_kl,
)
from jax_unlearn.duality.floors import Floor, likelihood_floor, reverse_kl_floor
from jax_unlearn.duality.solutions import (
    DualSolution,
    solve_forward_kl,
    solve_likelihood,
    solve_mixed,
    solve_reverse_kl,
)
from jax_unlearn.duality.stored_samples import (
    SampledSolution,
    likelihood_multipliers,
    likelihood_solver,
    reverse_kl_multipliers,
)

__all__ = [
    "DualSolution",
    "Floor",
    "SampledSolution",
    "compose_forward_kl",
    "compose_likelihood",
    "compose_reverse_kl",
    "dual_forward_kl",
    "dual_likelihood",
    "dual_reverse_kl",
    "likelihood_floor",
    "likelihood_multipliers",
    "likelihood_solver",
    "reverse_kl_floor",
    "reverse_kl_multipliers",
    "solve_forward_kl",
    "solve_likelihood",
    "solve_mixed",
    "solve_reverse_kl",
    "tilt_forward_kl",
    "tilt_likelihood",
    "tilt_reverse_kl",
]
