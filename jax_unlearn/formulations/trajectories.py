"""Losses along the model's own trajectories: what reverse-KL and likelihood problems share.

The ancestral chain of p_θ visits `steps` of the schedule's time steps. Each row of a batch is one
trajectory, and every time step of it a training point.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_unlearn import divergences, losses, samplers, schedules
from jax_unlearn.formulations.base import Evaluate, Losses, reach
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["ConditionBatch", "Held", "Separated", "Stored"]


class Held(NamedTuple):
    """Conditions [n, ...] at which p(·|cond) is held to q(·|base); usually the same."""

    cond: Condition
    base: Condition


class Separated(NamedTuple):
    """Conditions at which p is held to one distribution and moved away from others.

    Attributes:
      cond: what p is conditioned on, [f, ...]; None for a model without conditions.
      base: p(·|cond) is held to q(·|base), [f, ...]: the null label, or an anchor.
      target: q_i is q(·|target), [f, ...], or [f, k, ...] for k constraints on each row's
        trajectory; None in likelihood problems, where h_i says what to forget.
      constraint: the constraint i that each belongs to, integer [f] or [f, k].
      likelihood: in mixed problems, the number j of the h_j on each row, integer [f] or [f, l];
        there `constraint` is of the targets alone. None elsewhere.
    """

    cond: Condition
    base: Condition
    target: Condition
    constraint: Any
    likelihood: Any = None


class ConditionBatch(NamedTuple):
    """What an on-policy step sees: conditions alone; the images are the model's own.

    Their frequencies are the law of conditions π of the problem over condition and image
    jointly: objective Σ_c π(c) KL(p(·|c)‖q(·|base_c)), each constraint a mean over its rows.
    """

    kept: Held | None
    forget: Separated


class Stored(NamedTuple):
    """Points of trajectories that were sampled before, for estimators that hold them fixed.

    Each row's loss is that of one time step, times their number: the mean over uniform steps of
    a trajectory is its loss. Without the trajectories' ends there are no values of h.

    Attributes:
      conditions: whose trajectories they are.
      x_t: the point of each kept row and of each row of `forget`: (None or [n, ...], [f, ...]).
      step: the places in the chain, 0 the noisiest: (None or integer [n], integer [f]).
    """

    conditions: ConditionBatch
    x_t: tuple[Any, Any]
    step: tuple[Any, Any]


class Rows(NamedTuple):
    """A `ConditionBatch` laid out: kept rows first, then f rows with k targets and l likelihoods.

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


def lay_out(batch: ConditionBatch, key: Array, axis_name: str | None) -> Rows:
    """Concatenates the rows of a batch and gives each its own key, whatever its device."""
    forget, constraint = batch.forget, jnp.asarray(batch.forget.constraint)
    target = forget.target
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
    if batch.kept is None:
        return Rows(keys, forget.cond, forget.base, 0, target, separated, likely)
    leaves = jax.tree.leaves(batch.kept)
    if not leaves:
        raise ValueError(
            "kept rows need a cond or a base to be counted by: without conditions p is one "
            "distribution, and the rows of `forget` hold it to its base."
        )
    kept = leaves[0].shape[0]
    kept_keys = losses.example_keys(kept_key, kept, axis_name=axis_name)
    return Rows(
        keys=jnp.concatenate([kept_keys, keys]),
        cond=concatenate(batch.kept.cond, forget.cond),
        base=concatenate(batch.kept.base, forget.base),
        kept=kept,
        target=target,
        separated=separated,
        likely=likely,
    )


class Chain(NamedTuple):
    """An ancestral chain: the event's shape, its time steps, log-SNRs and path-KL weights.

    `following` are the log-SNRs after each step; the last is +∞, the clean image.
    """

    schedule: schedules.NoiseSchedule
    shape: tuple[int, ...]
    times: Array
    log_snr: Array
    following: Array
    weights: Array


def chain(
    schedule: schedules.NoiseSchedule, shape: tuple[int, ...] | None, steps: int | None
) -> Chain:
    """Chooses the time steps and the weights w of Σ_t w_t ‖ε_p − ε_q‖², in nats.

    They are `divergences.path_kl_weights` of the sub-grid: for posterior variances
    ½ expm1(logSNR_s − logSNR_t) from t to the next s, and for the last step, which adds no noise,
    those of a step with the variance of the one before it.

    Raises:
      ValueError: for a missing shape, fewer than 2 steps or too many, or a zero terminal SNR.
    """
    if shape is None or steps is None:
        raise ValueError("on-policy estimators sample: give the shape of one example, and steps.")
    if steps < 2:
        raise ValueError(f"a chain with path-KL weights takes at least 2 steps, not {steps}.")
    times = schedules.timesteps(schedule, steps)
    log_snr = np.asarray(schedule.log_snr)[times]
    if np.isneginf(log_snr[0]):
        raise ValueError(
            "the chain starts at a zero terminal SNR, where ε carries no image and the path KL is "
            "infinite: use spacing='leading' with fewer steps than the schedule has."
        )
    grid = dataclasses.replace(schedule, log_snr=jnp.asarray(log_snr[::-1].copy()))
    weights = divergences.path_kl_weights(grid, schedule.variance_type)[::-1]
    following = jnp.append(jnp.asarray(log_snr[1:]), jnp.inf)
    return Chain(
        schedule, tuple(shape), jnp.asarray(times), jnp.asarray(log_snr), following, weights
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
        batch: ConditionBatch | Stored,
        axis_name: str | None,
        current: Any = None,
    ) -> Losses:
        stored = isinstance(batch, Stored)
        rows = lay_out(batch.conditions if stored else batch, key, axis_name)
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
            reached = reached.at[jnp.arange(forgotten)[:, None], rows.likely].add(
                reach(rows.likely, at, count, axis_name)
            )
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
            x_t, step = (
                jnp.concatenate([part for part in parts if part is not None])
                for parts in (batch.x_t, batch.step)
            )
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
        return Losses(objective, values, index, diagnostics)

    return evaluate
