"""The report of an audit: rows of the targets side by side, from what its phases measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_unlearn import metrics
from jax_unlearn.app.audit import attacks
from jax_unlearn.app.audit.attacks import Row, Tools
from jax_unlearn.app.audit.copies import Space
from jax_unlearn.app.audit.options import LEAST
from jax_unlearn.app.audit.scores import averaged, interval, scores
from jax_unlearn.app.audit.subject import Concept, Subject
from jax_unlearn.app.run_file import plain_options

__all__ = ["report_of"]


def report_of(
    tools: Tools, functions: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """All that was asked and measured, but for the verdict and where it was measured.

    Args:
      tools: what was audited.
      functions: the attacks that were made, by name.
      results: of each phase, by name; see `phases_of`.
    """
    subject, options = tools.subject, tools.options
    targets = [*subject.targets]
    kept = results["kept"]

    def table(phase: str, key: str) -> list[dict[str, Any]]:
        """Rows of one phase, the targets side by side."""
        found = []
        for concept in subject.concepts:
            sides = {
                name: [Row(**row) for row in results[f"{phase}, {concept.name}, {name}"]["rows"]]
                for name in subject.sides(concept)
            }
            for number, row in enumerate(sides["model"]):
                entry: dict[str, Any] = {"concept": concept.name, "settings": row.settings}
                entry |= {key: row.budget, "oracle": None}
                for name, rows in sides.items():
                    entry[name] = interval(rows[number].hits, rows[number].count)
                found.append(entry)
        return found

    recoverable = [
        {"attack": attack, **row} for attack in functions for row in table(attack, "budget")
    ]
    too = []
    for concept in subject.concepts:
        every = {name: results[f"likelihood, {concept.name}, {name}"] for name in targets}
        # What tells the forgotten images to whoever has both checkpoints.
        every["rise"] = {
            part: (np.array(every["model"][part]) - np.array(every["reference"][part])).tolist()
            for part in ("forgotten", "unseen")
            if part in every["model"]
        }
        entry: dict[str, Any] = {"concept": concept.name}
        too.append(entry | {name: _told(one) for name, one in every.items()})
    harmed = {
        "agreement": {name: interval(*pair) for name, pair in kept["agreement"].items()},
        "conditions": {
            c: {name: interval(*pair) for name, pair in sides.items()}
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
                    "images": len(one.images),
                    "attacked": len(one.x_0),
                    "unseen": 0 if one.unseen is None else len(one.unseen),
                    "source": one.source,
                    "copies": None if one.copies is None else _copies(one),
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
        "nearest": [
            _nearest(tools, concept, results)
            for concept in subject.concepts
            if "nearest" in results[f"forgotten, {concept.name}, model"]
        ],
        "scores": scores(
            options.guidance,
            forgotten,
            recoverable,
            harmed["agreement"] or None,
            {name: _domains(subject, results, name) for name in targets if subject.domains},
        ),
    }


def _told(values: Mapping[str, list[float]]) -> dict[str, Any]:
    """Losses of forgotten and of unseen images, and how well they tell one from the other."""
    parts = {part: values[part] for part in ("forgotten", "unseen") if part in values}
    found: dict[str, Any] = {
        part: {"mean": float(np.mean(own)), "values": own} for part, own in parts.items()
    }
    if min(len(values["forgotten"]), len(values.get("unseen", ()))) >= LEAST:
        told = metrics.membership(np.array(values["forgotten"]), np.array(values["unseen"]))
        sides = {"at_low_rates": told.at_low_rates, "too_forgotten_at": told.too_forgotten_at}
        found["membership"] = {"auc": told.auc._asdict()} | {
            name: [{"rate": rate, **one._asdict()} for rate, one in rates.items()]
            for name, rates in sides.items()
        }
    return found


def _copies(concept: Concept) -> dict[str, Any]:
    """What makes a copy, for the report."""
    assert concept.copies is not None
    space, (distance, rate, count) = concept.copies.space, concept.copies.threshold
    return {
        "space": space.name,
        "distance": distance,
        "similarity": _similarity(space, distance),
        "rate": rate,
        "count": count,
    }


def _similarity(space: Space, distance: float) -> float | None:
    """The cosine of unit vectors at a distance."""
    return 1 - distance**2 / 2 if space.cosine else None


def _nearest(tools: Tools, concept: Concept, results: Mapping[str, Any]) -> dict[str, Any]:
    """Of each image of a concept the distance to the nearest sample, by space and by model."""
    sides = {
        name: results[f"forgotten, {concept.name}, {name}"] for name in tools.subject.sides(concept)
    }
    found: dict[str, Any] = {"concept": concept.name, "samples": sides["model"]["samples"]}
    found["spaces"] = [
        {
            "name": space.name,
            "cosine": space.cosine,
            **{
                name: [
                    {"distance": one, "similarity": _similarity(space, one)}
                    for one in side["nearest"][space.name]
                ]
                for name, side in sides.items()
            },
        }
        for space in tools.subject.spaces
    ]
    found["copied"] = None
    if concept.copies is not None:
        found["copied"] = {}
        for name, (_, one) in tools.subject.sides(concept).items():
            assert one.copies is not None
            near = np.array(sides[name]["nearest"][one.copies.space.name])
            hits = int((near < one.copies.threshold.distance).sum())
            found["copied"][name] = interval(hits, len(near))
    return found


def _domains(subject: Subject, results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """IRA and CRA of a model: of kept conditions, and across domains of the forgotten too."""
    assert subject.domains is not None
    named = dict(results["kept"]["named"][name])
    for concept in subject.concepts:
        named |= results[f"forgotten, {concept.name}, {name}"]["named"]
    numbered = {int(c): classes for c, classes in named.items()}
    return {
        "IRA": averaged(subject.domains.inner, numbered),
        "CRA": averaged(subject.domains.cross, numbered),
    }
