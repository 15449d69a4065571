"""Weight-based unlearning methods, for comparison with constrained unlearning.

Each method is a function that returns a loss (params, reference, key, batch) -> scalar, whose
gradient in params any optax optimizer takes; losses over one kind of batch may be added. Parts of
a loss are means of their own, so that its weights do not depend on how many examples a batch has
of each. Where a method prescribes a gradient that is not that of a loss (SISS, EraseDiff), the
scalar has the prescribed one. Batches of images are `formulations.Batch`; its `base` and `kept`
are both denoised as data here. `loss` below is Σ_t w_t E‖ε − ε_θ(x_t, t, c)‖², in the unit of
the weights. The equal-weight Lagrangian is `primal_dual` with `optax.set_to_zero()`.

NegGrad: Golatkar et al. 2020 (arXiv 1911.04933). SISS: Alberti et al. 2025, Data Unlearning in
Diffusion Models (2503.01034). EraseDiff: Wu et al. 2025 (2401.05779). ESD: Gandikota et al. 2023
(2303.07345). SalUn: Fan et al. 2024 (2310.12508). Selective Amnesia: Heng and Soh 2023
(2305.10120). Concept Ablation: Kumari et al. 2023 (2303.13516).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import ndtr

from jax_unlearn import losses, samplers, schedules
from jax_unlearn.formulations import Batch, Examples, Separated, on_policy
from jax_unlearn.typing import Array, ArrayLike, Condition, Denoiser, Params

__all__ = [
    "Anchored",
    "MaskedState",
    "Remembered",
    "concept_ablation",
    "erase_diff",
    "esd",
    "esd_target",
    "fisher",
    "masked",
    "naive_deletion",
    "neg_grad",
    "partial_sample",
    "saliency_mask",
    "selective_amnesia",
    "siss",
    "train_step",
]

Loss = Callable[[Params, Any, Array, Any], Array]


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, Array]]:
    """(key, params, opt_state, reference, batch) -> (params, opt_state, value); to be jitted."""

    def step(
        key: Array, params: Params, opt_state: Any, reference: Any, batch: Any
    ) -> tuple[Params, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(params, reference, key, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def _mean_loss(
    apply: Denoiser, schedule: schedules.NoiseSchedule, weighting: losses.TimeWeighting
) -> Callable[[Params, Array, Examples], Array]:
    def mean(params: Params, key: Array, rows: Examples) -> Array:
        draws = losses.draw(key, rows.x_0, weighting.probabilities)
        return losses.denoising_loss(
            apply,
            params,
            schedule,
            x_0=rows.x_0,
            cond=rows.cond,
            draws=draws,
            weighting=weighting,
        ).mean()

    return mean


def _retained(batch: Batch) -> Examples:
    parts = [part for part in (batch.base, batch.kept) if part is not None]
    if not parts:
        raise ValueError("the batch has nothing to retain: give examples in kept or in base.")
    return on_policy.concatenate(*parts)


def _forgotten(batch: Batch) -> Examples:
    return Examples(batch.forget.x_0, batch.forget.cond)


def naive_deletion(
    apply: Denoiser, schedule: schedules.NoiseSchedule, weighting: losses.TimeWeighting
) -> Loss:
    """loss(retained): goes on training without what is forgotten. `batch.forget` is not read.

    The loss raises ValueError for a batch with neither `kept` nor `base`.
    """
    mean = _mean_loss(apply, schedule, weighting)
    return lambda params, reference, key, batch: mean(params, key, _retained(batch))


def neg_grad(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    scale: float,
) -> Loss:
    """loss(retained) − s loss(forgotten); ascent alone where a batch has nothing to retain.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      scale: s.
    """
    mean = _mean_loss(apply, schedule, weighting)

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        kept_key, forget_key = jax.random.split(key)
        forgotten = mean(params, forget_key, _forgotten(batch))
        if batch.kept is None and batch.base is None:
            return -scale * forgotten
        return mean(params, kept_key, _retained(batch)) - scale * forgotten

    return loss


def _two_gradients(
    pair: Callable[[Params], tuple[Array, Array]], params: Params
) -> tuple[tuple[Array, Array], Params, Params]:
    """The values of two losses and the gradient of each, at fixed params."""
    values, vjp = jax.vjp(pair, jax.lax.stop_gradient(params))
    one, zero = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
    return values, vjp((one, zero))[0], vjp((zero, one))[0]


def _with_gradient(value: Array, gradient: Params, params: Params) -> Array:
    """A scalar of this value, whose derivative in params is `gradient`."""
    still = jax.lax.stop_gradient(params)
    return value + optax.tree.vdot(gradient, optax.tree.sub(params, still))


def siss(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    norm: float,
    mixing: float = 0.5,
    estimator: str = "importance",
    max_norm: float = 1.0,
) -> Loss:
    """SISS(λ): the gradient is g_x − (ν/‖g_a‖) g_a, then shortened to `max_norm`.

    g_x and g_a are the whole batch's gradients of loss(retained) and loss(forgotten). With
    "importance" both come from one forward pass at x_t of the mixture (1−λ) q(·|x) + λ q(·|a),
    as weights w_x ‖ε_x − ε_θ‖² and w_a ‖ε_a − ε_θ‖² say (`losses.mixture`), row j of
    the retained images paired with row j of the forgotten ones under the latter's condition.
    With "two_term" each set is noised and denoised by itself. The value is that of
    loss(retained) − (ν/‖g_a‖) loss(forgotten).

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      norm: ν, of the ascent's part of the gradient.
      mixing: λ in (0, 1).
      estimator: "importance" or "two_term".
      max_norm: to which the gradient is clipped.

    Raises:
      ValueError: for an unknown estimator or a λ outside (0, 1); and by the loss, where
        "importance" gets other numbers of retained and of forgotten images.
    """
    if estimator not in ("importance", "two_term"):
        raise ValueError(f"estimator {estimator!r} is not 'importance' or 'two_term'.")
    if not 0 < mixing < 1:
        raise ValueError(f"mixing must lie inside (0, 1), not be {mixing}.")
    mean = _mean_loss(apply, schedule, weighting)

    def mixed_pair(params: Params, key: Array, rows: Examples, other: Examples) -> tuple:
        if rows.x_0.shape != other.x_0.shape:
            raise ValueError(
                "SISS pairs each forgotten image with a retained one: got the shapes "
                f"{other.x_0.shape} and {rows.x_0.shape}."
            )
        drawn = losses.draw(key, rows.x_0, weighting.probabilities)
        mixed = losses.mixture(
            x=rows.x_0,
            a=other.x_0,
            noise=drawn.noise,
            choose_a=drawn.uniform < mixing,
            log_snr=schedule.log_snr[drawn.t],
            mixing=mixing,
        )
        epsilon = losses.predict_epsilon(
            apply, params, schedule, x_t=mixed.x_t, t=drawn.t, cond=other.cond
        )
        scale = losses.importance(weighting, drawn.t)
        kept = scale * mixed.weight_x * losses.squared_error(epsilon, mixed.noise_x)
        forgotten = scale * mixed.weight_a * losses.squared_error(epsilon, mixed.noise_a)
        return kept.mean(), forgotten.mean()

    def separate_pair(params: Params, key: Array, rows: Examples, other: Examples) -> tuple:
        kept_key, forget_key = jax.random.split(key)
        return mean(params, kept_key, rows), mean(params, forget_key, other)

    pair = mixed_pair if estimator == "importance" else separate_pair

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        rows, other = _retained(batch), _forgotten(batch)
        (kept, forgotten), g_x, g_a = _two_gradients(lambda p: pair(p, key, rows, other), params)
        scale = norm / jnp.maximum(optax.tree.norm(g_a), 1e-30)
        gradient = jax.tree.map(lambda x, a: x - scale * a, g_x, g_a)
        clip = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(gradient), 1e-30))
        return _with_gradient(kept - scale * forgotten, optax.tree.scale(clip, gradient), params)

    return loss


def erase_diff(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    eta: float,
) -> Loss:
    """EraseDiff: the gradient is g_r + λ g_f, with λ = max(0, η − ⟨g_r, g_f⟩/‖g_f‖²).

    g_r is the gradient of loss(retained); g_f that of loss(forgotten) with uniform noise on
    [0, 1), in x_t and as the target, in place of the normal one. λ is the least with which the
    forgetting loss falls at the rate η‖g_f‖². The paper's constraint is loss_f(θ) ≤ loss_f(φ),
    where φ is K steps of descent of loss_f from θ; loss_f(φ) is held fixed, hence its gradient is
    zero, and neither g_f nor λ depends on it: the K steps are left out.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      eta: η.
    """
    mean = _mean_loss(apply, schedule, weighting)

    def pair(params: Params, key: Array, batch: Batch) -> tuple[Array, Array]:
        kept_key, forget_key = jax.random.split(key)
        draws = losses.draw(forget_key, batch.forget.x_0, weighting.probabilities)
        forgotten = losses.denoising_loss(
            apply,
            params,
            schedule,
            x_0=batch.forget.x_0,
            cond=batch.forget.cond,
            draws=draws._replace(noise=ndtr(draws.noise)),
            weighting=weighting,
        )
        return mean(params, kept_key, _retained(batch)), forgotten.mean()

    def loss(params: Params, reference: Params, key: Array, batch: Batch) -> Array:
        (kept, forgotten), g_r, g_f = _two_gradients(lambda p: pair(p, key, batch), params)
        along = optax.tree.vdot(g_r, g_f) / jnp.maximum(optax.tree.vdot(g_f, g_f), 1e-30)
        weight = jnp.maximum(0.0, eta - along)
        gradient = jax.tree.map(lambda r, f: r + weight * f, g_r, g_f)
        return _with_gradient(kept + weight * forgotten, gradient, params)

    return loss


def partial_sample(
    predict: Callable[[Array, Array], Array],
    schedule: schedules.NoiseSchedule,
    x_start: Array,
    *,
    steps: int,
    count: ArrayLike,
) -> tuple[Array, Array]:
    """The first `count` of `steps` DDIM steps, η = 0: the state x_t [batch, ...] and its time t.

    It is x[count], t[count] of `samplers.sample`'s trajectory. `count`, in [0, steps), may be
    traced: a loop of that many steps runs, not a masked one of `steps`.
    """
    times = jnp.asarray(schedules.timesteps(schedule, steps))
    log_snr = schedule.log_snr[times]

    def body(step: Array, x_t: Array) -> Array:
        return samplers.ddim_step(
            predict(x_t, jnp.full(x_t.shape[:1], times[step])),
            x_t=x_t,
            noise=jnp.zeros_like(x_t),
            log_snr_t=log_snr[step],
            log_snr_s=log_snr[step + 1],
            schedule=schedule,
        )

    return jax.lax.fori_loop(0, count, body, x_start), times[count]


def esd_target(
    apply: Denoiser, reference: Params, cond: Condition, *, null: Condition, strength: float
) -> Callable[[Array, Array], Array]:
    """ε_q(x_t, ∅) − η (ε_q(x_t, c) − ε_q(x_t, ∅)): guidance of scale −η, as (x_t, t) -> prediction.

    It is reverse KL's composed score where q_i = q(·|c), q = q(·|∅) and α = η
    (`duality.compose_reverse_kl` with λ = η/(1+η)).
    """
    return samplers.guided(apply, reference, cond, unconditional=null, scale=-strength)


def esd(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    *,
    shape: tuple[int, ...],
    strength: float = 1.0,
    guidance: float = 3.0,
    steps: int = 50,
) -> Loss:
    """ESD: E‖ε_θ(x_t, c) − (ε_q(x_t, ∅) − η (ε_q(x_t, c) − ε_q(x_t, ∅)))‖².

    x_t are states of the model being trained: noise after a uniformly drawn number of its first
    `steps` DDIM steps, one number a batch, with classifier-free guidance, all held fixed. Where
    θ is what is updated, masks over parameters (`optax.masked`) make the paper's variants.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      shape: of one example, without the batch axis.
      strength: η.
      guidance: scale of guidance of the partial sampling.
      steps: of the whole sampler.

    Returns:
      A loss over `Separated`: c is `cond` for θ and the guided sampling and `target` for q, ∅ is
      `base`; `constraint` is not read.
    """

    def loss(params: Params, reference: Params, key: Array, batch: Separated) -> Array:
        count_key, noise_key = jax.random.split(key)
        keys = losses.example_keys(noise_key, jax.tree.leaves(batch.target)[0].shape[0])
        x_t, time = partial_sample(
            samplers.guided(
                apply,
                jax.lax.stop_gradient(params),
                batch.cond,
                unconditional=batch.base,
                scale=guidance,
            ),
            schedule,
            jax.vmap(lambda key: jax.random.normal(key, shape))(keys),
            steps=steps,
            count=jax.random.randint(count_key, (), 0, steps),
        )
        t = jnp.full(x_t.shape[:1], time)
        target = esd_target(apply, reference, batch.target, null=batch.base, strength=strength)
        wanted = losses.predict_epsilon(
            lambda params, x_t, t, cond: target(x_t, t), None, schedule, x_t=x_t, t=t, cond=None
        )
        ours = losses.predict_epsilon(apply, params, schedule, x_t=x_t, t=t, cond=batch.cond)
        return losses.squared_error(ours, wanted).mean()

    return loss


def saliency_mask(gradient: Params, share: float = 0.5) -> Params:
    """SalUn's weights to train: the `share` of all entries with the largest |gradient|.

    Args:
      gradient: of the loss of the images to forget, over all of them, at the pretrained model;
        for instance `jax.grad` of `neg_grad` on batches of `forget` alone, summed.
      share: in (0, 1]; of n entries ⌊share n⌋ are chosen, ties in the order of the leaves.

    Returns:
      A tree of booleans for `masked`.

    Raises:
      ValueError: for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], not be {share}.")
    leaves, tree = jax.tree.flatten(gradient)
    magnitudes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in leaves])
    chosen = jnp.argsort(magnitudes, descending=True, stable=True)[: int(share * magnitudes.size)]
    flat = jnp.zeros(magnitudes.shape, bool).at[chosen].set(True)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)
    parts = zip(leaves, ends[:-1], ends[1:], strict=True)
    return tree.unflatten(flat[start:end].reshape(leaf.shape) for leaf, start, end in parts)


class MaskedState(NamedTuple):
    """The mask, and the state of the optimizer behind it."""

    mask: Params
    inner: Any


def masked(optimizer: optax.GradientTransformation, mask: Params) -> optax.GradientTransformation:
    """The optimizer on some entries of each array; the others do not move at all.

    The mask acts on gradients, so that moments and norms know of none other, and once more on
    updates, so that weight decay does not move the rest. (`optax.masked` is for whole arrays.)

    Args:
      optimizer: any.
      mask: booleans, the tree and shapes of the parameters; it is carried in the state.
    """

    def select(mask: Params, updates: Params) -> Params:
        return jax.tree.map(lambda chosen, leaf: jnp.where(chosen, leaf, 0), mask, updates)

    def init(params: Params) -> MaskedState:
        return MaskedState(jax.tree.map(jnp.asarray, mask), optimizer.init(params))

    def update(
        updates: Params, state: MaskedState, params: Params = None
    ) -> tuple[Params, MaskedState]:
        updates, inner = optimizer.update(select(state.mask, updates), state.inner, params)
        return select(state.mask, updates), state._replace(inner=inner)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore


class Remembered(NamedTuple):
    """What Selective Amnesia is held to: the pretrained parameters θ* and their `fisher`."""

    params: Params
    fisher: Params


def fisher(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    params: Params,
    key: Array,
    examples: Examples,
    *,
    draws: int,
) -> Params:
    """The diagonal F = E_x (∂ loss(x)/∂θ)², a tree like params.

    loss(x) is one image's Σ_t w_t E‖ε − ε_θ‖², which takes the place of −log p(x). Its gradient
    is a mean over `draws` noisy versions, whose time steps are stratified; as many as the
    schedule has steps is what the paper's code uses. Fewer add their variance to F. One image
    is seen at a time.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      params: θ*.
      key: a PRNG key.
      examples: samples of the pretrained model and their conditions.
      draws: noisy versions of each.
    """
    mean = _mean_loss(apply, schedule, weighting)

    def add(total: Params, inputs: tuple[Array, Examples]) -> tuple[Params, None]:
        key, example = inputs
        rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (draws, *leaf.shape)), example)
        gradient = jax.grad(mean)(params, key, rows)
        return jax.tree.map(lambda a, g: a + jnp.square(g), total, gradient), None

    count = examples.x_0.shape[0]
    keys = losses.example_keys(key, count)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (keys, examples))
    return optax.tree.scale(1.0 / count, total)


def selective_amnesia(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    strength: float,
) -> Loss:
    """Selective Amnesia: loss(surrogates) + loss(replay) + (λ/2) Σ_i F_i (θ_i − θ*_i)².

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      strength: λ.

    Returns:
      A loss whose `reference` is `Remembered`. Its batches have in `base` images of the
      surrogate distribution (the paper's is uniform noise on [−1, 1]) under the forgotten
      conditions, and in `kept` the pretrained model's own samples under kept conditions;
      `forget` is not read. It raises ValueError where one of the two is missing.
    """
    mean = _mean_loss(apply, schedule, weighting)

    def loss(params: Params, reference: Remembered, key: Array, batch: Batch) -> Array:
        if batch.base is None or batch.kept is None:
            raise ValueError("Selective Amnesia needs surrogates in base and samples in kept.")
        base_key, kept_key = jax.random.split(key)
        moved = optax.tree.sub(params, reference.params)
        penalty = optax.tree.vdot(reference.fisher, jax.tree.map(jnp.square, moved))
        return (
            mean(params, base_key, batch.base)
            + mean(params, kept_key, batch.kept)
            + 0.5 * strength * penalty
        )

    return loss


class Anchored(NamedTuple):
    """Images of an anchor concept, [n, ...] each.

    Attributes:
      x_0: samples of q(·|anchor), in [−1, 1].
      cond: the condition to forget.
      anchor: the condition that takes its place.
    """

    x_0: Any
    cond: Condition
    anchor: Condition


def concept_ablation(
    apply: Denoiser,
    schedule: schedules.NoiseSchedule,
    weighting: losses.TimeWeighting,
    *,
    variant: str = "model",
    preservation: float = 1.0,
) -> Loss:
    """Concept Ablation: Σ_t w_t E‖ε_θ(x_t, c) − y‖² + ρ loss(anchor images under the anchor).

    y is ε_θ(x_t, anchor), held fixed ("model"; of the network being trained, as published), or
    the noise ("noise"). On images of c with another label as the anchor, the first term of
    "model" is SalUn's loss of labels.

    Args:
      apply: the denoiser.
      schedule: its noise schedule.
      weighting: weights and probabilities of the time steps.
      variant: "model" or "noise".
      preservation: ρ.

    Returns:
      A loss over `Anchored`.

    Raises:
      ValueError: for an unknown variant.
    """
    if variant not in ("model", "noise"):
        raise ValueError(f"variant {variant!r} is not 'model' or 'noise'.")

    def loss(params: Params, reference: Params, key: Array, batch: Anchored) -> Array:
        drawn = losses.draw(key, batch.x_0, weighting.probabilities)
        x_t = schedules.add_noise(
            x_0=batch.x_0, noise=drawn.noise, log_snr=schedule.log_snr[drawn.t]
        )
        both = losses.predict_epsilon(
            apply,
            params,
            schedule,
            x_t=jnp.concatenate([x_t, x_t]),
            t=jnp.concatenate([drawn.t, drawn.t]),
            cond=on_policy.concatenate(batch.cond, batch.anchor),
        )
        ours, anchored = jnp.split(both, 2)
        target = jax.lax.stop_gradient(anchored) if variant == "model" else drawn.noise
        ablated = losses.squared_error(ours, target)
        preserved = losses.squared_error(anchored, drawn.noise)
        return (losses.importance(weighting, drawn.t) * (ablated + preservation * preserved)).mean()

    return loss
