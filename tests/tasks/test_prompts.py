"""Whole runs of the concept command on a tiny pipeline, conditioned on prompts."""

import dataclasses
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_vocabulary import write_tokenizer
from pipelines import ONE_LEVEL, write_pipeline

from jax_unlearn import likelihoods, quantification
from jax_unlearn.app import cli
from jax_unlearn.app.options import ConceptOptions, SampleOptions
from jax_unlearn.app.sampling import draw_grid
from jax_unlearn.app.tasks import concept_evaluation, concept_formulations, concepts
from jax_unlearn.app.tasks.concept_request import make_prompt_request
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.networks import load_network
from jax_unlearn.pretrained.subsets import subset_labels
from jax_unlearn.pretrained.text_to_image import encode_prompts, load_text_to_image
from jax_unlearn.problem import NoisyPoints, Samples

CLIP = pathlib.Path(__file__).parent.parent / "fixtures" / "clip"
SMALL = {
    "steps": 3, "batch_size": 8, "forget_batch_size": 8, "samples": 2, "sampling_steps": 3,
    "evaluation_images": 16, "checkpoint_every": 2, "chain_steps": 2, "stored_samples": 16,
    "classifier_draws": 2, "target_steps": 3,
}  # fmt: skip
WIDENED = {
    "forget": ("cat|kitty", "dog"),
    "template": ("a {}", "{} in oil => oil"),
    "anchor": "cow",
    "retain": ("a hen", "a  hen in oil"),
    "show": ("one cat", "a hen"),
}


def flags(values):
    return [
        text
        for name, value in values.items()
        for one in (value if isinstance(value, tuple) else (value,))
        for text in ("--" + name.replace("_", "-"), str(one))
    ]


def arguments(model, out, *more):
    return ["concept", "--model", str(model), "--out", str(out), *flags(SMALL), *more]


def options_of(**more):
    return ConceptOptions(**{**SMALL, **WIDENED, **more})


def test_a_concept_is_its_names_in_the_templates(model):
    request = make_prompt_request(model, options_of())
    names = request.conditions.names

    def prompt(condition):
        return names[condition].strip("“”")

    assert request.concepts == ("cat", "dog")
    assert [
        (prompt(c), prompt(base), [prompt(target) for target in targets])
        for c, base, targets in request.separated
    ] == [
        ("a cat", "no prompt", ["a cat", "a dog"]),
        ("cat in oil", "oil", ["cat in oil", "dog in oil"]),
        ("a kitty", "no prompt", ["a cat", "a dog"]),
        ("kitty in oil", "oil", ["cat in oil", "dog in oil"]),
        ("a dog", "no prompt", ["a cat", "a dog"]),
        ("dog in oil", "oil", ["cat in oil", "dog in oil"]),
    ]
    assert [prompt(c) for c in request.kept] == [
        "a hen", "a hen in oil", "a cow", "cow in oil", "oil", "no prompt",
    ]  # fmt: skip
    assert [prompt(c) for c, _ in request.anchors] == ["a cow", "cow in oil"]
    assert [prompt(c) for c in request.shown] == ["one cat"]
    shown_as = dict(zip(names, request.conditions.shown_as, strict=False))
    classes = request.conditions.classes
    assert classes[shown_as["“a kitty”"]] == "a cat"
    assert classes[shown_as["“a hen”"]] == "a hen"
    assert shown_as["“oil”"] == shown_as["“one cat”"] == -1
    members = [
        {prompt(c) for c, member in zip(request.candidates, row, strict=True) if member}
        for row in request.members
    ]
    assert members == [{"a cat", "cat in oil"}, {"a dog", "dog in oil"}]
    assert "no prompt" not in {prompt(c) for c in request.candidates}


def test_each_condition_is_measured_against_its_own_template(model):
    request = make_prompt_request(model, options_of())
    number = {name.strip("“”"): c for c, name in enumerate(request.conditions.names)}
    compared = concept_evaluation.compared(request)
    plain, oil = ((number["a cat"], number["a dog"]), (number["cat in oil"], number["dog in oil"]))
    assert compared[number["oil"]] == (number["oil"], oil)
    assert compared[number["no prompt"]] == (number["no prompt"], plain)
    assert compared[number["cow in oil"]] == (number["cow in oil"], oil)
    assert compared[number["kitty in oil"]] == (number["oil"], oil)
    assert set(compared) == {c for c, name in enumerate(request.conditions.names)}


@pytest.mark.slow
def test_numbers_stand_for_the_encoded_prompts(model):
    request = make_prompt_request(model, options_of())
    apply, params, *_ = request.pretrained
    x, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 4)), jnp.array([1, 500, 999])
    chosen = ["“kitty in oil”", "no prompt", "“a hen”"]
    numbers = jnp.array([request.conditions.names.index(name) for name in chosen])
    encoded = encode_prompts(model, ["kitty in oil", None, "a hen"])
    expected = model.pretrained.apply(params, x, t, encoded)
    np.testing.assert_allclose(apply(params, x, t, numbers), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_probability_of_a_concept_is_that_of_its_prompts_together(model):
    options = options_of(formulation="likelihood", target_steps=0)
    request = make_prompt_request(model, options)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 4))
    reference = request.pretrained.params
    together = concept_evaluation.classifier(request, options)(reference, x)
    each = concept_evaluation.classifier(
        request._replace(members=np.eye(len(request.candidates), dtype=bool)), options
    )(reference, x)
    np.testing.assert_allclose(each.sum(axis=1), 1, atol=1e-5)
    for i, row in enumerate(request.members):
        np.testing.assert_allclose(together[:, i], each[:, row].sum(axis=1), rtol=1e-5)


@pytest.mark.slow
def test_concepts_are_told_from_what_is_held_to_instead(model):
    options = options_of(formulation="likelihood", template=("{} in oil => oil",))
    request = make_prompt_request(model, options)
    few = np.asarray(request.candidates)[request.judged]
    names = [request.conditions.names[c] for c in few]
    assert names == ["“cat in oil”", "“dog in oil”", "“oil”"]
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 4))
    reference = request.pretrained.params
    found = concept_evaluation.classifier(request, options)(reference, x)
    log_p = concept_evaluation.log_posterior(request, options, few)(reference, x)
    np.testing.assert_allclose(found, np.exp(log_p)[:, :2], rtol=1e-5)
    # No prompt is no candidate, as long as there is another.
    free = make_prompt_request(model, options_of(formulation="likelihood", template=("{}",)))
    assert len(free.judged) == len(free.candidates)


@pytest.mark.slow
@pytest.mark.parametrize("retain", [(), ("a hen", "oil")])
def test_a_base_does_not_explain_itself(model, retain, monkeypatch):
    """Unless there is nothing else to tell concepts from."""
    options = options_of(
        formulation="likelihood", threshold=("0.9x",), anchor=None, retain=retain,
        template=("{} in oil => oil",),
    )  # fmt: skip
    request = make_prompt_request(model, options)
    seen = []
    follow = likelihoods.posterior_path

    def recorded(*given, **named):
        seen.append((np.asarray(named["concepts"]), np.asarray(named["members"])))
        return follow(*given, **named)

    monkeypatch.setattr(likelihoods, "posterior_path", recorded)
    # A network that knows nothing tells nothing apart.
    perfect = quantification.Confusion(
        np.eye(2), np.zeros(2), np.zeros((2, 2, 2)), np.zeros((2, 2))
    )
    monkeypatch.setattr(quantification, "confusion", lambda values, labels: perfect)
    concept_formulations.stored_samples(
        request, options, concept_evaluation.judging(request, options)
    )
    ((concepts_seen, members),) = seen  # compiled once
    names = [request.conditions.names[c] for c in concepts_seen]
    shown = ["“cat in oil”", "“dog in oil”"]
    assert names == [*shown, "“a hen”"] if retain else [*shown, "“oil”"]
    np.testing.assert_array_equal(members, [[1, 0, 0], [0, 1, 0]])


def test_rows_follow_their_own_base(model):
    options = options_of()
    request = make_prompt_request(model, options)
    expected = {one.cond: one.base for one in request.separated}
    rows = np.resize(np.arange(len(expected)), 18)
    bases = np.array([one.base for one in request.separated])[rows]
    # Each stored sample is the number of the base that it was drawn from.
    path = concept_formulations.Path(*[np.stack([bases, bases, bases], axis=1)] * 5)
    values = np.zeros((18, 2))
    stored = concept_formulations.StoredSamples(
        bases, values, values, rows, np.array(request.kept), np.array(request.kept), path, None
    )
    for batch in (
        partial(concept_formulations.condition_batch, request, options),
        partial(concept_formulations.sample_batch, request, stored, options),
        partial(concept_formulations.point_batch, request, stored, options),
    ):
        seen = set()
        for step in range(6):
            forget = batch(step).forget
            base = forget.x_t if isinstance(forget, NoisyPoints) else forget.base
            assert [expected[c] for c in forget.cond.tolist()] == base.tolist()
            if isinstance(forget, Samples):
                np.testing.assert_array_equal(forget.x_0, forget.base)
            seen |= set(forget.cond.tolist())
        assert seen == set(expected)


def test_a_base_of_few_samples_has_a_floor_with_the_others(model):
    """Concepts in 0.3 and 0.2 of the samples, of which 0.1 and all may be left: a binary KL."""
    options = options_of(formulation="likelihood")
    request = make_prompt_request(model, options)
    h = (np.random.default_rng(0).random((2000, 2)) < [0.3, 0.2]).astype(np.float32)
    exact = 0.5 * (0.1 * np.log(0.1 / 0.3) + 0.9 * np.log(0.9 / 0.7))
    for few in (2, 600):  # of the second base
        separated = np.repeat([0, 1], [2000 - few, few])
        stored = concept_formulations.StoredSamples(h, h, h, separated, h, h, None, None)
        found = concept_formulations.floor_of(request, options, np.array([0.1, 1.0]), 0.5, stored)
        assert abs(found.value - exact) < 3 * found.stderr
        assert found.stderr < 0.1 * exact


@pytest.fixture(scope="module")
def finished(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    clip = tmp_path_factory.mktemp("clip")
    for file in CLIP.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (clip / file.name).write_bytes(file.read_bytes())
    write_tokenizer(clip)
    assert cli.main(arguments(pipeline, out, *flags(WIDENED), "--clip", str(clip))) == 0
    return out


@pytest.mark.slow
def test_a_run_leaves_a_pipeline_and_what_it_says(finished, pipeline):
    found = json.loads((finished / "report.json").read_text())
    assert [one["name"] for one in found["constraints"]] == ["cat", "dog"]
    metrics = found["metrics"]
    assert metrics["path_kl"]["before"]["“a hen”"]["value"] < 1e-6
    assert set(metrics["violation"]["after"]) == {
        f"“{p}”" for p in ("a cat", "cat in oil", "a kitty", "kitty in oil", "a dog", "dog in oil")
    }
    assert "“one cat”" in metrics["named_forgotten"]["after"]
    assert "“one cat”" not in metrics["agreement"]["after"]
    assert {"kid", "fid"} <= set(metrics)
    page = (finished / "report.html").read_text()
    assert "no prompt or “oil”" in page
    assert "Shown, not trained on" in page
    trained, reference = load_text_to_image(finished / "model"), load_text_to_image(pipeline)
    for ours, theirs in zip(
        jax.tree.leaves((trained.vae.params, trained.text_encoders[0].params)),
        jax.tree.leaves((reference.vae.params, reference.text_encoders[0].params)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_subset_trains_alone(pipeline, tmp_path):
    given = ["--forget", "cat", "--threshold", "1.1x", "--train", "esd-x", "--save", "unet"]
    assert cli.main(arguments(pipeline, tmp_path / "out", *given)) == 0
    before = load_pretrained(pipeline).params
    after = load_network(tmp_path / "out" / "model").params
    labels = jax.tree.leaves(subset_labels(before, "cross-attention"))
    for label, first, last in zip(
        labels, jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
        assert np.array_equal(first, last) == (label == "frozen")


@pytest.mark.slow
def test_a_low_rank_change_is_written_alone(pipeline, tmp_path):
    given = ["--forget", "cat", "--threshold", "1.1x", "--train", "lora:2", "--save", "lora"]
    given += ["--estimator", "stop_gradient", "--minibatches", "2"]
    assert cli.main(arguments(pipeline, tmp_path / "out", *given)) == 0
    files = sorted(path.name for path in (tmp_path / "out" / "model").iterdir())
    assert [name for name in files if not name.startswith("samples_")] == [
        "README.md", "model.sha256", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert "- lora\n" in (tmp_path / "out" / "model" / "README.md").read_text()
    drawn = [
        draw_grid(
            SampleOptions(
                str(pipeline),
                tmp_path / f"{n}.png",
                prompts=("a cat",),
                samples=2,
                steps=2,
                lora=lora,
            )
        )
        for n, lora in enumerate((None, tmp_path / "out" / "model"))
    ]
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.slow
def test_kept_conditions_are_ordered_by_their_distance(model, monkeypatch):
    options = options_of(evaluation_images=1)
    request = make_prompt_request(model, options)
    measured = concept_evaluation.evaluator(request, options, None)(request.pretrained.params)
    likelihood = dataclasses.replace(options, formulation="likelihood")
    assert concepts._distances(request, likelihood, measured) == {}  # few enough to show them all
    monkeypatch.setattr(concepts, "SHOWN", 2)
    for given in (options, likelihood):
        found = concepts._distances(request, given, measured)
        assert set(found) == set(request.kept) - {request.conditions.null}
        for c, value in found.items():
            each = measured.values[measured.cond == c].mean(axis=0)
            assert value == pytest.approx(each.min(), rel=1e-3)
    groups = concepts._nearest_first(range(1, 20), {c: float(-c) for c in range(20)})
    assert [*groups.values()] == [[19, 18], [2, 1]]
    few = concepts._nearest_first((0, 1, 2), {0: 2.0, 2: 1.0, 1: 3.0})
    assert few == {"Retained": [2, 0, 1]}
    assert concepts._nearest_first((2, 0, 1), {}) == {"Retained": [2, 0, 1]}


@pytest.mark.slow
def test_an_sdxl_pipeline_is_unlearned_in_bfloat16(tmp_path):
    pipeline = write_pipeline(tmp_path / "xl", xl=True, unet=ONE_LEVEL)
    given = ["--forget", "cat", "--threshold", "1.1x", "--dtype", "bfloat16", "--remat"]
    given += ["--retain", "a hen", "--estimator", "stop_gradient"]
    assert cli.main(arguments(pipeline, tmp_path / "out", *given)) == 0
    trained, before = (
        load_text_to_image(path).pretrained.params
        for path in (tmp_path / "out" / "model", pipeline)
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True)
    ]
    assert np.mean(moved) > 0.9


def test_prompts_are_read_from_a_file(model, tmp_path):
    (tmp_path / "kept.txt").write_text("a hen\n\n a duck \n")
    request = make_prompt_request(model, options_of(retain=(f"@{tmp_path / 'kept.txt'}",)))
    assert {"“a hen”", "“a duck”"} <= {request.conditions.names[c] for c in request.kept}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--forget", "cat"], "--anchor"),
        (["--forget", "cat", "--anchor", "cat"], "also to be forgotten"),
        (["--forget", "cat", "--base", "cat", "--anchor", "cow"], "also to be forgotten"),
        (
            ["--forget", "cat", "--anchor", "cow", "--retain", "cat"],
            "both to be forgotten and kept",
        ),
        (["--forget", " ", "--anchor", "cow"], "no tokens"),
        (["--forget", "cat|cat", "--anchor", "cow"], "the same"),
        (["--forget", "cat", "--anchor", "cow", "--template", "a photo"], "place of"),
        (["--forget", "cat", "--anchor", "cow", "--retain", "@nowhere.txt"], "nowhere.txt"),
        (["--forget", "x" * 90, "--anchor", "cow"], "77"),
        (["--forget", "cat", "--anchor", "cow", "--judge", "j.safetensors"], "--clip"),
        (["--forget", "cat", "--anchor", "cow", "--clip", "nowhere"], "nowhere"),
        (["--forget", "cat", "--anchor", "cow", "--train", "esd-y"], "esd-x"),
        (["--forget", "cat", "--anchor", "cow", "--save", "lora"], "--train lora"),
        (
            ["--forget", "cat", "--anchor", "cow", "--train", "esd-u", "--start", "edited"],
            "--start edited",
        ),
    ],
)
def test_mistakes_are_one_clear_line(pipeline, tmp_path, capsys, given, message):
    assert cli.main(arguments(pipeline, tmp_path / "out", *given)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_prompts_are_refused_for_labels(tiny_model, tmp_path, capsys):
    given = ["concept", "--model", str(tiny_model), "--out", str(tmp_path / "out"), *flags(SMALL)]
    assert cli.main([*given, "--forget", "dog", "--retain", "a cat"]) == 2
    assert "--retain is for models that are conditioned on prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_samples_of_prompts_make_a_grid(pipeline, tmp_path, capsys):
    out = tmp_path / "grid.png"
    given = [
        "sample",
        "--model",
        str(pipeline),
        "--out",
        str(out),
        "--steps",
        "2",
        "--samples",
        "2",
    ]
    assert cli.main(given) == 2
    assert "--prompts" in capsys.readouterr().err
    assert cli.main([*given, "--prompts", "a cat", "--prompts", "a dog"]) == 0
    assert out.stat().st_size > 100
