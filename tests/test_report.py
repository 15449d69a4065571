"""Report: what the page says, that it stands alone, and that files are written whole."""

import copy
import html.parser
import io
import json
import math
import os
import re

import numpy as np
import pytest
from PIL import Image

from jax_unlearn.app.report import Grid, read_rows, verdict, write_comparison, write_report
from jax_unlearn.app.report.figures import draw_curves, draw_grid

VOID = {"meta", "img", "br", "hr", "link", "input", "col"}


def constraint(name="sneaker", value=3.214, stderr=0.012, threshold=3.0, multiplier=0.713):
    return {
        "name": name,
        "value": value,
        "stderr": stderr,
        "unit": "bits/dim",
        "threshold": threshold,
        "reference_value": 2.417,
        "slack": None if threshold is None else value - threshold,
        "multiplier": multiplier,
        "satisfied": None if threshold is None else value >= threshold,
    }


def make_report(*constraints, **changes):
    return {
        "asked": {
            "command": "jax-unlearn run --steps 30",
            "model": "fashion",
            "forget": [
                {"name": c["name"], "source": "data", "images": 6000, "label": 7}
                for c in constraints
            ],
            "retain": {"name": "rest", "source": "rest", "images": 54000, "label": None},
            "thresholds": "absolute",
            "options": {"batch_size": 128, "learning_rate": 1e-5},
        },
        "formulation": "forward_kl",
        "objective": {"value": 0.0321, "stderr": 0.0018, "unit": "bits/dim", "description": "KL"},
        "constraints": list(constraints),
        "feasible": all(c["satisfied"] is not False for c in constraints),
        "complementary_slackness": -0.1526,
        "steps": 30,
        "seconds": 125.0,
        "timing": {"compile": 4.25, "train": 120.75},
        "seed": 17,
        "device": "cpu",
        "versions": {"jax_unlearn": "0.1.0"},
        **changes,
    }


def make_rows(m, number=30):
    thresholds = np.full(m, 3.0)
    return [
        {
            "step": 10 * i,
            "objective": 0.01 * i,
            "values": (2.5 + 0.03 * i + 0.01 * np.arange(m)).tolist(),
            "violations": (0.5 - 0.03 * i - 0.01 * np.arange(m)).tolist(),
            "multipliers": (0.01 * i * np.ones(m)).tolist(),
            "thresholds": thresholds.tolist(),
            "seconds": 0.1 * i,
        }
        for i in range(number)
    ]


def make_grid(number=6, size=8, channels=1, columns=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, number, size, size, channels), dtype=np.uint8)
    return Grid("Sneakers", "The same noise.", images[0], images[1], columns)


class Page(html.parser.HTMLParser):
    """Checks that tags balance; collects the text, and every attribute with its tag."""

    def __init__(self, source):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def write(folder, report, rows=(), grids=()):
    path = write_report(folder, report, rows, grids)
    return Page(path.read_text("utf-8"))


def test_page_is_balanced_and_self_contained(tmp_path):
    page = write(tmp_path, make_report(constraint()), make_rows(1), [make_grid()])
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "iframe", "object"}
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(links) == 3  # Samples before, after, and curves.
    assert all(link.startswith("data:image/png;base64,") for link in links)
    source = (tmp_path / "report.html").read_text("utf-8")
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source
    images = sum(tag == "img" and name == "src" for tag, name, _ in page.attributes)
    texts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(texts) == images
    assert all(texts)


def test_writes_every_file_and_nothing_else(tmp_path):
    report = make_report(constraint())
    write(tmp_path / "new" / "folder", report, make_rows(1), [make_grid(), make_grid()])
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"report.json", "report.html", "curves.png", "grid_1.png", "grid_2.png"}
    assert json.loads((tmp_path / "new/folder/report.json").read_text("utf-8")) == report


def test_every_number_of_the_certificate_appears(tmp_path):
    first = constraint()
    second = constraint("bag", value=-12.3456, stderr=0.5, threshold=2.25, multiplier=0.0)
    page = write(tmp_path, make_report(first, second))
    # Rounded by hand: two digits of the standard error; otherwise four significant digits.
    for shown in ("3.214 ± 0.012", "≥ 3", "0.214", "0.713", "2.417", "✓ yes"):
        assert shown in page.text
    for shown in ("−12.35 ± 0.50", "≥ 2.25", "−14.6", "✗ no", "0.0321 ± 0.0018", "−0.1526"):
        assert shown in page.text
    exact = {value for tag, name, value in page.attributes if (tag, name) == ("data", "value")}
    for entry in (first, second):
        for key in ("value", "threshold", "slack", "multiplier", "reference_value"):
            assert repr(entry[key]) in exact
    for shown in ("1 of 2", "1e-05", "2 min 05 s", "4.25 s", "17", "jax-unlearn run --steps 30"):
        assert shown in page.text


def test_likelihood_constraints_are_upper_bounds(tmp_path):
    entry = {**constraint(value=0.02, stderr=0.001, threshold=0.01), "slack": -0.01}
    entry["satisfied"] = False
    report = make_report(entry, formulation="likelihood")
    assert "≤ 0.01" in write(tmp_path, report).text
    assert "threshold at most 0.01, missed by 0.01" in verdict(report)


def floor_and_gap(value=0.0201, effective=41.26, **more):
    beside = {"unit": "nats", "effective": effective}
    return {
        "floor": {"value": value, "stderr": 0.0024, **beside, **more},
        "gap": {"value": 0.0321 - value, "stderr": 0.003, **beside},
    }


def test_the_page_says_what_no_model_can_beat(tmp_path):
    plain = write(tmp_path / "none", make_report(constraint()))
    assert "Floor and gap" not in plain.text
    page = write(tmp_path / "some", make_report(constraint(), **floor_and_gap()))
    for shown in ("0.0201 ± 0.0024 nats", "0.0120 ± 0.0030 nats", "41.3 effective ones carry it"):
        assert shown in page.text
    for absent in ("too few", "95 % confidence", "This gap is negative"):
        assert absent not in page.text
    exact = {value for tag, name, value in page.attributes if (tag, name) == ("data", "value")}
    assert {repr(0.0201), repr(0.0321 - 0.0201)} <= exact
    few = write(tmp_path / "few", make_report(constraint(), **floor_and_gap(effective=19.4)))
    assert "19.4 effective ones carry it, too few to call it a bound" in few.text
    sure = write(tmp_path / "sure", make_report(constraint(), **floor_and_gap(lower=0.0125)))
    assert "With 95 % confidence the floor is at least 0.0125" in sure.text
    below = write(tmp_path / "below", make_report(constraint(), **floor_and_gap(value=0.05)))
    assert "This gap is negative" in below.text


def test_a_gap_that_is_not_finite_is_a_dash(tmp_path):
    given = floor_and_gap(value=math.nan)
    page = write(tmp_path, make_report(constraint(), **given))
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["non_finite"] == ["floor.value", "gap.value"]
    assert "Floor and gap No model that meets the thresholds pays less than the floor: —" in (
        page.text
    )


def test_the_formula_is_the_one_that_is_given(tmp_path):
    formula = "minimise KL(p‖q) subject to E_p[hᵢ] ≤ εᵢ & <more>"
    report = make_report(constraint(), formulation="likelihood", formula=formula)
    page = write(tmp_path / "one", report)
    assert f"Likelihood: {formula}; q is the reference model" in page.text
    side_by_side = Page(write_comparison(tmp_path, ["one"]).read_text("utf-8"))
    assert formula in side_by_side.text


def test_names_are_escaped(tmp_path):
    name = '<script>alert("x")</script> & _$\\frac$ 運動靴'
    report = make_report(constraint(name), constraint("_plain"))
    report["metrics"] = {"agreement": {"after": {name: {"rate": 0.1, "stderr": 0.1, "count": 5}}}}
    report["asked"]["command"] = f"run --forget '{name}'"
    grid = make_grid()._replace(title=f'" onerror="{name}', caption=name)
    page = write(tmp_path, report, make_rows(2), [grid])
    assert not [tag for tag, _, _ in page.attributes if tag == "script"]
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in (tmp_path / "report.html").read_text("utf-8")
    assert page.text.count(name) >= 5


def test_many_constraints_are_summarised(tmp_path):
    m = 500
    values = 3.0 + 0.01 * np.random.default_rng(0).permutation(np.arange(m) - 99)
    entries = [constraint(f"image {i}", value=v, multiplier=float(i)) for i, v in enumerate(values)]
    for i, entry in enumerate(entries):  # exactly: 99 miss their threshold
        entry["satisfied"] = bool(values[i] > 2.999)
    report = make_report(*entries, feasible=False)
    page = write(tmp_path, report, make_rows(m))
    assert "401 of 500 constraints are satisfied" in page.text
    assert "99 of 500 constraints are violated" in page.text
    assert "499 of 500 multipliers are above 0" in page.text
    assert "249.5" in page.text  # the median
    rows = re.findall(r'<th scope="row">(image \d+)</th>', (tmp_path / "report.html").read_text())
    assert rows == [f"image {i}" for i in np.argsort(values)[:20]]
    assert f"the worst is “{rows[0]}”" in page.text
    assert len(json.loads((tmp_path / "report.json").read_text())["constraints"]) == m


@pytest.mark.parametrize(("m", "same"), [(1, True), (7, False), (8, True), (40, False)])
def test_curves_of_few_and_many_constraints(m, same):
    rows = make_rows(m, 90)
    if not same:
        for row in rows:
            row["thresholds"] = [3.0 + 0.1 * i for i in range(m)]
    rows[3]["values"][0] = math.nan
    rows[4]["objective"] = None
    report = make_report(*(constraint(f"image {i}") for i in range(m)))
    with Image.open(io.BytesIO(draw_curves(report, rows))) as image:
        assert image.width >= 1200


def test_metrics_are_optional_and_unknown_ones_are_shown(tmp_path):
    page = write(tmp_path / "none", make_report(constraint()))
    for absent in ("KID", "Classifier agreement", "Further metrics"):
        assert absent not in page.text
    assert "No samples were drawn" in page.text
    assert "No metrics were recorded" in page.text

    def pair(before, after):
        return {"before": {"value": before, "stderr": 0.5}, "after": {"value": after}}

    metrics = {
        "agreement": {
            "before": {"sneaker": {"rate": 0.987, "stderr": 0.011, "count": 1234}},
            "after": {"sneaker": {"rate": 0.021, "stderr": 0.013, "count": 1234}},
        },
        "fid": {"before": 8.125, "after": 9.375},
        "nelbo": {
            "held_out": {**pair(4.5, 7.75), "change": {"value": 3.25, "stderr": 0.0625}},
            "unit": "bits/dim",
        },
        "precision_at_k": pair(16.5, 32.25),
    }
    page = write(tmp_path / "some", make_report(constraint(), metrics=metrics))
    for shown in ("0.987 ± 0.011", "0.021 ± 0.013", "1,234", "to forget", "FID", "8.125", "9.375"):
        assert shown in page.text
    for shown in (
        "held out",
        "4.50 ± 0.50",
        "7.75",
        "3.250 ± 0.062",
        "precision at k",
        "16.50 ± 0.50",
        "32.25",
    ):
        assert shown in page.text
    assert "KID" not in page.text.replace("unbiased KID", "")


def test_numbers_that_are_not_finite_are_null_and_listed(tmp_path):
    entry = {**constraint(value=math.nan), "satisfied": False}
    report = make_report(constraint("bag"), entry, feasible=False, seed=np.int64(3))
    report["objective"]["stderr"] = math.inf
    before = copy.deepcopy(report["objective"])
    page = write(tmp_path, report)
    assert report["objective"] == before

    def refuse(token):
        raise AssertionError(token)

    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert stored["constraints"][1]["value"] is None
    assert stored["seed"] == 3
    assert stored["non_finite"] == [
        "objective.stderr",
        "constraints[1].value",
        "constraints[1].slack",
    ]
    assert "constraints[1].slack" in page.text
    assert "the worst is “sneaker” at no finite value" in verdict(stored)
    assert verdict(report) == verdict(stored)


def test_verdict_says_how_closely_constraints_hold():
    sentence = verdict(make_report(constraint()))
    assert sentence == (
        "The constraint “sneaker” is satisfied; it ends at 3.214 ± 0.012 bits/dim "
        "(threshold at least 3, slack 0.214, multiplier 0.713)."
    )
    close = constraint("bag", value=3.01)
    sentence = verdict(make_report(constraint(), close))
    assert sentence.startswith("Both constraints are satisfied; the tightest is “bag”")
    assert sentence.endswith("within two standard errors of the threshold, too close to call.")
    # What counts as satisfied within its error may be on the wrong side.
    short = constraint(value=2.99) | {"satisfied": True}
    assert verdict(make_report(short)) == (
        "The constraint “sneaker” is satisfied within two standard errors; it ends at 2.990 ± "
        "0.012 bits/dim (threshold at least 3, missed by 0.01, multiplier 0.713). That is within "
        "two standard errors of the threshold, too close to call."
    )


@pytest.mark.parametrize(
    ("value", "satisfied", "heading", "row"),
    [
        (3.2, True, "✓ Constraints satisfied", "✓ yes"),
        (2.99, True, "– Constraints satisfied within their errors", "– too close"),
        (2.9, False, "✗ Constraints violated", "✗ no"),
    ],
)
def test_a_report_does_not_call_missed_thresholds_met(tmp_path, value, satisfied, heading, row):
    entry = constraint(value=value) | {"satisfied": satisfied}
    path = write_report(
        tmp_path / "one", make_report(constraint("a"), entry, feasible=satisfied), [], []
    )
    text = path.read_text("utf-8")
    assert f"<strong>{heading}</strong>" in text
    assert text.count(row) == (2 if row == "✓ yes" else 1)
    assert ("within errors alone" in text) == (row == "– too close")
    side_by_side = write_comparison(tmp_path, ["one"]).read_text("utf-8")
    assert f"<strong>Forward KL: {heading}</strong>" in side_by_side


def test_verdict_names_the_worst_violation():
    entries = [constraint("a", value=2.9), constraint("b", value=2.5, multiplier=41.0)]
    sentence = verdict(make_report(*entries, constraint("c")))
    assert sentence == (
        "2 of 3 constraints are violated; the worst is “b” at 2.500 ± 0.012 bits/dim "
        "(threshold at least 3, missed by 0.5, multiplier 41)."
    )
    sentence = verdict(make_report(constraint("a", value=2.9), constraint("c")))
    assert sentence.startswith("1 of 2 constraints is violated; the worst is “a”")


def test_verdict_without_thresholds_and_with_a_contradiction(tmp_path):
    free = constraint(threshold=None)
    assert "No threshold was set" in verdict(make_report(free))
    page = write(tmp_path / "free", make_report(free))
    assert "no threshold" in page.text
    write(tmp_path / "empty", make_report())
    with pytest.raises(ValueError, match="1 of 1 constraints are not satisfied"):
        write_report(tmp_path / "no", make_report(constraint(value=1.0), feasible=True), [], [])
    assert not (tmp_path / "no").exists()


def test_read_rows_leaves_out_only_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "objective": 1.5}\n{"step": 1, "objective": NaN}\n'
    path.write_text(whole + '{"step": 2, "obj')
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [0, 1]
    assert math.isnan(rows[1]["objective"])
    path.write_bytes(whole.encode() + '{"name": "é'.encode()[:-1])
    assert len(read_rows(path)) == 2
    path.write_text(whole + '{"step": 2}')
    assert len(read_rows(path)) == 3
    path.write_text("")
    assert read_rows(path) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 0}\n{"step": 1, "ob\n{"step": 2}\n', 2),
        ('{"step": 0}\n{"step": 1, "ob\n', 2),
        ('{"step": 0}\n\n{"step": 2}\n', 2),
        ('[1, 2]\n{"step": 0}\n', 1),
        ('{"step": 0}\nnot a row', 2),
    ],
)
def test_read_rows_refuses_any_other_line(tmp_path, text, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"line {line}"):
        read_rows(path)


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    write(tmp_path, make_report(constraint()))
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(source, target):
        assert os.path.dirname(source) == str(tmp_path)  # one file system: the rename is atomic
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_report(tmp_path, make_report(constraint("bag")), [], [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_grid_keeps_every_pixel_of_small_images():
    grid = make_grid(number=5, size=8, channels=3, columns=3)
    with Image.open(io.BytesIO(draw_grid(grid))) as image:
        pixels = np.asarray(image.convert("RGB"))
    # A whole factor: each source pixel is a block; look for the first image's corner blocks.
    factor = (960 // 3 - 4) // 8
    block = np.kron(grid.before[0], np.ones((factor, factor, 1), np.uint8))
    starts = np.argwhere((pixels == block[0, 0]).all(-1))
    assert any(
        np.array_equal(pixels[y : y + block.shape[0], x : x + block.shape[1]], block)
        for y, x in starts[:50]
    )
    after = np.kron(grid.after[4], np.ones((factor, factor, 1), np.uint8))
    starts = np.argwhere((pixels == after[0, 0]).all(-1))
    assert any(
        np.array_equal(pixels[y : y + after.shape[0], x : x + after.shape[1]], after)
        for y, x in starts
    )


def test_large_images_are_reduced():
    images = np.zeros((2, 512, 384, 3), np.uint8)
    grid = Grid("photographs", "", images, images, 8)
    many = Grid("photographs", "", images.repeat(8, 0), images.repeat(8, 0), 8)
    for drawn in (grid, many):
        with Image.open(io.BytesIO(draw_grid(drawn))) as image:
            assert image.width < 4500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": np.zeros((5, 8, 8, 1), np.uint8)}, "one shape"),
        ({"before": np.zeros((6, 8, 8, 1)), "after": np.zeros((6, 8, 8, 1))}, "uint8"),
        ({"columns": 0}, "one column"),
    ],
)
def test_grids_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, make_report(constraint()), [], [make_grid()._replace(**changes)])


def test_rows_of_different_lengths_are_refused():
    rows = make_rows(2)
    rows[5]["values"] = [1.0]
    with pytest.raises(ValueError, match="'values' of one length"):
        draw_curves(make_report(constraint(), constraint("b")), rows)
