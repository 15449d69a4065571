"""The two problems of concepts, and their batches: conditions alone, or stored samples."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import duality, likelihoods, losses, multipliers, quantification
from jax_unlearn.app import data
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import (
    Setup,
    batch_rows,
    controller,
    in_batches,
    seeded,
    unmeasured,
)
from jax_unlearn.app.tasks.concept_evaluation import (
    Judged,
    Judging,
    classifier,
    fresh_samples,
    log_posterior,
    rows_of,
)
from jax_unlearn.app.tasks.concept_request import ConceptRequest
from jax_unlearn.formulations import (
    distill_likelihood,
    distill_posterior,
    reverse_kl,
    sample_trajectories,
)
from jax_unlearn.problem import Batch, Conditions, Images, NoisyPoints, Samples
from jax_unlearn.typing import Array, Params

__all__ = [
    "StoredSamples",
    "condition_batch",
    "floor_of",
    "has_floor",
    "likelihood_problem",
    "likelihood_setup",
    "path_log_ratios",
    "point_batch",
    "reverse_kl_setup",
    "sample_batch",
    "stored_samples",
    "unmeasured_samples",
]

# Paths of the reference for the floor of reverse KL, of each condition at least.
LEAST_PATHS = 8
# Fewer, of a base or in all, make no floor.
LEAST_SAMPLES = 4


def reverse_kl_setup(request: ConceptRequest, options: ConceptOptions) -> Setup:
    """On its own trajectories. All concepts constrain each forgotten condition: Σ λ_i < 1."""
    apply, _, schedule, config = request.pretrained
    chain = {"shape": config.sample_shape, "steps": options.chain_steps}
    problem = reverse_kl(
        apply,
        schedule,
        estimator=options.estimator,
        project=multipliers.capped_simplex(1 - options.max_multiplier),
        **chain,
    )
    visit = sample_trajectories(apply, schedule, **chain) if options.minibatches > 1 else None
    dual = controller(options, lambda thresholds: thresholds)
    batch = seeded(partial(condition_batch, request), options)
    formula = (
        "minimise KL(p‖q) subject to KL(p‖qᵢ) ≥ bᵢ: path KLs in nats along p's own trajectories, "
        "averaged over conditions"
    )
    return Setup(problem, dual, 0.0, batch, formula, (), visit)


def condition_batch(request: ConceptRequest, options: ConceptOptions, step: int) -> Batch:
    """The conditions of a step: each as often as any other, give or take one."""
    kept, separated = (
        data.batch_indices(seed=options.seed, step=step, size=size, count=len(conditions))
        for conditions, size in (
            (request.kept, options.batch_size),
            (request.separated, options.forget_batch_size),
        )
    )
    held = np.asarray(request.kept, np.int32)[kept]
    cond, base, targets = request.rows(separated)
    constraint = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    return Batch(Conditions(held, held), Conditions(cond, base, targets, constraint))


class Path(NamedTuple):
    """Points of a noising path of each stored sample: [n, steps, ...]; see `NoisyPoints`."""

    x_t: Any
    t: Any
    epsilon: Any
    posterior: Any
    push: Any


class StoredSamples(NamedTuple):
    """Samples of the reference, drawn once: of the bases, and of the kept conditions.

    Attributes:
      base: samples of the bases, [n, ...].
      h: what is bounded, at these: the classifier's posterior, or that calibrated, [n, m].
      values: what the training reweights by, [n, m]: h; or with --target-steps concepts, one drawn
        for each sample from its posterior at the end of its `path`, or none. The samples are then
        of q(x, c), which p_λ is a tilt of.
      separated: whose base each of the first was drawn from, [n].
      kept: samples of kept conditions.
      cond: what these show.
      path: of the samples of the bases, with --target-steps; else None.
      confusion: of the classifier on these samples, with --target-steps; else None.
    """

    base: np.ndarray
    h: np.ndarray
    values: np.ndarray
    separated: np.ndarray
    kept: np.ndarray
    cond: np.ndarray
    path: Path | None
    confusion: quantification.Confusion | None


def stored_samples(
    request: ConceptRequest, options: ConceptOptions, judged: Judging
) -> StoredSamples:
    """Unguided samples of the reference model: q itself is what the problem is about."""
    count, shape = options.stored_samples, request.pretrained.config.sample_shape
    reference = request.pretrained.params
    cond, separated = _sampled_under(request, count)
    batched = partial(in_batches, size=batch_rows(shape))
    key = jax.random.key(options.seed + 2)
    noise, other = (
        np.asarray(jax.random.normal(one, (count, *shape))) for one in jax.random.split(key)
    )
    bases = request.rows(separated)[1]
    base = batched(lambda _, *rows: judged.sample(reference, *rows), key, noise, bases)
    kept = batched(lambda _, *rows: judged.sample(reference, *rows), key, other, cond)
    h = values = batched(lambda _, x: judged.posterior(reference, x), key, base)
    path = confusion = None
    if options.target_steps:
        path, shown = _paths(request, options, base, separated)
        values = _one_of(shown, np.random.default_rng(options.seed))
        confusion = quantification.confusion(h, values)
        h = np.asarray(quantification.calibrate(h, confusion))
    return StoredSamples(base, h, values, separated, kept, cond, path, confusion)


def _sampled_under(request: ConceptRequest, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the stored samples are drawn under: kept conditions, and places of separated ones."""
    cond = np.resize(np.asarray(request.kept, np.int32), count)
    return cond, np.resize(np.arange(len(request.separated)), count)


def unmeasured_samples(request: ConceptRequest, options: ConceptOptions) -> StoredSamples:
    """Of the shapes of `stored_samples`, and of no memory: for a step that is only compiled."""
    count, shape = options.stored_samples, request.pretrained.config.sample_shape
    concepts, steps = len(request.concepts), options.target_steps
    cond, separated = _sampled_under(request, count)
    # Each shows one concept or none, in turn, and the classifier finds it.
    shown = np.eye(concepts + 1, dtype=np.float32)[np.arange(count) % (concepts + 1), :concepts]
    path = confusion = None
    if steps:
        points = (count, steps)
        path = Path(
            unmeasured(*points, *shape),
            unmeasured(*points, dtype=np.int32),
            unmeasured(*points, *shape),
            unmeasured(*points, concepts),
            unmeasured(*points, concepts, *shape),
        )
        confusion = quantification.confusion(shown, shown)
    images = unmeasured(count, *shape)
    return StoredSamples(images, shown, shown, separated, images, cond, path, confusion)


def _one_of(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most one of each row, drawn with these probabilities: 0 or 1, [n, m]."""
    upper = probabilities.cumsum(axis=1)
    drawn = rng.uniform(size=(len(upper), 1))
    return ((upper - probabilities <= drawn) & (drawn < upper)).astype(np.float32)


def _paths(
    request: ConceptRequest,
    options: ConceptOptions,
    base: np.ndarray,
    separated: np.ndarray,
) -> tuple[Path, np.ndarray]:
    """Noises the stored samples, each base taken as the mixture of candidates that fits it best.

    Also the probability of each concept at the end, [n, m].
    """
    apply, reference, schedule, config = request.pretrained
    bases = request.rows(separated)[1]
    # What is held to a base is among what the base shows: it would explain all by itself.
    told_apart = ~np.isin(request.candidates, bases)
    if request.members[:, told_apart].any(axis=0).all():
        told_apart[:] = True
    members = request.members[:, told_apart].astype(np.float32)
    concepts = jnp.asarray(np.asarray(request.candidates)[told_apart])
    judged = jax.jit(log_posterior(request, options, concepts))
    batched = partial(in_batches, size=batch_rows(config.sample_shape))
    log_p = batched(lambda _, x: judged(reference, x), jax.random.key(0), base)
    prior = np.zeros((len(base), len(concepts)), np.float32)
    for one in np.unique(bases):
        of_base = bases == one
        prior[of_base] = np.log(likelihoods.mixture_shares(log_p[of_base]))

    @jax.jit
    def follow(
        reference: Params, key: Array, x_0: Array, base: Array, prior: Array, times: Array
    ) -> tuple[Path, Array]:
        found = likelihoods.posterior_path(
            apply, reference, schedule, key,
            x_0=x_0, times=times, concepts=concepts, members=members, log_prior=prior,
        )  # fmt: skip

        def predict(point: tuple[Array, Array]) -> Array:
            x_t, t = point[0], jnp.full(base.shape, point[1])
            return losses.predict_epsilon(
                apply, reference, schedule, x_t=x_t, t=t, cond=base, clip=True
            )

        steps = jnp.broadcast_to(times[:, None], (len(times), len(base)))
        epsilon = jax.lax.map(predict, (found.x_t, times))
        parts = (found.x_t, steps, epsilon, found.posterior, found.push)
        path = Path(*(part.swapaxes(0, 1) for part in parts))
        return path, jnp.matmul(jnp.exp(found.log_posterior), members.T, precision="highest")

    weighting, rng = likelihoods.path_weighting(schedule), np.random.default_rng(options.seed)

    def batch(key: Array, x_0: Array, base: Array, prior: Array) -> tuple[Path, Array]:
        times = likelihoods.path_times(weighting, options.target_steps, rng)
        return follow(reference, key, x_0, base, prior, times)

    key = jax.random.key(options.seed + 4)
    return batched(batch, key, base, bases, prior)


def bounded(request: ConceptRequest, options: ConceptOptions, stored: StoredSamples) -> Judged:
    """What the constraints bound, h: the classifier's posterior, or that calibrated."""
    posterior = classifier(request, options)
    if stored.confusion is None:
        return posterior
    confusion = stored.confusion
    return lambda reference, x_0: quantification.calibrate(posterior(reference, x_0), confusion)


def likelihood_setup(
    request: ConceptRequest, options: ConceptOptions, stored: StoredSamples, thresholds: np.ndarray
) -> Setup:
    """Dual first: λ* on the stored samples, then distillation at it; fresh samples move λ.

    In the first half of the run, at equal distances, as many samples of the model are drawn as are
    stored of q, from new noise: from that of stored ones, which it was trained on, a model might
    show less than it does elsewhere. λ then takes a step of `multipliers.stored_dual`; constraints
    are to hold by a standard error. The second half is for the network to follow, as its step size
    falls.

    Raises:
      ValueError: for a threshold below what any stored sample has.
    """
    groups = _groups(request, stored)
    first = duality.likelihood_multipliers(
        stored.values, thresholds, groups=groups, key=jax.random.key(options.seed)
    )
    if not bool(first.solution.attained):
        least = ", ".join(f"{value:.3g}" for value in first.solution.largest_thresholds)
        raise ValueError(
            f"no reweighting of {len(stored.base)} stored samples meets the thresholds "
            f"{', '.join(f'{b:.3g}' for b in thresholds)}: the least they can show are {least}."
        )
    problem = likelihood_problem(request, options, stored)
    notes = (_dual_note(request, options, stored, first),)
    return problem._replace(multipliers=np.asarray(first.multipliers), notes=notes)


def likelihood_problem(
    request: ConceptRequest, options: ConceptOptions, stored: StoredSamples
) -> Setup:
    """What `likelihood_setup` sets up, but for the multipliers to start from, which are 0 here."""
    apply, _, schedule, config = request.pretrained
    groups = _groups(request, stored)
    if stored.path is None:
        dimensions = int(np.prod(config.sample_shape))
        weights = losses.noise_to_signal_weights(schedule.log_snr, dimensions)
        weighting = losses.time_weighting(weights)
        problem = distill_likelihood(apply, schedule, weighting, control_variate=True)
    else:
        problem = distill_posterior(apply, schedule, likelihoods.path_weighting(schedule))
    h = bounded(request, options, stored)
    # On several devices each takes as many rows: a few conditions come once more.
    devices = jax.device_count()
    rows = np.resize(stored.separated, -(-len(stored.base) // devices) * devices)
    count = options.corrections
    steps = {options.steps * part // (2 * count) for part in range(1, count + 1)} - {0}
    dual = multipliers.stored_dual(stored.values, groups=groups, margin=1.0)
    batch = sample_batch if stored.path is None else point_batch
    return Setup(
        problem._replace(fresh=fresh_samples(request, options, h)),
        dual if steps else optax.set_to_zero(),
        0.0,
        seeded(partial(batch, request, stored), options),
        _formula(stored),
        (),
        dual_batch=rows_of(request, request.rows(rows)[0]) if steps else None,
        dual_steps=tuple(sorted(steps)),
    )


def _formula(stored: StoredSamples) -> str:
    bound = "E_p[hᵢ(x)] ≤ εᵢ, h the reference's own posterior"
    if stored.confusion is not None:
        bound = quantification.FORMULA
    return f"minimise KL(p‖q) subject to {bound}"


def _dual_note(
    request: ConceptRequest,
    options: ConceptOptions,
    stored: StoredSamples,
    first: duality.SampledSolution,
) -> str:
    assert first.interval is not None
    shown = "; ".join(
        f"{concept} {value:.3g} ({low:.3g} to {high:.3g})"
        for concept, value, low, high in zip(
            request.concepts, first.multipliers, *first.interval, strict=True
        )
    )
    note = (
        f"Multipliers from {len(stored.base)} stored samples, before any training, with 95 % "
        f"bootstrap intervals: {shown}. They leave {float(first.effective):.0%} of the samples' "
        "effective number."
    )
    if stored.confusion is not None:
        found = "; ".join(
            f"{concept} in {shown:.3g} of those that show it and {elsewhere:.3g} of those without"
            for concept, shown, elsewhere in zip(
                request.concepts,
                np.diag(stored.confusion.shown),
                stored.confusion.elsewhere,
                strict=True,
            )
        )
        note += (
            f" On these samples the classifier finds {found}: hᵢ is its posterior, calibrated for "
            "this, and its mean the share of samples that show the concept."
        )
    if options.corrections:
        note += " During the run fresh samples of the model move them."
    return note


def _groups(request: ConceptRequest, stored: StoredSamples) -> np.ndarray:
    """The base of each stored sample: p keeps the share of each."""
    return np.array([one.base for one in request.separated])[stored.separated]


def has_floor(stored: StoredSamples | None) -> bool:
    """Whether there are samples enough for `floor_of`; of paths there are."""
    return stored is None or len(stored.base) >= LEAST_SAMPLES


def floor_of(
    request: ConceptRequest,
    options: ConceptOptions,
    thresholds: np.ndarray,
    share: float,
    stored: StoredSamples | None,
    ratios: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> duality.Floor:
    """What no model that meets the thresholds can pay less than, in the objective's unit.

    Of the objective, an average over conditions, the forgotten ones have a `share`; what is kept
    costs 0 or more. `ratios` returns those of `path_log_ratios`, if they are known already.
    """
    key = jax.random.key(options.seed + 5)
    if stored is not None:
        bases = _groups(request, stored)
        enough = np.unique(bases, return_counts=True)[1].min() >= LEAST_SAMPLES
        # Without groups the floor is a lower one, which holds for families too.
        groups = bases if enough else None
        found = duality.likelihood_floor(stored.h, thresholds, groups=groups, key=key)
    else:
        known = partial(path_log_ratios, request, options) if ratios is None else ratios
        found_ratios, groups = known()
        found = duality.reverse_kl_floor(found_ratios, thresholds, groups=groups, key=key)
    lower = None if found.lower is None else share * found.lower
    return found._replace(value=share * found.value, stderr=share * found.stderr, lower=lower)


def path_log_ratios(
    request: ConceptRequest, options: ConceptOptions
) -> tuple[np.ndarray, np.ndarray]:
    """log dQ/dQ_i in nats along paths of the reference at the bases, and whose base each is."""
    apply, reference, schedule, config = request.pretrained
    count = len(request.separated)
    separated = np.tile(np.arange(count), max(-(-options.evaluation_images // count), LEAST_PATHS))
    _, base, targets = request.rows(separated)

    @jax.jit
    def ratios(reference: Params, key: Array, base: Array, targets: Array) -> Array:
        return likelihoods.path_log_ratios(
            apply, reference, schedule, key,
            base=base, targets=targets, shape=config.sample_shape, steps=options.chain_steps,
        )  # fmt: skip

    found = in_batches(
        partial(ratios, reference),
        jax.random.key(options.seed + 6),
        base,
        targets,
        size=batch_rows(config.sample_shape),
    )
    return found, separated


def sample_batch(
    request: ConceptRequest, stored: StoredSamples, options: ConceptOptions, step: int
) -> Batch:
    """The stored samples of a step, each as often as any other."""
    kept, chosen, cond, base = _chosen(request, options, stored, step, len(stored.base))
    values = stored.values[chosen]
    constraint = np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape)
    return Batch(kept, Samples(stored.base[chosen], cond, base, values, constraint))


def point_batch(
    request: ConceptRequest, stored: StoredSamples, options: ConceptOptions, step: int
) -> Batch:
    """The points of a step, each of each stored sample as often as any other."""
    assert stored.path is not None
    steps = stored.path.t.shape[1]
    kept, point, cond, _ = _chosen(request, options, stored, step, len(stored.base) * steps)
    chosen, place = np.divmod(point, steps)
    x_t, t, epsilon, posterior, push = (part[chosen, place] for part in stored.path)
    values = stored.values[chosen]
    constraint = np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape)
    points = NoisyPoints(x_t, t, cond, epsilon, posterior, push, values, constraint)
    return Batch(kept, points)


def _chosen(
    request: ConceptRequest, options: ConceptOptions, stored: StoredSamples, step: int, count: int
) -> tuple[Images, np.ndarray, np.ndarray, np.ndarray]:
    """Kept samples, places below `count`, some for each stored sample, and their conditions."""
    kept, chosen, which = (
        data.batch_indices(seed=options.seed, step=step, size=size, count=one)
        for size, one in (
            (options.batch_size, len(stored.kept)),
            (options.forget_batch_size, count),
            (options.forget_batch_size, len(request.separated)),
        )
    )
    if len({one.base for one in request.separated}) > 1:
        which = stored.separated[chosen // (count // len(stored.base))]
    cond, base, _ = request.rows(which)
    return Images(stored.kept[kept], stored.cond[kept]), chosen, cond, base
