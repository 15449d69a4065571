"""UA, IRA, CRA and RA, in the words and averages of UnlearnCanvas, and ERR."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_unlearn import metrics

__all__ = ["averaged", "interval", "scores"]

_ON_CONDITIONS = ("inversion", "unlearndiffatk")


def interval(hits: int, count: int) -> dict[str, Any]:
    """A share as the report has it."""
    return metrics.binomial_interval(hits, count)._asdict()


def averaged(
    right: Mapping[int, tuple[str, Sequence[int]]], named: Mapping[int, Sequence[int]]
) -> dict[str, Any] | None:
    """Accuracy averaged over the concepts of a domain, each over its conditions.

    Zhang et al., UnlearnCanvas, 2024: a concept's accuracy is over all samples that were asked
    for it, in every combination with the other domain. All concepts weigh the same.

    Args:
      right: condition -> its concept in this domain, and the classes that are right for it.
      named: condition -> the class that the judge gives each of its samples.

    Returns:
      "value", "count" (samples), "concepts" (each with the interval of its samples); None for a
      domain without conditions.
    """
    shares: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}
    for c, (concept, classes) in right.items():
        hits = np.isin(named[c], classes)
        shares.setdefault(concept, []).append(float(hits.mean()))
        total = counts.setdefault(concept, [0, 0])
        total[0] += int(hits.sum())
        total[1] += len(hits)
    if not shares:
        return None
    return {
        "value": float(np.mean([np.mean(own) for own in shares.values()])),
        "count": sum(count for _, count in counts.values()),
        "concepts": {concept: interval(*pair) for concept, pair in counts.items()},
    }


def scores(
    guidance: float,
    forgotten: Sequence[Mapping[str, Any]],
    recoverable: Sequence[Mapping[str, Any]],
    agreement: Mapping[str, Any] | None,
    domains: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The scores of a report.

    Args:
      guidance: the scale that UA is measured at.
      forgotten: rows of it.
      recoverable: rows of it.
      agreement: the share of kept samples that are named right, by model; None without a judge.
      domains: by model, "IRA" and "CRA" as `averaged` has them; nothing where none are known.

    Returns:
      UA, RA, IRA, CRA, robustness and ERR of the model, None where they are not known; "sides",
      the first four of every model; "domains".
    """
    sides: dict[str, dict[str, Any]] = {}
    for name in ("model", "reference", "oracle"):
        own = [row for row in forgotten if row.get(name)]
        asked = [
            row[name]["value"]
            for row in own
            if row["scale"] == guidance and row["settings"]["what"] != "paraphrases"
        ] or [row[name]["value"] for row in own]
        if not asked:
            continue
        sides[name] = {
            "UA": 1 - float(np.mean(asked)),
            "RA": agreement[name]["value"] if agreement and name in agreement else None,
            **{
                part: (domains.get(name, {}).get(part) or {}).get("value")
                for part in ("IRA", "CRA")
            },
        }
    attacked = [row["model"]["value"] for row in recoverable if row["attack"] in _ON_CONDITIONS]
    found: dict[str, Any] = {**sides["model"], "robustness": None, "ERR": None}
    if attacked:
        found["robustness"] = 1 - max(attacked)
    parts = found["UA"], found["RA"], found["robustness"]
    if None not in parts:
        found["ERR"] = float(metrics.harmonic_mean(*parts))
    return found | {"sides": sides, "domains": dict(domains)}
