"""An adversary whose conditions are trained along with the model: neither ever starts anew.

    min over θ of L(θ, λ; c),   and for each row r   min over c_r of attack_r(θ, c_r)

`robust` looks for the worst condition from the start in each step, in as many passes of the network
as its attack has steps. A pool takes one step each, and keeps what it found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import losses, schedules
from jax_unlearn.problem import Batch, Evaluate, Losses, Problem, psum
from jax_unlearn.typing import Array, ArrayLike, Denoiser, Params

__all__ = ["AttackLoss", "Pooled", "against_pool", "denoising_attack", "optimizer_pair"]

AttackLoss = Callable[..., Array]
"""(params, reference, key, pool, *, axis_name=None) -> what each row of the pool lowers, [rows]."""

# fold_in of a key by less than the number of rows, or of a split's keys, is what problems do, and
# `robust` has the number above this one.
_APART = 2**31 - 2


class Pooled(NamedTuple):
    """The parameters of a model and of its adversary.

    Attributes:
      params: of the denoiser.
      pool: conditions, [rows, ...], float.
    """

    params: Params
    pool: Any


def against_pool(problem: Problem, attack_loss: AttackLoss) -> Problem:
    """The problem whose row r to forget is under condition r of a pool that attacks the model.

    ∂L/∂θ = ∂/∂θ L(θ, λ; forget.cond = pool),   ∂L/∂pool_r = ∂/∂pool_r attack_loss_r(θ, pool_r)

    One descent on both is simultaneous gradient descent on the two players' losses. The value of L
    is that of the problem alone. The attack has noise of its own: it does not fit what it is judged
    by. Since nothing weighs the attack against the problem, give each an optimizer of its own: see
    `optimizer_pair`.

    Args:
      problem: any whose rows to forget have a `cond`.
      attack_loss: see `denoising_attack`. Over several devices each has its part of the pool's
        rows, and the loss must fold the rows' places into its keys (`losses.example_keys`).

    Returns:
      A Problem over `Pooled` parameters; the reference stays what it is for `problem`. A batch has
      as many rows to forget as the pool, over all devices, or it raises ValueError; what stands in
      their `cond` is not read. `losses` and `fresh` are both of the pool.

    Example: a network that says θ c, and attackers who want to hear 1. Where θ = 2, the slope of
      (2c − 1)² is 4 at c = 1 and 20 at c = 3. The model sees (2c)², and hears of no attack.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, multipliers
      >>> from jax_unlearn.problem import Batch, Conditions, Losses, Problem
      >>> def losses(theta, reference, key, batch, current, *, axis_name=None):
      ...     heard = jnp.square(theta * batch.forget.cond)
      ...     return Losses(jnp.square(theta - 1)[None], heard, batch.forget.constraint)
      >>> def attack_loss(theta, reference, key, pool, *, axis_name=None):
      ...     return jnp.square(theta * pool - 1)
      >>> problem = Problem(losses, -1.0, multipliers.non_negative(), "silence")
      >>> problem = formulations.against_pool(problem, attack_loss)
      >>> both = formulations.Pooled(jnp.array(2.0), pool=jnp.array([1.0, 3.0]))
      >>> batch = Batch(None, Conditions(None, None, constraint=jnp.array([0, 0])))
      >>> def value(both):
      ...     return lagrangian(problem, both, None, jax.random.key(0), batch, [0.1], [0.0])[0]
      >>> slope = jax.grad(value)(both)
      >>> [round(float(x), 3) for x in (value(both), slope.params, *slope.pool)]
      [3.0, 4.0, 4.0, 20.0]
    """

    def pooled(evaluate: Evaluate) -> Evaluate:
        def losses_at_pool(
            both: Params,
            reference: Params,
            key: Array,
            batch: Batch,
            current: Array,
            /,
            *,
            axis_name: str | None = None,
        ) -> Losses:
            params, pool = both
            pool = _own_rows(pool, batch, axis_name)
            still = jax.lax.stop_gradient((params, reference))
            other = jax.random.fold_in(key, _APART)
            attack = attack_loss(*still, other, pool, axis_name=axis_name)
            forget = batch.forget._replace(cond=jax.lax.stop_gradient(pool))
            found = evaluate(
                params, reference, key, batch._replace(forget=forget), current, axis_name=axis_name
            )
            # Nothing, with the attack's slope. Of the objective's rows here and elsewhere the mean
            # is taken: so each row here has as much as makes their share of that mean the sum.
            here = jnp.asarray(found.objective.shape[0], jnp.float32)
            slope = (attack - jax.lax.stop_gradient(attack)).sum() * psum(here, axis_name) / here
            return found._replace(objective=found.objective + slope)

        return losses_at_pool

    return problem._replace(
        losses=pooled(problem.losses),
        fresh=None if problem.fresh is None else pooled(problem.fresh),
        name=f"{problem.name} against a pool",
    )


def optimizer_pair(
    model: optax.GradientTransformation, pool: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Two optimizers side by side: of the model's parameters, and of the pool's conditions.

    Args:
      model: of `Pooled.params`. A clip of the global norm sees these alone.
      pool: of `Pooled.pool`, such as `attacks.restarted_adam`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_unlearn.formulations import Pooled, optimizer_pair
      >>> both = optimizer_pair(optax.sgd(0.1), optax.sgd(1.0))
      >>> at = Pooled(jnp.ones(1), jnp.ones((2, 1)))
      >>> updates, _ = both.update(at, both.init(at), at)
      >>> [round(float(leaf.ravel()[0]), 2) for leaf in updates]
      [-0.1, -1.0]
    """

    def init(params: Any) -> tuple[Any, Any]:
        return model.init(params.params), pool.init(params.pool)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        at = (None, None) if params is None else params
        first, first_state = model.update(updates.params, state[0], at[0])
        second, second_state = pool.update(updates.pool, state[1], at[1])
        return Pooled(first, second), (first_state, second_state)

    return optax.GradientTransformation(init, update)


def _own_rows(pool: Any, batch: Batch, axis_name: str | None) -> Any:
    """The rows of the pool that this device's rows to forget are under."""
    count = jax.tree.leaves(batch.forget)[0].shape[0]
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(pool)]
    if not shapes or any(shape[:1] != (count * devices,) for shape in shapes):
        raise ValueError(
            f"the pool needs a condition for each of {count * devices} rows to forget, not leaves "
            f"{shapes}."
        )
    if axis_name is None:
        return pool
    start = jax.lax.axis_index(axis_name) * count
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count), pool)


def denoising_attack(
    apply: Denoiser, schedule: schedules.NoiseSchedule, images: ArrayLike, *, each: int = 1
) -> AttackLoss:
    """The loss of concept inversion (arXiv 2308.01508): ‖ε − ε_θ(x_t, t, pool_r)‖²/d, [rows].

    It is the mean of `each` images a row, which all have a uniform time step and noise of their
    own: an attacker who sees more of them has less noise in its slope. Predictions are not clipped.

    Args:
      apply: the denoiser that is attacked.
      schedule: its noise schedule.
      images: of what is forgotten, [m, n, ...]: n of each of m concepts. Row r of the pool attacks
        for concept r mod m.
      each: images that a row sees in a step, at least 1.

    Returns:
      A loss for `against_pool`, which reads no reference.

    Raises:
      ValueError: for no images, or no image a row.

    Example: a network that says its condition misses noise, whose mean square is 1, by c² more.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, schedules
      >>> attack_loss = formulations.denoising_attack(
      ...     lambda params, x_t, t, cond: cond, schedules.noise_schedule(), jnp.ones((1, 5, 2))
      ... )
      >>> pool = jnp.repeat(jnp.array([0.0, 2.0]), 10_000)[:, None] * jnp.ones(2)
      >>> missed = attack_loss(None, None, jax.random.key(0), pool)
      >>> [round(float(x)) for x in (missed[:10_000].mean(), missed[10_000:].mean())]
      [1, 5]
    """
    stored = jnp.asarray(images)
    if stored.ndim < 3 or not stored.size:
        raise ValueError(f"images must be [m, n, ...], at least one, not {list(stored.shape)}.")
    if each < 1:
        raise ValueError(f"each row sees at least 1 image, not {each}.")

    def attack_loss(
        params: Params, reference: Params, key: Array, pool: Any, *, axis_name: str | None = None
    ) -> Array:
        del reference

        def one(key: Array, concept: Array) -> tuple[Array, Array, Array]:
            which, time, noise = jax.random.split(key, 3)
            x_0 = stored[concept, jax.random.randint(which, (), 0, stored.shape[1])]
            t = jax.random.randint(time, (), 0, schedule.num_steps)
            return x_0, t, jax.random.normal(noise, x_0.shape, x_0.dtype)

        count = jax.tree.leaves(pool)[0].shape[0]
        rows = jnp.arange(count)
        if axis_name is not None:
            rows = rows + jax.lax.axis_index(axis_name) * count
        keys = losses.example_keys(key, count * each, axis_name=axis_name)
        x_0, t, noise = jax.vmap(one)(keys, jnp.repeat(rows % stored.shape[0], each))
        pool = jax.tree.map(lambda leaf: jnp.repeat(leaf, each, axis=0), pool)
        x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[t])
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=pool)
        return (
            losses.squared_error(ours, noise).reshape(count, each).mean(axis=1) / stored[0, 0].size
        )

    return attack_loss
