"""A closed-form edit of cross-attention that maps some prompts to others, to start training at."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_unlearn.typing import Array, ArrayLike, Params

__all__ = ["edit_cross_attention"]


def edit_cross_attention(
    params: Params,
    *,
    sources: ArrayLike,
    targets: ArrayLike,
    kept: ArrayLike,
    weight: float = 1.0,
    ridge: float = 1e-3,
) -> Params:
    """Makes keys and values of the sources' tokens those of the targets', and keeps the others'.

    Every key and value kernel W_0 of attention to the text becomes W_0 M (acting on hidden states
    as W_0 M h) with

      M = argmin s Σ ‖M c − b‖² + Σ ‖M k − k‖² + ρ ‖M − I‖²
        = I + s (Σ (b − c) cᵀ) (s Σ c cᵀ + Σ k kᵀ + ρ I)⁻¹

    over pairs (c, b) of a source's and its target's hidden states at the same token, and kept ones
    k; ρ is `ridge` times the mean eigenvalue of the weighted sums. One M serves all layers, since
    each kernel's own least squares has the minimiser W_0 M (Gandikota et al. 2024, 2308.14761, with
    their regulariser on M). It is exact where the sources' hidden states are linearly
    independent of the kept ones', for instance for one prompt in fewer tokens than dimensions;
    SDXL's pooled text is not edited.

    Args:
      params: of a `UNet2DConditionModel`.
      sources: hidden states of prompts to be moved, [n, tokens, width].
      targets: of the prompts that each becomes, of the same shape.
      kept: hidden states of prompts that stay as they are, [k, tokens, width].
      weight: s ≥ 0, of the sources beside the kept ones; 0 changes nothing.
      ridge: how far M is held to I where the prompts leave it free, > 0.

    Raises:
      ValueError: for shapes that do not fit, a negative weight, a ridge that is not positive, or a
        network without attention to a text of that width.
    """
    sources, targets, kept = (jnp.asarray(part, jnp.float32) for part in (sources, targets, kept))
    width = sources.shape[-1]
    if sources.ndim != 3 or sources.shape != targets.shape or kept.shape[1:] != sources.shape[1:]:
        raise ValueError(
            "expected hidden states [n, tokens, width] of as many sources as targets and of kept "
            f"prompts, not {sources.shape}, {targets.shape} and {kept.shape}."
        )
    if not ridge > 0 or not weight >= 0:
        raise ValueError(
            f"ridge must be positive, not {ridge}, and weight at least 0, not {weight}."
        )
    rows = (part.reshape(-1, width) for part in (sources, targets, kept))
    change = _change(*rows, weight, ridge)
    edited = 0

    def edit(path: tuple[Any, ...], leaf: Array) -> Array:
        nonlocal edited
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or "attn2" not in names or names[-2] not in ("to_k", "to_v"):
            return leaf
        if leaf.shape[0] != width:
            raise ValueError(f"{'.'.join(names)} takes texts {leaf.shape[0]} wide, not {width}.")
        edited += 1
        return leaf + jnp.matmul(change.T, leaf, precision="highest")

    found = jax.tree_util.tree_map_with_path(edit, params)
    if not edited:
        raise ValueError("the network has no attention to a text.")
    return found


@jax.jit
def _change(sources: Array, targets: Array, kept: Array, weight: float, ridge: float) -> Array:
    """M − I."""
    with jax.default_matmul_precision("highest"):
        moved = weight * (targets - sources).T @ sources
        sums = weight * sources.T @ sources + kept.T @ kept
        damping = ridge * jnp.trace(sums) / len(sums)
        sums = sums + damping * jnp.eye(len(sums))
        return jax.scipy.linalg.solve(sums, moved.T, assume_a="pos").T
