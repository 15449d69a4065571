"""What a run measures, on a model whose every prediction is known: ε = 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_unlearn import divergences, schedules
from jax_unlearn.app import data
from jax_unlearn.app.options import ImageOptions
from jax_unlearn.app.tasks import base, evaluation
from jax_unlearn.app.tasks import images as requests
from jax_unlearn.pretrained import Pretrained, PretrainedConfig

STEPS = 50
SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": STEPS}


@pytest.fixture(scope="module")
def grey():
    """Grey images, a model that predicts no noise, and 8 dimensions an image."""
    unet = {"_class_name": "UNet2DModel", "sample_size": [2, 4], "in_channels": 1}
    unet |= {"out_channels": 1}
    pretrained = Pretrained(
        lambda params, x_t, t, cond: params * x_t,
        jnp.zeros(()),
        schedules.from_diffusers(SCHEDULER),
        PretrainedConfig(unet, SCHEDULER),
    )
    pixels = np.random.default_rng(0).integers(120, 136, (72, 2, 4, 1)).astype(np.uint8)

    def images(part, name):
        return data.Images(part, None, tuple(f"{name} {i}" for i in range(len(part))))

    return requests.make_request(
        pretrained,
        [("forget", "forget", images(pixels[:4], "forget"))],
        images(pixels[4:40], "retain"),
        images(pixels[40:], "held out"),
        ImageOptions(),
    )


def test_nelbo_weights_are_what_a_clipped_step_can_cost(grey):
    weighting = evaluation.make_weighting(grey, ImageOptions(weighting="nelbo"))
    schedule = grey.pretrained.schedule
    unbounded = np.asarray(divergences.path_kl_weights(schedule))
    snr = np.exp(np.asarray(schedule.log_snr, np.float64))
    # The error is ‖ε‖², 8 on average; a step costs a chain within [−1, 1] at most ½ΔSNR · 8 · 2².
    most = 2.0 * (snr[:-1] - snr[1:])
    ratio = np.asarray(weighting.weights)[1:] / np.minimum(unbounded[1:], most)
    np.testing.assert_allclose(ratio, 1.0, rtol=0.25)  # e_t is measured on 64 images
    assert unbounded[-1] > 100 * weighting.weights[-1]
    assert weighting.weights[0] == unbounded[0]
    assert np.asarray(weighting.probabilities).sum() == pytest.approx(1, abs=1e-5)


def test_batches_take_trees_and_few_large_rows():
    shapes = []

    def function(key, x, cond, nothing):
        shapes.append(x.shape)
        return x.sum(axis=1) + cond["a"]

    x, a = np.arange(14.0).reshape(7, 2), np.arange(7.0)
    found = base.in_batches(function, jax.random.key(0), x, {"a": a}, None, size=3)
    np.testing.assert_array_equal(found, x.sum(axis=1) + a)
    assert shapes == [(3, 2)] * 3
    assert [base.batch_rows(shape) for shape in ((28, 28, 1), (64, 64, 4), (512, 512, 3))] == [
        64, 16, 1,
    ]  # fmt: skip


def test_an_estimate_is_the_mean_and_its_standard_error():
    found = base.estimate(np.array([1.0, 2.0, 6.0]))
    assert found.value == 3.0
    assert found.stderr == pytest.approx(np.sqrt(7.0) / np.sqrt(3.0))
    assert np.isnan(base.estimate(np.array([1.0])).stderr)
    found = base.estimate(np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]))
    np.testing.assert_allclose(found.value, [3.0, 1.0])
    np.testing.assert_allclose(found.stderr, [np.sqrt(7.0 / 3.0), 1.0])


@pytest.mark.slow
def test_measurements_are_paired_and_of_the_sampled_chain(grey):
    options = ImageOptions(samples=0, evaluation_images=64)
    weighting = evaluation.make_weighting(grey, options)
    measure = evaluation.evaluator(grey, options, weighting, None).measure
    before, again, after = (measure(jnp.full((), value))[0] for value in (0.0, 0.0, 1.0))
    for name in ("forgotten", "held_out", "retained"):
        np.testing.assert_array_equal(before.paired["nelbo"][name], again.paired["nelbo"][name])
        assert before.paired["nelbo"][name].shape == (32,)
    assert before.objective.value == 0.0
    # ‖0 − x_t‖² = ᾱ x_0² + (1−ᾱ) ‖ε‖² with x_0 ≈ 0, averaged over t and 8 dimensions.
    noise_share = float((1 - grey.pretrained.schedule.alphas_cumprod).mean())
    assert after.objective.value == pytest.approx(noise_share, rel=0.1)
    # x_0 ≈ 0, so that ε = 0 is off by clip(σε, ±α)/σ: E min(|ε|, α/σ)² with ε normal.
    limit = np.exp(0.5 * np.asarray(grey.pretrained.schedule.log_snr, np.float64))
    inside = 2 * stats.norm.cdf(limit) - 1 - 2 * limit * stats.norm.pdf(limit)
    clipped = (inside + 2 * limit**2 * stats.norm.sf(limit)).mean()
    assert before.constraints.value[0] == pytest.approx(clipped, rel=0.1)
    assert clipped < 0.8  # unclipped it is 1
    # The images are near 0; ε = x_t gives x̂_0 = x_t (1−σ)/α, and ε = 0 gives x_t/α, clipped.
    assert (after.paired["nelbo"]["held_out"] < before.paired["nelbo"]["held_out"]).all()
