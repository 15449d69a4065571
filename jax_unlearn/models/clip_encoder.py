"""What the two towers of CLIP share: their options and the transformer, as linen modules."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax

from jax_unlearn.models import blocks
from jax_unlearn.models.config import (
    is_count,
    is_number,
    listed_class,
    read_options,
    require,
    require_choices,
)
from jax_unlearn.typing import Array

__all__ = ["ACTIVATIONS", "NEUTRAL", "CLIPEncoder", "CLIPTowerConfig"]


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": _quick_gelu,
    "gelu": blocks.ACTIVATIONS["gelu"],
}
"""Activations by transformers' names."""

NEUTRAL = (
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
    "add_cross_attention",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
)
"""Keys of a config.json that say where it comes from, how to train, or, in those that the
transformers of 2022 wrote, how to generate text and to classify, which CLIP does not."""


@dataclasses.dataclass(frozen=True)
class CLIPTowerConfig:
    """The options that both towers have.

    Attributes:
      hidden_act: "quick_gelu", which is x·sigmoid(1.702 x), or "gelu", which is exact.
      with_projection: whether the pooled state is projected to `projection_dim`, which the class
        that ends in `WithProjection` says and no key of its own.
    """

    network: ClassVar[str]

    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    with_projection: bool = False

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> Self:
        """Reads a `config.json`: missing keys take transformers' defaults.

        Raises:
          ValueError: for an unknown key, except those that start with `_` or hold null, and for
            a value that is malformed or not supported.
        """
        values = read_options(cls, config, name=cls.network, neutral=NEUTRAL)
        projected = listed_class(config) == f"{cls.network}WithProjection"
        return cls(**values | {"with_projection": projected})

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        counts = (
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
        )
        checks = {name: is_count(getattr(self, name)) for name in counts}
        checks["layer_norm_eps"] = is_number(self.layer_norm_eps) and self.layer_norm_eps >= 0
        require(self, checks, name=self.network)
        require_choices(self, {"hidden_act": tuple(ACTIVATIONS)})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}."
            )


class CLIPAttention(nn.Module):
    """Multi-head attention of each token to all or, `causal`, to itself and those before it."""

    heads: int
    causal: bool
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
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=self.causal)
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
        hidden = ACTIVATIONS[self.hidden_act](hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class CLIPEncoderLayer(nn.Module):
    """x + attention, then + a two-layer perceptron, each of the normed input."""

    config: CLIPTowerConfig
    causal: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, N, C] → [B, N, C]."""
        config = self.config
        norm = functools.partial(blocks.LayerNorm, config.layer_norm_eps)
        attention = CLIPAttention(
            config.num_attention_heads, self.causal, dtype=self.dtype, name="self_attn"
        )
        mlp = CLIPMLP(config.intermediate_size, config.hidden_act, dtype=self.dtype, name="mlp")
        x = x + attention(norm(name="layer_norm1")(x))
        return x + mlp(norm(name="layer_norm2")(x))


class CLIPEncoder(nn.Module):
    """A stack of layers.

    Attributes:
      config: the options.
      causal: whether a token attends to those before it only.
      dtype: computing dtype.
    """

    config: CLIPTowerConfig
    causal: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """[B, N, C] → the input and every layer's output, each [B, N, C]."""
        states = [x]
        for i in range(self.config.num_hidden_layers):
            layer = CLIPEncoderLayer(self.config, self.causal, self.dtype, name=f"layers_{i}")
            states.append(layer(states[-1]))
        return states
