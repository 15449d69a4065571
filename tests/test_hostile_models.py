"""Models of strangers and damaged ones: refused in one line, before memory, and nothing let out."""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from pipelines import write_pipeline

from jax_unlearn.models import config as bounds
from jax_unlearn.models import files, memory
from jax_unlearn.models.clip_text import CLIPTextConfig
from jax_unlearn.models.clip_vision import CLIPVisionConfig
from jax_unlearn.models.judge import Judge, load_judge, save_judge
from jax_unlearn.models.tensors import read_header, read_tensor
from jax_unlearn.models.unet_2d import UNet2DConfig
from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig
from jax_unlearn.pretrained import digests as digests_module
from jax_unlearn.pretrained import load_clip, load_pretrained, save_pretrained, save_unet
from jax_unlearn.pretrained.clip_tokenizer import load_tokenizer
from jax_unlearn.pretrained.digests import (
    check_digests,
    file_digest,
    folder_digests,
    write_digests,
)
from jax_unlearn.pretrained.hub import find_model, is_hub_name
from jax_unlearn.pretrained.networks import load_network, save_network
from jax_unlearn.pretrained.subsets import load_lora, lora_init, save_lora
from jax_unlearn.pretrained.text_to_image import is_text_to_image, load_text_to_image
from jax_unlearn.pretrained.weights import _host, clean_leftovers, new_folder
from jax_unlearn.schedules import from_diffusers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
STEM = "diffusion_pytorch_model.safetensors"
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture
def folder(pipeline, tmp_path):
    return pathlib.Path(shutil.copytree(pipeline, tmp_path / "model"))


@pytest.fixture(scope="module")
def loaded(pipeline):
    return load_pretrained(pipeline)


@pytest.fixture
def saved(loaded, tmp_path):
    save_pretrained(tmp_path / "saved", loaded)
    return tmp_path / "saved"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path):
    """Another value of one tensor, which the format does not notice."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def refused(load, *args, match, within=5.0):
    """One line without control characters, at once."""
    started = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        load(*args)
    assert time.process_time() - started < within
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------ names and links


@pytest.mark.parametrize(
    "name", ["../outside", "../../etc", "/etc", "a/b", "..", "a\0b", "a\\b", "a\x1b[31m", "\ud800"]
)
def test_parts_are_names_of_folders_beside_the_index(folder, name):
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "secret.json").write_text("{}")
    edit_json(folder / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    for load in (load_pretrained, load_text_to_image):
        refused(load, folder, match=r"model_index\.json names a part '.*' ?: expected the name of")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(folder / "vae", outside)
    for link, target in {
        "vae/secret.txt": "/etc/passwd",
        "secret.json": outside / "config.json",
        "vae": outside,
        "tokenizer/more.json": "../../outside/config.json",
    }.items():
        changed = pathlib.Path(shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True))
        if (changed / link).is_dir():
            shutil.rmtree(changed / link)
        (changed / link).symlink_to(target)
        for load in (load_pretrained, load_text_to_image, is_text_to_image):
            refused(
                load,
                changed,
                match=f"{link} is a link out of the model's folder, to /.*: replace it by a copy",
            )
        shutil.rmtree(changed)


def test_every_loader_looks_at_links(folder, loaded, tmp_path):
    clip = shutil.copytree(FIXTURES / "clip", tmp_path / "clip")
    lora = tmp_path / "lora"
    save_lora(lora, lora_init(loaded.params, jax.random.key(0), rank=1))
    for load, where in (
        (load_network, folder / "vae"),
        (load_tokenizer, folder / "tokenizer"),
        (load_clip, clip),
        (lambda path: load_lora(path, loaded.params), lora),
    ):
        link = where / "more.json"
        link.symlink_to("/etc/passwd")
        refused(load, where, match=r"more\.json is a link out of the model's folder")
        link.unlink()
        link.symlink_to("nothing")
        refused(load, where, match=r"more\.json is a link to nothing")


def test_links_are_looked_at_before_copying(folder, tmp_path):
    pretrained = load_pretrained(folder)
    (folder / "vae" / "secret.txt").symlink_to("/etc/passwd")
    refused(save_pretrained, tmp_path / "new", pretrained, match="secret.txt is a link out of")
    assert list(tmp_path.iterdir()) == [folder]


def test_the_scheduler_above_a_unet_is_inside_its_pipeline(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": 1}')
    (folder / SCHEDULER).unlink()
    (folder / SCHEDULER).symlink_to(secret)
    refused(load_pretrained, folder / "unet", match="is a link out of the model's folder")
    shutil.rmtree(folder / "scheduler")
    shutil.copytree(FIXTURES / "clip", tmp_path / "other")
    shutil.move(secret, tmp_path / "other" / "scheduler_config.json")
    (folder / "scheduler").symlink_to(tmp_path / "other")
    refused(load_pretrained, folder / "unet", match="is a link out of the model's folder")


def test_links_inside_the_folder_are_followed(folder, loaded):
    (folder / "vae" / STEM).rename(folder / "shared.safetensors")
    (folder / "vae" / STEM).symlink_to("../shared.safetensors")
    again = load_text_to_image(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, again.pretrained.params)


def test_loops_and_odd_names_are_refused(folder):
    (folder / "vae" / "a.json").symlink_to("b.json")
    (folder / "vae" / "b.json").symlink_to("a.json")
    refused(load_pretrained, folder, match=r"[ab]\.json is a link to nothing")
    for name in "ab":
        (folder / "vae" / f"{name}.json").unlink()
    (folder / "vae" / "a\nb.json").write_text("{}")
    refused(load_pretrained, folder, match=r"whose name is not plain: 'a\\nb\.json'")
    (folder / "vae" / "a\nb.json").unlink()
    os.mkfifo(folder / "vae" / "more.json")
    refused(load_pretrained, folder, match=r"more\.json is no file: remove it")


@pytest.fixture
def cache(folder, tmp_path):
    """The model as in the hub's cache: links to files named by their digests."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            # Only large files are named by their sha256, the others by git's sha1.
            blob = blobs / (digest if path.suffix == ".safetensors" else digest[:40])
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_the_cache_of_the_hub_is_one_of_links(cache, loaded, tmp_path):
    found = load_text_to_image(cache).pretrained
    jax.tree.map(np.testing.assert_array_equal, loaded.params, found.params)
    save_pretrained(tmp_path / "saved", found)
    assert not any(path.is_symlink() for path in (tmp_path / "saved").rglob("*"))
    load_network(cache / "vae")
    (cache / "vae" / "secret.txt").symlink_to("/etc/passwd")
    refused(load_text_to_image, cache, match="is a link out of the model's folder")


def test_blobs_of_another_place_are_no_cache(cache, tmp_path):
    blobs = cache.parent.parent / "blobs"
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    refused(load_text_to_image, cache, match="is a link out of the model's folder")


def test_the_cache_of_the_hub_names_its_digests(cache):
    flip((cache / "vae" / STEM).resolve())
    load_pretrained(cache)  # does not read it
    refused(
        load_text_to_image,
        cache,
        match=rf"vae/{STEM} is not the file that the hub lists \(sha256 .{{12}}… instead of",
    )


# ------------------------------------------------------------------ digests


def test_digests_are_those_of_sha256sum(saved):
    lines = (saved / "model.sha256").read_text().splitlines()
    files_here = [path for path in saved.rglob("*") if path.is_file()]
    expected = {
        path.relative_to(saved).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files_here
        if path.name != "model.sha256"
    }
    assert lines == [f"{expected[name]}  {name}" for name in sorted(expected)]
    assert len(lines) > 10
    assert folder_digests(saved) == expected
    assert file_digest(saved / UNET) == expected[UNET]


def test_only_what_a_model_is_read_from_has_digests(folder):
    (folder / "README.md").write_text("hello")
    (folder / "vae" / "deeper").mkdir()
    (folder / "vae" / "deeper" / "config.json").write_text("{}")
    (folder / "model.sha256").write_text("")
    assert set(folder_digests(folder)) == {
        path.relative_to(folder).as_posix()
        for path in [*folder.glob("*.json"), *folder.glob("*/*.*")]
    }


def test_damage_is_found(saved):
    load_text_to_image(saved)
    flip(saved / "vae" / STEM)
    load_pretrained(saved)  # does not read it
    wrong = rf"vae/{STEM} is not the file that model\.sha256 lists \(sha256 .{{12}}… instead of "
    refused(load_text_to_image, saved, match=wrong)
    refused(load_network, saved / "vae", match=wrong)
    flip(saved / "unet" / STEM)
    for load, path in (
        (load_pretrained, saved),
        (load_pretrained, saved / "unet"),
        (load_network, saved / "unet"),
        (load_text_to_image, saved),
    ):
        refused(load, path, match=rf"unet/{STEM} is not .* it was damaged or changed")


def test_who_changes_a_model_on_purpose_removes_the_list(saved):
    edit_json(saved / SCHEDULER, beta_end=0.02)
    refused(
        load_pretrained,
        saved,
        match=r"scheduler_config\.json is not the file .* changed\. Remove .*model\.sha256 to acc",
    )
    refused(load_pretrained, saved / "unet", match="scheduler_config.json is not the file")
    (saved / "model.sha256").unlink()
    load_pretrained(saved)


def test_every_saved_model_has_its_digests(loaded, tmp_path):
    network = load_network(FIXTURES / "stable_diffusion" / "vae")
    lora = lora_init(loaded.params, jax.random.key(0), rank=1)
    saves = {
        "network": lambda path: save_network(path, network),
        "unet": lambda path: save_unet(path, loaded),
        "lora": lambda path: save_lora(path, lora),
    }
    loads = {
        "network": load_network,
        "unet": lambda path: load_pretrained(path, scheduler={}),
        "lora": lambda path: load_lora(path, loaded.params),
    }
    for name, save in saves.items():
        save(tmp_path / name)
        loads[name](tmp_path / name)
        (path,) = (tmp_path / name).glob("*.safetensors")
        flip(path)
        refused(loads[name], tmp_path / name, match="is not the file that model.sha256 lists")
    refused(loads["lora"], path, match="is not the file that model.sha256 lists")


def test_clip_is_compared_too(tmp_path):
    clip = pathlib.Path(shutil.copytree(FIXTURES / "clip", tmp_path / "clip"))
    write_digests(clip)
    flip(clip / "model.safetensors")
    refused(load_clip, clip, match="is not the file that model.sha256 lists")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\n", "is malformed in line 1: expected a sha256, two spaces and a name"),
        (f"{'0' * 64}  unet/config.json\n{'0' * 63}  a\n", "is malformed in line 2"),
        (f"{'0' * 64}  ../outside.json\n", "lists '../outside.json', which is no path inside"),
        (f"{'0' * 64}  /etc/passwd\n", "lists '/etc/passwd', which is no path inside"),
        (f"{'0' * 64}  a\x1b[31m\n", r"lists 'a\\x1b\[31m', which is no path inside"),
        (f"{'0' * 64}  a\n{'1' * 64}  a\n", "lists 'a' twice"),
        (b"\xff\xfe", "model.sha256 cannot be read"),
    ],
)
def test_malformed_lists_are_refused(saved, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (saved / "model.sha256").write_bytes(content)
    refused(load_pretrained, saved, match=message)


def test_digests_that_are_remembered_are_of_the_same_file(tmp_path, monkeypatch):
    path, count = tmp_path / "a.json", []
    digest = hashlib.file_digest

    def counted(*args):
        count.append(args)
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path.write_text("one")
    before = path.stat()
    first = file_digest(path)
    # At once, of the same size and with the same time: nothing tells of it but the bytes.
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest() != first
    assert len(count) == 2
    monkeypatch.setattr(digests_module, "_SETTLED", -(10**9))
    assert file_digest(path) == file_digest(path) == hashlib.sha256(b"two").hexdigest()
    assert len(count) == 3
    check_digests(tmp_path)


# ------------------------------------------------------------------ revisions


def test_a_revision_is_followed_to_its_commit(cache, monkeypatch, tmp_path):
    calls = []

    def fetch(name, *, revision, allow_patterns):
        calls.append((name, revision))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = load_pretrained("owner/name", revision="main")
    config = found.config
    assert (config.source, config.revision, config.commit) == ("owner/name", "main", COMMIT)
    assert config.folder == str(cache)
    assert calls == [("owner/name", "main"), ("owner/name", COMMIT)]
    calls.clear()
    save_pretrained(tmp_path / "saved", found)
    assert {revision for _, revision in calls} == {COMMIT}
    calls.clear()
    both = load_text_to_image("owner/name", revision="v1").pretrained.config
    assert (both.revision, both.commit) == ("v1", COMMIT)
    assert [revision for _, revision in calls] == ["v1", COMMIT, COMMIT]
    calls.clear()
    assert is_text_to_image("owner/name", revision="v1")
    assert calls == [("owner/name", "v1")]
    none = load_pretrained("owner/name").config
    assert (none.revision, none.commit) == ("", COMMIT)


def test_a_folder_here_has_no_revision(folder, loaded):
    for load in (load_pretrained, load_text_to_image, is_text_to_image):
        with pytest.raises(ValueError, match="revision main is given for .*, a folder here"):
            load(folder, revision="main")
    assert (loaded.config.revision, loaded.config.commit) == ("", "")
    assert loaded.config.folder == loaded.config.source


def test_what_goes_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/name")
    for name in ("name", "/owner/name", "owner/name/more", "../name", "owner/..", "", "a b/c"):
        assert not is_hub_name(name)
        refused(find_model, name or "nothing", match="no such folder: .* no name on the hub")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to("nothing")
    assert not is_hub_name("owner/name")
    refused(find_model, "owner/name", match="owner/name is a link to nothing")
    refused(find_model, "a" * 300, match="cannot be read: File name too long")


# ------------------------------------------------------------------ bounds


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (UNET, {"layers_per_block": 10**7}, "layers_per_block is 10000000: expected 32 at most"),
        (UNET, {"layers_per_block": [10**7, 1]}, "layers_per_block is 10000000"),
        (UNET, {"layers_per_block": 10**400}, "layers_per_block is malformed: 1000.*…"),
        (UNET, {"sample_size": 10**7}, "sample_size is 10000000: expected 16384 at most"),
        (UNET, {"transformer_layers_per_block": 10**6}, "transformer_layers_per_block is"),
        (UNET, {"layers_per_block": 32, "transformer_layers_per_block": 64}, "make 8320 transf"),
        (UNET, {"cross_attention_dim": 10**9}, "cross_attention_dim is 1000000000"),
        (UNET, {"block_out_channels": [4] * 1000}, "has 1000 entries: expected 16 at most"),
        (UNET, {"conv_in_kernel": 10001}, "conv_in_kernel is 10001: expected 64 at most"),
        (UNET, {"norm_eps": float("inf")}, "norm_eps is malformed: inf"),
        (UNET, {"norm_eps": float("nan")}, "norm_eps is malformed: nan"),
        (UNET, {"norm_eps": 10**400}, "norm_eps is malformed: 1000"),
        (UNET, {"dropout": float("nan")}, "dropout is malformed: nan"),
        (UNET, {"mid_block_scale_factor": float("inf")}, "mid_block_scale_factor is malformed"),
        (UNET, {"upcast_attention": {}}, "upcast_attention is malformed: {}"),
        (UNET, {"act_fn": ["silu", "silu"]}, r"act_fn \('silu', 'silu'\) is not supported"),
        (UNET, {"_class_name": ["x"] * 10**5}, "is of class .*…: expected"),
        (UNET, {"x\x1b[31m": 1}, r"unknown .* options \['x\\x1b\[31m'\]"),
        (VAE, {"scaling_factor": float("inf")}, "scaling_factor is malformed: inf"),
        (VAE, {"layers_per_block": 10**7}, "layers_per_block is 10000000"),
        (VAE, {"latent_channels": 10**12}, "latent_channels is 1000000000000"),
        (TEXT, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: expected 256 at"),
        (TEXT, {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        (TEXT, {"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
        (TEXT, {"hidden_size": 65536, "intermediate_size": 2**20, "vocab_size": 2**21,
                "num_hidden_layers": 64}, "describes .* parameters, which need .* GB: this mach"),
        (TEXT, {"layer_norm_eps": float("inf")}, "layer_norm_eps is malformed: inf"),
        (TEXT, {"architectures": {"CLIPTextModel": 1}}, "is of class None: expected one of"),
        (TEXT, {"_class_name": "AutoencoderKL"}, "unknown AutoencoderKL options"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000: exp"),
        (SCHEDULER, {"num_train_timesteps": True}, "num_train_timesteps is True"),
        (SCHEDULER, {"beta_start": float("nan")}, r"beta_start is nan: .* inside \(0, 1\)"),
        (SCHEDULER, {"beta_end": 1}, "beta_end is 1: expected"),
        (SCHEDULER, {"beta_end": 10**400}, "beta_end is 1000.*…: expected"),
        (SCHEDULER, {"trained_betas": ["a"]}, r"trained_betas is \['a'\]: expected null, or at"),
        (SCHEDULER, {"trained_betas": [0.5] * (10**6 + 1)}, "trained_betas is .*…: expected null"),
        (SCHEDULER, {"clip_sample_range": float("inf")}, "clip_sample_range is inf"),
        (SCHEDULER, {"steps_offset": 1.5}, "steps_offset is 1.5"),
        (SCHEDULER, {"_class_name": ["DDIM"]}, r"class.* \"\['DDIM'\]\"|_class_name is \['DDIM'\]"),
        (SCHEDULER, {"beta_start": 1e-17, "beta_end": 1e-17, "rescale_betas_zero_snr": True},
         "the betas are too small"),
        (TOKENIZER, {"model_max_length": 10**9}, "malformed model_max_length: 1000000000"),
        (TOKENIZER, {"added_tokens_decoder": [1]}, r"added_tokens_decoder of .* malformed: \[1\]"),
        (TOKENIZER, {"additional_special_tokens": 1}, "additional_special_tokens of .* malformed"),
        (TOKENIZER, {"added_tokens_decoder": {"0": "\ud800"}}, r"is malformed: '\\ud800'"),
        ("model_index.json", {"_class_name": ["x"]}, "is a pipeline with the parts"),
        ("model_index.json", {"_class_name": "a\x1b[31m"}, r"is a 'a\\x1b\[31m' with the parts"),
    ],
)  # fmt: skip
def test_values_are_bounded_before_anything_is_built(folder, file, changes, message):
    edit_json(folder / file, **changes)
    refused(load_text_to_image, folder, match=message)


@pytest.mark.parametrize(
    "changes",
    [{"layers_per_block": 10**7}, {"sample_size": [10**7, 4]}, {"num_class_embeds": 10**12},
     {"norm_eps": float("inf")}, {"attention_head_dim": 10**9}, {"freq_shift": float("nan")},
     {"num_train_timesteps": 10**12}],
)  # fmt: skip
def test_options_of_pixel_models_are_bounded(tiny_model, tmp_path, changes):
    path = shutil.copytree(tiny_model, tmp_path / "model")
    (path / "model.sha256").unlink()
    edit_json(path / UNET, **changes)
    (name,) = changes
    refused(load_pretrained, path, match=f"UNet2DModel option {name} is")


def test_released_and_larger_models_are_inside_the_bounds():
    released = json.loads((FIXTURES / "stable_diffusion" / "architectures.json").read_text())
    assert len(released) > 4
    for config in released.values():
        UNet2DConditionConfig.from_diffusers(config)
    xl = released["stable-diffusion-xl-base-1.0"]
    UNet2DConditionConfig.from_diffusers(xl | {"sample_size": 4096})
    UNet2DConfig(sample_size=4096, block_out_channels=(1024, 2048, 4096, 8192))
    # The text tower of OpenCLIP's bigG, and a vision tower twice as deep at 1344 pixels.
    CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu", max_position_embeddings=248,
    )  # fmt: skip
    CLIPVisionConfig(
        hidden_size=1664, intermediate_size=8192, num_hidden_layers=96, num_attention_heads=16,
        image_size=1344, patch_size=14,
    )  # fmt: skip
    assert from_diffusers({"num_train_timesteps": 10**6}).num_steps == 10**6
    assert bounds.MAX_TRANSFORMERS > 10 * 70


def test_no_prompt_is_longer_than_the_encoder_takes(folder):
    edit_json(folder / TOKENIZER, model_max_length=300)
    (tokenizer,) = load_text_to_image(folder).tokenizers
    assert tokenizer.length == 77
    edit_json(folder / TOKENIZER, model_max_length=int(1e30))
    (tokenizer,) = load_text_to_image(folder).tokenizers
    assert tokenizer.length == 77


def test_parts_are_of_their_class(folder):
    for part, other, message in (
        ("text_encoder", "vae", "network AutoencoderKL: expected CLIPTextModel"),
        ("vae", "unet", "network UNet2DConditionModel: expected AutoencoderKL"),
    ):
        changed = pathlib.Path(shutil.copytree(folder, folder.parent / part))
        shutil.rmtree(changed / part)
        shutil.copytree(folder / other, changed / part)
        refused(load_text_to_image, changed, match=f"{part} holds a {message}")


def test_parameters_are_compared_with_the_memory(folder, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 10**4)
    monkeypatch.setattr(np, "fromfile", None)  # Nothing is read.
    refused(load_network, folder / "vae", match="describes [0-9,]+ parameters, which need 0.0 GB")
    refused(load_text_to_image, folder, match="unet describes [0-9,]+ parameters")


def test_memory_is_the_smallest_limit(tmp_path, monkeypatch):
    limits = [tmp_path / name for name in ("none", "max", "large", "small")]
    for path, text in zip(limits[1:], ("max\n", f"{2**62}\n", "1000000\n"), strict=True):
        path.write_text(text)
    monkeypatch.setattr(memory, "_limits", lambda: limits[:3])
    machine = memory.machine_memory()
    assert 2**28 < machine < 2**62
    monkeypatch.setattr(memory, "_limits", lambda: limits)
    assert memory.machine_memory() == 10**6


# ------------------------------------------------------------------ files


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("file", [UNET, SCHEDULER, TOKENIZER, TEXT, "model_index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP.encode(), "is no readable json: .*recursion"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "is nested too deep: expected at most 64 levels"),
        (b'{"a": ' + b"1" * 10**5 + b"}", "is no readable json: .*digits"),
        (b"\xff\xfe", "is no readable json"),
        (b"", "is no readable json"),
        (b"[1]", "must hold a json object, not a list"),
        (b'{"a": "\x1b"}', "is no readable json"),
    ],
)
def test_json_that_is_none(folder, file, content, message):
    (folder / file).write_bytes(content)
    refused(load_text_to_image, folder, match=message)


@pytest.mark.parametrize(
    "file", [UNET, "model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
)
def test_files_that_are_too_large_are_not_read(folder, file):
    with (folder / file).open("r+b") as opened:
        opened.truncate(2**40)
    refused(load_text_to_image, folder, match=r"has 1099511627776 bytes: expected at most")


@pytest.mark.parametrize(
    "file",
    [UNET, SCHEDULER, "model_index.json", "vae/config.json", f"unet/{STEM}", f"vae/{STEM}",
     "tokenizer/vocab.json", "tokenizer/merges.txt"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_pipes_and_folders_are_no_files(folder, file, kind):
    (folder / file).unlink()
    kind(folder / file)
    refused(load_text_to_image, folder, match=f"{file} is no file: remove it")


def test_a_pipe_is_not_opened(folder, tmp_path):
    for name, load in {
        "model.sha256": lambda path: load_pretrained(path.parent),
        "given.json": lambda path: load_pretrained(folder, scheduler=path.parent / "given.json"),
        "lora.safetensors": lambda path: load_lora(path, {}),
        "x.safetensors": read_header,
    }.items():
        os.mkfifo(folder / name)
        refused(load, folder / name, match=f"{name} is (a pipe|no file)|is neither|no such folder"
                if name == "given.json" else f"{name} is (a pipe|no file)")  # fmt: skip
        (folder / name).unlink()


def test_what_cannot_be_opened_is_not_called_damaged(folder, monkeypatch):
    opened = pathlib.Path.open

    def closed(path, *args, **options):
        if path.name in closed_names:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(pathlib.Path, "open", closed)
    for name in ("config.json", STEM, "vocab.json", "model_index.json"):
        closed_names = {name}
        refused(load_text_to_image, folder, match=r"cannot be read: Permission denied\.$")
    (folder / "model.sha256").write_text("")
    closed_names = {"model.sha256"}
    refused(load_text_to_image, folder, match=r"model.sha256 cannot be read: Permission denied")


def test_folders_that_cannot_be_listed(folder, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "iterdir", fail)
    refused(load_pretrained, folder, match="model cannot be read: Permission denied")


def test_messages_show_what_cannot_be_printed():
    assert files.shown("conv_in.bias") == "conv_in.bias"
    assert files.shown("a\x1b[31m\n") == repr("a\x1b[31m\n")
    assert files.shown("\u202e") == "'\\u202e'"
    assert len(files.shown("a" * 10**6)) == 101


# ------------------------------------------------------------------ safetensors


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def changed_tensor(**changes):
    def change(content):
        header, data = header_of(content)
        header["conv_in.bias"] |= changes
        return with_header(header, data)

    return change


def overlapping(content):
    header, data = header_of(content)
    header["conv_in.bias"]["data_offsets"] = header["conv_out.bias"]["data_offsets"]
    return with_header(header, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: (2**63).to_bytes(8, "little") + content[8:],
        lambda content: (2**64 - 1).to_bytes(8, "little") + content[8:],
        lambda content: (2**24).to_bytes(8, "little") + content[8:],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: with_header(b"[" * 10**5, b""),
        lambda content: with_header(b"[1]", b""),
        lambda content: with_header({"a": 1}, b""),
        lambda content: with_header({"a": {}}, b""),
        overlapping,
        changed_tensor(data_offsets=[0, 2**63]),
        changed_tensor(data_offsets=[4, 0]),
        changed_tensor(data_offsets=[-4, 0]),
        changed_tensor(data_offsets="x"),
        changed_tensor(shape=[2**62, 8]),
        changed_tensor(shape=[-1]),
        changed_tensor(shape=None),
        changed_tensor(dtype="\x1b[31m"),
        changed_tensor(dtype=None),
    ],
)
def test_damaged_headers(folder, change):
    path = folder / "unet" / STEM
    path.write_bytes(change(path.read_bytes()))
    refused(load_pretrained, folder, match="is damaged, or no safetensors file: ")


def test_damage_anywhere_is_one_line(folder):
    path, rng = folder / "vae" / STEM, np.random.default_rng(0)
    good = path.read_bytes()
    outcomes = []
    for number in range(400):
        content = bytearray(good)
        content[rng.integers(len(good) // 2)] ^= 1 << rng.integers(8)
        path.write_bytes(content[: rng.integers(len(good))] if number % 2 else content)
        try:
            for name, stored in read_header(path).items():
                read_tensor(name, stored)
            outcomes.append("read")
        except ValueError as error:
            outcomes.append("one line" if str(error).isprintable() else "more")
    assert set(outcomes) == {"read", "one line"}
    assert min(outcomes.count(outcome) for outcome in set(outcomes)) > 20


def test_names_of_tensors_are_printed_visibly(folder):
    path = folder / "unet" / STEM
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors | {"a\x1b[31m\nb": np.zeros(1, np.float32)}, path)
    refused(load_pretrained, folder, match=r"1 of no parameter \('a\\x1b\[31m\\nb'\)")
    # Beyond what float32 holds.
    safetensors.numpy.save_file(tensors | {"conv_in.bias": np.full(8, 1e300)}, path)
    refused(load_pretrained, folder, match=r"tensor conv_in\.bias holds values that are not fin")


# ------------------------------------------------------------------ judges


@pytest.fixture(scope="module")
def judge_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    module = Judge(num_labels=3, widths=(2, 3), num_features=4)
    params = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    save_judge(folder / "judge.safetensors", module, params, image_shape=(8, 8, 1))
    return folder


def test_a_folder_is_a_judge(judge_files):
    images = np.zeros((2, 8, 8, 1), np.float32)
    by_folder, by_file = (
        load_judge(path).logits(images) for path in (judge_files, judge_files / "judge.safetensors")
    )
    np.testing.assert_array_equal(by_folder, by_file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "has format None, not"),
        ({"image_shape": [8, 8]}, r"malformed image_shape: \[8, 8\]"),
        ({"image_shape": [8, 8, "1"]}, "malformed image_shape"),
        ({"image_shape": [10**9, 8, 1]}, "malformed image_shape"),
        ({"image_shape": [2, 8, 1]}, "images 2×8 too small for 2 convolutions"),
        (
            {"image_shape": [65536, 65536, 1], "num_features": 65536},
            "describes .* parameters, which need",
        ),
        ({"widths": []}, r"malformed widths: \[\]"),
        ({"widths": [1] * 17}, "malformed widths"),
        ({"num_labels": 10**12}, "malformed num_labels: 1000000000000"),
        ({"num_labels": None}, "malformed num_labels: None"),
        ({"num_features": 10**400}, "malformed num_features: 1000"),
        ({"num_features": 5}, "json file describes: 3 tensors differ, the first is features.bias"),
    ],
)
def test_malformed_judges(judge_files, tmp_path, changes, message):
    path = pathlib.Path(shutil.copytree(judge_files, tmp_path / "judge"))
    edit_json(path / "judge.json", **changes)
    refused(load_judge, path, match=message)


def test_damaged_judges(judge_files, tmp_path):
    refused(load_judge, tmp_path, match=r"has no judge\.json")
    refused(load_judge, tmp_path / "nothing.safetensors", match=r"has no nothing\.json")
    path = pathlib.Path(shutil.copytree(judge_files, tmp_path / "judge"))
    (path / "judge.json").write_text(DEEP)
    refused(load_judge, path, match="judge.json is no readable json")
    shutil.copy(judge_files / "judge.json", path)
    (path / "judge.safetensors").write_bytes(b"\xff" * 100)
    refused(load_judge, path, match="judge.safetensors is damaged, or no safetensors file")
    (path / "judge.safetensors").unlink()
    refused(load_judge, path, match=r"has no judge\.safetensors")


# ------------------------------------------------------------------ folders that are made


def test_a_folder_that_cannot_be_made(tmp_path, loaded):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "file/model": "the folder .* cannot be made: Not a directory",
        "a" * 300: "cannot be made: File name too long",
        "link": "link is a link to nothing: remove it",
        "file": "file exists: choose another",
    }.items():
        refused(save_unet, tmp_path / name, loaded, match=message)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_full_disk_is_no_wrong_input(tmp_path, monkeypatch, number):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pathlib.Path, "mkdir", fail)
    full = number == errno.ENOSPC
    with pytest.raises(OSError if full else ValueError, match=os.strerror(number)) as caught:
        with new_folder(tmp_path / "model"):
            pass
    assert isinstance(caught.value, OSError) == full


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_removed(tmp_path):
    dead, alive, host = dead_process(), os.getppid(), _host()
    gone = [f".model.new-{dead}-{host}-00aa11bb", f".model.old-{dead}-{host}-00aa11bb",
            f".model.new-{dead}-00aa11bb"]  # fmt: skip
    kept = [f".model.new-{alive}-{host}-00aa11bb", f".model.new-{dead}-ffffffff-00aa11bb",
            f".other.new-{dead}-{host}-00aa11bb", "model", f"model.new-{dead}"]  # fmt: skip
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    clean_leftovers(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    assert (tmp_path / "model" / "config.json").read_text() == "model"
    clean_leftovers(tmp_path / "nowhere" / "model")


def test_what_was_moved_aside_returns(tmp_path):
    dead = dead_process()
    old = tmp_path / f".model.old-{dead}-{_host()}-00aa11bb"
    old.mkdir()
    (old / "config.json").write_text("before")
    (tmp_path / f".model.new-{dead}-{_host()}-00aa11bb").mkdir()
    clean_leftovers(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "before"


def test_leftovers_have_the_names_that_are_looked_for(tmp_path):
    """A process that is killed inside the block leaves what `clean_leftovers` finds."""
    lines = f"""
import os
from jax_unlearn.pretrained.weights import new_folder
with new_folder({str(tmp_path / "model")!r}) as folder:
    (folder / "config.json").write_text("x")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", lines]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    clean_leftovers(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
