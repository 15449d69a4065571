"""diffusers' `Transformer2DModel`: attention of the pixels to each other and to a text."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jax_unlearn.models.blocks import ACTIVATIONS, Attention, Conv, GroupNorm, LayerNorm
from jax_unlearn.typing import Array

__all__ = ["BasicTransformerBlock", "Transformer2DModel"]


class GEGLU(nn.Module):
    """a · gelu(b), where a and b are the halves of W x + c; gelu is exact."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] → [..., features]."""
        x = nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
        values, gates = x[..., : self.features], x[..., self.features :]
        return values * ACTIVATIONS["gelu"](gates)


class FeedForward(nn.Module):
    """A `GEGLU` of four times the width, projected back."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] → [..., C]."""
        hidden = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """x + self-attention, then + cross-attention, then + feed-forward, each of the normed input.

    Attributes:
      heads: of both attentions.
      only_cross_attention: the first attention too is to the context.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """[B, N, C], [B, M, D] → [B, N, C]."""

        def attend(name: str, x: Array, context: Array | None) -> Array:
            head_dim = x.shape[-1] // self.heads
            return Attention(
                self.heads, head_dim, qkv_bias=False, residual=False, dtype=self.dtype, name=name
            )(x, context)

        first = context if self.only_cross_attention else None
        x = x + attend("attn1", LayerNorm(name="norm1")(x), first)
        x = x + attend("attn2", LayerNorm(name="norm2")(x), context)
        return x + FeedForward(dtype=self.dtype, name="ff")(LayerNorm(name="norm3")(x))


class Transformer2DModel(nn.Module):
    """x + a projection of `layers` transformer blocks over the projected, group-normed pixels.

    Attributes:
      layers: number of transformer blocks.
      block: makes a `BasicTransformerBlock`.
      norm_groups: of the group norm, whose eps is 1e-6 whatever that of other norms.
      linear_projection: projections are stored as matrices, not as 1×1 convolutions.
    """

    layers: int
    block: Callable[..., Any]
    norm_groups: int
    linear_projection: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """[B, H, W, C], [B, M, D] → [B, H, W, C]."""
        channels = x.shape[-1]

        def project(name: str, x: Array) -> Array:
            if self.linear_projection:
                return nn.Dense(channels, dtype=self.dtype, name=name)(x)
            return Conv(channels, 1, padding=(0, 0), dtype=self.dtype, name=name)(x)

        h = project("proj_in", GroupNorm(self.norm_groups, 1e-6, name="norm")(x))
        h = h.reshape(x.shape[0], -1, channels)
        for i in range(self.layers):
            h = self.block(name=f"transformer_blocks_{i}")(h, context)
        return x + project("proj_out", h.reshape(x.shape))
