"""How much of an on-policy gradient is noise: its mean and its deviation over batches.

    python benchmarks/gradient_noise.py [--task blueprint] [--batches 8] [--seeds 0 1 2]

The gradient of reverse KL's Lagrangian at the start of a task of `prompts.py`, in all parameters,
with every multiplier at a fifth of the domain, along 22 trajectories a batch. signal is the norm of
the mean, less what its own noise adds (0 where that is all there is); noise is the root of the
summed variances of one batch. Their ratio is what a step has to go by.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from prompts import COMMON, REVERSE, TASKS

from jax_unlearn import lagrangian, reverse_kl
from jax_unlearn.app import embedded
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.concept_formulations import condition_batch
from jax_unlearn.app.tasks.concept_request import make_prompt_request
from jax_unlearn.pretrained.text_to_image import load_text_to_image

ESTIMATORS = ("stop_gradient", "bounded", "pathwise")
MULTIPLIER = 0.2


def gradients(request, options, estimator, batches):
    """Of `batches` batches, [batches, parameters]."""
    apply, reference, schedule, config = request.pretrained
    count = len(request.concepts)
    multipliers = jnp.full(count, MULTIPLIER / count)
    problem = reverse_kl(
        apply, schedule, estimator=estimator, shape=config.sample_shape, steps=options.chain_steps
    )

    @jax.jit
    def gradient(key, batch):
        def value(params):
            return lagrangian(
                problem, params, reference, key, batch, multipliers, jnp.zeros(count)
            )[0]

        found = jax.grad(value)(request.start)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

    key = jax.random.key(options.seed)
    return np.stack(
        [
            np.asarray(gradient(jax.random.fold_in(key, n), condition_batch(request, options, n)))
            for n in range(batches)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="blueprint")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    model = load_text_to_image(embedded.text_model_path())
    for seed in arguments.seeds:
        options = ConceptOptions(seed=seed, **COMMON, **REVERSE, **TASKS[arguments.task])
        request = make_prompt_request(model, options)
        for estimator in ESTIMATORS:
            found = gradients(request, options, estimator, arguments.batches)
            mean, noise = found.mean(axis=0), found.var(axis=0, ddof=1).sum()
            signal = max(np.square(mean).sum() - noise / arguments.batches, 0.0)
            norms = np.quantile(np.linalg.norm(found, axis=1), [0.0, 0.5, 1.0])
            print(
                f"{arguments.task}, seed {seed}, {estimator:13}: signal {signal**0.5:.3g}, noise "
                f"{noise**0.5:.3g}, ratio {(signal / noise) ** 0.5:.2g}; norms of batches "
                f"{norms[0]:.3g} to {norms[2]:.3g}, median {norms[1]:.3g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
