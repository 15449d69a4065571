"""What options ask for, whatever the models are conditioned on."""

import dataclasses
import os
from typing import Any

from jax_unlearn import divergences, schedules
from jax_unlearn.app import embedded
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.schedules import NoiseSchedule

__all__ = ["EMBEDDED", "asked", "on_chain", "others", "path_of"]

EMBEDDED = ("embedded", "embedded-text")


def path_of(name: str) -> str | os.PathLike[str]:
    """Where a model is that an option names."""
    if name == "embedded":
        return embedded.model_path()
    return embedded.text_model_path() if name == "embedded-text" else name


def asked(options: AuditOptions, **changes: Any) -> ConceptOptions:
    """The same request as `concept` takes; nothing of it trains."""
    shared = ("seed", "sampling_steps", "chain_steps", "forget")
    given: dict[str, Any] = {name: getattr(options, name) for name in shared}
    return ConceptOptions(**given | {"threshold": ("1x",)} | changes)


def others(options: AuditOptions) -> dict[str, str]:
    """The models beside the reference."""
    names = {"model": options.model, "oracle": options.oracle}
    return {name: path for name, path in names.items() if path}


def on_chain(pretrained: Pretrained, options: AuditOptions) -> NoiseSchedule:
    """The schedule whose chain path KLs are of; refuses more steps than it has."""
    schedule = dataclasses.replace(pretrained.schedule, variance_type="fixed_geometric")
    schedules.timesteps(schedule, options.sampling_steps)
    divergences.chain(schedule, pretrained.config.sample_shape, options.chain_steps)
    return schedule
