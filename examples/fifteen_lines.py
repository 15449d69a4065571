"""Trousers forgotten by the embedded model. Prints a violation that closes, and its multiplier."""

import jax
import optax

from jax_unlearn import Batch, Images, forward_kl, load_pretrained, losses, multipliers, primal_dual
from jax_unlearn.app import embedded

apply, params, schedule, _ = load_pretrained(embedded.model_path())
data, labels = embedded.load_data().train
weighting = losses.time_weighting(losses.simple_weights(schedule.num_steps, 28 * 28))
problem = forward_kl(apply, schedule, weighting, reference_values=[0.044])  # trousers' loss
algorithm = primal_dual(problem, optax.adam(3e-4), multipliers.nu_pi(0.3, 8.0, nu=0.5))
state, step = algorithm.init(params, thresholds=[0.06]), jax.jit(algorithm.step)
for key in jax.random.split(jax.random.key(0), 60):
    kept, gone = (jax.random.choice(key, of, (16,)) / 127.5 - 1 for of in (data, data[labels == 1]))
    batch = Batch(Images(kept, None), Images(gone, None, jax.numpy.zeros(16, int)))
    state, info = step(key, state, params, batch)
    print(f"violation {info.violations[0]:+.4f}, multiplier {info.multipliers[0]:.3f}")
