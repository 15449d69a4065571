"""What was typed, as the options of a command."""

import dataclasses
import importlib
import pathlib
from typing import Any

__all__ = ["COMMANDS", "parse", "split", "take"]

COMMANDS = {
    "demo": "options.DemoOptions",
    "data": "options.DataOptions",
    "concept": "options.ConceptOptions",
    "sweep": "sweep.options.SweepOptions",
    "plan": "plan.options.PlanOptions",
    "audit": "audit.options.AuditOptions",
    "sample": "options.SampleOptions",
    "verify": "options.VerifyOptions",
}
"""The options of each command: the module in this package, and the class."""


def take(arguments: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from the arguments."""
    for place, argument in enumerate(arguments):
        if argument == flag:
            if place + 1 == len(arguments):
                raise ValueError(f"{flag} needs a value.")
            value = arguments[place + 1]
            del arguments[place : place + 2]
            return value
        if argument.startswith(flag + "="):
            del arguments[place]
            return argument.split("=", 1)[1]
    return None


def split(kind: type, command: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of a command that has another after its name: its own, and those of the other.

    Raises:
      ValueError: if no command follows, or an option has no value.
    """
    import tyro

    name = next(iter(arguments), "--help")
    if name in ("-h", "--help"):
        tyro.cli(kind, args=["--help"], prog=f"jax-unlearn {command}")
    if name not in ("concept", "data"):
        raise ValueError(
            f"{command} {name}: give the command to {command}, concept or data, and then its "
            "options."
        )
    flags = {
        f"--{field.name.replace('_', '-')}": field.default is False
        for field in dataclasses.fields(kind)[1:]
    }
    own, rest, taken = [name], [], None
    for argument in arguments[1:]:
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
            taken = flag if flag in flags else None
            if taken is not None:
                own += [flag] + [value] * ("=" in argument)
                continue
        # What follows an option, up to the next, is its value.
        (rest if taken is None else own).append(argument)
    for place, flag in enumerate(own):
        following = own[place + 1] if place + 1 < len(own) else "--"
        if flags.get(flag) is False and following.startswith("--"):
            raise ValueError(f"{flag} needs a value.")
    return own, rest


def parse(command: str, arguments: list[str], before: str = "") -> Any:
    """The options of a command; `before` it stands in run.json, as "sweep " does."""
    import tyro

    from jax_unlearn.app.jobs import DEFAULTS
    from jax_unlearn.app.options import RunOptions
    from jax_unlearn.app.run_file import load_run

    module, name = COMMANDS[command].rsplit(".", 1)
    kind = getattr(importlib.import_module(f"jax_unlearn.app.{module}"), name)
    config = take(arguments, "--config") if issubclass(kind, RunOptions) else None
    default = None if config is None else load_run(pathlib.Path(config), before + command, kind)
    if default is None and {"--resume", "--continue"} & set(arguments):
        out = take(list(arguments), "--out")
        saved = pathlib.Path(out or kind.out) / "run.json"
        if not saved.is_file():
            raise ValueError(f"nothing to resume: {saved} is not there.")
        default = load_run(saved, before + command, kind)
    if default is None:
        chosen: dict[str, Any] = {}
        for flag in ("--formulation", "--method") if command == "concept" else ():
            chosen |= DEFAULTS.get(take(list(arguments), flag) or "", {})
        default = kind(**chosen)
    # A repeated option starts from nothing, not from its default.
    given: dict[str, Any] = {
        field.name: ()
        for field in dataclasses.fields(kind)
        if isinstance(getattr(default, field.name), tuple)
        and any(
            argument.split("=")[0] == f"--{field.name.replace('_', '-')}" for argument in arguments
        )
    }
    default = dataclasses.replace(default, **given)
    options = tyro.cli(
        kind,
        args=arguments,
        default=default,
        prog=f"jax-unlearn {command}",
        config=(tyro.conf.UseAppendAction,),
    )
    if getattr(options, "go_on", False):
        options = dataclasses.replace(options, resume=True)
    options.validate()
    return options
