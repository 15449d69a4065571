import statistics
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_unlearn.metrics import binomial_interval, coverage, harmonic_mean, membership

# Intervals of a share


@pytest.mark.parametrize("count", [1, 2, 10, 57, 1000, 1_000_000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_exact_interval_is_that_of_the_beta_quantiles(count, level):
    hits = np.unique(np.linspace(0, count, 23).astype(int))
    hits = np.union1d(hits, [0, 1, count - 1, count])
    found = binomial_interval(hits, count, level)
    tail = (1 - level) / 2
    inner_low, inner_high = np.maximum(hits, 1), np.minimum(hits, count - 1)
    low = np.where(hits > 0, stats.beta.ppf(tail, inner_low, count - inner_low + 1), 0)
    high = np.where(hits < count, stats.beta.isf(tail, inner_high + 1, count - inner_high), 1)
    np.testing.assert_allclose(found.low, low, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found.high, high, rtol=1e-7, atol=1e-12)
    np.testing.assert_array_equal(found.value, hits / count)
    assert ((found.low <= found.value) & (found.value <= found.high)).all()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95])
def test_the_exact_interval_holds_every_share_as_often_as_it_says(share):
    hits = np.arange(41)
    found = binomial_interval(hits, 40)
    inside = (found.low <= share) & (share <= found.high)
    assert stats.binom.pmf(hits, 40, share)[inside].sum() >= 0.95


def test_intervals_broadcast_and_scalars_stay_plain_numbers():
    found = binomial_interval([[0], [2]], [4, 5, 6])
    assert found.low.shape == found.high.shape == found.value.shape == found.count.shape == (2, 3)
    alone = binomial_interval(jnp.asarray(2), 5)
    assert [type(field) for field in alone] == [float, float, float, int]
    assert alone == (found.value[1, 1], found.low[1, 1], found.high[1, 1], 5)


def test_of_no_samples_nothing_is_known():
    value, low, high, count = binomial_interval(0, 0)
    assert np.isnan(value)
    assert (low, high, count) == (0.0, 1.0, 0)
    mixed = binomial_interval([0, 3], [0, 3])
    np.testing.assert_array_equal(mixed.value, [np.nan, 1.0])
    np.testing.assert_array_equal(mixed.high, [1.0, 1.0])


@pytest.mark.parametrize(
    ("hits", "count", "wrong"),
    [
        (-1, 3, "not -1 of 3"),
        ([1, 4], 3, "not 4 of 3"),
        (1.5, 3, "not 1.5 of 3"),
        (1, 2.5, "not 1.0 of 2.5|not 1 of 2.5"),
        (np.nan, 3, "not nan of 3"),
        (1, np.inf, "of inf"),
    ],
)
def test_impossible_counts_are_refused(hits, count, wrong):
    with pytest.raises(ValueError, match=wrong):
        binomial_interval(hits, count)


@pytest.mark.parametrize("level", [0, 1, -0.1, 95, np.nan])
def test_a_level_is_a_probability(level):
    with pytest.raises(ValueError, match="level is a probability"):
        binomial_interval(1, 2, level)
    with pytest.raises(ValueError, match="level is a probability"):
        membership([0.0, 1.0], [0.0, 1.0], level=level)


# Membership


def compared(f, u):
    """The comparisons c of all pairs, one by one."""
    return np.array([[float(a < b) + 0.5 * float(a == b) for b in u] for a in f])


def losses(seed, n, m, shift, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), shift + spread * rng.normal(size=m)


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (7, 31), (40, 11)])
def test_the_area_is_the_share_of_pairs_in_order(decimals, n, m):
    f, u = (np.round(part, decimals) for part in losses(n + decimals, n, m, 0.5))
    auc = membership(f, u).auc
    np.testing.assert_allclose(auc.value, compared(f, u).mean(), rtol=1e-12)
    assert auc.count == n + m
    # The two sides are one question asked twice.
    back = membership(u, f).auc
    np.testing.assert_allclose([1 - back.value, 1 - back.high, 1 - back.low], auc[:3], atol=1e-12)


def test_above_a_half_is_remembered_and_below_too_forgotten():
    f, u = losses(0, 200, 300, 0.0)
    remembered, forgotten = membership(f - 3, u), membership(f + 3, u)
    assert remembered.auc.low > 0.9
    assert forgotten.auc.high < 0.1
    assert remembered.at_low_rates[0.05].low > 0.8 > 0.01 > remembered.too_forgotten_at[0.05].value
    assert forgotten.too_forgotten_at[0.05].low > 0.8 > 0.01 > forgotten.at_low_rates[0.05].value


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_both_ends_of_the_interval_solve_its_equation_with_delongs_variance(shift):
    f, u = losses(3, 90, 120, shift)
    c = compared(f, u)
    variance = c.mean(axis=1).var(ddof=1) / 90 + c.mean(axis=0).var(ddof=1) / 120
    auc = membership(f, u, level=0.9).auc
    z = stats.norm.ppf(0.95)
    for end in (auc.low, auc.high):
        spread = variance * end * (1 - end) / (auc.value * (1 - auc.value))
        np.testing.assert_allclose((auc.value - end) ** 2, z**2 * spread, rtol=1e-6)


def test_the_width_is_that_of_a_bootstrap():
    f, u = losses(4, 150, 100, 0.5)
    c, rng = compared(f, u), np.random.default_rng(5)
    drawn = [c[rng.integers(150, size=150)][:, rng.integers(100, size=100)] for _ in range(1000)]
    deviation = np.std([pairs.mean() for pairs in drawn])
    auc = membership(f, u).auc
    np.testing.assert_allclose((auc.high - auc.low) / (2 * 1.96), deviation, rtol=0.08)


@pytest.mark.parametrize(
    ("n", "m", "area", "spread"),
    [(100, 100, 0.5, 1.0), (60, 60, 0.8, 2.0), (30, 30, 0.75, 1.0), (50, 150, 0.3, 1.0)],
)
def test_the_interval_holds_the_area_between_two_gaussians(n, m, area, spread):
    """P(N(0, 1) < N(μ, s²)) is Φ(μ/√(1 + s²)); 500 repetitions."""
    shift = statistics.NormalDist().inv_cdf(area) * np.sqrt(1 + spread**2)
    held = 0
    for seed in range(500):
        auc = membership(*losses(seed, n, m, shift, spread), rates=()).auc
        held += auc.low <= area <= auc.high
    assert 0.92 <= held / 500 <= 0.98


@pytest.mark.parametrize("n", [20, 100])
def test_where_hardly_any_pair_is_out_of_order_the_interval_still_holds(n):
    """Two Gaussians, and a law where one image in fifty is as told apart as can be."""
    rng, held = np.random.default_rng(n), np.zeros(2)
    shift = statistics.NormalDist().inv_cdf(0.995) * np.sqrt(5)
    for _ in range(400):
        f, u = rng.normal(size=n), shift + 2 * rng.normal(size=n)
        mixed = np.where(rng.uniform(size=n) < 0.02, 1.0, -1.0)
        for law, (area, forgotten, unseen) in enumerate([(0.995, f, u), (0.98, mixed, 0.0 * u)]):
            auc = membership(forgotten, unseen, rates=()).auc
            held[law] += auc.low <= area <= auc.high
    assert (held / 400 >= 0.92).all()


def test_the_interval_is_worth_no_fewer_and_no_more_pairs_than_its_bounds():
    in_order, unseen = np.arange(19.0), np.arange(20.0, 40.0)
    # One image beyond all others has DeLong's N = 19; one pair out of order has 4000.
    for last, area, pairs in ((50.0, 0.95, 20), (20.5, 1 - 1 / 400, 40)):
        auc = membership([*in_order, last], unseen, rates=()).auc
        np.testing.assert_allclose(auc.value, area, rtol=1e-12)
        for end in (auc.low, auc.high):
            expected = stats.norm.ppf(0.975) ** 2 * end * (1 - end) / pairs
            np.testing.assert_allclose((area - end) ** 2, expected, rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (20, 20), (50, 20)])
def test_the_interval_is_no_point_where_losses_are_told_apart_or_all_equal(n, m):
    above = membership(np.zeros(n), np.ones(m), rates=()).auc
    below = membership(np.ones(n), np.zeros(m), rates=()).auc
    equal = membership(np.zeros(n), np.zeros(m), rates=()).auc
    assert (above.value, above.high, below.value, below.low) == (1.0, 1.0, 0.0, 0.0)
    # min(n, m) disjoint pairs are all in order with the probability AUC^min(n, m) at most.
    exact = 0.025 ** (1 / min(n, m))
    np.testing.assert_allclose([above.low, 1 - below.high], exact, atol=0.19 if m == 2 else 0.02)
    assert equal.value == 0.5
    assert equal.high - equal.low > 1 / np.sqrt(min(n, m) + 4)


def test_shares_at_low_rates_are_counted_below_and_above_the_thresholds():
    unseen = np.arange(100.0)
    forgotten = np.array([-5.0, 0.5, 1.0, 3.5, 4.5, 5.0, 28.5, 94.0, 94.5, 98.5, 120.0])
    found = membership(forgotten, unseen, rates=(0.01, 0.05, 0.29))
    counts = {rate: round(part.value * 11) for rate, part in found.at_low_rates.items()}
    assert counts == {0.01: 2, 0.05: 5, 0.29: 7}
    counts = {rate: round(part.value * 11) for rate, part in found.too_forgotten_at.items()}
    assert counts == {0.01: 2, 0.05: 3, 0.29: 4}
    assert found.at_low_rates[0.05] == binomial_interval(5, 11)
    assert found.too_forgotten_at[0.05] == binomial_interval(3, 11)
    stricter = membership(forgotten, unseen, level=0.99).at_low_rates[0.05]
    assert stricter == binomial_interval(5, 11, 0.99)


def test_a_tenth_of_a_hundredth_of_the_unseen_is_no_threshold():
    rates = (0.01, 0.05)
    found = membership(np.zeros(30), np.arange(1.0, 100.0), rates=rates)
    for side in (found.at_low_rates, found.too_forgotten_at):
        assert np.isnan(side[0.01].value)
        assert side[0.01][1:] == (0.0, 1.0, 0)
        assert side[0.05].count == 30
    assert membership(np.zeros(30), np.arange(1.0, 101.0)).at_low_rates[0.01].value == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_the_attacker_is_wrong_no_more_often_than_the_rate(rate):
    """Of new unseen images, a share of about the rate is beyond the threshold on either side."""
    shares = []
    for seed in range(49):
        fresh, unseen = losses(seed, 2000, 100, 0.0)
        found = membership(fresh, unseen, rates=(rate,))
        shares.append((found.at_low_rates[rate].value, found.too_forgotten_at[rate].value))
    # The law of the (k + 1)-th of m uniform values.
    law = stats.beta(100 * rate + 1, 100 - 100 * rate)
    assert (np.abs(np.mean(shares, axis=0) - law.mean()) < 4 * law.std() / 7).all()


def test_infinite_losses_are_losses():
    found = membership([np.inf, 0.0], [1.0, np.inf], rates=())
    assert found.auc.value == 2.5 / 4


@pytest.mark.parametrize(
    ("forgotten", "unseen", "options", "line"),
    [
        ([[1.0, 2.0]], [1.0, 2.0], {}, r"not \(1, 2\) with \(2,\)"),
        ([1.0], [1.0, 2.0], {}, r"not \(1,\) with \(2,\)"),
        ([1.0, 2.0], [], {}, r"not \(2,\) with \(0,\)"),
        ([1.0, np.nan], [1.0, 2.0], {}, "1 of the forgotten and 0 of the unseen"),
        ([1.0, 2.0], [1.0, 2.0], {"rates": (0.1, 0.0)}, r"not \(0.1, 0.0\)"),
        ([1.0, 2.0], [1.0, 2.0], {"rates": (0.6,)}, "false-positive rates in"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(forgotten, unseen, options, line):
    with pytest.raises(ValueError, match=line):
        membership(forgotten, unseen, **options)


# Coverage


def by_double_loop(x, y, k):
    def distance(a, b):
        return float(np.sqrt(np.square(a - b).sum()))

    def radii(points):
        others = (
            sorted(distance(a, b) for j, b in enumerate(points) if j != i)
            for i, a in enumerate(points)
        )
        return [found[k - 1] for found in others]

    radii_x, radii_y = radii(x), radii(y)
    inside = np.array([[distance(a, b) <= r for b in y] for a, r in zip(x, radii_x, strict=True)])
    makes = np.array([[distance(a, b) <= r for a in x] for b, r in zip(y, radii_y, strict=True)])
    return (
        inside.any(axis=0).mean(),
        makes.any(axis=0).mean(),
        inside.sum() / (k * len(y)),
        inside.any(axis=1).mean(),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "d"), [(23, 31, 3), (40, 6, 1), (9, 50, 8)])
def test_coverage_is_the_double_loop_of_the_definitions(k, n, m, d):
    rng = np.random.default_rng(n + k)
    x, y = rng.normal(size=(n, d)), 0.5 + 1.2 * rng.normal(size=(m, d))
    np.testing.assert_allclose(coverage(x, y, k=k), by_double_loop(x, y, k), rtol=1e-12)


def test_sets_of_several_blocks_are_counted_whole():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 4)), 0.3 + rng.normal(size=(530, 4))
    among_x = np.sqrt(np.square(x[:, None] - x).sum(-1)) + np.diag(np.full(600, np.inf))
    among_y = np.sqrt(np.square(y[:, None] - y).sum(-1)) + np.diag(np.full(530, np.inf))
    between = np.sqrt(np.square(x[:, None] - y).sum(-1))
    inside = between <= np.sort(among_x, axis=1)[:, 4:5]
    makes = between <= np.sort(among_y, axis=1)[:, 4]
    expected = (
        inside.any(0).mean(), makes.any(1).mean(), inside.sum() / (5 * 530), inside.any(1).mean()
    )  # fmt: skip
    np.testing.assert_allclose(coverage(x, y), expected, rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_identical_sets_hold_each_other_whole(offset):
    """Every ball holds its centre and k neighbours, the last exactly on its edge."""
    x = np.random.default_rng(1).normal(size=(300, 64)).astype(np.float32) + offset
    precision, recall, density, covered = coverage(x, x, k=4)
    assert (precision, recall, covered) == (1.0, 1.0, 1.0)
    assert density == 5 / 4


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.1, 0.3), (1.0, 1e6)])
def test_equal_distances_are_equal_at_any_scale(scale, offset):
    """On a lattice nearly every radius is the distance of many points: all lie on the edge."""
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 4, size=(60, 5)), rng.integers(0, 4, size=(47, 5))
    expected = by_double_loop(x, y, 3)
    np.testing.assert_allclose(coverage(scale * x + offset, scale * y + offset, k=3), expected)


def test_two_far_clusters_of_which_one_is_made():
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(40, 2)), 100 + rng.normal(size=(60, 2))
    made = rng.normal(size=(50, 2))
    found = coverage(np.concatenate([left, right]), made, k=5)
    alone = coverage(left, made, k=5)
    assert found.precision == alone.precision > 0.8
    assert found.density == alone.density
    np.testing.assert_allclose(found.recall, 0.4 * alone.recall)
    np.testing.assert_allclose(found.coverage, 0.4 * alone.coverage)
    # Turned round: half of what is made has no counterpart.
    turned = coverage(left, np.concatenate([made, right[:50]]), k=5)
    assert turned.precision == alone.precision / 2
    assert turned.recall == alone.recall
    assert coverage(left, right) == (0.0, 0.0, 0.0, 0.0)


def test_points_on_a_line_by_hand():
    """The balls of 0, 1, 3 and 7, k = 2, have the radii 3, 2, 3 and 6; of 2, 4 and 20: 18, 16, 18.

    So 2 lies in the first three and 7's; 4 in those of 3 and 7; 20 in none. The three balls of the
    generated points hold every real one.
    """
    real, made = [[0.0], [1.0], [3.0], [7.0]], [[2.0], [4.0], [20.0]]
    precision, recall, density, covered = coverage(real, made, k=2)
    assert (precision, recall, density, covered) == (2 / 3, 1.0, 6 / 6, 1.0)


def test_a_far_outlier_fools_precision_and_not_density():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(200, 2)), 20 + rng.normal(size=(200, 2))
    x[0] = 40.0
    found = coverage(x, y)
    assert found.precision == 1.0
    assert found.density == 1 / 5
    assert found.coverage == 1 / 200


@pytest.mark.parametrize("k", [1, 5])
def test_equal_laws_have_density_one_and_the_coverage_of_the_lemma(k):
    n, m, rng = 30, 50, np.random.default_rng(k)
    sets = [(rng.normal(size=(n, 3)), rng.normal(size=(m, 3))) for _ in range(600)]
    found = np.array([coverage(x, y, k=k) for x, y in sets])
    mean, error = found.mean(axis=0), found.std(axis=0) / np.sqrt(600)
    expected = 1 - np.prod([(n - j) / (n + m - j) for j in range(1, k + 1)])
    assert abs(mean[2] - 1) < 4 * error[2]
    assert error[2] < 0.02
    assert abs(mean[3] - expected) < 4 * error[3]


def test_memory_stays_at_blocks_of_rows():
    x = np.random.default_rng(4).normal(size=(4000, 4))
    tracemalloc.start()
    found = coverage(x, x + 1e-3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.coverage == 1.0
    assert peak < 4000 * 4000 * 8 / 2


@pytest.mark.parametrize(
    ("real", "generated", "k", "line"),
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), 5, r"not \(9, 2\) and \(9, 3\)"),
        (np.zeros(9), np.zeros((9, 1)), 5, r"not \(9,\) and \(9, 1\)"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "9 and 9, not 0"),
        (np.zeros((5, 2)), np.zeros((9, 2)), 5, "5 and 9, not 5"),
        (np.zeros((9, 2)), np.zeros((5, 2)), 5, "9 and 5, not 5"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), 5, "must be finite"),
        (np.zeros((9, 2)), np.full((9, 2), np.inf), 5, "must be finite"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(real, generated, k, line):
    with pytest.raises(ValueError, match=line):
        coverage(real, generated, k=k)


# Summaries


def test_the_harmonic_mean_is_scipys():
    shares = np.random.default_rng(5).uniform(0.01, 1, size=(3, 20))
    np.testing.assert_allclose(harmonic_mean(*shares), stats.hmean(shares), rtol=1e-5)
    broadcast = harmonic_mean(shares[0][:, None], shares[1])
    pairs = np.broadcast_arrays(shares[0][:, None], shares[1])
    np.testing.assert_allclose(broadcast, stats.hmean(np.stack(pairs)), rtol=1e-5)


def test_one_share_of_zero_is_a_mean_of_zero():
    assert float(harmonic_mean(0, 1, 1)) == 0.0
    assert float(harmonic_mean(0.0)) == 0.0
    np.testing.assert_allclose(harmonic_mean([0.0, 0.5], 1.0), [0.0, 2 / 3], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: harmonic_mean(s, 0.5)))
    np.testing.assert_allclose(gradient(0.5), 0.5, rtol=1e-6)
    assert np.isfinite(gradient(0.0))


@pytest.mark.parametrize("shares", [(), (1.1,), (0.5, -0.1), ([0.2, np.nan],), (50, 0.5)])
def test_what_is_no_share_is_refused(shares):
    with pytest.raises(ValueError, match="share"):
        harmonic_mean(*shares)
