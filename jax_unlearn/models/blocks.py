"""The parts of diffusers' UNets as linen modules, channels last.

Names of submodules are those of diffusers with `_` for the `.` before an index, so that a path
of parameters maps to a key of the checkpoint by rule. Every module takes `dtype`, in which it
computes (None: that of its input); parameters stay float32, and norms and the softmax of
attention are computed in at least float32.

Defaults of linen that differ from torch are avoided rather than corrected: the group norm is
two-pass with an explicit epsilon, paddings are explicit, and gelu is exact.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.models.convolution import convolve
from jax_unlearn.typing import Array

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Conv",
    "DownBlock2D",
    "Downsample2D",
    "FourierProjection",
    "GroupNorm",
    "LabelEmbedding",
    "LayerNorm",
    "MidBlock2D",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "UpBlock2D",
    "Upsample2D",
    "sinusoidal_embedding",
]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
"""Activations by diffusers' names."""

Factory = Callable[..., Any]
"""Makes a submodule: a `functools.partial` of its class with every option that blocks share."""


class Conv(nn.Module):
    """2D convolution y[h,w] = Σ_{i,j} x[s·h+i−p, s·w+j−p] K[i,j] + b, zeros outside x.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel, stored as [k, k, in, out].
      stride: s.
      padding: zeros (before, after) both height and width.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] → [B, H', W', features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, stride=self.stride, padding=self.padding)
        return y + bias


class GroupNorm(nn.Module):
    """y = (x − mean) / √(var + eps) · scale + bias, moments over pixels and a group's channels.

    The variance is that of the centred values: E[x²] − E[x]² loses digits at a large mean.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, ..., C] → [B, ..., C], of the dtype of `x`.

        Raises:
          ValueError: if the groups do not divide the channels.
        """
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"a group norm of {self.groups} groups cannot divide {channels} channels: "
                "check norm_num_groups and block_out_channels."
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        grouped = x.reshape(x.shape[0], -1, self.groups, channels // self.groups)
        grouped = grouped.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(centred).mean((1, 3), keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * scale + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """As `GroupNorm`, but with moments over the channels of each pixel or token."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] → [..., C], of the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


def sinusoidal_embedding(
    t: Array, channels: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Array:
    """[sin(t·f), cos(t·f)] with f_i = 10000^(−i / (n − freq_shift)), i < n = ⌊channels/2⌋.

    Args:
      t: times [B].
      channels: width of the embedding; an odd one ends in a zero.
      flip_sin_to_cos: put the cosines first.
      freq_shift: 1 for DDPM's own embedding, 0 for most later networks.

    Returns:
      [B, channels], float32.

    References:
      Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, 2020, appendix B.
    """
    half = channels // 2
    # torch rounds each of these steps to float32, and t = 999 magnifies the rounding: do the same.
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half - freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    parts = (
        [jnp.cos(angles), jnp.sin(angles)]
        if flip_sin_to_cos
        else [jnp.sin(angles), jnp.cos(angles)]
    )
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, channels % 2)))


class FourierProjection(nn.Module):
    """[sin(2π W log t), cos(2π W log t)] with a fixed random W (Song et al. 2021); needs t > 0."""

    channels: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """[B] → [B, 2·channels], float32; no gradient reaches W."""
        weight = self.param("weight", nn.initializers.normal(self.scale), (self.channels,))
        weight = jax.lax.stop_gradient(weight)
        angles = jnp.log(t.astype(jnp.float32))[:, None] * weight * 2 * np.float32(np.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """act_2(W_2 act_1(W_1 x + b_1) + b_2), without act_2 where `post_act_fn` is None."""

    features: int
    act_fn: str = "silu"
    post_act_fn: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, C] → [B, features]."""
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        x = ACTIVATIONS[self.act_fn](x)
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_2")(x)
        return x if self.post_act_fn is None else ACTIVATIONS[self.post_act_fn](x)


class LabelEmbedding(nn.Module):
    """A table of one vector a label; labels outside it give nan, never another label's vector."""

    labels: int
    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        """[...] integers → [..., features]."""
        init = nn.initializers.normal(1.0)
        table = self.param("embedding", init, (self.labels, self.features), jnp.float32)
        rows = (
            jnp.asarray(table)
            .at[labels]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return rows if self.dtype is None else rows.astype(self.dtype)


def _kernel(dtype: Any, head_dim: int, keys: int) -> Literal["cudnn"] | None:
    """The kernel of `jax.nn.dot_product_attention`, which never picks a flash kernel by itself.

    cuDNN has one for half precision, heads of some widths and, in training, an even number of keys,
    on GPUs of NVIDIA since Ampere. It has no forward-mode derivative. None leaves attention to XLA,
    as float32 does everywhere and the 77 tokens of CLIP do.
    """
    device = jax.config.jax_default_device or jax.devices()[0]  # pyrefly: ignore
    if getattr(device, "platform", "") != "gpu" or "NVIDIA" not in device.device_kind:
        return None
    capability = float(device.compute_capability)
    widest = 256 if capability >= 9 else 128
    fits = keys % 2 == 0 and head_dim % 8 == 0 and head_dim <= widest
    return "cudnn" if capability >= 8 and fits and dtype in (jnp.bfloat16, jnp.float16) else None


class Attention(nn.Module):
    """Multi-head attention over pixels: softmax(QKᵀ/√d) V, projected, then (x + ·) / rescale.

    Attributes:
      heads: number of heads.
      head_dim: d, so that queries, keys and values have heads·d channels.
      norm_groups: groups of the norm before the projections; None has no norm.
      norm_eps: of that norm.
      qkv_bias: whether queries, keys and values have a bias.
      residual: whether x is added to the output.
      rescale: the output is divided by it.
    """

    heads: int
    head_dim: int
    norm_groups: int | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    residual: bool = True
    rescale: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """[B, ..., C] → [B, ..., C]; keys and values come from `context` [B, N, D], else from x."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.norm_groups is not None:
            tokens = GroupNorm(self.norm_groups, self.norm_eps, name="group_norm")(tokens)
        source = tokens if context is None else context
        inner = self.heads * self.head_dim

        def project(name: str, values: Array) -> Array:
            dense = nn.Dense(inner, use_bias=self.qkv_bias, dtype=self.dtype, name=name)
            return dense(values).reshape(*values.shape[:2], self.heads, self.head_dim)

        queries = project("to_q", tokens)
        mixed = jax.nn.dot_product_attention(
            queries,
            project("to_k", source),
            project("to_v", source),
            implementation=_kernel(queries.dtype, self.head_dim, source.shape[1]),
        ).reshape(*tokens.shape[:2], inner)
        out = nn.Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(mixed).reshape(x.shape)
        out = out + x if self.residual else out
        return out / self.rescale


def _repeat_pixels(x: Array) -> Array:
    """Nearest-neighbour upsampling by two."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def _average_pixels(x: Array) -> Array:
    """Mean of each 2×2 pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Downsample2D(nn.Module):
    """A 3×3 convolution of stride 2; `padding` 0 pads one row below and one column right."""

    features: int
    padding: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        """[B, H, W, C] → [B, H/2, W/2, features]; `temb` is ignored."""
        padding = (0, 1) if self.padding == 0 else (self.padding, self.padding)
        return Conv(self.features, stride=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Each pixel repeated 2×2, then a 3×3 convolution."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        """[B, H, W, C] → [B, 2H, 2W, features]; `temb` is ignored."""
        return Conv(self.features, dtype=self.dtype, name="conv")(_repeat_pixels(x))


class ResnetBlock2D(nn.Module):
    """(shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))) ⊕ temb)))) / rescale.

    ⊕ adds a projection of act(temb) before norm2, or, with `scale_shift`, applies
    h ↦ h·(1 + scale) + shift after it. The shortcut is a 1×1 convolution where the channels
    change, else the identity.

    Attributes:
      features: output channels.
      groups: of both norms.
      eps: of both norms.
      act_fn: a key of `ACTIVATIONS`.
      scale_shift: how the time embedding enters, see above.
      rescale: the output is divided by it.
      resample: "up" repeats and "down" averages pixels, on both paths, before conv1.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    act_fn: str = "silu"
    scale_shift: bool = False
    rescale: float = 1.0
    resample: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        """[B, H, W, C], [B, D] or None → [B, H', W', features]."""
        act = ACTIVATIONS[self.act_fn]
        h = act(GroupNorm(self.groups, self.eps, name="norm1")(x))
        if self.resample == "up":
            x, h = _repeat_pixels(x), _repeat_pixels(h)
        elif self.resample == "down":
            x, h = _average_pixels(x), _average_pixels(h)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        norm2 = GroupNorm(self.groups, self.eps, name="norm2")
        if temb is None:
            h = norm2(h)
        else:
            width = self.features * (2 if self.scale_shift else 1)
            shift = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(act(temb))
            shift = shift[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
                h = norm2(h) * (1 + scale) + shift
            else:
                h = norm2(h + shift)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(act(h))
        if x.shape[-1] != self.features:
            x = Conv(
                self.features, kernel_size=1, padding=(0, 0), dtype=self.dtype, name="conv_shortcut"
            )(x)
        return (x + h) / self.rescale


class DownBlock2D(nn.Module):
    """Resnets, each with an attention where there is one, then a downsampler where there is one.

    Attributes:
      features: output channels.
      layers: number of resnets.
      resnet: makes a `ResnetBlock2D`.
      attention: makes a module called as (x, context), or None.
      downsample: makes a module called as (x, temb), or None.
    """

    features: int
    layers: int
    resnet: Factory
    attention: Factory | None = None
    downsample: Factory | None = None

    @nn.compact
    def __call__(
        self, x: Array, temb: Array | None, context: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """Returns the output and what the up blocks are to take, the output last."""
        skips = []
        for i in range(self.layers):
            x = self.resnet(self.features, name=f"resnets_{i}")(x, temb)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, context)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(self.features, name="downsamplers_0")(x, temb)
            skips.append(x)
        return x, skips


class MidBlock2D(nn.Module):
    """A resnet, an attention where there is one, a resnet; attributes as in `DownBlock2D`."""

    features: int
    resnet: Factory
    attention: Factory | None = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None, context: Array | None = None) -> Array:
        """[B, H, W, C] → [B, H, W, features]."""
        x = self.resnet(self.features, name="resnets_0")(x, temb)
        if self.attention is not None:
            x = self.attention(name="attentions_0")(x, context)
        return self.resnet(self.features, name="resnets_1")(x, temb)


class UpBlock2D(nn.Module):
    """As `DownBlock2D`, each resnet taking one skip beside its input, then an upsampler."""

    features: int
    layers: int
    resnet: Factory
    attention: Factory | None = None
    upsample: Factory | None = None

    @nn.compact
    def __call__(
        self, x: Array, skips: list[Array] | None, temb: Array | None, context: Array | None = None
    ) -> Array:
        """Takes `layers` values off the end of `skips`, if any, which is changed in place."""
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.resnet(self.features, name=f"resnets_{i}")(x, temb)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, context)
        if self.upsample is not None:
            x = self.upsample(self.features, name="upsamplers_0")(x, temb)
        return x
