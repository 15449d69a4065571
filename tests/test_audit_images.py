"""`jax-unlearn audit` of images: what a copy is, which models it takes, restarts, IRA and CRA."""

import shutil

import jax
import numpy as np
import pytest
from audited import refused, report_of, rows_of
from pipelines import ONE_LEVEL, write_pipeline
from safetensors.numpy import load_file, save_file

from jax_unlearn import metrics
from jax_unlearn.app import cli, embedded, verify
from jax_unlearn.app.audit import page
from jax_unlearn.app.audit.attacks import conditions
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.scores import averaged, scores
from jax_unlearn.app.audit.subject import load_subject
from jax_unlearn.app.embedded import captions

SMALL = (
    "--samples 4 --sampling-steps 3 --chain-steps 3 --inversion-steps 8 --relearning-steps 1 "
    "--copy-rate 0.1"
).split()
WEIGHTS = "diffusion_pytorch_model.safetensors"


# --- What a copy is.


def test_at_most_the_stated_share_of_unseen_images_are_copies():
    """Over many draws of Gaussian data the rate of false positives is k/(m + 1), not more."""
    rng = np.random.default_rng(0)
    forgotten = rng.standard_normal((5, 3))

    def distances(count):
        rows = rng.standard_normal((count, 1, 3))
        return np.linalg.norm(rows - forgotten, axis=2).min(axis=1)

    for count, rate in ((30, 0.1), (99, 0.01), (25, 0.3)):
        wrong = []
        for _ in range(400):
            found = metrics.copy_threshold(distances(count), rate)
            assert found.rate <= rate
            assert found.count == count
            wrong.append((distances(200) < found.distance).mean())
        expected = int(rate * (count + 1) + 1e-9) / (count + 1)
        assert found.rate == pytest.approx(expected)
        error = np.std(wrong) / len(wrong) ** 0.5
        assert abs(np.mean(wrong) - expected) < 4 * error


@pytest.mark.parametrize(
    ("values", "rate", "said"),
    [
        (np.ones(98), 0.01, "that takes 99"),
        (np.ones((3, 2)), 0.5, r"\(3, 2\)"),
        ([1.0, float("nan")], 0.5, "numbers"),
        (np.ones(9), 0.0, "lies in"),
        (np.ones(9), 1.0, "lies in"),
    ],
)
def test_what_sets_no_threshold(values, rate, said):
    with pytest.raises(ValueError, match=said):
        metrics.copy_threshold(values, rate)


def test_nearest_is_that_of_all_pairs(monkeypatch):
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((n, 7)).astype(np.float32) for n in (11, 23))
    y[5] = y[2]  # The first of equal ones.
    every = np.sqrt(((x[:, None].astype(float) - y[None]) ** 2).sum(-1))
    for elements in (2**24, 21):
        monkeypatch.setattr(metrics.copies, "_ELEMENTS", elements)
        distance, index = metrics.nearest_distances(x, y)
        np.testing.assert_array_equal(index, every.argmin(axis=1))
        np.testing.assert_allclose(distance, every.min(axis=1), rtol=1e-6)


@pytest.mark.parametrize(("x", "y"), [((2, 3), (4, 2)), ((2,), (2, 2)), ((2, 3), (0, 3))])
def test_nearest_refuses(x, y):
    with pytest.raises(ValueError, match="m at least 1"):
        metrics.nearest_distances(np.zeros(x), np.zeros(y))


# --- IRA and CRA.


def test_ira_and_cra_by_hand():
    """Two objects in two styles; the object "cup" is forgotten, "dog" is kept.

    The classes are 0 dog photo, 1 dog sketch, 2 cup photo, 3 cup sketch.
    """
    named = {
        0: [0, 0, 1, 2],  # dog photo: dog 3 of 4, photo 3 of 4
        1: [1, 3],  # dog sketch: dog 1 of 2, sketch 2 of 2
        2: [0, 0, 0, 1],  # cup photo: photo 3 of 4
        3: [1, 1, 0, 0],  # cup sketch: sketch 2 of 4
    }
    inner = {0: ("dog", (0, 1)), 1: ("dog", (0, 1))}
    cross = {
        0: ("photo", (0, 2)), 1: ("sketch", (1, 3)), 2: ("photo", (0, 2)), 3: ("sketch", (1, 3))
    }  # fmt: skip
    ira, cra = averaged(inner, named), averaged(cross, named)
    assert ira["value"] == (3 / 4 + 1 / 2) / 2
    assert ira["concepts"]["dog"] == metrics.binomial_interval(4, 6)._asdict()
    assert cra["value"] == ((3 / 4 + 3 / 4) / 2 + (1 + 2 / 4) / 2) / 2
    assert cra["count"] == 14
    assert averaged({}, named) is None
    share = {"value": 0.25, "low": 0.0, "high": 1.0, "count": 4}
    forgotten = [{"model": share, "scale": 2.5, "settings": {"what": "the forgotten conditions"}}]
    attacked = [{"model": share | {"value": 0.5}, "attack": "inversion"}]
    agreement = {"model": share | {"value": 0.75}}
    found = scores(2.5, forgotten, attacked, agreement, {"model": {"IRA": ira, "CRA": cra}})
    assert (found["UA"], found["RA"]) == (0.75, 0.75)
    assert (found["IRA"], found["CRA"]) == (ira["value"], cra["value"])
    assert found["ERR"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))
    assert scores(2.5, forgotten, attacked, None, {})["ERR"] is None


@pytest.mark.slow
def test_captions_of_an_object_and_of_a_style_are_told_apart():
    options = {"reference": "embedded-text", "model": "embedded-text", "samples": 4}
    for forget, own, other in (
        ("sneaker", captions.OBJECTS, captions.STYLES),
        ("blueprint", captions.STYLES, captions.OBJECTS),
    ):
        subject = load_subject(AuditOptions(forget=(forget,), **options))
        domains = subject.domains
        assert {name for name, _ in domains.inner.values()} == {*own} - {forget}
        assert {name for name, _ in domains.cross.values()} == {*other}
        # Every pair once: the forgotten ones have their other part.
        assert len(domains.inner) == len(own) * len(other) - len(other)
        assert len(domains.cross) == len(own) * len(other)
        for c, (name, classes) in {**domains.inner, **domains.cross}.items():
            assert name in subject.conditions.names[c]
            told = [subject.conditions.classes[place] for place in classes]
            assert all(name in one for one in told)
            assert len(told) == (len(captions.STYLES) if name in captions.OBJECTS else 10)


# --- Restarts.


def test_the_best_restart_is_that_of_the_least_loss():
    """Whatever the images are: the judge has no say in it."""
    losses = np.array([[3.0, 1.0, 2.0], [0.5, np.nan, 0.7]])
    best = conditions._least(losses)
    assert best.tolist() == [1, 0]
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1, 1, 1)
    before = np.array([[True, False, False, False], [False] * 4])
    every, chosen = conditions._with_best({"what": "x"}, 8, images, best, before)
    assert every.images.ravel().tolist() == list(range(24))
    assert every.settings == {"what": "x"}
    assert np.flatnonzero(every.before).tolist() == [0, 4, 8]
    assert chosen.images.ravel().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert chosen.settings == {"what": "x", "restarts": "best of 3"}
    assert np.flatnonzero(chosen.before).tolist() == [0]
    assert len([*conditions._with_best({}, 8, images[:, :1], best * 0)]) == 1


# --- The command.


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory):
    """A folder with a random UNet of 8×8 grey images that is conditioned on nothing."""
    from jax_unlearn.models.unet_2d import UNet2DConfig, init_params
    from jax_unlearn.pretrained import Pretrained, PretrainedConfig, UNet2DDenoiser, save_pretrained
    from jax_unlearn.schedules import from_diffusers

    unet = {
        "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
        "layers_per_block": 1, "block_out_channels": [8, 8], "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        "add_attention": False,
    }  # fmt: skip
    scheduler = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    path = tmp_path_factory.mktemp("unconditional") / "model"
    config = PretrainedConfig(unet, scheduler, None, None)
    denoiser = UNet2DDenoiser(UNet2DConfig.from_diffusers(unet), None)
    params = init_params(unet, jax.random.key(1))
    save_pretrained(path, Pretrained(denoiser, params, from_diffusers(scheduler), config))
    return path


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Six images to forget, and forty that are not among them; of 8×8, with labels 0 to 2."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(2)

    def write(name, count):
        images = rng.integers(0, 256, (count, 8, 8)).astype(np.uint8)
        np.savez(folder / name, images=images, labels=np.arange(count) % 3)
        return folder / name

    return {"images": write("images.npz", 6), "unseen": write("unseen.npz", 40)}


@pytest.fixture
def command(sets, tmp_path):
    def start(reference, *more, out="audit", images=True):
        given = ["--reference", str(reference), "--model", str(reference)]
        if images:
            given += [part for name in sets for part in (f"--{name}", str(sets[name]))]
        return cli.main(["audit", *given, "--out", str(tmp_path / out), *SMALL, *map(str, more)])

    return start


@pytest.mark.slow
def test_an_unconditional_model(command, unconditional, sets, tmp_path, capsys):
    """Its copies are those that brute force finds; what it lacks is not attacked."""
    assert command(unconditional, "--attacks", "rounding") == 0
    report = report_of(tmp_path / "audit")
    assert {*report["asked"]["not_made"]} == {"inversion", "unlearndiffatk", "guidance"}
    for row in rows_of(report):
        assert row["model"] == row["reference"]
        assert row["unseen"]["count"] == 4
    (concept,) = report["asked"]["concepts"]
    assert (concept["images"], concept["copies"]["count"]) == (6, 34)
    assert concept["copies"]["rate"] == 3 / 35
    # The nearest sample of each image, from the pictures that the phase left.
    forgotten = np.load(sets["images"])["images"][..., None]
    (entry,) = report["nearest"]
    with np.load(tmp_path / "audit" / "phases" / "forgotten-the-images-model.npz") as arrays:
        near = arrays["near"]
        drawn = arrays["images"]
    assert entry["samples"] == len(drawn) == 4

    def rms(a, b):
        return np.sqrt((((a.astype(float) - b) / 255) ** 2).mean())

    for i, image in enumerate(forgotten):
        every = [rms(image, one) for one in drawn]
        found = entry["spaces"][0]["model"][i]["distance"]
        assert found == pytest.approx(min(every), rel=1e-5)
        np.testing.assert_array_equal(near[i], drawn[int(np.argmin(every))])
    assert report["scores"]["RA"] is None
    assert "no condition" in report["asked"]["kept"]
    assert verify.verify(tmp_path / "audit")[0] == []


@pytest.mark.slow
def test_every_attack_on_an_unconditional_model(command, unconditional, tmp_path):
    assert command(unconditional) == 0
    attacks = [row["attack"] for row in report_of(tmp_path / "audit")["recoverable"]]
    every = ["noise", "stochasticity", "inpainting", "relearning", "rounding"]
    assert [*dict.fromkeys(attacks)] == every


@pytest.mark.slow
def test_an_image_that_comes_back_is_a_copy(command, unconditional, tmp_path):
    """Taken to little noise and back, an image is itself, of forgotten and of unseen images."""
    assert command(unconditional, "--attacks", "noise") == 0
    report = report_of(tmp_path / "audit")
    least = report["recoverable"][0]
    assert least["budget"] == 0.4
    assert least["model"]["value"] == least["unseen"]["value"] == 1
    assert not page.easier(least)
    assert page.state(report)[0] == "close"
    assert "copies of the images" in report["verdict"]
    text = (tmp_path / "audit" / "report.html").read_text()
    assert "The nearest sample to each image" in text
    assert "unseen images" in text


@pytest.mark.slow
def test_more_than_unseen_images_is_said(command, unconditional, tmp_path):
    assert command(unconditional, "--attacks", "rounding") == 0
    report = report_of(tmp_path / "audit")
    share = {"value": 1.0, "low": 0.94, "high": 1.0, "count": 64}
    none = {"value": 0.0, "low": 0.0, "high": 0.06, "count": 64}
    (copied,) = (one["copied"] for one in report["nearest"])
    for row in [*rows_of(report), copied]:
        row |= {"model": none, "unseen": none}
    assert page.state(report) == (
        "satisfied", "✓ No more was found than of images that were never seen"
    )  # fmt: skip
    # One image that comes out is no green light, whatever the intervals.
    copied["model"] = none | {"value": 1 / 64}
    assert page.state(report)[0] == "close"
    copied["model"] = share
    assert page.state(report)[0] == "violated"
    copied["model"] = none
    report["recoverable"][-1]["model"] = share
    assert page.state(report)[0] == "violated"
    assert "More comes back than of images that were never seen: Rounded weights (100 %" in (
        page.verdict(report)
    )


@pytest.mark.slow
def test_labels_restarts_and_one_image(command, tiny_model, sets, tmp_path):
    """A single image of a model of labels; inversion from three starts."""
    one = tmp_path / "one.npz"
    np.savez(one, images=np.load(sets["images"])["images"][:1], labels=np.array([2]))
    given = ("--images", one, "--unseen", sets["unseen"], "--restarts", "3")
    attacks = ("--attacks", "inversion", "--attacks", "relearning")
    assert command(tiny_model, *given, *attacks, images=False) == 0
    report = report_of(tmp_path / "audit")
    assert report["seeds"]["restarts"] == 3
    assert report["seeds"]["noise"]["inversion"] == [0, 11]
    assert report["asked"]["concepts"][0]["conditions"] == ["T-shirt/top"]
    for row in report["recoverable"]:
        if row["attack"] == "inversion":
            best = "restarts" in row["settings"]
            assert row["model"]["count"] == (4 if best else 12)
        else:
            assert row["settings"]["images"] == 1
    assert {row["settings"].get("restarts") for row in report["recoverable"]} == {
        None, "best of 3"
    }  # fmt: skip
    assert "membership" not in report["too_forgotten"][0]["model"]


@pytest.mark.slow
def test_captions_and_no_captions(tmp_path, capsys):
    """Images of a pipeline, under a caption and under none; IRA and CRA of given prompts."""
    reference = write_pipeline(tmp_path / "reference", unet=ONE_LEVEL)
    rng = np.random.default_rng(3)

    def write(name, count):
        np.savez(tmp_path / name, images=rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8))
        return str(tmp_path / name)

    images, unseen = write("images.npz", 4), write("unseen.npz", 24)
    given = ["--reference", str(reference), "--model", str(reference), *SMALL]
    few = ["--attacks", "inversion", "--attacks", "rounding"]
    out = tmp_path / "audit"
    arguments = ["--images", f"{images}:a cat", "--unseen", unseen, "--out", str(out)]
    assert cli.main(["audit", *given, *arguments, *few[2:]]) == 0
    report = report_of(out)
    assert report["asked"]["concepts"][0]["conditions"] == ["“a cat”"]
    assert {row["scale"] for row in report["forgotten"]} == {0.0, 1.0, 2.5, 5.0, 7.5}
    assert {*report["asked"]["not_made"]} == {"unlearndiffatk", "guidance"}
    assert report["scores"]["RA"] is None
    options = AuditOptions(
        reference=str(reference), model=str(reference), images=(images,), unseen=(unseen,),
        copy_rate=0.1, sampling_steps=3, chain_steps=3,
    )  # fmt: skip
    subject = load_subject(options)
    assert subject.uncaptioned
    assert subject.kept == (subject.null,) == subject.concepts[0].forgotten
    named = [
        "--forget",
        "cat",
        "--template",
        "a {} => a",
        "--retain",
        "a dog",
        "--cross",
        "the dog",
    ]
    named += ["--clip", str(embedded.clip_path()), "--restarts", "2", "--out", str(tmp_path / "c")]
    assert cli.main(["audit", *given, *named, "--attacks", "unlearndiffatk", *few[:2]]) == 0
    report = report_of(tmp_path / "c")
    domains = report["scores"]["domains"]["model"]
    assert [*domains["IRA"]["concepts"]] == ["a dog"]
    assert [*domains["CRA"]["concepts"]] == ["the dog"]
    counts = {
        (row["attack"], row["settings"].get("what"), row["settings"].get("restarts")): row["model"]
        for row in report["recoverable"]
    }
    assert {key: one["count"] for key, one in counts.items()} == {
        ("unlearndiffatk", None, None): 8,
        ("unlearndiffatk", None, "best of 2"): 4,
        ("inversion", "one token", None): 8,
        ("inversion", "one token", "best of 2"): 4,
        ("inversion", "whole embedding", None): 8,
        ("inversion", "whole embedding", "best of 2"): 4,
    }


# --- Wrong input.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--attacks", "inversion"), ("inversion", "takes none")),
        (("--attacks", "guidance"), ("guidance", "distance")),
        (("--forget", "dog"), ("not conditioned", "--images without --forget")),
        (("--copy-rate", "0"), ("--copy-rate must lie in (0, 1), not 0.0",)),
        (("--copy-rate", "0.01"), ("--unseen has 40 images", "are 105")),
        (("--restarts", "0"), ("--restarts must lie in [1, 64], not 0",)),
        (("--cross", "a dog"), ("--cross", "prompts")),
        (("--judge", "nowhere"), ("--judge names labels", "none")),
    ],
)
def test_wrong_options(command, unconditional, tmp_path, capsys, changes, said):
    assert command(unconditional, *changes) == 2
    refused(capsys, *said)
    assert not (tmp_path / "audit").exists()


def test_what_is_missing(command, unconditional, tiny_model, sets, tmp_path, capsys):
    assert command(unconditional, images=False) == 2
    refused(capsys, "--forget is missing, or --images")
    assert command(unconditional, "--images", sets["images"], images=False) == 2
    refused(capsys, "--unseen is missing", "--sscd")
    # No label: as with `data`, it must be said.
    bare = tmp_path / "bare.npz"
    np.savez(bare, images=np.zeros((6, 8, 8), np.uint8))
    assert command(tiny_model, "--images", bare, images=False) == 2
    refused(capsys, "labels are missing", "PATH:LABEL")
    assert not (tmp_path / "audit").exists()


def test_images_that_the_unseen_ones_repeat_calibrate_nothing(command, unconditional, sets, capsys):
    """The same pixels are no unseen image: of the forty none is left."""
    given = ("--images", sets["unseen"], "--unseen", sets["unseen"])
    assert command(unconditional, *given, images=False) == 2
    refused(capsys, "--unseen has 0 images", "are 49")


@pytest.mark.slow
def test_the_embedded_model_and_its_repeated_images(tmp_path):
    """Weights that are moved at random repeat nothing; the model itself is its own reference."""
    folder = tmp_path / "moved"
    shutil.copytree(embedded.model_path(), folder)
    (folder / "model.sha256").unlink(missing_ok=True)
    path, rng = folder / "unet" / WEIGHTS, np.random.default_rng(0)
    weights = {
        name: (value + 0.1 * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    out = tmp_path / "audit"
    given = ["--reference", "embedded", "--model", str(folder), "--forget", "repeated"]
    few = ["--samples", "32", "--sampling-steps", "10", "--chain-steps", "3", "--attacks", "noise"]
    assert cli.main(["audit", *given, *few, "--out", str(out)]) == 0
    report = report_of(out)
    (concept,), (entry,) = report["asked"]["concepts"], report["nearest"]
    assert concept["images"] == 16
    assert concept["copies"]["rate"] <= 0.01
    assert report["asked"]["kept"] == [*report["harmed"]["conditions"]]
    # The reference repeats one of them pixel by pixel.
    most = concept["copies"]["distance"]
    assert min(one["distance"] for one in entry["spaces"][0]["reference"]) < most / 2
    assert entry["copied"]["reference"]["value"] > 0
    assert [space["name"] for space in entry["spaces"]] == ["pixels", "the judge's features"]
    assert report["scores"]["RA"] is not None
    assert "membership" in report["too_forgotten"][0]["model"]
