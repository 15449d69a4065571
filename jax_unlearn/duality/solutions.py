"""Exact solutions on finite spaces, from the concave dual, differentiable in all their data."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.duality import closed_forms
from jax_unlearn.typing import Array, ArrayLike

__all__ = [
    "DualSolution",
    "solve_forward_kl",
    "solve_likelihood",
    "solve_mixed",
    "solve_reverse_kl",
]


class DualSolution(NamedTuple):
    """What the dual of a finite problem says, m constraints over n cells.

    **What is certain.** The dual function is differentiable inside its domain, with the
    violations of p_λ as gradient. Where its maximum is attained there (`attained`), p_λ
    therefore meets every constraint, and λ_i violation_i = 0. So it is optimal and the gap is
    zero, on any space, however coarse, although RU and FU are not convex in p. A gap appears
    where the maximum sits on the edge of the domain, Λ → 1 (RU), p_λ → 0 somewhere (FU) or
    λ → ∞ (LU). In a space without atoms strong duality holds there too, since mass can be split
    at will (arXiv 2605.30825). In a finite one the best p is then no tilt, and the dual value
    is a lower bound of its price and no more. For FU this happens on a finite space only where
    q is itself a mixture of the q_i; elsewhere log p = −∞ is approached, at a price.

    **Derivatives** of `multipliers` follow from the implicit function theorem. The optimality
    condition is the natural residual ν − [ν + a violation(ν)]_+ = 0 of the KKT conditions, in
    units ν = λ/unit that keep ν near one. They serve thresholds, log masses and likelihoods, in
    forward and reverse mode, under jit and vmap. Every other field is differentiated through λ.
    Envelope: dP*/db_i = λ_i (RU, FU), dP*/dε_i = −λ_i (LU). At a weakly active constraint
    (λ_i = 0 and violation_i = 0) λ* has two one-sided derivatives; that of the inactive side is
    given. Where λ is not unique (q_i that coincide) the one of least norm in ν is given. Where
    the optimum is not attained derivatives are nan.

    Attributes:
      multipliers: λ, [m]; where not `attained`, the point at which the ascent stopped.
      log_p: log p_λ, [n].
      primal_value: the objective at p_λ in nats; ∞ where p_λ violates a constraint.
      dual_value: g(λ) in nats, a lower bound of the optimum in any case; ∞ where it is proven
        that no p meets the thresholds: one lies beyond `largest_thresholds` (RU, LU), or g
        exceeds what the costliest p costs, max −log q.
      gap: primal_value − dual_value; ∞ where p_λ violates a constraint.
      violations: b_i − KL (RU, FU) or E_p[h_i] − ε_i (LU) at p_λ, [m]; −∞ for a constraint that
        q itself meets with an infinite KL. Where not `attained`, the positive ones say which
        constraints fail; with each threshold moved by its violation, to the value that p_λ
        has, this same λ is the solution: thresholds to ask for instead.
      feasible: whether p_λ meets every constraint, up to rounding.
      attained: whether the maximum of the dual lies inside the domain: `feasible`, and
        complementary slackness holds up to rounding. The solution is good only if so.
      largest_thresholds: the furthest that each constraint could be asked alone, [m]. RU:
        max −log q_i over q's support, beyond which no p helps. LU: min h_i there, below which
        none does. FU: KL(q_i‖p_λ) at the edge of the domain, less the cells which that
        empties (w_λ ≈ 0): more is had by emptying single cells only, which on a grid is an
        artefact of its mesh.
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
    scaled: Array  # ν
    at: closed_forms.Point  # of ν
    merit: Array  # g + μ B at ν
    residual: Array  # of the KKT conditions at ν
    damping: Array  # Levenberg's τ
    barrier: Array  # μ; 0 in the direct ascent
    along_path: Array  # whether this is the second attempt
    iterations: Array
    done: Array


def _maximise(problem: closed_forms.Problem) -> tuple[Array, Array]:
    """argmax g(ν) over ν ≥ 0 and the iterations it took: Newton's method, direct or along a path.

    The direct ascent from ν = 0 solves (C_FF + τ diag C_FF) d = ∇g over the coordinates F that
    are positive or rise, and projects onto ν ≥ 0. Levenberg's τ also keeps it inside the domain.
    It takes a few steps, but can get caught at the edges besides ν ≥ 0.

    The second attempt then follows the maxima of g + μ B, B = Σ log ν_i + wall, which keep away
    from the edges (an interior-point method). μ falls whenever Newton's decrement is below it,
    and at μ = 0 the attempt ends as the first began.

    A step is taken if the merit g + μ B rises enough. Where that no longer resolves the
    difference, it is taken if the KKT residual falls. Else τ grows, which shortens the step.
    """
    unit, size = problem.unit, problem.size
    eps = jnp.finfo(unit.dtype).eps
    least = jnp.asarray(eps**0.75, unit.dtype)
    zeros, inside = jnp.zeros_like(unit), jnp.full_like(unit, 0.1 / unit.size)
    none, wide = least * 0, jnp.asarray(0.1, unit.dtype)

    def merit(scaled: Array, dual: Array, barrier: Array) -> Array:
        logs = jnp.log(jnp.where(scaled > 0, scaled, 1.0)).sum() + problem.wall(scaled)[0]
        return dual + jnp.where(barrier > 0, barrier * logs, 0.0)

    def kkt(scaled: Array, at: closed_forms.Point) -> Array:
        active = jnp.where(scaled > 0, jnp.abs(at.violations), jnp.maximum(at.violations, 0.0))
        return jnp.max(active / size)

    def step(state: _Ascent) -> _Ascent:
        # One program serves both attempts: `where` chooses what depends on the attempt, as jit and
        # vmap need. First the quadratic model of the merit at ν.
        scaled, at, barrier, on_path = state.scaled, state.at, state.barrier, state.barrier > 0
        inverse = jnp.where(on_path, 1.0 / scaled, 0.0)
        _, slopes, bend = problem.wall(scaled)
        gradient = unit * at.violations + barrier * (inverse + slopes)
        curvature = problem.curvature(scaled, at) + barrier * (jnp.diag(inverse**2) + bend)

        # Newton's system in units of the curvature's diagonal, which makes it well scaled whatever
        # the h_i are. A coordinate held at ν_i = 0 gets the row of the identity, and so no move.
        # Where the curvature rounds to 0 the floor of the diagonal keeps the move finite.
        free = (scaled > 0) | (gradient > 0)
        diagonal = jnp.maximum(jnp.diag(curvature), eps * (eps + jnp.abs(gradient)))
        root = jnp.sqrt(jnp.where(free, diagonal, 1.0))
        both = free[:, None] & free[None, :]
        matrix = jnp.where(both, curvature / jnp.outer(root, root), 0.0)
        matrix += jnp.diag(jnp.where(free, jnp.where(on_path, least, state.damping), 1.0))
        move = jnp.linalg.solve(matrix, jnp.where(free, gradient / root, 0.0)) / root

        # Along the path no ν_i loses more than 0.9 of itself: it must stay positive. The direct
        # ascent goes all the way and is cut off at 0, which is how a constraint turns inactive.
        fall = jnp.max(jnp.where(on_path, -move * inverse, 0.0), initial=0.9)
        share = jnp.where(on_path, 0.9 / fall / (1.0 + state.damping), 1.0)
        trial = jnp.maximum(scaled + share * move, 0.0)

        # Accept or not. Armijo's condition asks for a share of the promised rise. Near the maximum
        # a rise is below rounding: half the residual, at no loss beyond rounding, will do. Outside
        # the domain g is −∞, so that such a trial is always refused.
        new = problem.point(trial)
        value, residual = merit(trial, new.dual, barrier), kkt(trial, new)
        slope, gain = gradient @ (trial - scaled), value - state.merit
        rises = (slope > 0) & (gain >= 1e-4 * slope)
        falls = (residual < 0.5 * state.residual) & (gain >= -100 * eps * (1 + jnp.abs(at.dual)))
        taken = jnp.isfinite(value) & (rises | falls)
        scaled, at, residual = jax.tree.map(
            lambda a, b: jnp.where(taken, a, b),
            (trial, new, residual),
            (scaled, at, state.residual),
        )

        # τ falls to a tenth after a step, and to next to nothing once it is small: the last steps
        # are Newton's own. After a refusal it grows tenfold, from a value that matters.
        lower = jnp.where(state.damping > 1e-3, 0.1 * state.damping, least)
        higher = jnp.maximum(10 * state.damping, jnp.where(on_path, 1.0, 1e-3))
        damping = jnp.where(taken, lower, higher)

        # What comes next. The end is a residual at rounding level, or a dual value beyond what any
        # p costs, which proves that no p meets the thresholds. On the path an iterate near the
        # maximum for this μ takes the next one, and 0 once μ no longer shows in g. A direct ascent
        # that ended far from a solution begins anew from the inside, on the path.
        stuck = jnp.all(trial == state.scaled) | (damping > 1 / eps**2)
        solved = (residual <= 4 * eps) | (at.dual > 2 * problem.ceiling + 1)
        next_mu = on_path & ((gradient @ move < barrier) | stuck)
        smaller = jnp.where(barrier > least * (1 + jnp.abs(at.dual)), 0.1 * barrier, 0.0)
        ended = ~next_mu & (stuck | (~state.along_path & (state.iterations >= 60)))
        hopeless = residual > 1e3 * eps
        restart = ended & ~solved & ~state.along_path & hopeless
        scaled = jnp.where(restart, inside, scaled)
        at = jax.tree.map(lambda a, b: jnp.where(restart, a, b), problem.point(inside), at)
        barrier = jnp.where(restart, wide, jnp.where(next_mu, smaller, barrier))
        return _Ascent(
            scaled,
            at,
            merit(scaled, at.dual, barrier),
            jnp.where(restart, kkt(scaled, at), residual),
            jnp.where(restart | next_mu, least, damping),
            barrier,
            state.along_path | restart,
            state.iterations + 1,
            solved | (ended & ~restart),
        )

    def going(state: _Ascent) -> Array:
        return ~state.done & (state.iterations < 500)

    at = problem.point(zeros)
    residual = kkt(zeros, at)
    no, count = jnp.zeros((), bool), jnp.zeros((), int)
    first = _Ascent(zeros, at, at.dual, residual, least, none, no, count, residual <= 0)
    last = jax.lax.while_loop(going, step, first)
    return last.scaled, last.iterations


def _invert(linear: Any, target: Array) -> Array:
    """Solves a small linear system given as a function, by least squares of least norm.

    Where q_i coincide the system is singular, and λ not unique: least norm chooses one.
    """
    matrix = jax.vmap(linear, out_axes=1)(jnp.eye(target.shape[0], dtype=target.dtype))
    return jnp.linalg.pinv(matrix) @ target


@jax.custom_jvp
def _without_derivative_unless(condition: Array, values: Array) -> Array:
    """The values, with derivatives nan where the condition fails: rather none than a wrong one."""
    del condition
    return values


@_without_derivative_unless.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[1] * jnp.where(primals[0], 1.0, jnp.nan)


@functools.partial(jax.jit, static_argnums=0)
def _solution(formulation: Any, log_q: Array, rows: Any, thresholds: Array) -> DualSolution:
    problem = formulation(log_q, rows, thresholds)
    tolerance = math.sqrt(jnp.finfo(problem.unit.dtype).eps)

    def natural_residual(scaled: Array) -> Array:
        moved = scaled + problem.point(scaled).violations / problem.size
        return scaled - jnp.where(moved > 0, moved, 0.0)

    # `custom_root` differentiates the residual at the solution, not the ascent that found it.
    def solve(function: Any, start: Array) -> tuple[Array, Array]:
        del function, start
        scaled, count = _maximise(problem)
        return scaled, count.astype(scaled.dtype)  # the aux of `custom_root` must be real

    scaled, count = jax.lax.custom_root(
        natural_residual, jnp.zeros_like(problem.unit), solve, _invert, has_aux=True
    )
    found = jax.lax.stop_gradient(problem.point(scaled))
    # Two proofs that no p meets the thresholds: one alone is out of reach, or g exceeds any price.
    impossible = jnp.any(problem.beyond) | (
        found.dual > problem.ceiling * (1 + tolerance) + tolerance
    )
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
        largest_thresholds=jax.lax.stop_gradient(problem.largest),
        margin=at.margin,
        iterations=jax.lax.stop_gradient(count).astype(int),
    )


def _checked(log_q: ArrayLike, rows: ArrayLike, thresholds: ArrayLike, name: str) -> Any:
    shapes = [list(np.shape(values)) for values in (log_q, rows, thresholds)]
    if [len(shape) for shape in shapes] != [1, 2, 1] or shapes[1] != shapes[2] + shapes[0]:
        raise ValueError(
            f"expected log_q [n], {name} [m, n] and thresholds [m], got {shapes[0]}, {shapes[1]} "
            f"and {shapes[2]}."
        )
    if shapes[1][0] == 0:
        raise ValueError("expected at least one constraint, got none.")
    if not isinstance(thresholds, jax.core.Tracer) and np.isnan(thresholds).any():
        raise ValueError(f"thresholds must be numbers, got {thresholds}.")
    for label, values in {"log_q": log_q, name: rows}.items():
        if isinstance(values, jax.core.Tracer):
            continue
        values = np.asarray(values)
        if label == "likelihoods":
            if not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError("likelihoods must be finite and not negative.")
        elif not (np.abs((total := np.exp(values).sum(axis=-1)) - 1) < 1e-3).all():
            raise ValueError(
                f"the masses of {label} must sum to one, got {total}: "
                "normalise with jax.nn.log_softmax."
            )
    dtype = jnp.result_type(float)
    return tuple(jnp.asarray(values, dtype) for values in (log_q, rows, thresholds))


def solve_reverse_kl(
    log_q: ArrayLike, log_q_unlearn: ArrayLike, thresholds: ArrayLike
) -> DualSolution:
    """min_p KL(p‖q) subject to KL(p‖q_i) ≥ b_i, on a finite space.

    p_λ ∝ (q / Π_i q_i^{λ_i})^{1/(1−Λ)}, and λ maximises `dual_reverse_kl` over λ ≥ 0, Λ < 1. As
    Λ → 1 p_λ becomes a point mass; thresholds that only it or less could meet are reported as
    not attained. Source: arXiv 2605.30825.

    On an unbounded space the domain also asks for a finite E_q[w_λ]. A q_i with lighter tails than
    q can make it infinite at a Λ < 1: for Gaussians of variances s² and s_i² < s², at
    λ_i ≥ s_i²/s². p_λ does not exist there, and a solution on a grid that comes near is one of the
    grid's ends.

    Args:
      log_q: log masses of the reference, [n]; −inf is an empty cell.
      log_q_unlearn: log masses of each q_i, [m, n].
      thresholds: b in nats, [m].

    Returns:
      A `DualSolution`, float64 under x64 and float32 otherwise: look at `attained`.

    Raises:
      ValueError: for shapes that do not fit, or (outside jit) masses that do not sum to one.

    Example:
      Two cells, q = (1/2, 1/2) and q_1 = (3/4, 1/4). p = (1/4, 3/4) is ½ log 3 nats from q_1. It is
      the nearest to q of these, since it is p_λ ∝ q²/q_1 at λ = 1/2.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> solution = duality.solve_reverse_kl(log_q, log_q_1, [0.5 * jnp.log(3.0)])
      >>> round(float(solution.multipliers[0]), 3), bool(solution.attained)
      (0.5, True)
      >>> [round(float(p), 3) for p in jnp.exp(solution.log_p)]
      [0.25, 0.75]
      >>> round(float(solution.primal_value), 3)  # KL(p‖q) in nats
      0.131
    """
    data = _checked(log_q, log_q_unlearn, thresholds, "log_q_unlearn")
    return _solution(closed_forms.reverse_kl_problem, *data)


def solve_forward_kl(
    log_q: ArrayLike, log_q_unlearn: ArrayLike, thresholds: ArrayLike
) -> DualSolution:
    """min_p KL(q‖p) subject to KL(q_i‖p) ≥ b_i, on a finite space.

    p_λ = (q − Σ_i λ_i q_i)/(1−Λ), and λ maximises `dual_forward_kl` over λ ≥ 0, Σ_i λ_i q_i ≤ q.
    Source of the closed form: arXiv 2605.30825.

    In a continuous space there is a b past which λ stays on the edge of its domain. The
    constraint is then met by ever smaller and deeper holes in p where q ≈ Σ_i λ_i q_i. Each
    further nat of b_i costs the same λ_i, and the infimum is not attained. On a grid the holes
    are cells whose mass falls out of floating-point range, and λ agrees with the edge to the
    last digit: not attained. A threshold beyond `largest_thresholds` that is attained
    nevertheless is met by emptying cells, with a small `margin`.

    Args, returns, raises: as `solve_reverse_kl`.

    Example:
      Two cells, q = (1/2, 1/2) and q_1 = (3/4, 1/4). From p = (1/4, 3/4) q_1 is ½ log 3 nats away,
      and p = (q − ½ q_1)/½: λ = 1/2.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> solution = duality.solve_forward_kl(log_q, log_q_1, [0.5 * jnp.log(3.0)])
      >>> round(float(solution.multipliers[0]), 3), bool(solution.attained)
      (0.5, True)
      >>> [round(float(p), 3) for p in jnp.exp(solution.log_p)]
      [0.25, 0.75]
      >>> round(float(solution.primal_value), 3)  # KL(q‖p) in nats
      0.144
    """
    data = _checked(log_q, log_q_unlearn, thresholds, "log_q_unlearn")
    return _solution(closed_forms.forward_kl_problem, *data)


def solve_likelihood(
    log_q: ArrayLike,
    likelihoods: ArrayLike,
    thresholds: ArrayLike,
    *,
    groups: ArrayLike | None = None,
) -> DualSolution:
    """min_p KL(p‖q) subject to E_p[h_i] ≤ ε_i, on a finite space; convex in p.

    p_λ ∝ q exp(−Σ_i λ_i h_i), and λ maximises `dual_likelihood` over λ ≥ 0. If no p meets the
    thresholds together the dual is unbounded: λ then grows until its value exceeds what any p
    costs, which is the proof. Source: arXiv 2605.30825.

    With groups, p is a family p(·|k): min Σ_k q(k) KL(p(·|k)‖q(·|k)) subject to
    Σ_k q(k) E_{p(·|k)}[h_i] ≤ ε_i. p keeps q's mass q(k) of each group of cells, which without them
    it may move from one to another. p_λ(·|k) ∝ q(·|k) exp(−Σ_i λ_i h_i), and
    g(λ) = −Σ_k q(k) log E_{q(·|k)}[exp(−Σ_i λ_i h_i)] − λᵀε.

    Args:
      log_q: log masses of the reference, [n]; −inf is an empty cell.
      likelihoods: h_i ≥ 0 of each cell, [m, n].
      thresholds: ε in units of h, [m].
      groups: bool [k, n], of which each cell belongs to one; None is one group of all.

    Returns:
      A `DualSolution`, float64 under x64 and float32 otherwise: look at `attained`.

    Raises:
      ValueError: for shapes that do not fit. Outside jit also for masses that do not sum to one,
        likelihoods that are negative or not finite, or a cell of no group or of several.

    Example:
      h is 1 in the first of two equal cells, and may be 1/4 on average instead of 1/2. So
      p = (1/4, 3/4), which is ∝ (e^{−λ}, 1) at λ = log 3.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q = jnp.log(jnp.array([0.5, 0.5]))
      >>> solution = duality.solve_likelihood(log_q, [[1.0, 0.0]], [0.25])
      >>> round(float(solution.multipliers[0]), 3), bool(solution.attained)
      (1.099, True)
      >>> [round(float(p), 3) for p in jnp.exp(solution.log_p)]
      [0.25, 0.75]
      >>> bool(duality.solve_likelihood(log_q, [[1.0, 0.5]], [0.25]).attained)  # below min h
      False
    """
    log_q, rows, bounds = _checked(log_q, likelihoods, thresholds, "likelihoods")
    if groups is None:
        return _solution(closed_forms.likelihood_problem, log_q, rows, bounds)
    if np.ndim(groups) != 2 or np.shape(groups)[1:] != log_q.shape:
        raise ValueError(f"expected groups [k, {log_q.shape[0]}], got {list(np.shape(groups))}.")
    if not isinstance(groups, jax.core.Tracer) and (np.asarray(groups).sum(axis=0) != 1).any():
        raise ValueError("each cell must belong to one of the groups.")
    rows = (rows, jnp.asarray(groups, bool))
    return _solution(closed_forms.grouped_problem, log_q, rows, bounds)


def solve_mixed(
    log_q: ArrayLike, log_q_unlearn: ArrayLike, likelihoods: ArrayLike, thresholds: ArrayLike
) -> DualSolution:
    """min_p KL(p‖q) subject to KL(p‖q_i) ≥ b_i and E_p[h_j] ≤ ε_j, on a finite space.

    p_{λ,μ} ∝ (q Π_i q_i^{−λ_i} exp(−Σ_j μ_j h_j))^{1/(1−Λ)}, Λ = Σ_i λ_i. Over λ, μ ≥ 0, Λ < 1,
    (λ, μ) maximises −(1−Λ) log Σ_x (q Π_i q_i^{−λ_i} e^{−Σ_j μ_j h_j})^{1/(1−Λ)} + λᵀb − μᵀε.
    These are the closed forms of `solve_reverse_kl` and `solve_likelihood` in one, and all that is
    said there holds.

    Args:
      log_q: log masses of the reference, [n].
      log_q_unlearn: log masses of each q_i, [k, n].
      likelihoods: h_j ≥ 0 of each cell, [l, n].
      thresholds: (b_1 … b_k, ε_1 … ε_l), [k + l].

    Returns:
      A `DualSolution` of k + l constraints in this order: look at `attained`.

    Raises:
      ValueError: as those two.

    Example:
      Three equal cells, q_1 = (1/2, 1/4, 1/4), and h is 1 in the third. At λ = 1/2, μ = ½ log 2, p
      is ∝ e^{−2μh}/q_1 = (2, 4, 2). Its KL from q_1 is ¼ log 2, and E_p[h] = 1/4.

      >>> import jax.numpy as jnp
      >>> from jax_unlearn import duality
      >>> log_q, log_q_1 = jnp.log(jnp.full(3, 1 / 3)), jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> thresholds = [0.25 * jnp.log(2.0), 0.25]
      >>> solution = duality.solve_mixed(log_q, log_q_1, [[0.0, 0.0, 1.0]], thresholds)
      >>> [round(float(multiplier), 3) for multiplier in solution.multipliers]
      [0.5, 0.347]
      >>> [round(float(p), 3) for p in jnp.exp(solution.log_p)]
      [0.25, 0.5, 0.25]
    """
    count, thresholds = np.shape(log_q_unlearn)[0], jnp.asarray(thresholds)
    log_q, logs, bounds = _checked(log_q, log_q_unlearn, thresholds[:count], "log_q_unlearn")
    _, rows, others = _checked(log_q, likelihoods, thresholds[count:], "likelihoods")
    thresholds = jnp.concatenate([bounds, others])
    return _solution(closed_forms.mixed_problem, log_q, (logs, rows), thresholds)
