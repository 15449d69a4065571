"""One audit from options to page: phases that are kept as they end, and what is made of them."""

import json
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_unlearn import metrics
from jax_unlearn.app import verify
from jax_unlearn.app.audit import attacks, measures
from jax_unlearn.app.audit.attacks import Row, Tools
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.page import verdict, write_page
from jax_unlearn.app.audit.subject import Concept, Subject, Target, load_subject
from jax_unlearn.app.files import DiskFull, is_full, replace_file
from jax_unlearn.app.folder import check_folder, claim
from jax_unlearn.app.identity import (
    digest_of,
    digests_at,
    leaf_digests,
    leaf_kinds,
    versions,
)
from jax_unlearn.app.run_file import plain_options, save_run
from jax_unlearn.app.stopping import stop_signals
from jax_unlearn.app.terminal import say
from jax_unlearn.models.files import read_json

__all__ = ["audit"]

# Where results lie, and how the command was started.
_NO_MATTER = ("out", "reference", "model", "oracle", "clip", "judge", "images", "unseen")


def audit(options: AuditOptions) -> dict[str, Any]:
    """Audits, and writes report.json and report.html into options.out.

    Each phase is written when it ends, and not measured again by --resume.

    Returns:
      The report.

    Raises:
      ValueError: for models that cannot be compared or a folder in use; see `load_subject`.
      Interrupted: after SIGINT or SIGTERM; finished phases are kept.
      DiskFull: if it is.
    """
    again = f"jax-unlearn audit --out {options.out} --resume"
    check_folder(options)
    subject = load_subject(options)
    tools = attacks.make_tools(subject, options)
    functions = attacks.attempts(tools)
    try:
        with (
            claim(options),
            stop_signals(f"stopped; nothing measured is lost. Go on with: {again}"),
        ):
            return _audit(tools, functions)
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFull(f"the disk of {options.out} is full: free some space, then {again}.") from (
            error
        )


def _audit(tools: Tools, functions: Mapping[str, attacks.Attack]) -> dict[str, Any]:
    subject, options = tools.subject, tools.options
    out = options.out
    identity = _identity(subject, options)
    _begin(options, identity)
    phases = _phases(tools, functions)
    kept = _Kept(out / "phases", digest_of(identity))
    results: dict[str, Any] = {}
    seconds = 0.0
    with tqdm(phases.items(), unit="phase", dynamic_ncols=True) as bar:
        for name, measure in bar:
            bar.set_postfix_str(name)
            results[name] = kept.get(name) or kept.put(name, measure)
            seconds += results[name]["seconds"]
    report = _report(tools, functions, results)
    report |= {
        "identity": identity | {"digest": digest_of(identity)},
        "seeds": [options.seed],
        "versions": versions(),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "seconds": round(seconds, 1),
    }
    report["verdict"] = verdict(report)
    images = {name: result["images"] for name, result in results.items() if "images" in result}
    write_page(out, report, images)
    verify.write_sums(out)
    return report


def _identity(subject: Subject, options: AuditOptions) -> dict[str, Any]:
    """What determines the numbers."""
    kept = {name: value for name, value in plain_options(options).items() if name not in _NO_MATTER}
    models = {
        name: digest_of([leaf_kinds(tree), leaf_digests(tree)])
        for name, one in subject.targets.items()
        for tree in [{"params": one.params, "table": one.table}]
    }
    parts = {
        one.name: {"x_0": one.x_0, "cond": one.cond, "unseen": one.unseen, "of": one.unseen_cond}
        for one in subject.concepts
    }
    inputs = {
        "conditions": digest_of([subject.conditions.names, subject.kept, subject.shown]),
        "images": digest_of(leaf_digests(parts)),
    }
    for name in ("judge", "clip"):
        if (path := getattr(options, name)) is not None:
            inputs[name] = digest_of(digests_at(path))
    return json.loads(
        json.dumps(
            {
                "command": "audit",
                "options": kept,
                "models": models,
                "inputs": inputs,
                "versions": versions(),
            }
        )
    )


def _begin(options: AuditOptions, identity: Mapping[str, Any]) -> None:
    """Writes run.json, or compares with it.

    Raises:
      ValueError: naming what differs from the audit that is resumed.
    """
    path = options.out / "run.json"
    if not options.resume:
        save_run(path, "audit", options, identity=identity, digest=digest_of(identity))
        return
    saved = read_json(path).get("identity")
    if not isinstance(saved, dict):
        raise ValueError(f"{path} does not say which audit it is of: start anew.")
    differing = [
        f"{part} {name}"
        for part in ("options", "models", "inputs", "versions")
        for name in sorted({*saved.get(part, {}), *identity[part]})
        if saved.get(part, {}).get(name) != identity[part].get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} is of another audit: {', '.join(differing)} differ. Start another with "
            "another --out."
        )


class _Kept:
    """Results of phases on disk, a json file each, and its images beside it."""

    def __init__(self, folder: pathlib.Path, digest: str) -> None:
        self._folder, self._digest = folder, digest
        folder.mkdir(exist_ok=True)

    def _path(self, name: str) -> pathlib.Path:
        return self._folder / (re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() + ".json")

    def get(self, name: str) -> dict[str, Any] | None:
        """What was kept, or None; what is damaged is measured again."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            stored = read_json(path)
            result, digest = stored["result"], stored["digest"]
            if (stored["audit"], digest) != (self._digest, digest_of([name, result])):
                raise ValueError
            if "images" in result:
                image_path = path.with_suffix(".npy")
                result = result | {"images": np.load(image_path, allow_pickle=False)}
        except (ValueError, KeyError, OSError):
            say(f"{path} is damaged: measured again.")
            return None
        return result

    def put(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measures and keeps."""
        started = time.monotonic()
        result = measure() | {"seconds": 0.0}
        result["seconds"] = round(time.monotonic() - started, 2)
        plain = {key: value for key, value in result.items() if key != "images"}
        if "images" in result:
            with self._path(name).with_suffix(".npy").open("wb") as file:
                np.save(file, result["images"])
            plain["images"] = True
        plain = json.loads(json.dumps(plain))
        stored = {"audit": self._digest, "digest": digest_of([name, plain]), "result": plain}
        replace_file(self._path(name), (json.dumps(stored) + "\n").encode())
        return result


def _phases(
    tools: Tools, functions: Mapping[str, attacks.Attack]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that is measured, by name, in order."""
    subject = tools.subject
    targets = subject.targets
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def drawing(attack: attacks.Attack, target: Target, concept: Concept) -> Any:
        def measure() -> dict[str, Any]:
            rows, images = tools.judged(attack(target, concept), concept)
            return {"rows": [row._asdict() for row in rows], "images": images}

        return measure

    shown = partial(measures.forgotten, tools)
    every = [(concept, target) for concept in subject.concepts for target in targets.values()]
    for concept, target in every:
        name = f"{concept.name}, {target.name}"
        found[f"forgotten, {name}"] = drawing(shown, target, concept)
        found[f"likelihood, {name}"] = partial(measures.likelihoods, tools, target, concept)
    found["kept"] = partial(_kept, tools)
    found["path KL"] = partial(_path_kls, tools)
    for attack, function in functions.items():
        for concept, target in every:
            found[f"{attack}, {concept.name}, {target.name}"] = drawing(function, target, concept)
    return found


def _kept(tools: Tools) -> dict[str, Any]:
    targets = tools.subject.targets
    samples = {
        name: measures.kept_samples(tools, targets[name], 2) for name in ("model", "reference")
    }
    again = measures.kept_samples(tools, targets["reference"], 4)
    oracle = targets.get("oracle")
    theirs = None if oracle is None else measures.kept_samples(tools, oracle, 2)
    found = measures.harmed(tools, samples, again, theirs)
    rows = [one[:, :1].reshape(-1, *one.shape[2:]) for one in samples.values()]
    return found | {"images": np.concatenate([row[: attacks.SHOWN] for row in rows])}


def _path_kls(tools: Tools) -> dict[str, Any]:
    targets, subject = tools.subject.targets, tools.subject
    others = [targets[name] for name in ("reference", "oracle") if name in targets]
    lost = [c for concept in subject.concepts for c in concept.forgotten]
    return {
        "kept": measures.path_kls(tools, targets["model"], others, subject.kept),
        "forgotten": measures.path_kls(tools, targets["model"], others, lost),
    }


def _interval(hits: int, count: int) -> dict[str, Any]:
    return metrics.binomial_interval(hits, count)._asdict()


def _report(
    tools: Tools, functions: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    subject, options = tools.subject, tools.options
    targets = [*subject.targets]

    def table(phase: str, key: str) -> list[dict[str, Any]]:
        """Rows of one phase, the targets side by side."""
        found = []
        for concept in subject.concepts:
            sides = {
                name: [Row(**row) for row in results[f"{phase}, {concept.name}, {name}"]["rows"]]
                for name in targets
            }
            for number, row in enumerate(sides["model"]):
                entry: dict[str, Any] = {"concept": concept.name, "settings": row.settings}
                entry |= {key: row.budget, "oracle": None}
                for name, rows in sides.items():
                    entry[name] = _interval(rows[number].hits, rows[number].count)
                found.append(entry)
        return found

    recoverable = [
        {"attack": attack, **row} for attack in functions for row in table(attack, "budget")
    ]
    too = []
    for concept in subject.concepts:
        entry: dict[str, Any] = {"concept": concept.name}
        for name in targets:
            values = results[f"likelihood, {concept.name}, {name}"]
            own: dict[str, Any] = {
                part: {"mean": float(np.mean(values[part])), "values": values[part]}
                for part in ("forgotten", "unseen")
                if part in values
            }
            if "unseen" in values:
                told = metrics.membership(values["forgotten"], values["unseen"])
                own["membership"] = {
                    "auc": told.auc._asdict(),
                    **{
                        part: [{"rate": rate, **one._asdict()} for rate, one in rates.items()]
                        for part, rates in (
                            ("at_low_rates", told.at_low_rates),
                            ("too_forgotten_at", told.too_forgotten_at),
                        )
                    },
                }
            entry[name] = own
        too.append(entry)
    kept = results["kept"]
    harmed = {
        "agreement": {name: _interval(*pair) for name, pair in kept["agreement"].items()},
        "conditions": {
            c: {name: _interval(*pair) for name, pair in sides.items()}
            for c, sides in kept["conditions"].items()
        },
        **{name: kept[name] for name in kept if name.startswith(("kid_", "neighbours_"))},
        "path_kl": {part: results["path KL"][part] for part in ("kept", "forgotten")},
    }
    forgotten = table("forgotten", "scale")
    forgotten.sort(key=lambda row: (row["settings"]["what"] == "paraphrases", row["scale"]))
    return {
        "kind": "audit",
        "asked": {
            "command": "audit",
            "reference": options.reference,
            "model": options.model,
            "oracle": options.oracle or None,
            "concepts": [
                {
                    "name": one.name,
                    "conditions": [subject.conditions.names[c] for c in one.forgotten],
                    "images": len(one.x_0),
                    "unseen": 0 if one.unseen is None else len(one.unseen),
                    "source": one.source,
                }
                for one in subject.concepts
            ],
            "paraphrases": [subject.conditions.names[c] for c in subject.shown],
            "kept": [subject.conditions.names[c] for c in subject.kept],
            "start": subject.conditions.names[subject.start],
            "options": plain_options(options),
            "not_made": attacks.unavailable(subject),
        },
        "forgotten": forgotten,
        "too_forgotten": too,
        "recoverable": recoverable,
        "harmed": harmed,
        "scores": _scores(options, forgotten, recoverable, harmed),
    }


def _scores(
    options: AuditOptions,
    forgotten: list[dict[str, Any]],
    recoverable: list[dict[str, Any]],
    harmed: Mapping[str, Any],
) -> dict[str, Any]:
    """UA and RA, in the words of UnlearnCanvas, and ERR over the attacks on conditions."""
    own = [
        row["model"]["value"]
        for row in forgotten
        if row["scale"] == options.guidance and row["settings"]["what"] != "paraphrases"
    ] or [row["model"]["value"] for row in forgotten]
    unlearning = 1 - float(np.mean(own))
    retained = harmed["agreement"]["model"]["value"]
    attacked = [
        row["model"]["value"]
        for row in recoverable
        if row["attack"] in ("inversion", "unlearndiffatk")
    ]
    found: dict[str, Any] = {"UA": unlearning, "RA": retained, "robustness": None, "ERR": None}
    if attacked:
        found["robustness"] = 1 - max(attacked)
        shares = (unlearning, retained, found["robustness"])
        found["ERR"] = float(metrics.harmonic_mean(*shares))
    return found
