"""The minimisers of the three Lagrangians and their dual functions, on finite spaces.

A finite space is n cells: `log_q` [n] are the log masses of the reference q, row i of
`log_q_unlearn` [m, n] those of q_i, row i of `likelihoods` [m, n] the values h_i ≥ 0. Each mass
function sums to one; −inf is an empty cell. Λ = Σ_i λ_i, and all values are in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "dual_forward_kl",
    "dual_likelihood",
    "dual_reverse_kl",
    "tilt_forward_kl",
    "tilt_likelihood",
    "tilt_reverse_kl",
]


class Point(NamedTuple):
    """What a formulation says at one λ. `dual` is −inf outside the domain, the rest then void.

    `margin` is the distance to the domain's edge: 1 − Λ, min_x w_λ(x), or ∞.
    """

    dual: Array
    violations: Array
    log_p: Array
    margin: Array


class Problem(NamedTuple):
    """A formulation on a finite space, in the coordinates λ = unit · ν.

    Attributes:
      point: ν -> Point.
      curvature: (ν, Point) -> −∂²g/∂ν² [m, m].
      wall: ν -> a concave barrier at the domain's edges besides ν ≥ 0: its value, gradient [m]
        and negated second derivative [m, m].
      objective: log_p -> the objective in nats.
      unit: of λ, [m]; constants that keep ν near one.
      size: what a violation is measured by, [m].
      free: constraints that q itself meets with an infinite value, bool [m].
      ceiling: no feasible p costs more: a larger dual value proves that there is none.
      largest: the furthest threshold of each constraint alone, [m].
      beyond: thresholds that no p meets, bool [m].
    """

    point: Callable[[Array], Point]
    curvature: Callable[[Array, Point], Array]
    wall: Callable[[Array], tuple[Array, Array, Array]]
    objective: Callable[[Array], Array]
    unit: Array
    size: Array
    free: Array
    ceiling: Array
    largest: Array
    beyond: Array


def _floats(*arrays: ArrayLike) -> tuple[Array, ...]:
    dtype = jnp.result_type(float)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def _expect(p: Array, values: Array) -> Array:
    """Σ_x p(x) values(x), where 0 · ∞ is 0 and so is its derivative."""
    return jnp.sum(p * jnp.where(p > 0, values, 0.0), axis=-1)


def _outer(p: Array, rows: Array) -> Array:
    """Σ_x p(x) rows_i(x) rows_j(x), [m, m]."""
    return (rows * p) @ rows.T


def _covariance(p: Array, rows: Array, groups: Array) -> Array:
    """Σ_k p(k) Cov(rows | group k), [m, m]."""
    rows, masses = jnp.where(p > 0, rows, 0.0), groups @ p
    means = (rows * p) @ groups.T / jnp.where(masses > 0, masses, 1.0)
    return _outer(p, rows - means @ groups)


def mixed_problem(
    log_q: Array,
    rows: tuple[Array, Array],
    thresholds: Array,
    groups: Array | None = None,
) -> Problem:
    """KL(p‖q) → min subject to KL(p‖q_i) ≥ b_i and E_p[h_j] ≤ ε_j; rows are (log q_i, h_j).

    Both kinds are E_p[f_i] ≥ ±threshold of one function: f_i = log p − log q_i, or f_j = −h_j. The
    second derivative of the dual is −Cov_p(f)/(1−Λ), Λ the sum over the first kind. With groups of
    cells (bool [k, n]; only without q_i) p must keep q's mass of each. Then p_λ is the tilt within
    each group, g sums over them with these masses, and the covariance is that within.
    """
    log_q_unlearn, likelihoods = rows
    is_kl = jnp.arange(thresholds.shape[0]) < log_q_unlearn.shape[0]
    support = jnp.isfinite(log_q)
    # Such a q_i lacks mass that q has: KL(p‖q_i) is infinite, and its constraint met, for free.
    hollow = jnp.any(support & ~jnp.isfinite(log_q_unlearn), axis=1)
    q = jnp.exp(log_q)
    members = jnp.ones((1, q.shape[0]), bool) if groups is None else groups
    inside = members & support
    groups, masses = members.astype(q.dtype), jnp.where(inside, q, 0.0).sum(axis=1)
    if members.shape[0] == 1:  # It sums to one whatever the rounding, and has no derivative.
        masses = jnp.ones_like(masses)
    log_masses = jnp.log(jnp.where(masses > 0, masses, 1.0))
    log_q = jnp.where(support, log_q, 0.0)
    # A free constraint becomes KL(p‖q) ≥ −1, which binds nowhere and has finite derivatives.
    logs = jnp.where(support & ~hollow[:, None], log_q_unlearn, log_q)
    h = jnp.where(support, likelihoods, 0.0)
    average = jax.lax.stop_gradient(h @ q)
    free = jnp.concatenate([hollow, jnp.zeros(average.shape, bool)])
    thresholds = jnp.where(free, -1.0, thresholds)
    offsets = jnp.concatenate([logs, h])
    kinds = is_kl.astype(log_q.dtype)
    signs = 2 * kinds - 1
    # λ_j multiplies h_j, whose scale is the user's: ν_j = λ_j E_q[h_j] has none.
    unit = jnp.concatenate([jnp.ones_like(logs[:, 0]), jnp.where(average > 0, 1 / average, 1.0)])
    # What ε_j near 0, which has no size of its own, is measured by.
    smallest = jnp.sqrt(jnp.finfo(q.dtype).eps) * jnp.where(average > 0, average, 1.0)

    def functions(log_p: Array) -> Array:
        return jnp.where(is_kl[:, None], log_p, 0.0) - offsets

    def point(scaled: Array) -> Point:
        multipliers = unit * scaled
        margin = 1.0 - multipliers @ kinds
        power = jnp.where(margin > 0, margin, 1.0)  # outside the domain all but `dual` is void
        logits = (log_q - multipliers @ offsets) / power
        # A group without mass has the weight 0, but its sum must be finite for that to hold.
        every = jnp.where(inside.any(axis=1)[:, None], inside, True)
        log_sums = (
            jax.nn.logsumexp(jnp.broadcast_to(logits, every.shape), axis=1, where=every)
            - log_masses
        )
        log_p = jnp.where(support, logits - log_sums @ groups, -jnp.inf)
        violations = signs * thresholds - _expect(jnp.exp(log_p), functions(log_p))
        dual = multipliers @ (signs * thresholds) - power * (masses @ log_sums)
        margin = jnp.where(kinds.sum() > 0, margin, jnp.inf)
        return Point(jnp.where(margin > 0, dual, -jnp.inf), violations, log_p, margin)

    def curvature(scaled: Array, at: Point) -> Array:
        rows = unit[:, None] * functions(at.log_p)
        return _covariance(jnp.exp(at.log_p), rows, groups) / (1.0 - (unit * scaled) @ kinds)

    def wall(scaled: Array) -> tuple[Array, Array, Array]:
        inverse = 1.0 / (1.0 - (unit * scaled) @ kinds)
        return -jnp.log(inverse), -inverse * kinds, inverse**2 * jnp.outer(kinds, kinds)

    # Alone, KL(p‖q_i) is greatest for all mass in the cell of least q_i, and E_p[h_j] smallest for
    # all mass of each group in its cell of least h_j.
    most = jnp.max(-logs, axis=1, where=support, initial=0.0)
    least = jnp.min(
        jnp.broadcast_to(h[:, None], (h.shape[0], *inside.shape)),
        axis=2,
        where=inside,
        initial=jnp.inf,
    )
    least = jnp.where(masses > 0, least, 0.0) @ masses
    furthest = jnp.concatenate([jnp.where(hollow, jnp.inf, most), least])
    rounding = 8 * jnp.finfo(q.dtype).eps
    return Problem(
        point,
        curvature,
        wall,
        objective=lambda log_p: _expect(jnp.exp(log_p), log_p - log_q),
        unit=unit,
        size=jnp.where(
            is_kl,
            1.0 + jnp.abs(thresholds),
            jnp.maximum(jnp.abs(thresholds), jnp.append(jnp.zeros_like(most), smallest)),
        ),
        free=free,
        ceiling=jnp.max(-log_q, where=support, initial=0.0),
        largest=furthest,
        beyond=signs * thresholds > signs * furthest * (1 + signs * rounding),
    )


def reverse_kl_problem(log_q: Array, log_q_unlearn: Array, thresholds: Array) -> Problem:
    """KL(p‖q) → min subject to KL(p‖q_i) ≥ b_i."""
    return mixed_problem(log_q, (log_q_unlearn, log_q_unlearn[:0]), thresholds)


def likelihood_problem(log_q: Array, likelihoods: Array, thresholds: Array) -> Problem:
    """KL(p‖q) → min subject to E_p[h_i] ≤ ε_i."""
    return mixed_problem(log_q, (likelihoods[:0], likelihoods), thresholds)


def grouped_problem(log_q: Array, rows: tuple[Array, Array], thresholds: Array) -> Problem:
    """The same for a p that has q's mass of each group; rows are (h_i [m, n], groups [k, n])."""
    likelihoods, groups = rows
    return mixed_problem(log_q, (likelihoods[:0], likelihoods), thresholds, groups)


def forward_kl_problem(log_q: Array, log_q_unlearn: Array, thresholds: Array) -> Problem:
    """KL(q‖p) → min subject to KL(q_i‖p) ≥ b_i.

    The second derivative of the dual is −Σ_x q_i q_j / r + 1/(1−Λ), with r = q − Σ_i λ_i q_i.
    """
    support = jnp.isfinite(log_q)
    # Such a q_i has mass where q has none: KL(q_i‖q) is infinite, its constraint met, for free.
    free = jnp.any(~support & jnp.isfinite(log_q_unlearn), axis=1)
    q = jnp.exp(log_q)
    log_q = jnp.where(support, log_q, 0.0)
    rows = jnp.where(free[:, None], jnp.where(support, log_q, -jnp.inf), log_q_unlearn)
    thresholds = jnp.where(free, -1.0, thresholds)
    masses = jnp.exp(rows)
    log_ratios = jnp.where(jnp.isfinite(rows), rows - log_q, -jnp.inf)
    # λ_i q_i ≤ q alone ends at λ_i = min q/q_i, which is `unit`: there ν_i = 1.
    shift = jax.lax.stop_gradient(jnp.max(log_ratios, axis=1))
    unit = jnp.exp(-shift)
    ratios = jnp.exp(log_ratios - shift[:, None])  # at most one
    prices = thresholds - _expect(masses, log_ratios)

    def point(scaled: Array) -> Point:
        weights = 1.0 - scaled @ ratios
        margin = jnp.min(weights, where=support, initial=jnp.inf)
        inside = (margin > 0) & support
        log_w = jnp.log(jnp.where(inside, weights, 1.0))
        rest = jnp.where(inside, q * weights, 0.0)
        total = jnp.where(margin > 0, rest.sum(), 1.0)
        log_p = jnp.where(support, log_q + log_w - jnp.log(total), -jnp.inf)
        dual = (unit * scaled) @ prices - _expect(rest, log_w) + total * jnp.log(total)
        violations = thresholds - _expect(masses, rows - log_p)
        return Point(jnp.where(margin > 0, dual, -jnp.inf), violations, log_p, margin)

    def curvature(scaled: Array, at: Point) -> Array:
        weights = jnp.where(support & (at.margin > 0), 1.0 - scaled @ ratios, 1.0)
        return _outer(q / weights, ratios) - jnp.outer(unit, unit) / jnp.sum(q * weights)

    def wall(scaled: Array) -> tuple[Array, Array, Array]:
        weights = jnp.where(support, 1.0 - scaled @ ratios, 1.0)
        gradient = -ratios @ (q / weights)
        return q @ jnp.log(weights), gradient, _outer(q / weights**2, ratios)

    # The edge of λ_i alone lies at ν_i = 1; what it gives besides the cells that it empties.
    weights = 1.0 - ratios
    kept = support & (weights > jnp.finfo(q.dtype).eps ** 0.75)
    total = jnp.sum(q * jnp.where(kept, weights, 0.0), axis=1, keepdims=True)
    log_edge = jnp.log(jnp.where(kept, weights, 1.0)) - jnp.log(jnp.where(total > 0, total, 1.0))
    largest = _expect(jnp.where(kept, masses, 0.0), log_ratios - log_edge)
    return Problem(
        point,
        curvature,
        wall,
        objective=lambda log_p: _expect(q, log_q - log_p),
        unit=unit,
        size=1.0 + jnp.abs(thresholds),
        free=free,
        ceiling=jnp.asarray(jnp.inf, log_q.dtype),
        largest=jnp.where(free, jnp.inf, largest),
        beyond=jnp.zeros(thresholds.shape, bool),
    )


def _dual(problem: Problem, multipliers: Array) -> Array:
    inside = jnp.all(jnp.where(problem.free, multipliers == 0, multipliers >= 0))
    return jnp.where(inside, problem.point(multipliers / problem.unit).dual, -jnp.inf)


def _tilt(problem: Problem, multipliers: Array) -> Array:
    at = problem.point(multipliers / problem.unit)
    inside = jnp.all(jnp.where(problem.free, multipliers == 0, multipliers >= 0))
    return jnp.where(inside & (at.margin > 0), at.log_p, jnp.nan)


def _zeros(log_q_unlearn: Array) -> Array:
    return jnp.zeros(log_q_unlearn.shape[:1], log_q_unlearn.dtype)


def dual_reverse_kl(
    multipliers: ArrayLike, log_q: ArrayLike, log_q_unlearn: ArrayLike, thresholds: ArrayLike
) -> Array:
    """g(λ) = −(1−Λ) log E_q[Π_i (q/q_i)^{α_i}] + λᵀb, α_i = λ_i/(1−Λ); nats, a scalar.

    The infimum over p of KL(p‖q) + Σ_i λ_i (b_i − KL(p‖q_i)), concave in λ, with gradient
    b_i − KL(p_λ‖q_i). Its domain is λ ≥ 0, Λ < 1, and λ_i = 0 where q_i lacks mass that q has
    (KL(p‖q_i) is then infinite for free); −inf outside. Source: arXiv 2605.30825.

    Args:
      multipliers: λ, [m].
      log_q: [n].
      log_q_unlearn: [m, n].
      thresholds: b in nats, [m].

    Example:
      Two cells. At λ = 1/2, α is 1 and E_q[q/q_1] = ½ (2/3 + 2) = 4/3, so that
      g = −½ log(4/3) + ½ b = −0.1438 + 0.1.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> round(float(duality.dual_reverse_kl([0.5], log_q, log_q_1, [0.2])), 4)
      -0.0438
    """
    multipliers, *data = _floats(multipliers, log_q, log_q_unlearn, thresholds)
    return _dual(reverse_kl_problem(*data), multipliers)


def dual_forward_kl(
    multipliers: ArrayLike, log_q: ArrayLike, log_q_unlearn: ArrayLike, thresholds: ArrayLike
) -> Array:
    """g(λ) = Σ_i λ_i (b_i − KL(q_i‖q)) − Σ_x r log(r/q) + (1−Λ) log(1−Λ), r = q − Σ_i λ_i q_i.

    The infimum over p of KL(q‖p) + Σ_i λ_i (b_i − KL(q_i‖p)) in nats, a scalar, concave in λ,
    with gradient b_i − KL(q_i‖p_λ). Its domain is λ ≥ 0, r > 0 on q's support, and λ_i = 0
    where q_i has mass that q lacks; −inf outside. Source: arXiv 2605.30825.

    Args: as `dual_reverse_kl`.

    Example:
      Two cells. At λ = 1/2, p_λ = (1/4, 3/4), KL(q‖p_λ) = 0.1438 and KL(q_1‖p_λ) = 0.5493, so that
      g = 0.1438 + ½ (0.5 − 0.5493).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> round(float(duality.dual_forward_kl([0.5], log_q, log_q_1, [0.5])), 4)
      0.1192
    """
    multipliers, *data = _floats(multipliers, log_q, log_q_unlearn, thresholds)
    return _dual(forward_kl_problem(*data), multipliers)


def dual_likelihood(
    multipliers: ArrayLike, log_q: ArrayLike, likelihoods: ArrayLike, thresholds: ArrayLike
) -> Array:
    """g(λ) = −log E_q[exp(−Σ_i λ_i h_i)] − λᵀε in nats, a scalar; −inf unless λ ≥ 0.

    The infimum over p of KL(p‖q) + Σ_i λ_i (E_p[h_i] − ε_i), concave in λ, with gradient
    E_{p_λ}[h_i] − ε_i. Source: arXiv 2605.30825.

    Args:
      multipliers: λ in nats per unit of h, [m].
      log_q: [n].
      likelihoods: h ≥ 0, [m, n].
      thresholds: ε in units of h, [m].

    Example:
      h is 1 in the first of two cells. At λ = log 3, E_q[e^{−λh}] = ½ (1/3 + 1) = 2/3, so that
      g = −log(2/3) − ¼ log 3.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q = jnp.log(jnp.array([0.5, 0.5]))
      >>> g = duality.dual_likelihood(jnp.log(jnp.array([3.0])), log_q, [[1.0, 0.0]], [0.25])
      >>> round(float(g), 4)
      0.1308
    """
    multipliers, *data = _floats(multipliers, log_q, likelihoods, thresholds)
    return _dual(likelihood_problem(*data), multipliers)


def tilt_reverse_kl(multipliers: ArrayLike, log_q: ArrayLike, log_q_unlearn: ArrayLike) -> Array:
    """The log masses [n] of p_λ ∝ q Π_i (q/q_i)^{α_i}, α_i = λ_i/(1−Λ); nan outside the domain.

    Equally p_λ ∝ (q / Π_i q_i^{λ_i})^{1/(1−Λ)}. Source: arXiv 2605.30825.

    Args: as `dual_reverse_kl`.

    Example:
      At λ = 1/2, p_λ ∝ q²/q_1 = (1/3, 1).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> [round(float(p), 3) for p in jnp.exp(duality.tilt_reverse_kl([0.5], log_q, log_q_1))]
      [0.25, 0.75]
    """
    multipliers, log_q, rows = _floats(multipliers, log_q, log_q_unlearn)
    return _tilt(reverse_kl_problem(log_q, rows, _zeros(rows)), multipliers)


def tilt_forward_kl(multipliers: ArrayLike, log_q: ArrayLike, log_q_unlearn: ArrayLike) -> Array:
    """The log masses [n] of p_λ = (q − Σ_i λ_i q_i) / (1−Λ); nan outside the domain.

    Source: arXiv 2605.30825.

    Args: as `dual_forward_kl`.

    Example:
      At λ = 1/2, q − ½ q_1 = (1/8, 3/8).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> [round(float(p), 3) for p in jnp.exp(duality.tilt_forward_kl([0.5], log_q, log_q_1))]
      [0.25, 0.75]
    """
    multipliers, log_q, rows = _floats(multipliers, log_q, log_q_unlearn)
    return _tilt(forward_kl_problem(log_q, rows, _zeros(rows)), multipliers)


def tilt_likelihood(multipliers: ArrayLike, log_q: ArrayLike, likelihoods: ArrayLike) -> Array:
    """The log masses [n] of p_λ ∝ q exp(−Σ_i λ_i h_i); nan unless λ ≥ 0.

    Source: arXiv 2605.30825.

    Args: as `dual_likelihood`.

    Example:
      h is 1 in the first of two equal cells: at λ = log 3, p_λ ∝ (1/3, 1).

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, multipliers = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([3.0]))
      >>> log_p = duality.tilt_likelihood(multipliers, log_q, [[1.0, 0.0]])
      >>> [round(float(p), 3) for p in jnp.exp(log_p)]
      [0.25, 0.75]
    """
    multipliers, log_q, rows = _floats(multipliers, log_q, likelihoods)
    return _tilt(likelihood_problem(log_q, rows, _zeros(rows)), multipliers)
