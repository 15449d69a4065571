"""What is measured of a model of concepts: path KLs, separations, and how likely concepts are."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import likelihoods, quantification, samplers
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.concept_problem import Problem
from jax_unlearn.formulations import ConditionBatch, Separated, reverse_kl
from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = [
    "Raw",
    "Shows",
    "classifier",
    "compared",
    "draw",
    "evaluator",
    "likelihoods_of_samples",
    "log_posterior",
]

LEAST_ROWS = 8


class Raw(NamedTuple):
    """What was measured, a row each.

    Attributes:
      cond: of each trajectory, [n].
      path_kl: in nats, [n].
      valued: the condition of each value, [v]: that of the trajectories; for likelihoods that of
        samples, of separated conditions and of anchors whose values thresholds are calibrated on.
      values: of the constraints, [v, m].
    """

    cond: np.ndarray
    path_kl: np.ndarray
    valued: np.ndarray
    values: np.ndarray


Shows = Callable[[Params, Array, np.ndarray], np.ndarray]


def likelihoods_of_samples(
    problem: Problem, options: ConceptOptions, h: Callable[[Array], Array]
) -> Shows:
    """(params, key, conditions [n]) -> h of a sample of each, [n, m]."""

    @jax.jit
    def shows(params: Params, key: Array, cond: Array) -> Array:
        noise = jax.random.normal(key, (cond.shape[0], *problem.pretrained.config.sample_shape))
        return h(draw(problem, options, params, noise, cond))

    size = batch_rows(problem.pretrained.config.sample_shape)
    return lambda params, key, cond: in_batches(partial(shows, params), key, cond, size=size)


def evaluator(
    problem: Problem, options: ConceptOptions, shows: Shows | None
) -> Callable[[Params], Raw]:
    """Trajectories of every condition, the same noise every time; values are theirs, or of samples.

    Args:
      problem: whose conditions.
      options: how many.
      shows: `likelihoods_of_samples`, for constraints on these.
    """
    apply, reference, schedule, config = problem.pretrained
    count = len(problem.concepts)
    formulation = reverse_kl(
        apply,
        schedule,
        estimator="stop_gradient",
        shape=config.sample_shape,
        steps=options.chain_steps,
    )

    @jax.jit
    def along(
        params: Params, key: Array, cond: Array, base: Array, target: Array
    ) -> tuple[Array, Array]:
        # Likelihoods are of samples: along trajectories the concepts need not be evaluated.
        shape = (cond.shape[0], count if shows is None else 0)
        constraint = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        rows = Separated(cond, base, target if shows is None else None, constraint)
        found = formulation.losses(
            params, reference, key, ConditionBatch(None, rows), None, jnp.zeros(count)
        )
        return found.objective, found.constraint.reshape(shape)

    batched = partial(in_batches, size=batch_rows(config.sample_shape))
    rows = compared(problem)
    each = max(options.evaluation_images // len(rows), LEAST_ROWS)
    # Rows of all conditions in every batch, which also share its noise.
    cond = np.tile(np.array(list(rows), np.int32), each)
    base = np.tile(np.array([base for base, _ in rows.values()], np.int32), each)
    target = np.tile(np.array([targets for _, targets in rows.values()], np.int32), (each, 1))
    key = jax.random.key(options.seed + 1)

    judged = [one.cond for one in problem.separated]
    if "calibrated" in options.threshold:
        judged += [c for c, _ in problem.anchors]
    rows_each = max(options.evaluation_images // len(judged), LEAST_ROWS)
    valued = cond if shows is None else np.tile(np.array(judged, np.int32), rows_each)

    def evaluate(params: Params) -> Raw:
        path_kl, values = batched(partial(along, params), key, cond, base, target)
        if shows is not None:
            values = shows(params, key, valued)
        return Raw(cond, path_kl, valued, values)

    return evaluate


def compared(problem: Problem) -> dict[int, tuple[int, tuple[int, ...]]]:
    """What every condition is held to, and the concepts that it is measured against.

    Those are of its own template: a base's are those of what is held to it.
    """
    own = {one.base: one.targets for one in reversed(problem.separated)} | dict(problem.anchors)
    first = problem.separated[0].targets
    separated = {one.cond: (one.base, one.targets) for one in problem.separated}
    others = (*problem.kept, *problem.shown)
    return separated | {c: (c, own.get(c, first)) for c in others}


def log_posterior(
    problem: Problem, options: ConceptOptions, candidates: ArrayLike
) -> Callable[[Array], Array]:
    """x_0 -> the reference's own log-posterior of each candidate, [n, candidates]."""
    apply, reference, schedule, _ = problem.pretrained

    def posterior(x_0: Array) -> Array:
        return likelihoods.diffusion_classifier(
            apply,
            reference,
            schedule,
            jax.random.key(options.seed),
            x_0=x_0,
            concepts=jnp.asarray(candidates),
            draws=options.classifier_draws,
            weights=likelihoods.noised_weights(schedule, options.classifier_noise),
        ).value

    return posterior


def classifier(
    problem: Problem, options: ConceptOptions, confusion: quantification.Confusion | None = None
) -> Callable[[Array], Array]:
    """x_0 -> h [n, concepts], the reference's own posterior of each concept.

    With the confusion of that classifier the mean of h is the share of each concept.
    """
    judged = problem.judged if options.target_steps else np.arange(len(problem.candidates))
    posterior = log_posterior(problem, options, np.asarray(problem.candidates)[judged])
    members = jnp.asarray(problem.members[:, judged], jnp.float32)

    def h(x_0: Array) -> Array:
        found = jnp.matmul(jnp.exp(posterior(x_0)), members.T, precision="highest")
        return found if confusion is None else confusion.shares(found)

    return h


def draw(
    problem: Problem, options: ConceptOptions, params: Params, noise: Array, cond: Array
) -> Array:
    """Unguided samples of p(·|cond) by DDIM: the few steps of an ancestral chain leave noise.

    The same noise gives the same image, or nearly, where a model is nearly the same.
    """
    apply, _, schedule, _ = problem.pretrained
    return samplers.sample(
        lambda x_t, t: apply(params, x_t, t, cond),
        schedule,
        jax.random.key(0),
        noise,
        steps=options.sampling_steps,
    ).x_0
