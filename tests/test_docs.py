"""The site's sources: what is made from the code is whole, and what is written leads somewhere."""

import dataclasses
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import jax_unlearn
from jax_unlearn.app import cli, parsing

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = DOCS / "_generated"
README = DOCS.parent / "benchmarks" / "README.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(DOCS / "_ext"))
    yield
    sys.path.remove(str(DOCS / "_ext"))


@pytest.fixture(scope="module")
def pages():
    return importlib.import_module("pages")


@pytest.fixture(scope="module")
def docstrings():
    return importlib.import_module("docstrings")


@pytest.mark.parametrize("command", parsing.COMMANDS)
def test_a_command_s_page_has_the_options_of_its_help(pages, capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    helped = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
    heads = re.findall(r"^`([^`]+)`.*\n: .+", pages.command_pages()[command], flags=re.MULTILINE)
    assert len(heads) == len(set(heads)) == len(dataclasses.fields(pages.commands()[command]))
    assert {head for head in heads if head.startswith("--")} <= {*helped}


def test_options_say_what_they_take_and_their_default(pages):
    page = pages.command_pages()["concept"]
    assert "`--steps` *INTEGER* — default `60`\n: Primal-dual steps; the command line takes" in page
    assert "`--threshold` *TEXT, repeatable* — default `calibrated`\n: A number (nats;" in page
    assert "`--save` *pipeline \\| unet \\| lora \\| maxdiffusion* — default `pipeline`" in page
    assert "`--continue`\n: As `--resume`, with other `--steps`, thresholds" in page
    assert "`--clip` *PATH*\n" in page
    assert "`FOLDER` *PATH* — default `unlearned`" in pages.command_pages()["verify"]
    # What only this command has comes before what every run has.
    assert page.index("`--template`") < page.index("`--save` *") < page.index("`--resume`\n")


def public():
    """(module, name) of everything in `__all__` outside the application and the networks."""
    for found in pkgutil.walk_packages(jax_unlearn.__path__, "jax_unlearn."):
        if not found.name.startswith(("jax_unlearn.app", "jax_unlearn.models")):
            module = importlib.import_module(found.name)
            yield from ((module, name) for name in module.__all__)


def test_every_public_name_is_documented_once(pages):
    sources = "\n".join(pages.api_pages().values())
    found = re.findall(r"^\.\. auto(?:class|function|data):: (\S+)::(\S+)$", sources, re.MULTILINE)
    assert len(set(found)) == len(found)
    documented = [(name, getattr(sys.modules[module], name)) for module, name in found]
    missing = [
        f"{module.__name__}.{name}"
        for module, name in public()
        if not any(name == other and getattr(module, name) is thing for other, thing in documented)
    ]
    assert missing == ["jax_unlearn.typing.Array", "jax_unlearn.typing.ArrayLike"]
    for name in ("forward_kl", "primal_dual", "Batch", "NoiseSchedule", *jax_unlearn._LAZY):
        assert f"``jax_unlearn.{name}``" in pages.api_pages()["index"]


def test_links_of_the_pages_resolve(pages):
    made = pages.made(GENERATED)
    scripts = [path.stem for path in (DOCS / "gallery").glob("plot_*.py")]
    assert len(scripts) >= 3
    drawn = {GENERATED / "gallery" / "index.rst"}
    for name in scripts:
        drawn.add(GENERATED / "gallery" / f"{name}.rst")
        drawn.add(GENERATED / "gallery" / "images" / f"sphx_glr_{name}_001.png")
    written = {path: path.read_text("utf-8") for path in DOCS.glob("*.md")}
    for path, text in {**written, **made}.items():
        for link in LINK.findall(text) if path.suffix == ".md" else ():
            if re.match(r"https?://|#", link):
                continue
            place = Path(path.parent, link.split("#")[0]).resolve()
            assert place in {*made, *drawn, *written} or place.is_file(), f"{path.name}: {link}"
        for target in re.findall(r"\{literalinclude\} (\S+)", text):
            assert Path(path.parent, target).is_file(), f"{path.name}: {target}"


def test_names_in_the_pages_exist(pages):
    targets, used = pages.targets(), []
    for path in DOCS.glob("*.md"):
        for text in re.findall(r"\{py:(?:obj|mod)\}`([^`]+)`", path.read_text("utf-8")):
            name = re.sub(r".*<(.+)>", r"\1", text).lstrip("~")
            used.append(name)
            assert name in targets, f"{path.name}: {name}"
    assert len(used) > 20


def test_results_are_those_of_the_benchmarks_tables_first(pages):
    text = README.read_text("utf-8")
    made = pages.result_pages(README, GENERATED / "results")
    assert len(made) == 1 + len(re.findall("^## ", text, re.MULTILINE))
    whole = "\n".join(made.values())
    for line in text.splitlines()[1:]:
        assert "](" in line or line.removeprefix("## ") in whole
    for name, page in made.items():
        if name != "index" and re.search(r"^\|", page, re.MULTILINE):
            assert page.split("\n\n")[1].startswith("|"), name
    assert "By `python benchmarks/concepts.py`." in made["two-concepts-at-once"]


def test_docstrings_become_restructuredtext(docstrings):
    lines = """L(θ, λ) = |x|* of `params` and `lagrangian`s.

    λ ← Π[λ]
    θ ← θ − 1

| aim | x_t |
|---|---|
| "a" | q_ |

- one
  more
- **two**

Args:
  first_: what it is
    in two lines.
  other: a number.

Returns:
  Both: see arXiv 2605.30825.

Raises:
  ValueError: for less.

Example: two.
  >>> 1 + 1
  2""".split("\n")
    link = {"lagrangian": "jax_unlearn.problem.lagrangian"}.get
    assert [line for line in docstrings.as_rst(lines, link) if line] == [
        r"L(θ, λ) = \|x\|\* of ``params`` and "
        r":py:obj:`lagrangian <jax_unlearn.problem.lagrangian>`\ s.",
        "   | λ ← Π[λ]",
        "   | θ ← θ − 1",
        ".. list-table::",
        "   :header-rows: 1",
        "   * - aim",
        r"     - x\_t",
        '   * - "a"',
        r"     - q\_",
        "- one more",
        "- **two**",
        ":Args:",
        r"   * **first\_** – what it is in two lines.",
        "   * **other** – a number.",
        ":Returns:",
        "   Both: see `arXiv 2605.30825 <https://arxiv.org/abs/2605.30825>`__.",
        ":Raises:",
        "   * **ValueError** – for less.",
        ".. rubric:: Example",
        "two.",
        ">>> 1 + 1",
        "2",
    ]


def test_names_in_docstrings_lead_to_what_they_mean(pages):
    targets = pages.targets()

    def resolved(text, inside, taken=()):
        return pages.resolve(text, inside, targets, taken)

    of = "jax_unlearn.formulations.reverse_kl"
    assert resolved("likelihood", of) == "jax_unlearn.formulations.likelihood"
    assert resolved("likelihood", of, ["likelihood"]) is None
    assert resolved("multipliers.box", of) == "jax_unlearn.multipliers.box"
    assert resolved("jax_unlearn.forward_kl", of) == "jax_unlearn.formulations.forward_kl"
    # The module and its function have one name there: the longer path is the function's.
    assert resolved("stored_samples.likelihood_solver", "jax_unlearn.duality.Floor") == (
        "jax_unlearn.duality.likelihood_solver"
    )
    assert resolved("reverse_kl", of) is None
    assert resolved("no such name", of) is None
    assert resolved("nothing", of) is None
