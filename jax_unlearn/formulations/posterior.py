"""Regression on the exact score of p_λ at stored points, where h_i is 0 or 1."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import losses, schedules
from jax_unlearn.formulations import tilt
from jax_unlearn.formulations.base import Evaluate, Examples, Losses, reach
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["Points", "PosteriorBatch"]

# The least share of a point's images that p_λ is taken to leave.
LEAST = 1e-4


class Points(NamedTuple):
    """Stored points of noising paths of q(·|base), and what is known there (`posteriors`).

    Attributes:
      x_t: [f, ...].
      t: integer, [f].
      cond: what p is conditioned on, [f, ...]; or None.
      epsilon: the reference's prediction at x_t and the base, as ε, [f, ...].
      posterior: u_i = E[h_i(x_0) | x_t], [f, k].
      push: σ_t ∇u_i, [f, k, ...].
      values: h_i(x_0) of the image that was noised, or 1 for the concept that it shows, [f, k].
      constraint: the constraint i of each, integer [f, k]; see `Samples`.
    """

    x_t: Any
    t: Any
    cond: Condition
    epsilon: Any
    posterior: Any
    push: Any
    values: Any
    constraint: Any


class PosteriorBatch(NamedTuple):
    """What a step of the "posterior" estimator sees.

    **Objective.** Mean over all rows of (w_t/π_t) ‖ε_θ − ε*‖², with ε* the reference's prediction
    for kept rows, whose t is drawn from π, and elsewhere

      ε* = ε_q + Σ_i κ_i σ_t ∇u_i / (1 − Σ_i κ_i u_i),   κ_i = 1 − exp(−λ_i):

    the score of p_λ ∝ q exp(−Σ_i λ_i h_i), noised, where each image has h_i = 1 for at most one i
    and else 0, since then E_q[exp(−Σ_i λ_i h_i) | x_t] = 1 − Σ_i κ_i u_i. Where h is undecided,
    it is that of the joint law of image and concept, p_λ(x, c) ∝ q(x, c) exp(−λ_c): of those that
    show concept i in at most a share ε_i, the nearest to q. Concepts leave then, and not all that
    resembles them: E[h_i] does not fall below q(1 − Σ h)'s, and `quantification.Confusion` tells
    shares from it. The target has no Monte-Carlo noise, and it is known where q goes and p_λ does
    not: what "tilt", which weights by p_λ, leaves to chance. Give points whose t have the law π.

    **Constraint values** and diagnostics are those of "tilt", of the images that were noised.

    Attributes:
      kept: images at which the model is held to the reference's prediction; or None.
      forget: points.
    """

    kept: Examples | None
    forget: Points


def losses_of(
    apply: Denoiser,
    reference_apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting | None,
) -> Evaluate:
    """The losses of `PosteriorBatch`.

    Raises:
      ValueError: without a weighting.
    """
    if weighting is None:
        raise ValueError("the posterior estimator is a regression: give its weighting of time.")

    def evaluate(
        params: Params,
        reference: Params,
        key: Array,
        batch: PosteriorBatch,
        axis_name: str | None,
        current: Array,
    ) -> Losses:
        kept, forget = batch
        constraint, values = jnp.asarray(forget.constraint), jnp.asarray(forget.values)
        if not constraint.shape == values.shape == jnp.shape(forget.posterior):
            raise ValueError(
                f"posterior, values and constraint must have one shape [f, k], not "
                f"{list(jnp.shape(forget.posterior))}, {list(values.shape)} and "
                f"{list(constraint.shape)}."
            )
        count = constraint.shape[0] + (0 if kept is None else kept.x_0.shape[0])
        reached = reach(constraint, current, count, axis_name)
        kappa = -jnp.expm1(-reached)
        left = jnp.maximum(1.0 - (kappa * forget.posterior).sum(axis=1, keepdims=True), LEAST)
        push = jnp.einsum("fk,fk...->f...", kappa / left, jnp.asarray(forget.push))
        x_t, t, cond = jnp.asarray(forget.x_t), jnp.asarray(forget.t), forget.cond
        target = forget.epsilon + push
        if kept is not None:
            drawn = losses.draw(key, kept.x_0, weighting.probabilities, axis_name=axis_name)
            noised = schedules.add_noise(
                x_0=kept.x_0, noise=drawn.noise, log_snr=schedule.log_snr[drawn.t]
            )
            theirs = losses.predict_epsilon(
                reference_apply, reference, schedule, x_t=noised, t=drawn.t, cond=kept.cond
            )
            x_t, t = jnp.concatenate([noised, x_t]), jnp.concatenate([drawn.t, t])
            target = jnp.concatenate([theirs, target])
            cond = jax.tree.map(lambda *c: jnp.concatenate(c), kept.cond, cond)
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond)
        tilted, _, diagnostics = tilt.normalised(
            -(reached * values).sum(axis=1), constraint[:, 0], current.shape[0], count, axis_name
        )
        return Losses(
            objective=losses.importance(weighting, t) * losses.squared_error(ours, target),
            constraint=(tilted[:, None] * values).reshape(-1),
            index=constraint.reshape(-1),
            diagnostics=diagnostics,
        )

    return evaluate
