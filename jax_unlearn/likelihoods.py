"""Likelihoods of images under a diffusion model, in nats: of a concept, or of the image itself.

A likelihood constraint bounds E_p[h_i(x)]; all it needs is a `Likelihood`, a function of clean
images x_0 [batch, ...] with values h_i(x_0) >= 0, [batch]. Three kinds, each one line:

  lambda x: jnp.exp(log_density(x))                                   # a density
  lambda x: jnp.exp(diffusion_classifier(..., x_0=x, ...).value[:, i])  # the model's own posterior
  lambda x: jax.nn.sigmoid(judge(x))                                  # any function

With the key held fixed, the second is as much a function of x as the others, and differentiable.

`log_likelihood` is log p(x) by the probability-flow ODE. The network is called at its integer
time steps alone: the solver's nodes lie on them, and time between them needs no interpolation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import divergences, losses, schedules
from jax_unlearn.typing import Array, ArrayLike, Denoiser, Estimate, Params

__all__ = [
    "Likelihood",
    "concept_energies",
    "diffusion_classifier",
    "log_likelihood",
    "log_odds",
    "log_ratio",
    "noised_weights",
    "posterior_odds",
]

Likelihood = Callable[[Array], Array]
"""h(x_0): images [batch, ...] -> nonnegative values [batch]."""

_DIVERGENCES = ("exact", "rademacher", "gaussian")


def _mean(values: Array) -> Estimate:
    """Mean over the first axis and its standard error, which is not differentiated."""
    deviation = jax.lax.stop_gradient(values).std(axis=0, ddof=1)
    return Estimate(values.mean(axis=0), deviation / np.sqrt(values.shape[0]))


def _path_weights(schedule: schedules.NoiseSchedule) -> Array:
    if np.isneginf(np.asarray(schedule.log_snr)[-1]):
        raise ValueError(
            "the path-KL weights of this schedule are infinite at its zero terminal SNR, where "
            "ε carries no image: pass finite `weights`, for instance with 0 at the last step."
        )
    return divergences.path_kl_weights(schedule)


def noised_weights(schedule: schedules.NoiseSchedule, noise: float) -> Array:
    """`divergences.path_kl_weights` of the steps whose σ_t is at least `noise`, else 0, [T].

    With them an energy is the negative ELBO not of x_0 but of x_s ∼ q(x_s|x_0), on average, s the
    last step left out: a classifier of the noised image, by Bayes' rule as the other is. Two
    concepts differ by less there, but so do the errors of networks, which at low noise outweigh
    what tells concepts apart; and the estimate needs fewer draws.

    Args:
      schedule: of the denoiser.
      noise: standard deviation of the noise, α² + σ² = 1; 0 leaves nothing out.

    Raises:
      ValueError: if it leaves every step out, or for a zero terminal SNR.
    """
    weights = _path_weights(schedule)
    sigma = np.sqrt(1 / (1 + np.exp(np.asarray(schedule.log_snr))))
    if not (sigma >= noise).any():
        raise ValueError(
            f"no step has noise of {noise} or more: the last one's is {sigma[-1]:.3g}."
        )
    return jnp.where(sigma >= noise, weights, 0.0)


def _time_weighting(
    schedule: schedules.NoiseSchedule,
    weights: ArrayLike | None,
    probabilities: ArrayLike | None,
) -> losses.TimeWeighting:
    weights = _path_weights(schedule) if weights is None else weights
    weights, log_snr = jnp.asarray(weights), schedule.log_snr
    if weights.shape != log_snr.shape:
        raise ValueError(f"weights must be {list(log_snr.shape)}, not {list(weights.shape)}.")
    if probabilities is None:
        # Where concepts differ, their ε differ by about α or less; √w keeps a share for steps
        # of large weight where α is small and networks still differ.
        shares = weights * jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(weights)
        probabilities = sum(0.5 * share / share.sum() for share in shares)
    probabilities = jnp.asarray(probabilities)
    if probabilities.shape != log_snr.shape:
        given = list(probabilities.shape)
        raise ValueError(f"probabilities must be {list(log_snr.shape)}, not {given}.")
    return losses.TimeWeighting(weights, probabilities)


def count_concepts(concepts: Any) -> int:
    """The length of the one leading axis of conditions, or a ValueError."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(concepts)}
    if len(counts) != 1 or counts == {()}:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(concepts)]
        raise ValueError(f"concepts must share one leading axis, one entry a concept: {shapes}.")
    return counts.pop()[0]


def for_rows(concept: Any, batch: int) -> Any:
    """One condition, given to each of `batch` rows."""
    return jax.tree.map(lambda c: jnp.broadcast_to(c, (batch, *jnp.shape(c))), concept)


def concept_energies(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: Array,
    concepts: Any,
    draws: int,
    weights: ArrayLike | None = None,
    probabilities: ArrayLike | None = None,
    concepts_at_once: int | None = None,
) -> Array:
    """(w_t/π_t) ‖ε − ε_c(α x_0 + σ ε, t)‖² -> [draws, batch, concepts].

    The mean over draws is an unbiased estimate of the energy E_c(x_0) = Σ_t w_t E‖ε − ε_c‖², with
    ε_c that of the sampled chain, which may clip.
    Every concept sees the same (t, ε), so that ‖ε‖² and most of the noise cancel in
    differences E_c − E_b; the draws of an image are stratified over time. Memory is that of one
    draw's forward pass, gradients included (they run it again).

    With the default weights, E_c + `divergences.prior_kl` + (d/2) log(2π v_1) is the negative
    ELBO of the ancestral chain of ε_c with posterior variances, whose last step is Gaussian
    with that of t = 1, v_1. So E_c bounds −log p_c(x_0) up to what no concept changes; the gap
    is KL(q(x_{1:T}|x_0) ‖ p_c(x_{1:T}|x_0)) of the noised images. It does not vanish, even
    for exact denoisers, but then its difference between concepts does, as the steps are refined
    and σ_0 falls below their details; for networks that difference is unknown. Where ᾱ_{T−1} is
    nearly 0 (cosine schedules), w_{T−1} is so large that a network's errors at that step count
    for nats: weights with 0 there leave them out.

    Args:
      apply: the conditional denoiser.
      params: its parameters.
      schedule: its noise schedule.
      key: a PRNG key.
      x_0: clean images [batch, ...].
      concepts: conditions, a pytree with one leading axis: labels [concepts], embeddings
        [concepts, ...].
      draws: number of (t, ε) for each image.
      weights: w_t, [T]; None takes `divergences.path_kl_weights`, in nats; see also
        `noised_weights`.
      probabilities: π_t, [T]; None draws half in proportion to w_t α_t, half to √w_t.
      concepts_at_once: how many concepts go into one forward pass; None takes all.

    Raises:
      ValueError: for concepts without one common leading axis, weights or probabilities that
        are not [T], no draws, or default weights at a zero terminal SNR.
    """
    weighting = _time_weighting(schedule, weights, probabilities)
    x_0, count, batch = jnp.asarray(x_0), count_concepts(concepts), x_0.shape[0]
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}.")
    cumulative = jnp.cumsum(weighting.probabilities)

    @jax.checkpoint
    def one(inputs: tuple[Array, Array]) -> Array:
        index, draw_key = inputs
        time_key, noise_key = jax.random.split(draw_key)
        u = (index + jax.random.uniform(time_key, (batch,))) / draws
        t = jnp.searchsorted(cumulative, u * cumulative[-1], side="right")
        t = jnp.minimum(t, schedule.num_steps - 1).astype(jnp.int32)
        noise = jax.random.normal(noise_key, x_0.shape, x_0.dtype)
        x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[t])

        def energy(concept: Any) -> Array:
            cond = for_rows(concept, batch)
            epsilon = losses.predict_epsilon(
                apply, params, schedule, x_t=x_t, t=t, cond=cond, clip=True
            )
            return losses.importance(weighting, t) * losses.squared_error(epsilon, noise)

        return jax.lax.map(energy, concepts, batch_size=concepts_at_once or count).T

    return jax.lax.map(one, (jnp.arange(draws), jax.random.split(key, draws)))


def diffusion_classifier(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: Array,
    concepts: Any,
    draws: int,
    log_prior: ArrayLike | None = None,
    **options: Any,
) -> Estimate:
    """The posterior log p(c|x_0) = log softmax_c(log prior_c − E_c(x_0)), [batch, concepts].

    E_c = Σ_t w_t E‖ε − ε_c(x_t, t)‖² as `concept_energies` estimates it, noise shared across
    concepts (Li et al. 2023). It is Bayes' rule with the ELBO of each concept in place of its
    log-likelihood: exact where the gaps of the concepts are equal, and only then.

    The standard error is that of E_c − Σ_k p(k|x_0) E_k over the draws (the delta method), and
    errs upwards, since the draws are stratified. The estimate is consistent in the draws; it
    is not unbiased, since the softmax is not linear.

    Args:
      apply: the conditional denoiser.
      params: its parameters.
      schedule: its noise schedule.
      key: a PRNG key; the same key gives the same function of `x_0` and `params`.
      x_0: clean images [batch, ...].
      concepts: conditions with a leading axis [concepts, ...]; their priors should sum to what
        an image can be, "none of these" included as a concept where it can.
      draws: number of (t, ε) for each image, at least 2.
      log_prior: [concepts], up to a constant; None is uniform.
      **options: `weights`, `probabilities`, `concepts_at_once` of `concept_energies`.

    Raises:
      ValueError: as `concept_energies`; for fewer than 2 draws or a prior not [concepts].
    """
    count = count_concepts(concepts)
    log_prior = jnp.zeros(count) if log_prior is None else jnp.asarray(log_prior)
    if log_prior.shape != (count,):
        raise ValueError(f"log_prior must be [{count}], not {list(log_prior.shape)}.")
    _at_least_two("draws", draws)
    energies = concept_energies(
        apply, params, schedule, key, x_0=x_0, concepts=concepts, draws=draws, **options
    )
    log_posterior = jax.nn.log_softmax(log_prior - energies.mean(axis=0))
    # E_c − Σ_k p_k E_k as one contraction: written as a difference, jaxlib 0.10.2 compiles the
    # moments over the draws into wrong numbers on a CPU.
    centre = jnp.eye(count) - jnp.exp(log_posterior)[:, :, None]
    centred = jnp.einsum("dbk,bkc->dbc", energies, centre, precision="highest")
    return Estimate(log_posterior, _mean(centred).stderr)


def _at_least_two(name: str, given: int) -> None:
    if given < 2:
        raise ValueError(f"a standard error takes at least 2 {name}, not {given}.")


def log_odds(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: Array,
    concepts: Any,
    base: Any,
    draws: int,
    **options: Any,
) -> Estimate:
    """The log-odds log p(x_0|c)/p(x_0|base) ≈ E_base(x_0) − E_c(x_0), [batch, concepts], in nats.

    With the null label as base this is log p(c|x_0)/p(c), whose gradient in x is s_c − s_∅.
    Unbiased for the difference of energies, which is that of two ELBOs (`concept_energies`);
    the standard error is over the draws, and errs upwards, since they are stratified.

    Args:
      apply: the conditional denoiser.
      params: its parameters.
      schedule: its noise schedule.
      key: a PRNG key.
      x_0: clean images [batch, ...].
      concepts: conditions with a leading axis [concepts, ...].
      base: one condition of the same structure, without the leading axis.
      draws: number of (t, ε) for each image, at least 2.
      **options: `weights`, `probabilities`, `concepts_at_once` of `concept_energies`.

    Raises:
      ValueError: as `concept_energies`, and for fewer than 2 draws.
    """
    _at_least_two("draws", draws)
    count_concepts(concepts)
    both = jax.tree.map(lambda c, b: jnp.concatenate([jnp.asarray(b)[None], c]), concepts, base)
    energies = concept_energies(
        apply, params, schedule, key, x_0=x_0, concepts=both, draws=draws, **options
    )
    return _mean(energies[..., :1] - energies[..., 1:])


def posterior_odds(*args: Any, **kwargs: Any) -> Array:
    """h_c(x_0) = p(x_0|c)/p(x_0|base) = exp(`log_odds`) -> [batch, concepts].

    Same arguments. Its estimate is too high on average, by about half the squared standard
    error of the log, relatively; and it is unbounded, unlike a posterior among concepts.
    """
    return jnp.exp(log_odds(*args, **kwargs).value)


class _Nodes(NamedTuple):
    """Start, middle and end of each step of the solver, each field [steps, 3]."""

    t: Array  # integers
    rate: Array  # σ dτ/ds


def _nodes(schedule: schedules.NoiseSchedule, steps: int, last: int) -> _Nodes:
    log_snr = np.asarray(schedule.log_snr, np.float64)[: last + 1]
    log_sigma, log_alpha = -0.5 * np.logaddexp(0, log_snr), -0.5 * np.logaddexp(0, -log_snr)
    tau = log_sigma - np.log1p(np.exp(log_alpha))
    # Even in τ as far as integers allow, each step two or more of them wide.
    even = 2 * np.arange(steps + 1)
    ends = np.abs(tau[:, None] - np.linspace(tau[0], tau[last], steps + 1)).argmin(axis=0)
    ends = np.minimum(np.maximum.accumulate(ends - even) + even, last - even[::-1])
    start, end = ends[:-1], ends[1:]
    half = [a + 1 + np.abs(tau[a + 1 : b] - (tau[a] + tau[b]) / 2).argmin()
            for a, b in zip(start, end, strict=True)]  # fmt: skip
    times = np.stack([start, np.array(half), end], axis=1)
    first, middle, final = tau[times].T
    rates = [4 * middle - 3 * first - final, final - first, first - 4 * middle + 3 * final]
    rate = np.exp(log_sigma)[times] * np.stack(rates, axis=1)
    return _Nodes(jnp.asarray(times, jnp.int32), jnp.asarray(rate, jnp.float32))


def _log_likelihoods(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    x_0: Array,
    key: Array | None,
    *,
    steps: int,
    divergence: str = "exact",
    probes: int = 8,
    last: int | None = None,
) -> Array:
    """One log p for each probe, [probes, batch]; [1, batch] with the exact trace."""
    x_0 = jnp.asarray(x_0)
    if last is None:
        last = schedule.num_steps - 1
        if schedule.prediction_type == "epsilon":  # α_t ≥ 1/200
            kept = np.asarray(schedule.log_snr) >= np.log(1 / (200**2 - 1))
            last = int(kept.sum()) - 1
    if not 2 <= last < schedule.num_steps:
        raise ValueError(f"last must be in [2, {schedule.num_steps - 1}], not {last}.")
    if not 1 <= steps <= last // 2:
        raise ValueError(
            f"steps must be in [1, {last // 2}], not {steps}: each takes two intervals of the "
            f"schedule's time steps 0 to {last}."
        )
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is not one of {_DIVERGENCES}.")
    if divergence == "exact":
        dimensions = x_0[0].size
        directions = jnp.eye(dimensions, dtype=x_0.dtype).reshape(dimensions, 1, *x_0.shape[1:])
        directions = jnp.broadcast_to(directions, (dimensions, *x_0.shape))
    else:
        _at_least_two("probes", probes)
        if key is None:
            raise ValueError(f"divergence {divergence!r} draws probes: pass a key.")
        random = jax.random.rademacher if divergence == "rademacher" else jax.random.normal
        directions = random(key, (probes, *x_0.shape), x_0.dtype)

    def slope(x: Array, nodes: _Nodes, k: int) -> tuple[Array, Array]:
        """d/ds of x and of log p at node k of a step."""
        t, rate = nodes.t[k], nodes.rate[k]

        def field(x: Array) -> Array:
            prediction = predict(x, jnp.full(x.shape[:1], t))
            return (
                rate
                * schedules.convert(
                    prediction,
                    x_t=x,
                    log_snr=schedule.log_snr[t],
                    prediction_type=schedule.prediction_type,
                ).velocity
            )

        value, derivative = jax.linearize(field, x)
        along = jax.vmap(lambda z: (z * derivative(z)).reshape(len(x), -1).sum(axis=1))(directions)
        return value, along.sum(axis=0, keepdims=True) if divergence == "exact" else along

    @jax.checkpoint
    def step(state: tuple[Array, Array], nodes: _Nodes) -> tuple[tuple[Array, Array], None]:
        x, total = state
        x_1, d_1 = slope(x, nodes, 0)
        x_2, d_2 = slope(x + 0.5 * x_1, nodes, 1)
        x_3, d_3 = slope(x + 0.5 * x_2, nodes, 1)
        x_4, d_4 = slope(x + x_3, nodes, 2)
        x = x + (x_1 + 2 * x_2 + 2 * x_3 + x_4) / 6
        return (x, total + (d_1 + 2 * d_2 + 2 * d_3 + d_4) / 6), None

    count = 1 if divergence == "exact" else probes
    start = x_0, jnp.zeros((count, x_0.shape[0]), x_0.dtype)
    (x_last, total), _ = jax.lax.scan(step, start, _nodes(schedule, steps, last))
    log_prior = jax.scipy.stats.norm.logpdf(x_last).reshape(len(x_0), -1).sum(axis=1)
    return log_prior + total


def _over_probes(values: Array) -> Estimate:
    if values.shape[0] == 1:
        return Estimate(values[0], jnp.zeros_like(values[0]))
    return _mean(values)


def log_likelihood(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    x_0: Array,
    key: Array | None = None,
    *,
    steps: int,
    divergence: str = "exact",
    probes: int = 8,
    last: int | None = None,
) -> Estimate:
    """The log-likelihood log p(x_0) by the probability-flow ODE, in nats -> [batch].

    log p(x_0) = log N(x(last); 0, I) + ∫ div(σ v)(x, t) dτ along dx/dτ = σ v(x, t), x(0) = x_0,
    with v the velocity α ε − σ x̂_0 and τ = log tan(φ/2), tan φ = σ/α = exp(−logSNR/2) (Song et
    al. 2021, "Score-based generative modeling through SDEs", eq. 39, in other coordinates). x
    keeps the scale of the data and of unit noise; τ is log σ at low noise, where details of any
    scale may appear, and finite at a zero terminal SNR.

    p is the law that the flow makes of N(0, I) at t = last, *at the least noisy step t = 0*: for
    an exact denoiser, of α_0 x + σ_0 ε, not of x. Images are not clipped. In bits per dimension:
    `divergences.bits_per_dim(-log_p, d)`, plus log2(127.5) for the 256 levels of [−1, 1] with
    uniform noise of one level added to them.

    The solver is the classical Runge-Kutta method of order four, in a time s in which each
    step's start, middle and end are integers t: τ(s) is the parabola through its values there.
    So the network is called at integers only, four times a step. On Gaussian data, 30 steps are
    within 1e-3 bits per dimension, on average over the data, on the usual schedules of 1000
    steps: 1e-5 for deviations near 1, and up to 2e-3 for details finer than σ_0, where the
    schedule's own first steps are wide and more steps do not help. Gradients recompute each
    step.

    Args:
      predict: (x_t, integer t [batch]) -> prediction in the schedule's prediction type, such
        as `samplers.guided` returns; examples must not interact.
      schedule: noise schedule, not traced.
      x_0: images [batch, ...].
      key: a PRNG key, for the probes.
      steps: of the solver, 1 to last // 2, as even in τ as integers t allow.
      divergence: "exact" (d derivatives a call, all at once: for low dimension), or
        Hutchinson's estimate with "rademacher" or "gaussian" probes, which is unbiased.
      probes: how many, at least 2, held fixed along the flow.
      last: the time step at which p is N(0, I). None is T−1, or, for networks that predict ε,
        the last step with α_t ≥ 1/200: their velocity is (ε − σ x)/α, which multiplies their
        errors by 1/α (the embedded model, with a cosine schedule: 328 bits a dimension from
        T−1 and 2.98 from 990), while the prior's error is at most about ½ ᾱ_last ‖x_0‖² nats.

    Returns:
      log p(x_0) and its standard error over probes, 0 with the exact trace; the solver's own
      error is not part of it.

    Raises:
      ValueError: for steps, last or divergence out of range, fewer than 2 probes, or no key.
    """
    options: dict[str, Any] = {"divergence": divergence, "probes": probes, "last": last}
    return _over_probes(_log_likelihoods(predict, schedule, x_0, key, steps=steps, **options))


def log_ratio(
    predict: Callable[[Array, Array], Array],
    other: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    x_0: Array,
    key: Array | None = None,
    **options: Any,
) -> Estimate:
    """The log-ratio log q(x_0)/q_i(x_0), `predict` over `other`, in nats -> [batch].

    Two runs of `log_likelihood` with the same probes, whose noise cancels as far as the two
    denoisers agree; the standard error is that of the difference. Arguments, `steps` and the other
    options among them, and errors are those of `log_likelihood`.
    """
    above, below = (
        _log_likelihoods(one, schedule, x_0, key, **options) for one in (predict, other)
    )
    return _over_probes(above - below)
