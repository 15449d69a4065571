"""The baselines of `data`: what each trains by, on the images of the request.

Retained images are shown under their own labels, and as large a share under none as in the
constrained run. Unlike there, none is shown under a label that is to be forgotten.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jax_unlearn import baselines, losses
from jax_unlearn.app import data, methods
from jax_unlearn.app.options import DataOptions, ImageOptions
from jax_unlearn.app.tasks import images
from jax_unlearn.app.tasks.images import ImageRequest
from jax_unlearn.app.tasks.methods import Trained, remembered, summed
from jax_unlearn.baselines.base import Loss
from jax_unlearn.problem import Batch, Images
from jax_unlearn.typing import Array, Params

__all__ = ["Relabelled", "check_images", "image_method"]

# Images that the Fisher information is of.
FISHER_IMAGES = 64
# Rows of the gradient that chooses what trains: at least so many, and so many at once.
LEAST_ROWS, AT_ONCE = 256, 32


class Relabelled(NamedTuple):
    """Images to forget beside another label each, and retained ones."""

    moved: baselines.Anchored
    rows: Batch


class _Setting(NamedTuple):
    """What a method is built from; `of` is the denoiser, its schedule and the weighting."""

    request: ImageRequest
    options: DataOptions
    of: tuple[Any, Any, losses.TimeWeighting]
    prepare: Callable[[Batch], Batch]

    def batch(self, options: DataOptions, step: int) -> Batch:
        """Retained images under their own labels; see `images.batch`."""
        return images.batch(self.request._replace(forgotten_labels=()), options, step)


def check_images(request: ImageRequest, options: ImageOptions) -> None:
    """Refuses a method that the images do not have what it takes for, before any work.

    Raises:
      ValueError: naming what is missing.
    """
    method = getattr(options, "method", methods.CONSTRAINED)
    labels, kept = request.forget.labels, request.retain.labels
    if method == "saliency" and (
        labels is None or kept is None or any(set(kept) <= {label} for label in labels)
    ):
        raise ValueError(
            "--method saliency denoises what is forgotten as under another label: it needs labels "
            "or captions, and retained images that have others."
        )
    if method == "selective-amnesia" and not request.forgotten_labels:
        raise ValueError(
            "--method selective-amnesia makes labels show noise: it needs a label that only images "
            "to forget have."
        )


def image_method(
    request: ImageRequest,
    options: ImageOptions,
    weighting: losses.TimeWeighting,
    prepare: Callable[[Batch], Batch],
) -> Trained | None:
    """What --method replaces of the task of `data`; None of one that replaces no loss.

    Args:
      request: images to forget and to keep.
      options: with the method; those of `demo` have none.
      weighting: of the constrained problem's losses.
      prepare: of the constrained problem.
    """
    method = getattr(options, "method", methods.CONSTRAINED)
    if method not in _METHODS:
        return None
    assert isinstance(options, DataOptions)
    of = (request.pretrained.apply, request.pretrained.schedule, weighting)
    return _METHODS[method](_Setting(request, options, of, prepare))


def _naive_deletion(setting: _Setting) -> Trained:
    return Trained(lambda _: baselines.naive_deletion(*setting.of), setting.batch)


def _neg_grad(setting: _Setting) -> Trained:
    return Trained(lambda scale: baselines.neg_grad(*setting.of, scale=scale), setting.batch)


def _siss(setting: _Setting) -> Trained:
    def batch(options: DataOptions, step: int) -> Batch:
        """As many retained images as there are to forget, a pair each."""
        brought = setting.batch(options, step)
        count = options.forget_batch_size
        return brought._replace(kept=jax.tree.map(lambda leaf: leaf[:count], brought.kept))

    return Trained(lambda norm: baselines.siss(*setting.of, norm=norm), batch)


def _siss_no_is(setting: _Setting) -> Trained:
    return Trained(
        lambda norm: baselines.siss(*setting.of, norm=norm, estimator="two_term"), setting.batch
    )


def _erase_diff(setting: _Setting) -> Trained:
    return Trained(lambda eta: baselines.erase_diff(*setting.of, eta=eta), setting.batch)


def _saliency(setting: _Setting) -> Trained:
    request = setting.request
    moved = baselines.concept_ablation(*setting.of, preservation=0.0)
    retained = baselines.naive_deletion(*setting.of)
    others = np.unique(np.asarray(request.retain.labels))

    def loss_of(strength: Any) -> Loss:
        def loss(params: Params, reference: Params, key: Array, batch: Relabelled) -> Array:
            first, second = jax.random.split(key)
            return moved(params, reference, first, batch.moved) + strength * retained(
                params, reference, second, batch.rows
            )

        return loss

    def batch(options: DataOptions, step: int) -> Relabelled:
        brought = setting.batch(options, step)
        chosen, _ = images.forgotten_rows(request, options, step)
        rng = np.random.default_rng([options.seed, step, 3])
        labels = np.asarray(chosen.labels)
        other = np.array([rng.choice(others[others != label]) for label in labels])
        moved = baselines.Anchored(
            chosen.stored, request.cond(chosen.labels), request.cond(other.astype(np.int32))
        )
        return Relabelled(moved, brought)

    def prepare(brought: Relabelled) -> Relabelled:
        moved = brought.moved
        return Relabelled(moved._replace(x_0=data.to_x_0(moved.x_0)), setting.prepare(brought.rows))

    mask = baselines.saliency_mask(_gradient_of_forgotten(setting))
    return Trained(loss_of, batch, prepare, mask=mask)


def _gradient_of_forgotten(setting: _Setting) -> Params:
    """Of the loss of all images to forget at the reference, each as often as any other."""
    request = setting.request
    params = request.pretrained.params
    ascent = baselines.neg_grad(*setting.of, scale=1.0)
    gradient = jax.jit(jax.grad(lambda params, key, rows: ascent(params, None, key, rows)))
    count = len(request.forget.pixels)
    rows = np.tile(np.arange(count), -(-LEAST_ROWS // count))
    total = optax.tree.zeros_like(params)
    for number, start in enumerate(range(0, len(rows), AT_ONCE)):
        # The last batch begins anew, so that all have one shape.
        chosen = data.take(request.forget, np.resize(rows[start:], AT_ONCE))
        few = Images(data.to_x_0(chosen.stored), request.cond(chosen.labels))
        key = jax.random.fold_in(jax.random.key(setting.options.seed), 2**20 + number)
        total = optax.tree.add(total, gradient(params, key, Batch(None, few)))
    return total


def _selective_amnesia(setting: _Setting) -> Trained:
    request, options = setting.request, setting.options
    apply, schedule, weighting = setting.of
    if options.weighting == "simple":
        weighting = summed(weighting, request.pretrained.config.sample_shape)

    def batch(options: DataOptions, step: int) -> Batch:
        """Uniform noise under the labels to forget, and retained images."""
        chosen, _ = images.forgotten_rows(request, options, step)
        rng = np.random.default_rng([options.seed, step, 3])
        noise = rng.integers(0, 256, chosen.stored.shape, np.uint8)
        kept = setting.batch(options, step).kept
        return Batch(kept, None, Images(noise, request.cond(chosen.labels)))

    def prepare(brought: Batch) -> Batch:
        kept, base = (
            part._replace(x_0=data.to_x_0(part.x_0)) for part in (brought.kept, brought.base)
        )
        return Batch(kept, None, base)

    chosen = data.take(request.retain, np.arange(FISHER_IMAGES) % len(request.retain.pixels))
    examples = Images(data.to_x_0(chosen.stored), request.cond(chosen.labels))
    return Trained(
        lambda strength: baselines.selective_amnesia(apply, schedule, weighting, strength=strength),
        batch,
        prepare,
        remembered(request.pretrained, weighting, examples, options.seed),
    )


_METHODS = {
    "naive-deletion": _naive_deletion,
    "neg-grad": _neg_grad,
    "siss": _siss,
    "siss-no-is": _siss_no_is,
    "erase-diff": _erase_diff,
    "saliency": _saliency,
    "selective-amnesia": _selective_amnesia,
}
