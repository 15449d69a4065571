"""Constrained problems that have nothing to do with diffusion, solved by the same algorithm.

A `Problem` is any function that gives one loss a row. First min x² + y² subject to x + y = 1: the
dual domain of an equality is all real numbers, and the multiplier of x + y − 1 is −1. Then a
straight line through three groups of points, its mean squared error on two of them bounded: one
bound binds and has a multiplier, the other does not and has none. Printed are solutions,
multipliers, and each group's error beside its bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_unlearn
from jax_unlearn import multipliers

RNG = np.random.default_rng(0)
GROUP = np.repeat([0, 1, 2], [60, 15, 15])
X = RNG.uniform(-1, 1, 90)
Y = np.choose(GROUP, [X, 1 - X, 0.5 * X + 0.2]) + 0.1 * RNG.normal(size=90)
BOUNDS = np.array([0.5, 0.3])  # of the mean squared errors of groups 1 and 2


def squared_norm(point, reference, key, batch, current, *, axis_name=None):
    """x² + y², and x + y."""
    return jax_unlearn.Losses(jnp.square(point).sum()[None], point.sum()[None], jnp.array([0]))


def squared_errors(line, reference, key, batch, current, *, axis_name=None):
    """Those of all points are the objective, those of groups 1 and 2 constraints 0 and 1."""
    errors, bounded = jnp.square(line[0] * X + line[1] - Y), np.flatnonzero(GROUP)
    return jax_unlearn.Losses(errors, errors[bounded], GROUP[bounded] - 1)


# The sign −1 makes value − threshold the violation: x + y − 1, error − bound.
nearest = jax_unlearn.Problem(squared_norm, -1.0, multipliers.free(), "nearest point of a line")
fair = jax_unlearn.Problem(squared_errors, -1.0, multipliers.non_negative(), "fair line")


def solve(problem, start, thresholds, rate, steps):
    """Parameters and λ after gradient descent, with νPI control of the multipliers."""
    dual = multipliers.nu_pi(rate, proportional=5 * rate)
    algorithm = jax_unlearn.primal_dual(problem, optax.sgd(rate), dual)

    def step(state, key):
        return algorithm.step(key, state, None, None)

    keys = jax.random.split(jax.random.key(0), steps)  # the losses draw nothing
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))(
        algorithm.init(start, thresholds)
    )
    return np.asarray(state.params), np.asarray(state.multipliers)


def main():
    point, multiplier = solve(nearest, jnp.array([2.0, -1.0]), [1.0], rate=0.1, steps=300)
    print(f"x + y = 1: x = {point[0]:.4f}, y = {point[1]:.4f}, multiplier {multiplier[0]:.4f}")
    line, prices = solve(fair, jnp.zeros(2), BOUNDS, rate=0.05, steps=3000)
    errors = np.square(line[0] * X + line[1] - Y)
    print(f"line: slope {line[0]:.4f}, intercept {line[1]:.4f}, mean error {errors.mean():.4f}")
    for group, (bound, price) in enumerate(zip(BOUNDS, prices, strict=True), start=1):
        error = errors[GROUP == group].mean()
        print(f"  group {group}: error {error:.4f} of at most {bound}, multiplier {price:.4f}")
    return {"point": point, "multiplier": multiplier, "line": line, "prices": prices}


if __name__ == "__main__":
    main()
