"""What a run measures, the same way before and after: constraints, likelihoods, samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import data, divergences, losses, metrics, samplers, schedules
from jax_unlearn.models.judge import JudgeFunctions
from jax_unlearn.options import RunOptions
from jax_unlearn.problem import Problem, under_null
from jax_unlearn.typing import Array, Estimate, Params

__all__ = ["Evaluation", "Measured", "estimate", "evaluator", "make_weighting"]

BATCH = 64
NELBO_DRAWS = 8
LEAST_DRAWS = 32
RECONSTRUCTED = 32


class Measured(NamedTuple):
    """The numbers and pictures of one set of parameters.

    Attributes:
      objective: path KL to the reference on held-out images, in the weighting's unit.
      constraints: the loss of each constraint's images, [m].
      calibration: the same loss on held-out images.
      nelbo: "forgotten", "held_out", "retained" -> the NELBO of each image shown, bits/dim, [n];
        a set smaller than n is shown several times, with other noise.
      metrics: name -> number, Estimate, or a further level of names.
      samples: uint8 [labels, samples, height, width, channels]; unconditional models have one
        row; None where none were asked for.
      reconstructions: uint8, forgotten images noised and denoised again.
    """

    objective: Estimate
    constraints: Estimate
    calibration: Estimate
    nelbo: dict[str, np.ndarray]
    metrics: dict[str, Any]
    samples: np.ndarray | None
    reconstructions: np.ndarray


class Evaluation(NamedTuple):
    """The evaluation of a problem.

    Attributes:
      measure: params -> Measured, on the same images and noise every time.
      originals: the images behind `reconstructions`, uint8.
      labels: the labels that `samples` has rows of; empty for an unconditional model.
    """

    measure: Callable[[Params], Measured]
    originals: np.ndarray
    labels: tuple[int, ...]


def estimate(values: np.ndarray) -> Estimate:
    """The mean of independent values [n] and its standard error (NaN for one value)."""
    stderr = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(np.asarray(values.mean()), np.asarray(stderr))


def _in_batches(function: Callable[..., Array], key: Array, *arrays: Any) -> np.ndarray:
    """function(key of the batch, *rows) over batches of one shape; the last is padded."""
    count = len(arrays[0])
    size = min(BATCH, count)
    outputs = []
    for number, start in enumerate(range(0, count, size)):
        rows = np.arange(start, start + size) % count
        part = [None if array is None else array[rows] for array in arrays]
        outputs.append(np.asarray(function(jax.random.fold_in(key, number), *part)))
    return np.concatenate(outputs)[:count]


def _spread(count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """`wanted` indices below `count`, every one as often as any other, give or take one."""
    rounds = -(-wanted // count)
    return np.concatenate([rng.permutation(count) for _ in range(rounds)])[:wanted]


def make_weighting(problem: Problem, options: RunOptions) -> losses.TimeWeighting:
    """The weights and probabilities of time steps that the options ask for.

    For "nelbo" t is drawn in proportion to w_t times the reference model's own error e_t at t,
    measured on 64 held-out images at 25 time steps. Where samplers clip x̂_0 to ±c, step t costs
    them at most ½(SNR_{t−1} − SNR_t) d (2c)² nats, so that w_t is at most this over e_t. It
    matters at the last step of the cosine schedule: w is 500 there, and would make a
    tenth of the NELBO of an error that no sample shows.

    Raises:
      ValueError: for "nelbo" at a zero terminal SNR, where the path KL is infinite.
    """
    schedule, config = problem.pretrained.schedule, problem.pretrained.config
    dimensions = int(np.prod(config.sample_shape))
    if options.weighting == "simple":
        return losses.time_weighting(losses.simple_weights(schedule.num_steps, dimensions))
    weights = divergences.path_kl_weights(schedule)
    if not bool(jnp.isfinite(weights).all()):
        raise ValueError("--weighting nelbo needs a schedule whose terminal SNR is not zero.")
    times = np.linspace(0, schedule.num_steps - 1, 25).round().astype(np.int32)
    images = data.take(problem.held_out, np.arange(64) % len(problem.held_out.pixels))
    keys = jax.random.split(jax.random.key(options.seed), len(times))

    @jax.jit
    def error(key: Array, t: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_unit_range(x)
        noise = jax.random.normal(key, x_0.shape)
        many = jnp.full(len(x), t)
        x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=schedule.log_snr[many])
        epsilon = losses.predict_epsilon(
            problem.pretrained.apply,
            problem.pretrained.params,
            schedule,
            x_t=x_t,
            t=many,
            cond=cond,
        )
        return losses.squared_error(epsilon, noise).mean()

    measured = [
        float(error(key, t, images.pixels, images.labels))
        for key, t in zip(keys, times, strict=True)
    ]
    errors = np.exp(np.interp(np.arange(schedule.num_steps), times, np.log(measured)))
    if schedule.clip_range is not None:
        snr = np.exp(np.asarray(schedule.log_snr, np.float64))
        most = 2 * dimensions * schedule.clip_range**2 * -np.diff(snr, prepend=snr[:1]) / errors
        weights = jnp.concatenate([weights[:1], jnp.minimum(weights, most)[1:]])
    return losses.time_weighting(weights, errors)


def evaluator(
    problem: Problem,
    options: RunOptions,
    weighting: losses.TimeWeighting,
    judge: JudgeFunctions | None,
) -> Evaluation:
    """Prepares the evaluation: chooses images and noise, and compiles when first used."""
    apply, reference, schedule, config = problem.pretrained
    dimensions = int(np.prod(config.sample_shape))
    rng = np.random.default_rng([options.seed, 2])
    keys = jax.random.split(jax.random.key(options.seed + 1), 6)
    null = config.null_label

    # Draw k of every constraint before draw k + 1 of any: time steps are stratified over a
    # batch, and each constraint must get its share of all of them.
    draws = max(options.evaluation_images // len(problem.constraints), LEAST_DRAWS)
    tested = np.stack(
        [one.indices[_spread(len(one.indices), draws, rng)] for one in problem.constraints], axis=1
    ).ravel()
    owner = np.tile(np.arange(len(problem.constraints)), draws)
    tested_images = data.take(problem.forget, tested)
    tested_cond = under_null(tested_images.labels, null, options.null_share, rng)
    held = data.take(
        problem.held_out, _spread(len(problem.held_out.pixels), options.evaluation_images, rng)
    )
    held_cond = under_null(held.labels, null, options.null_share, rng)

    @jax.jit
    def constraint_losses(params: Params, key: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_unit_range(x)
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
        x_0 = data.to_unit_range(x)
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
            x_0=data.to_unit_range(x),
            cond=cond,
            draws=NELBO_DRAWS,
        )
        return divergences.bits_per_dim(terms.total, dimensions)

    def guided(params: Params, cond: Any) -> Callable[[Array, Array], Array]:
        if cond is None or null is None or options.guidance == 1:
            return lambda x_t, t: apply(params, x_t, t, cond)
        free = jnp.full_like(cond, null)
        return samplers.guided(apply, params, cond, unconditional=free, scale=options.guidance)

    @jax.jit
    def draw_samples(params: Params, key: Array, noise: Array, cond: Any) -> Array:
        return samplers.sample(
            guided(params, cond), schedule, key, noise, steps=options.sampling_steps
        ).x_0

    @jax.jit
    def reconstruct(params: Params, key: Array, x: Array, cond: Any) -> Array:
        x_0 = data.to_unit_range(x)
        return metrics.reconstruct(
            lambda x_t, t: losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=cond),
            schedule,
            x_0,
            jax.random.normal(key, x_0.shape),
            start=int(0.6 * schedule.num_steps),
            steps=options.sampling_steps,
        )

    likelihood_sets = {}
    for name, images in (
        ("forgotten", problem.forget),
        ("held_out", problem.held_out),
        ("retained", problem.retain),
    ):
        shown_images = _spread(len(images.pixels), max(options.evaluation_images // 2, 1), rng)
        likelihood_sets[name] = data.take(images, shown_images)
    shown = data.take(
        problem.forget,
        _spread(len(problem.forget.pixels), min(RECONSTRUCTED, len(problem.forget.pixels)), rng),
    )
    labels = tuple(range(config.num_labels)) if config.num_labels else ()
    rows = max(len(labels), 1)
    noise = np.random.default_rng([options.seed, 3]).standard_normal(
        (rows * options.samples, *config.sample_shape), np.float32
    )
    wanted_labels = np.repeat(np.asarray(labels, np.int32), options.samples) if labels else None
    kept_labels = [label for label in labels if label not in problem.forgotten_labels]
    real = problem.held_out.pixels[:2000]

    def features(pixels: np.ndarray) -> np.ndarray:
        if judge is None:
            flat = np.asarray(data.to_unit_range(pixels)).reshape(len(pixels), -1)
            return flat - flat.mean(axis=1, keepdims=True)
        judged = jax.jit(judge.features)
        return _in_batches(lambda _, x: judged(data.to_unit_range(x)), keys[0], pixels)

    def judge_samples(samples: np.ndarray) -> dict[str, Any]:
        assert judge is not None
        flat = samples.reshape(-1, *config.sample_shape)
        judged = jax.jit(judge.logits)
        logits = _in_batches(lambda _, x: judged(data.to_unit_range(x)), keys[0], flat)
        found: dict[str, Any] = {}
        if wanted_labels is not None:
            by_class = metrics.agreement(logits, wanted_labels, len(labels))
            found["agreement"] = {
                config.label_name(label): {
                    "rate": float(by_class.rate[label]),
                    "stderr": float(by_class.stderr[label]),
                    "count": int(by_class.count[label]),
                }
                for label in labels
            }
        kept = samples[kept_labels] if labels else samples
        ours = features(kept.reshape(-1, *config.sample_shape))
        theirs = features(real)
        found["kid"] = metrics.kernel_distance(ours, theirs)
        found["fid"] = float(metrics.frechet_distance(ours, theirs))
        return found

    def measure(params: Params) -> Measured:
        values = _in_batches(
            lambda key, x, c: constraint_losses(params, key, x, c),
            keys[0],
            tested_images.pixels,
            tested_cond,
        )
        by_constraint = [estimate(values[owner == i]) for i in range(len(problem.constraints))]
        calibration = _in_batches(
            lambda key, x, c: constraint_losses(params, key, x, c), keys[1], held.pixels, held_cond
        )
        objective = _in_batches(
            lambda key, x, c: path_kl(params, key, x, c), keys[2], held.pixels, held.labels
        )
        nelbos = {
            name: _in_batches(
                lambda key, x, c: nelbo(params, key, x, c),
                keys[3],
                images.pixels,
                images.labels,
            )
            for name, images in likelihood_sets.items()
        }
        found: dict[str, Any] = {}
        again = _in_batches(
            lambda key, x, c: reconstruct(params, key, x, c), keys[4], shown.pixels, shown.labels
        )
        reconstructions = data.to_pixels(again)
        similar = metrics.cosine_similarity(features(reconstructions), features(shown.pixels))
        found["similarity"] = estimate(np.asarray(similar))
        samples = None
        if options.samples:
            drawn = _in_batches(
                lambda key, x, c: draw_samples(params, key, x, c), keys[5], noise, wanted_labels
            )
            samples = data.to_pixels(drawn).reshape(rows, options.samples, *config.sample_shape)
            if judge is not None:
                found |= judge_samples(samples)
        return Measured(
            objective=estimate(objective),
            constraints=Estimate(
                np.array([one.value for one in by_constraint]),
                np.array([one.stderr for one in by_constraint]),
            ),
            calibration=estimate(calibration),
            nelbo=nelbos,
            metrics=found,
            samples=samples,
            reconstructions=reconstructions,
        )

    return Evaluation(measure, shown.pixels, labels)
