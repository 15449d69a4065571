"""Three Gaussians, the first unlearned: what a network learns against the exact answer.

q is a mixture of three Gaussians, u its first component. For each formulation a small score
network, trained on samples of q, is unlearned, and the law of its samples compared with the exact
p_λ. Frozen denoisers of q and u are the exact ones: what remains is the error of the
estimators and of the network. Values are those of samples, not of paths:

  KL(p‖q) and KL(p‖u) from exact log densities and the entropy of a histogram of the samples;
  FU's KL(u‖p) is a path KL of the learned network, which bounds it from above.

    python examples/three_gaussians.py --seeds 1 --formulation all
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from jax_unlearn import divergences, dual_first, duality, losses, mixtures, samplers, schedules
from jax_unlearn import formulations as f
from jax_unlearn.multipliers import nu_pi
from jax_unlearn.primal_dual import primal_dual

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
MEANS, VARIANCE = np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), 0.49
# The network sees x in units in which its variance is about one: (x − SHIFT) · SCALE.
SHIFT, SCALE = np.array([0.0, 1.0]), 0.5
Q = mixtures.gaussian_mixture((MEANS - SHIFT) * SCALE, VARIANCE * SCALE**2)
U = mixtures.select(Q, [0])
THRESHOLD = {"RU": 14.0, "FU": 3.0, "LU": 0.01}
RUNS = ["RU pathwise", "RU stop_gradient", "RU tilt", "FU", "LU tilt", "LU pathwise"]

STEPS = 40
_ALPHAS = 1 / (1 + np.exp(-np.linspace(8, -5, STEPS)))
SCHEDULE = schedules.noise_schedule(
    trained_betas=1 - _ALPHAS / np.append(1.0, _ALPHAS[:-1]), variance_type="fixed_geometric"
)
PATH = divergences.path_kl_weights(SCHEDULE, "fixed_geometric")
# Plain denoising: equal weights. Path weights: drawn in proportion, since ‖ε − ε_θ‖² is about one.
PLAIN = losses.time_weighting(losses.simple_weights(STEPS, 2))
PATH_WEIGHTING = losses.time_weighting(PATH, np.ones(STEPS))


def network(params, x_t, t, cond):
    """ε of x and log-SNR: three hidden layers, and a skip that is exact far from all means."""
    log_snr = SCHEDULE.log_snr[t][:, None]
    clock = [log_snr / 7] + [wave(k * log_snr / 4) for k in (1, 2) for wave in (jnp.sin, jnp.cos)]
    hidden = jnp.concatenate([x_t, *clock], axis=1)
    for weight, bias in params[:-1]:
        hidden = jax.nn.silu(hidden @ weight + bias)
    weight, bias = params[-1]
    sigma, signal = jnp.sqrt(jax.nn.sigmoid(-log_snr)), jax.nn.sigmoid(log_snr)
    skip = sigma * x_t / (signal * VARIANCE * SCALE**2 + 1 - signal)
    return skip + hidden @ weight + bias


def exact_denoiser(params, x_t, t, cond):
    """ε of q where cond is 0, of u where it is 1."""
    both = [mixtures.predictions(law, x_t, SCHEDULE.log_snr[t]).epsilon for law in (Q, U)]
    return jnp.where(cond[:, None] == 0, *both)


def density_of_u(x):
    """h: in the units of the problem, not of the network."""
    return SCALE**2 * jnp.exp(mixtures.log_density(U, x))


@jax.jit
def pretrain(key):
    """Denoising of samples of q, with a decaying rate."""
    steps, optimizer = 6000, optax.adam(optax.cosine_decay_schedule(3e-3, 6000))

    def loss(params, key):
        a, b = jax.random.split(key)
        x_0 = mixtures.sample(Q, a, 512)
        data = {"x_0": x_0, "cond": None, "draws": losses.draw(b, x_0, PLAIN.probabilities)}
        return losses.denoising_loss(network, params, SCHEDULE, weighting=PLAIN, **data).mean()

    def body(carry, key):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    shapes, keys = [(7, 64), (64, 64), (64, 64), (64, 2)], jax.random.split(key, 4)
    params = [
        (jax.random.normal(k, shape) / np.sqrt(shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, shapes, strict=True)
    ]
    carry = (params, optimizer.init(params))
    return jax.lax.scan(body, carry, jax.random.split(key, steps))[0][0]


def reverse_or_likelihood(kind, estimator, key, threshold):
    """The formulation, its batches, λ* from stored samples, and a dual optimizer."""
    stored = mixtures.sample(Q, key, 50_000)
    zeros = jnp.zeros(256, int)
    tilted, sampled = {"weighting": PLAIN, "control_variate": True}, {"shape": (2,), "steps": STEPS}
    common = tilted if estimator == "tilt" else sampled
    common |= {"estimator": estimator, "reference_apply": exact_denoiser}
    if kind == "RU":
        values = mixtures.log_density(Q, stored) - mixtures.log_density(U, stored)
        first = dual_first.reverse_kl_multipliers(values[:, None], [threshold])
        problem, dual = f.reverse_kl(network, SCHEDULE, **common), nu_pi(3e-4, 1e-3, 0.9)
    else:
        values = density_of_u(stored)
        first = dual_first.likelihood_multipliers(values[:, None], [threshold])
        problem = f.likelihood(network, SCHEDULE, lambda x: density_of_u(x)[:, None], **common)
        dual = nu_pi(4.0, 50.0, 0.9)

    def batch_of(key):
        if estimator != "tilt":
            target = zeros + 1 if kind == "RU" else None
            return f.ConditionBatch(None, f.Separated(zeros, zeros, target, zeros))
        chosen = jax.random.randint(key, (512,), 0, len(stored))
        none = jnp.zeros(512, int)
        return f.SampleBatch(None, f.Samples(stored[chosen], none, none, values[chosen], none))

    dual = optax.set_to_zero() if estimator == "tilt" else dual
    return problem, batch_of, first.multipliers, dual


def forward(reference, key):
    """The same for forward KL, and the loss of u's own denoiser: KL(u‖p) is what exceeds it."""
    x_u = mixtures.sample(U, key, 200_000)
    draws = losses.draw(key, x_u, PATH_WEIGHTING.probabilities)
    data = {"x_0": x_u, "cond": jnp.ones(len(x_u), int), "draws": draws}
    before, least = (
        losses.denoising_loss(apply, reference, SCHEDULE, weighting=PATH_WEIGHTING, **data).mean()
        for apply in (network, exact_denoiser)
    )
    problem = f.forward_kl(network, SCHEDULE, PATH_WEIGHTING, reference_values=[before])

    def batch_of(key):
        a, b = jax.random.split(key)
        forget = f.Forget(mixtures.sample(U, a, 256), None, jnp.zeros(256, int))
        return f.Batch(f.Examples(mixtures.sample(Q, b, 256), None), None, forget)

    return problem, batch_of, jnp.array([0.2]), nu_pi(2e-3, 2e-2, 0.9), least


def unlearn(name, reference, key):
    """Trained parameters, and λ and the constraint's value over the last third of the steps."""
    kind, _, estimator = name.partition(" ")
    threshold, shift = THRESHOLD[kind], 0.0
    if kind == "FU":
        problem, batch_of, first, dual, shift = forward(reference, key)
    else:
        problem, batch_of, first, dual = reverse_or_likelihood(kind, estimator, key, threshold)
    steps = 700 if estimator in ("pathwise", "stop_gradient") else 2000
    rate = optax.cosine_decay_schedule(1e-3, steps, 0.01)
    algorithm = primal_dual(problem, optax.adam(rate), dual)

    def body(state, key):
        return algorithm.step(key, state, batch_of(jax.random.fold_in(key, 1)))

    state = algorithm.init(reference, threshold + shift, multipliers=first)
    state, info = jax.jit(lambda s, k: jax.lax.scan(body, s, jax.random.split(k, steps)))(
        state, key
    )
    multiplier, value = (x[-(steps // 3) :].mean() for x in (info.multipliers, info.values))
    return state.params, {"multiplier": float(multiplier), "in_training": float(value - shift)}


@jax.jit
def draw(params, key):
    """Samples of the ancestral chain."""
    start = jax.random.normal(jax.random.fold_in(key, 1), (100_000, 2))
    return samplers.sample(
        lambda x, t: network(params, x, t, None), SCHEDULE, key, start, steps=STEPS, method="ddpm"
    ).x_0


def masses_of(x, weights):
    """Of the modes, points going to the nearest, in the units of the problem."""
    nearest = np.square(x[:, None] - MEANS).sum(axis=2).argmin(axis=1)
    return [float(weights[nearest == k].sum()) for k in range(3)]


def measure(x):
    """Mode masses, KL(p‖q), KL(p‖u) and E h of the network's samples."""
    points = np.asarray(x) / SCALE + SHIFT
    counts, *_ = np.histogram2d(*points.T, bins=100, range=[[-7, 7], [-6, 8]])
    share = counts[counts > 0] / counts.sum()
    bias = (len(share) - 1) / (2 * len(x))  # Miller and Madow's, of the entropy
    entropy = -(share * np.log(share / (0.14 * SCALE) ** 2)).sum() + bias
    return {
        "masses": masses_of(points, np.full(len(x), 1 / len(x))),
        "kl_q": float(-entropy - mixtures.log_density(Q, x).mean()),
        "kl_u": float(-entropy - mixtures.log_density(U, x).mean()),
        "mean_h": float(density_of_u(x).mean()),
    }


def exact(kind):
    """λ, p_λ and its values on a fine grid, in float64."""
    with jax.enable_x64(True):
        q, u = (mixtures.gaussian_mixture(means, VARIANCE) for means in (MEANS, MEANS[:1]))
        cells = mixtures.grid([(-7, 7), (-6, 8)], 350)
        log_q, log_u = mixtures.log_masses(q, cells), mixtures.log_masses(u, cells)
        h = jnp.exp(mixtures.log_density(u, cells.x))
        solve = {"RU": duality.solve_reverse_kl, "FU": duality.solve_forward_kl}
        solve, row = solve.get(kind, duality.solve_likelihood), h if kind == "LU" else log_u
        found = solve(log_q, row[None], jnp.array([THRESHOLD[kind]]))
        p = np.exp(found.log_p)
        means = {"kl_q": found.log_p - log_q, "kl_u": found.log_p - log_u, "mean_h": h}
        answer = {name: float((p * value).sum()) for name, value in means.items()}
        answer |= {"multiplier": float(found.multipliers[0]), "price": float(found.primal_value)}
        return answer | {"masses": masses_of(np.asarray(cells.x), p)}, p.reshape(350, 350)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--formulation", default="all", choices=["all", *RUNS])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    names = RUNS if args.formulation == "all" else [args.formulation]
    answers, rows, clouds = {name: exact(name[:2]) for name in names}, [], {}
    for seed in range(args.seeds):
        key = jax.random.key(seed)
        reference = pretrain(key)
        rows.append({"seed": seed, "run": "before"} | measure(draw(reference, key)))
        for name in names:
            key = jax.random.fold_in(key, RUNS.index(name))
            params, found = unlearn(name, reference, key)
            x = draw(params, key)
            rows.append({"seed": seed, "run": name} | found | measure(x))
            clouds.setdefault(name, np.asarray(x[:3000]) / SCALE + SHIFT)
            print(json.dumps(rows[-1]), "exact", json.dumps(answers[name][0]), flush=True)
    args.out.mkdir(exist_ok=True)
    result = {"exact": {name: answers[name][0] for name in names}, "runs": rows}
    (args.out / "three_gaussians.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.imshow(answers[name][1].T, origin="lower", extent=(-7, 7, -6, 8), cmap="Blues")
        axis.scatter(*clouds[name].T, s=2, color="tab:red", alpha=0.5, linewidths=0)
        axis.set(title=name, xlim=(-5, 5), ylim=(-3, 6), xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(args.out / "three_gaussians.png", dpi=110)


if __name__ == "__main__":
    main()
