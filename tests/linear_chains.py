"""One-dimensional chains with linear denoisers, ε(x, t, c) = gain[t] x + bias[c, t].

Every x_t of such a chain is Gaussian, so that path KLs and moments are known exactly: in numpy and
float64, from the posterior of the forward process and nothing of the package.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import lagrangian, schedules, sharding

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


def averages(problem, params, reference, batch, multipliers, thresholds, count):
    """Of `lagrangian` over keys: means and standard errors of one vector.

    It is the Lagrangian, the objective, the values, and the Lagrangian's gradient as `flat` has it.
    """
    params, reference = (jax.tree.map(jnp.float32, tree) for tree in (params, reference))

    def value(params, key):
        return lagrangian(problem, params, reference, key, batch, multipliers, thresholds)

    @jax.jit
    @jax.vmap
    def one(key):
        (total, found), gradient = jax.value_and_grad(value, has_aux=True)(params, key)
        scalars = jnp.stack([total, found.objective])
        return jnp.concatenate([scalars, found.values, gradient["gain"], gradient["bias"].ravel()])

    got = np.asarray(one(jax.random.split(jax.random.key(0), count)), np.float64)
    return got.mean(axis=0), got.std(axis=0) / np.sqrt(count)


def by_hand(params, reference, points, label, targets, weights, bound, at_end=lambda x: 0.0):
    """Reverse mode through one recorded chain, in float64 -> gradient, shares.

    Args:
      params: of the chain.
      reference: of the chains that it is compared with.
      points: x_t at each step, [steps, coordinates].
      label: of the chain.
      targets: labels of the reference.
      weights: of the path KL to each of these.
      bound: largest length of what comes back to a prediction from later steps, to its own.
      at_end: x_0 -> the derivative of what is added there.
    """
    gradient, shortened = jax.tree.map(np.zeros_like, params), []
    last = points[-1]
    later = at_end((last - SIGMA[0] * (params["gain"][0] * last + params["bias"][label, 0]))
                   / ALPHA[0])  # fmt: skip
    for x, (t, in_x_0, in_x, _, scale) in reversed(list(zip(points, steps_of(ALL), strict=True))):
        prediction = params["gain"][t] * x + params["bias"][label, t]
        own, through_targets = np.zeros_like(x), np.zeros_like(x)
        for target, weight in zip(targets, weights, strict=True):
            theirs = reference["gain"][t] * x + reference["bias"][target, t]
            part = (in_x_0 * SIGMA[t] / ALPHA[t]) ** 2 / scale * (prediction - theirs)
            own += weight * part
            through_targets -= weight * part * reference["gain"][t]
        coming = -in_x_0 * SIGMA[t] / ALPHA[t] * later
        share = min(1.0, bound * np.linalg.norm(own) / max(np.linalg.norm(coming), 1e-300))
        shortened.append(share)
        total = own + share * coming
        gradient["gain"][t] += total @ x
        gradient["bias"][label, t] += total.sum()
        later = share * (in_x_0 / ALPHA[t] + in_x) * later
        later = later + through_targets + total * params["gain"][t]
    return gradient, np.array(shortened)


def ddim_lines(gain, bias):
    """x_t = slope x_T + offset under DDIM with ε = gain x + bias, [T] each, in numpy.

    Returns (t, slope, offset) at each of the chain's times, and the last two of x_0.
    """
    slope, offset, lines = 1.0, 0.0, []
    for t in ALL:
        lines.append((t, slope, offset))
        epsilon = gain[t] * slope, gain[t] * offset + bias[t]
        slope, offset = (
            (x - SIGMA[t] * e) / ALPHA[t] for x, e in zip((slope, offset), epsilon, strict=True)
        )
        if t:
            slope, offset = (
                ALPHA[t - 1] * x + SIGMA[t - 1] * e
                for x, e in zip((slope, offset), epsilon, strict=True)
            )
    return lines, (slope, offset)


def minimiser(problem, reference, batch, current):
    """Of the objective: it is quadratic in gain and bias [2, T] of a linear denoiser."""

    @jax.jit
    def losses_at(parameters):
        gain, bias = parameters.reshape(2, -1)
        params = {"gain": gain, "bias": bias[None]}
        got = problem.losses(params, reference, jax.random.key(0), batch, jnp.float32(current))
        return got.objective.mean(), got

    vector = jnp.zeros(2 * STEPS)
    gradient, got = jax.jit(jax.grad(losses_at, has_aux=True))(vector)
    hessian = jax.jit(jax.hessian(lambda vector: losses_at(vector)[0]))(vector)
    solved = -np.linalg.solve(np.asarray(hessian), np.asarray(gradient))
    return solved.reshape(2, -1), got.values, got.diagnostics


def check_devices(algorithm_of, reference, batch, thresholds):
    """Four steps on one device, on a mesh of 8 by jit, and on 8 by pmap, are the same."""
    alone, mesh = algorithm_of(None), sharding.device_mesh()
    spread = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
    ways = {
        "one": (sharding.jit_step(alone.step), batch),
        "jit": (sharding.jit_step(alone.step, mesh), sharding.shard_batch(batch, mesh)),
        "pmap": (sharding.pmap_step(algorithm_of("data")), spread),
    }
    ends = {}
    for name, (step, placed) in ways.items():
        state = alone.init(reference, thresholds, multipliers=0.1)
        for key in jax.random.split(jax.random.key(0), 4):
            state, info = step(key, state, reference, placed)
        ends[name] = jax.tree.map(np.asarray, (state.params, state.multipliers, info))
    for other in ("jit", "pmap"):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ends["one"], ends[other]
        )
    assert (np.abs(ends["one"][1] - 0.1) > 1e-3).any()
