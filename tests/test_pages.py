"""Reports in a browser: nothing is wider than the page, and a printed page shows all of it."""

import math

import pytest
from browser import CHROMIUM, measure
from test_report import constraint, floor_and_gap, make_grid, make_report, make_rows

from jax_unlearn.app.report import write_comparison, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]
PAGES = ("few", "many", ".")
LAYOUT = """
  const root = document.scrollingElement;
  const [red, green, blue] = window.getComputedStyle(document.body).backgroundColor
    .match(/\\d+/g).map(Number);
  return {
    width: window.innerWidth, content: root.scrollWidth, headings:
    [...document.querySelectorAll("h2")].map((heading) => heading.textContent),
    dark: red + green + blue < 384, loaded: [...document.images].map((one) => one.naturalWidth),
    spilling: [...document.querySelectorAll("main *")]
      .filter((one) => !one.closest(".scroll"))
      .filter((one) => one.getBoundingClientRect().right > root.clientWidth + 1)
      .map((one) => one.outerHTML.slice(0, 200)),
  };
"""
PRINTED = """
  const inside = [...document.querySelectorAll("details > :not(summary)")];
  const pictures = [...document.querySelectorAll("figure")];
  return {
    folded: document.querySelectorAll("details").length,
    hidden: inside.filter((one) => one.getBoundingClientRect().height < 10).length,
    shown: inside.filter((one) => one.checkVisibility({contentVisibilityAuto: true})).length,
    inside: inside.length,
    heights: pictures.map((one) => one.getBoundingClientRect().height),
    breaks: pictures.map((one) => window.getComputedStyle(one).breakInside),
    wide: [...document.querySelectorAll("main *")]
      .filter((one) => one.getBoundingClientRect().right > document.body.clientWidth + 1)
      .map((one) => one.outerHTML.slice(0, 200)),
  };
"""


def hard(count):
    """A report with whatever makes a page wide: long names, units, paths, and many rows."""
    unit = "mean squared error a dimension, evenly weighted over time"
    entries = [
        constraint(f"a photograph of the object number {i} by somebody") | {"unit": unit}
        for i in range(count)
    ]
    report = make_report(*entries, **floor_and_gap(), formula="minimise KL(p‖q) s. t. " + "E" * 60)
    report["objective"]["unit"] = unit
    report["asked"]["model"] = "/a/folder/" + "m" * 90
    report["asked"]["command"] = "jax-unlearn data --config /" + "x" * 150 + "/run.json"
    report["asked"]["retain"] = [{"name": "n" * 80, "images": 5}] * 20
    report["asked"]["options"] |= {"template": "t" * 120}
    rates = {
        f"a photograph of thing {i}": {"rate": 0.5, "stderr": 0.1, "count": 9} for i in range(20)
    }
    report["metrics"] = {"agreement": {"before": rates, "after": rates}}
    report["identity"] = {
        "digest": "0" * 64,
        "model": {"parameters": "1" * 64, "files": {"unet/" + "w" * 80: "2" * 64}},
        "inputs": {"forget": "3" * 64},
    }
    report["files"] = {"model/unet/diffusion_pytorch_model.safetensors": "4" * 64}
    return report


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_report(folder / "few", hard(2), make_rows(2), [make_grid(), make_grid(200, columns=4)])
    write_report(folder / "many", hard(30), make_rows(30, 100), [make_grid(40, columns=8)])
    write_comparison(folder, ["few", "many", "many"])
    return folder


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_and_does_not_complain(pages, tmp_path, dark):
    given = [(pages / name / "report.html", width) for name in PAGES for width in (400, 1280)]
    every, messages = measure(given, tmp_path, LAYOUT, dark=dark)
    assert messages == []
    for (_, width), found in zip(given, every, strict=True):
        assert found["width"] == width
        assert found["content"] <= width
        assert found["spilling"] == []
        assert found["dark"] == dark
        assert found["loaded"]
        assert all(found["loaded"])


def test_a_page_opens_with_verdict_and_pictures(pages, tmp_path):
    given = [(pages / name / "report.html", 1280) for name in ("few", ".")]
    (one, together), _ = measure(given, tmp_path, LAYOUT)
    assert one["headings"] == [
        "Samples before and after", "Certificate", "Over the run", "Metrics", "How to read this",
        "What was asked", "Repeating this run", "Identity and files",
    ]  # fmt: skip
    assert together["headings"] == ["What is forgotten", "What is retained", "Numbers"]


def test_a_printed_page_opens_what_is_folded_and_cuts_no_picture(pages, tmp_path):
    width, height = (96 / 25.4 * (side - 2 * 15) for side in (210, 297))
    given = []
    for name in PAGES:
        text = (pages / name / "report.html").read_text("utf-8")
        assert "@page { size: A4; margin: 15mm; }" in text
        printed = tmp_path / f"printed-{len(given)}.html"
        printed.write_text(text.replace("@media print", "@media all"), "utf-8")
        given.append((printed, math.floor(width)))
    every, _ = measure(given, tmp_path, PRINTED)
    assert [found["folded"] > 0 for found in every] == [True, True, False]
    for found in every:
        assert found["hidden"] == 0
        assert found["shown"] == found["inside"]
        assert set(found["breaks"]) == {"avoid"}
        assert 100 < max(found["heights"]) < height
        assert found["wide"] == []


def test_the_browser_tells(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<main><p style='width:900px'>x</p></main><script>throw Error('no')</script>")
    ((found,), messages) = measure([(page, 400)], tmp_path, LAYOUT)
    assert found["content"] == 908
    assert len(found["spilling"]) == 1
    assert "Uncaught Error: no" in messages[0]
