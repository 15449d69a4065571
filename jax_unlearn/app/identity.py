"""What makes a run the run that it is: options, inputs, model and versions, as digests.

The identity stands in run.json, in every checkpoint and in the report. A run goes on only where
it is the same, or where `--continue` allows what differs; then a new leg begins, which run.json
and the report list.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np

import jax_unlearn
from jax_unlearn.app import data
from jax_unlearn.app.options import DataOptions, RunOptions
from jax_unlearn.app.processes import fetch
from jax_unlearn.app.run_file import plain_options
from jax_unlearn.app.tasks.concept_request import ConceptRequest
from jax_unlearn.app.tasks.images import ImageRequest
from jax_unlearn.models.files import read_json
from jax_unlearn.pretrained.digests import file_digest, folder_digests

__all__ = [
    "Identity",
    "Leg",
    "check_options",
    "digest_of",
    "digests_at",
    "changes",
    "identify",
    "leaf_digests",
    "leaf_kinds",
    "plain",
    "saved_legs",
    "versions",
]

# These change where results lie, what is written of them and how often, and no number.
_NO_MATTER = ("out", "checkpoint_every", "link", "tensorboard")
# Paths: what they lead to is compared, and may have moved.
_PATHS = ("model", "revision", "judge", "clip")
_IMAGES = ("forget", "retain", "held_out")
# What a new leg may change: how the problem is solved from there on, and its thresholds.
_CONTINUED = (
    "steps", "threshold", "learning_rate", "dual_learning_rate", "dual_damping", "max_multiplier",
)  # fmt: skip


class Identity(NamedTuple):
    """What determines a run's numbers.

    Attributes:
      command: of jax-unlearn.
      options: all that change a number, but for paths.
      model: `parameters` of the denoiser and the `files` it was read with, as digests.
      inputs: digests of images with their labels or captions, of conditions, and of what judges.
      versions: of Python and the libraries that compute.
    """

    command: str
    options: dict[str, Any]
    model: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]


class Leg(NamedTuple):
    """A part of a run under one identity.

    Attributes:
      after: steps done before it.
      digest: of its identity.
      changed: what differs from the leg before, as "name: old, now new".
      device: what it ran on, at first.
    """

    after: int
    digest: str
    changed: tuple[str, ...]
    device: str


def leaf_kinds(tree: Any) -> dict[str, str]:
    """Type and shape of each leaf, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{leaf.shape}" for path, leaf in leaves}


def leaf_digests(tree: Any) -> dict[str, str]:
    """SHA-256 of each leaf's values, by its path."""

    def digest(leaf: Any) -> str:
        values = np.ascontiguousarray(leaf).reshape(-1)
        return hashlib.sha256(values.view(np.uint8).data).hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter.
        digests = list(pool.map(digest, map(fetch, jax.tree.leaves(tree))))
    return dict(zip(leaf_kinds(tree), digests, strict=True))


def digest_of(content: Any) -> str:
    """SHA-256 of plain values, as json with sorted keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(identity: Identity, legs: Sequence[Leg]) -> dict[str, Any]:
    """What stands in run.json, with a digest of all of it."""
    content = json.loads(json.dumps([identity._asdict(), [leg._asdict() for leg in legs]]))
    return {"identity": content[0], "legs": content[1], "digest": digest_of(content)}


def versions() -> dict[str, str]:
    """Of Python, of this library and of those that compute or save."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {
        "jax_unlearn": jax_unlearn.__version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in names},
    }


def identify(request: ImageRequest | ConceptRequest, options: RunOptions, command: str) -> Identity:
    """The identity of a run.

    Args:
      request: what to forget and to keep.
      options: how.
      command: of jax-unlearn.
    """
    passed = (*_NO_MATTER, *_PATHS, *(_IMAGES if isinstance(options, DataOptions) else ()))
    kept = {name: value for name, value in plain_options(options).items() if name not in passed}
    config = request.pretrained.config
    params = request.pretrained.params
    model = {
        "files": folder_digests(pathlib.Path(config.folder)) if config.folder else {},
        "parameters": digest_of([leaf_kinds(params), leaf_digests(params)]),
    }
    inputs = _inputs(request)
    for name in ("judge", "clip"):
        if (path := getattr(options, name, None)) is not None:
            inputs[name] = digest_of(digests_at(path))
    return Identity(command, kept, model, inputs, versions())


def digests_at(path: pathlib.Path) -> dict[str, str]:
    """SHA-256 of the files of a folder, or of a judge's file and the json beside it."""
    if path.is_dir():
        return folder_digests(path)
    files = (path, path.with_suffix(".json"))
    return {one.name: file_digest(one) for one in files}


def _inputs(request: ImageRequest | ConceptRequest) -> dict[str, str]:
    if isinstance(request, ConceptRequest):
        found = {
            "conditions": digest_of(
                [request.conditions.names, request.separated, request.kept, request.shown]
            )
        }
        return found if request.real is None else found | {"real": _pixels(request.real)}
    texts = None if request.captions is None else request.captions.texts
    parts = {name: getattr(request, name) for name in _IMAGES}
    return {name: _images(part, texts) for name, part in parts.items()}


def _pixels(pixels: np.ndarray) -> str:
    return digest_of([digest.hex() for digest in data.content_hashes(pixels)])


def _images(images: data.Images, texts: tuple[str | None, ...] | None) -> str:
    labels: Any = None if images.labels is None else images.labels.tolist()
    if labels is not None and texts is not None:
        labels = [texts[label] for label in labels]
    return digest_of([_pixels(images.pixels), labels])


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two identities, and how a message puts it."""
    found: dict[str, str] = {}
    for name in sorted({*saved["options"], *now["options"]}):
        before, after = saved["options"].get(name), now["options"].get(name)
        if before != after:
            found[name] = f"--{name.replace('_', '-')}: {_listed(before)}, now {_listed(after)}"
    if saved["model"]["parameters"] != now["model"]["parameters"]:
        found["model"] = "the model's parameters are not those that the run began with"
    else:
        before, after = saved["model"]["files"], now["model"]["files"]
        changed = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]
        if changed:
            found["model"] = f"files of the model have changed: {', '.join(changed)}"
    for name in sorted({*saved["inputs"], *now["inputs"]}):
        if saved["inputs"].get(name) != now["inputs"].get(name):
            found[f"inputs {name}"] = f"{_INPUTS.get(name, name)} not what the run began with"
    before, after = saved["versions"], now["versions"]
    changed = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]
    if changed:
        found["versions"] = "versions: " + "; ".join(
            f"{name} {before.get(name)}, now {after.get(name)}" for name in changed
        )
    return found


_INPUTS = {
    "forget": "the images to forget (pixels, labels or captions) are",
    "retain": "the retained images (pixels, labels or captions) are",
    "held_out": "the held-out images (pixels, labels or captions) are",
    "conditions": "the conditions are",
    "real": "the images that samples are compared with are",
    "judge": "the judge is",
    "clip": "the CLIP is",
}


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse(found: Mapping[str, str], options: RunOptions, path: pathlib.Path) -> None:
    """ValueError for what differs and may not.

    Raises:
      ValueError: naming all of it.
    """
    allowed = {*_CONTINUED, "versions"} if options.go_on else set()
    refused = [text for name, text in found.items() if name not in allowed]
    if not refused:
        return
    may = set(found) <= {*_CONTINUED, "versions"}
    hint = (
        "Give --continue in place of --resume to go on as a new leg, which the report shows"
        if may
        else "Start another run with another --out"
    )
    raise ValueError(f"{path} is of another run: {'; '.join(refused)}. {hint}.")


def _read(path: pathlib.Path) -> dict[str, Any]:
    run = read_json(path)
    try:
        identity, legs = run["identity"], run["legs"]
        same = run["digest"] == digest_of([identity, legs])
        same = same and digest_of(identity) == legs[-1]["digest"]
        _differences(identity, identity)
        [Leg(**leg) for leg in legs]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say which run it is of, as those of version 0.2 did not: start anew."
        ) from error
    if not same:
        raise ValueError(f"{path} was changed: its identity or legs are not those that were saved.")
    return run


def check_options(options: RunOptions) -> None:
    """Refuses to resume with other options than those of the run, before anything is loaded.

    Raises:
      ValueError: naming what differs.
    """
    path = options.out / "run.json"
    if not options.resume:
        return
    run = read_json(path)
    saved, now = ({**part} for part in (run["options"], plain_options(options)))
    passed = (*_NO_MATTER, *_PATHS, *(_IMAGES if isinstance(options, DataOptions) else ()))
    for part in (saved, now):
        for name in passed:
            part.pop(name, None)
    nothing = {"model": {"parameters": "", "files": {}}, "inputs": {}, "versions": {}}
    found = _differences(
        {"options": saved, **nothing},
        {"options": now, **nothing},
    )
    _refuse(found, options, path)


def saved_legs(path: pathlib.Path) -> tuple[Leg, ...]:
    """The legs in a run.json.

    Raises:
      ValueError: if it has none, or its identity was changed.
    """
    return tuple(Leg(**leg | {"changed": tuple(leg["changed"])}) for leg in _read(path)["legs"])


def changes(path: pathlib.Path, identity: Identity, options: RunOptions) -> dict[str, str]:
    """What differs from the run in `path`, where `options` allow it; {} for the same run.

    Raises:
      ValueError: naming what differs and may not.
    """
    now = json.loads(json.dumps(identity._asdict()))
    found = _differences(_read(path)["identity"], now)
    _refuse(found, options, path)
    return found
