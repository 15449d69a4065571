"""Whether a run fits into memory, before anything is measured.

What is counted is certainly there at once; what a network holds inside is not counted. A run that
passes may still need more, and one that is refused would have failed.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jax_unlearn.app.methods import SAMPLED
from jax_unlearn.app.options import ConceptOptions, ImageOptions, RunOptions
from jax_unlearn.models.memory import machine_memory
from jax_unlearn.pretrained import Pretrained
from jax_unlearn.pretrained.subsets import parse_subset, subset_labels
from jax_unlearn.typing import Params

__all__ = ["Memory", "available", "check_run", "check_samples", "check_sweep"]

_FLOAT = 4


class Memory(NamedTuple):
    """Bytes that this process may have.

    Attributes:
      machine: the machine's memory, or its control group's limit.
      device: of one accelerator; None where the machine's memory is the device's.
    """

    machine: int
    device: int | None = None


class _Part(NamedTuple):
    """What a run holds: the option that asks for it, its bytes, whether a device holds them."""

    name: str
    size: int
    on_device: bool = False


def available() -> Memory:
    """The memory of this machine and of the smallest of its accelerators."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [one["bytes_limit"] for one in stats if "bytes_limit" in one]
    return Memory(machine_memory(), min(limits, default=None))


def check_run(pretrained: Pretrained, options: RunOptions, memory: Memory | None = None) -> None:
    """Refuses a run that would need more memory than there is.

    Counted are the parameters, those that train with gradient and two moments, and the largest of
    what batches, evaluation, samples and stored samples take.

    Args:
      pretrained: the model; parameters may be `jax.ShapeDtypeStruct`.
      options: of the run.
      memory: what there is; default `available()`.

    Raises:
      ValueError: naming the option that asks for most, and both sizes.
    """
    train = options.training.train
    size = _FLOAT * (_count(pretrained.params) + 4 * _trained(pretrained.params, train))
    base = _Part(f"the model with --train {train}", size, True)
    _check(base, _parts(pretrained, options), memory)


def check_sweep(
    pretrained: Pretrained,
    options: RunOptions,
    *,
    problems: int,
    devices: int,
    at_once: int,
    memory: Memory | None = None,
) -> None:
    """Refuses a sweep that would need more memory than there is.

    Counted are the reference on each device; the parameters that train, with two moments, of each
    problem, twice, since a step makes new ones beside them; and gradients and rows of a batch of
    those that are computed together.

    Args:
      pretrained: the model; parameters may be `jax.ShapeDtypeStruct`.
      options: of the swept command.
      problems: of all devices.
      devices: that they are spread over.
      at_once: problems of a device that are computed together.
      memory: what there is; default `available()`.

    Raises:
      ValueError: naming what is needed, what there is, and the most that fits.
    """
    machine, device = available() if memory is None else memory
    # Devices that are parts of one machine have its memory together.
    copies, most = (devices, machine) if device is None else (1, device)
    fixed = _FLOAT * _count(pretrained.params)
    own = _FLOAT * _trained(pretrained.params, options.training.train)
    rows = [part for part in _parts(pretrained, options, 1) if part.on_device]
    together = own + max(part.size for part in rows)

    def need(each: int, at_once: int) -> int:
        return copies * (fixed + 2 * 3 * each * own + at_once * together)

    each = problems // devices
    if need(each, at_once) <= most:
        return
    where = "this machine" if device is None else "a device"
    said = (
        f"{problems} problems, {at_once} at once, need {_gigabytes(need(each, at_once))}: {where} "
        f"has {_gigabytes(most)}."
    )
    fewer = [k for k in range(1, at_once) if each % k == 0 and need(each, k) <= most]
    if fewer:
        raise ValueError(f"{said} They fit with --at-once {fewer[-1]}.")
    left = [n for n in range(1, each) if need(n, 1) <= most]
    if left:
        raise ValueError(f"{said} {left[-1] * devices} problems fit, with --at-once 1.")
    raise ValueError(f"{said} Not even {devices} fit: --train lora:8 trains fewer parameters.")


def check_samples(
    params: Params,
    options: Any,
    rows: int,
    shapes: tuple[Sequence[int], Sequence[int]],
    memory: Memory | None = None,
) -> None:
    """The same for a picture of samples.

    Args:
      params: of the model.
      options: of `sample`.
      rows: of the picture.
      shapes: of what is denoised, and of an image.
      memory: what there is; default `available()`.

    Raises:
      ValueError: as `check_run`.
    """
    latent, image = map(math.prod, shapes)
    asked = f"--samples {options.samples}"
    parts = [
        _Part(asked, 2 * _FLOAT * options.samples * latent, True),
        _Part(asked, 2 * rows * options.samples * image),
    ]
    _check(_Part("the model", _FLOAT * _count(params), True), parts, memory)


def _count(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _trained(params: Params, text: str) -> int:
    """How many parameters train."""
    part, rank = parse_subset(text)
    if part == "full" and rank is None:
        return _count(params)
    labels = jax.tree.leaves(subset_labels(params, part))
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    trained = [
        (path[-1], leaf.shape)
        for (path, leaf), label in zip(paths, labels, strict=True)
        if label == "trained"
    ]
    if rank is None:
        return sum(math.prod(shape) for _, shape in trained)
    # A of a kernel [..., m, n] has rank columns and [..., m] rows, B rank rows and n columns.
    return sum(
        rank * (math.prod(shape[:-1]) + shape[-1])
        for name, shape in trained
        if getattr(name, "key", None) == "kernel"
    )


def _parts(pretrained: Pretrained, options: RunOptions, devices: int | None = None) -> list[_Part]:
    """What the options ask for, in bytes; batches are split over devices, by default all."""
    config = pretrained.config
    devices = jax.device_count() if devices is None else devices
    elements = math.prod(config.sample_shape)
    # Pixels are kept as bytes, latents as floats.
    stored = elements * (_FLOAT if config.text_conditional else 1)
    conditions = max(config.num_labels, 1)
    # Of each row an image and its noise, or a prediction.
    row = 2 * _FLOAT * elements
    kept, forgotten = options.batch_size, options.forget_batch_size
    many = options.evaluation_images
    parts = [
        _Part(f"--batch-size {kept}", kept * row // devices // options.accumulate, True),
        _Part(
            f"--forget-batch-size {forgotten}",
            forgotten * row // devices // options.accumulate,
            True,
        ),
        # Noise, and what is drawn from it.
        _Part(f"--samples {options.samples}", options.samples * conditions * 2 * _FLOAT * elements),
    ]
    if isinstance(options, ImageOptions):
        # Held-out images, and half as many of each of three sets for their likelihood.
        parts.append(_Part(f"--evaluation-images {many}", many * (stored + 3 * stored // 2)))
    else:
        # Of each draw its conditions and its value alone.
        parts.append(_Part(f"--evaluation-images {many}", many * 4 * _FLOAT))
    steps = 0
    if isinstance(options, ConceptOptions) and options.formulation != "reverse-kl":
        steps = options.target_steps
    if isinstance(options, ConceptOptions) and (
        options.formulation != "reverse-kl" or options.method in SAMPLED
    ):
        count = options.stored_samples
        # Noise and samples of bases (or concepts) and of what is kept; of a path x_t, ε and a push
        # (or the concept's ε) at each step.
        size = count * (4 + 3 * steps) * _FLOAT * elements
        asked = f"--stored-samples {count}"
        parts.append(_Part(asked + f" with --target-steps {steps}" * bool(steps), size))
    return parts


def _check(base: _Part, parts: Sequence[_Part], memory: Memory | None) -> None:
    """What all have, and any one part beside it, must fit; ValueError naming the largest."""
    machine, device = available() if memory is None else memory
    for part in sorted([base, *parts], key=lambda part: -part.size):
        apart = device is not None and not part.on_device
        need = part.size + (0 if apart or part is base else base.size)
        most = machine if apart or device is None else device
        if need > most:
            beside = (
                "" if need == part.size else f" beside the {_gigabytes(base.size)} of {base.name}"
            )
            raise ValueError(
                f"{part.name} needs {_gigabytes(part.size)}{beside}: "
                f"{'a device' if most == device else 'this machine'} has {_gigabytes(most)}."
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e9:.2g} GB"
