"""Losses along the model's own trajectories: what on-policy formulations share.

The ancestral chain of p_θ visits `steps` of the schedule's time steps. Each row of a batch is one
trajectory, and every time step of it a training point.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.divergences import Chain, chain
from jax_unlearn.problem import (
    Batch,
    Conditions,
    Evaluate,
    Losses,
    TrajectoryPoints,
    row_shares,
)
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["Visit", "sample_trajectories"]


class Rows(NamedTuple):
    """A batch of conditions as arrays: kept rows, then f rows with k targets and l likelihoods.

    Attributes:
      keys: of each row's noise, [n].
      cond: [n, ...].
      base: [n, ...].
      kept: how many rows are kept ones.
      target: [f · k, ...], row by row.
      separated: the constraint of each target, [f, k].
      likely: the number of each likelihood, [f, l].
    """

    keys: Array
    cond: Condition
    base: Condition
    kept: int
    target: Condition
    separated: Array
    likely: Array


def concatenate(*trees: Any) -> Any:
    """Concatenates the leaves of trees along their first axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def as_rows(batch: Batch, key: Array, axis_name: str | None) -> Rows:
    """Concatenates the rows of a batch and gives each its own key, whatever its device."""
    kept, forget = batch.kept, batch.forget
    given = [forget] if kept is None else [kept, forget]
    if batch.base is not None or not all(isinstance(part, Conditions) for part in given):
        raise ValueError(
            "on-policy formulations take a Batch of Conditions, or of TrajectoryPoints, and no "
            f"base; got {' and '.join(type(part).__name__ for part in given)}."
        )
    if forget.constraint is None:
        raise ValueError("rows of forget need the number of their constraint.")
    constraint, target = jnp.asarray(forget.constraint), forget.target
    if constraint.ndim == 2:
        target = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), target)
    separated = constraint.reshape(constraint.shape[0], -1)
    likely = separated[:, :0]
    if target is None:
        separated, likely = likely, separated
    if forget.likelihood is not None:
        likely = jnp.asarray(forget.likelihood).reshape(constraint.shape[0], -1)
    kept_key, forget_key = jax.random.split(key)
    keys = losses.example_keys(forget_key, constraint.shape[0], axis_name=axis_name)
    if kept is None:
        return Rows(keys, forget.cond, forget.base, 0, target, separated, likely)
    leaves = jax.tree.leaves((kept.cond, kept.base))
    if not leaves:
        raise ValueError(
            "kept rows need a cond or a base to be counted by: without conditions p is one "
            "distribution, and the rows of `forget` hold it to its base."
        )
    count = leaves[0].shape[0]
    kept_keys = losses.example_keys(kept_key, count, axis_name=axis_name)
    return Rows(
        keys=jnp.concatenate([kept_keys, keys]),
        cond=concatenate(kept.cond, forget.cond),
        base=concatenate(kept.base, forget.base),
        kept=count,
        target=target,
        separated=separated,
        likely=likely,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bounded(bound: float, prediction: Array, x_t: Array) -> tuple[Array, Array, Array]:
    """(prediction, prediction, x_t): what a step's losses see, and what its sampler goes on with.

    Backwards, the cotangents of the last two are shortened row by row until that of the prediction
    is at most `bound` times as long as the losses' own.
    """
    del bound
    return prediction, prediction, x_t


def _bounded_forward(
    bound: float, prediction: Array, x_t: Array
) -> tuple[tuple[Array, Array, Array], None]:
    return _bounded(bound, prediction, x_t), None


def _bounded_backward(
    bound: float, _: None, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    own, later, carried = cotangents

    def norm(values: Array) -> Array:
        squares = jnp.square(values).sum(axis=tuple(range(1, values.ndim)), keepdims=True)
        return jnp.sqrt(jnp.maximum(squares, jnp.finfo(values.dtype).tiny))

    scale = jnp.minimum(1.0, bound * norm(own) / norm(later))
    return own + scale * later, scale * carried


_bounded.defvjp(_bounded_forward, _bounded_backward)


def run(
    predict: Callable[[Array, Array], Array],
    compare: Callable[[Array, Array, Array, Array], Any],
    chain: Chain,
    keys: Array,
    *,
    bound: float,
) -> tuple[Any, Array]:
    """Samples one trajectory a row; compare(x_t, t, logSNR_t, ε_θ(x_t, t)) at each of its steps.

    One scan, which keeps x_t and runs each step's network again for the backward pass; what is
    named "frozen" is kept too.

    Args:
      predict: (x_t, t [n]) -> the network's output.
      compare: (x_t, t [n], logSNR_t [n], ε) -> a tree of values, each [rows]; ε is that of the
        schedule's clipped x̂_0, if it clips.
      chain: of the sampler.
      keys: of each row's noise, [n].
      bound: of the derivatives through the trajectory, row by row and step by step, relative to
        those through ε at given x_t: 0 holds the trajectory fixed, ∞ is the whole derivative.

    Returns:
      The values, with a first axis of steps, and the ends x_0 of the trajectories.
    """
    count = keys.shape[0]

    def noise(step: Array | int) -> Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), chain.shape))(
            keys
        )

    policy = jax.checkpoint_policies.save_only_these_names("frozen")

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def body(x_t: Array, inputs: tuple[Array, ...]) -> tuple[Array, Any]:
        step, time, log_snr, following = inputs
        t = jnp.full((count,), time)
        prediction = predict(x_t, t)
        if bound == 0:
            going_on, x = jax.lax.stop_gradient(prediction), x_t
        elif bound == np.inf:
            going_on, x = prediction, x_t
        else:
            prediction, going_on, x = _bounded(bound, prediction, x_t)
        epsilon = schedules.clipped(prediction, chain.schedule, x_t=x_t, log_snr=log_snr).epsilon
        terms = compare(x_t, t, jnp.full((count,), log_snr), epsilon)
        x_s = samplers.ddpm_step(
            going_on,
            x_t=x,
            noise=noise(step),
            log_snr_t=log_snr,
            log_snr_s=following,
            schedule=chain.schedule,
        )
        return x_s, terms

    steps = jnp.arange(chain.times.shape[0])
    inputs = (steps, chain.times, chain.log_snr, chain.following)
    x_0, terms = jax.lax.scan(body, noise(steps.shape[0]), inputs)
    return terms, x_0


def _no_likelihoods(x_0: Array) -> Array:
    del x_0
    raise ValueError(
        "the batch asks for likelihoods, by rows without a target or by `likelihood`, and the "
        "problem has none."
    )


def conditions_of(batch: Batch) -> Batch:
    """The conditions of stored points."""
    if not isinstance(batch.kept, TrajectoryPoints | None):
        raise ValueError(
            f"kept must be stored points as forget is, not {type(batch.kept).__name__}."
        )
    kept = None if batch.kept is None else batch.kept.conditions
    return Batch(kept, batch.forget.conditions, batch.base)


def path_losses(
    apply: Denoiser,
    reference_apply: Denoiser,
    chain: Chain,
    likelihoods: Callable[[Array], Array] = _no_likelihoods,
    gradients: Callable[[Array, Array], Array] | None = None,
    *,
    bound: float,
    separations: int = 0,
) -> Evaluate:
    """The losses of path KLs and of likelihoods at the ends of the same trajectories.

    The objective is the path KL to `base`, constraint values are those to each `target`, then
    h_j(x_0). Where the trajectory is held fixed h_j(x_0) has no gradient, and the objective
    regresses on ε_q + σ_t Σ_j λ_j ∇h_j in its place: with the constraints' multipliers λ_i the
    whole is then stationary at ε_q + (Σ_i λ_i (ε_q − ε_i) + σ_t Σ_j λ_j ∇h_j)/(1 − Σ_i λ_i).
    Each row is a problem of its own condition, `Losses.share` the part of the rows that a
    constraint is on.

    Args:
      apply: the denoiser of p.
      reference_apply: that of q and q_i.
      chain: of the sampler.
      likelihoods: x_0 [f, ...] -> h [f, l].
      gradients: (x_t [f, ...], t [f]) -> ∇h, [f, l, ...]; None differentiates h at the
        reference's x̂_0.
      bound: of derivatives through the trajectory, see `run`.
      separations: how many constraints on path KLs come before the likelihoods in the order of
        multipliers and thresholds.
    """
    pathwise = bound > 0

    def evaluate(
        params: Params,
        reference: Params,
        key: Array,
        batch: Batch,
        current: Array,
        /,
        *,
        axis_name: str | None = None,
    ) -> Losses:
        stored = isinstance(batch.forget, TrajectoryPoints)
        rows = as_rows(conditions_of(batch) if stored else batch, key, axis_name)
        count, kept = rows.keys.shape[0], rows.kept
        forgotten, each = rows.separated.shape
        if each and jax.tree.structure(rows.base) != jax.tree.structure(rows.target):
            raise ValueError("base and target are conditions of one reference: of one structure.")
        if each and likelihoods is not _no_likelihoods and not separations:
            raise ValueError("a likelihood problem has no target: leave it None in the batch.")
        conditions = concatenate(rows.base, rows.target) if each else rows.base
        guides = rows.likely.shape[1] and not pathwise

        def for_each(values: Array) -> Array:
            return jnp.repeat(values[kept:], each, axis=0)

        def theirs(x_t: Array, t: Array, log_snr: Array) -> schedules.Predictions:
            """The reference's at every row's base, then at every target; clipped as it says."""
            x_t, t, log_snr = (jnp.concatenate([a, for_each(a)]) for a in (x_t, t, log_snr))
            prediction = checkpoint_name(reference_apply(reference, x_t, t, conditions), "frozen")
            return schedules.clipped(prediction, chain.schedule, x_t=x_t, log_snr=log_snr)

        def guidance(x_t: Array, t: Array, log_snr: Array) -> tuple[Array, Array]:
            """σ Σ_j λ_j ∇h_j, and the reference's ε."""
            # λ as it acts on each row, [f, l]: zero for likelihoods that are not the row's.
            at = current[separations:]
            reached = jnp.zeros((forgotten, at.shape[0]), at.dtype)
            reached = reached.at[jnp.arange(forgotten)[:, None], rows.likely].add(at[rows.likely])
            if gradients is None:

                def penalty(x_t: Array) -> tuple[Array, Array]:
                    at_x = theirs(x_t, t, log_snr)
                    return (reached * likelihoods(at_x.x_0[kept:count])).sum(), at_x.epsilon

                push, epsilon = jax.grad(penalty, has_aux=True)(x_t)
            else:
                epsilon = theirs(x_t, t, log_snr).epsilon
                push = jnp.einsum("fm,fm...->f...", reached, gradients(x_t[kept:], t[kept:]))
                push = jnp.concatenate([jnp.zeros_like(x_t[:kept]), push])
            return schedules.alpha_sigma(log_snr, x_t)[1] * push, epsilon

        def compare(x_t: Array, t: Array, log_snr: Array, epsilon: Array) -> tuple[Array, ...]:
            """What the objective regresses on, the path KL to the base, and to each target."""
            push = None
            if guides:
                push, others = guidance(x_t, t, log_snr)
            else:
                others = theirs(x_t, t, log_snr).epsilon
            held = losses.squared_error(epsilon, others[:count])
            separated = losses.squared_error(for_each(epsilon), others[count:])
            if push is None:
                return held, held, separated
            return losses.squared_error(epsilon, others[:count] + push), held, separated

        def predict(x_t: Array, t: Array) -> Array:
            return apply(params, x_t, t, rows.cond)

        x_0 = None
        if stored:
            if pathwise:
                raise ValueError("stored points have no derivative: use an estimator without one.")
            parts = [part for part in (batch.kept, batch.forget) if part is not None]
            x_t = jnp.concatenate([part.x_t for part in parts])
            step = jnp.concatenate([part.step for part in parts])
            t, log_snr = chain.times[step], chain.log_snr[step]
            epsilon = schedules.clipped(predict(x_t, t), chain.schedule, x_t=x_t, log_snr=log_snr)
            weight = chain.weights.shape[0] * chain.weights[step]
            held, kl, separated = compare(x_t, t, log_snr, epsilon.epsilon)
            objective, path_kl, values = weight * held, weight * kl, for_each(weight) * separated
        else:
            terms, x_0 = run(predict, compare, chain, rows.keys, bound=bound)
            objective, path_kl, values = (
                (chain.weights[:, None] * term).sum(axis=0) for term in terms
            )
        index, diagnostics = rows.separated.reshape(-1), {}
        if rows.likely.shape[1] and x_0 is not None:
            h = likelihoods(x_0[kept:])
            expected = (forgotten, current.shape[0] - separations)
            if h.shape != expected:
                raise ValueError(
                    f"likelihoods must return one value for each of {expected[1]} constraints, "
                    f"{list(expected)}, not {list(h.shape)}."
                )
            h = h[jnp.arange(forgotten)[:, None], rows.likely]
            values = jnp.concatenate([values, h.reshape(-1)])
            index = jnp.concatenate([index, separations + rows.likely.reshape(-1)])
        if guides:
            mean = path_kl.mean()
            mean = mean if axis_name is None else jax.lax.pmean(mean, axis_name)
            diagnostics = {"path_kl": mean}
        constrained = jnp.concatenate(
            [rows.separated.reshape(-1), separations + rows.likely.reshape(-1)]
        )
        share = row_shares(constrained, current.shape[0], count, axis_name)
        return Losses(objective, values, index, share, diagnostics)

    return evaluate


Visit = Callable[..., Batch]
"""(params, key, batch, *, axis_name=None) -> a `Batch` of points; see `sample_trajectories`."""


def sample_trajectories(
    apply: Denoiser, schedule: schedules.NoiseSchedule, *, shape: tuple[int, ...], steps: int
) -> Visit:
    """A function (params, key, batch of conditions) -> x_t of the model's own chain.

    With the same key they are those of an on-policy formulation's losses, with the same shape and
    steps, whose errors it raises.

    Returns:
      A function whose result has `TrajectoryPoints` with leading axes [steps, rows, ...]: `step`
      counts 0, 1, …; `conditions` have the axis of rows alone.

    Example: two steps of three rows.
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> visit = formulations.sample_trajectories(
      ...     lambda params, x_t, t, cond: x_t, schedule, shape=(4,), steps=2
      ... )
      >>> rows = Conditions(None, None, constraint=jnp.zeros(3, int))
      >>> points = visit(None, jax.random.key(0), Batch(None, rows)).forget
      >>> points.x_t.shape, points.step[:, 0].tolist()
      ((2, 3, 4), [0, 1])
    """
    along = chain(schedule, shape, steps)

    def visit(params: Params, key: Array, batch: Batch, *, axis_name: str | None = None) -> Batch:
        rows = as_rows(batch, key, axis_name)
        x_t, _ = run(
            lambda x_t, t: apply(params, x_t, t, rows.cond),
            lambda x_t, t, log_snr, epsilon: x_t,
            along,
            rows.keys,
            bound=0.0,
        )
        place = jnp.broadcast_to(jnp.arange(steps)[:, None], x_t.shape[:2])
        forget = TrajectoryPoints(batch.forget, x_t[:, rows.kept :], place[:, rows.kept :])
        if batch.kept is None:
            return Batch(None, forget)
        kept = TrajectoryPoints(batch.kept, x_t[:, : rows.kept], place[:, : rows.kept])
        return Batch(kept, forget)

    return visit
