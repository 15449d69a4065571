"""Audits of models from text to image."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_unlearn.app import data, embedded
from jax_unlearn.app.audit.copies import spaces
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject.checks import check_judge, check_same, check_vae
from jax_unlearn.app.audit.subject.images import Shown, of_conditions, of_images
from jax_unlearn.app.audit.subject.parts import Domains, Subject, Target
from jax_unlearn.app.audit.subject.request import EMBEDDED, asked, on_chain, others, path_of
from jax_unlearn.app.embedded import captions
from jax_unlearn.app.tasks import conditions as named
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.concept_request import make_prompt_request, prompt_lines
from jax_unlearn.app.tasks.conditions import NamedConditions, table_of
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.pretrained import load_pretrained
from jax_unlearn.pretrained.clip import load_clip, zero_shot
from jax_unlearn.pretrained.text_to_image import TextToImage, encode_images, load_text_to_image

__all__ = ["of_prompts"]


def of_prompts(options: AuditOptions) -> Subject:
    """The subject of prompts, or of images and their captions; see `load_subject`."""
    if options.judge is not None:
        raise ValueError("--judge is for models that are conditioned on labels; give --clip.")
    return _of_names(options) if options.forget else _of_captioned(options)


def _of_names(options: AuditOptions) -> Subject:
    own = options.reference == "embedded-text"
    usual = own and not options.template
    cross = [prompt for text in options.cross for prompt in prompt_lines(text)]
    wording: dict[str, Any] = {
        name: getattr(options, name) for name in ("template", "retain", "show")
    }
    wording["retain"] = (*options.retain, *options.cross)
    if usual:
        if cross:
            raise ValueError("--cross: of the embedded captions objects and styles are known.")
        wording = captions.forgetting(options.forget)
        wording = {name: wording[name] for name in ("forget", "template", "retain", "show")}
        options = dataclasses.replace(options, forget=wording.pop("forget"))
    reference = load_text_to_image(path_of(options.reference))
    request = make_prompt_request(reference, asked(options, model="", start="reference", **wording))
    conditions = request.conditions
    prompts = [name.strip("“”") for name in conditions.names[:-1]]
    numbered: Any = request.pretrained.apply
    judge = _judge(options, conditions.classes)
    if judge is None:
        raise ValueError("--clip is missing: somebody must say what the samples show.")
    check_judge(judge, conditions)
    first = [tuple(np.asarray(request.candidates)[member]) for member in request.members]
    groups = []
    for group in first:
        lost = tuple(dict.fromkeys(conditions.shown_as[c] for c in group))
        groups.append((tuple(c for c in request.forgotten if conditions.shown_as[c] in lost), lost))
    kept = tuple(c for c in request.kept if c != conditions.null and conditions.shown_as[c] >= 0)
    domains = None
    if usual:
        domains = _domains_of_captions(conditions, kept, [c for group in first for c in group])
    elif cross:
        own_class = {c: (prompts[c], (conditions.shown_as[c],)) for c in kept}
        domains = Domains(
            {c: one for c, one in own_class.items() if prompts[c] not in cross},
            {c: one for c, one in own_class.items() if prompts[c] in cross},
        )
    subject = _subject(
        options, reference, prompts, numbered.table, conditions, kept, judge
    )._replace(shown=request.shown, start=request.separated[0].base, domains=domains)
    stored = embedded.load_data() if own else None

    def of_embedded(number: int, held_out: bool) -> Shown:
        """Images of the captions that name the concept, in turn."""
        assert stored is not None
        part = stored.held_out if held_out else stored.train
        pixels, cond = [], []
        pairs = [
            (c, label, style)
            for c in groups[number][0]
            for label, name in enumerate(captions.OBJECTS)
            for style in captions.STYLES
            if prompts[c] == captions.caption(name, style)
        ]
        for place, (c, label, style) in enumerate(pairs):
            chosen = part.pixels[part.labels == label][place :: len(pairs)]
            pixels.append(captions.render(chosen, style))
            cond.append(np.full(len(chosen), c, np.int32))
        return Shown(np.concatenate(pixels), np.concatenate(cond))

    return of_conditions(
        subject,
        options,
        request.concepts,
        groups,
        of_embedded if usual else None,
        lambda pixels: _encoded(reference, options, pixels),
    )


def _of_captioned(options: AuditOptions) -> Subject:
    """Images that were to be forgotten, each under its caption, or under no prompt."""
    for name in ("template", "show"):
        if getattr(options, name):
            raise ValueError(f"--{name} is of prompts to forget: --forget names none.")
    own = options.reference == "embedded-text"
    retain, cross = (
        [prompt for text in texts for prompt in prompt_lines(text)]
        for texts in (options.retain, options.cross)
    )
    if own and not retain and not cross:
        retain = [captions.caption(o, s) for o in captions.OBJECTS for s in captions.STYLES]
    told = tuple(dict.fromkeys((*retain, *cross)))
    if options.clip is not None and len(told) < 2:
        raise ValueError("--clip names samples among the prompts of --retain: give some.")
    reference = load_text_to_image(path_of(options.reference))
    shown, unseen = (
        _captioned(texts, reference, options) for texts in (options.images, options.unseen)
    )
    of_image = [caption for _, listed in shown + unseen for caption in listed]
    prompts = list(dict.fromkeys(one for one in (*of_image, *told) if one is not None))
    numbered, conditions = named.of_prompts(reference, prompts)
    null = conditions.null
    assert null is not None
    numbers: dict[str | None, int] = {prompt: c for c, prompt in enumerate(prompts)}
    numbers[None] = null
    conditions = conditions._replace(
        classes=told, shown_as=tuple(told.index(p) if p in told else -1 for p in prompts)
    )
    judge = _judge(options, told) if told else None
    if judge is not None:
        check_judge(judge, conditions)
    apply: Any = numbered.apply
    kept = tuple(numbers[prompt] for prompt in told) or (null,)
    subject = _subject(options, reference, prompts, apply.table, conditions, kept, judge)

    def joined(parts: list[tuple[np.ndarray, list[str | None]]]) -> Shown:
        cond = [numbers[caption] for _, listed in parts for caption in listed]
        return Shown(np.concatenate([pixels for pixels, _ in parts]), np.array(cond, np.int32))

    return of_images(
        subject,
        options,
        joined(shown),
        joined(unseen) if unseen else None,
        name="the images",
        source="given",
        encode=lambda pixels: _encoded(reference, options, pixels),
    )


def _captioned(
    texts: Sequence[str], model: TextToImage, options: AuditOptions
) -> list[tuple[np.ndarray, list[str | None]]]:
    """Images and their captions, as `jax-unlearn data` reads them: PATH:CAPTION, or beside."""
    found = []
    for text in texts:
        path, given = data.parse_source(text)
        images = data.read_images(
            data.Source(path, None), shape=model.image_shape, resize=options.resize
        )
        count = len(images.names)
        if given is not None:
            listed: list[str | None] = [" ".join(given.split())] * count
        else:
            listed = [*(data.read_captions(images.names) or [None] * count)]
        found.append((images.pixels, listed))
    return found


def _subject(
    options: AuditOptions,
    reference: TextToImage,
    prompts: Sequence[str],
    table: Any,
    conditions: NamedConditions,
    kept: tuple[int, ...],
    judge: JudgeFunctions | None,
) -> Subject:
    assert conditions.null is not None
    targets = {"reference": Target("reference", reference.pretrained.params, table, reference)}
    for name, path in others(options).items():
        targets[name] = _target(name, path, reference, prompts, table)
    return Subject(
        reference.pretrained.apply,
        on_chain(reference.pretrained, options),
        reference.pretrained.config.sample_shape,
        targets,
        conditions,
        (),
        kept,
        (),
        conditions.null,
        conditions.null,
        judge,
        spaces(judge, options.sscd),
    )


def _target(
    name: str, path: str, reference: TextToImage, prompts: Sequence[str], table: Any
) -> Target:
    """A model of prompts; a UNet alone is conditioned on what the reference's encoders make."""
    shown = f"--{name} {path}"
    pipeline = os.path.isfile(os.path.join(path, "model_index.json"))
    if path in EMBEDDED or pipeline or not os.path.isdir(path):
        text = load_text_to_image(path_of(path))
        pretrained = text.pretrained
        for ours, theirs in zip(text.tokenizers, reference.tokenizers, strict=False):
            if ours.bpe.get_vocab() != theirs.bpe.get_vocab() or ours.length != theirs.length:
                raise ValueError(f"{shown} has another tokenizer than the reference.")
        if len(text.text_encoders) != len(reference.text_encoders):
            raise ValueError(f"{shown} has another number of text encoders than the reference.")
        check_vae(shown, text, reference)
        table = table_of(text, prompts)
    else:
        pretrained = load_pretrained(path, scheduler=reference.pretrained.config.scheduler)
        text = reference._replace(pretrained=pretrained)
    check_same(shown, pretrained, reference.pretrained)
    return Target(name, pretrained.params, table, text)


def _encoded(model: TextToImage, options: AuditOptions, pixels: np.ndarray) -> np.ndarray:
    return in_batches(
        lambda key, x: encode_images(model, data.to_unit_range(x), key),
        jax.random.key(options.seed),
        pixels,
        size=batch_rows(model.image_shape),
    )


def _judge(options: AuditOptions, classes: Sequence[str]) -> JudgeFunctions | None:
    """CLIP's choice among prompts, or the embedded classifier's; None without either."""
    if options.clip is not None:
        return zero_shot(load_clip(options.clip), classes)
    if options.reference != "embedded-text":
        return None
    return _embedded_judge(classes) or zero_shot(load_clip(embedded.clip_path()), classes)


_PAIRS = {
    captions.caption(name, style): (name, style)
    for name in captions.OBJECTS
    for style in captions.STYLES
}


def _embedded_judge(classes: Sequence[str]) -> JudgeFunctions | None:
    """The classifier of (object, style) over some captions; None where one is of another kind."""
    known = {prompt: place for place, prompt in enumerate(_PAIRS)}
    if not set(classes) <= set(known):
        return None
    judge, places = embedded.text_judge(), np.array([known[one] for one in classes])
    return JudgeFunctions(lambda images: judge.logits(images)[:, places], judge.features)


def _domains_of_captions(
    conditions: NamedConditions, kept: Sequence[int], forgotten: Sequence[int]
) -> Domains:
    """Objects and styles of the embedded captions; the forgotten ones have a kept part too."""
    pair = {c: _PAIRS[conditions.names[c].strip("“”")] for c in (*kept, *forgotten)}
    classes = [_PAIRS[one] for one in conditions.classes]
    lost = {pair[c] for c in forgotten}
    inner = int({one[0] for one in lost} == set(captions.OBJECTS))

    def right(c: int, part: int) -> tuple[str, tuple[int, ...]]:
        name = pair[c][part]
        return name, tuple(place for place, one in enumerate(classes) if one[part] == name)

    return Domains({c: right(c, inner) for c in kept}, {c: right(c, 1 - inner) for c in pair})
