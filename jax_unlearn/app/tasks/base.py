"""What a task is: an unlearning job made ready for the loop that `run` runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import multipliers
from jax_unlearn.app import processes
from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.report import Grid
from jax_unlearn.duality import Floor
from jax_unlearn.formulations import AttackLoss
from jax_unlearn.formulations.trajectories import Visit
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.problem import Batch, Problem
from jax_unlearn.typing import Array, ArrayLike, Estimate, Params

__all__ = [
    "Adversary",
    "Baseline",
    "Measured",
    "Setup",
    "Task",
    "batch_rows",
    "controller",
    "estimate",
    "in_batches",
    "seeded",
    "spread",
    "unmeasured",
]

BATCH = 64
# Of what is measured without gradients; sixteen latents of Stable Diffusion 1 at once.
BATCH_ELEMENTS = 2**18


class Measured(NamedTuple):
    """The numbers and pictures of one set of parameters.

    Attributes:
      objective: with its standard error, in `Task.objective_unit`.
      constraints: the value of each constraint, [m].
      metrics: name -> number, Estimate, or a further level of names.
      paired: metric -> part -> one value an image [n], on the same images and noise every time.
      samples: uint8 [labels, samples, height, width, channels]; unconditional models have one
        row; None where none were asked for.
      reconstructions: uint8, images to forget noised and denoised again; None without images.
    """

    objective: Estimate
    constraints: Estimate
    metrics: dict[str, Any]
    paired: dict[str, dict[str, np.ndarray]]
    samples: np.ndarray | None
    reconstructions: np.ndarray | None


class Adversary(NamedTuple):
    """A pool of attackers that trains beside the model: see `against_pool`.

    Attributes:
      loss: what each lowers, of the denoiser's parameters.
      pool: conditions to begin with, a row each.
      optimizer: of the pool.
    """

    loss: AttackLoss
    pool: Any
    optimizer: optax.GradientTransformation


class Baseline(NamedTuple):
    """A method that trains in the place of the constrained problem, which still measures.

    Attributes:
      about: what the report says of it.
      problem: what trains, of the strength; a sweep traces it.
      reference: what its losses take for the reference; None is the reference's parameters.
      optimizer: makes its own of the run's.
    """

    about: dict[str, Any]
    problem: Callable[[ArrayLike], Problem]
    reference: Any = None
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = (
        lambda optimizer: optimizer
    )


class Setup(NamedTuple):
    """What the algorithm runs.

    Attributes:
      problem: with its dual domain.
      dual: optimizer of the multipliers.
      multipliers: to start from, [m] or a scalar.
      batch: (step, seed=None) -> the batch of the step; see `seeded`.
      formula: what is solved, as the report prints it.
      notes: what the owner should know.
      visit: of `minibatched`, with --minibatches.
      dual_batch: rows of fresh samples that move the multipliers; or None.
      dual_steps: numbers of steps done at which they do.
      prepare: from a batch to what the losses take; traced with the step.
      adversary: who chooses the conditions of the rows to forget.
      baseline: what trains instead of `problem`.
    """

    problem: Problem
    dual: optax.GradientTransformation
    multipliers: np.ndarray | float
    batch: Callable[..., Batch]
    formula: str
    notes: tuple[str, ...]
    visit: Visit | None = None
    dual_batch: Batch | None = None
    dual_steps: tuple[int, ...] = ()
    prepare: Callable[[Batch], Batch] = lambda brought: brought
    adversary: Adversary | None = None
    baseline: Baseline | None = None


class Task(NamedTuple):
    """An unlearning job, the reference model measured.

    Attributes:
      pretrained: the model.
      params: to start from; the reference stays that of `pretrained`.
      names: of the constraints.
      problem: losses, sign and dual domain.
      dual: the optimizer of the multipliers.
      thresholds: [m].
      multipliers: λ to start from, [m].
      reference_values: of the constraints, as the report puts them beside the thresholds, [m].
      batch: (step, seed=None) -> what the host brings to it, a pure function of these; without a
        seed that of the options.
      prepare: from that to what the losses take; traced with the step.
      before: the reference model's measurements.
      measure: params -> Measured, the same way.
      asked: what the report says was asked for: "forget", "retain", and "notes".
      units: of the objective and of the constraints.
      objective: what it is, in words.
      captions: metric -> its "unit" or "description".
      grids: the pictures of the report, from the measurements after.
      formula: what is solved, as the report prints it.
      at: (threshold=None, strength=None) -> the same job with another threshold for each
        constraint, as --threshold takes it, or another strength. Nothing is measured again.
      floor: () -> what no model that meets the thresholds can pay less than; None where there is
        no such bound.
      visit: of `minibatched`, to take --minibatches primal steps a step.
      dual_batch: rows of fresh samples that move the multipliers; None where batches do.
      dual_steps: numbers of steps done at which they do.
      adversary: who chooses the conditions of the rows to forget; None where batches name them.
      baseline: what trains instead of `problem`; None where that does.
    """

    pretrained: Pretrained
    params: Params
    names: tuple[str, ...]
    problem: Problem
    dual: optax.GradientTransformation
    thresholds: np.ndarray
    multipliers: ArrayLike
    reference_values: np.ndarray
    batch: Callable[..., Any]
    prepare: Callable[[Any], Any]
    before: Measured
    measure: Callable[[Params], Measured]
    asked: dict[str, Any]
    units: tuple[str, str]
    objective: str
    captions: dict[str, dict[str, str]]
    grids: Callable[[Measured], list[Grid]]
    formula: str
    at: "Callable[..., Task]"
    floor: Callable[[], Floor] | None = None
    visit: Visit | None = None
    dual_batch: Batch | None = None
    dual_steps: tuple[int, ...] = ()
    adversary: Adversary | None = None
    baseline: Baseline | None = None


def controller(
    options: RunOptions, sizes: Callable[[Array], ArrayLike]
) -> optax.GradientTransformationExtraArgs:
    """νPI control of the multipliers, for violations relative to the sizes of the values.

    The rates are shared by the constraints: one rate serves every unit and every number of them.

    Args:
      options: with the rates.
      sizes: of the thresholds [m], the sizes [m]. The state's own are given, so that one
        transformation serves all.
    """

    def update(
        updates: Array, state: Any, params: Array | None = None, *, thresholds: Array, **extra: Any
    ) -> tuple[Array, Any]:
        del extra
        scale = 1.0 / jnp.maximum(jnp.asarray(sizes(thresholds)), 1e-12) / len(thresholds)
        scaled = multipliers.nu_pi(
            integral=jnp.asarray(options.dual_learning_rate * scale, jnp.float32),
            proportional=jnp.asarray(options.dual_damping * scale, jnp.float32),
            nu=0.9,
        )
        return scaled.update(updates, state, params)  # pyrefly: ignore

    init = multipliers.nu_pi(0.0, proportional=0.0).init
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore


def seeded(batch: Callable[[Any, int], Any], options: RunOptions) -> Callable[..., Any]:
    """(step, seed=None) -> batch(options, step), the options with another seed if one is given."""

    def of(step: int, seed: int | None = None) -> Any:
        own = options if seed is None else dataclasses.replace(options, seed=seed)
        return batch(own, step)

    return of


def estimate(values: np.ndarray) -> Estimate:
    """The mean of independent values [n, ...] and its standard error (NaN for one value)."""
    mean = np.asarray(values.mean(axis=0))
    if len(values) < 2:
        return Estimate(mean, np.full_like(mean, np.nan))
    return Estimate(mean, np.asarray(values.std(axis=0, ddof=1) / np.sqrt(len(values))))


def batch_rows(shape: Sequence[int]) -> int:
    """How many images or latents of a shape are measured at once: 64, or fewer large ones."""
    return max(1, min(BATCH, BATCH_ELEMENTS // int(np.prod(shape))))


def in_batches(function: Callable[..., Any], key: Array, *arrays: Any, size: int = BATCH) -> Any:
    """function(key of the batch, *rows) over equal batches of at most `size`, the last padded.

    Accelerators share the rows of a batch, and many processes the batches; all know the outcome.

    Each argument is an array, a tree of arrays, or None. The function returns an array or a tree
    of them, each with a row for each row given.
    """
    count = len(jax.tree.leaves(arrays[0])[0])
    batches = -(-count // size)
    size = processes.whole(-(-count // batches))

    def batch(number: int) -> Any:
        rows = np.arange(number * size, (number + 1) * size) % count
        part = jax.tree.map(lambda array: array[rows], arrays)
        return function(jax.random.fold_in(key, number), *processes.over_devices(part))

    outputs = processes.share(batches, batch)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)


def spread(count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """`wanted` indices below `count`, every one as often as any other, give or take one."""
    rounds = -(-wanted // count)
    return np.concatenate([rng.permutation(count) for _ in range(rounds)])[:wanted]


def unmeasured(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Ones of a shape, of which one is stored: what a step is compiled for without measuring."""
    return np.broadcast_to(np.ones((), dtype), shape)
