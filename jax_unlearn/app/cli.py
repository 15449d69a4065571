"""The command line: jax-unlearn demo | data | concept | sweep | plan | audit | sample | verify."""

import dataclasses
import errno
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import webbrowser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax_unlearn.app.parsing import COMMANDS, parse, split, take

# What loads networks is imported once a command is known: --help answers at once.
if TYPE_CHECKING:
    from jax_unlearn.app.audit.options import AuditOptions
    from jax_unlearn.app.options import RunOptions, SampleOptions, VerifyOptions

__all__ = ["main"]

# What the system says of paths that cannot be used as they were given.
_OF_INPUT = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
_USAGE = """usage: jax-unlearn COMMAND [OPTIONS]

  demo     forget a class of the embedded model and data, or with --text an object of the
           embedded model from text to image; needs no network
  data     forget images that a diffusers checkpoint of yours was trained on
  concept  forget labels or prompts that a diffusers checkpoint is conditioned on; needs no images
  sweep    before data or concept and its options: that at many thresholds, or strengths of a
           method, and seeds, in one program; writes their front
  plan     before data or concept and its options: what that will cost, and whether it fits; no
           weights are read, and a TPU is planned for without one
  audit    measure what a model that was made to forget still shows, and what brings it back
  sample   draw a grid of samples from a checkpoint
  verify   check that a finished folder is what its run left

  --help after a command lists its options with their defaults and units.
  --config RUN.JSON after demo, data or concept repeats the run that wrote it.
"""


def _without_ynnpack() -> None:
    """Turns YNNPACK off on CPUs, before a backend starts: convolutions take 0.5 to 0.8 of the time.

    Not where the user has set XLA's flags, a plugin for accelerators is installed, or the release
    of jaxlib is one that this was not measured with.
    """
    if "XLA_FLAGS" in os.environ:
        return
    # libtpu alone is what `plan` compiles with.
    found = importlib.util.find_spec("jax_plugins") or (
        importlib.util.find_spec("libtpu")
        and any(any(pathlib.Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*"))
    )
    if os.environ.get("JAX_PLATFORMS", "" if found else "cpu") != "cpu":
        return
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type="


def _cache_compilations() -> None:
    """Keeps XLA's compilations in the user's cache folder, unless told where already."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "jax_unlearn"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _checked_jobs(command: str, options: "RunOptions") -> list[tuple[str, Any, Any, Any]]:
    """The runs that a command makes, loaded: (command, request, options, judge) each.

    Raises:
      ValueError: for what cannot be run.
    """
    from jax_unlearn.app.identity import check_options
    from jax_unlearn.app.jobs import jobs_of
    from jax_unlearn.app.loading import load
    from jax_unlearn.app.memory import check_run
    from jax_unlearn.app.run import check_batches, check_method

    check_options(options)
    asked = jobs_of(command, options)
    for option in ("push_to_hub", "coordinator"):
        if len(asked) > 1 and getattr(options, option):
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} is for one model: choose a --formulation.")
    # The runs of one command have one reference, whose samples are drawn once.
    known: dict[Any, Any] = {}
    jobs = []
    for name, one in asked:
        request, exact, judge = load(one)
        jobs.append((name, request._replace(known=known), exact, judge))
    if len(jobs) > 1 and options.go_on:
        raise ValueError(
            "--continue is for one run: give the command of one of those in "
            f"{options.out} with --out {jobs[0][2].out}, say."
        )
    for _, request, one, _ in jobs:
        check_method(request, one)
        check_run(request.pretrained, one)
        check_batches(request, one)
    return jobs


def _unlearn(command: str, options: "RunOptions") -> int:
    from jax_unlearn.app import processes, report, verify
    from jax_unlearn.app.folder import check_folder, claim
    from jax_unlearn.app.push import push
    from jax_unlearn.app.run import run
    from jax_unlearn.app.run_file import save_run
    from jax_unlearn.app.terminal import printable, say

    processes.start(options)
    # Everything is checked before anything is written, and the folder first: images and prompts
    # may take minutes to encode.
    processes.agreed(lambda: check_folder(options), main_only=True)
    jobs = processes.agreed(lambda: _checked_jobs(command, options))
    assert jobs is not None

    def run_one(name: str, request: Any, one: "RunOptions", judge: Any) -> None:
        found = run(request, one, command=name, judge=judge).report
        if processes.is_main():
            print(printable(f"{report.verdict(found)}\nmodel:  {one.out / 'model'}"))

    page = options.out / "report.html"
    if len(jobs) == 1:
        run_one(*jobs[0])
    else:
        with claim(options):
            if not options.resume:
                save_run(options.out / "run.json", command, options)
            for name, request, one, judge in jobs:
                if (one.out / verify.SUMS).is_file():
                    continue
                say(f"{one.out.name}:")
                resume = (one.out / "run.json").is_file()
                run_one(name, request, dataclasses.replace(one, resume=resume), judge)
            page = report.write_comparison(options.out, [one.out.name for _, _, one, _ in jobs])
            verify.write_sums(options.out)
    processes.wait("the report is written")
    if not processes.is_main():
        return 0
    print(printable(f"report: {page}\nseal:   {verify.seal(options.out)}"))
    if options.push_to_hub:
        print(printable(f"pushed: {push(options.out / 'model', options.push_to_hub)}"))
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open(page.absolute().as_uri())
    return 0


def _sample(options: "SampleOptions") -> int:
    from jax_unlearn.app.loading import announce
    from jax_unlearn.app.sampling import draw_grid
    from jax_unlearn.app.terminal import printable

    announce(options)
    draw_grid(options)
    print(printable(str(options.out)))
    return 0


def _audit(options: "AuditOptions") -> int:
    from jax_unlearn.app import verify
    from jax_unlearn.app.audit.run import audit
    from jax_unlearn.app.terminal import printable

    print(printable(audit(options)["verdict"]))
    page = options.out / "report.html"
    print(printable(f"report: {page}\nseal:   {verify.seal(options.out)}"))
    return 0


def _plan(arguments: list[str]) -> int:
    import tyro

    from jax_unlearn.app.loading import announce
    from jax_unlearn.app.plan.options import PlanOptions
    from jax_unlearn.app.terminal import printable

    own, rest = split(PlanOptions, "plan", arguments)
    asked = tyro.cli(PlanOptions, args=own, prog="jax-unlearn plan")
    asked.validate()
    options = parse(asked.command, rest)
    announce(options)

    from jax_unlearn.app.plan.plan import plan, table

    print(printable(table(plan(asked, options))))
    return 0


def _sweep(arguments: list[str]) -> int:
    import tyro

    from jax_unlearn.app.run_file import fitted
    from jax_unlearn.app.sweep.options import SweepOptions
    from jax_unlearn.models.files import read_json

    own, rest = split(SweepOptions, "sweep", arguments)
    for flag in ("--threshold", "--strength"):
        if take(list(rest), flag) is not None and f"{flag}s" in own:
            raise ValueError(f"{flag}s are swept: leave {flag} out.")
    path, default = take(list(rest), "--config"), SweepOptions(own[0])  # pyrefly: ignore
    options = parse(own[0], rest, "sweep ")
    if path is None and options.resume:
        path = str(options.out / "run.json")
    if path is not None:
        saved = pathlib.Path(path)
        default = fitted(saved, read_json(saved).get("sweep"), SweepOptions)
    asked = tyro.cli(SweepOptions, args=own, default=default, prog="jax-unlearn sweep")
    asked.validate()
    options = asked.applied(options)
    _cache_compilations()

    from jax_unlearn.app import verify
    from jax_unlearn.app.folder import check_folder
    from jax_unlearn.app.identity import check_options
    from jax_unlearn.app.loading import load
    from jax_unlearn.app.memory import check_run, check_sweep
    from jax_unlearn.app.run import check_batches, check_method
    from jax_unlearn.app.sweep.fronts import table
    from jax_unlearn.app.sweep.run import check_sweep_options, devices_of, sweep
    from jax_unlearn.app.terminal import printable

    check_folder(options)
    devices = devices_of(asked, options)
    check_options(options)
    check_sweep_options(asked, options)
    request, _, judge = load(options)
    check_method(request, options)
    check_run(request.pretrained, options)
    problems = len(asked.points(options))
    check_sweep(
        request.pretrained, options, problems=problems, devices=devices, at_once=asked.at_once
    )
    check_batches(request, options, 1)
    print(printable(table(sweep(request, asked, options, judge=judge))))
    out = options.out
    print(printable(f"front:  {out / 'fronts.json'}\nseal:   {verify.seal(out)}"))
    return 0


def _verify(options: "VerifyOptions") -> int:
    from jax_unlearn.app.terminal import printable, say
    from jax_unlearn.app.verify import seal, verify

    problems, count = verify(options.folder)
    found = seal(options.folder)
    if options.seal and options.seal.lower() != found:
        problems.insert(0, f"its seal is {found}, not {options.seal}")
    for problem in problems:
        say(f"jax-unlearn: {options.folder}: {problem}.")
    if not problems:
        print(printable(f"{options.folder}: {count} files are as the run left them; seal {found}"))
    return 1 if problems else 0


def _run(command: str, arguments: list[str]) -> int:
    if command in ("plan", "sweep"):
        return _plan(arguments) if command == "plan" else _sweep(arguments)
    options = parse(command, arguments)
    if command == "verify":
        return _verify(options)
    _cache_compilations()
    if command == "sample":
        return _sample(options)
    return _audit(options) if command == "audit" else _unlearn(command, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 done, 1 the run failed, 2 the input was wrong, 130 and 143 stopped."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if given else 2
    command, *rest = given
    # Nothing that takes time is imported before a signal can be answered.
    from jax_unlearn.app.files import DiskFull, is_full
    from jax_unlearn.app.stopping import Interrupted, stop_signals
    from jax_unlearn.app.terminal import say

    if command not in COMMANDS:
        say(f"jax-unlearn: unknown command {command!r}.\n\n{_USAGE}")
        return 2
    try:
        with stop_signals("stopped."):
            _without_ynnpack()
            return _run(command, rest)
    except Interrupted as stop:
        if str(stop):
            say(f"jax-unlearn: {_one_line(stop)}")
        return 128 + stop.signal
    except (ValueError, OverflowError, RecursionError) as error:
        say(f"jax-unlearn: {_one_line(error)}")
        return 2
    except Exception as error:
        from jax_unlearn.app.plan.plan import NotPlanned
        from jax_unlearn.app.push import NotPushed
        from jax_unlearn.app.run import NotFinite

        if isinstance(error, DiskFull | NotFinite | NotPlanned | NotPushed):
            say(f"jax-unlearn: {_one_line(error)}")
        elif is_full(error):
            say("jax-unlearn: the disk is full. No finished file was damaged.")
        elif (lost := _lost(error)) is not None:
            say(f"jax-unlearn: {lost}")
            os._exit(1)  # Elsewhere JAX would wait for the others.
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            say(f"jax-unlearn: out of memory: {_one_line(error)[:200]}")
        elif isinstance(error, OSError):
            say(f"jax-unlearn: {error.filename or 'a file'}: {error.strerror or error}.")
            return 2 if error.errno in _OF_INPUT else 1
        else:
            raise
        return 1


def _lost(error: BaseException) -> str | None:
    """What to say where another process of the run is gone; None for other errors."""
    import jax

    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    return (
        f"process {jax.process_index()} has lost another one of the run, and ends. Start all of "
        f"them again with --resume. ({_one_line(error)[:200]})"
    )


def _one_line(error: BaseException) -> str:
    """The message of an error; a path in it may hold line breaks."""
    return " ".join(str(error).split("\n"))


if __name__ == "__main__":
    sys.exit(main())
