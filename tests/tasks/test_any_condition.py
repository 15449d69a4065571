"""Runs whose constraints hold under any condition: points, attackers, and measurements."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_unlearn import attacks, schedules
from jax_unlearn.app import algorithm as algorithms
from jax_unlearn.app import cli, parsing
from jax_unlearn.app import run as running
from jax_unlearn.app.jobs import jobs_of
from jax_unlearn.app.options import ConceptOptions, DemoOptions
from jax_unlearn.app.run_file import load_run
from jax_unlearn.app.tasks import any_condition, concept_request, concepts
from jax_unlearn.app.tasks.conditions import by_vectors
from jax_unlearn.formulations import Pooled
from jax_unlearn.pretrained import load_pretrained, relabelled
from jax_unlearn.pretrained.subsets import lora_attack, lora_init, lora_merge

SMALL = {
    "formulation": "without", "threshold": ("0.1x",), "steps": 4, "batch_size": 8,
    "forget_batch_size": 8, "samples": 2, "sampling_steps": 3, "evaluation_images": 12,
    "checkpoint_every": 2, "chain_steps": 2, "stored_samples": 24, "classifier_draws": 2,
    "target_steps": 3, "attack_steps": 4,
}  # fmt: skip


def options_of(model, out, **more):
    return ConceptOptions(**{"model": str(model), "out": out, "forget": ("dog",), **SMALL, **more})


def request_of(model, out, **more):
    options = options_of(model, out, **more)
    return concept_request.make_request(load_pretrained(model), options), options


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """A request for two of three labels, its options, and what makes its points."""
    request, options = request_of(tiny_model, tmp_path_factory.mktemp("two"), forget=("dog", "cat"))
    return request, options, any_condition.point_maker(request, options)


@pytest.fixture(scope="module")
def single(two_levels, tmp_path_factory):
    """The same for one label."""
    request, options = request_of(two_levels, tmp_path_factory.mktemp("single"), attack_steps=40)
    return request, options, any_condition.point_maker(request, options)


def leaves(folder):
    return jax.tree.leaves(load_pretrained(folder / "model").params)


@pytest.mark.slow
def test_labels_as_vectors_are_what_they_are_as_numbers(tiny_model):
    pretrained = load_pretrained(tiny_model)
    apply, table = by_vectors(pretrained)
    x, t = jax.random.normal(jax.random.key(0), (4, *pretrained.config.sample_shape)), jnp.arange(4)
    labels = jnp.array([0, 1, 2, 3])
    np.testing.assert_allclose(
        apply(pretrained.params, x, t, jnp.asarray(table)[labels]),
        pretrained.apply(pretrained.params, x, t, labels),
        rtol=1e-6,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="no table of labels"):
        by_vectors(pretrained._replace(params={}))


@pytest.mark.slow
def test_forgotten_conditions_are_held_to_their_base_and_kept_ones_to_themselves(two):
    request, options, make = two
    points = make(24, 24, 7)
    held = {(c, base) for c, base in zip(points.cond.tolist(), points.base.tolist(), strict=True)}
    null = request.conditions.null
    assert held == {(c, c) for c in request.kept} | {(c, null) for c in request.forgotten}
    counts = np.unique(points.cond, return_counts=True)[1]
    assert len(set(counts)) == 1  # equal shares
    assert points.images.shape[:2] == (2, 12)
    assert points.t.shape == (2, 12 * options.target_steps) == points.x_t.shape[:2]
    # One step in each third of all, for each image.
    thirds = points.t.reshape(2, 12, 3) * 3 // request.pretrained.schedule.num_steps
    np.testing.assert_array_equal(thirds, np.broadcast_to([2, 1, 0], thirds.shape))
    jax.tree.map(np.testing.assert_array_equal, points, make(24, 24, 7))
    assert (points.kept != make(24, 24, 8).kept).any(axis=(1, 2, 3)).all()


@pytest.mark.slow
def test_of_one_other_condition_the_rest_predicts_what_that_one_does(two):
    request, _, make = two
    (label,) = [c for c in request.kept if c != request.conditions.null]
    points = make(24, 24, 7)
    apply, reference, schedule, _ = request.pretrained
    x_t, t = points.x_t.reshape(-1, *points.x_t.shape[2:]), points.t.reshape(-1)
    expected = apply(reference, x_t, t, np.full(len(t), label))  # a network that predicts noise
    assert schedule.prediction_type == "epsilon"
    np.testing.assert_allclose(points.epsilon.reshape(x_t.shape), expected, rtol=1e-4, atol=1e-5)
    for own, found in zip(request.forgotten, (points.concept[i] for i in range(2)), strict=True):
        x, t = points.x_t[request.forgotten.index(own)], points.t[request.forgotten.index(own)]
        expected = apply(reference, x, t, np.full(len(t), own))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_samples_of_a_base_that_show_the_concept_are_left_out(tiny_model, tmp_path, monkeypatch):
    request, options = request_of(tiny_model, tmp_path)
    asked = []

    def classifier(*_):
        def judged(reference, x_0):
            shown = x_0.mean(axis=(1, 2, 3)) > 0
            jax.debug.callback(lambda x: asked.append(np.asarray(x)), x_0)
            return shown[:, None].astype(jnp.float32)

        return judged

    monkeypatch.setattr(any_condition, "classifier", classifier)
    points = any_condition.point_maker(request, options)(36, 8, 7)
    jax.effects_barrier()
    null = request.conditions.null
    judged = np.concatenate(asked)
    means = judged.mean(axis=(1, 2, 3))
    assert (means > 0).any()
    assert (means <= 0).any()
    held = points.kept[points.base == null]
    assert (held.mean(axis=(1, 2, 3)) <= 0).all()
    other = points.kept[points.base != null]
    assert (other.mean(axis=(1, 2, 3)) > 0).any()  # of what is kept all are
    monkeypatch.setattr(
        any_condition, "classifier", lambda *_: lambda _, x: jnp.ones((len(x), 1), jnp.float32)
    )
    with pytest.raises(ValueError, match="samples of null label show what is to be forgotten"):
        any_condition.point_maker(request, options)(36, 8, 7)


@pytest.mark.slow
def test_the_rest_are_the_conditions_that_explain_the_concept_best(
    tiny_model, tmp_path, monkeypatch
):
    """Of three scores the two highest are taken, in order of their numbers."""
    request, options = request_of(tiny_model, tmp_path)
    scores = {c: -float(c == 0) for c in request.kept if c != request.conditions.null}
    seen = []

    def rest_path(*given, concepts, **options):
        jax.debug.callback(lambda c: seen.append(np.asarray(c).tolist()), concepts)
        return real(*given, concepts=concepts, **options)

    real = any_condition.likelihoods.rest_path
    monkeypatch.setattr(any_condition, "REST", 1)
    monkeypatch.setattr(any_condition.likelihoods, "rest_path", rest_path)
    monkeypatch.setattr(
        any_condition,
        "log_posterior",
        lambda request, options, candidates: (
            lambda _, x: jnp.broadcast_to(
                jnp.array([scores[int(c)] for c in candidates]), (len(x), len(candidates))
            )
        ),
    )
    any_condition.point_maker(request, options)(12, 12, 7)
    jax.effects_barrier()
    best = max(scores, key=lambda c: scores[c])
    assert seen
    assert all(one == [best] for one in seen)


@pytest.mark.slow
def test_batches_give_each_concept_as_many_attackers(two):
    request, options, make = two
    options, points = dataclasses.replace(options, forget_batch_size=6), make(24, 24, 7)
    setup = any_condition.any_condition_setup(request, options, points)
    table = np.asarray(by_vectors(request.pretrained)[1])
    shown = np.asarray(
        relabelled(request.pretrained.params, request.forgotten, request.conditions.null)[
            "class_embedding"
        ]["embedding"]
    )
    for step in range(3):
        kept, forget, _ = setup.prepare(setup.batch(step))
        np.testing.assert_array_equal(forget.constraint, [0, 1] * 3)
        for x_t, t, epsilon, i in zip(
            forget.x_t, forget.t, forget.epsilon, forget.constraint, strict=True
        ):
            (place,) = np.flatnonzero((points.x_t[i] == x_t).all(axis=(1, 2, 3)))
            assert points.t[i, place] == t
            np.testing.assert_array_equal(points.epsilon[i, place], epsilon)
        for x_0, cond, base in zip(*kept[:2], kept.base, strict=True):
            held = points.base[(points.kept == x_0).all(axis=(1, 2, 3))]
            assert any((table[b] == base).all() for b in held)
            # A label to forget is embedded as its base from the start.
            assert any((shown[c] == cond).all() for c in points.cond)
    assert setup.adversary.pool.shape == (6, table.shape[1])
    # Fed with −violation, λ rests where values are a fifth of their thresholds, and falls below.
    thresholds, state = np.array([0.5, 2.0], np.float32), setup.dual.init(jnp.ones(2))
    for share, sign in ((0.2, 0), (0.1, -1), (0.3, 1), (1.0, 1)):
        change, _ = setup.dual.update(
            jnp.array((1 - share) * thresholds), state, jnp.ones(2), thresholds=thresholds
        )
        np.testing.assert_array_equal(np.sign(np.round(change, 6)), sign)


@pytest.mark.slow
def test_a_model_is_measured_under_attacks_that_lower_the_loss(single):
    """By hand: the same attack, and the mean squared distance from the rest at its conditions."""
    request, options, make = single
    points, fresh = make(24, 24, 7), make(12, 12, 8)
    params = request.pretrained.params
    found = any_condition.under_attack(request, options, points, fresh)(params)
    assert list(found.by_steps) == [10, 20, 30, 40]
    apply, table = by_vectors(request.pretrained)
    schedule = request.pretrained.schedule
    key = jax.random.fold_in(jax.random.key(options.seed), 11)
    numbers = np.array([*request.forgotten, *request.kept, *request.shown])
    starts = attacks.pool_of(np.asarray(table)[numbers], 8, seed=options.seed + 1)
    images, values = points.images[0], []

    @jax.jit
    def invert(key, start):
        return attacks.invert(
            lambda e, x_t, t: apply(params, x_t, t, jnp.tile(e, (len(x_t), 1))),
            schedule, key, x_0=images, start=start, steps=40, batch=8, every=10,
        )  # fmt: skip

    for one, start in zip(jax.random.split(key, 8), starts, strict=True):
        inverted = invert(one, start)
        assert inverted.loss[-1] < inverted.loss[1]
        for e in inverted.found[1:]:
            cond = jnp.tile(e, (len(fresh.t[0]), 1))
            ours = np.asarray(apply(params, fresh.x_t[0], fresh.t[0], cond))
            apart, from_concept, of_rest = (
                np.mean((a - b) ** 2, axis=(1, 2, 3))
                for a, b in (
                    (ours, fresh.epsilon[0]),
                    (ours, fresh.concept[0]),
                    (fresh.epsilon[0], fresh.concept[0]),
                )
            )
            values.append(np.mean(apart * (from_concept < of_rest)))
    np.testing.assert_allclose(found.values.value, [np.mean(values)], rtol=1e-3)
    by_steps = np.array(values).reshape(8, 4)
    for place, each in enumerate(found.by_steps.values()):
        np.testing.assert_allclose(each.value, [by_steps[:, place].mean()], rtol=1e-3)
    stderr = by_steps.mean(axis=1).std(ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(found.values.stderr, [stderr], rtol=1e-2)
    # Of the reference itself nothing is lost.
    assert float(found.objective.value) < 1e-9


@pytest.mark.slow
def test_what_is_kept_is_measured_at_its_base(single):
    """All weights zero: it predicts 0, and misses the mean square of the reference's prediction."""
    request, options, make = single
    fresh = make(192, 8, 8)
    options = dataclasses.replace(options, attack_steps=4)
    measure = any_condition.under_attack(request, options, make(24, 24, 7), fresh)
    silent = jax.tree.map(jnp.zeros_like, request.pretrained.params)
    apply, reference, schedule, _ = request.pretrained
    rng, squares = np.random.default_rng(0), []
    for _ in range(4):
        t = rng.integers(schedule.num_steps, size=len(fresh.kept))
        noise = rng.standard_normal(fresh.kept.shape, np.float32)
        x_t = schedules.add_noise(x_0=fresh.kept, noise=noise, log_snr=schedule.log_snr[t])
        squares.append(np.mean(np.square(apply(reference, x_t, t, fresh.base)), axis=(1, 2, 3)))
    squares = np.concatenate(squares)
    found = measure(silent).objective
    wrong = np.hypot(squares.std() / np.sqrt(len(squares)), found.stderr)
    assert abs(found.value - squares.mean()) < 4 * wrong


def test_a_low_rank_change_is_attacked_as_what_it_makes():
    params = {"attn2": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    lora = lora_init(params, jax.random.key(0), rank=1)
    lora = jax.tree.map(lambda leaf: leaf + 1, lora)

    def attack(params, reference, key, pool, *, axis_name=None):
        return pool * params["attn2"]["kernel"].sum() + reference["attn2"]["kernel"].sum()

    found = lora_attack(attack)(lora, params, None, jnp.arange(3.0), axis_name=None)
    merged = lora_merge(params, lora)["attn2"]["kernel"].sum()
    np.testing.assert_allclose(found, np.arange(3) * merged + 15, rtol=1e-6)


@pytest.mark.slow
def test_a_run_saves_the_model_alone_and_resumes_bit_for_bit(tiny_model, tmp_path, capsys):
    given = ["concept", "--model", str(tiny_model), "--forget", "dog"]
    for name, value in SMALL.items():
        values = value if isinstance(value, tuple) else (value,)
        given += ["--" + name.replace("_", "-"), *map(str, values)]
    assert cli.main([*given, "--out", str(tmp_path / "whole")]) == 0
    found = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert found["formulation"] == "without"
    (constraint,) = found["constraints"]
    assert constraint["threshold"] == pytest.approx(0.1 * constraint["reference_value"], rel=1e-5)
    assert constraint["slack"] == pytest.approx(
        constraint["threshold"] - constraint["value"], rel=1e-4, abs=1e-9
    )
    after = found["metrics"]["under_attack"]["after"]["dog"]
    assert np.mean([one["value"] for one in after.values()]) == pytest.approx(
        constraint["value"], rel=1e-4
    )
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "≤ " in page
    assert "≥ " not in page
    assert "Under any condition" in page

    # The command has rates of its own for this formulation.
    saved = load_run(tmp_path / "whole" / "run.json", "concept", ConceptOptions)
    options = dataclasses.replace(saved, out=tmp_path / "stopped")
    request = concept_request.make_request(load_pretrained(tiny_model), options)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(request, options, command="concept", progress=False, after_step=stop)
    assert cli.main(["concept", "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    for ours, theirs in zip(leaves(tmp_path / "stopped"), leaves(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_model_and_attackers_train_and_nothing_else_does(tiny_model, tmp_path):
    """The algorithm that `run` makes, by hand: labels' vectors stay, networks and pool move."""
    request, options = request_of(tiny_model, tmp_path)
    task = concepts.concept_task(request, options, None)
    assert task.adversary is not None
    problem = algorithms.against_pool(task.problem, task.adversary.loss)
    algorithm = algorithms.primal_dual(
        problem,
        algorithms.optimizer_pair(optax.adam(1e-3), task.adversary.optimizer),
        task.dual,
    )
    start = Pooled(task.params, task.adversary.pool)
    state = algorithm.init(start, task.thresholds, multipliers=task.multipliers)
    step = jax.jit(algorithm.step)
    for number in range(2):
        key = jax.random.fold_in(jax.random.key(0), number)
        state, info = step(key, state, request.pretrained.params, task.prepare(task.batch(number)))
        assert bool(info.finite)
    before, after = (jax.tree.map(np.asarray, one) for one in (task.params, state.params.params))
    np.testing.assert_array_equal(
        before.pop("class_embedding")["embedding"], after.pop("class_embedding")["embedding"]
    )
    moved = [
        (a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    assert np.mean(moved) > 0.9
    assert (np.asarray(state.params.pool) != np.asarray(task.adversary.pool)).any(axis=1).all()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"threshold": ("calibrated",)}, "needs a --threshold"),
        ({"target_steps": 0}, "--target-steps of 2 or more"),
        ({"attack_steps": 0}, "--attack-steps must"),
        ({"forget": ("dog", "cat"), "forget_batch_size": 5}, "not a multiple of the 2 concepts"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, given, word):
    with pytest.raises(ValueError, match=word):
        options_of("embedded", tmp_path, **given).validate()


def test_the_robust_demo_is_one_run_of_concept(tmp_path):
    ((command, one),) = jobs_of("demo", DemoOptions(text=True, robust=True, out=tmp_path))
    assert (command, one.formulation, one.out) == ("concept", "without", tmp_path)
    one.validate()
    for given in ({}, {"text": True, "formulation": "likelihood"}):
        with pytest.raises(ValueError, match="--robust is for --text"):
            DemoOptions(robust=True, **given).validate()
    parsed = parsing.parse("concept", ["--forget", "dog", "--formulation", "without"])
    assert (parsed.threshold, parsed.attack_steps) == (("0.05x",), 400)
