"""Unlearns a Flax NNX network: `nnx.split` gives the parameters, `nnx.merge` the function.

The data are two Gaussians in the plane, of which the left one is forgotten. Printed are the
denoising losses of both before and after, the threshold of the left one, and the multiplier's mean
over the last third. It stays below the left one's share, one half, as in the exact solution.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_unlearn import Batch, Images, forward_kl, losses, mixtures, multipliers, primal_dual
from jax_unlearn.schedules import noise_schedule

schedule = noise_schedule("squaredcos_cap_v2", num_steps=100)
weighting = losses.time_weighting(losses.simple_weights(100, 2))
law = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)
parts = {"left": mixtures.select(law, 0), "right": mixtures.select(law, 1)}
THRESHOLD = 0.8


class Network(nnx.Module):
    def __init__(self, rngs):
        first, second = (nnx.Linear(n, 64, rngs=rngs) for n in (4, 64))
        last = nnx.Linear(64, 2, rngs=rngs)
        self.layers = nnx.Sequential(first, nnx.silu, second, nnx.silu, last)

    def __call__(self, x_t, t):
        log_snr = schedule.log_snr[t][:, None] / 10
        return self.layers(jnp.concatenate([x_t, log_snr, jnp.sin(3 * log_snr)], axis=1))


graph, initial, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)  # rest: statistics


def denoise(params, x_t, t, cond):
    return nnx.merge(graph, params, rest)(x_t, t)


def loss(params, law, key, rows=256):
    x_0 = mixtures.sample(law, key, rows)
    data = {"x_0": x_0, "cond": None, "draws": losses.draw(key, x_0, weighting.probabilities)}
    return losses.denoising_loss(denoise, params, schedule, weighting=weighting, **data).mean()


@jax.jit
def pretrain(params, keys):
    optimizer = optax.adam(3e-3)

    def step(carry, key):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], law, key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def main():
    reference = pretrain(initial, jax.random.split(jax.random.key(0), 1500))
    problem = forward_kl(denoise, schedule, weighting)
    algorithm = primal_dual(problem, optax.adam(5e-4), multipliers.nu_pi(0.02, 0.2, nu=0.9))

    def step(state, key):
        kept, gone = (mixtures.sample(one, key, 128) for one in (law, parts["left"]))
        batch = Batch(Images(kept, None), Images(gone, None, jnp.zeros(128, int)))
        return algorithm.step(key, state, reference, batch)

    start, keys = algorithm.init(reference, [THRESHOLD]), jax.random.split(jax.random.key(2), 600)
    state, info = jax.jit(jax.lax.scan, static_argnums=0)(step, start, keys)
    found = {"multiplier": float(info.multipliers[-200:].mean())}
    for name, one in parts.items():
        both = (loss(params, one, keys[0], rows=4096) for params in (reference, state.params))
        found[name] = before, after = tuple(map(float, both))
        print(f"{name}: {before:.3f} -> {after:.3f}")
    print(f"threshold of the left {THRESHOLD}, multiplier {found['multiplier']:.3f}")
    return found


if __name__ == "__main__":
    main()
