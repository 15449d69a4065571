"""Files that launch a run on many machines: shells read them, the command takes their options."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from jax_unlearn.app import parsing

LAUNCH = pathlib.Path(__file__).parents[1] / "examples" / "launch"
SHELLS = ("tpu_pod.sh", "xpk.sh", "slurm.sbatch")


def commands(name):
    """The words after each `jax-unlearn` in a shell file, as the machines' shells split them."""
    text = (LAUNCH / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = re.findall(r"jax-unlearn (\w+ --.*)", "\n".join(lines))
    return [shlex.split(line.removesuffix('"')) for line in found]


@pytest.mark.parametrize("name", SHELLS)
def test_shells_read_the_files(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", SHELLS)
def test_the_command_takes_their_options(name):
    ((command, *options),) = commands(name)
    options = [option for option in options if option != "$resume"]
    parsed = parsing.parse(command, options)
    assert parsed.coordinator == "auto"
    assert parsed.forget == ("a photo of a golf ball",)
    assert parsed.mesh == "data=-1"


def test_the_pods_of_kubernetes_meet():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, command = container["command"]
    arguments = [one.replace("$(JOB_COMPLETION_INDEX)", "3") for one in container["args"]]
    parsed = parsing.parse(command, arguments)
    assert program == "jax-unlearn"
    assert parsed.num_processes == job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert parsed.process_id == 3
    # The name of pod 0: that of the job, its index, and the service that the pods are in.
    name = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert parsed.coordinator.split(":")[0] == name
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert any(
        str(parsed.out).startswith(mount["mountPath"]) for mount in container["volumeMounts"]
    )


def test_every_file_is_in_the_table():
    listed = set(re.findall(r"\]\((\S+)\)", (LAUNCH / "README.md").read_text()))
    assert listed == {path.name for path in LAUNCH.iterdir()} - {"README.md"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-processes", "2"], "come with --coordinator"),
        (["--coordinator", "auto", "--process-id", "0"], "come with --coordinator HOST:PORT"),
        (["--coordinator", "here"], "must be HOST:PORT, or auto"),
        (["--coordinator", "here:1"], "--process-id -1 of --num-processes 0"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2 of --num-processes 2",
        ),
        (["--mesh", "rows=2"], "data=N,fsdp=N,tensor=N"),
        (["--mesh", "fsdp=2", "--parallel", "pmap"], "--parallel pmap has no --mesh"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parsing.parse("concept", ["--forget", "Sneaker", *options])
