"""Sweeps of tiny models: each problem as its own run, resumed bit for bit, refused in one line."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_unlearn import metrics, multipliers
from jax_unlearn.app import cli, loading, memory, report, verify
from jax_unlearn.app import run as running
from jax_unlearn.app.options import ConceptOptions, DataOptions
from jax_unlearn.app.sweep import fronts as made
from jax_unlearn.app.sweep import run as sweeps
from jax_unlearn.app.sweep.options import Point, SweepOptions
from jax_unlearn.app.tasks import (
    concept_evaluation,
    concept_formulations,
    concept_request,
    concepts,
    image_task,
    images,
)
from jax_unlearn.app.tasks.base import Measured, controller
from jax_unlearn.app.tasks.evaluation import Evaluation
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.sweep import sweep_init
from jax_unlearn.typing import Estimate

SMALL = {
    "steps": 4, "batch_size": 16, "forget_batch_size": 8, "samples": 0, "sampling_steps": 3,
    "evaluation_images": 16, "checkpoint_every": 2,
}  # fmt: skip
CONCEPT = SMALL | {
    "forget": ("dog",), "chain_steps": 2, "stored_samples": 16, "classifier_draws": 2,
    "target_steps": 3, "corrections": 1,
}  # fmt: skip


def of_images(model, files, out, **more):
    sources = {name: (str(path),) for name, path in files.items()}
    return DataOptions(**{"model": str(model), "out": out, **sources, **SMALL, **more})


def of_labels(model, out, **more):
    return ConceptOptions(**{"model": str(model), "out": out, **CONCEPT, **more})


def request_of(options):
    pretrained = load_pretrained(options.model)
    if isinstance(options, DataOptions):
        return images.from_paths(pretrained, options)
    return concept_request.make_request(pretrained, options)


def swept(asked, options, **more):
    asked.validate()
    options = asked.applied(options)
    sweeps.devices_of(asked, options)
    return sweeps.sweep(request_of(options), asked, options, progress=False, **more)


def measure_cheaply(patch):
    """A measure without a network: distances of the parameters. Returns what was measured."""
    calls = []

    def evaluator(request, *given):
        reference = request.pretrained.params

        def measure(params):
            calls.append(1)
            moved = jax.tree.map(lambda a, b: np.square(a - b).sum(), params, reference)
            far = 1e4 * sum(jax.tree.leaves(moved))
            value = Estimate(np.array([0.3 + np.sqrt(far)]), np.array([0.01]))
            objective = Estimate(np.float32(far), np.float32(0.02))
            return Measured(objective, value, {}, {}, None, None), Estimate(0.5, 0.1)

        return Evaluation(measure, None)

    patch.setattr(image_task, "evaluator", evaluator)
    return calls


@pytest.fixture
def cheap(monkeypatch):
    return measure_cheaply(monkeypatch)


ASKED = SweepOptions("data", ("1.2x", "1.6x"), (), (0, 5), keep_models=True)


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_images, tmp_path_factory):
    """The folder of a sweep that was not disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        calls = measure_cheaply(patch)
        found = swept(ASKED, of_images(tiny_model, tiny_images, out))
    assert len(calls) == 5  # The reference once, and four models.
    assert found == json.loads((out / "fronts.json").read_text())
    return out


def leaves(folder):
    return jax.tree.leaves(load_pretrained(folder).params)


# ---- runs


def without_time(found):
    """What must not change: all but seconds."""
    if isinstance(found, dict):
        return {k: without_time(v) for k, v in found.items() if k not in ("seconds", "timing")}
    return [without_time(one) for one in found] if isinstance(found, list) else found


def rows_of(folder):
    rows = report.read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_sweep_leaves_what_is_promised(whole):
    found = json.loads((whole / "fronts.json").read_text())
    problems = found["problems"]
    assert [one["name"] for one in problems] == [
        f"threshold-{text}-seed-{seed}" for text in ("1.2x", "1.6x") for seed in (0, 5)
    ]
    assert [one["constraints"][0]["threshold"] for one in problems] == pytest.approx(
        [0.36, 0.36, 0.48, 0.48], rel=1e-6
    )
    assert len({one["objective"]["value"] for one in problems}) == 4
    assert found["devices"] == 4
    with Image.open(whole / "fronts.png") as picture:
        assert picture.size[0] > 500
    assert not verify.verify(whole)[0]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_measures_nothing_twice(
    whole, tiny_model, tiny_images, tmp_path, cheap, monkeypatch
):
    def kill(step):
        if step == 3:
            raise KeyboardInterrupt

    options = of_images(tiny_model, tiny_images, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        swept(ASKED, options, after_step=kill)
    put = sweeps.Kept.put

    def killing(kept, name, measure):
        if name == "threshold-1.6x-seed-0":
            raise KeyboardInterrupt
        return put(kept, name, measure)

    options = dataclasses.replace(options, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(sweeps.Kept, "put", killing)
        with pytest.raises(KeyboardInterrupt):
            swept(ASKED, options)
    del cheap[:]
    found = swept(ASKED, options)
    assert len(cheap) == 3  # The reference, and two of four models.
    assert without_time(found) == without_time(json.loads((whole / "fronts.json").read_text()))
    assert rows_of(tmp_path) == rows_of(whole)
    for one in (whole / "models").iterdir():
        for ours, theirs in zip(leaves(one), leaves(tmp_path / "models" / one.name), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_each_problem_is_its_own_run(whole, tiny_model, tiny_images, tmp_path, cheap):
    """Of the command's seed: with another one a run also measures on other images."""
    options = of_images(tiny_model, tiny_images, tmp_path, threshold=("1.6x",))
    request = request_of(options)
    task = running.TASKS[images.ImageRequest](request, options, None)
    alone = trained_alone(task, options, request)
    ours = leaves(whole / "models" / "threshold-1.6x-seed-0")
    for a, b in zip(ours, jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    rows = rows_of(whole)
    assert rows[-1]["multipliers"][2] == pytest.approx(alone.multipliers.tolist(), abs=1e-6)
    pairs = zip(ours, jax.tree.leaves(request.pretrained.params), strict=True)
    moved = [np.abs(a - b).max() for a, b in pairs]
    assert max(moved) > 1e-4


def trained_alone(task, options, request):
    """A task by its own step, one after the other."""
    from jax_unlearn.app.algorithm import algorithm_of

    algorithm, start, step = algorithm_of(task, options, task.params)
    reference = request.pretrained.params
    if task.baseline is not None and task.baseline.reference is not None:
        reference = task.baseline.reference
    state = algorithm.init(start, task.thresholds, multipliers=task.multipliers)
    compiled, key = jax.jit(step), jax.random.key(options.seed)
    beside = () if task.dual_batch is None else (task.dual_batch,)
    for number in range(options.steps):
        state, _ = compiled(key, state, reference, (task.batch(number), *beside))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neg-grad", "equal-weights", "selective-amnesia"])
def test_strengths_are_data_of_one_program(tiny_model, tiny_images, tmp_path, cheap, method):
    asked = SweepOptions("data", (), (0.1, 0.4), (), keep_models=True)
    options = of_images(tiny_model, tiny_images, tmp_path, method=method)
    found = swept(asked, options)
    assert [one["strength"] for one in found["problems"]] == [0.1, 0.4]
    assert found["method"]["name"] == method
    own = asked.applied(options)
    request = request_of(own)
    task = running.TASKS[images.ImageRequest](request, own, None)
    for strength in (0.1, 0.4):
        alone = trained_alone(task.at(None, strength), own, request)
        ours = leaves(tmp_path / "models" / f"strength-{strength}-seed-0")
        for a, b in zip(ours, jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"formulation": "reverse-kl"},
        {"formulation": "reverse-kl", "estimator": "stop_gradient", "minibatches": 2},
        {"formulation": "likelihood"},
        {"formulation": "without"},
    ],
)
def test_concepts_are_swept(tiny_model, tmp_path, more):
    thresholds = ("0.9x", "0.5x") if more["formulation"] != "without" else ("0.1x", "0.05x")
    asked = SweepOptions("concept", thresholds, (), (), keep_models=True)
    options = of_labels(tiny_model, tmp_path, **more)
    found = swept(asked, options)
    assert not [one for one in found["problems"] if "lost" in one]
    assert bool(found["floor"]) == (more["formulation"] != "without")
    own = asked.applied(options)
    request = request_of(own)
    task = running.TASKS[concept_request.ConceptRequest](request, own, None)
    alone = trained_alone(task.at("0.5x" if found["floor"] else "0.05x"), own, request)
    params = alone.params if task.adversary is None else alone.params.params
    ours = leaves(tmp_path / "models" / f"threshold-{thresholds[1]}-seed-0")
    for a, b in zip(ours, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if found["floor"]:
        # Of the threshold that asks for more, the floor is higher.
        by_text = {one["threshold"]: one["value"] for one in found["floor"]}
        assert set(by_text) == set(thresholds)


@pytest.mark.parametrize(
    ("more", "given"),
    [
        ({}, {"thresholds": ("0.9x", "0.5x")}),
        (
            {"train": "full", "estimator": "stop_gradient", "minibatches": 2},
            {"thresholds": ("1x",)},
        ),
        ({"formulation": "likelihood"}, {"thresholds": ("0.9x", "0.5x")}),
        ({"method": "esd", "corrections": 3}, {"strengths": (0.5, 2.0)}),
        ({"method": "equal-weights", "corrections": 3}, {"strengths": (0.5, 0.2)}),
    ],
)
def test_every_kind_of_concept_is_a_stacked_problem(tiny_model, tmp_path, monkeypatch, more, given):
    """The program is traced, of shapes alone; nothing is measured or stored."""

    def evaluator(request, options, shows):
        cond = np.tile(np.array([*concept_evaluation.compared(request)]), 4)
        values = 1.0 + np.arange(len(cond), dtype=np.float32)[:, None]
        found = concept_evaluation.Measurements(cond, values[:, 0], cond, values)
        return lambda params: found

    def only_shapes(algorithm, start, thresholds, **named):
        return jax.eval_shape(
            lambda start: sweep_init(algorithm, start, thresholds, **named), start
        )

    monkeypatch.setattr(concepts, "evaluator", evaluator)
    unmeasured = concept_formulations.unmeasured_samples
    monkeypatch.setattr(
        concepts, "stored_samples", lambda request, options, judged: unmeasured(request, options)
    )
    monkeypatch.setattr(sweeps, "sweep_init", only_shapes)
    asked = SweepOptions("concept", seeds=(0, 1), **given)
    options = of_labels(tiny_model, tmp_path, evaluation_images=8, **more)
    asked.validate()
    options = asked.applied(options)
    request, points = request_of(options), asked.points(options)
    task = running.TASKS[concept_request.ConceptRequest](request, options, None)
    problems = sweeps._problems(points, task, options, None, 1)
    states, infos = jax.eval_shape(problems.step, problems.states, problems.batch(0))
    kinds = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        for tree in (states, problems.states)
    ]
    assert kinds[0] == kinds[1]
    assert infos.finite.shape == (len(points),)
    # What is measured is told against each problem's own threshold.
    thresholds = [float(one.thresholds[0]) for one in problems.tasks]
    if "thresholds" in given:
        asked_for = [float(text[:-1]) for text in given["thresholds"] for _ in range(2)]
        np.testing.assert_allclose(np.divide(thresholds, thresholds[0]),
                                   np.divide(asked_for, asked_for[0]), rtol=1e-5)  # fmt: skip
        found = [one.measure(request.pretrained.params) for one in problems.tasks]
        violation = [one.metrics["violation"]["dog"]["dog"].value for one in found]
        changed = np.array(violation) - violation[0]
        sign = -1 if options.formulation == "likelihood" else 1
        np.testing.assert_allclose(
            changed, sign * np.subtract(thresholds, thresholds[0]), rtol=1e-5
        )
    if options.method == "equal-weights":
        assert [float(one.multipliers[0]) for one in problems.tasks] == pytest.approx(
            [0.5, 0.5, 0.2, 0.2]
        )


KILLED = """
import os, signal, sys
from jax_unlearn.app.sweep import run
original = run.sweep
def killing(*args, **kwargs):
    def after_step(step):
        if step == 3:
            os.kill(os.getpid(), signal.{signal})
    return original(*args, **kwargs, after_step=after_step)
run.sweep = killing
from jax_unlearn.app import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigint_saves_and_says_how_to_go_on(tiny_model, tiny_images, tmp_path, capsys):
    given = ["sweep", "data", "--model", str(tiny_model), "--out", str(tmp_path / "out")]
    for name, value in {**SMALL, **tiny_images}.items():
        given += [f"--{name.replace('_', '-')}", str(value)]
    given += ["--thresholds", "1.2x", "1.5x", "--at-once", "1", "--seeds=0"]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-c", KILLED.replace("{signal}", "SIGINT"), *given],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 128 + signal.SIGINT, ran.stderr
    assert "Traceback" not in ran.stderr
    said = re.search(r"Go on with: jax-unlearn (sweep data --out \S+ --resume)", ran.stderr)
    assert cli.main([*said[1].split(), "--thresholds", "1.2x", "1.4x"]) == 2
    assert "--thresholds: ['1.2x', '1.5x'], now ['1.2x', '1.4x']" in capsys.readouterr().err
    assert cli.main(said[1].split()) == 0
    shown = capsys.readouterr().out
    assert "hypervolume" in shown
    assert "fronts.json" in shown
    found = json.loads((tmp_path / "out" / "fronts.json").read_text())
    assert [one["threshold"] for one in found["problems"]] == ["1.2x", "1.5x"]
    assert "nelbo" in found["problems"][0]["metrics"]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_a_problem_that_is_lost_is_told_and_takes_no_other_with_it(
    tiny_model, tiny_images, tmp_path, cheap, monkeypatch
):
    at = sweeps.sweep_init

    def ruined(*given, **named):
        states = at(*given, **named)
        thresholds = states.thresholds.at[1].set(jnp.nan)
        return states._replace(thresholds=thresholds)

    monkeypatch.setattr(sweeps, "sweep_init", ruined)
    found = swept(ASKED, of_images(tiny_model, tiny_images, tmp_path))
    lost = "step 1: a loss or gradient was not finite"
    assert [one.get("lost") for one in found["problems"]] == [None, lost, None, None]
    assert [one["seeds"] for one in found["curve"]] == [1, 2]
    assert f"threshold-1.2x-seed-5: {lost}" in made.table(found)


# ---- numbers


def task_of(sign, thresholds, before, units=("nats", "nats")):
    count = len(thresholds)
    return types.SimpleNamespace(
        names=tuple("abc"[:count]),
        problem=types.SimpleNamespace(sign=sign, name="any"),
        thresholds=np.array(thresholds),
        baseline=None,
        units=units,
        objective="price",
        formula="",
        before=types.SimpleNamespace(
            constraints=Estimate(np.array(before), np.full(count, 0.1)),
            objective=Estimate(0.0, 0.0),
        ),
    )


def measured(values, objective, floor=None):
    constraints = [{"value": v, "stderr": 0.1, "name": n} for n, v in zip("abc", values)]  # noqa: B905
    found = {
        "constraints": constraints,
        "objective": {"value": objective, "stderr": 0.01},
        "feasible": True,
    }
    return found if floor is None else found | {"floor": {"value": floor, "stderr": 0.02}}


def test_fronts_of_one_constraint_over_seeds():
    asked = SweepOptions("concept", ("0.5x", "1x"), (), (0, 1), reference_point=(0.0, 3.0))
    options = ConceptOptions()
    tasks = [task_of(1.0, [b], [0.0]) for b in (2.0, 2.0, 4.0, 4.0)]
    values = [([2.0], 1.0, 0.5), ([2.2], 1.2, 0.5), ([4.0], 2.0, 1.5), ([1.0], 2.5, 1.5)]
    found = made.describe(
        asked.points(options), tasks, [measured(*one) for one in values], asked, options
    )
    assert [one["dominated"] for one in found["problems"]] == [False, False, False, True]
    # By hand: the rectangles up to (0, 3) of seed 0 are 2 × 2 and 2 × 1 more; of seed 1, 2.2 × 1.8.
    volume = found["hypervolume"]
    assert volume["by_seed"] == {"0": pytest.approx(6.0), "1": pytest.approx(3.96)}
    expected = metrics.mean_interval([6.0, 3.96])
    assert volume["value"] == pytest.approx(4.98)
    assert volume["low"] == pytest.approx(expected.low)
    assert [one["forgotten"]["value"] for one in found["curve"]] == pytest.approx([2.1, 2.5])
    assert [one["objective"]["value"] for one in found["curve"]] == pytest.approx([1.1, 2.25])
    assert [(one["forgotten"], one["value"]) for one in found["floor"]] == [(2.0, 0.5), (4.0, 1.5)]
    assert found["axes"]["forgotten"]["more_is"] == "larger"
    assert "4.98" in made.table(found)


def test_the_worst_of_many_constraints_counts_in_its_unit():
    """Shares that must fall to a tenth of 0.5 and of 0.2: the second has fallen less."""
    asked = SweepOptions("concept", ("0.1x",))
    options = ConceptOptions(seed=3)
    task = task_of(-1.0, [0.05, 0.02], [0.5, 0.2], ("nats", "share"))
    found = made.describe(
        asked.points(options), [task], [measured([0.04, 0.03], 1.0, 0.2)], asked, options
    )
    (one,) = found["problems"]
    assert one["seed"] == 3
    assert one["forgotten"]["value"] == pytest.approx(0.15)
    assert one["forgotten"]["stderr"] == pytest.approx(0.5)
    assert found["floor"][0]["forgotten"] == pytest.approx(0.1)
    assert found["axes"]["forgotten"]["more_is"] == "smaller"
    assert found["reference"]["forgotten"]["value"] == pytest.approx(1.0)
    assert found["curve"][0]["objective"]["low"] is None
    numbers = SweepOptions("concept", ("0.05",))
    found = made.describe(
        numbers.points(options), [task], [measured([0.04, 0.03], 1.0)], numbers, options
    )
    assert found["problems"][0]["forgotten"]["value"] == pytest.approx(0.04)
    assert found["floor"] == []


def test_multipliers_move_relative_to_the_thresholds_of_the_state():
    options = ConceptOptions(dual_learning_rate=0.3, dual_damping=0.2)
    thresholds, violations = jnp.array([0.5, 2.0]), jnp.array([0.1, -0.4])
    dual = controller(options, lambda b: b)
    plain = multipliers.nu_pi(0.3 / thresholds / 2, proportional=0.2 / thresholds / 2, nu=0.9)
    state, other = dual.init(jnp.zeros(2)), plain.init(jnp.zeros(2))
    for scale in (1.0, 0.5, -2.0):
        ours, state = dual.update(-scale * violations, state, thresholds=thresholds)
        theirs, other = plain.update(-scale * violations, other)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# ---- what does not fit


def test_a_sweep_that_does_not_fit_says_how_much_would(tiny_model, tmp_path):
    pretrained = load_pretrained(tiny_model)
    count = 4 * sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
    options = of_labels(tiny_model, tmp_path)
    row = 16 * 2 * 4 * 64  # The larger part of a batch.

    def check(problems, devices, at_once, sizes):
        memory.check_sweep(
            pretrained, options, problems=problems, devices=devices, at_once=at_once,
            memory=memory.Memory(*sizes),
        )  # fmt: skip

    # The reference, two moments and parameters of four, twice, and a gradient of one.
    least = count * (1 + 2 * 3 * 4 + 1) + row
    check(4, 1, 1, (least,))
    check(8, 2, 1, (10**12, least))
    with pytest.raises(ValueError, match=r"4 problems, 1 at.* 3 problems fit, with --at-once 1"):
        check(4, 1, 1, (least - 1,))
    with pytest.raises(ValueError, match="6 problems fit"):
        check(8, 2, 1, (10**12, least - 1))
    with pytest.raises(ValueError, match=r"4 problems, 4 at once.*They fit with --at-once 2"):
        check(4, 1, 4, (least + count + row,))
    # Devices of one machine share its memory.
    check(8, 2, 1, (2 * least,))
    with pytest.raises(ValueError, match="this machine has"):
        check(8, 2, 1, (2 * least - 1,))
    with pytest.raises(ValueError, match="Not even 1 fit"):
        check(1, 1, 1, (count,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sample"], "concept or data"),
        (["concept", "--forget", "dog"], "--thresholds is missing"),
        (["concept", "--forget", "dog", "--thresholds"], "--thresholds needs a value"),
        (["concept", "--forget", "dog", "--thresholds", "0.5x", "0.50x"], "0.50x is given twice"),
        (["concept", "--forget", "dog", "--thresholds", "0.5x", "2"], "all ratios"),
        (["concept", "--forget", "dog", "--thresholds", "0.5x", "calibrated"], "calibrated alone"),
        (["concept", "--forget", "dog", "--thresholds", "many"], "threshold 'many'"),
        (["concept", "--forget", "dog", "--thresholds", "1x", "--strengths", "1"], "one of them"),
        (["concept", "--forget", "dog", "--strengths", "1"], "--strengths are of a --method"),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "--threshold", "2x"],
            "leave --threshold out",
        ),
        (
            ["concept", "--method", "esd", "--strengths", "1", "--strength", "2"],
            "leave --strength out",
        ),
        (
            ["concept", "--forget", "dog", "--method", "esd", "--thresholds", "1x"],
            "--method esd does not see",
        ),
        (["concept", "--forget", "dog", "--method", "esd"], "--strengths is missing"),
        (
            ["concept", "--forget", "dog", "--method", "esd", "--strengths", "1", "-1"],
            "must be 0 or more",
        ),
        (
            ["concept", "--forget", "dog", "--method", "esd", "--strengths", "1", "1.0"],
            "1.0 is given twice",
        ),
        (["concept", "--forget", "dog", "--thresholds", "1x", "--seeds", "1", "1"], "given twice"),
        (["concept", "--forget", "dog", "--thresholds", "1x", "--seeds", "-1"], "--seed must lie"),
        (["concept", "--forget", "dog", "--thresholds", "1x", "--at-once", "0"], "--at-once must"),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "2x", "3x", "--at-once", "2"],
            "does not divide the 1 problems of a device",
        ),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "2x", "3x", "--mesh", "data=8"],
            "3 problems do not divide over 8 devices. Without --mesh they take 3",
        ),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "2x", "--mesh", "fsdp=8"],
            "over data alone",
        ),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "--reference-point", "1"],
            "two finite numbers",
        ),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "--coordinator", "auto"],
            "--coordinator is of one run",
        ),
        (
            ["concept", "--forget", "dog", "--thresholds", "1x", "--parallel", "pmap"],
            "pmap is of one run",
        ),
        (["concept", "--thresholds", "1x"], "--forget is missing"),
        (["concept", "--out", "nowhere", "--resume"], "nothing to resume"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line_before_anything_is_loaded(
    given, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", None)
    assert cli.main(["sweep", *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_names_of_problems_are_those_of_folders():
    point = Point("0.5x", None, 3)
    assert sweeps.folder_of(pathlib.Path("o"), point).as_posix() == "o/models/threshold-0.5x-seed-3"
    assert Point(None, 1e-05, 0).name == "strength-1e-05-seed-0"
    assert Point(None, None, 2).name == "seed-2"
