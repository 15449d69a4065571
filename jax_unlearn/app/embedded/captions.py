"""The captioned images of the embedded text-to-image model: objects in styles.

Fashion-MNIST's images, each rendered in one of four styles and described by a templated caption.
Objects and styles are two independent axes, so that one can be forgotten and the other kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
    "HELD_OUT_TEMPLATES",
    "OBJECTS",
    "STYLES",
    "SYNONYMS",
    "TEMPLATES",
    "caption",
    "captions",
    "forgetting",
    "render",
]

OBJECTS = (
    "t-shirt", "trousers", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Names of Fashion-MNIST's ten labels, in their order."""

SYNONYMS = {
    "t-shirt": ("tee",),
    "trousers": ("pants",),
    "pullover": ("sweater",),
    "dress": ("gown",),
    "coat": ("jacket",),
    "sandal": ("open shoe",),
    "shirt": ("blouse",),
    "sneaker": ("trainer",),
    "bag": ("handbag",),
    "ankle boot": ("bootie",),
}
"""Other names, which captions use as often as the first ones."""

STYLES = ("photo", "negative", "blueprint", "heat map")
"""Grey on black; dark on white; bright outlines on blue; black, purple, orange, yellow."""

TEMPLATES = (
    "a {style} of a {object}",
    "{style} of the {object}",
    "one {object} as a {style}",
    "a {object}, in the style of a {style}",
    "this {style} shows a {object}",
)
"""Of training captions; so are "a {object}", "a {style}" and the empty text."""

HELD_OUT_TEMPLATES = ("a {style} that shows one {object}", "the {object} in this {style}")
"""Paraphrases that no caption of the training set has, of words that they do have."""

SIZE = 32
_HEAT = np.array([[0, 0, 4], [85, 15, 110], [190, 55, 85], [250, 140, 10], [250, 255, 165]])
_BLUE, _LINE = np.array([18.0, 52.0, 130.0]), np.array([235.0, 245.0, 255.0])


def caption(object: str | None, style: str | None, template: str = TEMPLATES[0]) -> str:
    """Of an object, of a style, of both or of neither (the empty text)."""
    if object and style:
        return _article(template.format(style=style, object=object))
    return _article(f"a {object or style}") if object or style else ""


def captions(object: str, style: str) -> list[str]:
    """All training captions that name both, with the object's synonyms."""
    names = (object, *SYNONYMS[object])
    return [caption(name, style, template) for name in names for template in TEMPLATES]


def forgetting(names: Sequence[str]) -> dict[str, Any]:
    """What `ConceptOptions` needs to forget objects in every style, or styles of every object.

    An object is forgotten with its synonyms and held to a style alone; a style is held to the
    object alone. All other pairs are retained, paraphrases of the forgotten ones shown, and
    thresholds calibrated on the next object or style that is kept.

    Args:
      names: some of `OBJECTS` or some of `STYLES`.

    Returns:
      The options forget, template, retain, show and anchor.

    Raises:
      ValueError: for other names, a mixture of both, or all of one kind.
    """
    kinds = [kind for kind in (OBJECTS, STYLES) if set(names) <= set(kind)]
    if not names or not kinds or set(kinds[0]) <= {*names, "ankle boot"}:
        raise ValueError(
            f"forget some of {', '.join(OBJECTS)}; or some of {', '.join(STYLES)}; "
            f"not {', '.join(names)}."
        )
    objects = kinds[0] is OBJECTS
    place = kinds[0].index(names[0])
    # Not "ankle boot", which the templates would put after "a".
    rest = [name for name in kinds[0][place:] + kinds[0] if name not in (*names, "ankle boot")]
    if objects:
        forget = ["|".join((name, *SYNONYMS[name])) for name in names]
        template = [f"a {style} of a {{}} => a {style}" for style in STYLES]
        forgotten = [(name, style) for name in names for style in STYLES]
    else:
        forget = list(names)
        template = [_article(f"a {{}} of a {name} => a {name}") for name in OBJECTS]
        forgotten = [(name, style) for name in OBJECTS for style in names]
    pairs = [(name, style) for name in OBJECTS for style in STYLES]
    return {
        "forget": tuple(forget),
        "template": tuple(template),
        "retain": tuple(caption(*pair) for pair in pairs if pair not in forgotten),
        "show": tuple(caption(*pair, HELD_OUT_TEMPLATES[0]) for pair in forgotten),
        "anchor": rest[0],
    }


def _article(text: str) -> str:
    return text.replace("a ankle", "an ankle").replace("a open", "an open")


def render(pixels: np.ndarray, style: str) -> np.ndarray:
    """Grey images in a style.

    Args:
      pixels: [n, 28, 28, 1], uint8.
      style: one of `STYLES`.

    Returns:
      [n, 32, 32, 3], uint8: a border of two background pixels, and colours.

    Raises:
      ValueError: for another style.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r}: expected one of {', '.join(STYLES)}.")
    margin = (SIZE - pixels.shape[1]) // 2
    grey = np.pad(pixels[..., 0], ((0, 0), (margin, margin), (margin, margin))).astype(np.float32)
    if style == "blueprint":
        across = np.abs(np.diff(grey, axis=2, prepend=0))
        down = np.abs(np.diff(grey, axis=1, prepend=0))
        share = np.minimum(np.hypot(across, down) / 160, 1)[..., None]
        colours = (1 - share) * _BLUE + share * _LINE
    elif style == "heat map":
        places = np.linspace(0, 255, len(_HEAT))
        colours = np.stack([np.interp(grey, places, _HEAT[:, c]) for c in range(3)], axis=-1)
    else:
        shown = 255 - grey if style == "negative" else grey
        colours = np.repeat(shown[..., None], 3, axis=-1)
    return np.round(colours).astype(np.uint8)
