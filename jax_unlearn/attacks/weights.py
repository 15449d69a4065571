"""Attacks on a network's weights: teaching the concept again, and rounding to a few bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import schedules
from jax_unlearn.attacks.objective import checked, drawn_loss
from jax_unlearn.baselines.base import train_step
from jax_unlearn.problem import Images
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = ["Relearning", "RelearningState", "relearning", "rounded"]


class RelearningState(NamedTuple):
    """What relearning carries: parameters, the optimizer's state, and steps taken, an integer."""

    params: Params
    opt_state: Any
    step: Array


class Relearning(NamedTuple):
    """Relearning as two pure functions.

    Attributes:
      init: (params) -> state.
      advance: (state, key, steps) -> state, `steps` further ones, compiled once for any number.
    """

    init: Callable[[Params], RelearningState]
    advance: Callable[[RelearningState, Array, int], RelearningState]


def relearning(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    optimizer: optax.GradientTransformation,
    *,
    x_0: ArrayLike,
    cond: Condition,
    batch: int,
) -> Relearning:
    """Fine-tunes on a few forgotten images: min_θ E ‖ε − ε_θ(x_t, t, c)‖²/d.

    Each step draws `batch` of the n images with replacement, their noise, and uniform time steps.
    The draws depend on the key and the number of steps taken. So with one key a run in pieces
    equals the run at once, and every budget is seen on the way. `jax.vmap` runs several keys or
    models side by side.

    Args:
      apply: the denoiser. To train an adapter, let it take the adapter's parameters.
      schedule: its noise schedule.
      optimizer: for the parameters.
      x_0: images of the concept, [n, ...].
      cond: the condition of each, leaves [n, ...], or None.
      batch: how many images a step draws.

    Raises:
      ValueError: for no images, conditions of another number, an empty batch; from `advance` for
        a negative number of steps.

    Example:
      A network whose images are all θ, at ᾱ = ½, is taught ones.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_unlearn import attacks, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 1e-6])
      >>> apply = lambda theta, x_t, t, cond: 2**0.5 * x_t - theta
      >>> attack = attacks.relearning(
      ...     apply, schedule, optax.sgd(0.25), x_0=jnp.ones((3, 1)), cond=None, batch=4
      ... )
      >>> state = attack.advance(attack.init(jnp.array([0.0])), jax.random.key(0), 1)
      >>> round(float(state.params[0]), 3), int(state.step)
      (0.5, 1)
      >>> state = attack.advance(state, jax.random.key(0), 9)
      >>> round(float(state.params[0]), 3), int(state.step)
      (0.999, 10)
    """
    images = checked(x_0, cond, batch)
    loss = drawn_loss(apply, schedule, batch)
    train = train_step(lambda params, _, key, images: loss(params, key, images), optimizer)

    def init(params: Params) -> RelearningState:
        params = jax.tree.map(jnp.asarray, params)
        return RelearningState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    # The images are an argument: as a constant they would be part of the compiled program. So is
    # the number of steps, and one program serves all budgets.
    @jax.jit
    def run(state: RelearningState, key: Array, images: Images, steps: ArrayLike) -> Any:
        def body(_: Array, state: RelearningState) -> RelearningState:
            step_key = jax.random.fold_in(key, state.step)
            params, opt_state, _loss = train(step_key, state.params, state.opt_state, None, images)
            return RelearningState(params, opt_state, state.step + 1)

        return jax.lax.fori_loop(0, steps, body, state)

    def advance(state: RelearningState, key: Array, steps: int) -> RelearningState:
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}.")
        return run(state, key, images, steps)

    return Relearning(init, advance)


def rounded(params: Params, bits: int) -> Params:
    """s round(w/s), s = max|w|/(2^{bits−1} − 1): weights on a symmetric grid of a few bits.

    Each output channel, the last axis, has a scale s of its own. Leaves of one dimension or none,
    biases and norms, stay as they are, and so do integers. What small updates hid may come back,
    since rounding drops them (Zhang et al. 2025, "Catastrophic failure of LLM unlearning via
    quantization").

    Args:
      params: any pytree.
      bits: 2 to 16.

    Raises:
      ValueError: for another number of bits.

    Example:
      Three bits are the integers −3 to 3, times 1/3 where the largest weight is 1.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks
      >>> found = attacks.rounded({"kernel": jnp.array([[1.0], [-0.4]]), "bias": jnp.ones(1)}, 3)
      >>> [round(float(weight), 3) for weight in found["kernel"][:, 0]], found["bias"].tolist()
      ([1.0, -0.333], [1.0])
    """
    if bits not in range(2, 17):
        raise ValueError(f"bits must be an integer from 2 to 16, not {bits}.")
    largest = 2 ** (bits - 1) - 1

    def on_grid(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Half-precision cannot hold the integers of many bits.
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        most = jnp.abs(wide).max(axis=tuple(range(leaf.ndim - 1)), keepdims=True)
        number = jnp.round(wide / jnp.where(most > 0, most, 1.0) * largest)
        # In this order the largest weight stays as it is, so that rounding twice changes nothing.
        return (number / largest * most).astype(leaf.dtype)

    return jax.tree.map(on_grid, params)
