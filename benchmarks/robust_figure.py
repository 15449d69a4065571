"""Draws what robust.py measured: attacks by their budget, and robustness by its price.

One row a concept. Lines of the unlearned model are means over seeds, the band is from the lowest
to the highest of them; of the reference and the oracle, which are one model each, the band is the
95 % interval of Clopper and Pearson. On the right a point is one run.

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
# The panels of attacks: title, key in the rows, settings, what a budget is.
PANELS = (
    ("Concept inversion, whole embedding", "inversion", {"what": "whole embedding"}, "steps"),
    (
        "Relearning, 16 images",
        "relearning",
        {"what": "all parameters", "images": 16},
        "steps of fine-tuning",
    ),
)
MODELS = {"reference": "0.5", "oracle": "tab:green"}
ROBUST = ("tab:red", "tab:blue", "tab:purple", "tab:orange", "tab:brown")


def curve(row, attack, settings):
    """The budgets of an attack, its hits and its counts."""
    found = [one for one in row[attack] if one["settings"] == settings]
    return np.array([(one["budget"], one["hits"], one["count"]) for one in found]).T


def price(row):
    """Of what is kept, the share that is named right."""
    return row["RA"]["hits"] / row["RA"]["count"]


def draw_attack(axis, rows, attack, settings):
    for name, color in MODELS.items():
        for row in (one for one in rows if one["model"] == name):
            budgets, hits, counts = curve(row, attack, settings)
            found = metrics.binomial_interval(hits, counts)
            axis.fill_between(budgets, found.low, found.high, color=color, alpha=0.15, lw=0)
            axis.plot(budgets, found.value, color=color, label=name)
    for color, (threshold, runs) in zip(ROBUST, by_threshold(rows).items(), strict=False):
        shares = []
        for row in runs:
            budgets, hits, counts = curve(row, attack, settings)
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
    _, attack, settings, _ = PANELS[0]
    for color, (threshold, runs) in zip(ROBUST, by_threshold(rows).items(), strict=False):
        found = [curve(row, attack, settings)[1:, -1] for row in runs]
        axis.scatter(
            [price(row) for row in runs], [h / n for h, n in found], color=color, label=threshold
        )
    for name, color in MODELS.items():
        for row in (one for one in rows if one["model"] == name):
            hits, count = curve(row, attack, settings)[1:, -1]
            axis.axhline(hits / count, color=color, lw=1, ls="--")
            axis.scatter(price(row), hits / count, color=color, marker="s", label=name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the numbers lie")
    folder = parser.parse_args().out
    figure, axes = plt.subplots(len(CONCEPTS), 3, figsize=(12, 3.4 * len(CONCEPTS)), squeeze=False)
    for line, concept in zip(axes, CONCEPTS, strict=True):
        rows = json.loads((folder / f"robust_{concept}.json").read_text())["rows"]
        for axis, (title, attack, settings, unit) in zip(line, PANELS, strict=False):
            draw_attack(axis, [r for r in rows if attack in r], attack, settings)
            axis.set(title=f"{concept}: {title}", xlabel=unit, ylabel="shown", ylim=(-0.03, 1.03))
        line[0].legend(fontsize=8)
        line[1].set_xscale("symlog", base=2, linthresh=1)
        draw_price(line[2], [row for row in rows if PANELS[0][1] in row])
        line[2].set(
            title=f"{concept}: price of robustness", xlabel="what is kept, named right",
            ylabel="shown after the last step of inversion", ylim=(-0.03, 1.03),
        )  # fmt: skip
        line[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "robust.png", dpi=110)


if __name__ == "__main__":
    main()
