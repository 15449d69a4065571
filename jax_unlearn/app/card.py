"""The model card: README.md in a run's model folder, as the Hugging Face hub shows it.

It is written from the contents of report.json alone. Its pictures lie beside it.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax_unlearn.app.files import replace_file
from jax_unlearn.app.report import Grid, verdict
from jax_unlearn.app.report.figures import draw_grid
from jax_unlearn.app.report.folder import finite
from jax_unlearn.app.report.page import (
    certificate_of,
    environment,
    formulation_of,
    method_of,
    number,
    standing_of,
)

__all__ = ["render_card", "write_card"]

_REFERENCE = "PATH OR NAME OF THE REFERENCE"
_PICTURES = 2
"""Of a report's grids: what is forgotten, and what is kept."""
_MOST = 20
"""Names above this many are counted, not listed."""
_PUNCTUATION = re.compile(r"([\\`*_\[\]<>#|~$&@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
# A path stands at the beginning, or after what joins options; it ends at what joins them.
_PATH = re.compile(r"(?<![^\s,:=|])(?:~?/|[A-Za-z]:\\)(?=[^\s/])[^,|:]*")
_USE = {
    "pipeline": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH OR NAME OF THIS MODEL")""",
    "unet": """from diffusers import {network}

unet = {network}.from_pretrained("PATH OR NAME OF THIS MODEL")""",
    "lora": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base})
pipeline.load_lora_weights("PATH OR NAME OF THIS MODEL")""",
    "maxdiffusion": """from jax_unlearn import load_text_to_image

model = load_text_to_image("maxdiffusion:PATH OF THIS MODEL")""",
}


def _markdown(value: Any) -> str:
    """A text as Markdown shows it: on one line, and none of its characters acts."""
    return _PUNCTUATION.sub(r"\\\1", _line(str(value)))


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _fenced(text: str) -> str:
    """A text as a block of code, which it cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{_line(text)}\n{fence}"


def _public(value: Any) -> Any:
    """A value without the folders of this machine: of absolute paths the last part alone."""
    if isinstance(value, Mapping):
        return {name: _public(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return _PATH.sub(_last_part, value) if isinstance(value, str) else value


def _last_part(match: re.Match[str]) -> str:
    return re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]


def _front(report: Mapping[str, Any], lora: bool) -> dict[str, str]:
    """The hub's metadata; all of it is of few characters, or in quotes."""
    asked = report["asked"]
    front = dict(asked.get("license") or {})
    if asked.get("commit"):
        front |= {"base_model": asked["model"]}
        front |= {"base_model_relation": "adapter" if lora else "finetune"}
    if asked.get("pipeline_tag"):
        front |= {"pipeline_tag": asked["pipeline_tag"]}
    return {name: json.dumps(value) for name, value in front.items()}


def render_card(report: Mapping[str, Any], pictures: Sequence[tuple[str, str, str]]) -> str:
    """The text of a model card.

    Args:
      report: the contents of report.json.
      pictures: title, caption and file of each.
    """
    asked = _public(report["asked"])
    report = {**report, "asked": asked, "constraints": _public(list(report["constraints"]))}
    options = {n: v for n, v in (asked.get("options") or {}).items() if n != "out" and v != ""}
    kind = options.get("save", "pipeline")
    text = asked.get("pipeline_tag") == "text-to-image"
    names = [str(entry["name"]) for entry in asked["forget"]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    found = environment()
    found.filters.update(markdown=_markdown, fenced=_fenced, number=number)
    return found.get_template("card.md.jinja").render(
        report=report,
        front=_front(report, kind == "lora"),
        lora=kind == "lora",
        library="jax" if kind == "maxdiffusion" else "diffusers",
        model=asked["model"],
        subject=", ".join(names[:3]) + more,
        state=standing_of(report),
        verdict=verdict(report),
        pictures=pictures,
        forgotten=[{"images": None, **entry} for entry in asked["forget"][:_MOST]],
        more_forgotten=max(0, len(names) - _MOST),
        formulation=formulation_of(report),
        method=method_of(report),
        thresholds=asked.get("thresholds") or "none",
        certificate=certificate_of(report),
        use=_USE[kind].format(
            base=json.dumps(asked["model"] if asked.get("commit") else _REFERENCE),
            network="UNet2DConditionModel" if text else "UNet2DModel",
        ),
        command=re.sub(r"--config .*run\.json", "--config run.json", asked["command"]),
        options=options,
    )


def write_card(folder: pathlib.Path, report: Mapping[str, Any], grids: Sequence[Grid]) -> None:
    """Writes README.md, and the pictures that it shows, into a model's folder.

    Absolute paths are shortened to their last part: the folder is made to be published.

    Args:
      folder: of the model.
      report: what report.json holds, or will.
      grids: samples before and after; the first two are shown.
    """
    pictures = []
    for place, grid in enumerate(grids[:_PICTURES], start=1):
        file = f"samples_{place}.png"
        replace_file(folder / file, draw_grid(grid))
        pictures.append((_public(grid.title), _public(grid.caption), file))
    text = render_card(finite(report), pictures)
    replace_file(folder / "README.md", text.encode())
