"""
A multiplier finds its level
============================

Algorithm 1 on the masses of a grid: gradient descent on log p, ascent on λ. The constraint is
KL(p‖q₁) ≥ 16. Plain ascent swings about the exact λ\\*; a PI controller settles sooner.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from jax_unlearn import Losses, Problem, duality, mixtures, multipliers, primal_dual

jax.config.update("jax_enable_x64", True)
q = mixtures.gaussian_mixture([[-2.0], [0.5], [2.5]], 0.36)
cells = mixtures.grid([(-5.0, 5.5)], 200)
log_q, log_u = (mixtures.log_masses(one, cells) for one in (q, mixtures.select(q, 0)))
exact = duality.solve_reverse_kl(log_q, log_u[None], [16.0])

# %%
# A problem is any function that gives one loss a row. Here there is one row, the exact KLs.


def losses(logits, reference, key, batch, current, *, axis_name=None):
    log_p = jax.nn.log_softmax(logits)
    price, value = (jnp.exp(log_p) @ (log_p - other) for other in (log_q, log_u))
    return Losses(price[None], value[None], jnp.array([0]))


problem = Problem(losses, 1.0, multipliers.capped_simplex(), "exact reverse KL")


def unlearn(dual, steps=600):
    algorithm = primal_dual(problem, optax.sgd(0.5), dual)

    def step(state, key):
        return algorithm.step(key, state, None, None)

    keys = jax.random.split(jax.random.key(0), steps)  # the losses draw nothing
    start = algorithm.init(log_q, [16.0])
    return jax.jit(jax.lax.scan, static_argnums=0)(step, start, keys)[1]


runs = {"ascent": optax.sgd(0.001), "nu_pi": multipliers.nu_pi(0.001, 0.02)}
found = {name: unlearn(dual) for name, dual in runs.items()}
print(f"exact λ* = {exact.multipliers[0]:.4f}")
for name, info in found.items():
    print(f"{name}: λ = {info.multipliers[-1, 0]:.4f}, violation {info.violations[-1, 0]:+.4f}")

# %%

figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.5, 4), sharex=True, layout="constrained")
for name, info in found.items():
    top.plot(info.multipliers[:, 0], label=name)
    bottom.plot(info.violations[:, 0])
top.axhline(float(exact.multipliers[0]), color="0.5", ls="--", label="exact λ*")
bottom.axhline(0.0, color="0.5", ls="--")
top.set(ylabel="multiplier λ")
bottom.set(ylabel="violation, nats", xlabel="step")
top.legend(frameon=False, fontsize=8)
plt.show()
