"""Retention against forgetting: what unlearning one of three Gaussians does to the other two.

Forgetting is how much mass the forgotten mode has left; retention is the KL from q of p, both
conditioned on the kept modes (points nearest to their means). Lines are exact optima over a range
of thresholds, points are networks: likelihood and reverse KL by distillation, forward KL, and
erasure by negative guidance, which regresses ε_q − η (ε_u − ε_q) along the network's own
trajectories. That is what reverse KL by "stop_gradient" does with a multiplier that stays,
η = λ/(1−λ).

    python examples/forgetting_curves.py --seeds 5
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from small_denoiser import (
    coarse,
    distilled,
    draw,
    forward,
    histogram,
    kl_from,
    nearest,
    on_cells,
    pretrain,
)
from three_gaussians import FUNCTIONS, RESULTS, Q, U, on_policy

from jax_unlearn.multipliers import nu_pi

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Thresholds, and for erasure η.
SWEEPS = {
    "LU": [0.03, 0.01, 0.001],
    "FU": [1.5, 3.0, 4.0],
    "RU": [11.0, 14.0, 18.0],
    "ESD": [0.1, 0.25, 0.5],
}
LINES = {
    "LU": np.geomspace(0.05, 1e-4, 15),
    "FU": np.linspace(1.1, 6.0, 15),
    "RU": np.linspace(8.9, 30.0, 15),
}


def curve_point(counts, cells, mode_of, bias=True):
    """(mass left of the forgotten mode, KL(p‖q) given the kept ones) of counts or masses."""
    kept = mode_of != 0
    q, p = cells.q[kept] / cells.q[kept].sum(), counts[kept]
    if bias:
        return float(counts[~kept].sum() / counts.sum()), kl_from(p, q)
    p = p / p.sum()
    return float(counts[~kept].sum()), float((p * np.log(p / q)).sum())


def exact_line(kind, cells, mode_of):
    rows, points = cells.h if kind == "LU" else cells.log_u, []
    with jax.enable_x64(True):
        for threshold in LINES[kind]:
            found = FUNCTIONS[kind][0](cells.log_q, rows, jnp.array([threshold]))
            if found.attained:
                points.append(curve_point(coarse(found.log_p), cells, mode_of, bias=False))
    return points


def networks(kind, reference, key):
    """Parameters at each point of the sweep, by one compiled run."""
    points = jnp.array(SWEEPS[kind])[:, None]
    first = 0.25 + 0 * points
    if kind == "FU":
        run = forward(Q, [U], reference, key, nu_pi(2e-3, 2e-2, 0.9), 3000, rows=256)
    elif kind == "ESD":
        run = on_policy("RU", "stop_gradient", optax.set_to_zero(), 300, 48)
        first = points / (1 + points)
    else:
        run, solve = distilled(kind, Q, [U], key, 3000, rows=512)
        first = [solve(threshold) for threshold in points]
    for threshold, multipliers in zip(points, first, strict=True):
        yield run(reference, reference, threshold, multipliers, key)[0]


def figure(lines, rows, path):
    """Draws the lines and, with error bars over seeds, the networks; prints what it draws."""

    def statistics(run, at):
        both = [(r["mass_left"], r["kl_kept"]) for r in rows if (r["run"], r["at"]) == (run, at)]
        return np.mean(both, axis=0), np.std(both, axis=0, ddof=1)

    canvas, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    colours = {"LU": "tab:green", "FU": "tab:blue", "RU": "tab:red", "ESD": "tab:orange"}
    for kind, line in lines.items():
        axis.plot(*np.transpose(line), color=colours[kind], label=f"{kind}, exact")
    for kind, sweep in SWEEPS.items():
        mean, deviation = np.moveaxis([statistics(kind, at) for at in sweep], 1, 0)
        axis.errorbar(
            *mean.T, *deviation.T[::-1], fmt="o", color=colours[kind], label=f"{kind}, network"
        )
        for at, m, s in zip(sweep, mean, deviation, strict=True):
            print(f"{kind} {at}: mass left {m[0]:.4f} ± {s[0]:.4f}, KL {m[1]:.5f} ± {s[1]:.5f}")
    before, spread = statistics("before", 0.0)
    print(f"before: mass left {before[0]:.4f}, KL {before[1]:.5f} ± {spread[1]:.5f}")
    axis.axhline(before[1], color="grey", linestyle=":", label="network before unlearning")
    axis.set(xlabel="mass left of the forgotten mode", ylabel="KL(p‖q) on the kept modes, nats")
    axis.set(yscale="log", ylim=(1e-5, 5), xlim=(0.34, 0))
    canvas.legend(loc="outside right center", fontsize=8)
    canvas.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    cells, mode_of = on_cells(Q, [U]), nearest(Q)
    lines = {kind: exact_line(kind, cells, mode_of) for kind in LINES}
    rows = []
    args.out.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        key = jax.random.key(100 + seed)
        reference = pretrain(key, Q)

        def record(run, at, params, seed=seed, key=key):
            mass, kl = curve_point(histogram(draw(params, key, 80)), cells, mode_of)
            rows.append({"seed": seed, "run": run, "at": at, "mass_left": mass, "kl_kept": kl})
            print(json.dumps(rows[-1]), flush=True)

        record("before", 0.0, reference)
        for kind, sweep in SWEEPS.items():
            key = jax.random.fold_in(key, 1)
            for at, params in zip(sweep, networks(kind, reference, key), strict=True):
                record(kind, at, params)
        result = json.dumps({"exact": lines, "runs": rows}, indent=1)
        (args.out / "forgetting_curves.json").write_text(result + "\n")
    figure(lines, rows, args.out / "forgetting_curves.png")


if __name__ == "__main__":
    main()
