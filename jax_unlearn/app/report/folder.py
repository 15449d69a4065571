"""The files of a report: reads the rows of a run, writes the report of it."""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_unlearn.app.files import replace_file
from jax_unlearn.app.report.figures import (
    SMOOTHED_ROWS,
    Grid,
    check_grid,
    draw_curves,
    draw_grid,
    sides,
)
from jax_unlearn.app.report.page import render, render_comparison, verdict

__all__ = ["finite", "read_rows", "write_comparison", "write_report"]


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a `metrics.jsonl`.

    A killed run can leave its last line unfinished, without a line break: that one is left out.

    Raises:
      ValueError: for any other line that is not a JSON object, naming it.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not line:
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError too
            if last and line.startswith(b"{"):
                break
            raise ValueError(
                f"{os.fspath(path)}, line {number}: not valid JSON ({error}). Only the last line "
                "of a killed run may be unfinished; remove this line to read the others."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{os.fspath(path)}, line {number}: expected a JSON object, "
                f"not {type(row).__name__}."
            )
        rows.append(row)
    return rows


def _plain(value: Any, path: str, non_finite: list[str]) -> Any:
    """`value` as plain JSON types; nan and inf become None, their paths go to `non_finite`."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {
            str(key): _plain(entry, f"{path}.{key}" if path else str(key), non_finite)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{path}[{i}]", non_finite) for i, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(path)
        return None
    return value


def finite(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of plain JSON types: what is not finite is null, and listed under "non_finite"."""
    non_finite: list[str] = []
    content = _plain(report, "", non_finite)
    return content | {"non_finite": non_finite} if non_finite else content


def _encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _sides(picture: bytes) -> dict[str, str]:
    return {name: _encoded(side) for name, side in sides(picture).items()}


def write_report(
    folder: str | os.PathLike[str],
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    grids: Sequence[Grid],
) -> Path:
    """Writes `report.json`, `grid_1.png`…, `curves.png` and `report.html` into a folder.

    The page holds its figures as data URIs, needs no script and loads nothing. Each file is
    written beside its place and renamed into it, `report.html` last.

    Args:
      folder: where to write; made if it is not there.
      report: the keys "asked" (command, model, forget, retain, thresholds, options),
        "formulation", "formula", "objective" (value, stderr, unit, description), optionally
        "floor" and "gap" (value, stderr, unit, effective), "constraints" (a list of
        name, value, stderr, unit, threshold, reference_value, slack, multiplier, satisfied),
        "feasible", "complementary_slackness", "steps", "seconds", "timing", "seed", "device",
        "versions", and optionally "metrics", "identity", "legs", "files" and "method" (of a
        baseline: title, formula, source, symbol, strength, meaning, and whether it had
        multipliers; without them multiplier and slackness are null). Numbers that are not finite
        become null, and their paths are listed under "non_finite".
      rows: what `metrics.jsonl` holds: "step", "objective", and "values", "violations",
        "multipliers", "thresholds" of [m] each; see `read_rows`. May be empty.
      grids: samples before and after, from the same noise. May be empty.

    Returns:
      The path of `report.html`.

    Raises:
      ValueError: for a report that contradicts itself, rows of different lengths, or a grid that
        is not uint8 [n, height, width, 1 or 3] of one shape before and after.
    """
    plain = finite(report)
    verdict(plain)  # refuses a report that contradicts itself before anything is written
    for grid in grids:
        check_grid(grid)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    replace_file(folder / "report.json", text)
    figures = {f"grid_{i}.png": draw_grid(grid) for i, grid in enumerate(grids, start=1)}
    curves = draw_curves(plain, rows)
    if curves is not None:
        figures["curves.png"] = curves
    for name, content in figures.items():
        replace_file(folder / name, content)
    encoded: dict[str, Any] = {}
    for name, content in figures.items():
        stem = name.removesuffix(".png")
        encoded[stem] = _encoded(content) if stem == "curves" else _sides(content)
    digest = hashlib.sha256(text).hexdigest()
    page = render(plain, grids, encoded, smoothed=len(rows) >= SMOOTHED_ROWS, digest=digest)
    replace_file(folder / "report.html", page.encode())
    return folder / "report.html"


def write_comparison(folder: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """Writes `report.html` of the finished runs in `folder/name`, side by side.

    The page holds its pictures, the first two grids of each run, and links to the full reports.

    Raises:
      ValueError: if a run has no report, or an unreadable one.
    """
    folder = Path(folder)
    columns = []
    for name in names:
        try:
            columns.append((name, json.loads((folder / name / "report.json").read_text("utf-8"))))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / name} has no report to compare: {error}.") from error
    pictures = []
    for number, title in ((1, "What is forgotten"), (2, "What is retained")):
        files = [(name, folder / name / f"grid_{number}.png") for name in names]
        shown = [
            {"name": name, "sides": _sides(file.read_bytes())}
            for name, file in files
            if file.is_file()
        ]
        if shown:
            caption = "Before and after, from the same noise."
            pictures.append({"title": title, "caption": caption, "pictures": shown})
    replace_file(folder / "report.html", render_comparison(columns, pictures).encode())
    return folder / "report.html"
