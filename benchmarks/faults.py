"""What a hostile world does to runs: kills, signals, damage, changed inputs, full disks, rivals.

    python benchmarks/faults.py --out benchmarks/results
    python benchmarks/faults.py --kinds checkpoints --case 17 --keep /tmp/faults

Runs of tiny networks by the command line, `jax-unlearn data` (forward KL) and `concept` (reverse KL
and likelihood), are disturbed and go on. Each must end in the state of the run that was not
disturbed: the same bytes of OUT/model, the same rows and report but for seconds, and a folder that
`verify` calls whole. Or it must be refused: exit 2, one line, nothing changed.
Everything else is a failure, is written with its seed, and makes the exit status 1.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from PIL import Image
from tqdm import tqdm

import jax_unlearn
from jax_unlearn.app import cli, verify
from jax_unlearn.app.report import read_rows
from jax_unlearn.models.unet_2d import UNet2DConfig, init_params
from jax_unlearn.pretrained import Pretrained, PretrainedConfig, UNet2DDenoiser, save_pretrained
from jax_unlearn.schedules import from_diffusers

LIMIT = 120  # seconds, after which a command hangs
CLOSE = 1e-6  # between parameters of runs on different numbers of devices
GOOD = ("same", "passed_over", "refused", "found", "whole")
BAD = ("different_state", "traceback", "hang", "false_report", "lines", "exit", "changed")
PARTS = ("loading", "reference", "training", "measuring", "saving")

UNET = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
    "layers_per_block": 1, "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4, "add_attention": False, "num_class_embeds": 4,
}  # fmt: skip
SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
COMMON = "--model model --out out --batch-size 16 --forget-batch-size 8 --samples 2 \
--sampling-steps 4 --checkpoint-every 4"
CONCEPT = f"concept --forget dog {COMMON} --steps 12 --evaluation-images 32 --chain-steps 3"
COMMANDS = {
    "data": f"data --forget forget:dog --retain retain.npz {COMMON} --steps 24 --threshold 1.2x \
--evaluation-images 16",
    "reverse-kl": CONCEPT,
    "likelihood": f"{CONCEPT} --formulation likelihood --threshold 0.1x --stored-samples 64 \
--classifier-draws 2 --target-steps 3",
}
# As the installed script; the empty line says that the command begins. A signal before that, while
# Python imports the package, ends it as it ends any program: nothing has been read or written.
ENTRY = "import sys\nfrom jax_unlearn.app.cli import main\nprint(flush=True)\nsys.exit(main())"
PROGRAM = [sys.executable, "-c", ENTRY]
MIX = ("data", "reverse-kl", "data", "likelihood", "data")


class Recipe(NamedTuple):
    """A run that was not disturbed.

    Attributes:
      start: its command line.
      steps: of the run.
      whole: its folder.
      trained: the folder after the last step, before anything was measured or saved.
      spans: seconds of each of PARTS.
      on: folders of undisturbed runs by their number of devices, where that was asked for.
    """

    start: list[str]
    steps: int
    whole: pathlib.Path
    trained: pathlib.Path
    spans: list[float]
    on: dict[int, pathlib.Path]

    @property
    def resume(self) -> list[str]:
        return [self.start[0], "--out", "out", "--resume"]


class Ended(NamedTuple):
    """How a command ended; no code is a hang."""

    code: int | None
    text: str


class Outcome(NamedTuple):
    """What became of a case; what was done to it; a number, where one was measured."""

    name: str
    what: str
    number: float | None = None


class Case(NamedTuple):
    """What a case is made from: `place` is a folder of its own, with a copy of the inputs."""

    index: int
    rng: np.random.Generator
    place: pathlib.Path
    recipe: Recipe
    call: Callable[[pathlib.Path, list[str]], Ended]

    @property
    def out(self) -> pathlib.Path:
        return self.place / "out"


# --- The model and the images.


def write_inputs(place: pathlib.Path) -> None:
    """A random network of 8×8 grey images with three labels, and images of them."""
    config = PretrainedConfig(UNET, SCHEDULER, {0: "cat", 1: "dog", 2: "T-shirt/top"}, 3)
    denoiser = UNet2DDenoiser(UNet2DConfig.from_diffusers(UNET), 3)
    params = init_params(UNET, jax.random.key(0))
    model = Pretrained(denoiser, params, from_diffusers(SCHEDULER), config)
    save_pretrained(place / "model", model)
    # Or it would be this list that finds changed weights, and not the run's identity.
    (place / "model" / "model.sha256").unlink(missing_ok=True)
    rng = np.random.default_rng(0)
    kept = np.tile([0, 2], 30)
    np.savez(place / "retain.npz", images=draw(rng, kept), labels=kept)
    (place / "forget").mkdir()
    for number, image in enumerate(draw(rng, np.ones(12, int))):
        Image.fromarray(image).save(place / "forget" / f"{number}.png")


def draw(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    noisy = rng.normal(60 * labels[:, None, None] + 60, 30, (len(labels), 8, 8))
    return np.clip(noisy, 0, 255).astype(np.uint8)


# --- Processes.


def launch(place: pathlib.Path, given: list[str], devices: int = 1) -> subprocess.Popen:
    """Starts a command, and returns when it has begun; `wait` reads what it says."""
    said = open(place / f"said-{time.monotonic_ns()}", "w+b")  # noqa: SIM115
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    process = subprocess.Popen(
        [*PROGRAM, *given],
        cwd=place,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=said,
    )
    process.stdout.readline()
    process.said = said
    return process


def wait(process: subprocess.Popen) -> Ended:
    with process.said as said, process.stdout:
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        said.seek(0)
        return Ended(code, said.read().decode(errors="replace"))


def run(place: pathlib.Path, given: list[str], devices: int = 1) -> Ended:
    return wait(launch(place, given, devices))


def serve(connection: Any) -> None:
    """Runs commands in this process, one after another: imports and programs are there already."""
    while (job := connection.recv()) is not None:
        place, given, said = job
        os.chdir(place)
        for stream, target in ((1, os.devnull), (2, said)):
            file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
            os.close(file)
        try:
            code = cli.main(given)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        connection.send(code)


class Server:
    """A process that runs commands; a new one after a hang, a crash, and each 25th command."""

    def __init__(self) -> None:
        self._process, self._count = None, 0

    def __call__(self, place: pathlib.Path, given: list[str]) -> Ended:
        if self._process is None or self._count == 25:
            self.close()
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._count = 0
        self._count += 1
        said = place / "said"
        self._connection.send((place, given, said))
        code = None
        if self._connection.poll(LIMIT):
            try:
                code = self._connection.recv()
            except EOFError:  # It has died.
                self._process.join()
                code = self._process.exitcode
                self.close()
        else:
            self.close()
        return Ended(code, said.read_text(errors="replace"))

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):  # It may have died.
                self._connection.send(None)
            self._process.join(5)
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


# --- What a run left, and what it said.

_BESIDE = re.compile(r"note: .*|measuring the .* \.\.\.|resuming after step \d+|\s*\d+%\|.*")


def messages(text: str) -> list[str]:
    """The lines that a command has printed beside notes and bars."""
    lines = re.split(r"[\r\n]+", text)
    return [line for line in lines if line.strip() and not _BESIDE.fullmatch(line)]


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: pathlib.Path) -> dict[str, str]:
    """Every path in a folder with the digest of its content."""
    return {
        path.relative_to(folder).as_posix(): digest(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def without_seconds(out: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report and the rows, but for what tells the time."""
    report = json.loads((out / "report.json").read_text())
    for name in ("seconds", "timing"):
        del report[name]
    del report["rows"]["digest"]  # Rows have seconds.
    rows = [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_rows(out / "metrics.jsonl")
    ]
    return report, rows


def differences(out: pathlib.Path, whole: pathlib.Path) -> tuple[str, str] | None:
    """How a finished run differs from another one: the name of an outcome, and what differs."""
    if tree(out / "model") != tree(whole / "model"):
        return "different_state", "other files of OUT/model"
    (report, rows), (expected, expected_rows) = map(without_seconds, (out, whole))
    if rows != expected_rows:
        return "different_state", "other rows"
    wrong = [name for name in {**report, **expected} if report.get(name) != expected.get(name)]
    if wrong:
        numbers = {"objective", "constraints", "metrics"} & set(wrong)
        return "different_state" if numbers else "false_report", f"report: {', '.join(wrong)}"
    if json.loads((out / "run.json").read_text()) != json.loads((whole / "run.json").read_text()):
        return "false_report", "other run.json"
    problems, _ = verify.verify(out)
    return ("false_report", f"verify: {'; '.join(problems)}") if problems else None


def brief(ended: Ended) -> str:
    text = "\n".join(messages(ended.text))
    return text if len(text) < 800 else f"{text[:400]} … {text[-400:]}"


def failed(ended: Ended) -> tuple[str, str] | None:
    """What must not happen however a command ends."""
    if ended.code is None:
        return "hang", f"over {LIMIT} s: {brief(ended)}"
    if "Traceback" in ended.text or ended.code < 0:
        return "traceback", f"exit {ended.code}: {brief(ended)}"
    return None


def one_line(ended: Ended, code: int, *texts: str) -> tuple[str, str] | None:
    """What is wrong with a command that was to end with this code, one line, and texts in it."""
    if wrong := failed(ended):
        return wrong
    said = messages(ended.text)
    if ended.code != code:
        return "exit", f"exit {ended.code} in place of {code}: {said}"
    if len(said) != 1 or not said[0].startswith("jax-unlearn: "):
        return "lines", f"{len(said)} lines: {said}"
    missing = [text for text in texts if text not in said[0]]
    return ("lines", f"the line has no {missing}: {said[0]}") if missing else None


def refused(ended: Ended, out: pathlib.Path, before: dict[str, str]) -> tuple[str, str]:
    """The outcome of a command that was to be refused, or was allowed to be."""
    if wrong := one_line(ended, 2):
        return wrong
    after = tree(out)
    changed = sorted(n for n in {**before, **after} if before.get(n) != after.get(n))
    if changed:
        return "changed", f"by a refusal ({messages(ended.text)[0]}): {', '.join(changed)}"
    return "refused", messages(ended.text)[0]


def finished(ended: Ended, out: pathlib.Path, whole: pathlib.Path) -> tuple[str, str]:
    """The outcome of a command that was to end as the run that was not disturbed."""
    if wrong := failed(ended):
        return wrong
    if ended.code != 0:
        return "exit", f"exit {ended.code}: {messages(ended.text)}"
    if said := messages(ended.text):
        return "lines", f"beside its notes: {said}"
    if wrong := differences(out, whole):
        return wrong
    return ("passed_over" if "passed over" in ended.text else "same"), ""


def outcome(found: tuple[str, str], *what: str) -> Outcome:
    name, more = found
    return Outcome(name, ", ".join((*what, more) if name in BAD else what))


# --- Moments.


def rows_in(out: pathlib.Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def part(out: pathlib.Path, steps: int) -> int:
    """Which of PARTS a run is in, by what it has written."""
    if (out / "model").exists() or any(out.glob(".model.new-*")):
        return 4
    rows = rows_in(out)
    return 3 if rows >= steps else 2 if rows else int((out / "run.json").exists())


def when(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """Returns when something has happened, or the process has ended."""
    until = time.monotonic() + LIMIT
    while process.poll() is None and not ready() and time.monotonic() < until:
        time.sleep(0.002)


def random_moment(process: subprocess.Popen, case: Case) -> str:
    """Waits for a random moment of the case's part, and names the part that it is in."""
    steps, wanted = case.recipe.steps, case.index % len(PARTS)
    when(process, lambda: part(case.out, steps) >= wanted)
    moment = time.monotonic() + case.rng.uniform(0, case.recipe.spans[wanted])
    when(process, lambda: time.monotonic() >= moment)
    return PARTS[part(case.out, steps)] if process.poll() is None else "end"


def again(case: Case) -> list[str]:
    """The command that goes on with a run, or begins it if it had not begun."""
    return case.recipe.resume if (case.out / "run.json").is_file() else case.recipe.start


# --- The kinds of faults: each function makes and judges one case.


def kill(case: Case) -> Outcome:
    process = launch(case.place, case.recipe.start)
    what = f"killed while {random_moment(process, case)}"
    process.kill()
    wait(process)
    if case.index // len(PARTS) % 2:
        process = launch(case.place, again(case))
        moment = time.monotonic() + case.rng.uniform(0, sum(case.recipe.spans))
        when(process, lambda: time.monotonic() >= moment)
        process.kill()
        wait(process)
        what += ", and again"
    return outcome(finished(run(case.place, again(case)), case.out, case.recipe.whole), what)


def stop(case: Case) -> Outcome:
    number = (signal.SIGTERM, signal.SIGINT)[case.index % 2]
    process = launch(case.place, case.recipe.start)
    what = f"{number.name} while {random_moment(process, case)}"
    process.send_signal(number)
    ended = wait(process)
    if ended.code != 0 and (wrong := one_line(ended, 128 + number, "stopped")):
        return outcome(wrong, what)
    if ended.code != 0:
        ended = run(case.place, again(case))
    return outcome(finished(ended, case.out, case.recipe.whole), what)


def flip(path: pathlib.Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def cut(path: pathlib.Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(max(len(content), 1))])


def blank(path: pathlib.Path, rng: np.random.Generator) -> None:
    """A block of the file reads as zeros, as after a power cut."""
    content = bytearray(path.read_bytes())
    start = int(rng.integers(max(len(content), 1)))
    end = min(start + 512, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def lengthen(path: pathlib.Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(64))


def delete(path: pathlib.Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace(path: pathlib.Path, rng: np.random.Generator) -> None:
    """A folder becomes a file, and a file a folder."""
    was_folder = path.is_dir()
    delete(path, rng)
    path.write_bytes(rng.bytes(16)) if was_folder else path.mkdir()


def some_file(folder: pathlib.Path, rng: np.random.Generator) -> pathlib.Path:
    """Each file as likely as another one, or as its size: most bytes are in few files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size + 1 for path in files], float)
    weights = None if rng.random() < 0.5 else sizes / sizes.sum()
    return files[rng.choice(len(files), p=weights)]


def some_folder(folder: pathlib.Path, rng: np.random.Generator) -> pathlib.Path:
    folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    return folders[rng.integers(len(folders))]


DAMAGES = (flip, flip, flip, flip, cut, cut, delete, blank, lengthen, replace)


def damage_checkpoints(case: Case) -> Outcome:
    rng, folder = case.rng, case.out / "checkpoints"
    shutil.copytree(case.recipe.whole if case.index % 4 == 3 else case.recipe.trained, case.out)
    done = []
    for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
            break
        last = max(folder.iterdir(), key=lambda path: int(path.name), default=folder)
        inside = last if last.is_dir() and rng.random() < 0.8 else folder
        if rng.random() < 0.15 or not any(path.is_file() for path in inside.rglob("*")):
            damage, path = (replace, delete)[rng.integers(2)], some_folder(folder, rng)
        else:
            damage, path = DAMAGES[rng.integers(len(DAMAGES))], some_file(inside, rng)
        done.append(f"{damage.__name__} {path.relative_to(case.out)}")
        damage(path, rng)
    before = tree(case.out)
    ended = case.call(case.place, case.recipe.resume)
    if ended.code == 2:
        return outcome(refused(ended, case.out, before), *done)
    return outcome(finished(ended, case.out, case.recipe.whole), *done)


# What changes between stop and resume: each returns the options that are given beside --resume.


def change_pixel(case: Case) -> list[str]:
    path = case.place / "forget" / "3.png"
    pixels = np.array(Image.open(path))
    pixels[tuple(case.rng.integers(8, size=2))] ^= 1
    Image.fromarray(pixels).save(path)
    return []


def delete_image(case: Case) -> list[str]:
    (case.place / "forget" / f"{case.rng.integers(12)}.png").unlink()
    return []


def add_image(case: Case) -> list[str]:
    image = draw(case.rng, np.ones(1, int))[0]
    Image.fromarray(image).save(case.place / "forget" / "12.png")
    return []


def replace_image(case: Case) -> list[str]:
    one, other = case.rng.choice(12, 2, replace=False)
    shutil.copyfile(case.place / "forget" / f"{one}.png", case.place / "forget" / f"{other}.png")
    return []


def other_label(case: Case) -> list[str]:
    return ["--forget", "forget:cat"]


def change_retained(case: Case) -> list[str]:
    """A pixel, two labels, one image less or one more, or two images in each other's place."""
    path, rng = case.place / "retain.npz", case.rng
    with np.load(path) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    match rng.integers(5):
        case 0:
            images[(rng.integers(60), *rng.integers(8, size=2))] ^= 1
        case 1:
            labels[rng.choice(30, 1) * 2] = 2
        case 2:
            images, labels = images[:-1], labels[:-1]
        case 3:
            images, labels = np.concatenate([images, images[:1]]), np.append(labels, labels[:1])
        case 4:
            images[[0, 1]] = images[[1, 0]]
    np.savez(path, images=images, labels=labels)
    return []


def change_weights(case: Case) -> list[str]:
    path = case.place / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[case.rng.integers(data, len(content))] ^= 1 << int(case.rng.integers(8))
    path.write_bytes(content)
    return []


def change_json(path: pathlib.Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def change_model(case: Case) -> list[str]:
    """An option of the network, of the schedule, or the name of a label."""
    folder = case.place / "model"
    name, change = (
        ("unet/config.json", {"norm_eps": 1e-3}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 51}),
        ("scheduler/scheduler_config.json", {"beta_start": 1e-3}),
        ("model_index.json", {"id2label": {"0": "cat", "1": "dog", "2": "coat"}}),
    )[case.rng.integers(4)]
    change_json(folder / name, lambda content: content.update(change))
    return []


OPTIONS = (
    "--threshold 3x", "--seed 1", "--steps 5", "--steps 40", "--learning-rate 1e-3",
    "--batch-size 32", "--forget-batch-size 4", "--evaluation-images 24", "--max-multiplier 0.5",
    "--sampling-steps 5",
)  # fmt: skip


def change_option(case: Case) -> list[str]:
    return case.rng.choice(OPTIONS).split()


def edit_run(case: Case) -> list[str]:
    """An option, the identity, or both with a digest that fits."""
    which = case.rng.integers(3)

    def change(run: dict[str, Any]) -> None:
        if which != 1:
            run["options"]["learning_rate"] = 1e-3
        if which != 0:
            run["identity"]["options"]["learning_rate"] = 1e-3
        if which == 2:
            text = json.dumps(run["identity"], sort_keys=True, separators=(",", ":"))
            run["legs"][0]["digest"] = hashlib.sha256(text.encode()).hexdigest()

    change_json(case.out / "run.json", change)
    return []


LEGS = ({"device": "8 × tpu"}, {"after": 3}, {"changed": ["--threshold: 1x, now 2x"]})


def edit_leg(case: Case) -> list[str]:
    """What the report says of the run's legs."""
    change = LEGS[case.index // len(CHANGES) % len(LEGS)]
    change_json(case.out / "run.json", lambda run: run["legs"][0].update(change))
    return []


def damage_run(case: Case) -> list[str]:
    (flip, flip, cut, delete, replace)[case.rng.integers(5)](case.out / "run.json", case.rng)
    return []


def damage_rows(case: Case) -> list[str]:
    (flip, cut, cut, delete)[case.rng.integers(4)](case.out / "metrics.jsonl", case.rng)
    return []


def edit_rows(case: Case) -> list[str]:
    """A digit of a number, or a line that is missing, twice there, or another one's place."""
    path, rng = case.out / "metrics.jsonl", case.rng
    lines = path.read_text().splitlines(keepends=True)
    one = int(rng.integers(len(lines) - 1))
    match rng.integers(4):
        case 0:
            lines[one] = re.sub(
                r"\d(?=[,\]}])", lambda d: str((int(d[0]) + 1) % 10), lines[one], count=1
            )
        case 1:
            del lines[one]
        case 2:
            lines.insert(one, lines[one])
        case 3:
            lines[one : one + 2] = lines[one : one + 2][::-1]
    path.write_text("".join(lines))
    return []


# Those of images are `data`'s alone. After those of the run it may go on, in the same state.
IMAGE_CHANGES = (
    change_pixel, delete_image, add_image, replace_image, other_label, change_retained,
)  # fmt: skip
RUN_CHANGES = (edit_run, edit_leg, damage_run, damage_rows, edit_rows)
CHANGES = (*IMAGE_CHANGES, change_weights, change_model, change_option, change_option, *RUN_CHANGES)


def change_inputs(case: Case) -> Outcome:
    change = CHANGES[case.index % len(CHANGES)]
    shutil.copytree(case.recipe.trained, case.out)
    given = change(case)
    what = " ".join((change.__name__, *given))
    before = tree(case.out)
    ended = case.call(case.place, [*case.recipe.resume, *given])
    if ended.code == 0 and change not in RUN_CHANGES:
        return outcome(("false_report", "accepted"), what)
    if ended.code == 2:
        return outcome(refused(ended, case.out, before), what)
    return outcome(finished(ended, case.out, case.recipe.whole), what)


SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)


def fill_disk(case: Case) -> Outcome:
    """A file system in memory that is too small, and then is not."""
    files = [path for path in case.recipe.whole.rglob("*") if path.is_file()]
    needed = sum(math.ceil(path.stat().st_size / 4096) * 4096 for path in files)
    size = int(SHARES[case.index] * needed)
    first, resume = (shlex.join([*PROGRAM, *x]) for x in (case.recipe.start, case.recipe.resume))
    case.out.mkdir()
    script = f"""
        mount -t tmpfs -o size={size} none out || exit 99
        timeout {LIMIT} {first} 2> said-1 > /dev/null; echo $? > code-1
        mount -o remount,size=1g out || exit 99
        if [ -f out/run.json ]; then set -- {resume}; else set -- {first}; fi
        timeout {LIMIT} "$@" 2> said-2 > /dev/null; echo $? > code-2
        cp -r out copy
    """
    environment = {**os.environ, "TMPDIR": str(case.place)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=case.place, env=environment, check=False
    )
    what = f"{size / 1024:.0f} of {needed / 1024:.0f} KiB"
    if done.returncode == 99:
        raise OSError("cannot mount a tmpfs")

    def ended(number: int) -> Ended:
        code = int((case.place / f"code-{number}").read_text())
        return Ended(None if code == 124 else code, (case.place / f"said-{number}").read_text())

    if wrong := one_line(ended(1), 1, "disk", "is full"):
        return outcome(wrong, what)
    return outcome(finished(ended(2), case.place / "copy", case.recipe.whole), what)


RIVALS = ([], ["--resume"], ["--overwrite"])


def rival(case: Case) -> Outcome:
    """A second process on a run's folder: while it is stopped in each of its parts, or a race."""
    which, race = RIVALS[case.index % 3], case.index >= 3 * (len(PARTS) - 1)
    given = [*case.recipe.start, *which]
    if race:
        if which:
            shutil.copytree(case.recipe.trained, case.out)
        what = f"two at once: {' '.join(which) or 'plain'}"
        both = [wait(process) for process in [launch(case.place, given) for _ in range(2)]]
        for ended in both:
            if ended.code != 0 and (wrong := one_line(ended, 2)):
                return outcome(wrong, what)
        winner = min(both, key=lambda ended: (ended.code is None, ended.code))
        return outcome(finished(winner, case.out, case.recipe.whole), what)
    wanted = 1 + case.index // 3
    process = launch(case.place, case.recipe.start)
    when(process, lambda: part(case.out, case.recipe.steps) >= wanted)
    process.send_signal(signal.SIGSTOP)
    what = f"{' '.join(which) or 'plain'} beside one that is stopped while {PARTS[wanted]}"
    try:
        before = tree(case.out)
        second = refused(run(case.place, given), case.out, before)
    finally:
        process.send_signal(signal.SIGCONT)
    first = finished(wait(process), case.out, case.recipe.whole)
    return outcome(first if first[0] != "same" else second, what)


COUNTS = [*itertools.permutations((1, 2, 4))]


def change_devices(case: Case) -> Outcome:
    """A run that is stopped twice and goes on with other numbers of devices.

    It is compared with one that was not stopped, on as many devices as it began with: sums over
    devices round otherwise, and Adam makes steps of gradients that are rounding alone.
    """
    counts, rows = COUNTS[case.index % len(COUNTS)], 0
    given, what = case.recipe.start, f"{counts} devices, stopped"
    whole = case.recipe.on[counts[0]]
    for devices in counts[:-1]:
        process = launch(case.place, given, devices)
        when(process, lambda rows=rows: rows_in(case.out) > rows)
        process.terminate()
        ended = wait(process)
        if wrong := one_line(ended, 128 + signal.SIGTERM, "stopped"):
            return outcome(wrong, what)
        rows, given = rows_in(case.out), case.recipe.resume
        what += f" after {rows}"
    ended = run(case.place, given, counts[-1])
    if ended.code != 0 or failed(ended) or messages(ended.text):
        return outcome(finished(ended, case.out, whole), what)
    far, apart = distance(case.out, whole), distance(case.recipe.whole, whole)
    problems, _ = verify.verify(case.out)
    name = "false_report" if problems else "same" if far <= CLOSE else "different_state"
    what += f": parameters differ by {far:.2g}; undisturbed, on {counts[0]} and 1, by {apart:.2g}"
    return Outcome(name, what, far)


def distance(out: pathlib.Path, other: pathlib.Path) -> float:
    """The largest difference of a parameter."""
    name = "model/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (safetensors.numpy.load_file(folder / name) for folder in (out, other))
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)


def damage_finished(case: Case) -> Outcome:
    """One file of a finished folder; the last cases are not damaged."""
    rng = case.rng
    shutil.copytree(case.recipe.whole, case.out)
    if case.index >= KINDS["finished"].cases - 3:
        ended = case.call(case.place, ["verify", "out"])
        whole = ended.code == 0 and not ended.text
        return Outcome("whole" if whole else "exit", f"not damaged: {ended.text}")
    shutil.rmtree(case.out / "checkpoints")  # Which are not part of the result.
    path = some_file(case.out, rng)
    name, content = path.relative_to(case.out).as_posix(), path.read_bytes()
    damage = (flip, flip, cut, delete, blank, lengthen, replace)[rng.integers(7)]
    damage(path, rng)
    if path.is_file() and path.read_bytes() == content:
        flip(path, rng)
    what = f"{damage.__name__} {name}"
    ended = case.call(case.place, ["verify", "out"])
    if wrong := failed(ended):
        return outcome(wrong, what)
    if ended.code == 0:
        return Outcome("false_report", f"{what}: verify calls it whole")
    # Sums that cannot be read are a wrong input; a cut in them lets other files stand alone.
    sums = name == verify.SUMS
    if ended.code not in ((1, 2) if sums else (1,)):
        return Outcome("exit", f"{what}: exit {ended.code}: {ended.text}")
    if name not in ended.text and not (sums and ended.code == 1):
        return Outcome("lines", f"{what}: not named in {ended.text}")
    return Outcome("found", what)


class Kind(NamedTuple):
    """How many cases of a function, and which runs they are made from."""

    make: Callable[[Case], Outcome]
    cases: int
    recipe: Callable[[int], str] = lambda index: MIX[index % len(MIX)]


KINDS = {
    "kills": Kind(kill, 50, lambda index: MIX[index // len(PARTS) % len(MIX)]),
    "signals": Kind(stop, 20, lambda index: MIX[index // len(PARTS) % len(MIX)]),
    "checkpoints": Kind(damage_checkpoints, 200),
    "inputs": Kind(
        change_inputs,
        60,
        lambda index: (
            "data"
            if CHANGES[index % len(CHANGES)] in IMAGE_CHANGES
            else MIX[index // len(CHANGES) % len(MIX)]
        ),
    ),
    "disks": Kind(fill_disk, 6),
    "writers": Kind(rival, 15, lambda index: "data"),
    "devices": Kind(change_devices, 8, lambda index: ("data", *MIX)[max(0, index - 5)]),
    "finished": Kind(damage_finished, 33),
}


# --- Runs that are not disturbed, and all cases of all kinds.


def undisturbed(place: pathlib.Path, inputs: pathlib.Path, name: str, devices: bool) -> Recipe:
    """Runs it twice, to compile its programs and to time its parts, and compares the two.

    With `devices` it runs on 2 and 4 of them too.
    """
    start = shlex.split(COMMANDS[name])
    steps = int(start[start.index("--steps") + 1])
    whole = place / f"{name}-1" / "out"
    recipe = Recipe(start, steps, whole, place / f"{name}-trained", [], {1: whole})
    for number in (1, 2):
        folder = place / f"{name}-{number}"
        shutil.copytree(inputs, folder)
        began, marks = time.monotonic(), []
        process = launch(folder, start)
        for wanted in range(1, len(PARTS)):
            when(process, lambda out=folder / "out", wanted=wanted: part(out, steps) >= wanted)
            marks.append(time.monotonic())
        ended = wait(process)
        marks = [began, *marks, time.monotonic()]
        found, more = finished(ended, folder / "out", recipe.whole)
        if found != "same":
            raise SystemExit(f"{name}: undisturbed runs are not the same: {found} {more}")
        recipe = recipe._replace(spans=[float(x) for x in np.diff(marks)])
    shutil.copytree(recipe.whole, recipe.trained)
    for path in recipe.trained.iterdir():
        if path.name not in ("run.json", "metrics.jsonl", "checkpoints"):
            delete(path, np.random.default_rng())
    for count in (2, 4) if devices else ():
        folder = place / f"{name}-devices-{count}"
        shutil.copytree(inputs, folder)
        if (ended := run(folder, start, count)).code != 0:
            raise SystemExit(f"{name}: on {count} devices: {brief(ended)}")
        recipe.on[count] = folder / "out"
    return recipe


def can_mount() -> bool:
    script = "mount -t tmpfs -o size=64k none /mnt"
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True)
        return done.returncode == 0
    return False


def chosen(kind: str, share: float) -> list[int]:
    """The indices of a share of a kind's cases, at random."""
    cases = KINDS[kind].cases
    rng = np.random.default_rng([zlib.crc32(kind.encode()), 1])
    return sorted(rng.choice(cases, max(1, round(share * cases)), replace=False).tolist())


def summarise(kind: str, found: dict[int, Outcome], seed: int) -> dict[str, Any]:
    counts = collections.Counter(one.name for one in found.values())
    entry: dict[str, Any] = {
        "cases": len(found),
        "outcomes": {name: counts[name] for name in (*GOOD, *BAD) if counts[name]},
        "failures": sum(counts[name] for name in BAD),
        "failed": [
            {"seed": [seed, index], "outcome": one.name, "what": one.what}
            for index, one in sorted(found.items())
            if one.name in BAD
        ],
    }
    if kind in ("kills", "signals"):
        moments = (re.search(r"while (\w+)", one.what) for one in found.values())
        entry["moments"] = dict(collections.Counter(moment[1] for moment in moments if moment))
    numbers = [one.number for one in found.values() if one.number is not None]
    if numbers:
        entry["farthest"] = max(numbers)
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--cases", type=float, default=1.0, help="the share of cases to run")
    parser.add_argument("--case", type=int, help="run this one of each kind alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="cases at once")
    parser.add_argument("--keep", type=pathlib.Path, help="work in this new folder, and keep it")
    parser.add_argument(
        "--out", type=pathlib.Path, help="put the results of these kinds into its faults.json"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = arguments.keep
        if place is None:
            place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        else:
            place.mkdir(parents=True)
        place = place.resolve()
        # Of all processes from here on: programs are compiled once.
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(place / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1]),
            "JAX_PLATFORMS": "cpu",
        }
        inputs = place / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        jobs = {kind: chosen(kind, arguments.cases) for kind in arguments.kinds}
        if arguments.case is not None:
            jobs = {kind: [arguments.case] for kind in jobs}
        not_run = {}
        if "disks" in jobs and not can_mount():
            del jobs["disks"]
            not_run["disks"] = {"cases": 0, "not_run": "no tmpfs can be mounted here"}
            print("disks: not run, no tmpfs can be mounted here", file=sys.stderr)
        names = {KINDS[kind].recipe(index) for kind, indices in jobs.items() for index in indices}
        apart = {KINDS["devices"].recipe(index) for index in jobs.get("devices", ())}
        total = 2 * len(names) + sum(map(len, jobs.values()))
        bar = stack.enter_context(tqdm(total=total, unit="case", dynamic_ncols=True))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(arguments.workers))
        bar.set_postfix_str("undisturbed")
        recipes = {}
        for name, recipe in zip(
            names,
            pool.map(lambda name: undisturbed(place, inputs, name, name in apart), names),
            strict=True,
        ):
            recipes[name] = recipe
            bar.update(2)
        local, servers = threading.local(), []

        def call(folder: pathlib.Path, given: list[str]) -> Ended:
            if not hasattr(local, "server"):
                local.server = Server()
                servers.append(local.server)
            return local.server(folder, given)

        def make(kind: str, index: int) -> Outcome:
            folder = place / f"{kind}-{index}"
            shutil.copytree(inputs, folder)
            rng = np.random.default_rng([arguments.seed, zlib.crc32(kind.encode()), index])
            name = KINDS[kind].recipe(index)
            found = KINDS[kind].make(Case(index, rng, folder, recipes[name], call))
            if found.name in GOOD or arguments.keep is None:
                shutil.rmtree(folder)
            return found._replace(what=f"{name}: {found.what}")

        results, failures = {}, 0
        for kind, indices in jobs.items():
            found: dict[int, Outcome] = {}
            began = time.monotonic()
            futures = {pool.submit(make, kind, index): index for index in indices}
            for future in concurrent.futures.as_completed(futures):
                one = found[futures[future]] = future.result()
                failures += one.name in BAD
                bar.set_postfix_str(f"{kind}, {failures} failed")
                bar.update()
                if one.name in BAD:
                    bar.write(f"{kind} {futures[future]}: {one.name}: {one.what}")
            results[kind] = summarise(kind, found, arguments.seed)
            results[kind]["seconds"] = round(time.monotonic() - began)
        for server in servers:
            server.close()
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "safetensors")
    about = {
        "command": f"python benchmarks/faults.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            "jax_unlearn": jax_unlearn.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        },
        "all_seconds": round(time.monotonic() - started),
    }
    found = {kind: entry | about for kind, entry in (results | not_run).items()}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / "faults.json"
        found = (json.loads(path.read_text()) if path.is_file() else {}) | found
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
