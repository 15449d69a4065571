"""Samples of every condition from the same noise, what a judge says of them, and their pictures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_unlearn import metrics, samplers
from jax_unlearn.app import data, report
from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.conditions import NamedConditions, predictor
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.typing import Array, Params

__all__ = ["CAPTIONS", "Drawing", "drawing", "features_of", "sample_grids"]

CAPTIONS = {
    "agreement": {
        "description": "Share of the samples of each condition that the judge names so; the "
        "forgotten ones should fall, the others should not."
    },
    "named_forgotten": {
        "description": "Share of the samples of each condition that the judge names as something "
        "that was to be forgotten."
    },
}


class Drawing(NamedTuple):
    """How samples are drawn and judged.

    Attributes:
      drawn: the conditions that there are rows of; empty for an unconditional model.
      draw: (params, seed=0) -> uint8 [conditions, samples, height, width, channels], from the same
        noise for the same seed; None where no samples were asked for.
      judge: (samples, real images or None) -> what a judge names them by condition, KID and FID of
        the kept conditions against the images, where there are any; nothing without a judge.
    """

    drawn: tuple[int, ...]
    draw: Callable[..., np.ndarray | None]
    judge: Callable[[np.ndarray, np.ndarray | None], dict[str, Any]]


def features_of(judge: JudgeFunctions | None) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images -> the judge's features, or the centred pixels without one."""
    judged = None if judge is None else _of_pixels(judge.features)

    def features(pixels: np.ndarray) -> np.ndarray:
        if judged is None:
            flat = np.asarray(data.to_unit_range(pixels)).reshape(len(pixels), -1)
            return flat - flat.mean(axis=1, keepdims=True)
        size = batch_rows(pixels.shape[1:])
        return in_batches(lambda _, x: judged(x), jax.random.key(0), pixels, size=size)

    return features


def _of_pixels(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of images in [-1, 1], of uint8 ones."""
    return jax.jit(lambda pixels: function(data.to_unit_range(pixels)))


def drawing(
    pretrained: Pretrained,
    conditions: NamedConditions,
    options: RunOptions,
    judge: JudgeFunctions | None,
    forgotten: Sequence[int],
    left_out: Sequence[int] = (),
    known: dict[Any, np.ndarray] | None = None,
) -> Drawing:
    """Prepares the drawing of samples, guided as the options say.

    Args:
      pretrained: the model; only its parameters may change later.
      conditions: that it takes.
      options: of the run.
      judge: names what samples show.
      forgotten: conditions whose samples are not to show what they did.
      left_out: conditions that KID and FID leave out beside these.
      known: samples of the same reference, by how they were drawn; those drawn here are added.
    """
    apply, _, schedule, config = pretrained
    drawn = conditions.drawn
    rows = max(len(drawn), 1)
    wanted = np.repeat(np.asarray(drawn, np.int32), options.samples) if drawn else None

    @jax.jit
    def draw_batch(params: Params, key: Array, noise: Array, cond: Any) -> Array:
        predict = predictor(apply, params, conditions, cond, options.guidance)
        found = samplers.sample(predict, schedule, key, noise, steps=options.sampling_steps).x_0
        return conditions.decode(found)

    def draw(params: Params, seed: int = 0) -> np.ndarray | None:
        if not options.samples:
            return None
        how = (options.seed, seed, options.samples, options.sampling_steps, options.guidance)
        how = (conditions.names, drawn, *how)
        shared = known if known is not None and params is pretrained.params else {}
        if how in shared:
            return shared[how]
        noise = np.random.default_rng([options.seed, 3, seed]).standard_normal(
            (rows * options.samples, *config.sample_shape), np.float32
        )
        size = batch_rows(config.sample_shape)
        found = in_batches(
            partial(draw_batch, params), jax.random.key(seed), noise, wanted, size=size
        )
        shape = rows, options.samples, *conditions.image_shape
        shared[how] = data.to_pixels(found).reshape(shape)
        return shared[how]

    kept = [place for place, c in enumerate(drawn) if c not in (*forgotten, *left_out)]
    features = features_of(judge)
    logits_of = None if judge is None else _of_pixels(judge.logits)

    def judge_samples(samples: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
        if logits_of is None:
            return {}
        found: dict[str, Any] = {}
        if wanted is not None:
            flat = samples.reshape(-1, *conditions.image_shape)
            logits = in_batches(
                lambda _, x: logits_of(x),
                jax.random.key(0),
                flat,
                size=batch_rows(conditions.image_shape),
            )
            named = logits.argmax(axis=1).reshape(rows, -1)
            classes = dict(zip(drawn, conditions.shown_as, strict=True))
            lost = [classes[c] for c in forgotten if c in classes]
            own = named == np.asarray(conditions.shown_as)[:, None]
            if told := [c for c in drawn if classes[c] >= 0]:
                found["agreement"] = _shares(conditions, own, told)
            if lost:
                found["named_forgotten"] = _shares(conditions, np.isin(named, lost), drawn)
        if real is not None:
            shown = samples[kept] if drawn else samples
            ours = features(shown.reshape(-1, *conditions.image_shape))
            theirs = features(real)
            found["kid"] = metrics.kernel_distance(ours, theirs)
            found["fid"] = float(metrics.frechet_distance(ours, theirs))
        return found

    return Drawing(drawn, draw, judge_samples)


def _shares(
    conditions: NamedConditions, hits: np.ndarray, wanted: Sequence[int]
) -> dict[str, dict[str, float]]:
    """By name: the share of a row's hits [conditions, samples], and its standard error."""
    count = hits.shape[1]
    found = metrics.proportion(hits.sum(axis=1), count)
    return {
        conditions.names[c]: {"rate": float(rate), "stderr": float(stderr), "count": count}
        for c, rate, stderr in zip(conditions.drawn, *found, strict=True)
        if c in wanted
    }


def sample_grids(
    conditions: NamedConditions,
    before: np.ndarray | None,
    after: np.ndarray | None,
    groups: dict[str, Sequence[int]],
    remarks: Mapping[int, str] | None = None,
) -> list[report.Grid]:
    """Samples before and after, from the same noise, a grid for each group of conditions.

    Remarks are what the caption adds to a condition's name.
    """
    if before is None or after is None:
        return []
    count = min(8, before.shape[1])
    shape = (-1, *conditions.image_shape)
    grids = []
    for title, group in groups.items():
        places = [conditions.drawn.index(c) for c in group if c in conditions.drawn]
        if conditions.drawn and not places:
            continue
        named = ", ".join(
            conditions.names[c] + (f" ({remarks[c]})" if remarks and c in remarks else "")
            for c in (conditions.drawn[place] for place in places)
        )
        first, last = (
            samples[places or [0]][:, :count].reshape(shape) for samples in (before, after)
        )
        caption = f"A row each: {named}." if places else "Samples."
        grids.append(report.Grid(title, caption, first, last, count))
    return grids
