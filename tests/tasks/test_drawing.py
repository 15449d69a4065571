"""What a judge is said to have named, against counts by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.tasks.conditions import of_labels
from jax_unlearn.app.tasks.drawing import drawing
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained import load_pretrained


def by_brightness(images):
    """Class 0, 1 or 2 for dark, middle and bright images."""
    level = jnp.mean(images, axis=(1, 2, 3))[:, None]
    return -jnp.square(level - jnp.array([-0.8, 0.0, 0.8]))


def test_names_are_counted_by_condition(tiny_model):
    pretrained = load_pretrained(tiny_model)
    # Two conditions are the same to the judge, and the third is nothing that it tells apart.
    conditions = of_labels(pretrained)._replace(shown_as=(2, 2, -1))
    judge = JudgeFunctions(by_brightness, lambda images: images.reshape(len(images), -1))
    drawn = drawing(pretrained, conditions, RunOptions(samples=4), judge, (1,))
    levels = np.array([[255, 255, 255, 0], [255, 0, 0, 0], [255, 255, 127, 127]], np.uint8)
    samples = np.broadcast_to(levels[..., None, None, None], (3, 4, 8, 8, 1))
    found = drawn.judge(samples, None)
    rates = {name: entry["rate"] for name, entry in found["agreement"].items()}
    assert rates == {"cat": pytest.approx(0.75), "dog": pytest.approx(0.25)}
    named = {name: entry["rate"] for name, entry in found["named_forgotten"].items()}
    assert named == {
        name: pytest.approx(r) for name, r in zip(named, (0.75, 0.25, 0.5), strict=True)
    }
    # Wilson's half-width at one standard deviation, for one hit of four.
    half = np.sqrt(0.25 * 0.75 / 4 + 1 / 64) / 1.25
    assert found["agreement"]["dog"]["stderr"] == pytest.approx(half)
