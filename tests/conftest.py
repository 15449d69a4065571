import atexit
import os
import pathlib
import shutil
import tempfile

# Before jax is imported: the sharding tests need more than one device, and whole runs compile
# the same programs again, in this process and in those it starts.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="jax_unlearn-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache

import numpy as np
import pytest

# Scripts that write the fixtures, with torch: not tests, and not searched for doctests.
collect_ignore_glob = ["fixtures/*"]


@pytest.fixture(autouse=True, scope="module")
def _frees_programs():
    """A program compiled for CPUs holds memory maps; past vm.max_map_count, 65,530, XLA crashes."""
    import jax

    yield
    jax.clear_caches()


def write_tiny_model(path, channels):
    """A random class-conditional UNet of 8×8 grey images: three labels and null."""
    import jax

    from jax_unlearn.models.unet_2d import UNet2DConfig, init_params
    from jax_unlearn.pretrained import Pretrained, PretrainedConfig, UNet2DDenoiser, save_pretrained
    from jax_unlearn.schedules import from_diffusers

    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [channels, channels],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "add_attention": False,
        "num_class_embeds": 4,
    }
    scheduler = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    params = init_params(unet, jax.random.key(0))
    config = PretrainedConfig(unet, scheduler, {0: "cat", 1: "dog", 2: "T-shirt/top"}, 3)
    denoiser = UNet2DDenoiser(UNet2DConfig.from_diffusers(unet), 3)
    save_pretrained(path, Pretrained(denoiser, params, from_diffusers(scheduler), config))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", 8)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """Two npz files of 8×8 images: `forget` has the label 1 alone, `retain` has 0 and 2."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)

    def write(name, labels):
        shape = (len(labels), 8, 8)
        images = np.clip(rng.normal(60 * labels[:, None, None] + 60, 30, shape), 0, 255)
        np.savez(folder / name, images=images.astype(np.uint8), labels=labels)
        return folder / name

    return {
        "forget": write("forget.npz", np.full(12, 1)),
        "retain": write("retain.npz", np.tile([0, 2], 30)),
    }


@pytest.fixture
def clip_side(monkeypatch):
    """The script that writes the fixtures of CLIP, for its torch networks."""
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "fixtures")
    import write_clip_fixtures

    return write_clip_fixtures
