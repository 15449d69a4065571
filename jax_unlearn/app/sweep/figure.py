"""The figure of a sweep, as PNG: what was forgotten against its price, and the floor under both."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_fronts"]

_BLUE, _GREY = "#0072B2", "#333333"


def draw_fronts(fronts: Mapping[str, Any]) -> bytes | None:
    """The front of a sweep; None where nothing was measured.

    Args:
      fronts: what fronts.json has. Each problem is a point, hollow where another of its seed
        dominates it. The line joins the means over seeds, its band is Student's interval of the
        objective, and the dashed line is the floor.
    """
    curve = sorted(fronts["curve"], key=lambda one: one["forgotten"]["value"])
    if not curve:
        return None
    figure = Figure(figsize=(6.4, 4.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x = [one["forgotten"]["value"] for one in curve]
    axes.plot(x, [one["objective"]["value"] for one in curve], color=_BLUE, label="mean over seeds")
    if all(one["objective"]["low"] is not None for one in curve):
        low, high = ([one["objective"][side] for one in curve] for side in ("low", "high"))
        axes.fill_between(x, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="95 % interval")
    for one in fronts["problems"]:
        if "lost" not in one:
            axes.errorbar(
                one["forgotten"]["value"],
                one["objective"]["value"],
                xerr=one["forgotten"]["stderr"],
                yerr=one["objective"]["stderr"],
                marker="o",
                markersize=4,
                markerfacecolor="white" if one["dominated"] else _BLUE,
                color=_BLUE,
                elinewidth=0.6,
            )
    if floors := fronts["floor"]:
        at = [one["forgotten"] for one in floors]
        value = [one["value"] for one in floors]
        axes.errorbar(
            at, value, yerr=[one["stderr"] for one in floors], color=_GREY, linestyle=(0, (4, 2)),
            elinewidth=0.6, marker="_", label="floor: no model can lie below",
        )  # fmt: skip
    forgotten, objective = fronts["axes"]["forgotten"], fronts["axes"]["objective"]
    axes.set_xlabel(
        f"forgotten: {forgotten['more_is']} is more ({forgotten['unit']})", parse_math=False
    )
    axes.set_ylabel(f"objective ({objective['unit']})", parse_math=False)
    if forgotten["more_is"] == "smaller":
        axes.invert_xaxis()
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
