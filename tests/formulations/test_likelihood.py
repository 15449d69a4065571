import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import formulations, lagrangian
from jax_unlearn.formulations import likelihood
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Images

KEY = jax.random.key(0)
RNG = np.random.default_rng(2)
CENTRES = np.array([0.8, -0.5])
REFERENCE = chains.gaussian([0.0, 1.0], 0.5)
PARAMS = jax.tree.map(lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape), REFERENCE)
MULTIPLIERS, THRESHOLDS = np.array([0.45, 0.3]), np.array([0.3, 0.6])
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
    return Batch(
        kept=Conditions(jnp.array([1]), jnp.array([1])),
        forget=Conditions(zeros, zeros, None, each),
    )


def exact_values(params):
    held = chains.path_kl(params, 1, REFERENCE, 1) + 2 * chains.path_kl(params, 0, REFERENCE, 0)
    _, (mean, variance) = chains.moments(params, 0)
    return held / 3, 0.5 * ((mean - CENTRES) ** 2 + variance)


@pytest.mark.slow
def test_pathwise_values_and_gradient_against_exact_chains():
    def mean_over_rows(params):
        """Of the Lagrangian of each row by itself."""
        kept, forgotten = (chains.path_kl(params, i, REFERENCE, i) for i in (1, 0))
        forgotten += MULTIPLIERS @ (exact_values(params)[1] - THRESHOLDS)
        return (kept + forgotten + forgotten) / 3

    mean, error = chains.averages(
        ON_POLICY(squares), PARAMS, REFERENCE, batch_of(), MULTIPLIERS, THRESHOLDS, 20_000
    )
    objective, values = exact_values(PARAMS)
    gradient = chains.differences(mean_over_rows, PARAMS)
    exact = np.concatenate([[mean_over_rows(PARAMS), objective], values, gradient])
    assert (np.abs(mean - exact) < 4.5 * error + 1e-5).all()
    assert (error < 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_stop_gradient_regresses_on_the_score_and_reports_the_model_s_own_values(given):
    """x̂_0 is linear in x here, so that ε_q + σ Σ λ_i ∇h_i(x̂_0(x)) is a linear denoiser."""
    current = np.array([0.3, 0.15])
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

    problem = ON_POLICY(squares, estimator="stop_gradient", gradients=gradients if given else None)

    @jax.jit
    def evaluate(params, key):
        got = problem.losses(params, single(REFERENCE), key, batch_of(), jnp.float32(current))
        return got.objective, got.values.reshape(2, 2), got.diagnostics["path_kl"]

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


def gradients_by_hand(estimator, multiplier, bound):
    """Of six rows in float64: the package's, each row's by hand, and what was shortened there."""
    with jax.enable_x64(True):
        rng, rows, centre = np.random.default_rng(2), 6, CENTRES[0]
        params = jax.tree.map(lambda leaf: leaf + 0.4 * rng.normal(size=leaf.shape), REFERENCE)
        reference, at = (jax.tree.map(jnp.asarray, tree) for tree in (REFERENCE, params))
        zeros = jnp.zeros(rows, int)
        batch = Batch(None, Conditions(zeros, zeros, None, zeros))
        options = {"shape": (2,), "steps": 5}
        problem = likelihood(
            chains.apply,
            chains.SCHEDULE,
            lambda x: 0.5 * jnp.square(x - centre).sum(axis=1, keepdims=True),
            estimator=estimator,
            **options,
        )

        def value(params):
            return lagrangian(problem, params, reference, KEY, batch, [multiplier], [0.3])[0]

        found = jax.jit(jax.grad(value))(at)
        visit = formulations.sample_trajectories(chains.apply, chains.SCHEDULE, **options)
        points = np.asarray(jax.jit(visit)(at, KEY, batch).forget.x_t)
    each = [
        chains.by_hand(
            params, REFERENCE, points[:, row], 0, (0,), (1.0,), bound,
            at_end=lambda x: multiplier * (x - centre),
        )
        for row in range(rows)
    ]  # fmt: skip
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(one for one, _ in each))
    return found, expected, np.array([share for _, share in each])


@pytest.mark.slow
def test_gradient_of_a_trajectory_by_hand():
    found, expected, _ = gradients_by_hand("pathwise", 4.0, np.inf)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected
    )


def test_bounded_is_refused():
    """At the reference a step's own derivative is 0: that of h would be shortened to nothing."""
    with pytest.raises(ValueError, match="'bounded' is not one of .'pathwise', 'stop_gradient'"):
        ON_POLICY(squares, estimator="bounded")


@pytest.mark.slow
def test_pathwise_primal_dual_meets_the_bound_at_the_price_of_its_multiplier():
    """On linear chains, whose optimum is found by a search over λ of the exact Lagrangian."""
    zeros = jnp.zeros(64, int)
    batch = Batch(None, Conditions(zeros, zeros, None, zeros))
    thresholds = np.array([0.30, 0.22])
    algorithm = primal_dual(
        ON_POLICY(lambda x: squares(x)[:, :1]),
        optax.adam(optax.exponential_decay(0.01, 1000, 0.1)),
        optax.sgd(optax.exponential_decay(0.5, 1000, 0.1)),
    )

    @jax.jit
    @jax.vmap
    def solve(threshold):
        state = algorithm.init(single(REFERENCE), threshold)
        return jax.lax.scan(
            lambda state, key: algorithm.step(key, state, single(REFERENCE), batch),
            state,
            jax.random.split(KEY, 1500),
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
        ({"estimator": "dps"}, "'dps' is not one of"),
        ({"estimator": "guidance"}, "'guidance' is not one of"),
        ({"steps": 1}, "at least 2"),
    ],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        ON_POLICY(squares, **options)


def losses_of(problem, batch):
    arguments = single(PARAMS), single(REFERENCE), KEY, batch, jnp.zeros(2)
    return jax.eval_shape(lambda: problem.losses(*arguments))


def test_likelihoods_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 2\], not \[2\]"):
        losses_of(ON_POLICY(lambda x: squares(x)[:, 0]), batch_of())


def test_rows_of_another_type_are_refused():
    images = Images(jnp.zeros((2, 1)), jnp.zeros(2, int), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="got Conditions and Images"):
        losses_of(ON_POLICY(squares), batch_of()._replace(forget=images))
    with pytest.raises(ValueError, match="no base"):
        losses_of(ON_POLICY(squares), batch_of()._replace(base=images))


@pytest.mark.parametrize("estimator", ["pathwise", "stop_gradient"])
def test_the_problem_is_the_paper_s(estimator):
    problem = ON_POLICY(squares, estimator=estimator)
    assert problem.sign == -1
    np.testing.assert_array_equal(problem.project(jnp.array([-1.0, 40.0])), [0.0, 40.0])
    # Two of three rows are forgotten, each with both constraints.
    got = jax.jit(problem.losses)(single(PARAMS), single(REFERENCE), KEY, batch_of(), jnp.zeros(2))
    np.testing.assert_allclose(got.share, [2 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(got.index, [0, 1, 0, 1])
