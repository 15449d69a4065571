"""Methods that unlearn what a model is conditioned on, without images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.baselines.base import Loss
from jax_unlearn.formulations import trajectories
from jax_unlearn.formulations.robust import Adversary
from jax_unlearn.problem import Batch, Conditions
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = ["Anchored", "adv_unlearn", "concept_ablation", "esd", "esd_target", "partial_sample"]


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
    states = _guided_states(apply, schedule, shape, guidance, steps)
    regression = _against_guided(apply, schedule, strength)

    def loss(params: Params, reference: Params, key: Array, batch: Conditions) -> Array:
        x_t, t = states(params, key, batch.cond, batch.base)
        return regression(params, reference, x_t, t, batch)

    return loss


def _guided_states(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    shape: tuple[int, ...],
    guidance: float,
    steps: int,
) -> Callable[[Params, Array, Condition, Condition], tuple[Array, Array]]:
    """(params, key, cond, null) -> x_t and t of `esd`, a row of each condition."""

    def states(params: Params, key: Array, cond: Condition, null: Condition) -> tuple[Array, Array]:
        count_key, noise_key = jax.random.split(key)
        keys = losses.example_keys(noise_key, jax.tree.leaves(cond)[0].shape[0])
        still = jax.lax.stop_gradient(params)
        x_t, time = partial_sample(
            samplers.guided(apply, still, cond, unconditional=null, scale=guidance),
            schedule,
            jax.vmap(lambda key: jax.random.normal(key, shape))(keys),
            steps=steps,
            count=jax.random.randint(count_key, (), 0, steps),
        )
        return x_t, jnp.full(x_t.shape[:1], time)

    return states


def _against_guided(
    apply: Denoiser, schedule: schedules.NoiseSchedule, strength: float
) -> Callable[..., Array]:
    """(params, reference, x_t, t, rows) -> mean ‖ε_θ(x_t, cond) − `esd_target`‖²."""

    def regression(
        params: Params, reference: Params, x_t: Array, t: Array, rows: Conditions
    ) -> Array:
        target = esd_target(apply, reference, rows.target, null=rows.base, strength=strength)
        wanted = losses.predict_epsilon(
            lambda params, x_t, t, cond: target(x_t, t), None, schedule, x_t=x_t, t=t, cond=None
        )
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=rows.cond)
        return losses.squared_error(ours, wanted).mean()

    return regression


def adv_unlearn(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    adversary: Adversary,
    *,
    shape: tuple[int, ...],
    retention: float = 0.3,
    strength: float = 1.0,
    guidance: float = 3.0,
    steps: int = 50,
) -> Loss:
    """AdvUnlearn: ESD's loss at the condition c* of an attack, and γ E‖ε_θ(x_t, k) − ε_q(x_t, k)‖².

    E‖ε_θ(x_t, c*) − (ε_q(x_t, ∅) − η (ε_q(x_t, c) − ε_q(x_t, ∅)))‖²,   c* ≈ argmin over c′ of
    E‖ε_θ(x_t, c′) − ε_q(x_t, c)‖²,   and k is what is kept. x_t are as in `esd`, of c and of k.

    Published attacks learn words of a prompt, by 30 steps of Adam (Zhang et al. 2024), and train
    the text encoder. Here conditions themselves are moved, and the denoiser trains.

    Args:
      apply: the denoiser, of conditions as the adversary gives them.
      schedule: its noise schedule.
      adversary: gives c* as `cond` of the rows to forget; `formulations.worst_conditions` with the
        aim "trajectory" lowers what the published attack does. No gradient goes through it.
      shape: of one example, without the batch axis.
      retention: γ.
      strength: η.
      guidance: scale of guidance of the partial sampling.
      steps: of the whole sampler.

    Returns:
      A loss over a `Batch` of `Conditions`. In `forget`, c is `target` and ∅ is `base`; in `kept`,
      k is `cond` and ∅ is `target`, where x_t are guided away from it.

    Example: a network that says its condition times θ; the attack doubles c = 1. At θ = 1, where
      η = 0, the first term is (2 − 0)², and what is kept is 0.5 · (3 − 3)².

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> def doubled(params, reference, key, batch):
      ...     forget = batch.forget
      ...     return batch._replace(forget=forget._replace(cond=2 * forget.cond))
      >>> loss = baselines.adv_unlearn(
      ...     lambda theta, x_t, t, cond: theta * cond, schedules.noise_schedule(), doubled,
      ...     shape=(1,), retention=0.5, strength=0.0, steps=2,
      ... )
      >>> one = jnp.ones((4, 1))
      >>> batch = Batch(Conditions(3 * one, 3 * one, 0 * one), Conditions(one, 0 * one, one))
      >>> float(loss(1.0, 1.0, jax.random.key(0), batch))
      4.0
      >>> float(loss(1.5, 1.0, jax.random.key(0), batch))  # 3² + 0.5 · 1.5²
      10.125
    """
    states = _guided_states(apply, schedule, shape, guidance, steps)
    regression = _against_guided(apply, schedule, strength)

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        attack_key, forget_key, kept_key = jax.random.split(key, 3)
        still = jax.lax.stop_gradient((params, reference))
        kept, worst, _ = adversary(*still, attack_key, batch)
        x_t, t = states(params, forget_key, worst.target, worst.base)
        forgetting = regression(params, reference, x_t, t, worst)
        x_t, t = states(params, kept_key, kept.cond, kept.target)
        ours, theirs = (
            losses.predict_epsilon(apply, of, schedule, x_t=x_t, t=t, cond=kept.cond)
            for of in (params, reference)
        )
        return forgetting + retention * losses.squared_error(ours, theirs).mean()

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
