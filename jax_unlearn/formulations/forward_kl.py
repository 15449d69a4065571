"""Forward KL: denoising losses on images of what is kept and of what is forgotten."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.formulations.base import Examples, Formulation, Losses
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = ["Batch", "Forget", "forward_kl"]

ESTIMATORS = ("two_term", "importance", "norm_balanced")


class Forget(NamedTuple):
    """Images to move away from.

    Attributes:
      x_0: in [−1, 1], [f, height, width, channels].
      cond: what each is forgotten under: labels [f], embeddings [f, ...], or None.
      constraint: the constraint i that each belongs to, integer [f].
    """

    x_0: Any
    cond: Condition
    constraint: Any


class Batch(NamedTuple):
    """What one step sees.

    Attributes:
      kept: examples at which the model is held to the reference's prediction; or None.
      base: examples that the model is held to as data, whatever the reference says; or None.
      forget: examples of the constraints.
    """

    kept: Examples | None
    base: Examples | None
    forget: Forget


def _concatenate(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _rows(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def forward_kl(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    estimator: str = "two_term",
    mixing: float = 0.5,
    balance: float = 2.0,
    project: multipliers.Projection | None = None,
    reference_values: ArrayLike | None = None,
) -> Formulation:
    """FU: min KL(q‖p) subject to KL(q_i‖p) ≥ b_i, for q and q_i given by images.

    Both divergences are, up to constants of the data, denoising losses
    Σ_t w_t E‖ε − ε_θ(x_t)‖² (arXiv 2605.30825; with `divergences.path_kl_weights` the
    negative ELBO in nats, which bounds −log p from above). For kept images the constant is
    known where the reference is: E‖ε − ε_θ‖² = E‖ε_q − ε_θ‖² + const for the exact denoiser
    ε_q of q, so `batch.kept` regresses on the reference's prediction. Its loss is then the
    path KL itself, and both it and its gradient vanish exactly, without noise, at the
    reference model. `batch.base` regresses on the noise: it is for conditions under which p
    must become the law of the given images and not stay the reference's, such as the null
    label and the label of a forgotten class. Constraint values are of the chain that the samplers
    run, which clips its estimate of x_0 where the schedule says so (`schedules.convert`): else
    an error at the noisiest steps, which no sample ever shows, would pass for forgetting.

    Estimators:
      "two_term": one forward pass over kept and forgotten images.
      "importance": forgotten image j shares one noisy image, drawn from a mixture of the two
        (`losses.mixture`) under the forgotten one's condition, with image j of
        `batch.base`, or of `batch.kept` where there is no base; all others are used as in
        "two_term". Needs at least as many of them as of forgotten images; with as many, a
        batch spread over devices has the same pairs. Diagnostics
        `ess_retain`, `ess_forget`: effective sample sizes as shares of the batch; where they
        are near the mixing shares (1−γ, γ) the weights have saturated and nothing is gained
        over "two_term".
      "norm_balanced": "two_term", and the constraints' part of the gradient is shortened to
        at most `balance` times the norm of the objective's: a trust region against a large
        multiplier. With balance > 1 the stationary points of the Lagrangian stay the same,
        since both parts have one norm there. Kept rows regress on the noise here, as in
        SISS: the gradient of their path KL is zero at the reference, and would let nothing
        move.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      estimator: see above.
      mixing: γ, the share of forgotten images in the mixture ("importance").
      balance: ν ("norm_balanced").
      project: onto the dual domain; default `multipliers.capped_simplex()`. In distribution
        space the domain is Σ λ_i q_i ≤ q almost everywhere. Samples cannot check that, but
        its integral, Σ λ_i ≤ 1, is necessary: beyond it the Lagrangian falls without bound by
        making every image unlikely alike.
      reference_values: the reference model's own constraint values, [m], measured well
        beforehand; or None. With them a constraint's value is estimated by
        reference_value_i + mean(loss of θ − loss of the reference) on the same noise: the
        gradient is the same, and the noise of a draw, which the two share, cancels. Costs a
        frozen forward of the images to forget, in one pass with that of the kept ones.

    Returns:
      A Formulation over `Batch`, in the unit of the weights.

    Raises:
      ValueError: for an unknown estimator, mixing outside (0, 1), or balance ≤ 0.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {ESTIMATORS}.")
    if not 0 < mixing < 1:
        raise ValueError(f"mixing must lie inside (0, 1), not be {mixing}.")
    if balance <= 0:
        raise ValueError(f"balance must be positive, not {balance}.")

    def evaluate(
        params: Params,
        reference: Params,
        key: Array,
        batch: Batch,
        axis_name: str | None,
        current: Array | None = None,
    ) -> Losses:
        del current  # forward-KL losses do not depend on the multipliers
        forget, parts = batch.forget, [part for part in (batch.base, batch.kept) if part]
        if not parts:
            raise ValueError("a batch needs examples in kept or in base: it has no objective.")
        rows: Examples = _concatenate(*parts)
        based = 0 if batch.base is None else batch.base.x_0.shape[0]
        pairs = forget.x_0.shape[0] if estimator == "importance" else 0
        if pairs > parts[0].x_0.shape[0]:
            raise ValueError(
                f"the importance estimator pairs each of {pairs} forgotten images with one of "
                f"batch.{'base' if based else 'kept'}, which has {parts[0].x_0.shape[0]}."
            )
        keys = jax.random.split(key, 3)
        # Each part is drawn by itself, so that a sharded batch gets the noise of a whole one.
        drawn: losses.Draws = _concatenate(
            *(
                losses.draw(part_key, part.x_0, weighting.probabilities, axis_name=axis_name)
                for part_key, part in zip(keys, parts, strict=False)
            )
        )
        scale = losses.importance(weighting, drawn.t)
        log_snr = schedule.log_snr[drawn.t]
        x_t = schedules.add_noise(x_0=rows.x_0, noise=drawn.noise, log_snr=log_snr)
        t, cond, target = drawn.t, rows.cond, drawn.noise
        mixed = None
        if pairs:
            mixed = losses.mixture(
                x=rows.x_0[:pairs],
                a=forget.x_0,
                noise=drawn.noise[:pairs],
                choose_a=drawn.uniform[:pairs] < mixing,
                log_snr=log_snr[:pairs],
                mixing=mixing,
            )
            x_t = jnp.concatenate([mixed.x_t, x_t[pairs:]])
            cond = _concatenate(forget.cond, _rows(cond, slice(pairs, None)))
            target = jnp.concatenate([mixed.noise_x, target[pairs:]])
        count = x_t.shape[0]
        forgotten, noise, weight = slice(0, pairs), drawn.noise, jnp.ones((count,))
        diagnostics = {}
        if mixed is None:
            other = losses.draw(keys[2], forget.x_0, weighting.probabilities, axis_name=axis_name)
            noisy = schedules.add_noise(
                x_0=forget.x_0, noise=other.noise, log_snr=schedule.log_snr[other.t]
            )
            x_t, t = jnp.concatenate([x_t, noisy]), jnp.concatenate([t, other.t])
            cond = _concatenate(cond, forget.cond)
            forgotten, noise = slice(count, None), other.noise
            forget_scale = losses.importance(weighting, other.t)
        else:
            noise = mixed.noise_a
            forget_scale = mixed.weight_a * scale[:pairs]
            weight = weight.at[:pairs].set(mixed.weight_x)
            diagnostics = {
                "ess_retain": losses.effective_sample_size(mixed.weight_x, axis_name=axis_name),
                "ess_forget": losses.effective_sample_size(mixed.weight_a, axis_name=axis_name),
            }

        distils = batch.kept is not None and estimator != "norm_balanced"
        controlled = reference_values is not None
        # One frozen forward over the rows that need it: the kept, the forgotten, or both.
        start = 0 if controlled and pairs else based if distils else count
        stop = x_t.shape[0] if controlled else count
        frozen = jnp.zeros_like(x_t)
        if start < stop:
            part = slice(start, stop)
            frozen = frozen.at[part].set(
                losses.predict_epsilon(
                    apply, reference, schedule, x_t=x_t[part], t=t[part], cond=_rows(cond, part)
                )
            )
        if distils:
            target = jnp.concatenate([target[:based], frozen[based:count]])

        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond)

        def clipped(epsilon: Array) -> Array:
            return schedules.convert(
                epsilon[forgotten],
                x_t=x_t[forgotten],
                log_snr=schedule.log_snr[t[forgotten]],
                prediction_type="epsilon",
                clip_range=schedule.clip_range,
            ).epsilon

        constraint = losses.squared_error(clipped(ours), noise)
        if controlled:
            constraint -= losses.squared_error(clipped(frozen), noise)
        constraint = forget_scale * constraint
        if controlled:
            constraint += jnp.asarray(reference_values)[forget.constraint]
        return Losses(
            objective=weight * scale * losses.squared_error(ours[:count], target),
            constraint=constraint,
            index=forget.constraint,
            diagnostics=diagnostics,
        )

    return Formulation(
        losses=evaluate,
        sign=1.0,
        project=multipliers.capped_simplex() if project is None else project,
        balance=balance if estimator == "norm_balanced" else None,
        name="forward_kl",
    )
