"""A run by many processes, over loopback: its parameters, and what it survives."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import write_tiny_model

pytestmark = pytest.mark.slow

STEPS = 20
SMALL = [
    "--steps", str(STEPS), "--batch-size", "16", "--forget-batch-size", "8", "--samples", "2",
    "--sampling-steps", "4", "--evaluation-images", "16", "--checkpoint-every", "1",
    # Adam amplifies round-off where a gradient starts at zero, in proportion to its rate.
    "--learning-rate", "5e-5",
    "--threshold", "1.2x",
]  # fmt: skip


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Launched:
    """The processes of one command, and where their messages are."""

    def __init__(self, arguments, folder, processes, devices, cache, slurm=False):
        port, folder = free_port(), folder / f"messages-{processes}x{devices}-{time.time_ns()}"
        folder.mkdir(parents=True)
        self.messages = [folder / f"{number}.log" for number in range(processes)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.running = []
        for number, path in enumerate(self.messages):
            many = [
                "--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes),
                "--process-id", str(number),
            ]  # fmt: skip
            if slurm:
                many = ["--coordinator", "auto"]
                environment |= {
                    "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost",
                    "SLURM_NTASKS": str(processes), "SLURM_PROCID": str(number),
                    "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_NODES": "1",
                }  # fmt: skip
            with path.open("w") as file:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "jax_unlearn.app.cli", *arguments,
                         *(many if processes > 1 else [])],
                        stdout=file, stderr=file, env=environment,
                    )
                )  # fmt: skip

    def ends(self, seconds=280):
        """The exit codes."""
        until = time.monotonic() + seconds
        try:
            return [one.wait(max(until - time.monotonic(), 1)) for one in self.running]
        except subprocess.TimeoutExpired:
            for one in self.running:
                one.kill()
            raise AssertionError(self.said()) from None

    def said(self):
        return "\n".join(path.read_text() for path in self.messages)


@pytest.fixture(scope="module")
def command(tiny_images, tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    # Wide enough that its convolutions are split over `fsdp`.
    model = write_tiny_model(place / "model", 16)

    def launch(out, *more, processes=1, devices=4, slurm=False):
        asked = [
            "data", "--model", str(model), "--forget", str(tiny_images["forget"]), "--retain",
            str(tiny_images["retain"]), "--out", str(out), *SMALL, *more,
        ]  # fmt: skip
        return Launched(asked, place, processes, devices, place / "programs", slurm)

    return launch


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    launched = command(out)
    assert launched.ends() == [0], launched.said()
    return params_of(out)


def params_of(out):
    (path,) = (pathlib.Path(out) / "model").rglob("*.safetensors")
    return safetensors.numpy.load_file(path)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "slurm"),
    [
        ((), False),
        (("--mesh", "fsdp=2"), True),
        (("--mesh", "data=1,tensor=2,fsdp=2"), False),
        (("--mesh", "dcn_data=2"), False),
    ],
)
def test_two_processes_make_the_model_of_one(command, undisturbed, tmp_path, mesh, slurm):
    launched = command(tmp_path / "out", *mesh, processes=2, devices=2, slurm=slurm)
    assert launched.ends() == [0, 0], launched.said()
    assert_same(params_of(tmp_path / "out"), undisturbed)
    (finished,) = (tmp_path / "out").glob("report.json")
    assert json.loads(finished.read_text())["device"] == "4 × cpu"
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(1, STEPS + 1)]
    # One process speaks.
    assert "report:" in launched.messages[0].read_text()
    assert "report:" not in launched.messages[1].read_text()


def test_pmap_makes_the_model_of_jit(command, undisturbed, tmp_path):
    launched = command(tmp_path / "out", "--parallel", "pmap")
    assert launched.ends() == [0], launched.said()
    assert_same(params_of(tmp_path / "out"), undisturbed)


def wait_for_step(out, number, launched):
    until = time.monotonic() + 240
    while not (out / "checkpoints" / str(number)).is_dir():
        assert time.monotonic() < until, launched.said()
        assert all(one.poll() is None for one in launched.running), launched.said()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "then"), [(0, []), (1, [(1, 4), (4, 1), (1, 1)])], ids=["first", "second"]
)
def test_a_killed_process_ends_the_others_and_the_run_goes_on_elsewhere(
    command, undisturbed, tmp_path, victim, then
):
    out = tmp_path / "out"
    launched = command(out, processes=2, devices=2)
    wait_for_step(out, 2, launched)
    launched.running[victim].kill()
    since = time.monotonic()
    codes = launched.ends(90)
    assert time.monotonic() - since < 60
    assert codes[1 - victim] not in (0, None), launched.said()
    (other,) = (path for n, path in enumerate(launched.messages) if n != victim)
    assert "Traceback" not in other.read_text()
    assert "lost" in other.read_text() or "another task died" in other.read_text()
    for processes, devices in then:
        again = shutil.copytree(out, tmp_path / f"{processes}x{devices}")
        launched = command(again, "--resume", processes=processes, devices=devices)
        assert launched.ends() == [0] * processes, launched.said()
        assert_same(params_of(again), undisturbed)


def test_told_to_stop_all_stop_at_one_step_and_the_run_goes_on_elsewhere(
    command, undisturbed, tmp_path
):
    out = tmp_path / "out"
    launched = command(out, processes=2, devices=2)
    wait_for_step(out, 1, launched)
    launched.running[1].send_signal(signal.SIGTERM)
    assert launched.ends() == [143, 143], launched.said()
    assert launched.said().count("stopped after step") == 1
    launched = command(out, "--resume", processes=2, devices=2)
    assert launched.ends() == [0, 0], launched.said()
    assert_same(params_of(out), undisturbed)


def test_where_one_process_is_refused_all_are(command, tmp_path):
    launched = command(tmp_path / "out", "--mesh", "data=3", processes=2, devices=2)
    assert launched.ends() == [2, 2]
    assert launched.said().count("does not fit the 4 devices") == 2
    assert not (tmp_path / "out").exists()
