"""Samples of every label, and what a judge says of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import data, metrics, report, samplers
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.options import RunOptions
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.tasks.base import in_batches
from jax_unlearn.typing import Array, Params

__all__ = ["CAPTIONS", "Drawing", "drawing", "features_of", "sample_grids"]

CAPTIONS = {
    "agreement": {
        "description": "Share of the samples of each label that the judge names so; the forgotten "
        "labels should fall, the others should not."
    }
}


class Drawing(NamedTuple):
    """How samples are drawn and judged.

    Attributes:
      labels: that there are rows of; empty for an unconditional model.
      draw: (params, seed=0) -> uint8 [labels, samples, height, width, channels], from the same
        noise for the same seed; None where no samples were asked for.
      judge: (samples, real images or None) -> agreement by label, KID and FID of the kept labels
        against the images, where there are any; nothing without a judge.
    """

    labels: tuple[int, ...]
    draw: Callable[..., np.ndarray | None]
    judge: Callable[[np.ndarray, np.ndarray | None], dict[str, Any]]


def features_of(judge: JudgeFunctions | None) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images -> the judge's features, or the centred pixels without one."""
    judged = None if judge is None else jax.jit(judge.features)

    def features(pixels: np.ndarray) -> np.ndarray:
        if judged is None:
            flat = np.asarray(data.to_unit_range(pixels)).reshape(len(pixels), -1)
            return flat - flat.mean(axis=1, keepdims=True)
        return in_batches(lambda _, x: judged(data.to_unit_range(x)), jax.random.key(0), pixels)

    return features


def drawing(
    pretrained: Pretrained,
    options: RunOptions,
    judge: JudgeFunctions | None,
    forgotten: Sequence[int],
) -> Drawing:
    """Prepares the drawing of samples of all labels, guided as the options say.

    Args:
      pretrained: the model; only its parameters may change later.
      options: of the run.
      judge: names what samples show.
      forgotten: labels that KID and FID leave out.
    """
    apply, _, schedule, config = pretrained
    null, labels = config.null_label, tuple(range(config.num_labels))
    rows = max(len(labels), 1)
    wanted = np.repeat(np.asarray(labels, np.int32), options.samples) if labels else None

    @jax.jit
    def draw_batch(params: Params, key: Array, noise: Array, cond: Any) -> Array:
        def predict(x_t: Array, t: Array) -> Array:
            return apply(params, x_t, t, cond)

        if cond is not None and null is not None and options.guidance != 1:
            free = jnp.full_like(cond, null)
            predict = samplers.guided(
                apply, params, cond, unconditional=free, scale=options.guidance
            )
        return samplers.sample(predict, schedule, key, noise, steps=options.sampling_steps).x_0

    def draw(params: Params, seed: int = 0) -> np.ndarray | None:
        if not options.samples:
            return None
        noise = np.random.default_rng([options.seed, 3, seed]).standard_normal(
            (rows * options.samples, *config.sample_shape), np.float32
        )
        drawn = in_batches(partial(draw_batch, params), jax.random.key(seed), noise, wanted)
        return data.to_pixels(drawn).reshape(rows, options.samples, *config.sample_shape)

    kept = [label for label in labels if label not in forgotten]
    features = features_of(judge)
    logits_of = None if judge is None else jax.jit(judge.logits)

    def judge_samples(samples: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
        if logits_of is None:
            return {}
        found: dict[str, Any] = {}
        if wanted is not None:
            flat = samples.reshape(-1, *config.sample_shape)
            logits = in_batches(
                lambda _, x: logits_of(data.to_unit_range(x)), jax.random.key(0), flat
            )
            by_class = metrics.agreement(logits, wanted, len(labels))
            found["agreement"] = {
                config.label_name(label): {
                    "rate": float(by_class.rate[label]),
                    "stderr": float(by_class.stderr[label]),
                    "count": int(by_class.count[label]),
                }
                for label in labels
            }
        if real is not None:
            shown = samples[kept] if labels else samples
            ours = features(shown.reshape(-1, *config.sample_shape))
            theirs = features(real)
            found["kid"] = metrics.kernel_distance(ours, theirs)
            found["fid"] = float(metrics.frechet_distance(ours, theirs))
        return found

    return Drawing(labels, draw, judge_samples)


def sample_grids(
    pretrained: Pretrained,
    drawn: Drawing,
    before: np.ndarray | None,
    after: np.ndarray | None,
    forgotten: Sequence[int],
) -> list[report.Grid]:
    """Samples before and after, from the same noise: of forgotten and of kept labels."""
    if before is None or after is None:
        return []
    config = pretrained.config
    count = min(8, before.shape[1])

    both = (before, after)

    def rows(labels: Sequence[int], title: str, caption: str) -> report.Grid:
        where = [drawn.labels.index(label) for label in labels] if labels else [0]
        shape = (-1, *config.sample_shape)
        pair = [samples[where][:, :count].reshape(shape) for samples in both]
        return report.Grid(title, caption, pair[0], pair[1], count)

    grids = []
    if forgotten:
        asked = ", ".join(config.label_name(label) for label in forgotten)
        grids.append(rows(forgotten, f"Forgotten: {asked}", f"Samples asked for as {asked}."))
    kept = [label for label in drawn.labels if label not in forgotten]
    named = ", ".join(config.label_name(label) for label in kept)
    grids.append(rows(kept, "Retained", f"A row each: {named}." if kept else "Samples."))
    return grids
