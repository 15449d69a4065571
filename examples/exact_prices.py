"""Draws the price of forgetting one of three Gaussians: dP*/db against the threshold b.

    python examples/exact_prices.py prices.png

Each curve is the exact optimum on a grid. P* is the least divergence from the reference that
meets the threshold; its slope is the multiplier, by which the next bit of forgetting is paid.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from jax_unlearn import duality, mixtures

reference = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], 0.49)
unlearn = mixtures.select(reference, 0)


def curve(solve, rows, thresholds):
    """P*, dP*/db by the implicit function theorem, and λ*, for every threshold."""

    def price(b):
        solution = solve(log_q, rows, b[None])
        return solution.primal_value, (solution.multipliers[0], solution.attained)

    both = jax.jit(lambda b: jax.lax.map(jax.value_and_grad(price, has_aux=True), b))
    (value, (multiplier, attained)), slope = both(jnp.asarray(thresholds))
    keep = np.asarray(attained)
    return thresholds[keep], value[keep], slope[keep], multiplier[keep]


with jax.enable_x64(True):
    cells = mixtures.grid([(-7.0, 7.0)] * 2, 101)
    log_q, log_u = mixtures.log_masses(reference, cells), mixtures.log_masses(unlearn, cells)[None]
    density = jnp.exp(mixtures.log_density(unlearn, cells.x))[None]
    problems = {
        "RU: KL(p‖u) ≥ b": (duality.solve_reverse_kl, log_u, np.linspace(7, 40, 34), "b (nats)"),
        "FU: KL(u‖p) ≥ b": (duality.solve_forward_kl, log_u, np.linspace(0.5, 14, 28), "b (nats)"),
        "LU: E[h] ≤ ε": (duality.solve_likelihood, density, np.geomspace(0.1, 1e-4, 31), "ε"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex="col", layout="constrained")
    for (title, (solve, rows, grid, label)), (top, bottom) in zip(
        tqdm(problems.items(), "formulations", disable=None), axes.T, strict=True
    ):
        b, value, slope, multiplier = curve(solve, rows, grid)
        top.plot(b, value)
        bottom.plot(b, np.abs(slope), label="|derivative of P*|")
        bottom.plot(b, multiplier, ".", label="λ*")
        top.set(title=title, ylabel="P* (nats)")
        bottom.set(xlabel=label, ylabel="price")
        if label == "ε":
            bottom.set(xscale="log", yscale="log")
    axes[1, 0].legend()
    figure.savefig(sys.argv[1], dpi=120)
