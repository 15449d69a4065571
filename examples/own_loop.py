"""Composes the losses by hand: a front of thresholds in one vmapped loop, and its gradient.

A researcher's loop needs none of the command line. Here a mixture of two Gaussians is
unlearned down to one, for four thresholds at once: the state carries its thresholds, so one
vmap traces the whole retention-unlearning front. The derivative of the final objective in the
threshold, through all steps, comes from jax.grad.
"""

import jax
import jax.numpy as jnp
import optax

import jax_unlearn
from jax_unlearn import losses, schedules

schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=100)
weighting = losses.time_weighting(losses.simple_weights(100, 2))


def denoise(params, x_t, t, cond):
    """A small network: three dense layers of the point and its log-SNR."""
    log_snr = schedule.log_snr[t][:, None] / 10
    hidden = jnp.concatenate([x_t, log_snr, jnp.cos(3 * log_snr), jnp.sin(3 * log_snr)], axis=1)
    for weight, bias in params[:-1]:
        hidden = jax.nn.silu(hidden @ weight + bias)
    weight, bias = params[-1]
    return hidden @ weight + bias


def initial(key, widths=(5, 64, 64, 2)):
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(key, (a, b)) / jnp.sqrt(a), jnp.zeros(b))
        for key, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def mode(key, count, centre):
    return jnp.array(centre) + 0.5 * jax.random.normal(key, (count, 2))


def pretrain(key, steps=2000):
    """Ordinary training on both modes, with the library's loss."""
    optimizer = optax.adam(3e-3)
    params = initial(key)

    def body(carry, key):
        params, state = carry
        a, b, c = jax.random.split(key, 3)
        x_0 = jnp.concatenate([mode(a, 128, [-2.0, 0.0]), mode(b, 128, [2.0, 0.0])])
        drawn = losses.draw(c, x_0, weighting.probabilities)

        def loss(params):
            each = losses.denoising_loss(
                denoise, params, schedule, x_0=x_0, cond=None, draws=drawn, weighting=weighting
            )
            return each.mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), keys)
    return params


def unlearn(threshold, reference, key, steps):
    """Forgets the left mode until its loss reaches the threshold; everything is traceable."""
    formulation = jax_unlearn.forward_kl(denoise, schedule, weighting)
    algorithm = jax_unlearn.primal_dual(formulation, optax.adam(1e-3), optax.sgd(0.05))
    state = algorithm.init(reference, jnp.atleast_1d(threshold))

    def body(state, key):
        a, b, c = jax.random.split(key, 3)
        batch = jax_unlearn.Batch(
            kept=jax_unlearn.Examples(mode(a, 128, [2.0, 0.0]), None),
            base=None,
            forget=jax_unlearn.Forget(mode(b, 128, [-2.0, 0.0]), None, jnp.zeros(128, int)),
        )
        return algorithm.step(c, state, batch)

    state, info = jax.lax.scan(body, state, jax.random.split(key, steps))
    return state, info


def main():
    reference = jax.jit(pretrain)(jax.random.key(0))
    thresholds = jnp.array([0.5, 0.8, 1.2, 1.6])
    state, info = jax.jit(jax.vmap(lambda b: unlearn(b, reference, jax.random.key(1), 600)))(
        thresholds
    )
    print("threshold  constraint value  multiplier  objective (means of the last 100 steps)")
    for row in range(len(thresholds)):
        last = [value[row, -100:].mean() for value in (info.values, info.multipliers)]
        kept = info.objective[row, -100:].mean()
        print(f"{thresholds[row]:9.2f}  {last[0]:16.3f}  {last[1]:10.3f}  {kept:9.4f}")

    def price(threshold):
        _, info = unlearn(threshold, reference, jax.random.key(1), 30)
        return info.multipliers[-1, 0]

    at, width = jnp.float32(1.2), 1e-2
    slope = jax.jit(jax.grad(price))(at)
    finite = (price(at + width) - price(at - width)) / (2 * width)
    print(f"d multiplier / d threshold after 30 steps: {slope:.4f}, by differences {finite:.4f}")


if __name__ == "__main__":
    main()
