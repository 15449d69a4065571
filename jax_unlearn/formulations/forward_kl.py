"""Forward KL: denoising losses on images of what is kept and of what is forgotten."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.problem import Batch, Images, Losses, Problem
from jax_unlearn.typing import Array, ArrayLike, Denoiser, Params

__all__ = ["forward_kl"]


def _concatenate(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _rows(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def forward_kl(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    mixing: float | None = None,
    project: multipliers.Projection | None = None,
    reference_values: ArrayLike | None = None,
) -> Problem:
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

    **Multipliers** are those of the paper: objective and constraints are means over their own rows,
    and p_λ = (q − Σ_i λ_i q_i)/(1 − Λ).

    **Importance sampling.** With `mixing` γ forgotten image j shares one noisy image, drawn from
    (1−γ) q(·|x) + γ q(·|a) (`losses.mixture`) under the forgotten one's condition, with image j of
    `batch.base`, or of `batch.kept` where there is no base: one row of the network where two are
    needed without. There must be at least as many of them as of forgotten images; with as many, a
    batch spread over devices has the same pairs. Diagnostics `ess_retain`, `ess_forget` are the
    effective sample sizes as shares of the batch. Where they are near (1−γ, γ) the weights have
    saturated, as they do in high dimension: nothing is gained then.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      mixing: γ, the share of forgotten images in the mixture; None noises each set by itself.
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
      A Problem over `Batch` of `Images`, in the unit of the weights.

    Raises:
      ValueError: for mixing outside (0, 1).

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      From a kept one θ = 1 has the distance (1 − 0)² to the reference's 0, whatever x is.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, losses, schedules
      >>> from jax_unlearn.problem import Batch, Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> problem = formulations.forward_kl(apply, schedule, weighting)
      >>> forget = Images(jnp.full((2, 1), 3.0), None, constraint=jnp.zeros(2, int))
      >>> batch = Batch(Images(jnp.ones((4, 1)), None), forget)
      >>> value, found = lagrangian(problem, 1.0, 0.0, jax.random.key(0), batch, [0.1], [9.0])
      >>> [round(float(x), 3) for x in (value, found.objective, found.values[0])]
      [1.5, 1.0, 4.0]
    """
    if mixing is not None and not 0 < mixing < 1:
        raise ValueError(f"mixing must lie inside (0, 1), not be {mixing}.")

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
        del current  # forward-KL losses do not depend on the multipliers
        forget, parts = batch.forget, [part for part in (batch.base, batch.kept) if part]
        if not parts:
            raise ValueError("a batch needs examples in kept or in base: it has no objective.")
        if not all(isinstance(part, Images) for part in (forget, *parts)):
            raise ValueError("forward KL takes a Batch of Images alone.")
        if forget.constraint is None:
            raise ValueError("images to forget need the number of their constraint.")
        rows: Images = _concatenate(*(part._replace(constraint=None) for part in parts))
        based = 0 if batch.base is None else batch.base.x_0.shape[0]
        pairs = 0 if mixing is None else forget.x_0.shape[0]
        if pairs > parts[0].x_0.shape[0]:
            raise ValueError(
                f"importance sampling pairs each of {pairs} forgotten images with one of "
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
        if mixing is not None:
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

        distils = batch.kept is not None
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
            values=constraint,
            index=forget.constraint,
            diagnostics=diagnostics,
        )

    project = multipliers.capped_simplex() if project is None else project
    return Problem(evaluate, sign=1.0, project=project, name="forward_kl")
