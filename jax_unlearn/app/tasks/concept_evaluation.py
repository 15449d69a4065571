"""What is measured of a model of concepts: path KLs, separations, and how likely concepts are."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import likelihoods, quantification, samplers
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.concept_request import ConceptRequest
from jax_unlearn.formulations import reverse_kl, sampled
from jax_unlearn.problem import Batch, Conditions, Evaluate
from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = [
    "Measurements",
    "Judged",
    "Judging",
    "Shows",
    "classifier",
    "compared",
    "draw",
    "evaluator",
    "fresh_samples",
    "judging",
    "likelihoods_of_samples",
    "log_posterior",
    "repeated",
    "rows_of",
]

LEAST_ROWS = 8


class Measurements(NamedTuple):
    """What was measured, a row each.

    Attributes:
      cond: of each trajectory, [n].
      path_kl: in nats, [n].
      valued: the condition of each value, [v]: that of the trajectories; for likelihoods that of
        samples of separated conditions.
      values: of the constraints, [v, m].
    """

    cond: np.ndarray
    path_kl: np.ndarray
    valued: np.ndarray
    values: np.ndarray


Judged = Callable[[Params, Array], Array]
"""(the reference's parameters, x_0 [n, ...]) -> h of each concept, [n, m]."""
Shows = Callable[[Params, Array, np.ndarray], np.ndarray]
"""(params, key, conditions [n]) -> h of a sample of each, [n, m]."""


class Judging(NamedTuple):
    """How samples are drawn and judged, each compiled once for all that is measured.

    Attributes:
      sample: (params, noise [n, ...], conditions [n]) -> unguided samples, [n, ...]; the same noise
        gives the same image.
      posterior: the reference's own, of each concept; see `classifier`.
    """

    sample: Callable[[Params, Array, Array], Array]
    posterior: Judged


def fresh_samples(request: ConceptRequest, options: ConceptOptions, h: Judged) -> Evaluate:
    """E h of unguided samples of p(·|cond): what `Problem.fresh` takes.

    They are drawn by DDIM: the few steps of an ancestral chain leave noise.
    """
    apply, _, schedule, config = request.pretrained
    return sampled(
        apply,
        schedule,
        h,
        shape=config.sample_shape,
        steps=options.sampling_steps,
        at_once=batch_rows(config.sample_shape),
    )


def rows_of(request: ConceptRequest, cond: np.ndarray) -> Batch:
    """Conditions [n] as rows that every concept constrains."""
    count = len(request.concepts)
    constraint = np.broadcast_to(np.arange(count, dtype=np.int32), (len(cond), count))
    return Batch(None, Conditions(cond, cond, None, constraint))


def judging(request: ConceptRequest, options: ConceptOptions) -> Judging:
    """What draws samples by DDIM, and judges them."""
    return Judging(jax.jit(partial(draw, request, options)), jax.jit(classifier(request, options)))


def likelihoods_of_samples(
    request: ConceptRequest, judged: Judging, confusion: quantification.Confusion | None
) -> Shows:
    """Judges samples of the model under conditions, calibrated where a confusion is known."""
    shape, reference = request.pretrained.config.sample_shape, request.pretrained.params
    batched = partial(in_batches, size=batch_rows(shape))

    def shows(params: Params, key: Array, cond: np.ndarray) -> np.ndarray:
        noise = np.asarray(jax.random.normal(key, (len(cond), *shape)))
        x_0 = batched(lambda _, *rows: judged.sample(params, *rows), key, noise, cond)
        h = batched(lambda _, x: judged.posterior(reference, x), key, x_0)
        return h if confusion is None else np.asarray(quantification.calibrate(h, confusion))

    return shows


def evaluator(
    request: ConceptRequest, options: ConceptOptions, shows: Shows | None
) -> Callable[[Params], Measurements]:
    """Trajectories of every condition, the same noise every time; values are theirs, or of samples.

    Args:
      request: whose conditions.
      options: how many.
      shows: `likelihoods_of_samples`, for constraints on these.
    """
    apply, reference, schedule, config = request.pretrained
    count = len(request.concepts)
    along_paths = reverse_kl(
        apply,
        schedule,
        estimator="stop_gradient",
        shape=config.sample_shape,
        steps=options.chain_steps,
    )

    @jax.jit
    def along(
        params: Params, reference: Params, key: Array, cond: Array, base: Array, target: Array
    ) -> tuple[Array, Array]:
        # Likelihoods are of samples: along trajectories the concepts need not be evaluated.
        shape = (cond.shape[0], count if shows is None else 0)
        constraint = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        rows = Conditions(cond, base, target if shows is None else None, constraint)
        found = along_paths.losses(params, reference, key, Batch(None, rows), jnp.zeros(count))
        return found.objective, found.values.reshape(shape)

    batched = partial(in_batches, size=batch_rows(config.sample_shape))
    rows = compared(request)
    each = max(options.evaluation_images // len(rows), LEAST_ROWS)
    # Rows of all conditions in every batch, which also share its noise.
    cond = np.tile(np.array(list(rows), np.int32), each)
    base = np.tile(np.array([base for base, _ in rows.values()], np.int32), each)
    target = np.tile(np.array([targets for _, targets in rows.values()], np.int32), (each, 1))
    key = jax.random.key(options.seed + 1)

    valued = cond
    if shows is not None:
        valued = repeated([one.cond for one in request.separated], options)

    def evaluate(params: Params) -> Measurements:
        path_kl, values = batched(partial(along, params, reference), key, cond, base, target)
        if shows is not None:
            values = shows(params, key, valued)
        return Measurements(cond, path_kl, valued, values)

    return evaluate


def repeated(conditions: Sequence[int], options: ConceptOptions) -> np.ndarray:
    """The conditions again and again, for as many samples as an estimate is made from."""
    each = max(options.evaluation_images // len(conditions), LEAST_ROWS)
    return np.tile(np.asarray(conditions, np.int32), each)


def compared(request: ConceptRequest) -> dict[int, tuple[int, tuple[int, ...]]]:
    """What every condition is held to, and the concepts that it is measured against.

    Those are of its own template: a base's are those of what is held to it.
    """
    own = {one.base: one.targets for one in reversed(request.separated)} | dict(request.anchors)
    first = request.separated[0].targets
    separated = {one.cond: (one.base, one.targets) for one in request.separated}
    others = (*request.kept, *request.shown)
    return separated | {c: (c, own.get(c, first)) for c in others}


def log_posterior(
    request: ConceptRequest, options: ConceptOptions, candidates: ArrayLike
) -> Judged:
    """The reference's own log-posterior of each candidate, [n, candidates]."""
    apply, _, schedule, _ = request.pretrained

    def posterior(reference: Params, x_0: Array) -> Array:
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


def classifier(request: ConceptRequest, options: ConceptOptions) -> Judged:
    """The reference's own posterior of each concept, [n, m]."""
    judged = request.judged if options.target_steps else np.arange(len(request.candidates))
    posterior = log_posterior(request, options, np.asarray(request.candidates)[judged])
    members = jnp.asarray(request.members[:, judged], jnp.float32)

    def h(reference: Params, x_0: Array) -> Array:
        return jnp.matmul(jnp.exp(posterior(reference, x_0)), members.T, precision="highest")

    return h


def draw(
    request: ConceptRequest, options: ConceptOptions, params: Params, noise: Array, cond: Array
) -> Array:
    """Unguided samples of p(·|cond) by DDIM; the same noise gives the same image."""
    apply, _, schedule, _ = request.pretrained
    return samplers.sample(
        lambda x_t, t: apply(params, x_t, t, cond),
        schedule,
        jax.random.key(0),
        noise,
        steps=options.sampling_steps,
    ).x_0
