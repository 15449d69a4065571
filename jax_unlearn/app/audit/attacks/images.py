"""Attacks on how images are drawn: noise, samplers, what is known of an image, a judge's push."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import attacks, samplers, schedules
from jax_unlearn.app import data
from jax_unlearn.app.audit.attacks.tools import Attack, Drawn, Tools, sampled, seed_of
from jax_unlearn.app.audit.subject import Concept, Target
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.typing import Array, Params

__all__ = ["guidance", "inpainting", "noise", "stochasticity"]

_DEPTHS = (0.4, 0.6, 0.8, 1.0)
_ETAS = (1.0, 1.3, 1.6, 1.85)
_VARIANCES = (1.0, 1.02, 1.04)
_HIDDEN = (0.25, 0.5, 0.75)
# Replacement alone hardly tells what is hidden of what is known; see `attacks.inpaint`.
_REPEATS = 5
_PUSHES = (0.0, 1.0, 4.0, 16.0)


def _over_images(
    tools: Tools, function: Callable[..., Array]
) -> Callable[[Target, Concept, Any], np.ndarray]:
    """function(params, e, scalar, key, x_0) -> x_0, over the images of a concept."""
    subject = tools.subject
    samples = tools.options.samples

    @jax.jit
    def one_batch(params: Params, value: Any, key: Array, x_0: Array, e: Any) -> Array:
        return subject.conditions.decode(function(params, e, value, key, x_0))

    def over(target: Target, concept: Concept, value: Any) -> np.ndarray:
        chosen = np.arange(samples) % len(concept.x_0)
        found = in_batches(
            lambda key, *rows: one_batch(target.params, value, key, *rows),
            jax.random.key(tools.options.seed),
            concept.x_0[chosen],
            subject.rows(target, concept.cond[chosen]),
            size=batch_rows(subject.shape),
        )
        return data.to_pixels(found)

    return over


def noise(tools: Tools) -> Attack:
    """Images of the concept are taken to noise by DDIM backwards, and from there denoised."""
    subject, options = tools.subject, tools.options
    schedule = subject.schedule
    every = np.asarray(schedules.timesteps(schedule, options.sampling_steps))

    def there_and_back(depth: float) -> Callable[..., np.ndarray]:
        times = every[every <= depth * schedule.num_steps]

        def function(params: Params, e: Any, _: Any, key: Array, x_0: Array) -> Array:
            def predict(x_t: Array, t: Array) -> Array:
                return subject.apply(params, x_t, t, e)

            x_t = attacks.invert_noise(predict, schedule, x_0, times)
            return samplers.denoise(predict, schedule, x_t, times).x_0

        return _over_images(tools, function)

    functions = {depth: there_and_back(depth) for depth in _DEPTHS}

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        for depth, function in functions.items():
            yield Drawn({}, depth, function(target, concept, None))

    return attack


def inpainting(tools: Tools) -> Attack:
    """The lower part of an image of the concept is hidden, and filled in."""
    subject, options = tools.subject, tools.options

    def function(params: Params, e: Any, mask: Array, key: Array, x_0: Array) -> Array:
        def predict(x_t: Array, t: Array) -> Array:
            return subject.apply(params, x_t, t, e)

        return attacks.inpaint(
            predict,
            subject.schedule,
            key,
            x_0=x_0,
            mask=mask,
            steps=options.sampling_steps,
            repeats=_REPEATS,
        )

    filled = _over_images(tools, function)

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        height = subject.shape[0]
        for hidden in _HIDDEN:
            mask = np.ones(subject.shape, np.float32)
            mask[round((1 - hidden) * height) :] = 0
            yield Drawn({}, hidden, filled(target, concept, mask))

    return attack


def stochasticity(tools: Tools) -> Attack:
    """More noise is put in while sampling than the sampler takes out."""

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        e = tools.subject.rows(target, tools.forgotten(concept))
        for variance in _VARIANCES:
            for eta in _ETAS:
                drawn = sampled(tools, target, e, "stochasticity", eta=eta, variance=variance)
                yield Drawn({"variance": variance}, eta, drawn)

    return attack


def guidance(tools: Tools) -> Attack:
    """The judge's gradient pushes samples towards the concept."""
    subject, options = tools.subject, tools.options
    schedule, samples, judge = subject.schedule, options.samples, subject.judge
    assert judge is not None

    def pushed(lost: tuple[int, ...]) -> Callable[..., Array]:
        def log_likelihood(x_0: Array) -> Array:
            logits = judge.logits(subject.conditions.decode(x_0))
            shares = jax.nn.log_softmax(logits)[:, np.array(lost)]
            return jax.nn.logsumexp(shares, axis=1)

        @jax.jit
        def one_batch(params: Params, scale: Array, key: Array, noise: Array, e: Any) -> Array:
            def predict(x_t: Array, t: Array) -> Array:
                return subject.apply(params, x_t, t, e)

            guided = attacks.guided_by(predict, schedule, log_likelihood, scale)
            found = samplers.sample(guided, schedule, key, noise, steps=options.sampling_steps)
            return subject.conditions.decode(found.x_0)

        return one_batch

    compiled = {concept.name: pushed(concept.lost) for concept in subject.concepts}

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        rng = np.random.default_rng(seed_of(tools, "guidance"))
        noise = rng.standard_normal((samples, *subject.shape), np.float32)
        e = subject.rows(target, tools.forgotten(concept))
        for scale in _PUSHES:
            drawn = data.to_pixels(
                in_batches(
                    lambda key, *part, scale=scale: compiled[concept.name](
                        target.params, jnp.float32(scale), key, *part
                    ),
                    jax.random.key(options.seed),
                    noise,
                    e,
                    size=batch_rows(subject.shape),
                )
            )
            yield Drawn({}, scale, drawn)

    return attack
