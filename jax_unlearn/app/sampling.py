"""A grid of samples from a checkpoint."""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_unlearn import samplers, schedules
from jax_unlearn.app import data, embedded
from jax_unlearn.app.files import is_full, replace_file
from jax_unlearn.app.memory import check_samples
from jax_unlearn.app.options import SampleOptions
from jax_unlearn.app.tasks.conditions import of_labels, of_prompts, predictor
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.subsets import load_lora, lora_merge
from jax_unlearn.pretrained.text_to_image import is_text_to_image, load_text_to_image
from jax_unlearn.typing import Array, Params

__all__ = ["draw_grid"]

_MOST_PIXELS = 2**31 - 1  # Of a side of a PNG.


def draw_grid(options: SampleOptions) -> np.ndarray:
    """Draws samples, a row for each label or prompt, and writes them as one picture.

    The noise of column j of a row depends on the seed, the label (or which prompt it is) and j
    alone, so that two models can be compared sample by sample.

    Returns:
      The samples, uint8 [rows, columns, height, width, channels].

    Raises:
      ValueError: for a model, label, prompt or number of steps that cannot be had, or a picture
        that cannot be written; that is seen before the model is loaded.
      OSError: if the disk is full.
    """
    with _writing(options.out):
        _check_target(options.out, options.overwrite)
    own = {"embedded": embedded.model_path, "embedded-text": embedded.text_model_path}
    path = own[options.model]() if options.model in own else options.model
    revision = options.revision or None
    if is_text_to_image(path, revision=revision):
        if options.labels or not options.prompts:
            raise ValueError(f"{options.model} is conditioned on text: give --prompts.")
        model = load_text_to_image(path, revision=revision)
        pretrained, conditions = of_prompts(model, options.prompts)
        if options.lora is not None:
            params = pretrained.params
            merged = lora_merge(params, load_lora(options.lora, params))
            pretrained = pretrained._replace(params=merged)
        wanted = list(conditions.drawn)
    else:
        for name in ("prompts", "lora"):
            if getattr(options, name):
                raise ValueError(f"--{name}: {options.model} is not conditioned on text.")
        pretrained = load_pretrained(path, revision=revision)
        conditions = of_labels(pretrained)
        if options.labels and not conditions.drawn:
            raise ValueError(f"--labels: {options.model} is not conditioned on labels.")
        find = pretrained.config.find_label
        wanted = [find(text) for text in options.labels] or list(conditions.drawn)
    apply, params, schedule, config = pretrained
    schedules.timesteps(schedule, options.steps)
    height, width, channels = conditions.image_shape
    scale = max(1, 64 // height)
    count = len(wanted or [0])
    size = (height * scale, width * scale, channels)
    check_samples(params, options, count, (config.sample_shape, size))
    if max(options.samples * size[1], count * size[0]) > _MOST_PIXELS:
        raise ValueError(f"--samples {options.samples} make a picture of too many pixels.")

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
    picture = grid.transpose(0, 2, 1, 3, 4).reshape(len(rows) * height, -1, channels)
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    encoded = io.BytesIO()
    Image.fromarray(picture[..., 0] if channels == 1 else picture).save(encoded, "PNG")
    with _writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, encoded.getvalue())
    return grid


@contextlib.contextmanager
def _writing(out: pathlib.Path) -> Iterator[None]:
    """Turns what the system says about a path into a line; a full disk is not the path's fault."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise
        raise ValueError(f"cannot write {out}: {error.strerror}.") from error


def _check_target(out: pathlib.Path, overwrite: bool) -> None:
    """Refuses a picture that could not be written, and leaves nothing behind.

    Raises:
      ValueError: if it, or what stands in its way, is there.
      OSError: whatever writing beside it would raise.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link to nothing: choose another --out.")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} is no file: choose another --out for the picture.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out, or --overwrite it.")
    above = next(folder for folder in out.parents if folder.exists())
    # The name, and that under which it is written first.
    for part in (*out.relative_to(above).parts, f".{out.name}.{os.getpid()}.tmp"):
        with contextlib.suppress(FileNotFoundError):
            (above / part).lstat()
    with tempfile.TemporaryFile(dir=above) as file:
        file.write(bytes(2**16))
