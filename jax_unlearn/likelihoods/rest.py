"""What a denoiser that knows only some concepts predicts, from a model of these and others."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_unlearn import schedules
from jax_unlearn.likelihoods.classifier import count_concepts
from jax_unlearn.likelihoods.posteriors import posterior_path
from jax_unlearn.typing import Array, ArrayLike, Denoiser, Params

__all__ = ["RestPath", "rest_path"]


class RestPath(NamedTuple):
    """Points of one noising path of each image, the noisiest first.

    Attributes:
      x_t: [steps, batch, ...].
      epsilon: ε̄(x_t), what is predicted there by one who knows the rest alone, [steps, batch, ...].
      posterior: p(c|x_t) among the rest, [steps, batch, concepts].
    """

    x_t: Array
    epsilon: Array
    posterior: Array


def rest_path(
    apply: Denoiser,
    params: Params,
    schedule: schedules.NoiseSchedule,
    key: Array,
    *,
    x_0: Array,
    times: Array,
    concepts: Any,
    log_prior: ArrayLike | None = None,
) -> RestPath:
    """Noises each image along one path, and predicts its noise as who knows only the rest.

    ε̄(x_t) = Σ_c p(c|x_t) ε_c(x_t),   p(c|x_t) ∝ π_c q_c(x_t) over the `concepts` alone

    That is the denoiser of Σ_c π_c q_c, at images that this mixture may never show. The images are
    those of a concept to be forgotten, and `concepts` are all others: ε̄ is then what a model
    predicts that never knew it. The posterior is that of `posterior_path`, which holds for every
    path, of whatever image. For exact denoisers and ever finer steps ε̄ is exact.

    ε_c is not clipped, unlike the means that the posterior compares: it is a target of training.
    All concepts go through the network in one pass, [concepts · batch], at one time step each: the
    pass that moves the posterior on gives ε̄ too.

    Args:
      apply: the conditional denoiser.
      params: its parameters.
      schedule: its noise schedule.
      key: a PRNG key.
      x_0: clean images [batch, ...], of what is to be forgotten.
      times: integer time steps, falling strictly, [steps]; the posterior starts at the prior.
      concepts: of the rest, conditions with a leading axis [concepts, ...].
      log_prior: log π of the rest, [batch, concepts] or [concepts], up to a constant; None is
        uniform.

    Raises:
      ValueError: for concepts without one common leading axis, or a prior that does not fit them.

    Example:
      The rest are the points −1 and 1: network c predicts (x_t − α c)/σ. A forgotten image at 0.8
      is, to who knows no other than these, a noised 1.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import likelihoods, schedules
      >>> schedule = schedules.noise_schedule(num_steps=100, beta_end=0.2)
      >>> alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(s * schedule.log_snr)) for s in (1, -1))
      >>> def apply(params, x_t, t, cond):
      ...     return (x_t - (alpha[t] * cond)[:, None]) / sigma[t][:, None]
      >>> times = jnp.array([99, 60, 30, 5])
      >>> path = likelihoods.rest_path(
      ...     apply, None, schedule, jax.random.key(0), x_0=jnp.full((1, 1), 0.8), times=times,
      ...     concepts=jnp.array([-1.0, 1.0]),
      ... )
      >>> shown = (path.x_t[:, 0, 0] - sigma[times] * path.epsilon[:, 0, 0]) / alpha[times]
      >>> [round(float(x), 2) for x in (shown[0], shown[-1])]
      [0.0, 1.0]
    """
    count = count_concepts(concepts)
    path = posterior_path(
        apply, params, schedule, key,
        x_0=x_0, times=times, concepts=concepts, members=jnp.eye(count), log_prior=log_prior,
    )  # fmt: skip
    return RestPath(path.x_t, path.epsilon, path.posterior)
