"""Attacks on what a frozen network is conditioned on: embeddings that bring a concept back.

Concept inversion finds a whole condition embedding, and UnlearnDiffAtk the embeddings of a few
tokens before a prompt. Both are `invert`, which differs only in what its variable stands for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn import schedules
from jax_unlearn.attacks.objective import checked, drawn_loss
from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "Inversion",
    "in_ball",
    "invert",
    "nearest_tokens",
    "onto_vocabulary",
    "straight_through",
]


class Inversion(NamedTuple):
    """What `invert` found, at each of its records.

    Attributes:
      found: the variable, projected, leaves [records, ...].
      steps: how many steps led there, integers [records]; the first is 0, the start.
      loss: mean loss of the steps since the record before, [records]. The first is the start's
        own, in the first step.
    """

    found: Any
    steps: Array
    loss: Array


def invert(
    predict: Callable[[Any, Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: ArrayLike,
    start: Any,
    steps: int,
    batch: int,
    learning_rate: optax.ScalarOrSchedule = 3e-2,
    weight_decay: float | Array = 0.0,
    every: int | None = None,
    project: Callable[[Any], Any] | None = None,
) -> Inversion:
    """min_c E_{x_0, t, ε} ‖ε − ε̂(x_t, t; c)‖²/d, by AdamW on c from `start`.

    Each step draws `batch` images with replacement, their noise, and uniform time steps.

    With a projection P it minimises the loss of P(c) over c, by the derivative that P has. That of
    a ball is the true one: on its rim the pull outwards is left out, and Adam comes to rest where
    the loss in the ball is least. That of a vocabulary is `straight_through`.

    The draws of a step depend on the key and on its number alone, so that each record is where a
    run of that many steps ends.

    `jax.jit` compiles it, and `jax.vmap` over key and start runs restarts side by side.

    Args:
      predict: (variable, x_t [batch, ...], integer t [batch]) -> prediction, in the schedule's
        prediction type, of the frozen network.
      schedule: its noise schedule.
      key: a PRNG key.
      x_0: images of the concept, [n, ...].
      start: the variable at first, any pytree of floats.
      steps: how many steps of the optimizer, at least one.
      batch: how many images a step draws.
      learning_rate: of AdamW; a number or an optax schedule.
      weight_decay: of AdamW; 0 is Adam.
      every: how many steps lie between records, a divisor of `steps`; None records the end alone.
      project: variable -> variable, as `in_ball` and `onto_vocabulary` make it; one that has no
        slope goes through `straight_through` first.

    Raises:
      ValueError: for no images, no steps, an empty batch, or records that do not fit the steps.

    References:
      Pham et al., "Circumventing concept erasure methods for text-to-image generative models",
      2024 (concept inversion).
      Zhang et al., "To generate or not? Safety-driven unlearned diffusion models are still easy
      to generate unsafe images ... for now", 2024 (UnlearnDiffAtk).

    Example:
      The network's condition is the mean of its images. Inversion finds that of the given ones.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_unlearn import attacks, mixtures, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> def predict(mean, x_t, t):
      ...     law = mixtures.gaussian_mixture(mean[None], 0.01)
      ...     return mixtures.denoiser(law, schedule)(x_t, t)
      >>> found = attacks.invert(
      ...     predict, schedule, jax.random.key(0), x_0=jnp.array([[0.3], [0.5]]),
      ...     start=jnp.array([-1.0]), steps=200, every=100, batch=16,
      ...     learning_rate=optax.cosine_decay_schedule(0.05, 200),
      ... )
      >>> found.steps.tolist(), [round(float(c), 1) for c in found.found[:, 0]]
      ([0, 100, 200], [-1.0, 0.4, 0.4])
    """
    images = checked(x_0, None, batch)
    every = steps if every is None else every
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    if every < 1 or steps % every:
        raise ValueError(f"every must divide the {steps} steps, not be {every}.")
    start = jax.tree.map(jnp.asarray, start)
    projected = project if project is not None else lambda variable: variable
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    loss = drawn_loss(lambda variable, x_t, t, _: predict(variable, x_t, t), schedule, batch)

    def step(carry: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], Array]:
        variable, opt_state = carry
        step_key = jax.random.fold_in(key, number)
        value, gradient = jax.value_and_grad(
            lambda variable: loss(projected(variable), step_key, images)
        )(variable)
        updates, opt_state = optimizer.update(gradient, opt_state, variable)
        return (optax.apply_updates(variable, updates), opt_state), value

    def stretch(carry: tuple[Any, Any], numbers: Array) -> tuple[tuple[Any, Any], tuple]:
        carry, values = jax.lax.scan(step, carry, numbers)
        return carry, (projected(carry[0]), values)

    numbers = jnp.arange(steps).reshape(-1, every)
    _, (found, values) = jax.lax.scan(stretch, (start, optimizer.init(start)), numbers)
    found = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), projected(start), found)
    mean = jnp.append(values[0, 0], values.mean(axis=1))
    return Inversion(found, jnp.arange(0, steps + 1, every), mean)


def _directions(vectors: Array) -> Array:
    norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(norm == 0, 1.0, norm)


def _search(vocabulary: ArrayLike, allowed: ArrayLike | None) -> Callable[[Array], Array]:
    """embeddings [..., k, d] -> nearest tokens [..., k]; the vocabulary is prepared once."""
    vocabulary = jnp.asarray(vocabulary)
    if vocabulary.ndim != 2 or len(vocabulary) == 0:
        raise ValueError(f"a vocabulary is [v, d], at least one token, not {vocabulary.shape}.")
    if allowed is not None:
        if np.shape(allowed) != vocabulary.shape[:1]:
            raise ValueError(
                f"allowed says yes or no to each of {len(vocabulary)} tokens, but its shape is "
                f"{np.shape(allowed)}."
            )
        if not isinstance(allowed, jax.core.Tracer) and not np.any(allowed):
            raise ValueError(f"none of the {len(vocabulary)} tokens is allowed.")
    directions = _directions(vocabulary)

    def nearest(embeddings: Array) -> Array:
        if embeddings.ndim < 2 or embeddings.shape[-1] != vocabulary.shape[1]:
            raise ValueError(
                f"embeddings are [k, {vocabulary.shape[1]}], as long as the vocabulary's, not "
                f"{embeddings.shape}."
            )
        cosine = jnp.matmul(
            _directions(embeddings), directions.T, precision=jax.lax.Precision.HIGHEST
        )
        if allowed is not None:
            cosine = jnp.where(jnp.asarray(allowed, bool), cosine, -jnp.inf)
        return jnp.argmax(cosine, axis=-1)

    return nearest


def nearest_tokens(
    embeddings: ArrayLike, vocabulary: ArrayLike, allowed: ArrayLike | None = None
) -> Array:
    """argmax_j cos(e_i, w_j): the token whose embedding points most nearly the same way, [k].

    Of equal ones it is the first. A vector of zeros has the cosine 0 with everything.

    Args:
      embeddings: e_i, [k, d].
      vocabulary: w_j, the embeddings of all tokens, [v, d].
      allowed: which tokens may be chosen, boolean [v]; None allows all. It leaves out the special
        ones, and words that name the concept.

    Raises:
      ValueError: for shapes that do not fit, or no token allowed.

    Example:
      The length does not count. Without the second token the third is nearest.

      >>> from jax_unlearn import attacks
      >>> vocabulary = [[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]]
      >>> attacks.nearest_tokens([[0.1, 0.2]], vocabulary).tolist()
      [1]
      >>> attacks.nearest_tokens([[0.1, 0.2]], vocabulary, [True, False, True]).tolist()
      [2]
    """
    return _search(vocabulary, allowed)(jnp.asarray(embeddings))


def onto_vocabulary(
    vocabulary: ArrayLike, allowed: ArrayLike | None = None
) -> Callable[[Array], Array]:
    """The projection of `invert` to tokens: embeddings [k, d] -> those of their nearest tokens.

    What it finds is text that a user can type. Its derivative is that of `straight_through`. Args
    and Raises: as `nearest_tokens`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks
      >>> project = attacks.onto_vocabulary([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]])
      >>> project(jnp.array([[0.1, 0.2], [3.0, 0.1]])).tolist()
      [[5.0, 5.0], [1.0, 0.0]]
    """
    vocabulary = jnp.asarray(vocabulary)
    nearest = _search(vocabulary, allowed)
    return straight_through(lambda x: vocabulary[nearest(x)].astype(x.dtype))


def straight_through(project: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function with the derivative of the identity (Bengio et al. 2013).

    Args:
      project: variable -> variable of the same leaves, such as a step function.

    Example:
      >>> import jax
      >>> from jax_unlearn import attacks
      >>> value, slope = jax.value_and_grad(attacks.straight_through(jax.numpy.round))(2.7)
      >>> float(value), float(slope)
      (3.0, 1.0)
    """

    def through(variable: Any) -> Any:
        # The difference is exactly 0, and so the value is exactly the projected one.
        return jax.tree.map(
            lambda x, y: jax.lax.stop_gradient(y) + (x - jax.lax.stop_gradient(x)),
            variable,
            project(variable),
        )

    return through


def in_ball(centre: Any, radius: ArrayLike) -> Callable[[Any], Any]:
    """The projection of `invert` to a ball: c + min(1, ρ/‖x − c‖) (x − c).

    The norm is Euclidean, over all leaves of the variable together.

    Args:
      centre: c, a pytree like the variable.
      radius: ρ ≥ 0.

    Raises:
      ValueError: for a negative radius.

    Example:
      (3, 4) has the length 5; at most 1 is allowed.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks
      >>> project = attacks.in_ball(jnp.zeros(2), 1.0)
      >>> [round(float(value), 3) for value in project(jnp.array([3.0, 4.0]))]
      [0.6, 0.8]
    """
    if not isinstance(radius, jax.core.Tracer) and not np.all(np.asarray(radius) >= 0):
        raise ValueError(f"radius must not be negative, got {radius}.")

    def project(variable: Any) -> Any:
        offset = jax.tree.map(jnp.subtract, variable, centre)
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(offset))
        outside = squares > jnp.square(radius)
        # Inside, the root is of 1: that of 0 has no derivative.
        share = jnp.where(outside, radius / jnp.sqrt(jnp.where(outside, squares, 1.0)), 1.0)
        return jax.tree.map(
            lambda leaf, middle, shift: (middle + share * shift).astype(jnp.result_type(leaf)),
            variable,
            centre,
            offset,
        )

    return project
