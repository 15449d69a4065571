"""Two of five Gaussians unlearned: constraints against one weight for both, exactly.

    python examples/equal_weights.py

One of the two lies beside a kept Gaussian, the other far from all. For each formulation and
threshold the constrained optimum, with a multiplier for each, is compared with the tilt that has
one multiplier for both, raised until the less forgotten of the two meets the threshold: the
best that any run with equal weights can reach at the same worst-case forgetting. Under reverse KL
the far one is separated as it is (37 nats) and costs nothing; one weight for both pushes it on.
"""

import jax
import jax.numpy as jnp

from jax_unlearn import duality, mixtures

MEANS = [[2.0, 0.0], [0.0, 3.2], [3.6, 3.2], [1.3, 3.9], [-3.0, -2.0]]
NEAR, FAR = 3, 4

reference = mixtures.gaussian_mixture(MEANS, 0.49)
unlearn = [mixtures.select(reference, component) for component in (NEAR, FAR)]


def divergence(log_p, log_r):
    return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p - log_r, 0.0), axis=-1)


def compare(solve, tilt, rows, threshold, measure, price, highest):
    """(multipliers, price) of the constrained optimum, and of equal multipliers."""
    solution = solve(log_q, rows, jnp.full(2, threshold))
    assert solution.attained, "the optimum is not attained: choose a lower threshold"
    low, high = 0.0, highest  # the less forgotten of the two meets the threshold in between
    for _ in range(60):
        middle = 0.5 * (low + high)
        violated = measure(tilt(jnp.full(2, middle), log_q, rows)).max() > 0
        low, high = (middle, high) if violated else (low, middle)
    equal = tilt(jnp.full(2, high), log_q, rows)
    assert abs(measure(equal).max()) < 1e-6, "no equal weights meet the threshold"
    return solution.multipliers, price(solution.log_p), high, price(equal)


with jax.enable_x64(True):
    cells = mixtures.grid([(-7.0, 7.5), (-6.0, 8.0)], 241)
    log_q = mixtures.log_masses(reference, cells)
    log_u = jnp.stack([mixtures.log_masses(one, cells) for one in unlearn])
    h = jnp.stack([jnp.exp(mixtures.log_density(one, cells.x)) for one in unlearn])
    print("formulation, threshold | multipliers near, far | price | equal multiplier | its price")
    for name, solve, tilt, rows, thresholds, highest in (
        ("RU", duality.solve_reverse_kl, duality.tilt_reverse_kl, log_u, (16, 20, 25), 0.499),
        ("FU", duality.solve_forward_kl, duality.tilt_forward_kl, log_u, (1.7, 2.0, 2.3), 0.1999),
        ("LU", duality.solve_likelihood, duality.tilt_likelihood, h, (0.03, 0.02, 0.01), 1e3),
    ):
        for b in thresholds:
            measure, price = {
                "RU": (lambda p, b=b: b - divergence(p, log_u), lambda p: divergence(p, log_q)),
                "FU": (lambda p, b=b: b - divergence(log_u, p), lambda p: divergence(log_q, p)),
                "LU": (lambda p, b=b: h @ jnp.exp(p) - b, lambda p: divergence(p, log_q)),
            }[name]
            (near, far), best, equal, paid = compare(
                solve, tilt, rows, b, jax.jit(measure), price, highest
            )
            print(
                f"{name} {b:5} | {near:.4f} {far:.4f} | {best:.4f} | {equal:.4f} | {paid:.4f} "
                f"({paid / best:.3g} times)"
            )
