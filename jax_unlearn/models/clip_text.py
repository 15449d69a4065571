"""The text encoders of CLIP, as Stable Diffusion uses them, as a linen module."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models import blocks
from jax_unlearn.models.config import is_count, is_number, read_options, require, require_choices
from jax_unlearn.typing import Array, Params

__all__ = ["CLIPTextConfig", "CLIPTextModel", "TextEncoding", "param_shapes"]


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": _quick_gelu,
    "gelu": blocks.ACTIVATIONS["gelu"],
}
# Keys of a config.json that say where it comes from or how to train.
_NEUTRAL = (
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "dropout",
    "attention_dropout",
    "initializer_factor",
    "initializer_range",
    "bos_token_id",
    "pad_token_id",
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The options of transformers' `CLIPTextModel` that the output depends on, and its defaults.

    Attributes:
      hidden_act: "quick_gelu", which is x·sigmoid(1.702 x), or "gelu", which is exact.
      eos_token_id: of the token whose hidden state is pooled. 2 is what all released before July
        2023 say, and mean the highest token of each prompt.
      with_projection: whether the pooled state is projected to `projection_dim`, which the class
        `CLIPTextModelWithProjection` says and no key of its own.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Reads a `config.json`: missing keys take transformers' defaults.

        Raises:
          ValueError: for an unknown key, except those that start with `_` or hold null, and for
            a value that is malformed or not supported.
        """
        values = read_options(cls, config, name="CLIPTextModel", neutral=_NEUTRAL)
        architecture = (config.get("architectures") or ["CLIPTextModel"])[0]
        return cls(**values | {"with_projection": architecture == "CLIPTextModelWithProjection"})

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        counts = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        checks = {name: is_count(getattr(self, name)) for name in counts}
        checks |= {
            "layer_norm_eps": is_number(self.layer_norm_eps) and self.layer_norm_eps >= 0,
            "eos_token_id": is_count(self.eos_token_id, least=0),
        }
        require(self, checks, name="CLIPTextModel")
        require_choices(self, {"hidden_act": tuple(_ACTIVATIONS)})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}."
            )


class TextEncoding(NamedTuple):
    """What a text encoder makes of tokens.

    Attributes:
      hidden_states: [B, N, hidden_size], what a UNet attends to.
      pooled: the last layer at the end of each prompt: [B, hidden_size], or [B, projection_dim]
        with a projection.
    """

    hidden_states: Array
    pooled: Array


class CLIPAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, N, C] → [B, N, C]."""

        def project(name: str, values: Array) -> Array:
            return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(values)

        queries, keys, values = (
            project(name, x).reshape(*x.shape[:2], self.heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return project("out_proj", mixed.reshape(x.shape))


class CLIPMLP(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2."""

    features: int
    hidden_act: str
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] → [..., C]."""
        hidden = nn.Dense(self.features, dtype=self.dtype, name="fc1")(x)
        hidden = _ACTIVATIONS[self.hidden_act](hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class CLIPEncoderLayer(nn.Module):
    """x + attention, then + a two-layer perceptron, each of the normed input."""

    config: CLIPTextConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, N, C] → [B, N, C]."""
        config = self.config
        norm = functools.partial(blocks.LayerNorm, config.layer_norm_eps)
        attention = CLIPAttention(config.num_attention_heads, dtype=self.dtype, name="self_attn")
        mlp = CLIPMLP(config.intermediate_size, config.hidden_act, dtype=self.dtype, name="mlp")
        x = x + attention(norm(name="layer_norm1")(x))
        return x + mlp(norm(name="layer_norm2")(x))


class CLIPTextEmbeddings(nn.Module):
    """The sum of a token's and its position's vector; nan for a token outside the vocabulary."""

    config: CLIPTextConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """[B, N] integers → [B, N, C]."""
        config = self.config
        table = functools.partial(
            blocks.LabelEmbedding, features=config.hidden_size, dtype=self.dtype
        )
        x = table(config.vocab_size, name="token_embedding")(tokens)
        positions = jnp.arange(tokens.shape[1])
        return x + table(config.max_position_embeddings, name="position_embedding")(positions)


class CLIPEncoder(nn.Module):
    """A stack of layers."""

    config: CLIPTextConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """[B, N, C] → the input and every layer's output, each [B, N, C]."""
        states = [x]
        for i in range(self.config.num_hidden_layers):
            layer = CLIPEncoderLayer(self.config, self.dtype, name=f"layers_{i}")
            states.append(layer(states[-1]))
        return states


class CLIPTextTransformer(nn.Module):
    """The encoder without a projection."""

    config: CLIPTextConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array, skip: int, final_norm: bool) -> TextEncoding:
        """As `CLIPTextModel`."""
        config = self.config
        x = CLIPTextEmbeddings(config, self.dtype, name="embeddings")(tokens)
        states = CLIPEncoder(config, self.dtype, name="encoder")(x)
        norm = blocks.LayerNorm(config.layer_norm_eps, name="final_layer_norm")
        is_end = tokens if config.eos_token_id == 2 else tokens == config.eos_token_id
        pooled = norm(states[-1][jnp.arange(len(tokens)), jnp.argmax(is_end, axis=-1)])
        hidden = states[-1 - skip]
        return TextEncoding(norm(hidden) if final_norm else hidden, pooled)


class CLIPTextModel(nn.Module):
    """transformers' `CLIPTextModel` or, by its config, `CLIPTextModelWithProjection`.

    What a pipeline hands to the UNet:

    - Stable Diffusion 1.x and 2.x: the last layer after the final norm, the defaults here. (The
      encoders of 2.x are stored without their last layer, so that this is the penultimate one.)
    - SDXL: of both encoders `skip=1, final_norm=False`, hidden states concatenated along their
      channels, and the second's `pooled`.
    - A pipeline's `clip_skip=k` adds k to `skip`.

    Attributes:
      config: the options.
      dtype: computing dtype, e.g. bfloat16; None computes in float32. Parameters, norms and the
        softmax stay float32.
    """

    config: CLIPTextConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array, *, skip: int = 0, final_norm: bool = True) -> TextEncoding:
        """Encodes prompts.

        Args:
          tokens: [B, N] integers, N at most `max_position_embeddings`, without a mask: padding
            is attended to, as the pipelines of Stable Diffusion have it.
          skip: how many of the last layers `hidden_states` leaves out.
          final_norm: whether `hidden_states` are normed by the final layer norm.

        Returns:
          Hidden states and the pooled state, float32. A token outside the vocabulary makes those
          of its prompt nan.

        Raises:
          ValueError: for tokens of another shape or type, or more layers skipped than there are.
        """
        config = self.config
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"tokens must be [batch, at most {config.max_position_embeddings}], not "
                f"{tokens.shape}."
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, not {tokens.dtype}.")
        if not 0 <= skip <= config.num_hidden_layers:
            raise ValueError(
                f"skip must be from 0 to the {config.num_hidden_layers} layers, not {skip}."
            )
        transformer = CLIPTextTransformer(config, self.dtype, name="text_model")
        hidden, pooled = transformer(tokens, skip, final_norm)
        if config.with_projection:
            pooled = nn.Dense(
                config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
            )(pooled)
        return TextEncoding(hidden.astype(jnp.float32), pooled.astype(jnp.float32))


def param_shapes(config: CLIPTextConfig) -> Params:
    """The parameters of `CLIPTextModel(config)` as a pytree of `jax.ShapeDtypeStruct`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(CLIPTextModel(config).init, key, tokens)["params"]
