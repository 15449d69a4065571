"""Plans of tiny models: the same step as a run's, without its weights, and what is said of it."""

import dataclasses
import json
import math
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import ONE_LEVEL, write_pipeline
from tiny_models import write_tiny_model

from jax_unlearn.app import cli
from jax_unlearn.app.algorithm import algorithm_of
from jax_unlearn.app.options import ConceptOptions, DataOptions
from jax_unlearn.app.plan import plan as plans
from jax_unlearn.app.plan import without_weights, worker
from jax_unlearn.app.plan.chips import CHIPS, Chip, larger, parse_topology
from jax_unlearn.app.plan.options import PlanOptions
from jax_unlearn.app.plan.plan import Plan, plan, table
from jax_unlearn.app.tasks import (
    any_condition,
    concept_evaluation,
    concept_formulations,
    image_task,
    images,
)
from jax_unlearn.app.tasks.base import Measured
from jax_unlearn.app.tasks.evaluation import Evaluation
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.typing import Estimate

SMALL = {
    "steps": 6, "batch_size": 8, "forget_batch_size": 8, "samples": 2, "sampling_steps": 3,
    "evaluation_images": 16, "chain_steps": 2, "stored_samples": 16, "classifier_draws": 2,
    "target_steps": 3,
}  # fmt: skip
LABELS = {"forget": ("dog",), "threshold": ("0.5",)}
PROMPTS = {"forget": ("cat|kitty", "dog"), "threshold": ("0.5",), "retain": ("a hen",)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny", unet=ONE_LEVEL)


@pytest.fixture(scope="module")
def bare(pipeline, tmp_path_factory):
    """Of the pipeline what a plan may read: the json files of the denoiser and its noise."""
    folder = tmp_path_factory.mktemp("bare")
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        (folder / part).parent.mkdir()
        shutil.copy(pipeline / part, folder / part)
    return folder


def of_images(tiny_model, tiny_images, **more):
    sources = {name: (str(path),) for name, path in tiny_images.items()}
    given = {"steps": 6, "batch_size": 64, "forget_batch_size": 32} | sources | more
    return DataOptions(model=str(tiny_model), **given)


def parameters(folder):
    """Bytes of all arrays that a safetensors file's header lists."""
    with (folder / "unet" / "diffusion_pytorch_model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return sum(4 * math.prod(one["shape"]) for one in header.values())


def sizes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


# ---- the step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "more"),
    [
        (True, {}),
        (True, {"formulation": "likelihood"}),
        (True, {"formulation": "without"}),
        (False, {"train": "cross-attention"}),
        (False, {"train": "lora:2", "estimator": "stop_gradient", "minibatches": 2}),
        (False, {"formulation": "likelihood", "target_steps": 0, "corrections": 0}),
        (False, {"formulation": "without", "train": "lora:2"}),
    ],
)
def test_a_step_takes_the_shapes_that_it_leaves(tiny_model, bare, labels, more):
    given = {"model": str(tiny_model if labels else bare), **(LABELS if labels else PROMPTS)}
    step = without_weights.step_of(ConceptOptions(**(SMALL | given | more)), 8)
    state, info = jax.eval_shape(step.function, *step.arguments)
    assert sizes(state) == sizes(step.arguments[1])
    assert info.values.shape == (1 if labels else 2,)
    corrected = more.get("formulation") == "likelihood" and more.get("corrections", 3)
    assert step.dual_share == (3 / 6 if corrected else 0)


def only_traced(function, key, *rows, size=None):
    """As `in_batches`, but that nothing is computed: zeros of the shapes that come out."""
    return jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, key, *rows)
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 3])
def test_unmeasured_samples_have_the_shapes_of_stored_ones(bare, monkeypatch, steps):
    monkeypatch.setattr(concept_formulations, "in_batches", only_traced)
    given = SMALL | PROMPTS | {"target_steps": steps, "stored_samples": 12}
    options = ConceptOptions(model=str(bare), **given)
    request = without_weights.request_of(options)
    stored = concept_formulations.stored_samples(
        request, options, concept_evaluation.judging(request, options)
    )
    assumed = concept_formulations.unmeasured_samples(request, options)
    assert sizes(stored._replace(confusion=None)) == sizes(assumed._replace(confusion=None))
    assert (stored.confusion is None) == (assumed.confusion is None) == (steps == 0)


def test_unmeasured_points_have_the_shapes_of_stored_ones(tiny_model, monkeypatch):
    monkeypatch.setattr(any_condition, "in_batches", only_traced)
    given = SMALL | LABELS | {"forget": ("dog", "cat"), "formulation": "without"}
    options = ConceptOptions(model=str(tiny_model), **given)
    request, count = without_weights.request_of(options), options.stored_samples
    points = any_condition.point_maker(request, options)(count, count, 7)
    assert sizes(points) == sizes(any_condition.unmeasured_points(request, options))


@pytest.mark.slow
def test_the_step_of_data_is_that_of_the_run(tiny_model, tiny_images, monkeypatch):
    found = Estimate(np.array([0.3]), np.array([0.1]))
    measured = Measured(found, found, {}, {}, None, None)
    evaluation = Evaluation(lambda params: (measured, Estimate(np.array(0.5), 0.1)), None)
    monkeypatch.setattr(image_task, "evaluator", lambda *given: evaluation)
    options = of_images(tiny_model, tiny_images)
    request = images.from_paths(load_pretrained(tiny_model), options)
    task = image_task.image_task(request, options, None)
    algorithm, start, function = algorithm_of(task, options, task.params)
    state = algorithm.init(start, task.thresholds)
    given = (jax.random.key(0), state, request.pretrained.params, (task.batch(0),))
    step = without_weights.step_of(options, 8)
    assert sizes(step.arguments) == sizes(jax.tree.map(jnp.asarray, given))

    def program(function, arguments):
        return str(jax.make_jaxpr(function)(*arguments))

    # The same operations, whatever was measured.
    assert program(step.function, step.arguments) == program(function, given)


@pytest.mark.slow
def test_encoded_prompts_are_as_long_and_wide_as_the_model_takes(bare, tmp_path):
    options = ConceptOptions(model=str(bare), **(SMALL | PROMPTS))
    table = without_weights.request_of(options).pretrained.apply.table
    assert table.shape == (5, 77, 8)
    large = write_pipeline(tmp_path / "xl", xl=True)
    for weights in large.rglob("*.safetensors"):
        weights.unlink()
    table = without_weights.request_of(
        dataclasses.replace(options, model=str(large))
    ).pretrained.apply.table
    found = {name: leaf.shape for name, leaf in table.items()}
    assert found == {
        "encoder_hidden_states": (5, 77, 20), "text_embeds": (5, 10), "time_ids": (5, 6),
    }  # fmt: skip


# ---- the plan


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_images):
    """The plan of a step on one device."""
    return plan(PlanOptions("data", "cpu:1"), of_images(tiny_model, tiny_images), progress=False)


@pytest.fixture(scope="module")
def planned(tiny_model, tiny_images, tmp_path_factory):
    """That on four, by the command line."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    flags = ["--batch-size", "64", "--forget-batch-size", "32", "--steps", "6"]
    sources = [text for name, path in tiny_images.items() for text in (f"--{name}", str(path))]
    given = ["plan", "data", "--model", str(tiny_model), *sources, *flags]
    assert cli.main([*given, "--topology", "cpu:4", "--mesh", "data=4", "--json", str(path)]) == 0
    return Plan(**json.loads(path.read_text()))


def test_arguments_are_the_copies_of_the_parameters(planned, tiny_model):
    # What trains, its two moments, and the reference; beside them a batch of bytes and labels.
    over = planned.memory["arguments_bytes"] - 4 * parameters(tiny_model)
    assert 0 <= over <= 96 / 4 * (64 + 2 * 4) + 300


def test_a_data_parallel_step_sums_what_trains(planned, tiny_model):
    params = parameters(tiny_model)
    assert params <= planned.collectives["all-reduce"]["bytes"] <= params + 200


@pytest.mark.slow
def test_devices_share_the_batch(alone, planned, tiny_model):
    one, four = alone, planned
    assert one.collective_bytes == 0
    over = one.memory["arguments_bytes"] - 4 * parameters(tiny_model)
    assert 0 <= over <= 96 * (64 + 2 * 4) + 300
    assert four.memory["temporaries_bytes"] < 0.5 * one.memory["temporaries_bytes"]
    assert four.flops_per_chip == pytest.approx(one.flops_per_chip / 4, rel=0.02)
    assert four.flops_per_step == 4 * four.flops_per_chip
    assert four.memory["peak_bytes"] < one.memory["peak_bytes"]


def test_the_numbers_of_a_plan_fit_one_another(planned):
    made, memory = planned, planned.memory
    assert memory["fits"] is True
    assert made.suggestion is None
    parts = ("arguments", "temporaries", "outputs", "constants")
    assert memory["peak_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
    assert memory["chip_bytes"] > memory["peak_bytes"]
    assert made.seconds_per_step == max(made.roofline_seconds.values()) > 0
    assert made.chip_hours == pytest.approx(6 * made.seconds_per_step * 4 / 3600)
    assert made.compile_seconds > 0
    assert (made.chips, made.mesh, made.rates_timed_here) == (4, "data=4,fsdp=1,tensor=1", True)
    shown = table(made)
    for part in ("4 × 1/4 of this CPU", "all-reduce", made.bound_by, "It fits.", "lower bound"):
        assert part in shown


@pytest.mark.slow
def test_parameters_over_chips_take_less_of_each(planned, tiny_images, tmp_path):
    wide = write_tiny_model(tmp_path / "model", 32)
    options = dataclasses.replace(of_images(wide, tiny_images), batch_size=64)
    found = {}
    for mesh in ("", "fsdp=4"):
        one = dataclasses.replace(options, mesh=mesh)
        found[mesh] = plan(PlanOptions("data", "cpu:4"), one, progress=False)
    whole, split = found.values()
    assert split.mesh == "data=1,fsdp=4,tensor=1"
    # What is not split is too small, as the page on devices says.
    leaves = [leaf.size for leaf in jax.tree.leaves(load_pretrained(wide).params)]
    least = 4 * 4 * (sum(n for n in leaves if n >= 2048) / 4 + sum(n for n in leaves if n < 2048))
    over = split.memory["arguments_bytes"] - least
    assert 0 <= over <= 96 / 4 * (64 + 2 * 4) + 300
    assert split.memory["arguments_bytes"] < 0.4 * whole.memory["arguments_bytes"]
    # Parameters are gathered where they are used; else only rows of the batch are moved.
    gathered = [one.collectives["all-gather"]["bytes"] for one in (whole, split)]
    assert gathered[0] < 0.1 * 4 * sum(leaves) < gathered[1]


@pytest.mark.slow
def test_what_is_suggested_fits(alone, planned, tiny_model, tiny_images):
    one, four = alone, planned
    between = (one.memory["peak_bytes"] + 2 * four.memory["peak_bytes"]) / 3
    asked = PlanOptions("data", "cpu:1", chip_memory=between / 1e9)
    options = of_images(tiny_model, tiny_images)
    made = plan(asked, options, progress=False)
    assert made.memory["fits"] is False
    suggestion = made.suggestion
    assert suggestion["by"] == "compiled"
    assert suggestion["peak_bytes"] <= between
    assert suggestion["change"] in ("--topology cpu:2", "--topology cpu:4", "--remat")
    flag, _, value = suggestion["change"].partition(" ")
    if flag == "--remat":
        options = dataclasses.replace(options, remat=True)
    else:
        asked = dataclasses.replace(asked, topology=value)
    again = plan(asked, options, progress=False)
    assert again.memory["fits"] is True
    assert again.memory["peak_bytes"] == suggestion["peak_bytes"]


def fake(peaks, seconds):
    """What compiles nothing: peaks by (remat, devices, batch size), arguments of 1 GB."""
    jobs = []

    def compile_in(job):
        chip = Chip("fake", 10e9, 1e12, 1e12, 1e12)._asdict()
        found = {"chip": chip, "chips": job.topology.devices, "arguments": 1e9, "versions": {}}
        found["mesh"] = {"data": job.topology.devices}
        if job.shapes_only:
            return found
        jobs.append(job)
        peak = peaks(job.options.remat, job.topology.devices, job.options.batch_size)
        memory = {
            "arguments": 1e9, "temporaries": peak - 1e9, "outputs": 0, "constants": 0, "peak": peak,
        }  # fmt: skip
        found |= {"memory": memory, "compile_seconds": seconds, "flops": 1e9, "bytes": 1e9}
        return found | {"collectives": {}}

    return compile_in, jobs


def test_changes_are_compiled_where_that_is_cheap_those_that_keep_the_result_first(bare):
    options = ConceptOptions(model=str(bare), **(SMALL | PROMPTS | {"train": "lora:2"}))
    asked = PlanOptions("concept", "v5e:2x2")
    compile_in, jobs = fake(lambda remat, n, batch: 2e9 if batch < 8 else 11e9, 5)
    made = plan(asked, options, progress=False, compile_in=compile_in)
    assert made.suggestion == {
        "change": "--batch-size 4 --forget-batch-size 4",
        "peak_bytes": 2_000_000_000,
        "by": "compiled",
        "tried": [
            "--remat", "--mesh fsdp=2", "--mesh fsdp=4", "--topology v5e:2x4",
            "--batch-size 4 --forget-batch-size 4",
        ],
    }  # fmt: skip
    assert len(jobs) == 6
    compile_in, jobs = fake(lambda remat, n, batch: 9e9 if remat else 11e9, 5)
    made = plan(asked, options, progress=False, compile_in=compile_in)
    assert made.suggestion["change"] == "--remat"
    assert "--remat" in table(made)
    assert "does not fit" in table(made)
    compile_in, jobs = fake(lambda remat, n, batch: 11e9, 5)
    made = plan(asked, options, progress=False, compile_in=compile_in)
    assert made.suggestion is None
    assert "none of the changes" in table(made)


def test_arguments_are_added_up_where_compiling_takes_long(bare):
    options = ConceptOptions(model=str(bare), **(SMALL | PROMPTS))
    compile_in, jobs = fake(lambda remat, n, batch: 13e9, plans.CHEAP + 1)
    asked = PlanOptions("concept", "v5e:2x2")
    made = plan(asked, options, progress=False, compile_in=compile_in)
    assert len(jobs) == 1
    # 1 GB of arguments, and half of 12 GB, by half of the rows a chip.
    assert made.suggestion["change"] == "--topology v5e:2x4"
    assert (made.suggestion["by"], made.suggestion["peak_bytes"]) == ("arithmetic", 7_000_000_000)
    assert "not compiled" in table(made)


def test_a_program_that_the_compiler_refuses_does_not_fit(bare):
    options = ConceptOptions(model=str(bare), **(SMALL | PROMPTS))

    def compile_in(job):
        memory = {"arguments": 1, "temporaries": 2, "outputs": 0, "constants": 0, "peak": 3}
        chip = CHIPS["v5e"]._asdict()
        found = {"chip": chip, "chips": 4, "arguments": 1e99, "versions": {}, "mesh": {"data": 4}}
        return found | {"memory": memory, "compile_seconds": 1.0}

    made = plan(PlanOptions("concept", "v5e:2x2"), options, progress=False, compile_in=compile_in)
    assert made.memory["fits"] is False
    assert made.seconds_per_step is None
    assert "does not fit" in table(made)


# ---- topologies and mistakes


def test_topologies_are_read():
    assert [parse_topology(text).devices for text in ("v5e:16x16", "v5p:2x2x2", "tpu7x:2x2x1")] == [
        256, 8, 8,
    ]  # fmt: skip
    assert [one.text for one in larger(parse_topology("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
    assert [one.text for one in larger(parse_topology("cpu:2"))] == ["cpu:4", "cpu:8", "cpu:16"]
    assert not larger(parse_topology("gpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sample"], "concept or data"),
        (["concept", "--topology", "v9:2x2"], "v5e:4x4"),
        (["concept", "--topology", "v5e:3x3"], "v5e comes as 2x2"),
        (["concept", "--topology", "cpu:0"], "cpu:8"),
        (["concept", "--topology"], "needs a value"),
        (
            ["concept", "--forget", "dog", "--topology", "v5e:2x2", "--mesh", "data=8"],
            "fit the 4 devices",
        ),
        (
            ["concept", "--forget", "dog", "--topology", "cpu:4", "--mesh", "fsdp=3"],
            "fit the 4 devices",
        ),
        (["concept", "--forget", "dog", "--method", "esd"], "not of --method esd"),
        (["concept", "--json", "nowhere/plan.json"], "folder"),
        (["concept", "--chip-memory", "0"], "--chip-memory"),
        (["concept", "--topology", "cpu:8"], "--forget is missing"),
        (["concept", "--forget", "dog", "--steps", "0"], "--steps"),
        (["concept", "--forget", "a", "--train", "esd-u", "--start", "edited"], "--start edited"),
    ],
)
def test_mistakes_are_one_clear_line_before_anything_is_compiled(
    given, message, monkeypatch, capsys
):
    monkeypatch.setattr(plans, "_in_child", None)
    assert cli.main(["plan", *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_help_names_both_parts(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    assert "--topology" in capsys.readouterr().out


@pytest.mark.slow
def test_mistakes_that_only_the_child_sees_are_one_clear_line(tiny_model, tmp_path, capsys):
    given = ["plan", "concept", "--topology", "cpu:3", "--model", str(tiny_model)]
    given += ["--forget", "dog", "--batch-size", "8", "--json", str(tmp_path / "plan.json")]
    assert cli.main(given) == 2
    assert "does not divide over 3 devices" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo warning >&2; echo 'no space' >&2; exit 3", "status 3. It last said: no space\n"),
        ("kill -9 $$", "signal 9 (this machine may lack the memory to compile in).\n"),
    ],
)
def test_a_compiler_that_dies_is_one_clear_line(script, said, monkeypatch, tmp_path, capsys):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(plans.sys, "executable", str(program))
    given = ["plan", "concept", "--model", "m", "--forget", "dog", "--topology", "cpu:1"]
    assert cli.main(given) == 1
    assert capsys.readouterr().err.endswith(f"compiling ended after 0.0 minutes with {said}")


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax_unlearn\[tpu-plan\]"') as caught:
        worker._devices(parse_topology("v5e:2x2"))
    assert "\n" not in str(caught.value)


def test_a_planned_device_is_alone_in_its_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    cpu, tpu, gpu = (
        plans._environment(parse_topology(text)) for text in ("cpu:4", "v5e:2x2", "gpu")
    )
    assert (cpu["JAX_PLATFORMS"], cpu["XLA_FLAGS"]) == ("cpu", "--xla_a=1")
    assert (tpu["TPU_SKIP_MDS_QUERY"], tpu["ALLOW_MULTIPLE_LIBTPU_LOAD"]) == ("1", "1")
    assert tpu["JAX_PLATFORMS"] == "cpu"
    assert "XLA_FLAGS" not in tpu
    assert "JAX_PLATFORMS" not in gpu


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_tpu_is_planned_for_without_one(topology, tiny_model, tiny_images, planned):
    pytest.importorskip("libtpu")
    made = plan(PlanOptions("data", topology), of_images(tiny_model, tiny_images), progress=False)
    assert (made.chips, made.memory["fits"]) == (4, True)
    assert made.memory["chip_bytes"] == CHIPS[topology.partition(":")[0]].memory
    assert made.flops_per_chip == pytest.approx(planned.flops_per_chip, rel=0.1)
    params = parameters(tiny_model)
    assert params <= made.collectives["all-reduce"]["bytes"] <= params + 500
    assert made.memory["arguments_bytes"] >= 4 * params
    assert 0 < made.seconds_per_step < 1e-3
    assert not made.rates_timed_here
