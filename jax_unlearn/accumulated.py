"""A batch in parts, one after the other: the gradient of the whole in the memory of a part."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_unlearn.problem import Evaluate, Losses, Problem
from jax_unlearn.typing import Array, Params

__all__ = ["accumulated"]


def accumulated(problem: Problem, parts: int) -> Problem:
    """The same problem, whose losses are computed in parts of each batch.

    The losses of all rows are what the step sees, as ever: multipliers move by the violation of
    the whole batch, then the gradient is taken. Backward passes compute a part's activations
    again, which costs about a third more time. Each part draws noise by a key of its own. Weights
    that are normalised over a batch are normalised over its parts.

    Args:
      problem: whose batches are trees of arrays [rows, ...].
      parts: how many; each kind of rows must divide by it. Part i has the rows i, i + parts, …,
        so that rows stay on their devices.

    Returns:
      A problem with the same optimum.

    Raises:
      ValueError: for fewer than one part; when losses are traced, for rows that do not divide.

    Example: the losses of four rows in two parts.
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> from jax_unlearn.accumulated import accumulated
      >>> from jax_unlearn.problem import Losses, Problem
      >>> def losses(x, reference, key, batch, multipliers, *, axis_name=None):
      ...     return Losses(jnp.square(x - batch), x + batch, jnp.zeros(len(batch), int))
      >>> problem = Problem(losses, 1.0, multipliers.non_negative(), "near the data")
      >>> batch = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> found = accumulated(problem, 2).losses(0.0, None, jax.random.key(0), batch, None)
      >>> found.objective.tolist()
      [1.0, 9.0, 4.0, 16.0]
    """
    if parts < 1:
        raise ValueError(f"a batch has at least one part, not {parts}.")
    if parts == 1:
        return problem
    fresh = problem.fresh
    return problem._replace(
        losses=_in_parts(problem.losses, parts),
        fresh=None if fresh is None else _in_parts(fresh, parts),
    )


def _in_parts(evaluate: Evaluate, parts: int) -> Evaluate:
    def split(leaf: Any) -> Array:
        rows = leaf.shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows of a batch do not divide into {parts} parts.")
        return jnp.moveaxis(jnp.reshape(leaf, (rows // parts, parts, *leaf.shape[1:])), 1, 0)

    def losses(
        params: Params,
        reference: Params,
        key: Array,
        batch: Any,
        multipliers: Array,
        /,
        *,
        axis_name: str | None = None,
    ) -> Losses:
        @jax.checkpoint
        def one(part: tuple[Array, Any]) -> Losses:
            own_key, rows = part
            return evaluate(params, reference, own_key, rows, multipliers, axis_name=axis_name)

        found = jax.lax.map(one, (jax.random.split(key, parts), jax.tree.map(split, batch)))
        return Losses(
            objective=found.objective.reshape(-1),
            values=found.values.reshape(-1),
            index=found.index.reshape(-1),
            share=jnp.mean(jnp.asarray(found.share), axis=0),
            diagnostics=jax.tree.map(lambda leaf: leaf.mean(axis=0), found.diagnostics),
        )

    return losses
