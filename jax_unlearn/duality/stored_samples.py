"""λ* from stored samples of q, before any training.

The dual functions of likelihood and reverse-KL constraints depend on q only through the joint law
of h_i, or of log q/q_i, under it. On n samples the dual is a concave function of m numbers, and
is maximised to machine precision. λ* then starts the primal-dual loop, or is the whole solution:
a "tilt" estimator distils p_λ with multipliers that stay.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.duality import solutions
from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "SampledSolution",
    "likelihood_multipliers",
    "likelihood_solver",
    "reverse_kl_multipliers",
]

Solve = Callable[[Array, Array, tuple[int, ...]], solutions.DualSolution]


class SampledSolution(NamedTuple):
    """The exact solution on the samples, and how it varies with them.

    Attributes:
      multipliers: λ*, [m].
      interval: percentile bootstrap interval of λ*, [2, m]; ±∞ where some resamples, see
        `attained`, had no solution. None without a key.
      resampled: λ* of each resample, [resamples, m]; None without a key.
      price_interval: the same interval of the price in nats, [2]. The price itself is
        `solution.primal_value`. None without a key.
      attained: the share of resamples whose dual has its maximum inside the domain, a scalar;
        less than one says that the thresholds are near what these samples can show. None
        without a key.
      effective: (Σw)²/(n Σw²) of the weights w_λ of the samples, in (0, 1]; where n times it is
        a handful, λ* rests on that handful, and the interval is not to be trusted either.
      solution: of the finite problem with the samples as cells: price, gap, `attained`, and
        `largest_thresholds`, which are those of these samples. Look at `solution.attained`.
    """

    multipliers: Array
    interval: Array | None
    resampled: Array | None
    price_interval: Array | None
    attained: Array | None
    effective: Array
    solution: solutions.DualSolution


def likelihood_solver(
    values: ArrayLike, *, groups: ArrayLike | None = None
) -> Callable[[ArrayLike], solutions.DualSolution]:
    """ε ↦ argmax over λ ≥ 0 of −log mean_n exp(−Σ_i λ_i h_i(x_n)) − λᵀε (arXiv 2605.30825).

    The samples are checked here, once. What is returned is a pure function of the thresholds, for
    `jax.jit`, `jax.vmap` and derivatives: those of λ*(ε) follow from the implicit function
    theorem, see `DualSolution`. By the envelope theorem the price has the derivative −λ*.

    The paper's h is a likelihood, not negative. Here any finite h will do: h_i − c with the
    threshold ε_i − c is the same problem, with the same λ*. `quantification` gives such an h.

    With groups the samples are of a family q(·|k), k with its share s_k of them. The dual is then
    −Σ_k s_k log mean_{n∈k} exp(−Σ_i λ_i h_i(x_n)) − λᵀε: no p(·|k) can escape a constraint by
    leaving its share to another.

    Args:
      values: h_i(x_n) at samples x_n of q, [n, m]. Not traced.
      groups: k of each sample, integers [n]; None is one group. Not traced.

    Returns:
      A function from ε [m], in units of h, to a `DualSolution` whose cells are the samples. Its
      multipliers are in nats per unit of h. Look at `attained`.

    Raises:
      ValueError: for shapes that do not fit, or values that are not finite.

    Example:
      One sample in five shows a concept, and λ* = log(0.25 (1−ε)/ε) lets a share ε do so.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn.duality import likelihood_solver
      >>> solve = likelihood_solver([[1.0], [0.0], [0.0], [0.0], [0.0]])
      >>> front = jax.jit(jax.vmap(solve))(jnp.array([[0.2], [0.1], [0.05]]))
      >>> [f"{value:.3f}" for value in front.multipliers[:, 0]]
      ['0.000', '0.811', '1.558']
      >>> [f"{value:.3f}" for value in front.primal_value]
      ['0.000', '0.037', '0.094']
      >>> slope = jax.jacfwd(lambda epsilon: solve(epsilon).multipliers)(jnp.array([0.1]))
      >>> f"{slope[0, 0]:.2f}"
      '-11.11'
    """
    values, sizes, order = _by_group(values, groups)
    places = np.argsort(order)

    def solve(thresholds: ArrayLike) -> solutions.DualSolution:
        found = _solve_likelihood(*_fitting(values, thresholds), sizes)
        return found._replace(log_p=found.log_p[places])

    return solve


def likelihood_multipliers(
    values: ArrayLike,
    thresholds: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    key: Array | None = None,
    resamples: int = 100,
    level: float = 0.95,
) -> SampledSolution:
    """Argmax over λ ≥ 0 of −log mean_n exp(−Σ_i λ_i h_i(x_n)) − λᵀε (arXiv 2605.30825).

    The solution of `likelihood_solver`, which says more, with a bootstrap of the samples.

    Args:
      values: h_i(x_n) at samples x_n of q, [n, m]; in the paper not negative. Not traced.
      thresholds: ε, [m]. These may be traced.
      groups: k of each sample, integers [n]; None is one group. Resamples are drawn within each.
      key: of the bootstrap; None leaves it out.
      resamples: of the bootstrap.
      level: of the intervals, in (0, 1).

    Returns:
      The multipliers, in nats per unit of h, their interval and the whole solution.

    Raises:
      ValueError: for shapes that do not fit, values that are not finite, a level outside (0, 1),
        or no resamples.

    Example:
      >>> import jax
      >>> from jax_unlearn.duality import likelihood_multipliers
      >>> shown = [[1.0]] * 40 + [[0.0]] * 160
      >>> found = likelihood_multipliers(shown, [0.1], key=jax.random.key(0), resamples=50)
      >>> f"λ* {found.multipliers[0]:.3f}, price {found.solution.primal_value:.3f} nats"
      'λ* 0.811, price 0.037 nats'
      >>> low, high = found.interval[:, 0]
      >>> bool(low < found.multipliers[0] < high), bool(found.solution.attained)
      (True, True)
    """
    values, sizes, order = _by_group(values, groups)
    values, bounds = _fitting(values, thresholds)
    # Group by group: a resample that draws within each leaves their places as they are.
    found = _with_bootstrap(_solve_likelihood, values, bounds, sizes, key, resamples, level)
    log_p = found.solution.log_p[np.argsort(order)]
    return found._replace(solution=found.solution._replace(log_p=log_p))


def reverse_kl_multipliers(
    log_ratios: ArrayLike,
    thresholds: ArrayLike,
    *,
    key: Array | None = None,
    resamples: int = 100,
    level: float = 0.95,
) -> SampledSolution:
    """Argmax over λ ≥ 0, Λ < 1 of −(1−Λ) log mean_n Π_i (q/q_i)^{α_i}(x_n) + λᵀb.

    α_i = λ_i/(1−Λ) (arXiv 2605.30825). Where α is large the mean is carried by the few samples
    with the largest ratios: see `SampledSolution.effective`. Divergences larger than log n plus the
    largest log-ratio cannot be seen on n samples.

    Args:
      log_ratios: log q(x_n) − log q_i(x_n) at samples x_n of q, in nats, [n, m]. Not traced.
      thresholds: b in nats, [m]. These may be traced.
      key: of the bootstrap; None leaves it out.
      resamples: of the bootstrap.
      level: of the intervals, in (0, 1).

    Returns:
      The multipliers, their interval and the whole solution.

    Raises:
      ValueError: for shapes that do not fit, ratios that are not finite, a level outside (0, 1),
        or no resamples.

    Example:
      q = (½, ½) and q_1 = (0.9, 0.1), by their ratios at one sample of each cell. KL(q‖q_1) is
      0.511 nats, and KL(p‖q_1) = 0.8 asks for p = (0.381, 0.619).

      >>> import numpy as np
      >>> from jax_unlearn.duality import reverse_kl_multipliers
      >>> log_ratios = np.log([[0.5 / 0.9], [0.5 / 0.1]])
      >>> found = reverse_kl_multipliers(log_ratios, [0.8])
      >>> f"λ* {found.multipliers[0]:.3f}, price {found.solution.primal_value:.3f} nats"
      'λ* 0.180, price 0.028 nats'
      >>> [f"{mass:.3f}" for mass in np.exp(found.solution.log_p)]
      ['0.381', '0.619']
    """
    log_ratios, bounds = _fitting(_finite(log_ratios), thresholds)
    sizes = log_ratios.shape[:1]
    return _with_bootstrap(_solve_reverse_kl, log_ratios, bounds, sizes, key, resamples, level)


def _uniform(values: Array) -> Array:
    return jnp.full(values.shape[:1], -jnp.log(values.shape[0]), values.dtype)


# Under jit, where the solver asks no q_i to sum to one: on samples they do so only on average.
@partial(jax.jit, static_argnums=2)
def _solve_likelihood(
    values: Array, bounds: Array, sizes: tuple[int, ...]
) -> solutions.DualSolution:
    groups = None
    if len(sizes) > 1:
        groups = np.repeat(np.arange(len(sizes)), sizes) == np.arange(len(sizes))[:, None]
    # The solver takes h ≥ 0; h and ε less the same number pose the same problem.
    shift = jnp.minimum(values.min(axis=0), 0.0)
    # TPUs and some GPUs otherwise round λᵀh to fewer digits than differences of λ* can bear.
    with jax.default_matmul_precision("highest"):
        found = solutions.solve_likelihood(
            _uniform(values), (values - shift).T, bounds - shift, groups=groups
        )
    return found._replace(largest_thresholds=found.largest_thresholds + shift)


@partial(jax.jit, static_argnums=2)
def _solve_reverse_kl(
    log_ratios: Array, bounds: Array, sizes: tuple[int, ...]
) -> solutions.DualSolution:
    del sizes
    log_q = _uniform(log_ratios)
    with jax.default_matmul_precision("highest"):
        return solutions.solve_reverse_kl(log_q, log_q - log_ratios.T, bounds)


@partial(jax.jit, static_argnums=(0, 4))
def _resample(
    solve: Solve, keys: Array, values: Array, bounds: Array, sizes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    counts = np.repeat(sizes, sizes)

    def resolve(key: Array) -> tuple[Array, Array, Array]:
        rows = starts + jax.random.randint(key, values.shape[:1], 0, counts)
        found = solve(values[rows], bounds, sizes)
        return found.multipliers, found.primal_value, found.attained

    return jax.lax.map(resolve, keys)


# What is checked is data, and in numpy: in jax a check would be traced under the caller's jit.
def _finite(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, jnp.result_type(float))
    if values.ndim != 2 or not len(values):
        raise ValueError(f"expected values [n, m] at one sample or more, got {list(values.shape)}.")
    if not np.isfinite(values).all():
        raise ValueError("values at the samples must be finite.")
    return values


def _by_group(
    values: ArrayLike, groups: ArrayLike | None
) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """The values group by group, the size of each group, and the order that sorts them."""
    values = _finite(values)
    groups = np.zeros(len(values), int) if groups is None else np.asarray(groups)
    if groups.shape != values.shape[:1]:
        raise ValueError(f"expected groups [{len(values)}], got {list(groups.shape)}.")
    order = np.argsort(groups, kind="stable")
    sizes = tuple(np.unique(groups, return_counts=True)[1].tolist())
    return values[order], sizes, order


def _fitting(values: np.ndarray, thresholds: ArrayLike) -> tuple[Array, Array]:
    dtype = jnp.result_type(float)
    bounds = jnp.asarray(thresholds, dtype)
    if values.shape[1:] != bounds.shape:
        raise ValueError(
            f"expected values [n, m] and thresholds [m], got {list(values.shape)} and "
            f"{list(bounds.shape)}."
        )
    return jnp.asarray(values, dtype), bounds


def _interval(resampled: Array, attained: Array, level: float) -> Array:
    """Percentiles of the resamples, [2, ...]; one without a solution counts as ∓∞."""
    attained = attained.reshape(-1, *(1,) * (resampled.ndim - 1))
    tail = 0.5 * (1.0 - level)
    low, high = (jnp.where(attained, resampled, end) for end in (-jnp.inf, jnp.inf))
    return jnp.stack([jnp.quantile(low, tail, axis=0), jnp.quantile(high, 1.0 - tail, axis=0)])


def _with_bootstrap(
    solve: Solve,
    values: Array,
    bounds: Array,
    sizes: tuple[int, ...],
    key: Array | None,
    resamples: int,
    level: float,
) -> SampledSolution:
    """Sizes are those of the groups, which follow one another."""
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            "expected at least one resample and a level inside (0, 1), got "
            f"{resamples} and {level}."
        )
    solution = solve(values, bounds, sizes)
    weights = jnp.exp(solution.log_p)
    effective = 1.0 / (values.shape[0] * jnp.square(weights).sum())
    interval = resampled = price_interval = share = None
    if key is not None:
        keys = jax.random.split(key, resamples)
        resampled, prices, attained = _resample(solve, keys, values, bounds, sizes)
        interval = _interval(resampled, attained, level)
        price_interval = _interval(prices, attained, level)
        share = attained.mean()
    return SampledSolution(
        solution.multipliers, interval, resampled, price_interval, share, effective, solution
    )
