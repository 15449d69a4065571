import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import pytest
from scipy import optimize

from jax_unlearn import duality, likelihoods, mixtures, schedules

KEY = jax.random.key(0)
Q = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], 0.49)
U = mixtures.select(Q, [0])


def binary_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def is_calibrated(floors, exact, share):
    """Never above beyond the error, on average nor one by one; near; with honest errors."""
    values, errors = (np.array([getattr(f, name) for f in floors]) for name in ("value", "stderr"))
    assert values.mean() <= exact + 3 * values.std() / np.sqrt(len(values))
    assert values.mean() >= share * exact
    z = (values - exact) / errors
    assert z.max() < 4
    assert 0.7 < errors.mean() / values.std() < 1.5


def test_likelihood_floor_over_many_seeds():
    """Two independent concepts of 30 and 20 %: the price is the sum of two binary KLs."""
    rng, thresholds = np.random.default_rng(0), [0.1, 0.05]
    shares = np.array([0.3, 0.2])
    exact = binary_kl(np.array(thresholds), shares).sum()
    floors = [
        duality.likelihood_floor(rng.random((400, 2)) < shares, thresholds, key=jax.random.key(i))
        for i in range(150)
    ]
    is_calibrated(floors, exact, 0.95)
    tilted = np.log(shares / (1 - shares) * (1 - np.array(thresholds)) / thresholds)
    np.testing.assert_allclose(np.mean([f.multipliers for f in floors], 0), tilted, rtol=0.1)
    weights = np.prod([1 - s + s * np.exp(-c * tilted.T) for s, c in ((shares, 1),)], axis=1)
    squares = np.prod(1 - shares + shares * np.exp(-2 * tilted))
    effective = np.mean([f.effective for f in floors])
    assert effective == pytest.approx(400 * weights.item() ** 2 / squares, rel=0.05)


def test_reverse_kl_floor_over_many_seeds():
    """N(0, I) against N(μ e_i, I): p_λ* is N(−a(1, 1), I), with ((a + μ)² + a²)/2 = b."""
    rng, mean, b = np.random.default_rng(1), 1.0, 1.5
    a = (-mean + np.sqrt(4 * b - mean**2)) / 2
    floors = []
    for seed in range(150):
        log_ratios = mean**2 / 2 - mean * rng.normal(size=(400, 2))
        floors.append(duality.reverse_kl_floor(log_ratios, [b, b], key=jax.random.key(seed)))
    is_calibrated(floors, a**2, 0.93)
    strength = a / mean  # p_λ ∝ q exp(α Σ ℓ) has the mean −α μ
    expected = strength / (1 + 2 * strength)
    np.testing.assert_allclose(np.mean([f.multipliers for f in floors], 0), expected, rtol=0.05)
    assert all(f.lower is None for f in floors)


@pytest.mark.slow
def test_three_gaussians_from_samples():
    """Against the dual functions by quadrature, maximised by scipy."""
    cells = mixtures.grid([(-7, 7), (-6, 8)], 200)
    on_cells, x = cells.x, mixtures.sample(Q, KEY, 20_000)
    q = np.exp(np.float64(mixtures.log_masses(Q, cells)))

    density = jax.jit(mixtures.log_density)

    def values_at(x):
        log_q, log_u = (np.float64(density(law, x)) for law in (Q, U))
        return np.exp(log_u)[:, None], (log_q - log_u)[:, None]

    def best(dual, most):
        found = optimize.minimize_scalar(lambda c: -dual(c), bounds=(0, most), method="bounded")
        return found.x, -found.fun

    (h, log_ratios), (sampled_h, sampled_ratios) = values_at(on_cells), values_at(x)
    current, exact = best(lambda c: -np.log(q @ np.exp(-c * h[:, 0])) - 0.01 * c, 100)
    assert exact == pytest.approx(0.1691, abs=1e-4)
    floor = duality.likelihood_floor(sampled_h, [0.01], key=KEY)
    assert abs(floor.value - exact) < min(3 * floor.stderr, 0.1 * exact)
    assert 0.9 * exact < floor.lower < exact
    np.testing.assert_allclose(floor.multipliers, current, rtol=0.1)

    def dual(c):
        return 14 * c - (1 - c) * np.log(q @ np.exp(c / (1 - c) * log_ratios[:, 0]))

    current, exact = best(dual, 0.3)
    assert exact == pytest.approx(0.1825, abs=1e-4)
    floor = duality.reverse_kl_floor(sampled_ratios, [14.0], key=KEY)
    assert abs(floor.value - exact) < min(3 * floor.stderr, 0.1 * exact)
    np.testing.assert_allclose(floor.multipliers, current, rtol=0.1)


@pytest.mark.slow
def test_three_gaussians_from_paths():
    """Of exact denoisers and fine steps: the same threshold on paths has nearly the images' price.

    On paths of few steps it has not: they part from one another more, or less, than images do.
    """
    base = jnp.zeros(8000, int)

    def path_ratios(steps):
        alphas = 1 / (1 + np.exp(-np.linspace(9, -9, steps)))
        schedule = schedules.noise_schedule(
            trained_betas=1 - alphas / np.append(1, alphas[:-1]), variance_type="fixed_geometric"
        )

        def apply(params, x_t, t, cond):
            ours, theirs = (mixtures.predictions(p, x_t, schedule.log_snr[t]) for p in (Q, U))
            return jnp.where((cond == 0)[:, None], ours.epsilon, theirs.epsilon)

        return jax.jit(
            lambda key: likelihoods.path_log_ratios(
                apply, None, schedule, key, base=base, targets=base[:, None] + 1, shape=(2,),
                steps=steps,
            )
        )(KEY)  # fmt: skip

    floors = {}
    for steps in (60, 400):
        found = np.asarray(path_ratios(steps), np.float64)
        floors[steps] = duality.reverse_kl_floor(found, [14.0], key=KEY)
        error = np.exp(-found).std() / np.sqrt(len(found))
        assert abs(np.exp(-found).mean() - 1) < 3 * error
    assert found.mean() == pytest.approx(8.787, rel=0.05)
    assert abs(floors[400].value - 0.1825) < min(3 * floors[400].stderr, 0.1 * 0.1825)
    assert floors[60].value < 0.95 * floors[400].value


def test_likelihood_floor_of_a_family():
    """Each group keeps its share: its own odds, all tilted by one e^−λ."""
    rng = np.random.default_rng(2)
    rates, sizes = np.array([0.5, 0.1, 0.02]), np.array([1500, 1000, 501])
    shares = sizes / sizes.sum()

    def tilted(current):
        odds = rates / (1 - rates) * np.exp(-current)
        return odds / (1 + odds)

    current = optimize.brentq(lambda c: shares @ tilted(c) - 0.05, 0, 20)
    exact = shares @ binary_kl(tilted(current), rates)
    names = np.repeat([7, -1, 3], sizes)
    order = rng.permutation(len(names))
    h = (rng.random(len(names)) < np.repeat(rates, sizes))[order, None]
    floor = duality.likelihood_floor(h, [0.05], groups=names[order], key=KEY)
    assert abs(floor.value - exact) < 3 * floor.stderr < 0.2 * exact
    np.testing.assert_allclose(floor.multipliers, current, rtol=0.15)
    assert 0.5 * exact < floor.lower < exact
    # What leaves the shares free is a weaker claim: of the binary KL of the whole.
    free = duality.likelihood_floor(h, [0.05], key=KEY)
    assert abs(free.value - binary_kl(0.05, shares @ rates)) < 3 * free.stderr
    assert free.value < 0.9 * floor.value


def test_small_groups_do_not_raise_the_floor():
    """The log of a mean of 3 is too low by much of the price; the jackknife says so."""
    rng, groups = np.random.default_rng(3), np.repeat(np.arange(150), 6)
    exact, current = binary_kl(0.1, 0.3), np.log(0.3 / 0.7 * 0.9 / 0.1)
    drawn = [rng.random((900, 1)) < 0.3 for _ in range(60)]
    floors = [
        duality.likelihood_floor(h, [0.1], groups=groups, key=jax.random.key(i))
        for i, h in enumerate(drawn)
    ]
    is_calibrated(floors, exact, 0.9)
    plain = [-np.log(np.exp(-current * h.reshape(300, 3)).mean(1)).mean() for h in drawn]
    assert np.mean(plain) - 0.1 * current > 1.2 * exact
    # The given λ uses all six, and says what a jackknife written out does.
    floor = duality.likelihood_floor(drawn[0], [0.1], groups=groups, multipliers=[current])
    w = np.exp(-current * drawn[0].reshape(150, 6))
    left = np.log([np.delete(w, i, axis=1).mean(1) for i in range(6)])
    corrected = 6 * np.log(w.mean(1)) - 5 * left.mean(0)
    assert floor.value == pytest.approx(-corrected.mean() - 0.1 * current)
    variances = 5 / 6 * np.square(left - left.mean(0)).sum(0)
    assert floor.stderr == pytest.approx(np.sqrt(variances.sum()) / 150)
    counts = w.sum(1) ** 2 / (w**2).sum(1)
    assert floor.effective == pytest.approx(1 / np.mean(1 / counts))


def test_weak_duality_at_any_multipliers():
    """No p of random masses is cheaper than the floor of its own values; g is the dual function."""
    rng = np.random.default_rng(4)
    q, u = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8), size=2)
    h = rng.normal(size=(8, 2))
    drawn = rng.choice(8, 4000, p=q)
    log_ratios = np.log(q / u).T
    tightest = np.inf
    for _ in range(40):
        p = rng.dirichlet(20 * q) + 1e-9
        p /= p.sum()
        price = p @ np.log(p / q)

        current, epsilon = rng.exponential(0.5, 2), p @ h
        floor = duality.likelihood_floor(h[drawn], epsilon, multipliers=current)
        assert floor.value < price + 3 * floor.stderr
        exact = -np.log(q @ np.exp(-h @ current)) - current @ epsilon
        assert abs(floor.value - exact) < 4 * floor.stderr
        np.testing.assert_allclose(floor.multipliers, current)
        tightest = min(tightest, price - floor.value)

        current = 0.5 * rng.dirichlet(np.ones(3))[:2]
        b = [p @ np.log(p / one) for one in u]
        floor = duality.reverse_kl_floor(log_ratios[drawn], b, multipliers=current)
        assert floor.value < price + 3 * floor.stderr
        rest = 1 - current.sum()
        mean = q @ np.exp(log_ratios @ current / rest)
        assert abs(floor.value - (current @ b - rest * np.log(mean))) < 4 * floor.stderr
        np.testing.assert_allclose(floor.multipliers, current)
    assert tightest < 0.2


def test_other_thresholds_along_the_tangent():
    """N(0, 1) against N(1, 1): P* = (√b − √½)², whose tangents lie below it."""
    log_ratios = 0.5 - np.random.default_rng(5).normal(size=(4000, 1))
    floor = duality.reverse_kl_floor(log_ratios, [1.5], key=KEY)
    for b in (0.6, 1.4, 1.6, 3.0):
        moved = floor.value + floor.multipliers @ [b - 1.5]
        assert moved < (np.sqrt(b) - np.sqrt(0.5)) ** 2 + 3 * floor.stderr
        given = duality.reverse_kl_floor(log_ratios, [b], multipliers=floor.multipliers)
        assert given.value == pytest.approx(moved, abs=0.1 * floor.stderr)


def test_negative_values_pose_the_same_problem():
    """h may be a calibrated posterior, (h − a)/(b − a) of shares a and b of false and true."""
    rng = np.random.default_rng(6)
    h, groups = rng.beta(0.4, 0.8, size=(6000, 2)), rng.integers(0, 3, 6000)
    options = {"groups": groups, "key": KEY}
    plain = duality.likelihood_floor(h, [0.2, 0.25], **options)
    shifted, bounds = (h - 0.1) / 0.8, (np.array([0.2, 0.25]) - 0.1) / 0.8
    calibrated = duality.likelihood_floor(shifted, bounds, **options)
    assert calibrated.value == pytest.approx(plain.value, rel=1e-4)
    assert calibrated.stderr == pytest.approx(plain.stderr, rel=1e-4)
    np.testing.assert_allclose(calibrated.multipliers, 0.8 * plain.multipliers, rtol=1e-3)
    assert plain.lower > 0
    assert calibrated.lower is None
    known = duality.likelihood_floor(shifted, bounds, least=-0.125, **options)
    assert known.lower == pytest.approx(plain.lower, rel=1e-4)


def test_the_lower_bound_written_out():
    rng = np.random.default_rng(7)
    h, current, epsilon = rng.random((300, 2)), np.array([1.5, 0.7]), np.array([0.2, 0.3])
    groups = np.repeat([0, 1], [100, 200])
    floor = duality.likelihood_floor(h, epsilon, groups=groups, multipliers=current, confidence=0.9)
    expected = -current @ epsilon
    for k, n in ((0, 100), (1, 200)):
        w = np.exp(-h[groups == k] @ current)
        log = np.log(2 / (0.1 / 2))
        upper = w.mean() + np.sqrt(2 * w.var(ddof=1) * log / n) + 7 * log / (3 * (n - 1))
        expected -= n / 300 * np.log(upper)
    assert floor.lower == pytest.approx(expected)
    assert 0 < floor.lower < floor.value
    # A price is never negative, whatever few samples say.
    few = duality.likelihood_floor(h[:8], epsilon, multipliers=current)
    assert few.lower == 0


@pytest.mark.parametrize("given", [True, False])
def test_the_lower_bound_covers(given):
    """Where h = 0 is rare, a third of the samples miss it: their own spread would say nothing."""
    rng, rare = np.random.default_rng(8), 0.02
    exact = binary_kl(0.8, 1 - rare)
    misses, unseen, bounds = 0, 0, []
    for seed in range(200):
        h = rng.random((60, 1)) >= rare
        unseen += h.all()
        options = {"multipliers": [2.5]} if given else {"key": jax.random.key(seed)}
        floor = duality.likelihood_floor(h, [0.8], confidence=0.9, **options)
        if given:
            exact = -np.log(rare + (1 - rare) * np.exp(-2.5)) - 2
        misses += floor.lower > exact
        bounds.append(floor.lower)
    assert unseen > 40
    assert misses <= 0.1 * 200
    easy = rng.random((5000, 1)) < 0.3
    floor = duality.likelihood_floor(easy, [0.1], confidence=0.9, key=KEY)
    assert 0.6 * binary_kl(0.1, 0.3) < floor.lower < binary_kl(0.1, 0.3)


def test_thresholds_beyond_the_samples():
    """A floor is what they can show: finite, no surer than a few samples, and below the truth."""
    rng = np.random.default_rng(9)
    h = 0.1 + rng.random((2000, 1))
    for epsilon, exact in ((0.1005, -1 - np.log(0.0005)), (0.05, np.inf)):
        floor = duality.likelihood_floor(h, [epsilon], key=KEY)
        assert 2.5 < floor.value < exact
        assert 8 < floor.effective < 400
        assert np.isfinite([floor.stderr, *floor.multipliers]).all()
    # All samples alike, above the threshold. One in 25 may be unlike, and has to count for little.
    floor = duality.likelihood_floor(np.ones((50, 1)), [0.5], key=KEY)
    np.testing.assert_allclose(25 * np.exp(-floor.multipliers), 10, rtol=0.12)
    assert floor.value == pytest.approx(0.5 * floor.multipliers[0])
    assert floor.effective == pytest.approx(50)
    # Already met: for nothing.
    floor = duality.likelihood_floor(h, [5.0], key=KEY)
    assert floor[:2] == (0, 0)
    assert floor.lower == 0
    log_ratios = 0.5 - rng.normal(size=(2000, 1))
    for b in (6.0, 100.0):
        floor = duality.reverse_kl_floor(log_ratios, [b], key=KEY)
        exact = (np.sqrt(b) - np.sqrt(0.5)) ** 2
        assert 0.75 * exact < floor.value < exact + 2 * floor.stderr
        assert 8 < floor.effective < 100
    floor = duality.reverse_kl_floor(log_ratios, [0.1], key=KEY)
    assert floor[:2] == (0, 0)


def test_weights_that_span_all_of_floating_point():
    """One sample of a thousand nats more: the jackknife calls it what it is."""
    log_ratios = np.zeros((10, 1))
    log_ratios[3] = 4000.0
    floor = duality.reverse_kl_floor(log_ratios, [0.5], multipliers=[0.5])
    assert np.isfinite(floor.value)
    assert floor.value < 0.25 - 0.5 * (4000 - np.log(10))
    assert floor.stderr > 100
    assert floor.effective == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((np.ones((8, 2)), [1.0]), {}, r"\[8, 2\] and \[1\]"),
        ((np.ones(8), [1.0]), {}, r"expected values \[n, m\]"),
        ((np.ones((8, 0)), []), {}, "at least 1"),
        ((np.full((8, 1), np.nan), [1.0]), {}, "finite"),
        ((np.ones((8, 1)), [np.inf]), {}, "finite"),
        ((np.ones((8, 1)), [1.0]), {"groups": np.zeros(5)}, r"groups \[8\], got \[5\]"),
        ((np.ones((8, 1)), [1.0]), {"groups": np.arange(8) // 3}, "at least 4 samples .* not 2"),
        ((np.ones((0, 1)), [1.0]), {}, "at least 4 samples"),
        ((np.ones((8, 1)), [1.0]), {"multipliers": [-0.1]}, "1 multipliers, at least 0"),
        ((np.ones((8, 1)), [1.0]), {"multipliers": [0.1, 0.1]}, "1 multipliers"),
        ((np.ones((8, 1)), [1.0]), {"key": None}, "give a key"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, words):
    for floor in (duality.likelihood_floor, duality.reverse_kl_floor):
        with pytest.raises(ValueError, match=words):
            floor(*arguments, **({"key": KEY} | options))


def test_bad_options_are_refused():
    values = np.ones((8, 1))
    with pytest.raises(ValueError, match="inside"):
        duality.likelihood_floor(values, [1.0], key=KEY, confidence=1.0)
    with pytest.raises(ValueError, match="least"):
        duality.likelihood_floor(values, [1.0], key=KEY, least=[0.0, 0.0])
    with pytest.raises(ValueError, match="sum to less than 1, not to 1"):
        duality.reverse_kl_floor(values, [1.0], multipliers=[1.0])


# Paths. Two linear chains that differ in gain and in bias; labels choose which.
PARAMS = [chains.gaussian([0.3], 0.5), chains.gaussian([-0.1], 0.55), chains.gaussian([0.6], 0.45)]


def linear(params, x_t, t, cond):
    gain, bias = (
        jnp.stack([jnp.asarray(np.ravel(p[name]), jnp.float32) for p in params])
        for name in ("gain", "bias")
    )
    return gain[cond, t][:, None] * x_t + bias[cond, t][:, None]


def alike(label, times=chains.ALL):
    """KL in nats of the chain of label 0 to that of another, from moments of Gaussians."""
    return chains.path_kl(PARAMS[0], 0, PARAMS[label], 0, times)


@pytest.mark.parametrize(("steps", "times"), [(5, chains.ALL), (2, (2, 0))])
def test_the_mean_over_paths_is_the_path_kl(steps, times):
    count = 40_000
    base = jnp.zeros(count, int)
    found = jax.jit(
        lambda key: likelihoods.path_log_ratios(
            linear, PARAMS, chains.SCHEDULE, key, base=base,
            targets=jnp.broadcast_to(jnp.array([1, 2, 0]), (count, 3)), shape=(1,), steps=steps,
        )
    )(KEY)  # fmt: skip
    found = np.asarray(found, np.float64)
    assert found.shape == (count, 3)
    np.testing.assert_array_equal(found[:, 2], 0)
    for i in (0, 1):
        exact, error = alike(i + 1, times), found[:, i].std() / np.sqrt(count)
        assert abs(found[:, i].mean() - exact) < 3 * error < 0.1 * exact
        weights = np.exp(-found[:, i])
        assert abs(weights.mean() - 1) < 3 * weights.std() / np.sqrt(count) < 0.1


@pytest.mark.parametrize(
    ("variance", "kind", "clip"),
    [
        ("fixed_small", "epsilon", 0.4),
        ("fixed_small", "sample", None),
        ("fixed_large", "epsilon", None),
        ("fixed_geometric", "sample", 0.4),
    ],
)
def test_ratios_are_those_of_gaussian_densities(variance, kind, clip):
    """Written out along the very paths, which the network has seen; they agree in the last step."""
    schedule = schedules.noise_schedule(
        trained_betas=chains.BETAS, prediction_type=kind, variance_type=variance, clip_range=clip
    )
    seen = []

    def network(x, t, cond, numbers):
        push = (t > 0) * numbers.asarray([1.0, 0.3, -0.5])[cond]
        return numbers.tanh(x * (1 + t) / 4) + push * numbers.cos(x)

    def apply(params, x_t, t, cond):
        jax.debug.callback(lambda x: seen.append(np.float64(x[:4])), x_t, ordered=True)
        shape = (-1, *(1,) * (x_t.ndim - 1))
        return network(x_t, t.reshape(shape), cond.reshape(shape), jnp)

    targets = np.array([[1, 2], [2, 1], [1, 1], [2, 0]])
    found = jax.jit(
        lambda key: likelihoods.path_log_ratios(
            apply, None, schedule, key, base=np.zeros(4, int), targets=targets, shape=(2, 1),
            steps=5,
        )
    )(KEY)  # fmt: skip
    jax.effects_barrier()
    path = [x.reshape(4, 2) for x in seen]
    expected = np.zeros((4, 2))
    for (t, in_x_0, in_x, posterior, _), x, following in zip(
        chains.steps_of(chains.ALL)[:-1], path, path[1:], strict=False
    ):
        now, after = chains.ALPHAS_CUMPROD[[t, t - 1]]
        v = {"fixed_small": posterior, "fixed_large": 1 - now / after}
        v["fixed_geometric"] = np.sqrt(v["fixed_small"] * v["fixed_large"])

        def mean(cond, t=t, x=x, in_x_0=in_x_0, in_x=in_x):
            x_0 = network(x, t, cond[:, None], np)
            if kind == "epsilon":
                x_0 = (x - chains.SIGMA[t] * x_0) / chains.ALPHA[t]
            return in_x_0 * (x_0 if clip is None else np.clip(x_0, -clip, clip)) + in_x * x

        def distance(cond, following=following, mean=mean):
            return np.square(following - mean(cond)).sum(axis=1)

        own = distance(np.zeros(4, int))
        expected += np.stack([distance(c) - own for c in targets.T], 1) / (2 * v[variance])
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_floor_of_shifted_chains():
    """Chains that differ by a bias alone: ℓ is N(K, 2K), and P* = (√b − √K̄)² over conditions."""
    params = chains.gaussian([0.0, 0.5, -0.9, 0.9], 0.6)
    divergences = [chains.path_kl(params, i, params, j) for i, j in ((0, 1), (0, 2), (3, 1))]
    target, base = np.tile([1, 2, 1], 4000), np.tile([0, 0, 3], 4000)
    found = jax.jit(
        lambda key: likelihoods.path_log_ratios(
            chains.apply, jax.tree.map(jnp.float32, params), chains.SCHEDULE, key,
            base=jnp.asarray(base), targets=jnp.asarray(target)[:, None], shape=(1,), steps=5,
        )
    )(KEY)  # fmt: skip
    mean = np.mean(divergences)
    floor = duality.reverse_kl_floor(found, [2 * mean], groups=3 * base + target, key=KEY)
    exact = mean * (np.sqrt(2) - 1) ** 2
    assert abs(floor.value - exact) < 3 * floor.stderr < 0.15 * exact
    # p_λ moves every mean by α = √2 − 1 of what parts it from its target.
    np.testing.assert_allclose(floor.multipliers, 1 - 1 / np.sqrt(2), rtol=0.05)
    for kl, i in zip(divergences, range(3), strict=True):
        np.testing.assert_allclose(found[i::3].mean(), kl, rtol=0.1)
        np.testing.assert_allclose(found[i::3].var(), 2 * kl, rtol=0.1)


@pytest.mark.parametrize(
    ("base", "targets", "steps", "words"),
    [
        (np.zeros(4, int), np.zeros(4, int), 3, r"\[\[4\]\] and \[\[4\]\]"),
        (np.zeros(3, int), np.zeros((4, 1), int), 3, r"\[\[3\]\] and \[\[4, 1\]\]"),
        (np.zeros((4, 2)), np.zeros((4, 1, 3)), 3, r"targets \[n, k, ...\]"),
        (None, np.zeros((4, 1), int), 3, "one structure"),
        (None, None, 3, "expected conditions"),
        (np.zeros(4, int), np.zeros((4, 1), int), 1, "at least 2 steps, not 1"),
        (np.zeros(4, int), np.zeros((4, 1), int), 6, "1 to 5 steps"),
    ],
)
def test_bad_paths_are_refused(base, targets, steps, words):
    with pytest.raises(ValueError, match=words):
        likelihoods.path_log_ratios(
            linear, PARAMS, chains.SCHEDULE, KEY, base=base, targets=targets, shape=(1,),
            steps=steps,
        )  # fmt: skip


def test_a_start_without_signal_is_refused():
    schedule = schedules.noise_schedule(
        trained_betas=chains.BETAS, rescale_betas_zero_snr=True, spacing="trailing"
    )
    with pytest.raises(ValueError, match="zero terminal SNR"):
        likelihoods.path_log_ratios(
            linear, PARAMS, schedule, KEY, base=np.zeros(2, int), targets=np.ones((2, 1), int),
            shape=(1,), steps=3,
        )  # fmt: skip
