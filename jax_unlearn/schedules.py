"""Noise schedules, the forward process, and conversions between predictions.

The time coordinate is the log signal-to-noise ratio, logSNR = log ᾱ − log(1−ᾱ). With
α = √ᾱ = √sigmoid(logSNR) and σ = √(1−ᾱ) = √sigmoid(−logSNR), both ends are exact in float32,
where 1 − ᾱ would lose every digit. Subscript t is an integer in [0, T), 0 the least noisy.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "NoiseSchedule",
    "Predictions",
    "add_noise",
    "alpha_sigma",
    "clipped",
    "convert",
    "expand",
    "from_diffusers",
    "noise_schedule",
    "timesteps",
]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_VARIANCE_TYPES = ("fixed_small", "fixed_large", "fixed_geometric")
_SPACINGS = ("leading", "trailing", "linspace")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete-time variance-preserving noise schedule, a pytree of one array.

    Attributes:
      log_snr: log ᾱ_t − log(1−ᾱ_t), decreasing, [T]; −inf at a zero terminal SNR.
      prediction_type: what the network predicts, "epsilon", "sample" (x_0) or "v_prediction".
      variance_type: variance of the ancestral sampler: "fixed_small" (of the posterior),
        "fixed_large" (β_t) or "fixed_geometric" (the geometric mean of the two).
      clip_range: samplers clip their estimate of x_0 to ±clip_range; None does not clip.
      spacing: how a sampler spreads fewer than T steps: "leading", "trailing", "linspace".
      steps_offset: added to the "leading" steps.
      final_alpha_cumprod_one: whether DDIM's last step goes to ᾱ = 1 (else to ᾱ_0).

    Example:
      ᾱ = 0.9, 0.5 and 0.1; `noise_schedule` makes the usual ones.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import schedules
      >>> schedule = schedules.NoiseSchedule(logit(jnp.array([0.9, 0.5, 0.1])))
      >>> schedule.num_steps, [round(float(a), 3) for a in schedule.alphas_cumprod]
      (3, [0.9, 0.5, 0.1])
    """

    log_snr: Array
    prediction_type: str = dataclasses.field(default="epsilon", metadata={"static": True})
    variance_type: str = dataclasses.field(default="fixed_small", metadata={"static": True})
    clip_range: float | None = dataclasses.field(default=None, metadata={"static": True})
    spacing: str = dataclasses.field(default="leading", metadata={"static": True})
    steps_offset: int = dataclasses.field(default=0, metadata={"static": True})
    final_alpha_cumprod_one: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def num_steps(self) -> int:
        """T, the number of time steps the network was trained with."""
        return self.log_snr.shape[0]

    @property
    def alphas_cumprod(self) -> Array:
        """ᾱ_t, [T]."""
        return jax.nn.sigmoid(self.log_snr)


def _betas(schedule: str, beta_start: float, beta_end: float, num_steps: int) -> np.ndarray:
    if schedule == "linear":
        return np.linspace(beta_start, beta_end, num_steps)
    if schedule == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
    if schedule == "squaredcos_cap_v2":

        def alpha_bar(fraction: np.ndarray) -> np.ndarray:
            return np.cos((fraction + 0.008) / 1.008 * np.pi / 2) ** 2

        edges = np.arange(num_steps + 1) / num_steps
        return np.minimum(1 - alpha_bar(edges[1:]) / alpha_bar(edges[:-1]), 0.999)
    raise ValueError(
        f"beta_schedule {schedule!r} is not supported: expected 'linear', 'scaled_linear' or "
        "'squaredcos_cap_v2'."
    )


def noise_schedule(
    beta_schedule: str = "linear",
    *,
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: ArrayLike | None = None,
    rescale_betas_zero_snr: bool = False,
    **options: Any,
) -> NoiseSchedule:
    """Makes a noise schedule from its betas: ᾱ_t = Π_{s≤t} (1 − β_s), in float64.

    Args:
      beta_schedule: "linear" (Ho et al. 2020), "scaled_linear" (Rombach et al. 2022) or
        "squaredcos_cap_v2" (Nichol & Dhariwal 2021).
      num_steps: T.
      beta_start: β_0 of the linear schedules.
      beta_end: β_{T−1} of the linear schedules.
      trained_betas: the betas themselves, [T], in place of a named schedule.
      rescale_betas_zero_snr: shift and scale √ᾱ so that ᾱ_{T−1} = 0 (Lin et al. 2023, alg. 1).
      **options: further fields of `NoiseSchedule`.

    Raises:
      ValueError: for an unknown name, or betas outside (0, 1).

    Example:
      Each step halves the signal's variance: ᾱ = 0.5, 0.25, 0.125.

      >>> from jax_unlearn import schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5, 0.5], clip_range=1.0)
      >>> [round(float(a), 3) for a in schedule.alphas_cumprod], schedule.clip_range
      ([0.5, 0.25, 0.125], 1.0)
    """
    if trained_betas is not None:
        betas = np.asarray(trained_betas, np.float64)
    else:
        betas = _betas(beta_schedule, beta_start, beta_end, num_steps)
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must be one-dimensional, at least two, and inside (0, 1).")
    log_alphas = np.cumsum(np.log1p(-betas))
    if rescale_betas_zero_snr:
        root = np.exp(0.5 * log_alphas)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            log_alphas = 2 * np.log(root)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = log_alphas - np.log(-np.expm1(log_alphas))
    if np.isnan(log_snr).any() or np.isposinf(log_snr).any():
        raise ValueError("the betas are too small to tell the noise at each step.")
    for name, known in (
        ("prediction_type", _PREDICTION_TYPES),
        ("variance_type", _VARIANCE_TYPES),
        ("spacing", _SPACINGS),
    ):
        if name in options and options[name] not in known:
            raise ValueError(f"{name} {options[name]!r} is not one of {known}.")
    return NoiseSchedule(jnp.asarray(log_snr, jnp.float32), **options)


# Options that change neither the trained network's meaning nor our samplers at these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "dynamic_thresholding_ratio": (0.995,),
    "sample_max_value": (1.0,),
}
# Of a schedule in a file; those of released models have 1000.
_MAX_STEPS = 10**6


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_STEPS


def _is_number(value: Any, least: float = 0, most: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float) and value is not True and least < value <= most


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _are_betas(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, list | tuple) and len(value) <= _MAX_STEPS and all(map(_is_beta, value))
    )


def _is_beta(value: Any) -> bool:
    return _is_number(value, most=1) and value < 1


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": (lambda value: _is_step(value) and value > 1, f"2 to {_MAX_STEPS}"),
    "beta_start": (_is_beta, "a number inside (0, 1)"),
    "beta_end": (_is_beta, "a number inside (0, 1)"),
    "trained_betas": (_are_betas, f"null, or at most {_MAX_STEPS} numbers inside (0, 1)"),
    "rescale_betas_zero_snr": (_is_flag, "true or false"),
    "clip_sample": (_is_flag, "true or false"),
    "clip_sample_range": (_is_number, "a positive number"),
    "steps_offset": (_is_step, f"0 to {_MAX_STEPS}"),
    "set_alpha_to_one": (_is_flag, "true or false"),
    "_class_name": (lambda value: isinstance(value, str), "a text"),
}


def from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
    """Makes the noise schedule of a diffusers `scheduler_config.json`.

    DDPM, DDIM, PNDM and the other discrete schedulers share the fields that define the
    process a network was trained on. Missing ones take diffusers' defaults for the class: DDPM
    and DDIM clip x_0, PNDM and the ODE solvers do not. Fields of a particular solver, whose
    names are not read here, do not change that process.

    Args:
      config: the file's content, as a mapping.

    Raises:
      ValueError: for a schedule, prediction or variance type that is not supported, and for a
        value that is malformed or beyond its bounds.

    Example:
      >>> from jax_unlearn import schedules
      >>> schedule = schedules.from_diffusers(
      ...     {"_class_name": "DDIMScheduler", "num_train_timesteps": 50, "beta_end": 0.5}
      ... )
      >>> schedule.num_steps, schedule.clip_range, schedule.prediction_type
      (50, 1.0, 'epsilon')
      >>> round(float(schedule.alphas_cumprod[0]), 6)  # 1 − beta_start
      0.9999
    """
    for name, (check, expected) in _CHECKS.items():
        if name in config and not check(config[name]):
            text = repr(config[name])
            text = text if len(text) < 100 else f"{text[:100]}…"
            raise ValueError(f"scheduler option {name} is {text}: expected {expected}.")
    for name, allowed in _NEUTRAL.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"scheduler option {name}={config[name]!r} is not supported: expected {allowed[0]}."
            )
    variance = config.get("variance_type", "fixed_small")
    if variance == "fixed_small_log":
        variance = "fixed_small"
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance_type {variance!r} is not 'fixed_small' or 'fixed_large'.")
    # DDPM and DDIM, also under names such as DDPMParallelScheduler, have other defaults than the
    # schedulers that came after them.
    kind = config.get("_class_name", "DDPMScheduler")
    early, pndm = kind.startswith(("DDPM", "DDIM")), kind == "PNDMScheduler"
    clip = config.get("clip_sample", early)
    return noise_schedule(
        config.get("beta_schedule", "linear"),
        num_steps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
        trained_betas=config.get("trained_betas"),
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        prediction_type=config.get("prediction_type", "epsilon"),
        variance_type=variance,
        clip_range=float(config.get("clip_sample_range", 1.0)) if clip else None,
        spacing=config.get("timestep_spacing", "leading" if early or pndm else "linspace"),
        steps_offset=config.get("steps_offset", 0),
        final_alpha_cumprod_one=config.get("set_alpha_to_one", not pndm),
    )


def expand(values: Array, like: Array) -> Array:
    """Trailing axes of one, until `values` [batch] has as many axes as `like` [batch, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import schedules
      >>> images, scales = jnp.ones((2, 3, 3, 1)), jnp.array([10.0, 20.0])
      >>> schedules.expand(scales, images).shape
      (2, 1, 1, 1)
      >>> [float(image.max()) for image in schedules.expand(scales, images) * images]
      [10.0, 20.0]
    """
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def alpha_sigma(log_snr: Array, like: Array) -> tuple[Array, Array]:
    """α = √sigmoid(logSNR) and σ = √sigmoid(−logSNR), shaped to broadcast over `like`.

    Args:
      log_snr: [batch] or a scalar.
      like: [batch, ...].

    Example:
      ᾱ = 0.36, so that α = 0.6 and σ = 0.8.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import schedules
      >>> alpha, sigma = schedules.alpha_sigma(logit(jnp.array([0.36])), jnp.ones((1, 2)))
      >>> round(float(alpha[0, 0]), 3), round(float(sigma[0, 0]), 3)
      (0.6, 0.8)
    """
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
    return expand(alpha, like), expand(sigma, like)


def add_noise(*, x_0: Array, noise: Array, log_snr: Array) -> Array:
    """x_t = α x_0 + σ ε, the forward process, [batch, ...].

    Args:
      x_0: clean images [batch, ...].
      noise: ε, standard normal, the shape of x_0.
      log_snr: of x_t, [batch] or a scalar.

    Example:
      ᾱ = 0.36: 0.6 · 1 + 0.8 · 2.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import schedules
      >>> one = jnp.ones((1, 1))
      >>> x_t = schedules.add_noise(x_0=one, noise=2 * one, log_snr=logit(jnp.array([0.36])))
      >>> round(float(x_t[0, 0]), 3)
      2.2
    """
    alpha, sigma = alpha_sigma(log_snr, x_0)
    return alpha * x_0 + sigma * noise


class Predictions(NamedTuple):
    """One prediction in every coordinate, each of the shape of x_t: what `convert` returns."""

    epsilon: Array
    x_0: Array
    velocity: Array
    score: Array


def convert(
    prediction: Array,
    *,
    x_t: Array,
    log_snr: Array,
    prediction_type: str,
    clip_range: float | None = None,
) -> Predictions:
    """x_0 = α x_t − σ v = (x_t − σ ε)/α, ε = σ x_t + α v, v = α ε − σ x_0 and score = −ε/σ.

    All four follow from the one that a network predicts, since x_t = α x_0 + σ ε. With a
    clip_range x_0 is clipped to it, and the others are made to fit: ε = (x_t − α clip(x_0))/σ. At
    high noise the difference is large. An ε that is off by 1 % where α = 10⁻⁴ puts x_0 off by 100,
    and clipping mends it. At zero SNR x_0 and v do not follow from ε: the division gives inf or nan
    there, and the clipped ε is x_t/σ.

    Args:
      prediction: the network's output, the shape of x_t.
      x_t: noisy images [batch, ...].
      log_snr: of x_t, [batch] or a scalar.
      prediction_type: "epsilon", "sample" or "v_prediction".
      clip_range: bound of |x_0|; None does not clip.

    Raises:
      ValueError: for another prediction type.

    Example:
      At ᾱ = 0.36 the noise of x_t = 2.2 is predicted as 2. Then x_0 = (2.2 − 0.8 · 2)/0.6 = 1,
      v = 0.6 · 2 − 0.8 · 1 = 0.4, and the score is −2/0.8.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import schedules
      >>> found = schedules.convert(
      ...     jnp.array([[2.0]]), x_t=jnp.array([[2.2]]), log_snr=logit(jnp.array([0.36])),
      ...     prediction_type="epsilon",
      ... )
      >>> [round(float(value[0, 0]), 3) for value in found]
      [2.0, 1.0, 0.4, -2.5]
    """
    alpha, sigma = alpha_sigma(log_snr, x_t)
    if prediction_type == "epsilon":
        epsilon = prediction
        x_0 = (x_t - sigma * epsilon) / alpha
        velocity = alpha * epsilon - sigma * x_0
    elif prediction_type == "sample":
        x_0 = prediction
        epsilon = (x_t - alpha * x_0) / sigma
        velocity = alpha * epsilon - sigma * x_0
    elif prediction_type == "v_prediction":
        velocity = prediction
        x_0 = alpha * x_t - sigma * velocity
        epsilon = sigma * x_t + alpha * velocity
    else:
        raise ValueError(f"prediction_type {prediction_type!r} is not one of {_PREDICTION_TYPES}.")
    if clip_range is not None:
        # For ε it is α x_0 that is clipped, not x_0: nothing is divided by an α of 0.
        limit = alpha * clip_range
        signal = jnp.clip(x_t - sigma * epsilon, -limit, limit)
        epsilon = (x_t - signal) / sigma
        x_0 = jnp.clip(x_0, -clip_range, clip_range)
        velocity = alpha * epsilon - sigma * x_0
    return Predictions(epsilon=epsilon, x_0=x_0, velocity=velocity, score=-epsilon / sigma)


def clipped(
    prediction: Array, schedule: NoiseSchedule, *, x_t: Array, log_snr: Array
) -> Predictions:
    """What the schedule's samplers go on with: `convert` with its type and its clipping of x_0.

    Args:
      prediction: the network's output, the shape of x_t.
      schedule: gives the prediction type and the clip range.
      x_t: noisy images [batch, ...].
      log_snr: of x_t, [batch] or a scalar.

    Example:
      At ᾱ = 0.36 the estimate (2.2 − 0.8 · 0)/0.6 = 3.67 is no pixel value. It becomes 1, and the
      noise (2.2 − 0.6 · 1)/0.8 = 2.

      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import logit
      >>> from jax_unlearn import schedules
      >>> schedule = schedules.noise_schedule(clip_range=1.0)
      >>> found = schedules.clipped(
      ...     jnp.array([[0.0]]), schedule, x_t=jnp.array([[2.2]]), log_snr=logit(jnp.array([0.36]))
      ... )
      >>> round(float(found.x_0[0, 0]), 3), round(float(found.epsilon[0, 0]), 3)
      (1.0, 2.0)
    """
    return convert(
        prediction,
        x_t=x_t,
        log_snr=log_snr,
        prediction_type=schedule.prediction_type,
        clip_range=schedule.clip_range,
    )


def timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """The time steps of a sampler of `steps` steps, decreasing, [steps], as diffusers spaces them.

    "leading": i·⌊T/steps⌋ + offset; "trailing": T − i·T/steps − 1; "linspace": from T−1 to 0
    (Lin et al. 2023, table 2).

    Args:
      schedule: gives T, the spacing and the offset.
      steps: how many.

    Raises:
      ValueError: if `steps` is not in [1, T], or the offset leaves the schedule.

    Example:
      Only "leading" ends short of the noise, and only "trailing" short of the image.

      >>> from jax_unlearn import schedules
      >>> for spacing in ("leading", "trailing", "linspace"):
      ...     schedule = schedules.noise_schedule(spacing=spacing)
      ...     print(spacing, schedules.timesteps(schedule, 4).tolist())
      leading [750, 500, 250, 0]
      trailing [999, 749, 499, 249]
      linspace [999, 666, 333, 0]
    """
    total = schedule.num_steps
    if not 1 <= steps <= total:
        raise ValueError(f"a sampler takes 1 to {total} steps, not {steps}.")
    if schedule.spacing == "leading":
        times = np.arange(steps)[::-1] * (total // steps) + schedule.steps_offset
    elif schedule.spacing == "trailing":
        times = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    else:
        times = np.linspace(0, total - 1, steps).round()[::-1]
    times = times.astype(np.int32)
    if times[0] >= total:
        raise ValueError(
            f"steps_offset {schedule.steps_offset} with {steps} steps starts at {times[0]}, "
            f"outside the schedule's {total} steps."
        )
    return times
