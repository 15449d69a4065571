"""One audit from options to page: phases that are kept as they end, and what is made of them."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_unlearn.app import verify
from jax_unlearn.app.audit import attacks
from jax_unlearn.app.audit.attacks import Tools
from jax_unlearn.app.audit.drawing import NOISE
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.page import verdict, write_page
from jax_unlearn.app.audit.phases import phases_of
from jax_unlearn.app.audit.report import report_of
from jax_unlearn.app.audit.subject import Subject, load_subject
from jax_unlearn.app.files import explained_if_full
from jax_unlearn.app.folder import check_folder, claim
from jax_unlearn.app.identity import (
    digest_of,
    digests_at,
    leaf_digests,
    leaf_kinds,
    versions,
)
from jax_unlearn.app.kept import Kept
from jax_unlearn.app.run_file import plain_options, save_run
from jax_unlearn.app.stopping import stop_signals
from jax_unlearn.models.files import read_json

__all__ = ["audit"]

# Where results lie, and how the command was started.
_NO_MATTER = ("out", "reference", "model", "oracle", "clip", "judge", "sscd", "images", "unseen")


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
    with (
        explained_if_full(options.out, again),
        claim(options),
        stop_signals(f"stopped; nothing measured is lost. Go on with: {again}"),
    ):
        return _audit(tools, functions)


def _audit(tools: Tools, functions: Mapping[str, attacks.Attack]) -> dict[str, Any]:
    subject, options = tools.subject, tools.options
    out = options.out
    identity = _identity(subject, options)
    _begin(options, identity)
    phases = phases_of(tools, functions)
    kept = Kept(out / "phases", digest_of(identity))
    results: dict[str, Any] = {}
    seconds = 0.0
    with tqdm(phases.items(), unit="phase", dynamic_ncols=True) as bar:
        for name, measure in bar:
            bar.set_postfix_str(name)
            results[name] = kept.get(name) or kept.put(name, measure)
            seconds += results[name]["seconds"]
    report = report_of(tools, functions, results)
    report |= {
        "identity": identity | {"digest": digest_of(identity)},
        "seeds": {
            "audit": options.seed,
            "noise": {name: [options.seed, number] for name, number in NOISE.items()},
            "restarts": options.restarts,
        },
        "versions": versions(),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "seconds": round(seconds, 1),
    }
    report["verdict"] = verdict(report)
    arrays = {
        name: {key: part for key, part in result.items() if isinstance(part, np.ndarray)}
        for name, result in results.items()
    }
    write_page(out, report, arrays, {one.name: one.images for one in subject.concepts})
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
    parts = {}
    for one in subject.concepts:
        own: dict[str, Any] = {
            "x_0": one.x_0,
            "cond": one.cond,
            "unseen": one.unseen,
            "of": one.unseen_cond,
        }
        for name, part in (("images", one), ("control", one.control)):
            if part is not None and part.copies is not None:
                threshold = np.array(part.copies.threshold)
                own[name] = {"pixels": part.images, "cond": part.cond, "threshold": threshold}
        parts[one.name] = own
    inputs = {
        "conditions": digest_of([subject.conditions.names, subject.kept, subject.shown]),
        "images": digest_of(leaf_digests(parts)),
    }
    for name in ("judge", "clip", "sscd"):
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
