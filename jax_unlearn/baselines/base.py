"""What the baselines share: the kind of a loss, its training step, the mean denoising loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jax_unlearn import losses, schedules
from jax_unlearn.formulations import Examples
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["Loss", "mean_loss", "train_step"]

Loss = Callable[[Params, Any, Array, Any], Array]


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, Array]]:
    """(key, params, opt_state, reference, batch) -> (params, opt_state, value); to be jitted."""

    def step(
        key: Array, params: Params, opt_state: Any, reference: Any, batch: Any
    ) -> tuple[Params, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(params, reference, key, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def mean_loss(
    apply: Denoiser, schedule: schedules.NoiseSchedule, weighting: losses.TimeWeighting
) -> Callable[[Params, Array, Examples], Array]:
    """(params, key, examples) -> the mean of their denoising losses, a scalar."""

    def mean(params: Params, key: Array, rows: Examples) -> Array:
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
