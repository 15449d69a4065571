"""What the baselines share: the kind of a loss, how it is trained, the mean denoising loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.problem import Images, Losses, Problem
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["Loss", "loss_problem", "mean_loss", "train_step"]

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


def loss_problem(loss: Loss, *, name: str) -> Problem:
    """min_θ loss(θ) as a `Problem` whose constraints never have a row: what `primal_dual` trains.

    Values are NaN and violations 0, so that multipliers stay where they began, and weigh nothing.
    With `optax.set_to_zero()` for the multipliers a step is that of `train_step`.

    Args:
      loss: (params, reference, key, batch) -> scalar.
      name: as it stands in a report.

    Returns:
      A Problem for jit. Under pmap its losses raise ValueError: a loss draws the same noise on
      each device, and may have a gradient that is no mean over rows.

    Example: one step of ½ from 0 towards 1.
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_unlearn import baselines, primal_dual
      >>> loss = lambda x, reference, key, batch: jnp.square(x - batch)
      >>> problem = baselines.loss_problem(loss, name="nearer")
      >>> algorithm = primal_dual(problem, optax.sgd(0.25), optax.set_to_zero())
      >>> state = algorithm.init(jnp.zeros(()), thresholds=[3.0])
      >>> state, info = algorithm.step(jax.random.key(0), state, None, 1.0)
      >>> float(state.params), float(info.objective), info.values.tolist()
      (0.5, 1.0, [nan])
    """

    def losses_of(
        params: Params,
        reference: Any,
        key: Array,
        batch: Any,
        current: Array,
        /,
        *,
        axis_name: str | None = None,
    ) -> Losses:
        del current
        if axis_name is not None:
            raise ValueError(f"{name} is a loss of whole batches: use jit and a mesh, not pmap.")
        value = loss(params, reference, key, batch)
        return Losses(value[None], jnp.zeros(0), jnp.zeros(0, int))

    return Problem(losses_of, 1.0, multipliers.non_negative(), name)


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
