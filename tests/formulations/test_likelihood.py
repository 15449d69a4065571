import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import losses
from jax_unlearn.duality import stored_samples as dual_first
from jax_unlearn.formulations import (
    ConditionBatch,
    Held,
    SampleBatch,
    Samples,
    Separated,
    likelihood,
)
from jax_unlearn.primal_dual import primal_dual

KEY = jax.random.key(0)
RNG = np.random.default_rng(2)
VARIANCE, CENTRES = 0.5, np.array([0.8, -0.5])
REFERENCE = chains.gaussian([0.0, 1.0], VARIANCE)
PARAMS = jax.tree.map(lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape), REFERENCE)
MULTIPLIERS = np.array([0.3, 0.2])
WEIGHTING = losses.TimeWeighting(jnp.array([1.0, 2.0, 1.0, 0.5, 2.0]), jnp.full(5, 0.2))
ON_POLICY = functools.partial(likelihood, chains.apply, chains.SCHEDULE, shape=(1,), steps=5)


def squares(x):
    """h_i = (x − a_i)²/2: tilts of a Gaussian by exp(−λ h) are Gaussian."""
    return 0.5 * jnp.square(x - jnp.float32(CENTRES))


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def batch_of():
    """A kept condition, and two rows of label 0, with both constraints on each."""
    zeros = jnp.zeros(2, int)
    each = jnp.tile(jnp.arange(2), (2, 1))
    return ConditionBatch(
        kept=Held(jnp.array([1]), jnp.array([1])), forget=Separated(zeros, zeros, None, each)
    )


def exact_values(params):
    held = chains.path_kl(params, 1, REFERENCE, 1) + 2 * chains.path_kl(params, 0, REFERENCE, 0)
    _, (mean, variance) = chains.moments(params, 0)
    return held / 3, 0.5 * ((mean - CENTRES) ** 2 + variance)


def test_pathwise_values_and_gradient_against_exact_chains():
    def lagrangian(params):
        objective, values = exact_values(params)
        return objective + MULTIPLIERS @ values

    formulation = ON_POLICY(squares, estimator="pathwise")

    def estimate(params, key):
        got = formulation.losses(
            params, single(REFERENCE), key, batch_of(), None, jnp.float32(MULTIPLIERS)
        )
        values = jnp.zeros(2).at[got.index].add(got.constraint) / 2
        objective = got.objective.mean()
        return objective + jnp.float32(MULTIPLIERS) @ values, (objective, values)

    @jax.jit
    @jax.vmap
    def one(key):
        gradient, (objective, values) = jax.grad(estimate, has_aux=True)(single(PARAMS), key)
        flat = jnp.concatenate([gradient["gain"], gradient["bias"].ravel()])
        return jnp.concatenate([objective[None], values, flat])

    got = np.asarray(one(jax.random.split(KEY, 20_000)), np.float64)
    error = got.std(axis=0) / np.sqrt(len(got))
    objective, values = exact_values(PARAMS)
    exact = np.concatenate([[objective], values, chains.differences(lagrangian, PARAMS)])
    assert (np.abs(got.mean(axis=0) - exact) < 4.5 * error + 1e-5).all()
    assert (error < 0.05).all()


@pytest.mark.parametrize("given", [False, True])
def test_guidance_regresses_on_the_score_and_reports_the_model_s_own_values(given):
    """x̂_0 is linear in x here, so that ε_q + σ Σ λ_i ∇h_i(x̂_0(x)) is a linear denoiser."""
    current = np.array([0.2, 0.1]) * 3 / 2  # λ N/N_i: two rows of three have both constraints
    gain, bias = REFERENCE["gain"], REFERENCE["bias"][0]
    alpha, sigma = chains.ALPHA, chains.SIGMA
    slope, offset = (1 - sigma * gain) / alpha, -sigma * bias / alpha
    target = {
        "gain": gain + sigma * current.sum() * slope**2,
        "bias": bias + sigma * slope * (current @ (offset - CENTRES[:, None])),
    }
    # The network has one gain for both labels: compare the forgotten rows alone.
    params = {"gain": target["gain"], "bias": np.stack([target["bias"], REFERENCE["bias"][1]])}

    def gradients(x_t, t):
        s, o = jnp.float32(slope)[t][:, None], jnp.float32(offset)[t][:, None]
        return (s * (s * x_t + o - jnp.float32(CENTRES)))[..., None]

    formulation = ON_POLICY(squares, estimator="guidance", gradients=gradients if given else None)

    @jax.jit
    def evaluate(params, key):
        got = formulation.losses(
            params, single(REFERENCE), key, batch_of(), None, jnp.float32([0.2, 0.1])
        )
        return got.objective, got.constraint.reshape(2, 2), got.diagnostics["path_kl"]

    objective, values, path_kl = jax.vmap(evaluate, (None, 0))(
        single(params), jax.random.split(KEY, 4000)
    )
    np.testing.assert_allclose(objective[:, 1:], 0.0, atol=1e-4)
    assert objective[:, 0].mean() > 0.01  # the kept row holds to q's own gain
    gradient = jax.grad(lambda p: evaluate(p, KEY)[1].sum())(single(params))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    expected_kl, expected = exact_values(params)
    error = values.mean(axis=1).std(axis=0) / np.sqrt(4000)
    assert (np.abs(values.mean(axis=(0, 1)) - expected) < 4.5 * error).all()
    assert path_kl.mean() == pytest.approx(expected_kl, rel=0.05)


def test_tilt_distils_the_closed_form():
    """p_λ has precision 1/s² + λ and mean λ a / (1/s² + λ)."""
    current = 1.5
    x = np.sqrt(VARIANCE) * jax.random.normal(KEY, (100_000, 1))
    zeros = jnp.zeros(100_000, int)
    batch = SampleBatch(None, Samples(x, zeros, zeros, squares(x)[:, :1], zeros[:, None]))
    formulation = likelihood(chains.apply, chains.SCHEDULE, weighting=WEIGHTING)
    solved, constraint, diagnostics = chains.minimiser(
        formulation, single(REFERENCE), batch, [current]
    )
    variance = 1 / (1 / VARIANCE + current)
    mean = variance * current * CENTRES[0]
    exact = chains.gaussian([mean], variance)
    np.testing.assert_allclose(solved[0], exact["gain"], atol=0.025)
    np.testing.assert_allclose(solved[1], exact["bias"][0], atol=0.025)
    expected = 0.5 * (variance + (mean - CENTRES[0]) ** 2)
    assert constraint.mean() == pytest.approx(expected, rel=0.02)
    kl = 0.5 * (variance / VARIANCE + mean**2 / VARIANCE - 1 - np.log(variance / VARIANCE))
    assert diagnostics["tilt_kl"] == pytest.approx(kl, rel=0.03)


def test_dual_first_then_tilt_is_the_whole_solution():
    """λ* of E_{p_λ} h = ε from samples, held fixed; the trained chain then meets ε by itself."""
    threshold, count = 0.25, 20_000
    x = np.sqrt(VARIANCE) * jax.random.normal(KEY, (count, 1))
    first = dual_first.likelihood_multipliers(squares(x)[:, :1], [threshold], key=KEY)

    def value(current):
        variance = 1 / (1 / VARIANCE + current)
        return 0.5 * (variance + (variance * current * CENTRES[0] - CENTRES[0]) ** 2)

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if value(middle) > threshold else (low, middle)
    assert first.interval[0, 0] < low < first.interval[1, 0]
    assert first.multipliers[0] == pytest.approx(low, rel=0.03)
    assert first.attained == 1

    zeros = jnp.zeros(count, int)
    samples = Samples(x, zeros, zeros, squares(x)[:, 0], zeros)
    algorithm = primal_dual(
        likelihood(chains.apply, chains.SCHEDULE, weighting=WEIGHTING),
        optax.adam(optax.exponential_decay(0.02, 300, 0.2)),
        optax.set_to_zero(),
    )
    state = algorithm.init(single(REFERENCE), threshold, multipliers=first.multipliers)

    @jax.jit
    def train(state):
        def body(state, key):
            rows = jax.random.randint(key, (512,), 0, count)
            chosen = jax.tree.map(lambda leaf: leaf[rows], samples)
            return algorithm.step(key, state, SampleBatch(None, chosen))

        return jax.lax.scan(body, state, jax.random.split(KEY, 800))

    state, info = train(state)
    assert info.values[-400:].mean() == pytest.approx(threshold, rel=0.02)
    np.testing.assert_array_equal(state.multipliers, first.multipliers)
    variance = 1 / (1 / VARIANCE + low)
    target = chains.gaussian([variance * low * CENTRES[0]], variance)
    np.testing.assert_allclose(state.params["gain"], target["gain"], atol=0.05)
    np.testing.assert_allclose(state.params["bias"][0], target["bias"][0], atol=0.05)


@pytest.mark.slow
def test_pathwise_primal_dual_meets_the_bound_at_the_price_of_its_multiplier():
    """On linear chains, whose optimum is found by a search over λ of the exact Lagrangian."""
    batch = ConditionBatch(None, Separated(*[jnp.zeros(64, int)] * 2, None, jnp.zeros(64, int)))
    thresholds = np.array([0.30, 0.22])
    algorithm = primal_dual(
        ON_POLICY(lambda x: squares(x)[:, :1], estimator="pathwise"),
        optax.adam(optax.exponential_decay(0.01, 1000, 0.1)),
        optax.sgd(optax.exponential_decay(0.5, 1000, 0.1)),
    )

    @jax.jit
    @jax.vmap
    def solve(threshold):
        state = algorithm.init(single(REFERENCE), threshold)
        return jax.lax.scan(
            lambda state, key: algorithm.step(key, state, batch), state, jax.random.split(KEY, 1500)
        )

    state, info = solve(jnp.float32(thresholds)[:, None])
    final = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[:, -300:].mean(axis=1), info)
    np.testing.assert_allclose(final.values[:, 0], thresholds, rtol=0.02)
    for i, multiplier in enumerate(final.multipliers[:, 0]):
        params = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), state.params)

        def lagrangian(params, multiplier=multiplier):
            _, (mean, variance) = chains.moments(params, 0)
            value = 0.5 * ((mean - CENTRES[0]) ** 2 + variance)
            return chains.path_kl(params, 0, REFERENCE, 0) + multiplier * value

        at = chains.differences(lagrangian, params)
        scale = np.linalg.norm(chains.differences(lagrangian, REFERENCE))
        assert np.linalg.norm(at) < 0.05 * scale


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"estimator": "dps"}, "dps"),
        ({}, "weighting"),
        ({"estimator": "pathwise", "shape": (1,), "steps": 5}, "likelihoods"),
        ({"estimator": "guidance", "likelihoods": squares, "shape": (1,)}, "steps"),
        ({"estimator": "guidance", "likelihoods": squares, "steps": 5}, "shape"),
    ],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        likelihood(chains.apply, chains.SCHEDULE, **options)


def test_likelihoods_of_another_shape_are_refused():
    formulation = ON_POLICY(lambda x: squares(x)[:, 0], estimator="pathwise")
    with pytest.raises(ValueError, match=r"\[2, 2\], not \[2\]"):
        formulation.losses(single(PARAMS), single(REFERENCE), KEY, batch_of(), None, jnp.zeros(2))


def test_formulation_is_the_paper_s():
    formulation = likelihood(chains.apply, chains.SCHEDULE, weighting=WEIGHTING)
    assert formulation.sign == -1
    np.testing.assert_array_equal(formulation.project(jnp.array([-1.0, 40.0])), [0.0, 40.0])
