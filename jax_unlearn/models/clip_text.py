"""The text encoders of CLIP, as Stable Diffusion uses them, as a linen module."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_unlearn.models import blocks
from jax_unlearn.models.clip_encoder import CLIPEncoder, CLIPTowerConfig
from jax_unlearn.models.config import is_count, require
from jax_unlearn.typing import Array, Params

__all__ = ["CLIPTextConfig", "CLIPTextModel", "TextEncoding", "param_shapes"]


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(CLIPTowerConfig):
    """The options of transformers' `CLIPTextModel` that the output depends on, and its defaults.

    Attributes, beside those of `CLIPTowerConfig`:
      eos_token_id: of the token whose hidden state is pooled. 2 is what all released before July
        2023 say, and mean the highest token of each prompt.
    """

    network: ClassVar[str] = "CLIPTextModel"

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        """Checks every value: what is malformed here would fail late or not at all."""
        checks = {
            "vocab_size": is_count(self.vocab_size),
            "max_position_embeddings": is_count(self.max_position_embeddings),
            "eos_token_id": is_count(self.eos_token_id, least=0),
        }
        require(self, checks, name=self.network)
        super().__post_init__()


class TextEncoding(NamedTuple):
    """What a text encoder makes of tokens.

    Attributes:
      hidden_states: [B, N, hidden_size], what a UNet attends to.
      pooled: the last layer at the end of each prompt: [B, hidden_size], or [B, projection_dim]
        with a projection.
    """

    hidden_states: Array
    pooled: Array


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


class CLIPTextTransformer(nn.Module):
    """The encoder without a projection."""

    config: CLIPTextConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Array, skip: int, final_norm: bool) -> TextEncoding:
        """As `CLIPTextModel`."""
        config = self.config
        x = CLIPTextEmbeddings(config, self.dtype, name="embeddings")(tokens)
        states = CLIPEncoder(config, causal=True, dtype=self.dtype, name="encoder")(x)
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
