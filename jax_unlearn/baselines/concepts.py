"""Methods that unlearn what a model is conditioned on, without images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.baselines.base import Loss
from jax_unlearn.formulations import Separated, on_policy
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = ["Anchored", "concept_ablation", "esd", "esd_target", "partial_sample"]


def partial_sample(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    x_start: Array,
    *,
    steps: int,
    count: ArrayLike,
) -> tuple[Array, Array]:
    """The first `count` of `steps` DDIM steps, η = 0: the state x_t [batch, ...] and its time t.

    It is x[count], t[count] of `samplers.sample`'s trajectory. `count`, in [0, steps), may be
    traced: a loop of that many steps runs, not a masked one of `steps`.
    """
    times = jnp.asarray(schedules.timesteps(schedule, steps))
    log_snr = schedule.log_snr[times]

    def body(step: Array, x_t: Array) -> Array:
        return samplers.ddim_step(
            predict(x_t, jnp.full(x_t.shape[:1], times[step])),
            x_t=x_t,
            noise=jnp.zeros_like(x_t),
            log_snr_t=log_snr[step],
            log_snr_s=log_snr[step + 1],
            schedule=schedule,
        )

    return jax.lax.fori_loop(0, count, body, x_start), times[count]


def esd_target(
    apply: Denoiser, reference: Params, cond: Condition, *, null: Condition, strength: float
) -> Callable[[Array, Array], Array]:
    """ε_q(x_t, ∅) − η (ε_q(x_t, c) − ε_q(x_t, ∅)): guidance of scale −η, as (x_t, t) -> prediction.

    It is reverse KL's composed score where q_i = q(·|c), q = q(·|∅) and α = η
    (`duality.compose_reverse_kl` with λ = η/(1+η)).
    """
    return samplers.guided(apply, reference, cond, unconditional=null, scale=-strength)


def esd(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    *,
    shape: tuple[int, ...],
    strength: float = 1.0,
    guidance: float = 3.0,
    steps: int = 50,
) -> Loss:
    """ESD: E‖ε_θ(x_t, c) − (ε_q(x_t, ∅) − η (ε_q(x_t, c) − ε_q(x_t, ∅)))‖².

    x_t are states of the model being trained: noise after a uniformly drawn number of its first
    `steps` DDIM steps, one number a batch, with classifier-free guidance, all held fixed. Where
    θ is what is updated, masks over parameters (`optax.masked`) make the paper's variants.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      shape: of one example, without the batch axis.
      strength: η.
      guidance: scale of guidance of the partial sampling.
      steps: of the whole sampler.

    Returns:
      A loss over `Separated`: c is `cond` for θ and the guided sampling and `target` for q, ∅ is
      `base`; `constraint` is not read.
    """

    def loss(params: Params, reference: Params, key: Array, batch: Separated) -> Array:
        count_key, noise_key = jax.random.split(key)
        keys = losses.example_keys(noise_key, jax.tree.leaves(batch.target)[0].shape[0])
        x_t, time = partial_sample(
            samplers.guided(
                apply,
                jax.lax.stop_gradient(params),
                batch.cond,
                unconditional=batch.base,
                scale=guidance,
            ),
            schedule,
            jax.vmap(lambda key: jax.random.normal(key, shape))(keys),
            steps=steps,
            count=jax.random.randint(count_key, (), 0, steps),
        )
        t = jnp.full(x_t.shape[:1], time)
        target = esd_target(apply, reference, batch.target, null=batch.base, strength=strength)
        wanted = losses.predict_epsilon(
            lambda params, x_t, t, cond: target(x_t, t), None, schedule, x_t=x_t, t=t, cond=None
        )
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=batch.cond)
        return losses.squared_error(ours, wanted).mean()

    return loss


class Anchored(NamedTuple):
    """Images of an anchor concept, [n, ...] each.

    Attributes:
      x_0: samples of q(·|anchor), in [−1, 1].
      cond: the condition to forget.
      anchor: the condition that takes its place.
    """

    x_0: Any
    cond: Condition
    anchor: Condition


def concept_ablation(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    variant: str = "model",
    preservation: float = 1.0,
) -> Loss:
    """Concept Ablation: Σ_t w_t E‖ε_θ(x_t, c) − y‖² + ρ loss(anchor images under the anchor).

    y is ε_θ(x_t, anchor), held fixed ("model"; of the network being trained, as published), or
    the noise ("noise"). On images of c with another label as the anchor, the first term of
    "model" is SalUn's loss of labels.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      variant: "model" or "noise".
      preservation: ρ.

    Returns:
      A loss over `Anchored`.

    Raises:
      ValueError: for an unknown variant.
    """
    if variant not in ("model", "noise"):
        raise ValueError(f"variant {variant!r} is not 'model' or 'noise'.")

    def loss(params: Params, reference: Params, key: Array, batch: Anchored) -> Array:
        drawn = losses.draw(key, batch.x_0, weighting.probabilities)
        x_t = schedules.add_noise(
            x_0=batch.x_0, noise=drawn.noise, log_snr=schedule.log_snr[drawn.t]
        )
        both = losses.predict_epsilon(
            apply,
            params,
            schedule,
            x_t=jnp.concatenate([x_t, x_t]),
            t=jnp.concatenate([drawn.t, drawn.t]),
            cond=on_policy.concatenate(batch.cond, batch.anchor),
        )
        ours, anchored = jnp.split(both, 2)
        target = jax.lax.stop_gradient(anchored) if variant == "model" else drawn.noise
        ablated = losses.squared_error(ours, target)
        preserved = losses.squared_error(anchored, drawn.noise)
        return (losses.importance(weighting, drawn.t) * (ablated + preservation * preserved)).mean()

    return loss
