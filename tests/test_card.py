"""Model cards: what the hub reads of them, what a reader sees, and what must not act."""

import json
import re

import pytest
from test_report import constraint, floor_and_gap, make_grid, make_report

from jax_unlearn.app.card import render_card, write_card
from jax_unlearn.pretrained.hub import license_of

HOSTILE = "a|b `c` <script>x</script> [l](http://e.vil) ![i](x)\n# head\n---\n*_~$@\x1b[31m"


def asked(report, **more):
    report["asked"] |= more
    return report


def of_the_hub(save="pipeline", **more):
    given = {"commit": "0" * 40, "model": "owner/name", "pipeline_tag": "text-to-image"}
    given |= {"license": {"license": "openrail", "license_link": "https://a.b/c"}} | more
    return asked(make_report(constraint()), options={"save": save, "seed": 3}, **given)


def front_of(text):
    """The metadata, by a reader of the only forms that are written: words, json, and a list."""
    lines = text.split("\n---\n", 1)[0].removeprefix("---\n").split("\n")
    found, tags = {}, []
    for line in lines:
        if line.startswith("- "):
            tags.append(line[2:])
        else:
            name, value = line.split(":", 1)
            found[name] = json.loads(value) if '"' in value else value.strip()
    return found | {"tags": tags}


def test_the_hub_is_told_what_the_model_is():
    assert front_of(render_card(of_the_hub(), [])) == {
        "library_name": "diffusers",
        "license": "openrail",
        "license_link": "https://a.b/c",
        "base_model": "owner/name",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusion", "unlearning", "jax_unlearn"],
    }
    front = front_of(render_card(of_the_hub("lora"), []))
    assert front["base_model_relation"] == "adapter"
    assert front["tags"][-1] == "lora"


def test_a_model_of_this_machine_is_of_no_repository():
    report = of_the_hub(commit="", model="/home/somebody/model", license={}, pipeline_tag=None)
    text = render_card(report, [])
    assert front_of(text).keys() == {"library_name", "tags"}
    assert "# model without sneaker" in text


def test_hub_reads_the_same_metadata(tmp_path):
    """The library of the hub is the oracle."""
    import huggingface_hub

    (tmp_path / "README.md").write_text(render_card(of_the_hub("lora"), []), "utf-8")
    found = huggingface_hub.metadata_load(tmp_path / "README.md")
    assert found["base_model"] == "owner/name"
    assert found["tags"] == ["diffusion", "unlearning", "jax_unlearn", "lora"]
    assert found["license_link"] == "https://a.b/c"


@pytest.mark.parametrize(
    ("save", "line"),
    [
        ("pipeline", "DiffusionPipeline.from_pretrained("),
        ("unet", "UNet2DConditionModel.from_pretrained("),
        ("lora", 'from_pretrained("owner/name")\npipeline.load_lora_weights('),
    ],
)
def test_a_card_says_how_its_model_is_loaded(save, line):
    code = re.search(r"```python\n(.*?)\n```", render_card(of_the_hub(save), []), re.DOTALL)[1]
    assert line in code
    compile(code, "card", "exec")


def test_a_card_states_the_certificate():
    close = constraint("bag", value=2.99) | {"satisfied": True}
    report = make_report(constraint(), close, **floor_and_gap(), formula="minimise KL(p‖q)")
    text = render_card(report, [("Sneakers", "The same noise.", "samples_1.png")])
    for shown in (
        "| sneaker | 2.417 | 3.214 ± 0.012 bits/dim | ≥ 3 | 0.713 | yes |",
        "| bag | 2.417 | 2.990 ± 0.012 bits/dim | ≥ 3 | 0.713 | too close |",
        "Forward KL: minimise KL(p‖q).",
        "- Price: 0.0321 ± 0.0018 bits/dim (KL).",
        "meets the thresholds: 0.0201 ± 0.0024 nats. Gap: 0.0120 ± 0.0030.",
        "](samples_1.png)",
        "jax-unlearn run --steps 30",
        "| batch\\_size | 128 |",
        "jax\\_unlearn 0.1.0",
        "Nothing here claims that the model complies with any law.",
    ):
        assert shown in text
    many = render_card(make_report(*(constraint(f"image {i}") for i in range(30))), [])
    assert "The table shows the 20 tightest of 30 constraints." in many
    assert "And 10 more." in many
    assert "![" not in many
    none = render_card(make_report(constraint(threshold=None, multiplier=None)), [])
    assert "| sneaker | 2.417 | 3.214 ± 0.012 bits/dim | none | — | — |" in none


def test_no_text_of_the_user_acts():
    report = make_report(constraint(HOSTILE))
    asked(
        report, model=HOSTILE, options={"template": HOSTILE}, commit="1", command="```\nx" + HOSTILE
    )
    text = render_card(report, [(HOSTILE, HOSTILE, "samples_1.png")])
    assert "\x1b" not in text
    assert front_of(text)["base_model"] == HOSTILE
    body = text.split("\n---\n", 1)[1]
    fence = re.search(r"^(`{4,})\n.*\n\1$", body, re.MULTILINE)  # Longer than what is inside.
    body = body.replace(fence[0], "")
    for acting in ("<script", "](http", "[i", "`c", "|b"):
        assert not re.search(rf"(?<!\\){re.escape(acting)}", body)
    assert "http://" not in body
    assert not re.search(r"^# head|^\*_", body, re.MULTILINE)
    rows = [line for line in body.splitlines() if line.startswith("| a")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 7}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/photos of us", "photos of us"),
        ("/home/me/photos:cat, ~/more/b.npz", "photos:cat, b.npz"),
        ("C:\\owners\\me\\photos", "photos"),
        ("a cat and/or a dog / bird", "a cat and/or a dog / bird"),
        ("owner/name", "owner/name"),
    ],
)
def test_folders_of_this_machine_are_not_published(given, shown):
    report = make_report(constraint(given))
    asked(report, options={"forget": given, "out": "/home/me/out"}, forget=[{"name": given}])
    asked(report, command="jax-unlearn data --config /home/me/o ut/run.json --out NEW")
    text = render_card(report, [])
    assert f"| forget | {shown.replace('~', chr(92) + '~')} |" in text
    assert "jax-unlearn data --config run.json --out NEW" in text
    assert "home" not in text
    assert "owners" not in text


def test_the_card_and_its_pictures_are_written(tmp_path):
    report = make_report(
        constraint(), objective={"value": float("nan"), "stderr": 1.0, "unit": "n"}
    )
    report["objective"]["description"] = ""
    write_card(tmp_path, report, [make_grid(), make_grid(), make_grid()])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "samples_1.png", "samples_2.png"}
    assert "- Price: — n." in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\r\nlicense: 'apache-2.0'\r\ntags: [x]\r\n---\r\ntext", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b/c.md\n---\n",
            {"license": "other", "license_name": "own", "license_link": "https://a.b/c.md"},
        ),
        ("---\nlicense: mit\n", {}),
        ("license: mit\n", {}),
        ("---\ntags: x\n---\nlicense: mit\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ('---\nlicense: "a\nb: c"\n---\n', {}),
        ("---\nlicense: <b>\n---\n", {}),
        ("---\nlicense: " + "x" * 300 + "\n---\n", {}),
    ],
)
def test_the_licence_of_the_base_is_that_of_its_card(tmp_path, card, found):
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(card.encode() + b"\xff")
    assert license_of(tmp_path) == found


def test_a_card_that_is_no_file_is_none(tmp_path):
    (tmp_path / "README.md").mkdir()
    assert license_of(tmp_path) == {}
