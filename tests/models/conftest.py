import pathlib

import jax
import pytest


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def torch_side(monkeypatch):
    """The script that writes the fixtures of Stable Diffusion, for its torch networks."""
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "fixtures")
    import write_stable_diffusion_fixtures

    return write_stable_diffusion_fixtures
