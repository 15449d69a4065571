"""A training loop of one's own: `jax_unlearn.lagrangian` and plain optax, without `primal_dual`.

The embedded model forgets trousers: min KL(q‖p) over all of its images subject to a denoising loss
of trousers ≥ 0.06, from 0.044. `lagrangian` gives the value to descend and the violations to
ascend; the rest is the reader's. Here gradients are clipped, an average of the parameters is kept,
and the dual step is an augmented Lagrangian's: the network meets λ + ρ violation. Printed are the
violation and the multiplier, means of ten steps each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jax_unlearn
from jax_unlearn import losses
from jax_unlearn.app import data, embedded

TROUSERS, ROWS = 1, 16
THRESHOLD, DUAL_RATE, RHO = jnp.array([0.06]), 0.3, 8.0

apply, reference, schedule, _ = jax_unlearn.load_pretrained(embedded.model_path())
weighting = losses.time_weighting(losses.simple_weights(schedule.num_steps, 28 * 28))
problem = jax_unlearn.forward_kl(apply, schedule, weighting, reference_values=[0.044])
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))


@jax.jit
def step(key, params, average, opt_state, multiplier, seen, batch):
    """One step; `seen` is the violation in the step before."""

    def value(params):
        met = problem.project(multiplier + RHO * seen)
        return jax_unlearn.lagrangian(problem, params, reference, key, batch, met, THRESHOLD)

    gradient, found = jax.grad(value, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 0.1)
    multiplier = problem.project(multiplier + DUAL_RATE * found.violations)
    return (params, average, opt_state, multiplier, found.violations), found


def main(steps=60):
    pixels, labels = embedded.load_data().train
    trousers = np.flatnonzero(labels == TROUSERS)
    rng, history = np.random.default_rng(0), []
    carry = (reference, reference, optimizer.init(reference), jnp.zeros(1), jnp.zeros(1))
    for number in (bar := tqdm(range(1, steps + 1), "own loop", disable=None)):
        kept, gone = rng.choice(len(labels), ROWS), rng.choice(trousers, ROWS)
        batch = jax_unlearn.Batch(
            kept=jax_unlearn.Images(data.to_unit_range(pixels[kept]), None),
            forget=jax_unlearn.Images(
                data.to_unit_range(pixels[gone]), None, np.zeros(ROWS, np.int32)
            ),
        )
        carry, found = step(jax.random.key(number), *carry, batch)
        history.append((float(found.violations[0]), float(carry[3][0])))
        if number % 10 == 0:
            violation, multiplier = np.mean(history[-10:], axis=0)
            bar.write(f"step {number}: violation {violation:+.4f}, multiplier {multiplier:.3f}")
    violations, multipliers = np.transpose(history)
    return {"violations": violations, "multipliers": multipliers, "average": carry[1]}


if __name__ == "__main__":
    main()
