"""log dQ/dQ_i along paths of the reference's own ancestral chain, in nats."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import divergences, losses, samplers, schedules
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["path_log_ratios"]


def path_log_ratios(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    base: Condition,
    targets: Condition,
    shape: tuple[int, ...],
    steps: int,
) -> Array:
    """ℓ_i(τ) = Σ_t (‖x_s − μ_i(x_t)‖² − ‖x_s − μ_q(x_t)‖²)/2v_t = log dQ/dQ_i(τ), [n, k], nats.

    τ is a path of the ancestral chain Q of `steps` steps at a base condition: x_T ∼ N(0, I), then
    x_s ∼ N(μ_q(x_t), v_t) (`samplers.ddpm_step`). Q_i is the chain of the same variances at a
    target condition. In ε, with the path-KL weights w_t, d_t = ε_q − ε_i and the noise z_t of each
    step, ℓ_i = Σ_t w_t ‖d_t‖² − √(2 w_t) d_t·z_t.

    The last step of a sampler adds no noise, and the two chains would share no path. It gets the
    variance that its weight w assumes (`divergences.path_kl_weights`) and a draw of its own. Hence
    E_Q[ℓ_i] is the path KL KL(Q‖Q_i), E_Q[exp(−ℓ_i)] = 1, and the price of a chain P of the same
    steps, as on-policy formulations measure it, is KL(P‖Q). For exact denoisers and ever finer
    steps ℓ_i tends to log q(x_0)/q_i(x_0): the chains are time reversals of one noising process.

    A row depends on its key alone, which is that of its place: more paths take another key. Under
    `jax.jit`, with the schedule not traced, the chain is compiled once for several calls.

    Args:
      apply: the denoiser of q and of the q_i. Separate networks are one denoiser whose condition
        says which.
      params: its parameters.
      schedule: its noise schedule; gives the time steps, variances and the clipping of x̂_0.
      key: a PRNG key.
      base: conditions of the paths, a pytree of arrays [n, ...].
      targets: the conditions of q_1 … q_k for each path, of the same structure, [n, k, ...].
      shape: of one example, such as (height, width, channels).
      steps: of the chain, 2 to T.

    Returns:
      ℓ, [n, k].

    Raises:
      ValueError: for conditions that do not fit each other, fewer than 2 steps or too many, or a
        zero terminal SNR.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=10)
      >>> def apply(params, x_t, t, cond):
      ...     return x_t + params[cond][:, None]
      >>> labels = jnp.zeros(4000, int)
      >>> log_ratios = likelihoods.path_log_ratios(
      ...     apply, jnp.array([0.0, 0.1]), schedule, jax.random.key(0),
      ...     base=labels, targets=labels[:, None] + 1, shape=(1,), steps=5,
      ... )
      >>> log_ratios.shape, bool(abs(jnp.exp(-log_ratios).mean() - 1) < 0.1)
      ((4000, 1), True)
    """
    count, each = _checked(base, targets)
    chain = divergences.chain(schedule, shape, steps)
    conditions = jax.tree.map(
        lambda one, many: jnp.concatenate([one, jnp.reshape(many, (-1, *many.shape[2:]))]),
        base,
        targets,
    )
    keys = losses.example_keys(key, count)

    def noise(step: Array | int) -> Array:
        return jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(row, step), shape))(keys)

    def body(carry: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple, None]:
        x_t, total = carry
        step, time, now, after, weight = inputs
        rows = jnp.concatenate([x_t, jnp.repeat(x_t, each, axis=0)])
        prediction = apply(params, rows, jnp.full(rows.shape[:1], time), conditions)
        epsilon = schedules.clipped(prediction, schedule, x_t=rows, log_snr=now).epsilon
        z = noise(step)
        difference = jnp.repeat(epsilon[:count], each, axis=0) - epsilon[count:]
        along = (difference * jnp.repeat(z, each, axis=0)).reshape(count * each, -1).sum(axis=1)
        squares = jnp.square(difference).reshape(count * each, -1).sum(axis=1)
        x_s = samplers.ddpm_step(
            prediction[:count], x_t=x_t, noise=z, log_snr_t=now, log_snr_s=after, schedule=schedule
        )
        return (x_s, total + weight * squares - jnp.sqrt(2 * weight) * along), None

    inputs = (jnp.arange(steps), chain.times, chain.log_snr, chain.following, chain.weights)
    start = noise(steps)
    (_, total), _ = jax.lax.scan(body, (start, jnp.zeros(count * each, start.dtype)), inputs)
    return total.reshape(count, each)


def _checked(base: Condition, targets: Condition) -> tuple[int, int]:
    """n and k."""
    if jax.tree.structure(base) != jax.tree.structure(targets):
        raise ValueError("base and targets are conditions of one reference: of one structure.")
    theirs = [np.shape(leaf) for leaf in jax.tree.leaves(targets)]
    expected = [shape[:1] + shape[2:] for shape in theirs]
    ours = [np.shape(leaf) for leaf in jax.tree.leaves(base)]
    leading = {shape[:2] for shape in theirs}
    if len(leading) != 1 or min(map(len, theirs)) < 2 or ours != expected:
        raise ValueError(
            f"expected conditions base [n, ...] and targets [n, k, ...], got the shapes "
            f"{list(map(list, ours))} and {list(map(list, theirs))}."
        )
    return leading.pop()
