"""Noised images of what is forgotten, denoised under any condition as if it never was known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.formulations.trajectories import concatenate
from jax_unlearn.problem import Batch, Images, Losses, NoisyPoints, Problem
from jax_unlearn.typing import Array, Condition, Denoiser, Params

__all__ = ["without"]


def without(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    *,
    reference_apply: Denoiser | None = None,
) -> Problem:
    """min E_kept ‖ε_θ − ε_q‖²/d subject to E_i ‖ε_θ(x_t, t, c) − ε̄_i(x_t, t)‖²/d ≤ τ_i.

    E_i is over noised images of concept i, and ε̄_i what a model predicts there that knows only the
    other concepts (`likelihoods.rest_path`). d is the number of dimensions of an image.

    The conditions c of these points may be any: `robust` and `against_pool` have an adversary
    choose them. Inversion of a condition looks for the one under which noised images of the concept
    are denoised best. Where the constraint holds at all conditions with τ_i = 0, it finds none that
    makes them more likely than the rest does.

    With `concept` ε_i, the reference's prediction at what is to be forgotten, a point counts only
    where the model is nearer to ε_i than the rest is, ‖ε_θ − ε_i‖ < ‖ε̄_i − ε_i‖. Elsewhere it
    denoises the concept no better than the rest. So a kept condition may stay what it is. Without
    `concept` it would have to predict ε̄_i at much noise, where images of all kinds look alike.

    ε_q is the reference's prediction at the `base` of a kept row, which is its condition where it
    has none. A forgotten condition is kept too: its base is what stands in its place.

    The objective's noise and uniform time steps are drawn with the key; the points are given.
    Kept rows and points are one forward pass of the trained network. Predictions are not clipped.

    Args:
      apply: the denoiser of p.
      schedule: its noise schedule.
      reference_apply: the denoiser of q, called with the reference's parameters; default `apply`.

    Returns:
      A Problem over `Batch(kept, forget)`: `Images`, and `NoisyPoints` of which `posterior`, `push`
      and `values` are not read, and `constraint` is [f]. It raises ValueError for other rows, and
      for kept and forgotten conditions that do not make one array.

    Example: a network that says θ c, of a reference that says c. A kept row c = 1 has the loss
      (θ − 1)²; points c = 3 where the rest says 0 have (3θ)². Here θ is ½.

      >>> import jax, jax.numpy as jnp
      >>> from jax_unlearn import formulations, lagrangian, schedules
      >>> from jax_unlearn.problem import Batch, Images, NoisyPoints
      >>> schedule = schedules.noise_schedule(trained_betas=[0.5, 0.5])
      >>> problem = formulations.without(lambda theta, x_t, t, cond: theta * cond, schedule)
      >>> x, t = jnp.zeros((2, 1)), jnp.array([0, 1])
      >>> points = NoisyPoints(
      ...     x, t, cond=x + 3, epsilon=x, posterior=None, push=None, values=None, constraint=0 * t
      ... )
      >>> value, found = lagrangian(
      ...     problem, 0.5, 1.0, jax.random.key(0), Batch(Images(x, x + 1), points), [2.0], [0.25]
      ... )
      >>> [round(float(x), 3) for x in (found.objective, found.values[0], value)]
      [0.25, 2.25, 4.25]
    """
    frozen = apply if reference_apply is None else reference_apply
    uniform = jnp.full(schedule.num_steps, 1 / schedule.num_steps)

    def evaluate(
        params: Params,
        reference: Params,
        key: Array,
        batch: Batch,
        current: Array,
        /,
        *,
        axis_name: str | None = None,
    ) -> Losses:
        del current  # the losses do not depend on the multipliers
        kept, forget = _rows(batch)
        drawn = losses.draw(key, kept.x_0, uniform, axis_name=axis_name)
        noised = schedules.add_noise(
            x_0=kept.x_0, noise=drawn.noise, log_snr=schedule.log_snr[drawn.t]
        )
        base = kept.cond if kept.base is None else kept.base
        theirs = losses.predict_epsilon(
            frozen, reference, schedule, x_t=noised, t=drawn.t, cond=base
        )
        ours = losses.predict_epsilon(
            apply,
            params,
            schedule,
            x_t=jnp.concatenate([noised, forget.x_t]),
            t=jnp.concatenate([drawn.t, forget.t]),
            cond=concatenate(kept.cond, forget.cond),
        )
        target = jax.lax.stop_gradient(jnp.concatenate([theirs, forget.epsilon]))
        apart = losses.squared_error(ours, target) / noised[0].size
        count = noised.shape[0]
        values = apart[count:]
        if forget.concept is not None:
            shown = losses.squared_error(ours[count:], forget.concept)
            values = jnp.where(
                shown < losses.squared_error(forget.epsilon, forget.concept), values, 0.0
            )
        return Losses(apart[:count], values, jnp.asarray(forget.constraint))

    return Problem(evaluate, sign=-1.0, project=multipliers.non_negative(), name="without")


def _rows(batch: Batch) -> tuple[Images, NoisyPoints]:
    kept, forget = batch.kept, batch.forget
    if (
        batch.base is not None
        or not isinstance(kept, Images)
        or not isinstance(forget, NoisyPoints)
    ):
        raise ValueError(
            "expected a Batch of Images that are kept and NoisyPoints to forget, and no base; got "
            f"{type(kept).__name__} and {type(forget).__name__}."
        )
    points, given = np.shape(forget.x_t)[:1], np.shape(forget.constraint)
    if given != points:
        raise ValueError(f"points {list(points)} have a constraint each, not {list(given)}.")
    if _kinds(kept.cond) != _kinds(forget.cond):
        raise ValueError(
            "kept and forgotten conditions must be of one kind: got "
            f"{_kinds(kept.cond)} and {_kinds(forget.cond)}."
        )
    return kept, forget


def _kinds(cond: Condition) -> Any:
    """The structure of conditions, and of each leaf the shape of a row and whether it is real."""
    leaves, structure = jax.tree.flatten(cond)
    real = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    shapes = [jnp.shape(leaf)[1:] for leaf in leaves]
    return structure, list(zip(shapes, real, strict=True))
