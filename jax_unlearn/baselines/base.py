"""What the baselines share: the kind of a loss, its training step, the mean denoising loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jax_unlearn import losses, schedules
from jax_unlearn.problem import Images
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["Loss", "mean_loss", "train_step"]

Loss = Callable[[Params, Any, Array, Any], Array]


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, Array]]:
    """(key, params, opt_state, reference, batch) -> (params, opt_state, value); to be jitted.

    θ ← θ − optimizer(∇_θ loss(θ)): the whole of a weight-based method.

    Args:
      loss: (params, reference, key, batch) -> scalar.
      optimizer: for the parameters.

    Example: one step of ½ from 0 towards 1.
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_unlearn import baselines
      >>> loss = lambda x, reference, key, batch: jnp.square(x - batch)
      >>> optimizer = optax.sgd(0.25)
      >>> step = jax.jit(baselines.train_step(loss, optimizer))
      >>> x, state, value = step(jax.random.key(0), 0.0, optimizer.init(0.0), None, 1.0)
      >>> float(x), float(value)
      (0.5, 1.0)
    """

    def step(
        key: Array, params: Params, opt_state: Any, reference: Any, batch: Any
    ) -> tuple[Params, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(params, reference, key, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def mean_loss(
    apply: Denoiser, schedule: schedules.NoiseSchedule, weighting: losses.TimeWeighting
) -> Callable[[Params, Array, Images], Array]:
    """(params, key, examples) -> the mean of their denoising losses, a scalar.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.

    Example: a network whose images are all θ, at ᾱ = ½ alone. The loss of an image x is (x − θ)².
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import baselines, losses, schedules
      >>> from jax_unlearn.problem import Images
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> weighting = losses.TimeWeighting(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> mean = baselines.base.mean_loss(apply, schedule, weighting)
      >>> images = Images(jnp.array([[1.0], [3.0]]), None)
      >>> round(float(mean(0.0, jax.random.key(0), images)), 4)
      5.0
    """

    def mean(params: Params, key: Array, rows: Images) -> Array:
        draws = losses.draw(key, rows.x_0, weighting.probabilities)
        return losses.denoising_loss(
            apply,
            params,
            schedule,
            x_0=rows.x_0,
            cond=rows.cond,
            draws=draws,
            weighting=weighting,
        ).mean()

    return mean
