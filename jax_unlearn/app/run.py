"""One unlearning run from request to report: loop, checkpoints, signals, files."""

import contextlib
import errno
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jax_unlearn import sharding
from jax_unlearn.app import outcome, report
from jax_unlearn.app.checkpoint import Checkpoints
from jax_unlearn.app.files import replace_file
from jax_unlearn.app.options import ConceptOptions, ImageOptions, RunOptions, save_run
from jax_unlearn.app.tasks import concept_request, concepts, image_task, images
from jax_unlearn.app.tasks.base import Task
from jax_unlearn.minibatched import minibatched
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained import Pretrained, save_pretrained, save_unet
from jax_unlearn.pretrained.subsets import (
    lora_init,
    lora_merge,
    lora_problem,
    parse_subset,
    save_lora,
    subset_optimizer,
    subset_problem,
)
from jax_unlearn.primal_dual import PrimalDualState, certificate, primal_dual
from jax_unlearn.typing import Array, Estimate, Params

__all__ = [
    "Interrupted",
    "NotFinite",
    "Result",
    "check_batches",
    "check_folder",
    "dual_schedule",
    "prepare_folder",
    "run",
]

_TASKS: dict[type, Callable[[Any, Any, Any], Task]] = {
    images.ImageRequest: image_task.image_task,
    concept_request.ConceptRequest: concepts.concept_task,
}


class Interrupted(Exception):
    """The run was asked to stop, and has saved a checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class NotFinite(Exception):
    """A loss or gradient became infinite or not a number."""


class Result(NamedTuple):
    """What a run ends with: the report as in report.json, and the page that shows it."""

    report: dict[str, Any]
    page: pathlib.Path


def check_batches(
    request: images.ImageRequest | concept_request.ConceptRequest, options: RunOptions
) -> None:
    """Refuses batches that do not divide over the devices, before anything is measured.

    Raises:
      ValueError: naming the size.
    """
    sizes = [options.batch_size, options.forget_batch_size]
    if isinstance(request, images.ImageRequest):
        assert isinstance(options, ImageOptions)
        parts = jax.tree.leaves(images.batch(request, options, 0))
        sizes = [len(leaf) for leaf in parts]
    for size in sizes:
        sharding.check_rows(size, jax.device_count())


def _in_use(out: pathlib.Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def check_folder(options: RunOptions) -> None:
    """Refuses what `prepare_folder` would refuse, and changes nothing.

    Raises:
      ValueError: if the folder is in use and neither resume nor overwrite was asked for, or if
        there is nothing to resume.
    """
    out = options.out
    if options.resume:
        if not (out / "run.json").is_file():
            raise ValueError(f"nothing to resume: {out} has no run.json.")
    elif _in_use(out) and not options.overwrite:
        raise ValueError(
            f"{out} is in use: choose another --out, or --resume, or --overwrite (which moves it "
            "aside)."
        )


def prepare_folder(options: RunOptions) -> None:
    """Makes room for the outputs, or refuses.

    Raises:
      ValueError: as `check_folder`, or if the folder cannot be made.
    """
    check_folder(options)
    out = options.out
    if options.resume:
        return
    if _in_use(out):
        number = 1
        while (aside := out.with_name(f"{out.name}.previous-{number}")).exists():
            number += 1
        out.rename(aside)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {out}: {error.strerror}.") from error


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying of them."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = [
            signal.signal(number, lambda got, _: received.append(got)) for number in numbers
        ]
    except ValueError:  # Not the main thread: signals are somebody else's business.
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _row(step: int, info: Any, thresholds: np.ndarray, seconds: float) -> dict[str, Any]:
    def plain(values: Any) -> list[float | None]:
        return [float(v) if np.isfinite(v) else None for v in np.asarray(values)]

    return {
        "step": step,
        "objective": float(info.objective),
        "values": plain(info.values),
        "violations": plain(info.violations),
        "multipliers": plain(info.multipliers),
        "thresholds": plain(thresholds),
        "gradient_norm": float(info.gradient_norm),
        **{name: float(value) for name, value in info.diagnostics.items()},
        "seconds": round(seconds, 3),
    }


def _keep_rows(path: pathlib.Path, steps: int) -> float:
    """Cuts metrics.jsonl back to the rows of the first `steps` steps; the seconds they took."""
    rows = [row for row in report.read_rows(path) if row["step"] <= steps] if path.exists() else []
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows[-1]["seconds"] if rows else 0.0


def run(
    request: images.ImageRequest | concept_request.ConceptRequest,
    options: RunOptions,
    *,
    command: str,
    judge: JudgeFunctions | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Unlearns, and writes model, report, metrics and checkpoints into options.out.

    Call `prepare_folder` first. A run that was killed goes on bit for bit from its last
    checkpoint with options.resume: batches and noise are functions of the seed and the step.

    Args:
      request: what to forget and to keep.
      options: how.
      command: the name under which run.json and the report can repeat the run.
      judge: names what samples show; without one agreement, KID and FID are not measured.
      progress: whether to show a bar on the terminal.
      after_step: called with each finished step's number.

    Raises:
      Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
      NotFinite: if a loss or gradient is not; the state of the step before is saved.
      ValueError: if the disk is full or a checkpoint does not fit.
    """
    try:
        return _run(request, options, command, judge, progress, after_step)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk of {options.out} is full: free some space and --resume from its last "
            "checkpoint. No finished file was damaged."
        ) from error


def _advice(options: RunOptions) -> str:
    """What may help a run whose losses became infinite: only what its command has and uses."""
    if not isinstance(options, ConceptOptions):
        return "Try a lower --learning-rate or --max-multiplier."
    if options.formulation == "likelihood":
        return "Try a lower --learning-rate, or a larger --threshold."
    calmer = " or --max-multiplier"
    if options.estimator == "pathwise":
        calmer += ", or --estimator bounded"
    return f"Try a lower --learning-rate{calmer}."


def dual_schedule(task: Task) -> Callable[[Array], Array] | None:
    """Steps done -> whether the multipliers move: in all, unless fresh samples move them."""
    if task.dual_batch is None:
        return None
    marks = jnp.array(task.dual_steps, jnp.int32)
    return lambda done: (done == marks).any()


def _updates(options: RunOptions) -> int:
    """Of the parameters, in one step."""
    return options.training.minibatches


def learning_rate(options: RunOptions) -> optax.Schedule:
    """Updates done -> step size: a warm-up of a tenth, at most 20 steps, then a cosine to 0."""
    updates, warmup = _updates(options), min(20, max(options.steps // 10, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup * updates, max(options.steps, warmup + 1) * updates
    )


def _run(
    request: images.ImageRequest | concept_request.ConceptRequest,
    options: RunOptions,
    command: str,
    judge: JudgeFunctions | None,
    progress: bool,
    after_step: Callable[[int], None] | None,
) -> Result:
    started = time.monotonic()
    out, pretrained = options.out, request.pretrained
    if not options.resume:
        save_run(out / "run.json", command, options)

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr, flush=True)

    for note in request.notes:
        say(f"note: {note}")
    say("measuring the reference model ...")
    task = _TASKS[type(request)](request, options, judge)
    thresholds = task.thresholds
    timing = {"reference": time.monotonic() - started}
    optimizer = optax.adam(learning_rate(options), b1=0.9, b2=0.99)
    part, rank = parse_subset(options.training.train)
    problem, start = task.problem, task.params
    if rank is not None:
        problem = lora_problem(problem)
        start = lora_init(start, jax.random.key(options.seed), rank=rank, part=part)
    elif part != "full":
        problem = subset_problem(problem, part)
        optimizer = subset_optimizer(optimizer, part)
    if task.visit is None:
        algorithm = primal_dual(problem, optimizer, task.dual, dual_schedule=dual_schedule(task))
    else:
        merge = None if rank is None else lora_merge
        algorithm = minibatched(
            problem, optimizer, task.dual, task.visit, parts=_updates(options), merge=merge
        )
    # Only what trains is copied: the step does not donate the reference.
    state = algorithm.init(
        jax.tree.map(jnp.copy, start), thresholds, multipliers=task.multipliers, copy=False
    )
    # A step's key follows from the seed and the state's own count: nothing more to save.
    key, reference = jax.random.key(options.seed), pretrained.params
    mesh = sharding.data_mesh() if jax.device_count() > 1 else None
    if mesh is not None:
        state, key, reference = sharding.replicate((state, key, reference), mesh)

    def step(key: Array, state: PrimalDualState, reference: Params, brought: Any) -> Any:
        batch, *dual_batch = brought
        key = jax.random.fold_in(key, state.step)
        return algorithm.step(key, state, reference, task.prepare(batch), *dual_batch)

    compiled = sharding.jit_step(step, mesh)
    beside = () if task.dual_batch is None else (task.dual_batch,)
    with contextlib.closing(Checkpoints(out / "checkpoints")) as checkpoints:
        metrics_path = out / "metrics.jsonl"
        elapsed = 0.0
        if options.resume and checkpoints.latest is not None:
            state, _ = checkpoints.restore(state)
            say(f"resuming after step {int(state.step)}")
        elapsed = _keep_rows(metrics_path, int(state.step))

        def place(batch: Any) -> Any:
            brought = (batch, *beside)
            return brought if mesh is None else sharding.shard_batch(brought, mesh)

        state, timing["first_step"] = _train(
            task,
            options,
            command,
            state,
            lambda state, brought: compiled(key, state, reference, brought),
            place,
            checkpoints,
            metrics_path,
            elapsed,
            progress,
            after_step,
        )
        rows = report.read_rows(metrics_path)
        timing["train"] = rows[-1]["seconds"]
        say("measuring the unlearned model ...")
        measuring = time.monotonic()
        trained = jax.device_get(state.params)
        params = trained if rank is None else lora_merge(pretrained.params, trained)
        after = task.measure(params)
        floor = None if task.floor is None else task.floor()
        timing["unlearned"] = time.monotonic() - measuring
        _save(options, pretrained._replace(params=params), trained)
        certified = certificate(
            task.problem,
            objective=after.objective,
            values=after.constraints,
            thresholds=thresholds,
            multipliers=state.multipliers,
            floor=None if floor is None else Estimate(floor.value, floor.stderr),
        )
        mean_multipliers = np.mean([row["multipliers"] for row in rows], axis=0)
        timing["all"] = elapsed + time.monotonic() - started
        found = outcome.describe(
            task, options, command, after, certified, floor, mean_multipliers, timing
        )
        page = report.write_report(out, found, rows, task.grids(after))
    return Result(found, page)


def _save(options: RunOptions, unlearned: Pretrained, trained: Params) -> None:
    """Writes OUT/model as the options ask: the pipeline, its UNet, or a low-rank change."""
    folder, kind = options.out / "model", options.training.save
    if kind == "lora":
        save_lora(folder, trained, overwrite=True)
    elif kind == "unet":
        save_unet(folder, unlearned, overwrite=True)
    else:
        save_pretrained(folder, unlearned, overwrite=True, hard_links=options.training.link)


def _train(
    task: Task,
    options: RunOptions,
    command: str,
    state: PrimalDualState,
    step: Callable[[PrimalDualState, Any], Any],
    place: Callable[[Any], Any],
    checkpoints: Checkpoints,
    metrics_path: pathlib.Path,
    elapsed: float,
    progress: bool,
    after_step: Callable[[int], None] | None,
) -> tuple[PrimalDualState, float]:
    """Runs the remaining steps; the final state and the seconds that the first step took."""
    first, started = int(state.step), time.monotonic()
    first_step = 0.0
    bar = tqdm(
        total=options.steps, initial=first, unit="step", disable=not progress, dynamic_ncols=True
    )
    host = {"seed": options.seed}
    with bar, metrics_path.open("a") as log, _stop_signals() as received:

        def record(number: int, info: Any) -> None:
            info = jax.device_get(info)
            if not info.finite:
                log.flush()
                checkpoints.save(state, host)
                checkpoints.wait()
                raise NotFinite(
                    f"step {number}: a loss or gradient is not finite. The last good state is "
                    f"saved ({options.out}/checkpoints). {_advice(options)}"
                )
            seconds = elapsed + time.monotonic() - started
            log.write(json.dumps(_row(number, info, task.thresholds, seconds)) + "\n")
            log.flush()
            worst = float(np.max(info.violations))
            many = np.asarray(info.multipliers)
            shown = (
                " ".join(f"{value:.2f}" for value in many)
                if many.size <= 4
                else f"{many.min():.2f}…{many.max():.2f}"
            )
            bar.set_postfix_str(
                f"objective {float(info.objective):.4g}, violation {worst:+.3g}, λ {shown}"
            )
            bar.update()
            if after_step is not None:
                after_step(number)

        pending = None
        for number in range(first + 1, options.steps + 1):
            batch = place(task.batch(number - 1))
            state, info = step(state, batch)
            # The step before is logged while this one runs.
            if pending is not None:
                record(*pending)
            pending = (number, info)
            if number == first + 1:
                jax.block_until_ready(info)
                first_step = time.monotonic() - started
            if received or number % options.checkpoint_every == 0 or number == options.steps:
                record(*pending)
                pending = None
                checkpoints.save(state, host)
            if received:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped after step {number}; saved. Go on with: "
                    f"jax-unlearn {command} --out {options.out} --resume",
                    received[0],
                )
    return state, first_step
