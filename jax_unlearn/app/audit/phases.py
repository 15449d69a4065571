"""What is measured, phase by phase."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jax_unlearn.app.audit import attacks, measures
from jax_unlearn.app.audit.attacks import Tools
from jax_unlearn.app.audit.subject import Concept, Target

__all__ = ["phases_of"]


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
