"""Whole runs of the concept command on a tiny model, and what it refuses."""

import dataclasses
import html
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import divergences, likelihoods, losses, quantification, sharding
from jax_unlearn.app import algorithm as algorithms
from jax_unlearn.app import cli, parsing, report
from jax_unlearn.app import run as running
from jax_unlearn.app.jobs import jobs_of
from jax_unlearn.app.options import ConceptOptions, DemoOptions
from jax_unlearn.app.run_file import load_run, save_run
from jax_unlearn.app.tasks import (
    concept_evaluation,
    concept_formulations,
    concept_request,
    concepts,
)
from jax_unlearn.pretrained import load_pretrained, relabelled
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Losses

SMALL = {
    "steps": 4, "batch_size": 16, "forget_batch_size": 8, "samples": 2, "sampling_steps": 4,
    "evaluation_images": 32, "checkpoint_every": 2, "chain_steps": 3, "stored_samples": 64,
    "classifier_draws": 2, "target_steps": 3,
}  # fmt: skip


RUNS = {
    "reverse-kl": {},
    # No model of four steps is so far away: the multiplier climbs to its bound.
    "minibatches": {
        "estimator": "stop_gradient",
        "minibatches": 3,
        "threshold": ("100x",),
        "max_multiplier": 0.3,
    },
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


@pytest.mark.slow
def test_likelihoods_take_more_steps_by_default(finished):
    def steps(*given):
        return parsing.parse("concept", ["--forget", "dog", *given]).steps

    likely = ("--formulation", "likelihood")
    assert (steps(), steps(*likely), steps("--formulation=likelihood")) == (60, 300, 300)
    assert steps(*likely, "--steps", "7") == 7
    assert steps("--config", str(finished / "likelihood" / "run.json"), *likely) == 4


def leaves(folder):
    return jax.tree.leaves(load_pretrained(folder / "model").params)


@pytest.mark.slow
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


@pytest.mark.slow
def test_runs_of_several_formulations_stand_side_by_side(finished):
    page = report.write_comparison(finished, ["reverse-kl", "likelihood"])
    text = page.read_text()
    for name in ("reverse-kl", "likelihood"):
        found = json.loads((finished / name / "report.json").read_text())
        assert f'value="{found["objective"]["value"]!r}"' in text
        assert f'href="{name}/report.html"' in text
    assert text.count("data:image/png;base64,") == 8  # before and after, forgotten and kept
    with pytest.raises(ValueError, match="no report"):
        report.write_comparison(finished, ["reverse-kl", "elsewhere"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_bit_for_bit(finished, tiny_model, tmp_path, monkeypatch, name):
    options = options_of(tiny_model, tmp_path / "stopped", **RUNS[name])
    request = concept_request.make_request(load_pretrained(tiny_model), options)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    dealt, minibatched = [], algorithms.minibatched

    def recorded(*given, parts, **named):
        dealt.append(parts)
        return minibatched(*given, parts=parts, **named)

    monkeypatch.setattr(algorithms, "minibatched", recorded)
    with pytest.raises(KeyboardInterrupt):
        running.run(request, options, command="concept", progress=False, after_step=stop)
    assert dealt == ([3] if name == "minibatches" else [])
    assert cli.main(["concept", "--out", str(options.out), "--resume"]) == 0
    for ours, theirs in zip(leaves(options.out), leaves(finished / name), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (
        [row["multipliers"] for row in report.read_rows(folder / "metrics.jsonl")]
        for folder in (options.out, finished / name)
    )
    assert ours == theirs


@pytest.mark.slow
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
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    assert [one.cond for one in request.separated] == [1, 0, 3]
    assert request.kept == (2,)
    batches = [concept_formulations.condition_batch(request, options, step) for step in range(3)]
    shown = np.concatenate([batch.forget.cond for batch in batches])
    np.testing.assert_array_equal(np.bincount(shown), [8, 8, 0, 8])
    for batch in batches:
        assert set(batch.kept.cond) == {2}
        assert set(batch.forget.base) == {3}
        np.testing.assert_array_equal(batch.forget.target, np.tile([1, 0], (8, 1)))
        np.testing.assert_array_equal(batch.forget.constraint, np.tile([0, 1], (8, 1)))


@pytest.mark.slow
def test_the_classifier_sees_images_with_the_noise_that_is_asked_for(tiny_model, tmp_path):
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    for noise in (0.0, 0.6):
        options = options_of(tiny_model, tmp_path, formulation="likelihood", classifier_noise=noise)
        request = concept_request.make_request(load_pretrained(tiny_model), options)
        apply, params, schedule, _ = request.pretrained
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
        found = concept_evaluation.classifier(request, options)(params, x)
        np.testing.assert_allclose(found[:, 0], jnp.exp(expected.value[:, 1]), rtol=1e-4)


@pytest.mark.slow
def test_likelihoods_are_measured_where_they_are_asked_for(two_levels, tmp_path):
    """All samples are of what is forgotten; others calibrate thresholds, at the reference alone."""
    options = options_of(
        two_levels, tmp_path, formulation="likelihood", threshold=("calibrated",), target_steps=0
    )
    request = concept_request.make_request(load_pretrained(two_levels), options)
    judged = concept_evaluation.judging(request, options)
    shows = concept_evaluation.likelihoods_of_samples(request, judged, None)
    measured = concept_evaluation.evaluator(request, options, shows)(request.pretrained.params)
    assert set(measured.valued) == {1}
    assert len(measured.valued) == options.evaluation_images
    assert measured.values.shape == (len(measured.valued), 1)
    assert set(measured.cond) == {0, 1, 2, 3}
    anchors = concept_evaluation.repeated([c for c, _ in request.anchors], options)
    assert set(anchors) == {0, 2}
    task = concepts.concept_task(request, options, None)
    key, params = jax.random.key(options.seed + 1), request.pretrained.params
    shown = shows(params, key, anchors).sum()
    np.testing.assert_allclose(task.thresholds, (shown + 1) / (len(anchors) + 2), rtol=1e-4)


@pytest.mark.slow
def test_likelihood_multipliers_meet_the_threshold_on_the_stored_samples(tiny_model, tmp_path):
    options = options_of(
        tiny_model, tmp_path, formulation="likelihood", threshold=("0.9x",), target_steps=0
    )
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    task = concepts.concept_task(request, options, None)
    batches = [task.batch(step).forget for step in range(8)]  # every stored sample once
    h = np.concatenate([np.asarray(batch.values, np.float64) for batch in batches])[:, 0]
    weights = np.exp(-h * float(task.multipliers[0]))
    assert task.thresholds[0] == pytest.approx(0.9 * h.mean(), rel=1e-5)
    assert (weights * h).mean() / weights.mean() == pytest.approx(0.9 * h.mean(), rel=1e-3)
    assert ((h >= 0) & (h <= 1)).all()
    assert h.std() > 0


@pytest.mark.slow
def test_stored_samples_are_of_the_joint_law_of_image_and_concept(two_levels, tmp_path):
    options = options_of(
        two_levels, tmp_path, formulation="likelihood", forget=("dog", "cat"), threshold=("0.8x",)
    )
    request = concept_request.make_request(load_pretrained(two_levels), options)
    by = concept_evaluation.judging(request, options)
    stored = concept_formulations.stored_samples(request, options, by)
    assert set(stored.values.ravel()) == {0.0, 1.0}
    assert (stored.values.sum(axis=1) <= 1).all()
    # What is noised most little is known of, and of what is noised least as much as can be.
    shares, expected = stored.values.mean(axis=0), stored.path.posterior[:, -1].mean(axis=0)
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / 8)
    reference = request.pretrained.params
    judged = jax.jit(concept_evaluation.classifier(request, options))(reference, stored.base)
    for i in range(2):
        of_i = np.asarray(judged)[stored.values[:, i] == 1]
        right = (of_i.sum(axis=0) + np.eye(2)[i]) / (len(of_i) + 1)
        np.testing.assert_allclose(stored.confusion.shown[i], right, rtol=1e-4)
    # What is bounded is the classifier's posterior, calibrated, in training too.
    shown, elsewhere = (np.asarray(part, np.float64) for part in stored.confusion[:2])
    calibrated = np.linalg.solve((shown - elsewhere).T, (np.asarray(judged) - elsewhere).T).T
    trained = concept_formulations.bounded(request, options, stored)(reference, stored.base)
    for h in (stored.h, trained):
        np.testing.assert_allclose(h, calibrated, rtol=1e-3, atol=1e-3)
    # λ* moves log-odds from shares π to ε: of each concept against none.
    task = concepts.concept_task(request, options, None)
    np.testing.assert_allclose(task.thresholds, 0.8 * shares, rtol=1e-6)
    odds = shares / (1 - shares.sum()) / (0.8 * shares / (1 - 0.8 * shares.sum()))
    np.testing.assert_allclose(task.multipliers, np.log(odds), rtol=1e-4)
    assert "the classifier finds dog in" in " ".join(task.asked["notes"])
    # What is certified are shares, and their error has that of the confusion.
    shows = concept_evaluation.likelihoods_of_samples(request, by, stored.confusion)
    cond = np.tile(np.array([one.cond for one in request.separated], np.int32), 16)
    found = shows(reference, jax.random.key(options.seed + 1), cond)
    before = task.before.constraints
    np.testing.assert_allclose(before.value, found.mean(axis=0), rtol=1e-4, atol=1e-4)
    of_each = np.stack([found[cond == c] for c in np.unique(cond)])
    sampled = (of_each.var(axis=1, ddof=1) / of_each.shape[1]).mean(axis=0) / len(of_each)
    expected = np.sqrt(sampled + quantification.share_variance(before.value, stored.confusion))
    np.testing.assert_allclose(before.stderr, expected, rtol=1e-4)


def test_one_concept_at_most_is_drawn_of_each_image():
    rng = np.random.default_rng(0)
    chances = np.tile([0.2, 0.0, 0.5], (20_000, 1))
    drawn = concept_formulations._one_of(chances, rng)
    assert (drawn.sum(axis=1) <= 1).all()
    np.testing.assert_allclose(drawn.mean(axis=0), chances[0], atol=4 * 0.5 / np.sqrt(20_000))
    certain = concept_formulations._one_of(np.eye(3)[[0, 2, 1]], rng)
    np.testing.assert_array_equal(certain, np.eye(3)[[0, 2, 1]])


@pytest.mark.slow
def test_a_share_of_a_base_that_shows_nothing_is_refused(tiny_model, tmp_path, monkeypatch):
    options = options_of(tiny_model, tmp_path, formulation="likelihood", threshold=("0.5x",))
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    monkeypatch.setattr(concept_formulations, "_one_of", lambda p, rng: np.zeros(p.shape))
    with pytest.raises(ValueError, match="--threshold 0.5x: the base has 0; give a number"):
        concepts.concept_task(request, options, None)


@pytest.mark.slow
def test_points_are_of_the_reference_at_the_base(tiny_model, tmp_path):
    options = options_of(tiny_model, tmp_path, formulation="likelihood")
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    task = concepts.concept_task(request, options, None)
    apply, params, schedule, _ = request.pretrained
    seen = []

    @jax.jit
    def predict(params, x_t, t, cond):
        return losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond, clip=True)

    for step in range(24):  # 64 samples, three points each, every one once
        forget = task.batch(step).forget
        base = np.full(8, request.separated[0].base)
        expected = predict(params, forget.x_t, forget.t, base)
        np.testing.assert_allclose(forget.epsilon, expected, rtol=1e-4, atol=1e-4)
        assert ((forget.posterior > 0) & (forget.posterior < 1)).all()
        seen += [x.tobytes() for x in forget.x_t]
    assert len(set(seen)) == 192
    # At the noisiest point nothing is known but the base's share of the concept.
    stored = concept_formulations.stored_samples(
        request, options, concept_evaluation.judging(request, options)
    )
    log_p = jax.jit(concept_evaluation.log_posterior(request, options, request.candidates))(
        params, stored.base
    )
    (share,) = likelihoods.mixture_shares(log_p) @ request.members.T
    np.testing.assert_allclose(stored.path.posterior[:, 0, 0], share, rtol=1e-3)
    assert abs(share - 1 / 3) > 0.01
    # The candidates are all labels, so that the posterior of all of them does not move.
    everyone = request._replace(members=np.ones((1, 3), bool))
    stored = concept_formulations.stored_samples(
        everyone, options, concept_evaluation.judging(everyone, options)
    )
    assert stored.path.push.shape == (64, 3, 1, *request.pretrained.config.sample_shape)
    np.testing.assert_allclose(stored.path.posterior, 1, rtol=1e-5)
    np.testing.assert_allclose(stored.path.push, 0, atol=1e-5)
    assert (np.diff(stored.path.t, axis=1) < 0).all()


@pytest.mark.slow
def test_fresh_samples_of_the_model_move_the_multipliers(tiny_model, tmp_path, monkeypatch):
    """In the first half of the run and nowhere else, towards what they show too much."""
    keys = []

    def fresh_samples(request, options, h):
        def evaluate(params, reference, key, batch, current, *, axis_name=None):
            jax.debug.callback(lambda data: keys.append(data.tolist()), jax.random.key_data(key))
            # Half of the share, with a standard error of a tenth.
            index = batch.forget.constraint.reshape(-1)
            each = jnp.where(jnp.arange(len(index)) % 2 == 0, 1.0, -1.0)
            return Losses(0 * each, share * (0.5 + 0.1 * np.sqrt(len(index) - 1) * each), index)

        return evaluate

    monkeypatch.setattr(concept_formulations, "fresh_samples", fresh_samples)
    options = options_of(
        tiny_model, tmp_path / "out", formulation="likelihood", threshold=("0.5x",), steps=6
    )
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    stored = concept_formulations.stored_samples(
        request, options, concept_evaluation.judging(request, options)
    )
    share = float(stored.values.mean())
    task = concepts.concept_task(request, options, None)
    assert task.dual_steps == (1, 2, 3)
    found = running.run(request, options, command="concept", progress=False).report

    def multiplier(left):
        return np.log(share / (1 - share)) - np.log(left / (1 - left))

    # The half that it may show is to be held by one standard error.
    expected = [multiplier(0.5 * share)]
    for done in range(6):
        gain = max(1.0, expected[-1] / multiplier(0.5 * share))
        step = gain * (multiplier(0.5 * share) - multiplier(0.6 * share))
        expected.append(expected[-1] + step * (done in task.dual_steps))
    assert task.multipliers == pytest.approx(expected[:1], rel=1e-3)
    rows = report.read_rows(options.out / "metrics.jsonl")
    np.testing.assert_allclose([row["multipliers"][0] for row in rows], expected[1:], rtol=1e-3)
    assert found["constraints"][0]["multiplier"] == rows[-1]["multipliers"][0]
    jax.effects_barrier()
    # Neither the noise of what was trained on nor of what is certified, nor the same twice.
    own = [jax.random.wrap_key_data(data) for data in np.unique(np.uint32(keys), axis=0)]
    assert len(own) == 3
    others = [jax.random.key(options.seed + 1), *jax.random.split(jax.random.key(options.seed + 2))]
    noise = [np.asarray(jax.random.normal(key, (64,))) for key in (*own, *others)]
    assert np.abs(np.corrcoef(noise) - np.eye(len(noise))).max() < 0.5


@pytest.mark.slow
def test_multipliers_of_a_run_move_where_they_should_and_nowhere_else(finished):
    folder = finished / "likelihood"
    options = load_run(folder / "run.json", "concept", ConceptOptions)
    request = concept_request.make_request(load_pretrained(options.model), options)
    task = concepts.concept_task(request, options, None)
    rows = report.read_rows(folder / "metrics.jsonl")
    found = [np.float32(task.multipliers).tolist(), *(row["multipliers"] for row in rows)]
    moved = [done for done, pair in enumerate(itertools.pairwise(found)) if pair[0] != pair[1]]
    assert tuple(moved) == task.dual_steps == (1, 2)


@pytest.mark.slow
def test_steps_of_likelihoods_on_a_mesh_are_those_of_one_device(two_levels, tmp_path):
    options = options_of(
        two_levels, tmp_path, formulation="likelihood", threshold=("0.5x",), stored_samples=60
    )
    request = concept_request.make_request(load_pretrained(two_levels), options)
    task = concepts.concept_task(request, options, None)
    # A device each has as many rows.
    assert len(task.dual_batch.forget.cond) == 64
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))
    algorithm = primal_dual(
        task.problem, optimizer, task.dual, dual_schedule=algorithms.dual_schedule(task)
    )

    def step(key, state, reference, brought):
        return algorithm.step(key, state, reference, *brought)

    ends = []
    for mesh in (None, sharding.device_mesh()):
        state = algorithm.init(task.params, task.thresholds, multipliers=task.multipliers)
        reference, compiled, seen = request.pretrained.params, sharding.jit_step(step, mesh), []
        if mesh is not None:
            assert mesh.size == 8
            state, reference = sharding.replicate((state, reference), mesh)
        for number in range(options.steps):
            brought = (task.batch(number), task.dual_batch)
            if mesh is not None:
                brought = sharding.shard_batch(brought, mesh)
            state, info = compiled(jax.random.key(number), state, reference, brought)
            assert info.finite
            seen.append(np.asarray(info.multipliers))
        ends.append((jax.device_get(state.params), seen))
    (one, seen_by_one), (mesh, seen_by_mesh) = ends
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, mesh)
    np.testing.assert_allclose(seen_by_mesh, seen_by_one, rtol=1e-4)
    assert len(set(np.ravel(seen_by_one))) == 3  # the first, and two that fresh samples found
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, task.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_multipliers_are_those_of_one_forgotten_condition_alone(finished):
    """Though it is on a third of the rows: the bound of the domain is the option itself."""
    found = json.loads((finished / "minibatches" / "report.json").read_text())
    rows = report.read_rows(finished / "minibatches" / "metrics.jsonl")
    climb = [row["multipliers"][0] for row in rows]
    assert 0 < climb[0] < climb[-1] == pytest.approx(0.3, rel=1e-6)
    (constraint,) = found["constraints"]
    assert constraint["multiplier"] == climb[-1]
    assert constraint["mean_multiplier"] == pytest.approx(np.mean(climb))
    assert found["complementary_slackness"] == pytest.approx(
        0.3 * abs(constraint["slack"]), rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_floor_and_the_gap_to_it_are_reported(finished, name):
    found = json.loads((finished / name / "report.json").read_text())
    floor, gap, objective = (found[part] for part in ("floor", "gap", "objective"))
    assert floor["unit"] == gap["unit"] == objective["unit"] == "nats"
    assert np.isfinite([*(floor[part] for part in ("value", "stderr", "effective"))]).all()
    assert gap["value"] == pytest.approx(objective["value"] - floor["value"], rel=1e-5)
    assert gap["stderr"] == pytest.approx(np.hypot(objective["stderr"], floor["stderr"]), rel=1e-5)
    assert floor["effective"] == gap["effective"] > 0
    page = " ".join((finished / name / "report.html").read_text().split())
    assert "<h3>Floor and gap</h3>" in page
    for part in (floor, gap):
        assert f'value="{part["value"]!r}"' in page
    assert ("too few to call it a bound" in page) == (floor["effective"] < 20)


def test_a_floor_is_of_the_forgotten_conditions_and_their_share(tiny_model, tmp_path):
    """A concept in 0.3 of the samples of a base, of which 0.1 may be left: a binary KL."""
    options = options_of(tiny_model, tmp_path, formulation="likelihood", forget=("dog", "cat"))
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    h = (np.random.default_rng(0).random((4000, 2)) < [0.3, 0.2]).astype(np.float32)
    stored = concept_formulations.StoredSamples(
        h, h, h, np.arange(4000) % 2, h, np.zeros(4000), None, None
    )
    found = concept_formulations.floor_of(request, options, np.array([0.1, 0.5]), 0.25, stored)
    exact = 0.25 * (0.1 * np.log(0.1 / 0.3) + 0.9 * np.log(0.9 / 0.7))
    assert abs(found.value - exact) < 3 * found.stderr
    assert 0 < found.stderr < 0.1 * exact
    assert 0 < found.lower < exact


@pytest.mark.slow
def test_path_log_ratios_are_on_average_the_path_kl_at_the_base(tiny_model, tmp_path):
    options = options_of(
        tiny_model, tmp_path, forget=("dog", "cat"), separate_null=True, evaluation_images=512
    )
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    ratios, separated = concept_formulations.path_log_ratios(request, options)
    assert ratios.shape == (513, 2)
    np.testing.assert_array_equal(np.bincount(separated), [171, 171, 171])
    measured = concept_evaluation.evaluator(request, options, None)(request.pretrained.params)
    at_base = measured.values[measured.cond == 3]
    error = np.hypot(*(v.std(axis=0) / np.sqrt(len(v)) for v in (ratios, at_base)))
    assert (np.abs(ratios.mean(axis=0) - at_base.mean(axis=0)) < 4 * error).all()
    assert (ratios.std(axis=0) > 0).all()


def test_many_conditions_leave_each_enough_paths_for_a_floor(tiny_model, tmp_path):
    options = options_of(
        tiny_model, tmp_path, forget=("dog", "cat"), separate_null=True, evaluation_images=4
    )
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    found = concept_formulations.floor_of(request, options, np.ones(2), 0.5, None)
    assert np.isfinite([found.value, found.stderr]).all()


@pytest.mark.slow
def test_a_handful_of_stored_samples_has_no_floor(tiny_model, tmp_path):
    options = options_of(
        tiny_model, tmp_path, formulation="likelihood", stored_samples=3, threshold=("0.9",),
        target_steps=0,
    )  # fmt: skip
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    assert concepts.concept_task(request, options, None).floor is None


@pytest.mark.slow
def test_the_formula_is_that_of_the_problem_that_was_solved(finished, tiny_model, tmp_path):
    printed = {}
    for name in RUNS:
        found = json.loads((finished / name / "report.json").read_text())
        page = html.unescape((finished / name / "report.html").read_text())
        assert found["formula"] in page
        printed[name] = found["formula"]
    for name in ("reverse-kl", "minibatches"):
        assert "KL(p‖q) subject to KL(p‖qᵢ) ≥ bᵢ" in printed[name]
        assert "path KLs" in printed[name]
    # The posterior of the classifier, calibrated; without --target-steps itself.
    assert "h̃ = (h − e)(S − e)⁻¹, the calibrated posterior" in printed["likelihood"]
    options = options_of(
        tiny_model, tmp_path, formulation="likelihood", threshold=("0.9x",), target_steps=0
    )
    request = concept_request.make_request(load_pretrained(tiny_model), options)
    plain = concepts.concept_task(request, options, None).formula
    assert "KL(p‖q) subject to E_p[hᵢ(x)] ≤ εᵢ" in plain
    assert "own posterior" in plain
    assert "calibrated" not in plain
    assert "(S − e)" not in plain


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_learning_rate_ends_with_the_last_update(tiny_model, tmp_path, minibatches):
    options = options_of(tiny_model, tmp_path, minibatches=minibatches, steps=30, learning_rate=0.5)
    rate = algorithms.learning_rate(options)
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
        (["--forget", "dog", "--corrections", "-1"], "--corrections must lie in [0, "),
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
    jobs = jobs_of("demo", DemoOptions(out=tmp_path, seed=3))
    assert [(name, one.out.name) for name, one in jobs] == [
        ("demo", "forward-kl"),
        ("concept", "reverse-kl"),
        ("concept", "likelihood"),
    ]
    assert {one.seed for _, one in jobs} == {3}
    ((_, alone),) = jobs_of("demo", DemoOptions(out=tmp_path, formulation="likelihood"))
    assert alone.out == tmp_path
    ((_, images),) = jobs_of("demo", DemoOptions(out=tmp_path, forget=("repeated",)))
    assert images.out == tmp_path


def test_the_demo_of_prompts_keeps_all_other_pairs(tmp_path):
    jobs = jobs_of("demo", DemoOptions(out=tmp_path, text=True, forget=("blueprint",)))
    assert [one.out.name for _, one in jobs] == ["reverse-kl", "likelihood"]
    for _, one in jobs:
        one.validate()
        assert (one.model, one.forget, len(one.retain)) == ("embedded-text", ("blueprint",), 30)
    with pytest.raises(ValueError, match="--text"):
        DemoOptions(text=True, formulation="forward-kl").validate()
    with pytest.raises(ValueError, match="forget some of"):
        jobs_of("demo", DemoOptions(out=tmp_path, text=True, forget=("hat",)))


@pytest.mark.slow
def test_options_survive_a_round_trip(finished):
    options = load_run(finished / "likelihood" / "run.json", "concept", ConceptOptions)
    assert options.formulation == "likelihood"
    assert options.base is None
    assert isinstance(options.out, pathlib.Path)


@pytest.mark.slow
def test_the_demo_goes_on_with_what_is_left(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    shutil.copytree(finished, out)
    (out / "report.html").unlink(missing_ok=True)
    (out / "likelihood" / "report.json").unlink()
    (out / "likelihood" / "SHA256SUMS").unlink()
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

    monkeypatch.setattr("jax_unlearn.app.jobs.jobs_of", jobs)
    assert cli.main(["demo", "--out", str(out), "--resume"]) == 0
    assert "likelihood/report.html" in (out / "report.html").read_text()
    assert (out / "reverse-kl" / "report.json").stat().st_mtime_ns == untouched
    pairs = zip(leaves(out / "likelihood"), leaves(finished / "likelihood"), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    assert str(out / "report.html") in capsys.readouterr().out
