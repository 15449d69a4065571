"""A grid of samples from a checkpoint."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_unlearn import data, embedded, samplers
from jax_unlearn.options import SampleOptions
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.typing import Array, Params

__all__ = ["draw_grid"]


def draw_grid(options: SampleOptions) -> np.ndarray:
    """Draws samples, a row for each label, and writes them as one picture.

    The noise of column j of a label depends on the seed, the label and j alone, so that two
    models can be compared sample by sample.

    Returns:
      The samples, uint8 [rows, columns, height, width, channels].

    Raises:
      ValueError: for a model, label or number of steps that cannot be had.
    """
    path = embedded.model_path() if options.model == "embedded" else options.model
    apply, params, schedule, config = load_pretrained(path)
    if options.labels and not config.num_labels:
        raise ValueError(f"--labels: {options.model} is not conditioned on labels.")
    labels = [config.find_label(text) for text in options.labels] or list(range(config.num_labels))

    @partial(jax.jit, donate_argnums=2)
    def draw(params: Params, key: Array, noise: Array, cond: Array | None) -> Array:
        def predict(x_t: Array, t: Array) -> Array:
            return apply(params, x_t, t, cond)

        if cond is not None and config.null_label is not None and options.guidance != 1:
            free = jnp.full_like(cond, config.null_label)
            predict = samplers.guided(
                apply, params, cond, unconditional=free, scale=options.guidance
            )
        return samplers.sample(
            predict, schedule, key, noise, steps=options.steps, method=options.method
        ).x_0

    rows = []
    for row in labels or [0]:
        key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), row))
        noise = jax.random.normal(noise_key, (options.samples, *config.sample_shape))
        cond = jnp.full((options.samples,), row, jnp.int32) if labels else None
        rows.append(data.to_pixels(draw(params, key, noise, cond)))
    grid = np.stack(rows)
    height, width, channels = config.sample_shape
    scale = max(1, 64 // height)
    picture = grid.transpose(0, 2, 1, 3, 4).reshape(len(rows) * height, -1, channels)
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial_path = options.out.with_name(options.out.name + ".partial")
    Image.fromarray(picture[..., 0] if channels == 1 else picture).save(partial_path, "PNG")
    partial_path.replace(options.out)
    return grid
