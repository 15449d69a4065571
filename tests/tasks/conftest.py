import pytest
from pipelines import ONE_LEVEL, write_pipeline

from jax_unlearn.pretrained.text_to_image import load_text_to_image


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The folder of a tiny random pipeline from text to image."""
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny", unet=ONE_LEVEL)


@pytest.fixture(scope="session")
def model(pipeline):
    return load_text_to_image(pipeline)
