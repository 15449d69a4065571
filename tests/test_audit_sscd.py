"""The copy-detection network that a user gives as an ONNX file."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from jax_unlearn import metrics
from jax_unlearn.app.audit import copies, sscd
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject import load_subject

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def write(path, shape=("n", 3, "h", "w"), kind=TensorProto.FLOAT, axes=(2, 3)):
    """A network that takes the mean of each channel."""
    shape_out = [shape[0] if i == 0 else 3 for i in range(4 - len(axes))]
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    graph = helper.make_graph(
        [node],
        "means",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape_out)],
        [helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)],
    )
    # Older than the newest, as exporters write them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((30, 20))) for one in smooth])


@pytest.mark.parametrize("shape", [("n", 3, "h", "w"), (2, 3, 32, 40), (1, 3, "h", "w")])
def test_features_are_those_of_the_resized_and_normalised_image(tmp_path, images, shape):
    found = sscd.load_sscd(write(tmp_path / "means.onnx", shape))(images)
    height, width = (32, 40) if shape[2] == 32 else (288, 432)
    for image, own in zip(images, found, strict=True):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        means = ((np.asarray(resized) / 255 - MEAN) / STD).mean(axis=(0, 1))
        np.testing.assert_allclose(own, means / np.linalg.norm(means), atol=1e-4)


def test_grey_images_have_three_channels(tmp_path, images):
    features = sscd.load_sscd(write(tmp_path / "means.onnx"))
    grey = images[..., :1]
    np.testing.assert_array_equal(features(grey), features(np.repeat(grey, 3, axis=-1)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shape": ("n", 1, "h", "w")}, r"expected float32 images \[batch, 3, height, width\]"),
        ({"kind": TensorProto.DOUBLE}, "expected float32 images"),
        ({"axes": (3,)}, "expected a vector"),
        (None, "no readable"),
    ],
)
def test_other_files(tmp_path, settings, said):
    path = tmp_path / "other.onnx"
    if settings is None:
        path.write_bytes(b"no network")
        said = "not a readable ONNX file"
    else:
        write(path, **settings)
    with pytest.raises(ValueError, match=said) as error:
        sscd.load_sscd(path)
    assert "\n" not in str(error.value)


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "means.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime: pip install 'jax-unlearn\[sscd\]'"):
        sscd.load_sscd(path)


def test_copies_are_told_by_it(tmp_path, images):
    """Without unseen images by the usual threshold: a cosine of one half, which is distance 1."""
    (space, pixels) = copies.spaces(None, write(tmp_path / "means.onnx"))
    assert (space.name, pixels.name) == ("SSCD", "pixels")
    found = copies.copies_of(space, images[:1], None, 0.01)
    assert found.threshold.distance == 1.0
    cosine = space.features(images) @ space.features(images[:1])[0]
    np.testing.assert_array_equal(found.among(images), cosine > 0.5)
    distance, _ = metrics.nearest_distances(space.features(images), found.bank)
    np.testing.assert_allclose(1 - distance**2 / 2, cosine, atol=1e-5)


def test_images_need_no_unseen_ones_beside_it(tmp_path, tiny_model):
    path = tmp_path / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (4, 8, 8)).astype(np.uint8), labels=np.ones(4, int))
    options = AuditOptions(
        reference=str(tiny_model),
        model=str(tiny_model),
        images=(str(path),),
        sampling_steps=3,
        chain_steps=3,
        sscd=write(tmp_path / "means.onnx"),
    )
    (concept,) = load_subject(options).concepts
    assert concept.copies.space.name == "SSCD"
    assert concept.control is None
    assert concept.unseen is None
