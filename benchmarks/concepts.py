"""Two concepts of the embedded model forgotten at once: constraints against hand-picked weights.

    python benchmarks/concepts.py --seeds 0 1 2 --out benchmarks/results
    python benchmarks/concepts.py --seeds 2 --methods esd --add benchmarks/results/concepts.json

Reverse-KL and likelihood constraints (as `jax-unlearn concept` has them, reverse KL by its own
estimator, "bounded", and by "pathwise"), Lagrangians with equal fixed weights ("pathwise"), and ESD
with its strength swept. The likelihood is that of the image itself, without noise, trained on
weighted samples ("tilt"), and λ that of the stored samples, uncorrected; or, in "posterior", as
`concept` has it: the share of samples that show a concept, a quarter of the base's. Every model is
measured by the same function: what the judge says of guided samples, KID of the kept labels, and
path KL to the reference.
ESD starts at the pretrained model, as published, and at the constrained methods' own start, where
forgotten labels are embedded as the null label is ("ESD from base").
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import baselines
from jax_unlearn.app import data, embedded
from jax_unlearn.app.algorithm import dual_schedule
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks import concept_request, concepts
from jax_unlearn.formulations import reverse_kl
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.subsets import subset_optimizer, subset_params, subset_problem
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Conditions

FORGET = ("Trouser", "Sneaker")
COMMON = {"forget": FORGET, "samples": 16, "evaluation_images": 132, "chain_steps": 10}
REVERSE = {
    "steps": 60, "batch_size": 12, "forget_batch_size": 6,
}  # fmt: skip
# Of ESD and of equal weights, which do not have multipliers that swing.
FIXED_RATE = 2e-4
LIKELIHOOD = {
    "steps": 50, "learning_rate": 5e-4, "batch_size": 64, "forget_batch_size": 32,
    "stored_samples": 256, "classifier_draws": 4, "classifier_noise": 0.0, "samples": 0,
    "target_steps": 0, "corrections": 0,
}  # fmt: skip
# Regression on the optimum's own score; λ is corrected, and a share of samples is what is bounded.
POSTERIOR = {
    "steps": 400, "learning_rate": 2e-4, "batch_size": 8, "forget_batch_size": 24,
    "stored_samples": 320, "classifier_draws": 4, "samples": 0, "corrections": 5,
    "evaluation_images": 160, "threshold": ("0.25x",),
}  # fmt: skip
STRENGTHS = (0.0, 0.3, 1.0, 2.0, 3.0, 5.0)
FROM_BASE = (1.0,)
EQUAL_REVERSE = (0.2, 0.5)  # λ of a forgotten condition alone, the same for both concepts
EQUAL_REVERSE_STEPS = 40
EQUAL_LIKELIHOOD = (1.0, 10.0)
ESD_STEPS, ESD_ROWS = 60, 8
METHODS = ("start", "esd", "likelihood", "posterior", "bounded", "pathwise", "equal")


def optimizer_of(peak, steps):
    """The same for every method: Adam, a tenth of the steps to warm up, then a cosine to 0."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    return optax.adam(rate, b1=0.9, b2=0.99)


def constrained(task, options, weights=None):
    """Trains a task's problem; with weights, the multipliers stay as given."""
    optimizer = optimizer_of(options.learning_rate, options.steps)
    algorithm = primal_dual(
        subset_problem(task.problem, options.train),
        subset_optimizer(optimizer, options.train),
        task.dual if weights is None else optax.set_to_zero(),
        dual_schedule=dual_schedule(task),
    )
    reference = task.pretrained.params
    start = task.multipliers if weights is None else weights
    state = algorithm.init(task.params, task.thresholds, multipliers=start)
    key = jax.random.key(options.seed)
    fresh = task.dual_batch if weights is None else None

    @jax.jit
    def step(state, reference, batch):
        key_now = jax.random.fold_in(key, state.step)
        return algorithm.step(key_now, state, reference, batch, fresh)

    state, info = step(state, reference, task.batch(0))
    jax.block_until_ready(info)
    started = time.monotonic()
    for number in range(1, options.steps):
        state, info = step(state, reference, task.batch(number))
    jax.block_until_ready(info)
    return state.params, np.asarray(state.multipliers), time.monotonic() - started


def make_esd(problem, options, optimizer, part="full"):
    """A function (start, η) -> parameters of which a part is trained; one program for all η."""
    apply, reference, schedule, config = problem.pretrained
    forgotten = np.asarray(problem.forgotten, np.int32)
    null = np.full(ESD_ROWS, problem.conditions.null, np.int32)

    @jax.jit
    def step(key, params, state, strength, rows):
        loss = baselines.esd(
            apply,
            schedule,
            shape=config.sample_shape,
            strength=strength,
            guidance=options.guidance,
            steps=options.sampling_steps,
        )

        def of_part(params, *rest):
            return loss(subset_params(params, part), *rest)

        batch = Conditions(rows, null, rows)
        train_step = baselines.train_step(of_part, subset_optimizer(optimizer, part))
        return train_step(key, params, state, reference, batch)

    def train(start, strength):
        params, state = start, subset_optimizer(optimizer, part).init(start)
        started = time.monotonic()
        for number in range(ESD_STEPS):
            key = jax.random.fold_in(jax.random.key(options.seed), number)
            turn = data.batch_indices(
                seed=options.seed, step=number, size=ESD_ROWS, count=len(forgotten)
            )
            params, state, value = step(key, params, state, jnp.asarray(strength), forgotten[turn])
        jax.block_until_ready(value)
        return params, time.monotonic() - started

    return train


def with_estimator(task, problem, options, estimator):
    """The same problem by another estimator of its gradient."""
    apply, _, schedule, config = problem.pretrained
    found = reverse_kl(
        apply,
        schedule,
        estimator=estimator,
        shape=config.sample_shape,
        steps=options.chain_steps,
        project=task.problem.project,
    )
    return task._replace(problem=found)


def row_of(problem, method, setting, measured, thresholds, seconds=None, multipliers=None):
    names = [problem.conditions.names[c] for c in problem.forgotten]
    rates = {name: one["rate"] for name, one in measured.metrics["agreement"].items()}
    kl = {name: float(one.value) for name, one in measured.metrics["path_kl"].items()}
    return {
        "method": method,
        "setting": setting,
        "forgotten_agreement": float(np.mean([rates[name] for name in names])),
        "forgotten_agreement_worst": float(np.max([rates[name] for name in names])),
        "kept_agreement": float(np.mean([r for name, r in rates.items() if name not in names])),
        "kid": float(measured.metrics["kid"].value),
        "kid_stderr": float(measured.metrics["kid"].stderr),
        "kept_path_kl": float(np.mean([v for name, v in kl.items() if name not in names])),
        "forgotten_path_kl_to_base": float(np.mean([kl[name] for name in names])),
        "separation": [float(v) for v in measured.constraints.value],
        "separation_stderr": [float(v) for v in measured.constraints.stderr],
        "thresholds": [float(v) for v in thresholds],
        "multipliers": None if multipliers is None else [float(v) for v in multipliers],
        "seconds": seconds,
    }


def study(seed, methods):
    """The rows of one seed, one after another."""
    pretrained, judge = load_pretrained(embedded.model_path()), embedded.judge()
    reverse = ConceptOptions(seed=seed, **COMMON, **REVERSE)
    problem = concept_request.make_request(pretrained, reverse)
    held_out = embedded.load_data().held_out
    problem = problem._replace(real=held_out.pixels[~np.isin(held_out.labels, problem.forgotten)])
    task = concepts.concept_task(problem, reverse, judge)

    def row(method, setting, params, *more):
        return row_of(problem, method, setting, task.measure(params), task.thresholds, *more)

    if "start" in methods:
        yield row_of(problem, "before", None, task.before, task.thresholds)
        yield row("start", None, task.params)
    if "esd" in methods:
        train = make_esd(problem, reverse, optimizer_of(FIXED_RATE, ESD_STEPS))
        for name, start, strengths in (
            ("ESD", pretrained.params, STRENGTHS),
            ("ESD from base", task.params, FROM_BASE),
        ):
            for strength in strengths:
                params, seconds = train(start, strength)
                yield row(name, strength, params, seconds)
    for method, changes, weights in (
        ("likelihood", LIKELIHOOD, (None, *EQUAL_LIKELIHOOD)),
        ("posterior", POSTERIOR, (None,)),
    ):
        if method not in methods:
            continue
        likely = dataclasses.replace(reverse, formulation="likelihood", **changes)
        other = concepts.concept_task(problem, likely, None)
        for weight in weights:
            fixed = None if weight is None else np.full(len(FORGET), weight)
            params, found, seconds = constrained(other, likely, fixed)
            name = "likelihood" if weight is None else "likelihood, equal weights"
            name = "likelihood, posterior" if method == "posterior" else name
            result = row(name, weight, params, seconds, found)
            own = other.measure(params)
            result["mean_h"] = [float(v) for v in own.constraints.value]
            result["mean_h_thresholds"] = [float(v) for v in other.thresholds]
            yield result
    if "bounded" in methods:
        params, found, seconds = constrained(task, reverse)
        yield row("reverse KL", None, params, seconds, found)
    pathwise = with_estimator(task, problem, reverse, "pathwise")
    if "pathwise" in methods:
        params, found, seconds = constrained(pathwise, reverse)
        yield row("reverse KL, pathwise", None, params, seconds, found)
    if "equal" in methods:
        shorter = dataclasses.replace(reverse, steps=EQUAL_REVERSE_STEPS, learning_rate=FIXED_RATE)
        for weight in EQUAL_REVERSE:
            fixed = np.full(len(FORGET), weight)
            params, found, seconds = constrained(pathwise, shorter, fixed)
            yield row("reverse KL, equal weights", weight, params, seconds, found)


def rows_of(paths):
    """The rows of earlier runs."""
    return [row for path in paths for row in json.loads(path.read_text())["runs"]]


def replaced(rows, row):
    """The rows with another one, which takes the place of an earlier run of the same."""
    names = ("seed", "task", "method", "setting")

    def same(other):
        return all(other.get(name) == row.get(name) for name in names)

    return [*(other for other in rows if not same(other)), row]


def summarise(rows):
    """Mean and standard deviation over seeds of every number, for each method and setting."""
    table = []
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        same = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
        entry = {"method": method, "setting": setting, "seeds": len(same)}
        for name, value in same[0].items():
            if isinstance(value, (float, list)) and name != "setting":
                values = np.array([row[name] for row in same], float)
                spread = values.std(axis=0, ddof=1) if len(same) > 1 else np.full_like(values[0], 0)
                entry[name] = {"mean": values.mean(axis=0).tolist(), "sd": spread.tolist()}
        table.append(entry)
    return table


def both(entry, name, factor=1.0, digits=2):
    """Mean ± standard deviation over seeds, of one number or of several; of one seed its own."""
    means, spreads = (np.atleast_1d(entry[name][key]) * factor for key in ("mean", "sd"))
    return ", ".join(
        f"{mean:.{digits}g} ± {sd:.2g}" if entry["seeds"] > 1 else f"{mean:.{digits}g}"
        for mean, sd in zip(means, spreads, strict=True)
    )


def print_table(table):
    """The summary as rows of Markdown."""
    print("| | still named so, % | others, % | KID | path KL of kept | KLs to both | seeds |")
    for entry in table:
        cells = [
            " ".join(str(entry[name]) for name in ("method", "setting") if entry[name] is not None),
            both(entry, "forgotten_agreement", 100, 3),
            both(entry, "kept_agreement", 100, 3),
            both(entry, "kid"),
            both(entry, "kept_path_kl"),
            both(entry, "separation", digits=3),
            str(entry["seeds"]),
        ]
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--add", type=pathlib.Path, nargs="+", default=[], help="earlier results")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "concepts.json"
    rows = rows_of(arguments.add)

    def write():
        result = {
            "command": "python benchmarks/concepts.py",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
            "summary": summarise(rows),
            "runs": rows,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")

    for seed in arguments.seeds:
        for row in study(seed, arguments.methods):
            rows = replaced(rows, {"seed": seed, **row})
            print(json.dumps(rows[-1]), flush=True)
            write()
    write()
    print_table(summarise(rows))


if __name__ == "__main__":
    main()
