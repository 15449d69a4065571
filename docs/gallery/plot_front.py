"""
A front and its floor
=====================

The price of forgetting, KL(p‖q), against what is left of the forgotten mode, E_p[h]. The exact
front is P\\*(ε). The floor is estimated from 2000 samples of q, by weak duality. Negative guidance,
p ∝ q (q/q₁)^α, is one way to forget, and a dear one. No way leads below the front.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jax_unlearn import duality, mixtures

jax.config.update("jax_enable_x64", True)
q = mixtures.gaussian_mixture([[-1.2], [0.8], [2.5]], 0.64)
cells = mixtures.grid([(-6.0, 7.0)], 600)
log_q, log_u = (mixtures.log_masses(one, cells) for one in (q, mixtures.select(q, 0)))
h = mixtures.responsibilities(q, cells.x)[:, 0]

# %%
# The front, for all thresholds in one program. Its slope is −λ, by the envelope theorem.

thresholds = jnp.linspace(0.05, 0.32, 40)
solve = jax.vmap(lambda e: duality.solve_likelihood(log_q, h[None], e[None]))
front = jax.jit(solve)(thresholds)
slope = np.gradient(front.primal_value, thresholds)
error = np.abs(slope + front.multipliers[:, 0])[2:-2].max()
print(f"λ up to {front.multipliers.max():.1f}, −dP*/dε differs by at most {error:.3f}")

# %%
# The floor knows q by samples alone. Its error is that of the mean over them.

drawn = mixtures.sample(q, jax.random.key(0), 2000)
values = mixtures.responsibilities(q, drawn)[:, :1]
asked = np.linspace(0.06, 0.3, 9)
floors = [duality.likelihood_floor(values, [e], key=jax.random.key(1)) for e in asked]

# %%

guided = []
for alpha in np.linspace(0.0, 0.12, 30):
    log_p = jax.nn.log_softmax(log_q + alpha * (log_q - log_u))
    guided.append((jnp.exp(log_p) @ h, jnp.exp(log_p) @ (log_p - log_q)))

figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
axis.plot(thresholds, front.primal_value, color="C0", label="exact front P*(ε)")
axis.errorbar(
    asked, [f.value for f in floors], [2 * f.stderr for f in floors],
    fmt="o", ms=3, color="C1", label="floor of 2000 samples, ± 2 errors",
)  # fmt: skip
axis.plot(*np.transpose(guided), color="C2", label="negative guidance, by α")
axis.set(xlabel="E[h], what is left of the forgotten mode", ylabel="KL(p‖q), nats")
axis.set_ylim(0, None)
axis.legend(frameon=False, fontsize=8)
plt.show()
