import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn import lagrangian, losses, schedules
from jax_unlearn.formulations import forward_kl
from jax_unlearn.problem import Batch, Conditions, Images

BETAS = (0.1, 0.3, 0.5, 0.7)
ALPHA = np.sqrt(np.cumprod(1 - np.array(BETAS)))
SIGMA = np.sqrt(1 - ALPHA**2)
WEIGHTS = np.array([2.0, 1.0, 0.6, 0.3])
PROBABILITIES = np.array([0.3, 0.3, 0.2, 0.2])
SCHEDULE = schedules.noise_schedule(trained_betas=BETAS)
WEIGHTING = losses.TimeWeighting(jnp.float32(WEIGHTS), jnp.float32(PROBABILITIES))

RNG = np.random.default_rng(0)
# gain [T], then bias [label, T]
PARAMS, REFERENCE = 0.5 * RNG.normal(size=(2, 12))
KEPT, BASE, FORGET = RNG.uniform(-1, 1, (3, 4))
MULTIPLIERS, THRESHOLDS = np.array([0.7, 0.3]), np.array([2.0, 3.0])
CONSTRAINT = np.array([0, 1, 1, 1])


def denoiser(params, x_t, t, cond):
    """Linear in x_t, so that every expectation over the noise is a polynomial."""
    label = 0 if cond is None else cond
    bias = params[4:].reshape(2, 4)[label, t]
    return params[t].reshape(-1, 1, 1, 1) * x_t + bias.reshape(-1, 1, 1, 1)


def images(values):
    return jnp.float32(values).reshape(-1, 1, 1, 1)


def batch_of(kept=True, base=True, labels=True):
    def under(label):
        return jnp.full(4, label) if labels else None

    return Batch(
        kept=Images(images(KEPT), under(0)) if kept else None,
        forget=Images(images(FORGET), under(1), jnp.asarray(CONSTRAINT)),
        base=Images(images(BASE), under(1)) if base else None,
    )


def exact(params, kept=0, base=1, forget=1, use=("kept", "base")):
    """Objective and constraint values in float64; labels are given, images are the above."""
    gain, bias = params[:4], params[4:].reshape(2, 4)
    gain_ref, bias_ref = REFERENCE[:4], REFERENCE[4:].reshape(2, 4)

    def noise_regression(x, label):  # E(ε − g(αx + σε) − c)²
        return (1 - gain * SIGMA) ** 2 + (gain * ALPHA * x[:, None] + bias[label]) ** 2

    slope, offset = gain - gain_ref, bias[kept] - bias_ref[kept]
    rows = []
    if "base" in use:
        rows.append(noise_regression(BASE, base) @ WEIGHTS)
    if "kept" in use:  # E(Δg (αx + σε) + Δc)²
        held = (slope * SIGMA) ** 2 + (slope * ALPHA * KEPT[:, None] + offset) ** 2
        rows.append(held @ WEIGHTS)
    values = noise_regression(FORGET, forget) @ WEIGHTS
    return np.concatenate(rows).mean(), np.array([values[CONSTRAINT == i].mean() for i in (0, 1)])


def exact_lagrangian(params, **options):
    objective, values = exact(params, **options)
    return objective + MULTIPLIERS @ (THRESHOLDS - values)


def finite_differences(function, point, step=1e-5):
    return np.array(
        [(function(point + step * e) - function(point - step * e)) / (2 * step)
         for e in np.eye(len(point))]
    )  # fmt: skip


def losses_of(problem, batch, params=PARAMS, key=0):
    arguments = jnp.float32(params), jnp.float32(REFERENCE), jax.random.key(key), batch
    return jax.jit(problem.losses)(*arguments, jnp.zeros(2))


def estimates(problem, batch, count=20_000):
    """Samples of (the Lagrangian, objective, two values, gradient of the first), [count, 16]."""

    def value(params, key):
        reference = jnp.float32(REFERENCE)
        return lagrangian(problem, params, reference, key, batch, MULTIPLIERS, THRESHOLDS)

    @jax.jit
    @jax.vmap
    def one(key):
        (total, found), gradient = jax.value_and_grad(value, has_aux=True)(jnp.float32(PARAMS), key)
        return jnp.concatenate([jnp.stack([total, found.objective]), found.values, gradient])

    return np.asarray(one(jax.random.split(jax.random.key(0), count)), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixing", "case"),
    [
        (None, "both"),
        (0.5, "both"),
        (0.25, "base"),
        (None, "kept"),
        (0.4, "kept"),
    ],
)
def test_losses_and_gradient_are_unbiased(mixing, case):
    """Against closed-form expectations and their finite differences; both estimators alike."""
    problem = forward_kl(denoiser, SCHEDULE, WEIGHTING, mixing=mixing)
    if case == "kept":  # without conditions, so that pairs of the mixture agree on theirs
        batch, options = batch_of(base=False, labels=False), {"forget": 0, "use": ("kept",)}
    elif case == "base":
        batch, options = batch_of(kept=False), {"use": ("base",)}
    else:
        batch, options = batch_of(), {}
    objective, values = exact(PARAMS, **options)
    gradient = finite_differences(lambda p: exact_lagrangian(p, **options), PARAMS)
    got = estimates(problem, batch)
    stderr = got.std(axis=0) / np.sqrt(len(got))
    total = exact_lagrangian(PARAMS, **options)
    expected = np.concatenate([[total, objective], values, gradient])
    assert (np.abs(got.mean(axis=0) - expected) < 4.5 * stderr + 1e-6).all()
    assert (stderr < 0.1).all()


def test_importance_holds_a_kept_pair_under_the_forgotten_condition():
    problem = forward_kl(denoiser, SCHEDULE, WEIGHTING, mixing=0.5)
    got = estimates(problem, batch_of(base=False))[:, 1]
    objective, _ = exact(PARAMS, kept=1, use=("kept",))  # label 1, not the kept images' own 0
    assert abs(got.mean() - objective) < 4.5 * got.std() / np.sqrt(len(got))


@pytest.mark.slow
@pytest.mark.parametrize("mixing", [None, 0.5])
def test_kept_rows_vanish_at_the_reference(mixing):
    problem = forward_kl(denoiser, SCHEDULE, WEIGHTING, mixing=mixing)
    reference = jnp.float32(REFERENCE)

    @jax.jit
    def objective(params):
        return losses_of(problem, batch_of(base=False), params).objective

    np.testing.assert_array_equal(objective(reference), np.zeros(4))
    np.testing.assert_array_equal(jax.jacobian(objective)(reference), np.zeros((4, 12)))


def test_the_reference_gets_no_gradient_where_it_is_frozen():
    """The kept target is data: its derivative in params is that of ε_θ alone."""
    problem = forward_kl(denoiser, SCHEDULE, WEIGHTING)
    batch, key = batch_of(base=False), jax.random.key(1)

    def kept(params, reference):
        return problem.losses(params, reference, key, batch, jnp.zeros(2)).objective.sum()

    params, reference = jnp.float32(PARAMS), jnp.float32(REFERENCE)
    ours, theirs = jax.jit(jax.grad(kept, argnums=(0, 1)))(params, reference)
    # A square of a difference of two linear maps: the derivatives mirror one another.
    np.testing.assert_allclose(ours, -theirs, rtol=1e-5, atol=1e-6)


def test_importance_reports_effective_sample_sizes():
    problem = forward_kl(denoiser, SCHEDULE, WEIGHTING, mixing=0.5)

    def sizes(x, a):
        forget = Images(images(a), None, jnp.zeros(len(a), int))
        got = losses_of(problem, Batch(None, forget, Images(images(x), None)), key=3)
        return got.diagnostics["ess_retain"], got.diagnostics["ess_forget"]

    same = np.full(8, 0.3)
    np.testing.assert_allclose(sizes(same, same), [1.0, 1.0], rtol=1e-6)
    # Far apart each image's weight is 0 or 1/share: the two shares of use add up to one.
    retain, forget = sizes(np.full(8, 100.0), np.full(8, -100.0))
    assert retain + forget == pytest.approx(1.0)


@pytest.mark.slow
def test_the_problem_is_the_paper_s():
    problem = forward_kl(denoiser, SCHEDULE, WEIGHTING)
    assert problem.sign == 1
    # Σ λ_i q_i ≤ q needs Σ λ_i ≤ 1.
    np.testing.assert_allclose(problem.project(jnp.array([-1.0, 0.3])), [0.0, 0.3], rtol=1e-6)
    assert 0.9 < problem.project(jnp.array([-1.0, 2.0])).sum() < 1
    capped = forward_kl(denoiser, SCHEDULE, WEIGHTING, project=lambda x: x / 2)
    np.testing.assert_array_equal(capped.project(jnp.array([-1.0])), [-0.5])
    # Objective and constraints are means over rows of their own.
    assert losses_of(problem, batch_of()).share == 1


@pytest.mark.parametrize("mixing", [0.0, 1.0, -0.5])
def test_bad_options_are_refused(mixing):
    with pytest.raises(ValueError, match="mixing"):
        forward_kl(denoiser, SCHEDULE, WEIGHTING, mixing=mixing)


@pytest.mark.parametrize("part", ["base", "kept"])
def test_importance_refuses_more_forgotten_images_than_it_can_pair(part):
    few = Images(images(KEPT[:3]), jnp.zeros(3, int))
    batch = batch_of()._replace(base=None, kept=None)._replace(**{part: few})
    with pytest.raises(ValueError, match=rf"batch\.{part}, which has 3"):
        losses_of(forward_kl(denoiser, SCHEDULE, WEIGHTING, mixing=0.5), batch)


LABELS = jnp.zeros(4, int)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"kept": None, "base": None}, "kept or in base"),
        ({"forget": Conditions(LABELS, LABELS, LABELS, LABELS)}, "Images alone"),
        ({"kept": Conditions(LABELS, LABELS)}, "Images alone"),
        ({"forget": Images(images(FORGET), LABELS)}, "number of their constraint"),
    ],
)
def test_bad_batches_are_refused(parts, word):
    with pytest.raises(ValueError, match=word):
        losses_of(forward_kl(denoiser, SCHEDULE, WEIGHTING), batch_of()._replace(**parts))


@pytest.mark.slow
@pytest.mark.parametrize("mixing", [None, 0.5])
def test_reference_values_keep_the_gradient_and_cancel_the_noise(mixing):
    """With the exact reference values the constraint's mean is unchanged and its spread falls."""
    schedule = schedules.noise_schedule("squaredcos_cap_v2", num_steps=20)
    weighting = losses.time_weighting(losses.simple_weights(20, 1))
    key = jax.random.key(3)

    def linear(params, x_t, t, cond):
        return params["a"][t][:, None, None, None] * x_t + params["b"]

    reference = {"a": jnp.sqrt(jax.nn.sigmoid(-schedule.log_snr)), "b": jnp.zeros(())}
    params = {"a": reference["a"] + 0.02, "b": jnp.array(0.05)}
    x_0 = jax.random.normal(key, (4096, 1, 1, 1))
    batch = Batch(Images(x_0, None), Images(x_0 + 0.1, None, jnp.arange(4096) % 2))

    def values(given, params, key):
        problem = forward_kl(linear, schedule, weighting, mixing=mixing, reference_values=given)
        found = problem.losses(params, reference, key, batch, jnp.zeros(2))
        return jnp.zeros(2).at[found.index].add(found.values) / 2048, found.values

    keys = jax.random.split(key, 40)
    exact = jax.vmap(lambda k: values(None, reference, k)[0])(keys).mean(axis=0)
    plain, plain_rows = values(None, params, key)
    controlled, controlled_rows = values(exact, params, key)
    gradient, other = (
        jax.jacrev(lambda p, given=given: values(given, p, key)[0])(params)
        for given in (None, exact)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, other
    )
    assert controlled_rows.std() < 0.5 * plain_rows.std()
    error = 4 * float(plain_rows.std()) / np.sqrt(2048)
    np.testing.assert_allclose(controlled, plain, atol=error)
    _, at_reference = values(exact, reference, key)
    np.testing.assert_allclose(at_reference, exact[batch.forget.constraint], rtol=1e-6)


@pytest.mark.parametrize("controlled", [False, True])
def test_constraint_values_are_of_the_clipping_chain_and_the_objective_is_not(controlled):
    """x̂_0 far out of range: α(c − x_0)/σ is the error of ε, with c the clipped x̂_0 or itself."""
    schedule = dataclasses.replace(SCHEDULE, clip_range=1.0)
    share = WEIGHTS * (ALPHA / SIGMA) ** 2
    weighting = losses.TimeWeighting(jnp.float32(WEIGHTS), jnp.float32(share / share.sum()))
    alpha, sigma = jnp.float32(ALPHA), jnp.float32(SIGMA)

    def far(params, x_t, t, cond):
        return (x_t - (alpha[t] * params).reshape(-1, 1, 1, 1)) / sigma[t].reshape(-1, 1, 1, 1)

    before = jnp.float32([40.0, 50.0]) if controlled else None
    problem = forward_kl(far, schedule, weighting, reference_values=before)
    batch = batch_of(kept=False)
    found = jax.jit(problem.losses)(7.0, -5.0, jax.random.key(0), batch, jnp.zeros(2))
    total = share.sum()  # of the weights: the drawn t leave no variance
    expected = total * (1 - FORGET) ** 2
    if controlled:
        expected = np.asarray(before)[CONSTRAINT] + expected - total * (-1 - FORGET) ** 2
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    np.testing.assert_allclose(found.objective, total * (7 - BASE) ** 2, rtol=1e-4)
