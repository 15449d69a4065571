"""The runs that a command makes, and what the demo gives each of them."""

import dataclasses
from typing import Any

from jax_unlearn.app.embedded import captions
from jax_unlearn.app.options import ConceptOptions, DemoOptions, RunOptions

__all__ = ["DEFAULTS", "jobs_of"]

# Of `concept`, where they are not those of reverse KL: steps that do not sample are cheaper, and
# closed forms have none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "likelihood": {"steps": 300},
    "without": {
        "steps": 1500,
        "batch_size": 48,
        "forget_batch_size": 16,
        "learning_rate": 3e-4,
        "threshold": ("0.05x",),
        "dual_learning_rate": 0.02,
    },
    "uce": {"steps": 0},
}
# What the side-by-side demo gives the formulations that `concept` runs: minutes, not hours. In so
# few steps reverse KL can keep nine tenths of the base's separation, and not reach an anchor's.
_DEMO: dict[str, dict[str, Any]] = {
    "reverse-kl": {
        "steps": 12,
        "batch_size": 12,
        "forget_batch_size": 6,
        "threshold": ("0.9x",),
    },
    "likelihood": {
        "stored_samples": 153,
        "classifier_draws": 2,
        "target_steps": 0,
        "corrections": 0,
        "learning_rate": 2e-4,
    },
}
_DEMO_TEXT: dict[str, dict[str, Any]] = {
    "reverse-kl": {
        "steps": 12,
        "batch_size": 16,
        "forget_batch_size": 8,
        "threshold": ("0.9x",),
    },
    "likelihood": {
        "steps": 40,
        "stored_samples": 160,
        "classifier_draws": 2,
        "target_steps": 0,
        "corrections": 0,
        "threshold": ("0.25x",),
        "learning_rate": 2e-4,
    },
}


def jobs_of(command: str, options: RunOptions) -> list[tuple[str, RunOptions]]:
    """The runs that a command makes: its name in run.json, and its options."""
    if not isinstance(options, DemoOptions):
        return [(command, options)]
    options = dataclasses.replace(options, forget=options.asked)
    if "repeated" in options.forget and not options.text:
        return [(command, options)]
    settings = _DEMO_TEXT if options.text else _DEMO
    many = options.formulation == "all" and not options.robust
    jobs: list[tuple[str, RunOptions]] = []
    every = [*settings] if options.text else ["forward-kl", *settings]
    alone = "without" if options.robust else options.formulation
    for formulation in every if many else [alone]:
        out = options.out / formulation if many else options.out
        if formulation == "forward-kl":
            one = dataclasses.replace(options, out=out, formulation=formulation)
            jobs.append((command, one))
            continue
        shared = ("seed", "samples", "sampling_steps", "guidance", "forget", "resume", "overwrite",
                  "tensorboard", "mesh", "parallel")  # fmt: skip
        given: dict[str, Any] = {name: getattr(options, name) for name in shared}
        given |= {"out": out, "formulation": formulation, "evaluation_images": 153}
        if options.text:
            given |= captions.forgetting(options.forget)
            given |= {"model": "embedded-text", "samples": 6, "sampling_steps": 15}
            given["evaluation_images"] = 440
        given |= DEFAULTS["without"] if options.robust else settings[formulation]
        jobs.append(("concept", ConceptOptions(**given)))
    return jobs
