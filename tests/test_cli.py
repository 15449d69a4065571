"""What a user may get wrong: each a clear line, exit 2, and nothing touched."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jax_unlearn.app import cli


@pytest.fixture
def refuse(tiny_model, tiny_images, tmp_path, capsys, monkeypatch):
    """Runs `data` with changes; asserts exit 2 on one line, and that no work was begun."""
    from jax_unlearn.app import run

    def never(*args, **kwargs):
        raise AssertionError("the run was begun")

    monkeypatch.setattr(run, "run", never)

    def check(*more, **changes):
        given = {
            "model": tiny_model,
            "forget": tiny_images["forget"],
            "retain": tiny_images["retain"],
            "out": tmp_path / "out",
        } | changes
        arguments = ["data", *more]
        for name, value in given.items():
            arguments += [f"--{name}", str(value)]
        assert cli.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("jax-unlearn: ")
        assert message.count("\n") == 1, message
        assert "Traceback" not in message
        assert not (tmp_path / "out").exists()
        return message

    return check


def npz(path, labels, size=8, seed=0, channels=None):
    shape = (len(labels), size, size) + (() if channels is None else (channels,))
    images = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    np.savez(path, images=images, labels=np.asarray(labels))
    return path


def test_a_missing_model_folder(refuse, tmp_path):
    assert "nowhere" in refuse(model=tmp_path / "nowhere")


def test_a_missing_image_folder(refuse, tmp_path):
    assert "nowhere" in refuse(forget=tmp_path / "nowhere")


def test_a_folder_without_images(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    assert ".txt" in refuse(retain=tmp_path / "empty")


def test_images_of_the_wrong_size_offer_resize(refuse, tmp_path):
    assert "--resize" in refuse(forget=npz(tmp_path / "big.npz", [1, 1], size=16))


def test_a_truncated_image_is_named(refuse, tmp_path):
    folder = tmp_path / "images" / "dog"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "good.png")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:60])
    assert "torn.png" in refuse(forget=tmp_path / "images")


def test_a_label_that_the_model_does_not_have(refuse, tmp_path):
    message = refuse(forget=npz(tmp_path / "labels.npz", [7, 7]))
    assert "7" in message
    assert "cat" in message


def test_retaining_nothing_but_what_is_to_be_forgotten(refuse, tiny_images):
    assert "retain" in refuse(retain=tiny_images["forget"]).lower()


def test_overlapping_images_are_counted_and_removed(tiny_model, tiny_images, tmp_path):
    from jax_unlearn.app.options import DataOptions
    from jax_unlearn.app.tasks import images as requests
    from jax_unlearn.pretrained import load_pretrained

    with np.load(tiny_images["forget"]) as first, np.load(tiny_images["retain"]) as second:
        np.savez(
            tmp_path / "both.npz",
            images=np.concatenate([first["images"][:5], second["images"]]),
            labels=np.concatenate([first["labels"][:5], second["labels"]]),
        )
    options = DataOptions(
        model=str(tiny_model),
        forget=(str(tiny_images["forget"]),),
        retain=(str(tmp_path / "both.npz"),),
    )
    request = requests.from_paths(load_pretrained(tiny_model), options)
    assert any(note.startswith("5 retained") for note in request.notes)
    assert len(request.retain.pixels) + len(request.held_out.pixels) == 60


@pytest.mark.parametrize("text", ["-1", "0", "nan", "inf", "0x", "twice", "-2x"])
def test_a_threshold_out_of_its_domain(refuse, text):
    assert "threshold" in refuse(f"--threshold={text}")


def test_a_number_of_thresholds_that_does_not_fit(refuse):
    assert "2 thresholds" in refuse("--threshold", "2x", "--threshold", "3x")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--learning-rate", "-1"),
        ("--base-share", "1.5"),
        ("--held-out-share", "1"),
        ("--guidance", "-1"),
        ("--seed", "-1"),
        ("--max-multiplier", "1"),
    ],
)
def test_numbers_out_of_their_domain_name_the_option(refuse, flag, value):
    assert flag in refuse(f"{flag}={value}")


def test_more_sampling_steps_than_the_schedule_has(refuse):
    assert "50 steps" in refuse("--sampling-steps", "51")


def test_a_pair_too_many_for_the_importance_estimator(refuse):
    message = refuse("--estimator", "importance", "--batch-size", "16", "--forget-batch-size", "32")
    assert "importance" in message


def test_pickled_weights(refuse, tiny_model, tmp_path):
    import shutil

    model = tmp_path / "pickled"
    shutil.copytree(tiny_model, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "safetensors" in refuse(model=model)


def test_damaged_weights(refuse, tiny_model, tmp_path):
    import shutil

    model = tmp_path / "damaged"
    shutil.copytree(tiny_model, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "safetensors" in refuse(model=model)


def test_an_option_of_the_network_that_is_not_known(refuse, tiny_model, tmp_path):
    import shutil

    model = tmp_path / "unknown"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"warp_speed": 9}))
    (model / "model.sha256").unlink(missing_ok=True)  # It was changed on purpose.
    assert "warp_speed" in refuse(model=model)


def test_nothing_given_is_named(capsys):
    assert cli.main(["data", "--retain", "x", "--forget", "y"]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_an_unknown_command_shows_the_commands(capsys):
    assert cli.main(["forget"]) == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [None, "", "--xla_force_host_platform_device_count=2"])
def test_convolutions_of_commands_leave_ynnpack_out_unless_the_user_has_set_flags(flags):
    """By what XLA compiles: of the jaxlib that this was measured with, and of no other."""
    script = (
        "from jax_unlearn.app import cli\n"
        "cli._without_ynnpack()\n"
        "import jax, jax.numpy as jnp\n"
        "def convolve(x, k):\n"
        "    return jax.lax.conv_general_dilated(\n"
        "        x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))\n"
        "given = jnp.ones((4, 16, 16, 32)), jnp.ones((3, 3, 32, 32))\n"
        "print('ynn' in jax.jit(convolve).lower(*given).compile().as_text())"
    )
    root = str(pathlib.Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS")
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    if flags is not None:
        environment["XLA_FLAGS"] = flags
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    changed = flags is None and importlib.metadata.version("jaxlib").startswith("0.10.")
    assert done.stdout.strip() == str(not changed)


@pytest.mark.parametrize("given", [["--help"], []])
def test_help_loads_neither_networks_nor_the_parser_of_options(given):
    script = (
        "import sys\n"
        "from jax_unlearn.app.cli import main\n"
        f"code = main({given})\n"
        "print(code, *sorted({'flax', 'tyro', 'orbax'} & set(sys.modules)))"
    )
    root = str(pathlib.Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    usage, last = done.stdout.rstrip().rsplit("\n", 1)
    assert usage.startswith("usage: jax-unlearn COMMAND")
    assert last == ("0" if given else "2")


def test_help_lists_every_option_with_its_default(capsys):
    import dataclasses
    import re

    from jax_unlearn.app.options import DataOptions

    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "--help"])
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for field in dataclasses.fields(DataOptions):
        name = "continue" if field.name == "go_on" else field.name
        assert "--" + name.replace("_", "-") in text
    assert "default: 64" in text


def test_resuming_nothing(capsys, tmp_path):
    assert cli.main(["demo", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_label_of_the_demo_that_is_not_there(capsys, tmp_path):
    assert cli.main(["demo", "--forget", "hat", "--out", str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err
    assert "Trouser" in message
    assert not (tmp_path / "none").exists()


def test_sample_draws_a_picture_and_refuses_to_replace_it(tiny_model, tmp_path, capsys):
    given = ["sample", "--model", str(tiny_model), "--out", str(tmp_path / "grid.png")]
    given += ["--samples", "2", "--steps", "3"]
    assert cli.main(given) == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 64, 3 * 64)
    assert cli.main(given) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main([*given, "--overwrite", "--labels", "dog"]) == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 64, 64)
    assert cli.main([*given, "--overwrite", "--labels", "hat"]) == 2


def test_batches_that_do_not_divide_over_the_devices(refuse):
    # Half of the batch shows retained images under the forgotten label.
    assert "a batch of 12 does not divide over 8 devices" in refuse("--batch-size", "24")
    assert "a batch of 12" in refuse("--forget-batch-size", "12")
