"""Attacks on what a model is conditioned on: embeddings and tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import attacks
from jax_unlearn.app.audit.attacks.tools import (
    Attack,
    Drawn,
    Tools,
    encoded,
    sampled,
    seed_of,
    spread,
)
from jax_unlearn.app.audit.subject import Concept, Subject, Target
from jax_unlearn.pretrained.text_to_image import TextToImage
from jax_unlearn.typing import Array, Params

__all__ = ["inversion", "one_encoder", "unlearndiffatk"]

# The settings of UnlearnDiffAtk as published (Zhang et al. 2024).
_PREFIX, _ITERATIONS, _RATE, _DECAY = 3, 40, 0.01, 0.1
_IMAGES = 8
_PROMPTS = 16


def _inverted(
    tools: Tools, params: Params, encode: Callable[[Any], Any], starts: Any, **settings: Any
) -> attacks.Inversion:
    """Inversion of a variable that `encode` makes one condition of, on frozen parameters.

    From each of some starts side by side; what is found has the restarts first.
    """
    subject = tools.subject

    def predict(variable: Any, x_t: Array, t: Array) -> Array:
        return subject.apply(params, x_t, t, spread(encode(variable), len(x_t)))

    def one(key: Array, start: Any) -> attacks.Inversion:
        return attacks.invert(predict, subject.schedule, key, start=start, **settings)

    key, restarts = jax.random.key(tools.options.seed), tools.options.restarts
    keys = [key, *(jax.random.fold_in(key, number) for number in range(1, restarts))]
    return jax.vmap(one)(jnp.stack(keys), starts)


def _least(losses: np.ndarray) -> np.ndarray:
    """The restart whose own loss is least, along the last axis; nan is never it."""
    return np.where(np.isnan(losses), np.inf, losses).argmin(axis=-1)


def _with_best(
    settings: dict[str, Any],
    budget: int,
    images: np.ndarray,
    best: np.ndarray,
    before: np.ndarray | None = None,
) -> Iterator[Drawn]:
    """Samples of every restart, and where there are several those of the best alone.

    Args:
      settings: of the attack.
      budget: of the attack.
      images: [groups, restarts, samples, ...].
      best: the restart of each group, [groups].
      before: which samples count whatever they show, [groups, samples], or None.
    """
    groups, restarts, count = images.shape[:3]
    if before is None:
        before = np.zeros((groups, count), bool)
    spread_over = np.repeat(before[:, None], restarts, axis=1)
    yield Drawn(settings, budget, images.reshape(-1, *images.shape[3:]), spread_over.ravel())
    if restarts > 1:
        chosen = images[np.arange(groups), best]
        yield Drawn(
            settings | {"restarts": f"best of {restarts}"},
            budget,
            chosen.reshape(-1, *images.shape[3:]),
            before.ravel(),
        )


def inversion(tools: Tools) -> Attack:
    """A free condition, or a free token of the prompt, is fitted to images of the concept.

    Pham et al., Circumventing Concept Erasure Methods for Text-to-Image Generative Models, 2024.
    """
    subject, options = tools.subject, tools.options
    steps, samples, restarts = options.inversion_steps, options.samples, options.restarts

    def whole(_: Any, e: Any) -> Any:
        return e

    def fitting(encode: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        @jax.jit
        def fit(params: Params, given: Any, x_0: Array, starts: Any) -> Any:
            found = _inverted(
                tools,
                params,
                partial(encode, given),
                starts,
                x_0=x_0,
                steps=steps,
                batch=min(len(x_0), 64),
                learning_rate=options.inversion_rate,
                every=steps // 8,
            )
            shape = found.loss.shape
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found.found)
            made = jax.lax.map(lambda one: encode(given, one), flat)
            made = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), made)
            return found.steps[0], made, found.loss

        return fit

    fit_whole = fitting(whole)
    text = subject.targets["reference"].text
    fit_token = fitting(_encode(text)) if text is not None and one_encoder(text) else None

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        rng = np.random.default_rng(seed_of(tools, "starts of inversion"))
        more = np.resize(rng.permutation(np.asarray(subject.kept, np.int32)), restarts - 1)
        starts = subject.rows(target, np.array([subject.start, *more], np.int32))
        ways: list[tuple[str, Callable[..., Any], Any, Any]] = []
        named = fit_token is not None and not subject.of_images
        if named and (token := _one_token(subject, target, concept)) is not None:
            prompt, middle = token
            words = rng.choice(_vocabulary(target)[1], (restarts - 1, 1))
            ways.append(("one token", fit_token, prompt, np.concatenate([middle[None], words])))
        for what, fit, given, first in [*ways, ("whole embedding", fit_whole, None, starts)]:
            budgets, found, losses = jax.device_get(fit(target.params, given, concept.x_0, first))
            for place, budget in enumerate(budgets):
                e = jax.tree.map(
                    lambda leaf, place=place: np.repeat(leaf[:, place], samples, axis=0), found
                )
                drawn = sampled(tools, target, e, "inversion")
                images = drawn.reshape(1, restarts, samples, *drawn.shape[1:])
                best = _least(losses[:, place])[None]
                yield from _with_best({"what": what}, int(budget), images, best)

    return attack


class _Tokens(NamedTuple):
    """A prompt, some of whose tokens are free vectors.

    Attributes:
      params: of the text encoder.
      tokens: of the prompt, [N].
      rows: tokens that the prompt has in the free places alone, [k]; the vectors take their place.
    """

    params: Params
    tokens: np.ndarray
    rows: np.ndarray


def one_encoder(text: TextToImage) -> bool:
    """Whether prompts are encoded by one encoder alone, as in Stable Diffusion 1 and 2."""
    return len(text.text_encoders) == 1


def _encode(text: TextToImage) -> Callable[[_Tokens, Array], Array]:
    """(prompt, vectors [k, d]) -> what the denoiser sees of it."""
    module = text.text_encoders[0].module

    def encode(given: _Tokens, vectors: Array) -> Array:
        model = given.params["text_model"]
        embeddings = model["embeddings"]
        table = jnp.asarray(embeddings["token_embedding"]["embedding"])
        embeddings = embeddings | {
            "token_embedding": {"embedding": table.at[given.rows].set(vectors)}
        }
        params = given.params | {"text_model": model | {"embeddings": embeddings}}
        found: Any = module.apply({"params": params}, jnp.asarray(given.tokens)[None])
        return found.hidden_states[0]

    return encode


def _vocabulary(target: Target) -> tuple[Params, np.ndarray]:
    """The text encoder's parameters, and the vectors of its tokens."""
    assert target.text is not None
    params = target.text.text_encoders[0].params
    return params, np.asarray(params["text_model"]["embeddings"]["token_embedding"]["embedding"])


def _unused(tokens: np.ndarray, count: int, size: int) -> np.ndarray:
    """The last `count` tokens that do not occur; the very last ends prompts."""
    free = np.setdiff1d(np.arange(size - 1), tokens)
    return free[-count:].astype(np.int32)


def _tokens_of(subject: Subject, target: Target, c: int) -> np.ndarray:
    assert target.text is not None
    return target.text.tokenizers[0](subject.conditions.names[c].strip("“”"))[0]


def _one_token(
    subject: Subject, target: Target, concept: Concept
) -> tuple[_Tokens, np.ndarray] | None:
    """The first prompt that names a concept, its name made one free token; None if not there."""
    assert target.text is not None
    tokenizer = target.text.tokenizers[0]
    tokens = _tokens_of(subject, target, concept.forgotten[0])
    name = tokenizer.bpe.encode(concept.name, add_special_tokens=False).ids
    for place in range(len(tokens) - len(name) + 1):
        if tokens[place : place + len(name)].tolist() == name:
            params, vocabulary = _vocabulary(target)
            row = _unused(tokens, 1, len(vocabulary))
            padding = np.full(len(name) - 1, tokenizer.pad, np.int32)
            parts = (tokens[:place], row, tokens[place + len(name) :], padding)
            start = vocabulary.mean(axis=0, keepdims=True)
            return _Tokens(params, np.concatenate(parts), row), start
    return None


def unlearndiffatk(tools: Tools) -> Attack:
    """Three tokens before a prompt, nearest to vectors that fit samples of the reference.

    Zhang et al., To Generate or Not?, 2024: 40 steps of rate 0.01 and weight decay 0.1. A sample
    counts that shows the concept without the attack, or with it.
    """
    subject, options, restarts = tools.subject, tools.options, tools.options.restarts
    text = subject.targets["reference"].text
    assert text is not None
    encode = _encode(text)

    @jax.jit
    def fit(
        params: Params, vocabulary: Array, allowed: Array, given: Any, rows: Any
    ) -> tuple[Array, Array]:
        """What the denoiser sees of each attacked prompt, [prompts, restarts, N, d]; the losses."""
        project = attacks.onto_vocabulary(vocabulary, allowed)

        def one(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            tokens, x_0, starts = row
            prompt = given._replace(tokens=tokens)

            found = _inverted(
                tools,
                params,
                partial(encode, prompt),
                starts,
                x_0=x_0,
                steps=_ITERATIONS,
                batch=_IMAGES,
                learning_rate=_RATE,
                weight_decay=_DECAY,
                project=project,
            )
            made = jax.lax.map(lambda last: encode(prompt, last), found.found[:, -1])
            return made, found.loss[:, -1]

        return jax.lax.map(one, rows)

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        assert target.text is not None
        tokenizer = target.text.tokenizers[0]
        params, vocabulary = _vocabulary(target)
        allowed = np.ones(len(vocabulary), bool)
        allowed[[tokenizer.start, tokenizer.end, tokenizer.pad]] = False
        asked = (*concept.forgotten, *subject.shown)[:_PROMPTS]
        every = [_tokens_of(subject, target, c) for c in asked]
        free = _unused(np.concatenate(every), _PREFIX, len(vocabulary))
        kept = [
            (c, np.insert(tokens, 1, free)[: len(tokens)])
            for c, tokens in zip(asked, every, strict=True)
            if np.argmax(tokens == tokenizer.end) + _PREFIX < len(tokens)
        ]
        if not kept:
            raise ValueError("--attacks unlearndiffatk: no prompt has room for three tokens more.")
        numbers = np.array([c for c, _ in kept], np.int32)
        prompts = np.stack([tokens for _, tokens in kept]).astype(np.int32)
        reference = subject.targets["reference"]
        own = sampled(
            tools,
            reference,
            subject.rows(reference, np.repeat(numbers, _IMAGES)),
            "images of unlearndiffatk",
        )
        x_0 = encoded(tools, own).reshape(len(kept), _IMAGES, *subject.shape)
        rng = np.random.default_rng(seed_of(tools, "tokens of unlearndiffatk"))
        # The first start of each prompt is the same for every number of restarts.
        words = rng.choice(np.flatnonzero(allowed), (restarts, len(kept), _PREFIX))
        starts = vocabulary[words.swapaxes(0, 1)]
        given = _Tokens(params, prompts[0], free)
        found, losses = jax.device_get(
            fit(target.params, vocabulary, allowed, given, (prompts, x_0, starts))
        )
        each = max(options.samples // len(kept), 1)
        plain = subject.rows(target, np.repeat(numbers, each))
        before = sampled(tools, target, plain, "unlearndiffatk")
        yield Drawn({}, 0, before)
        attacked = np.repeat(found.reshape(-1, *found.shape[2:]), each, axis=0)
        drawn = sampled(tools, target, attacked, "unlearndiffatk")
        images = drawn.reshape(len(kept), restarts, each, *drawn.shape[1:])
        shown = tools.shows(before, concept).reshape(len(kept), each)
        yield from _with_best({}, _ITERATIONS, images, _least(losses), shown)

    return attack
