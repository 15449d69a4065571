"""Derivatives through K steps of the algorithm, against finite differences and the exact limit.

The problem is the nearest point of a half-plane, min ½‖x − a‖² subject to cᵀx ≥ b, whose solution
is x* = a + λ* c with λ* = (b − cᵀa)/‖c‖². A step is a pure function of a state that holds b, so
that K of them are one `lax.scan`, with derivatives. Printed for K = 5 and K = 200 are dx_K/db,
d(objective)/db and the derivative of the objective in the primal rate, each beside its finite
difference; then the limits dx*/db = c/‖c‖² and, by the envelope theorem, dP*/db = λ*.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_unlearn
from jax_unlearn import multipliers

A, C = np.array([1.0, -0.5]), np.array([1.0, 2.0])
B, RATE = 2.0, 0.15


def losses(x, reference, key, batch, current, *, axis_name=None):
    return jax_unlearn.Losses(
        objective=0.5 * jnp.square(x - A).sum()[None], values=(C @ x)[None], index=jnp.array([0])
    )


problem = jax_unlearn.Problem(losses, 1.0, multipliers.non_negative(), "half-plane")


def unrolled(b, rate, steps):
    """(x_K, objective_K) after K primal-dual steps from x = a, λ = 0."""
    algorithm = jax_unlearn.primal_dual(problem, optax.sgd(rate), optax.sgd(0.1))

    def step(state, key):
        return algorithm.step(key, state, None, None)

    state = algorithm.init(jnp.asarray(A), jnp.atleast_1d(b))
    state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), steps))
    return state.params, 0.5 * jnp.square(state.params - A).sum()


def both(function, at, width=1e-5):
    """The derivative by jax.jacrev, and the central difference in float64."""
    finite = (function(at + width) - function(at - width)) / (2 * width)
    return np.asarray(jax.jacrev(function)(at)), np.asarray(finite)


def derivatives(steps):
    run = jax.jit(lambda b, rate: unrolled(b, rate, steps))
    return {
        "dx/db": both(lambda b: run(b, RATE)[0], B),
        "dP/db": both(lambda b: run(b, RATE)[1], B),
        "dP/drate": both(lambda rate: run(B, rate)[1], RATE),
    }


def main():
    with jax.enable_x64(True):
        found = {steps: derivatives(steps) for steps in (5, 200)}
    for steps, rows in found.items():
        for name, (derivative, finite) in rows.items():
            derivative, finite = derivative.round(5), finite.round(5)
            print(f"K = {steps}: {name} {derivative}, by differences {finite}")
    limit = {"dx/db": C / (C @ C), "dP/db": (B - C @ A) / (C @ C), "dP/drate": 0.0}
    print("limit:", ", ".join(f"{name} {np.round(value, 5)}" for name, value in limit.items()))
    return found, limit


if __name__ == "__main__":
    main()
