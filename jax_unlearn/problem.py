"""What a formulation is: losses that a primal-dual algorithm balances.

A `Formulation` says how a batch is turned into objective and constraint losses, one value an
example, which side of its threshold a constraint must lie on, and where its multipliers live.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import multipliers
from jax_unlearn.typing import Array, ArrayLike, Condition

__all__ = ["Examples", "Formulation", "Losses"]


class Examples(NamedTuple):
    """Kept images [n, height, width, channels] in [−1, 1], and what each is shown under."""

    x_0: Any
    cond: Condition


class Losses(NamedTuple):
    """One value an example; the step takes their means.

    Attributes:
      objective: [n].
      constraint: values of the examples of the constraints, [f].
      index: the constraint of each of these, integer [f].
      diagnostics: scalars for the log.
    """

    objective: Array
    constraint: Array
    index: Array
    diagnostics: dict[str, Array]


Evaluate = Callable[..., Losses]
"""`Formulation.losses`."""


class Formulation(NamedTuple):
    """A constrained problem over network parameters: min objective s.t. violations ≤ 0.

    Attributes:
      losses: (params, reference, key, batch, axis_name, multipliers) -> Losses; differentiable
        in params. The multipliers, [m], are those before the dual step, for losses that they
        weight or shift; the step multiplies the constraints by them itself.
      sign: +1 where a constraint is value ≥ threshold, −1 where it is value ≤ threshold; one
        for all, or [m]. violation = sign · (threshold − value), feasible when ≤ 0.
      project: the projection onto the dual domain, [m] -> [m].
      balance: None, or ν: the constraints' part of the gradient is shortened to at most ν
        times the norm of the objective's part.
      name: as it stands in a report.
    """

    losses: Evaluate
    sign: float | Array
    project: multipliers.Projection
    balance: ArrayLike | None
    name: str


def psum(values: Array, axis_name: str | None) -> Array:
    """Σ over the devices that a batch is spread over, if it is."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def reach(constraint: Array, current: Array, rows: int, axis_name: str | None) -> Array:
    """λ_i N/N_i for the constraints of each row, the shape of `constraint`, [f, k] -> [f, k].

    In Σ_n f_n/N + Σ_i λ_i Σ_{n∈i} g_n/N_i each row's f_n meets λ_i N/N_i times its g_n: that
    is the multiplier of the problem of this row's condition alone. N counts all rows, N_i
    those of constraint i.
    """
    counts = psum(jnp.zeros_like(current).at[constraint].add(1.0), axis_name)
    total = psum(jnp.asarray(rows, current.dtype), axis_name)
    return (current * total / jnp.maximum(counts, 1.0))[constraint]
