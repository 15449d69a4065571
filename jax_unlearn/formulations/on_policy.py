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
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["ConditionBatch", "Held", "Separated"]


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
    """

    cond: Condition
    base: Condition
    target: Condition
    constraint: Any


class ConditionBatch(NamedTuple):
    """What an on-policy step sees: conditions alone; the images are the model's own.

    Their frequencies are the law of conditions π of the problem over condition and image
    jointly: objective Σ_c π(c) KL(p(·|c)‖q(·|base_c)), each constraint a mean over its rows.
    """

    kept: Held | None
    forget: Separated


class Rows(NamedTuple):
    """A `ConditionBatch` laid out: kept rows first, then f rows with k constraints each.

    Attributes:
      keys: of each row's noise, [n].
      cond: [n, ...].
      base: [n, ...].
      kept: how many rows are kept ones.
      target: [f · k, ...], row by row.
      constraint: [f, k].
    """

    keys: Array
    cond: Condition
    base: Condition
    kept: int
    target: Condition
    constraint: Array


def concatenate(*trees: Any) -> Any:
    """Concatenates the leaves of trees along their first axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def lay_out(batch: ConditionBatch, key: Array, axis_name: str | None) -> Rows:
    """Concatenates the rows of a batch and gives each its own key, whatever its device."""
    forget, constraint = batch.forget, jnp.asarray(batch.forget.constraint)
    target = forget.target
    if constraint.ndim == 2:
        target = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), target)
    constraint = constraint.reshape(constraint.shape[0], -1)
    kept_key, forget_key = jax.random.split(key)
    keys = losses.example_keys(forget_key, constraint.shape[0], axis_name=axis_name)
    if batch.kept is None:
        return Rows(keys, forget.cond, forget.base, 0, target, constraint)
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
        constraint=constraint,
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


def run(
    predict: Callable[[Array, Array], Array],
    compare: Callable[[Array, Array, Array, Array], Any],
    chain: Chain,
    keys: Array,
    *,
    pathwise: bool,
) -> tuple[Any, Array]:
    """Samples one trajectory a row and sums w_t compare(x_t, t, logSNR_t, ε_θ(x_t, t)) over it.

    One scan, which keeps x_t and runs each step's network again for the backward pass; what
    `frozen` returns is kept too.

    Args:
      predict: (x_t, t [n]) -> the network's output.
      compare: (x_t, t [n], scalar logSNR_t, ε) -> a tree of values, each [rows]; ε is that of
        the schedule's clipped x̂_0, if it clips.
      chain: of the sampler.
      keys: of each row's noise, [n].
      pathwise: whether derivatives go through the trajectory, or only through ε at given x_t.

    Returns:
      The sums, and the ends x_0 of the trajectories.
    """
    count = keys.shape[0]

    def noise(step: Array | int) -> Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), chain.shape))(
            keys
        )

    policy = jax.checkpoint_policies.save_only_these_names("frozen")

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def body(x_t: Array, inputs: tuple[Array, ...]) -> tuple[Array, Any]:
        step, time, log_snr, following, weight = inputs
        t = jnp.full((count,), time)
        prediction = predict(x_t, t)
        epsilon = schedules.clipped(prediction, chain.schedule, x_t=x_t, log_snr=log_snr).epsilon
        terms = jax.tree.map(lambda term: weight * term, compare(x_t, t, log_snr, epsilon))
        x_s = samplers.ddpm_step(
            prediction if pathwise else jax.lax.stop_gradient(prediction),
            x_t=x_t,
            noise=noise(step),
            log_snr_t=log_snr,
            log_snr_s=following,
            schedule=chain.schedule,
        )
        return x_s, terms

    steps = jnp.arange(chain.times.shape[0])
    inputs = (steps, chain.times, chain.log_snr, chain.following, chain.weights)
    x_0, terms = jax.lax.scan(body, noise(steps.shape[0]), inputs)
    return jax.tree.map(lambda term: term.sum(axis=0), terms), x_0


def frozen(
    apply: Denoiser,
    reference: Params,
    schedule: schedules.NoiseSchedule,
    *,
    x_t: Array,
    t: Array,
    log_snr: Array,
    cond: Condition,
) -> tuple[Array, Array]:
    """(ε, x̂_0) of the reference model at x_t, clipped as the schedule says."""
    prediction = checkpoint_name(apply(reference, x_t, t, cond), "frozen")
    clipped = schedules.clipped(prediction, schedule, x_t=x_t, log_snr=log_snr)
    return clipped.epsilon, clipped.x_0
