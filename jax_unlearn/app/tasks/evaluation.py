"""What a run measures, the same way before and after: constraints, likelihoods, samples."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import divergences, losses, metrics, schedules
from jax_unlearn.app import data
from jax_unlearn.app.options import ImageOptions
from jax_unlearn.app.tasks.base import Measured, batch_rows, estimate, in_batches, spread
from jax_unlearn.app.tasks.drawing import Drawing, drawing, features_of
from jax_unlearn.app.tasks.images import ImageRequest, under_null
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.typing import Array, Estimate, Params

__all__ = ["Evaluation", "evaluator", "make_weighting"]

NELBO_DRAWS = 8
LEAST_DRAWS = 32
RECONSTRUCTED = 32


class Evaluation(NamedTuple):
    """The evaluation of a request.

    Attributes:
      measure: params -> (Measured, the loss of held-out images, which calibrates thresholds), on
        the same images and noise every time.
      drawing: how samples are drawn.
    """

    measure: Callable[[Params], tuple[Measured, Estimate]]
    drawing: Drawing


def make_weighting(request: ImageRequest, options: ImageOptions) -> losses.TimeWeighting:
    """The weights and probabilities of time steps that the options ask for.

    For "nelbo" t is drawn in proportion to w_t times the reference model's own error e_t at t,
    measured on 64 held-out images at 25 time steps. Where samplers clip x̂_0 to ±c, step t costs
    them at most ½(SNR_{t−1} − SNR_t) d (2c)² nats, so that w_t is at most this over e_t. It
    matters at the last step of the cosine schedule: w is 500 there, and would make a
    tenth of the NELBO of an error that no sample shows.

    Raises:
      ValueError: for "nelbo" at a zero terminal SNR, where the path KL is infinite.
    """
    schedule, config = request.pretrained.schedule, request.pretrained.config
    dimensions = int(np.prod(config.sample_shape))
    if options.weighting == "simple":
        return losses.time_weighting(losses.simple_weights(schedule.num_steps, dimensions))
    weights = divergences.path_kl_weights(schedule)
    if not bool(jnp.isfinite(weights).all()):
        raise ValueError("--weighting nelbo needs a schedule whose terminal SNR is not zero.")
    times = np.linspace(0, schedule.num_steps - 1, 25).round().astype(np.int32)
    images = data.take(request.held_out, np.arange(64) % len(request.held_out.pixels))
    keys = jax.random.split(jax.random.key(options.seed), len(times))

    @jax.jit
    def error(key: Array, t: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_x_0(x)
        noise = jax.random.normal(key, x_0.shape)
        many = jnp.full(len(x), t)
        x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[many])
        epsilon = losses.predict_epsilon(
            request.pretrained.apply,
            request.pretrained.params,
            schedule,
            x_t=x_t,
            t=many,
            cond=cond,
        )
        return losses.squared_error(epsilon, noise).mean()

    measured = [
        float(error(key, t, images.stored, request.cond(images.labels)))
        for key, t in zip(keys, times, strict=True)
    ]
    errors = np.exp(np.interp(np.arange(schedule.num_steps), times, np.log(measured)))
    if schedule.clip_range is not None:
        snr = np.exp(np.asarray(schedule.log_snr, np.float64))
        most = 2 * dimensions * schedule.clip_range**2 * -np.diff(snr, prepend=snr[:1]) / errors
        weights = jnp.concatenate([weights[:1], jnp.minimum(weights, most)[1:]])
    return losses.time_weighting(weights, errors)


def evaluator(
    request: ImageRequest,
    options: ImageOptions,
    weighting: losses.TimeWeighting,
    judge: JudgeFunctions | None,
) -> Evaluation:
    """Prepares the evaluation: chooses images and noise, and compiles when first used."""
    apply, reference, schedule, config = request.pretrained
    dimensions = int(np.prod(config.sample_shape))
    rng = np.random.default_rng([options.seed, 2])
    keys = jax.random.split(jax.random.key(options.seed + 1), 6)
    null, conditions = request.null, request.conditions
    batched = partial(in_batches, size=batch_rows(config.sample_shape))

    # Draw k of every constraint before draw k + 1 of any: time steps are stratified over a
    # batch, and each constraint must get its share of all of them.
    draws = max(options.evaluation_images // len(request.constraints), LEAST_DRAWS)
    tested = np.stack(
        [one.indices[spread(len(one.indices), draws, rng)] for one in request.constraints], axis=1
    ).ravel()
    owner = np.tile(np.arange(len(request.constraints)), draws)
    tested_images = data.take(request.forget, tested)
    tested_cond = request.cond(under_null(tested_images.labels, null, options.null_share, rng))
    held = data.take(
        request.held_out, spread(len(request.held_out.pixels), options.evaluation_images, rng)
    )
    held_cond = request.cond(under_null(held.labels, null, options.null_share, rng))

    @jax.jit
    def constraint_losses(params: Params, key: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_x_0(x)
        return losses.denoising_loss(
            apply,
            params,
            schedule,
            x_0=x_0,
            cond=cond,
            draws=losses.draw(key, x_0, weighting.probabilities),
            weighting=weighting,
            clip=True,
        )

    @jax.jit
    def path_kl(params: Params, key: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_x_0(x)
        drawn = losses.draw(key, x_0, weighting.probabilities)
        x_t = schedules.add_noise(x_0=x_0, noise=drawn.noise, log_snr=schedule.log_snr[drawn.t])
        return divergences.path_kl(
            apply,
            params,
            reference,
            schedule,
            x_t=x_t,
            t=drawn.t,
            cond=cond,
            weighting=weighting,
        )

    @jax.jit
    def nelbo(params: Params, key: Array, x: Array, cond: Any) -> Array:
        terms = divergences.nelbo_terms(
            apply,
            params,
            schedule,
            key,
            x_0=data.to_x_0(x),
            cond=cond,
            draws=NELBO_DRAWS,
            discrete=request.captions is None,
        )
        return divergences.bits_per_dim(terms.total, dimensions)

    @jax.jit
    def reconstruct(params: Params, key: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_x_0(x)
        found = metrics.reconstruct(
            lambda x_t, t: losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond),
            schedule,
            x_0,
            jax.random.normal(key, x_0.shape),
            start=int(0.6 * schedule.num_steps),
            steps=options.sampling_steps,
        )
        return conditions.decode(found)

    likelihood_sets = {}
    for name, images in (
        ("forgotten", request.forget),
        ("held_out", request.held_out),
        ("retained", request.retain),
    ):
        shown_images = spread(len(images.pixels), max(options.evaluation_images // 2, 1), rng)
        likelihood_sets[name] = data.take(images, shown_images)
    shown = data.take(
        request.forget,
        spread(len(request.forget.pixels), min(RECONSTRUCTED, len(request.forget.pixels)), rng),
    )
    sampled = request.pretrained if request.captions is None else request.captions.sampled
    drawn = drawing(sampled, conditions, options, judge, request.lost, known=request.known)
    features = features_of(judge)

    def measure(params: Params) -> tuple[Measured, Estimate]:
        values = batched(
            partial(constraint_losses, params), keys[0], tested_images.stored, tested_cond
        )
        by_constraint = [estimate(values[owner == i]) for i in range(len(request.constraints))]
        calibration = batched(partial(constraint_losses, params), keys[1], held.stored, held_cond)
        objective = batched(
            partial(path_kl, params), keys[2], held.stored, request.cond(held.labels)
        )
        nelbos = {
            name: batched(
                partial(nelbo, params), keys[3], images.stored, request.cond(images.labels)
            )
            for name, images in likelihood_sets.items()
        }
        found: dict[str, Any] = {}
        again = batched(
            partial(reconstruct, params), keys[4], shown.stored, request.cond(shown.labels)
        )
        reconstructions = data.to_pixels(again)
        similar = metrics.cosine_similarity(features(reconstructions), features(shown.pixels))
        found["similarity"] = estimate(np.asarray(similar))
        samples = drawn.draw(params)
        if samples is not None:
            found |= drawn.judge(samples, request.held_out.pixels[:2000])
        measured = Measured(
            objective=estimate(objective),
            constraints=Estimate(
                np.array([one.value for one in by_constraint]),
                np.array([one.stderr for one in by_constraint]),
            ),
            metrics=found,
            paired={"nelbo": nelbos},
            samples=samples,
            reconstructions=reconstructions,
        )
        return measured, estimate(calibration)

    return Evaluation(measure, drawn)
