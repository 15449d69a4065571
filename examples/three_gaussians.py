"""Three Gaussians, the first unlearned: what a network learns against the exact answer.

q is a mixture of three Gaussians, u its first component. For each formulation a small score
network, trained on samples of q, is unlearned, and the law of its samples compared with the exact
p_λ. Frozen denoisers of q and u are the exact ones: what remains is the error of the estimators,
of the sampler and of the network. All divergences are those of 200,000 samples of the network,
counted in cells, against exact masses of the cells. Runs named "tilt" distil stored samples of q
(`distill_reverse_kl`, `distill_likelihood`). The duality gap is that of the learned pair:
the objective so measured less the exact dual function at the learned λ, as a share of P*.

    python examples/three_gaussians.py --seeds 5
    python examples/three_gaussians.py --seeds 5 --formulation "LU tilt" --distill-steps 20000
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from small_denoiser import (
    BOX,
    SCHEDULE,
    STEPS,
    coarse,
    density,
    distilled,
    draw,
    exact_denoiser,
    forward,
    histogram,
    kl_from,
    kl_to,
    mixture,
    nearest,
    network,
    on_cells,
    pretrain,
    trainer,
)

import jax_unlearn
from jax_unlearn import duality, mixtures
from jax_unlearn.multipliers import nu_pi

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
Q = mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
U = mixtures.select(Q, [0])
THRESHOLD = {"RU": 14.0, "FU": 3.0, "LU": 0.01}
RUNS = [
    "RU pathwise", "RU tilt", "RU stop_gradient", "FU", "LU tilt", "LU pathwise", "RU bounded",
]  # fmt: skip


def on_policy(kind, estimator, dual, steps, rows):
    """A run along the network's own trajectories."""
    zeros = jnp.zeros(rows, int)
    options = {"estimator": estimator, "shape": (2,), "steps": STEPS}
    options |= {"reference_apply": exact_denoiser(Q, U)}
    if kind == "RU":
        problem = jax_unlearn.reverse_kl(network, SCHEDULE, **options)
        forget = jax_unlearn.Conditions(None, base=zeros, target=zeros + 1, constraint=zeros)
    else:
        problem = jax_unlearn.likelihood(
            network, SCHEDULE, lambda x: density(U, x)[:, None], **options
        )
        forget = jax_unlearn.Conditions(None, base=zeros, constraint=zeros)
    batch = jax_unlearn.Batch(kept=None, forget=forget)
    return trainer(problem, lambda key: batch, dual, steps, 1e-3)


def waiting(dual, steps):
    """Multipliers that stay until the network has come near its optimum."""
    return optax.chain(dual, optax.scale_by_schedule(lambda step: jnp.where(step < steps, 0, 1)))


def unlearn(name, reference, key, measured, distill_steps):
    """Trained parameters, λ, and the constraint's value as training saw it.

    Training sees KLs of paths, which exceed those of samples. Reverse and forward KL are therefore
    trained twice: the second time the threshold is raised by the excess that samples show.
    """
    kind, _, estimator = name.partition(" ")
    threshold = jnp.array([THRESHOLD[kind]])
    if kind == "FU":
        dual = nu_pi(2e-3, 2e-2, 0.9)
        run, first = forward(Q, [U], reference, key, dual, 3000), jnp.array([0.25])
    else:
        run, solve = distilled(kind, Q, [U], key, distill_steps)
        first = solve(threshold)
        if estimator == "tilt":
            return run(reference, reference, threshold, first, key)
        dual = waiting(nu_pi(3e-4, 1e-3, 0.9) if kind == "RU" else nu_pi(4.0, 50.0, 0.9), 200)
        run = on_policy(kind, estimator, dual, 700, 48 if estimator == "stop_gradient" else 96)
    params, first, value = found = run(reference, reference, threshold, first, key)
    if kind == "LU":
        return found
    excess = value - measured(draw(params, jax.random.fold_in(key, 2), 50))["constraint"]
    return run(params, reference, threshold + excess, first, jax.random.fold_in(key, 3))


FUNCTIONS = {
    "RU": (duality.solve_reverse_kl, duality.dual_reverse_kl),
    "FU": (duality.solve_forward_kl, duality.dual_forward_kl),
    "LU": (duality.solve_likelihood, duality.dual_likelihood),
}


def on_exact_cells(kind, cells, function, *arguments):
    """A function of `duality` on the cells, in float64; its threshold is that of this study."""
    rows = cells.h if kind == "LU" else cells.log_u
    with jax.enable_x64(True):
        arguments = [jnp.asarray(argument, float) for argument in arguments]
        return function(*arguments, cells.log_q, rows, jnp.array([THRESHOLD[kind]]))


def values_of(kind, modes, mode_of, kl_q, kl_u, q_kl, u_kl, mean_h):
    """What the tables show: masses of the modes, objective, constraint and KL(p‖q)."""
    masses = [float(modes[mode_of == k].sum() / modes.sum()) for k in range(3)]
    objective, constraint = {"RU": (kl_q, kl_u), "FU": (q_kl, u_kl), "LU": (kl_q, mean_h)}[kind]
    return {"masses": masses, "objective": objective, "constraint": constraint, "kl_q": kl_q}


def exact(kind, cells, mode_of):
    """λ*, P*, the values of p_λ*, and its masses on the coarse cells."""
    found = on_exact_cells(kind, cells, FUNCTIONS[kind][0])
    log_p, p = np.asarray(found.log_p), np.exp(found.log_p)
    q, u = np.exp(cells.log_q), np.exp(cells.log_u[0])
    kl = [(p * (log_p - cells.log_q)).sum(), (p * (log_p - cells.log_u[0])).sum()]
    kl += [(q * (cells.log_q - log_p)).sum(), (u * (cells.log_u[0] - log_p)).sum()]
    kl = map(float, [*kl, (p * cells.h[0]).sum()])
    answer = values_of(kind, coarse(log_p), mode_of, *kl)
    return answer | {"multiplier": float(found.multipliers[0])}, coarse(log_p)


def measure(kind, x, cells, mode_of):
    """The same of the network's samples."""
    counts, (u,) = histogram(x), cells.unlearn
    kl = kl_from(counts, cells.q), kl_from(counts, u), kl_to(cells.q, counts), kl_to(u, counts)
    return values_of(kind, counts, mode_of, *kl, float(density(U, x).mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--formulation", default="all", choices=["all", *RUNS])
    parser.add_argument("--distill-steps", type=int, default=5000, help='of "tilt"')
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    names = RUNS if args.formulation == "all" else [args.formulation]
    suffix = "" if args.formulation == "all" else "_" + args.formulation.replace(" ", "_").lower()
    cells, mode_of = on_cells(Q, [U]), nearest(Q)
    solved = {kind: exact(kind, cells, mode_of) for kind in THRESHOLD}
    answers = {name: solved[name[:2]] for name in names}
    rows, clouds = [], {}
    args.out.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        key = jax.random.key(seed)
        reference = pretrain(key, Q)
        before = measure("RU", draw(reference, key), cells, mode_of)
        rows.append({"seed": seed, "run": "before"} | before)
        for name in names:
            key = jax.random.fold_in(key, RUNS.index(name))
            kind = name[:2]
            measured = functools.partial(measure, kind, cells=cells, mode_of=mode_of)
            params, multipliers, value = unlearn(name, reference, key, measured, args.distill_steps)
            x = draw(params, jax.random.fold_in(key, 1))
            row = {"seed": seed, "run": name, "multiplier": float(multipliers[0])}
            row |= {"in_training": float(value[0])} | measured(x)
            dual = on_exact_cells(kind, cells, FUNCTIONS[kind][1], multipliers)
            gap = row["objective"] - float(dual)
            row |= {"dual": float(dual), "gap": gap / answers[name][0]["objective"]}
            clouds.setdefault(name, np.asarray(x[:3000]))
            rows.append(row)
            print(json.dumps(row), flush=True)
        result = {"exact": {kind: answer for kind, (answer, _) in solved.items()}, "runs": rows}
        (args.out / f"three_gaussians{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in names:
        print(name)
        for field, value in (answers[name][0] | {"gap": 0.0}).items():
            found = np.array([row[field] for row in rows if row["run"] == name])
            print(f"  {field} {found.mean(0)} ± {found.std(0, ddof=1)}, exact {value}")
    if suffix:
        return
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        density_of_p = answers[name][1].reshape(2 * [int(np.sqrt(answers[name][1].size))])
        axis.imshow(density_of_p.T, origin="lower", extent=np.ravel(BOX), cmap="Blues")
        axis.scatter(*clouds[name].T, s=3, color="tab:red", alpha=0.5, linewidths=0)
        axis.set(title=name, xlim=(-2.4, 2.4), ylim=(-2, 2.6), xticks=[], yticks=[])
    figure.savefig(args.out / "three_gaussians.png", dpi=110)


if __name__ == "__main__":
    main()
