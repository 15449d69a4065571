"""Constraints that hold under any condition, against what inversion of a condition brings back.

Reverse KL separates prompts, and leaves the rest of the network as it was. Here, from its model,
noised images of the concept are held to what a model predicts that knows only the rest
(`likelihoods.rest_path`), under conditions that a pool of inverters trains against the model:

    min E_kept ‖ε_θ − ε_q‖²/d   subject to   E ‖ε_θ(x_t, t, c) − ε̄(x_t, t)‖²/d ≤ τ,  any c

Every threshold τ is a run of its own; so is each seed. Before, after, and on the oracle:

  UA     samples of the forgotten prompts and of paraphrases that do not show the concept
  RA     samples of the kept prompts that show what was asked for, object and style
  CCE    concept inversion of the whole embedding, 400 steps of Adam from the base's prompt

    python benchmarks/robust.py --start DIR/model --oracle benchmarks/oracles/sneaker \\
        --thresholds 0.003 --seeds 0 --out benchmarks/results --save MODELS

DIR is the output of `jax-unlearn demo --text --formulation reverse-kl --out DIR`.
"""

import argparse
import json
import os
import pathlib
import platform
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

from jax_unlearn import attacks, likelihoods, multipliers, primal_dual, samplers
from jax_unlearn.app.audit import attacks as audits
from jax_unlearn.app.audit import measures, subject
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.tasks.base import in_batches
from jax_unlearn.formulations import (
    Pooled,
    against_pool,
    denoising_attack,
    optimizer_pair,
    without,
)
from jax_unlearn.pretrained import load_pretrained, save_unet
from jax_unlearn.problem import Batch, Images, NoisyPoints

CONCEPT_IMAGES, KEPT_IMAGES, POINTS, NOISE_LEVELS = 256, 1024, 2, 16
KEPT_ROWS, POOL = 48, 32


def stored(found, options, seed):
    """Samples of the reference, and what the rest predicts at noised ones of the concept."""
    reference, (concept,) = found.targets["reference"], found.concepts
    table = np.asarray(reference.table)

    @jax.jit
    def draw(_, noise, e):
        predict = lambda x_t, t: found.apply(reference.params, x_t, t, e)  # noqa: E731
        key = jax.random.key(0)
        return samplers.sample(predict, found.schedule, key, noise, steps=25).x_0

    def samples(cond, number):
        rng = np.random.default_rng([seed, number])
        noise = rng.standard_normal((len(cond), *found.shape), np.float32)
        return in_batches(draw, jax.random.key(0), noise, table[cond])

    kept = np.array([*found.kept, found.null])
    shown, held = np.resize(concept.forgotten, CONCEPT_IMAGES), np.resize(kept, KEPT_IMAGES)
    images, others = samples(shown, 1), samples(held, 2)
    # Of each prompt what remains in its template: the kept prompts of the same style.
    names = [name.strip("“”") for name in found.conditions.names]
    styles = {c: names[c].split(" of a ")[0] for c in concept.forgotten}
    rng, parts = np.random.default_rng([seed, 3]), []
    for style in sorted(set(styles.values())):
        rest = [c for c in found.kept if names[c].startswith(style + " of ")]
        follow = jax.jit(
            partial(
                likelihoods.rest_path,
                found.apply,
                reference.params,
                found.schedule,
                concepts=jnp.asarray(table[rest]),
            )
        )
        own = images[[styles[c] == style for c in shown]]
        for part in np.split(own, len(own) // 32):
            for _ in range(POINTS):
                places = np.arange(NOISE_LEVELS)[::-1] + rng.uniform(size=NOISE_LEVELS)
                times = (places * found.schedule.num_steps / NOISE_LEVELS).astype(np.int32)
                key = jax.random.key(int(rng.integers(2**31)))
                path = follow(key, x_0=part, times=times)
                t = np.repeat(times, len(part))
                flat = (np.asarray(x).reshape(-1, *found.shape) for x in (path.x_t, path.epsilon))
                parts.append((*flat, t))
    x_t, epsilon, t = (np.concatenate(one) for one in zip(*parts, strict=True))
    starts = table[[*kept, *concept.forgotten, *found.shown]]
    return {
        "images": images, "kept": others, "held": table[held], "starts": starts,
        "x_t": x_t, "epsilon": epsilon, "t": t,
    }  # fmt: skip


def train(found, data, threshold, seed, steps, rate, period):
    """From the model: the parameters, and the last rows of the log."""
    problem = against_pool(
        without(found.apply, found.schedule),
        denoising_attack(found.apply, found.schedule, data["images"]),
    )
    optimizer = optimizer_pair(
        optax.adam(optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps), b2=0.99),
        attacks.restarted_adam(data["starts"], period=period, seed=seed),
    )
    # λ is relative to the kept rows' loss: ascent in units of the threshold.
    dual = multipliers.nu_pi(0.02 / threshold, 0.5 / threshold, nu=0.9)
    algorithm = primal_dual(problem, optimizer, dual)
    start = Pooled(found.targets["model"].params, attacks.pool_of(data["starts"], POOL, seed=seed))
    start = jax.tree.map(jnp.copy, start)
    state = algorithm.init(start, [threshold], multipliers=np.ones(1, np.float32))
    reference = found.targets["reference"].params
    held = {name: jnp.asarray(value) for name, value in data.items()}

    @partial(jax.jit, donate_argnums=0)
    def step(state, key, held):
        kept_key, point_key, key = jax.random.split(key, 3)
        i = jax.random.randint(kept_key, (KEPT_ROWS,), 0, len(held["kept"]))
        j = jax.random.randint(point_key, (POOL,), 0, len(held["t"]))
        points = NoisyPoints(
            held["x_t"][j], held["t"][j], state.params.pool, held["epsilon"][j],
            None, None, None, jnp.zeros(POOL, jnp.int32),
        )  # fmt: skip
        batch = Batch(Images(held["kept"][i], held["held"][i]), points)
        return algorithm.step(key, state, reference, batch)

    rows, started = [], time.monotonic()
    for number in trange(steps, unit="step"):
        state, info = step(state, jax.random.fold_in(jax.random.key(seed), number), held)
        rows.append((info.objective, info.values[0], info.multipliers[0]))
    rows = np.array(jax.device_get(rows), float).reshape(steps, 3)
    tail = rows[-100:].mean(axis=0)
    log = dict(zip(("kept_error", "value", "multiplier"), map(float, tail), strict=True))
    return state.params.params, log | {"seconds": round(time.monotonic() - started)}


def inverter(found, options):
    """A function of (params, images, start): the embedding at each record of concept inversion."""

    @jax.jit
    def invert(params, x_0, start):
        def predict(e, x_t, t):
            return found.apply(params, x_t, t, jnp.broadcast_to(e, (len(x_t), *e.shape)))

        return attacks.invert(
            predict, found.schedule, jax.random.key(options.seed), x_0=x_0, start=start,
            steps=400, batch=64, every=50,
        )  # fmt: skip

    return invert


def measure(tools, target, invert):
    """UA, RA and the curve of concept inversion of one target."""
    (concept,), count = tools.subject.concepts, tools.options.samples

    def share(hits):
        return {"value": float(np.mean(hits)), "count": int(np.size(hits))}

    kept = measures.kept_samples(tools, target, 2)
    named = tools.named(kept.reshape(-1, *kept.shape[2:])).reshape(kept.shape[:2])
    conditions = tools.subject.conditions
    shown = dict(zip(conditions.drawn, conditions.shown_as, strict=True))
    wanted = np.array([shown[c] for c in tools.subject.kept])[:, None]
    found = {"RA": share(named == wanted)}
    for drawn in measures.forgotten(tools, target, concept):
        if drawn.budget == tools.options.guidance:
            name = "UA" if drawn.settings["what"] != "paraphrases" else "UA_paraphrases"
            found[name] = share(~tools.shows(drawn.images, concept))
    start = np.asarray(target.table)[tools.subject.start]
    best, found["CCE"] = invert(target.params, concept.x_0, start), []
    free = tools.subject.free(target, count)
    for number, e in zip(best.steps.tolist(), np.asarray(best.found), strict=True):
        rows = np.repeat(e[None], count, axis=0)
        drawn = tools.draw(
            target.params, rows, free, scale=tools.options.guidance, seed=(tools.options.seed, 11)
        )
        found["CCE"].append({"steps": number, **share(tools.shows(drawn, concept))})
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", required=True, help="the model to begin with")
    parser.add_argument("--oracle", required=True)
    parser.add_argument("--forget", default="sneaker")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.003])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument(
        "--period", type=int, default=300, help="steps of each attacker of the pool"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument(
        "--compared", nargs="*", default=["start", "reference", "oracle"], help="measured beside"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--save", type=pathlib.Path, help="write the UNets into this folder")
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        options = AuditOptions(
            reference="embedded-text", model=given.start, oracle=given.oracle,
            forget=(given.forget,), samples=given.samples, seed=seed,
        )  # fmt: skip
        found = subject.load_subject(options)
        tools = audits.make_tools(found, options)
        invert = inverter(found, options)
        for name in given.compared:
            target = found.targets["model" if name == "start" else name]
            row = {"seed": seed, "model": name}
            rows.append(row | measure(tools, target, invert))
            print(json.dumps(rows[-1]), flush=True)
        data = stored(found, options, seed)
        for threshold in given.thresholds:
            setting = given.steps, given.learning_rate, given.period
            params, log = train(found, data, threshold, seed, *setting)
            target = found.targets["model"]._replace(params=params)
            row = {"seed": seed, "model": "robust", "threshold": threshold, "training": log}
            row["period"] = given.period
            rows.append(row | measure(tools, target, invert))
            print(json.dumps(rows[-1]), flush=True)
            if given.save:
                path = given.save / f"{given.forget}-{threshold:g}-{seed}"
                save_unet(path, load_pretrained(given.start)._replace(params=params))
    command = f"python benchmarks/robust.py --thresholds {' '.join(map(str, given.thresholds))}"
    command += (
        f" --seeds {' '.join(map(str, given.seeds))} --steps {given.steps} --period {given.period}"
    )
    result = {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "forget": given.forget,
        "rows": rows,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"robust_{given.forget}.json"

    def which(row):
        return row["seed"], row["model"], row.get("threshold"), row.get("period")

    if path.is_file():  # Rows that were not measured anew stay.
        before = json.loads(path.read_text())["rows"]
        new = {which(row) for row in rows}
        result["rows"] = [row for row in before if which(row) not in new] + rows
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
