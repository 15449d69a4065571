"""Whole runs of the baselines of --method: what they leave, and that they resume."""

import html
import json

import jax
import numpy as np
import pytest

from jax_unlearn.app import cli, report, verify
from jax_unlearn.app import run as running
from jax_unlearn.app.options import ConceptOptions, DataOptions
from jax_unlearn.app.tasks import concept_methods, concept_request, image_task, images
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.text_to_image import load_text_to_image

SHARED = {
    "steps": 4, "batch_size": 16, "forget_batch_size": 8, "samples": 0, "sampling_steps": 3,
    "checkpoint_every": 2,
}  # fmt: skip
CONCEPT = SHARED | {
    "forget": ("dog",), "evaluation_images": 8, "chain_steps": 2, "stored_samples": 16,
}  # fmt: skip
CONCEPTS = (
    "esd", "concept-ablation", "neg-grad", "adv-unlearn", "selective-amnesia", "equal-weights",
)  # fmt: skip
IMAGES = (
    "naive-deletion", "neg-grad", "siss", "siss-no-is", "erase-diff", "saliency",
    "selective-amnesia", "equal-weights",
)  # fmt: skip
# One of each kind: a loss alone, a mask in the optimizer's state, a reference of its own, and
# multipliers that are held fixed.
RESUMED = {("concept", "esd"), ("data", "saliency"), ("data", "selective-amnesia"),
           ("concept", "equal-weights")}  # fmt: skip


def concept_of(model, out, method, **more):
    options = ConceptOptions(
        **{"model": str(model), "out": out, "method": method, **CONCEPT, **more}
    )
    options.validate()
    return concept_request.make_request(load_pretrained(model), options), options


def images_of(model, files, out, method, **more):
    options = DataOptions(
        model=str(model), out=out, method=method, forget=(str(files["forget"]),),
        retain=(str(files["retain"]),), **SHARED | {"evaluation_images": 8} | more,
    )  # fmt: skip
    options.validate()
    return images.from_paths(load_pretrained(model), options), options


def leaves(folder):
    return jax.tree.leaves(load_pretrained(folder / "model").params)


def both_params(out, pipeline):
    return (load_text_to_image(path).pretrained.params for path in (out / "model", pipeline))


def rows_of(folder):
    rows = report.read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def run_once(request, options, command):
    running.check_method(request, options)
    return running.run(request, options, command=command, progress=False).report


def check_resume(asked, command, whole):
    """The same run, stopped after three steps and resumed from its checkpoint of two."""

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    request, options = asked("stopped")
    with pytest.raises(KeyboardInterrupt):
        running.run(request, options, command=command, progress=False, after_step=stop)
    assert cli.main([command, "--out", str(options.out), "--resume"]) == 0
    for ours, theirs in zip(leaves(options.out), leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert rows_of(options.out) == rows_of(whole)


def check_report(found, options):
    """Names the method, and says of the constraints what they measure."""
    method, folder = found["method"], options.out
    assert method["name"] == options.method
    assert not verify.verify(folder)[0]
    page = html.unescape((folder / "report.html").read_text())
    card = (folder / "model" / "README.md").read_text()
    assert method["formula"] in page
    assert f"trained by {method['title']}" in report.verdict(found)
    assert f"{method['title']}" in card
    (constraint,) = found["constraints"]
    assert constraint["satisfied"] == found["feasible"]
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    if options.method == "equal-weights":
        assert constraint["multiplier"] == constraint["mean_multiplier"] == method["strength"]
        assert {tuple(row["multipliers"]) for row in rows} == {(0.5,)}
        assert all(np.isfinite(row["values"]).all() for row in rows)
        return
    assert constraint["multiplier"] is found["complementary_slackness"] is None
    assert {tuple(row["values"]) for row in rows} == {(None,)}
    assert {tuple(row["violations"]) for row in rows} == {(None,)}
    assert "multiplier" not in report.verdict(found)
    assert "they measure it" in page
    assert "they measure it" in card
    assert f"loss of {method['title']}".lower() in page.lower()


@pytest.mark.slow
@pytest.mark.parametrize("method", CONCEPTS)
def test_labels_are_forgotten_by_a_baseline(tiny_model, tmp_path, method):
    def asked(name):
        return concept_of(tiny_model, tmp_path / name, method)

    request, options = asked("whole")
    found = run_once(request, options, "concept")
    check_report(found, options)
    if ("concept", method) in RESUMED:
        check_resume(asked, "concept", options.out)
    assert found["formulation"] == "reverse_kl"
    before = jax.tree.leaves(load_pretrained(tiny_model).params)
    moved = [np.abs(a - b).max() for a, b in zip(leaves(options.out), before, strict=True)]
    # Adam's steps are no longer than its rate: of four, from the reference.
    assert 1e-5 < max(moved) < (4.5e-4 if method != "equal-weights" else np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("method", IMAGES)
def test_images_are_forgotten_by_a_baseline(tiny_model, tiny_images, tmp_path, method):
    def asked(name):
        return images_of(tiny_model, tiny_images, tmp_path / name, method)

    request, options = asked("whole")
    found = run_once(request, options, "data")
    check_report(found, options)
    if ("data", method) in RESUMED:
        check_resume(asked, "data", options.out)
    assert found["formulation"] == "forward_kl"
    before = jax.tree.leaves(load_pretrained(tiny_model).params)
    pairs = list(zip(leaves(options.out), before, strict=True))
    moved = sum(int((a != b).sum()) for a, b in pairs) / sum(b.size for _, b in pairs)
    if method == "saliency":
        assert 0.4 < moved <= 0.5  # the half of all entries that trains
    elif method != "equal-weights":
        assert moved > 0.9


@pytest.mark.slow
def test_equal_weights_of_nothing_leave_the_model_where_it_was(tiny_model, tiny_images, tmp_path):
    """Forward KL to the reference is 0 there, and so is its gradient, without noise."""
    request, options = images_of(
        tiny_model, tiny_images, tmp_path / "out", "equal-weights", strength=0.0, base_share=0.0
    )
    running.run(request, options, command="data", progress=False)
    for ours, theirs in zip(
        leaves(options.out), jax.tree.leaves(request.pretrained.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_run_is_that_of_its_method_and_strength(tiny_model, tmp_path, capsys):
    request, options = concept_of(tiny_model, tmp_path / "out", "esd", strength=2.0)
    found = run_once(request, options, "concept")
    check_report(found, options)
    assert "ESD, η = 2" in (options.out / "report.html").read_text()
    kept = found["identity"]["options"]
    assert (kept["method"], kept["strength"]) == ("esd", 2.0)
    for given, was in ((["--strength", "3"], "2.0"), (["--method", "neg-grad"], "esd")):
        for again in ("--resume", "--continue"):
            assert cli.main(["concept", "--out", str(options.out), again, *given]) == 2
            assert f"{given[0]}: {was}, now {given[1]}" in capsys.readouterr().err


PROMPTS = SHARED | {
    "steps": 0, "forget": ("cat", "dog"), "template": ("a {}",), "retain": ("a hen",),
    "threshold": ("1.1x",), "evaluation_images": 8, "chain_steps": 2, "method": "uce",
}  # fmt: skip


def test_uce_is_the_minimiser_of_its_least_squares(model):
    """In the forgotten and kept prompts of the request, and no prompt."""
    options = ConceptOptions(**PROMPTS | {"strength": 0.3})
    options.validate()
    request = concept_request.make_prompt_request(model, options)
    edited = concept_methods._uce(concept_methods._Setting(request, options)).params(0.3)
    table = np.float64(request.pretrained.apply.table)
    names = [name.strip("“”") for name in request.conditions.names]
    c = np.concatenate([table[names.index(name)] for name in ("a cat", "a dog")])
    b = np.concatenate([table[names.index("no prompt")]] * 2)
    k = np.concatenate([table[names.index(name)] for name in ("a hen", "no prompt")])
    rho = 1e-3 * (0.3 * np.square(c).sum() + np.square(k).sum()) / 8
    inputs = np.concatenate([np.sqrt(0.3) * c, k, np.sqrt(rho) * np.eye(8)])
    outputs = np.concatenate([np.sqrt(0.3) * b, k, np.sqrt(rho) * np.eye(8)])
    transposed = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    block = ("down_blocks_0", "attentions_0", "transformer_blocks_0", "attn2")
    before, after = request.pretrained.params, edited
    for name in block:
        before, after = before[name], after[name]
    assert np.abs(transposed - np.eye(8)).max() > 0.01
    for name in ("to_k", "to_v"):
        wanted = transposed @ np.float64(before[name]["kernel"])
        np.testing.assert_allclose(after[name]["kernel"], wanted, atol=1e-4)
    np.testing.assert_array_equal(after["to_q"]["kernel"], before["to_q"]["kernel"])


def flags(values):
    return [
        text
        for name, value in values.items()
        for one in (value if isinstance(value, tuple) else (value,))
        for text in ("--" + name.replace("_", "-"), str(one))
    ]


@pytest.mark.slow
def test_uce_takes_no_step_and_with_no_weight_changes_nothing(pipeline, tmp_path):
    out = tmp_path / "out"
    given = {name: value for name, value in PROMPTS.items() if name != "steps"}
    arguments = flags(given | {"strength": 0.0, "out": out, "model": pipeline})
    assert cli.main(["concept", *arguments]) == 0
    found = json.loads((out / "report.json").read_text())
    assert found["steps"] == 0
    assert found["method"]["strength"] == 0
    assert rows_of(out) == []
    assert not verify.verify(out)[0]
    assert "No metrics were recorded" in (out / "report.html").read_text()
    ours, theirs = (
        load_text_to_image(path).pretrained.params for path in (out / "model", pipeline)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["esd", "adv-unlearn", "selective-amnesia"])
def test_prompts_are_forgotten_by_a_baseline(pipeline, tmp_path, method):
    """ESD of cross-attention alone, and those that need conditions as vectors, or samples."""
    out = tmp_path / "out"
    given = PROMPTS | {"method": method, "steps": 3, "stored_samples": 8, "out": out}
    given |= {"train": "esd-x"} if method == "esd" else {}
    assert cli.main(["concept", *flags(given | {"model": pipeline})]) == 0
    found = json.loads((out / "report.json").read_text())
    assert found["method"]["name"] == method
    ours, theirs = (
        load_text_to_image(path).pretrained.params for path in (out / "model", pipeline)
    )
    same = jax.tree_util.tree_map_with_path(
        lambda path, a, b: ("attn2" in jax.tree_util.keystr(path), bool((a == b).all())),
        ours, theirs,
    )  # fmt: skip
    pairs = set(jax.tree.leaves(same, is_leaf=lambda leaf: isinstance(leaf, tuple)))
    assert (True, False) in pairs
    assert ((False, False) in pairs) == (method != "esd")


@pytest.mark.slow
@pytest.mark.parametrize("formulation", ["likelihood", "without"])
def test_a_baseline_is_measured_by_any_formulation(tiny_model, tmp_path, formulation):
    request, options = concept_of(
        tiny_model, tmp_path / "out", "equal-weights", formulation=formulation, strength=2.0,
        threshold=("0.5x",), classifier_draws=2, target_steps=3, attack_steps=4,
    )  # fmt: skip
    found = running.run(request, options, command="concept", progress=False).report
    assert found["formulation"] == formulation
    assert {tuple(row["multipliers"]) for row in rows_of(options.out)} == {(2.0,)}


@pytest.mark.slow
def test_a_baseline_whose_loss_explodes_says_what_may_help(
    tiny_model, tiny_images, tmp_path, monkeypatch
):
    request, options = images_of(
        tiny_model, tiny_images, tmp_path / "out", "neg-grad", learning_rate=1e30
    )
    with pytest.raises(running.NotFinite, match="start anew with another --strength"):
        running.run(request, options, command="data", progress=False)


@pytest.mark.slow
def test_runs_of_constraints_have_no_baseline(tiny_model, tiny_images, tmp_path):
    request, options = images_of(tiny_model, tiny_images, tmp_path, "constrained")
    assert image_task.image_task(request, options, None).baseline is None
