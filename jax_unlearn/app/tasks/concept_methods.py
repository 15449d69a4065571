"""The baselines of `concept`: what each trains by, on conditions or on samples of the reference.

Of the forgotten conditions all have equal shares, and of the kept ones too. Samples are of the
reference, unguided, and drawn once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import baselines, formulations, losses
from jax_unlearn.app import data
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.concept_evaluation import draw
from jax_unlearn.app.tasks.concept_request import ConceptRequest, Separation, edited
from jax_unlearn.app.tasks.conditions import by_vectors
from jax_unlearn.app.tasks.methods import Trained, remembered, summed
from jax_unlearn.baselines.base import Loss
from jax_unlearn.problem import Batch, Conditions, Images

__all__ = ["check_concepts", "concept_method"]

# Of the attack that AdvUnlearn trains against: its steps; and the radius of its ball, in mean
# distances of what is forgotten from no condition.
ATTACK_STEPS, ATTACK_RADIUS = 30, 0.5
# Time steps of the chain that the attack samples.
ATTACK_POINTS = 10
# Samples that the Fisher information is of.
FISHER_IMAGES = 64


class _Setting(NamedTuple):
    """What a method is built from."""

    request: ConceptRequest
    options: ConceptOptions

    @property
    def forgotten(self) -> list[Separation]:
        """What must not show the concepts; the free branch is no method's own."""
        null = self.request.conditions.null
        return [one for one in self.request.separated if one.cond != null]

    @property
    def of(self) -> tuple[Any, Any, losses.TimeWeighting]:
        """The denoiser, its schedule, and weights of squared errors a dimension."""
        apply, _, schedule, config = self.request.pretrained
        dimensions = int(np.prod(config.sample_shape))
        weights = losses.simple_weights(schedule.num_steps, dimensions)
        return apply, schedule, losses.time_weighting(weights)

    @property
    def sampler(self) -> dict[str, Any]:
        """Of ESD's partial samples: that of the run's pictures."""
        return {
            "shape": self.request.pretrained.config.sample_shape,
            "guidance": self.options.guidance,
            "steps": self.options.sampling_steps,
        }


def check_concepts(request: ConceptRequest, options: ConceptOptions) -> None:
    """Refuses a method that the model does not have what it takes for, before any work.

    Raises:
      ValueError: naming what is missing.
    """
    method = options.method
    if method in ("esd", "adv-unlearn") and request.conditions.null is None:
        raise ValueError(
            f"--method {method} steers away from the null label, which the model does not have."
        )
    if method == "adv-unlearn":
        by_vectors(request.pretrained)
    if method == "uce" and not request.pretrained.config.text_conditional:
        raise ValueError("--method uce edits attention to a text: a model of labels has none.")


def concept_method(request: ConceptRequest, options: ConceptOptions) -> Trained | None:
    """What --method replaces of the task of `concept`; None of one that replaces no loss.

    It starts at the reference, as published, or with --start edited where the constrained run does.

    Args:
      request: what to forget and to keep.
      options: with the method.
    """
    if options.method not in _METHODS:
        return None
    trained = _METHODS[options.method](_Setting(request, options))
    if options.start == "edited":
        trained = trained._replace(params=lambda _: request.start)
    return trained


def _indices(options: ConceptOptions, step: int, size: int, count: int) -> np.ndarray:
    return data.batch_indices(seed=options.seed, step=step, size=size, count=count)


def _esd(setting: _Setting) -> Trained:
    apply, schedule, _ = setting.of

    def loss(strength: Any) -> Loss:
        return baselines.esd(apply, schedule, strength=strength, **setting.sampler)

    return Trained(loss, partial(_conditions, setting))


def _conditions(setting: _Setting, options: ConceptOptions, step: int) -> Conditions:
    """The forgotten conditions of a step, each as often as any other, and no condition."""
    forgotten = np.array([one.cond for one in setting.forgotten], np.int32)
    size = options.forget_batch_size
    cond = forgotten[_indices(options, step, size, len(forgotten))]
    null = np.full(size, setting.request.conditions.null, np.int32)
    return Conditions(cond, null, cond, np.zeros(size, np.int32))


def _adv_unlearn(setting: _Setting) -> Trained:
    apply, table = by_vectors(setting.request.pretrained)
    schedule, sampler = setting.request.pretrained.schedule, setting.sampler
    adversary = formulations.worst_conditions(
        apply,
        schedule,
        radius=ATTACK_RADIUS * _distance(setting, table),
        steps=ATTACK_STEPS,
        shape=sampler["shape"],
        points=min(ATTACK_POINTS, schedule.num_steps),
        table=table,
    )
    kept = np.array(setting.request.kept, np.int32)

    def loss(retention: Any) -> Loss:
        return baselines.adv_unlearn(apply, schedule, adversary, retention=retention, **sampler)

    def batch(options: ConceptOptions, step: int) -> Batch:
        size = options.batch_size
        cond = kept[_indices(options, step, size, len(kept))]
        null = np.full(size, setting.request.conditions.null, np.int32)
        return Batch(Conditions(cond, cond, null), _conditions(setting, options, step))

    return Trained(loss, batch)


def _distance(setting: _Setting, table: Any) -> float:
    """Mean Euclidean distance of the forgotten conditions from no condition."""
    forgotten = np.array([one.cond for one in setting.forgotten])
    null = setting.request.conditions.null
    squares = sum(
        np.square(np.asarray(leaf)[forgotten] - np.asarray(leaf)[null]).reshape(len(forgotten), -1)
        .sum(axis=1)
        for leaf in jax.tree.leaves(table)
    )  # fmt: skip
    return float(np.sqrt(squares).mean())


def _neg_grad(setting: _Setting) -> Trained:
    forgotten = [one.cond for one in setting.forgotten]
    shown, kept = _samples(setting, forgotten, 1), _samples(setting, setting.request.kept, 2)

    def batch(options: ConceptOptions, step: int) -> Batch:
        forget = _taken(shown, _indices(options, step, options.forget_batch_size, len(shown.cond)))
        return Batch(
            _taken(kept, _indices(options, step, options.batch_size, len(kept.cond))), forget
        )

    return Trained(lambda scale: baselines.neg_grad(*setting.of, scale=scale), batch)


def _selective_amnesia(setting: _Setting) -> Trained:
    """Its surrogates are samples of the base, as it was published for prompts."""
    request, options = setting.request, setting.options
    bases, kept = _samples_of_bases(setting, 1), _samples(setting, request.kept, 2)
    apply, schedule, weighting = setting.of
    weighting = summed(weighting, request.pretrained.config.sample_shape)

    def batch(options: ConceptOptions, step: int) -> Batch:
        rows = _indices(options, step, options.forget_batch_size, len(bases.cond))
        surrogates = Images(bases.x_0[rows], bases.cond[rows])
        own = _taken(kept, _indices(options, step, options.batch_size, len(kept.cond)))
        return Batch(own, None, surrogates)

    few = _taken(kept, np.arange(FISHER_IMAGES) % len(kept.cond))
    return Trained(
        lambda strength: baselines.selective_amnesia(apply, schedule, weighting, strength=strength),
        batch,
        reference=remembered(request.pretrained, weighting, few, options.seed),
    )


def _concept_ablation(setting: _Setting) -> Trained:
    bases = _samples_of_bases(setting, 1)

    def loss(preservation: Any) -> Loss:
        return baselines.concept_ablation(*setting.of, preservation=preservation)

    def batch(options: ConceptOptions, step: int) -> baselines.Anchored:
        rows = _indices(options, step, options.forget_batch_size, len(bases.cond))
        return baselines.Anchored(*(part[rows] for part in bases))

    return Trained(loss, batch)


def _uce(setting: _Setting) -> Trained:
    request = setting.request
    # No step is taken, so that nothing is read of the loss.
    return Trained(
        lambda _: lambda *_: jnp.zeros(()),
        partial(_conditions, setting),
        params=partial(edited, request.pretrained, setting.forgotten, request.kept),
    )


def _samples(setting: _Setting, conditions: Sequence[int], number: int) -> Images:
    """--stored-samples of the reference, the conditions in turn."""
    request, count = setting.request, setting.options.stored_samples
    cond = np.resize(np.asarray(conditions, np.int32), max(count, len(conditions)))
    shape = request.pretrained.config.sample_shape
    rng = np.random.default_rng([setting.options.seed, 31, number])
    noise = rng.standard_normal((len(cond), *shape), np.float32)
    sample = jax.jit(partial(draw, request, setting.options))
    x_0 = in_batches(
        lambda _, *rows: sample(request.pretrained.params, *rows),
        jax.random.key(0), noise, cond, size=batch_rows(shape),
    )  # fmt: skip
    return Images(x_0, cond)


def _samples_of_bases(setting: _Setting, number: int) -> baselines.Anchored:
    """Samples of the base of each forgotten condition, in turn."""
    held = setting.forgotten
    drawn = _samples(setting, [one.base for one in held], number)
    cond = np.resize(np.array([one.cond for one in held], np.int32), len(drawn.cond))
    return baselines.Anchored(drawn.x_0, cond, drawn.cond)


def _taken(rows: Images, chosen: np.ndarray) -> Images:
    return Images(rows.x_0[chosen], rows.cond[chosen])


_METHODS = {
    "esd": _esd,
    "concept-ablation": _concept_ablation,
    "uce": _uce,
    "neg-grad": _neg_grad,
    "adv-unlearn": _adv_unlearn,
    "selective-amnesia": _selective_amnesia,
}
