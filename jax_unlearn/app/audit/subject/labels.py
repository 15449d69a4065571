"""Audits of models of labels, and of models that are conditioned on nothing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_unlearn.app import data, embedded
from jax_unlearn.app.audit.copies import spaces
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject.checks import check_judge, check_same
from jax_unlearn.app.audit.subject.images import Shown, of_conditions, of_images
from jax_unlearn.app.audit.subject.parts import Domains, Subject, Target
from jax_unlearn.app.audit.subject.request import asked, on_chain, others, path_of
from jax_unlearn.app.tasks import conditions as named
from jax_unlearn.app.tasks.concept_request import make_request
from jax_unlearn.models.judge import load_judge
from jax_unlearn.pretrained import Pretrained, load_pretrained
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["of_labels"]

_REPEATED = ("repeated",)


@dataclasses.dataclass(frozen=True)
class _Unconditional:
    """A denoiser that does not see its condition."""

    apply: Denoiser

    def __call__(self, params: Params, x_t: Array, t: Array, cond: Any, /) -> Array:
        return self.apply(params, x_t, t, None)


def of_labels(options: AuditOptions) -> Subject:
    """The subject of labels, or of images in pixel space; see `load_subject`."""
    for name in ("template", "retain", "show", "clip", "cross"):
        if getattr(options, name):
            raise ValueError(f"--{name} is for models that are conditioned on prompts.")
    own = options.reference == "embedded"
    repeated = own and options.forget == _REPEATED
    of_labels = bool(options.forget) and not repeated
    reference = load_pretrained(path_of(options.reference))
    config = reference.config
    labelled = bool(config.num_labels) and "class_embedding" in reference.params
    if not labelled and of_labels:
        raise ValueError(
            f"{options.reference} is not conditioned on labels or prompts: --forget has nothing to "
            "name. Give the images themselves, --images without --forget."
        )
    if labelled and "embedding" not in reference.params["class_embedding"]:
        raise ValueError(f"{options.reference} has no table of labels, but computes with numbers.")
    models = {"reference": reference}
    models |= {name: load_pretrained(path_of(path)) for name, path in others(options).items()}
    for name, other in models.items():
        check_same(f"--{name} {getattr(options, name)}", other, reference)
        if other.config.id2label not in (None, config.id2label):
            raise ValueError(f"--{name} names its labels otherwise than the reference.")
    if not labelled:
        subject = _unconditional(options, models)
    else:
        subject = _of_table(options, models, of_labels)
    if of_labels:
        forgotten = tuple(config.find_label(text) for text in options.forget)
        names = [config.label_name(label) for label in forgotten]
        groups = [((label,), (label,)) for label in forgotten]
        stored = embedded.load_data() if own else None

        def of_embedded(number: int, held_out: bool) -> Shown:
            assert stored is not None
            part = stored.held_out if held_out else stored.train
            return _of_embedded(part, part.labels == forgotten[number])

        return of_conditions(subject, options, names, groups, of_embedded if own else None)
    if repeated and options.images:
        raise ValueError("--forget repeated names images: give these, or --images.")
    stored = embedded.load_data() if own else None
    if repeated:
        assert stored is not None
        given = _of_embedded(stored.train, stored.repeated)
    else:
        given = _read(options.images, reference, options)
    unseen = None
    if options.unseen:
        unseen = _read(options.unseen, reference, options)
    elif stored is not None:
        same = np.isin(stored.held_out.labels, given.cond)
        unseen = _of_embedded(stored.held_out, same)
    return of_images(
        subject._replace(start=int(given.cond[0]) if subject.null is None else subject.null),
        options,
        given,
        unseen,
        name="the repeated images" if repeated else "the images",
        source="the embedded data" if repeated else "given",
    )


def _of_embedded(part: embedded.LabelledImages, places: np.ndarray) -> Shown:
    return Shown(part.pixels[places], part.labels[places])


def _read(texts: Sequence[str], reference: Pretrained, options: AuditOptions) -> Shown:
    """Images under their labels, as `jax-unlearn data` reads them."""
    config = reference.config
    parts = [
        data.read_images(
            text,
            shape=config.sample_shape,
            id2label=config.id2label,
            num_labels=config.num_labels or None,
            resize=options.resize,
        )
        for text in texts
    ]
    pixels = np.concatenate([part.pixels for part in parts])
    labels = [np.zeros(len(p.pixels), np.int32) if p.labels is None else p.labels for p in parts]
    return Shown(pixels, np.concatenate(labels).astype(np.int32))


def _of_table(options: AuditOptions, models: dict[str, Pretrained], of_labels: bool) -> Subject:
    """Models of labels, whose table of embeddings is apart from the network."""
    reference = models["reference"]
    conditions, null = named.of_labels(reference), reference.config.null_label
    kept, start = conditions.drawn, null
    if of_labels:
        request = make_request(reference, asked(options))
        kept = tuple(c for c in request.kept if c != null)
        start = request.separated[0].base
    targets = {}
    for name, one in models.items():
        params = {key: part for key, part in one.params.items() if key != "class_embedding"}
        table = np.asarray(one.params["class_embedding"]["embedding"])
        targets[name] = Target(name, params, table, None)
    judge = embedded.judge() if options.judge is None and options.reference == "embedded" else None
    if options.judge is not None:
        judge = load_judge(options.judge)
    if judge is not None:
        check_judge(judge, conditions)
    elif of_labels:
        raise ValueError("--judge is missing: somebody must say what the samples show.")
    apply: Any = reference.apply
    free = dataclasses.replace(apply.config, class_embed_type="identity", num_class_embeds=None)
    return Subject(
        dataclasses.replace(apply, config=free, null_label=None),
        on_chain(reference, options),
        reference.config.sample_shape,
        targets,
        conditions,
        (),
        kept,
        (),
        null,
        0 if start is None else start,
        judge,
        spaces(judge, options.sscd),
        Domains({c: (conditions.names[c], (c,)) for c in kept}, {}) if of_labels else None,
    )


def _unconditional(options: AuditOptions, models: dict[str, Pretrained]) -> Subject:
    """Models of nothing: one condition, of no numbers."""
    if options.judge is not None:
        raise ValueError("--judge names labels, and this model is conditioned on none.")
    reference = models["reference"]
    conditions = named.of_labels(reference)._replace(
        names=("no condition",), drawn=(0,), shown_as=(-1,)
    )
    table = np.zeros((1, 0), np.float32)
    return Subject(
        _Unconditional(reference.apply),
        on_chain(reference, options),
        reference.config.sample_shape,
        {name: Target(name, one.params, table, None) for name, one in models.items()},
        conditions,
        (),
        (0,),
        (),
        None,
        0,
        None,
        spaces(None, options.sscd),
    )
