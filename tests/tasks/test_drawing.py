"""What a judge is said to have named, against counts by hand."""

import jax
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


def test_runs_of_one_command_draw_their_reference_once(tiny_model):
    calls, pretrained = [], load_pretrained(tiny_model)
    conditions = of_labels(pretrained)

    def counted(images):
        jax.debug.callback(calls.append, images.shape[0])
        return images

    conditions = conditions._replace(decode=counted)
    known, other = {}, jax.tree.map(lambda leaf: 1.1 * leaf, pretrained.params)

    def drawn(params=pretrained.params, seed=0, shared=known, **changes):
        options = RunOptions(**({"samples": 2, "sampling_steps": 2} | changes))
        found = drawing(pretrained, conditions, options, None, (), known=shared).draw(params, seed)
        jax.effects_barrier()
        count = len(calls)
        calls.clear()
        return found, count

    first, count = drawn()
    assert count == 1
    again, count = drawn()
    assert count == 0
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(drawn(shared=None)[0], first)
    # What is drawn otherwise, or of other parameters, is not the same.
    assert drawn(other)[1] == drawn(other)[1] == 1
    for change in ({"seed": 1}, {"guidance": 1.0}, {"sampling_steps": 3}, {"samples": 3}):
        assert drawn(**change)[1] == 1, change
    assert drawn()[1] == 0
