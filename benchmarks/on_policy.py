"""What on-policy training points cost: reverse KL against ESD's partial sampling.

    python benchmarks/on_policy.py [--quick] [--only counts|clock] [--out FILE]

counts: rows of network passes that are executed for one training point, by a denoiser that counts
them on the host while the compiled step runs; those that differentiation runs again, and
backward passes, apart.

clock: seconds until the embedded model's p(·|c) at one class is as far from it as the null label
is, KL(p‖q(·|c)) ≥ D = KL(q(·|∅)‖q(·|c)), without damage, KL(p‖q(·|∅)) ≤ `--budget` D; all are
path KLs. Both are needed: one step of Adam at rate 5e-4 takes p further than D from everything. On
the line of compositions ε_∅ + a (ε_∅ − ε_c) the two are about (1+a)² D and a² D. All methods begin
at the same weights and have the same target, negative guidance of strength η (reverse KL at the
fixed multiplier λ = η/(1+η), that is α = η); they differ in the points they are trained at. Batch
size and learning rate of each are swept on the first seed; those that got there first then run on
every seed, in turns. The path KL is measured along fresh trajectories of a chain that none is
trained on, with the same noise every time; compilation and measurements are not on the clock. It is
measured when the number of steps has grown by a tenth, so that times are right to a tenth.

"minibatched" is "stop_gradient" with `--parts` steps of Adam on the points of each trajectory, each
point in one of them; a step is all of these.

With `--model embedded-text` c is "a photo of a sneaker" and "a photo" stands for ∅. One more method
is then ESD by hand in torch, on diffusers' network; it needs the torch extra, and its state, loss
and gradient are first compared with those of `baselines` on the same noise. `--train
cross-attention` trains that alone, by every method, as ESD-x does.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import platform
import tempfile
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from text_to_image import TOLERANCE, Esd, compare, counting

import jax_unlearn
from jax_unlearn import Batch, Conditions, baselines, reverse_kl, schedules
from jax_unlearn.app import embedded
from jax_unlearn.app.tasks.conditions import of_prompts
from jax_unlearn.formulations import sample_trajectories
from jax_unlearn.pretrained.networks import load_network
from jax_unlearn.pretrained.subsets import subset_optimizer, subset_params, subset_problem
from jax_unlearn.pretrained.text_to_image import load_text_to_image

ESD, TORCH, MINIBATCHED = "esd", "torch", "minibatched"
METHODS = (ESD, "stop_gradient", "bounded", "pathwise")
PROMPTS = ("a photo of a sneaker", "a photo")


def small(params, x_t, t, cond):
    """A denoiser for the counts, which do not depend on what is inside; not linear."""
    return jnp.tanh(params["w"] * x_t + params["b"][cond][:, None, None, None])


class Setting(NamedTuple):
    """A model, and the numbers of what it forgets and of what that is held to."""

    model: Any
    forgotten: int
    base: int


def setting_of(options):
    if options.model == "embedded":
        model = jax_unlearn.load_pretrained(embedded.model_path())
        return Setting(model, options.label, model.config.null_label)
    model, _ = of_prompts(load_text_to_image(embedded.text_model_path()), PROMPTS)
    schedule = dataclasses.replace(model.schedule, variance_type="fixed_geometric")
    return Setting(model._replace(schedule=schedule), 0, 1)


def forgotten(rows, null, label):
    ones = jnp.ones(rows, int)
    return Conditions(label * ones, null * ones, label * ones, 0 * ones)


def count_passes(options):
    """Rows per training point of each method: {"forward", "rematerialised", "backward"}."""
    schedule, shape = schedules.noise_schedule("squaredcos_cap_v2"), (2, 2, 1)
    params = {"w": jnp.float32(0.3), "b": jnp.array([0.1, 0.2])}
    batch, tally = forgotten(1, 0, 1), collections.Counter()
    apply = counting(small, tally)
    found = {}
    for name in METHODS:
        if name == ESD:
            loss = baselines.esd(apply, schedule, shape=shape, steps=options.esd_steps)
            points = 1
        else:
            problem = reverse_kl(
                apply, schedule, shape=shape, steps=options.chain_steps, estimator=name
            )
            points = options.chain_steps

            def loss(params, reference, key, batch, problem=problem):
                return jax_unlearn.lagrangian(
                    problem, params, reference, key, Batch(None, batch), [0.5], [0.0]
                )[0]

        step = jax.jit(jax.value_and_grad(loss))
        value = jax.jit(loss)

        def passes(function, key, params=params):
            tally.clear()
            jax.block_until_ready(function(params, params, key, batch))
            return dict(tally)

        # ESD draws how many steps it samples: each number once, since all are equally likely.
        cases = {}
        for seed in range(100 * options.esd_steps):
            key = jax.random.key(seed)
            first, both = passes(value, key)["forward"], passes(step, key)
            cases[first] = (first, both["forward"] - first, both["backward"])
            if len(cases) == (options.esd_steps if name == ESD else 1):
                break
        mean = np.mean(list(cases.values()), axis=0) / points
        found[name] = dict(
            zip(("forward", "rematerialised", "backward"), mean.tolist(), strict=True)
        )
        found[name]["all"] = float(mean.sum())
    return found


class Runner(NamedTuple):
    """How a method trains.

    Attributes:
      init: (learning rate, seed) -> state.
      step: (key, state) -> state, compiled.
      params_of: state -> the parameters that it stands for.
    """

    init: Any
    step: Any
    params_of: Any


def make_runner(name, setting, rows, options):
    """The runner of one of `METHODS`, or of minibatches."""
    model = setting.model
    shape, batch = model.config.sample_shape, forgotten(rows, setting.base, setting.forgotten)

    @optax.inject_hyperparams
    def adam(learning_rate):
        return subset_optimizer(optax.adam(learning_rate), options.train)

    optimizer = adam(learning_rate=0.0)

    def with_rate(opt_state, rate):
        return opt_state._replace(hyperparams={"learning_rate": jnp.float32(rate)})

    if name == ESD:
        loss = baselines.esd(
            model.apply, model.schedule, shape=shape, strength=options.strength,
            guidance=options.guidance, steps=options.esd_steps,
        )  # fmt: skip
        train = baselines.train_step(
            lambda params, *rest: loss(subset_params(params, options.train), *rest), optimizer
        )

        def init(rate, seed):
            return model.params, with_rate(optimizer.init(model.params), rate)

        def step(key, state, reference):
            return train(key, *state, reference, batch)[:2]

        def params_of(state):
            return state[0]
    else:
        problem = reverse_kl(
            model.apply, model.schedule, shape=shape, steps=options.chain_steps,
            estimator="stop_gradient" if name == MINIBATCHED else name,
        )  # fmt: skip
        problem = subset_problem(problem, options.train)
        if name == MINIBATCHED:
            visit = sample_trajectories(
                model.apply, model.schedule, shape=shape, steps=options.chain_steps
            )
            algorithm = jax_unlearn.minibatched(
                problem, optimizer, optax.set_to_zero(), visit, parts=options.parts
            )
        else:
            algorithm = jax_unlearn.primal_dual(problem, optimizer, optax.set_to_zero())

        def init(rate, seed):
            multiplier = options.strength / (1 + options.strength)
            state = algorithm.init(model.params, 0.0, multipliers=multiplier)
            return state._replace(opt_state=with_rate(state.opt_state, rate))

        def step(key, state, reference):
            return algorithm.step(key, state, reference, Batch(None, batch))[0]

        def params_of(state):
            return state.params

    program = jax.jit(step).lower(jax.random.key(0), init(0.0, 0), model.params).compile()
    return Runner(init, lambda key, state: program(key, state, model.params), params_of)


def make_torch_runner(setting, rows, options):
    """ESD in torch on the same weights."""
    apply, params, schedule, config = setting.model
    folder = embedded.text_model_path()
    concept, base = (
        np.repeat(np.asarray(apply.table)[number : number + 1], rows, axis=0)
        for number in (setting.forgotten, setting.base)
    )
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())

    def init(rate, seed):
        return Esd(
            folder / "unet", options, concept, base,
            scheduler=scheduler, rate=rate, seed=seed,
            trains=lambda name: options.train == "full" or "attn2" in name,
        )  # fmt: skip

    def step(key, esd):
        esd()
        return esd

    def params_of(esd):
        with tempfile.TemporaryDirectory() as temporary:
            esd.model.save_pretrained(temporary)
            return load_network(temporary).params

    network = load_network(folder / "unet")
    differences = compare(network, init(0.0, 0), options)
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the torch step is not the same computation: {differences}.")
    return Runner(init, step, params_of)


def make_measure(setting, options):
    """(params, condition) -> path KLs of p(·|condition) to q(·|base) and to q(·|c), and errors."""
    model = setting.model
    problem = reverse_kl(
        model.apply, model.schedule, shape=model.config.sample_shape,
        steps=options.measure_steps, estimator="stop_gradient",
    )  # fmt: skip
    batch = forgotten(options.measure_rows, setting.base, setting.forgotten)
    key = jax.random.key(10**6)

    @jax.jit
    def measure(params, reference, condition):
        rows = Batch(None, batch._replace(cond=jnp.full_like(batch.cond, condition)))
        got = problem.losses(params, reference, key, rows, jnp.zeros(1))
        both = jnp.stack([got.objective, got.values])
        return both.mean(axis=1), both.std(axis=1, ddof=1) / jnp.sqrt(options.measure_rows)

    return lambda params, condition: np.asarray(measure(params, model.params, condition)).tolist()


def run(runner, measure, threshold, most, limit, *, rate, seed):
    """Trains until both hold or to the limit; seconds are None if the limit came first."""
    key, state = jax.random.key(seed), runner.init(rate, seed)
    seconds, done, curve, reached = 0.0, 0, [], False
    while seconds < limit:
        upto = max(done + 1, int(done * 1.1))
        started = time.perf_counter()
        for number in range(done, upto):
            state = runner.step(jax.random.fold_in(key, number), state)
        jax.block_until_ready(state)
        seconds, done = seconds + time.perf_counter() - started, upto
        (held, value), (_, error) = measure(runner.params_of(state))
        curve.append([done, *(round(number, 4) for number in (seconds, value, error, held))])
        reached = value >= threshold and held <= most
        if reached:
            break
    return {
        "rate": rate, "seed": seed, "steps": done, "reached": reached,
        "seconds": seconds if reached else None, "stopped_after": seconds,
        "kl_to_base": curve[-1][4], "curve": curve,
    }  # fmt: skip


def clock(options):
    """Sweeps, then runs the best of each method on every seed."""
    setting = setting_of(options)
    measure = make_measure(setting, options)
    (_, base), (_, base_error) = measure(setting.model.params, setting.base)
    threshold, most = options.threshold * base, options.budget * base
    print(
        f"KL(q(·|base)‖q(·|c)) = {base:.2f} ± {base_error:.2f} nats: to reach {threshold:.2f} "
        f"within {most:.2f} of the base",
        flush=True,
    )
    runners, sweep, best = {}, [], {}
    for name in options.methods:
        fastest = None
        for rows in options.rows:
            make = make_torch_runner if name == TORCH else partial(make_runner, name)
            runner = make(setting, rows, options)
            jax.block_until_ready(runner.step(jax.random.key(0), runner.init(0.0, 0)))
            runners[name, rows] = partial(
                run, runner, partial(measure, condition=setting.forgotten), threshold, most
            )
            for rate in options.rates:
                # What is already slower than the fastest cannot be the best of the sweep.
                limit = options.limit if fastest is None else min(options.limit, fastest)
                got = runners[name, rows](limit, rate=rate, seed=options.seeds[0])
                sweep.append({"method": name, "rows": rows, **got})
                print(
                    f"{name:13} rows {rows:3} rate {rate:.0e}: {got['steps']:4} steps, "
                    f"{got['stopped_after']:7.1f} s, KL to c {got['curve'][-1][2]:.0f} "
                    f"and to base {got['kl_to_base']:.0f}"
                    f"{'' if got['reached'] else ', not reached'}",
                    flush=True,
                )
                if got["reached"] and (fastest is None or got["seconds"] < fastest):
                    fastest, best[name] = got["seconds"], (rows, rate)
    runs = []
    for seed in options.seeds:
        for name, (rows, rate) in best.items():
            got = runners[name, rows](options.limit, rate=rate, seed=seed)
            runs.append({"method": name, "rows": rows, **got})
    summary = {}
    for name, (rows, rate) in best.items():
        mine = [one for one in runs if one["method"] == name]
        seconds = [one["seconds"] for one in mine if one["reached"]]
        summary[name] = {
            "rows": rows,
            "rate": rate,
            "seconds": seconds,
            "median_seconds": float(np.median(seconds)) if len(seconds) == len(mine) else None,
            "median_steps": float(np.median([one["steps"] for one in mine])),
            "median_kl_to_base": float(np.median([one["kl_to_base"] for one in mine])),
        }
    for slow in (ESD, TORCH):
        seconds = summary.get(slow, {}).get("median_seconds")
        for one in summary.values():
            if seconds and one["median_seconds"]:
                one[f"{slow}_over_this"] = seconds / one["median_seconds"]
    return {
        "kl_base_to_c": base,
        "kl_base_to_c_stderr": base_error,
        "threshold": threshold,
        "budget": most,
        "summary": summary,
        "runs": runs,
        "sweep": sweep,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: few steps, rows, seeds")
    parser.add_argument("--only", choices=["counts", "clock"])
    parser.add_argument("--model", choices=["embedded", "embedded-text"], default="embedded")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, MINIBATCHED, TORCH])
    parser.add_argument("--train", choices=["full", "cross-attention"], default="full")
    parser.add_argument("--label", type=int, default=1, help="the class to forget: trousers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-4, 1e-4, 5e-5])
    parser.add_argument("--strength", type=float, default=1.0, help="η")
    parser.add_argument("--guidance", type=float, default=3.0, help="of ESD's partial sampling")
    parser.add_argument("--esd-steps", type=int, default=50)
    parser.add_argument("--chain-steps", type=int, default=20, help="of the reverse-KL chain")
    parser.add_argument("--parts", type=int, default=10, help="minibatches of a trajectory")
    parser.add_argument("--measure-steps", type=int, default=25)
    parser.add_argument("--measure-rows", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=1.5)
    parser.add_argument("--limit", type=float, default=400.0, help="seconds of training a run")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/on_policy.json")
    )
    options = parser.parse_args()
    text = options.model == "embedded-text"
    options.methods = options.methods or [*METHODS, MINIBATCHED, *[TORCH] * text]
    if TORCH in options.methods and not text:
        parser.error("torch is for --model embedded-text.")
    if options.quick:
        options.seeds, options.rows, options.rates = [0], [2], [5e-4]
        options.esd_steps, options.chain_steps, options.parts = 6, 4, 2
        options.measure_steps, options.measure_rows, options.limit = 5, 4, 15.0
        options.threshold, options.budget = 0.5, 100.0
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {cores} cores, load {load:.1f}, "
        f"{jax.default_backend()}, jax {jax.__version__}",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }
    print(result["machine"])
    if options.only != "clock":
        result["counts"] = count_passes(options)
        print("rows of network passes a training point:")
        for name, passes in result["counts"].items():
            parts = ", ".join(f"{kind} {rows:.2f}" for kind, rows in passes.items())
            ratio = result["counts"][ESD]["all"] / passes["all"]
            print(f"{name:13} {parts}; ESD needs {ratio:.1f} times as many")
    if options.only != "counts":
        result["clock"] = clock(options)
        print(json.dumps(result["clock"]["summary"], indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
