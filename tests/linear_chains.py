"""One-dimensional chains with linear denoisers, ε(x, t, c) = gain[t] x + bias[c, t].

Every x_t of such a chain is Gaussian, so that path KLs and moments are known exactly: in numpy and
float64, from the posterior of the forward process and nothing of the package.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import schedules

BETAS = np.array([0.05, 0.15, 0.3, 0.5, 0.7])
STEPS = len(BETAS)
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)
ALPHA, SIGMA = np.sqrt(ALPHAS_CUMPROD), np.sqrt(1 - ALPHAS_CUMPROD)
SCHEDULE = schedules.noise_schedule(trained_betas=BETAS)
LABELS = 4


def apply(params, x_t, t, cond):
    """As a denoiser of points [batch, 1]; params are {"gain": [T], "bias": [labels, T]}."""
    label = 0 if cond is None else cond
    return params["gain"][t][:, None] * x_t + params["bias"][label, t][:, None]


def gaussian(means, variance):
    """The parameters of exact denoisers of N(mean_c, variance), one label a mean; float64."""
    total = ALPHAS_CUMPROD * variance + 1 - ALPHAS_CUMPROD
    return {
        "gain": SIGMA / total,
        "bias": -SIGMA * ALPHA / total * np.asarray(means)[:, None],
    }


def steps_of(times):
    """For t in times, to the next: (t, slope of the mean in x̂_0, in x, variance, KL's variance)."""
    rows, before = [], None
    for t, s in zip(times, [*times[1:], None], strict=True):
        now, after = ALPHAS_CUMPROD[t], 1.0 if s is None else ALPHAS_CUMPROD[s]
        beta = 1 - now / after
        variance = beta * (1 - after) / (1 - now)
        rows.append(
            (t, np.sqrt(after) * beta / (1 - now), np.sqrt(now / after) * (1 - after) / (1 - now),
             variance, before if s is None else variance)
        )  # fmt: skip
        before = variance
    return rows


ALL = tuple(range(STEPS - 1, -1, -1))


def moments(params, label, times=ALL):
    """(t, mean, variance) of each x_t along the chain from N(0, 1), and of x_0 at the end."""
    mean, variance, path = 0.0, 1.0, []
    for t, in_x_0, in_x, noise, _ in steps_of(times):
        path.append((t, mean, variance))
        gain, bias = params["gain"][t], params["bias"][label, t]
        slope = in_x + in_x_0 * (1 - SIGMA[t] * gain) / ALPHA[t]
        mean = slope * mean - in_x_0 * SIGMA[t] / ALPHA[t] * bias
        variance = slope**2 * variance + noise
    return path, (mean, variance)


def path_kl(params, label, reference, other, times=ALL, along=None):
    """KL in nats of p(·|label)'s chain to the reference's at `other`; x_t from `along`'s."""
    path, _ = moments(params if along is None else along, label, times)
    total = 0.0
    for (t, mean, variance), (_, in_x_0, _, _, scale) in zip(path, steps_of(times), strict=True):
        slope = params["gain"][t] - reference["gain"][t]
        offset = params["bias"][label, t] - reference["bias"][other, t]
        squared = (slope * mean + offset) ** 2 + slope**2 * variance
        total += (in_x_0 * SIGMA[t] / ALPHA[t]) ** 2 * squared / (2 * scale)
    return total


def flat(params):
    """As one vector."""
    return np.concatenate([np.ravel(params["gain"]), np.ravel(params["bias"])])


def unflat(vector):
    """The inverse of `flat`."""
    return {"gain": vector[:STEPS], "bias": vector[STEPS:].reshape(-1, STEPS)}


def differences(function, params, width=1e-5):
    """Central differences of a function of parameters, as one vector."""
    point = flat(params)
    return np.array(
        [(function(unflat(point + width * e)) - function(unflat(point - width * e))) / (2 * width)
         for e in np.eye(len(point))]
    )  # fmt: skip


def minimiser(formulation, reference, batch, current):
    """Of the objective: it is quadratic in gain and bias [2, T] of a linear denoiser."""

    @jax.jit
    def losses_at(parameters):
        gain, bias = parameters.reshape(2, -1)
        params = {"gain": gain, "bias": bias[None]}
        got = formulation.losses(
            params, reference, jax.random.key(0), batch, None, jnp.float32(current)
        )
        return got.objective.mean(), got

    vector = jnp.zeros(2 * STEPS)
    gradient, got = jax.jit(jax.grad(losses_at, has_aux=True))(vector)
    hessian = jax.jit(jax.hessian(lambda vector: losses_at(vector)[0]))(vector)
    solved = -np.linalg.solve(np.asarray(hessian), np.asarray(gradient))
    return solved.reshape(2, -1), got.constraint, got.diagnostics
