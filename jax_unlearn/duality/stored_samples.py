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

from jax_unlearn import duality
from jax_unlearn.typing import Array, ArrayLike, Estimate

__all__ = [
    "DualFirst",
    "likelihood_correction",
    "likelihood_multipliers",
    "reverse_kl_multipliers",
]

Solve = Callable[[Array, Array, tuple[int, ...]], duality.DualSolution]


class DualFirst(NamedTuple):
    """The exact solution on the samples, and how it varies with them.

    Attributes:
      multipliers: λ*, [m].
      interval: percentile bootstrap interval of λ*, [2, m]; ±∞ where some resamples, see
        `attained`, had no solution. None without a key.
      resampled: λ* of each resample, [resamples, m]; None without a key.
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
    attained: Array | None
    effective: Array
    solution: duality.DualSolution


def likelihood_multipliers(
    values: ArrayLike,
    thresholds: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    key: Array | None = None,
    resamples: int = 100,
    level: float = 0.95,
) -> DualFirst:
    """Argmax over λ ≥ 0 of −log mean_n exp(−Σ_i λ_i h_i(x_n)) − λᵀε (arXiv 2605.30825).

    With groups the samples are of a family q(·|k), k with its share s_k of them, and the dual is
    −Σ_k s_k log mean_{n∈k} exp(−Σ_i λ_i h_i(x_n)) − λᵀε: no p(·|k) can escape a constraint by
    leaving its share to another.

    Args:
      values: h_i(x_n) ≥ 0 at samples x_n of q, [n, m].
      thresholds: ε, [m].
      groups: k of each sample, integers [n]; None is one group. Resamples are drawn within each.
      key: of the bootstrap; None leaves it out.
      resamples: of the bootstrap.
      level: of the interval, in (0, 1).

    Returns:
      The multipliers, in nats per unit of h, their interval and the whole solution.

    Raises:
      ValueError: for shapes that do not fit, values that are negative or not finite, a level
        outside (0, 1), or no resamples.
    """
    values, bounds = _checked(values, thresholds)
    if not bool((values >= 0).all()):
        raise ValueError("likelihoods must not be negative.")
    groups = np.zeros(len(values), int) if groups is None else np.asarray(groups)
    if groups.shape != values.shape[:1]:
        raise ValueError(f"expected groups [{len(values)}], got {list(groups.shape)}.")
    # Group by group: a resample that draws within each leaves their places as they are.
    order = np.argsort(groups, kind="stable")
    sizes = tuple(np.unique(groups, return_counts=True)[1].tolist())
    found = _with_bootstrap(_solve_likelihood, values[order], bounds, sizes, key, resamples, level)
    log_p = found.solution.log_p[np.argsort(order)]
    return found._replace(solution=found.solution._replace(log_p=log_p))


def likelihood_correction(
    shown: Estimate,
    thresholds: ArrayLike,
    multipliers: ArrayLike,
    *,
    stored: ArrayLike,
    groups: ArrayLike | None = None,
    margin: float = 0.0,
) -> Array:
    """A step of dual ascent from samples of the model itself, in place of q's.

    λ + g (λ*(ε) − λ*(E h)), where E h is the model's and λ*(·) maximises the dual function of the
    stored samples of q: a network that has distilled only a part of p_λ shows what p_λ′ does,
    λ′ = λ*(E h), and g = max(1, |λ|₁/|λ′|₁) says how much more λ it takes than p_λ would. If it
    keeps following as large a part, one step is all. No λ_i falls by more than half, or rises by
    more than max(λ_i, 1).

    Args:
      shown: E h_i of the model, [m], with its standard error.
      thresholds: ε, [m].
      multipliers: λ, [m], in nats per unit of h.
      stored: h_i at samples of q, as `likelihood_multipliers` takes them.
      groups: of the stored samples.
      margin: standard errors of E h to be added to it, so that constraints hold beyond chance.

    Returns:
      The new multipliers, [m].

    Raises:
      ValueError: for shapes that do not fit, or numbers that are not finite.
    """
    stored, thresholds = _checked(stored, thresholds)
    given = (shown.value, shown.stderr, multipliers)
    value, stderr, multipliers = (jnp.asarray(part, stored.dtype) for part in given)
    if not thresholds.shape == value.shape == stderr.shape == multipliers.shape:
        raise ValueError(
            f"expected {len(thresholds)} values, errors and multipliers, got {list(value.shape)}, "
            f"{list(stderr.shape)} and {list(multipliers.shape)}."
        )
    if not bool(jnp.isfinite(value + stderr).all()):
        raise ValueError("what the model shows must be finite.")
    asked, followed, reached = (
        likelihood_multipliers(stored, bound, groups=groups).multipliers
        for bound in (thresholds, value, value + margin * stderr)
    )
    least = jnp.finfo(stored.dtype).eps
    gain = jnp.maximum(multipliers.sum() / jnp.maximum(followed.sum(), least), 1.0)
    step = gain * (asked - reached)
    return multipliers + jnp.clip(step, -0.5 * multipliers, jnp.maximum(multipliers, 1.0))


def reverse_kl_multipliers(
    log_ratios: ArrayLike,
    thresholds: ArrayLike,
    *,
    key: Array | None = None,
    resamples: int = 100,
    level: float = 0.95,
) -> DualFirst:
    """Argmax over λ ≥ 0, Λ < 1 of −(1−Λ) log mean_n Π_i (q/q_i)^{α_i}(x_n) + λᵀb.

    α_i = λ_i/(1−Λ) (arXiv 2605.30825). Where α is large the mean is carried by the few samples
    with the largest ratios: see `DualFirst.effective`. Divergences larger than log n plus the
    largest log-ratio cannot be seen on n samples.

    Args:
      log_ratios: log q(x_n) − log q_i(x_n) at samples x_n of q, in nats, [n, m].
      thresholds: b in nats, [m].
      key: of the bootstrap; None leaves it out.
      resamples: of the bootstrap.
      level: of the interval, in (0, 1).

    Returns:
      The multipliers, their interval and the whole solution.

    Raises:
      ValueError: for shapes that do not fit, ratios that are not finite, a level outside (0, 1),
        or no resamples.
    """
    log_ratios, bounds = _checked(log_ratios, thresholds)
    one = log_ratios.shape[:1]
    return _with_bootstrap(_solve_reverse_kl, log_ratios, bounds, one, key, resamples, level)


def _uniform(values: Array) -> Array:
    return jnp.full(values.shape[:1], -jnp.log(values.shape[0]), values.dtype)


# Under jit, where the solver asks no q_i to sum to one: on samples they do so only on average.
@partial(jax.jit, static_argnums=2)
def _solve_likelihood(values: Array, bounds: Array, sizes: tuple[int, ...]) -> duality.DualSolution:
    groups = None
    if len(sizes) > 1:
        groups = np.repeat(np.arange(len(sizes)), sizes) == np.arange(len(sizes))[:, None]
    return duality.solve_likelihood(_uniform(values), values.T, bounds, groups=groups)


@partial(jax.jit, static_argnums=2)
def _solve_reverse_kl(
    log_ratios: Array, bounds: Array, sizes: tuple[int, ...]
) -> duality.DualSolution:
    del sizes
    log_q = _uniform(log_ratios)
    return duality.solve_reverse_kl(log_q, log_q - log_ratios.T, bounds)


@partial(jax.jit, static_argnums=(0, 4))
def _resample(
    solve: Solve, keys: Array, values: Array, bounds: Array, sizes: tuple[int, ...]
) -> tuple[Array, Array]:
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    counts = np.repeat(sizes, sizes)

    def one(key: Array) -> tuple[Array, Array]:
        rows = starts + jax.random.randint(key, values.shape[:1], 0, counts)
        found = solve(values[rows], bounds, sizes)
        return found.multipliers, found.attained

    return jax.lax.map(one, keys)


def _checked(values: ArrayLike, thresholds: ArrayLike) -> tuple[Array, Array]:
    dtype = jnp.result_type(float)
    values, thresholds = jnp.asarray(values, dtype), jnp.asarray(thresholds, dtype)
    if values.ndim != 2 or values.shape[1:] != thresholds.shape:
        raise ValueError(
            f"expected values [n, m] and thresholds [m], got {list(values.shape)} and "
            f"{list(thresholds.shape)}."
        )
    if not bool(jnp.isfinite(values).all()):
        raise ValueError("values at the samples must be finite.")
    return values, thresholds


def _with_bootstrap(
    solve: Solve,
    values: Array,
    bounds: Array,
    sizes: tuple[int, ...],
    key: Array | None,
    resamples: int,
    level: float,
) -> DualFirst:
    """Sizes are those of the groups, which follow one another."""
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            "expected at least one resample and a level inside (0, 1), got "
            f"{resamples} and {level}."
        )
    solution = solve(values, bounds, sizes)
    weights = jnp.exp(solution.log_p)
    effective = 1.0 / (values.shape[0] * jnp.square(weights).sum())
    if key is None:
        return DualFirst(solution.multipliers, None, None, None, effective, solution)

    resampled, attained = _resample(solve, jax.random.split(key, resamples), values, bounds, sizes)
    tail = 0.5 * (1.0 - level)
    unbounded = jnp.where(attained[:, None], resampled, jnp.inf)
    interval = jnp.stack(
        [
            jnp.quantile(jnp.where(attained[:, None], resampled, -jnp.inf), tail, axis=0),
            jnp.quantile(unbounded, 1.0 - tail, axis=0),
        ]
    )
    return DualFirst(
        solution.multipliers, interval, resampled, attained.mean(), effective, solution
    )
