"""What constraints that hold under any condition cost, and what attacks then find.

Each threshold and seed is a run of `jax-unlearn demo --text --robust`. Its model, the reference and
the oracle, which never knew the concept, are then attacked as `jax-unlearn audit` does:

  UA     samples of the forgotten prompts and of paraphrases that do not show the concept
  RA     samples of the kept prompts that show what was asked for, object and style
  CCE    concept inversion of one token and of the whole embedding, by steps of Adam
  UDA    UnlearnDiffAtk: three tokens before the prompt
  learn  fine-tuning on 4 or 16 images, by steps

    python benchmarks/robust.py --thresholds 0.3x --seeds 0 --out benchmarks/results --models MODELS
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import time

import jax
import numpy as np

import jax_unlearn
from jax_unlearn.app import loading, run
from jax_unlearn.app.audit import attacks, measures
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject import load_subject
from jax_unlearn.app.jobs import jobs_of
from jax_unlearn.app.options import DemoOptions

ATTACKS = ("inversion", "unlearndiffatk", "relearning")


def train(folder, forget, threshold, seed, steps):
    """The command's run: what its report says of it. A model that is there is not made again."""
    if not (folder / "report.json").is_file():
        asked = DemoOptions(text=True, robust=True, forget=(forget,), seed=seed, out=folder)
        ((command, options),) = jobs_of("demo", asked)
        options = dataclasses.replace(options, threshold=(threshold,), samples=0)
        if steps is not None:
            options = dataclasses.replace(options, steps=steps)
        request, options, judge = loading.load(options)
        started = time.monotonic()
        run.run(request, options, command=command, judge=judge)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    found = json.loads((folder / "report.json").read_text())
    constraint = {
        name: found["constraints"][0][name]
        for name in ("threshold", "value", "stderr", "multiplier", "reference_value")
    }
    return constraint | {"objective": found["objective"]["value"], "timing": found["timing"]}


def attacked(tools, target, which):
    """UA, RA and what each attack finds of one target."""
    (concept,) = tools.subject.concepts

    def share(hits):
        return {"hits": int(np.sum(hits)), "count": int(np.size(hits))}

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
    for name, attack in which.items():
        rows = tools.judged(attack(target, concept), concept).rows
        found[name] = [row._asdict() for row in rows]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--forget", default="sneaker")
    parser.add_argument("--thresholds", nargs="+", default=["0.3x"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training; default the command's")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--compared", nargs="*", default=["reference", "oracle"])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=pathlib.Path, required=True, help="of the runs' folders")
    given = parser.parse_args()
    oracle = pathlib.Path(__file__).parent / "oracles" / given.forget
    path = given.out / f"robust_{given.forget}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []

    def keep(row):
        """Rows that were not measured anew stay."""
        row = row | {"version": jax_unlearn.__version__}
        which = [row[name] for name in ("model", "seed", "threshold", "steps")]
        rows[:] = [
            one
            for one in rows
            if [one[name] for name in ("model", "seed", "threshold", "steps")] != which
        ]
        rows.append(row)
        given.out.mkdir(parents=True, exist_ok=True)
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        result = {"forget": given.forget, "machine": machine, "jax": jax.__version__, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    for seed in given.seeds:
        for threshold in given.thresholds:
            folder = given.models / f"{given.forget}-{threshold}-{seed}"
            training = train(folder, given.forget, threshold, seed, given.steps)
            options = AuditOptions(
                reference="embedded-text", model=str(folder / "model"), oracle=str(oracle),
                forget=(given.forget,), samples=given.samples, seed=seed,
                attacks=tuple(given.attacks), restarts=given.restarts,
            )  # fmt: skip
            subject = load_subject(options)
            tools = attacks.make_tools(subject, options)
            which = attacks.attempts(tools)
            row = {"seed": seed, "threshold": None, "steps": None}
            for name in given.compared:
                keep(row | {"model": name} | attacked(tools, subject.targets[name], which))
            given.compared = []  # Once is enough.
            row |= {"model": "robust", "threshold": threshold, "steps": given.steps}
            found = attacked(tools, subject.targets["model"], which)
            keep(row | {"training": training} | found)


if __name__ == "__main__":
    main()
