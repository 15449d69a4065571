"""The baselines of --method: each makes of a task the same task, trained by a loss of its own.

Thresholds, measurements, certificate and pictures stay those of the constrained problem. Of the
task only what trains is replaced: start, batches, losses, and multipliers, which are held fixed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax

from jax_unlearn import baselines, losses, multipliers
from jax_unlearn.app import methods
from jax_unlearn.app.options import ModelOptions, RunOptions
from jax_unlearn.app.tasks.base import Baseline, Task, seeded
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.problem import Images
from jax_unlearn.typing import Array, Params

__all__ = [
    "Trained",
    "by_method",
    "equal_weights",
    "remembered",
    "summed",
    "trained_by",
    "with_strength",
]

Asked = TypeVar("Asked", bound=RunOptions)

# Noisy versions of each image that the Fisher information is of.
FISHER_DRAWS = 32


class Trained(NamedTuple):
    """What a method replaces of a task.

    Attributes:
      loss: strength -> (params, reference, key, batch) -> scalar.
      batch: (options, whose seed it takes, step) -> what the host brings to it.
      prepare: from that to what the loss takes, if not the task's own.
      reference: as `Baseline.reference`.
      mask: of the entries that train, a tree of booleans; None trains all.
      params: strength -> what to start from, if not the reference's.
    """

    loss: Callable[[Any], Callable[[Params, Any, Array, Any], Array]]
    batch: Callable[[Any, int], Any]
    prepare: Callable[[Any], Any] | None = None
    reference: Any = None
    mask: Params | None = None
    params: Callable[[Any], Params] | None = None


def by_method(task: Task, options: RunOptions, replaced: Trained | None) -> Task:
    """The task as --method trains it.

    Args:
      task: of the constrained problem.
      options: with the method and its strength.
      replaced: by the method; None of one that replaces no loss.
    """
    if getattr(options, "method", methods.CONSTRAINED) == methods.CONSTRAINED:
        return task
    assert isinstance(options, ModelOptions)
    if replaced is None:
        return equal_weights(task, options)
    return trained_by(task, options, replaced)


def with_strength(options: Asked, strength: float | None) -> Asked:
    """The options with another --strength, if one is given."""
    return options if strength is None else dataclasses.replace(options, strength=strength)  # pyrefly: ignore


def trained_by(task: Task, options: ModelOptions, method: Trained) -> Task:
    """The task, trained by a loss from the reference; its multipliers are 0 and stay so."""
    about = methods.about(options)
    mask = method.mask

    def optimizer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        return inner if mask is None else baselines.masked(inner, mask)

    start = method.params
    return _fixed(task)._replace(
        params=task.pretrained.params if start is None else start(about["strength"]),
        batch=seeded(method.batch, options),
        prepare=method.prepare or task.prepare,
        multipliers=0.0,
        visit=None,
        adversary=None,
        baseline=Baseline(
            about,
            lambda strength: baselines.loss_problem(method.loss(strength), name=about["title"]),
            method.reference,
            optimizer,
        ),
    )


def equal_weights(task: Task, options: ModelOptions) -> Task:
    """λ_i = Λ/m for each of the m constraints, from the constrained problem's own start."""
    about, count = methods.about(options), len(task.names)
    # Λ is what was asked for: no bound of moving multipliers cuts it.
    free = task.problem._replace(project=multipliers.free())
    return _fixed(task)._replace(
        multipliers=np.full(count, about["strength"] / count, np.float32),
        baseline=Baseline(about, lambda strength: free),
    )


def _fixed(task: Task) -> Task:
    """With multipliers that do not move."""
    return task._replace(dual=optax.set_to_zero(), dual_batch=None, dual_steps=())


def remembered(
    pretrained: Pretrained, weighting: losses.TimeWeighting, examples: Images, seed: int
) -> baselines.Remembered:
    """The reference and its Fisher information on examples, for Selective Amnesia."""

    @jax.jit
    def information(params: Params, key: Array, examples: Images) -> Params:
        return baselines.fisher(
            pretrained.apply, pretrained.schedule, weighting, params, key, examples,
            draws=FISHER_DRAWS,
        )  # fmt: skip

    key = jax.random.fold_in(jax.random.key(seed), 21)
    return baselines.Remembered(pretrained.params, information(pretrained.params, key, examples))


def summed(weighting: losses.TimeWeighting, shape: tuple[int, ...]) -> losses.TimeWeighting:
    """A weighting of errors a dimension, as one of sums over them: λ was published for these."""
    return weighting._replace(weights=weighting.weights * np.prod(shape))
