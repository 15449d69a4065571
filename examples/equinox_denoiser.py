"""Unlearns a denoiser that is not this library's: an Equinox network, the same step.

The step needs a function (params, x_t, t, cond) -> prediction and nothing else. An Equinox
module is split into its arrays, which are the params, and the rest, which the function closes
over. The data are scikit-learn's 8×8 digits; the class to forget is the zero.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jax_unlearn
from jax_unlearn import losses, multipliers, schedules

schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=200)
weighting = losses.time_weighting(losses.simple_weights(200, 64))


class Network(eqx.Module):
    """An MLP on pixels, log-SNR and an embedded label; the eleventh label is "none"."""

    labels: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.labels = eqx.nn.Embedding(11, 16, key=first)
        self.mlp = eqx.nn.MLP(64 + 16 + 2, 64, 256, 3, jax.nn.silu, key=second)

    def __call__(self, x_t, t, label):
        log_snr = schedule.log_snr[t] / 10
        extra = jnp.stack([log_snr, jnp.sin(3 * log_snr)])
        hidden = jnp.concatenate([x_t.reshape(-1), self.labels(label), extra])
        # Near its own noise level the image is mostly noise: start from x_t and correct.
        return x_t + self.mlp(hidden).reshape(8, 8, 1)


params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_array)


def denoise(params, x_t, t, cond):
    return jax.vmap(eqx.combine(params, static))(x_t, t, cond)


def loss_of(params, x_0, labels, key):
    drawn = losses.draw(key, x_0, weighting.probabilities)
    return losses.denoising_loss(
        denoise, params, schedule, x_0=x_0, cond=labels, draws=drawn, weighting=weighting
    )


def main():
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 8.0 - 1.0, jnp.float32)
    labels = jnp.asarray(digits.target)
    zeros, others = np.flatnonzero(digits.target == 0), np.flatnonzero(digits.target != 0)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def pretrain(params, key):
        def body(carry, key):
            params, state = carry
            rows_key, null_key, key = jax.random.split(key, 3)
            rows = jax.random.randint(rows_key, (128,), 0, len(images))
            cond = jnp.where(jax.random.uniform(null_key, (128,)) < 0.2, 10, labels[rows])
            gradient = jax.grad(lambda p: loss_of(p, images[rows], cond, key).mean())(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, optimizer.init(params))
        return jax.lax.scan(body, carry, jax.random.split(key, 4000))[0][0]

    reference = pretrain(params, jax.random.key(1))

    def value(params, rows):
        return float(loss_of(params, images[rows], labels[rows], jax.random.key(2)).mean())

    before = value(reference, zeros), value(reference, others)
    formulation = jax_unlearn.forward_kl(denoise, schedule, weighting)
    algorithm = jax_unlearn.primal_dual(
        formulation, optax.adam(3e-4), multipliers.nu_pi(0.2, 1.0, nu=0.9)
    )
    state = algorithm.init(reference, thresholds=[2 * before[0]])
    step = jax.jit(algorithm.step, donate_argnums=1)
    rng = np.random.default_rng(0)
    for number in range(400):
        kept, gone = rng.choice(others, 128), rng.choice(zeros, 64)
        batch = jax_unlearn.Batch(
            kept=jax_unlearn.Examples(images[kept], labels[kept]),
            base=None,
            forget=jax_unlearn.Forget(images[gone], labels[gone], np.zeros(64, np.int32)),
        )
        state, _ = step(jax.random.key(number), state, batch)
    after = value(state.params, zeros), value(state.params, others)
    print(f"zeros  (threshold {2 * before[0]:.4f}): {before[0]:.4f} -> {after[0]:.4f}")
    print(f"others                     : {before[1]:.4f} -> {after[1]:.4f}")
    print(f"multiplier {state.multipliers[0]:.3f}")


if __name__ == "__main__":
    main()
