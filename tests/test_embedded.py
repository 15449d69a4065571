import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import jax_unlearn
from jax_unlearn.app import embedded
from jax_unlearn.app.data import to_unit_range
from jax_unlearn.app.embedded import captions
from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.tasks.conditions import of_prompts
from jax_unlearn.app.tasks.drawing import drawing
from jax_unlearn.pretrained.clip import load_clip, zero_shot
from jax_unlearn.pretrained.text_to_image import load_text_to_image

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "unet_2d"


@pytest.fixture(scope="module")
def data():
    return embedded.load_data()


def test_sizes_and_balance(data):
    for images, per_label in ((data.train, 600), (data.held_out, 300)):
        assert images.pixels.shape == (10 * per_label, 28, 28, 1)
        assert images.pixels.dtype == np.uint8
        assert images.labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(images.labels), np.full(10, per_label))


def test_no_image_is_there_twice(data):
    both = np.concatenate([data.train.pixels, data.held_out.pixels])
    assert len({image.tobytes() for image in both}) == 9_000


def test_repeated_images_are_sixteen_at_most_two_of_a_label(data):
    assert data.repeated.shape == (16,)
    assert len(set(data.repeated.tolist())) == 16
    assert np.bincount(data.train.labels[data.repeated]).max() == 2


def test_the_judge_knows_the_held_out_images(data):
    logits = embedded.judge().logits(data.held_out.pixels / np.float32(127.5) - 1)
    right = np.asarray(logits).argmax(axis=1) == data.held_out.labels
    rates = [right[data.held_out.labels == label].mean() for label in range(10)]
    assert np.mean(rates) >= 0.91
    assert min(rates) >= 0.7


def test_features_are_penultimate(data):
    features = embedded.judge().features(data.held_out.pixels[:5] / np.float32(127.5) - 1)
    assert features.shape == (5, 64)
    assert (np.asarray(features) >= 0).all()


def test_the_package_data_stay_small_and_licensed():
    folder = pathlib.Path(embedded.__file__).parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    text = [
        path for path in files if "text" in str(path.relative_to(folder)) or "clip" in path.parts
    ]
    for part in (text, [path for path in files if path not in text]):
        assert 1e6 < sum(path.stat().st_size for path in part) < 12e6
    assert "Zalando" in (folder / "LICENSE.txt").read_text()


def test_model_path_says_how_to_make_a_missing_model(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="train_embedded_model"):
        embedded.model_path()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert embedded.model_path() == tmp_path / "model"


def _example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.torch
def test_the_judge_holds_out_what_the_model_holds_out(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setitem(sys.modules, "train_judge", None)
    monkeypatch.setitem(sys.modules, "train_embedded_model", None)
    labels = np.random.default_rng(0).integers(10, size=60_000).astype(np.uint8)
    splits = (_example(name).split(labels) for name in ("train_judge", "train_embedded_model"))
    for ours, theirs in zip(*splits, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_embedded_model_predicts_what_torch_diffusers_does():
    """The whole model against outputs that write_unet_fixtures.py stored with torch."""
    model = jax_unlearn.load_pretrained(embedded.model_path())
    with np.load(FIXTURES / "embedded.npz") as stored, jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)(model.params, stored["x_t"], stored["t"], stored["cond"])
        error = np.linalg.norm(ours - stored["output"]) / np.linalg.norm(stored["output"])
    assert error < 1e-5
    assert model.config.null_label == 10
    assert model.config.id2label[1] == "Trouser"


def test_captions_render_images_that_their_judge_names():
    held_out = embedded.load_data().held_out
    logits = embedded.text_judge().logits
    objects = held_out.labels[:200]
    right = []
    for number, style in enumerate(captions.STYLES):
        images = to_unit_range(captions.render(held_out.pixels[:200], style))
        right.append(np.asarray(logits(images)).argmax(axis=1) == 4 * objects + number)
    assert np.mean(right) > 0.85
    with pytest.raises(ValueError, match="photo"):
        captions.render(held_out.pixels[:2], "fresco")


def test_what_is_forgotten_is_neither_retained_nor_an_anchor():
    for names, count in ((("sneaker", "bag"), 32), (("blueprint",), 30), (("ankle boot",), 36)):
        found = captions.forgetting(names)
        assert len(found["retain"]) == len(set(found["retain"])) == count
        assert not any(name in text.split() for name in names for text in found["retain"])
        assert found["anchor"] not in names
        assert not set(found["show"]) & set(found["retain"])
    assert captions.forgetting(["bag"])["forget"] == ("bag|handbag",)
    for names in ([], ["hat"], ["bag", "photo"], captions.STYLES):
        with pytest.raises(ValueError, match="forget some of"):
            captions.forgetting(names)


@pytest.mark.slow
def test_the_embedded_pipeline_follows_its_prompts():
    model = load_text_to_image(embedded.text_model_path())
    objects, styles = ("trousers", "bag", "sandal"), captions.STYLES
    prompts = [captions.caption(name, style) for name in objects for style in styles]
    pretrained, conditions = of_prompts(model, prompts)
    options = RunOptions(samples=4, sampling_steps=12)
    samples = drawing(pretrained, conditions, options, None, ()).draw(pretrained.params)
    images = to_unit_range(samples.reshape(-1, *model.image_shape))
    named = np.asarray(embedded.text_judge().logits(images)).argmax(axis=1).reshape(12, 4)
    wanted = [4 * captions.OBJECTS.index(o) + s for o in objects for s in range(len(styles))]
    assert (named == np.array(wanted)[:, None]).mean() > 0.85
    clip = zero_shot(load_clip(embedded.clip_path()), prompts)
    fits = np.asarray(clip.logits(images)).argmax(axis=1).reshape(12, 4)
    assert (fits == np.arange(12)[:, None]).mean() > 0.7
