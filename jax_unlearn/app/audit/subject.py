"""What is audited: two models and perhaps an oracle, what was to be forgotten, and who judges."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.app import data, embedded
from jax_unlearn.app.audit.drawing import drawer
from jax_unlearn.app.audit.options import LEAST, AuditOptions
from jax_unlearn.app.embedded import captions
from jax_unlearn.app.options import ConceptOptions
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.app.tasks.concept_request import (
    ConceptRequest,
    make_prompt_request,
    make_request,
)
from jax_unlearn.app.tasks.conditions import NamedConditions, table_of
from jax_unlearn.models.judge import JudgeFunctions, load_judge
from jax_unlearn.pretrained import Pretrained, load_pretrained
from jax_unlearn.pretrained.clip import load_clip, zero_shot
from jax_unlearn.pretrained.text_to_image import (
    TextToImage,
    encode_images,
    is_text_to_image,
    load_text_to_image,
)
from jax_unlearn.schedules import NoiseSchedule
from jax_unlearn.typing import Denoiser, Params

__all__ = ["Concept", "Subject", "Target", "load_subject"]

_EMBEDDED = ("embedded", "embedded-text")


class Target(NamedTuple):
    """A model that attacks are made on.

    Attributes:
      name: "model", "reference" or "oracle".
      params: of the denoiser.
      table: what it is conditioned on, a tree of arrays [conditions, ...].
      text: the pipeline that encodes prompts; None for labels.
    """

    name: str
    params: Params
    table: Any
    text: TextToImage | None


class Concept(NamedTuple):
    """Something that was to be forgotten.

    Attributes:
      name: of it.
      forgotten: conditions that name it.
      lost: classes of the judge that show it.
      images: of it, uint8 [n, height, width, channels].
      x_0: these as the denoiser has them, [n, ...].
      cond: the condition that each is shown under, [n].
      unseen: images that the reference was not trained on, as x_0; None where there are none.
      unseen_cond: as `cond`.
      source: where the images came from.
    """

    name: str
    forgotten: tuple[int, ...]
    lost: tuple[int, ...]
    images: np.ndarray
    x_0: np.ndarray
    cond: np.ndarray
    unseen: np.ndarray | None
    unseen_cond: np.ndarray | None
    source: str


class Subject(NamedTuple):
    """Everything that an audit is of.

    Attributes:
      apply: (params, x_t, t, e) -> prediction, conditioned on rows e of a `Target.table`.
      schedule: its noise schedule, of variance "fixed_geometric".
      shape: of what is denoised.
      targets: "model" and "reference", and "oracle" where there is one.
      conditions: by number, as `Target.table` has them.
      concepts: what was to be forgotten.
      kept: conditions to keep, without the free branch.
      shown: paraphrases.
      null: the free branch of guidance; None where there is none.
      start: the condition that inversion starts from: what stands in place of the concept.
      judge: names what images show.
      request: what the options asked for.
    """

    apply: Denoiser
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    targets: dict[str, Target]
    conditions: NamedConditions
    concepts: tuple[Concept, ...]
    kept: tuple[int, ...]
    shown: tuple[int, ...]
    null: int | None
    start: int
    judge: JudgeFunctions
    request: ConceptRequest

    def rows(self, target: Target, cond: np.ndarray) -> Any:
        """What conditions [n] are to a target, [n, ...]."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[cond], target.table)

    def free(self, target: Target, count: int) -> Any:
        """The free branch of guidance, [count, ...]; None where there is none."""
        if self.null is None:
            return None
        return self.rows(target, np.full(count, self.null, np.int32))


def load_subject(options: AuditOptions) -> Subject:
    """Loads the models, and checks that they can be compared, before anything is sampled.

    Raises:
      ValueError: for models of different networks, schedules, tokenizers or labels, for a judge
        that does not know the concept, for too few images, or as `load_pretrained`,
        `load_text_to_image`, `make_request` and `make_prompt_request`.
    """
    own = options.reference in _EMBEDDED
    if options.reference == "embedded-text" or (
        options.reference != "embedded" and is_text_to_image(options.reference)
    ):
        return _of_prompts(options, own)
    return _of_labels(options, own)


def _path(name: str) -> str | os.PathLike[str]:
    if name == "embedded":
        return embedded.model_path()
    return embedded.text_model_path() if name == "embedded-text" else name


def _asked(options: AuditOptions, **changes: Any) -> ConceptOptions:
    """The same request as `concept` takes; nothing of it trains."""
    shared = ("seed", "sampling_steps", "chain_steps", "forget")
    given: dict[str, Any] = {name: getattr(options, name) for name in shared}
    return ConceptOptions(**given | {"threshold": ("1x",)} | changes)


def _others(options: AuditOptions) -> dict[str, str]:
    names = {"model": options.model, "oracle": options.oracle}
    return {name: path for name, path in names.items() if path}


# --- Labels.


def _of_labels(options: AuditOptions, own: bool) -> Subject:
    for name in ("template", "retain", "show", "clip"):
        if getattr(options, name):
            raise ValueError(f"--{name} is for models that are conditioned on prompts.")
    reference = load_pretrained(_path(options.reference))
    config = reference.config
    if not config.num_labels or "class_embedding" not in reference.params:
        raise ValueError(
            f"{options.reference} is not conditioned on labels or prompts: an audit is of what a "
            "condition brings up."
        )
    if "embedding" not in reference.params["class_embedding"]:
        raise ValueError(f"{options.reference} has no table of labels, but computes with numbers.")
    models = {"reference": reference}
    models |= {name: load_pretrained(_path(path)) for name, path in _others(options).items()}
    for name, other in models.items():
        _check_same(f"--{name} {getattr(options, name)}", other, reference)
        if other.config.id2label not in (None, config.id2label):
            raise ValueError(f"--{name} names its labels otherwise than the reference.")
    request = make_request(reference, _asked(options))
    conditions = request.conditions
    targets = {}
    for name, one in models.items():
        params = {key: part for key, part in one.params.items() if key != "class_embedding"}
        table = np.asarray(one.params["class_embedding"]["embedding"])
        targets[name] = Target(name, params, table, None)
    judge = embedded.judge() if options.judge is None and own else None
    if options.judge is not None:
        judge = load_judge(options.judge)
    if judge is None:
        raise ValueError("--judge is missing: somebody must say what the samples show.")
    _check_judge(judge, conditions)
    apply: Any = reference.apply
    free = dataclasses.replace(apply.config, class_embed_type="identity", num_class_embeds=None)
    subject = Subject(
        dataclasses.replace(apply, config=free, null_label=None),
        request.pretrained.schedule,
        config.sample_shape,
        targets,
        conditions,
        (),
        tuple(c for c in request.kept if c != conditions.null),
        request.shown,
        conditions.null,
        request.separated[0].base,
        judge,
        request,
    )
    given = {label: ((label,), (label,)) for label in request.forgotten}
    stored = embedded.load_data() if own else None

    def of_embedded(label: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        assert stored is not None
        part = stored.held_out if held_out else stored.train
        pixels = part.pixels[part.labels == label]
        return pixels, np.full(len(pixels), label, np.int32)

    return _with_concepts(
        subject, options, list(given.values()), of_embedded if own else None, lambda x: x
    )


# --- Prompts.


def _of_prompts(options: AuditOptions, own: bool) -> Subject:
    if options.judge is not None:
        raise ValueError("--judge is for models that are conditioned on labels; give --clip.")
    own = options.reference == "embedded-text"
    wording: dict[str, Any] = {
        name: getattr(options, name) for name in ("template", "retain", "show")
    }
    if own and not options.template:
        wording = captions.forgetting(options.forget)
        wording = {name: wording[name] for name in ("forget", "template", "retain", "show")}
        options = dataclasses.replace(options, forget=wording.pop("forget"))
    reference = load_text_to_image(_path(options.reference))
    request = make_prompt_request(
        reference, _asked(options, model="", start="reference", **wording)
    )
    conditions = request.conditions
    prompts = [name.strip("“”") for name in conditions.names[:-1]]
    numbered: Any = request.pretrained.apply
    base = Target("reference", reference.pretrained.params, numbered.table, reference)
    targets = {"reference": base}
    for name, path in _others(options).items():
        targets[name] = _prompt_target(name, path, reference, prompts, base.table)
    if own and options.clip is None:
        judge = _embedded_judge(conditions.classes) or zero_shot(
            load_clip(embedded.clip_path()), conditions.classes
        )
    elif options.clip is None:
        raise ValueError("--clip is missing: somebody must say what the samples show.")
    else:
        judge = zero_shot(load_clip(options.clip), conditions.classes)
    _check_judge(judge, conditions)
    first = [tuple(np.asarray(request.candidates)[member]) for member in request.members]
    given = []
    for group in first:
        lost = tuple(dict.fromkeys(conditions.shown_as[c] for c in group))
        forgotten = tuple(c for c in request.forgotten if conditions.shown_as[c] in lost)
        given.append((forgotten, lost))
    subject = Subject(
        reference.pretrained.apply,
        request.pretrained.schedule,
        reference.pretrained.config.sample_shape,
        targets,
        conditions,
        (),
        tuple(c for c in request.kept if c != conditions.null and conditions.shown_as[c] >= 0),
        request.shown,
        conditions.null,
        request.separated[0].base,
        judge,
        request,
    )

    def encode(pixels: np.ndarray) -> np.ndarray:
        return in_batches(
            lambda key, x: encode_images(reference, data.to_unit_range(x), key),
            jax.random.key(options.seed),
            pixels,
            size=batch_rows(reference.image_shape),
        )

    stored = embedded.load_data() if own else None

    def of_embedded(number: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        """Images of the captions that name the concept, in turn."""
        assert stored is not None
        part = stored.held_out if held_out else stored.train
        pixels, cond = [], []
        pairs = [
            (c, label, style)
            for c in given[number][0]
            for label, name in enumerate(captions.OBJECTS)
            for style in captions.STYLES
            if prompts[c] == captions.caption(name, style)
        ]
        for place, (c, label, style) in enumerate(pairs):
            chosen = part.pixels[part.labels == label][place :: len(pairs)]
            pixels.append(captions.render(chosen, style))
            cond.append(np.full(len(chosen), c, np.int32))
        return np.concatenate(pixels), np.concatenate(cond)

    usual = own and not options.template
    return _with_concepts(subject, options, given, of_embedded if usual else None, encode)


def _prompt_target(
    name: str, path: str, reference: TextToImage, prompts: Sequence[str], table: Any
) -> Target:
    """A model of prompts; a UNet alone is conditioned on what the reference's encoders make."""
    shown = f"--{name} {path}"
    pipeline = os.path.isfile(os.path.join(path, "model_index.json"))
    if path in _EMBEDDED or pipeline or not os.path.isdir(path):
        text = load_text_to_image(_path(path))
        pretrained = text.pretrained
        for ours, theirs in zip(text.tokenizers, reference.tokenizers, strict=False):
            if ours.bpe.get_vocab() != theirs.bpe.get_vocab() or ours.length != theirs.length:
                raise ValueError(f"{shown} has another tokenizer than the reference.")
        if len(text.text_encoders) != len(reference.text_encoders):
            raise ValueError(f"{shown} has another number of text encoders than the reference.")
        _check_vae(shown, text, reference)
        table = table_of(text, prompts)
    else:
        pretrained = load_pretrained(path, scheduler=reference.pretrained.config.scheduler)
        text = reference._replace(pretrained=pretrained)
    _check_same(shown, pretrained, reference.pretrained)
    return Target(name, pretrained.params, table, text)


def _check_vae(shown: str, model: TextToImage, reference: TextToImage) -> None:
    ours, theirs = jax.tree.leaves(model.vae.params), jax.tree.leaves(reference.vae.params)
    same = len(ours) == len(theirs) and all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    if not same:
        raise ValueError(f"{shown} has another autoencoder than the reference.")


def _embedded_judge(classes: Sequence[str]) -> JudgeFunctions | None:
    """The classifier of (object, style) over some captions; None where one is of another kind."""
    known = {
        captions.caption(name, style): len(captions.STYLES) * i + j
        for i, name in enumerate(captions.OBJECTS)
        for j, style in enumerate(captions.STYLES)
    }
    if not set(classes) <= set(known):
        return None
    judge, places = embedded.text_judge(), np.array([known[one] for one in classes])
    return JudgeFunctions(lambda images: judge.logits(images)[:, places], judge.features)


# --- Both.


def _check_same(shown: str, other: Pretrained, reference: Pretrained) -> None:
    """Refuses a model whose predictions mean something else, or whose parameters do not fit."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves, _ in map(jax.tree_util.tree_flatten_with_path, (other.params, reference.params))
    ]
    differing = [
        key for key in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(key) != shapes[1].get(key)
    ]
    if differing:
        raise ValueError(
            f"{shown} is another network than the reference: {len(differing)} parameters differ "
            f"in shape, the first is {differing[0]}, {shapes[0].get(differing[0])} instead of "
            f"{shapes[1].get(differing[0])}."
        )
    if other.apply != reference.apply:
        raise ValueError(f"{shown} is another network than the reference: its options differ.")
    if other.config.null_label != reference.config.null_label:
        raise ValueError(f"{shown} has another null label than the reference.")
    ours, theirs = other.schedule, reference.schedule
    if ours.prediction_type != theirs.prediction_type or not np.array_equal(
        ours.log_snr, theirs.log_snr
    ):
        raise ValueError(f"{shown} has another noise schedule or prediction type.")


def _check_judge(judge: JudgeFunctions, conditions: NamedConditions) -> None:
    found = jax.eval_shape(
        judge.logits, jax.ShapeDtypeStruct((1, *conditions.image_shape), jnp.float32)
    )
    if found.shape[1] != len(conditions.classes):
        raise ValueError(
            f"the judge tells {found.shape[1]} classes apart, the model has "
            f"{len(conditions.classes)}."
        )


def _with_concepts(
    subject: Subject,
    options: AuditOptions,
    given: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    of_embedded: Callable[[int, bool], tuple[np.ndarray, np.ndarray]] | None,
    encode: Callable[[np.ndarray], np.ndarray],
) -> Subject:
    """Finds the images of each concept; see `AuditOptions.images`."""
    names = subject.request.concepts
    asked = {
        flag: _sorted_sources(flag, getattr(options, flag), names) for flag in ("images", "unseen")
    }
    concepts = []
    for number, (forgotten, lost) in enumerate(given):
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        labelled = subject.targets["reference"].text is None
        for flag in ("images", "unseen"):
            if sources := asked[flag][number]:
                parts = [
                    data.read_images(
                        source, shape=subject.conditions.image_shape, resize=options.resize
                    )
                    for source in sources
                ]
                pixels = np.concatenate([part.pixels for part in parts])
                found[flag] = pixels, np.full(len(pixels), forgotten[0], np.int32)
            elif of_embedded is not None:
                which = forgotten[0] if labelled else number
                found[flag] = of_embedded(which, flag == "unseen")
        source = "given" if asked["images"][number] else "the embedded data"
        if "images" not in found:
            source = "samples of the reference"
            found["images"] = _drawn(subject, options, forgotten)
        rng = np.random.default_rng([options.seed, number])
        chosen = {}
        for flag, (pixels, cond) in found.items():
            if len(pixels) < LEAST:
                raise ValueError(
                    f"--{flag}: {len(pixels)} images of {names[number]!r}: of fewer than {LEAST} "
                    "an interval says nothing."
                )
            some = rng.permutation(len(pixels))[: options.attack_images]
            chosen[flag] = pixels[some], cond[some]
        pixels, cond = chosen["images"]
        unseen = chosen.get("unseen")
        concepts.append(
            Concept(
                names[number],
                forgotten,
                lost,
                pixels,
                _as_x_0(encode, pixels),
                cond,
                None if unseen is None else _as_x_0(encode, unseen[0]),
                None if unseen is None else unseen[1],
                source,
            )
        )
    return subject._replace(concepts=tuple(concepts))


def _as_x_0(encode: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    return np.asarray(data.to_x_0(encode(pixels)))


def _sorted_sources(
    flag: str, texts: Sequence[str], names: Sequence[str]
) -> list[list[data.Source]]:
    """The sources of each concept; one that names none is of the only concept."""
    found: list[list[data.Source]] = [[] for _ in names]
    for text in texts:
        path, name = data.parse_source(text)
        if name is None and len(names) > 1:
            raise ValueError(f"--{flag} {text}: write PATH:NAME, one of {', '.join(names)}.")
        if name is not None and name not in names:
            raise ValueError(f"--{flag} {text}: {name!r} is none of {', '.join(names)}.")
        found[0 if name is None else names.index(name)].append(data.Source(path, None))
    return found


def _drawn(
    subject: Subject, options: AuditOptions, forgotten: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Guided samples of the reference."""
    cond = np.resize(np.asarray(forgotten, np.int32), options.attack_images)
    draw = drawer(
        subject.apply,
        subject.schedule,
        subject.conditions.decode,
        shape=subject.shape,
        steps=options.sampling_steps,
    )
    target = subject.targets["reference"]
    found = draw(
        target.params,
        subject.rows(target, cond),
        subject.free(target, len(cond)),
        scale=options.guidance,
        seed=(options.seed, 9),
    )
    return found, cond
