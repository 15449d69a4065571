"""Methods that unlearn images: from examples to forget and examples to retain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import ndtr

from jax_unlearn import losses, schedules
from jax_unlearn.baselines.base import Loss, mean_loss
from jax_unlearn.formulations import trajectories
from jax_unlearn.problem import Batch, Images
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = [
    "Remembered",
    "erase_diff",
    "fisher",
    "naive_deletion",
    "neg_grad",
    "selective_amnesia",
    "siss",
]


def _retained(batch: Batch) -> Images:
    parts = [part for part in (batch.base, batch.kept) if part is not None]
    if not parts:
        raise ValueError("the batch has nothing to retain: give examples in kept or in base.")
    return trajectories.concatenate(*(part._replace(constraint=None) for part in parts))


def naive_deletion(
    apply: Denoiser, schedule: schedules.NoiseSchedule, weighting: losses.TimeWeighting
) -> Loss:
    """loss(retained): goes on training without what is forgotten. `batch.forget` is not read.

    The loss raises ValueError for a batch with neither `kept` nor `base`.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Batch, Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> loss = baselines.naive_deletion(apply, schedule, weighting)
      >>> batch = Batch(kept=Images(jnp.ones((4, 1)), None), forget=None)
      >>> round(float(loss(0.0, None, jax.random.key(0), batch)), 4)
      1.0
    """
    mean = mean_loss(apply, schedule, weighting)
    return lambda params, reference, key, batch: mean(params, key, _retained(batch))


def neg_grad(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    scale: float,
) -> Loss:
    """loss(retained) − s loss(forgotten); ascent alone where a batch has nothing to retain.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      scale: s.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      Here 1² − 0.1 · 3².

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Batch, Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> loss = baselines.neg_grad(apply, schedule, weighting, scale=0.1)
      >>> batch = Batch(Images(jnp.ones((4, 1)), None), Images(jnp.full((2, 1), 3.0), None))
      >>> round(float(loss(0.0, None, jax.random.key(0), batch)), 4)
      0.1
    """
    mean = mean_loss(apply, schedule, weighting)

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        kept_key, forget_key = jax.random.split(key)
        forgotten = mean(params, forget_key, batch.forget)
        if batch.kept is None and batch.base is None:
            return -scale * forgotten
        return mean(params, kept_key, _retained(batch)) - scale * forgotten

    return loss


def _two_gradients(
    pair: Callable[[Params], tuple[Array, Array]], params: Params
) -> tuple[tuple[Array, Array], Params, Params]:
    """The values of two losses and the gradient of each, at fixed params."""
    values, vjp = jax.vjp(pair, jax.lax.stop_gradient(params))
    one, zero = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
    return values, vjp((one, zero))[0], vjp((zero, one))[0]


def _with_gradient(value: Array, gradient: Params, params: Params) -> Array:
    """A scalar of this value, whose derivative in params is `gradient`."""
    still = jax.lax.stop_gradient(params)
    return value + optax.tree.vdot(gradient, optax.tree.sub(params, still))


def siss(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    norm: float,
    mixing: float = 0.5,
    estimator: str = "importance",
    max_norm: float = 1.0,
) -> Loss:
    """SISS(λ): the gradient is g_x − (ν/‖g_a‖) g_a, then shortened to `max_norm`.

    g_x and g_a are the whole batch's gradients of loss(retained) and loss(forgotten). With
    "importance" both come from one forward pass at x_t of the mixture (1−λ) q(·|x) + λ q(·|a),
    as weights w_x ‖ε_x − ε_θ‖² and w_a ‖ε_a − ε_θ‖² say (`losses.mixture`), row j of
    the retained images paired with row j of the forgotten ones under the latter's condition.
    With "two_term" each set is noised and denoised by itself. The value is that of
    loss(retained) − (ν/‖g_a‖) loss(forgotten).

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      norm: ν, of the ascent's part of the gradient.
      mixing: λ in (0, 1).
      estimator: "importance" or "two_term".
      max_norm: to which the gradient is clipped.

    Raises:
      ValueError: for an unknown estimator or a λ outside (0, 1); and by the loss, where
        "importance" gets other numbers of retained and of forgotten images.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      Here g_x = −2 and g_a = −6, of which ν = 1.5 is taken off.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Batch, Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> loss = baselines.siss(apply, schedule, weighting, norm=1.5, estimator="two_term")
      >>> batch = Batch(Images(jnp.ones((2, 1)), None), Images(jnp.full((2, 1), 3.0), None))
      >>> round(float(jax.grad(loss)(0.0, None, jax.random.key(0), batch)), 4)
      -0.5
    """
    if estimator not in ("importance", "two_term"):
        raise ValueError(f"estimator {estimator!r} is not 'importance' or 'two_term'.")
    if not 0 < mixing < 1:
        raise ValueError(f"mixing must lie inside (0, 1), not be {mixing}.")
    mean = mean_loss(apply, schedule, weighting)

    def mixed_pair(params: Params, key: Array, rows: Images, other: Images) -> tuple:
        if rows.x_0.shape != other.x_0.shape:
            raise ValueError(
                "SISS pairs each forgotten image with a retained one: got the shapes "
                f"{other.x_0.shape} and {rows.x_0.shape}."
            )
        drawn = losses.draw(key, rows.x_0, weighting.probabilities)
        mixed = losses.mixture(
            x=rows.x_0,
            a=other.x_0,
            noise=drawn.noise,
            choose_a=drawn.uniform < mixing,
            log_snr=schedule.log_snr[drawn.t],
            mixing=mixing,
        )
        epsilon = losses.predict_epsilon(
            apply, params, schedule, x_t=mixed.x_t, t=drawn.t, cond=other.cond
        )
        scale = losses.importance(weighting, drawn.t)
        kept = scale * mixed.weight_x * losses.squared_error(epsilon, mixed.noise_x)
        forgotten = scale * mixed.weight_a * losses.squared_error(epsilon, mixed.noise_a)
        return kept.mean(), forgotten.mean()

    def separate_pair(params: Params, key: Array, rows: Images, other: Images) -> tuple:
        kept_key, forget_key = jax.random.split(key)
        return mean(params, kept_key, rows), mean(params, forget_key, other)

    pair = mixed_pair if estimator == "importance" else separate_pair

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        rows, other = _retained(batch), batch.forget
        (kept, forgotten), g_x, g_a = _two_gradients(lambda p: pair(p, key, rows, other), params)
        scale = norm / jnp.maximum(optax.tree.norm(g_a), 1e-30)
        gradient = jax.tree.map(lambda x, a: x - scale * a, g_x, g_a)
        clip = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(gradient), 1e-30))
        return _with_gradient(kept - scale * forgotten, optax.tree.scale(clip, gradient), params)

    return loss


def erase_diff(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    eta: float,
) -> Loss:
    """EraseDiff: the gradient is g_r + λ g_f, with λ = max(0, η − ⟨g_r, g_f⟩/‖g_f‖²).

    g_r is the gradient of loss(retained); g_f that of loss(forgotten) with uniform noise on
    [0, 1), in x_t and as the target, in place of the normal one. λ is the least with which the
    forgetting loss falls at the rate η‖g_f‖². The paper's constraint is loss_f(θ) ≤ loss_f(φ),
    where φ is K steps of descent of loss_f from θ; loss_f(φ) is held fixed, hence its gradient is
    zero, and neither g_f nor λ depends on it: the K steps are left out.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      eta: η.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      Here g_r = −2, g_f = 2 and λ = 0.5 + 1.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Batch, Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> loss = baselines.erase_diff(apply, schedule, weighting, eta=0.5)
      >>> batch = Batch(Images(jnp.ones((2, 1)), None), Images(-jnp.ones((2, 1)), None))
      >>> round(float(jax.grad(loss)(0.0, None, jax.random.key(0), batch)), 4)
      1.0
    """
    mean = mean_loss(apply, schedule, weighting)

    def pair(params: Params, key: Array, batch: Batch) -> tuple[Array, Array]:
        kept_key, forget_key = jax.random.split(key)
        draws = losses.draw(forget_key, batch.forget.x_0, weighting.probabilities)
        forgotten = losses.denoising_loss(
            apply,
            params,
            schedule,
            x_0=batch.forget.x_0,
            cond=batch.forget.cond,
            draws=draws._replace(noise=ndtr(draws.noise)),
            weighting=weighting,
        )
        return mean(params, kept_key, _retained(batch)), forgotten.mean()

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        (kept, forgotten), g_r, g_f = _two_gradients(lambda p: pair(p, key, batch), params)
        along = optax.tree.vdot(g_r, g_f) / jnp.maximum(optax.tree.vdot(g_f, g_f), 1e-30)
        weight = jnp.maximum(0.0, eta - along)
        gradient = jax.tree.map(lambda r, f: r + weight * f, g_r, g_f)
        return _with_gradient(kept + weight * forgotten, gradient, params)

    return loss


class Remembered(NamedTuple):
    """What Selective Amnesia is held to: the pretrained parameters θ* and their `fisher`."""

    params: Params
    fisher: Params


def fisher(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    params: Params,
    key: Array,
    examples: Images,
    *,
    draws: int,
) -> Params:
    """The diagonal F = E_x (∂ loss(x)/∂θ)², a tree like params.

    loss(x) is one image's Σ_t w_t E‖ε − ε_θ‖², which takes the place of −log p(x). Its gradient
    is a mean over `draws` noisy versions, whose time steps are stratified; as many as the
    schedule has steps is what the paper's code uses. Fewer add their variance to F. One image
    is seen at a time.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      params: θ*.
      key: a PRNG key.
      examples: samples of the pretrained model and their conditions.
      draws: noisy versions of each.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      Two images, whose derivatives at θ = 0 are −2 and −6.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> images = Images(jnp.array([[1.0], [3.0]]), None)
      >>> key, theta = jax.random.key(0), jnp.zeros(())
      >>> found = baselines.fisher(apply, schedule, weighting, theta, key, images, draws=2)
      >>> round(float(found), 3)
      20.0
    """
    mean = mean_loss(apply, schedule, weighting)

    def add(total: Params, inputs: tuple[Array, Images]) -> tuple[Params, None]:
        key, example = inputs
        rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (draws, *leaf.shape)), example)
        gradient = jax.grad(mean)(params, key, rows)
        return jax.tree.map(lambda a, g: a + jnp.square(g), total, gradient), None

    count = examples.x_0.shape[0]
    keys = losses.example_keys(key, count)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (keys, examples))
    return optax.tree.scale(1.0 / count, total)


def selective_amnesia(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    strength: float,
) -> Loss:
    """Selective Amnesia: loss(surrogates) + loss(replay) + (λ/2) Σ_i F_i (θ_i − θ*_i)².

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      strength: λ.

    Returns:
      A loss whose `reference` is `Remembered`. Its batches have in `base` images of the
      surrogate distribution (the paper's is uniform noise on [−1, 1]) under the forgotten
      conditions, and in `kept` the pretrained model's own samples under kept conditions;
      `forget` is not read. It raises ValueError where one of the two is missing.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      Here 0.5² + 0.5² + (4/2) · 2 · 0.5².

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Batch, Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> loss = baselines.selective_amnesia(apply, schedule, weighting, strength=4.0)
      >>> surrogates, own = (Images(jnp.full((2, 1), x), None) for x in (0.0, 1.0))
      >>> remembered = baselines.Remembered(params=jnp.ones(()), fisher=jnp.array(2.0))
      >>> batch = Batch(kept=own, forget=None, base=surrogates)
      >>> round(float(loss(jnp.array(0.5), remembered, jax.random.key(0), batch)), 4)
      1.5
    """
    mean = mean_loss(apply, schedule, weighting)

    def loss(params: Params, reference: Remembered, key: Array, batch: Batch) -> Array:
        if batch.base is None or batch.kept is None:
            raise ValueError("Selective Amnesia needs surrogates in base and samples in kept.")
        base_key, kept_key = jax.random.split(key)
        moved = optax.tree.sub(params, reference.params)
        penalty = optax.tree.vdot(reference.fisher, jax.tree.map(jnp.square, moved))
        return (
            mean(params, base_key, batch.base)
            + mean(params, kept_key, batch.kept)
            + 0.5 * strength * penalty
        )

    return loss
