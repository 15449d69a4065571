"""Attacks on the weights: a few steps of fine-tuning, and rounding."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from jax_unlearn import attacks
from jax_unlearn.app.audit.attacks.tools import Attack, Drawn, Tools, sampled
from jax_unlearn.app.audit.subject import Concept, Target
from jax_unlearn.pretrained.subsets import lora_init, lora_merge
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["relearning", "rounding"]

_LORA_RANK = 4
_RELEARNED_FROM = (4, 16)
_BITS = (8, 6, 5, 4)


def relearning(tools: Tools) -> Attack:
    """A few steps of fine-tuning on a few images; judged on other prompts where there are any."""
    subject, options = tools.subject, tools.options
    adam = optax.adam(options.relearning_rate)
    low_alone = optax.multi_transform(
        {"base": optax.set_to_zero(), "low": adam}, {"base": "base", "low": "low"}
    )

    def merged(parts: dict[str, Params]) -> Params:
        return lora_merge(parts["base"], parts["low"])

    def adapted(parts: dict[str, Params], x_t: Array, t: Array, cond: Any) -> Array:
        return subject.apply(merged(parts), x_t, t, cond)

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        asked = subject.shown or concept.forgotten
        e = subject.rows(target, np.resize(np.asarray(asked, np.int32), options.samples))
        # What trains is apart from what does not: no parameters become constants of the program.
        ways: list[tuple[str, Denoiser, Any, Callable[[Any], Params]]] = []
        if target.text is not None:
            low = lora_init(target.params, jax.random.key(options.seed), rank=_LORA_RANK)
            name = f"low-rank change of rank {_LORA_RANK}"
            ways.append((name, adapted, {"base": target.params, "low": low}, merged))
        ways.append(("all parameters", subject.apply, target.params, lambda params: params))
        for what, apply, start, whole in ways:
            for given in sorted({min(count, len(concept.x_0)) for count in _RELEARNED_FROM}):
                learning = attacks.relearning(
                    apply,
                    subject.schedule,
                    low_alone if apply is adapted else adam,
                    x_0=concept.x_0[:given],
                    cond=subject.rows(target, concept.cond[:given]),
                    batch=min(given, 16),
                )
                state, done = learning.init(start), 0
                for budget in _doubling(options.relearning_steps):
                    if budget > done:
                        key = jax.random.key(options.seed)
                        state = learning.advance(state, key, budget - done)
                        done = budget
                    drawn = sampled(tools, target, e, "relearning", params=whole(state.params))
                    yield Drawn({"what": what, "images": given}, budget, drawn)

    return attack


def _doubling(most: int) -> Iterator[int]:
    """0, 1, 2, 4, …, and `most`."""
    yield 0
    budget = 1
    while budget < most:
        yield budget
        budget *= 2
    yield most


def rounding(tools: Tools) -> Attack:
    """The weights are rounded to a few bits: what was moved by little moves back."""

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        e = tools.subject.rows(target, tools.forgotten(concept))
        for bits in _BITS:
            params = attacks.rounded(target.params, bits)
            yield Drawn({}, bits, sampled(tools, target, e, "rounding", params=params))

    return attack
