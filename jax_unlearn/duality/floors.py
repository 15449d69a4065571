"""The floor under a certificate: g(λ), from samples of the reference alone, is what no p can beat.

Weak duality: for each λ in the dual domain, every p that meets the thresholds has
KL(p‖q) ≥ g(λ). So the price of a model, less the floor, is all that a better one could save. λ is
chosen on one half of the samples and g evaluated on the other, then with the halves exchanged.
Neither half has been fitted to where it is evaluated, and a poor λ only lowers the floor.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jax_unlearn.typing import Array, ArrayLike

__all__ = ["Floor", "likelihood_floor", "reverse_kl_floor"]

_FEWEST = 10
"""A chosen λ leaves at least so many effective samples, on the half that it is chosen on."""


class Floor(NamedTuple):
    """A lower bound of the price of every p that meets the thresholds, in nats.

    With other thresholds, such as the values that a model really has, the bound holds too, once
    moved along its tangent: for likelihoods by −λᵀ(ε′ − ε), for reverse KL by λᵀ(b′ − b). The
    samples, λ and the standard error remain. With groups the price is the mean over them. Kept
    conditions cost nothing: where a mean counts them too, the floor shrinks by their share.

    Attributes:
      value: the estimate of g(λ), or of the mean of g at the λ of both halves. Since g is concave,
        that mean is at most g at `multipliers`. It is negative where λ is a poor one.
      stderr: its standard error, by the jackknife.
      effective: how many samples carry the value, Σ_halves (Σw)²/Σw² with the weights w of the
        samples, a count. With groups of shares s_k it is 1/Σ_k (s_k/count_k) in each half. Where
        it is a handful the value is no bound: it may miss what was not sampled.
      multipliers: λ, [m]; the mean over both halves.
      lower: a floor that holds with the stated probability; None where there is none.
    """

    value: float
    stderr: float
    effective: float
    multipliers: np.ndarray
    lower: float | None


class _Samples(NamedTuple):
    """Rows of h, group by group: where each group starts, and its share of the whole."""

    h: np.ndarray
    group: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    shares: np.ndarray


class _LogMeans(NamedTuple):
    """log mean_k exp(−hα) of each group, and what its jackknife says, each [groups]."""

    plain: np.ndarray
    corrected: np.ndarray
    variance: np.ndarray
    effective: np.ndarray


def likelihood_floor(
    values: ArrayLike,
    thresholds: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    key: Array | None = None,
    multipliers: ArrayLike | None = None,
    least: ArrayLike = 0.0,
    confidence: float = 0.95,
) -> Floor:
    """g(λ) = −Σ_k s_k log E_{q(·|k)}[exp(−Σ_i λ_i h_i)] − λᵀε, nats.

    No family p(·|k) with Σ_k s_k E_{p(·|k)}[h_i] ≤ ε_i has a smaller Σ_k s_k KL(p(·|k)‖q(·|k))
    (arXiv 2605.30825). A path KL exceeds the KL of images, so that the floor is one of path prices
    too. h may be any finite number, a calibrated posterior for one.

    The log of a sample mean lies below that of the mean, by about half its variance. The floor of
    many small groups would be too high by as much: the jackknife removes it.

    `lower` is the floor that holds with probability `confidence` over the samples. There each
    E_{q(·|k)} is replaced by the empirical Bernstein bound of w = exp(−λᵀ(h − least)) ∈ (0, 1],
    mean w + √(2 V log(2/δ)/n) + 7 log(2/δ)/(3(n − 1)), with V the sample variance (Maurer & Pontil
    2009, theorem 4). δ is 1 − confidence shared by all groups and both halves, and `lower` the mean
    over the halves, or 0 where that is negative.

    Args:
      values: h_i(x_n) at independent samples x_n of q, [n, m].
      thresholds: ε in units of h, [m].
      groups: k of each sample, integers [n]; None is one group. s_k is its share of the samples.
        Without groups the floor is a lower one, which holds for families as well.
      key: of the random halves, drawn within each group; not needed with `multipliers`.
      multipliers: λ ≥ 0 in nats per unit of h, [m], chosen without these samples; every sample
        then evaluates. None chooses them. Where no maximum is found, as if no p met the
        thresholds, λ is one that leaves at least 10 effective samples.
      least: the least that each h_i can be, known beforehand, a scalar or [m]. `lower` rests on it,
        and the choice of λ where all samples are above the thresholds.
      confidence: of `lower`, in (0, 1). `lower` is None where a value lies below `least`.

    Returns:
      The floor.

    Raises:
      ValueError: for shapes that do not fit, numbers that are not finite, negative multipliers, a
        confidence outside (0, 1), neither a key nor multipliers, or a group of fewer than 4
        samples (2 with multipliers).

    Example:
      >>> import jax, numpy as np
      >>> from jax_unlearn import duality
      >>> h = np.random.default_rng(0).random((2000, 1)) < 0.3
      >>> floor = duality.likelihood_floor(h, [0.1], key=jax.random.key(0))
      >>> exact = 0.1 * np.log(0.1 / 0.3) + 0.9 * np.log(0.9 / 0.7)
      >>> bool(abs(floor.value - exact) < 3 * floor.stderr), bool(floor.lower < exact)
      (True, True)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie inside (0, 1), not {confidence}.")
    samples, bounds, given = _checked(values, thresholds, groups, multipliers)
    least = np.asarray(least, np.float64)
    if least.shape not in ((), bounds.shape) or not np.isfinite(least).all():
        raise ValueError(f"least must be a finite number or {len(bounds)} of them, got {least}.")
    # The same problem for h ≥ 0: e^{−λᵀh} ≤ 1.
    low = np.minimum(least, samples.h.min(axis=0))
    known = bool((low == least).all())
    samples, bounds = samples._replace(h=samples.h - low), bounds - low

    parts = _cross_fitted(samples, bounds, key, given, _choose)
    floor = _averaged(parts, bounds, [1.0] * len(parts))
    if not known:
        return floor
    failure = (1 - confidence) / (len(parts) * len(samples.sizes))
    lower = np.mean([_bernstein_floor(held, current, bounds, failure) for current, held in parts])
    return floor._replace(lower=max(0.0, float(lower)))  # no price is negative


def reverse_kl_floor(
    log_ratios: ArrayLike,
    thresholds: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    key: Array | None = None,
    multipliers: ArrayLike | None = None,
) -> Floor:
    """g(λ) = λᵀb − (1−Λ) Σ_k s_k log E_{q(·|k)}[exp(Σ_i α_i ℓ_i)], α_i = λ_i/(1−Λ), nats.

    No family p(·|k) with Σ_k s_k KL(p(·|k)‖q_i(·|k)) ≥ b_i has a smaller
    Σ_k s_k KL(p(·|k)‖q(·|k)) (arXiv 2605.30825). ℓ_i = log q/q_i at samples of q. With log-ratios
    of images, prices and thresholds are KLs of images; with those of paths
    (`likelihoods.path_log_ratios`), path KLs of chains of the same steps and variances.

    The mean is carried by samples with large ratios, and has no upper bound: look at
    `Floor.effective`; `lower` is None. The bias of the logarithm is removed as in
    `likelihood_floor`.

    λ is found from the likelihood's problem. At a price θ the constraints say
    E_p[ℓ_i] ≥ b_i − θ, with the dual function a(α) = αᵀ(b − θ) − Σ_k s_k log E exp(αᵀℓ). g is
    (a(α) + θ Σα)/(1 + Σα), and θ is raised to it until they agree (Dinkelbach 1967).

    Args:
      log_ratios: ℓ_i at independent samples of q, in nats, [n, m].
      thresholds: b in nats, [m].
      groups: k of each sample, integers [n], each with its own q(·|k) and q_i(·|k); None is one
        group. s_k is its share of the samples.
      key: of the random halves, drawn within each group; not needed with `multipliers`.
      multipliers: λ ≥ 0 with Λ < 1, [m], chosen without these samples; every sample then
        evaluates. None chooses them, as in `likelihood_floor`.

    Returns:
      The floor.

    Raises:
      ValueError: as `likelihood_floor`, and for Λ ≥ 1.

    Example:
      >>> import jax, numpy as np
      >>> from jax_unlearn import duality
      >>> x = np.random.default_rng(0).normal(size=(4000, 1))  # q = N(0, 1), q_1 = N(1, 1)
      >>> floor = duality.reverse_kl_floor(0.5 - x, [0.8], key=jax.random.key(0))
      >>> exact = (np.sqrt(0.8) - np.sqrt(0.5)) ** 2  # p = N(-0.26, 1)
      >>> bool(abs(floor.value - exact) < 3 * floor.stderr)
      True
    """
    samples, bounds, given = _checked(log_ratios, thresholds, groups, multipliers)
    # E_p[−ℓ] ≤ −b + price, as likelihoods are written.
    samples, bounds = samples._replace(h=-samples.h), -bounds
    if given is not None:
        if not given.sum() < 1:
            raise ValueError(f"multipliers must sum to less than 1, not to {given.sum()}.")
        given = given / (1 - given.sum())
    parts = _cross_fitted(samples, bounds, key, given, _choose_reverse_kl)
    return _averaged(parts, bounds, [1 / (1 + tilt.sum()) for tilt, _ in parts])


def _checked(
    values: ArrayLike,
    thresholds: ArrayLike,
    groups: ArrayLike | None,
    multipliers: ArrayLike | None,
) -> tuple[_Samples, np.ndarray, np.ndarray | None]:
    h, bounds = np.asarray(values, np.float64), np.asarray(thresholds, np.float64)
    if h.ndim != 2 or h.shape[1:] != bounds.shape or not bounds.size:
        raise ValueError(
            f"expected values [n, m] and thresholds [m], m at least 1, got {list(h.shape)} and "
            f"{list(bounds.shape)}."
        )
    if not (np.isfinite(h).all() and np.isfinite(bounds).all()):
        raise ValueError("values at the samples and thresholds must be finite.")
    given = None
    if multipliers is not None:
        given = np.asarray(multipliers, np.float64)
        if given.shape != bounds.shape or not ((given >= 0) & np.isfinite(given)).all():
            raise ValueError(f"expected {len(bounds)} multipliers, at least 0, got {given}.")

    labels = np.zeros(len(h), int) if groups is None else np.asarray(groups)
    if labels.shape != h.shape[:1]:
        raise ValueError(f"expected groups [{len(h)}], got {list(labels.shape)}.")
    fewest = 4 if given is None else 2
    group, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    if not sizes.size or sizes.min() < fewest:
        raise ValueError(
            f"a floor takes at least {fewest} samples of each group, not "
            f"{sizes.min(initial=len(h))}. Without groups it is lower, and holds as well."
        )
    order = np.argsort(group, kind="stable")
    return _select(h[order], group[order], sizes / len(h)), bounds, given


def _select(h: np.ndarray, group: np.ndarray, shares: np.ndarray) -> _Samples:
    sizes = np.bincount(group, minlength=len(shares))
    return _Samples(h, group, np.cumsum(sizes) - sizes, sizes, shares)


def _cross_fitted(
    samples: _Samples,
    bounds: np.ndarray,
    key: Array | None,
    given: np.ndarray | None,
    choose: Callable[[_Samples, np.ndarray], np.ndarray],
) -> list[tuple[np.ndarray, _Samples]]:
    """The strengths α, and the samples to evaluate them on: all, or either half with the other's.

    The two estimates are averaged as independent ones. To first order they are: at the maximum
    of g a change of α by the one half's noise does not change what the other half shows.
    """
    if given is not None:
        return [(given, samples)]
    if key is None:
        raise ValueError("the halves are random: give a key, or multipliers.")
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    order = np.lexsort((generator.random(len(samples.group)), samples.group))
    odd = (np.arange(len(order)) - samples.starts[samples.group]) % 2 == 1
    first, second = (
        _select(samples.h[order[half]], samples.group[half], samples.shares) for half in (~odd, odd)
    )
    return [(choose(first, bounds), second), (choose(second, bounds), first)]


def _averaged(
    parts: list[tuple[np.ndarray, _Samples]], bounds: np.ndarray, scales: list[float]
) -> Floor:
    """Of scale · (−Σ_k s_k log mean_k e^{−αᵀh} − αᵀε), whose multipliers are scale · α."""
    value, chosen = 0.0, np.zeros_like(bounds)
    variance = effective = 0.0
    for (strengths, held), scale in zip(parts, scales, strict=True):
        means = _log_means(held, strengths)
        value += scale * _dual(held, means, strengths, bounds)
        variance += np.square(scale * held.shares) @ means.variance
        effective += _count(held, means)
        chosen = chosen + scale * strengths
    count = len(parts)
    return Floor(
        float(value) / count, float(np.sqrt(variance)) / count, effective, chosen / count, None
    )


def _dual(samples: _Samples, means: _LogMeans, strengths: np.ndarray, bounds: np.ndarray) -> float:
    return float(-samples.shares @ means.corrected - strengths @ bounds)


def _choose(samples: _Samples, bounds: np.ndarray, *, bounded: bool = True) -> np.ndarray:
    """The maximum of Σ_k −s_k log mean_k e^{−λᵀh} − λᵀε, or the way to it as far as samples lead.

    The maximum on few samples overshoots. Of the points on the ray to it that leave enough
    effective samples, the one with the largest corrected value is taken: 0 has the value 0. Where
    no maximum is found, one unseen sample could undo what the others show. If its weight is
    bounded, w ≤ 1 for h ≥ 0, it is kept a small part: Σw, too, is at least as large as asked.
    """
    (furthest, attained), best, chosen = _maximise(samples, bounds), 0.0, np.zeros_like(bounds)
    for scale in 0.9 ** np.arange(100):
        trial = scale * furthest
        means = _log_means(samples, trial)
        value = _dual(samples, means, trial, bounds)
        seen = np.inf
        if bounded and not attained:
            seen = len(samples.h) * (samples.shares @ np.exp(means.plain))
        if value > best and min(seen, _count(samples, means)) >= _fewest(samples):
            best, chosen = value, trial
        elif best > 0:
            break
    return chosen


def _maximise(samples: _Samples, bounds: np.ndarray) -> tuple[np.ndarray, bool]:
    """Newton's method with Levenberg's damping, projected onto λ ≥ 0, in float64 on the host.

    `solutions` has the same maximum, in a program compiled for each number of samples. Here the
    ascent also ends where too few samples are left. A step gains no more than 4 nats, so that it
    ends not far beyond, and at a finite λ where all samples violate a constraint. The second value
    says whether there is a maximum.
    """
    h, group, starts, sizes, shares = samples
    h = h - bounds  # the same problem, with ε = 0
    shifted = samples._replace(h=h)
    current, value, damping = np.zeros_like(bounds), 0.0, 1e-9
    at = _log_means(shifted, current)
    for _ in range(60):
        p = (shares / sizes)[group] * np.exp(-h @ current - at.plain[group])
        means = np.add.reduceat(p[:, None] * h, starts) / shares[:, None]
        gradient, centred = p @ h, h - means[group]
        free = (current > 0) | (gradient > 0)
        rises = np.abs(gradient) > 1e-6 * (p @ np.abs(h))
        if not (rises & free).any():
            return current, True
        if _count(samples, at) < _fewest(samples):
            break
        curvature = (p[:, None] * centred).T @ centred
        diagonal = np.maximum(np.diag(curvature), 1e-12 * (p @ np.square(h)))[free]
        matrix = curvature[np.ix_(free, free)] + damping * np.diag(diagonal)
        move = np.zeros_like(current)
        move[free] = np.linalg.solve(matrix, gradient[free])
        move *= min(1.0, 4 / (gradient @ move))
        trial = np.maximum(current + move, 0.0)
        new = _log_means(shifted, trial)
        reached = -shares @ new.plain
        if reached > value and reached >= value + 1e-4 * (gradient @ (trial - current)):
            current, value, at, damping = trial, reached, new, max(0.1 * damping, 1e-9)
        elif damping > 1e9:
            break
        else:
            damping = max(10 * damping, 1e-3)
    return current, False


def _choose_reverse_kl(samples: _Samples, bounds: np.ndarray) -> np.ndarray:
    """α at the maximum of (αᵀb − Σ_k s_k log mean_k exp(αᵀℓ))/(1 + Σα), for h = −ℓ and ε = −b."""
    price, best = 0.0, np.zeros_like(bounds)
    for _ in range(20):
        tilt = _choose(samples, bounds + price, bounded=False)
        reached = _dual(samples, _log_means(samples, tilt), tilt, bounds) / (1 + tilt.sum())
        if reached > price:
            best = tilt
        if reached <= price * (1 + 1e-5):
            break
        price = reached
    return best


def _fewest(samples: _Samples) -> float:
    """_FEWEST, or half of what there is where that is little."""
    return min(_FEWEST, 0.5 * _harmonic(samples.shares, samples.sizes))


def _count(samples: _Samples, means: _LogMeans) -> float:
    return _harmonic(samples.shares, means.effective)


def _harmonic(shares: np.ndarray, counts: np.ndarray) -> float:
    return float(1 / (shares @ (1 / counts)))


def _log_means(samples: _Samples, strengths: np.ndarray) -> _LogMeans:
    """In logarithms, and without differences of nearly equal numbers: weights span decades."""
    group, sizes = samples.group, samples.sizes

    def add(terms: np.ndarray) -> np.ndarray:
        return np.add.reduceat(terms, samples.starts)

    logits = -samples.h @ strengths
    top = np.maximum.reduceat(logits, samples.starts)
    weights = np.exp(logits - top[group])
    total = add(weights)
    shares = weights / total[group]
    plain = top + np.log(total / sizes)
    # Each sample left out: log mean_k changes by log(1 − share) − log(1 − 1/n).
    most = shares > 0.5
    rest = np.maximum(add(np.where(most, 0.0, weights)), np.finfo(float).tiny) / total
    left = np.where(most, np.log(rest)[group], np.log1p(-np.where(most, 0.0, shares)))
    left = left - np.log1p(-1 / sizes)[group]
    mean = add(left) / sizes
    spread = add(np.square(left - mean[group]))
    return _LogMeans(
        plain,
        corrected=plain - (sizes - 1) * mean,
        variance=(sizes - 1) / sizes * spread,
        effective=1 / add(np.square(shares)),
    )


def _bernstein_floor(
    samples: _Samples, current: np.ndarray, bounds: np.ndarray, failure: float
) -> float:
    """−Σ_k s_k log u_k − λᵀε for h ≥ 0, with u_k above the mean of group k but with `failure`."""
    weights, sizes, log = np.exp(-samples.h @ current), samples.sizes, np.log(2 / failure)
    mean = np.add.reduceat(weights, samples.starts) / sizes
    squares = np.add.reduceat(np.square(weights - mean[samples.group]), samples.starts)
    upper = mean + np.sqrt(2 * squares / (sizes - 1) * log / sizes) + 7 * log / (3 * (sizes - 1))
    return float(-samples.shares @ np.log(np.minimum(upper, 1.0)) - current @ bounds)
