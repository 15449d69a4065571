"""A finished folder is verified against its digests, and every change is found."""

import json
import shutil
import subprocess

import pytest

from jax_unlearn.app import cli
from jax_unlearn.app.verify import seal, verify, write_sums

SMALL = [
    "--steps", "2", "--batch-size", "16", "--forget-batch-size", "8", "--samples", "2",
    "--sampling-steps", "4", "--evaluation-images", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("verified") / "out"
    given = [
        "data", "--model", str(tiny_model), "--forget", str(tiny_images["forget"]),
        "--retain", str(tiny_images["retain"]), "--out", str(out), *SMALL,
    ]  # fmt: skip
    assert cli.main(given) == 0
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_a_finished_folder_is_whole(out, capsys):
    problems, count = verify(out)
    assert problems == []
    assert count == len((out / "SHA256SUMS").read_text().splitlines()) >= 8
    assert cli.main(["verify", str(out), "--seal", seal(out)]) == 0
    assert seal(out) in capsys.readouterr().out
    assert cli.main(["verify", str(out), "--seal", "0" * 64]) == 1
    assert "its seal is" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_sums_are_those_of_sha256sum(out):
    found = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


NAMES = (
    "report.json", "report.html", "run.json", "metrics.jsonl", "curves.png", "grid_1.png",
    "model/unet/diffusion_pytorch_model.safetensors", "model/model_index.json", "model/README.md",
    "model/samples_1.png",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_change_of_a_file_is_found(out, capsys, name):
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(content)
    assert cli.main(["verify", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is not the file that the run left" in line
    (out / name).unlink()
    assert verify(out)[0] == [f"{name} is missing"]


def test_a_file_that_is_not_of_the_run_is_named(out):
    (out / "model" / "extra.safetensors").write_bytes(b"")
    assert verify(out)[0] == ["model/extra.safetensors is not of the run"]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def edit_report(out):
    edit_json(out / "report.json", lambda report: report.update(steps=3))


def edit_options(out):
    def change(run):
        run["identity"]["options"]["seed"] = 9

    edit_json(out / "report.json", lambda report: change(report))


def edit_run(out):
    path = out / "run.json"
    edit_json(path, lambda run: run["legs"].append(dict(run["legs"][0], after=1)))


def edit_page(out):
    page = (out / "report.html").read_text()
    (out / "report.html").write_text(page.replace("onstraint", "0nstraint"))


def edit_rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")


def edit_model(out):
    (out / "model" / "extra.txt").write_text("x")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (edit_report, "report.json is of other rows"),
        (edit_options, "report.json and run.json are of different runs"),
        (edit_run, "run.json was changed"),
        (edit_page, "report.html is the page of another report.json"),
        (edit_rows, "report.json is of other rows"),
        (edit_model, "report.json lists another model"),
    ],
)
def test_files_that_contradict_each_other_are_found_even_with_new_sums(out, edit, problem):
    before = seal(out)
    edit(out)
    write_sums(out)
    assert seal(out) != before
    assert any(problem in found for found in verify(out)[0])


@pytest.mark.parametrize(
    "line", ["nonsense", "0" * 64 + "  ../outside", "0" * 64 + "  /etc/passwd"]
)
def test_sums_that_cannot_be_trusted_are_one_line(out, capsys, line):
    (out / "SHA256SUMS").write_text(line + "\n")
    assert cli.main(["verify", str(out)]) == 2
    assert "line 1" in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_said_to_be_so(out, capsys):
    (out / "SHA256SUMS").unlink()
    assert cli.main(["verify", str(out)]) == 2
    assert "no run has finished" in capsys.readouterr().err


def test_runs_inside_a_folder_are_verified_with_it(finished, tmp_path):
    together = tmp_path / "demo"
    together.mkdir()
    shutil.copytree(finished, together / "one")
    (together / "run.json").write_text("{}")
    write_sums(together)
    problems, count = verify(together)
    assert problems == []
    assert count == 1 + verify(finished)[1]
    (together / "one" / "report.html").write_text("")
    assert verify(together)[0] == ["one: report.html is not the file that the run left"]
    (together / "one" / "SHA256SUMS").unlink()
    assert verify(together)[0] == ["one has not finished"]
