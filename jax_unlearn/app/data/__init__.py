"""Images and their captions read, split and batched, deterministic and resumable."""

from jax_unlearn.app.data.batches import balanced_indices, batch_indices
from jax_unlearn.app.data.images import (
    Images,
    NotNumbers,
    concatenate,
    content_hashes,
    find_overlap,
    remove_overlap,
    split_held_out,
    take,
    to_pixels,
    to_unit_range,
    to_x_0,
)
from jax_unlearn.app.data.reading import (
    Source,
    fold,
    parse_source,
    read_captions,
    read_images,
    read_text,
)

__all__ = [
    "Images",
    "NotNumbers",
    "Source",
    "balanced_indices",
    "batch_indices",
    "concatenate",
    "content_hashes",
    "find_overlap",
    "fold",
    "parse_source",
    "read_captions",
    "read_images",
    "read_text",
    "remove_overlap",
    "split_held_out",
    "take",
    "to_pixels",
    "to_unit_range",
    "to_x_0",
]
