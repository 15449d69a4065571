"""A front of thresholds in one vmapped scan, and the derivative of a multiplier through it.

A network of two Gaussians forgets the left one, for four thresholds at once: the state carries its
thresholds, so that one vmap traces the retention-unlearning front. Printed are the constraint's
value, the multiplier and the objective at each threshold; they rise together. Then the derivative
of the multiplier after 30 steps in the threshold, by jax.grad and by finite differences.
"""

import jax
import jax.numpy as jnp
import optax

from jax_unlearn import Batch, Images, forward_kl, losses, mixtures, multipliers, primal_dual
from jax_unlearn.schedules import noise_schedule

schedule = noise_schedule("squaredcos_cap_v2", num_steps=100)
weighting = losses.time_weighting(losses.simple_weights(100, 2))
law = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)


def denoise(params, x_t, t, cond):
    """A small network: three dense layers of the point and its log-SNR."""
    log_snr = schedule.log_snr[t][:, None] / 10
    hidden = jnp.concatenate([x_t, log_snr, jnp.cos(3 * log_snr), jnp.sin(3 * log_snr)], axis=1)
    for weight, bias in params[:-1]:
        hidden = jax.nn.silu(hidden @ weight + bias)
    weight, bias = params[-1]
    return hidden @ weight + bias


def initial(key, widths=(5, 64, 64, 2)):
    shapes = list(zip(widths[:-1], widths[1:], strict=True))
    keys = jax.random.split(key, len(shapes))
    return [
        (jax.random.normal(key, (a, b)) / jnp.sqrt(a), jnp.zeros(b))
        for key, (a, b) in zip(keys, shapes, strict=True)
    ]


def pretrain(key, steps=2000):
    """Ordinary training, with the library's loss."""
    optimizer, params = optax.adam(3e-3), initial(key)

    def loss(params, key):
        x_0 = mixtures.sample(law, key, 256)
        data = {"x_0": x_0, "cond": None, "draws": losses.draw(key, x_0, weighting.probabilities)}
        return losses.denoising_loss(denoise, params, schedule, weighting=weighting, **data).mean()

    def step(carry, key):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def unlearn(threshold, reference, steps):
    """What every step reports, [steps]; everything is traceable, the threshold included."""
    problem = forward_kl(denoise, schedule, weighting)
    # Without eps_root the derivative of Adam's √v would be infinite where v is zero.
    optimizer, dual = optax.adam(1e-3, eps_root=1e-8), multipliers.nu_pi(0.02, 0.2, nu=0.9)
    algorithm = primal_dual(problem, optimizer, dual)

    def step(state, key):
        kept, gone = mixtures.sample(law, key, 128), mixtures.sample(LEFT, key, 128)
        batch = Batch(Images(kept, None), Images(gone, None, jnp.zeros(128, int)))
        return algorithm.step(key, state, reference, batch)

    state = algorithm.init(reference, jnp.atleast_1d(threshold))
    return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), steps))[1]


LEFT = mixtures.select(law, 0)


def main():
    reference = jax.jit(pretrain)(jax.random.key(0))
    thresholds = jnp.array([0.5, 0.6, 0.7, 0.8])
    front = jax.jit(jax.vmap(lambda b: unlearn(b, reference, 600)))(thresholds)
    print("threshold  constraint value  multiplier  objective (means of the last 200 steps)")
    means = [front.values[..., 0], front.multipliers[..., 0], front.objective]
    rows = jnp.stack([thresholds, *(each[:, -200:].mean(axis=1) for each in means)], axis=1)
    for row in rows.tolist():
        print("{:9.2f}  {:16.3f}  {:10.3f}  {:9.4f}".format(*row))

    multiplier = jax.jit(lambda b: unlearn(b, reference, 30).multipliers[-1, 0])
    at, width = jnp.float32(0.6), 1e-2
    slope = jax.grad(multiplier)(at)
    finite = (multiplier(at + width) - multiplier(at - width)) / (2 * width)
    print(f"d multiplier / d threshold after 30 steps: {slope:.4f}, by differences {finite:.4f}")
    return {"rows": rows, "slope": float(slope), "finite": float(finite)}


if __name__ == "__main__":
    main()
