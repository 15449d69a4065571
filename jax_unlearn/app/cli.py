"""The command line: jax-unlearn demo | data | concept | sample."""

import dataclasses
import os
import pathlib
import sys
import webbrowser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# What loads networks is imported once a command is known: --help answers at once.
if TYPE_CHECKING:
    from jax_unlearn.app.options import ModelOptions, RunOptions, SampleOptions

__all__ = ["main"]

_COMMANDS = {
    "demo": "DemoOptions",
    "data": "DataOptions",
    "concept": "ConceptOptions",
    "sample": "SampleOptions",
}
_USAGE = """usage: jax-unlearn COMMAND [OPTIONS]

  demo     forget a class of the embedded model and data, or with --text an object of the
           embedded model from text to image; needs no network
  data     forget images that a diffusers checkpoint of yours was trained on
  concept  forget labels or prompts that a diffusers checkpoint is conditioned on; needs no images
  sample   draw a grid of samples from a checkpoint

  --help after a command lists its options with their defaults and units.
  --config RUN.JSON after demo, data or concept repeats the run that wrote it.
"""


def _take(arguments: list[str], flag: str) -> str | None:
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


def _parse(command: str, arguments: list[str]) -> Any:
    import tyro

    from jax_unlearn.app import options as kinds
    from jax_unlearn.app.options import RunOptions, load_run

    kind = getattr(kinds, _COMMANDS[command])
    config = _take(arguments, "--config") if issubclass(kind, RunOptions) else None
    default = None if config is None else load_run(pathlib.Path(config), command, kind)
    if default is None and "--resume" in arguments:
        out = _take(list(arguments), "--out")
        saved = pathlib.Path(out or kind.out) / "run.json"
        if not saved.is_file():
            raise ValueError(f"nothing to resume: {saved} is not there.")
        default = load_run(saved, command, kind)
    if default is None:
        likely = command == "concept" and _take(list(arguments), "--formulation") == "likelihood"
        changed: dict[str, Any] = {"steps": _LIKELIHOOD_STEPS} if likely else {}
        default = kind(**changed)
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
    options.validate()
    return options


def _cache_compilations() -> None:
    """Keeps XLA's compilations in the user's cache folder, unless told where already."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "jax_unlearn"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _load(options: "RunOptions") -> tuple[Any, "RunOptions", Any]:
    """The request that the options ask for, the options made exact, and the judge."""
    import numpy as np

    from jax_unlearn.app import embedded
    from jax_unlearn.app.options import ConceptOptions, DataOptions, DemoOptions, ModelOptions
    from jax_unlearn.app.tasks import concept_request, images
    from jax_unlearn.models.judge import load_judge
    from jax_unlearn.pretrained import load_pretrained
    from jax_unlearn.pretrained.text_to_image import is_text_to_image

    if isinstance(options, DemoOptions):
        pretrained = _named(load_pretrained(embedded.model_path()), "the embedded model")
        return (*images.from_embedded(pretrained, options), embedded.judge())
    assert isinstance(options, ModelOptions)
    own = options.model == "embedded"
    if options.model == "embedded-text" or (not own and is_text_to_image(options.model)):
        return _load_prompts(options)
    pretrained = load_pretrained(
        embedded.model_path() if own else options.model, dtype=options.dtype, remat=options.remat
    )
    judge = embedded.judge() if own else None
    if own:
        pretrained = _named(pretrained, "the embedded model")
    if options.judge is not None:
        judge = load_judge(options.judge)
    if isinstance(options, DataOptions):
        return images.from_paths(pretrained, options), options, judge
    assert isinstance(options, ConceptOptions)
    request = concept_request.make_request(pretrained, options)
    if own:
        stored = embedded.load_data().held_out
        real = stored.pixels[~np.isin(stored.labels, request.forgotten)]
        request = request._replace(real=real)
    return request, options, judge


def _named(pretrained: Any, name: str) -> Any:
    config = dataclasses.replace(pretrained.config, name=name)
    return pretrained._replace(config=config)


def _load_prompts(options: "ModelOptions") -> tuple[Any, "RunOptions", Any]:
    """`_load` for a model from text to image."""
    from jax_unlearn.app import embedded
    from jax_unlearn.app.options import ConceptOptions, DataOptions
    from jax_unlearn.app.tasks import concept_request, images
    from jax_unlearn.pretrained.clip import load_clip, zero_shot
    from jax_unlearn.pretrained.text_to_image import load_text_to_image

    own = options.model == "embedded-text"
    path = embedded.text_model_path() if own else options.model
    model = load_text_to_image(path, dtype=options.dtype, remat=options.remat)
    if own:
        named = _named(model.pretrained, "the embedded model from text to image")
        model = model._replace(pretrained=named)
    folder = embedded.clip_path() if own and options.clip is None else options.clip
    clip = None if folder is None else load_clip(folder)
    if isinstance(options, DataOptions):
        request: Any = images.from_captioned(model, options)
    else:
        assert isinstance(options, ConceptOptions)
        request = concept_request.make_prompt_request(model, options)
    # Images without captions are shown under no prompt alone; a CLIP then only compares.
    classes = request.conditions.classes or ("",)
    return request, options, None if clip is None else zero_shot(clip, classes)


def _unlearn(command: str, options: "RunOptions") -> int:
    from jax_unlearn.app import report
    from jax_unlearn.app.options import save_run
    from jax_unlearn.app.run import (
        Interrupted,
        NotFinite,
        check_batches,
        check_folder,
        prepare_folder,
        run,
    )

    # Everything is checked before anything is written, and the folder first: images and prompts
    # may take minutes to encode.
    check_folder(options)
    jobs = [(name, *_load(one)) for name, one in _jobs(command, options)]
    for _, request, one, _ in jobs:
        check_batches(request, one)
    prepare_folder(options)
    if len(jobs) > 1 and not options.resume:
        save_run(options.out / "run.json", command, options)
    done = []
    try:
        for name, request, one, judge in jobs:
            if len(jobs) > 1:
                if (one.out / "report.json").is_file():
                    continue
                print(f"{one.out.name}:", file=sys.stderr)
                one = dataclasses.replace(one, resume=(one.out / "run.json").is_file())
                prepare_folder(one)
            done.append(run(request, one, command=name, judge=judge))
            print(f"{report.verdict(done[-1].report)}\nmodel:  {one.out / 'model'}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        if len(jobs) > 1:
            print(
                f"(all of it: jax-unlearn {command} --out {options.out} --resume)", file=sys.stderr
            )
        return 128 + stop.signal
    except KeyboardInterrupt:  # While measuring; the steps themselves stop as Interrupted.
        print(
            f"stopped. Go on with: jax-unlearn {command} --out {options.out} --resume",
            file=sys.stderr,
        )
        return 130
    except NotFinite as stop:
        print(f"jax-unlearn: {stop}", file=sys.stderr)
        return 1
    page = options.out / "report.html"
    if len(jobs) > 1:
        page = report.write_comparison(options.out, [one.out.name for _, _, one, _ in jobs])
    print(f"report: {page}")
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open(page.absolute().as_uri())
    return 0


# Of `concept` by likelihoods, whose steps do not sample: each is cheaper than one of reverse KL.
_LIKELIHOOD_STEPS = 300
# What the side-by-side demo gives the formulations that `concept` runs: minutes, not hours. In so
# few steps reverse KL can keep nine tenths of the base's separation, and not reach an anchor's.
_DEMO: dict[str, dict[str, Any]] = {
    "reverse-kl": {
        "steps": 12,
        "batch_size": 12,
        "forget_batch_size": 6,
        "threshold": ("0.9x",),
    },
    "likelihood": {
        "stored_samples": 160,
        "classifier_draws": 2,
        "target_steps": 0,
        "corrections": 0,
        "learning_rate": 2e-4,
    },
}
_DEMO_TEXT: dict[str, dict[str, Any]] = {
    "reverse-kl": {
        "steps": 12,
        "batch_size": 16,
        "forget_batch_size": 8,
        "threshold": ("0.9x",),
    },
    "likelihood": {
        "steps": 40,
        "stored_samples": 160,
        "classifier_draws": 2,
        "target_steps": 0,
        "corrections": 0,
        "threshold": ("0.25x",),
        "learning_rate": 2e-4,
    },
}


def _jobs(command: str, options: "RunOptions") -> list[tuple[str, "RunOptions"]]:
    """The runs that a command makes: its name in run.json, and its options."""
    from jax_unlearn.app.embedded import captions
    from jax_unlearn.app.options import ConceptOptions, DemoOptions, RunOptions

    if not isinstance(options, DemoOptions):
        return [(command, options)]
    options = dataclasses.replace(options, forget=options.asked)
    if "repeated" in options.forget and not options.text:
        return [(command, options)]
    settings = _DEMO_TEXT if options.text else _DEMO
    many = options.formulation == "all"
    jobs: list[tuple[str, RunOptions]] = []
    every = [*settings] if options.text else ["forward-kl", *settings]
    for formulation in every if many else [options.formulation]:
        out = options.out / formulation if many else options.out
        if formulation == "forward-kl":
            one = dataclasses.replace(options, out=out, formulation=formulation)
            jobs.append((command, one))
            continue
        shared = ("seed", "samples", "sampling_steps", "guidance", "forget", "resume", "overwrite")
        given: dict[str, Any] = {name: getattr(options, name) for name in shared}
        given |= {"out": out, "formulation": formulation, "evaluation_images": 132}
        if options.text:
            given |= captions.forgetting(options.forget)
            given |= {"model": "embedded-text", "samples": 6, "sampling_steps": 15}
            given["evaluation_images"] = 440
        jobs.append(("concept", ConceptOptions(**given | settings[formulation])))
    return jobs


def _sample(options: "SampleOptions") -> int:
    from jax_unlearn.app.sampling import draw_grid

    draw_grid(options)
    print(options.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 done, 1 the run failed, 2 the input was wrong, 130 and 143 stopped."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if given else 2
    command, *rest = given
    if command not in _COMMANDS:
        print(f"jax-unlearn: unknown command {command!r}.\n\n{_USAGE}", end="", file=sys.stderr)
        return 2
    try:
        options = _parse(command, rest)
        _cache_compilations()
        if command == "sample":
            return _sample(options)
        return _unlearn(command, options)
    except ValueError as error:
        print(f"jax-unlearn: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
