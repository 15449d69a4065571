"""The images of an audit: those of concepts, or those that were themselves to be forgotten."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_unlearn.app import data
from jax_unlearn.app.audit.copies import Copies, copies_of
from jax_unlearn.app.audit.drawing import NOISE, drawer
from jax_unlearn.app.audit.options import LEAST, AuditOptions
from jax_unlearn.app.audit.subject.parts import Concept, Subject

__all__ = ["Shown", "of_conditions", "of_images"]


class Shown(NamedTuple):
    """Images and the condition that each is shown under.

    Attributes:
      pixels: uint8 [n, height, width, channels].
      cond: numbers of conditions, [n].
    """

    pixels: np.ndarray
    cond: np.ndarray

    def take(self, places: np.ndarray) -> "Shown":
        """Those at some places."""
        return Shown(self.pixels[places], self.cond[places])


Encode = Callable[[np.ndarray], np.ndarray]


def _x_0(encode: Encode, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(data.to_x_0(encode(pixels)))


def of_images(
    subject: Subject,
    options: AuditOptions,
    given: Shown,
    unseen: Shown | None,
    *,
    name: str,
    source: str,
    encode: Encode = lambda pixels: pixels,
) -> Subject:
    """The subject of images that were themselves to be forgotten.

    As many of the unseen images as attacks are given are the control. The others set what makes a
    copy, of the forgotten and of the control.

    Raises:
      ValueError: for no unseen images where nothing else says what a copy is, or too few.
    """
    space, rng = subject.spaces[0], np.random.default_rng([options.seed, 0])
    some = rng.permutation(len(given.pixels))[: options.attack_images]

    def concept(shown: Shown, some: np.ndarray, copies: Copies, apart: Shown | None) -> Concept:
        chosen = shown.take(some)
        return Concept(
            name,
            tuple(dict.fromkeys(shown.cond.tolist())),
            (),
            shown.pixels,
            _x_0(encode, chosen.pixels),
            chosen.cond,
            None if apart is None else _x_0(encode, apart.pixels),
            None if apart is None else apart.cond,
            source,
            copies,
        )

    if unseen is None:
        if space.name != "SSCD":
            raise ValueError(
                "--unseen is missing: images that the reference was not trained on say how near "
                "makes a copy; or give --sscd."
            )
        copies = copies_of(space, given.pixels, None, options.copy_rate)
        return subject._replace(concepts=(concept(given, some, copies, None),))
    seen = set(data.content_hashes(given.pixels))
    new = [i for i, one in enumerate(data.content_hashes(unseen.pixels)) if one not in seen]
    unseen = unseen.take(rng.permutation(np.array(new, np.int64)))
    count, least = len(some), int(np.ceil(1 / options.copy_rate - 1e-9)) - 1
    if len(unseen.pixels) < count + least:
        raise ValueError(
            f"--unseen has {len(unseen.pixels)} images that are not to be forgotten: {count} that "
            f"are attacked beside them, and {least} that set a threshold at --copy-rate "
            f"{options.copy_rate:g}, are {least + count}. Give more, or another rate."
        )
    control = unseen.take(np.arange(count))
    rest = unseen.take(np.arange(count, len(unseen.pixels)))
    apart = rest.take(np.arange(min(len(rest.pixels), options.attack_images)))
    ours, theirs = (
        copies_of(space, one.pixels, rest.pixels, options.copy_rate) for one in (given, control)
    )
    beside = concept(control, np.arange(count), theirs, None)
    found = concept(given, some, ours, apart)._replace(control=beside)
    return subject._replace(concepts=(found,))


def of_conditions(
    subject: Subject,
    options: AuditOptions,
    names: Sequence[str],
    given: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    of_embedded: Callable[[int, bool], Shown] | None,
    encode: Encode = lambda pixels: pixels,
) -> Subject:
    """The subject of concepts that conditions name; see `AuditOptions.images` for their images.

    Args:
      subject: without concepts.
      options: of the audit.
      names: of the concepts.
      given: of each concept the conditions that name it, and the judge's classes that show it.
      of_embedded: (number of a concept, held out) -> the embedded images of it.
      encode: pixels to what is denoised.

    Raises:
      ValueError: for images of none of the concepts, or too few.
    """
    flags = ("images", "unseen")
    asked = {flag: _sorted_sources(flag, getattr(options, flag), names) for flag in flags}
    concepts = []
    for number, (forgotten, lost) in enumerate(given):
        found: dict[str, Shown] = {}
        for flag in flags:
            if sources := asked[flag][number]:
                shape = subject.conditions.image_shape
                parts = [
                    data.read_images(source, shape=shape, resize=options.resize)
                    for source in sources
                ]
                pixels = np.concatenate([part.pixels for part in parts])
                found[flag] = Shown(pixels, np.full(len(pixels), forgotten[0], np.int32))
            elif of_embedded is not None:
                found[flag] = of_embedded(number, flag == "unseen")
        source = "given" if asked["images"][number] else "the embedded data"
        if "images" not in found:
            source = "samples of the reference"
            found["images"] = _drawn(subject, options, forgotten)
        rng = np.random.default_rng([options.seed, number])
        chosen = {}
        for flag, shown in found.items():
            if len(shown.pixels) < LEAST:
                raise ValueError(
                    f"--{flag}: {len(shown.pixels)} images of {names[number]!r}: of fewer than "
                    f"{LEAST} an interval says nothing."
                )
            chosen[flag] = shown.take(rng.permutation(len(shown.pixels))[: options.attack_images])
        images, unseen = chosen["images"], chosen.get("unseen")
        concepts.append(
            Concept(
                names[number],
                forgotten,
                lost,
                images.pixels,
                _x_0(encode, images.pixels),
                images.cond,
                None if unseen is None else _x_0(encode, unseen.pixels),
                None if unseen is None else unseen.cond,
                source,
            )
        )
    return subject._replace(concepts=tuple(concepts))


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


def _drawn(subject: Subject, options: AuditOptions, forgotten: tuple[int, ...]) -> Shown:
    """Guided samples of the reference."""
    cond = np.resize(np.asarray(forgotten, np.int32), options.attack_images)
    draw: Any = drawer(
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
        seed=(options.seed, NOISE["images"]),
    )
    return Shown(found, cond)
