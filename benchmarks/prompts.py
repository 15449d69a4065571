"""Forgetting objects and styles of the embedded text-to-image model: four methods, three seeds.

Tasks: one object (with its synonym), one style, two objects, an object in one style. Methods: the
closed-form edit that training starts from, reverse KL and likelihood with constraints, equal
weights fixed by hand, and ESD (2303.07345) over strengths and learning rates. Each is judged by a
classifier of (object, style) that saw only real images:

  UA    unlearning accuracy: samples of forgotten prompts that do not show what was forgotten
  UA'   the same on paraphrases in templates that neither the model nor the run has seen
  IRA   in-domain retain accuracy: kept objects (styles) right, when objects (styles) are forgotten
  CRA   cross-domain retain accuracy: the style (object) right, on the same samples
  KID   of samples of the kept prompts, against the reference's from other noise

    python benchmarks/prompts.py --seeds 0 1 2 --out benchmarks/results
    python benchmarks/prompts.py --seeds 2 --methods esd --add benchmarks/results/prompts.json
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform

import jax
import numpy as np
from concepts import (
    ESD_STEPS,
    both,
    constrained,
    make_esd,
    optimizer_of,
    replaced,
    rows_of,
    summarise,
)

from jax_unlearn import metrics
from jax_unlearn.app import data, embedded
from jax_unlearn.app.embedded.captions import OBJECTS, STYLES, caption, forgetting
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.concept_request import make_prompt_request
from jax_unlearn.app.tasks.concepts import concept_task
from jax_unlearn.app.tasks.drawing import drawing, features_of
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained.text_to_image import load_text_to_image

PAIRS = [(name, style) for name in OBJECTS for style in STYLES]
BAG = {
    "forget": ("a blueprint of a bag|a blueprint of a handbag",),
    "template": ("{} => a blueprint",),
    "retain": tuple(caption(*pair) for pair in PAIRS if pair != ("bag", "blueprint")),
    "show": ("a blueprint that shows one bag",),
    "anchor": "a blueprint of a dress",
}
TASKS = {
    "sneaker": forgetting(["sneaker"]) | {"anchor": "ankle boot"},
    "blueprint": forgetting(["blueprint"]),
    "sneaker, bag": forgetting(["sneaker", "bag"]),
    "blueprint of a bag": BAG,
}
FORGOTTEN = {
    "sneaker": [pair for pair in PAIRS if pair[0] == "sneaker"],
    "blueprint": [pair for pair in PAIRS if pair[1] == "blueprint"],
    "sneaker, bag": [pair for pair in PAIRS if pair[0] in ("sneaker", "bag")],
    "blueprint of a bag": [("bag", "blueprint")],
}
COMMON = {
    "model": "embedded-text", "samples": 4, "sampling_steps": 12, "evaluation_images": 320,
}  # fmt: skip
REVERSE = {
    "steps": 40, "threshold": ("calibrated",), "batch_size": 12, "forget_batch_size": 10,
}  # fmt: skip
LIKELIHOOD = {
    "steps": 600, "stored_samples": 320, "classifier_draws": 4, "threshold": ("0.25x",),
    "learning_rate": 2e-4, "batch_size": 8, "forget_batch_size": 24, "evaluation_images": 640,
    "corrections": 5,
}  # fmt: skip
# Weighted denoising of the samples, with what served it best.
TILT = LIKELIHOOD | {
    "target_steps": 0, "train": "cross-attention-kv", "learning_rate": 1e-3, "corrections": 8,
}  # fmt: skip
EQUAL = (0.5,)
LABELS = {
    "closed-form edit": "the start alone: edited cross-attention",
    "reverse KL, equal weights": "its Lagrangian with λ",
    "likelihood": "likelihood, a quarter of the base's own share",
    "likelihood by tilt": "likelihood by `tilt`",
}
METHODS = ("edit", "reverse", "likelihood", "tilt", "esd")
STRENGTHS = (1.0, 3.0)
ESD_RATES = (2e-4, 1e-3)


class Judge:
    """Draws all prompts of a task and counts what they show."""

    def __init__(self, task, problem, options):
        names = [name.strip("“”") for name in problem.conditions.names]
        objects = TASKS[task] is not BAG and task != "blueprint"
        self.in_domain = 0 if objects else 1
        self.lost = {PAIRS.index(pair) for pair in FORGOTTEN[task]}
        kept = {caption(*pair): pair for pair in PAIRS if pair not in FORGOTTEN[task]}
        self.wanted = [kept.get(names[c]) for c in problem.conditions.drawn]
        self.forgotten = [c in problem.forgotten for c in problem.conditions.drawn]
        self.shown = [c in problem.shown for c in problem.conditions.drawn]
        self.judge = embedded.text_judge()
        self.features = features_of(JudgeFunctions(self.judge.logits, self.judge.features))
        self.draw = drawing(problem.pretrained, problem.conditions, options, None, ()).draw
        self.kept = [pair is not None for pair in self.wanted]
        other = self.images(problem.pretrained.params, 1)[self.kept]
        self.reference = self.features(other.reshape(-1, 32, 32, 3))

    def images(self, params, seed=0):
        return self.draw(params, seed).reshape(len(self.wanted), -1, 32, 32, 3)

    def __call__(self, params):
        images = self.images(params)
        logits = self.judge.logits(data.to_unit_range(images.reshape(-1, 32, 32, 3)))
        named = np.asarray(logits).argmax(axis=1).reshape(images.shape[:2])
        gone = ~np.isin(named, list(self.lost))
        right = np.stack([named // len(STYLES), named % len(STYLES)], axis=-1)
        wanted = np.array(
            [(OBJECTS.index(o), STYLES.index(s)) for o, s in filter(None, self.wanted)]
        )
        hits = (right[self.kept] == wanted[:, None]).mean(axis=(0, 1))
        features = self.features(images[self.kept].reshape(-1, 32, 32, 3))
        return {
            "UA": float(gone[self.forgotten].mean()),
            "UA_paraphrases": float(gone[self.shown].mean()),
            "IRA": float(hits[self.in_domain]),
            "CRA": float(hits[1 - self.in_domain]),
            "kid": float(metrics.kernel_distance(features, self.reference).value),
        }


def study(name, seed, methods, rates):
    """The rows of one task and seed, one after another."""
    model = load_text_to_image(embedded.text_model_path())
    options = ConceptOptions(seed=seed, **COMMON, **REVERSE, **TASKS[name])
    problem = make_prompt_request(model, options)
    judged = Judge(name, problem, options)
    silent = dataclasses.replace(options, samples=0)
    task = None if set(methods) <= {"likelihood", "tilt"} else concept_task(problem, silent, None)

    def row(method, setting, params, seconds=None, found=None, of=task):
        measured = of.measure(params)
        kl = measured.metrics["path_kl"]
        kept = [problem.conditions.names[c] for c in problem.kept]
        return {
            "method": method,
            "setting": setting,
            **judged(params),
            "kept_path_kl": float(np.mean([kl[c].value for c in kept])),
            "constraints": [float(v) for v in measured.constraints.value],
            "constraints_stderr": [float(v) for v in measured.constraints.stderr],
            "thresholds": [float(v) for v in of.thresholds],
            "multipliers": None if found is None else [float(v) for v in found],
            "seconds": seconds,
        }

    if "edit" in methods:
        yield row("before", None, task.pretrained.params)
        yield row("closed-form edit", None, problem.start)
    if "reverse" in methods:
        for weight in (None, *EQUAL):
            given = None if weight is None else np.full(len(problem.concepts), weight)
            params, found, seconds = constrained(task, silent, given)
            label = "reverse KL" if weight is None else "reverse KL, equal weights"
            yield row(label, weight, params, seconds, found)
    for method, label, changes in (
        ("likelihood", "likelihood", LIKELIHOOD),
        ("tilt", "likelihood by tilt", TILT),
    ):
        if method in methods:
            likely = dataclasses.replace(silent, formulation="likelihood", **changes)
            other = concept_task(problem, likely, None)
            params, found, seconds = constrained(other, likely, None)
            yield row(label, None, params, seconds, found, other)
    if "esd" in methods:
        for rate in rates:
            train = make_esd(problem, options, optimizer_of(rate, ESD_STEPS), "cross-attention")
            for strength in STRENGTHS:
                params, seconds = train(problem.pretrained.params, strength)
                yield row(f"ESD-x, rate {rate:.0e}", strength, params, seconds)


def print_table(name, rows):
    """Means and deviations over the seeds of a task, as rows of Markdown; KID less that before."""
    before = {row["seed"]: row["kid"] for row in rows if row["method"] == "before"}
    rows = [row | {"kid": row["kid"] - before.get(row["seed"], np.nan)} for row in rows]
    for entry in summarise(rows):
        digits = 2 if entry["method"].startswith("likelihood") else 3
        reached, asked = (
            both(entry, key, digits=digits).split(", ") for key in ("constraints", "thresholds")
        )
        cells = [
            name,
            labelled(entry["method"], entry["setting"]),
            *(percent(entry, key) for key in ("UA", "UA_paraphrases", "IRA", "CRA")),
            *(both(entry, key) for key in ("kid", "kept_path_kl")),
            ", ".join(
                f"{value} of {least.split()[0]}"
                for value, least in zip(reached, asked, strict=True)
            ),
            str(entry["seeds"]),
        ]
        print("|", " | ".join(cells), "|")


def labelled(method, setting):
    """What a table calls a method: a strength, or a weight, is its setting."""
    label = LABELS.get(method, method)
    if method.startswith("ESD"):
        return label.replace(", rate", f", η = {setting:g}, rate")
    return label if setting is None else f"{label} = {setting:g}"


def percent(entry, name):
    mean, spread = (100 * entry[name][key] for key in ("mean", "sd"))
    return f"{mean:.0f} ± {spread:.0f} %" if entry["seeds"] > 1 else f"{mean:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--add", type=pathlib.Path, nargs="+", default=[], help="earlier results")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", type=float, nargs="+", default=ESD_RATES, help="of ESD")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "prompts.json"
    rows = rows_of(arguments.add)

    def write():
        result = {
            "command": "python benchmarks/prompts.py",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
            "summary": {
                name: summarise([row for row in rows if row["task"] == name])
                for name in dict.fromkeys(row["task"] for row in rows)
            },
            "runs": rows,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")

    for seed in arguments.seeds:
        for name in arguments.tasks:
            for row in study(name, seed, arguments.methods, arguments.rates):
                rows = replaced(rows, {"seed": seed, "task": name, **row})
                print(json.dumps(rows[-1]), flush=True)
                write()
    write()
    print("| forgotten | | UA | UA' | IRA | CRA | KID | path KL of kept | constraint | seeds |")
    for name in dict.fromkeys(row["task"] for row in rows):
        print_table(name, [row for row in rows if row["task"] == name])


if __name__ == "__main__":
    main()
