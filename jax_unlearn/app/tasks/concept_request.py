"""Which conditions a concept is, what each is held to, and what must be left: labels or prompts."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_unlearn import divergences, likelihoods, schedules
from jax_unlearn.app import data
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.conditions import (
    NamedConditions,
    by_vectors,
    of_labels,
    of_prompts,
)
from jax_unlearn.likelihoods import posteriors
from jax_unlearn.pretrained import Pretrained, relabelled
from jax_unlearn.pretrained.editing import edit_cross_attention
from jax_unlearn.pretrained.subsets import parse_subset
from jax_unlearn.pretrained.text_to_image import TextToImage
from jax_unlearn.typing import Params

__all__ = [
    "ConceptRequest",
    "Separation",
    "edited",
    "make_prompt_request",
    "make_request",
    "prompt_lines",
]

# Of a file with a prompt a line, in bytes.
_MAX_PROMPTS = 2**24


class Separation(NamedTuple):
    """A condition that must not show the concepts.

    Attributes:
      cond: p(·|cond) is separated,
      base: and held to q(·|base).
      targets: the concepts q_i = q(·|target) that it is separated from, one for each constraint.
    """

    cond: int
    base: int
    targets: tuple[int, ...]


class ConceptRequest(NamedTuple):
    """NamedConditions, checked and by number.

    Attributes:
      pretrained: the model; its denoiser takes the numbers. Its schedule's variance is
        "fixed_geometric": path KLs are those of that chain. On ten steps of the embedded model
        they are within a factor of about two of the limit of many steps, those of "fixed_small"
        forty times as large.
      conditions: their names, and how samples of them are drawn.
      concepts: names of the concepts, one for each constraint.
      separated: the forgotten conditions, and the free branch if asked for.
      kept: conditions held to what they were.
      anchors: kept conditions that calibrated thresholds are measured on, and the conditions of
        the concepts that each is compared with.
      shown: conditions that are measured alone.
      candidates: conditions among which the model's own classifier decides ("likelihood").
      members: which of these show which concept, bool [concepts, candidates].
      start: the parameters to start from.
      real: images that samples are compared with, uint8; None for samples of the reference.
      notes: what the owner should know.
      known: samples of the reference that the runs of one command share; see `drawing`.
    """

    pretrained: Pretrained
    conditions: NamedConditions
    concepts: tuple[str, ...]
    separated: tuple[Separation, ...]
    kept: tuple[int, ...]
    anchors: tuple[tuple[int, tuple[int, ...]], ...]
    shown: tuple[int, ...]
    candidates: tuple[int, ...]
    members: np.ndarray
    start: Params
    real: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    known: dict[Any, np.ndarray] | None = None

    @property
    def forgotten(self) -> tuple[int, ...]:
        """The separated conditions without the free branch."""
        return tuple(one.cond for one in self.separated if one.cond != self.conditions.null)

    @property
    def judged(self) -> np.ndarray:
        """Places of the candidates that tell concepts from what is held to instead, in order.

        The concepts and the bases; all, where a base is no candidate. Whatever else these few
        confuse is allowed for on stored samples, and costs less than the calls of all of them.
        """
        bases = {one.base for one in self.separated}
        if not bases <= set(self.candidates):
            return np.arange(len(self.candidates))
        return np.flatnonzero(self.members.any(axis=0) | np.isin(self.candidates, list(bases)))

    def rows(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition [n], base [n] and targets [n, concepts] of separated conditions, by place."""
        cond, base, targets = (
            np.asarray(part, np.int32) for part in zip(*self.separated, strict=True)
        )
        return cond[which], base[which], targets[which]


def make_request(pretrained: Pretrained, options: ConceptOptions) -> ConceptRequest:
    """Checks the options against a model with labels, before any expensive work.

    Raises:
      ValueError: for a model without labels, a label that it does not have, a base or anchor
        that is to be forgotten, nothing left to keep, options of prompts, more steps or classifier
        noise than the schedule has, or without a table of labels where vectors are attacked.
    """
    config, null = pretrained.config, pretrained.config.null_label
    options.refuse(
        ("template", "retain", "show", "clip", "start", "train"),
        "models that are conditioned on prompts",
    )
    if options.formulation == "without":
        by_vectors(pretrained)
    forget = tuple(config.find_label(text) for text in options.forget)
    if len(set(forget)) < len(forget):
        raise ValueError(f"--forget names a label twice: {', '.join(options.forget)}.")
    if options.base is None and null is None:
        raise ValueError("the model has no null label to hold what is forgotten to: give --base.")
    base = null if options.base is None else config.find_label(options.base)
    assert base is not None
    for flag, text in (("base", options.base), ("anchor", options.anchor)):
        if text is not None and config.find_label(text) in forget:
            raise ValueError(f"--{flag} {text} is also to be forgotten.")
    separated, kept = forget, tuple(c for c in range(config.num_labels) if c not in forget)
    if options.separate_null:
        if null is None or base != null:
            raise ValueError("--separate-null needs a null label, and it as --base.")
        separated = (*separated, null)
    elif null is not None:
        kept = (*kept, null)
    if not kept:
        raise ValueError("nothing is left to keep: every label is to be forgotten.")
    labels = tuple(c for c in kept if c != null)
    anchors = labels if options.anchor is None else (config.find_label(options.anchor),)
    if not anchors and "calibrated" in options.threshold:
        raise ValueError("no kept label to calibrate on: give --threshold numbers.")
    candidates = tuple(range(config.num_labels))
    return ConceptRequest(
        _on_chain(pretrained, options),
        of_labels(pretrained),
        tuple(config.label_name(label) for label in forget),
        tuple(Separation(c, base, forget) for c in separated),
        kept,
        tuple((c, forget) for c in anchors),
        (),
        candidates,
        np.asarray(forget)[:, None] == np.asarray(candidates),
        relabelled(pretrained.params, forget, base),
    )


class _Template(NamedTuple):
    """A prompt with a place for a name, and the prompt that stands for no name; or None."""

    text: str
    base: str | None

    def fill(self, name: str) -> str:
        return " ".join(self.text.replace("{}", name).split())


def make_prompt_request(model: TextToImage, options: ConceptOptions) -> ConceptRequest:
    """Checks the options against a pipeline from text to image, and encodes all prompts once.

    Raises:
      ValueError: for a template without a place for a name, a prompt that is empty, too long, or
        both forgotten and kept, a base or anchor that is to be forgotten, calibrated thresholds
        without an anchor, a judge of labels, or more steps or classifier noise than the schedule
        has.
    """
    options.refuse(("judge",), "models that are conditioned on labels; give --clip")
    templates = [_template(text) for text in options.template]
    names = [[name.strip() for name in text.split("|")] for text in options.forget]
    everyone = [name for many in names for name in many]
    for flag, name in (("base", options.base), ("anchor", options.anchor)):
        if name is not None and name.strip() in everyone:
            raise ValueError(f"--{flag} {name} is also to be forgotten.")
    if options.anchor is None and "calibrated" in options.threshold:
        raise ValueError("calibrated thresholds of prompts need --anchor, a concept to keep.")

    numbers: dict[str, int] = {}

    def number(prompt: str) -> int:
        return numbers.setdefault(prompt, len(numbers))

    def base_of(template: _Template) -> str | None:
        if template.base is not None or options.base is None:
            return template.base
        return template.fill(options.base)

    # A forgotten prompt is separated from the first name of each concept in its own template.
    rows = [
        (
            number(template.fill(name)),
            base_of(template),
            tuple(number(template.fill(others[0])) for others in names),
        )
        for many in names
        for name in many
        for template in templates
    ]
    forgotten = set(numbers.values())
    if len(forgotten) < len(rows):
        raise ValueError("two of the prompts to forget are the same: each may be given once.")
    anchors = []
    if options.anchor is not None:
        for template in templates:
            against = tuple(number(template.fill(others[0])) for others in names)
            anchors.append((number(template.fill(options.anchor)), against))
    asked = [prompt for text in options.retain for prompt in prompt_lines(text)]
    bases = {number(base) for _, base, _ in rows if base is not None}
    named = [*(number(prompt) for prompt in asked), *(c for c, _ in anchors)]
    kept = list(dict.fromkeys((*named, *sorted(bases))))
    if both := sorted(forgotten & set(kept)):
        listed = ", ".join(repr(list(numbers)[c]) for c in both)
        raise ValueError(f"both to be forgotten and kept (or a base, or anchor): {listed}.")
    extra = tuple(number(prompt) for text in options.show for prompt in prompt_lines(text))
    shown = tuple(c for c in extra if c not in forgotten and c not in kept)
    prompts = list(numbers)
    for prompt in prompts:
        if not any(tokenizer.bpe.encode(prompt).ids for tokenizer in model.tokenizers):
            raise ValueError(f"the prompt {prompt!r} is empty: it has no tokens.")

    pretrained, conditions = of_prompts(model, prompts)
    null = conditions.null
    assert null is not None
    separated = [
        Separation(c, null if base is None else number(base), targets) for c, base, targets in rows
    ]
    if options.separate_null:
        separated.append(Separation(null, null, rows[0][2]))
    else:
        kept.append(null)
    if not kept:
        raise ValueError("nothing is left to keep: give --retain.")
    first = [tuple(number(t.fill(many[0])) for t in templates) for many in names]
    distinct = [c for group in first for c in group]
    candidates = (*distinct, *(c for c in dict.fromkeys(kept) if c != null))
    if len(candidates) == len(distinct):
        candidates = (*candidates, null)
    # What a judge tells apart: the concepts' first names, what was asked to be kept, the anchors.
    told_apart = list(dict.fromkeys((*distinct, *named)))
    shown_as = {c: place for place, c in enumerate(told_apart)}
    for many in names:
        for template in templates:
            place = shown_as[number(template.fill(many[0]))]
            shown_as |= {number(template.fill(name)): place for name in many}
    notes = []
    if not asked:
        notes.append(
            "No --retain: of what is kept the model is held only to "
            + ", ".join(conditions.names[c] for c in kept)
            + "."
        )
    start = _start(model, options, conditions, separated, kept, pretrained)
    return ConceptRequest(
        _on_chain(pretrained, options),
        conditions._replace(
            classes=tuple(prompts[c] for c in told_apart),
            shown_as=tuple(shown_as.get(c, -1) for c in conditions.drawn),
        ),
        tuple(many[0] for many in names),
        tuple(separated),
        tuple(kept),
        tuple(anchors),
        shown,
        candidates,
        np.array([np.isin(candidates, group) for group in first]),
        start,
        notes=tuple(notes),
    )


def _template(text: str) -> _Template:
    text, arrow, base = text.partition("=>")
    if "{}" not in text:
        raise ValueError(f"--template {text!r} has no {{}}, the place of what is forgotten.")
    if arrow and not base.strip():
        raise ValueError(f"--template {text!r} => names no base prompt.")
    return _Template(text, " ".join(base.split()) if arrow else None)


def prompt_lines(text: str) -> list[str]:
    """A prompt, or those of @FILE, one a line.

    Raises:
      ValueError: for a file that cannot be read, that has no prompts, or control characters.
    """
    if not text.startswith("@"):
        return [data.fold(text, f"the prompt {text!r}")]
    path = pathlib.Path(text[1:])
    lines = data.read_text(path, _MAX_PROMPTS).splitlines()
    prompts = [data.fold(line, f"a prompt of {path}") for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts


def _start(
    model: TextToImage,
    options: ConceptOptions,
    conditions: NamedConditions,
    separated: Sequence[Separation],
    kept: Sequence[int],
    pretrained: Pretrained,
) -> Params:
    part, rank = parse_subset(options.train)
    keys_train = rank is None and part != "no-cross-attention"
    if options.start == "reference" or not keys_train:
        return pretrained.params
    return edited(pretrained, separated, kept)


def edited(
    pretrained: Pretrained,
    separated: Sequence[Separation],
    kept: Sequence[int],
    weight: float = 1.0,
) -> Params:
    """The reference's parameters, of which cross-attention reads conditions as their bases.

    Args:
      pretrained: a model of prompts, by number.
      separated: what is read as its base, where that is another.
      kept: what is read as before.
      weight: as in `edit_cross_attention`.
    """
    apply: Any = pretrained.apply
    hidden = apply.table
    if isinstance(hidden, dict):
        hidden = hidden["encoder_hidden_states"]
    moved = [one for one in separated if one.cond != one.base]
    return edit_cross_attention(
        pretrained.params,
        sources=hidden[np.array([one.cond for one in moved])],
        targets=hidden[np.array([one.base for one in moved])],
        kept=hidden[np.array(kept)],
        weight=weight,
    )


def _on_chain(pretrained: Pretrained, options: ConceptOptions) -> Pretrained:
    schedule = dataclasses.replace(pretrained.schedule, variance_type="fixed_geometric")
    schedules.timesteps(schedule, options.sampling_steps)
    divergences.chain(schedule, pretrained.config.sample_shape, options.chain_steps)
    likelihoods.noised_weights(schedule, options.classifier_noise)
    if options.formulation == "likelihood" and options.target_steps:
        rng = np.random.default_rng()
        posteriors.path_times(posteriors.path_weighting(schedule), options.target_steps, rng)
    return pretrained._replace(schedule=schedule)
