"""A constrained problem over network parameters, the rows of its batches, and its Lagrangian.

    min_θ objective(θ)   subject to   violation_i(θ) = sign_i (b_i − value_i(θ)) ≤ 0,   i = 1 … m

    L(θ, λ) = objective(θ) + Σ_i s_i λ_i violation_i(θ)

A batch gives one loss a row: the objective is the mean over its n rows, value_i that over the n_i
rows of constraint i. s_i is 1, or n_i/n where each row is a problem of its own (a condition, with
its objective and its constraints): L is then the mean over rows of each row's Lagrangian, and λ_i
is the multiplier of one forgotten condition alone, however many others a batch has.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jax_unlearn import multipliers as duals
from jax_unlearn.typing import Array, ArrayLike, Condition, Params

__all__ = [
    "Batch",
    "Conditions",
    "Evaluation",
    "Images",
    "Losses",
    "NoisyPoints",
    "Problem",
    "Samples",
    "TrajectoryPoints",
    "lagrangian",
    "violations",
]


class Images(NamedTuple):
    """Images given as data.

    Attributes:
      x_0: in [−1, 1], [n, height, width, channels].
      cond: what each is shown under: labels [n], embeddings [n, ...], or None.
      constraint: of images to forget, the constraint i of each, integer [n]; else None.
      base: of kept images in `without`, what p(·|cond) is held to q(·|base) by, [n, ...]; None is
        `cond`.
    """

    x_0: Any
    cond: Condition
    constraint: Any = None
    base: Condition = None


class Conditions(NamedTuple):
    """Conditions alone; the images are the model's own.

    Their frequencies are the law of conditions π of the problem over condition and image
    jointly: objective Σ_c π(c) KL(p(·|c)‖q(·|base_c)), each constraint a mean over its rows.

    Attributes:
      cond: what p is conditioned on, [n, ...]; None for a model without conditions.
      base: p(·|cond) is held to q(·|base), [n, ...]: cond itself for what is kept; the null label
        or an anchor for what is forgotten.
      target: q_i is q(·|target), [n, ...], or [n, k, ...] for k constraints on each row. None for
        kept rows and where likelihoods h_i say what to forget.
      constraint: the constraint i of each target, integer [n] or [n, k]; without targets, the
        number of each h_i. None for kept rows.
      likelihood: in mixed problems, the number j of the h_j on each row, integer [n] or [n, l].
    """

    cond: Condition
    base: Condition
    target: Condition = None
    constraint: Any = None
    likelihood: Any = None


class Samples(NamedTuple):
    """Stored samples of q(·|base), and what the constraints say at them, computed once.

    Attributes:
      x_0: samples of q(·|base), [f, ...]; base is the law that p(·|cond) is held to.
      cond: what p is conditioned on, [f, ...]; or None.
      base: what q is conditioned on, [f, ...]; or None. Read by the control variate alone.
      values: h_i(x_0) (likelihood) or log q(x_0|base) − log q_i(x_0) in nats (reverse KL),
        [f] or [f, k].
      constraint: the constraint i of each value, integer, of the shape of `values`. All
        constraints on a condition must be on each of its rows, and rows whose first one is
        the same must have the same condition: they are normalised together.
    """

    x_0: Any
    cond: Condition
    base: Condition
    values: Any
    constraint: Any


class NoisyPoints(NamedTuple):
    """Points of noising paths of samples of q(·|base), and what is known there.

    Attributes:
      x_t: [f, ...].
      t: integer, [f]; of the law π of the weighting.
      cond: what p is conditioned on, [f, ...]; or None.
      epsilon: the reference's prediction at x_t and the base, as ε, [f, ...].
      posterior: u_i = E[h_i(x_0) | x_t], [f, k] (`likelihoods.posterior_path`).
      push: σ_t ∇u_i, [f, k, ...].
      values: h_i(x_0) of the image that was noised, or 1 for the concept that it shows, [f, k].
      constraint: the constraint i of each, integer [f, k]; see `Samples`.
      concept: in `without`, the reference's prediction at what is to be forgotten, [f, ...]; or
        None.
    """

    x_t: Any
    t: Any
    cond: Condition
    epsilon: Any
    posterior: Any
    push: Any
    values: Any
    constraint: Any
    concept: Any = None


class TrajectoryPoints(NamedTuple):
    """A point each of trajectories that were sampled before, for estimators that hold them fixed.

    A row's loss is that of one time step, times their number: its mean over uniform steps is that
    of the trajectory. Without the trajectories' ends there are no values of h.

    Attributes:
      conditions: whose trajectories they are, [n].
      x_t: [n, ...].
      step: the places in the chain, 0 the noisiest, integer [n].
    """

    conditions: Conditions
    x_t: Any
    step: Any


class Batch(NamedTuple):
    """What one step sees: rows of one of the types above.

    Attributes:
      kept: rows at which the model is held to the reference; or None.
      forget: rows that constraints are on.
      base: `Images` that the model is held to as data, whatever the reference says; or None.
    """

    kept: Any
    forget: Any
    base: Any = None


class Losses(NamedTuple):
    """One value a row; the step takes their means.

    Attributes:
      objective: [n].
      values: of the constraints, in any order, [v].
      index: the constraint of each of these, integer [v].
      share: s_i of the Lagrangian, [m] or a scalar; see `row_shares`.
      diagnostics: scalars for the log.
    """

    objective: Array
    values: Array
    index: Array
    share: ArrayLike = 1.0
    diagnostics: dict[str, Array] = {}


class Evaluate(Protocol):
    """(params, reference, key, batch, multipliers, *, axis_name=None) -> Losses."""

    def __call__(
        self,
        params: Params,
        reference: Params,
        key: Array,
        batch: Any,
        multipliers: Array,
        /,
        *,
        axis_name: str | None = None,
    ) -> Losses:
        """Losses of a batch, differentiable in params.

        The multipliers, [m], are those before the dual step, for losses that they weight or
        shift; the Lagrangian multiplies the violations by them itself. Under pmap, `axis_name` is
        the axis that the batch is spread over.
        """
        ...


class Problem(NamedTuple):
    """min objective subject to violations ≤ 0.

    Attributes:
      losses: of a batch; see `Evaluate`.
      sign: +1 where a constraint is value ≥ threshold, −1 where it is value ≤ threshold; one
        for all, or [m].
      project: the projection onto the dual domain, [m] -> [m].
      name: as it stands in a report.
      fresh: how a dual batch is evaluated, where not by `losses`, with the same arguments: of a
        `Losses` that it returns `values` and `index` are read. Distillation needs it, since its
        own values say nothing of the network (`formulations.sampled`).

    Example: min x² + y² subject to x + y = 1, whose multiplier is 1, at x = y = ½.
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> def losses(x, reference, key, batch, multipliers, *, axis_name=None):
      ...     return Losses(jnp.square(x).sum()[None], x.sum()[None], jnp.array([0]))
      >>> problem = Problem(losses, 1.0, multipliers.free(), "nearest point of a line")
      >>> value, found = lagrangian(
      ...     problem, jnp.ones(2), None, jax.random.key(0), None, multipliers=1.0, thresholds=1.0
      ... )
      >>> float(value), found.violations.tolist()
      (1.0, [-1.0])
    """

    losses: Evaluate
    sign: float | Array
    project: duals.Projection
    name: str
    fresh: Evaluate | None = None


class Evaluation(NamedTuple):
    """What a batch says of a problem, over all its devices.

    Attributes:
      objective: mean over the rows.
      values: of the constraints, [m]; NaN for one without a row in the batch.
      stderr: standard errors of these, [m]; NaN for one with fewer than two rows.
      violations: sign · (threshold − value), [m]; 0 for one without a row.
      diagnostics: of the losses.
    """

    objective: Array
    values: Array
    stderr: Array
    violations: Array
    diagnostics: dict[str, Array]


class Means(NamedTuple):
    """A device's part of the objective and of the values [m]: their sums over devices are means."""

    objective: Array
    values: Array


class Counted(NamedTuple):
    """What stands beside the means, the same on every device: rows seen, errors and shares, [m]."""

    seen: Array
    stderr: Array
    share: Array
    diagnostics: dict[str, Array]


def psum(values: Any, axis_name: str | None) -> Any:
    """Σ over the devices that a batch is spread over, if it is."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def row_shares(index: Array, count: int, rows: int, axis_name: str | None) -> Array:
    """n_i/n: the part of all rows that constraint i is on, [count]; see `Losses.share`."""
    on_each = jnp.zeros((count,), jnp.float32).at[index.reshape(-1)].add(1.0)
    return psum(on_each, axis_name) / psum(jnp.asarray(rows, jnp.float32), axis_name)


def violations(problem: Problem, values: ArrayLike, thresholds: ArrayLike) -> Array:
    """sign · (threshold − value), feasible when ≤ 0, [m].

    Example:
      >>> from jax_unlearn import multipliers
      >>> at_most = Problem(None, -1.0, multipliers.non_negative(), "at most")
      >>> violations(at_most, [0.5], [0.25]).tolist()
      [0.25]
    """
    return jnp.asarray(problem.sign * (jnp.asarray(thresholds) - jnp.asarray(values)))


def means_of(found: Losses, count: int, axis_name: str | None) -> tuple[Means, Counted]:
    """The means of losses with m = count constraints, and what stands beside them."""
    rows = psum(jnp.asarray(found.objective.shape[0], jnp.float32), axis_name)
    zeros = jnp.zeros((count,), jnp.result_type(found.values, jnp.float32))
    seen = psum(zeros.at[found.index].add(1.0), axis_name)
    own = Means(
        found.objective.sum() / rows,
        zeros.at[found.index].add(found.values) / jnp.maximum(seen, 1.0),
    )
    still = jax.lax.stop_gradient(found.values - psum(own.values, axis_name)[found.index])
    squares = psum(zeros.at[found.index].add(jnp.square(still)), axis_name)
    stderr = jnp.sqrt(squares / jnp.where(seen > 1, seen * (seen - 1), jnp.nan))
    share = jnp.broadcast_to(jnp.asarray(found.share, zeros.dtype), (count,))
    return own, Counted(seen, stderr, share, found.diagnostics)


def weighed(
    problem: Problem,
    means: Means,
    counted: Counted,
    multipliers: Array,
    thresholds: Array,
    axis_name: str | None,
) -> Array:
    """A device's part of L = objective + Σ_i s_i λ_i violation_i."""
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    parts = violations(problem, means.values, thresholds / devices)
    parts = jnp.where(counted.seen > 0, counted.share * multipliers * parts, 0.0)
    return means.objective + parts.sum()


def evaluation(
    problem: Problem, means: Means, counted: Counted, thresholds: Array, axis_name: str | None
) -> Evaluation:
    """The same numbers on every device."""
    objective, values = psum(means, axis_name)
    there = counted.seen > 0
    return Evaluation(
        objective=objective,
        values=jnp.where(there, values, jnp.nan),
        stderr=counted.stderr,
        violations=jnp.where(there, violations(problem, values, thresholds), 0.0),
        diagnostics=counted.diagnostics,
    )


def lagrangian(
    problem: Problem,
    params: Params,
    reference: Params,
    key: Array,
    batch: Any,
    multipliers: ArrayLike,
    thresholds: ArrayLike,
    *,
    axis_name: str | None = None,
) -> tuple[Array, Evaluation]:
    """L(θ, λ) = objective(θ) + Σ_i s_i λ_i sign_i (b_i − value_i(θ)), on a batch.

    Differentiable in params, multipliers and thresholds: ∂L/∂θ is what `primal_dual` descends,
    ∂L/∂λ_i is s_i violation_i where the losses do not depend on λ, and ∂L/∂b_i = s_i λ_i sign_i.
    Where an estimator regresses on an optimum (`formulations.distill_likelihood` and its kin),
    the objective is the regression's loss, and L has the right gradient in θ but not the value.

    Args:
      problem: losses and signs.
      params: θ.
      reference: the frozen parameters of the pretrained model, or whatever the losses take.
      key: a PRNG key.
      batch: what the losses take, for the library's own formulations a `Batch`.
      multipliers: λ, [m].
      thresholds: b, [m].
      axis_name: the pmap or shard_map axis that the batch is spread over, if any. The value is
        then this device's part of L: the sum over devices of values is L, that of gradients its
        gradient.

    Returns:
      The value, and an `Evaluation` of the batch, over all devices.

    Example: ½x² + λ(1 − x) at x = 2, λ = 3.
      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import multipliers
      >>> def losses(x, reference, key, batch, multipliers, *, axis_name=None):
      ...     return Losses(0.5 * jnp.square(x), x, jnp.array([0]))
      >>> problem = Problem(losses, 1.0, multipliers.non_negative(), "x at least one")
      >>> def value(x, multiplier):
      ...     return lagrangian(problem, x, None, jax.random.key(0), None, multiplier, [1.0])[0]
      >>> x, multiplier = jnp.array([2.0]), jnp.array([3.0])
      >>> float(value(x, multiplier))
      -1.0
      >>> [gradient.tolist() for gradient in jax.grad(value, (0, 1))(x, multiplier)]
      [[-1.0], [-1.0]]
    """
    thresholds = jnp.atleast_1d(jnp.asarray(thresholds, dtype=float))
    multipliers = jnp.broadcast_to(jnp.asarray(multipliers, dtype=float), thresholds.shape)
    found = problem.losses(params, reference, key, batch, multipliers, axis_name=axis_name)
    means, counted = means_of(found, thresholds.shape[0], axis_name)
    value = weighed(problem, means, counted, multipliers, thresholds, axis_name)
    return value, evaluation(problem, means, counted, thresholds, axis_name)
