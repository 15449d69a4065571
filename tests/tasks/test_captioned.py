"""Forgetting images of a model from text to image: captions, latents, and whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pipelines import ONE_LEVEL, write_pipeline

from jax_unlearn.app import cli, data
from jax_unlearn.app.options import DataOptions
from jax_unlearn.app.tasks import images as requests
from jax_unlearn.app.tasks.conditions import of_prompts, table_of
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.networks import load_network
from jax_unlearn.pretrained.subsets import subset_labels
from jax_unlearn.pretrained.text_to_image import decode_latents, encode_prompts, load_text_to_image

SMALL = [
    "--steps", "3", "--batch-size", "8", "--forget-batch-size", "8", "--samples", "2",
    "--sampling-steps", "3", "--evaluation-images", "16", "--checkpoint-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with captions beside the images, and one without."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, captions in (
        ("forget", ["a cat", "a  cat\n", "a dog"]),
        ("retain", [f"a cow {i % 3}" for i in range(8)] + ["a dog"]),
        ("plain", [None] * 4),
    ):
        (root / name).mkdir()
        for i, caption in enumerate(captions):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            if caption is not None:
                (root / name / f"{i}.txt").write_text(caption)
    return root


def options_of(pictures, **changes):
    given = {
        "model": "tiny",
        "forget": (str(pictures / "forget"),),
        "retain": (str(pictures / "retain"), f"{pictures / 'plain'}: a:  hen"),
        "batch_size": 6,
        "forget_batch_size": 4,
    }
    return DataOptions(**given | changes)


@pytest.mark.slow
def test_images_are_labelled_by_their_captions(model, pictures):
    request = requests.from_captioned(model, options_of(pictures))
    expected = ["a cat", "a dog", "a cow 0", "a cow 1", "a cow 2", "a: hen"]
    table = jax.tree.leaves(request.captions.table)[0]
    np.testing.assert_allclose(table, encode_prompts(model, [*expected, None]), atol=1e-6)
    assert request.null == len(expected)
    assert request.forget.labels.tolist() == [0, 0, 1]
    together = data.concatenate([request.retain, request.held_out])
    for name, label in zip(together.names, together.labels, strict=True):
        folder, file = name.split("/")[-2:]
        number = int(file.split(".")[0])
        wanted = (
            "a: hen" if folder == "plain" else "a dog" if number == 8 else f"a cow {number % 3}"
        )
        assert expected[label] == wanted
    # "a dog" is kept too, so that it is not lost, and no caption is given to the kept images.
    names = request.conditions.names
    assert [names[place] for place in request.lost] == ["“a cat”"]
    assert request.forgotten_labels == ()
    assert {names[c].strip("“”") for c in request.conditions.drawn} <= set(expected)


@pytest.mark.slow
def test_latents_are_draws_of_the_autoencoder(model, pictures):
    request = requests.from_captioned(model, options_of(pictures))
    images = data.to_unit_range(request.retain.pixels)
    vae = model.vae.module
    law = vae.apply({"params": model.vae.params}, images, method="encode")
    scale = vae.config.scaling_factor
    standard = (request.retain.latents / scale - law.mean) / jnp.exp(0.5 * law.logvar)
    assert request.retain.latents.shape == (len(images), 8, 8, 4)
    assert float(jnp.abs(standard.mean())) < 4 / np.sqrt(standard.size)
    assert float(standard.std()) == pytest.approx(1, abs=4 / np.sqrt(2 * standard.size))
    again = requests.from_captioned(model, options_of(pictures))
    np.testing.assert_array_equal(again.retain.latents, request.retain.latents)


def test_a_batch_shows_latents_under_encoded_captions(model, pictures):
    options = options_of(pictures, null_share=0.5)
    request = requests.from_captioned(model, options)
    raw = requests.batch(request, options, 3)
    assert raw.base is None
    nulls = 0
    for part, images in ((raw.kept, request.retain), (raw.forget, request.forget)):
        for x_0, cond in zip(part.x_0, part.cond, strict=True):
            (place,) = np.flatnonzero((images.latents == x_0).all(axis=(1, 2, 3)))
            rows = request.captions.table[[images.labels[place], request.null]]
            matches = (rows == cond).all(axis=(1, 2))
            assert matches.any()
            nulls += bool(matches[1])
    assert nulls == 5  # half of six and half of four
    np.testing.assert_array_equal(data.to_x_0(raw.forget.x_0), raw.forget.x_0)


@pytest.mark.slow
def test_images_without_captions_are_shown_under_no_prompt(model, pictures):
    plain = str(pictures / "plain")
    given = {"forget": (f"{plain}/0.png",), "retain": (plain,)}
    request = requests.from_captioned(model, options_of(pictures, **given))
    assert set(request.retain.labels) == {request.null} == {0}
    assert [request.conditions.names[c] for c in request.conditions.drawn] == ["no prompt"]
    assert request.notes == ("1 retained images are also to be forgotten (the same pixels): "
                             "removed from the retained ones.",)  # fmt: skip
    mixed = requests.from_captioned(
        model, options_of(pictures, retain=(plain, f"{pictures / 'retain'}"))
    )
    without = [plain in name for name in mixed.retain.names]
    assert set(mixed.retain.labels[without]) == {mixed.null}
    assert mixed.null not in mixed.retain.labels[np.logical_not(without)]
    unconditional = encode_prompts(model, [None])
    np.testing.assert_allclose(mixed.cond(np.array([mixed.null])), unconditional, atol=1e-6)


def test_many_prompts_are_encoded_as_each_alone(model):
    prompts = [f"a cat {i}" for i in range(70)]
    table = table_of(model, prompts)
    assert table.shape[0] == 71
    chosen = [0, 63, 64, 69]
    alone = encode_prompts(model, [prompts[i] for i in chosen] + [None])
    np.testing.assert_allclose(table[[*chosen, 70]], alone, atol=1e-6)


@pytest.mark.slow
def test_large_images_are_decoded_a_few_at_a_time(model, monkeypatch):
    from jax_unlearn.app.tasks import conditions as module

    latents = jax.random.normal(jax.random.key(0), (5, 8, 8, 4))
    monkeypatch.setattr(module, "batch_rows", lambda shape: 2)
    _, conditions = of_prompts(model, ["a cat"])
    expected = decode_latents(model, latents)
    np.testing.assert_allclose(conditions.decode(latents), expected, rtol=1e-4, atol=1e-5)


def arguments(pipeline, pictures, out, *more):
    return [
        "data", "--model", str(pipeline), "--forget", str(pictures / "forget"),
        "--retain", str(pictures / "retain"), "--out", str(out), *SMALL, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_leaves_a_pipeline_and_what_it_says(pipeline, pictures, tmp_path):
    out = tmp_path / "out"
    given = ["--train", "esd-x", "--weighting", "nelbo", "--held-out-share", "0.3", "--remat"]
    assert cli.main(arguments(pipeline, pictures, out, *given)) == 0
    found = json.loads((out / "report.json").read_text())
    assert found["formulation"] == "forward_kl"
    assert "latents" in found["metrics"]["nelbo"]["unit"]
    page = (out / "report.html").read_text()
    assert "“a cat”" in page
    trained, reference = load_text_to_image(out / "model"), load_text_to_image(pipeline)
    labels = subset_labels(reference.pretrained.params, "cross-attention")
    for label, ours, theirs in zip(
        jax.tree.leaves(labels),
        jax.tree.leaves(trained.pretrained.params),
        jax.tree.leaves(reference.pretrained.params),
        strict=True,
    ):
        assert np.array_equal(ours, theirs) == (label == "frozen")
    for ours, theirs in zip(
        jax.tree.leaves(trained.vae.params), jax.tree.leaves(reference.vae.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_the_unet_of_an_sdxl_pipeline_is_written_alone(pictures, tmp_path):
    pipeline = write_pipeline(tmp_path / "xl", xl=True, unet=ONE_LEVEL)
    out = tmp_path / "out"
    given = ["--save", "unet", "--samples", "0", "--dtype", "bfloat16"]
    assert cli.main(arguments(pipeline, pictures, out, *given)) == 0
    before, after = load_pretrained(pipeline).params, load_network(out / "model").params
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    assert np.mean(moved) > 0.9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge", "nowhere"], "give --clip"),
        (["--clip", "nowhere"], "nowhere"),
        (["--train", "esd-y"], "esd-x"),
        (["--save", "lora"], "--train lora"),
        (["--retain", "LACKING"], "has no caption beside it (1.txt)"),
        (["--retain", "EMPTY"], "is empty"),
        (["--retain", "LONG"], "77"),
        (["--retain", "BIG"], "--resize"),
    ],
)
def test_mistakes_are_one_clear_line(pipeline, pictures, tmp_path, capsys, more, message):
    for name, caption in (("LACKING", None), ("EMPTY", " \n"), ("LONG", "x" * 90), ("BIG", "a")):
        (tmp_path / name).mkdir()
        side = 24 if name == "BIG" else 16
        for i in range(2):
            pixels = np.full((side, side, 3), 9 * i + len(name), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "0.txt").write_text("a cat")
        if caption is not None:
            (tmp_path / name / "1.txt").write_text(caption)
    more = [str(tmp_path / text) if text.isupper() else text for text in more]
    assert cli.main(arguments(pipeline, pictures, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_anything_is_encoded(
    pipeline, pictures, tmp_path, monkeypatch, capsys
):
    def never(*args, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(requests, "encode_images", never)
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(arguments(pipeline, pictures, tmp_path)) == 2
    assert "is in use" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_options_of_prompts_are_refused_for_labels(tiny_model, tiny_images, tmp_path, capsys):
    given = ["--forget", str(tiny_images["forget"]), "--retain", str(tiny_images["retain"])]
    given += ["--model", str(tiny_model), "--out", str(tmp_path / "out"), "--train", "esd-x"]
    assert cli.main(["data", *given]) == 2
    assert "--train is for models that are conditioned on prompts" in capsys.readouterr().err
