"""The two problems of concepts, and their batches: conditions alone, or stored samples."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import losses, multipliers, quantification
from jax_unlearn import minibatched as replay
from jax_unlearn.app import data
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import batch_rows, estimate, in_batches
from jax_unlearn.app.tasks.concept_evaluation import Shows, classifier, draw, log_posterior
from jax_unlearn.app.tasks.concept_problem import Problem
from jax_unlearn.duality import stored_samples as dual_first
from jax_unlearn.formulations import (
    ConditionBatch,
    Examples,
    Formulation,
    Held,
    Points,
    PosteriorBatch,
    SampleBatch,
    Samples,
    Separated,
    likelihood,
    reverse_kl,
)
from jax_unlearn.likelihoods import posteriors
from jax_unlearn.typing import Array, Params

__all__ = [
    "Pool",
    "Posed",
    "condition_batch",
    "corrections",
    "likelihood_problem",
    "point_batch",
    "reverse_kl_problem",
    "sample_batch",
    "stored_samples",
]


class Posed(NamedTuple):
    """What the algorithm runs.

    Attributes:
      formulation: with its dual domain.
      dual: optimizer of the multipliers.
      multipliers: to start from, [m] or a scalar.
      batch: step -> what the formulation sees.
      notes: what the owner should know.
      visit: of `replay.minibatched`, with --minibatches.
    """

    formulation: Formulation
    dual: optax.GradientTransformation
    multipliers: np.ndarray | float
    batch: Callable[[int], ConditionBatch | SampleBatch | PosteriorBatch]
    notes: tuple[str, ...]
    visit: replay.Visit | None = None


def reverse_kl_problem(
    problem: Problem, options: ConceptOptions, thresholds: np.ndarray, share: float
) -> Posed:
    """On its own trajectories. The domain is Σ λ_i < share, as each λ_i meets 1/share there."""
    apply, _, schedule, config = problem.pretrained
    chain = {"shape": config.sample_shape, "steps": options.chain_steps}
    formulation = reverse_kl(apply, schedule, estimator=options.estimator, **chain)
    visit = replay.trajectories(apply, schedule, **chain) if options.minibatches > 1 else None
    project = multipliers.capped_simplex(1 - options.max_multiplier * share)
    scale = share / np.maximum(thresholds, 1e-12) / len(thresholds)
    dual = multipliers.nu_pi(
        integral=jnp.asarray(options.dual_learning_rate * scale, jnp.float32),
        proportional=jnp.asarray(options.dual_damping * scale, jnp.float32),
        nu=0.9,
    )
    batch = partial(condition_batch, problem, options)
    return Posed(formulation._replace(project=project), dual, 0.0, batch, (), visit)


def condition_batch(problem: Problem, options: ConceptOptions, step: int) -> ConditionBatch:
    """The conditions of a step: each as often as any other, give or take one."""
    kept, separated = (
        data.batch_indices(seed=options.seed, step=step, size=size, count=len(conditions))
        for conditions, size in (
            (problem.kept, options.batch_size),
            (problem.separated, options.forget_batch_size),
        )
    )
    held = np.asarray(problem.kept, np.int32)[kept]
    cond, base, targets = problem.rows(separated)
    constraint = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    return ConditionBatch(Held(held, held), Separated(cond, base, targets, constraint))


class Path(NamedTuple):
    """Points of a noising path of each stored sample: [n, steps, ...]; see `Points`."""

    x_t: Any
    t: Any
    epsilon: Any
    posterior: Any
    push: Any


class Pool(NamedTuple):
    """Stored samples of the reference: of the bases, and of the kept conditions.

    `separated` says whose base each of the first was drawn from, `cond` what the others show.
    `values` [n, m] are h; with --target-steps they are concepts, one drawn for each sample from its
    posterior at the end of its `path`, or none: samples of q(x, c), which p_λ is a tilt of.
    `confusion` is then that of h. Without, it is None, as the path is.
    """

    base: np.ndarray
    values: np.ndarray
    separated: np.ndarray
    kept: np.ndarray
    cond: np.ndarray
    path: Path | None
    confusion: quantification.Confusion | None


def stored_samples(problem: Problem, options: ConceptOptions) -> Pool:
    """Unguided samples of the reference model: q itself is what the problem is about."""
    count, shape = options.stored_samples, problem.pretrained.config.sample_shape
    sampled = jax.jit(partial(draw, problem, options, problem.pretrained.params))
    cond = np.resize(np.asarray(problem.kept, np.int32), count)
    separated = np.resize(np.arange(len(problem.separated)), count)
    batched = partial(in_batches, size=batch_rows(shape))
    key = jax.random.key(options.seed + 2)
    noise, other = (
        np.asarray(jax.random.normal(one, (count, *shape))) for one in jax.random.split(key)
    )
    base = batched(lambda _, *rows: sampled(*rows), key, noise, problem.rows(separated)[1])
    kept = batched(lambda _, *rows: sampled(*rows), key, other, cond)
    judged = jax.jit(classifier(problem, options))
    values = batched(lambda _, x: judged(x), key, base)
    path = confusion = None
    if options.target_steps:
        path, shown = _paths(problem, options, base, separated)
        labels = _one_of(shown, np.random.default_rng(options.seed))
        confusion = quantification.confusion(values, labels)
        values = labels
    return Pool(base, values, separated, kept, cond, path, confusion)


def _one_of(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most one of each row, drawn with these probabilities: 0 or 1, [n, m]."""
    upper = probabilities.cumsum(axis=1)
    drawn = rng.uniform(size=(len(upper), 1))
    return ((upper - probabilities <= drawn) & (drawn < upper)).astype(np.float32)


def _paths(
    problem: Problem,
    options: ConceptOptions,
    base: np.ndarray,
    separated: np.ndarray,
) -> tuple[Path, np.ndarray]:
    """Noises the stored samples, each base taken as the mixture of candidates that fits it best.

    Also the probability of each concept at the end, [n, m].
    """
    apply, reference, schedule, config = problem.pretrained
    bases = problem.rows(separated)[1]
    # What is held to a base is among what the base shows: it would explain all by itself.
    told_apart = ~np.isin(problem.candidates, bases)
    if problem.members[:, told_apart].any(axis=0).all():
        told_apart[:] = True
    members = problem.members[:, told_apart].astype(np.float32)
    concepts = jnp.asarray(np.asarray(problem.candidates)[told_apart])
    judged = jax.jit(log_posterior(problem, options, concepts))
    batched = partial(in_batches, size=batch_rows(config.sample_shape))
    log_p = batched(lambda _, x: judged(x), jax.random.key(0), base)
    prior = np.zeros((len(base), len(concepts)), np.float32)
    for one in np.unique(bases):
        of_base = bases == one
        prior[of_base] = np.log(posteriors.mixture_shares(log_p[of_base]))

    @jax.jit
    def follow(
        key: Array, x_0: Array, base: Array, prior: Array, times: Array
    ) -> tuple[Path, Array]:
        found = posteriors.posterior_path(
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

    weighting, rng = posteriors.path_weighting(schedule), np.random.default_rng(options.seed)

    def batch(key: Array, x_0: Array, base: Array, prior: Array) -> tuple[Path, Array]:
        times = posteriors.path_times(weighting, options.target_steps, rng)
        return follow(key, x_0, base, prior, times)

    key = jax.random.key(options.seed + 4)
    return batched(batch, key, base, bases, prior)


def likelihood_problem(
    problem: Problem, options: ConceptOptions, pool: Pool, thresholds: np.ndarray, share: float
) -> Posed:
    """Dual first: λ* on the stored samples, then distillation at it; `corrections` move λ.

    Raises:
      ValueError: for a threshold below what any stored sample has.
    """
    apply, _, schedule, config = problem.pretrained
    first = dual_first.likelihood_multipliers(
        pool.values,
        thresholds,
        groups=_groups(problem, pool),
        key=jax.random.key(options.seed),
    )
    if not bool(first.solution.attained):
        least = ", ".join(f"{value:.3g}" for value in first.solution.largest_thresholds)
        raise ValueError(
            f"no reweighting of {len(pool.base)} stored samples meets the thresholds "
            f"{', '.join(f'{b:.3g}' for b in thresholds)}: the least they can show are {least}."
        )
    assert first.interval is not None
    shown = "; ".join(
        f"{concept} {value:.3g} ({low:.3g} to {high:.3g})"
        for concept, value, low, high in zip(
            problem.concepts, first.multipliers, *first.interval, strict=True
        )
    )
    note = (
        f"Multipliers from {len(pool.base)} stored samples, for one forgotten condition alone, "
        f"with 95 % bootstrap intervals: {shown}. They leave {float(first.effective):.0%} of the "
        f"samples' effective number. In the certificate they are times {share:.3g}, the forgotten "
        "conditions' part of the objective."
    )
    if pool.confusion is not None:
        found = "; ".join(
            f"{concept} in {shown:.3g} of those that show it and {elsewhere:.3g} of those without"
            for concept, shown, elsewhere in zip(
                problem.concepts,
                np.diag(pool.confusion.shown),
                pool.confusion.elsewhere,
                strict=True,
            )
        )
        note += (
            f" On these samples the classifier finds {found}: shares are its averages on samples "
            "of the model, corrected for this."
        )
    if options.corrections:
        note += " During the run they are corrected by what samples of the model itself show."
    if pool.path is None:
        dimensions = int(np.prod(config.sample_shape))
        weights = losses.noise_to_signal_weights(schedule.log_snr, dimensions)
        formulation = likelihood(
            apply,
            schedule,
            estimator="tilt",
            weighting=losses.time_weighting(weights),
            control_variate=True,
        )
    else:
        weighting = posteriors.path_weighting(schedule)
        formulation = likelihood(apply, schedule, estimator="posterior", weighting=weighting)
    return Posed(
        formulation,
        optax.set_to_zero(),
        np.asarray(first.multipliers) * share,
        partial(sample_batch if pool.path is None else point_batch, problem, options, pool),
        (note,),
    )


def _groups(problem: Problem, pool: Pool) -> np.ndarray:
    """The base of each stored sample: p keeps the share of each."""
    return np.array([one.base for one in problem.separated])[pool.separated]


def corrections(
    problem: Problem,
    options: ConceptOptions,
    pool: Pool,
    shows: Shows,
    thresholds: np.ndarray,
    share: float,
) -> dict[int, Callable[[Params, Array], Array]]:
    """Steps up to the middle of the run -> (params, λ) -> λ after a step of dual ascent.

    Each by as many samples of the model as are stored of q, from new noise: from that of stored
    ones, which it was trained on, a model might show less than it does elsewhere. The constraints
    are to hold by a standard error. The second half is for the network to follow, as its step size
    falls.
    """
    cond = problem.rows(pool.separated)[0]

    def correct(step: int, params: Params, current: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(options.seed + 3), step)
        # As of one forgotten condition alone: the objective has only their share of all rows.
        alone = dual_first.likelihood_correction(
            estimate(shows(params, key, cond)),
            thresholds,
            current / share,
            stored=pool.values,
            groups=_groups(problem, pool),
            margin=1.0,
        )
        return (share * alone).astype(current.dtype)

    count = options.corrections
    steps = {options.steps * part // (2 * count) for part in range(1, count + 1)} - {0}
    return {step: partial(correct, step) for step in sorted(steps)}


def sample_batch(problem: Problem, options: ConceptOptions, pool: Pool, step: int) -> SampleBatch:
    """The stored samples of a step, each as often as any other."""
    kept, chosen, cond, base = _chosen(problem, options, pool, step, len(pool.base))
    values = pool.values[chosen]
    constraint = np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape)
    return SampleBatch(kept, Samples(pool.base[chosen], cond, base, values, constraint))


def point_batch(problem: Problem, options: ConceptOptions, pool: Pool, step: int) -> PosteriorBatch:
    """The points of a step, each of each stored sample as often as any other."""
    assert pool.path is not None
    steps = pool.path.t.shape[1]
    kept, point, cond, _ = _chosen(problem, options, pool, step, len(pool.base) * steps)
    chosen, place = np.divmod(point, steps)
    x_t, t, epsilon, posterior, push = (part[chosen, place] for part in pool.path)
    values = pool.values[chosen]
    constraint = np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape)
    points = Points(x_t, t, cond, epsilon, posterior, push, values, constraint)
    return PosteriorBatch(kept, points)


def _chosen(
    problem: Problem, options: ConceptOptions, pool: Pool, step: int, count: int
) -> tuple[Examples, np.ndarray, np.ndarray, np.ndarray]:
    """Kept samples, places below `count`, some for each stored sample, and their conditions."""
    kept, chosen, which = (
        data.batch_indices(seed=options.seed, step=step, size=size, count=one)
        for size, one in (
            (options.batch_size, len(pool.kept)),
            (options.forget_batch_size, count),
            (options.forget_batch_size, len(problem.separated)),
        )
    )
    if len({one.base for one in problem.separated}) > 1:
        which = pool.separated[chosen // (count // len(pool.base))]
    cond, base, _ = problem.rows(which)
    return Examples(pool.kept[kept], pool.cond[kept]), chosen, cond, base
