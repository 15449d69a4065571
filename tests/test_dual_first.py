import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jax_unlearn import duality, mixtures
from jax_unlearn.duality import stored_samples as dual_first
from jax_unlearn.typing import Estimate

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


@pytest.mark.parametrize("kind", ["reverse_kl", "likelihood"])
def test_samples_give_the_multipliers_of_the_density(kind):
    """Two constraints, one of them inactive, against the solution on a fine grid."""
    log_q = mixtures.log_masses(Q, CELLS)
    x = mixtures.sample(Q, KEY, 20_000)
    if kind == "reverse_kl":
        thresholds = jnp.array([14.0, 5.0])
        rows = log_q - ratios(CELLS.x).T
        exact = jax.jit(duality.solve_reverse_kl)(log_q, rows, thresholds)
        got = dual_first.reverse_kl_multipliers(ratios(x), thresholds, key=KEY, resamples=50)
    else:
        thresholds = jnp.array([0.02, 0.5])
        exact = duality.solve_likelihood(log_q, densities(CELLS.x).T, thresholds)
        got = dual_first.likelihood_multipliers(densities(x), thresholds, key=KEY, resamples=50)
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
    got = dual_first.reverse_kl_multipliers(ratio[:, None], [12.0])
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
    got = dual_first.likelihood_multipliers(h[:, None], [0.02])
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
    got = dual_first.likelihood_multipliers(
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
    free = dual_first.likelihood_multipliers(h[:, None], [0.02])
    assert free.solution.primal_value < 0.9 * got.solution.primal_value
    assert free.multipliers[0] < 0.9 * got.multipliers[0]
    low, high = got.interval[:, 0]
    assert low < got.multipliers[0] < high
    again = dual_first.likelihood_multipliers(h[:, None], [0.02], groups=np.zeros(900, int))
    np.testing.assert_allclose(again.multipliers, free.multipliers, rtol=1e-5)
    with pytest.raises(ValueError, match="groups"):
        dual_first.likelihood_multipliers(h[:, None], [0.02], groups=groups[:5])


def test_thresholds_beyond_the_samples_are_not_attained():
    x = mixtures.sample(Q, KEY, 500)
    got = dual_first.reverse_kl_multipliers(ratios(x)[:, :1], [60.0], key=KEY, resamples=10)
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
    for solve in (dual_first.likelihood_multipliers, dual_first.reverse_kl_multipliers):
        with pytest.raises(ValueError, match=word):
            solve(*arguments, key=KEY, **options)


def test_negative_likelihoods_are_refused():
    with pytest.raises(ValueError, match="negative"):
        dual_first.likelihood_multipliers(np.full((5, 1), -1.0), [1.0])


def test_corrections_lead_to_the_exact_multipliers():
    """Steps on samples of p_λ itself, redrawn for each λ, and on those of a weaker p."""
    q, thresholds = mixtures.sample(Q, KEY, 20_000), jnp.array([0.02, 0.04])
    h = densities(q)
    exact = dual_first.likelihood_multipliers(h, thresholds).multipliers
    rng = np.random.default_rng(0)

    def corrected(current, followed):
        weights = np.exp(-np.asarray(h, np.float64) @ np.asarray(followed * current, np.float64))
        drawn = h[rng.choice(len(h), len(h), p=weights / weights.sum())]
        shown = Estimate(drawn.mean(axis=0), drawn.std(axis=0) / np.sqrt(len(drawn)))
        return dual_first.likelihood_correction(shown, thresholds, current, stored=h)

    # One step is enough, within the samples' own error, if λ need not double.
    np.testing.assert_allclose(corrected(0.7 * exact, 1.0), exact, rtol=0.1)
    # A model that follows λ half of the way meets the same constraints at twice the λ.
    np.testing.assert_allclose(corrected(1.2 * exact, 0.5), 2 * exact, rtol=0.1)
    np.testing.assert_allclose(corrected(3 * exact, 0.5), 2 * exact, rtol=0.1)


def test_a_correction_is_scaled_by_what_the_model_has_followed():
    """h of 0 and 1, where p_λ has odds e^−λ times those of q, in each of two groups alike."""
    stored = np.repeat([[1.0], [0.0], [1.0], [0.0]], (20, 80, 10, 40), axis=0)
    groups = np.repeat([0, 1], (100, 50))

    def multiplier(share):
        return np.log(0.2 / 0.8) - np.log(share / (1 - share))

    def correct(value, threshold, current, **more):
        shown, given = Estimate([value], [0.03]), {"stored": stored, "groups": groups, **more}
        return dual_first.likelihood_correction(shown, [threshold], [current], **given)

    for current, gain in ((2.0, 2.0 / multiplier(0.1)), (0.5, 1.0)):
        for margin in (0.0, 1.0):
            reached = 0.1 + margin * 0.03
            expected = current + gain * (multiplier(0.08) - multiplier(reached))
            found = correct(0.1, 0.08, current, margin=margin)
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A model that shows it no less than q has followed nothing: the longest step.
    np.testing.assert_allclose(correct(0.9, 0.1, 2.0), 4.0)


def test_a_correction_has_bounds():
    stored = np.repeat(np.eye(3)[:, :2], (20, 20, 60), axis=0)
    current = np.array([3.0, 2.0])

    def correct(shown, thresholds, current=current):
        shown = Estimate(shown, [0.0, 0.0])
        return dual_first.likelihood_correction(shown, thresholds, current, stored=stored)

    np.testing.assert_allclose(correct([0.1, 0.1], [0.01, 0.01]), 2 * current)
    # Shares below 0, as a corrected classifier may give, are less than any λ leaves.
    np.testing.assert_allclose(correct([-0.1, 0.1], [0.05, 0.01]), [1.5, 4.0], rtol=1e-4)
    np.testing.assert_allclose(correct([0.1, 0.3], [0.01, 0.3], np.zeros(2)), [1.0, 0.0])
    with pytest.raises(ValueError, match=r"expected 2 values, errors and multipliers, got \[2\], "):
        correct([0.1, 0.1], [0.1, 0.1], np.ones(3))
    with pytest.raises(ValueError, match="what the model shows must be finite"):
        correct([0.1, np.nan], [0.1, 0.1])
