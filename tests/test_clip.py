import json
import pathlib
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from clip_vocabulary import END, VOCABULARY, write_tokenizer
from parity import TOLERANCE, relative_error
from PIL import Image

from jax_unlearn.pretrained.clip import clip_score, embed_images, embed_texts, load_clip, zero_shot

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
GIVEN = dict(np.load(FIXTURES / "clip" / "expected.npz"))
PROMPTS = [str(prompt) for prompt in GIVEN["prompts"]]
PREPROCESSING = {
    "crop_size": {"height": 10, "width": 10},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 10},
}


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of the model and of its tokenizer."""
    folder = tmp_path_factory.mktemp("clip") / "whole"
    shutil.copytree(FIXTURES / "clip", folder)
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def clip(whole):
    return load_clip(whole)


@pytest.fixture
def folder(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tower(folder, name, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{name: config[name] | changes})


def uniform(*shape):
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape).astype(np.float32)


def test_embeddings_equal_torch(clip):
    images, texts = embed_images(clip, GIVEN["images"]), embed_texts(clip, PROMPTS)
    assert relative_error(images, GIVEN["image_embeds"]) < TOLERANCE
    assert relative_error(texts, GIVEN["text_embeds"]) < TOLERANCE
    for vectors in (images, texts):
        assert vectors.shape == (3, 6)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_scores_and_logits_equal_torch(clip):
    judge = zero_shot(clip, PROMPTS)
    assert relative_error(judge.logits(GIVEN["images"]), GIVEN["logits"]) < TOLERANCE
    assert relative_error(judge.features(GIVEN["images"]), GIVEN["image_embeds"]) < TOLERANCE
    cosines = GIVEN["logits"] / np.exp(np.float64(clip.logit_scale))
    assert cosines.min() < 0 < cosines.max()
    for first in range(3):
        order = np.roll(np.arange(3), first)
        scores = clip_score(clip, GIVEN["images"], [PROMPTS[i] for i in order])
        expected = 100 * np.maximum(cosines[np.arange(3), order], 0)
        np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_number_of_labels_is_that_of_the_prompts(clip):
    judge = zero_shot(clip, PROMPTS[:2])
    assert judge.logits(GIVEN["images"]).shape == (3, 2)
    assert judge.features(GIVEN["images"][:1]).shape == (1, 6)


def bicubic(image, height, width):
    """Pillow's, of floats."""
    channels = [
        Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC)
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


@pytest.mark.parametrize("size", [32, 17, 4])
def test_images_of_another_size_are_resized_as_by_pillow(clip, size):
    images = uniform(2, size, size, 3)
    resized = np.stack([np.clip(bicubic(image, 10, 10), -1, 1) for image in images])
    expected = embed_images(clip, resized)
    assert relative_error(embed_images(clip, images), expected) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(20, 33), (15, 8)])
def test_middle_square_of_other_images_is_seen(clip, height, width):
    images = uniform(2, height, width, 3)
    short = min(height, width)
    size = int(10 * height / short), int(10 * width / short)
    top, left = (size[0] - 10) // 2, (size[1] - 10) // 2
    resized = np.stack([np.clip(bicubic(image, *size), -1, 1) for image in images])
    expected = embed_images(clip, resized[:, top : top + 10, left : left + 10])
    assert relative_error(embed_images(clip, images), expected) < TOLERANCE


def write_preprocessing(folder, nested, **changes):
    options = PREPROCESSING | changes
    name = "processor_config.json" if nested else "preprocessor_config.json"
    content = {"image_processor": options} if nested else options
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("nested", [False, True])
def test_pixels_are_normalised_as_the_folder_says(clip, folder, nested):
    write_preprocessing(folder, nested)
    changed = load_clip(folder)
    images = GIVEN["images"]
    mean, std = (np.array(PREPROCESSING[f"image_{name}"]) for name in ("mean", "std"))
    # The other one sees images in [-1, 1] as they are.
    expected = embed_images(clip, ((images + 1) / 2 - mean) / std)
    assert relative_error(embed_images(changed, images), expected) < TOLERANCE
    assert relative_error(embed_images(clip, images), expected) > 1e-2


def test_old_and_unnormalised_preprocessing(clip, folder):
    write_preprocessing(folder, False, size=10, crop_size=10, do_normalize=False)
    found = embed_images(load_clip(folder), GIVEN["images"])
    expected = embed_images(clip, (GIVEN["images"] + 1) / 2)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 224}}, "size {'shortest_edge': 224} is not supported"),
        ({"size": {"height": 10, "width": 10}}, "size {'height': 10, 'width': 10} is not"),
        ({"crop_size": 8}, "crop_size 8 is not supported: expected 10 or"),
        ({"resample": 2}, r"resample 2 is not supported: expected 3\."),
        ({"do_rescale": False}, "do_rescale False is not supported"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0 is not supported"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean must be a list of 3 numbers.* not \[0.5, 0.5\]"),
        ({"image_mean": None}, "image_mean must be a list"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be a list .* positive"),
    ],
)
def test_other_preprocessing_is_refused(folder, changes, message):
    write_preprocessing(folder, False, **changes)
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {message}"):
        load_clip(folder)


def test_old_dictionaries_of_options_win(clip, folder):
    config = json.loads((folder / "config.json").read_text())
    for name in ("text_config", "vision_config"):
        edit_json(folder / "config.json", **{f"{name}_dict": config[name], name: {}})
    loaded = load_clip(folder)
    assert (loaded.text.module, loaded.vision.module) == (clip.text.module, clip.vision.module)


def test_another_folder_has_the_tokenizer(clip, whole):
    loaded = load_clip(FIXTURES / "clip", whole)
    np.testing.assert_array_equal(embed_texts(loaded, PROMPTS), embed_texts(clip, PROMPTS))
    with pytest.raises(ValueError, match="neither vocab.json and merges.txt nor tokenizer.json"):
        load_clip(FIXTURES / "clip")


def test_what_is_fetched_from_the_hub(whole, monkeypatch):
    calls = []

    def fetch(name, *, revision, allow_patterns):
        calls.append((name, allow_patterns))
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_clip("owner/model", "owner/tokenizer")
    assert [name for name, _ in calls] == ["owner/model"] * 2 + ["owner/tokenizer"] * 2
    assert calls[0][1] == calls[2][1] == ["*.json", "README.md"]
    assert calls[1][1] == ["*.json", "README.md", "model*.safetensors", "merges.txt"]
    assert calls[3][1] == ["*.json", "README.md", "merges.txt"]


def test_padding_is_no_longer_than_the_text_tower_takes(clip, folder):
    assert clip.tokenizer.length == 12
    edit_json(folder / "tokenizer_config.json", model_max_length=9)
    shorter = load_clip(folder)
    assert shorter.tokenizer.length == 9
    found = embed_texts(shorter, PROMPTS)
    assert relative_error(found, GIVEN["text_embeds"]) < TOLERANCE


def test_images_that_are_none_are_refused(clip):
    for shape in ((2, 10, 10, 1), (2, 3, 10, 10), (10, 10, 3), (2, 0, 10, 3)):
        with pytest.raises(ValueError, match=r"takes images \[n, height, width, 3\], not \("):
            embed_images(clip, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], not uint8"):
        embed_images(clip, np.zeros((2, 10, 10, 3), np.uint8))
    with pytest.raises(ValueError, match="takes images"):
        zero_shot(clip, PROMPTS).features(np.zeros((2, 10, 10, 4), np.float32))


def test_prompts_that_are_none_are_refused(clip):
    for use in (embed_texts, zero_shot, lambda clip, p: clip_score(clip, GIVEN["images"], p)):
        with pytest.raises(ValueError, match=r"sequence of texts: pass \['a cat'\]"):
            use(clip, "a cat")
    with pytest.raises(ValueError, match="no prompts are given"):
        zero_shot(clip, [])
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        clip_score(clip, GIVEN["images"], PROMPTS[:2])
    with pytest.raises(ValueError, match="a prompt has 13 tokens .* takes 12"):
        embed_texts(clip, [" ".join(["cat"] * 11)])


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_clip(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no config.json"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="config.json: is of class 'CLIPTextModel': expected 'CL"):
        load_clip(FIXTURES / "stable_diffusion" / "text_encoder")
    edit_json(folder / "config.json", use_magic=1)
    with pytest.raises(ValueError, match=r"config.json: unknown CLIPModel options \['use_magic'\]"):
        load_clip(folder)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_missing_tower_is_refused(folder, tower):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    kept = {key: values for key, values in tensors.items() if not key.startswith(tower)}
    safetensors.numpy.save_file(kept, path)
    with pytest.raises(ValueError, match=rf"do not fit .* missing \({tower}_model\."):
        load_clip(folder)
    edit_json(folder / "config.json", **{f"{tower}_config": None})
    with pytest.raises(ValueError, match=f"config.json: {tower}_config is no object, but None"):
        load_clip(folder)


def test_tower_with_unknown_options_is_refused(folder):
    edit_tower(folder, "vision_config", vocab_size=3)
    with pytest.raises(ValueError, match=r"config.json: unknown CLIPVisionModel options \['voc"):
        load_clip(folder)


def test_tokenizer_of_another_model_is_refused(folder):
    end = VOCABULARY[END]
    edit_tower(folder, "text_config", eos_token_id=7)
    with pytest.raises(ValueError, match=f"ends prompts with token {end} of {end + 1}, .* 7 of"):
        load_clip(folder)
    edit_tower(folder, "text_config", eos_token_id=end, vocab_size=end)
    with pytest.raises(ValueError, match=f"expects {end} of {end}: pass its own tokenizer"):
        load_clip(folder)
    edit_tower(folder, "text_config", eos_token_id=2, vocab_size=end + 1)
    load_clip(folder)


def torch_folder(clip_side, folder, **options):
    """A random CLIP written by torch: its network, its tokenizer and what is loaded of it."""
    import transformers

    model = clip_side.torch_clip(seed=5, **{"text": {}, "vision": {}} | options)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model, transformers.CLIPTokenizer.from_pretrained(folder), load_clip(folder)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": {"hidden_act": "gelu"}},
        {"vision": {"hidden_act": "gelu"}},
        {"text": {"layer_norm_eps": 1e-2}},
        {"vision": {"layer_norm_eps": 1e-2}},
        {"text": {"num_attention_heads": 4}},
        {"text": {"eos_token_id": 2}},
        {"vision": {"image_size": 9, "patch_size": 3}},
        {"projection_dim": 9},
    ],
    ids=str,
)
def test_live_torch(options, clip_side, tmp_path):
    model, tokenizer, clip = torch_folder(clip_side, tmp_path, **options)
    images = clip_side.random_images(clip.vision.module.config.image_size)
    expected = clip_side.clip_outputs(model, tokenizer, images, PROMPTS)
    assert relative_error(embed_images(clip, images), expected["image_embeds"]) < TOLERANCE
    assert relative_error(embed_texts(clip, PROMPTS), expected["text_embeds"]) < TOLERANCE
    assert expected["text_embeds"].shape == (3, options.get("projection_dim", 6))
    logits = zero_shot(clip, PROMPTS).logits(images)
    assert relative_error(logits, expected["logits"]) < TOLERANCE
    cosines = np.diag(expected["logits"]) / model.logit_scale.exp().item()
    scores = clip_score(clip, images, PROMPTS)
    np.testing.assert_allclose(scores, 100 * np.maximum(cosines, 0), atol=1e-3)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(20, 20), (7, 7), (10, 10), (20, 33), (15, 8)])
def test_whole_processor_of_transformers(clip_side, tmp_path, shape):
    import transformers

    torch_folder(clip_side, tmp_path)
    processor = transformers.CLIPImageProcessorPil(size=10, crop_size=10)
    processor.save_pretrained(tmp_path)
    clip = load_clip(tmp_path)
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    given = processor([Image.fromarray(image) for image in pixels], return_tensors="np")
    images = given["pixel_values"].transpose(0, 2, 3, 1)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = clip_side.clip_outputs(model, tokenizer, np.ascontiguousarray(images), PROMPTS)
    found = embed_images(clip, pixels / np.float32(127.5) - 1)
    # Theirs rounds resized pixels to 8 bits and clips them, after each of the two directions.
    tolerance = TOLERANCE if shape == (10, 10) else 3e-2
    assert relative_error(found, expected["image_embeds"]) < tolerance
