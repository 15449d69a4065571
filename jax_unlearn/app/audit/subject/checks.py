"""Whether models can be compared, and whether the judge knows what they show."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.app.tasks.conditions import NamedConditions
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.pretrained.text_to_image import TextToImage

__all__ = ["check_judge", "check_same", "check_vae"]


def check_same(shown: str, other: Pretrained, reference: Pretrained) -> None:
    """Refuses a model whose predictions mean something else, or whose parameters do not fit."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves, _ in map(jax.tree_util.tree_flatten_with_path, (other.params, reference.params))
    ]
    differing = [
        key for key in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(key) != shapes[1].get(key)
    ]
    if differing:
        raise ValueError(
            f"{shown} is another network than the reference: {len(differing)} parameters differ "
            f"in shape, the first is {differing[0]}, {shapes[0].get(differing[0])} instead of "
            f"{shapes[1].get(differing[0])}."
        )
    if other.apply != reference.apply:
        raise ValueError(f"{shown} is another network than the reference: its options differ.")
    if other.config.null_label != reference.config.null_label:
        raise ValueError(f"{shown} has another null label than the reference.")
    ours, theirs = other.schedule, reference.schedule
    if ours.prediction_type != theirs.prediction_type or not np.array_equal(
        ours.log_snr, theirs.log_snr
    ):
        raise ValueError(f"{shown} has another noise schedule or prediction type.")


def check_vae(shown: str, model: TextToImage, reference: TextToImage) -> None:
    """Refuses a pipeline whose latents mean something else."""
    ours, theirs = jax.tree.leaves(model.vae.params), jax.tree.leaves(reference.vae.params)
    same = len(ours) == len(theirs) and all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    if not same:
        raise ValueError(f"{shown} has another autoencoder than the reference.")


def check_judge(judge: JudgeFunctions, conditions: NamedConditions) -> None:
    """Refuses a judge that tells other classes apart than the model has."""
    found = jax.eval_shape(
        judge.logits, jax.ShapeDtypeStruct((1, *conditions.image_shape), jnp.float32)
    )
    if found.shape[1] != len(conditions.classes):
        raise ValueError(
            f"the judge tells {found.shape[1]} classes apart, the model has "
            f"{len(conditions.classes)}."
        )
