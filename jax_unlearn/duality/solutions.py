"""Exact solutions on finite spaces, from the concave dual, differentiable in all their data."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_unlearn.duality import closed_forms
from jax_unlearn.typing import Array, ArrayLike

__all__ = ["DualSolution", "solve_forward_kl", "solve_likelihood", "solve_reverse_kl"]


class DualSolution(NamedTuple):
    """What the dual of a finite problem says, m constraints over n cells.

    **What is certain.** The dual function is differentiable inside its domain, with the
    violations of p_λ as gradient. Where its maximum is attained there (`attained`), p_λ
    therefore meets every constraint and λ_i violation_i = 0, so that it is optimal and the gap
    is zero, on any space, however coarse, although RU and FU are not convex in p. A gap appears
    where the maximum sits on the edge of the domain, Λ → 1 (RU), p_λ → 0 somewhere (FU) or
    λ → ∞ (LU). In a space without atoms strong duality holds there too, since mass can be split
    at will (arXiv 2605.30825); in a finite one the best p is then no tilt, and the dual value
    is a lower bound of its price and no more. For FU this happens on a finite space only where
    q is itself a mixture of the q_i; elsewhere log p = −∞ is approached, at a price.

    **Derivatives** of `multipliers` follow from the implicit function theorem; the optimality
    condition is the natural residual ν − [ν + a violation(ν)]_+ = 0 of the KKT conditions, in
    units ν = λ/unit that keep ν near one. They serve thresholds, log masses and likelihoods, in
    forward and reverse mode, under jit and vmap, and every other field is differentiated
    through λ. Envelope: dP*/db_i = λ_i (RU, FU), dP*/dε_i = −λ_i (LU). At a weakly active
    constraint (λ_i = 0 and violation_i = 0) λ* has two one-sided derivatives; that of the
    inactive side is given. Where λ is not unique (q_i that coincide) the one of least norm in ν
    is given. Where the optimum is not attained derivatives are nan.

    Attributes:
      multipliers: λ, [m]; where not `attained`, the point at which the ascent stopped.
      log_p: log p_λ, [n].
      primal_value: the objective at p_λ in nats; ∞ where p_λ violates a constraint.
      dual_value: g(λ) in nats, a lower bound of the optimum in any case; ∞ where it is proven
        that no p meets the thresholds: one lies beyond `largest_thresholds` (RU, LU), or g
        exceeds what the costliest p costs, max −log q.
      gap: primal_value − dual_value; ∞ where p_λ violates a constraint.
      violations: b_i − KL (RU, FU) or E_p[h_i] − ε_i (LU) at p_λ, [m]; −∞ for a constraint that
        q itself meets with an infinite KL. Where not `attained`, the thresholds less (LU: plus)
        the positive violations are ones that the same λ comes close to solving, jointly.
      feasible: whether p_λ meets every constraint, up to rounding.
      attained: whether the maximum of the dual lies inside the domain: `feasible`, and
        complementary slackness holds up to rounding. The solution is good only if so.
      largest_thresholds: the furthest that each constraint could be asked alone, [m]. RU:
        max −log q_i over q's support, beyond which no p helps. LU: min h_i there, below which
        none does. FU: KL(q_i‖p_λ) at the largest λ_i of the domain in this precision; more
        is only had by emptying single cells beyond floating-point range.
      margin: distance from the domain's edge: 1 − Λ (RU), min_x w_λ(x) (FU), ∞ (LU).
      iterations: of the solver.
    """

    multipliers: Array
    log_p: Array
    primal_value: Array
    dual_value: Array
    gap: Array
    violations: Array
    feasible: Array
    attained: Array
    largest_thresholds: Array
    margin: Array
    iterations: Array


class _Ascent(NamedTuple):
    scaled: Array
    at: closed_forms.Point
    merit: Array
    residual: Array
    damping: Array
    barrier: Array
    iterations: Array
    done: Array


def _residual(problem: closed_forms.Problem, scaled: Array, at: closed_forms.Point) -> Array:
    """The largest KKT violation, complementary slackness included, in units of `size`."""
    active = jnp.where(scaled > 0, jnp.abs(at.violations), jnp.maximum(at.violations, 0.0))
    return jnp.max(active / problem.size)


def _ascend(
    problem: closed_forms.Problem, start: Array, barrier: ArrayLike, limit: int, done: ArrayLike
) -> _Ascent:
    """Newton's method with Levenberg's damping on g + μ B, B = Σ log ν_i + wall; μ falls to 0.

    A step solves (C_FF + τ diag C_FF) d = ∇ over the coordinates F that are positive or rise.
    With μ > 0 a coordinate falls to a tenth at most; with μ = 0 it is projected onto ν ≥ 0. A
    step is taken if the merit rises enough, or, where that no longer resolves the difference,
    if the KKT residual falls; else τ grows. μ shrinks when Newton's decrement is below it.
    """
    eps = jnp.finfo(start.dtype).eps
    least = eps**0.75

    def merit(scaled: Array, dual: Array, barrier: Array) -> Array:
        logs = jnp.log(jnp.where(scaled > 0, scaled, 1.0)).sum() + problem.wall(scaled)
        return dual + jnp.where(barrier > 0, barrier * logs, 0.0)

    def step(state: _Ascent) -> _Ascent:
        scaled, at, barrier = state.scaled, state.at, state.barrier
        inverse = jnp.where(barrier > 0, 1.0 / scaled, 0.0)
        gradient = problem.unit * at.violations
        curvature = problem.curvature(scaled, at)
        gradient += barrier * (inverse + jax.grad(problem.wall)(scaled))
        curvature += barrier * (jnp.diag(inverse**2) - jax.hessian(problem.wall)(scaled))
        free = (scaled > 0) | (gradient > 0)
        diagonal = jnp.maximum(jnp.diag(curvature), eps * (eps + jnp.abs(gradient)))
        root = jnp.sqrt(jnp.where(free, diagonal, 1.0))
        both = free[:, None] & free[None, :]
        matrix = jnp.where(both, curvature / jnp.outer(root, root), 0.0)
        damped = jnp.where(barrier > 0, least, state.damping)
        matrix += jnp.diag(jnp.where(free, damped, 1.0))
        move = jnp.linalg.solve(matrix, jnp.where(free, gradient / root, 0.0)) / root
        decrement = gradient @ move
        fall = jnp.max(jnp.where(barrier > 0, -move * inverse, 0.0), initial=0.9)
        shorter = jnp.where(barrier > 0, 0.9 / fall / (1.0 + state.damping), 1.0)
        trial = jnp.maximum(scaled + shorter * move, 0.0)
        new = problem.point(trial)
        value = merit(trial, new.dual, barrier)
        residual = _residual(problem, trial, new)
        slope = gradient @ (trial - scaled)
        gain = value - state.merit
        rises = (slope > 0) & (gain >= 1e-4 * slope)
        falls = (residual < 0.5 * state.residual) & (gain >= -100 * eps * (1 + jnp.abs(at.dual)))
        taken = jnp.isfinite(value) & (rises | falls)
        chosen, there, value, residual = jax.tree.map(
            lambda a, b: jnp.where(taken, a, b),
            (trial, new, value, residual),
            (scaled, at, state.merit, state.residual),
        )
        lower = jnp.where(state.damping > 1e-3, 0.1 * state.damping, least)
        higher = jnp.maximum(10 * state.damping, jnp.where(barrier > 0, 1.0, 1e-3))
        damping = jnp.where(taken, lower, higher)
        stuck = jnp.all(trial == scaled) | (damping > 1 / eps**2)
        central = (barrier > 0) & ((decrement < barrier) | stuck)
        smaller = jnp.where(barrier > least * (1 + jnp.abs(there.dual)), 0.1 * barrier, 0.0)
        barrier = jnp.where(central, smaller, barrier)
        damping = jnp.where(central, least, damping)
        done = (residual <= 4 * eps) | (stuck & ~central)
        done |= there.dual > 2 * problem.ceiling + 1
        value = merit(chosen, there.dual, barrier)
        return _Ascent(chosen, there, value, residual, damping, barrier, state.iterations + 1, done)

    def going(state: _Ascent) -> Array:
        return ~state.done & (state.iterations < limit)

    at = problem.point(start)
    barrier = jnp.asarray(barrier, start.dtype)
    residual = _residual(problem, start, at)
    first = _Ascent(
        start,
        at,
        merit(start, at.dual, barrier),
        residual,
        jnp.asarray(least, start.dtype),
        barrier,
        jnp.zeros((), int),
        jnp.asarray(done) | (residual <= 0),
    )
    return jax.lax.while_loop(going, step, first)


def _maximise(problem: closed_forms.Problem) -> tuple[Array, Array]:
    """ν and the iterations it took: directly from λ = 0, else along the central path.

    The direct ascent takes a few steps, but can get caught where the domain has edges besides
    λ ≥ 0; the path along the barrier's maxima keeps away from them.
    """
    zeros = jnp.zeros_like(problem.unit)
    enough = 1e3 * jnp.finfo(zeros.dtype).eps
    direct = _ascend(problem, zeros, 0.0, 60, False)
    over = (direct.residual <= enough) | (direct.at.dual > problem.ceiling)
    inside = jnp.full_like(zeros, 0.1 / zeros.size)
    path = _ascend(problem, inside, 0.1, 400, over)
    better = over | (direct.at.dual > path.at.dual)
    return (
        jnp.where(better, direct.scaled, path.scaled),
        direct.iterations + path.iterations,
    )


def _invert(linear: Any, target: Array) -> Array:
    """Solves a small linear system given as a function, by least squares of least norm."""
    matrix = jax.vmap(linear, out_axes=1)(jnp.eye(target.shape[0], dtype=target.dtype))
    return jnp.linalg.pinv(matrix) @ target


@jax.custom_jvp
def _without_derivative_unless(condition: Array, values: Array) -> Array:
    del condition
    return values


@_without_derivative_unless.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[1] * jnp.where(primals[0], 1.0, jnp.nan)


def _solution(problem: closed_forms.Problem, largest: Array, beyond: Array) -> DualSolution:
    tolerance = math.sqrt(jnp.finfo(problem.unit.dtype).eps)

    def natural_residual(scaled: Array) -> Array:
        moved = scaled + problem.point(scaled).violations / problem.size
        return scaled - jnp.where(moved > 0, moved, 0.0)

    def solve(function: Any, start: Array) -> tuple[Array, Array]:
        del function, start
        return _maximise(problem)

    scaled, iterations = jax.lax.custom_root(
        natural_residual, jnp.zeros_like(problem.unit), solve, _invert, has_aux=True
    )
    found = jax.lax.stop_gradient(problem.point(scaled))
    impossible = jnp.any(beyond) | (found.dual > problem.ceiling * (1 + tolerance) + tolerance)
    feasible = jnp.all(found.violations <= tolerance * problem.size) & ~impossible
    slackness = jnp.abs(problem.unit * scaled * found.violations).sum()
    attained = feasible & (slackness <= tolerance * (1 + jnp.abs(found.dual)))
    scaled = _without_derivative_unless(attained, scaled)
    at = problem.point(scaled)
    primal = jnp.where(feasible, problem.objective(at.log_p), jnp.inf)
    dual = jnp.where(impossible, jnp.inf, at.dual)
    return DualSolution(
        multipliers=problem.unit * scaled,
        log_p=at.log_p,
        primal_value=primal,
        dual_value=dual,
        gap=jnp.where(feasible, primal - dual, jnp.inf),
        violations=jnp.where(problem.free, -jnp.inf, at.violations),
        feasible=feasible,
        attained=attained,
        largest_thresholds=jax.lax.stop_gradient(largest),
        margin=at.margin,
        iterations=iterations,
    )


def _checked(log_q: ArrayLike, rows: ArrayLike, thresholds: ArrayLike, name: str) -> Any:
    dtype = jnp.result_type(float)
    log_q, rows, thresholds = (jnp.asarray(a, dtype) for a in (log_q, rows, thresholds))
    shapes = (log_q.shape, rows.shape, thresholds.shape)
    if [len(shape) for shape in shapes] != [1, 2, 1] or shapes[1] != shapes[2] + shapes[0]:
        raise ValueError(
            f"expected log_q [n], {name} [m, n] and thresholds [m], got {list(shapes[0])}, "
            f"{list(shapes[1])} and {list(shapes[2])}."
        )
    if rows.shape[0] == 0:
        raise ValueError("expected at least one constraint, got none.")
    if not isinstance(thresholds, jax.core.Tracer) and bool(jnp.isnan(thresholds).any()):
        raise ValueError(f"thresholds must be numbers, got {thresholds}.")
    masses = {"log_q": log_q[None]} | ({name: rows} if name == "log_q_unlearn" else {})
    for label, values in masses.items():
        if isinstance(values, jax.core.Tracer):
            continue
        total = jnp.exp(jax.nn.logsumexp(values, axis=1))
        if not bool((jnp.abs(total - 1) < 1e-3).all()):
            raise ValueError(
                f"the masses of {label} must sum to one, got {total}: "
                "normalise with jax.nn.log_softmax."
            )
    if name == "likelihoods" and not isinstance(rows, jax.core.Tracer):
        if not bool((jnp.isfinite(rows) & (rows >= 0)).all()):
            raise ValueError("likelihoods must be finite and not negative.")
    return log_q, rows, thresholds


def solve_reverse_kl(
    log_q: ArrayLike, log_q_unlearn: ArrayLike, thresholds: ArrayLike
) -> DualSolution:
    """min_p KL(p‖q) subject to KL(p‖q_i) ≥ b_i, on a finite space.

    p_λ ∝ (q / Π_i q_i^{λ_i})^{1/(1−Λ)}, and λ maximises `dual_reverse_kl` over λ ≥ 0, Λ < 1. As
    Λ → 1 p_λ becomes a point mass; thresholds that only it or less could meet are reported as
    not attained. Source: arXiv 2605.30825.

    Args:
      log_q: log masses of the reference, [n]; −inf is an empty cell.
      log_q_unlearn: log masses of each q_i, [m, n].
      thresholds: b in nats, [m].

    Returns:
      A `DualSolution`, float64 under x64 and float32 otherwise: look at `attained`.

    Raises:
      ValueError: for shapes that do not fit, or (outside jit) masses that do not sum to one.
    """
    log_q, rows, thresholds = _checked(log_q, log_q_unlearn, thresholds, "log_q_unlearn")
    largest = jnp.max(-rows, axis=1, where=jnp.isfinite(log_q), initial=0.0)
    beyond = thresholds > largest * (1 + 8 * jnp.finfo(log_q.dtype).eps)
    return _solution(closed_forms.reverse_kl_problem(log_q, rows, thresholds), largest, beyond)


def solve_forward_kl(
    log_q: ArrayLike, log_q_unlearn: ArrayLike, thresholds: ArrayLike
) -> DualSolution:
    """min_p KL(q‖p) subject to KL(q_i‖p) ≥ b_i, on a finite space.

    p_λ = (q − Σ_i λ_i q_i)/(1−Λ), and λ maximises `dual_forward_kl` over λ ≥ 0, Σ_i λ_i q_i ≤ q.
    In a continuous space there is a b past which the constraint is met for nothing, by ever
    smaller holes in p, and no p is optimal. On a grid the holes are cells: the price falls with
    the mesh, and λ agrees with the edge of its domain to the last digit. Such thresholds are
    reported as not attained, with `largest_thresholds`; a small `margin` warns of them.
    Source: arXiv 2605.30825.

    Args, returns, raises: as `solve_reverse_kl`.
    """
    log_q, rows, thresholds = _checked(log_q, log_q_unlearn, thresholds, "log_q_unlearn")
    problem = closed_forms.forward_kl_problem(log_q, rows, thresholds)
    # The edge of λ_i alone is at ν_i = 1, by the choice of the unit.
    edge = (1 - 4 * jnp.finfo(log_q.dtype).eps) * jnp.eye(rows.shape[0], dtype=log_q.dtype)
    largest = thresholds - jnp.diag(jax.vmap(problem.point)(edge).violations)
    largest = jnp.where(problem.free, jnp.inf, largest)
    return _solution(problem, largest, jnp.zeros_like(problem.free))


def solve_likelihood(
    log_q: ArrayLike, likelihoods: ArrayLike, thresholds: ArrayLike
) -> DualSolution:
    """min_p KL(p‖q) subject to E_p[h_i] ≤ ε_i, on a finite space; convex in p.

    p_λ ∝ q exp(−Σ_i λ_i h_i), and λ maximises `dual_likelihood` over λ ≥ 0. If no p meets the
    thresholds together the dual is unbounded: λ then grows until its value exceeds what any p
    costs, which is the proof. Source: arXiv 2605.30825.

    Args:
      log_q: log masses of the reference, [n]; −inf is an empty cell.
      likelihoods: h_i ≥ 0 of each cell, [m, n].
      thresholds: ε in units of h, [m].

    Returns:
      A `DualSolution`, float64 under x64 and float32 otherwise: look at `attained`.

    Raises:
      ValueError: for shapes that do not fit, or (outside jit) masses that do not sum to one,
        or likelihoods that are negative or not finite.
    """
    log_q, rows, thresholds = _checked(log_q, likelihoods, thresholds, "likelihoods")
    largest = jnp.min(rows, axis=1, where=jnp.isfinite(log_q), initial=jnp.inf)
    beyond = thresholds < largest * (1 - 8 * jnp.finfo(log_q.dtype).eps)
    return _solution(closed_forms.likelihood_problem(log_q, rows, thresholds), largest, beyond)
