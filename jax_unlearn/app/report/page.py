"""The page of a report: numbers as text, the verdict, the tables, and the HTML."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np

__all__ = [
    "certificate_of",
    "environment",
    "formulation_of",
    "method_of",
    "number",
    "render",
    "render_comparison",
    "standing_of",
    "verdict",
]

_MAX_LISTED = 20
"""Above this many constraints the table shows the worst."""
_FORMULATIONS = {
    "reverse_kl": "Reverse KL",
    "forward_kl": "Forward KL",
    "likelihood": "Likelihood",
    "without": "Under any condition",
}
_ENOUGH = 20
"""Fewer effective samples than this under a floor are said to be few."""
_METRICS = (
    (
        "Classifier agreement",
        "How often a classifier gives each label to generated images.",
        ("agreement",),
    ),
    ("Forgotten concepts seen", "", ("named_forgotten",)),
    (
        "Image quality",
        "Distances between generated and retained images; lower is closer. "
        "An unbiased KID can be negative.",
        ("kid", "fid"),
    ),
    (
        "Likelihood",
        "NELBO, an upper bound of −log p; higher is less likely under the model. A forgotten image "
        "that is less likely than held-out images are would itself stand out.",
        ("nelbo",),
    ),
    ("Similarity", "Between generated images and those to forget.", ("similarity",)),
)
_STANDINGS = {
    "none": "– No thresholds",
    "violated": "✗ Constraints violated",
    "close": "– Constraints satisfied within their errors",
    "satisfied": "✓ Constraints satisfied",
}
_METRIC_NAMES = {"kid": "KID", "fid": "FID", "nelbo": "NELBO"}


def environment() -> jinja2.Environment:
    """Where the templates are, with the filters that they share."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("jax_unlearn.app.report", ""),
        autoescape=jinja2.select_autoescape(("html",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(data=_data, duration=_duration, standing=_STANDINGS.__getitem__)
    return found


def _digits(value: float, stderr: float | None) -> str:
    """Four significant digits, or as many decimals as two digits of the standard error take."""
    if not math.isfinite(value):
        return str(value)
    scale = stderr if stderr and math.isfinite(stderr) else None
    size = abs(value) if scale is None else max(abs(value), scale)
    if value == 0 and scale is None:
        return "0"
    if not 1e-4 <= size < 1e6:
        return f"{value:.3e}".replace("-", "−")
    decimals = (1 - math.floor(math.log10(scale))) if scale else 3 - math.floor(math.log10(size))
    text = f"{value:.{min(max(decimals, 0), 8)}f}"
    if scale is None and "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def number(value: Any, stderr: float | None = None) -> str:
    """A number as text: four significant digits, or as many as two of its standard error take."""
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) and stderr is None:
        return f"{value:,}".replace("-", "−")
    text = _digits(value, stderr)
    return text if stderr is None else f"{text} ± {_digits(stderr, stderr)}"


def _data(value: Any, stderr: float | None = None) -> markupsafe.Markup:
    """A rounded number, with every digit of it in the attribute."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return markupsafe.escape(number(value))
    exact = repr(value) if stderr is None else f"{value!r} ± {stderr!r}"
    return markupsafe.Markup('<data value="{}" title="{}">{}</data>').format(
        repr(value), exact, number(value, stderr)
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _thresholded(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The constraints that have a threshold, the worst first; one without a slack is worst."""
    constraints = [c for c in report["constraints"] if c["threshold"] is not None]

    def slack(constraint: Mapping[str, Any]) -> float:
        value = constraint["slack"]
        return -math.inf if value is None or math.isnan(value) else value

    return sorted(constraints, key=lambda c: (bool(c["satisfied"]), slack(c)))


def _unresolved(constraint: Mapping[str, Any]) -> bool:
    slack, stderr = constraint["slack"], constraint["stderr"]
    return slack is not None and stderr is not None and abs(slack) < 2 * stderr


def _missed(constraint: Mapping[str, Any]) -> bool:
    """Whether a constraint is satisfied within its error alone, on the wrong side."""
    slack = constraint["slack"]
    return bool(constraint["satisfied"]) and slack is not None and slack < 0


def standing_of(report: Mapping[str, Any]) -> str:
    """One word for all constraints: the class of the verdict in the style sheet."""
    constraints = _thresholded(report)
    if not constraints:
        return "none"
    if not report["feasible"]:
        return "violated"
    return "close" if any(map(_missed, constraints)) else "satisfied"


def formulation_of(report: Mapping[str, Any]) -> tuple[str, str]:
    """What was solved: its name, and the formula."""
    name = report["formulation"]
    return _FORMULATIONS.get(name, name), report.get("formula", "")


def method_of(report: Mapping[str, Any]) -> str:
    """What trained the model, where its constraints only measured it; else ""."""
    method = report.get("method")
    if method is None:
        return ""
    if method["strength"] is None:
        return method["title"]
    return f"{method['title']}, {method['symbol']} = {number(float(method['strength']))}"


def _side(report: Mapping[str, Any]) -> str:
    return "at most" if report["formulation"] in ("likelihood", "without") else "at least"


def verdict(report: Mapping[str, Any]) -> str:
    """Says in one or two sentences whether the constraints hold, and how closely.

    Names the worst constraint, its value, its slack and its multiplier. That a threshold was not
    reached is an answer too, and so is that the samples are too few to tell.

    Args:
      report: a report in the form that `write_report` takes.

    Raises:
      ValueError: if `feasible` contradicts the constraints' own `satisfied`.
    """
    constraints = _thresholded(report)
    violated = [c for c in constraints if not c["satisfied"]]
    if bool(report["feasible"]) != (not violated):
        raise ValueError(
            f"the report says feasible={report['feasible']}, yet {len(violated)} of "
            f"{len(constraints)} constraints are not satisfied: compute one from the other."
        )
    if not constraints:
        return "No threshold was set, so there is no constraint to satisfy or to violate."
    worst, total = constraints[0], len(constraints)
    standing = standing_of(report)
    word = "satisfied within two standard errors" if standing == "close" else standing
    if total == 1:
        head = f"The constraint “{worst['name']}” is {word}"
        subject = "it ends"
    else:
        if len(violated) in (0, total):
            count = "Both" if total == 2 else f"All {total:,}"
        else:
            count = f"{len(violated):,} of {total:,}"
        head = f"{count} constraints {'is' if len(violated) == 1 else 'are'} {word}"
        subject = f"the {'worst' if violated else 'tightest'} is “{worst['name']}”"
    unit = f" {worst['unit']}" if worst.get("unit") else ""
    threshold = f"threshold {_side(report)} {number(worst['threshold'])}"
    multiplier = f", multiplier {number(worst['multiplier'])}"
    if worst["multiplier"] is None:  # of a baseline
        multiplier = ""
    value, slack = worst["value"], worst["slack"]
    if value is None or slack is None or not (math.isfinite(value) and math.isfinite(slack)):
        return f"{head}; {subject} at no finite value ({threshold}{unit}{multiplier})."
    gap = f"{'missed by' if slack < 0 else 'slack'} {number(abs(slack))}"
    value = f"{number(value, worst['stderr'])}{unit}"
    sentence = f"{head}; {subject} at {value} ({threshold}, {gap}{multiplier})."
    if _unresolved(worst):
        sentence += " That is within two standard errors of the threshold, too close to call."
    if method := method_of(report):
        sentence += f" The model was trained by {method}."
    return sentence


def _cell(entry: Any) -> tuple[Any, float | None, int | None]:
    """Value, standard error and count of a float or of {"value" or "rate", "stderr", "count"}."""
    if isinstance(entry, Mapping):
        return entry.get("value", entry.get("rate")), entry.get("stderr"), entry.get("count")
    return entry, None, None


def _metric_rows(names: tuple[str, ...], node: Any) -> list[dict[str, Any]]:
    """The rows of a metric: {"before", "after"}, with names of parts outside or inside of it."""
    if not isinstance(node, Mapping) or {"value", "rate"} & set(node):
        empty = _cell(None)
        return [{"names": names, "before": empty, "after": _cell(node), "change": empty}]
    if not {"before", "after"} & set(node):
        parts = [(key, entry) for key, entry in node.items() if key not in ("unit", "description")]
        return [row for key, entry in parts for row in _metric_rows((*names, key), entry)]
    sides = {side: node.get(side) for side in ("before", "after", "change")}
    inner: dict[str, None] = {}
    for entry in sides.values():
        if isinstance(entry, Mapping) and not {"value", "rate"} & set(entry):
            inner.update(dict.fromkeys(entry))
    if not inner:
        return [{"names": names, **{side: _cell(entry) for side, entry in sides.items()}}]
    parts = [(key, {side: (e or {}).get(key) for side, e in sides.items()}) for key in inner]
    return [row for key, entry in parts for row in _metric_rows((*names, key), entry)]


def _metric_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each group of metrics that the report has, with its rows and unit."""
    metrics = report.get("metrics") or {}
    known = {key for _, _, keys in _METRICS for key in keys}
    rest = ("Further metrics", "", tuple(key for key in metrics if key not in known))
    forgotten = {str(f.get(key)) for f in report["asked"]["forget"] for key in ("label", "name")}
    tables = []
    for title, caption, keys in (*_METRICS, rest):
        present = [key for key in keys if metrics.get(key) is not None]
        rows = [row for key in present for row in _metric_rows((key,), metrics[key])]
        nodes = [metrics[key] for key in present if isinstance(metrics[key], Mapping)]
        for row in rows:
            names = row["names"] if len(keys) > 1 or len(row["names"]) == 1 else row["names"][1:]
            row["name"] = " · ".join(_METRIC_NAMES.get(n, n.replace("_", " ")) for n in names)
            row["forgotten"] = present == ["agreement"] and names[-1] in forgotten
        notes = [str(node["description"]) for node in nodes if node.get("description")]
        units = [str(node["unit"]) for node in nodes if node.get("unit")]
        if rows:
            tables.append(
                {
                    "title": title,
                    "caption": " ".join(notes) or caption,
                    "unit": units[0] if len(units) == 1 and len(present) == 1 else "",
                    "rows": rows,
                    "counted": any(
                        row[s][2] is not None for row in rows for s in ("before", "after")
                    ),
                    "changed": any(row["change"][0] is not None for row in rows),
                    "bars": present == ["agreement"],
                }
            )
    return tables


def certificate_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate's rows, the worst ones where there are many, and what they summarise."""
    constraints = report["constraints"]
    ordered = _thresholded(report)
    shown = ordered[:_MAX_LISTED] if len(constraints) > _MAX_LISTED else constraints
    multipliers = [c["multiplier"] for c in constraints if c["multiplier"] is not None]
    probabilities = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}
    quantiles = {}
    if multipliers:
        for name, probability in {**probabilities, "max": 1}.items():
            quantiles[name] = float(np.quantile(multipliers, probability))
    return {
        "rows": [{**c, "missed": _missed(c), "unresolved": _unresolved(c)} for c in shown],
        "total": len(constraints),
        "thresholded": len(ordered),
        "satisfied": sum(bool(c["satisfied"]) for c in ordered),
        "missed": sum(_missed(c) for c in ordered),
        "unresolved": sum(_unresolved(c) for c in ordered),
        "quantiles": quantiles,
        "active": sum(value > 0 for value in multipliers),
        "sign": "≤" if _side(report) == "at most" else "≥",
    }


def render(
    report: Mapping[str, Any],
    grids: Sequence[Any],
    figures: Mapping[str, Any],
    *,
    smoothed: bool = False,
    digest: str = "",
) -> str:
    """The page as one HTML document.

    Args:
      report: the report, of plain JSON types.
      grids: the title, caption and images of `grid_1.png`, `grid_2.png`, …
      figures: PNG in base64: "curves", and "grid_1", "grid_2", … as "before" and "after".
      smoothed: whether the curves show running means.
      digest: SHA-256 of report.json.
    """
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            verdict=verdict(report),
            state=standing_of(report),
            formulation=formulation_of(report),
            method=method_of(report),
            enough=_ENOUGH,
            certificate=certificate_of(report),
            tables=_metric_tables(report),
            grids=grids,
            figures=figures,
            smoothed=smoothed,
            digest=digest,
            max_listed=_MAX_LISTED,
        )
    )


def _rates(report: Mapping[str, Any], side: str, forgotten: bool) -> float | None:
    """The mean agreement of the forgotten labels, or of the others."""
    entries = (report.get("metrics") or {}).get("agreement", {}).get(side, {})
    names = {str(f["name"]) for f in report["asked"]["forget"]}
    left_out = report["asked"].get("shown", [])
    rates = [
        entry["rate"]
        for name, entry in entries.items()
        if (name in names) == forgotten and name not in left_out
    ]
    return sum(rates) / len(rates) if rates else None


def render_comparison(
    columns: Sequence[tuple[str, Mapping[str, Any]]], pictures: Sequence[Mapping[str, Any]]
) -> str:
    """Reports of one job under several formulations, as one HTML document.

    Args:
      columns: the folder and the report of each.
      pictures: "title", "caption", and "pictures": "name" and "sides", PNG in base64 as "before"
        and "after".
    """

    def pair(read: Any) -> list[dict[str, Any]]:
        return [{side: read(report, side) for side in ("before", "after")} for _, report in columns]

    rows = [
        {
            "name": "samples of what is forgotten that the judge still names so",
            "cells": pair(lambda report, side: _rates(report, side, True)),
        },
        {
            "name": "samples of what is kept that the judge names so",
            "cells": pair(lambda report, side: _rates(report, side, False)),
        },
    ]
    for name in ("kid", "fid"):

        def read(report: Mapping[str, Any], side: str, name: str = name) -> Any:
            return _cell(((report.get("metrics") or {}).get(name) or {}).get(side))[0]

        rows.append({"name": f"{_METRIC_NAMES[name]} of what is kept", "cells": pair(read)})
    subject = ", ".join(str(f["name"]) for f in columns[0][1]["asked"]["forget"])
    return (
        environment()
        .get_template("comparison.html")
        .render(
            title=f"Unlearning {subject}, side by side",
            columns=[
                {
                    "folder": folder,
                    "report": report,
                    "verdict": verdict(report),
                    "state": standing_of(report),
                    "formulation": formulation_of(report),
                }
                for folder, report in columns
            ],
            rows=rows,
            grids=pictures,
        )
    )
