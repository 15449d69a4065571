"""Whole runs of the concept command on a tiny model, and what it refuses."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn import divergences, likelihoods, losses
from jax_unlearn import minibatched as replay
from jax_unlearn.app import cli, report
from jax_unlearn.app import run as running
from jax_unlearn.app.options import ConceptOptions, DemoOptions, load_run, save_run
from jax_unlearn.app.tasks import (
    concept_evaluation,
    concept_formulations,
    concept_problem,
    concepts,
)
from jax_unlearn.likelihoods import posteriors
from jax_unlearn.pretrained import load_pretrained, relabelled

SMALL = {
    "steps": 4, "batch_size": 16, "forget_batch_size": 8, "samples": 2, "sampling_steps": 4,
    "evaluation_images": 32, "checkpoint_every": 2, "chain_steps": 3, "stored_samples": 64,
    "classifier_draws": 2, "target_steps": 3,
}  # fmt: skip


RUNS = {
    "reverse-kl": {},
    "minibatches": {"estimator": "stop_gradient", "minibatches": 3},
    "likelihood": {"formulation": "likelihood", "threshold": ("0.1x",)},
}


def options_of(model, out, **more):
    return ConceptOptions(**{"model": str(model), "out": out, "forget": ("dog",), **SMALL, **more})


def arguments(model, out, *more, **options):
    given = (SMALL | options).items()
    flags = []
    for name, value in given:
        values = value if isinstance(value, tuple) else (value,)
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return ["concept", "--model", str(model), "--out", str(out), *flags, *more]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A folder with a finished run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        assert cli.main(arguments(tiny_model, folder / name, "--forget", "dog", **options)) == 0
    return folder


def test_likelihoods_take_more_steps_by_default(finished):
    def steps(*given):
        return cli._parse("concept", ["--forget", "dog", *given]).steps

    likely = ("--formulation", "likelihood")
    assert (steps(), steps(*likely), steps("--formulation=likelihood")) == (60, 300, 300)
    assert steps(*likely, "--steps", "7") == 7
    assert steps("--config", str(finished / "likelihood" / "run.json"), *likely) == 4


def leaves(folder):
    return jax.tree.leaves(load_pretrained(folder / "model").params)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_everything_that_is_promised(finished, name):
    folder = finished / name
    found = json.loads((folder / "report.json").read_text())
    formulation = RUNS[name].get("formulation", "reverse-kl")
    assert found["formulation"].replace("_", "-") == formulation
    (constraint,) = found["constraints"]
    assert constraint["name"] == "dog"
    assert constraint["satisfied"] == found["feasible"]
    path_kl = found["metrics"]["path_kl"]
    assert set(path_kl["after"]) == {"dog", "cat", "T-shirt/top", "null label"}
    assert [path_kl["before"][c]["value"] < 1e-6 for c in ("dog", "cat", "null label")] == [
        False, True, True,
    ]  # fmt: skip
    violation = found["metrics"]["violation"]["after"]["dog"]["dog"]["value"]
    assert violation == pytest.approx(-constraint["slack"], rel=1e-4)
    # 16 of 24 rows are those of the three kept conditions.
    kept = [path_kl["after"][c]["value"] for c in ("cat", "T-shirt/top", "null label")]
    expected = 2 / 3 * np.mean(kept) + 1 / 3 * path_kl["after"]["dog"]["value"]
    assert found["objective"]["value"] == pytest.approx(expected, rel=1e-4)
    for file in ("report.html", "curves.png", "grid_1.png", "model", "checkpoints"):
        assert (folder / file).exists(), file
    assert len(report.read_rows(folder / "metrics.jsonl")) == 4
    assert "held to null label" in (folder / "report.html").read_text()


def test_runs_of_several_formulations_stand_side_by_side(finished):
    page = report.write_comparison(finished, ["reverse-kl", "likelihood"])
    text = page.read_text()
    for name in ("reverse-kl", "likelihood"):
        found = json.loads((finished / name / "report.json").read_text())
        assert f'value="{found["objective"]["value"]!r}"' in text
        assert f'href="{name}/report.html"' in text
    assert text.count("data:image/png;base64,") == 4
    with pytest.raises(ValueError, match="no report"):
        report.write_comparison(finished, ["reverse-kl", "elsewhere"])


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_bit_for_bit(finished, tiny_model, tmp_path, monkeypatch, name):
    options = options_of(tiny_model, tmp_path / "stopped", **RUNS[name])
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    dealt, minibatched = [], replay.minibatched

    def recorded(*given, parts, **named):
        dealt.append(parts)
        return minibatched(*given, parts=parts, **named)

    monkeypatch.setattr(replay, "minibatched", recorded)
    running.prepare_folder(options)
    with pytest.raises(KeyboardInterrupt):
        running.run(problem, options, command="concept", progress=False, after_step=stop)
    assert dealt == ([3] if name == "minibatches" else [])
    assert cli.main(["concept", "--out", str(options.out), "--resume"]) == 0
    for ours, theirs in zip(leaves(options.out), leaves(finished / name), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (
        [row["multipliers"] for row in report.read_rows(folder / "metrics.jsonl")]
        for folder in (options.out, finished / name)
    )
    assert ours == theirs


def test_forgotten_labels_start_as_the_base(tiny_model):
    apply, params, *_ = load_pretrained(tiny_model)
    moved = relabelled(params, [1], 3)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t, labels = jnp.array([0, 20, 49]), jnp.full((3,), 1)
    np.testing.assert_array_equal(apply(moved, x, t, labels), apply(params, x, t, labels + 2))
    np.testing.assert_array_equal(apply(moved, x, t, labels - 1), apply(params, x, t, labels - 1))
    assert jnp.abs(apply(params, x, t, labels) - apply(params, x, t, labels + 2)).max() > 1e-6


def test_batches_hold_each_condition_as_often(tiny_model, tmp_path):
    options = options_of(tiny_model, tmp_path, forget=("dog", "cat"), separate_null=True)
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
    assert [one.cond for one in problem.separated] == [1, 0, 3]
    assert problem.kept == (2,)
    batches = [concept_formulations.condition_batch(problem, options, step) for step in range(3)]
    shown = np.concatenate([batch.forget.cond for batch in batches])
    np.testing.assert_array_equal(np.bincount(shown), [8, 8, 0, 8])
    for batch in batches:
        assert set(batch.kept.cond) == {2}
        assert set(batch.forget.base) == {3}
        np.testing.assert_array_equal(batch.forget.target, np.tile([1, 0], (8, 1)))
        np.testing.assert_array_equal(batch.forget.constraint, np.tile([0, 1], (8, 1)))


def test_the_classifier_sees_images_with_the_noise_that_is_asked_for(tiny_model, tmp_path):
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    for noise in (0.0, 0.6):
        options = options_of(tiny_model, tmp_path, formulation="likelihood", classifier_noise=noise)
        problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
        apply, params, schedule, _ = problem.pretrained
        weights = divergences.path_kl_weights(schedule)
        alphas_cumprod = 1 / (1 + np.exp(-np.float64(schedule.log_snr)))
        expected = likelihoods.diffusion_classifier(
            apply,
            params,
            schedule,
            jax.random.key(options.seed),
            x_0=x,
            concepts=jnp.arange(3),
            draws=options.classifier_draws,
            weights=jnp.where(1 - alphas_cumprod >= noise**2, weights, 0.0),
        )
        found = concept_evaluation.classifier(problem, options)(x)
        np.testing.assert_allclose(found[:, 0], jnp.exp(expected.value[:, 1]), rtol=1e-4)


def test_likelihoods_are_measured_where_they_are_asked_for(tiny_model, tmp_path):
    for threshold, wanted in (("0.9x", {1}), ("calibrated", {0, 1, 2})):
        options = options_of(tiny_model, tmp_path, formulation="likelihood", threshold=(threshold,))
        problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
        h = concept_evaluation.classifier(problem, options)
        shows = concept_evaluation.likelihoods_of_samples(problem, options, h)
        raw = concept_evaluation.evaluator(problem, options, shows)(problem.pretrained.params)
        assert set(raw.valued) == wanted
        each = np.bincount(raw.valued)[list(wanted)]
        assert (each == max(options.evaluation_images // len(wanted), 8)).all()
        assert raw.values.shape == (len(raw.valued), 1)
        assert set(raw.cond) == {0, 1, 2, 3}


def test_likelihood_multipliers_meet_the_threshold_on_the_stored_samples(tiny_model, tmp_path):
    options = options_of(
        tiny_model, tmp_path, formulation="likelihood", threshold=("0.9x",), target_steps=0
    )
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
    task = concepts.concept_task(problem, options, None)
    batches = [task.batch(step).forget for step in range(8)]  # every stored sample once
    h = np.concatenate([np.asarray(batch.values, np.float64) for batch in batches])[:, 0]
    weights = np.exp(-h * float(task.multipliers[0]) * 24 / 8)
    assert task.thresholds[0] == pytest.approx(0.9 * h.mean(), rel=1e-5)
    assert (weights * h).mean() / weights.mean() == pytest.approx(0.9 * h.mean(), rel=1e-3)
    assert ((h >= 0) & (h <= 1)).all()
    assert h.std() > 0


def test_stored_samples_are_of_the_joint_law_of_image_and_concept(tiny_model, tmp_path):
    options = options_of(
        tiny_model, tmp_path, formulation="likelihood", forget=("dog", "cat"), threshold=("0.8x",)
    )
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
    pool = concept_formulations.stored_samples(problem, options)
    assert set(pool.values.ravel()) == {0.0, 1.0}
    assert (pool.values.sum(axis=1) <= 1).all()
    # What is noised most little is known of, and of what is noised least as much as can be.
    shares, expected = pool.values.mean(axis=0), pool.path.posterior[:, -1].mean(axis=0)
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / 8)
    judged = jax.jit(concept_evaluation.classifier(problem, options))(pool.base)
    for i in range(2):
        of_i = np.asarray(judged)[pool.values[:, i] == 1]
        right = (of_i.sum(axis=0) + np.eye(2)[i]) / (len(of_i) + 1)
        np.testing.assert_allclose(pool.confusion.shown[i], right, rtol=1e-4)
    # λ* moves log-odds from shares π to ε: of each concept against none.
    task = concepts.concept_task(problem, options, None)
    np.testing.assert_allclose(task.thresholds, 0.8 * shares, rtol=1e-6)
    odds = shares / (1 - shares.sum()) / (0.8 * shares / (1 - 0.8 * shares.sum()))
    np.testing.assert_allclose(np.asarray(task.multipliers) * 24 / 8, np.log(odds), rtol=1e-4)
    assert "the classifier finds dog in" in " ".join(task.asked["notes"])
    # What is certified are shares, and their error has that of the confusion.
    corrected = concept_evaluation.classifier(problem, options, pool.confusion)
    shows = concept_evaluation.likelihoods_of_samples(problem, options, corrected)
    cond = np.tile(np.array([one.cond for one in problem.separated], np.int32), 16)
    found = shows(problem.pretrained.params, jax.random.key(options.seed + 1), cond)
    before = task.before.constraints
    np.testing.assert_allclose(before.value, found.mean(axis=0), rtol=1e-4, atol=1e-4)
    of_each = np.stack([found[cond == c] for c in np.unique(cond)])
    sampled = (of_each.var(axis=1, ddof=1) / of_each.shape[1]).mean(axis=0) / len(of_each)
    expected = np.sqrt(sampled + pool.confusion.variance(before.value))
    np.testing.assert_allclose(before.stderr, expected, rtol=1e-4)


def test_one_concept_at_most_is_drawn_of_each_image():
    rng = np.random.default_rng(0)
    chances = np.tile([0.2, 0.0, 0.5], (20_000, 1))
    drawn = concept_formulations._one_of(chances, rng)
    assert (drawn.sum(axis=1) <= 1).all()
    np.testing.assert_allclose(drawn.mean(axis=0), chances[0], atol=4 * 0.5 / np.sqrt(20_000))
    certain = concept_formulations._one_of(np.eye(3)[[0, 2, 1]], rng)
    np.testing.assert_array_equal(certain, np.eye(3)[[0, 2, 1]])


def test_a_share_of_a_base_that_shows_nothing_is_refused(tiny_model, tmp_path, monkeypatch):
    options = options_of(tiny_model, tmp_path, formulation="likelihood", threshold=("0.5x",))
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
    monkeypatch.setattr(concept_formulations, "_one_of", lambda p, rng: np.zeros(p.shape))
    with pytest.raises(ValueError, match="--threshold 0.5x: the base has 0; give a number"):
        concepts.concept_task(problem, options, None)


def test_points_are_of_the_reference_at_the_base(tiny_model, tmp_path):
    options = options_of(tiny_model, tmp_path, formulation="likelihood")
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
    task = concepts.concept_task(problem, options, None)
    apply, params, schedule, _ = problem.pretrained
    seen = []
    for step in range(24):  # 64 samples, three points each, every one once
        forget = task.batch(step).forget
        base = np.full(8, problem.separated[0].base)
        expected = losses.predict_epsilon(
            apply, params, schedule, x_t=forget.x_t, t=forget.t, cond=base, clip=True
        )
        np.testing.assert_allclose(forget.epsilon, expected, rtol=1e-4, atol=1e-4)
        assert ((forget.posterior > 0) & (forget.posterior < 1)).all()
        seen += [x.tobytes() for x in forget.x_t]
    assert len(set(seen)) == 192
    # At the noisiest point nothing is known but the base's share of the concept.
    pool = concept_formulations.stored_samples(problem, options)
    log_p = jax.jit(concept_evaluation.log_posterior(problem, options, problem.candidates))(
        pool.base
    )
    (share,) = posteriors.mixture_shares(log_p) @ problem.members.T
    np.testing.assert_allclose(pool.path.posterior[:, 0, 0], share, rtol=1e-3)
    assert abs(share - 1 / 3) > 0.01
    # The candidates are all labels, so that the posterior of all of them does not move.
    everyone = problem._replace(members=np.ones((1, 3), bool))
    pool = concept_formulations.stored_samples(everyone, options)
    assert pool.path.push.shape == (64, 3, 1, *problem.pretrained.config.sample_shape)
    np.testing.assert_allclose(pool.path.posterior, 1, rtol=1e-5)
    np.testing.assert_allclose(pool.path.push, 0, atol=1e-5)
    assert (np.diff(pool.path.t, axis=1) < 0).all()


def test_the_model_itself_corrects_the_multipliers(finished, tiny_model, tmp_path):
    rows = report.read_rows(finished / "likelihood" / "metrics.jsonl")
    assert len({tuple(row["multipliers"]) for row in rows}) == 3  # after the first two steps
    options = options_of(tiny_model, tmp_path, formulation="likelihood", corrections=2)
    problem = concept_problem.make_problem(load_pretrained(tiny_model), options)
    task = concepts.concept_task(problem, options, None)
    assert list(task.corrections) == [1, 2]
    pool = concept_formulations.stored_samples(problem, options)
    share, seen = float(pool.values.mean()), []
    # Half of the share, with a standard error of a tenth.
    drawn = share * (0.5 + 0.1 * np.sqrt(63) * np.resize([[1.0], [-1.0]], (64, 1)))

    def shows(*given):
        seen.append(given)
        return drawn

    correct = concept_formulations.corrections(
        problem, options, pool, shows, np.array([0.5 * share]), 1 / 3
    )
    found = [correct[step](task.params, jnp.array([0.6], jnp.float32)) for step in (1, 2)]

    def multiplier(left):
        return np.log(share / (1 - share)) - np.log(left / (1 - left))

    # As of the forgotten label alone, 8 of 24 rows; the half that it may show is to be held by one
    # standard error.
    gain = 1.8 / multiplier(0.5 * share)
    step = gain * (multiplier(0.5 * share) - multiplier(0.6 * share))
    assert 0 < step < 1.8
    np.testing.assert_allclose(found, [[(1.8 + step) / 3]] * 2, rtol=1e-3)
    # Neither what was trained on nor what is certified, nor the same twice.
    params, keys, cond = zip(*seen, strict=True)
    assert all(one is task.params for one in params)
    np.testing.assert_array_equal(cond, np.full((2, 64), problem.separated[0].cond))
    others = [jax.random.key(options.seed + 1), *jax.random.split(jax.random.key(options.seed + 2))]
    noise = [np.asarray(jax.random.normal(key, (64,))) for key in (*keys, *others)]
    assert np.abs(np.corrcoef(noise) - np.eye(len(noise))).max() < 0.5


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_learning_rate_ends_with_the_last_update(tiny_model, tmp_path, minibatches):
    options = options_of(tiny_model, tmp_path, minibatches=minibatches, steps=30, learning_rate=0.5)
    rate = running.learning_rate(options)
    assert rate(3 * minibatches) == pytest.approx(0.5)  # a tenth is the warm-up
    assert rate(16.5 * minibatches) == pytest.approx(0.25)
    assert rate(30 * minibatches) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--forget", "hat"], "cat"),
        (["--forget", "dog", "--forget", "1"], "twice"),
        (["--forget", "dog", "--base", "dog"], "also to be forgotten"),
        (["--forget", "dog", "--anchor", "dog"], "also to be forgotten"),
        (["--forget", "dog", "--base", "cat", "--separate-null"], "--base"),
        (["--forget", "0", "--forget", "1", "--forget", "2"], "calibrate"),
        (["--forget", "dog", "--threshold", "-1"], "threshold"),
        (["--forget", "dog", "--chain-steps", "51"], "50"),
        (["--forget", "dog", "--chain-steps", "1"], "--chain-steps"),
        (["--forget", "dog", "--target-steps", "1"], "--target-steps must be 0, or 2 or more"),
        (
            ["--forget", "dog", "--formulation", "likelihood", "--target-steps", "51"],
            "steps must be 1 to",
        ),
        (["--forget", "dog", "--stored-samples", "1"], "--stored-samples must be 2 or more"),
        (["--forget", "dog", "--corrections", "-1"], "--corrections must be 0 or more"),
        (["--forget", "dog", "--minibatches", "2"], "does not divide --chain-steps 3"),
        (["--forget", "dog", "--minibatches", "3"], "trajectories that are held fixed"),
        (["--forget", "dog", "--classifier-noise", "1"], "--classifier-noise must lie in [0, 1)"),
        ([], "--forget"),
    ],
)
def test_mistakes_are_one_clear_line(tiny_model, tmp_path, capsys, given, message):
    assert cli.main([*arguments(tiny_model, tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_likelihood_threshold_out_of_reach_says_what_is_within(tiny_model, tmp_path, capsys):
    given = ["--forget", "dog", "--formulation", "likelihood", "--threshold", "1e-9"]
    tilt = arguments(tiny_model, tmp_path / "out", *given, target_steps=0)
    assert cli.main(tilt) == 2
    assert "the least they can show" in capsys.readouterr().err


def test_the_demo_runs_all_formulations_in_folders_of_their_own(tmp_path):
    jobs = cli._jobs("demo", DemoOptions(out=tmp_path, seed=3))
    assert [(name, one.out.name) for name, one in jobs] == [
        ("demo", "forward-kl"),
        ("concept", "reverse-kl"),
        ("concept", "likelihood"),
    ]
    assert {one.seed for _, one in jobs} == {3}
    ((_, alone),) = cli._jobs("demo", DemoOptions(out=tmp_path, formulation="likelihood"))
    assert alone.out == tmp_path
    ((_, images),) = cli._jobs("demo", DemoOptions(out=tmp_path, forget=("repeated",)))
    assert images.out == tmp_path


def test_the_demo_of_prompts_keeps_all_other_pairs(tmp_path):
    jobs = cli._jobs("demo", DemoOptions(out=tmp_path, text=True, forget=("blueprint",)))
    assert [one.out.name for _, one in jobs] == ["reverse-kl", "likelihood"]
    for _, one in jobs:
        one.validate()
        assert (one.model, one.forget, len(one.retain)) == ("embedded-text", ("blueprint",), 30)
    with pytest.raises(ValueError, match="--text"):
        DemoOptions(text=True, formulation="forward-kl").validate()
    with pytest.raises(ValueError, match="forget some of"):
        cli._jobs("demo", DemoOptions(out=tmp_path, text=True, forget=("hat",)))


def test_options_survive_a_round_trip(finished):
    options = load_run(finished / "likelihood" / "run.json", "concept", ConceptOptions)
    assert options.formulation == "likelihood"
    assert options.base is None
    assert isinstance(options.out, pathlib.Path)


def test_the_demo_goes_on_with_what_is_left(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    shutil.copytree(finished, out)
    (out / "report.html").unlink(missing_ok=True)
    (out / "likelihood" / "report.json").unlink()
    save_run(out / "run.json", "demo", DemoOptions(out=out))
    untouched = (out / "reverse-kl" / "report.json").stat().st_mtime_ns

    def jobs(command, options):
        assert options.resume
        names = ("reverse-kl", "likelihood")
        saved = [load_run(out / name / "run.json", "concept", ConceptOptions) for name in names]
        return [
            ("concept", dataclasses.replace(one, out=out / name))
            for name, one in zip(names, saved, strict=True)
        ]

    monkeypatch.setattr(cli, "_jobs", jobs)
    assert cli.main(["demo", "--out", str(out), "--resume"]) == 0
    assert "likelihood/report.html" in (out / "report.html").read_text()
    assert (out / "reverse-kl" / "report.json").stat().st_mtime_ns == untouched
    pairs = zip(leaves(out / "likelihood"), leaves(finished / "likelihood"), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    assert str(out / "report.html") in capsys.readouterr().out
