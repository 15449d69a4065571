"""Each attack on one target: what the judge sees, against what the attack was given.

An attack draws images, setting by setting, and the judge counts those that show the concept. The
same attack on the reference and on an oracle says what its success means.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import attacks, samplers, schedules
from jax_unlearn.app import data
from jax_unlearn.app.audit.drawing import drawer
from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject import Concept, Subject, Target
from jax_unlearn.app.tasks.base import batch_rows, in_batches
from jax_unlearn.pretrained.subsets import lora_init, lora_merge
from jax_unlearn.pretrained.text_to_image import TextToImage, encode_images
from jax_unlearn.typing import Array, Denoiser, Params

__all__ = ["Attack", "Attempt", "Drawn", "Row", "Tools", "attempts", "make_tools", "unavailable"]

# Of a target's weights; learned in the same way by all.
_LORA_RANK = 4
_RELEARNED_FROM = (4, 16)
_DEPTHS = (0.4, 0.6, 0.8, 1.0)
_ETAS = (1.0, 1.3, 1.6, 1.85)
_VARIANCES = (1.0, 1.02, 1.04)
_HIDDEN = (0.25, 0.5, 0.75)
# Replacement alone hardly tells what is hidden of what is known; see `attacks.inpaint`.
_REPEATS = 5
_PUSHES = (0.0, 1.0, 4.0, 16.0)
_BITS = (8, 6, 5, 4)
# The settings of UnlearnDiffAtk as published (Zhang et al. 2024).
_PREFIX, _ITERATIONS, _RATE, _DECAY = 3, 40, 0.01, 0.1
_IMAGES = 8
_PROMPTS = 16
SHOWN = 8


class Row(NamedTuple):
    """What an attack came to.

    Attributes:
      settings: of it, by name.
      budget: what it was given; see `BUDGETS`.
      hits: images that show the concept, as the judge says.
      count: images.
    """

    settings: dict[str, Any]
    budget: float
    hits: int
    count: int


class Attempt(NamedTuple):
    """Rows of an attack on one target, and some images of its last one, uint8."""

    rows: list[Row]
    images: np.ndarray


class Drawn(NamedTuple):
    """What one setting of an attack makes.

    Attributes:
      settings: of it, by name.
      budget: what it was given; see `BUDGETS`.
      images: uint8 [n, height, width, channels].
      before: which of them count whatever they show, [n]; or None.
    """

    settings: dict[str, Any]
    budget: float
    images: np.ndarray
    before: np.ndarray | None = None


Attack = Callable[[Target, Concept], Iterator[Drawn]]


class Tools(NamedTuple):
    """What attacks share: compiled once for all targets.

    Attributes:
      subject: what is audited.
      options: how.
      draw: see `drawer`.
      named: uint8 images [n, ...] -> the class of each, [n].
    """

    subject: Subject
    options: AuditOptions
    draw: Any
    named: Callable[[np.ndarray], np.ndarray]

    def shows(self, images: np.ndarray, concept: Concept) -> np.ndarray:
        """Which images show a concept, [n]."""
        return np.isin(self.named(images), concept.lost)

    def judged(self, drawn: Iterable[Drawn], concept: Concept) -> Attempt:
        """Judges all that an attack makes."""
        rows, images = [], None
        for one in drawn:
            shows, images = self.shows(one.images, concept), one.images[:SHOWN]
            if one.before is not None:
                shows = shows | one.before
            rows.append(Row(one.settings, one.budget, int(shows.sum()), len(shows)))
        assert images is not None
        return Attempt(rows, images)

    def forgotten(self, concept: Concept) -> np.ndarray:
        """Conditions that name it, in turn, as many as there are samples."""
        return np.resize(np.asarray(concept.forgotten, np.int32), self.options.samples)


def attempts(tools: Tools) -> dict[str, Attack]:
    """The chosen attacks: name -> a function of (target, concept).

    Raises:
      ValueError: for one that was named and that the model does not allow.
    """
    subject, options = tools.subject, tools.options
    for name, why in unavailable(subject).items():
        if name in options.attacks:
            raise ValueError(f"--attacks {name}: {why}.")
    chosen = [name for name in options.chosen if name not in unavailable(subject)]
    functions: dict[str, Callable[[Tools], Attack]] = {
        "inversion": _inversion,
        "unlearndiffatk": _unlearndiffatk,
        "noise": _noise,
        "stochasticity": _stochasticity,
        "inpainting": _inpainting,
        "guidance": _guidance,
        "relearning": _relearning,
        "rounding": _rounding,
    }
    return {name: functions[name](tools) for name in chosen}


def unavailable(subject: Subject) -> dict[str, str]:
    """Attacks that the model does not allow, and why."""
    text = subject.targets["reference"].text
    if text is None:
        return {"unlearndiffatk": "it changes tokens of a prompt, and this model takes labels"}
    if not _one_encoder(text):
        return {"unlearndiffatk": "it is for models with one text encoder"}
    return {}


def make_tools(subject: Subject, options: AuditOptions) -> Tools:
    """Prepares what attacks and other measurements share."""
    conditions = subject.conditions
    draw = drawer(
        subject.apply,
        subject.schedule,
        conditions.decode,
        shape=subject.shape,
        steps=options.sampling_steps,
    )
    logits = jax.jit(subject.judge.logits)

    def named(images: np.ndarray) -> np.ndarray:
        found = in_batches(
            lambda _, x: logits(data.to_unit_range(x)),
            jax.random.key(0),
            images,
            size=batch_rows(conditions.image_shape),
        )
        return found.argmax(axis=1)

    return Tools(subject, options, draw, named)


def _spread(e: Any, count: int) -> Any:
    """One condition as that of `count` rows."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), e)


def _seed(tools: Tools, number: int) -> tuple[int, int]:
    return tools.options.seed, number


def _sampled(tools: Tools, target: Target, e: Any, number: int, **changed: Any) -> np.ndarray:
    """Guided samples of conditions e [n, ...], from noise of its own for each number."""
    count = len(jax.tree.leaves(e)[0])
    given = {"scale": tools.options.guidance, "seed": _seed(tools, number)} | changed
    params = given.pop("params", target.params)
    return tools.draw(params, e, tools.subject.free(target, count), **given)


# --- Conditions.


def _inverted(
    tools: Tools, params: Params, encode: Callable[[Any], Any], **settings: Any
) -> attacks.Inversion:
    """Inversion of a variable that `encode` makes one condition of, on frozen parameters."""
    subject = tools.subject

    def predict(variable: Any, x_t: Array, t: Array) -> Array:
        return subject.apply(params, x_t, t, _spread(encode(variable), len(x_t)))

    key = jax.random.key(tools.options.seed)
    return attacks.invert(predict, subject.schedule, key, **settings)


def _inversion(tools: Tools) -> Attack:
    """A free condition, or a free token of the prompt, is fitted to images of the concept.

    Pham et al., Circumventing Concept Erasure Methods for Text-to-Image Generative Models, 2024.
    """
    subject, options = tools.subject, tools.options
    steps, samples = options.inversion_steps, options.samples

    def whole(_: Any, e: Any) -> Any:
        return e

    def fitting(encode: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        @jax.jit
        def fit(params: Params, given: Any, x_0: Array, start: Any) -> Any:
            found = _inverted(
                tools,
                params,
                partial(encode, given),
                x_0=x_0,
                start=start,
                steps=steps,
                batch=min(len(x_0), 64),
                learning_rate=options.inversion_rate,
                every=steps // 8,
            )
            return found.steps, jax.lax.map(lambda one: encode(given, one), found.found)

        return fit

    fit_whole = fitting(whole)
    text = subject.targets["reference"].text
    fit_token = fitting(_encode(text)) if text is not None and _one_encoder(text) else None

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        start = jax.tree.map(lambda leaf: leaf[0], subject.rows(target, np.array([subject.start])))
        ways: list[tuple[str, Callable[..., Any], Any, Any]] = []
        if fit_token is not None and (token := _one_token(subject, target, concept)) is not None:
            ways.append(("one token", fit_token, *token))
        for what, fit, given, first in [*ways, ("whole embedding", fit_whole, None, start)]:
            budgets, found = jax.device_get(fit(target.params, given, concept.x_0, first))
            for place, budget in enumerate(budgets):
                e = jax.tree.map(
                    lambda leaf, place=place: np.repeat(leaf[place : place + 1], samples, axis=0),
                    found,
                )
                yield Drawn({"what": what}, int(budget), _sampled(tools, target, e, 11))

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


def _one_encoder(text: TextToImage) -> bool:
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


def _one_token(subject: Subject, target: Target, concept: Concept) -> tuple[_Tokens, Array] | None:
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
            return _Tokens(params, np.concatenate(parts), row), jnp.asarray(start)
    return None


def _unlearndiffatk(tools: Tools) -> Attack:
    """Three tokens before a prompt, nearest to vectors that fit samples of the reference.

    Zhang et al., To Generate or Not?, 2024: 40 steps of rate 0.01 and weight decay 0.1. A sample
    counts that shows the concept without the attack, or with it.
    """
    subject, options = tools.subject, tools.options
    text = subject.targets["reference"].text
    assert text is not None
    encode = _encode(text)

    @jax.jit
    def fit(params: Params, vocabulary: Array, allowed: Array, given: Any, rows: Any) -> Array:
        """What the denoiser sees of each attacked prompt, [prompts, N, d]."""
        project = attacks.onto_vocabulary(vocabulary, allowed)

        def one(row: tuple[Array, Array, Array]) -> Array:
            tokens, x_0, start = row
            prompt = given._replace(tokens=tokens)

            found = _inverted(
                tools,
                params,
                partial(encode, prompt),
                x_0=x_0,
                start=start,
                steps=_ITERATIONS,
                batch=_IMAGES,
                learning_rate=_RATE,
                weight_decay=_DECAY,
                project=project,
            )
            return encode(prompt, jax.tree.map(lambda leaf: leaf[-1], found.found))

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
        own = _sampled(tools, reference, subject.rows(reference, np.repeat(numbers, _IMAGES)), 12)
        x_0 = _encoded(tools, own).reshape(len(kept), _IMAGES, *subject.shape)
        rng = np.random.default_rng([options.seed, 13])
        start = vocabulary[rng.choice(np.flatnonzero(allowed), (len(kept), _PREFIX))]
        given = _Tokens(params, prompts[0], free)
        found = fit(target.params, vocabulary, allowed, given, (prompts, x_0, start))
        each = max(options.samples // len(kept), 1)
        attacked = np.repeat(np.asarray(found), each, axis=0)
        plain = subject.rows(target, np.repeat(numbers, each))
        before = _sampled(tools, target, plain, 14)
        yield Drawn({}, 0, before)
        drawn = _sampled(tools, target, attacked, 14)
        yield Drawn({}, _ITERATIONS, drawn, tools.shows(before, concept))

    return attack


def _encoded(tools: Tools, images: np.ndarray) -> np.ndarray:
    """Images as the denoiser has them."""
    text = tools.subject.targets["reference"].text
    if text is None:
        return np.asarray(data.to_unit_range(images))
    return in_batches(
        lambda _, x: encode_images(text, data.to_unit_range(x)),
        jax.random.key(0),
        images,
        size=batch_rows(images.shape[1:]),
    )


# --- Noise, and what is known of an image.


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


def _noise(tools: Tools) -> Attack:
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


def _inpainting(tools: Tools) -> Attack:
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


def _stochasticity(tools: Tools) -> Attack:
    """More noise is put in while sampling than the sampler takes out."""

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        e = tools.subject.rows(target, tools.forgotten(concept))
        for variance in _VARIANCES:
            for eta in _ETAS:
                drawn = _sampled(tools, target, e, 15, eta=eta, variance=variance)
                yield Drawn({"variance": variance}, eta, drawn)

    return attack


def _guidance(tools: Tools) -> Attack:
    """The judge's gradient pushes samples towards the concept."""
    subject, options = tools.subject, tools.options
    schedule, samples = subject.schedule, options.samples

    def pushed(lost: tuple[int, ...]) -> Callable[..., Array]:
        def log_likelihood(x_0: Array) -> Array:
            logits = subject.judge.logits(subject.conditions.decode(x_0))
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
        rng = np.random.default_rng(_seed(tools, 16))
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


# --- Weights.


def _relearning(tools: Tools) -> Attack:
    """A few steps of fine-tuning on a few images; judged on other prompts where there are any."""
    subject, options = tools.subject, tools.options
    adam = optax.adam(options.relearning_rate)
    low_alone = optax.multi_transform(
        {"base": optax.set_to_zero(), "low": adam}, {"base": "base", "low": "low"}
    )

    def merged(parts: dict[str, Params]) -> Params:
        return lora_merge(parts["base"], parts["low"])

    def adapted(parts: dict[str, Params], x_t: Array, t: Array, cond: Any) -> Array:
        return subject.apply(merged(parts), x_t, t, cond)

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        asked = subject.shown or concept.forgotten
        e = subject.rows(target, np.resize(np.asarray(asked, np.int32), options.samples))
        # What trains is apart from what does not: no parameters become constants of the program.
        ways: list[tuple[str, Denoiser, Any, Callable[[Any], Params]]] = []
        if target.text is not None:
            low = lora_init(target.params, jax.random.key(options.seed), rank=_LORA_RANK)
            name = f"low-rank change of rank {_LORA_RANK}"
            ways.append((name, adapted, {"base": target.params, "low": low}, merged))
        ways.append(("all parameters", subject.apply, target.params, lambda params: params))
        for what, apply, start, whole in ways:
            for given in _RELEARNED_FROM:
                if given > len(concept.x_0):
                    continue
                learning = attacks.relearning(
                    apply,
                    subject.schedule,
                    low_alone if apply is adapted else adam,
                    x_0=concept.x_0[:given],
                    cond=subject.rows(target, concept.cond[:given]),
                    batch=min(given, 16),
                )
                state, done = learning.init(start), 0
                for budget in _doubling(options.relearning_steps):
                    if budget > done:
                        key = jax.random.key(options.seed)
                        state = learning.advance(state, key, budget - done)
                        done = budget
                    drawn = _sampled(tools, target, e, 17, params=whole(state.params))
                    yield Drawn({"what": what, "images": given}, budget, drawn)

    return attack


def _doubling(most: int) -> Iterator[int]:
    """0, 1, 2, 4, …, and `most`."""
    yield 0
    budget = 1
    while budget < most:
        yield budget
        budget *= 2
    yield most


def _rounding(tools: Tools) -> Attack:
    """The weights are rounded to a few bits: what was moved by little moves back."""

    def attack(target: Target, concept: Concept) -> Iterator[Drawn]:
        e = tools.subject.rows(target, tools.forgotten(concept))
        for bits in _BITS:
            params = attacks.rounded(target.params, bits)
            yield Drawn({}, bits, _sampled(tools, target, e, 18, params=params))

    return attack
