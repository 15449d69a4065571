"""Draws and tabulates what robust.py measured: attacks by budget, robustness by its price.

One row a concept. Lines of the unlearned model are means over seeds, the band is from the lowest
to the highest of them; of the reference and the oracle, which are one model each, the band is the
95 % interval of Clopper and Pearson. On the right a point is one run. The tables that are printed
have means over seeds, with the lowest and the highest.

    python benchmarks/robust_figure.py --out benchmarks/results
"""

import argparse
import json
import pathlib

import matplotlib
import numpy as np

from jax_unlearn import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONCEPTS = ("sneaker", "blueprint")
EMBEDDING = ("inversion", {"what": "whole embedding"})
TOKEN = ("inversion", {"what": "one token"})
PREFIX = ("unlearndiffatk", {})
FOUR, SIXTEEN, LOW = (
    ("relearning", {"what": what, "images": images})
    for what, images in (
        ("all parameters", 4),
        ("all parameters", 16),
        ("low-rank change of rank 4", 16),
    )
)
# The panels of attacks: title, the attack, what a budget is.
PANELS = (
    ("inversion, whole embedding", EMBEDDING, "steps"),
    ("relearning, 16 images", SIXTEEN, "steps of fine-tuning"),
)
MODELS = {"reference": "0.5", "oracle": "tab:green"}
ROBUST = ("tab:red", "tab:blue", "tab:purple", "tab:orange", "tab:brown")


def curve(row, attack):
    """The budgets of an attack, its hits and its counts."""
    name, settings = attack
    found = [one for one in row[name] if one["settings"] == settings]
    return np.array([(one["budget"], one["hits"], one["count"]) for one in found]).T


def price(row):
    """Of what is kept, the share that is named right: the object and the style."""
    return row["RA"]["hits"] / row["RA"]["count"]


def draw_attack(axis, rows, attack):
    for name, color in MODELS.items():
        for row in (one for one in rows if one["model"] == name):
            budgets, hits, counts = curve(row, attack)
            found = metrics.binomial_interval(hits, counts)
            axis.fill_between(budgets, found.low, found.high, color=color, alpha=0.15, lw=0)
            axis.plot(budgets, found.value, color=color, label=name)
    for color, (threshold, runs) in zip(ROBUST, by_threshold(rows).items(), strict=False):
        shares = []
        for row in runs:
            budgets, hits, counts = curve(row, attack)
            shares.append(hits / counts)
        axis.fill_between(budgets, *np.array([np.min(shares, 0), np.max(shares, 0)]),
                          color=color, alpha=0.15, lw=0)  # fmt: skip
        label = f"{threshold}, {len(runs)} seed{'s' * (len(runs) > 1)}"
        axis.plot(budgets, np.mean(shares, 0), color=color, marker="o", ms=3, label=label)


def by_threshold(rows):
    """Rows of the unlearned models by threshold, the loosest first."""
    robust = [row for row in rows if row["model"] == "robust"]
    texts = sorted({row["threshold"] for row in robust}, key=lambda text: -float(text[:-1]))
    return {text: [row for row in robust if row["threshold"] == text] for text in texts}


def draw_price(axis, rows):
    for color, (threshold, runs) in zip(ROBUST, by_threshold(rows).items(), strict=False):
        found = [curve(row, EMBEDDING)[1:, -1] for row in runs]
        axis.scatter(
            [price(row) for row in runs], [h / n for h, n in found], color=color, label=threshold
        )
    for name, color in MODELS.items():
        for row in (one for one in rows if one["model"] == name):
            hits, count = curve(row, EMBEDDING)[1:, -1]
            axis.axhline(hits / count, color=color, lw=1, ls="--")
            axis.scatter(price(row), hits / count, color=color, marker="s", label=name)


def shared(hits, count):
    return 100 * hits / count


def first_half(row, attack):
    """The first budget after which half of the samples show it; none is past the last."""
    budgets, hits, counts = curve(row, attack)
    there = (budgets > 0) & (hits >= counts / 2)
    return budgets[there][0] if there.any() else np.inf


def table(concept, rows):
    """A row for each model: what is measured, by column."""
    columns = {
        "UA": lambda row: shared(row["UA"]["hits"], row["UA"]["count"]),
        "RA": lambda row: 100 * price(row),
        "distance": lambda row: 1e3 * row.get("training", {"objective": 0.0})["objective"],
        "UnlearnDiffAtk": lambda row: shared(*curve(row, PREFIX)[1:, -1]),
        "one token": lambda row: shared(*curve(row, TOKEN)[1:, -1]),
    }
    for place, budget in enumerate(curve(rows[0], EMBEDDING)[0]):
        if budget % 100 == 0 and budget or budget == 50:
            columns[f"inversion {budget}"] = lambda row, place=place: shared(
                *curve(row, EMBEDDING)[1:, place]
            )
    columns |= {
        "relearning 4": lambda row: first_half(row, FOUR),
        "relearning 16": lambda row: first_half(row, SIXTEEN),
        "rank 4, 16": lambda row: shared(*curve(row, LOW)[1:, -1]),
    }
    groups = {name: [row for row in rows if row["model"] == name] for name in MODELS}
    groups |= by_threshold(rows)
    lines = [f"| {concept} | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, own in groups.items():
        cells = []
        for measure in columns.values():
            values = np.array([measure(row) for row in own])
            cell = f"{values.mean():.3g}"
            if len(own) > 1 and np.ptp(values) > 0:
                cell += f" ({values.min():.3g}–{values.max():.3g})"
            cells.append(cell)
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the numbers lie")
    folder = parser.parse_args().out
    figure, axes = plt.subplots(len(CONCEPTS), 3, figsize=(12, 3.4 * len(CONCEPTS)), squeeze=False)
    for line, concept in zip(axes, CONCEPTS, strict=True):
        rows = json.loads((folder / f"robust_{concept}.json").read_text())["rows"]
        for axis, (title, attack, unit) in zip(line, PANELS, strict=False):
            draw_attack(axis, [row for row in rows if attack[0] in row], attack)
            axis.set(title=f"{concept}: {title}", xlabel=unit, ylabel="shown", ylim=(-0.03, 1.03))
        line[0].legend(fontsize=8, loc="upper left")
        line[1].set_xscale("symlog", base=2, linthresh=1)
        line[1].set_xlim(-0.2, 80)
        draw_price(line[2], rows)
        line[2].set(
            title=f"{concept}: price of robustness", xlabel="what is kept, named right",
            ylabel="shown after 400 steps of inversion", ylim=(-0.03, 1.03),
        )  # fmt: skip
        line[2].legend(fontsize=8)
        print(f"\n{table(concept, rows)}")
    figure.tight_layout()
    figure.savefig(folder / "robust.png", dpi=110)


if __name__ == "__main__":
    main()
