"""What a run goes on from: the same run, its rows, whole checkpoints, finite states, alone."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_unlearn.app import cli, folder, identity, report, rows, stopping
from jax_unlearn.app.options import DataOptions
from jax_unlearn.pretrained import load_pretrained

SMALL = [
    "--steps", "6", "--batch-size", "16", "--forget-batch-size", "8", "--samples", "0",
    "--sampling-steps", "4", "--evaluation-images", "16", "--checkpoint-every", "2",
    "--threshold", "1.2x",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Keeps the programs of one run for all that are like it."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", settings["jax_compilation_cache_dir"])
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def inputs(tiny_model, tiny_images, tmp_path_factory):
    """Copies of the model and the images, which a test may change."""
    place = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_model, place / "model")
    (place / "model" / "model.sha256").unlink(missing_ok=True)
    for name, path in tiny_images.items():
        shutil.copyfile(path, place / f"{name}.npz")
    return place


def command(inputs, out, *more):
    return [
        "data", "--model", str(inputs / "model"), "--forget", str(inputs / "forget.npz"),
        "--retain", str(inputs / "retain.npz"), "--out", str(out), *SMALL, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that was not disturbed, of checkpoints after steps 4 and 6."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(command(inputs, out)) == 0
    return out


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run as it was after its last step, before it was measured."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("report.json", "report.html", "SHA256SUMS"):
        (out / name).unlink()
    shutil.rmtree(out / "model")
    return out


def resume(out, *more):
    return cli.main(["data", "--out", str(out), "--resume", *more])


def same(out, whole):
    pairs = zip(
        jax.tree.leaves(load_pretrained(out / "model").params),
        jax.tree.leaves(load_pretrained(whole / "model").params),
        strict=True,
    )
    equal = all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    found = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read]
        for read in (report.read_rows(one / "metrics.jsonl") for one in (out, whole))
    ]
    reports = [json.loads((one / "report.json").read_text()) for one in (out, whole)]
    numbers = [
        [
            one["objective"],
            [{k: v for k, v in c.items() if k != "name"} for c in one["constraints"]],
        ]
        for one in reports
    ]
    return equal and found[0] == found[1] and numbers[0] == numbers[1]


def test_an_identity_tells_every_input_apart(whole):
    found = json.loads((whole / "report.json").read_text())["identity"]
    assert set(found["inputs"]) == {"forget", "retain", "held_out"}
    assert "unet/config.json" in found["model"]["files"]
    assert {"jax", "jaxlib", "jax_unlearn", "optax"} <= set(found["versions"])
    assert found["options"]["threshold"] == ["1.2x"]
    assert not {"out", "model", "forget", "resume", "checkpoint_every"} & set(found["options"])
    run = json.loads((whole / "run.json").read_text())
    assert run["legs"][0]["digest"] == found["digest"] == identity.digest_of(run["identity"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--threshold", "3x"), "--threshold: 1.2x, now 3x"),
        (("--seed", "1"), "--seed: 0, now 1"),
        (("--steps", "4"), "--steps: 6, now 4"),
        (("--learning-rate", "1e-3"), "--learning-rate: 0.0005, now 0.001"),
        (("--batch-size", "8"), "--batch-size: 16, now 8"),
        (("--weighting", "nelbo"), "--weighting: simple, now nelbo"),
    ],
)
def test_other_options_are_refused(stopped, whole, capsys, given, named):
    before = {path: path.read_bytes() for path in stopped.glob("*.json*")}
    assert resume(stopped, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert ("--continue" in line) == (given[0] in ("--threshold", "--steps", "--learning-rate"))
    assert before == {path: path.read_bytes() for path in stopped.glob("*.json*")}


def change_pixels(inputs):
    with np.load(inputs / "forget.npz") as arrays:
        kept = dict(arrays)
    kept["images"][3, 4, 4] ^= 1
    np.savez(inputs / "forget.npz", **kept)


def delete_image(inputs):
    with np.load(inputs / "retain.npz") as arrays:
        kept = {name: array[:-1] for name, array in arrays.items()}
    np.savez(inputs / "retain.npz", **kept)


def change_label(inputs):
    with np.load(inputs / "retain.npz") as arrays:
        kept = dict(arrays)
    kept["labels"][:2] = kept["labels"][:2][::-1]
    np.savez(inputs / "retain.npz", **kept)


def change_weights(inputs):
    path = inputs / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + np.float32(1e-3)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def change_schedule(inputs):
    path = inputs / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_start": 1e-3}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_pixels, "the images to forget"),
        (delete_image, "the retained images"),
        (change_label, "the retained images"),
        (change_weights, "the model's parameters"),
        (change_schedule, "files of the model have changed: scheduler/scheduler_config.json"),
    ],
)
def test_inputs_that_changed_are_refused(inputs, tmp_path, whole, capsys, change, named):
    moved = tmp_path / "inputs"
    shutil.copytree(inputs, moved)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    paths = [
        "--model", str(moved / "model"), "--forget", str(moved / "forget.npz"),
        "--retain", str(moved / "retain.npz"),
    ]  # fmt: skip
    # What was only moved is the same.
    assert resume(out, *paths) == 0
    assert same(out, whole)
    capsys.readouterr()
    change(moved)
    assert resume(out, *paths) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "--continue" not in line


def test_other_versions_need_to_be_allowed(stopped, capsys, monkeypatch):
    monkeypatch.setattr(identity, "versions", lambda: {"jax": "9.9"})
    assert resume(stopped) == 2
    assert "now 9.9" in (line := capsys.readouterr().err)
    assert "--continue" in line


@pytest.mark.slow
def test_a_run_json_that_was_changed_is_refused(stopped, capsys):
    path = stopped / "run.json"
    run = json.loads(path.read_text())
    run["options"]["learning_rate"] = run["identity"]["options"]["learning_rate"] = 1e-3
    path.write_text(json.dumps(run))
    assert resume(stopped) == 2
    assert "was changed" in capsys.readouterr().err
    run["legs"][0]["digest"] = identity.digest_of(run["identity"])
    run["digest"] = identity.digest_of([run["identity"], run["legs"]])
    path.write_text(json.dumps(run))
    assert resume(stopped) == 2
    assert "not of the run in its run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"device": "8 × tpu"}, {"after": 3}, {"changed": ["--threshold: 1x, now 2x"]}]
)
def test_legs_that_were_changed_are_refused(stopped, capsys, change):
    path = stopped / "run.json"
    run = json.loads(path.read_text())
    run["legs"][0].update(change)
    path.write_text(json.dumps(run))
    assert resume(stopped) == 2
    assert "was changed" in capsys.readouterr().err


@pytest.mark.slow
def test_continuing_is_a_new_leg_that_the_report_shows(stopped, whole, capsys):
    asked = ["--steps", "8", "--threshold", "2x", "--learning-rate", "1e-4"]
    assert cli.main(["data", "--out", str(stopped), "--continue", *asked]) == 0
    found = json.loads((stopped / "report.json").read_text())
    assert [leg["after"] for leg in found["legs"]] == [0, 6]
    changed = found["legs"][1]["changed"]
    assert "--steps: 6, now 8" in changed
    assert "--threshold: 1.2x, now 2x" in changed
    first, second = (leg["digest"] for leg in found["legs"])
    assert first != second == found["identity"]["digest"]
    page = (stopped / "report.html").read_text()
    assert "Legs of the run" in page
    assert "--threshold: 1.2x, now 2x" in page
    read = report.read_rows(stopped / "metrics.jsonl")
    before, after = (row["thresholds"][0] for row in (read[5], read[6]))
    assert after == pytest.approx(before * 2 / 1.2, rel=1e-5)
    assert found["constraints"][0]["threshold"] == pytest.approx(after)
    assert len(read) == found["steps"] == 8
    assert [row["objective"] for row in read[:6]] == [
        row["objective"] for row in report.read_rows(whole / "metrics.jsonl")
    ]
    # The new leg is a run that goes on as it is.
    assert resume(stopped) == 0
    assert cli.main(["verify", str(stopped)]) == 0
    assert resume(stopped, "--steps", "6") == 2
    assert cli.main(["data", "--out", str(stopped), "--continue", "--steps", "6"]) == 2
    assert "below the 8 that are done" in capsys.readouterr().err


@pytest.mark.slow
def test_a_leg_that_made_no_step_is_forgotten(stopped):
    # Continued, and killed before it wrote a checkpoint of its own.
    more = ["data", "--out", str(stopped), "--continue", "--steps"]
    assert cli.main([*more, "7", "--checkpoint-every", "9"]) == 0
    shutil.rmtree(stopped / "checkpoints" / "7")
    assert cli.main([*more, "8"]) == 0
    legs = json.loads((stopped / "report.json").read_text())["legs"]
    assert [(leg["after"], leg["changed"]) for leg in legs] == [
        (0, []),
        (6, ["--steps: 7, now 8"]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["delete", "cut", "edit"])
def test_rows_belong_to_checkpoints(stopped, whole, capsys, damage):
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "delete":
        path.unlink()
    elif damage == "cut":  # The checkpoint before has all of its rows.
        path.write_bytes(b"".join(lines[:5]))
    else:
        path.write_bytes(b"".join(lines).replace(b'"step": 1,', b'"step": 1 ,'))
    code = resume(stopped)
    message = capsys.readouterr().err
    if damage == "cut":
        assert code == 0
        assert "passed over: step 6: the first 6 rows" in message
        assert same(stopped, whole)
        assert (stopped / "damaged_checkpoints" / "6.1").is_dir()
    else:
        assert code == 2
        assert "rows of" in message.splitlines()[-1]
        assert (stopped / "checkpoints" / "6").is_dir()


def test_a_row_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        rows.RowLog(path, 2)
    with pytest.raises(ValueError, match="fewer rows than the 3"):
        rows.RowLog(path, 3)


def test_the_digest_of_rows_is_that_of_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = rows.RowLog(path, 0)
    for step in (1, 2, 3):
        log.append({"step": step, "seconds": 0.5 * step})
        assert (log.count, log.seconds) == (step, 0.5 * step)
    assert (log.count, log.digest) == (3, rows.rows_digest(path, 3))
    log.close()
    again = rows.RowLog(path, 2)
    assert (again.count, again.seconds, again.digest) == (2, 1.0, rows.rows_digest(path, 2))
    again.close()
    assert rows.rows_digest(path, 3) is None


def data_files(step):
    """The files of a checkpoint that hold its arrays, some of them twice."""
    return sorted(path for path in step.rglob("d/*") if path.is_file())


def flip(path, *places):
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 0x10
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, whole, capsys):
    # Some bytes belong to no array, and some files are copies: one flip could do no harm.
    for path in data_files(stopped / "checkpoints" / "6"):
        flip(path, *range(0, path.stat().st_size, 64))
    assert resume(stopped) == 0
    message = capsys.readouterr().err
    assert "passed over: step 6" in message
    assert "resuming after step 4" in message
    assert same(stopped, whole)
    assert resume(stopped) == 0
    assert "passed over" not in capsys.readouterr().err


@pytest.mark.slow
def test_no_flip_in_a_checkpoint_restores_another_state(stopped, whole, capsys):
    rng = np.random.default_rng(0)
    files = sorted(path for path in (stopped / "checkpoints" / "6").rglob("*") if path.is_file())
    shutil.copytree(stopped, backup := stopped.with_name("backup"))
    for number in rng.choice(len(files), 6, replace=False):
        relative = files[number].relative_to(stopped)
        shutil.rmtree(stopped)
        shutil.copytree(backup, stopped)
        if (size := (stopped / relative).stat().st_size) == 0:
            continue
        flip(stopped / relative, int(rng.integers(size)))
        assert resume(stopped) == 0, relative
        assert same(stopped, whole), relative


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_one_line_says_so(stopped, capsys):
    for step in (4, 6):
        shutil.rmtree(stopped / "checkpoints" / str(step) / "record")
    assert resume(stopped) == 2
    (line,) = (one for one in capsys.readouterr().err.splitlines() if "jax-unlearn:" in one)
    assert "whole" in line
    assert "step 4" in line
    assert "step 6" in line
    assert (stopped / "checkpoints" / "6").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["checkpoints", "checkpoints/6"])
def test_checkpoints_that_are_a_file(stopped, whole, capsys, which):
    shutil.rmtree(stopped / which)
    (stopped / which).write_text("")
    code = resume(stopped)
    if which == "checkpoints":
        assert code == 2
        assert "not a folder" in capsys.readouterr().err
    else:
        assert code == 0
        assert same(stopped, whole)


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_the_run_and_drops_what_it_ruined(inputs, tmp_path, capsys):
    out = tmp_path / "nan"
    given = [*command(inputs, out), "--learning-rate", "1e30", "--checkpoint-every", "1"]
    assert cli.main(given) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    step = int(line.split("step ")[1].split(":")[0])
    kept = sorted(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert all(number <= step - 2 for number in kept)
    # What the line says can be done, can be done; and no step is missing.
    assert f"--out {out} --continue" in line
    assert cli.main(["data", "--out", str(out), "--continue", "--learning-rate", "1e-5"]) == 0
    found = json.loads((out / "report.json").read_text())
    assert [row["step"] for row in report.read_rows(out / "metrics.jsonl")] == [*range(1, 7)]
    assert found["objective"]["value"] is not None
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.slow
def test_a_model_that_the_last_step_ruined_is_not_reported(inputs, tmp_path, capsys):
    out = tmp_path / "last"
    given = [*command(inputs, out), "--learning-rate", "1e30", "--steps", "2"]
    assert cli.main(given) == 1
    assert "no finite objective" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "report.json").exists()
    assert not (out / "model").exists()


def test_two_processes_do_not_write_one_folder(stopped, inputs, capsys):
    options = DataOptions(out=stopped, resume=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time\n"
            "from jax_unlearn.app.folder import claim\n"
            "from jax_unlearn.app.options import DataOptions\n"
            "with claim(DataOptions(out=pathlib.Path(sys.argv[1]), resume=True)):\n"
            "    print('held', flush=True)\n"
            "    time.sleep(60)\n",
            str(stopped),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for more in (["--resume"], ["--overwrite"]):
            assert cli.main([*command(inputs, stopped), *more]) == 2
            assert f"being written by process {holder.pid} on" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    # Its death has released the folder, and its lock is no obstacle.
    with folder.claim(options):
        assert (stopped / ".lock").is_file()
    assert not (stopped / ".lock").exists()


@pytest.mark.parametrize("left", [(), (".lock",), (".run.json.123.tmp", ".lock")])
def test_a_run_that_was_killed_before_it_began_is_no_obstacle(tmp_path, capsys, left):
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text("x")
    assert cli.main(["data", "--out", str(out), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    with folder.claim(DataOptions(out=out)):
        assert sorted(path.name for path in out.iterdir()) == [".lock"]


@pytest.mark.parametrize("out", ["file/out", "x" * 300])
def test_a_folder_that_cannot_be_made(tmp_path, out):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="folder"),
        folder.claim(DataOptions(out=tmp_path / out)),
    ):
        pass


@pytest.mark.slow
def test_a_signal_while_measuring_is_answered(inputs, tmp_path):
    out = tmp_path / "signalled"
    script = (
        "import os, signal, sys\n"
        "from jax_unlearn.app import cli, run\n"
        "from jax_unlearn.app.tasks import image_task, images\n"
        "def measuring(*given):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise AssertionError('not stopped')\n"
        "run.TASKS[images.ImageRequest] = measuring\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, *command(inputs, out)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 128 + signal.SIGTERM, found.stderr
    assert "stopped while measuring" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr
    assert cli.main(["data", "--out", str(out), "--resume"]) == 0


def test_a_held_signal_waits_and_a_second_does_not():
    with stopping.stop_signals("enough") as signals:
        with signals.hold():
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == [signal.SIGTERM]
            with pytest.raises(stopping.Interrupted, match="enough"):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(stopping.Interrupted) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.value.signal == signal.SIGTERM


def test_what_a_full_disk_is():
    from jax_unlearn.app.files import is_full

    assert is_full(OSError(errno.ENOSPC, "x"))
    assert is_full(OSError(errno.EDQUOT, "x"))
    assert not is_full(OSError(errno.EACCES, "x"))
    assert not is_full(ValueError("x"))
