"""One step on one device, by pmap on eight, and by jit over a mesh of eight: the same numbers.

The eight devices are parts of one CPU. The model is a mixture of three Gaussians whose weights
train; the first is forgotten. The rows of a batch draw the same noise on whatever device they are.
Printed are what is left of that weight, λ, and the largest difference from one device in 60 steps.
"""

import os
from functools import partial

# Before jax is imported.
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import optax

import jax_unlearn
from jax_unlearn import losses, mixtures, multipliers, schedules, sharding

schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=100)
law = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], 0.25)


def denoise(log_weights, x_t, t, cond):
    return mixtures.denoiser(law._replace(log_weights=log_weights), schedule)(x_t, t)


def algorithm(axis_name=None):
    """The algorithm for jit; with axis_name="data" for pmap, whose step sums over that axis."""
    weighting = losses.time_weighting(losses.simple_weights(schedule.num_steps, 2))
    problem = jax_unlearn.forward_kl(denoise, schedule, weighting)
    dual = multipliers.nu_pi(0.2, proportional=2.0, nu=0.5)
    return jax_unlearn.primal_dual(problem, optax.sgd(10.0), dual, axis_name=axis_name)


@jax.jit
def batch(key):
    kept, forget = jax.random.split(key)
    gone = mixtures.sample(mixtures.select(law, 0), forget, 64)
    return jax_unlearn.Batch(
        kept=jax_unlearn.Images(mixtures.sample(law, kept, 64), None),
        forget=jax_unlearn.Images(gone, None, jnp.zeros(64, int)),
    )


def run(step, whole=lambda tree: tree, split=lambda rows: rows):
    """Log weights and λ. `whole` places what every device has, `split` what they share out."""
    state = whole(algorithm().init(law.log_weights, thresholds=[0.6]))
    for key in jax.random.split(jax.random.key(0), 60):
        state, _ = step(key, state, whole(law.log_weights), split(batch(key)))
    return jax.device_get((state.params, state.multipliers))


def by_pmap():
    def split(rows):
        return jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), rows)

    return run(sharding.pmap_step(algorithm(axis_name="data")), split=split)


def by_mesh():
    mesh = sharding.device_mesh()
    whole, split = partial(sharding.replicate, mesh=mesh), partial(sharding.shard_batch, mesh=mesh)
    return run(sharding.jit_step(algorithm().step, mesh), whole, split)


def main():
    log_weights, multiplier = one = run(sharding.jit_step(algorithm().step))
    left = float(jax.nn.softmax(log_weights)[0])
    print(f"weight of the first Gaussian 0.333 -> {left:.3f}, multiplier {multiplier[0]:.3f}")
    found = {"left": left, "multiplier": float(multiplier[0])}
    for name, many in (("pmap", by_pmap()), ("mesh", by_mesh())):
        found[name] = max(float(abs(a - b).max()) for a, b in zip(one, many, strict=True))
        print(f"{name} on {jax.device_count()} devices: largest difference {found[name]:.1e}")
    return found


if __name__ == "__main__":
    main()
