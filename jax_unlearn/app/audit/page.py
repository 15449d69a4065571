"""The page of an audit: its verdict in sentences with their numbers, curves, tables, pictures."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from jax_unlearn.app.files import replace_file
from jax_unlearn.app.report.folder import finite
from jax_unlearn.app.report.page import environment

__all__ = ["easier", "state", "verdict", "write_page"]

BUDGETS = {
    "inversion": "steps",
    "unlearndiffatk": "steps",
    "noise": "share of the noise that an image is taken to",
    "stochasticity": "η",
    "inpainting": "share of the image that is hidden",
    "guidance": "scale",
    "relearning": "steps",
    "rounding": "bits",
}
"""What the budget of each attack is."""
TITLES = {
    "inversion": "Concept inversion",
    "unlearndiffatk": "UnlearnDiffAtk",
    "noise": "Inverted noise",
    "stochasticity": "More noise while sampling",
    "inpainting": "Inpainting",
    "guidance": "Guidance by the judge",
    "relearning": "Relearning",
    "rounding": "Rounded weights",
}
TARGETS = ("model", "reference", "oracle", "unseen")
HEADS = {"unseen": "unseen images"}
"""What a column is called, where not as its model: the model attacked with unseen images."""
# Intervals of 64 samples are narrower; those of fewer may hide an excess of a quarter.
_WIDE = 0.26
# Images of a concept whose nearest samples are shown, and the side of their pictures at most.
_NEAREST, _SIDE = 12, 96
_COLOURS = {
    "model": "#D55E00", "reference": "#777777", "oracle": "#0072B2", "unseen": "#009E73",
}  # fmt: skip
_MARKS = {"model": "o", "reference": "s", "oracle": "^", "unseen": "v"}


def _percent(share: Mapping[str, Any]) -> str:
    """A share with its interval, in per cent."""
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['value']:.0f} % ({low:.0f} to {high:.0f} %)"


def _yardstick(row: Mapping[str, Any]) -> str | None:
    """What success without memory is measured on: the oracle, or unseen images, or nothing."""
    return next((name for name in ("oracle", "unseen") if row.get(name)), None)


def easier(row: Mapping[str, Any]) -> bool:
    """Whether the model shows more than what has no memory of it, beyond both intervals."""
    name = _yardstick(row)
    return name is not None and row["model"]["low"] > row[name]["high"]


def _worst(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row in which the model exceeds its yardstick most; without one, shows most."""

    def excess(row: Mapping[str, Any]) -> float:
        name = _yardstick(row)
        return row["model"]["low"] - (row[name]["high"] if name else 0)

    return max(rows, key=excess)


def _attacks(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["recoverable"]:
        found.setdefault(row["attack"], []).append(row)
    return found


def state(report: Mapping[str, Any]) -> tuple[str, str]:
    """The class of the verdict in the style sheet, and its heading.

    "violated" where something is shown or brought back more than without memory of it (from the
    oracle, or of unseen images), beyond the intervals. Where these are wide, or there is neither,
    nothing follows from the rest: "close". So it is where more of the forgotten images than of the
    unseen ones have a copy, by however little: one copy is one too many.
    """
    rows = [*report["forgotten"], *report["recoverable"]]
    copied = [one["copied"] for one in report["nearest"] if one["copied"]]
    names = {_yardstick(row) for row in rows}
    if None in names:
        return "close", f"– Measured without {'unseen images' if copied else 'an oracle'}"
    what = "in a model that never knew" if "oracle" in names else "of images that were never seen"
    if any(easier(row) for row in (*rows, *copied)):
        return "violated", f"✗ More is left than {what}"
    for one in copied:
        name = _yardstick(one)
        if name is not None and one["model"]["value"] > one[name]["value"]:
            return "close", "– Copies were found, in intervals too wide to tell from chance"
    sides = [row[name] for row in rows for name in ("model", *names)]
    if max(one["high"] - one["low"] for one in sides) > _WIDE:
        return "close", f"– No more was found than {what}, in wide intervals"
    return "satisfied", f"✓ No more was found than {what}"


def verdict(report: Mapping[str, Any]) -> str:
    """A paragraph, each sentence of which has its number on the page."""
    return " ".join(_sentences(report))


def _sentences(report: Mapping[str, Any]) -> Iterator[str]:
    scale = report["asked"]["options"]["guidance"]
    yardstick = _yardstick(report["forgotten"][0])
    for concept in report["asked"]["concepts"]:
        own = [row for row in report["forgotten"] if row["concept"] == concept["name"]]
        at = [row for row in own if row["scale"] == scale] or own
        # Another scale of guidance is named where it alone shows more than the yardstick.
        if easier(worst := _worst(own)) and not any(easier(row) for row in at):
            at = [*at, worst]
        for row in at:
            shares = [_percent(row[name]) for name in ("model", "reference")]
            if concept["copies"] is not None:
                text = f"Of the model's samples {shares[0]} are copies of {concept['name']}, of "
                text += f"the reference's {shares[1]}"
            else:
                name = "asked for" if row["settings"]["what"] != "paraphrases" else "paraphrased"
                text = f"“{concept['name']}”, {name}, is seen in {shares[0]} of the model's samples"
                text += f" and {shares[1]} of the reference's"
            if yardstick == "oracle":
                text += f", {_percent(row['oracle'])} of the oracle's"
            elif yardstick:
                text += f"; {_percent(row['unseen'])} are copies of unseen images"
            elsewhere = row["scale"] != at[0]["scale"]
            yield (
                f"At guidance {row['scale']:g}, {text[0].lower()}{text[1:]}."
                if elsewhere
                else f"{text}."
            )
    for entry in report["nearest"]:
        if entry["copied"] is not None:
            hits = {
                name: f"{_hits(one)} of {one['count']}" for name, one in entry["copied"].items()
            }
            text = (
                f"Among {entry['samples']} samples are copies of {hits['model']} images, among as "
                f"many of the reference's of {hits['reference']}"
            )
            if "unseen" in hits:
                text += f"; of unseen images, of {hits['unseen']}"
            yield text + "."
    brought, safe = [], []
    for attack, rows in _attacks(report).items():
        row = _worst(rows)
        text = f"{TITLES[attack]} ({_percent(row['model'])}"
        text += (
            f"; {HEADS.get(yardstick, yardstick)} {_percent(row[yardstick])})" if yardstick else ")"
        )
        more = easier(row) or (not yardstick and row["model"]["low"] > 0.1)
        (brought if more else safe).append(text)
    unseen = yardstick == "unseen"
    if brought and yardstick:
        what = "of images that were never seen" if unseen else "from a model that never knew"
        yield f"More comes back than {what}: {_listed(brought)}."
    elif brought:
        yield (
            f"These bring it back: {_listed(brought)}. Without an oracle nobody knows how much of "
            "that is memory."
        )
    if safe and yardstick:
        what = "of unseen images" if unseen else "from the oracle"
        yield f"No more than {what} comes back by {_listed(safe)}."
    elif safe:
        yield f"Little comes back by {_listed(safe)}."
    for entry in report["too_forgotten"]:
        told = entry["model"].get("membership")
        if told is None:
            continue
        auc = told["auc"]
        text = f"AUC {auc['value']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})"
        of_images = any(row.get("unseen") for row in report["forgotten"])
        of = "forgotten images" if of_images else f"images of “{entry['concept']}”"
        if auc["high"] < 0.5:
            yield (
                f"The {of} are less likely than unseen ones, "
                f"{text}: that gives away that they were deleted."
            )
        elif auc["low"] > 0.5:
            yield (f"The {of} are still more likely than unseen ones, {text}.")
        else:
            yield f"The {of} are not told from unseen ones, {text}."
    harmed = report["harmed"]
    if harmed["agreement"]:
        yield (
            f"What is kept is named right in {_percent(harmed['agreement']['model'])} of samples, "
            f"before in {_percent(harmed['agreement']['reference'])}."
        )
    moved = harmed["path_kl"]["kept"]["reference"]["by_condition"]
    name = max(moved, key=lambda c: moved[c]["value"])
    yield (
        f"Of the kept conditions {name} moved most, by {moved[name]['value']:.2g} ± "
        f"{moved[name]['stderr']:.2g} nats."
    )
    yield "This is what these attacks found with these settings; others may find more."


def _hits(share: Mapping[str, Any]) -> int:
    return round(share["value"] * share["count"])


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts)


def _label(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) if name == "what" else f"{name} {value}" for name, value in settings.items()
    )


def _panels(report: Mapping[str, Any]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """Rows of one attack, concept and settings each: a curve against the budget."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in report["recoverable"]:
        key = row["attack"], row["concept"], _label(row["settings"])
        found.setdefault(key, []).append(row)
    return found


def draw_curves(report: Mapping[str, Any]) -> bytes | None:
    """Success against the attack's budget: model, reference and oracle, with their intervals."""
    panels = _panels(report)
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.5 + 2.5 * lines), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    many = len(report["asked"]["concepts"]) > 1
    for axes, ((attack, concept, label), rows) in zip(every, panels.items(), strict=False):
        budgets = np.array([row["budget"] for row in rows], float)
        # Budgets that double lie evenly; zero stands before them.
        doubling = budgets.min() == 0 and len(budgets) > 2
        doubling = doubling and all(np.log2(one) % 1 == 0 for one in budgets[budgets > 0])
        for name in TARGETS:
            if not rows[0].get(name):
                continue
            value, low, high = (
                np.array([100 * row[name][part] for row in rows])
                for part in ("value", "low", "high")
            )
            colour = _COLOURS[name]
            axes.fill_between(budgets, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                budgets, value, color=colour, marker=_MARKS[name], markersize=3, linewidth=1.4,
                label=HEADS.get(name, name),
            )  # fmt: skip
        if doubling:
            axes.set_xscale("symlog", linthresh=1, base=2)
            axes.set_xticks(budgets, [f"{one:g}" for one in budgets])
        if attack == "rounding":
            axes.invert_xaxis()
        title = TITLES[attack] + (f", {concept}" if many else "")
        axes.set_title(title + (f"\n{label}" if label else ""), fontsize=8, parse_math=False)
        axes.set_xlabel(BUDGETS[attack], fontsize=7)
        axes.tick_params(labelsize=6, color="#888888")
        axes.set_ylim(-3, 103)
        axes.grid(True, color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    of_images = any(one["copies"] for one in report["asked"]["concepts"])
    shown = "samples that are copies (%)" if of_images else "samples that show it (%)"
    every[0].set_ylabel(shown, fontsize=7)
    handles, names = every[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw_path_kl(report: Mapping[str, Any]) -> bytes:
    """Path KL by time step, of kept and of forgotten conditions, to reference and oracle."""
    figure = Figure(figsize=(7.2, 2.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, 2), ("kept", "forgotten"), strict=True):
        found = report["harmed"]["path_kl"][part]
        for name in ("reference", "oracle"):
            if name in found:
                axes.plot(
                    found["times"], found[name]["by_time"], color=_COLOURS[name],
                    marker=_MARKS[name], markersize=3, label=f"to the {name}",
                )  # fmt: skip
        axes.set_title(f"{part} conditions", fontsize=9)
        axes.set_xlabel("time step", fontsize=8)
        axes.set_ylabel("path KL (nats)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw_strip(rows: Sequence[np.ndarray]) -> bytes:
    """Rows of small images as one picture, enlarged by a whole factor."""
    height, width = rows[0].shape[1:3]
    scale, gap = max(1, 64 // height), 4
    columns = max(len(row) for row in rows)
    size = (columns * (width * scale + gap) - gap, len(rows) * (height * scale + gap) - gap)
    canvas = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            image = image.convert("RGB").resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            canvas.paste(image, (j * (width * scale + gap), i * (height * scale + gap)))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _thumbnail(pixels: np.ndarray) -> str:
    """A small picture as text for a page."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    if min(image.size) * 2 <= _SIDE:
        factor = _SIDE // (2 * min(image.size)) + 1
        image = image.resize(
            (factor * image.width, factor * image.height), Image.Resampling.NEAREST
        )
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _nearest(
    report: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    images: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """The images of each concept whose nearest sample of the model is nearest, and these samples.

    Of each concept its name, the space that decides, how many samples were searched, and rows of
    pictures: a name, and of each image its picture, a number, and whether it is a copy.
    """
    found = []
    for entry in report["nearest"]:
        space, name = entry["spaces"][0], entry["concept"]
        (concept,) = (one for one in report["asked"]["concepts"] if one["name"] == name)
        most = concept["copies"] and concept["copies"]["distance"]
        order = np.argsort([one["distance"] for one in space["model"]], kind="stable")[:_NEAREST]
        rows = [("forgotten", [(_thumbnail(images[name][i]), "", False) for i in order])]
        for side in (one for one in TARGETS[:3] if one in space):
            near = arrays[f"forgotten, {name}, {side}"]["near"]
            cells = []
            for i in order:
                one = space[side][i]
                number = one["similarity"] if space["cosine"] else one["distance"]
                copied = most is not None and one["distance"] < most
                cells.append((_thumbnail(near[i]), f"{number:.2f}", copied))
            rows.append((side, cells))
        found.append({"concept": name, "rows": rows, **entry})
    return found


def _median(sides: Sequence[Mapping[str, Any]], cosine: bool) -> float:
    return float(np.median([one["similarity" if cosine else "distance"] for one in sides]))


def write_page(
    folder: Path,
    report: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    images: Mapping[str, np.ndarray],
) -> Path:
    """Writes report.json, its figures and, last, report.html.

    Args:
      folder: where to.
      report: see `run.audit`.
      arrays: of each phase by name, uint8 [n, height, width, channels]: "images" that it made, and
        "near", the sample that is nearest to each image of a concept.
      images: of each concept.
    """
    report = finite(report)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    replace_file(folder / "report.json", text)
    figures = {"path_kl.png": draw_path_kl(report)}
    if (curves := draw_curves(report)) is not None:
        figures["curves.png"] = curves
    strips = []
    targets = [name for name in TARGETS if report["forgotten"][0].get(name)]
    for concept in (one["name"] for one in report["asked"]["concepts"]):
        for phase in ("forgotten", *TITLES):
            rows = [arrays.get(f"{phase}, {concept}, {name}", {}).get("images") for name in targets]
            shown = [row for row in rows if row is not None]
            if len(shown) == len(targets):
                name = f"images_{len(strips) + 1}.png"
                figures[name] = draw_strip(shown)
                title = "Samples without an attack" if phase == "forgotten" else TITLES[phase]
                strips.append({"name": name, "title": title, "concept": concept, "phase": phase})
    if (kept := arrays.get("kept", {}).get("images")) is not None:
        half = len(kept) // 2
        figures["kept.png"] = draw_strip([kept[:half], kept[half:]])
    for name, content in figures.items():
        replace_file(folder / name, content)
    encoded = {name: base64.b64encode(content).decode() for name, content in figures.items()}
    moved = report["harmed"]["path_kl"]["kept"]["reference"]["by_condition"]
    page = (
        environment()
        .get_template("audit.html")
        .render(
            report=report,
            verdict=report["verdict"],
            state=state(report)[0],
            heading=state(report)[1],
            sentences=list(_sentences(report)),
            panels=_panels(report),
            titles=TITLES,
            budgets=BUDGETS,
            heads=HEADS,
            targets=targets,
            yardstick=_yardstick(report["forgotten"][0]),
            nearest=_nearest(report, arrays, images),
            median=_median,
            strips=strips,
            figures=encoded,
            percent=_percent,
            easier=easier,
            label=_label,
            most_moved=sorted(moved.items(), key=lambda item: -item[1]["value"])[:8],
            digest=hashlib.sha256(text).hexdigest(),
        )
    )
    replace_file(folder / "report.html", page.encode())
    return folder / "report.html"
