"""Fronts of every method of images on a mixture of three Gaussians, and the line below them all.

A network without conditions forgets the first of three modes. It is given samples of that mode and
of the others, as a method of images is. The one strength of each method is swept, from five seeds,
in one vmapped scan. Every method has the same number of rows through the network, forwards.

Both costs are of the same 4,096 trajectories of the model, of 100 steps:

  forgotten  E_p h(x_0), h the exact posterior of the first mode: a third before, to be small
  price      path KL(p‖q) in nats, q the network before

A sample shows the mode with probability h, so that by data processing price ≥ kl(E_p h ‖ E_q h),
the binary divergence. No model is below that line. The area that a front dominates is taken up to
(1/3, 1 nat), which was fixed before anything was run: no forgetting, at 2.5 times the price that
forgetting all of the mode has, log 3/2.

    python examples/mixture_fronts.py
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import small_denoiser
from scipy.special import rel_entr
from small_denoiser import NATS, PLAIN, SCHEDULE, STEPS, mixture, pretrain, trainer
from tqdm import tqdm

from jax_unlearn import (
    Batch,
    Conditions,
    Images,
    Problem,
    Samples,
    baselines,
    duality,
    formulations,
    metrics,
    mixtures,
    multipliers,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
REFERENCE_POINT = (1 / 3, 1.0)
ROWS, TRAJECTORIES = 128, 4096
# Strengths and dual steps were chosen on seeds below this.
FIRST_SEED = 20
# Rows of the network, forwards, that every method may use: 2,000 steps of 256.
BUDGET = 2000 * 2 * ROWS
LAW = mixture([[-2.4, -1.4], [2.4, -1.4], [0.0, 2.8]])
GONE, KEPT = mixtures.select(LAW, [0]), mixtures.select(LAW, [1, 2])

STRENGTHS = {
    "forward KL": [0.25, 0.5, 1.0, 2.0, 4.0],  # nats above the reference's own loss
    "likelihood": [0.2, 0.1, 0.05, 0.02, 0.01],  # E h
    "equal-weights": [0.05, 0.1, 0.2, 0.3, 0.4],  # λ of forward KL, held fixed
    "naive-deletion": [0.0],
    "neg-grad": [0.0001, 0.001, 0.003, 0.01, 0.1],
    "siss": [0.0001, 0.001, 0.01, 0.03, 0.1],
    "siss-no-is": [0.0001, 0.001, 0.01, 0.03, 0.1],
    "erase-diff": [0.0001, 0.001, 0.01, 0.1, 1.0],
}
CONSTRAINED = ("forward KL", "likelihood")

# Rows of the network in what is being traced.
_counted = []


def network(params, x_t, t, cond):
    """The network, whose rows are counted while it is traced."""
    _counted.append(len(x_t))
    return small_denoiser.network(params, x_t, t, cond)


def shown(x_0):
    """The exact posterior of the first mode, [n, 1]."""
    return mixtures.responsibilities(LAW, x_0)[:, :1]


class Method(NamedTuple):
    """What trains, and where the multipliers begin."""

    problem: Problem
    batch_of: Callable
    dual: optax.GradientTransformation = optax.set_to_zero()
    threshold: Any = 0.0
    multiplier: Any = 0.0


def images(key):
    """Retained and forgotten samples."""
    one, two = jax.random.split(key)
    kept, gone = mixtures.sample(KEPT, one, ROWS), mixtures.sample(GONE, two, ROWS)
    return Batch(Images(kept, None), Images(gone, None, jnp.zeros(ROWS, int)))


def all_and_gone(key):
    """Samples of the law before, which forward KL holds, and of what is forgotten."""
    one, two = jax.random.split(key)
    every, gone = mixtures.sample(LAW, one, ROWS), mixtures.sample(GONE, two, ROWS)
    return Batch(Images(every, None), Images(gone, None, jnp.zeros(ROWS, int)))


def tilted(key):
    """Samples of the law, each with its h."""
    x_0 = mixtures.sample(LAW, key, 2 * ROWS)
    constraint = jnp.zeros((2 * ROWS, 1), int)
    return Batch(None, Samples(x_0, None, jnp.zeros(2 * ROWS, int), shown(x_0), constraint))


def method_of(name, strength):
    """A method at one strength; the strength may be traced."""
    if name == "equal-weights":
        problem = formulations.forward_kl(network, SCHEDULE, NATS)
        return Method(problem, all_and_gone, multiplier=strength)
    if name == "forward KL":
        # Values less the reference's on the same draws: thresholds are nats above its own.
        zero = jnp.zeros(1)
        problem = formulations.forward_kl(network, SCHEDULE, NATS, reference_values=zero)
        return Method(problem, all_and_gone, multipliers.nu_pi(2e-3, 2e-2, nu=0.9), strength)
    if name == "likelihood":
        problem = formulations.distill_likelihood(network, SCHEDULE, PLAIN, control_variate=True)
        # λ* on stored samples, before any training; the multiplier stays.
        with jax.ensure_compile_time_eval():
            stored = np.asarray(shown(mixtures.sample(LAW, jax.random.key(0), 20_000)))
        found = duality.likelihood_solver(stored)(jnp.atleast_1d(strength))
        return Method(problem, tilted, multiplier=found.multipliers)
    make, given = {
        "naive-deletion": (baselines.naive_deletion, {}),
        "neg-grad": (baselines.neg_grad, {"scale": strength}),
        "siss": (baselines.siss, {"norm": strength}),
        "siss-no-is": (baselines.siss, {"norm": strength, "estimator": "two_term"}),
        "erase-diff": (baselines.erase_diff, {"eta": strength}),
    }[name]
    loss = make(network, SCHEDULE, PLAIN, **given)
    return Method(baselines.loss_problem(loss, name=name), images)


def steps_of(name, reference):
    """Steps that the budget of rows has, and rows of a step: counted as one is traced."""
    key = jax.random.key(0)
    method = method_of(name, STRENGTHS[name][0])
    _counted.clear()
    given = reference, reference, key, method.batch_of(key), jnp.zeros(1)
    jax.eval_shape(method.problem.losses, *given)
    return BUDGET // sum(_counted), sum(_counted)


@functools.partial(jax.jit, static_argnums=2)
def measure(params, reference, count, key):
    """(E_p h, price) and their standard errors, along the same trajectories."""
    problem = formulations.likelihood(network, SCHEDULE, shown, shape=(2,), steps=STEPS)
    rows = Batch(None, Conditions(None, None, constraint=jnp.zeros(count, int)))
    found = problem.losses(params, reference, key, rows, jnp.zeros(1))
    values = jnp.stack([found.values.reshape(count), found.objective])
    return values.mean(axis=1), values.std(axis=1) / np.sqrt(count)


def floor(forgotten, before):
    """The binary KL divergence: the least price of a model that shows the mode so often."""
    return rel_entr(forgotten, before) + rel_entr(1 - forgotten, 1 - before)


def front_of(name, references, keys):
    """Costs and their standard errors of each strength and seed, [strengths, seeds, 2] each."""
    steps, rows = steps_of(name, jax.tree.map(lambda leaf: leaf[0], references))

    def one(strength, reference, key):
        method = method_of(name, strength)
        run = trainer(method.problem, method.batch_of, method.dual, steps, 1e-3)
        given = jnp.atleast_1d(method.threshold), method.multiplier, key
        params, found, _ = run(reference, reference, *given)
        return *measure(params, reference, TRAJECTORIES, jax.random.fold_in(key, 2)), found[0]

    seeds = jax.vmap(one, in_axes=(None, 0, 0))
    found = jax.jit(jax.vmap(seeds, in_axes=(0, None, None)))(
        jnp.array(STRENGTHS[name]), references, keys
    )
    costs, errors, multiplier = (np.asarray(part) for part in found)
    return {
        "steps": steps,
        "rows": rows,
        "costs": costs,
        "errors": errors,
        "multiplier": multiplier,
    }


def hypervolumes(costs):
    """Of each seed's front; runs that are not finite add nothing."""
    return [
        metrics.hypervolume(one[np.isfinite(one).all(axis=1)], REFERENCE_POINT)
        for one in costs.swapaxes(0, 1)
    ]


def shown_costs(costs):
    """The mean of the seeds [seeds, 2] that ended finite, and how many did not."""
    finite = np.isfinite(costs).all(axis=1)
    if not finite.any():
        return "diverged"
    forgotten, price = costs[finite].mean(axis=0)
    return f"{forgotten:.3f}, {price:.3g}" + f" ({(~finite).sum()} diverged)" * (not finite.all())


def plain(values):
    """As json has it: null for what is not finite."""
    values = np.asarray(values)
    return np.where(np.isfinite(values), values.astype(object), None).tolist()


def draw(found, before, path):
    """The fronts, with bands of one standard deviation over the seeds, over the floor."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    line = np.linspace(1e-4, before, 300)
    axis.plot(line, floor(line, before), color="black", label="no model is below")
    for name, one in found.items():
        x, y = one["costs"].mean(axis=1).T
        spread = one["costs"].std(axis=1, ddof=1).T
        style = "o-" if name in CONSTRAINED else "s--"
        axis.errorbar(x, y, *spread[::-1], fmt=style, ms=4, lw=1, capsize=2, label=name)
    axis.set(xlabel="E h of the forgotten mode", ylabel="path KL to the reference (nats)")
    axis.set(xlim=(0, 0.36), ylim=(0, REFERENCE_POINT[1]))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=[*STRENGTHS], default=[*STRENGTHS])
    args = parser.parse_args()
    started = time.monotonic()
    keys = jax.vmap(jax.random.key)(FIRST_SEED + jnp.arange(args.seeds))
    references = jax.jit(jax.vmap(lambda key: pretrain(key, LAW)))(keys)
    same = jax.vmap(functools.partial(measure, count=TRAJECTORIES))
    before = float(same(references, references, key=keys)[0][:, 0].mean())
    found = {}
    for name in (bar := tqdm(args.methods)):
        bar.set_postfix_str(name)
        found[name] = front_of(name, references, keys)
    line = np.linspace(0, before, 20_001)
    most = metrics.hypervolume(np.stack([line, floor(line, before)], axis=1), REFERENCE_POINT)
    print(
        f"before {before:.4f}; area above the floor {most:.4f}; "
        f"{time.monotonic() - started:.0f} s on {jax.devices()[0].device_kind}"
    )
    print("| method | rows a step | steps | area, 95 % | of the floor's | strength: E h, price |")
    print("|---|---|---|---|---|---|")
    table = {}
    for name, one in found.items():
        area = metrics.mean_interval(hypervolumes(one["costs"]))
        each = "; ".join(
            f"{strength:g}: {shown_costs(costs)}"
            for strength, costs in zip(STRENGTHS[name], one["costs"], strict=True)
        )
        print(
            f"| {name} | {one['rows']} | {one['steps']} | {area.value:.4f} ({area.low:.4f} to "
            f"{area.high:.4f}) | {area.value / most:.1%} | {each} |"
        )
        table[name] = {
            "strengths": STRENGTHS[name],
            "area": area._asdict(),
            **{key: plain(value) for key, value in one.items()},
        }
    result = {"before": before, "reference_point": REFERENCE_POINT, "floor_area": most}
    args.out.mkdir(exist_ok=True)
    path = args.out / "mixture_fronts.json"
    path.write_text(json.dumps(result | {"methods": table}) + "\n")
    draw(found, before, args.out / "mixture_fronts.png")


if __name__ == "__main__":
    main()
