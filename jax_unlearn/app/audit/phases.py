"""What is measured, phase by phase, and how the results of each are kept."""

import json
import pathlib
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jax_unlearn.app.audit import attacks, measures
from jax_unlearn.app.audit.attacks import Tools
from jax_unlearn.app.audit.subject import Concept, Target
from jax_unlearn.app.files import replace_file
from jax_unlearn.app.identity import digest_of
from jax_unlearn.app.terminal import say
from jax_unlearn.models.files import read_json

__all__ = ["Kept", "phases_of"]


class Kept:
    """Results of phases on disk, a json file each, and its arrays beside it."""

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
            if stored["arrays"]:
                with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                    result = result | {name: arrays[name] for name in stored["arrays"]}
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            say(f"{path} is damaged: measured again.")
            return None
        return result

    def put(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measures and keeps."""
        started = time.monotonic()
        result = measure() | {"seconds": 0.0}
        result["seconds"] = round(time.monotonic() - started, 2)
        arrays = {key: value for key, value in result.items() if isinstance(value, np.ndarray)}
        if arrays:
            with self._path(name).with_suffix(".npz").open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        plain = {key: value for key, value in result.items() if key not in arrays}
        plain = json.loads(json.dumps(plain))
        stored = {"audit": self._digest, "digest": digest_of([name, plain]), "result": plain}
        stored["arrays"] = [*arrays]
        replace_file(self._path(name), (json.dumps(stored) + "\n").encode())
        return result


def phases_of(
    tools: Tools, functions: Mapping[str, attacks.Attack]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that is measured, by name, in order."""
    subject = tools.subject
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def drawing(attack: attacks.Attack, target: Target, concept: Concept) -> Any:
        def measure() -> dict[str, Any]:
            rows, images = tools.judged(attack(target, concept), concept)
            return {"rows": [row._asdict() for row in rows], "images": images}

        return measure

    every = [
        (f"{concept.name}, {name}", *side)
        for concept in subject.concepts
        for name, side in subject.sides(concept).items()
    ]
    for name, target, concept in every:
        found[f"forgotten, {name}"] = partial(_forgotten, tools, target, concept)
    for concept in subject.concepts:
        for name, target in subject.targets.items():
            measure = partial(measures.likelihoods, tools, target, concept)
            found[f"likelihood, {concept.name}, {name}"] = measure
    found["kept"] = partial(_kept, tools)
    found["path KL"] = partial(_path_kls, tools)
    for attack, function in functions.items():
        for name, target, concept in every:
            found[f"{attack}, {name}"] = drawing(function, target, concept)
    return found


def _forgotten(tools: Tools, target: Target, concept: Concept) -> dict[str, Any]:
    """Samples without an attack: what they show, and the nearest to each image of the concept."""
    drawn = list(measures.forgotten(tools, target, concept))
    rows, images = tools.judged(drawn, concept)
    found: dict[str, Any] = {"rows": [row._asdict() for row in rows], "images": images}
    if concept.lost:
        # The last are under the forgotten conditions, guided as the options say.
        found["named"] = measures.named_as(tools, tools.forgotten(concept), drawn[-1].images)
    if concept.source != "samples of the reference":
        every = np.concatenate([one.images for one in drawn])
        found["nearest"], found["near"] = measures.nearest(tools, concept, every)
        found["samples"] = len(every)
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
