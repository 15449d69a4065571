"""A small score network for mixtures of Gaussians in the plane, its training, and what it samples.

What the studies of Gaussians share. Points are in units in which a mixture's variance is about
one, SCALE of those of the problem; likelihoods h are densities in the units of the problem.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_unlearn
from jax_unlearn import duality, formulations, losses, mixtures, samplers, schedules

VARIANCE, SCALE = 0.49, 0.5
# Fine where the modes part; a last step at e⁻⁹ of noise leaves the samples their variance.
_LOG_SNR = np.concatenate(
    [
        np.linspace(9, 5, 10, endpoint=False),
        np.linspace(5, -3, 82, endpoint=False),
        np.linspace(-3, -5, 8),
    ]
)
_ALPHAS = 1 / (1 + np.exp(-_LOG_SNR))
STEPS = len(_LOG_SNR)
SCHEDULE = schedules.noise_schedule(
    trained_betas=1 - _ALPHAS / np.append(1.0, _ALPHAS[:-1]), variance_type="fixed_geometric"
)
# Plain denoising: equal weights. In nats: ½ ∫ ‖ε − ε_θ‖² d log-SNR, the limit of
# `path_kl_weights` for fine steps, drawn in proportion, since ‖ε − ε_θ‖² is about one.
PLAIN = losses.time_weighting(losses.simple_weights(STEPS, 2))
NATS = losses.time_weighting(-0.5 * np.gradient(_LOG_SNR), np.ones(STEPS))

# Exact densities live on FINE² cells of BOX, histograms of samples on blocks of 4 by 4 of them.
BOX, FINE, COARSE = [(-3.5, 3.5)] * 2, 400, 100


def mixture(means):
    """The mixture of equal weights, centred."""
    means = np.asarray(means)
    return mixtures.gaussian_mixture((means - means.mean(axis=0)) * SCALE, VARIANCE * SCALE**2)


def density(law, x):
    """In the units of the problem."""
    return SCALE**2 * jnp.exp(mixtures.log_density(law, x))


def network(params, x_t, t, cond):
    """ε of x and log-SNR: hidden layers, and a skip that is exact far from all means."""
    log_snr = SCHEDULE.log_snr[t][:, None]
    clock = [log_snr / 7] + [wave(k * log_snr / 4) for k in (1, 2) for wave in (jnp.sin, jnp.cos)]
    hidden = jnp.concatenate([x_t, *clock], axis=1)
    for weight, bias in params[:-1]:
        hidden = jax.nn.silu(hidden @ weight + bias)
    weight, bias = params[-1]
    sigma, signal = jnp.sqrt(jax.nn.sigmoid(-log_snr)), jax.nn.sigmoid(log_snr)
    skip = sigma * x_t / (signal * VARIANCE * SCALE**2 + 1 - signal)
    return skip + hidden @ weight + bias


def exact_denoiser(*laws):
    """A denoiser without parameters: that of laws[cond]."""

    def apply(params, x_t, t, cond):
        epsilon = jnp.zeros_like(x_t)  # no indexing: its transpose is slow on a CPU
        for index, law in enumerate(laws):
            one = mixtures.predictions(law, x_t, SCHEDULE.log_snr[t]).epsilon
            epsilon = jnp.where((cond == index)[:, None], one, epsilon)
        return epsilon

    return apply


def pretrain(key, law, steps=6000, width=96):
    """Parameters after denoising of samples of a mixture, with a decaying rate."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, key):
        a, b = jax.random.split(key)
        x_0 = mixtures.sample(law, a, 512)
        data = {"x_0": x_0, "cond": None, "draws": losses.draw(b, x_0, PLAIN.probabilities)}
        return losses.denoising_loss(network, params, SCHEDULE, weighting=PLAIN, **data).mean()

    def body(carry, key):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    shapes = [(7, width), (width, width), (width, width), (width, 2)]
    params = [
        (jax.random.normal(k, shape) / np.sqrt(shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(jax.random.split(key, 4), shapes, strict=True)
    ]
    run = jax.jit(lambda carry, keys: jax.lax.scan(body, carry, keys)[0][0])
    return run((params, optimizer.init(params)), jax.random.split(key, steps))


def trainer(problem, batch_of, dual, steps, rate):
    """A compiled run (parameters, reference, thresholds, λ, key) -> parameters, λ, values.

    Thresholds and multipliers are data: one program serves a sweep. The last two are averages
    over the last sixth of the steps.
    """
    rates = optax.cosine_decay_schedule(rate, steps, 0.01)
    algorithm = jax_unlearn.primal_dual(problem, optax.adam(rates), dual)

    @jax.jit
    def run(params, reference, thresholds, multipliers, key):
        def body(state, key):
            return algorithm.step(key, state, reference, batch_of(jax.random.fold_in(key, 1)))

        state = algorithm.init(params, thresholds, multipliers=multipliers)
        state, info = jax.lax.scan(body, state, jax.random.split(key, steps))
        end = steps // 6
        return state.params, info.multipliers[-end:].mean(axis=0), info.values[-end:].mean(axis=0)

    return run


def distilled(kind, law, unlearn, key, steps, rows=1024):
    """A `trainer` that distils p_λ from stored samples, and thresholds -> their λ*."""
    stored = mixtures.sample(law, key, 200_000)
    options = {"reference_apply": exact_denoiser(law), "control_variate": True}
    if kind == "RU":
        ratios = [
            mixtures.log_density(law, stored) - mixtures.log_density(u, stored) for u in unlearn
        ]
        values, solve = jnp.stack(ratios, axis=1), duality.reverse_kl_multipliers
        problem = formulations.distill_reverse_kl(network, SCHEDULE, PLAIN, **options)
    else:
        values = jnp.stack([density(u, stored) for u in unlearn], axis=1)
        solve = duality.likelihood_multipliers
        problem = formulations.distill_likelihood(network, SCHEDULE, PLAIN, **options)
    constraint = jnp.broadcast_to(jnp.arange(len(unlearn)), (rows, len(unlearn)))

    def batch_of(key):
        chosen, base = jax.random.randint(key, (rows,), 0, len(stored)), jnp.zeros(rows, int)
        samples = jax_unlearn.Samples(stored[chosen], None, base, values[chosen], constraint)
        return jax_unlearn.Batch(kept=None, forget=samples)

    run = trainer(problem, batch_of, optax.set_to_zero(), steps, 2e-3)
    return run, lambda thresholds: solve(values, thresholds).multipliers


def forward(law, unlearn, reference, key, dual, steps, rows=512):
    """A `trainer` on samples of q and of each q_i, whose constraint values are KL(q_i‖p).

    The loss at samples of q_i is that and the loss of q_i's own denoiser, which is measured first.
    """
    before, least = [], []
    for u in unlearn:
        x_0 = mixtures.sample(u, key, 400_000)
        draws = losses.draw(key, x_0, NATS.probabilities)
        data = {"x_0": x_0, "cond": jnp.zeros(len(x_0), int), "draws": draws}
        for apply, values in ((network, before), (exact_denoiser(u), least)):
            loss = losses.denoising_loss(apply, reference, SCHEDULE, weighting=NATS, **data)
            values.append(loss.mean())
    problem = formulations.forward_kl(network, SCHEDULE, NATS, reference_values=before)
    least, each = jnp.stack(least), rows // len(unlearn)

    def batch_of(key):
        first, *keys = jax.random.split(key, 1 + len(unlearn))
        x_0 = [mixtures.sample(u, k, each) for u, k in zip(unlearn, keys, strict=True)]
        index = jnp.repeat(jnp.arange(len(unlearn)), each)
        return jax_unlearn.Batch(
            kept=jax_unlearn.Images(mixtures.sample(law, first, rows), None),
            forget=jax_unlearn.Images(jnp.concatenate(x_0), None, index),
        )

    run = trainer(problem, batch_of, dual, steps, 2e-3)

    def shifted(params, reference, thresholds, *rest):
        params, multipliers, values = run(params, reference, thresholds + least, *rest)
        return params, multipliers, values - least

    return shifted


@functools.partial(jax.jit, static_argnames="thousands")
def draw(params, key, thousands=200):
    """Samples of the ancestral chain, in parts that fit the cache."""

    def predict(x_t, t):
        return network(params, x_t, t, None)

    def part(key):
        start = jax.random.normal(jax.random.fold_in(key, 1), (1000, 2))
        return samplers.sample(predict, SCHEDULE, key, start, steps=STEPS, method="ddpm").x_0

    return jax.lax.map(part, jax.random.split(key, thousands)).reshape(-1, 2)


class Cells(NamedTuple):
    """Fine cells in float64: log masses of q [n] and of each q_i [m, n], and h_i [m, n].

    `q` and `unlearn` are the masses on the cells of the histogram.
    """

    log_q: np.ndarray
    log_u: np.ndarray
    h: np.ndarray
    q: np.ndarray
    unlearn: list[np.ndarray]


def on_cells(law, unlearn):
    with jax.enable_x64(True):
        law, *unlearn = jax.tree.map(lambda leaf: leaf.astype(float), [law, *unlearn])
        cells = mixtures.grid(BOX, FINE)
        log_q, *log_u = (mixtures.log_masses(one, cells) for one in (law, *unlearn))
        h = jnp.stack([density(u, cells.x) for u in unlearn])
        log_q, log_u, h = (np.asarray(rows) for rows in (log_q, jnp.stack(log_u), h))
        return Cells(log_q, log_u, h, coarse(log_q), [coarse(one) for one in log_u])


def coarse(log_masses):
    """Masses of the fine cells summed to those of the histogram's, [COARSE²]."""
    block = FINE // COARSE
    masses = np.exp(np.asarray(log_masses)).reshape(COARSE, block, COARSE, block)
    return masses.sum(axis=(1, 3)).ravel()


def histogram(x):
    """Counts of samples in the coarse cells, [COARSE²]."""
    return np.histogram2d(*np.asarray(x).T, bins=COARSE, range=BOX)[0].ravel()


def nearest(law):
    """Which mean of a mixture each coarse cell is nearest to, [COARSE²]."""
    offsets = np.asarray(mixtures.grid(BOX, COARSE).x)[:, None] - np.asarray(law.means)
    return np.square(offsets).sum(axis=2).argmin(axis=1)


def kl_from(counts, masses):
    """KL of a histogram's law from exact masses, less the bias of counting (Miller and Madow)."""
    share, seen = counts / counts.sum(), counts > 0
    kl = (share[seen] * np.log(share[seen] / masses[seen])).sum()
    return float(kl - (seen.sum() - 1) / (2 * counts.sum()))


def kl_to(masses, counts):
    """KL from exact masses to a histogram's law; log(n + ½) has no bias of order 1/n."""
    return float((masses * (np.log(masses) - np.log((counts + 0.5) / counts.sum()))).sum())
