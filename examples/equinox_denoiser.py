"""Unlearns an Equinox network: a denoiser that is not this library's, the same step.

The step needs a function (params, x_t, t, cond) -> prediction and nothing else. An Equinox module
is split into its arrays, which are the params, and the rest, which the function closes over. The
data are scikit-learn's 8×8 digits, of which zeros are forgotten. Printed are the denoising losses
of zeros, with their threshold, and of all other digits, before and after, and the multiplier's
mean over the last quarter. It stays below the share of zeros, one in ten, as in the exact solution.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

from jax_unlearn import Batch, Images, forward_kl, losses, multipliers, primal_dual, schedules

schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=200)
weighting = losses.time_weighting(losses.simple_weights(200, 64))
digits = load_digits()
images, labels = jnp.asarray(digits.images[..., None] / 8.0 - 1.0, jnp.float32), digits.target
sets = {"zeros": np.flatnonzero(labels == 0), "others": np.flatnonzero(labels != 0)}


class Network(eqx.Module):
    """An MLP on pixels, log-SNR and an embedded label."""

    labels: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.labels = eqx.nn.Embedding(10, 16, key=key)
        self.mlp = eqx.nn.MLP(64 + 16 + 2, 64, 256, 3, jax.nn.silu, key=key)

    def __call__(self, x_t, t, label):
        log_snr = schedule.log_snr[t] / 10
        extra = jnp.stack([log_snr, jnp.sin(3 * log_snr)])
        # Near its own noise level the image is mostly noise: start from x_t and correct.
        hidden = jnp.concatenate([x_t.reshape(-1), self.labels(label), extra])
        return x_t + self.mlp(hidden).reshape(8, 8, 1)


initial, static = eqx.partition(Network(jax.random.key(0)), eqx.is_array)


def denoise(params, x_t, t, cond):
    return jax.vmap(eqx.combine(params, static))(x_t, t, cond)


@jax.jit
def loss(params, x_0, cond, key):
    drawn = losses.draw(key, x_0, weighting.probabilities)
    return losses.denoising_loss(
        denoise, params, schedule, x_0=x_0, cond=cond, draws=drawn, weighting=weighting
    ).mean()


def pretrain(params, rng, steps):
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x_0, cond, key):
        updates, state = optimizer.update(jax.grad(loss)(params, x_0, cond, key), state)
        return optax.apply_updates(params, updates), state

    for number in tqdm(range(steps), "pretraining", disable=None):
        rows = rng.choice(len(images), 128)
        params, state = step(params, state, images[rows], labels[rows], jax.random.key(number))
    return params


def main(pretraining=2000, steps=400):
    rng = np.random.default_rng(0)
    reference = pretrain(initial, rng, pretraining)

    def measure(params):
        key = jax.random.key(1)
        return {k: float(loss(params, images[v], labels[v], key)) for k, v in sets.items()}

    before = measure(reference)
    problem = forward_kl(denoise, schedule, weighting, reference_values=[before["zeros"]])
    algorithm = primal_dual(problem, optax.adam(1e-4), multipliers.nu_pi(0.02, 1.0, nu=0.9))
    state = algorithm.init(reference, thresholds=[1.5 * before["zeros"]])
    step, history = jax.jit(algorithm.step, donate_argnums=1), []
    for number in tqdm(range(steps), "unlearning", disable=None):
        kept, gone = rng.choice(len(images), 128), rng.choice(sets["zeros"], 64)
        forget = Images(images[gone], labels[gone], np.zeros(64, np.int32))
        batch = Batch(Images(images[kept], labels[kept]), forget)
        state, info = step(jax.random.key(number), state, reference, batch)
        history.append(info.multipliers[0])
    after, multiplier = measure(state.params), float(np.mean(history[-steps // 4 :]))
    for name in sets:
        print(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")
    print(f"threshold of zeros {1.5 * before['zeros']:.4f}, multiplier {multiplier:.3f}")
    return {"before": before, "after": after, "multiplier": multiplier}


if __name__ == "__main__":
    main()
