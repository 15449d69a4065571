"""Whole runs on a tiny model, through the command line as a user gives it."""

import dataclasses
import errno
import html
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import typing

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import write_tiny_model

from jax_unlearn.app import cli, report
from jax_unlearn.app import run as running
from jax_unlearn.app.folder import claim
from jax_unlearn.app.options import ConceptOptions, DataOptions, DemoOptions
from jax_unlearn.app.run import run
from jax_unlearn.app.run_file import load_run
from jax_unlearn.app.tasks import images as requests
from jax_unlearn.pretrained import load_pretrained

SMALL = [
    "--steps", "6", "--batch-size", "16", "--forget-batch-size", "8", "--samples", "2",
    "--sampling-steps", "4", "--evaluation-images", "32", "--checkpoint-every", "2",
]  # fmt: skip


def arguments(model, images, out, *more):
    return [
        "data", "--model", str(model), "--forget", str(images["forget"]),
        "--retain", str(images["retain"]), "--out", str(out), *SMALL, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(arguments(tiny_model, tiny_images, out)) == 0
    return out


def leaves(folder):
    return jax.tree.leaves(load_pretrained(folder / "model").params)


def rows_without_seconds(folder):
    rows = report.read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_leaves_everything_that_is_promised(finished):
    found = json.loads((finished / "report.json").read_text())
    assert {
        "formulation", "objective", "constraints", "feasible", "complementary_slackness",
        "metrics", "steps", "seconds", "seed", "device", "versions",
    } <= set(found)  # fmt: skip
    assert set(found["objective"]) >= {"value", "stderr", "unit"}
    (constraint,) = found["constraints"]
    assert set(constraint) >= {
        "name", "value", "stderr", "threshold", "reference_value", "slack", "multiplier",
        "mean_multiplier", "satisfied",
    }  # fmt: skip
    rows = report.read_rows(finished / "metrics.jsonl")
    assert constraint["mean_multiplier"] == pytest.approx(
        np.mean([row["multipliers"][0] for row in rows])
    )
    assert constraint["slack"] == pytest.approx(constraint["value"] - constraint["threshold"])
    assert found["complementary_slackness"] == pytest.approx(
        abs(constraint["multiplier"] * constraint["slack"]), rel=1e-5
    )
    for name in ("report.html", "metrics.jsonl", "run.json", "curves.png", "grid_1.png"):
        assert (finished / name).stat().st_size > 100, name
    for name in (
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ):
        assert (finished / "model" / name).is_file()
    assert [row["step"] for row in report.read_rows(finished / "metrics.jsonl")] == [*range(1, 7)]
    assert any((finished / "checkpoints").iterdir())
    page = html.unescape((finished / "report.html").read_text())
    assert "KL(q‖p) subject to KL(qᵢ‖p) ≥ bᵢ" in found["formula"]
    assert found["formula"] in page
    # Images of what is forgotten are not samples of the reference.
    assert not {"floor", "gap"} & set(found)
    assert "Floor and gap" not in page
    with Image.open(finished / "grid_1.png") as picture:
        assert picture.size[0] > 100


def test_the_model_has_moved_and_the_reference_has_not(finished, tiny_model):
    moved = [
        float(np.abs(a - b).max())
        for a, b in zip(
            leaves(finished), jax.tree.leaves(load_pretrained(tiny_model).params), strict=True
        )
    ]
    assert max(moved) > 1e-4


@pytest.mark.slow
def test_run_json_repeats_the_run_bit_for_bit(finished, tmp_path):
    again = tmp_path / "again"
    assert cli.main(["data", "--config", str(finished / "run.json"), "--out", str(again)]) == 0
    assert rows_without_seconds(again) == rows_without_seconds(finished)
    for ours, theirs in zip(leaves(again), leaves(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_output_folder_in_use_is_refused_and_overwriting_keeps_the_old_one(
    finished, tiny_model, tiny_images, capsys
):
    before = (finished / "report.json").read_bytes()
    assert cli.main(arguments(tiny_model, tiny_images, finished)) == 2
    assert "in use" in capsys.readouterr().err
    assert (finished / "report.json").read_bytes() == before
    with claim(DataOptions(out=finished, overwrite=True)):
        pass
    aside = finished.with_name("out.previous-1")
    assert (aside / "report.json").read_bytes() == before
    finished.rmdir()
    aside.rename(finished)


KILLED = """
import os, signal, sys
from jax_unlearn.app import cli, run
original, number = run.run, int(sys.argv[1])
def killing(*args, **kwargs):
    def after_step(step):
        if step == number:
            os.kill(os.getpid(), signal.{signal})
    return original(*args, **kwargs, after_step=after_step)
run.run = killing
sys.exit(cli.main(sys.argv[2:]))
"""


def start_and_signal(name, step, given):
    script = KILLED.replace("{signal}", name)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", script, str(step), *given],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(finished, tiny_model, tiny_images, tmp_path):
    step = 1 + time.time_ns() % 5
    out = tmp_path / "killed"
    given = arguments(tiny_model, tiny_images, out)
    killed = start_and_signal("SIGKILL", step, given)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "report.json").exists()
    assert cli.main(["data", "--out", str(out), "--resume"]) == 0
    assert rows_without_seconds(out) == rows_without_seconds(finished), f"killed at step {step}"
    for ours, theirs in zip(leaves(out), leaves(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (out, finished))
    assert ours["constraints"] == theirs["constraints"]
    assert ours["metrics"] == theirs["metrics"]


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_resume(tiny_model, tiny_images, tmp_path):
    out = tmp_path / "stopped"
    stopped = start_and_signal("SIGTERM", 3, arguments(tiny_model, tiny_images, out))
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    saved = [int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved) == len(report.read_rows(out / "metrics.jsonl"))


@pytest.mark.slow
def test_a_torn_last_row_is_dropped_on_resume(finished, tmp_path):
    import shutil

    out = tmp_path / "torn"
    shutil.copytree(finished, out)
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "obj')
    assert cli.main(["data", "--out", str(out), "--resume"]) == 0
    assert rows_without_seconds(out) == rows_without_seconds(finished)


def request_of(tiny_model, tiny_images, out, **more):
    options = DataOptions(
        model=str(tiny_model),
        forget=(str(tiny_images["forget"]),),
        retain=(str(tiny_images["retain"]),),
        out=out,
        steps=4,
        batch_size=16,
        forget_batch_size=8,
        samples=0,
        sampling_steps=4,
        evaluation_images=16,
        **more,
    )
    return requests.from_paths(load_pretrained(tiny_model), options), options


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (DataOptions(), ()),
        (DemoOptions(), ()),
        (ConceptOptions(estimator="bounded"), ()),
        (ConceptOptions(estimator="pathwise"), ()),
        (ConceptOptions(estimator="stop_gradient"), ()),
        (
            ConceptOptions(formulation="likelihood"),
            ("max_multiplier", "dual_learning_rate", "dual_damping", "estimator", "minibatches"),
        ),
    ],
)
def test_advice_names_only_what_the_command_has_and_uses(options, idle):
    advice = running._advice(options, "data").replace("--out", "").replace("--continue", "")
    fields = {field.name: field for field in dataclasses.fields(options)}
    named = [flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", advice)]
    assert "learning_rate" in named
    assert set(named) <= set(fields) - set(idle)
    # A value that is named is one that can be given, and not what was.
    for flag, value in re.findall(r"--([a-z-]+) ([a-z_]+)", advice):
        if typing.get_origin(fields[flag.replace("-", "_")].type) is typing.Literal:
            assert value in typing.get_args(fields[flag.replace("-", "_")].type)
            assert value != getattr(options, flag.replace("-", "_"))
    assert ("--estimator bounded" in advice) == (getattr(options, "estimator", "") == "pathwise")


@pytest.mark.slow
def test_per_image_makes_each_image_a_constraint(tiny_model, tiny_images, tmp_path):
    request, options = request_of(
        tiny_model, tiny_images, tmp_path / "each", per_image=True, threshold=("1.5x",)
    )
    result = run(request, options, command="data", progress=False)
    constraints = result.report["constraints"]
    assert len(constraints) == 12
    for constraint in constraints:
        assert constraint["threshold"] == pytest.approx(
            1.5 * constraint["reference_value"], rel=1e-5
        )


@pytest.mark.slow
def test_the_step_compiles_once(tiny_model, tiny_images, tmp_path, monkeypatch):
    traces = []
    request, options = request_of(tiny_model, tiny_images, tmp_path / "once")
    apply = request.pretrained.apply
    from jax_unlearn.app.tasks import image_task as module

    original = module.forward_kl

    def counting(apply, *args, **kwargs):
        def counted(params, x_t, t, cond):
            traces.append(x_t.shape)
            return apply(params, x_t, t, cond)

        return original(counted, *args, **kwargs)

    monkeypatch.setattr(module, "forward_kl", counting)
    run(request, options, command="data", progress=False)
    # The trained and the frozen network, once each.
    assert len(traces) == 2
    assert request.pretrained.apply is apply


def wrapped(error):
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as full:
        raise error from full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "devices"), [([], 8), (["--mesh", "fsdp=4"], 2), (["--parallel", "pmap"], None)]
)
def test_the_step_runs_as_it_was_asked_to(tiny_images, tmp_path, monkeypatch, given, devices):
    """`devices` hold the same part of the largest parameter; pmap is given it whole."""
    model = write_tiny_model(tmp_path / "model", 16)
    seen = []

    def stopped(lying):
        def make(*args, **kwargs):
            seen.append(lying(**kwargs))
            raise ValueError("seen")

        return make

    def whole_on(like):
        params = jax.tree.leaves(like[0].params)
        shards = max(params, key=lambda leaf: leaf.size).addressable_shards
        return len({shard.device for shard in shards if shard.index == shards[0].index})

    monkeypatch.setattr(running.sharding, "jit_step", stopped(whole_on))
    monkeypatch.setattr(running.sharding, "pmap_step", stopped(lambda: None))
    assert cli.main(arguments(model, tiny_images, tmp_path / "out", *given)) == 2
    assert seen == [devices]


@pytest.mark.slow
@pytest.mark.parametrize(
    "full",
    [
        # As Orbax, tensorstore and safetensors hand on what the system said.
        lambda *args: wrapped(ValueError("cannot write")),
        lambda *args: wrapped(RuntimeError("3 errors")),
        lambda *args: (_ for _ in ()).throw(ValueError("Error writing: No space left on device")),
    ],
)
def test_a_full_disk_is_one_clear_line(
    tiny_model, tiny_images, tmp_path, monkeypatch, capsys, full
):
    monkeypatch.setattr(running.Checkpoints, "save", full)
    out = tmp_path / "full"
    assert cli.main(arguments(tiny_model, tiny_images, out)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == (
        f"jax-unlearn: the disk of {out} is full: free some space, then jax-unlearn data --out "
        f"{out} --resume. No finished file was damaged."
    )
    assert not (out / "report.json").exists()


def test_options_survive_a_round_trip(finished):
    options = load_run(finished / "run.json", "data", DataOptions)
    assert options.steps == 6
    assert isinstance(options.out, pathlib.Path)
    assert isinstance(options.forget, tuple)


def test_under_null_replaces_its_share(tiny_model):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 3
    hidden = requests.under_null(labels, 3, 0.25, rng)
    assert (hidden == 3).sum() == 10
    np.testing.assert_array_equal(hidden[hidden != 3], labels[hidden != 3])
    assert requests.under_null(None, 3, 0.25, rng) is None
    np.testing.assert_array_equal(requests.under_null(labels, None, 0.25, rng), labels)


def test_batches_show_each_part_under_its_conditions(tiny_model, tiny_images, tmp_path):
    request, options = request_of(tiny_model, tiny_images, tmp_path / "batch")
    assert request.forgotten_labels == (1,)
    for step in range(3):
        batch = requests.batch(request, options, step)
        assert set(np.unique(batch.kept.cond)) <= {0, 2}
        assert sorted(np.unique(batch.base.cond)) == [1, 3]
        assert sorted(np.unique(batch.forget.cond)) == [1, 3]
        again = requests.batch(request, options, step)
        assert jax.tree.all(jax.tree.map(np.array_equal, batch, again))
        kept = {image.tobytes() for image in request.retain.pixels}
        assert all(image.tobytes() in kept for image in batch.base.x_0)
        assert all(image.tobytes() in kept for image in batch.kept.x_0)


def test_without_forgotten_labels_kept_rows_see_the_null_label(tiny_model, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("forget", 6), ("retain", 40)):
        np.savez(
            tmp_path / f"{name}.npz",
            images=rng.integers(0, 255, (count, 8, 8), np.uint8),
            labels=np.arange(count) % 3,
        )
    images = {name: tmp_path / f"{name}.npz" for name in ("forget", "retain")}
    request, options = request_of(tiny_model, images, tmp_path / "x", null_share=0.25)
    batch = requests.batch(request, options, 0)
    assert batch.base is None
    assert (batch.kept.cond == 3).sum() == 4
