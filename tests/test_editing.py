"""Closed-form edits of cross-attention against least squares and against the network itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error
from pipelines import UNET, shapes

from jax_unlearn.models.initialisation import random_params
from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionDenoiser
from jax_unlearn.pretrained.editing import edit_cross_attention


@pytest.fixture(scope="module")
def params():
    return random_params(shapes("unet", UNET), jax.random.key(0))


def hidden(seed, prompts, tokens=2, width=8):
    return np.random.default_rng(seed).normal(size=(prompts, tokens, width)).astype(np.float32)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_each_kernel_is_the_minimiser_of_its_least_squares(params, weight):
    sources, targets, kept, ridge = hidden(1, 3), hidden(2, 3), hidden(3, 6), 0.1
    edited = edit_cross_attention(
        params, sources=sources, targets=targets, kept=kept, weight=weight, ridge=ridge
    )
    c, b, k = (part.reshape(-1, 8).astype(np.float64) for part in (sources, targets, kept))
    c, b = np.sqrt(weight) * c, np.sqrt(weight) * b
    rho = ridge * (np.square(c).sum() + np.square(k).sum()) / 8
    # s‖M c − b‖² + ‖M k − k‖² + ρ‖M − I‖², as one system in the rows of Mᵀ.
    inputs = np.concatenate([c, k, np.sqrt(rho) * np.eye(8)])
    outputs = np.concatenate([b, k, np.sqrt(rho) * np.eye(8)])
    transposed = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    changed = 0
    for path, before in jax.tree_util.tree_leaves_with_path(params):
        after = edited
        for entry in path:
            after = after[entry.key]
        names = [entry.key for entry in path]
        if "attn2" in names and names[-2] in ("to_k", "to_v"):
            np.testing.assert_allclose(after, transposed @ np.asarray(before), atol=2e-5)
            changed += 1
        else:
            np.testing.assert_array_equal(after, before)
    assert changed == 8  # keys and values of four transformer blocks


@pytest.mark.slow
def test_independent_prompts_are_moved_exactly_and_others_stay(params):
    apply = UNet2DConditionDenoiser(UNet2DConditionConfig.from_diffusers(UNET))
    sources, targets, kept = hidden(1, 1), hidden(2, 1), hidden(3, 2)
    edited = edit_cross_attention(params, sources=sources, targets=targets, kept=kept, ridge=1e-7)
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([3, 700])

    def predict(params, condition):
        return apply(params, x, t, jnp.broadcast_to(condition, (2, 2, 8)))

    with jax.default_matmul_precision("highest"):
        moved = relative_error(predict(edited, sources), predict(params, targets))
        stays = relative_error(predict(edited, kept), predict(params, kept))
        apart = relative_error(predict(params, sources), predict(params, targets))
    assert moved < 1e-4
    assert stays < 1e-4
    assert apart > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": hidden(2, 2)}, "as many sources"),
        ({"kept": hidden(3, 2, tokens=3)}, "as many sources"),
        ({"ridge": 0.0}, "positive"),
        ({"weight": -1.0}, "at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(params, changes, message):
    given = {"sources": hidden(1, 1), "targets": hidden(2, 1), "kept": hidden(3, 2)} | changes
    with pytest.raises(ValueError, match=message):
        edit_cross_attention(params, **given)


def test_networks_without_attention_to_such_a_text_are_refused(params):
    given = {"targets": hidden(2, 1, width=4), "kept": hidden(3, 2, width=4)}
    with pytest.raises(ValueError, match="8 wide"):
        edit_cross_attention(params, sources=hidden(1, 1, width=4), **given)
    with pytest.raises(ValueError, match="no attention"):
        edit_cross_attention(
            {"conv": {"kernel": jnp.zeros((3, 3))}}, sources=hidden(1, 1, width=4), **given
        )
