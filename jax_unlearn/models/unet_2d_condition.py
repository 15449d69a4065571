"""diffusers' `UNet2DConditionModel`, the network of Stable Diffusion, as a linen module."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models import blocks
from jax_unlearn.models.config import (
    MAX_TRANSFORMERS,
    is_count,
    is_number,
    read_options,
    require,
    require_choices,
)
from jax_unlearn.models.transformer_2d import BasicTransformerBlock, Transformer2DModel
from jax_unlearn.sharding import keep_rows
from jax_unlearn.typing import Array, Condition, Params

__all__ = [
    "UNet2DConditionConfig",
    "UNet2DConditionDenoiser",
    "UNet2DConditionModel",
    "param_shapes",
]

_EVERY_LEVEL = (
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """The options of diffusers' `UNet2DConditionModel`, with its names and its defaults.

    Options that are null in every Stable Diffusion, and whose networks are not built here, may
    only hold their defaults. These meanings differ from what the name says:

    Attributes:
      attention_head_dim: the *number* of heads, of all levels or of each.
      act_fn: also of the time embedding and before the last convolution, but not of the
        embedding of size and crop.
      mid_block_scale_factor: outputs of the mid block's resnets are divided by it.
      dropout: kept for saving; `apply` runs without.
      upcast_attention: kept for saving; the softmax is always computed in float32.
      resnet_skip_time_act: kept for saving, as `resnet_out_scale_factor`,
        `mid_block_only_cross_attention` and `addition_embed_type_num_heads`: no block that is
        supported reads it.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: int = 64

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNet2DConditionConfig":
        """Reads a `config.json`: missing keys take diffusers' defaults.

        Raises:
          ValueError: for an unknown key, except those that start with `_` or hold null, and for
            a value that is malformed or not supported.
        """
        return cls(**read_options(cls, config, name="UNet2DConditionModel"))

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        self._check_types()
        activations = tuple(blocks.ACTIVATIONS)
        require_choices(
            self,
            {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "downsample_padding": (0, 1),
                "act_fn": activations,
                "time_embedding_act_fn": (None, *activations),
                "timestep_post_act": (None, *activations),
                "resnet_time_scale_shift": ("default", "scale_shift"),
                "addition_embed_type": (None, "text_time"),
                "time_embedding_type": ("positional",),
                "attention_type": ("default",),
                "dual_cross_attention": (False,),
                "class_embeddings_concat": (False,),
                "reverse_transformer_layers_per_block": (None,),
                "encoder_hid_dim": (None,),
                "encoder_hid_dim_type": (None,),
                "num_attention_heads": (None,),
                "class_embed_type": (None,),
                "num_class_embeds": (None,),
                "time_cond_proj_dim": (None,),
                "cross_attention_norm": (None,),
            },
        )
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", *_EVERY_LEVEL):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"{name} must have one entry for each of the {levels} levels of "
                    f"block_out_channels, not {len(value)}: {value}."
                )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the {channels} "
                    f"channels of block_out_channels {self.block_out_channels}."
                )
        for level in self._attending_levels():
            channels, heads = self.block_out_channels[level], self.at("attention_head_dim", level)
            if channels % heads:
                raise ValueError(
                    f"attention_head_dim {heads} does not divide a level's {channels} channels: "
                    "it is the number of heads, not the channels of one."
                )
        transformers = sum(
            (2 * self.at("layers_per_block", level) + 1)
            * self.at("transformer_layers_per_block", level)
            for level in self._attending_levels()
        )
        if transformers > MAX_TRANSFORMERS:
            raise ValueError(
                f"layers_per_block {self.layers_per_block} and transformer_layers_per_block "
                f"{self.transformer_layers_per_block} make {transformers} transformer blocks: "
                f"expected {MAX_TRANSFORMERS} at most."
            )
        if len({self.at("cross_attention_dim", level) for level in self._attending_levels()}) != 1:
            raise ValueError(
                f"cross_attention_dim {self.cross_attention_dim} must be one width at all levels "
                "with cross-attention, of which there must be one: all read the same text."
            )
        if self.addition_embed_type is not None:
            width, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
            if width is None or total is None or width >= total:
                raise ValueError(
                    "addition_embed_type 'text_time' needs projection_class_embeddings_input_dim "
                    f"(given {total}) above addition_time_embed_dim (given {width})."
                )

    def _check_types(self) -> None:
        def is_each(value: Any, kind: Any = is_count) -> bool:
            return isinstance(value, tuple) and len(value) > 0 and all(map(kind, value))

        def is_bool(value: Any) -> bool:
            return isinstance(value, bool)

        size, crossed = self.sample_size, self.only_cross_attention
        sides = size if isinstance(size, tuple) else (size, size)
        checks: dict[str, bool] = {
            name: is_count(getattr(self, name)) for name in ("in_channels", "out_channels")
        }
        checks |= {
            name: is_count(getattr(self, name)) or is_each(getattr(self, name))
            for name in _EVERY_LEVEL
            if name != "only_cross_attention"
        }
        checks |= {
            name: getattr(self, name) is None or is_count(getattr(self, name))
            for name in (
                "time_embedding_dim",
                "addition_time_embed_dim",
                "projection_class_embeddings_input_dim",
            )
        }
        checks |= {
            name: is_bool(getattr(self, name))
            for name in ("center_input_sample", "flip_sin_to_cos", "use_linear_projection")
        }
        checks |= {
            name: is_count(getattr(self, name)) and getattr(self, name) % 2 == 1
            for name in ("conv_in_kernel", "conv_out_kernel")
        }
        checks |= {
            "sample_size": size is None or (len(sides) == 2 and is_each(sides)),
            "only_cross_attention": is_bool(crossed) or is_each(crossed, is_bool),
            "block_out_channels": is_each(self.block_out_channels),
            "down_block_types": is_each(self.down_block_types, lambda kind: isinstance(kind, str)),
            "up_block_types": is_each(self.up_block_types, lambda kind: isinstance(kind, str)),
            "norm_num_groups": is_count(self.norm_num_groups),
            "norm_eps": is_number(self.norm_eps) and self.norm_eps >= 0,
            "freq_shift": is_number(self.freq_shift),
            "dropout": is_number(self.dropout),
            "mid_block_scale_factor": is_number(self.mid_block_scale_factor)
            and self.mid_block_scale_factor != 0,
        }
        require(self, checks, name="UNet2DConditionModel")

    def at(self, option: str, level: int) -> Any:
        """What an option is at a level, which it gives once for all or once for each."""
        value = getattr(self, option)
        return value[level] if isinstance(value, tuple) else value

    def _attending_levels(self) -> list[int]:
        last = len(self.block_out_channels) - 1
        levels = {i for i, kind in enumerate(self.down_block_types) if kind.startswith("Cross")}
        levels |= {last - i for i, kind in enumerate(self.up_block_types) if kind[:5] == "Cross"}
        return sorted(levels | ({last} if self.mid_block_type is not None else set()))

    @property
    def context_dim(self) -> int:
        """Channels of the text encoder's hidden states."""
        return self.at("cross_attention_dim", self._attending_levels()[0])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what is denoised, which may be latents.

        Raises:
          ValueError: if the config has no `sample_size`.
        """
        if self.sample_size is None:
            raise ValueError("the config has no sample_size: the image size must be given.")
        size = self.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height, width, self.in_channels


class UNet2DConditionModel(nn.Module):
    """diffusers' `UNet2DConditionModel`: a UNet that attends to a text.

    `apply({'params': params}, x_t, t, cond)` is the prediction of the noise or of the velocity,
    whichever the weights were trained for.

    Attributes:
      config: the options.
      dtype: computing dtype, e.g. bfloat16; None computes in that of the inputs. Parameters,
        norms and the softmax stay float32.
      remat: compute each resnet and transformer block again in the backward pass, which then
        stores no more than their inputs.
    """

    config: UNet2DConditionConfig
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_t: Array, t: Array, cond: Condition) -> Array:
        """Predicts from noisy images or latents.

        Args:
          x_t: noisy [B, H, W, in_channels]; H and W multiples of 2^(levels − 1).
          t: time steps [B], or one for all.
          cond: hidden states of the text encoder [B, N, D]. With `addition_embed_type`
            "text_time" (SDXL) a dict of these as `encoder_hidden_states`, the pooled text
            `text_embeds` [B, P] and `time_ids` [B, 6]: height and width of the original, top and
            left of the crop, height and width of the target, in pixels.

        Returns:
          [B, H, W, out_channels], of the dtype of `x_t`.

        Raises:
          ValueError: for shapes that do not fit, or a condition of another form.
        """
        config = self.config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        self._check_images(x_t)
        context, added = self._split(cond, x_t.shape[0])
        t = jnp.broadcast_to(jnp.asarray(t), (x_t.shape[0],))
        dtype = self.dtype or x_t.dtype
        temb = self._embed(t, added, dtype)
        context = context.astype(dtype)

        remat: Any = nn.remat if self.remat else lambda module: module
        resnet = functools.partial(
            remat(blocks.ResnetBlock2D),
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dtype=self.dtype,
        )

        def attention(level: int, only_cross_attention: bool) -> blocks.Factory:
            block = functools.partial(
                remat(BasicTransformerBlock),
                heads=config.at("attention_head_dim", level),
                only_cross_attention=only_cross_attention,
                dtype=self.dtype,
            )
            return functools.partial(
                Transformer2DModel,
                layers=config.at("transformer_layers_per_block", level),
                block=block,
                norm_groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                dtype=self.dtype,
            )

        x = 2 * x_t - 1 if config.center_input_sample else x_t
        x = self._conv(channels[0], config.conv_in_kernel, "conv_in")(x)
        skips = [x]
        for i, kind in enumerate(config.down_block_types):
            crossed = config.at("only_cross_attention", i)
            downsample = functools.partial(
                blocks.Downsample2D, padding=config.downsample_padding, dtype=self.dtype
            )
            x, outputs = blocks.DownBlock2D(
                channels[i],
                config.at("layers_per_block", i),
                resnet,
                attention(i, crossed) if kind == "CrossAttnDownBlock2D" else None,
                downsample if i < levels - 1 else None,
                name=f"down_blocks_{i}",
            )(x, temb, context)
            skips.extend(outputs)

        if config.mid_block_type is not None:
            # Its self-attention stays whatever `only_cross_attention` says.
            x = blocks.MidBlock2D(
                channels[-1],
                functools.partial(resnet, rescale=config.mid_block_scale_factor),
                attention(levels - 1, False),
                name="mid_block",
            )(x, temb, context)

        for i, kind in enumerate(config.up_block_types):
            level = levels - 1 - i
            crossed = config.at("only_cross_attention", level)
            x = blocks.UpBlock2D(
                channels[level],
                config.at("layers_per_block", level) + 1,
                resnet,
                attention(level, crossed) if kind == "CrossAttnUpBlock2D" else None,
                functools.partial(blocks.Upsample2D, dtype=self.dtype) if level > 0 else None,
                name=f"up_blocks_{i}",
            )(x, skips, temb, context)

        x = blocks.GroupNorm(config.norm_num_groups, config.norm_eps, name="conv_norm_out")(x)
        x = blocks.ACTIVATIONS[config.act_fn](x)
        x = self._conv(config.out_channels, config.conv_out_kernel, "conv_out")(x)
        return x.astype(x_t.dtype)

    def _conv(self, features: int, side: int, name: str) -> blocks.Conv:
        return blocks.Conv(features, side, padding=(side // 2,) * 2, dtype=self.dtype, name=name)

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

    def _split(self, cond: Condition, batch: int) -> tuple[Array, tuple[Array, Array] | None]:
        """The hidden states, and what is embedded beside the time."""
        config = self.config
        text_time = config.addition_embed_type == "text_time"
        names = {"encoder_hidden_states"} | ({"text_embeds", "time_ids"} if text_time else set())
        is_dict = isinstance(cond, Mapping)
        if cond is None or text_time != is_dict or (text_time and set(cond) != names):
            raise ValueError(
                f"cond must be {f'a dict of {sorted(names)}' if text_time else 'an array'}, not "
                f"{f'a dict of {sorted(cond)}' if is_dict else type(cond)}."
            )
        context = jnp.asarray(cond["encoder_hidden_states"] if text_time else cond)
        if context.ndim != 3 or (context.shape[0], context.shape[2]) != (batch, config.context_dim):
            raise ValueError(
                f"the hidden states of the text must be [{batch}, tokens, {config.context_dim}], "
                f"not {context.shape}."
            )
        if not text_time:
            return context, None
        text, ids = jnp.asarray(cond["text_embeds"]), jnp.asarray(cond["time_ids"])
        width, total = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        assert width is not None
        fits = text.ndim == ids.ndim == 2 and text.shape[0] == ids.shape[0] == batch
        if not fits or text.shape[1] + width * ids.shape[1] != total:
            raise ValueError(
                f"text_embeds [{batch}, P] and time_ids [{batch}, n] must fill the {total} values "
                f"P + {width}·n of the added embedding, not {text.shape} and {ids.shape}."
            )
        return context, (text, ids)

    def _embed(self, t: Array, added: tuple[Array, Array] | None, dtype: Any) -> Array:
        """The sum of the embeddings of time and of what is added, [B, D]."""
        config = self.config
        width = config.block_out_channels[0]
        mlp = functools.partial(
            blocks.TimestepEmbedding, config.time_embedding_dim or 4 * width, dtype=self.dtype
        )
        sinusoid = functools.partial(
            blocks.sinusoidal_embedding,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        temb = mlp(
            act_fn=config.act_fn, post_act_fn=config.timestep_post_act, name="time_embedding"
        )(sinusoid(t, width).astype(dtype))
        if added is not None:
            text, ids = added
            assert config.addition_time_embed_dim is not None
            sizes = sinusoid(ids.reshape(-1), config.addition_time_embed_dim)
            joined = jnp.concatenate([text, sizes.reshape(text.shape[0], -1)], axis=-1)
            temb = temb + mlp(name="add_embedding")(joined.astype(dtype))
        if config.time_embedding_act_fn is not None:
            temb = blocks.ACTIVATIONS[config.time_embedding_act_fn](temb)
        return temb


@dataclasses.dataclass(frozen=True)
class UNet2DConditionDenoiser:
    """A `UNet2DConditionModel` as a pure function; hashable, so that it may be a static argument.

    Attributes: as those of `UNet2DConditionModel`.
    """

    config: UNet2DConditionConfig
    dtype: Any = None
    remat: bool = False

    def __call__(self, params: Params, x_t: Array, t: Array, cond: Condition, /) -> Array:
        """Predicts from noisy images or latents, as `UNet2DConditionModel`."""
        model = UNet2DConditionModel(self.config, self.dtype, self.remat)
        rows = keep_rows((x_t, t, cond))
        return cast(Array, keep_rows(model.apply({"params": params}, *rows)))


def param_shapes(config: UNet2DConditionConfig) -> Params:
    """The parameters of `UNet2DConditionModel(config)` as a pytree of `jax.ShapeDtypeStruct`."""
    # The smallest image that can be halved as often as needed: parameters do not depend on it.
    side = 2 ** (len(config.block_out_channels) - 1)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    cond: Any = array(1, 1, config.context_dim)
    if config.addition_embed_type is not None:
        width, total = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        assert width is not None
        assert total is not None
        cond = {
            "encoder_hidden_states": cond,
            "text_embeds": array(1, total - width),
            "time_ids": array(1, 1),
        }
    key = jax.eval_shape(lambda: jax.random.key(0))
    x_t = array(1, side, side, config.in_channels)
    return jax.eval_shape(UNet2DConditionModel(config).init, key, x_t, array(1), cond)["params"]
