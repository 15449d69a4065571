"""Forgets a class of the embedded model with the Python API: the demo in one screen.

    python examples/forget_class.py DIR

DIR gets the unlearned model, and rows of samples of the class before and after. Printed every ten
steps are the objective, the violation and the multiplier.
"""

import pathlib
import sys

import jax
import numpy as np
import optax
from PIL import Image
from tqdm import tqdm

import jax_unlearn
from jax_unlearn import losses, multipliers, samplers
from jax_unlearn.app import data, embedded

CLASS, KEPT, BASE, FORGET = 1, 32, 32, 32
model = jax_unlearn.load_pretrained(embedded.model_path())
null, schedule = model.config.null_label, model.schedule
train = embedded.load_data().train
keep, drop = np.flatnonzero(train.labels != CLASS), np.flatnonzero(train.labels == CLASS)


def draw_batch(rng: np.random.Generator) -> jax_unlearn.Batch:
    """Kept images as they are; the class itself; kept images in the class's place."""
    rows, others = rng.choice(keep, KEPT + BASE), rng.choice(drop, FORGET)
    pixels, labels = data.to_unit_range(train.pixels[rows]), train.labels[rows]
    return jax_unlearn.Batch(
        kept=jax_unlearn.Images(pixels[:KEPT], labels[:KEPT]),
        forget=jax_unlearn.Images(
            data.to_unit_range(train.pixels[others]),
            rng.choice([CLASS, null], FORGET),
            np.zeros(FORGET, np.int32),
        ),
        base=jax_unlearn.Images(pixels[KEPT:], rng.choice([CLASS, null], BASE)),
    )


def main(folder: str, steps: int = 100) -> None:
    # The problem: stay near the reference, and make the class half again as unlikely.
    weighting = losses.time_weighting(losses.simple_weights(schedule.num_steps, 28 * 28))
    problem = jax_unlearn.forward_kl(model.apply, schedule, weighting)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-4, steps))
    algorithm = jax_unlearn.primal_dual(problem, optimizer, multipliers.nu_pi(1.0, 10.0, nu=0.9))
    state = algorithm.init(model.params, thresholds=[0.075])
    step = jax.jit(algorithm.step, donate_argnums=1)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    for number in (bar := tqdm(range(steps), "unlearning", disable=None)):
        batch = draw_batch(rng)
        state, info = step(jax.random.fold_in(key, number), state, model.params, batch)
        if number % 10 == 0:
            bar.write(
                f"{number}: objective {info.objective:.4f}, violation {info.violations[0]:.4f}, "
                f"multiplier {info.multipliers[0]:.3f}"
            )

    jax_unlearn.save_pretrained(folder, model._replace(params=state.params), overwrite=True)
    noise, asked = jax.random.normal(key, (8, 28, 28, 1)), np.full(8, CLASS)
    free = np.full(8, null)
    for name, params in (("before", model.params), ("after", state.params)):
        predict = samplers.guided(model.apply, params, asked, unconditional=free, scale=2.0)
        images = samplers.sample(predict, schedule, key, noise, steps=25).x_0
        row = np.concatenate(list(data.to_pixels(images)[..., 0]), axis=1)
        Image.fromarray(row).save(pathlib.Path(folder) / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1])
