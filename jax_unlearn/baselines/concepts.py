"""Methods that unlearn what a model is conditioned on, without images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.baselines.base import Loss
from jax_unlearn.formulations import trajectories
from jax_unlearn.problem import Conditions
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

    Args:
      predict: (x_t, integer t [batch]) -> prediction, in the schedule's prediction type.
      schedule: noise schedule.
      x_start: standard normal noise, [batch, ...].
      steps: of the whole sampler.
      count: of the steps that are made, an integer.

    Example: the state that the whole sampler is in after two steps of four.
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, mixtures, samplers, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100)
      >>> predict = mixtures.denoiser(mixtures.gaussian_mixture([[0.5]], 0.1), schedule)
      >>> start = jnp.array([[-1.0], [2.0]])
      >>> x_t, t = baselines.partial_sample(predict, schedule, start, steps=4, count=2)
      >>> path = samplers.sample(predict, schedule, jax.random.key(0), start, steps=4)
      >>> bool(jnp.allclose(x_t, path.x[2], atol=1e-5)), int(t) == int(path.t[2])
      (True, True)
    """
    times = jnp.asarray(schedules.timesteps(schedule, steps))
    log_snr = schedule.log_snr[times]

    def body(step: Array, x_t: Array) -> Array:
        return samplers.ddim_step(
            predict(x_t, jnp.full(x_t.shape[:1], times[step])),
            x_t=x_t,
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

    Args:
      apply: the denoiser.
      reference: the parameters of q.
      cond: c, [n, ...].
      null: ∅, [n, ...].
      strength: η.

    Example: a network that predicts its condition: 1 − 0.5 (3 − 1).
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import baselines
      >>> target = baselines.esd_target(
      ...     lambda params, x_t, t, cond: cond[:, None], None, jnp.array([3.0]),
      ...     null=jnp.array([1.0]), strength=0.5,
      ... )
      >>> float(target(jnp.zeros((1, 1)), jnp.zeros(1, int))[0, 0])
      0.0
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
      A loss over `Conditions`: c is `cond` for θ and the guided sampling and `target` for q, ∅ is
      `base`; `constraint` is not read.

    Example: a network whose images of label c are all θ_c, at ᾱ = ½.
      It has 1 for the concept, and should go to 0 − (1 − 0) = −1.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, schedules
      >>> from jax_unlearn.problem import Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta[cond][:, None]
      >>> loss = baselines.esd(apply, schedule, shape=(1,), strength=1.0, steps=1)
      >>> concept, theta = jnp.ones(3, int), jnp.array([0.0, 1.0])
      >>> rows = Conditions(concept, base=0 * concept, target=concept)
      >>> round(float(loss(theta, theta, jax.random.key(0), rows)), 4)
      4.0
    """

    def loss(params: Params, reference: Params, key: Array, batch: Conditions) -> Array:
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

    Example: a network whose images of label c are all θ_c, at ᾱ = ½.
      It has 0 for the concept and 2 for its anchor: (0 − 2)² + 0.5 (1 − 2)² at an image 1.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta[cond][:, None]
      >>> loss = baselines.concept_ablation(apply, schedule, weighting, preservation=0.5)
      >>> concept, theta = jnp.zeros(3, int), jnp.array([0.0, 2.0])
      >>> batch = baselines.Anchored(jnp.ones((3, 1)), concept, anchor=concept + 1)
      >>> round(float(loss(theta, None, jax.random.key(0), batch)), 4)
      4.5
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
            cond=trajectories.concatenate(batch.cond, batch.anchor),
        )
        ours, anchored = jnp.split(both, 2)
        target = jax.lax.stop_gradient(anchored) if variant == "model" else drawn.noise
        ablated = losses.squared_error(ours, target)
        preserved = losses.squared_error(anchored, drawn.noise)
        return (losses.importance(weighting, drawn.t) * (ablated + preservation * preserved)).mean()

    return loss
