"""A sweep from request to fronts: all problems train in one program, and each is measured."""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jax_unlearn import sharding
from jax_unlearn.app import data, outcome, report, verify
from jax_unlearn.app import identity as identities
from jax_unlearn.app.algorithm import algorithm_of
from jax_unlearn.app.checkpoint import Checkpoints
from jax_unlearn.app.checks import flag
from jax_unlearn.app.files import explained_if_full
from jax_unlearn.app.folder import claim
from jax_unlearn.app.identity import Leg
from jax_unlearn.app.kept import Kept
from jax_unlearn.app.loop import Loop, restore, train
from jax_unlearn.app.options import ModelOptions
from jax_unlearn.app.rows import RowLog
from jax_unlearn.app.run import TASKS, save_model, trained_of
from jax_unlearn.app.run_file import plain_options, save_run
from jax_unlearn.app.stopping import StopSignals, stop_signals
from jax_unlearn.app.sweep.fronts import describe, write_fronts
from jax_unlearn.app.sweep.options import Point, SweepOptions
from jax_unlearn.app.tasks import concept_request, images
from jax_unlearn.app.tasks.base import Task
from jax_unlearn.app.terminal import say
from jax_unlearn.models.files import read_json
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained.weights import clean_leftovers
from jax_unlearn.primal_dual import PrimalDualState, certificate
from jax_unlearn.sharding import AXIS
from jax_unlearn.sweep import sweep_devices, sweep_init, sweep_step
from jax_unlearn.typing import Estimate, Params

__all__ = ["check_sweep_options", "devices_of", "mesh_of", "sweep"]

Request = images.ImageRequest | concept_request.ConceptRequest
# How a sweep is started, and what is written of it: no number that was trained or measured.
_STARTING = ("command", "at_once", "reference_point", "keep_models")


def devices_of(asked: SweepOptions, options: ModelOptions) -> int:
    """How many devices a sweep is spread over: those of --mesh, or as many as divide its problems.

    Raises:
      ValueError: for a mesh that does not divide them, or has other axes than data, and for groups
        that do not divide the problems of a device.
    """
    problems, here = len(asked.points(options)), jax.devices()
    count = sweep_devices(problems, here)
    if options.mesh:
        sizes = sharding.device_mesh(**sharding.parse_mesh(options.mesh)).devices.shape
        count = sizes[0]
        if sizes[1:] != (1, 1):
            raise ValueError(
                f"--mesh {options.mesh}: a sweep spreads its problems over data alone; fsdp and "
                "tensor split one."
            )
        if problems % count:
            raise ValueError(
                f"--mesh {options.mesh}: {problems} problems do not divide over {count} devices. "
                f"Without --mesh they take {sweep_devices(problems, here)}."
            )
    if (problems // count) % asked.at_once:
        raise ValueError(
            f"--at-once {asked.at_once} does not divide the {problems // count} problems of a "
            "device."
        )
    return count


def check_sweep_options(asked: SweepOptions, options: ModelOptions) -> None:
    """Refuses to resume another sweep, before anything is loaded.

    Raises:
      ValueError: naming what differs.
    """
    if not options.resume:
        return
    path = options.out / "run.json"
    saved, now = read_json(path).get("sweep", {}), json.loads(json.dumps(plain_options(asked)))
    differing = [
        f"{flag(name)}: {saved.get(name)}, now {now[name]}"
        for name in now
        if name not in _STARTING and saved.get(name) != now[name]
    ]
    if differing:
        raise ValueError(
            f"{path} is of another sweep: {'; '.join(differing)}. Start another with another --out."
        )


def mesh_of(count: int) -> Mesh | None:
    """The first devices, as a mesh; None of one."""
    return None if count == 1 else sharding.device_mesh(devices=jax.devices()[:count])


def sweep(
    request: Request,
    asked: SweepOptions,
    options: ModelOptions,
    *,
    judge: JudgeFunctions | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains all problems, measures each, and writes fronts.json and fronts.png into options.out.

    A sweep that was killed goes on bit for bit from its last whole checkpoint with options.resume,
    and measures no model again that it has measured.

    Args:
      request: what to forget and to keep.
      asked: the points.
      options: of the command, those of the first point applied.
      judge: as of `run`.
      progress: whether to show bars on the terminal.
      after_step: called with each finished step's number.

    Returns:
      What is in fronts.json.

    Raises:
      Interrupted: after SIGINT or SIGTERM; nothing is lost.
      DiskFull: if it is.
      ValueError: as `run`.
    """
    again = f"jax-unlearn sweep {asked.command} --out {options.out} --resume"
    with (
        explained_if_full(options.out, again),
        claim(options),
        stop_signals(f"stopped while measuring; nothing is lost. Go on with: {again}") as stop,
    ):
        return _sweep(request, asked, options, judge, progress, after_step, stop, again)


class _Problems(NamedTuple):
    """All problems, ready to train.

    Attributes:
      tasks: the task of each, of which no two were measured apart.
      states: of all.
      step: (states, placed batches) -> (states, infos).
      batch: step -> the batches of all seeds, placed.
    """

    tasks: tuple[Task, ...]
    states: PrimalDualState
    step: Callable[[PrimalDualState, Any], Any]
    batch: Callable[[int], Any]


def _problems(
    points: Sequence[Point], task: Task, options: ModelOptions, mesh: Mesh | None, at_once: int
) -> _Problems:
    made = {(p.threshold, p.strength): task.at(p.threshold, p.strength) for p in points}
    tasks = tuple(made[point.threshold, point.strength] for point in points)
    first = tasks[0]
    algorithm, start, _ = algorithm_of(first, options, first.params)
    starts = [
        algorithm_of(one, _seeded(options, point), one.params)[1]
        for one, point in zip(tasks, points, strict=True)
    ]
    # Most share the reference's own arrays; low-rank changes and edited ones are each their own.
    same = [
        list(map(id, jax.tree.leaves(one))) == list(map(id, jax.tree.leaves(start)))
        for one in starts
    ]
    stacked = not all(same)
    if stacked:
        start = jax.tree.map(lambda *parts: jnp.stack(parts), *starts)
    thresholds = np.stack([one.thresholds for one in tasks])
    multipliers = [np.broadcast_to(one.multipliers, one.thresholds.shape) for one in tasks]
    states = sweep_init(
        algorithm, start, thresholds, multipliers=np.stack(multipliers), stacked=stacked, mesh=mesh
    )

    def step(key: Any, state: Any, reference: Any, brought: Any, *strength: Any) -> Any:
        # A strength is data like a threshold: what is built of it is part of the program.
        own = algorithm_of(first, options, first.params, strength=strength[0] if strength else None)
        return own[2](key, state, reference, brought)

    seeds = [*dict.fromkeys(point.seed for point in points)]
    which = np.array([seeds.index(point.seed) for point in points])
    keys = jnp.stack([jax.random.key(point.seed) for point in points])
    each = () if points[0].strength is None else (jnp.array([p.strength for p in points]),)
    reference = task.pretrained.params
    if first.baseline is not None and first.baseline.reference is not None:
        reference = first.baseline.reference
    if mesh is not None:
        spread = NamedSharding(mesh, PartitionSpec(AXIS))
        keys, which, each = (sharding.put(one, spread) for one in (keys, which, each))
        reference = sharding.replicate(reference, mesh)
    compiled = sweep_step(step, mesh, at_once=at_once)

    def batch(number: int) -> Any:
        beside = () if first.dual_batch is None else (first.dual_batch,)
        brought = [(first.batch(number, seed), *beside) for seed in seeds]
        together = jax.tree.map(lambda *rows: np.stack(rows), *brought)
        return together if mesh is None else sharding.replicate(together, mesh)

    return _Problems(
        tasks,
        states,
        lambda states, brought: compiled(keys, states, reference, brought, which, each),
        batch,
    )


def _seeded(options: ModelOptions, point: Point) -> ModelOptions:
    return dataclasses.replace(options, seed=point.seed)


def _sweep(
    request: Request,
    asked: SweepOptions,
    options: ModelOptions,
    judge: JudgeFunctions | None,
    progress: bool,
    after_step: Callable[[int], None] | None,
    stop: StopSignals,
    again: str,
) -> dict[str, Any]:
    started, out = time.monotonic(), options.out
    tell = say if progress else lambda text: None
    for note in request.notes:
        tell(f"note: {note}")
    points = asked.points(options)
    leg = _begin(request, asked, options)
    tell("measuring the reference model ...")
    task = TASKS[type(request)](request, options, judge)
    mesh = mesh_of(devices_of(asked, options))
    problems = _problems(points, task, options, mesh, asked.at_once)
    timing = {"reference": time.monotonic() - started}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(out / "checkpoints")))
        states = problems.states
        if options.resume:
            states = _restored(checkpoints, options, states, leg, tell)
        (out / verify.SUMS).unlink(missing_ok=True)
        log = stack.enter_context(
            contextlib.closing(RowLog(out / "metrics.jsonl", int(states.step)))
        )
        elapsed = log.seconds
        loop = Loop(
            problems.step, problems.batch, lambda number, info: None, checkpoints, log, leg.digest,
            stop, again,
        )  # fmt: skip
        with stop.hold():
            states, timing["first_step"] = _train(loop, options, states, progress, after_step)
        timing["train"] = log.seconds
        checkpoints.wait()
        kept = Kept(out / "measured", identities.digest_of([leg.digest, log.digest]))
        rows = report.read_rows(out / "metrics.jsonl")
        with tqdm(total=len(points), unit="model", disable=not progress, dynamic_ncols=True) as bar:
            found = []
            for place, point in enumerate(points):
                bar.set_postfix_str(point.name)
                measure = partial(_measured, problems, states, place, options, rows)
                found.append(kept.get(point.name) or kept.put(point.name, measure))
                folder = folder_of(out, point)
                if asked.keep_models and "lost" not in found[-1] and not folder.is_dir():
                    folder.parent.mkdir(exist_ok=True)
                    clean_leftovers(folder)
                    trained, params = _params_of(problems, states, place, options)
                    unlearned = task.pretrained._replace(params=params)
                    save_model(folder, options, unlearned, trained)
                bar.update()
        timing["measured"] = sum(one["seconds"] for one in found)
        timing["all"] = elapsed + time.monotonic() - started
        fronts = describe(points, problems.tasks, found, asked, options)
        fronts |= {
            "steps": options.steps,
            "identity": {"digest": leg.digest},
            "devices": 1 if mesh is None else mesh.size,
            "device": outcome.device(),
            "versions": identities.versions(),
            "seconds": round(timing.pop("all"), 2),
            "timing": {name: round(value, 2) for name, value in timing.items()},
        }
        write_fronts(out, fronts)
        verify.write_sums(out)
    return fronts


def _train(
    loop: Loop,
    options: ModelOptions,
    states: PrimalDualState,
    progress: bool,
    after_step: Callable[[int], None] | None,
) -> tuple[PrimalDualState, float]:
    """Runs the remaining steps, with a row of each; as `train`."""
    started, elapsed = time.monotonic(), loop.log.seconds
    bar = tqdm(
        total=options.steps,
        initial=int(states.step),
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    )

    def record(number: int, infos: Any) -> None:
        infos = jax.device_get(infos)
        seconds = elapsed + time.monotonic() - started
        loop.log.append(_row(number, infos, seconds))
        bar.set_postfix_str(f"{len(infos.finite)} problems")
        bar.update()
        if after_step is not None:
            after_step(number)

    with bar:
        return train(
            loop._replace(record=record),
            states,
            steps=options.steps,
            every=options.checkpoint_every,
        )


def _row(number: int, infos: Any, seconds: float) -> dict[str, Any]:
    """A step of all problems: lists over these."""

    def plain(values: Any) -> Any:
        values = np.asarray(values, np.float64)
        return np.where(np.isfinite(values), values, np.array(None)).tolist()

    return {
        "step": number,
        "objective": plain(infos.objective),
        "values": plain(infos.values),
        "multipliers": plain(infos.multipliers),
        "gradient_norm": plain(infos.gradient_norm),
        "finite": np.asarray(infos.finite).tolist(),
        "seconds": round(seconds, 3),
    }


def _begin(request: Request, asked: SweepOptions, options: ModelOptions) -> Leg:
    """Writes run.json, or compares with it.

    Raises:
      ValueError: naming what differs from the sweep that is resumed.
    """
    command, path = f"sweep {asked.command}", options.out / "run.json"
    identity = identities.identify(request, options, command)
    swept = {name: value for name, value in plain_options(asked).items() if name not in _STARTING}
    identity = identity._replace(options=identity.options | swept)
    leg = Leg(0, identities.digest_of(identity._asdict()), (), outcome.device())
    if options.resume:
        identities.changes(path, identity, options)
        return identities.saved_legs(path)[-1]
    saved = {name: value for name, value in plain_options(asked).items() if name != "at_once"}
    save_run(path, command, options, sweep=saved, **identities.plain(identity, [leg]))
    return leg


def _restored(
    checkpoints: Checkpoints,
    options: ModelOptions,
    states: PrimalDualState,
    leg: Leg,
    tell: Callable[[str], None],
) -> PrimalDualState:
    """The last whole state; the given one if there is none.

    Raises:
      ValueError: if there is no whole one, or it is of another sweep.
    """
    restored = restore(
        checkpoints, options.out, states, known={leg.digest}, steps=options.steps, tell=tell
    )
    if restored is None:
        return states
    if not np.allclose(restored.thresholds, states.thresholds, rtol=1e-2):
        raise ValueError(
            f"the thresholds are measured as {np.asarray(states.thresholds).tolist()}, and the "
            f"sweep began with {np.asarray(restored.thresholds).tolist()}: start anew with another "
            "--out."
        )
    return restored


def _params_of(
    problems: _Problems, states: PrimalDualState, place: int, options: ModelOptions
) -> tuple[Params, Params]:
    """What trained in a problem, and the parameters that it makes."""
    own = jax.tree.map(lambda leaf: leaf[place], states.params)
    return trained_of(problems.tasks[place], options, own)


def _measured(
    problems: _Problems,
    states: PrimalDualState,
    place: int,
    options: ModelOptions,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a problem ended with, as plain values; or why there is nothing to measure."""
    lost = [row["step"] for row in rows if not row["finite"][place]]
    if lost:
        return {"lost": f"step {lost[0]}: a loss or gradient was not finite"}
    task = problems.tasks[place]
    params = _params_of(problems, states, place, options)[1]
    try:
        after = task.measure(params)
    except data.NotNumbers:
        return {"lost": "the last step: samples of the model are not finite"}
    if not np.isfinite([after.objective.value, *np.atleast_1d(after.constraints.value)]).all():
        return {"lost": "the last step: objective or constraints are not finite"}
    floor = None if task.floor is None else task.floor()
    multipliers = np.asarray(states.multipliers[place])
    certified = certificate(
        task.problem,
        objective=after.objective,
        values=after.constraints,
        thresholds=np.asarray(states.thresholds[place]),
        multipliers=multipliers,
        floor=None if floor is None else Estimate(floor.value, floor.stderr),
    )
    every = [row["multipliers"][place] for row in rows] or [multipliers]
    parts = outcome.certified_parts(task, certified, floor, np.mean(every, axis=0))
    return {**parts, "metrics": outcome.metrics_of(task, after)}


def folder_of(out: pathlib.Path, point: Point) -> pathlib.Path:
    """Where the model of a problem is saved."""
    return out / "models" / re.sub(r"[^A-Za-z0-9.-]+", "-", point.name)
