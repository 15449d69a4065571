"""The diffusion classifier: posteriors of concepts by the model's own denoising losses, in nats.

A likelihood constraint bounds E_p[h_i(x)]. All it needs is a `Likelihood`, a function of clean
images x_0 [batch, ...] with values h_i(x_0) >= 0, [batch]. Three kinds, each one line:

  lambda x: jnp.exp(log_density(x))                                   # a density
  lambda x: jnp.exp(diffusion_classifier(..., x_0=x, ...).value[:, i])  # the model's own posterior
  lambda x: jax.nn.sigmoid(judge(x))                                  # any function

With the key held fixed, the second is as much a function of x as the others, and differentiable.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import divergences, losses, schedules
from jax_unlearn.typing import Array, ArrayLike, Denoiser, Estimate, Params

__all__ = [
    "Likelihood",
    "concept_energies",
    "count_concepts",
    "diffusion_classifier",
    "for_rows",
    "log_odds",
    "noised_weights",
]

Likelihood = Callable[[Array], Array]
"""h(x_0): images [batch, ...] -> nonnegative values [batch]."""


def mean_over_draws(values: Array) -> Estimate:
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

    With them an energy is the negative ELBO not of x_0 but of x_s ∼ q(x_s|x_0), on average, with s
    the last step left out. That makes a classifier of the noised image, by Bayes' rule as the other
    is. Two concepts differ by less there, but so do the errors of networks, which at low noise
    outweigh what tells concepts apart. The estimate also needs fewer draws.

    Args:
      schedule: of the denoiser.
      noise: standard deviation of the noise, α² + σ² = 1; 0 leaves nothing out.

    Raises:
      ValueError: if it leaves every step out, or for a zero terminal SNR.

    Example:
      ᾱ = 1/2, 1/4, 1/8 has σ = 0.71, 0.87, 0.94. The last two SNRs are 1/3 and 1/7, and
      ½ (7/3 − 1) = 0.667.

      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5, 0.5])
      >>> weights = likelihoods.noised_weights(schedule, noise=0.9)
      >>> [round(float(weight), 3) for weight in weights]
      [0.0, 0.0, 0.667]
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
    """The length of the one leading axis of conditions.

    Args:
      concepts: conditions, a pytree whose leaves are [concepts, ...].

    Raises:
      ValueError: for leaves whose leading axes differ, or a leaf without one.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods
      >>> likelihoods.count_concepts({"label": jnp.arange(3), "embedding": jnp.ones((3, 77, 8))})
      3
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(concepts)}
    if len(counts) != 1 or counts == {()}:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(concepts)]
        raise ValueError(f"concepts must share one leading axis, one entry a concept: {shapes}.")
    return counts.pop()[0]


def for_rows(concept: Any, batch: int) -> Any:
    """One condition, given to each of `batch` rows: leaves [...] -> [batch, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods
      >>> likelihoods.for_rows(jnp.array(7), 3).tolist()
      [7, 7, 7]
    """
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
    ε_c that of the sampled chain, which may clip. Every concept sees the same (t, ε), so that ‖ε‖²
    and most of the noise cancel in differences E_c − E_b. The draws of an image are stratified over
    time. Memory is that of one draw's forward pass, gradients included (they run it again).

    With the default weights, E_c + `divergences.prior_kl` + (d/2) log(2π v_1) is the negative
    ELBO of the ancestral chain of ε_c with posterior variances. Its last step is Gaussian with the
    variance of t = 1, v_1. So E_c bounds −log p_c(x_0) up to what no concept changes. The gap is
    KL(q(x_{1:T}|x_0) ‖ p_c(x_{1:T}|x_0)) of the noised images, and does not vanish even for exact
    denoisers. Its difference between concepts then does, as the steps are refined and σ_0 falls
    below their details; for networks that difference is unknown.

    Where ᾱ_{T−1} is nearly 0 (cosine schedules), w_{T−1} is so large that a network's errors at
    that step count for nats. Weights with 0 there leave them out.

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

    Example:
      A network that believes x_0 to be its concept c predicts (x_t − α c)/σ, which is off by
      α (c − x_0)/σ. At ᾱ = 3/4 the square is 3 (c − x_0)²: 0 and 12 for x_0 = 0 and c = 0, 2.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.25, 0.5])
      >>> def apply(params, x_t, t, cond):
      ...     alpha, sigma = schedules.alpha_sigma(schedule.log_snr[t], x_t)
      ...     return (x_t - alpha * cond[:, None]) / sigma
      >>> energies = likelihoods.concept_energies(
      ...     apply, None, schedule, jax.random.key(0), x_0=jnp.zeros((1, 1)),
      ...     concepts=jnp.array([0.0, 2.0]), draws=4, weights=[1.0, 0.0],
      ... )
      >>> [round(float(energy), 2) for energy in energies.mean(axis=0)[0]]
      [0.0, 12.0]
    """
    weighting = _time_weighting(schedule, weights, probabilities)
    x_0, count, batch = jnp.asarray(x_0), count_concepts(concepts), x_0.shape[0]
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}.")

    @jax.checkpoint
    def one(inputs: tuple[Array, Array]) -> Array:
        index, draw_key = inputs
        time_key, noise_key = jax.random.split(draw_key)
        uniform = jax.random.uniform(time_key, (batch,))
        u = (index.astype(uniform.dtype) + uniform) / draws
        t = losses.time_quantiles(weighting.probabilities, u)
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

    E_c = Σ_t w_t E‖ε − ε_c(x_t, t)‖², as `concept_energies` estimates it, with noise shared across
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

    Example:
      The network of `concept_energies`. x_0 = 0.9 costs 3 · 0.9² under concept 0 and 3 · 1.1² under
      concept 2, so that the odds are e^{1.2} = 3.3 to 1.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.25, 0.5])
      >>> def apply(params, x_t, t, cond):
      ...     alpha, sigma = schedules.alpha_sigma(schedule.log_snr[t], x_t)
      ...     return (x_t - alpha * cond[:, None]) / sigma
      >>> posterior = likelihoods.diffusion_classifier(
      ...     apply, None, schedule, jax.random.key(0), x_0=jnp.full((1, 1), 0.9),
      ...     concepts=jnp.array([0.0, 2.0]), draws=4, weights=[1.0, 0.0],
      ... )
      >>> [round(float(p), 3) for p in jnp.exp(posterior.value[0])]
      [0.769, 0.231]
    """
    count = count_concepts(concepts)
    log_prior = jnp.zeros(count) if log_prior is None else jnp.asarray(log_prior)
    if log_prior.shape != (count,):
        raise ValueError(f"log_prior must be [{count}], not {list(log_prior.shape)}.")
    at_least_two("draws", draws)
    energies = concept_energies(
        apply, params, schedule, key, x_0=x_0, concepts=concepts, draws=draws, **options
    )
    log_posterior = jax.nn.log_softmax(log_prior - energies.mean(axis=0))
    # E_c − Σ_k p_k E_k as one contraction: written as a difference, jaxlib 0.10.2 compiles the
    # moments over the draws into wrong numbers on a CPU.
    centre = jnp.eye(count) - jnp.exp(log_posterior)[:, :, None]
    centred = jnp.einsum("dbk,bkc->dbc", energies, centre, precision="highest")
    return Estimate(log_posterior, mean_over_draws(centred).stderr)


def at_least_two(name: str, given: int) -> None:
    """Raises ValueError for fewer than two draws, of which no standard error follows."""
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

    Example:
      The network of `concept_energies`: concept 0 knows x_0 = 0, and the base −2 costs 12 nats.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule(trained_betas=[0.25, 0.5])
      >>> def apply(params, x_t, t, cond):
      ...     alpha, sigma = schedules.alpha_sigma(schedule.log_snr[t], x_t)
      ...     return (x_t - alpha * cond[:, None]) / sigma
      >>> odds = likelihoods.log_odds(
      ...     apply, None, schedule, jax.random.key(0), x_0=jnp.zeros((1, 1)),
      ...     concepts=jnp.array([0.0]), base=jnp.array(-2.0), draws=4, weights=[1.0, 0.0],
      ... )
      >>> round(float(odds.value[0, 0]), 2)
      12.0
    """
    at_least_two("draws", draws)
    count_concepts(concepts)
    both = jax.tree.map(lambda c, b: jnp.concatenate([jnp.asarray(b)[None], c]), concepts, base)
    energies = concept_energies(
        apply, params, schedule, key, x_0=x_0, concepts=both, draws=draws, **options
    )
    return mean_over_draws(energies[..., :1] - energies[..., 1:])
