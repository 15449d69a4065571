"""`jax-unlearn audit` end to end, on tiny random networks of labels and of prompts."""

import json
import shutil

import jax
import numpy as np
import pytest
from audited import refused, report_of, rows_of
from pipelines import ONE_LEVEL, write_pipeline
from safetensors.numpy import load_file, save_file

from jax_unlearn import metrics
from jax_unlearn.app import cli, embedded, verify
from jax_unlearn.app.audit import page
from jax_unlearn.app.audit.options import ATTACKS, AuditOptions
from jax_unlearn.app.kept import Kept
from jax_unlearn.models.judge import Judge, save_judge

SMALL = (
    "--samples 4 --attack-images 8 --sampling-steps 3 --chain-steps 3 --inversion-steps 8 "
    "--relearning-steps 2"
).split()
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(folder, labels):
    module = Judge(num_labels=labels, widths=(4, 4), num_features=8)
    images = np.zeros((1, 8, 8, 1), np.float32)
    params = module.init(jax.random.key(0), images)["params"]
    folder.mkdir()
    save_judge(folder / "judge.safetensors", module, params, image_shape=(8, 8, 1))
    return folder


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judge") / "judge", 3)


@pytest.fixture(scope="session")
def other(tiny_model, tmp_path_factory):
    """The tiny model with all weights moved a little."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.sha256").unlink(missing_ok=True)
    path = folder / "unet" / WEIGHTS
    rng = np.random.default_rng(0)
    weights = {
        name: (value + 0.02 * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def command(tiny_model, tiny_images, judge, tmp_path):
    def start(model, *more, out="audit"):
        given = ["--reference", str(tiny_model), "--model", str(model), "--judge", str(judge)]
        given += ["--forget", "dog", "--images", str(tiny_images["forget"])]
        given += ["--out", str(tmp_path / out), *SMALL, *map(str, more)]
        return cli.main(["audit", *given])

    return start


@pytest.mark.slow
def test_a_model_against_itself(command, tiny_model, tmp_path, capsys):
    """The same parameters: every share is the reference's, and nothing has moved."""
    assert command(tiny_model, "--oracle", tiny_model) == 0
    report = report_of(tmp_path / "audit")
    assert {row["attack"] for row in report["recoverable"]} == {*ATTACKS} - {"unlearndiffatk"}
    assert "unlearndiffatk" in report["asked"]["not_made"]
    for row in rows_of(report):
        assert row["model"] == row["reference"] == row["oracle"]
        hits = round(row["model"]["value"] * row["model"]["count"])
        assert row["model"] == metrics.binomial_interval(hits, 4)._asdict()
        assert not page.easier(row)
    harmed = report["harmed"]
    assert harmed["agreement"]["model"] == harmed["agreement"]["reference"]
    for part in ("kept", "forgotten"):
        for name in ("reference", "oracle"):
            assert max(harmed["path_kl"][part][name]["by_time"]) < 1e-9
    (told,) = report["too_forgotten"]
    assert told["model"] == told["reference"]
    assert {*told["rise"]["forgotten"]["values"]} == {0.0}
    # Of four samples nothing follows.
    assert page.state(report)[0] == "close"
    assert "No more than from the oracle" in capsys.readouterr().out
    assert verify.verify(tmp_path / "audit")[0] == []
    assert cli.main(["verify", str(tmp_path / "audit")]) == 0


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(command, other, tmp_path, capsys, monkeypatch):
    """Stopped in a phase, an audit goes on with it, and ends in the same report."""
    few = ("--attacks", "rounding", "--attacks", "noise")
    assert command(other, *few, out="whole") == 0
    done, put = [], Kept.put

    def stop(self, name, measure):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return put(self, name, measure)

    monkeypatch.setattr(Kept, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        command(other, *few)
    again = []
    monkeypatch.setattr(
        Kept,
        "put",
        lambda self, name, measure: (again.append(name), put(self, name, measure))[1],
    )
    assert cli.main(["audit", "--out", str(tmp_path / "audit"), "--resume"]) == 0
    assert len(done) == 3
    assert not set(done) & set(again)
    reports = [report_of(tmp_path / name) for name in ("whole", "audit")]
    for report in reports:
        del report["seconds"]
        del report["asked"]["options"]["out"]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_a_damaged_phase_is_measured_again(command, other, tmp_path, capsys):
    few = ("--attacks", "rounding")
    assert command(other, *few) == 0
    before = report_of(tmp_path / "audit")
    phase = tmp_path / "audit" / "phases" / "rounding-dog-model.json"
    phase.write_text(phase.read_text().replace('"hits": ', '"hits": 1'))
    problems = verify.verify(tmp_path / "audit")[0]
    assert problems == ["phases/rounding-dog-model.json is not the file that the run left"]
    assert cli.main(["audit", "--out", str(tmp_path / "audit"), "--resume"]) == 0
    assert "rounding-dog-model.json is damaged: measured again." in capsys.readouterr().err
    after = report_of(tmp_path / "audit")
    assert after["recoverable"] == before["recoverable"]


@pytest.mark.slow
def test_another_audit_is_not_resumed(command, tiny_model, other, tmp_path, capsys):
    few = ("--attacks", "rounding")
    assert command(other, *few) == 0
    capsys.readouterr()
    out = str(tmp_path / "audit")
    assert cli.main(["audit", "--out", out, "--resume", "--seed", "1"]) == 2
    refused(capsys, "another audit", "options seed")
    assert cli.main(["audit", "--out", out, "--resume", "--model", str(tiny_model)]) == 2
    refused(capsys, "another audit", "models model")


@pytest.mark.slow
def test_a_report_that_was_changed_is_found(command, other, tmp_path):
    assert command(other, "--attacks", "rounding") == 0
    out = tmp_path / "audit"
    report = report_of(out)
    report["verdict"] = "All is well."
    (out / "report.json").write_text(json.dumps(report))
    verify.write_sums(out)
    assert verify.verify(out)[0] == ["report.html is the page of another report.json"]


@pytest.mark.slow
def test_more_than_an_oracle_is_said(command, other, tmp_path):
    """The verdict follows from the rows, whatever these are."""
    assert command(other, "--attacks", "rounding") == 0
    report = report_of(tmp_path / "audit")
    share = {"value": 1.0, "low": 0.94, "high": 1.0, "count": 64}
    none = {"value": 0.0, "low": 0.0, "high": 0.06, "count": 64}
    report["asked"]["oracle"] = "oracle"
    for row in rows_of(report):
        row |= {"model": none, "oracle": none}
    assert page.state(report)[0] == "satisfied"
    report["recoverable"][-1]["model"] = share
    assert page.state(report)[0] == "violated"
    assert "More comes back than from a model that never knew: Rounded weights (100 %" in (
        page.verdict(report)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--attacks", "unlearndiffatk"), ("unlearndiffatk", "labels")),
        (("--template", "a {}"), ("--template", "prompts")),
        (("--samples", "2"), ("--samples must lie in [4, 4096], not 2",)),
        (("--attack-images", "1000000000"), ("--attack-images must lie in",)),
        (("--inversion-steps", "9"), ("multiple of 8",)),
        (("--forget", "horse"), ("horse",)),
    ],
)
def test_wrong_options(command, other, tmp_path, capsys, changes, said):
    assert command(other, *changes) == 2
    refused(capsys, *said)
    assert not (tmp_path / "audit").exists()


def test_models_that_cannot_be_compared(command, tiny_model, tmp_path, capsys):
    for part, name, value, said in (
        ("unet", "num_class_embeds", 3, "another network"),
        ("unet", "norm_num_groups", 2, "options differ"),
        ("scheduler", "num_train_timesteps", 60, "noise schedule"),
    ):
        folder = tmp_path / name
        shutil.copytree(tiny_model, folder)
        (folder / "model.sha256").unlink(missing_ok=True)
        path = next((folder / part).glob("*config.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        if name == "num_class_embeds":
            weights = load_file(folder / "unet" / WEIGHTS)
            table = weights["class_embedding.weight"]
            weights["class_embedding.weight"] = table[:3].copy()
            save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
        assert command(folder) == 2, name
        refused(capsys, "--model", said)
        assert not (tmp_path / "audit").exists()


def test_a_judge_must_know_the_labels(command, other, tmp_path, capsys):
    wrong = save(tmp_path / "wrong", 5)
    assert command(other, "--judge", wrong) == 2
    refused(capsys, "the judge tells 5 classes apart, the model has 3")


def test_too_few_images(command, other, tmp_path, capsys):
    few = tmp_path / "few.npz"
    np.savez(few, images=np.zeros((3, 8, 8), np.uint8), labels=np.ones(3, np.int64))
    given = ["--reference", str(other), "--model", str(other), "--forget", "dog", *SMALL]
    options = ["--judge", str(save(tmp_path / "three", 3)), "--out", str(tmp_path / "audit")]
    assert cli.main(["audit", *given, *options, "--images", str(few)]) == 2
    refused(capsys, "--images", "fewer than 4")


@pytest.mark.slow
def test_prompts(tmp_path, capsys):
    """A pipeline against itself; a UNet alone is that pipeline; each attack is made."""
    reference = write_pipeline(tmp_path / "reference", unet=ONE_LEVEL)
    given = ["--reference", str(reference), "--model", str(reference / "unet")]
    given += ["--oracle", str(reference), "--clip", str(embedded.clip_path())]
    given += [
        "--forget",
        "cat",
        "--template",
        "a {} => a",
        "--retain",
        "a dog",
        "--show",
        "the cat",
    ]
    out = tmp_path / "audit"
    assert cli.main(["audit", *given, "--out", str(out), *SMALL]) == 0
    report = report_of(out)
    assert {row["attack"] for row in report["recoverable"]} == {*ATTACKS}
    for row in rows_of(report):
        assert row["model"] == row["reference"] == row["oracle"]
    ways = {
        row["settings"]["what"] for row in report["recoverable"] if row["attack"] == "inversion"
    }
    assert ways == {"whole embedding", "one token"}
    assert report["asked"]["concepts"][0]["source"] == "samples of the reference"
    assert "membership" not in report["too_forgotten"][0]["model"]


@pytest.mark.slow
def test_another_tokenizer_or_autoencoder_is_refused(tmp_path, capsys):
    reference = write_pipeline(tmp_path / "reference", unet=ONE_LEVEL)
    given = ["--reference", str(reference), "--clip", str(embedded.clip_path()), "--forget", "cat"]
    given += ["--template", "a {}", "--retain", "a dog", "--out", str(tmp_path / "audit"), *SMALL]
    for part, said in (("vae", "autoencoder"), ("tokenizer", "tokenizer")):
        folder = tmp_path / part
        shutil.copytree(reference, folder)
        if part == "vae":
            path = folder / "vae" / WEIGHTS
            weights = {name: value + 1 for name, value in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
        else:
            path = folder / "tokenizer" / "tokenizer_config.json"
            settings = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(settings | {"model_max_length": 12}))
        assert cli.main(["audit", *given, "--model", str(folder)]) == 2
        refused(capsys, "--model", said)


def test_options_have_every_attack():
    assert AuditOptions().chosen == ATTACKS
    assert AuditOptions(attacks=("rounding", "noise")).chosen == ("noise", "rounding")
