"""What trains in a run, and its step: of a task, or of a setup that was not measured."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_unlearn.accumulated import accumulated
from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.tasks.base import Setup, Task
from jax_unlearn.formulations import Pooled, against_pool, optimizer_pair
from jax_unlearn.minibatched import minibatched
from jax_unlearn.pretrained.subsets import (
    lora_attack,
    lora_init,
    lora_merge,
    lora_problem,
    parse_subset,
    subset_optimizer,
    subset_problem,
)
from jax_unlearn.primal_dual import PrimalDual, PrimalDualState, primal_dual
from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = ["algorithm_of", "dual_schedule", "learning_rate"]


def dual_schedule(task: Task | Setup) -> Callable[[Array], Array] | None:
    """Steps done -> whether the multipliers move: in all, unless fresh samples move them."""
    if task.dual_batch is None:
        return None
    marks = jnp.array(task.dual_steps, jnp.int32)
    return lambda done: (done == marks).any()


def _updates(options: RunOptions) -> int:
    """Of the parameters, in one step."""
    return options.training.minibatches


def learning_rate(options: RunOptions) -> optax.Schedule:
    """Updates done -> step size: a warm-up of a tenth, at most 20 steps, then a cosine to 0."""
    updates, warmup = _updates(options), min(20, max(options.steps // 10, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup * updates, max(options.steps, warmup + 1) * updates
    )


def algorithm_of(
    task: Task | Setup,
    options: RunOptions,
    params: Params,
    *,
    axis_name: str | None = None,
    strength: ArrayLike | None = None,
) -> tuple[PrimalDual, Any, Callable[..., Any]]:
    """What trains, and its step; nothing is measured.

    Args:
      task: the problem, and what goes with it.
      options: of the run.
      params: of the network, to start from.
      axis_name: as in `primal_dual`.
      strength: of a baseline, in place of its own; may be traced.

    Returns:
      The algorithm; what it starts from (the parameters, or a low-rank change of them, and a pool
      beside these where there is one); and the step that is compiled, a function of the key, the
      state, the reference, and the batch with the dual batch where there is one.
    """
    optimizer = optax.adam(learning_rate(options), b1=0.9, b2=0.99)
    part, rank = parse_subset(options.training.train)
    problem, start = task.problem, params
    if task.baseline is not None:
        own = task.baseline.about["strength"] if strength is None else strength
        problem, optimizer = task.baseline.problem(own), task.baseline.optimizer(optimizer)
    if rank is not None:
        problem = lora_problem(problem)
        start = lora_init(start, jax.random.key(options.seed), rank=rank, part=part)
    elif part != "full":
        problem = subset_problem(problem, part)
        optimizer = subset_optimizer(optimizer, part)
    if task.adversary is not None:
        attack = task.adversary.loss if rank is None else lora_attack(task.adversary.loss)
        problem = against_pool(problem, attack)
        optimizer = optimizer_pair(optimizer, task.adversary.optimizer)
        start = Pooled(start, task.adversary.pool)
    problem = accumulated(problem, options.accumulate)
    if task.visit is None:
        algorithm = primal_dual(
            problem, optimizer, task.dual, dual_schedule=dual_schedule(task), axis_name=axis_name
        )
    else:
        merge = None if rank is None else lora_merge
        algorithm = minibatched(
            problem, optimizer, task.dual, task.visit, parts=_updates(options), merge=merge,
            axis_name=axis_name,
        )  # fmt: skip

    def step(key: Array, state: PrimalDualState, reference: Params, brought: Any) -> Any:
        batch, *dual_batch = brought
        key = jax.random.fold_in(key, state.step)
        return algorithm.step(key, state, reference, task.prepare(batch), *dual_batch)

    return algorithm, start, step
