"""Constraints that hold at the worst condition of a ball, and who looks for that condition.

    value_i(θ) = min over ‖δ‖ ≤ ρ of KL(p_θ(·|c + δ) ‖ q_i) ≥ b_i,
    value_i(θ) = max over ‖δ‖ ≤ ρ of E_{p_θ(·|c + δ)} h_i ≤ ε_i

By Danskin's theorem the gradient of such a value is that at the worst δ, held fixed. So a robust
problem is the plain one on another batch, which an adversary makes inside the step.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jax_unlearn import divergences, losses, schedules
from jax_unlearn.formulations import trajectories
from jax_unlearn.problem import Batch, Conditions, Evaluate, Losses, Problem
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = ["Adversary", "kept_starts", "looked_up", "robust", "worst_conditions"]

Adversary = Callable[..., Batch]
"""(params, reference, key, batch, *, axis_name=None) -> a `Batch` of the same rows, attacked."""

# fold_in of a key by less than the number of rows, or of a split's keys, is what problems do.
_APART = 2**31 - 1
_AIMS = ("trajectory", "images")
# Of the slopes of earlier points, each step: one point says little of a whole path or law.
_MOMENTUM = 0.9


def robust(problem: Problem, adversary: Adversary) -> Problem:
    """The same problem where an adversary has moved the rows to forget.

    L(θ, λ) = objective(θ; δ*) + Σ_i s_i λ_i sign_i (b_i − value_i(θ; δ*)), δ* = δ*(θ) held fixed

    What the model is held to, the base of each row, holds at c + δ* too: the price of a robust
    constraint is paid where it is asked for. The problem itself sees the noise that it would see
    without the adversary, who has other noise: the attack does not fit what it is judged by.

    With `minibatched` give the plain problem, and its `step` the adversary's batch: trajectories
    must be those of the conditions that the constraints see.

    Args:
      problem: any whose rows the adversary knows.
      adversary: see `worst_conditions`. It has no derivative in the parameters.

    Returns:
      The problem; `losses` and `fresh` are both of the adversary's batch.

    Example: images of condition c are all θ c, and the path KL is 11/6 of the squared distance.
      From 2 an attack of radius ½ gets to 1.5, so that θ = 1 is at 1.5² from the images 0.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> alpha, sigma = schedules.alpha_sigma(schedule.log_snr, jnp.zeros((2, 1)))
      >>> apply = lambda theta, x_t, t, cond: (x_t - alpha[t] * theta * cond) / sigma[t]
      >>> problem = formulations.reverse_kl(apply, schedule, shape=(1,), steps=2)
      >>> adversary = formulations.worst_conditions(
      ...     apply, schedule, radius=0.5, steps=4, shape=(1,), points=2
      ... )
      >>> two = jnp.full((3, 1), 2.0)
      >>> rows = Conditions(two, base=two, target=0 * two, constraint=jnp.zeros(3, int))
      >>> value, found = lagrangian(
      ...     formulations.robust(problem, adversary),
      ...     1.0, 1.0, jax.random.key(0), Batch(None, rows), [0.5], [3.0],
      ... )
      >>> [round(float(x) * 6 / 11, 3) for x in (found.objective, found.values[0])]
      [0.25, 2.25]
    """

    def attacked(evaluate: Evaluate) -> Evaluate:
        def losses_at_worst(
            params: Params,
            reference: Params,
            key: Array,
            batch: Batch,
            current: Array,
            /,
            *,
            axis_name: str | None = None,
        ) -> Losses:
            still = jax.lax.stop_gradient((params, reference))
            other = jax.random.fold_in(key, _APART)
            worst = adversary(*still, other, batch, axis_name=axis_name)
            return evaluate(params, reference, key, worst, current, axis_name=axis_name)

        return losses_at_worst

    return problem._replace(
        losses=attacked(problem.losses),
        fresh=None if problem.fresh is None else attacked(problem.fresh),
        name=f"robust {problem.name}",
    )


def worst_conditions(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    *,
    radius: float,
    steps: int,
    shape: tuple[int, ...],
    aim: str = "trajectory",
    rate: float = 0.25,
    points: int = 10,
    images: ArrayLike | None = None,
    table: Any = None,
    reference_apply: Denoiser | None = None,
) -> Adversary:
    """The adversary who moves each forgotten condition within a ball, towards what is forgotten.

    v ← 0.9 v + g/‖g‖,   g = ∇_δ ‖ε_θ(x_t, t, c + δ) − ε*‖²
    δ ← Π[δ − rate ρ v/‖v‖],   Π onto ‖δ‖ ≤ ρ

    with one point x_t a row, drawn anew at each step: one forward and one backward pass over the
    rows to forget. Norms are Euclidean, each row's by itself, over all leaves of its condition.

    δ starts at 0. Drawn at random in thousands of dimensions it would lie on the sphere, far from
    all that the model knows, and a few steps would not find back. Where p(·|c) is still q_i no δ is
    worse than 0. Two attacks on one condition differ by their points.

    | aim | x_t | ε* | what it lowers |
    |---|---|---|---|
    | "trajectory" | of p's own chain, sampled once, at the start | ε_q(x_t, target) | KL(p‖q_i) |
    | "images" | noised images of what is forgotten | see below | KL(q_i‖p) |

    "trajectory" draws each time step in proportion to its part of the row's path KL, since a
    normalised step does not tell how much a step weighs. "images" draws them uniformly: it is
    concept inversion (arXiv 2308.01508) held to a ball. ε* is the noise; where rows have a target
    it is ε_q(x_t, target), the mean of that noise for samples of q(·|target). The slope has the
    same mean then, and less noise. With as many steps "images" is the stronger attack: it lowered
    the path KL of a small model from text to image from 61 nats to 9 in ten steps, "trajectory" to
    44. Five steps did half of that or nothing.

    Two constraints on one row have two worst conditions. A row of `Conditions` with k constraints
    is attacked for one of them, drawn anew, and left with that one. The likelihoods of a mixed
    problem are read at the worst condition of the separation.

    **Any start.** A start may be any condition: a row to forget is attacked from its `cond`,
    whatever its target. See `kept_starts`.

    Args:
      apply: the denoiser of p, of conditions that can be added to: a tree of float arrays.
      schedule: its noise schedule.
      radius: ρ ≥ 0; with 0 and one constraint a row, the robust problem is the plain one.
      steps: of the attack, at least 1.
      shape: of one example, without the batch axis.
      aim: see above.
      rate: length of a step, in radii.
      points: time steps of the chain that "trajectory" samples.
      images: of what is forgotten, [m, n, ...]: n of each constraint. Those of constraint m + i
        are those of i.
      table: what batches number their conditions by, a tree of arrays [conditions, ...]. All
        conditions of a batch are then looked up in it: the problem must take them as they are.
      reference_apply: the denoiser of q and q_i, called with the reference's parameters; default
        `apply`.

    Returns:
      An adversary for batches whose rows to forget have a `cond` and a `constraint`:
      `Conditions`, and with "images" `Images`, `Samples` and `NoisyPoints` too. It raises
      ValueError for others, and for numbered conditions without a table.

    Raises:
      ValueError: for a negative radius or rate, no step, an unknown aim, images that are missing,
        not asked for or of another shape, or points as `reverse_kl` refuses steps.

    Example: an attack stays in its ball, here as near to 0 as it gets.
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, schedules
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> alpha, sigma = schedules.alpha_sigma(schedule.log_snr, jnp.zeros((2, 1)))
      >>> adversary = formulations.worst_conditions(
      ...     lambda theta, x_t, t, cond: (x_t - alpha[t] * theta * cond) / sigma[t],
      ...     schedule, radius=0.5, steps=4, shape=(1,), aim="images", images=jnp.zeros((1, 8, 1)),
      ... )
      >>> rows = Conditions(jnp.array([[2.0], [-3.0]]), None, constraint=jnp.zeros(2, int))
      >>> worst = adversary(1.0, None, jax.random.key(0), Batch(None, rows)).forget
      >>> [round(c, 3) for c in worst.cond[:, 0].tolist()]
      [1.5, -2.5]
    """
    if not (0 <= radius < math.inf and 0 <= rate < math.inf):
        raise ValueError(f"radius and rate must be finite and at least 0, not {radius} and {rate}.")
    if steps < 1:
        raise ValueError(f"an attack takes at least 1 step, not {steps}.")
    if aim not in _AIMS:
        raise ValueError(f"aim {aim!r} is not one of {_AIMS}.")
    if (aim == "images") != (images is not None):
        raise ValueError(f"aim 'images' takes images, and no other does; the aim is {aim!r}.")
    stored = None if images is None else jnp.asarray(images)
    if stored is not None and (stored.shape[2:] != tuple(shape) or not stored.size):
        raise ValueError(
            f"images must be [constraints, images, {', '.join(map(str, shape))}], not "
            f"{list(stored.shape)}."
        )
    frozen = apply if reference_apply is None else reference_apply
    along = divergences.chain(schedule, shape, points) if stored is None else None

    def adversary(
        params: Params, reference: Params, key: Array, batch: Batch, *, axis_name: str | None = None
    ) -> Batch:
        batch = Batch(*(_embedded(part, table) for part in batch))
        cond, numbers = _attackable(batch.forget, aim)
        rows = jnp.arange(numbers.shape[0])
        keys = losses.example_keys(key, numbers.shape[0], axis_name=axis_name)
        choice, path, inner = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        forget, target = batch.forget, getattr(batch.forget, "target", None)
        if numbers.ndim == 2:
            place = jax.vmap(lambda key: jax.random.randint(key, (), 0, numbers.shape[1]))(choice)
            numbers, target = jax.tree.map(
                lambda leaf: jnp.asarray(leaf)[rows, place], (numbers, target)
            )
            if isinstance(forget, Conditions):
                forget = forget._replace(target=target, constraint=numbers)

        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], cond))

        def moved(delta: Array) -> Condition:
            return jax.tree.map(jnp.add, cond, jax.vmap(unravel)(delta))

        def theirs(x_t: Array, t: Array) -> Array:
            return losses.predict_epsilon(
                frozen, reference, schedule, x_t=x_t, t=t, cond=target, clip=True
            )

        def on_path() -> Callable[[Array], tuple[Array, Array, Array]]:
            """Samples p's chain at the start of the attack -> a draw of its points."""
            assert along is not None

            def compare(x_t: Array, t: Array, _: Array, epsilon: Array) -> tuple[Array, ...]:
                others = theirs(x_t, t)
                return x_t, others, losses.squared_error(epsilon, others)

            (x_t, others, apart), _ = trajectories.run(
                lambda x_t, t: apply(params, x_t, t, cond), compare, along, path, bound=0.0
            )
            share = jnp.log(along.weights[:, None] * apart)

            def draw(keys: Array) -> tuple[Array, Array, Array]:
                place = jax.vmap(jax.random.categorical, (0, 1))(keys, share)
                return x_t[place, rows], along.times[place], others[place, rows]

            return draw

        def noised(keys: Array) -> tuple[Array, Array, Array]:
            assert stored is not None

            def one(key: Array, number: Array) -> tuple[Array, Array, Array]:
                which, time, noise = jax.random.split(key, 3)
                one = jax.random.randint(which, (), 0, stored.shape[1])
                t = jax.random.randint(time, (), 0, schedule.num_steps)
                x_0 = stored[number % stored.shape[0], one]
                return x_0, t, jax.random.normal(noise, x_0.shape, x_0.dtype)

            x_0, t, noise = jax.vmap(one)(keys, numbers)
            x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[t])
            return x_t, t, noise if target is None else theirs(x_t, t)

        draw = noised if along is None else on_path()

        def descend(state: tuple[Array, Array], keys: Array) -> tuple[tuple[Array, Array], None]:
            delta, velocity = state
            x_t, t, goal = draw(keys)

            def apart(delta: Array) -> Array:
                ours = losses.predict_epsilon(
                    apply, params, schedule, x_t=x_t, t=t, cond=moved(delta), clip=True
                )
                return losses.squared_error(ours, goal).sum()

            slope = jax.grad(apart)(delta)
            velocity = _MOMENTUM * velocity + slope / _length(slope)
            delta = delta - rate * radius * velocity / _length(velocity)
            return (delta * jnp.minimum(1.0, radius / _length(delta)), velocity), None

        inner = jax.vmap(lambda key: jax.random.split(key, steps), out_axes=1)(inner)
        still = jnp.zeros((numbers.shape[0], flat.size), flat.dtype)
        (delta, _), _ = jax.lax.scan(descend, (still, still), inner)
        worst = moved(jax.lax.stop_gradient(delta))
        return batch._replace(forget=forget._replace(cond=worst))

    return adversary


def kept_starts(batch: Batch, rows: int, constraints: int) -> Batch:
    """The batch with kept conditions among those that separations must hold near.

    Who inverts a concept starts anywhere: from the null condition, or from what is kept. So the
    first `rows` kept conditions become rows to forget too, with the targets of the rows there, in
    turn. Each keeps its own law q(·|its base) as base, and stays among the kept rows as it is.

    Near a kept condition the model must show what is kept, and that may be all that can be asked.
    At δ = 0 its value is KL(q(·|base)‖q_i): with a threshold above that the two contradict each
    other, and what is kept pays. With one below it, the constraint costs nothing until an attack
    from there comes near. Where a start itself shows the concept in some of its images, as the null
    condition does, reverse KL hardly sees it: a likelihood bounds that share.

    A constraint is a mean over its rows, and a kept condition is far from what is forgotten. In one
    mean the far rows would make up for the near ones. So a kept start with constraint i counts as
    constraint `constraints` + i, with a threshold and a multiplier of its own.

    Args:
      batch: of `Conditions` with targets, kept ones among them; see `worst_conditions` for what
        then moves them.
      rows: how many, at most as many as are kept.
      constraints: m, how many there are without kept starts.

    Returns:
      A batch for 2m constraints.

    Raises:
      ValueError: for other batches, or more rows than are kept.

    Example: label 3 is kept, and label 1 forgotten.
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import formulations
      >>> from jax_unlearn.problem import Batch, Conditions
      >>> three, one, zero = jnp.array([3]), jnp.array([1]), jnp.array([0])
      >>> batch = Batch(Conditions(three, three), Conditions(one, zero, one, zero))
      >>> rows = formulations.kept_starts(batch, rows=1, constraints=1).forget
      >>> rows.cond.tolist(), rows.base.tolist(), rows.target.tolist(), rows.constraint.tolist()
      ([1, 3], [0, 3], [1, 1], [0, 1])
    """
    kept, forget = batch.kept, batch.forget
    if not (isinstance(kept, Conditions) and isinstance(forget, Conditions)):
        raise ValueError(
            "kept starts take a Batch of Conditions that are kept and to forget, not "
            f"{type(kept).__name__} and {type(forget).__name__}."
        )
    if forget.target is None or forget.constraint is None or forget.likelihood is not None:
        raise ValueError("kept starts are for separations: rows with target and constraint alone.")
    count = jax.tree.leaves(kept.cond)[0].shape[0]
    if not 0 <= rows <= count:
        raise ValueError(f"{rows} kept starts cannot be taken of {count} kept rows.")
    turn = jnp.arange(rows) % jnp.shape(forget.constraint)[0]
    cond, base = jax.tree.map(lambda leaf: leaf[:rows], (kept.cond, kept.base))
    target, constraint = jax.tree.map(
        lambda leaf: jnp.asarray(leaf)[turn], (forget.target, forget.constraint)
    )
    starts = Conditions(cond, base, target, constraint + constraints)
    return batch._replace(forget=trajectories.concatenate(forget, starts))


def looked_up(table: Any, cond: Condition) -> Condition:
    """The rows of a table that whole numbers [n] stand for; other conditions as they are.

    A denoiser that begins with it takes numbers and conditions alike, and so can have some moved.

    Args:
      table: a tree of arrays [conditions, ...]; or None.
      cond: numbers, or conditions.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import formulations
      >>> table = jnp.array([[0.5], [1.5]])
      >>> formulations.looked_up(table, jnp.array([1, 0])).tolist()
      [[1.5], [0.5]]
      >>> formulations.looked_up(table, jnp.array([[1.75]])).tolist()
      [[1.75]]
    """
    one = isinstance(cond, jax.Array | np.ndarray)
    if table is None or not one or not jnp.issubdtype(cond.dtype, jnp.integer):
        return cond
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[cond], table)


def _embedded(part: Any, table: Any) -> Any:
    """Rows of any type, their numbered conditions looked up."""
    fields = {"cond", "base", "target"} & set(getattr(part, "_fields", ()))
    return part and part._replace(
        **{field: looked_up(table, getattr(part, field)) for field in fields}
    )


def _attackable(forget: Any, aim: str) -> tuple[Condition, Array]:
    """The conditions of the rows to forget and the numbers of their constraints."""
    numbers, cond = getattr(forget, "constraint", None), getattr(forget, "cond", None)
    leaves = jax.tree.leaves(cond)
    if numbers is None or not leaves:
        raise ValueError(
            "an attack moves the conditions of rows to forget that have the number of their "
            f"constraint; got {type(forget).__name__} without "
            f"{'cond' if not leaves else 'constraint'}."
        )
    if not all(jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in leaves):
        raise ValueError(
            "there is no ball around whole numbers: give conditions as float arrays, or the "
            "`table` that they are numbered by."
        )
    if aim == "trajectory" and getattr(forget, "target", None) is None:
        raise ValueError("aim 'trajectory' is towards targets, and rows have none: use 'images'.")
    return jax.tree.map(jnp.asarray, cond), jnp.asarray(numbers)


def _length(rows: Array) -> Array:
    """The norm of each row, [n, 1]; never quite 0."""
    squares = jnp.square(rows).sum(axis=1, keepdims=True)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(rows.dtype).tiny))
