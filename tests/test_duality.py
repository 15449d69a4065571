import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from jax_unlearn import duality, mixtures, samplers, schedules

SOLVERS = {
    "reverse": duality.solve_reverse_kl,
    "forward": duality.solve_forward_kl,
    "likelihood": duality.solve_likelihood,
}
DUALS = {
    "reverse": duality.dual_reverse_kl,
    "forward": duality.dual_forward_kl,
    "likelihood": duality.dual_likelihood,
}
TILTS = {
    "reverse": duality.tilt_reverse_kl,
    "forward": duality.tilt_forward_kl,
    "likelihood": duality.tilt_likelihood,
}
KINDS = list(SOLVERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def x64(request):
    with jax.enable_x64("float32" not in request.node.name):
        yield


def log_softmax(values):
    return special.log_softmax(values, axis=-1)


def kl(log_p, log_q):
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(log_p) > 0, np.exp(log_p) * (log_p - log_q), 0.0).sum(axis=-1)


def objective(kind, log_p, log_q):
    return kl(log_q, log_p) if kind == "forward" else kl(log_p, log_q)


def violations(kind, log_p, rows, thresholds):
    """The definition, in numpy."""
    if kind == "likelihood":
        return rows @ np.exp(log_p) - thresholds
    values = kl(log_p, rows) if kind == "reverse" else kl(rows, log_p)
    return thresholds - values


def random_problem(kind, rng, m, n, spread=1.0):
    """Thresholds on both sides of what q itself has, so that some constraints are inactive."""
    log_q = log_softmax(rng.normal(size=n))
    rows = log_softmax(log_q + spread * rng.normal(size=(m, n)))
    rows = np.exp(rows) if kind == "likelihood" else rows
    values = np.abs(violations(kind, log_q, rows, np.zeros(m)))
    low, high = (0.5, 1.2) if kind == "likelihood" else (0.8, 1.5)
    return log_q, rows, values * rng.uniform(low, high, m)


def check(kind, solution, log_q, rows, thresholds, tolerance=1e-8):
    """The KKT conditions, by the definitions."""
    log_p = np.asarray(solution.log_p)
    found = violations(kind, log_p, rows, thresholds)
    primal = objective(kind, log_p, log_q)
    size = 1 + np.abs(thresholds)
    assert bool(solution.attained)
    assert bool(solution.feasible)
    assert (np.asarray(solution.multipliers) >= 0).all()
    assert (found <= tolerance * size).all()
    np.testing.assert_allclose(solution.violations, found, atol=tolerance * size.max())
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=tolerance)
    assert np.abs(solution.multipliers * found).sum() <= tolerance * (1 + primal)
    np.testing.assert_allclose(solution.primal_value, primal, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(solution.dual_value, primal, rtol=tolerance, atol=tolerance)
    assert abs(solution.gap) <= tolerance * max(1, primal)


@pytest.mark.parametrize("seed", range(4))
def test_groups_keep_their_masses_and_the_rest_is_optimal(seed):
    """The KKT conditions of Σ_k q(k) KL(p(·|k)‖q(·|k)), by the definitions."""
    rng = np.random.default_rng(seed)
    log_q, rows, thresholds = random_problem("likelihood", rng, 3, 40)
    rows = rows + rng.uniform(size=(3, 1))
    thresholds = rng.uniform(0.97, 1.02, 3) * (rows @ np.exp(log_q))
    groups = np.arange(5)[:, None] == rng.integers(0, 4, 40)  # the last is empty
    found = duality.solve_likelihood(log_q, rows, thresholds, groups=groups)
    p, multipliers = np.exp(found.log_p), np.asarray(found.multipliers)
    assert bool(found.attained)
    np.testing.assert_allclose(groups @ p, groups @ np.exp(log_q), rtol=1e-10)
    violated = rows @ p - thresholds
    assert (violated <= 1e-10).all()
    assert (multipliers >= 0).all()
    assert (multipliers > 0).any()
    assert np.abs(multipliers * violated).max() < 1e-9
    slope = found.log_p - log_q + multipliers @ rows
    for group in groups[:4]:
        assert np.ptp(np.asarray(slope)[group]) < 1e-9
    assert found.primal_value == pytest.approx(kl(found.log_p, log_q), rel=1e-10)
    assert abs(found.gap) < 1e-8
    ends = (
        np.exp(log_q)
        @ np.where(
            groups.any(axis=1)[:, None, None], np.where(groups[:, None], rows, np.inf), 0
        ).min(axis=2)[groups.argmax(axis=0)]
    )
    np.testing.assert_allclose(found.largest_thresholds, ends, rtol=1e-10)

    def price(thresholds):
        return duality.solve_likelihood(log_q, rows, thresholds, groups=groups)

    derivative = jax.jacfwd(lambda b: price(b).multipliers)(jnp.asarray(thresholds))
    for i, step in enumerate(1e-5 * np.eye(3)):
        difference = price(thresholds + step).multipliers - price(thresholds - step).multipliers
        scale = np.abs(derivative).max()
        np.testing.assert_allclose(derivative[:, i], difference / 2e-5, atol=1e-4 * scale)


def test_cells_belong_to_one_group():
    log_q, rows = np.log(np.full(3, 1 / 3)), np.ones((1, 3))
    for groups in ([[True, True, False]], [[True] * 3] * 2, [[True] * 2]):
        with pytest.raises(ValueError, match="group"):
            duality.solve_likelihood(log_q, rows, [1.0], groups=groups)


# Known values of three Gaussians.


def three_gaussians(cells):
    q = mixtures.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], 0.49)
    cut = mixtures.grid([(-7, 7)] * 2, cells)
    u = mixtures.select(q, 0)
    shares = mixtures.responsibilities(q, cut.x)
    density = jnp.exp(mixtures.log_density(u, cut.x))[None]
    return mixtures.log_masses(q, cut), mixtures.log_masses(u, cut)[None], density, shares


@pytest.mark.parametrize(
    ("kind", "threshold", "multiplier", "price", "masses"),
    [
        ("reverse", 14.0, 0.0689, 0.1825, (0.133, 0.486, 0.381)),
        ("forward", 3.0, 0.300629, 0.4064, (0.051, 0.475, 0.473)),
        ("likelihood", 0.01, 10.90, 0.1691, (0.121, 0.440, 0.439)),
    ],
)
def test_known_values_of_three_gaussians(kind, threshold, multiplier, price, masses):
    log_q, log_u, density, shares = three_gaussians(401)
    np.testing.assert_allclose(kl(np.asarray(log_q), np.asarray(log_u)), 8.787, atol=5e-4)
    np.testing.assert_allclose(kl(np.asarray(log_u), np.asarray(log_q)), 1.079, atol=5e-4)
    rows = density if kind == "likelihood" else log_u
    solution = SOLVERS[kind](log_q, rows, np.array([threshold]))
    np.testing.assert_allclose(solution.multipliers, [multiplier], rtol=1e-3)
    np.testing.assert_allclose(solution.primal_value, price, atol=5e-5)
    np.testing.assert_allclose(jnp.exp(solution.log_p) @ shares, masses, atol=5.1e-4)
    check(kind, solution, np.asarray(log_q), np.asarray(rows), np.array([threshold]))


# Against other solvers.


@every_kind
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_constrained_optimiser_of_p(kind, seed):
    """SLSQP on the logits of p, which knows nothing of duality."""
    log_q, rows, thresholds = random_problem(kind, np.random.default_rng(seed), 3, 5, 0.7)
    solution = SOLVERS[kind](log_q, rows, thresholds)
    check(kind, solution, log_q, rows, thresholds)
    best = min(
        (
            optimize.minimize(
                lambda z: objective(kind, log_softmax(z), log_q),
                start,
                method="SLSQP",
                constraints={
                    "type": "ineq",
                    "fun": lambda z: -violations(kind, log_softmax(z), rows, thresholds),
                },
                options={"ftol": 1e-14, "maxiter": 500},
            )
            for start in (log_q, np.asarray(solution.log_p) + 0.1)
        ),
        key=lambda result: result.fun if result.success else np.inf,
    )
    assert best.success
    np.testing.assert_allclose(solution.primal_value, best.fun, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.exp(solution.log_p), np.exp(log_softmax(best.x)), atol=1e-5)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("cells", [2, 3])
def test_no_p_of_a_fine_simplex_is_better(kind, cells):
    """All p on a lattice: none is feasible and cheaper than the solution, one comes close."""
    steps = 4000 if cells == 2 else 400
    counts = np.array(
        [c for c in itertools.product(range(1, steps), repeat=cells - 1) if sum(c) < steps]
    )
    p = np.concatenate([counts, steps - counts.sum(axis=1, keepdims=True)], axis=1) / steps
    rng = np.random.default_rng(cells)
    attained = 0
    for _ in range(6):
        log_q, rows, thresholds = random_problem(kind, rng, 2, cells, 0.5)
        solution = SOLVERS[kind](log_q, rows, thresholds)
        values = np.stack(
            [
                violations(kind, np.log(p), row[None, None], threshold).reshape(-1)
                if kind != "likelihood"
                else p @ row - threshold
                for row, threshold in zip(rows, thresholds, strict=True)
            ]
        )
        cost = objective(kind, np.log(p), log_q)
        cheapest = np.where((values <= 0).all(axis=0), cost, np.inf).min()
        assert solution.dual_value <= cheapest + 1e-9
        if solution.attained:
            attained += 1
            assert solution.primal_value <= cheapest + 1e-9
            assert cheapest <= solution.primal_value + 20 / steps
    assert attained >= 2


@pytest.mark.slow
def test_many_random_problems_meet_the_kkt_conditions():
    """Also sharp and nearly coinciding q_i. RU may sit on its edge, and then says so."""
    rng = np.random.default_rng(7)
    for kind, (m, n), spread in itertools.product(KINDS, [(6, 40), (50, 300)], [0.2, 1.0, 8.0]):
        for _ in range(3):
            log_q, rows, thresholds = random_problem(kind, rng, m, n, spread)
            solution = SOLVERS[kind](log_q, rows, thresholds)
            if solution.attained:
                check(kind, solution, log_q, rows, thresholds)
                continue
            assert kind != "likelihood"
            assert solution.margin < 1e-12
            assert np.isinf(solution.gap) or solution.gap > 1e-3


@pytest.mark.slow
@every_kind
def test_coinciding_and_dirac_like_distributions(kind):
    rng = np.random.default_rng(3)
    log_q, rows, thresholds = random_problem(kind, rng, 1, 12, 0.7)
    values = np.abs(violations(kind, log_q, rows, np.zeros(1)))
    thresholds = values * (0.6 if kind == "likelihood" else 1.3)
    single = SOLVERS[kind](log_q, rows, thresholds)
    assert single.multipliers[0] > 0
    double = SOLVERS[kind](log_q, np.repeat(rows, 2, axis=0), np.repeat(thresholds, 2))
    check(kind, double, log_q, np.repeat(rows, 2, axis=0), np.repeat(thresholds, 2))
    np.testing.assert_allclose(double.multipliers.sum(), single.multipliers[0], rtol=1e-8)
    np.testing.assert_allclose(double.log_p, single.log_p, atol=1e-8)
    # Nearly all mass of each q_i in one cell.
    peaks = 25.0 * np.eye(12)[:3]
    sharp = np.exp(peaks - 20) if kind == "likelihood" else log_softmax(peaks)
    values = np.abs(violations(kind, log_q, sharp, np.zeros(3)))
    factors = {
        "reverse": [1.02, 1.01, 0.9],
        "forward": [1.8, 1.2, 0.9],
        "likelihood": [0.1, 0.5, 2],
    }
    thresholds = values * np.array(factors[kind])
    check(kind, SOLVERS[kind](log_q, sharp, thresholds), log_q, sharp, thresholds)


@pytest.mark.slow
@every_kind
def test_loose_and_exactly_met_thresholds_leave_q_alone(kind):
    log_q, rows, _ = random_problem(kind, np.random.default_rng(5), 2, 6)
    exact = np.abs(violations(kind, log_q, rows, np.zeros(2)))
    for thresholds in (exact, exact * (2.0 if kind == "likelihood" else 0.5)):
        solution = SOLVERS[kind](log_q, rows, thresholds)
        assert bool(solution.attained)
        np.testing.assert_allclose(solution.multipliers, 0, atol=1e-12)
        np.testing.assert_allclose(solution.log_p, log_q, atol=1e-12)


# The dual functions and the tilts.


@pytest.mark.slow
@every_kind
def test_dual_is_the_minimum_of_the_lagrangian(kind):
    log_q, rows, thresholds = random_problem(kind, np.random.default_rng(11), 2, 5)
    multipliers = np.array([0.2, 0.15])

    def lagrangian(z):
        log_p = log_softmax(z)
        total = multipliers @ violations(kind, log_p, rows, thresholds)
        return objective(kind, log_p, log_q) + total

    best = optimize.minimize(lagrangian, log_q, method="BFGS", options={"gtol": 1e-9})
    data = (log_q, rows, thresholds)
    np.testing.assert_allclose(DUALS[kind](multipliers, *data), best.fun, rtol=1e-9)
    log_p = TILTS[kind](multipliers, log_q, rows)
    np.testing.assert_allclose(log_p, log_softmax(best.x), atol=1e-5)
    gradient = jax.grad(DUALS[kind])(multipliers, *data)
    np.testing.assert_allclose(gradient, violations(kind, log_p, rows, thresholds), rtol=1e-9)


def test_outside_the_domain():
    log_q, rows, thresholds = random_problem("forward", np.random.default_rng(0), 2, 5)
    for kind, outside in itertools.product(KINDS, ([-0.1, 0.0], [0.6, 0.5])):
        if kind == "likelihood" and min(outside) >= 0:
            continue
        far = np.array(outside) * (10 if kind == "forward" else 1)
        assert DUALS[kind](far, log_q, np.abs(rows), thresholds) == -np.inf
        assert np.isnan(TILTS[kind](far, log_q, np.abs(rows))).all()


# What cannot be had is said.


def test_reverse_kl_beyond_every_cell():
    log_q, log_u = log_softmax(np.array([0.0, 1.0, 2.0])), log_softmax(np.array([[0.0, 1.0, -1.0]]))
    most = -log_u.min()
    over = SOLVERS["reverse"](log_q, log_u, np.array([most + 0.1]))
    np.testing.assert_allclose(over.largest_thresholds, [most])
    assert not over.feasible
    assert not over.attained
    assert over.violations[0] > 0.09
    assert np.isinf([over.primal_value, over.dual_value, over.gap]).all()
    # At the edge itself p is a point mass.
    edge = SOLVERS["reverse"](log_q, log_u, np.array([most]))
    assert edge.feasible
    np.testing.assert_allclose(edge.primal_value, -log_q[2], rtol=1e-6)


def test_reverse_kl_between_the_tilts_and_the_simplex_shows_its_gap():
    """The cell where q/q_1 is largest is not the one where q_1 is smallest: no tilt gets there."""
    log_q, log_u = np.log([0.98, 0.019, 0.001]), np.log([[0.2, 0.7997, 0.0003]])
    threshold = 4.0  # between −log 0.2 and −log 0.0003
    solution = SOLVERS["reverse"](log_q, log_u, np.array([threshold]))
    assert not solution.attained
    assert np.isfinite(solution.dual_value)
    share = np.linspace(1e-6, 1 - 1e-6, 2001)
    first, second = np.meshgrid(share, share)
    third = 1 - first - second
    p = np.stack([first, second, third], -1)[third > 0]
    feasible = kl(np.log(p), log_u) >= threshold
    cheapest = kl(np.log(p[feasible]), log_q).min()
    assert solution.dual_value < cheapest - 0.1
    assert solution.margin < 1e-12
    lower = np.asarray(threshold - solution.violations)
    again = SOLVERS["reverse"](log_q, log_u, lower - 1e-6)
    assert again.attained


@pytest.mark.slow
@pytest.mark.parametrize("cells", [200, 800, 3200])
def test_forward_kl_past_its_edge_is_not_attained(cells):
    """q_1 inside q: q/q_1 is least at 0, where p has a hole; more is had by a deeper one only."""
    cut = mixtures.grid([(-8.0, 8.0)], cells)
    log_q = mixtures.log_masses(mixtures.gaussian_mixture([[0.0]], 1.0), cut)
    log_u = mixtures.log_masses(mixtures.gaussian_mixture([[0.0]], 0.25), cut)[None]
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-2 * x**2) * np.sqrt(2 / np.pi)
    rest = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) - 0.5 * density
    inside = np.abs(x) > 1e-9
    width = x[1] - x[0]
    edge = (density * np.log(density / np.where(inside, 2 * rest, 1)))[inside].sum() * width
    below = SOLVERS["forward"](log_q, log_u, np.array([edge - 0.05]))
    check("forward", below, np.asarray(log_q), np.asarray(log_u), np.array([edge - 0.05]), 1e-7)
    past = SOLVERS["forward"](log_q, log_u, np.array([edge + 3.0]))
    assert not past.attained
    assert not past.feasible
    np.testing.assert_allclose(past.multipliers, [0.5], rtol=5e-3)
    step = 16 / cells
    assert edge - 6 * step * np.log(1 / step) < past.largest_thresholds[0] < edge + 1e-3
    # Past the edge a nat of separation is not free: holes cost λ = min q/q_1 nats each.
    further = SOLVERS["forward"](log_q, log_u, np.array([edge + 4.0]))
    np.testing.assert_allclose(further.dual_value - past.dual_value, 0.5, rtol=5e-3)
    assert past.margin < 1e-12


def test_forward_kl_from_all_of_q():
    """q_1 = q: every λ < 1 leaves p = q, and the price b is only approached."""
    log_q = log_softmax(np.array([0.0, 1.0, 2.0]))
    solution = SOLVERS["forward"](log_q, log_q[None], np.array([1.0]))
    assert not solution.attained
    np.testing.assert_allclose(solution.dual_value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(solution.largest_thresholds, [0.0], atol=1e-9)


def test_likelihood_below_its_minimum_alone_and_jointly():
    log_q = log_softmax(np.array([0.0, 1.0, 2.0]))
    h = np.array([[0.2, 0.5, 1.0], [1.0, 0.5, 0.1]])
    alone = SOLVERS["likelihood"](log_q, h, np.array([0.19, 2.0]))
    np.testing.assert_allclose(alone.largest_thresholds, [0.2, 0.1])
    jointly = SOLVERS["likelihood"](log_q, h, np.array([0.4, 0.4]))
    for solution in (alone, jointly):
        assert not solution.feasible
        assert not solution.attained
        assert solution.violations.max() > 0
        assert np.isinf([solution.primal_value, solution.dual_value, solution.gap]).all()
    met = SOLVERS["likelihood"](log_q, h, np.array([0.56, 0.46]))
    check("likelihood", met, log_q, h, np.array([0.56, 0.46]))
    edge = SOLVERS["likelihood"](log_q, h, np.array([0.2, 2.0]))
    assert edge.feasible
    np.testing.assert_allclose(edge.primal_value, -log_q[0], rtol=1e-6)


@pytest.mark.slow
def test_empty_cells():
    """Where q is empty p is; where only q_i is, that constraint costs nothing (RU), and so on."""
    log_q = np.array([np.log(0.5), np.log(0.3), np.log(0.2), -np.inf])
    full = log_softmax(np.array([3.0, 0.0, 0.0, 0.0]))
    hollow = np.array([np.log(0.7), np.log(0.3), -np.inf, -np.inf])
    spills = np.array([np.log(0.1), np.log(0.1), np.log(0.1), np.log(0.7)])
    solution = SOLVERS["reverse"](log_q, np.stack([full, hollow]), np.array([1.0, 50.0]))
    assert solution.attained
    assert solution.log_p[3] == -np.inf
    assert solution.multipliers[1] == 0
    assert solution.violations[1] == -np.inf
    # Over three cells, where q_1 does not sum to one: its scale moves the threshold.
    scale = np.log(np.exp(full[:3]).sum())
    alone = SOLVERS["reverse"](log_q[:3], full[None, :3] - scale, np.array([1.0 + scale]))
    np.testing.assert_allclose(solution.primal_value, alone.primal_value, rtol=1e-9)
    rows = np.stack([hollow, spills])
    solution = SOLVERS["forward"](log_q, rows, np.array([1.0, 50.0]))
    assert solution.attained
    assert solution.multipliers[1] == 0
    assert solution.violations[1] == -np.inf
    alone = SOLVERS["forward"](log_q[:3], hollow[None, :3], np.array([1.0]))
    np.testing.assert_allclose(solution.primal_value, alone.primal_value, rtol=1e-9)
    h = np.array([[1.0, 0.0, 0.5, -0.0]])
    solution = SOLVERS["likelihood"](log_q, h, np.array([0.0]))
    assert solution.feasible
    np.testing.assert_allclose(solution.primal_value, -np.log(0.3), rtol=1e-6)

    def price(log_q):
        return duality.solve_reverse_kl(log_q, np.stack([full, hollow]), jnp.array([1.0, 50.0]))

    assert np.isfinite(jax.grad(lambda v: price(v).primal_value)(jnp.asarray(log_q))).all()


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        (duality.solve_reverse_kl, ([0.0], [0.0], [1.0]), r"log_q_unlearn \[m, n\]"),
        (duality.solve_forward_kl, ([0.0], [[0.0]], [1.0, 2.0]), r"thresholds \[m\]"),
        (duality.solve_reverse_kl, ([0.5], [[0.0]], [1.0]), "masses of log_q must sum to one"),
        (duality.solve_forward_kl, ([0.0], [[-1.0]], [1.0]), "masses of log_q_unlearn"),
        (duality.solve_likelihood, ([0.0], [[-1.0]], [1.0]), "not negative"),
        (duality.solve_likelihood, ([0.0], [[1.0]], [np.nan]), "must be numbers"),
        (duality.solve_likelihood, ([0.0], np.zeros((0, 1)), []), "at least one constraint"),
    ],
)
def test_mistakes_are_refused(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        solver(*map(np.asarray, arguments))


@pytest.mark.slow
@every_kind
def test_float32(kind):
    rng = np.random.default_rng(2)
    for _ in range(10):
        log_q, rows, thresholds = random_problem(kind, rng, 4, 20, 1.0)
        solution = SOLVERS[kind](log_q, rows, thresholds)
        assert solution.multipliers.dtype == solution.log_p.dtype == jnp.float32
        assert solution.attained
        with jax.enable_x64(True):
            exact = SOLVERS[kind](log_q, rows, thresholds)
            check(kind, exact, log_q, rows, thresholds)
        np.testing.assert_allclose(solution.primal_value, exact.primal_value, rtol=3e-4, atol=3e-6)
        scale = np.abs(exact.multipliers).max()
        np.testing.assert_allclose(solution.multipliers, exact.multipliers, atol=5e-3 * scale)


# Derivatives.


SCALES = {"reverse": 0.2, "forward": 0.1, "likelihood": 3.0}
PATTERNS = {"active": (1.0, 0.7), "mixed": (1.2, 0.0), "inactive": (0.0, 0.0)}


def numpy_tilt(kind, multipliers, log_q, rows):
    """The closed forms of p_λ, in numpy."""
    if kind == "reverse":
        return log_softmax((log_q - multipliers @ rows) / (1 - multipliers.sum()))
    if kind == "forward":
        return np.log((np.exp(log_q) - multipliers @ np.exp(rows)) / (1 - multipliers.sum()))
    return log_softmax(log_q - multipliers @ rows)


def inverse_problem(kind, pattern, cells=6):
    """A problem made from its answer: thresholds at the values of p_λ, and looser where λ is 0."""
    multipliers = SCALES[kind] * np.array(PATTERNS[pattern])
    log_q, rows, _ = random_problem(kind, np.random.default_rng(21), 2, cells, 0.6)
    log_p = numpy_tilt(kind, multipliers, log_q, rows)
    values = np.abs(violations(kind, log_p, rows, np.zeros(2)))
    slack = np.where(multipliers > 0, 0.0, 0.05)
    return log_q, rows, values + (slack if kind == "likelihood" else -slack), multipliers


def finite_differences(function, at, step=1e-5):
    at = np.asarray(at, np.float64)
    columns = []
    for i in np.ndindex(at.shape):
        move = np.zeros(at.shape)
        move[i] = step
        columns.append((np.asarray(function(at + move)) - function(at - move)) / (2 * step))
    return np.stack(columns, axis=-1).reshape(columns[0].shape + at.shape)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_derivatives_in_the_thresholds(kind, pattern):
    log_q, rows, thresholds, expected = inverse_problem(kind, pattern)

    def multipliers(b):
        return SOLVERS[kind](log_q, rows, b).multipliers

    def price(b):
        return SOLVERS[kind](log_q, rows, b).primal_value

    def bound(b):
        return SOLVERS[kind](log_q, rows, b).dual_value

    np.testing.assert_allclose(multipliers(thresholds), expected, atol=1e-9)
    numeric = finite_differences(multipliers, thresholds)
    scale = max(1.0, np.abs(numeric).max())
    for transform in (jax.jacfwd, jax.jacrev):
        exact = jax.jit(transform(multipliers))(thresholds)
        np.testing.assert_allclose(exact, numeric, atol=1e-5 * scale)
    envelope = -expected if kind == "likelihood" else expected
    for value in (price, bound):
        np.testing.assert_allclose(jax.grad(value)(thresholds), envelope, atol=1e-8)
    np.testing.assert_allclose(finite_differences(price, thresholds), envelope, atol=1e-5)


@pytest.mark.slow
@every_kind
def test_second_derivative_of_the_price(kind):
    """d²P*/db² = dλ*/db (RU, FU) or −dλ*/dε (LU)."""
    log_q, rows, thresholds, _ = inverse_problem(kind, "active")
    curvature = jax.hessian(lambda b: SOLVERS[kind](log_q, rows, b).dual_value)(thresholds)
    slope = jax.jacfwd(lambda b: SOLVERS[kind](log_q, rows, b).multipliers)(thresholds)
    np.testing.assert_allclose(curvature, -slope if kind == "likelihood" else slope, rtol=1e-6)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("pattern", ["active", "mixed"])
def test_derivatives_in_the_data(kind, pattern):
    """Through log_q and the log masses of the q_i (or the likelihoods), as normalised logits."""
    log_q, rows, thresholds, _ = inverse_problem(kind, pattern)

    def multipliers(logits):
        chosen = jnp.exp(logits[1:]) if kind == "likelihood" else jax.nn.log_softmax(logits[1:])
        return SOLVERS[kind](jax.nn.log_softmax(logits[0]), chosen, thresholds).multipliers

    both = np.concatenate([log_q[None], np.log(rows) if kind == "likelihood" else rows])
    numeric = finite_differences(multipliers, both)
    scale = max(1.0, np.abs(numeric).max())
    for transform in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(transform(multipliers)(both), numeric, atol=1e-5 * scale)


@pytest.mark.slow
@every_kind
def test_vmap_over_thresholds_and_problems(kind):
    log_q, rows, thresholds, _ = inverse_problem(kind, "active")
    batch = thresholds * np.array([0.9, 1.0, 1.1])[:, None]

    def multipliers(b):
        return SOLVERS[kind](log_q, rows, b).multipliers

    together = jax.vmap(multipliers)(batch)
    jacobians = jax.jit(jax.vmap(jax.jacrev(multipliers)))(batch)
    for b, found, jacobian in zip(batch, together, jacobians, strict=True):
        np.testing.assert_allclose(found, multipliers(b), atol=1e-9)
        np.testing.assert_allclose(jacobian, jax.jacfwd(multipliers)(b), atol=1e-6)
    rng = np.random.default_rng(1)
    problems = [random_problem(kind, rng, 2, 6, 0.5) for _ in range(4)]
    stacked = jax.vmap(SOLVERS[kind])(*(np.stack(parts) for parts in zip(*problems, strict=True)))
    for i, problem in enumerate(problems):
        check(kind, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), *problem)


@pytest.mark.slow
def test_no_derivative_where_the_optimum_is_not_attained():
    log_q, log_u = log_softmax(np.array([0.0, 1.0, 2.0])), log_softmax(np.array([[0.0, 1.0, -1.0]]))

    def multiplier(b):
        return SOLVERS["reverse"](log_q, log_u, b[None]).multipliers[0]

    assert np.isnan(jax.grad(multiplier)(10.0))
    assert np.isnan(jax.jacfwd(multiplier)(10.0))
    assert np.isfinite(jax.grad(multiplier)(1.8))


# Both kinds of constraint.


def mixed_problem(seed):
    """Two KL and two likelihood constraints on six cells, one of each kind inactive."""
    rng = np.random.default_rng(seed)
    log_q, logs, _ = random_problem("reverse", rng, 2, 6, 0.7)
    _, h, _ = random_problem("likelihood", rng, 2, 6, 0.7)
    values = mixed_violations(log_q, logs, h, np.zeros(4))
    thresholds = np.abs(values) * [1.25, 0.5, 0.85, 2.0]
    return log_q, logs, h, thresholds


def mixed_violations(log_p, logs, h, thresholds):
    separated = violations("reverse", log_p, logs, thresholds[:2])
    liked = violations("likelihood", log_p, h, thresholds[2:])
    return np.concatenate([separated, liked])


@pytest.mark.parametrize("seed", range(4))
def test_mixed_problem_agrees_with_a_constrained_optimiser_of_p(seed):
    log_q, logs, h, thresholds = mixed_problem(seed)
    solution = duality.solve_mixed(log_q, logs, h, thresholds)
    assert solution.attained
    found = mixed_violations(np.asarray(solution.log_p), logs, h, thresholds)
    np.testing.assert_allclose(solution.violations, found, atol=1e-9)
    active = np.asarray(solution.multipliers) > 0
    assert active.sum() >= 1
    assert (found < 1e-9).all()
    np.testing.assert_allclose(found[active], 0, atol=1e-9)
    np.testing.assert_allclose(solution.gap, 0, atol=1e-9)
    # The closed form, by hand.
    separated, liked = np.split(np.asarray(solution.multipliers), 2)
    tilt = log_softmax((log_q - separated @ logs - liked @ h) / (1 - separated.sum()))
    np.testing.assert_allclose(solution.log_p, tilt, atol=1e-9)
    best = optimize.minimize(
        lambda z: kl(log_softmax(z), log_q),
        log_q,
        method="SLSQP",
        constraints={
            "type": "ineq",
            "fun": lambda z: -mixed_violations(log_softmax(z), logs, h, thresholds),
        },
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert best.success
    np.testing.assert_allclose(solution.primal_value, best.fun, rtol=1e-6)
    np.testing.assert_allclose(np.exp(tilt), np.exp(log_softmax(best.x)), atol=1e-5)


@pytest.mark.slow
def test_mixed_problem_is_differentiable_in_its_thresholds():
    log_q, logs, h, thresholds = mixed_problem(0)

    def solve(b):
        return duality.solve_mixed(log_q, logs, h, b)

    multipliers = np.asarray(solve(thresholds).multipliers)
    assert (multipliers[[0, 2]] > 1e-2).all()
    np.testing.assert_array_equal(multipliers[[1, 3]], 0)
    numeric = finite_differences(lambda b: solve(b).multipliers, thresholds)
    exact = jax.jit(jax.jacrev(lambda b: solve(b).multipliers))(thresholds)
    np.testing.assert_allclose(exact, numeric, atol=1e-5 * np.abs(numeric).max())
    price = finite_differences(lambda b: solve(b).primal_value, thresholds)
    np.testing.assert_allclose(price, multipliers * [1, 1, -1, -1], atol=1e-5)


@pytest.mark.slow
def test_mixed_problem_out_of_reach():
    """Each kind alone can be met, not both: the cells that q_1 shuns are those that h dislikes."""
    log_q = log_softmax(np.zeros(3))
    log_1, h = log_softmax(np.array([[0.0, -1.0, -6.0]])), np.array([[0.0, 0.1, 1.0]])
    for thresholds, attained in (([2.0, 1.0], True), ([0.0, 0.1], True), ([4.0, 0.1], False)):
        solution = duality.solve_mixed(log_q, log_1, h, np.array(thresholds))
        assert solution.attained == attained
    np.testing.assert_allclose(solution.largest_thresholds, [-log_1[0, 2], 0.0], rtol=1e-9)
    with pytest.raises(ValueError, match="at least one"):
        duality.solve_mixed(log_q, log_1, h[:0], np.array([2.0]))


# Compositions of denoisers.


SCHEDULE = schedules.noise_schedule(num_steps=100, beta_start=1e-3, beta_end=0.2)
POINTS = np.random.default_rng(0).normal(size=(40, 2)) * 1.5


@pytest.fixture(name="laws")
def _laws(x64):
    q = mixtures.gaussian_mixture(
        [[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [0.49, 0.3, 0.6], [0.3, 0.3, 0.4]
    )
    return q, [mixtures.select(q, 0), mixtures.select(q, [1, 2])]


def score_of(log_density):
    return jax.jit(jax.vmap(jax.grad(lambda x: log_density(x[None])[0])))


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_forward_composition_is_exact_at_every_noise_level(laws, prediction_type):
    q, parts = laws
    schedule = schedules.NoiseSchedule(SCHEDULE.log_snr, prediction_type=prediction_type)
    multipliers = np.array([0.2, 0.5])  # 0.2 of component 0, 0.5 of a mixture of 1 and 2
    composed = duality.compose_forward_kl(
        mixtures.denoiser(q, schedule),
        [mixtures.denoiser(part, schedule) for part in parts],
        [mixtures.density_ratio(part, q, schedule) for part in parts],
        multipliers,
    )
    inner = np.array([0.3, 0.4]) / 0.7
    rest = mixtures.subtract(q, [0.2, 0.5 * inner[0], 0.5 * inner[1]])
    exact = mixtures.denoiser(rest, schedule)
    for step in (0, 30, 99):
        t = jnp.full(40, step)
        np.testing.assert_allclose(
            jax.jit(composed)(POINTS, t), jax.jit(exact)(POINTS, t), rtol=1e-6, atol=1e-8
        )


@pytest.mark.slow
def test_reverse_composition_is_the_score_of_tilted_noised_laws(laws):
    q, parts = laws
    multipliers = np.array([0.2, 0.1])
    denoisers = [mixtures.denoiser(p, SCHEDULE) for p in (q, *parts)]
    composed = jax.jit(duality.compose_reverse_kl(denoisers[0], denoisers[1:], multipliers))
    for step in (0, 30, 99):
        log_snr = SCHEDULE.log_snr[step]

        def log_tilt(x, log_snr=log_snr):
            logs = [mixtures.log_density(law, x, log_snr) for law in (q, *parts)]
            return (logs[0] - 0.2 * logs[1] - 0.1 * logs[2]) / 0.7

        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        expected = -sigma * score_of(log_tilt)(POINTS)
        np.testing.assert_allclose(composed(POINTS, jnp.full(40, step)), expected, rtol=1e-5)


@pytest.mark.slow
def test_likelihood_composition_is_the_score_of_the_tilt_by_noised_ratios(laws):
    q, parts = laws
    composed = duality.compose_likelihood(
        mixtures.denoiser(q, SCHEDULE),
        [mixtures.denoiser(part, SCHEDULE) for part in parts],
        [mixtures.density_ratio(part, q, SCHEDULE) for part in parts],
        np.array([1.5, 0.5]),
    )
    for step in (0, 30, 99):
        log_snr = SCHEDULE.log_snr[step]

        def log_tilt(x, log_snr=log_snr):
            logs = [mixtures.log_density(law, x, log_snr) for law in (q, *parts)]
            return logs[0] - 1.5 * jnp.exp(logs[1] - logs[0]) - 0.5 * jnp.exp(logs[2] - logs[0])

        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        expected = -sigma * score_of(log_tilt)(POINTS)
        np.testing.assert_allclose(composed(POINTS, jnp.full(40, step)), expected, rtol=1e-5)


@pytest.mark.slow
def test_sampling_a_composition_gives_the_tilt(laws):
    """FU, whose composition is exact: the shares of the modes are those of p_λ."""
    q, parts = laws
    composed = duality.compose_forward_kl(
        mixtures.denoiser(q, SCHEDULE),
        [mixtures.denoiser(parts[0], SCHEDULE)],
        [mixtures.density_ratio(parts[0], q, SCHEDULE)],
        [0.25],
    )
    start = jax.random.normal(jax.random.key(0), (4000, 2))
    x_0 = samplers.sample(composed, SCHEDULE, jax.random.key(1), start, steps=100).x_0
    shares = mixtures.responsibilities(q, x_0).mean(axis=0)
    np.testing.assert_allclose(shares, np.array([0.05, 0.3, 0.4]) / 0.75, atol=0.03)


def test_composition_mistakes_are_refused(laws):
    q, parts = laws
    predict = mixtures.denoiser(q, SCHEDULE)
    with pytest.raises(ValueError, match="one multiplier for each"):
        duality.compose_reverse_kl(predict, [predict], [0.1, 0.1])
    with pytest.raises(ValueError, match="sum to less than 1"):
        duality.compose_reverse_kl(predict, [predict], [1.0])
    with pytest.raises(ValueError, match="must not be negative"):
        duality.compose_likelihood(predict, [predict], [predict], [-1.0])
    with pytest.raises(ValueError, match="0 ratios"):
        duality.compose_forward_kl(predict, [predict], [], [0.1])
    with pytest.raises(ValueError, match="0 odds"):
        duality.compose_likelihood(predict, [predict], [], [0.1])
