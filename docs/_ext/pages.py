"""Pages that are made from the code itself: commands, modules, results."""

import ast
import dataclasses
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tyro

import jax_unlearn
from jax_unlearn.app import cli, parsing

ROOT = pathlib.Path(__file__).parents[2]
# Of the networks and the application only what users of the library meet.
_LEFT_OUT = ("jax_unlearn.app", "jax_unlearn.models")
_TAKEN = ("jax_unlearn.app.embedded", "jax_unlearn.models.judge")
_OF_JAX = ("jax_unlearn.typing.Array", "jax_unlearn.typing.ArrayLike")
_TYPES = {int: "INTEGER", float: "NUMBER", str: "TEXT", pathlib.Path: "PATH"}


# ---- commands


class Option(NamedTuple):
    """An option of a command, as its page shows it."""

    flag: str
    takes: str
    default: Any
    text: str
    owner: type
    changed: bool  # from what another class has by that name


def options(kind: type) -> list[Option]:
    """Of a dataclass of options, those of the class itself first."""
    hints = typing.get_type_hints(kind, include_extras=True)
    owners = [one for one in kind.__mro__ if dataclasses.is_dataclass(one)]
    texts = {one: _field_docstrings(one) for one in owners}
    found = []
    for field in dataclasses.fields(kind):
        owner = next(one for one in owners if field.name in one.__dict__["__annotations__"])
        documented = next(one for one in owners if field.name in texts[one])
        flag, takes = _flag(field.name, hints[field.name]), _takes(hints[field.name])
        changed = any(field.name in texts[one] for one in owners if one is not owner)
        text = texts[documented][field.name]
        found.append(Option(flag, takes, field.default, text, owner, changed))
    return sorted(found, key=lambda one: (owners.index(one.owner), one.changed))


def _field_docstrings(kind: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _flag(name: str, hint: Any) -> str:
    notes = getattr(hint, "__metadata__", ())
    if notes and notes == tyro.conf.Positional[int].__metadata__:
        return name.upper()
    renamed = [note.name for note in notes if getattr(note, "name", None)]
    return "--" + (renamed or [name])[0].replace("_", "-")


def _takes(hint: Any) -> str:
    """What an option takes: a kind, or its choices."""
    if typing.get_origin(hint) is typing.Annotated:
        return _takes(hint.__origin__)
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(inside)
    if origin is tuple:
        return f"{_takes(inside[0])}, repeatable"
    if origin in (types.UnionType, typing.Union):
        return _takes(next(one for one in inside if one is not type(None)))
    return _TYPES.get(hint, "")


def commands() -> dict[str, type]:
    """The dataclass of each command's options."""
    found = {}
    for command, where in parsing.COMMANDS.items():
        module, name = where.rsplit(".", 1)
        found[command] = getattr(importlib.import_module(f"jax_unlearn.app.{module}"), name)
    return found


def command_pages() -> dict[str, str]:
    """A page for each command, from its options, and the list of them."""
    pages = {command: _command_page(command, kind) for command, kind in commands().items()}
    rows = "\n".join(
        f"| [`{command}`]({command}.md) | {_as_markdown(inspect.getdoc(kind).split(chr(10))[0])} |"
        for command, kind in commands().items()
    )
    listed = "\n".join(commands())
    pages["index"] = (
        "# Commands\n\nThese pages are made from the options themselves, and have what `--help` "
        f"says.\n\n| command | |\n|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n{listed}\n```\n\n"
        f"```text\n{cli._USAGE.strip()}\n```\n\n"
        "A mistake is one clear line and exit code 2, before anything is computed or written. Exit "
        "code 1 says that a run failed; 130 and 143, that it was stopped.\n"
    )
    return pages


def _command_page(command: str, kind: type) -> str:
    lines = [f"# jax-unlearn {command}", "", _as_markdown(inspect.getdoc(kind) or ""), ""]
    owner: type | None = None
    for option in options(kind):
        if option.owner is not owner:
            owner = option.owner
            about = "Options of its own" if owner is kind else _first_line(owner)
            lines += [f"## {about}", ""]
        lines += [_head(option), f": {_as_markdown(option.text)}", ""]
    return "\n".join(lines)


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n")[0].rstrip(".")


def _head(option: Option) -> str:
    default = option.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    takes = f" *{_as_markdown(option.takes)}*" if option.takes else ""
    unset = default is None or default == () or default == "" or default is False
    return f"`{option.flag}`{takes}" + ("" if unset else f" — default `{shown}`")


def _as_markdown(text: str) -> str:
    """Plain text with code spans, so that nothing else in it is markup; options become code."""
    parts = re.split(r"(`[^`]+`)", text)
    for place in range(0, len(parts), 2):
        plain = re.sub(r"([*_\[\]<>|])", r"\\\1", parts[place])
        parts[place] = re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", plain)
    return "".join(parts)


# ---- modules


class Module(NamedTuple):
    """A module with a page of its own, and the public names that are documented there."""

    name: str
    names: dict[str, Any]  # documented as the key
    elsewhere: dict[str, Any]  # other libraries' types, handed on


def modules() -> list[Module]:
    """Public modules, packages with what their submodules have beyond them."""
    pages: dict[str, Module] = {}
    found = [
        (name, public, getattr(module, public))
        for name in sorted(_module_names())
        for module in [importlib.import_module(name)]
        for public in module.__all__
    ]
    # Packages first, which hand on what is in them; but what has no docstring of its own, as
    # aliases of types have not, is documented where it is written.
    with_docstrings = [one for one in found if _kind(one[2]) != "data"]
    others = [one for one in reversed(found) if _kind(one[2]) == "data"]
    for name, public, thing in with_docstrings + others:
        parent = name if name in _TAKEN else ".".join(name.split(".")[:2])
        page = pages.setdefault(parent, Module(parent, {}, {}))
        if any(thing is one and path.endswith(f".{public}") for path, one in page.names.items()):
            continue
        handed_on = page.elsewhere if f"{name}.{public}" in _OF_JAX else page.names
        handed_on[f"{name}.{public}"] = thing
    return [pages[name] for name in sorted(pages)]


def _kind(thing: Any) -> str:
    if not callable(thing) or typing.get_origin(thing) or thing is Any or thing is jax.Array:
        return "data"
    return "class" if inspect.isclass(thing) else "function"


def _module_names() -> Iterator[str]:
    for found in pkgutil.walk_packages(jax_unlearn.__path__, "jax_unlearn."):
        if not found.name.startswith(_LEFT_OUT):
            yield found.name
    yield from _TAKEN


def top_names() -> dict[str, Any]:
    """What `jax_unlearn` itself hands on, but for modules."""
    names = {*vars(jax_unlearn), *jax_unlearn._LAZY}
    found = {name: getattr(jax_unlearn, name) for name in sorted(names) if name[0] != "_"}
    return {
        name: thing
        for name, thing in found.items()
        if getattr(thing, "__module__", "").startswith("jax_unlearn")
    }


def targets() -> dict[str, str]:
    """Every path that leads to a documented thing -> the path that it is documented under."""
    found = {}
    for module in modules():
        found[module.name] = module.name
        for path, thing in module.names.items():
            found[path] = path
            if _kind(thing) != "data":
                found.setdefault(f"{thing.__module__}.{thing.__qualname__}", path)
            found.setdefault(f"{module.name}.{path.rsplit('.', 1)[1]}", path)
    documented = [(thing, path) for module in modules() for path, thing in module.names.items()]
    for name, thing in top_names().items():
        # Not where a module has that name too.
        found.setdefault(
            f"jax_unlearn.{name}", next(path for one, path in documented if one is thing)
        )
    return found


def api_pages() -> dict[str, str]:
    """A page for each module, and the list of them."""
    pages = {module.name.removeprefix("jax_unlearn."): _api_page(module) for module in modules()}
    rows = "".join(
        f"   * - :py:mod:`~{module.name}`\n"
        f"     - {_summary(importlib.import_module(module.name))}\n"
        for module in modules()
    )
    documented = {id(thing): path for one in modules() for path, thing in one.names.items()}
    top = "".join(
        f"   * - ``jax_unlearn.{name}``\n     - :py:obj:`{documented[id(thing)]}`\n"
        for name, thing in top_names().items()
    )
    table = ".. list-table::\n   :widths: auto\n\n"
    listed = "\n".join(f"   {name}" for name in pages)
    pages["index"] = (
        f"Reference\n=========\n\n{table}{rows}\nShort names\n-----------\n\n{table}{top}\n"
        f".. toctree::\n   :hidden:\n\n{listed}\n"
    )
    return pages


def _summary(module: types.ModuleType) -> str:
    return re.sub(r"([\\*|_])", r"\\\1", (module.__doc__ or "").split("\n")[0])


def _api_page(module: Module) -> str:
    title = module.name.removeprefix("jax_unlearn.")
    lines = [title, "=" * len(title), "", f".. automodule:: {module.name}", ""]
    if module.elsewhere:
        kept = [f"``{path.rsplit('.', 1)[1]}``" for path in module.elsewhere]
        lines += [f"{' and '.join(kept)} are JAX's own.", ""]
    lines += [".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {path.removeprefix(module.name + '.')}" for path in module.names] + [""]
    for path, thing in module.names.items():
        where, name = path.rsplit(".", 1)
        kind = _kind(thing)
        lines += [f".. auto{kind}:: {where}::{name}"]
        lines += ["   :members:", ""] if kind == "class" else [""]
    return "\n".join(lines)


# ---- results


def result_pages(source: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
    """A page for each section of a README, its first table first and then its command."""
    head, *sections = re.split(r"^## ", source.read_text("utf-8"), flags=re.MULTILINE)
    pages = {}
    for section in sections:
        title, body = section.split("\n", 1)
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        pages[slug] = f"# {title}\n\n{_relinked(_table_first(body), source.parent, folder)}"
    about = head.split("\n", 1)[1]
    pages["index"] = (
        f"# Results\n{about}\n```{{toctree}}\n:maxdepth: 1\n" + "\n".join(pages) + "\n```\n"
    )
    return pages


def _table_first(body: str) -> str:
    table = re.search(r"^\|.*(?:\n\|.*)*", body, flags=re.MULTILINE)
    command = re.search(r"`(python [^`]+)`", body)
    if table is None:
        return body
    shown = f"\n\nBy `{' '.join(command[1].split())}`.\n" if command else "\n"
    return f"{table[0]}{shown}\n{body[: table.start()].strip()}\n{body[table.end() :]}"


def _relinked(text: str, was: pathlib.Path, now: pathlib.Path) -> str:
    def moved(found: re.Match[str]) -> str:
        return f"]({os.path.relpath(was / found[1], now)})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)\)", moved, text)


# ---- all of them


def made(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """The text of every page, by its path below the folder."""
    results = folder / "results"
    kinds = {
        "commands": (command_pages(), "md"),
        "api": (api_pages(), "rst"),
        "results": (result_pages(ROOT / "benchmarks" / "README.md", results), "md"),
    }
    return {
        folder / kind / f"{name}.{suffix}": text
        for kind, (pages, suffix) in kinds.items()
        for name, text in pages.items()
    }


def write(folder: pathlib.Path) -> None:
    """Writes every page that is not there already as it is, and removes those of before."""
    pages = made(folder)
    for place in {path.parent for path in pages}:
        place.mkdir(parents=True, exist_ok=True)
        for stale in {*place.iterdir()} - {*pages}:
            stale.unlink()
    for path, text in pages.items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def resolve(text: str, inside: str, names: Mapping[str, str], taken: Sequence[str]) -> str | None:
    """What a code span in the docstring of `inside` refers to, unless that is a parameter."""
    if text in taken or not re.fullmatch(r"[\w.]+", text):
        return None
    parts = inside.split(".")
    spaces = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    tried = [text, *(f"{space}.{text}" for space in spaces)]
    return next((names[one] for one in tried if one in names and names[one] != inside), None)
