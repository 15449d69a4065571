"""A grid of samples from a checkpoint."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_unlearn import samplers
from jax_unlearn.app import data, embedded
from jax_unlearn.app.files import replace_file
from jax_unlearn.app.options import SampleOptions
from jax_unlearn.app.tasks.conditions import of_labels, of_prompts, predictor
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.subsets import load_lora, lora_merge
from jax_unlearn.pretrained.text_to_image import is_text_to_image, load_text_to_image
from jax_unlearn.typing import Array, Params

__all__ = ["draw_grid"]


def draw_grid(options: SampleOptions) -> np.ndarray:
    """Draws samples, a row for each label or prompt, and writes them as one picture.

    The noise of column j of a row depends on the seed, the label (or which prompt it is) and j
    alone, so that two models can be compared sample by sample.

    Returns:
      The samples, uint8 [rows, columns, height, width, channels].

    Raises:
      ValueError: for a model, label, prompt or number of steps that cannot be had.
    """
    own = {"embedded": embedded.model_path, "embedded-text": embedded.text_model_path}
    path = own[options.model]() if options.model in own else options.model
    if is_text_to_image(path):
        if options.labels or not options.prompts:
            raise ValueError(f"{options.model} is conditioned on text: give --prompts.")
        pretrained, conditions = of_prompts(load_text_to_image(path), options.prompts)
        if options.lora is not None:
            params = pretrained.params
            merged = lora_merge(params, load_lora(options.lora, params))
            pretrained = pretrained._replace(params=merged)
        wanted = list(conditions.drawn)
    else:
        for name in ("prompts", "lora"):
            if getattr(options, name):
                raise ValueError(f"--{name}: {options.model} is not conditioned on text.")
        pretrained = load_pretrained(path)
        conditions = of_labels(pretrained)
        if options.labels and not conditions.drawn:
            raise ValueError(f"--labels: {options.model} is not conditioned on labels.")
        find = pretrained.config.find_label
        wanted = [find(text) for text in options.labels] or list(conditions.drawn)
    apply, params, schedule, config = pretrained

    @jax.jit
    def draw(params: Params, key: Array, noise: Array, cond: Array | None) -> Array:
        predict = predictor(apply, params, conditions, cond, options.guidance)
        found = samplers.sample(
            predict, schedule, key, noise, steps=options.steps, method=options.method
        ).x_0
        return conditions.decode(found)

    rows = []
    for row in wanted or [0]:
        key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), row))
        noise = jax.random.normal(noise_key, (options.samples, *config.sample_shape))
        cond = jnp.full((options.samples,), row, jnp.int32) if wanted else None
        rows.append(data.to_pixels(draw(params, key, noise, cond)))
    grid = np.stack(rows)
    height, width, channels = conditions.image_shape
    scale = max(1, 64 // height)
    picture = grid.transpose(0, 2, 1, 3, 4).reshape(len(rows) * height, -1, channels)
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    Image.fromarray(picture[..., 0] if channels == 1 else picture).save(encoded, "PNG")
    replace_file(options.out, encoded.getvalue())
    return grid
