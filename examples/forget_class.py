"""Forgets a class of the embedded model with the Python API: the demo in one screen.

python examples/forget_class.py DIR
"""

import sys

import jax
import numpy as np
import optax
from PIL import Image

import jax_unlearn
from jax_unlearn import losses, multipliers, samplers
from jax_unlearn.app import data, embedded

CLASS, STEPS, KEPT, BASE, FORGET = 1, 100, 32, 32, 32

model = jax_unlearn.load_pretrained(embedded.model_path())
null, schedule = model.config.null_label, model.schedule
train = embedded.load_data().train
keep, drop = np.flatnonzero(train.labels != CLASS), np.flatnonzero(train.labels == CLASS)

# The problem: stay near the reference, and make the class half again as unlikely.
weighting = losses.time_weighting(losses.simple_weights(schedule.num_steps, 28 * 28))
formulation = jax_unlearn.forward_kl(model.apply, schedule, weighting)
optimizer = optax.adam(optax.cosine_decay_schedule(5e-4, STEPS))
algorithm = jax_unlearn.primal_dual(formulation, optimizer, multipliers.nu_pi(1.0, 10.0, nu=0.9))
state = algorithm.init(model.params, thresholds=[0.075])
step = jax.jit(algorithm.step, donate_argnums=1)


def batch(rng: np.random.Generator) -> jax_unlearn.Batch:
    """Kept images as they are; kept images in the class's place; the class itself."""
    rows, others = rng.choice(keep, KEPT + BASE), rng.choice(drop, FORGET)
    pixels, labels = data.to_unit_range(train.pixels[rows]), train.labels[rows]
    return jax_unlearn.Batch(
        kept=jax_unlearn.Examples(pixels[:KEPT], labels[:KEPT]),
        base=jax_unlearn.Examples(pixels[KEPT:], rng.choice([CLASS, null], BASE)),
        forget=jax_unlearn.Forget(
            data.to_unit_range(train.pixels[others]),
            rng.choice([CLASS, null], FORGET),
            np.zeros(FORGET, np.int32),
        ),
    )


rng, key = np.random.default_rng(0), jax.random.key(0)
for number in range(STEPS):
    state, info = step(jax.random.fold_in(key, number), state, batch(rng))
    if number % 10 == 0:
        print(number, f"objective {info.objective:.4f}", "violation", info.violations, flush=True)

jax_unlearn.save_pretrained(sys.argv[1], model._replace(params=state.params), overwrite=True)
noise, asked = jax.random.normal(key, (8, 28, 28, 1)), np.full(8, CLASS)
for name, params in (("before", model.params), ("after", state.params)):
    predict = samplers.guided(model.apply, params, asked, unconditional=asked * 0 + null, scale=2.0)
    images = samplers.sample(predict, schedule, key, noise, steps=25).x_0
    row = np.concatenate(list(data.to_pixels(images)[..., 0]), axis=1)
    Image.fromarray(row).save(f"{sys.argv[1]}/{name}.png")
