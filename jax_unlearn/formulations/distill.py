"""Formulations that distil a closed form p_λ = q w_λ / Z from stored samples of q.

They sample no trajectory to train: h, or log q/q_i, is computed once at each stored sample, and
the multipliers can be had before any training (`duality.likelihood_multipliers`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import losses, multipliers, samplers, schedules
from jax_unlearn.problem import (
    Batch,
    Conditions,
    Evaluate,
    Images,
    Losses,
    NoisyPoints,
    Problem,
    Samples,
    psum,
    row_shares,
)
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["distill_likelihood", "distill_posterior", "distill_reverse_kl", "sampled"]

# The least share of a point's images that p_λ is taken to leave.
LEAST = 1e-4


def distill_reverse_kl(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    reference_apply: Denoiser | None = None,
    project: multipliers.Projection | None = None,
    control_variate: bool = False,
) -> Problem:
    """RU by weighted denoising: min_θ E_q w_λ(x) ‖ε − ε_θ‖², w_λ = Π_i (q/q_i)^{α_i}.

    α_i = λ_i/(1−Λ). The minimiser is the denoiser of p_λ ∝ q w_λ, exactly (arXiv 2605.30825).
    Needs log q/q_i at the samples, for instance by `likelihoods.log_ratio`.

    Objective, constraint values, diagnostics and `control_variate` are those of
    `distill_likelihood`, with log(p_λ/q_i) in the place of h_i.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule.
      weighting: of the denoising loss.
      reference_apply: the denoiser of q, called with the reference's parameters; default `apply`.
      project: onto the dual domain; default `multipliers.capped_simplex(0.02)`.
      control_variate: see `distill_likelihood`.

    Returns:
      A Problem over `Batch(kept, forget)`: `Images` and `Samples` whose values are log q/q_i.

    Example: two samples, of which the concept has the second twice as often. With λ = ½, α = 1,
      and p_λ leaves them in the ratio 2 : ½. KL(p_λ‖q_1) = 0.8 log(1.6 · 2) + 0.2 log(0.4 / 2).

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, losses, schedules
      >>> from jax_unlearn.problem import Batch, Samples
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> problem = formulations.distill_reverse_kl(apply, schedule, weighting)
      >>> ratios = jnp.log(jnp.array([2.0, 0.5]))
      >>> rows = Samples(jnp.array([[0.0], [1.0]]), None, None, ratios, jnp.zeros(2, int))
      >>> value, found = lagrangian(
      ...     problem, 0.0, None, jax.random.key(0), Batch(None, rows), [0.5], [1.0]
      ... )
      >>> round(float(found.values[0]), 4)
      0.6086
    """

    def log_weights(current: Array, log_ratios: Array) -> Array:
        # Inside the domain by half its default margin, wherever a caller's projection ends.
        rest = jnp.maximum(1.0 - current.sum(axis=1), 0.01)
        return (current * log_ratios).sum(axis=1) / rest

    evaluate = _weighted_denoising(
        apply,
        apply if reference_apply is None else reference_apply,
        schedule,
        weighting,
        log_weights=log_weights,
        values=lambda log_p, log_ratios: log_p[:, None] + log_ratios,
        control_variate=control_variate,
    )
    project = multipliers.capped_simplex(0.02) if project is None else project
    return Problem(evaluate, sign=1.0, project=project, name="reverse_kl")


def distill_likelihood(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    reference_apply: Denoiser | None = None,
    control_variate: bool = False,
) -> Problem:
    """LU by weighted denoising: min_θ E_q w_λ(x) ‖ε − ε_θ‖², w_λ = exp(−Σ_i λ_i h_i).

    The minimiser is the denoiser of p_λ ∝ q w_λ, exactly (arXiv 2605.30825). h is read from the
    batch and never differentiated.

    **Objective.** Mean over all rows of w̃ (w_t/π_t) ‖ε − ε_θ‖², with w̃ = w_λ(x)/mean(w_λ) over the
    samples of one condition, and w̃ = 1 for kept rows, which regress on the reference's
    prediction. It is the negative ELBO of p_λ's samples up to constants, not KL(p‖q);
    diagnostics `tilt_kl` is KL(p_λ‖q) in nats, averaged over all rows, and `ess` the effective
    share of the samples that the weights leave. With `control_variate` a row's loss is
    (w̃ − 1) ‖ε − ε_θ‖² + ‖ε_q − ε_θ‖²: of the same minimiser where ε_q is the exact denoiser of
    the samples' law, without noise at λ = 0, and closer to the reference where samples are few.

    **Constraint values.** E_{p_λ} h_i, as self-normalised means of w̃ h_i. They are exact for p_λ
    as the batch grows, biased by O(1/(n · ess)) in a batch, and independent of θ: the dual ascent
    is that of the exact dual, and no error of the network moves λ. So they say what the target of
    the distillation satisfies and nothing of the network; `sampled` does.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule.
      weighting: of the denoising loss.
      reference_apply: the denoiser of q, called with the reference's parameters; default `apply`.
      control_variate: see above.

    Returns:
      A Problem over `Batch(kept, forget)`: `Images` (or None) and `Samples` whose values are h.

    Example: samples 0 and 1 with h = 0 and 1. At λ = log 2 p_λ has them as 2 : 1, so that
      E h = 1/3. So is the loss of a network whose images are all 0, at ᾱ = ½ alone.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, losses, schedules
      >>> from jax_unlearn.problem import Batch, Samples
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> problem = formulations.distill_likelihood(apply, schedule, weighting)
      >>> x_0, h = jnp.array([[0.0], [1.0]]), jnp.array([0.0, 1.0])
      >>> rows = Samples(x_0, None, None, h, constraint=jnp.zeros(2, int))
      >>> value, found = lagrangian(
      ...     problem, 0.0, None, jax.random.key(0), Batch(None, rows), jnp.log(2.0), [0.1]
      ... )
      >>> round(float(found.values[0]), 4), round(float(found.objective), 4)
      (0.3333, 0.3333)
    """
    evaluate = _weighted_denoising(
        apply,
        apply if reference_apply is None else reference_apply,
        schedule,
        weighting,
        log_weights=lambda current, h: -(current * h).sum(axis=1),
        values=lambda log_p, h: h,
        control_variate=control_variate,
    )
    return Problem(evaluate, sign=-1.0, project=multipliers.non_negative(), name="likelihood")


def distill_posterior(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    reference_apply: Denoiser | None = None,
) -> Problem:
    """LU by regression on the score of p_λ where each h_i is 0 or 1, from posteriors at x_t.

    **Objective.** Mean over all rows of (w_t/π_t) ‖ε_θ − ε*‖², with ε* the reference's prediction
    for kept rows, whose t is drawn from π, and elsewhere

      ε* = ε_q + Σ_i κ_i σ_t ∇u_i / (1 − Σ_i κ_i u_i),   κ_i = 1 − exp(−λ_i):

    the score of p_λ ∝ q exp(−Σ_i λ_i h_i), noised, where each image has h_i = 1 for at most one i
    and else 0, since then E_q[exp(−Σ_i λ_i h_i) | x_t] = 1 − Σ_i κ_i u_i. Where h is undecided,
    it is that of the joint law of image and concept, p_λ(x, c) ∝ q(x, c) exp(−λ_c): of those that
    show concept i in at most a share ε_i, the nearest to q. Concepts leave then, and not all that
    resembles them: E[h_i] does not fall below q(1 − Σ h)'s, and a calibrated posterior
    (`quantification`) tells shares from it. The target has no Monte-Carlo noise, and it is known
    where q goes and p_λ does not: what weighted denoising leaves to chance.

    **Constraint values** and diagnostics are those of `distill_likelihood`, of the images that
    were noised.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule.
      weighting: of the regression (`likelihoods.path_weighting`).
      reference_apply: the denoiser of q, called with the reference's parameters; default `apply`.

    Returns:
      A Problem over `Batch(kept, forget)`: `Images` (or None) and `NoisyPoints`.

    Example: at λ = log 2, κ = ½. Where u = ½ and σ ∇u = 0.3, ε* is 0.5 · 0.3 / 0.75 = 0.2 more
      than ε_q, so that a network that is still the reference has the loss 0.04.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, losses, schedules
      >>> from jax_unlearn.problem import Batch, NoisyPoints
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda params, x_t, t, cond: 0 * x_t
      >>> problem = formulations.distill_posterior(apply, schedule, weighting)
      >>> one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1), int)
      >>> rows = NoisyPoints(
      ...     one, zero[0], None, epsilon=0 * one, posterior=0.5 * one, push=0.3 * one[None],
      ...     values=one, constraint=zero,
      ... )
      >>> value, found = lagrangian(
      ...     problem, None, None, jax.random.key(0), Batch(None, rows), jnp.log(2.0), [0.1]
      ... )
      >>> round(float(found.objective), 4)
      0.04
    """
    frozen = apply if reference_apply is None else reference_apply

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
        kept, forget = batch.kept, _of_type(batch, NoisyPoints)
        constraint, values = jnp.asarray(forget.constraint), jnp.asarray(forget.values)
        if not constraint.shape == values.shape == jnp.shape(forget.posterior):
            raise ValueError(
                f"posterior, values and constraint must have one shape [f, k], not "
                f"{list(jnp.shape(forget.posterior))}, {list(values.shape)} and "
                f"{list(constraint.shape)}."
            )
        count = constraint.shape[0] + (0 if kept is None else kept.x_0.shape[0])
        kappa = -jnp.expm1(-current[constraint])
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
                frozen, reference, schedule, x_t=noised, t=drawn.t, cond=kept.cond
            )
            x_t, t = jnp.concatenate([noised, x_t]), jnp.concatenate([drawn.t, t])
            target = jnp.concatenate([theirs, target])
            cond = jax.tree.map(lambda *c: jnp.concatenate(c), kept.cond, cond)
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond)
        log_w = -(current[constraint] * values).sum(axis=1)
        tilted, _, diagnostics = normalised(
            log_w, constraint[:, 0], current.shape[0], count, axis_name
        )
        return Losses(
            objective=losses.importance(weighting, t) * losses.squared_error(ours, target),
            values=(tilted[:, None] * values).reshape(-1),
            index=constraint.reshape(-1),
            share=row_shares(constraint, current.shape[0], count, axis_name),
            diagnostics=diagnostics,
        )

    return Problem(evaluate, sign=-1.0, project=multipliers.non_negative(), name="likelihood")


def sampled(
    predict: Callable[[Params, Array, Array, Any], Array],
    schedule: schedules.NoiseSchedule,
    likelihoods: Callable[[Params, Array], Array],
    *,
    shape: tuple[int, ...],
    steps: int,
    at_once: int = 64,
) -> Evaluate:
    """E h_i over samples of the model itself, for `Problem.fresh`.

    Each row of `batch`, `Conditions` without targets, is one DDIM sample (η = 0) of p(·|cond) from
    noise of its own key, whatever device it is on. Nothing of it is differentiated.

    Args:
      predict: (params, x_t, t, cond) -> prediction, in the schedule's type.
      schedule: noise schedule.
      likelihoods: (reference, x_0 [n, ...]) -> h [n, m], for instance the reference's own
        posterior (`likelihoods.diffusion_classifier`).
      shape: of one example, without the batch axis.
      steps: of the sampler.
      at_once: how many rows are sampled together; memory is theirs.

    Returns:
      What `Problem.fresh` takes. It raises ValueError for a batch of other rows.

    Example: a network whose images are all θ = 2, and h = x².
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> alpha, sigma = schedules.alpha_sigma(schedule.log_snr, jnp.zeros((2, 1)))
      >>> apply = lambda theta, x_t, t, cond: (x_t - alpha[t] * theta) / sigma[t]
      >>> evaluate = formulations.sampled(
      ...     apply, schedule, lambda reference, x: jnp.square(x), shape=(1,), steps=2
      ... )
      >>> rows = Conditions(None, None, constraint=jnp.zeros(3, int))
      >>> found = evaluate(2.0, None, jax.random.key(0), Batch(None, rows), jnp.zeros(1))
      >>> [round(float(x), 3) for x in found.values]
      [4.0, 4.0, 4.0]
    """

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
        forget = _of_type(batch, Conditions)
        if forget.constraint is None:
            raise ValueError("rows of forget need the number of their constraint.")
        index = jnp.asarray(forget.constraint)
        count = index.shape[0]
        index = index.reshape(count, -1)
        parts = -(-count // at_once)
        size = -(-count // parts)
        # Padded to equal parts; a part has rows from all over the batch, so that on several
        # devices each part is spread as the batch is.
        rows = np.arange(parts * size) % count
        keys = losses.example_keys(key, count, axis_name=axis_name)
        given = jax.tree.map(
            lambda leaf: leaf[rows].reshape(size, parts, *leaf.shape[1:]).swapaxes(0, 1),
            (keys, forget.cond),
        )

        def one(part: tuple[Array, Any]) -> Array:
            keys, cond = part
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
            found = samplers.sample(
                lambda x_t, t: predict(params, x_t, t, cond), schedule, key, noise, steps=steps
            )
            return likelihoods(reference, found.x_0)

        h = jax.lax.stop_gradient(jax.lax.map(one, given))
        h = h.swapaxes(0, 1).reshape(parts * size, -1)[:count]
        values = jnp.take_along_axis(h, index, axis=1)
        return Losses(jnp.zeros((count,)), values.reshape(-1), index.reshape(-1))

    return evaluate


def _of_type(batch: Batch, rows: type) -> Any:
    kept = Conditions if rows is Conditions else Images
    right = isinstance(batch.forget, rows) and isinstance(batch.kept, kept | None)
    if batch.base is not None or not right:
        raise ValueError(
            f"expected a Batch of {rows.__name__} to forget and {kept.__name__} that are kept, or "
            f"None, and no base; got {type(batch.forget).__name__} and {type(batch.kept).__name__}."
        )
    return batch.forget


def _weighted_denoising(
    apply: Denoiser,
    reference_apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    log_weights: Callable[[Array, Array], Array],
    values: Callable[[Array, Array], Array],
    control_variate: bool,
) -> Evaluate:
    """The losses of `distill_likelihood`, for any tilt.

    Args:
      apply: the denoiser of p.
      reference_apply: that of q.
      schedule: noise schedule.
      weighting: of the denoising loss.
      log_weights: (λ of each row's constraints [f, k], values [f, k]) -> log w_λ, [f].
      values: (log p_λ/q [f], values [f, k]) -> what p_λ averages to the constraints, [f, k].
      control_variate: see there.
    """

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
        forget = _of_type(batch, Samples)
        parts = [part for part in (batch.kept, forget) if part is not None]
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
        tilted, log_p, diagnostics = normalised(
            log_weights(current[constraint], given),
            constraint[:, 0],
            current.shape[0],
            count,
            axis_name,
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
            values=(tilted[:, None] * values(log_p, given)).reshape(-1),
            index=constraint.reshape(-1),
            share=row_shares(constraint, current.shape[0], count, axis_name),
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
