"""diffusers' `UNet2DModel`, the network of DDPM, as a linen module."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models import blocks
from jax_unlearn.models.config import is_count, is_number, read_options, require, require_choices
from jax_unlearn.models.initialisation import random_params
from jax_unlearn.typing import Array, Condition, Params

__all__ = ["UNet2DConfig", "UNet2DModel", "init_params", "param_shapes"]

_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
    """The options of diffusers' `UNet2DModel`, with its names and its defaults.

    Most of them change the output and no shape, so a wrong one is noticed by no loader. These
    meanings differ from what the name says:

    Attributes:
      attention_head_dim: channels of one head; None is one head of all channels.
      attn_norm_num_groups: groups of the mid block's attention norm; None is `norm_num_groups`,
        or no norm with "scale_shift".
      dropout: kept for saving; `apply` runs without.
      downsample_type: of the attention blocks only, "conv" or "resnet"; so `upsample_type`.
      downsample_padding: 0 pads one row below and one column to the right.
      mid_block_scale_factor: outputs of the mid block's parts are divided by it.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNet2DConfig":
        """Reads a `config.json`: missing keys take diffusers' defaults.

        Raises:
          ValueError: for an unknown key, except those that start with `_` or hold null, and for
            a value that is malformed or not supported.
        """
        values = read_options(cls, config, name="UNet2DModel")
        for name in ("down_block_types", "up_block_types"):
            if name in values and isinstance(values[name], tuple):
                # The first released checkpoints prefix their blocks so.
                values[name] = tuple(str(kind).removeprefix("UNetRes") for kind in values[name])
        for name in ("downsample_type", "upsample_type"):
            if name in values:
                values[name] = values[name] or "conv"
        return cls(**values)

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        self._check_types()
        require_choices(
            self,
            {
                "time_embedding_type": ("positional", "fourier"),
                "down_block_types": _DOWN_BLOCKS,
                "mid_block_type": ("UNetMidBlock2D", None),
                "up_block_types": _UP_BLOCKS,
                "downsample_padding": (0, 1),
                "downsample_type": ("conv", "resnet"),
                "upsample_type": ("conv", "resnet"),
                "act_fn": tuple(blocks.ACTIVATIONS),
                "resnet_time_scale_shift": ("default", "scale_shift"),
                "class_embed_type": (None, "timestep", "identity"),
            },
        )
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                "block_out_channels, down_block_types and up_block_types must be of one length, "
                f"not {levels}, {len(self.down_block_types)} and {len(self.up_block_types)}."
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the {channels} "
                    f"channels of block_out_channels {self.block_out_channels}."
                )
            if self.attention_head_dim is not None and self._attends(channels):
                if channels < self.attention_head_dim:
                    raise ValueError(
                        f"attention_head_dim {self.attention_head_dim} leaves no head in a block "
                        f"of {channels} channels: it is the channels of a head, not their number."
                    )

    def _attends(self, channels: int) -> bool:
        """Whether a block of this many channels has attention."""
        down = zip(self.block_out_channels, self.down_block_types, strict=True)
        up = zip(reversed(self.block_out_channels), self.up_block_types, strict=True)
        mid = self.mid_block_type is not None and self.add_attention
        return (mid and channels == self.block_out_channels[-1]) or any(
            width == channels and kind.startswith("Attn") for width, kind in (*down, *up)
        )

    def _check_types(self) -> None:
        def is_tuple(value: Any, kind: type) -> bool:
            return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)

        size, channels = self.sample_size, self.block_out_channels
        sides = size if isinstance(size, tuple) else (size, size)
        checks: dict[str, bool] = {
            name: is_count(getattr(self, name))
            for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
        }
        checks |= {
            name: getattr(self, name) is None or is_count(getattr(self, name))
            for name in (
                "attention_head_dim",
                "attn_norm_num_groups",
                "num_class_embeds",
                "time_embedding_dim",
            )
        }
        checks |= {
            name: isinstance(getattr(self, name), bool)
            for name in ("center_input_sample", "flip_sin_to_cos", "add_attention")
        }
        checks |= {
            "sample_size": size is None or (len(sides) == 2 and all(map(is_count, sides))),
            "block_out_channels": isinstance(channels, tuple)
            and len(channels) > 0
            and all(map(is_count, channels)),
            "down_block_types": is_tuple(self.down_block_types, str),
            "up_block_types": is_tuple(self.up_block_types, str),
            "act_fn": isinstance(self.act_fn, str),
            "norm_eps": is_number(self.norm_eps) and self.norm_eps >= 0,
            "freq_shift": is_number(self.freq_shift),
            "dropout": is_number(self.dropout),
            "mid_block_scale_factor": is_number(self.mid_block_scale_factor)
            and self.mid_block_scale_factor != 0,
        }
        require(self, checks, name="UNet2DModel")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image.

        Raises:
          ValueError: if the config has no `sample_size`.
        """
        if self.sample_size is None:
            raise ValueError("the config has no sample_size: the image size must be given.")
        size = self.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height, width, self.in_channels


class UNet2DModel(nn.Module):
    """diffusers' `UNet2DModel`: a UNet of residual blocks with self-attention.

    `apply({'params': params}, x_t, t, cond)` is the prediction of the noise, of x_0 or of the
    velocity, whichever the weights were trained for.

    Attributes:
      config: the options.
      dtype: computing dtype, e.g. bfloat16; None computes in that of the inputs. Parameters,
        norms and the softmax stay float32.
      remat: compute each resnet and attention block again in the backward pass, which then stores
        no more than their inputs.
    """

    config: UNet2DConfig
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_t: Array, t: Array, cond: Condition = None) -> Array:
        """Predicts from noisy images.

        Args:
          x_t: noisy images [B, H, W, in_channels]; H and W multiples of 2^(levels − 1).
          t: time steps [B], or one for all; positive with Fourier time embeddings.
          cond: labels [B] (`num_class_embeds`), numbers [B] (class embedding "timestep"),
            vectors [B, D] ("identity"), or None for an unconditional model.

        Returns:
          [B, H, W, out_channels], of the dtype of `x_t`.

        Raises:
          ValueError: for shapes that do not fit, or a condition missing or not wanted.
        """
        config = self.config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        self._check_images(x_t)
        t = jnp.broadcast_to(jnp.asarray(t), (x_t.shape[0],))
        temb = self._embed(x_t, t, cond)

        resnet = functools.partial(
            self._wrap(blocks.ResnetBlock2D),
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn.lower(),
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dtype=self.dtype,
        )
        x = 2 * x_t - 1 if config.center_input_sample else x_t
        x = blocks.Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        skips = [x]
        for i, kind in enumerate(config.down_block_types):
            attends = kind == "AttnDownBlock2D"
            if attends and config.downsample_type == "resnet":
                downsample = functools.partial(resnet, resample="down")
            else:
                downsample = functools.partial(
                    blocks.Downsample2D, padding=config.downsample_padding, dtype=self.dtype
                )
            x, outputs = blocks.DownBlock2D(
                channels[i],
                config.layers_per_block,
                resnet,
                self._attention(channels[i]) if attends else None,
                downsample if i < levels - 1 else None,
                name=f"down_blocks_{i}",
            )(x, temb)
            skips.extend(outputs)

        if config.mid_block_type is not None:
            rescale = config.mid_block_scale_factor
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            attention = self._attention(channels[-1], norm_groups=groups, rescale=rescale)
            x = blocks.MidBlock2D(
                channels[-1],
                functools.partial(resnet, rescale=rescale),
                attention if config.add_attention else None,
                name="mid_block",
            )(x, temb)

        for i, kind in enumerate(config.up_block_types):
            attends = kind == "AttnUpBlock2D"
            features = channels[-1 - i]
            if attends and config.upsample_type == "resnet":
                upsample = functools.partial(resnet, resample="up")
            else:
                upsample = functools.partial(blocks.Upsample2D, dtype=self.dtype)
            x = blocks.UpBlock2D(
                features,
                config.layers_per_block + 1,
                resnet,
                self._attention(features) if attends else None,
                upsample if i < levels - 1 else None,
                name=f"up_blocks_{i}",
            )(x, skips, temb)

        x = blocks.GroupNorm(config.norm_num_groups, config.norm_eps, name="conv_norm_out")(x)
        # Not `act_fn`: diffusers always ends in silu.
        x = blocks.Conv(config.out_channels, dtype=self.dtype, name="conv_out")(jax.nn.silu(x))
        x = x.astype(x_t.dtype)
        if config.time_embedding_type == "fourier":
            x = x / t[:, None, None, None].astype(x.dtype)
        return x

    def _wrap(self, block: Any) -> Any:
        return nn.remat(block) if self.remat else block

    def _check_images(self, x_t: Array) -> None:
        config, factor = self.config, 2 ** (len(self.config.block_out_channels) - 1)
        if x_t.ndim != 4 or x_t.shape[-1] != config.in_channels:
            raise ValueError(
                f"x_t must be [batch, height, width, {config.in_channels}], not {x_t.shape}."
            )
        if x_t.shape[1] % factor or x_t.shape[2] % factor:
            raise ValueError(
                f"this network halves its images {len(config.block_out_channels) - 1} times: "
                f"height and width must be multiples of {factor}, not {x_t.shape[1:3]}."
            )

    def _attention(self, channels: int, **options: Any) -> blocks.Factory:
        config = self.config
        head_dim = config.attention_head_dim or channels
        options = {"norm_groups": config.norm_num_groups} | options
        return functools.partial(
            self._wrap(blocks.Attention),
            heads=channels // head_dim,
            head_dim=head_dim,
            norm_eps=config.norm_eps,
            dtype=self.dtype,
            **options,
        )

    def _embed(self, x_t: Array, t: Array, cond: Condition) -> Array:
        """The sum of the embeddings of time and condition, [B, D]."""
        config = self.config
        width = config.block_out_channels[0]
        features = config.time_embedding_dim or 4 * width
        if config.time_embedding_type == "fourier":
            project = blocks.FourierProjection(width, name="time_proj")
        else:
            project = functools.partial(
                blocks.sinusoidal_embedding,
                channels=width,
                flip_sin_to_cos=config.flip_sin_to_cos,
                freq_shift=config.freq_shift,
            )
        mlp = functools.partial(blocks.TimestepEmbedding, features, dtype=self.dtype)
        temb = mlp(name="time_embedding")(project(t).astype(self.dtype or x_t.dtype))

        if config.class_embed_type is None and config.num_class_embeds is None:
            if cond is not None:
                raise ValueError("cond must be None: this network has no class embedding.")
            return temb
        expected = (x_t.shape[0],)
        if config.class_embed_type == "identity":
            expected += (features,)
        if cond is None:
            raise ValueError(
                f"this network is class-conditional: cond must be of shape {expected}, not None."
            )
        cond = jnp.asarray(cond)
        if cond.shape != expected:
            raise ValueError(f"cond must be of shape {expected}, not {cond.shape}.")
        if config.class_embed_type == "identity":
            return temb + cond.astype(temb.dtype)
        if config.class_embed_type == "timestep":
            projected = project(cond).astype(self.dtype or x_t.dtype)
            return temb + mlp(name="class_embedding")(projected)
        assert config.num_class_embeds is not None
        if not jnp.issubdtype(cond.dtype, jnp.integer):
            raise ValueError(f"labels must be integers, not {cond.dtype}.")
        table = blocks.LabelEmbedding(
            config.num_class_embeds, features, dtype=self.dtype, name="class_embedding"
        )
        return temb + table(cond)


def param_shapes(config: UNet2DConfig) -> Params:
    """The parameters of `UNet2DModel(config)` as a pytree of `jax.ShapeDtypeStruct`."""
    # The smallest image that can be halved as often as needed: parameters do not depend on it.
    side = 2 ** (len(config.block_out_channels) - 1)
    x_t = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    cond = None
    if config.class_embed_type == "identity":
        width = config.time_embedding_dim or 4 * config.block_out_channels[0]
        cond = jax.ShapeDtypeStruct((1, width), jnp.float32)
    elif config.class_embed_type == "timestep" or config.num_class_embeds is not None:
        cond = t
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(UNet2DModel(config).init, key, x_t, t, cond)["params"]


def init_params(config: UNet2DConfig | Mapping[str, Any], key: Array) -> Params:
    """Parameters of a `UNet2DModel` as `random_params` draws them.

    Args:
      config: the options, or a raw `config.json`.
      key: a PRNG key.

    Returns:
      What goes under 'params' in `UNet2DModel(config).apply`.

    Raises:
      ValueError: as `UNet2DConfig.from_diffusers`.
    """
    if not isinstance(config, UNet2DConfig):
        config = UNet2DConfig.from_diffusers(config)
    return random_params(param_shapes(config), key)
