"""One unlearning run from request to report: loop, checkpoints, signals, files."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jax_unlearn import sharding
from jax_unlearn.app import data, legs, outcome, processes, report, verify
from jax_unlearn.app import identity as identities
from jax_unlearn.app.algorithm import algorithm_of
from jax_unlearn.app.card import write_card
from jax_unlearn.app.checkpoint import Checkpoints
from jax_unlearn.app.files import explained_if_full
from jax_unlearn.app.loop import Loop, train
from jax_unlearn.app.options import ConceptOptions, ImageOptions, RunOptions
from jax_unlearn.app.rows import RowLog
from jax_unlearn.app.stopping import StopSignals, stop_signals
from jax_unlearn.app.tasks import (
    concept_methods,
    concept_request,
    concepts,
    image_methods,
    image_task,
    images,
)
from jax_unlearn.app.tasks.base import Measured, Task
from jax_unlearn.app.tensorboard import event_log
from jax_unlearn.app.terminal import say
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained import Pretrained, save_maxdiffusion, save_pretrained, save_unet
from jax_unlearn.pretrained.maxdiffusion import check_writable
from jax_unlearn.pretrained.subsets import lora_merge, parse_subset, save_lora
from jax_unlearn.primal_dual import PrimalDualState, certificate
from jax_unlearn.typing import Estimate, Params

__all__ = [
    "TASKS",
    "NotFinite",
    "Result",
    "check_batches",
    "check_method",
    "run",
    "save_model",
    "trained_of",
]

TASKS: dict[type, Callable[[Any, Any, Any], Task]] = {
    images.ImageRequest: image_task.image_task,
    concept_request.ConceptRequest: concepts.concept_task,
}


class NotFinite(Exception):
    """A loss, a gradient or a measurement became infinite or not a number."""


class Result(NamedTuple):
    """What a run ends with: the report as in report.json, and the page that shows it."""

    report: dict[str, Any]
    page: pathlib.Path


def check_batches(
    request: images.ImageRequest | concept_request.ConceptRequest,
    options: RunOptions,
    ways: int | None = None,
) -> None:
    """Refuses batches that do not divide over the devices, before anything is measured.

    Args:
      request: with the images, if any.
      options: of the run.
      ways: parts that the rows of a batch are split into; default those of the mesh.

    Raises:
      ValueError: naming the size.
    """
    sizes = [options.batch_size, options.forget_batch_size]
    if isinstance(request, images.ImageRequest):
        assert isinstance(options, ImageOptions)
        parts = jax.tree.leaves(images.batch(request, options, 0))
        sizes = [len(leaf) for leaf in parts]
    if ways is None:
        ways = sharding.batch_ways(_mesh(options))
    for size in sizes:
        sharding.check_rows(size, ways)
        if size % (ways * options.accumulate):
            raise ValueError(
                f"a batch of {size} does not divide into {options.accumulate} parts (--accumulate) "
                f"over {ways} devices: choose a multiple of {ways * options.accumulate}."
            )


def _mesh(options: RunOptions) -> Mesh:
    return sharding.device_mesh(**sharding.parse_mesh(options.mesh))


def check_method(
    request: images.ImageRequest | concept_request.ConceptRequest, options: RunOptions
) -> None:
    """Refuses a --method or --save that this model or these images do not have what it takes for.

    Raises:
      ValueError: naming what is missing.
    """
    if options.training.save == "maxdiffusion":
        check_writable(request.pretrained.config)
    if isinstance(request, images.ImageRequest):
        assert isinstance(options, ImageOptions)
        image_methods.check_images(request, options)
    else:
        assert isinstance(options, ConceptOptions)
        concept_methods.check_concepts(request, options)


def _row(step: int, info: Any, thresholds: np.ndarray, seconds: float) -> dict[str, Any]:
    def plain(values: Any) -> list[float | None]:
        return [float(v) if np.isfinite(v) else None for v in np.asarray(values)]

    return {
        "step": step,
        "objective": float(info.objective),
        "values": plain(info.values),
        # Of a constraint without a row in the batch nothing is known.
        "violations": plain(np.where(np.isnan(info.values), np.nan, info.violations)),
        "multipliers": plain(info.multipliers),
        "thresholds": plain(thresholds),
        "gradient_norm": float(info.gradient_norm),
        **{name: float(value) for name, value in info.diagnostics.items()},
        "seconds": round(seconds, 3),
    }


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

    A run that was killed goes on bit for bit from its last whole checkpoint with options.resume:
    batches and noise are functions of the seed and the step. It does so only if it is the same
    run: see `identity`. The first loss that is not finite ends the run; no step is skipped.

    Args:
      request: what to forget and to keep.
      options: how.
      command: the name under which run.json and the report can repeat the run.
      judge: names what samples show; without one agreement, KID and FID are not measured.
      progress: whether to show a bar on the terminal.
      after_step: called with each finished step's number.

    Raises:
      Interrupted: after SIGINT or SIGTERM; nothing is lost.
      NotFinite: if a loss, gradient or measurement is not; ruined checkpoints are deleted.
      DiskFull: if it is.
      ValueError: if the folder is in use, or what is resumed is another run or damaged.
    """
    again = f"jax-unlearn {command} --out {options.out} --resume"
    with (
        explained_if_full(options.out, again),
        processes.own_options(options) as own,
        stop_signals(f"stopped while measuring; nothing is lost. Go on with: {again}") as stop,
    ):
        shared, progress = options.out, progress and processes.is_main()
        return _run(request, own, shared, command, judge, progress, after_step, stop)


def _advice(options: RunOptions, command: str) -> str:
    """What may help a run whose losses became infinite: only what its command has and uses."""
    knobs = "--learning-rate"
    another = ""
    if getattr(options, "method", "constrained") != "constrained":
        another = "; or start anew with another --strength"
    elif not isinstance(options, ConceptOptions):
        knobs += " or --max-multiplier"
    elif options.formulation == "likelihood":
        another = ", or a larger --threshold"
    else:
        knobs += " or --max-multiplier"
        if options.estimator == "pathwise":
            another = "; or start anew with --estimator bounded"
    again = f"jax-unlearn {command} --out {options.out} --continue"
    return f"Go on with a lower {knobs}{another}: {again} --learning-rate NUMBER"


def _run(
    request: images.ImageRequest | concept_request.ConceptRequest,
    options: RunOptions,
    shared: pathlib.Path,
    command: str,
    judge: JudgeFunctions | None,
    progress: bool,
    after_step: Callable[[int], None] | None,
    stop: StopSignals,
) -> Result:
    started = time.monotonic()
    out, pretrained = options.out, request.pretrained
    tell = say if progress else lambda text: None
    for note in request.notes:
        tell(f"note: {note}")
    identity = identities.identify(request, options, command)
    changed = legs.begin(options, command, identity)
    tell("measuring the reference model ...")
    task = TASKS[type(request)](request, options, judge)
    timing = {"reference": time.monotonic() - started}
    by_pmap = options.parallel == "pmap" and jax.device_count() > 1
    axis_name = sharding.AXIS if by_pmap else None
    algorithm, start, step = algorithm_of(task, options, task.params, axis_name=axis_name)
    reference = pretrained.params
    if task.baseline is not None and task.baseline.reference is not None:
        reference = task.baseline.reference
    # In one program. The step donates the copy of what trains, and not the reference.
    init = partial(algorithm.init, thresholds=task.thresholds, multipliers=task.multipliers)
    state = jax.jit(init)(start)
    # A step's key follows from the seed and the state's own count: nothing more to save.
    key = jax.random.key(options.seed)
    mesh = _mesh(options) if jax.device_count() > 1 and not by_pmap else None
    if mesh is not None:
        like = state, reference
        state, reference = sharding.put(like, sharding.shardings(like, mesh))
        key = sharding.replicate(key, mesh)

    if by_pmap:
        compiled = sharding.pmap_step(algorithm._replace(step=step))
    else:
        compiled = sharding.jit_step(step, mesh, like=None if mesh is None else (state, reference))
    beside = () if task.dual_batch is None else (task.dual_batch,)

    def place(batch: Any) -> Any:
        brought = (batch, *beside)
        if by_pmap:
            return sharding.split_batch(brought, jax.device_count())
        return brought if mesh is None else sharding.shard_batch(brought, mesh)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(shared / "checkpoints")))
        if options.resume:
            state = legs.restored_state(checkpoints, options, state, changed, tell)
        # What stands here from now on is not what these sums were made of.
        (out / verify.SUMS).unlink(missing_ok=True)
        run_legs = legs.legs_of(options, command, identity, changed, int(state.step))
        log = stack.enter_context(
            contextlib.closing(RowLog(out / "metrics.jsonl", int(state.step)))
        )
        loop = Loop(
            lambda state, brought: compiled(key, state, reference, brought),
            lambda number: place(task.batch(number)),
            lambda number, info: None,
            checkpoints,
            log,
            run_legs[-1].digest,
            stop,
            f"jax-unlearn {command} --out {options.out} --resume",
            None if mesh is None or jax.process_count() == 1 else processes.any_of(mesh),
        )
        elapsed, events = log.seconds, None
        with stop.hold(), contextlib.ExitStack() as while_training:
            if options.tensorboard:
                steps = report.read_rows(out / "metrics.jsonl")
                events = while_training.enter_context(
                    event_log(out / "tensorboard", task.names, steps)
                )
            state, timing["first_step"] = _train(
                loop, options, command, state, elapsed, progress, events, after_step
            )
        timing["train"] = log.seconds
        tell("measuring the unlearned model ...")
        measuring = time.monotonic()
        trained, params = trained_of(task, options, state.params)
        after = _measure(task, params, options, command, checkpoints)
        floor = None if task.floor is None else task.floor()
        timing["unlearned"] = time.monotonic() - measuring
        checkpoints.wait()
        if processes.is_main():
            save_model(out / "model", options, pretrained._replace(params=params), trained)
        certified = certificate(
            task.problem,
            objective=after.objective,
            values=after.constraints,
            # Those that the optimizer had: a device of another kind may measure others.
            thresholds=np.asarray(state.thresholds),
            multipliers=state.multipliers,
            floor=None if floor is None else Estimate(floor.value, floor.stderr),
        )
        rows = report.read_rows(out / "metrics.jsonl")
        every = [row["multipliers"] for row in rows] or [np.asarray(state.multipliers)]
        mean_multipliers = np.mean(every, axis=0)
        timing["all"] = elapsed + time.monotonic() - started
        found = outcome.describe(
            task, options, command, after, certified, floor, mean_multipliers, timing
        )
        found |= {
            "identity": {"digest": run_legs[-1].digest, **identity._asdict()},
            "legs": [leg._asdict() for leg in run_legs],
            "rows": {"count": log.count, "digest": log.digest},
        }
        page = out / "report.html"
        if not processes.is_main():
            return Result(found, page)
        grids = task.grids(after)
        write_card(out / "model", found, grids)
        found["files"] = verify.model_digests(out)
        page = report.write_report(out, found, rows, grids)
        verify.write_sums(out)
    return Result(found, page)


def _measure(
    task: Task, params: Params, options: RunOptions, command: str, checkpoints: Checkpoints
) -> Measured:
    """What the report says of the unlearned model.

    Raises:
      NotFinite: if the last step ruined it.
    """
    try:
        after = task.measure(params)
        if np.isfinite([after.objective.value, *np.atleast_1d(after.constraints.value)]).all():
            return after
    except data.NotNumbers:
        pass
    checkpoints.drop_from(options.steps)
    raise NotFinite(
        f"step {options.steps}: the model that it made has no finite objective or constraints, and "
        f"is not saved. {_back_to(checkpoints)} {_advice(options, command)}"
    )


def _back_to(checkpoints: Checkpoints) -> str:
    last = checkpoints.latest
    if last is None:
        return "No checkpoint is left, so that the run begins again."
    return f"The last checkpoint with a finite loss is that of step {last}."


def trained_of(task: Task, options: RunOptions, params: Any) -> tuple[Params, Params]:
    """What trained, on the host, and the parameters of the network that it makes.

    Args:
      task: of the run.
      options: of the run.
      params: of the final state.
    """
    trained = jax.tree.map(processes.fetch, params)
    if task.adversary is not None:
        trained = trained.params
    low_rank = parse_subset(options.training.train).rank is not None
    return trained, lora_merge(task.pretrained.params, trained) if low_rank else trained


def save_model(
    folder: pathlib.Path, options: RunOptions, unlearned: Pretrained, trained: Params
) -> None:
    """Writes a model as the options ask: the pipeline, its UNet, or a low-rank change.

    Args:
      folder: where to.
      options: of the run.
      unlearned: the model, its parameters those of the network.
      trained: what trained: these, or a low-rank change of the reference's.
    """
    kind = options.training.save
    if kind == "lora":
        base = unlearned.config.source if unlearned.config.commit else ""
        save_lora(folder, trained, base_model=base, overwrite=True)
    elif kind == "unet":
        save_unet(folder, unlearned, overwrite=True)
    elif kind == "maxdiffusion":
        save_maxdiffusion(folder, unlearned, overwrite=True)
    else:
        save_pretrained(folder, unlearned, overwrite=True, hard_links=options.training.link)


def _train(
    loop: Loop,
    options: RunOptions,
    command: str,
    state: PrimalDualState,
    elapsed: float,
    progress: bool,
    events: Callable[[Mapping[str, Any]], None] | None,
    after_step: Callable[[int], None] | None,
) -> tuple[PrimalDualState, float]:
    """Runs the remaining steps, with a row of each; as `train`."""
    started, thresholds = time.monotonic(), np.asarray(state.thresholds)
    log, checkpoints = loop.log, loop.checkpoints
    bar = tqdm(
        total=options.steps,
        initial=int(state.step),
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar:

        def record(number: int, info: Any) -> None:
            info = jax.device_get(info)
            if not info.finite:
                # The step before made these parameters, and a checkpoint may hold them already.
                checkpoints.drop_from(number - 1)
                raise NotFinite(
                    f"step {number}: a loss or gradient is not finite. {_back_to(checkpoints)} "
                    f"{_advice(options, command)}"
                )
            seconds = elapsed + time.monotonic() - started
            row = _row(number, info, thresholds, seconds)
            log.append(row)
            if events is not None:
                events(row)
            worst = float(np.max(info.violations))
            many = np.asarray(info.multipliers)
            shown = (
                " ".join(f"{value:.2f}" for value in many)
                if many.size <= 4
                else f"{many.min():.2f}…{many.max():.2f}"
            )
            said = f"objective {float(info.objective):.4g}, violation {worst:+.3g}, λ {shown}"
            if np.isnan(info.values).all():  # A baseline sees no constraint.
                said = f"loss {float(info.objective):.4g}"
            bar.set_postfix_str(said)
            bar.update()
            if after_step is not None:
                after_step(number)

        return train(
            loop._replace(record=record),
            state,
            steps=options.steps,
            every=options.checkpoint_every,
        )
