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
# Most of the suite's time is XLA's; few optimisations take two thirds. The numbers must agree.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny model."""
    from tiny_models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", 8)


@pytest.fixture(scope="session")
def two_levels(tmp_path_factory):
    """The folder of a tiny model with a middle: what it draws depends more on the label."""
    from tiny_models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", 8, levels=2)


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
