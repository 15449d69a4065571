"""Docstrings of this library, Markdown with sections of arguments, as reStructuredText."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence

SECTION = re.compile(r"(Args|Args of a call|Returns|Raises|Attributes|References|Example):( .*)?$")
ENTRY = re.compile(r"([\w*]+(?:, [\w*]+)*): ?(.*)$")
CODE = re.compile(r"``?([^`]+)``?")
RELATION = re.compile(r"[=←∝≤≥∈]")
Link = Callable[[str], str | None]


def as_rst(lines: Sequence[str], link: Link) -> list[str]:
    """A docstring's lines; `link` gives what a code span refers to, or None."""
    title, body, made = "", [], []
    for line in [*lines, "Returns:"]:
        if found := SECTION.match(line):
            made += _section(title, body, link)
            title, rest = found[1], (found[2] or "").strip()
            body = [rest] if rest else []
        else:
            # The body of a section is indented, but for what stands beside its title.
            body.append(line)
    return made


def _section(title: str, body: Sequence[str], link: Link) -> list[str]:
    if title and body:
        beside = [] if body[0].startswith(" ") or not body[0] else [body[0]]
        body = beside + textwrap.dedent("\n".join(body[len(beside) :])).split("\n")
    if not title:
        return list(_prose(body, link))
    if title in ("Example", "References"):
        return ["", f".. rubric:: {title}", "", *_prose(body, link), ""]
    if not any(body):
        return []
    if title == "Returns":
        inside = list(_prose(body, link))
    else:
        inside = [line for entry in _entries(body) for line in _entry(entry, link)]
    return ["", f":{title}:", *(f"   {line}".rstrip() for line in inside), ""]


def _entries(body: Sequence[str]) -> Iterator[list[str]]:
    """The lines of each `name: text`, whose further lines are indented."""
    entry: list[str] = []
    for line in body:
        if line and not line.startswith(" ") and entry:
            yield entry
            entry = []
        entry.append(line)
    yield entry


def _entry(entry: Sequence[str], link: Link) -> list[str]:
    first, rest = entry[0], textwrap.dedent("\n".join(entry[1:])).split("\n")
    found = ENTRY.match(first)
    name, text = (f"**{escaped(found[1])}** – ", found[2]) if found else ("", first)
    made = list(_prose([text, *rest], link))
    made[0] = name + made[0]
    return [f"* {made[0]}", *(f"  {line}".rstrip() for line in made[1:])]


def _prose(lines: Sequence[str], link: Link) -> Iterator[str]:
    """Paragraphs, lists, tables, formulas and doctests."""
    for block in _blocks(lines):
        text = "\n".join(block)
        if text.lstrip().startswith(">>>"):
            yield from block
        elif text.startswith("|"):
            yield from _table(block, link)
        elif text.startswith("- "):
            yield from _list(block, link)
        elif _is_formula(block):
            dedented = textwrap.dedent(text).split("\n")
            yield from (f"   | {_inline(line, link)}" for line in dedented)
        else:
            yield _inline(" ".join(line.strip() for line in block), link)
        yield ""


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in lines:
        begins = line.startswith(">>>") and block and not block[0].startswith(">>>")
        if (not line.strip() or begins) and block:
            yield block
            block = []
        if line.strip():
            block.append(line)
    if block:
        yield block


def _is_formula(block: Sequence[str]) -> bool:
    """Whether its lines are formulas, one each."""
    alone = block[0].startswith("    ")
    several = len(block) > 1 and not block[-1].endswith(".")
    return alone or (several and all(RELATION.search(line) for line in block))


def _list(block: Sequence[str], link: Link) -> Iterator[str]:
    items: list[str] = []
    for line in block:
        if line.startswith("- "):
            items.append(line[2:])
        else:
            items[-1] += f" {line.strip()}"
    for item in items:
        yield f"- {_inline(item, link)}"


def _table(block: Sequence[str], link: Link) -> Iterator[str]:
    yield from (".. list-table::", "   :header-rows: 1", "")
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block]
    width = max(map(len, rows))
    for row in rows[:1] + rows[2:]:
        cells = [*row, *[""] * (width - len(row))]
        for place, cell in enumerate(cells):
            yield f"   {'- ' if place else '* - '.rjust(2)}{_inline(cell, link)}".replace(
                "   - ", "     - ", 1
            )


def escaped(text: str) -> str:
    r"""As it stands in reStructuredText; emphasis by \*\* is kept."""
    parts = re.split(r"(\*\*[^*\s][^*]*\*\*)", text)
    return "".join(
        part if part.startswith("**") else re.sub(r"([\\*|_])", r"\\\1", part) for part in parts
    )


def _inline(text: str, link: Link) -> str:
    made, end = "", 0
    for found in CODE.finditer(text):
        target = link(found[1])
        code = f"``{found[1]}``" if target is None else f":py:obj:`{found[1]} <{target}>`"
        made += escaped(text[end : found.start()]) + code
        end = found.end()
        if text[end : end + 1].isalnum():
            made += "\\ "
    made += escaped(text[end:])
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", made)
