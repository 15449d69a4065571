import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jax_unlearn import duality, mixtures
from jax_unlearn.duality import stored_samples

KEY = jax.random.key(0)
Q = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], 0.49)
CONCEPTS = [mixtures.select(Q, [0]), mixtures.select(Q, [2])]
CELLS = mixtures.grid([(-7, 7), (-6, 8)], 200)


def ratios(x):
    return jnp.stack(
        [mixtures.log_density(Q, x) - mixtures.log_density(c, x) for c in CONCEPTS], axis=1
    )


def densities(x):
    return jnp.stack([jnp.exp(mixtures.log_density(c, x)) for c in CONCEPTS], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reverse_kl", "likelihood"])
def test_samples_give_the_multipliers_of_the_density(kind):
    """Two constraints, one of them inactive, against the solution on a fine grid."""
    log_q = mixtures.log_masses(Q, CELLS)
    x = mixtures.sample(Q, KEY, 20_000)
    if kind == "reverse_kl":
        thresholds = jnp.array([14.0, 5.0])
        rows = log_q - ratios(CELLS.x).T
        exact = jax.jit(duality.solve_reverse_kl)(log_q, rows, thresholds)
        got = stored_samples.reverse_kl_multipliers(ratios(x), thresholds, key=KEY, resamples=50)
    else:
        thresholds = jnp.array([0.02, 0.5])
        exact = duality.solve_likelihood(log_q, densities(CELLS.x).T, thresholds)
        got = stored_samples.likelihood_multipliers(densities(x), thresholds, key=KEY, resamples=50)
    assert exact.attained
    assert got.solution.attained
    assert got.attained == 1
    assert exact.multipliers[1] == 0
    assert got.multipliers[1] == 0
    np.testing.assert_allclose(got.multipliers, exact.multipliers, rtol=0.04)
    np.testing.assert_allclose(got.solution.primal_value, exact.primal_value, rtol=0.05)
    spread = got.resampled[:, 0].std()
    assert abs(got.multipliers[0] - exact.multipliers[0]) < 3 * spread
    low, high = got.interval[:, 0]
    assert 2 * spread < high - low < 6 * spread
    assert 0.3 < got.effective < 1


@pytest.mark.slow
def test_against_a_scalar_search_on_the_same_samples():
    """The dual functions written out, maximised by scipy."""
    x = mixtures.sample(Q, KEY, 2000)
    ratio = np.asarray(ratios(x)[:, 0], np.float64)
    h = np.asarray(densities(x)[:, 0], np.float64)

    def reverse(current):
        rest = 1 - current
        return rest * np.log(np.mean(np.exp(current / rest * ratio))) - 12.0 * current

    found = optimize.minimize_scalar(
        reverse, bounds=(0, 0.9), method="bounded", options={"xatol": 1e-9}
    )
    got = stored_samples.reverse_kl_multipliers(ratio[:, None], [12.0])
    assert got.interval is None
    assert got.multipliers[0] == pytest.approx(found.x, rel=1e-3)
    weights = np.exp(found.x / (1 - found.x) * ratio)
    effective = weights.sum() ** 2 / (2000 * (weights**2).sum())
    assert got.effective == pytest.approx(effective, rel=1e-3)

    def bounded(current):
        return np.log(np.mean(np.exp(-current * h))) + 0.02 * current

    found = optimize.minimize_scalar(
        bounded, bounds=(0, 100), method="bounded", options={"xatol": 1e-9}
    )
    got = stored_samples.likelihood_multipliers(h[:, None], [0.02])
    assert got.multipliers[0] == pytest.approx(found.x, rel=1e-3)


def test_groups_keep_their_shares():
    """Two laws with one constraint on their mean: the dual written out, maximised by scipy."""
    x = mixtures.sample(Q, KEY, 900)
    h = np.asarray(densities(x)[:, 0], np.float64)
    groups = np.where(h > np.median(h), 7, 3)
    groups[:150] = 3  # of unequal sizes, and mixed
    share = np.mean(groups == 7)

    def dual(current):
        parts = [np.log(np.mean(np.exp(-current * h[groups == k]))) for k in (3, 7)]
        return (1 - share) * parts[0] + share * parts[1] + 0.02 * current

    found = optimize.minimize_scalar(
        dual, bounds=(0, 200), method="bounded", options={"xatol": 1e-9}
    )
    got = stored_samples.likelihood_multipliers(
        h[:, None], [0.02], groups=groups, key=KEY, resamples=40
    )
    assert got.solution.attained
    assert got.multipliers[0] == pytest.approx(found.x, rel=1e-3)
    p = np.exp(got.solution.log_p)
    assert p[groups == 7].sum() == pytest.approx(share, rel=1e-4)
    assert p @ h == pytest.approx(0.02, rel=1e-3)
    tilted = np.exp(-found.x * h) * np.where(groups == 7, 1, 0)
    np.testing.assert_allclose(
        p[groups == 7], share * (tilted / tilted.sum())[groups == 7], rtol=1e-3
    )
    # Without groups p leaves the second one instead, at a lower price.
    free = stored_samples.likelihood_multipliers(h[:, None], [0.02])
    assert free.solution.primal_value < 0.9 * got.solution.primal_value
    assert free.multipliers[0] < 0.9 * got.multipliers[0]
    low, high = got.interval[:, 0]
    assert low < got.multipliers[0] < high
    again = stored_samples.likelihood_multipliers(h[:, None], [0.02], groups=np.zeros(900, int))
    np.testing.assert_allclose(again.multipliers, free.multipliers, rtol=1e-5)
    with pytest.raises(ValueError, match="groups"):
        stored_samples.likelihood_multipliers(h[:, None], [0.02], groups=groups[:5])


@pytest.mark.slow
def test_thresholds_beyond_the_samples_are_not_attained():
    x = mixtures.sample(Q, KEY, 2000)
    got = stored_samples.reverse_kl_multipliers(ratios(x)[:, :1], [60.0], key=KEY, resamples=10)
    assert not got.solution.attained
    assert got.attained == 0
    assert np.isneginf(got.interval[0, 0])
    assert np.isposinf(got.interval[1, 0])


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        ((np.ones((5, 2)), [1.0]), {}, r"\[5, 2\] and \[1\]"),
        ((np.ones(5), [1.0]), {}, r"\[n, m\]"),
        ((np.full((5, 1), np.nan), [1.0]), {}, "finite"),
        ((np.ones((5, 1)), [1.0]), {"level": 1.0}, "level"),
        ((np.ones((5, 1)), [1.0]), {"resamples": 0}, "resample"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, word):
    for solve in (stored_samples.likelihood_multipliers, stored_samples.reverse_kl_multipliers):
        with pytest.raises(ValueError, match=word):
            solve(*arguments, key=KEY, **options)


def test_one_sample_at_least():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stored_samples.likelihood_solver(np.ones((0, 1)))


def concave_dual(h, thresholds, groups, bounds):
    """argmax of −Σ_k s_k log mean_{n∈k} exp(−λᵀh) − λᵀε, written out, by L-BFGS in float64."""
    parts = [h[groups == k] for k in np.unique(groups)]

    def negated(current):
        value, slope = current @ thresholds, np.array(thresholds)
        for part in parts:
            share, weights = len(part) / len(h), np.exp(-part @ current)
            value = value + share * np.log(weights.mean())
            slope = slope - share * (weights @ part) / weights.sum()
        return value, slope

    found = optimize.minimize(
        negated,
        np.ones(h.shape[1]),
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-11, "maxiter": 500},
    )
    return found.x, -found.fun


def two_laws():
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 2, 400)
    h = rng.gamma(1.0 + groups[:, None], 1.0, (400, 2))
    h[:, 1] += 0.5 * h[:, 0]
    return h, groups


@pytest.mark.slow
def test_the_solver_is_a_pure_function_of_the_thresholds():
    h, groups = two_laws()
    with jax.enable_x64(True):
        solve = stored_samples.likelihood_solver(h, groups=groups)
        many = jnp.array([[1.0, 1.5], [0.8, 1.6], [1.2, 0.9]])
        found = jax.jit(jax.vmap(solve))(many)
        assert found.attained.all()
        for place, thresholds in enumerate(np.asarray(many)):
            expected, price = concave_dual(h, thresholds, groups, [(0, None)] * 2)
            np.testing.assert_allclose(found.multipliers[place], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.primal_value[place], price, rtol=1e-8)
            log_p = -h @ expected
            for k in (0, 1):  # In the order of the samples, with the share of each group.
                inside = groups == k
                log_p[inside] += np.log(inside.mean() / np.exp(log_p[inside]).sum())
            np.testing.assert_allclose(found.log_p[place], log_p, atol=1e-4)


@pytest.mark.slow
def test_derivatives_of_the_solution():
    """dλ*/dε against finite differences of the dual written out; dP*/dε = −λ*."""
    h, groups = two_laws()
    thresholds, step = np.array([1.0, 1.5]), 1e-4
    with jax.enable_x64(True):
        solve = stored_samples.likelihood_solver(h, groups=groups)
        columns = [
            concave_dual(h, thresholds + step * e, groups, [(0, None)] * 2)[0]
            - concave_dual(h, thresholds - step * e, groups, [(0, None)] * 2)[0]
            for e in np.eye(2)
        ]
        expected = np.column_stack(columns) / (2 * step)
        assert (np.abs(expected) > 0.05).all()

        def solution(bound):
            found = solve(bound)
            return found.multipliers, found.primal_value

        for jacobian in (jax.jacfwd, jax.jacrev):
            got, price = jax.jit(jacobian(solution))(thresholds)
            np.testing.assert_allclose(got, expected, rtol=1e-3)
            multipliers = concave_dual(h, thresholds, groups, [(0, None)] * 2)[0]
            np.testing.assert_allclose(price, -multipliers, rtol=1e-5)


@pytest.mark.slow
def test_any_finite_h_will_do():
    """Calibrated posteriors, affine in h, may be negative: λᵀh has the same tilt."""
    h, groups = two_laws()
    lower, thresholds = np.array([2.0, -0.3]), np.array([1.0, 1.5])
    plain = stored_samples.likelihood_multipliers(h, thresholds, groups=groups, key=KEY)
    assert (h - lower).min() < 0
    moved = stored_samples.likelihood_multipliers(
        h - lower, thresholds - lower, groups=groups, key=KEY
    )
    np.testing.assert_allclose(moved.multipliers, plain.multipliers, rtol=1e-4)
    np.testing.assert_allclose(moved.interval, plain.interval, rtol=1e-3)
    for name in ("primal_value", "dual_value", "log_p"):
        got, expected = getattr(moved.solution, name), getattr(plain.solution, name)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    least = sum((groups == k).mean() * (h - lower)[groups == k].min(axis=0) for k in (0, 1))
    np.testing.assert_allclose(moved.solution.largest_thresholds, least, rtol=1e-5)
    assert not stored_samples.likelihood_multipliers(
        h - lower, least - 1, groups=groups
    ).solution.attained


@pytest.mark.slow
def test_the_price_has_the_interval_of_the_resamples():
    """h of 0 and 1: λ = logit s − logit ε, and the price is KL(Bernoulli(ε)‖Bernoulli(s))."""
    h, epsilon = np.repeat([[1.0], [0.0]], (60, 140), axis=0), 0.1
    found = stored_samples.likelihood_multipliers(h, [epsilon], key=KEY)
    odds = np.exp(np.asarray(found.resampled[:, 0], np.float64)) * epsilon / (1 - epsilon)
    shares = odds / (1 + odds)
    prices = epsilon * np.log(epsilon / shares)
    prices += (1 - epsilon) * np.log((1 - epsilon) / (1 - shares))
    assert abs(shares.mean() - 0.3) < 0.01
    assert 0.02 < shares.std() < 0.05  # √(0.3 · 0.7 / 200) = 0.032
    np.testing.assert_allclose(found.price_interval, np.quantile(prices, [0.025, 0.975]), rtol=1e-3)
    np.testing.assert_allclose(
        found.interval[:, 0], np.quantile(found.resampled[:, 0], [0.025, 0.975]), rtol=1e-5
    )
    assert found.price_interval[0] < found.solution.primal_value < found.price_interval[1]


@pytest.mark.slow
def test_a_front_with_its_band_is_one_program():
    """Thresholds under jit and vmap, with the bootstrap; one beyond the samples among them."""
    x = mixtures.sample(Q, KEY, 200)
    h, log_ratios = densities(x)[:, :1], ratios(x)[:, :1]

    def bands(bound):
        return stored_samples.likelihood_multipliers(h, bound, key=KEY)

    front = jax.jit(jax.vmap(bands))(jnp.array([[0.03], [0.02], [-1.0]]))
    alone = bands(jnp.array([0.02]))
    np.testing.assert_allclose(front.interval[1], alone.interval, rtol=1e-3)
    np.testing.assert_allclose(front.price_interval[1], alone.price_interval, rtol=1e-3)
    assert (front.price_interval[0] < front.price_interval[1]).all()
    assert front.solution.attained.tolist() == [True, True, False]
    assert np.isneginf(front.price_interval[2, 0])
    assert np.isposinf(front.price_interval[2, 1])
    # Traced alone, where any check of a traced value would fail.
    shapes = jax.eval_shape(
        jax.vmap(lambda bound: stored_samples.reverse_kl_multipliers(log_ratios, bound, key=KEY)),
        jnp.ones((3, 1)),
    )
    assert shapes.price_interval.shape == (3, 2)
