"""Ancestral (DDPM) and implicit (DDIM) samplers as scans, with their trajectories."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn import schedules
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = ["Trajectory", "ddim_step", "ddpm_step", "guided", "sample"]


class Trajectory(NamedTuple):
    """A sampled path: x[k] is the network's input at time t[k]; x_0 is where it ends."""

    x: Array
    t: Array
    x_0: Array


def _log_alpha_cumprod(log_snr: Array) -> Array:
    return -jax.nn.softplus(-log_snr)


def ddpm_step(
    prediction: Array,
    *,
    x_t: Array,
    noise: Array,
    log_snr_t: Array,
    log_snr_s: Array,
    schedule: schedules.NoiseSchedule,
) -> Array:
    """One ancestral step from t to s < t (Ho et al. 2020, eqs. 6-7).

    x_s = √ᾱ_s β/(1−ᾱ_t) x̂_0 + √(ᾱ_t/ᾱ_s) (1−ᾱ_s)/(1−ᾱ_t) x_t + √v z, with β = 1 − ᾱ_t/ᾱ_s and
    v = β (1−ᾱ_s)/(1−ᾱ_t) ("fixed_small"), β ("fixed_large") or their geometric mean
    ("fixed_geometric"). At log_snr_s = +∞ (the clean image) no noise is added under any.

    Args:
      prediction: the network's output at x_t, in the schedule's prediction type.
      x_t: [batch, ...].
      noise: z, standard normal, the shape of x_t.
      log_snr_t: log-SNR now, a scalar.
      log_snr_s: log-SNR after the step, a scalar.
      schedule: gives the prediction type, the clipping of x̂_0 and the variance.
    """
    x_0 = schedules.clipped(prediction, schedule, x_t=x_t, log_snr=log_snr_t).x_0
    log_ratio = _log_alpha_cumprod(log_snr_t) - _log_alpha_cumprod(log_snr_s)
    beta = -jnp.expm1(log_ratio)
    var_t, var_s = jax.nn.sigmoid(-log_snr_t), jax.nn.sigmoid(-log_snr_s)
    mean = (
        jnp.sqrt(jax.nn.sigmoid(log_snr_s)) * beta / var_t * x_0
        + jnp.exp(0.5 * log_ratio) * var_s / var_t * x_t
    )
    power = {"fixed_small": 1.0, "fixed_geometric": 0.5, "fixed_large": 0.0}
    variance = beta * (var_s / var_t) ** power[schedule.variance_type]
    return mean + jnp.where(jnp.isposinf(log_snr_s), 0.0, jnp.sqrt(variance)) * noise


def ddim_step(
    prediction: Array,
    *,
    x_t: Array,
    noise: Array,
    log_snr_t: Array,
    log_snr_s: Array,
    schedule: schedules.NoiseSchedule,
    eta: ArrayLike = 0.0,
) -> Array:
    """One DDIM step from t to s < t (Song et al. 2021, eq. 12).

    x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−v) ε̂ + √v z, with v = η² (1−ᾱ_s)/(1−ᾱ_t) (1 − ᾱ_t/ᾱ_s). η = 0 is
    deterministic. Where x̂_0 is clipped, ε̂ is derived anew from it and x_t (diffusers'
    `use_clipped_model_output=True`; its default leaves ε̂, and guided samples of models that
    clip then drift off: at scale 3 the judge agreed with 42 % of the embedded model's).
    """
    clipped = schedules.clipped(prediction, schedule, x_t=x_t, log_snr=log_snr_t)
    log_ratio = _log_alpha_cumprod(log_snr_t) - _log_alpha_cumprod(log_snr_s)
    var_t, var_s = jax.nn.sigmoid(-log_snr_t), jax.nn.sigmoid(-log_snr_s)
    variance = jnp.square(eta) * var_s / var_t * -jnp.expm1(log_ratio)
    return (
        jnp.sqrt(jax.nn.sigmoid(log_snr_s)) * clipped.x_0
        + jnp.sqrt(jnp.maximum(var_s - variance, 0.0)) * clipped.epsilon
        + jnp.sqrt(variance) * noise
    )


def guided(
    apply: Denoiser,
    params: Params,
    cond: Condition,
    *,
    unconditional: Condition,
    scale: ArrayLike,
) -> Callable[[Array, Array], Array]:
    """Classifier-free guidance: ε_∅ + scale (ε_c − ε_∅), both branches in one forward pass.

    scale 1 is the conditional model and 0 the unconditional one (Ho & Salimans 2022, with
    w = scale − 1). The conditions are pytrees with a leading batch axis.

    Returns:
      A function (x_t, t) -> prediction for `sample`.
    """

    def predict(x_t: Array, t: Array) -> Array:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, unconditional)
        output = apply(params, jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        conditional, free = jnp.split(output, 2)
        return free + scale * (conditional - free)

    return predict


def sample(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    key: Array,
    x_start: Array,
    *,
    steps: int,
    method: str = "ddim",
    eta: ArrayLike = 0.0,
) -> Trajectory:
    """Samples from a denoiser by one scan over `steps` time steps.

    Args:
      predict: (x_t, integer t [batch]) -> prediction, in the schedule's prediction type.
      schedule: noise schedule; its spacing decides which time steps are visited.
      key: a PRNG key; unused by DDIM at η = 0.
      x_start: standard normal noise [batch, ...].
      steps: how many network evaluations, 1 to T.
      method: "ddim" or "ddpm".
      eta: DDIM's η.

    Returns:
      The trajectory: x [steps, batch, ...], t [steps] and x_0 [batch, ...].

    Raises:
      ValueError: for an unknown method or number of steps.
    """
    if method not in ("ddim", "ddpm"):
        raise ValueError(f"method {method!r} is not 'ddim' or 'ddpm'.")
    times = jnp.asarray(schedules.timesteps(schedule, steps))
    log_snr = schedule.log_snr[times]
    final = jnp.inf if method == "ddpm" or schedule.final_alpha_cumprod_one else schedule.log_snr[0]
    following = jnp.append(log_snr[1:], final)

    def body(x_t: Array, inputs: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        t, log_snr_t, log_snr_s, step_key = inputs
        prediction = predict(x_t, jnp.full(x_t.shape[:1], t))
        noise = jax.random.normal(step_key, x_t.shape, x_t.dtype)
        arguments = {
            "x_t": x_t,
            "noise": noise,
            "log_snr_t": log_snr_t,
            "log_snr_s": log_snr_s,
            "schedule": schedule,
        }
        if method == "ddpm":
            x_s = ddpm_step(prediction, **arguments)
        else:
            x_s = ddim_step(prediction, eta=eta, **arguments)
        return x_s, x_t

    keys = jax.random.split(key, steps)
    x_0, xs = jax.lax.scan(body, x_start, (times, log_snr, following, keys))
    return Trajectory(x=xs, t=times, x_0=x_0)
