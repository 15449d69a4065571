"""Weighted denoising on stored samples of q: distilling a closed form p_λ = q w_λ / Z."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import losses, schedules
from jax_unlearn.formulations.base import Evaluate, Examples, Losses, psum, reach
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["SampleBatch", "Samples"]


class Samples(NamedTuple):
    """Stored samples of q(·|base) and what the constraints say at them, computed once.

    Attributes:
      x_0: samples of q(·|base), [f, ...]; base is the law that p(·|cond) is held to.
      cond: what p is conditioned on, [f, ...]; or None.
      base: what q is conditioned on, [f, ...]; or None. Read by the control variate alone.
      values: h_i(x_0) (likelihood) or log q(x_0|base) − log q_i(x_0) in nats (reverse KL),
        [f] or [f, k].
      constraint: the constraint i of each value, integer, of the shape of `values`. All
        constraints on a condition must be on each of its rows, and rows whose first one is
        the same must have the same condition: they are normalised together.
    """

    x_0: Any
    cond: Condition
    base: Condition
    values: Any
    constraint: Any


class SampleBatch(NamedTuple):
    """What a step of a "tilt" estimator sees.

    **Objective.** Mean over all rows of w̃ (w_t/π_t) ‖ε − ε_θ‖², with w̃ = w_λ(x)/mean(w_λ) over the
    samples of one condition, and w̃ = 1 for kept rows, which regress on the reference's
    prediction. It is the negative ELBO of p_λ's samples up to constants, not KL(p‖q);
    diagnostics `tilt_kl` is KL(p_λ‖q) in nats, averaged over all rows, and `ess` the effective
    share of the samples that the weights leave. The minimiser is the denoiser of p_λ. With
    `control_variate` a row's loss is (w̃ − 1) ‖ε − ε_θ‖² + ‖ε_q − ε_θ‖²: of the same minimiser
    where ε_q is the exact denoiser of the samples' law, without noise at λ = 0, and closer to
    the reference where samples are few.

    **Constraint values.** E_{p_λ} h_i or KL(p_λ‖q_i), as self-normalised means of w̃ times h_i or
    log(p_λ/q_i). They are exact for p_λ as the batch grows, biased by O(1/(n · ess)) in a batch,
    and independent of θ: the dual ascent is that of the exact dual, and no error of the
    network moves λ. So they say what the target of the distillation satisfies and nothing of
    the network. A certificate needs samples of p_θ.

    Attributes:
      kept: images at which the model is held to the reference's prediction; or None.
      forget: weighted samples.
    """

    kept: Examples | None
    forget: Samples


def losses_of(
    apply: Denoiser,
    reference_apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting | None,
    *,
    log_weights: Callable[[Array, Array], Array],
    values: Callable[[Array, Array], Array],
    control_variate: bool,
) -> Evaluate:
    """The losses of `SampleBatch`.

    Args:
      apply: the denoiser of p.
      reference_apply: that of q.
      schedule: noise schedule.
      weighting: of the denoising loss.
      log_weights: (λ N/N_i [f, k], values [f, k]) -> log w_λ, [f].
      values: (log p_λ/q [f], values [f, k]) -> what p_λ averages to the constraints, [f, k].
      control_variate: see `SampleBatch`.

    Raises:
      ValueError: without a weighting.
    """
    if weighting is None:
        raise ValueError("the tilt estimator is a denoising loss: give its weighting of time.")

    def evaluate(
        params: Params,
        reference: Params,
        key: Array,
        batch: SampleBatch,
        axis_name: str | None,
        current: Array,
    ) -> Losses:
        forget, parts = batch.forget, [part for part in batch if part is not None]
        constraint = jnp.asarray(forget.constraint)
        given = jnp.asarray(forget.values)
        if given.shape != constraint.shape:
            raise ValueError(
                f"values and constraint must have one shape, not {given.shape} and "
                f"{constraint.shape}."
            )
        constraint = constraint.reshape(constraint.shape[0], -1)
        given = given.reshape(constraint.shape)
        count = sum(part.x_0.shape[0] for part in parts)
        kept = count - constraint.shape[0]
        log_w = log_weights(reach(constraint, current, count, axis_name), given)
        tilted, log_p, diagnostics = normalised(
            log_w, constraint[:, 0], current.shape[0], count, axis_name
        )
        drawn = [
            losses.draw(part_key, part.x_0, weighting.probabilities, axis_name=axis_name)
            for part_key, part in zip(jax.random.split(key, 2)[-len(parts) :], parts, strict=True)
        ]
        x_0 = jnp.concatenate([part.x_0 for part in parts])
        cond = jax.tree.map(lambda *c: jnp.concatenate(c), *(part.cond for part in parts))
        t = jnp.concatenate([part.t for part in drawn])
        noise = jnp.concatenate([part.noise for part in drawn])
        x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[t])
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond)
        frozen = count if control_variate else kept
        bases = [part.base if isinstance(part, Samples) else part.cond for part in parts]
        base = jax.tree.map(lambda *c: jnp.concatenate(c), *bases)
        theirs = noise[:0]
        if frozen:
            theirs = losses.predict_epsilon(
                reference_apply,
                reference,
                schedule,
                x_t=x_t[:frozen],
                t=t[:frozen],
                cond=jax.tree.map(lambda leaf: leaf[:frozen], base),
            )
        held = losses.squared_error(ours[:frozen], theirs)
        fresh = losses.squared_error(ours[kept:], noise[kept:])
        weighted = (tilted - 1.0) * fresh + held[kept:] if control_variate else tilted * fresh
        return Losses(
            objective=losses.importance(weighting, t) * jnp.concatenate([held[:kept], weighted]),
            constraint=(tilted[:, None] * values(log_p, given)).reshape(-1),
            index=constraint.reshape(-1),
            diagnostics=diagnostics,
        )

    return evaluate


def normalised(
    log_w: Array, group: Array, groups: int, count: int, axis_name: str | None
) -> tuple[Array, Array, dict[str, Array]]:
    """w̃ = w/mean(w) over each row's group, [f], its logarithm, and the diagnostics.

    `count` is that of all rows, kept ones too.
    """
    log_p = log_w - _log_mean(log_w, group, groups, axis_name)
    tilted = jnp.exp(log_p)
    diagnostics = {
        "ess": losses.effective_sample_size(tilted, axis_name=axis_name),
        "tilt_kl": psum((tilted * log_p).sum(), axis_name)
        / psum(jnp.asarray(1.0 * count), axis_name),
    }
    return tilted, log_p, diagnostics


def _log_mean(log_w: Array, group: Array, groups: int, axis_name: str | None) -> Array:
    """The log of the mean of w over each row's group, [f]."""
    largest = jnp.full((groups,), -jnp.inf, log_w.dtype).at[group].max(jax.lax.stop_gradient(log_w))
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    zeros = jnp.zeros_like(largest)
    sums = psum(zeros.at[group].add(jnp.exp(log_w - largest[group])), axis_name)
    counts = psum(zeros.at[group].add(1.0), axis_name)
    return largest[group] + jnp.log(sums[group] / counts[group])
