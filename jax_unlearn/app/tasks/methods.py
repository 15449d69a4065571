"""The baselines of --method: each makes of a task the same task, trained by a loss of its own.

Thresholds, measurements, certificate and pictures stay those of the constrained problem. Of the
task only what trains is replaced: start, batches, losses, and multipliers, which are held fixed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jax_unlearn import baselines, losses, multipliers
from jax_unlearn.app import methods
from jax_unlearn.app.options import ModelOptions
from jax_unlearn.app.tasks.base import Baseline, Task
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.problem import Images
from jax_unlearn.typing import Array, Params

__all__ = ["Trained", "equal_weights", "remembered", "summed", "trained_by"]

# Noisy versions of each image that the Fisher information is of.
FISHER_DRAWS = 32


class Trained(NamedTuple):
    """What a method replaces of a task.

    Attributes:
      loss: (params, reference, key, batch) -> scalar.
      batch: step -> what the host brings to it.
      prepare: from that to what the loss takes, if not the task's own.
      reference: as `Baseline.reference`.
      mask: of the entries that train, a tree of booleans; None trains all.
      params: to start from, if not the reference's.
    """

    loss: Callable[[Params, Any, Array, Any], Array]
    batch: Callable[[int], Any]
    prepare: Callable[[Any], Any] | None = None
    reference: Any = None
    mask: Params | None = None
    params: Params | None = None


def trained_by(task: Task, options: ModelOptions, method: Trained) -> Task:
    """The task, trained by a loss from the reference; its multipliers are 0 and stay so."""
    about = methods.about(options)
    mask = method.mask

    def optimizer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        return inner if mask is None else baselines.masked(inner, mask)

    return _fixed(task)._replace(
        params=task.pretrained.params if method.params is None else method.params,
        batch=method.batch,
        prepare=method.prepare or task.prepare,
        multipliers=0.0,
        visit=None,
        adversary=None,
        baseline=Baseline(
            about,
            baselines.loss_problem(method.loss, name=about["title"]),
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
        baseline=Baseline(about, free),
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
