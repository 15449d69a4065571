"""The image encoders of CLIP, vision transformers, as a linen module."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models import blocks
from jax_unlearn.models.clip_encoder import CLIPEncoder, CLIPTowerConfig
from jax_unlearn.models.config import is_count, require
from jax_unlearn.models.convolution import convolve
from jax_unlearn.typing import Array, Params

__all__ = ["CLIPVisionConfig", "CLIPVisionModel", "ImageEncoding", "param_shapes"]


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(CLIPTowerConfig):
    """The options of transformers' `CLIPVisionModel` that the output depends on, and its defaults.

    Attributes, beside those of `CLIPTowerConfig`:
      num_channels: of the images.
      image_size: height and width of the images.
      patch_size: height and width of the patches; the rows and columns that fill no patch, at
        the end, are not seen.
    """

    network: ClassVar[str] = "CLIPVisionModel"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        counts = ("num_channels", "image_size", "patch_size")
        checks = {name: is_count(getattr(self, name)) for name in counts}
        require(self, checks, name=self.network)
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}."
            )

    @property
    def num_positions(self) -> int:
        """Patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ImageEncoding(NamedTuple):
    """What an image encoder makes of images.

    Attributes:
      hidden_states: the last layer's, of the class token and the patches in rows:
        [B, num_positions, hidden_size].
      pooled: the class token's, normed: [B, hidden_size], or [B, projection_dim] with a
        projection.
    """

    hidden_states: Array
    pooled: Array


class PatchEmbedding(nn.Module):
    """A convolution without bias whose windows are the patches."""

    features: int
    patch_size: int
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] → [B, ⌊H / patch_size⌋ · ⌊W / patch_size⌋, features]."""
        shape = (self.patch_size, self.patch_size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        images, kernel = nn.dtypes.promote_dtype(images, kernel, dtype=self.dtype)
        patches = convolve(images, kernel, stride=self.patch_size, padding=(0, 0))
        return patches.reshape(len(images), -1, self.features)


class CLIPVisionEmbeddings(nn.Module):
    """A class token, then the patches, each with its position's vector added."""

    config: CLIPVisionConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] → [B, num_positions, hidden_size]."""
        config = self.config
        width = config.hidden_size
        patches = PatchEmbedding(width, config.patch_size, self.dtype, name="patch_embedding")
        x = patches(images)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (width,), jnp.float32)
        first = jnp.broadcast_to(first.astype(x.dtype), (len(x), 1, width))
        positions = blocks.LabelEmbedding(
            config.num_positions, width, self.dtype, name="position_embedding"
        )
        x = jnp.concatenate([first, x], axis=1)
        return x + positions(jnp.arange(config.num_positions))


class CLIPVisionTransformer(nn.Module):
    """The encoder without a projection."""

    config: CLIPVisionConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array) -> ImageEncoding:
        """As `CLIPVisionModel`."""
        config = self.config
        x = CLIPVisionEmbeddings(config, self.dtype, name="embeddings")(images)
        # The checkpoints' own spelling.
        x = blocks.LayerNorm(config.layer_norm_eps, name="pre_layrnorm")(x)
        x = CLIPEncoder(config, causal=False, dtype=self.dtype, name="encoder")(x)[-1]
        norm = blocks.LayerNorm(config.layer_norm_eps, name="post_layernorm")
        return ImageEncoding(x, norm(x[:, 0]))


class CLIPVisionModel(nn.Module):
    """transformers' `CLIPVisionModel` or, by its config, `CLIPVisionModelWithProjection`.

    Attributes:
      config: the options.
      dtype: computing dtype, e.g. bfloat16; None computes in float32. Parameters, norms and the
        softmax stay float32.
    """

    config: CLIPVisionConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array) -> ImageEncoding:
        """Encodes images.

        Args:
          images: [B, image_size, image_size, num_channels] as the network was trained on them,
            for released networks less a mean and over a standard deviation of each channel.

        Returns:
          Hidden states and the pooled state, float32.

        Raises:
          ValueError: for images of another shape.
        """
        config = self.config
        images = jnp.asarray(images)
        expected = (config.image_size, config.image_size, config.num_channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images must be [batch, {', '.join(map(str, expected))}], not {images.shape}."
            )
        transformer = CLIPVisionTransformer(config, self.dtype, name="vision_model")
        hidden, pooled = transformer(images)
        if config.with_projection:
            pooled = nn.Dense(
                config.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection"
            )(pooled)
        return ImageEncoding(hidden.astype(jnp.float32), pooled.astype(jnp.float32))


def param_shapes(config: CLIPVisionConfig) -> Params:
    """The parameters of `CLIPVisionModel(config)` as a pytree of `jax.ShapeDtypeStruct`."""
    shape = (1, config.image_size, config.image_size, config.num_channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(CLIPVisionModel(config).init, key, images)["params"]
