"""The figures of a report, as PNG: image grids before and after, and curves over steps."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

__all__ = ["SMOOTHED_ROWS", "Grid", "check_grid", "draw_curves", "draw_grid", "sides"]

_MAX_LINES = 7
"""Above this many constraints the curves are bands."""
SMOOTHED_ROWS = 80
"""From this many rows on, a curve is drawn with its running mean."""
_PANEL_PIXELS = 960
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow."""
_DASHED = (0, (4, 2))


class Grid(NamedTuple):
    """Samples of the reference and of the unlearned model, drawn from the same noise.

    Attributes:
      title: heading of the grid.
      caption: one sentence under it.
      before: samples of the reference model, uint8 [n, height, width, channels].
      after: samples of the unlearned model from the same noise, of the same shape.
      columns: images in a row.
    """

    title: str
    caption: str
    before: np.ndarray
    after: np.ndarray
    columns: int = 8


def _font_label(text: str, length: int = 32) -> str:
    """`text` shortened, with what the figure's font cannot draw replaced."""
    path = font_manager.findfont("DejaVu Sans")
    known = font_manager.get_font(path).get_charmap()
    text = "".join(c if ord(c) in known and c.isprintable() else "�" for c in text)
    return text if len(text) <= length else text[: length - 1] + "…"


class _Series(NamedTuple):
    steps: np.ndarray
    values: np.ndarray


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> _Series | None:
    """The rows' steps [n] and values [n] or [n, m] of one key, of the rows that have it."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows or np.size(rows[0][key]) == 0:
        return None
    try:
        steps = np.asarray([row["step"] for row in rows], np.float64)
        return _Series(steps, np.asarray([row[key] for row in rows], np.float64))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"every row of the metrics needs a 'step', and {key!r} of one length ({error})."
        ) from error


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred, shorter at the ends; of the finite values only."""
    kernel, finite = np.ones(window), np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    count = np.convolve(finite, kernel, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, noisy: bool) -> Any:
    if noisy and len(values) >= SMOOTHED_ROWS:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.7)
        values = _running_mean(values, len(values) // 40)
    return axes.plot(steps, values, color=colour, linewidth=1.6)[0]


def _band(axes: Axes, steps: np.ndarray, values: np.ndarray) -> dict[str, tuple[str, Any]]:
    """Minimum, quartiles, median and maximum over constraints, of values [rows, m]."""
    known = np.isfinite(values).any(axis=1)
    steps, values = steps[known], np.where(np.isfinite(values), values, np.nan)[known]
    low, first, middle, third, high = np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1], axis=1)
    outer = axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.15, linewidth=0)
    inner = axes.fill_between(steps, first, third, color=_COLOURS[0], alpha=0.3, linewidth=0)
    (line,) = axes.plot(steps, middle, color=_COLOURS[0], linewidth=1.6)
    names = ("median of the constraints", "middle half", "minimum to maximum")
    return {name: (name, handle) for name, handle in zip(names, (line, inner, outer), strict=True)}


def _panel(axes: Axes, label: str) -> None:
    axes.set_ylabel(label.replace(" (", "\n("), fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8, color="#888888")
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")


def draw_curves(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Constraint values, multipliers and the objective over steps, as a PNG.

    Of a baseline, which sees no constraint, its own loss alone.
    """
    method = report.get("method")
    if method is not None and not method["multipliers"]:
        rows = [{"step": row["step"], "objective": row["objective"]} for row in rows]
    values, thresholds, violations, multipliers, objective = (
        _series(rows, key)
        for key in ("values", "thresholds", "violations", "multipliers", "objective")
    )
    units = {c.get("unit") for c in report["constraints"]}
    unit = f" ({units.pop()})" if len(units) == 1 and units != {None} else ""
    one_threshold = thresholds is None or np.ptp(thresholds.values, axis=1).max() == 0
    panels: list[tuple[str, _Series]] = []
    if values is not None and values.values.shape[1] > _MAX_LINES and not one_threshold:
        values = None  # no line to compare a band of values with: show the violations against 0
        if violations is not None:
            panels.append((f"violation{unit}", violations))
    elif values is not None:
        panels.append((f"constraint value{unit}", values))
    if multipliers is not None:
        panels.append(("multiplier λ", multipliers))
    if objective is not None:
        unit = report["objective"].get("unit")
        label = f"objective ({unit})" if unit else "objective"
        if method is not None and not method["multipliers"]:
            label = f"loss of {method['title']}"
        panels.append((label, objective))
    if not panels:
        return None
    figure = Figure(figsize=(7.6, 0.5 + 2.05 * len(panels)), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    every_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    legend: dict[str, Any] = {}
    for axes, (label, series) in zip(every_axes, panels, strict=True):
        _panel(axes, label)
        if series is objective:
            _line(axes, series.steps, series.values, "#333333", True)
        elif series.values.shape[1] > _MAX_LINES:
            legend.update(_band(axes, *series))
        else:
            names = [str(c["name"]) for c in report["constraints"]]
            for i in range(series.values.shape[1]):
                name = names[i] if i < len(names) else f"constraint {i + 1}"
                line = _line(axes, series.steps, series.values[:, i], _COLOURS[i], series is values)
                legend[f"{i}{name}"] = (_font_label(name), line)
        if series is violations:
            zero = axes.axhline(0.0, color="#333333", linestyle=_DASHED, linewidth=1)
            legend["threshold"] = ("threshold (violation 0)", zero)
        if series is values and thresholds is not None:
            shown = thresholds.values[:, :1] if one_threshold else thresholds.values
            for i in range(shown.shape[1]):
                colour = "#333333" if one_threshold else _COLOURS[i]
                axes.plot(
                    thresholds.steps, shown[:, i], color=colour, linestyle=_DASHED, linewidth=1
                )
            (dashes,) = axes.plot([], color="#333333", linestyle=_DASHED, linewidth=1)
            legend["threshold"] = ("threshold", dashes)
    _legend(figure, list(legend.values()))
    every_axes[-1].set_xlabel("step", fontsize=9)
    figure.align_ylabels(every_axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Figure, entries: list[tuple[str, Any]]) -> None:
    if not entries:
        return
    handles, names = [handle for _, handle in entries], [name for name, _ in entries]
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(names))],
        loc="outside upper center",
        ncols=max(1, min(4, len(names), 100 // (max(map(len, names)) + 7))),
        fontsize=8,
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)  # a name may hold dollar signs or begin with an underscore
        text.set_text(name)


def check_grid(grid: Grid) -> None:
    """Raises ValueError unless the grid is uint8 [n, height, width, 1 or 3], n and columns > 0."""
    before, after = np.asarray(grid.before), np.asarray(grid.after)
    if before.shape != after.shape or before.ndim != 4 or before.shape[-1] not in (1, 3):
        raise ValueError(
            f"grid {grid.title!r}: expected before and after of one shape [n, height, width, 1 or "
            f"3], not {before.shape} and {after.shape}."
        )
    if before.dtype != np.uint8 or after.dtype != np.uint8:
        raise ValueError(
            f"grid {grid.title!r}: expected uint8 images, not {before.dtype} and {after.dtype}."
        )
    if not len(before) or grid.columns < 1:
        raise ValueError(f"grid {grid.title!r}: expected at least one image and one column.")


def draw_grid(grid: Grid) -> bytes:
    """Before and after side by side as a PNG; small images enlarged by a whole factor.

    What is between the images is transparent: the picture stands on light pages and dark ones.
    """
    number, height, width, channels = np.shape(grid.before)
    columns = min(grid.columns, number)
    lines = -(-number // columns)
    room = _PANEL_PIXELS // columns
    factor = max(1, (room - 4) // width)
    resampling = Image.Resampling.NEAREST
    size = (width * factor, height * factor)
    if width > 2 * room:  # large photographs: twice the page's width is enough for any screen
        resampling, size = (
            Image.Resampling.LANCZOS,
            (2 * room, max(1, round(2 * room * height / width))),
        )
    gap = max(2, size[0] // 24)
    panel = (columns * (size[0] + gap) - gap, lines * (size[1] + gap) - gap)
    text_size = max(11, panel[0] // 32)
    middle, top, margin = 2 * text_size, 2 * text_size, gap
    canvas = Image.new(
        "RGBA", (2 * panel[0] + middle + 2 * margin, top + panel[1] + margin), (255, 255, 255, 0)
    )
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), text_size)
    draw = ImageDraw.Draw(canvas)
    for label, images, left in (
        ("before", grid.before, margin),
        ("after", grid.after, margin + panel[0] + middle),
    ):
        draw.text((left, top // 2), label, fill="#7b7b7b", font=font, anchor="lm")
        for i, pixels in enumerate(np.asarray(images)):
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).convert("RGB")
            x = left + (i % columns) * (size[0] + gap)
            canvas.paste(
                image.resize(size, resampling), (x, top + (i // columns) * (size[1] + gap))
            )
    return _png(canvas)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sides(picture: bytes) -> dict[str, bytes]:
    """The halves "before" and "after" of what `draw_grid` draws, as PNG."""
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
        halves = {"before": (0, width // 2), "after": (width // 2, width)}
        found = {
            name: image.crop((left, 0, right, height)) for name, (left, right) in halves.items()
        }
    # Without what is empty at their left and right, so that one below the other lines up.
    boxes = {name: half.getbbox() or (0, 0, *half.size) for name, half in found.items()}
    return {
        name: _png(half.crop((boxes[name][0], 0, boxes[name][2], height)))
        for name, half in found.items()
    }
