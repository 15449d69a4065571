"""Whole runs of the concept command on a tiny model, and what it refuses."""

import json

import numpy as np
import pytest

from jax_unlearn import cli, report
from jax_unlearn.options import ConceptOptions
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.tasks import concepts

SMALL = [
    "--steps", "4", "--batch-size", "16", "--forget-batch-size", "8", "--samples", "2",
    "--sampling-steps", "4", "--evaluation-images", "32", "--checkpoint-every", "2",
    "--chain-steps", "3", "--stored-samples", "64", "--classifier-draws", "2",
]  # fmt: skip


def arguments(model, out, *more):
    return ["concept", "--model", str(model), "--forget", "dog", "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module", params=["reverse-kl", "likelihood"])
def finished(request, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    given = arguments(tiny_model, out, "--formulation", request.param)
    assert cli.main(given) == 0
    return out


def test_a_run_leaves_everything_that_is_promised(finished):
    found = json.loads((finished / "report.json").read_text())
    assert found["formulation"].replace("_", "-") in (finished / "run.json").read_text()
    (constraint,) = found["constraints"]
    assert constraint["name"] == "dog"
    assert set(found["metrics"]["path_kl"]["after"]) == {"dog", "cat", "T-shirt/top", "null label"}
    violation = found["metrics"]["violation"]["after"]["dog"]["dog"]["value"]
    assert violation == pytest.approx(-constraint["slack"], rel=1e-4)
    for name in ("report.html", "metrics.jsonl", "curves.png", "grid_1.png", "model"):
        assert (finished / name).exists(), name
    assert len(report.read_rows(finished / "metrics.jsonl")) == 4
