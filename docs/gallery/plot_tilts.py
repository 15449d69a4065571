"""
The three optima
================

A mixture of three Gaussians on the line, of which the left one is unlearned. Each optimum is a
tilt of q: reverse KL also moves what is kept, likelihood and forward KL leave it in its place.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from jax_unlearn import duality, mixtures

jax.config.update("jax_enable_x64", True)
q = mixtures.gaussian_mixture([[-2.0], [0.5], [2.5]], 0.36)
cells = mixtures.grid([(-5.0, 5.5)], 700)
log_q, log_u = (mixtures.log_masses(one, cells) for one in (q, mixtures.select(q, 0)))
posterior = mixtures.responsibilities(q, cells.x)[:, 0]

# %%
# Each threshold is met exactly, and the multiplier is the price of one more unit of it.

optima = {
    "reverse KL: KL(p‖q₁) ≥ 16": duality.solve_reverse_kl(log_q, log_u[None], [16.0]),
    "forward KL: KL(q₁‖p) ≥ 2": duality.solve_forward_kl(log_q, log_u[None], [2.0]),
    "likelihood: E[h] ≤ 0.05": duality.solve_likelihood(log_q, posterior[None], [0.05]),
}
for name, found in optima.items():
    price, multiplier = float(found.primal_value), float(found.multipliers[0])
    print(f"{name}: λ = {multiplier:.3f}, price {price:.3f} nats, attained {bool(found.attained)}")

# %%

x = cells.x[:, 0]
figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True, layout="constrained")
for axis, (name, found) in zip(axes, optima.items(), strict=True):
    axis.fill_between(x, jnp.exp(log_q - cells.log_volume), color="0.85", label="q")
    axis.plot(x, jnp.exp(log_u - cells.log_volume) / 3, "--", color="0.5", label="q₁, by its share")
    axis.plot(x, jnp.exp(found.log_p - cells.log_volume), color="C0", label="p")
    axis.set(title=name, xlabel="x")
axes[0].set_ylabel("density")
axes[0].legend(frameon=False, fontsize=8)
plt.show()
