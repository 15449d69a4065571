"""Two of five Gaussians unlearned by networks: a multiplier each against one weight for both.

The geometry of `equal_weights.py`: one of the two lies beside a kept Gaussian, the other far from
all. The constrained runs have thresholds; the others one multiplier for both constraints, swept.
Forgetting is that of the less forgotten of the two, price the objective, both of the networks' own
samples. At the forgetting that a constrained run reached, the price of equal weights is read off
their sweep, log against linear.

    python examples/five_gaussians.py --seeds 5
    python examples/five_gaussians.py --seeds 5 --formulation RU
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_denoiser import (
    density,
    distilled,
    draw,
    forward,
    histogram,
    kl_from,
    kl_to,
    mixture,
    on_cells,
    pretrain,
)

from jax_unlearn import mixtures
from jax_unlearn.multipliers import nu_pi

RESULTS = pathlib.Path(__file__).parent / "results"
Q = mixture([[2.0, 0.0], [0.0, 3.2], [3.6, 3.2], [1.3, 3.9], [-3.0, -2.0]])
UNLEARN = [mixtures.select(Q, component) for component in (3, 4)]  # near, far
THRESHOLDS = {"LU": [0.03, 0.02, 0.01], "FU": [2.0], "RU": [20.0, 25.0]}
EQUAL = {"LU": [2.5, 4.5, 8.0, 18.0], "FU": [0.155, 0.175, 0.19], "RU": [0.15, 0.17, 0.19]}


def measure(kind, x, cells):
    """Price, and what is forgotten of near and far.

    That is −log E h (LU), KL(q_i‖p) (FU) or KL(p‖q_i) (RU).
    """
    counts = histogram(x)
    if kind == "FU":
        return kl_to(cells.q, counts), [kl_to(u, counts) for u in cells.unlearn]
    if kind == "RU":
        return kl_from(counts, cells.q), [kl_from(counts, u) for u in cells.unlearn]
    return kl_from(counts, cells.q), [-float(jnp.log(density(u, x).mean())) for u in UNLEARN]


def runs(kind, reference, key):
    """(at, λ, parameters) of the constrained runs and of those with equal weights."""
    if kind == "FU":
        both = [nu_pi(2e-3, 2e-2, 0.9), optax.set_to_zero()]
        constrained, equal = (forward(Q, UNLEARN, reference, key, dual, 3000) for dual in both)

        def solve(thresholds):
            return jnp.array([0.15, 0.08])  # to start from
    else:
        constrained, solve = distilled(kind, Q, UNLEARN, key, 3000, rows=512)
        equal = constrained
    for threshold in THRESHOLDS[kind]:
        b = jnp.full(2, threshold)
        params, multipliers, _ = constrained(reference, reference, b, solve(b), key)
        yield "constrained", threshold, multipliers, params
    for weight in EQUAL[kind]:
        params, *_ = equal(reference, reference, b, jnp.full(2, weight), key)
        yield "equal", weight, jnp.full(2, weight), params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--formulation", default="all", choices=["all", *THRESHOLDS])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    cells, rows = on_cells(Q, UNLEARN), []
    kinds = list(THRESHOLDS) if args.formulation == "all" else [args.formulation]
    suffix = "" if args.formulation == "all" else "_" + args.formulation.lower()
    args.out.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        key = jax.random.key(seed)
        reference = pretrain(key, Q)
        for kind in kinds:
            sweep = []
            for run, at, multipliers, params in runs(kind, reference, key):
                price, forgotten = measure(kind, draw(params, key, 80), cells)
                sweep.append({"seed": seed, "kind": kind, "run": run, "at": at, "price": price})
                sweep[-1] |= {"multipliers": multipliers.tolist(), "forgotten": forgotten}
                print(json.dumps(sweep[-1]), flush=True)
            equal = [row for row in sweep if row["run"] == "equal"]
            reached, paid = np.transpose(
                sorted((min(row["forgotten"]), row["price"]) for row in equal)
            )
            for row in sweep:
                if row["run"] == "constrained":  # nan beyond the sweep
                    ends = {"left": np.nan, "right": np.nan}
                    found = np.interp(min(row["forgotten"]), reached, np.log(paid), **ends)
                    row["equal_price"] = float(np.exp(found))
            rows += sweep
        (args.out / f"five_gaussians{suffix}.json").write_text(json.dumps(rows, indent=1) + "\n")
    for kind in kinds:
        for threshold in THRESHOLDS[kind]:
            chosen = [r for r in rows if (r["kind"], r["at"]) == (kind, threshold)]
            table = {
                "λ": [row["multipliers"] for row in chosen],
                "forgotten": [row["forgotten"] for row in chosen],
                "price": [row["price"] for row in chosen],
                "price of equal weights": [row["equal_price"] for row in chosen],
                "ratio": [row["equal_price"] / row["price"] for row in chosen],
            }
            print(kind, threshold)
            for name, values in table.items():
                print(f"  {name}: {np.mean(values, axis=0)} ± {np.std(values, axis=0, ddof=1)}")


if __name__ == "__main__":
    main()
