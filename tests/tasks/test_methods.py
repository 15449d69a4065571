"""Runs of the baselines: what each trains on, that it trains by it, and what is refused."""

import json

import jax
import numpy as np
import pytest

from jax_unlearn.app import cli, report
from jax_unlearn.pretrained import load_pretrained

CONCEPT = {
    "steps": 3, "batch_size": 16, "forget_batch_size": 8, "samples": 2, "sampling_steps": 4,
    "evaluation_images": 32, "checkpoint_every": 2, "chain_steps": 3, "stored_samples": 24,
}  # fmt: skip


def flags(values):
    return [
        text
        for name, value in values.items()
        for one in (value if isinstance(value, tuple) else (value,))
        for text in ("--" + name.replace("_", "-"), str(one))
    ]


def concept(model, out, method, *more, **options):
    given = flags(CONCEPT | {"forget": "dog"} | options)
    return ["concept", "--model", str(model), "--out", str(out), "--method", method, *given, *more]


@pytest.mark.parametrize("method", ["esd", "equal-weights", "neg-grad", "concept-ablation", "selective-amnesia", "adv-unlearn"])
def test_labels(tiny_model, tmp_path, method):
    assert cli.main(concept(tiny_model, tmp_path / "out", method)) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    print(json.dumps(found["method"], ensure_ascii=False), report.verdict(found))
    print(report.read_rows(tmp_path / "out" / "metrics.jsonl")[-1])
