"""diffusers' `AutoencoderKL`, between images and the latents of Stable Diffusion, as linen."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models import blocks
from jax_unlearn.models.config import is_count, is_number, read_options, require, require_choices
from jax_unlearn.typing import Array, Params

__all__ = ["AutoencoderKL", "AutoencoderKLConfig", "Gaussian", "param_shapes", "sample_latents"]

# Of every norm, whatever the config says.
_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The options of diffusers' `AutoencoderKL`, with its names and its defaults.

    Attributes:
      scaling_factor: the denoiser's latents are those of the encoder times this factor.
      force_upcast: kept for saving, as `sample_size`; choose the computing dtype by `dtype`.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """Reads a `config.json`: missing keys take diffusers' defaults.

        Raises:
          ValueError: for an unknown key, except those that start with `_` or hold null, and for
            a value that is malformed or not supported.
        """
        return cls(**read_options(cls, config, name="AutoencoderKL"))

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        counts = ("in_channels", "out_channels", "layers_per_block", "latent_channels")
        flags = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        channels = self.block_out_channels
        checks = {name: is_count(getattr(self, name)) for name in (*counts, "norm_num_groups")}
        checks |= {name: isinstance(getattr(self, name), bool) for name in flags}
        checks |= {
            "block_out_channels": isinstance(channels, tuple)
            and len(channels) > 0
            and all(map(is_count, channels)),
            "scaling_factor": is_number(self.scaling_factor) and self.scaling_factor > 0,
        }
        require(self, checks, name="AutoencoderKL")
        require_choices(
            self,
            {
                "down_block_types": ("DownEncoderBlock2D",),
                "up_block_types": ("UpDecoderBlock2D",),
                "act_fn": tuple(blocks.ACTIVATIONS),
                "shift_factor": (None,),
                "latents_mean": (None,),
                "latents_std": (None,),
            },
        )
        if not len(channels) == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                "block_out_channels, down_block_types and up_block_types must be of one length, "
                f"not {len(channels)}, {len(self.down_block_types)} and {len(self.up_block_types)}."
            )
        for width in channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the {width} channels "
                    f"of block_out_channels {channels}."
                )

    @property
    def factor(self) -> int:
        """Pixels along an image's side to one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class Gaussian(NamedTuple):
    """A Gaussian of independent coordinates: what the encoder makes of an image.

    Attributes:
      mean: [B, h, w, latent_channels].
      logvar: of the same shape, in [-30, 20].
    """

    mean: Array
    logvar: Array


def sample_latents(key: Array, posterior: Gaussian) -> Array:
    """Mean + exp(logvar / 2) ε with ε standard normal."""
    noise = jax.random.normal(key, posterior.mean.shape, posterior.mean.dtype)
    return posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise


class _Layers(NamedTuple):
    """What encoder and decoder are made of."""

    resnet: blocks.Factory
    mid: nn.Module
    norm: nn.Module


def _layers(config: AutoencoderKLConfig, dtype: Any) -> _Layers:
    """To be called in the module that owns them."""
    groups, widest = config.norm_num_groups, config.block_out_channels[-1]
    resnet = functools.partial(
        blocks.ResnetBlock2D, groups=groups, eps=_EPS, act_fn=config.act_fn, dtype=dtype
    )
    attention = functools.partial(
        blocks.Attention,
        heads=1,
        head_dim=widest,
        norm_groups=groups,
        norm_eps=_EPS,
        dtype=dtype,
    )
    mid = blocks.MidBlock2D(
        widest, resnet, attention if config.mid_block_add_attention else None, name="mid_block"
    )
    return _Layers(resnet, mid, blocks.GroupNorm(groups, _EPS, name="conv_norm_out"))


class Encoder(nn.Module):
    """Images to what becomes mean and log variance."""

    config: AutoencoderKLConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, in_channels] → [B, H / f, W / f, 2·latent_channels]."""
        config, channels = self.config, self.config.block_out_channels
        resnet, mid, norm = _layers(config, self.dtype)
        downsample = functools.partial(blocks.Downsample2D, padding=0, dtype=self.dtype)
        x = blocks.Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, features in enumerate(channels):
            x, _ = blocks.DownBlock2D(
                features,
                config.layers_per_block,
                resnet,
                downsample=downsample if i < len(channels) - 1 else None,
                name=f"down_blocks_{i}",
            )(x, None)
        # Not `act_fn`: diffusers always ends in silu.
        x = jax.nn.silu(norm(mid(x, None)))
        return blocks.Conv(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to images."""

    config: AutoencoderKLConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, latent_channels] → [B, f·h, f·w, out_channels]."""
        config, channels = self.config, self.config.block_out_channels
        resnet, mid, norm = _layers(config, self.dtype)
        upsample = functools.partial(blocks.Upsample2D, dtype=self.dtype)
        x = mid(blocks.Conv(channels[-1], dtype=self.dtype, name="conv_in")(x), None)
        for i, features in enumerate(reversed(channels)):
            x = blocks.UpBlock2D(
                features,
                config.layers_per_block + 1,
                resnet,
                upsample=upsample if i < len(channels) - 1 else None,
                name=f"up_blocks_{i}",
            )(x, None, None)
        x = jax.nn.silu(norm(x))
        return blocks.Conv(config.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """diffusers' `AutoencoderKL`: `encode` and `decode`, called by `apply(..., method="encode")`.

    Latents here are the encoder's own; a denoiser takes them times `config.scaling_factor`.

    Attributes:
      config: the options.
      dtype: computing dtype, e.g. bfloat16; None computes in that of the inputs. Parameters,
        norms and the softmax stay float32.
    """

    config: AutoencoderKLConfig
    dtype: Any = None

    def setup(self) -> None:
        """Makes the submodules, which `encode` and `decode` use apart."""
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        pointwise = functools.partial(blocks.Conv, kernel_size=1, padding=(0, 0), dtype=self.dtype)
        if config.use_quant_conv:
            self.quant_conv = pointwise(2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = pointwise(config.latent_channels)

    def __call__(self, x: Array) -> Array:
        """Decodes the mean of `encode(x)`."""
        return self.decode(self.encode(x).mean)

    def encode(self, x: Array) -> Gaussian:
        """The posterior of an image's latents.

        Args:
          x: images [B, H, W, in_channels] in [-1, 1]; H and W multiples of `config.factor`.

        Returns:
          Mean and log variance [B, H / factor, W / factor, latent_channels].

        Raises:
          ValueError: for images of another shape.
        """
        config = self.config
        if x.ndim != 4 or x.shape[-1] != config.in_channels:
            raise ValueError(
                f"images must be [batch, height, width, {config.in_channels}], not {x.shape}."
            )
        if x.shape[1] % config.factor or x.shape[2] % config.factor:
            raise ValueError(
                f"height and width must be multiples of {config.factor}, not {x.shape[1:3]}."
            )
        moments = self.encoder(x)
        moments = self.quant_conv(moments) if config.use_quant_conv else moments
        mean, logvar = jnp.split(moments.astype(x.dtype), 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """Images of latents.

        Args:
          z: latents [B, h, w, latent_channels], not scaled.

        Returns:
          [B, factor·h, factor·w, out_channels], about in [-1, 1].

        Raises:
          ValueError: for latents of another shape.
        """
        config = self.config
        if z.ndim != 4 or z.shape[-1] != config.latent_channels:
            raise ValueError(
                f"latents must be [batch, height, width, {config.latent_channels}], not {z.shape}."
            )
        h = self.post_quant_conv(z) if config.use_post_quant_conv else z
        return self.decoder(h).astype(z.dtype)


def param_shapes(config: AutoencoderKLConfig) -> Params:
    """The parameters of `AutoencoderKL(config)` as a pytree of `jax.ShapeDtypeStruct`."""
    x = jax.ShapeDtypeStruct((1, config.factor, config.factor, config.in_channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(AutoencoderKL(config).init, key, x)["params"]
