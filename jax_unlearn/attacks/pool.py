"""A pool of attackers of all ages, of which each training step moves all by one step.

An attack of many steps at each step of training costs as much as those steps. A pool keeps its
attackers from one step of training to the next, and so pays for one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_unlearn.typing import Array, ArrayLike

__all__ = ["RestartedAdamState", "pool_of", "restarted_adam"]


class RestartedAdamState(NamedTuple):
    """What restarted Adam carries.

    Attributes:
      count: updates so far, an integer.
      age: of each row, integers [rows]. At `period` the row starts anew.
      mu: first moments, leaves [rows, ...].
      nu: second moments, leaves [rows, ...].
    """

    count: Array
    age: Array
    mu: Any
    nu: Any


def restarted_adam(
    starts: Any,
    *,
    learning_rate: ArrayLike = 3e-2,
    period: int = 100,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Adam on a pool of conditions, in which each row is an attacker of its own.

    m ← b1 m + (1−b1) g,  v ← b2 v + (1−b2) g²,  u = −rate m̂/(√v̂ + eps),  age ← age + 1;
    at age = period instead  u = start − row,  m, v, age ← 0.

    m̂ = m/(1 − b1^k) and v̂ = v/(1 − b2^k) count the k steps since the row's own start. Between
    restarts a row is what `optax.adam` would make of it alone. The gradients at a restart are not
    looked at. A cycle is `period` steps of Adam and the restart.

    Adversarial training moves the pool by one step at each step of the model. Attackers of all
    ages then face the current model, for one pass forward and back. That attack steps can be
    carried over while the model trains is the idea of free adversarial training.

    At first the ages are spread evenly over [0, period), so that restarts do not come all at once.
    A row with a head start is replaced after fewer steps; its moments and k are 0 all the same.
    With fewer rows than `period` the rows restart one by one, with pauses between.

    After `optax.apply_updates` a restarted row is at its start to within one unit in the last
    place of the larger of the two, row and start. No update that is added can do better: a large
    row has no digits for a small start. From zeros, and where row and start are of one sign and
    differ by less than a factor of 2, it is at the start exactly. A row that is not finite has no
    way back.

    Args:
      starts: where rows start anew, leaves [starts, ...]. They become constants of a compiled step.
      learning_rate: of Adam.
      period: how many steps of Adam a row takes before it starts anew, at least 1.
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: what is added to the root.
      seed: of the draws of starts. Those of an update depend on it and on `count` alone.

    Returns:
      A transformation of pools, leaves [rows, ...]. Its `update` needs the pool as `params`. The
      updates lower what the gradients are of: give those of the attackers' loss.

    Raises:
      ValueError: for a period that is no integer from 1 to 2³¹ − 1, or no starts. `init` and
        `update` raise it for a pool that is not made like the starts, and `update` without one.

    References:
      Shafahi et al., "Adversarial training for free!", 2019.

    Example:
      Two rows climb by ½ a step, from 0. The second has a head start, and is first to start anew.

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_unlearn import attacks
      >>> starts = jnp.zeros((1, 1))
      >>> pool = attacks.pool_of(starts, 2)
      >>> optimizer = attacks.restarted_adam(starts, learning_rate=0.5, period=2)
      >>> state = optimizer.init(pool)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(-jnp.ones_like(pool), state, pool)
      ...     pool = optax.apply_updates(pool, updates)
      ...     print([round(float(row), 3) for row in pool[:, 0]], state.age.tolist())
      [0.5, 0.5] [1, 2]
      [1.0, 0.0] [2, 0]
      [0.0, 0.5] [0, 1]
    """
    if not 1 <= period < 2**31 or period % 1:
        raise ValueError(f"period must be an integer from 1 to 2**31 - 1, not {period}.")
    starts = jax.tree.map(jnp.asarray, starts)
    number = _length(starts, "starts")
    rate, adam = jnp.asarray(learning_rate), optax.scale_by_adam(b1, b2, eps)

    def rows_of(pool: Any) -> int:
        given, expected = jax.tree.structure(pool), jax.tree.structure(starts)
        if given != expected:
            raise ValueError(f"the pool must be made like the starts, {expected}, not {given}.")
        rows = _length(pool, "rows of the pool")
        shapes = [[list(jnp.shape(x)[1:]) for x in jax.tree.leaves(t)] for t in (pool, starts)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"a row must have the shapes of a start, {shapes[1]}, not {shapes[0]}."
            )
        return rows

    def init(params: Any) -> RestartedAdamState:
        rows = rows_of(params)
        # By numpy, whose integers are long enough for the products.
        age = jnp.asarray(np.arange(rows, dtype=np.int64) * int(period) // rows, jnp.int32)
        moments: Any = adam.init(params)
        return RestartedAdamState(moments.count, age, moments.mu, moments.nu)

    def update(
        updates: Any, state: RestartedAdamState, params: Any = None
    ) -> tuple[Any, RestartedAdamState]:
        if params is None:
            raise ValueError("the pool must be given as params.")
        rows = rows_of(params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        drawn = jax.random.randint(key, (rows,), 0, number)

        def one(age: Array, gradient: Any, mu: Any, nu: Any, row: Any, which: Array) -> Any:
            anew = age >= period
            # A row's age is its steps, but for the head start until its first restart.
            steps = jnp.minimum(age, state.count)
            moved: Any = adam.update(gradient, optax.ScaleByAdamState(steps, mu, nu))
            step, (_, *moments) = moved
            change = jax.tree.map(
                lambda step, row, start: jnp.where(
                    anew, start[which].astype(row.dtype) - row, -rate * step
                ).astype(row.dtype),
                step,
                row,
                starts,
            )
            mu, nu = jax.tree.map(
                lambda moment: jnp.where(anew, jnp.zeros_like(moment), moment), moments
            )
            return change, jnp.where(anew, 0, age + 1), mu, nu

        params = jax.tree.map(jnp.asarray, params)
        change, *rest = jax.vmap(one)(state.age, updates, state.mu, state.nu, params, drawn)
        count: Any = optax.safe_increment(state.count)
        return change, RestartedAdamState(count, *rest)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore


def pool_of(starts: Any, rows: int, *, seed: int = 0) -> Any:
    """A pool to begin with: rows drawn from the starts, leaves [rows, ...].

    Each start is there as often as any other, give or take one, in random order. Chance also
    chooses which starts are there once more.

    Args:
      starts: leaves [starts, ...].
      rows: how many rows, at least one.
      seed: of the draws.

    Raises:
      ValueError: for no rows, or no starts.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import attacks
      >>> sorted(attacks.pool_of(jnp.array([1.0, 2.0]), 4).tolist())
      [1.0, 1.0, 2.0, 2.0]
    """
    if rows < 1:
        raise ValueError(f"a pool has at least 1 row, not {rows}.")
    starts = jax.tree.map(jnp.asarray, starts)
    number = _length(starts, "starts")
    which, order = jax.random.split(jax.random.key(seed))
    turns = jax.random.permutation(which, number)[jnp.arange(rows) % number]
    drawn = jax.random.permutation(order, turns)
    return jax.tree.map(lambda leaf: leaf[drawn], starts)


def _length(tree: Any, what: str) -> int:
    """The one length of the first axes of all leaves."""
    shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the {what} must be arrays of one first axis, at least 1 long, not of shapes {shapes}."
        )
    return lengths.pop()
