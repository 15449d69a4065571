"""What a model can be conditioned on, by number: labels, or a run's prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import samplers
from jax_unlearn.app.tasks.base import batch_rows
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.pretrained.text_to_image import TextToImage, decode_latents, encode_prompts
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = [
    "NamedConditions",
    "Numbered",
    "by_vectors",
    "of_labels",
    "of_prompts",
    "predictor",
    "table_of",
]

# Prompts that the text encoder sees at once.
ENCODED = 64


class NamedConditions(NamedTuple):
    """The conditions of a run, as whole numbers that the denoiser takes.

    Attributes:
      names: of each, the free branch included.
      null: the free branch of classifier-free guidance, or None.
      drawn: those that samples are drawn of; empty for an unconditional model.
      classes: what a judge tells apart.
      shown_as: the class of each of `drawn`; −1 for none.
      decode: what is denoised -> images in [-1, 1].
      image_shape: (height, width, channels) of these.
    """

    names: tuple[str, ...]
    null: int | None
    drawn: tuple[int, ...]
    classes: tuple[str, ...]
    shown_as: tuple[int, ...]
    decode: Callable[[Array], Array]
    image_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Numbered:
    """A denoiser conditioned on row numbers [batch] of a table of conditions, encoded once.

    Attributes:
      apply: the denoiser that takes the conditions themselves.
      table: the conditions, a tree of arrays [conditions, ...].
    """

    apply: Denoiser
    table: Any

    def __call__(self, params: Params, x_t: Array, t: Array, cond: Any, /) -> Array:
        """Predicts as `apply` does under the numbered conditions."""
        return self.apply(
            params, x_t, t, jax.tree.map(lambda leaf: jnp.asarray(leaf)[cond], self.table)
        )


def predictor(
    apply: Denoiser, params: Params, conditions: NamedConditions, cond: Any, guidance: float
) -> Callable[[Array, Array], Array]:
    """(x_t, t) -> the prediction under `cond`, guided where there is a free branch to guide by."""
    if cond is not None and conditions.null is not None and guidance != 1:
        free = jnp.full_like(cond, conditions.null)
        return samplers.guided(apply, params, cond, unconditional=free, scale=guidance)
    return lambda x_t, t: apply(params, x_t, t, cond)


def by_vectors(pretrained: Pretrained) -> tuple[Denoiser, Any]:
    """The denoiser that takes conditions themselves, and the table that their numbers look up.

    Of labels the table is that of the parameters, whose other entries the denoiser reads.

    Raises:
      ValueError: for a model without such a table.
    """
    apply: Any = pretrained.apply
    if isinstance(apply, Numbered):
        return apply.apply, apply.table
    embedding = pretrained.params.get("class_embedding", {})
    if "embedding" not in embedding:
        raise ValueError(
            "the model has no table of labels, so that there are no conditions between them."
        )
    free = dataclasses.replace(apply.config, class_embed_type="identity", num_class_embeds=None)
    free = dataclasses.replace(apply, config=free, null_label=None)
    return free, embedding["embedding"]


def of_labels(pretrained: Pretrained) -> NamedConditions:
    """The labels of a pixel-space model, and its null label."""
    config = pretrained.config
    labels = tuple(range(config.num_labels))
    names = [config.label_name(label) for label in labels]
    if config.null_label is not None:
        names.append("null label")
    return NamedConditions(
        tuple(names),
        config.null_label,
        labels,
        tuple(names[: len(labels)]),
        labels,
        lambda x: x,
        config.sample_shape,
    )


def of_prompts(model: TextToImage, prompts: Sequence[str]) -> tuple[Pretrained, NamedConditions]:
    """The prompts, in their order, and after them no prompt at all.

    Returns:
      The model with a denoiser that takes their numbers, and the conditions.

    Raises:
      ValueError: if a prompt is too long for the text encoder.
    """
    table, pretrained = table_of(model, prompts), model.pretrained
    numbers, rows = tuple(range(len(prompts))), batch_rows(model.image_shape)

    def decode(latents: Array) -> Array:
        if len(latents) <= rows:
            return decode_latents(model, latents)
        return jax.lax.map(
            lambda one: decode_latents(model, one[None])[0], latents, batch_size=rows
        )

    return pretrained._replace(apply=Numbered(pretrained.apply, table)), NamedConditions(
        (*(f"“{prompt}”" for prompt in prompts), "no prompt"),
        len(prompts),
        numbers,
        tuple(prompts),
        numbers,
        decode,
        model.image_shape,
    )


def table_of(model: TextToImage, prompts: Sequence[str]) -> Any:
    """The encoded prompts and, last, no prompt at all: a tree of arrays [prompts + 1, ...].

    Raises:
      ValueError: if a prompt is too long for the text encoder.
    """
    every = [*prompts, None]
    parts = []
    for start in range(0, len(every), ENCODED):
        some = every[start : start + ENCODED]
        # Of one shape, but for a short list: the encoder is compiled once.
        padded = some if start == 0 else some + [None] * (ENCODED - len(some))
        parts.append(jax.tree.map(np.asarray, encode_prompts(model, padded)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(every)], *parts)
