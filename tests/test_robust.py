"""Attacks on linear Gaussian models p(·|c) = N(A c, s²): the worst condition is known exactly.

All path KLs are then K ‖A c − m‖², with one K for all, and the worst of a ball is a problem of
least squares on a ball, solved here in numpy by bisection.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import formulations, lagrangian, losses, multipliers
from jax_unlearn.formulations import kept_starts, looked_up, robust, worst_conditions
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import (
    Batch,
    Conditions,
    Images,
    Losses,
    Problem,
    Samples,
    TrajectoryPoints,
)

KEY, RADIUS, VARIANCE = jax.random.key(0), 0.3, 0.5
UNIT = chains.gaussian([0.0, 1.0], VARIANCE)
NATS = chains.path_kl(UNIT, 0, UNIT, 1)  # K
GAIN, SLOPE = (jnp.float32(part) for part in (UNIT["gain"], UNIT["bias"][1]))
REFERENCE = jnp.float32([[1.5, 0.0], [0.0, 1.5]])
SKEW = jnp.float32([[1.1, -0.4], [0.3, 0.8]])
CHAIN = {"shape": (2,), "steps": 5}


def apply(matrix, x_t, t, cond):
    mean = jnp.matmul(cond, matrix.T, precision="highest")
    return GAIN[t][:, None] * x_t + SLOPE[t][:, None] * mean


def attack(denoiser=apply, **options):
    given = {"radius": RADIUS, "steps": 100, "shape": (2,), "points": 5} | options
    return worst_conditions(denoiser, chains.SCHEDULE, **given)


def build(make, *given, **options):
    return make(apply, chains.SCHEDULE, *given, **options)


SEPARATION = build(formulations.reverse_kl, estimator="stop_gradient", **CHAIN)
COND = jnp.float32([[1.0, 0.0], [-0.5, 1.0], [0.4, 0.9], [1.2, -0.7]])
BASE = jnp.zeros_like(COND)
TARGET = jnp.float32([[0.0, 1.0], [1.0, 1.0], [-1.0, 0.2], [0.1, 2.0]])
EACH = jnp.arange(4) % 2
STORED = jnp.float32(np.random.default_rng(1).normal(size=(2, 6, 2)))
BATCH = Batch(Conditions(COND + 1, COND + 1), Conditions(COND, BASE, TARGET, EACH))


def repeated(batch, times):
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), batch)


def worst(matrix, cond, target, radius=RADIUS):
    """The δ of least ‖A (c + δ) − A_q target‖ in the ball, by bisection on its multiplier."""
    matrix, cond = np.asarray(matrix, float), np.asarray(cond, float)
    goal = np.asarray(REFERENCE, float) @ np.asarray(target, float) - matrix @ cond

    def best(weight):
        return np.linalg.solve(matrix.T @ matrix + weight * np.eye(2), matrix.T @ goal)

    low, high = 0.0, 1e6
    assert np.linalg.norm(best(low)) > radius  # on the boundary: what these tests are about
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if np.linalg.norm(best(middle)) < radius else (middle, high)
    return best(high)


def nats(matrix, cond, target):
    return NATS * np.sum((np.asarray(matrix) @ cond - np.asarray(REFERENCE) @ target) ** 2)


def least(matrix, cond, target, radius=RADIUS):
    """The least path KL to a target in the ball, in nats."""
    return nats(matrix, cond + worst(matrix, cond, target, radius), target)


@pytest.mark.slow
@pytest.mark.parametrize("aim", ["trajectory", "images"])
def test_the_worst_condition_is_the_exact_one(aim):
    adversary = attack(aim=aim, images=STORED if aim == "images" else None)
    found = jax.jit(adversary)(SKEW, REFERENCE, KEY, BATCH).forget
    exact = [worst(SKEW, c, target) for c, target in zip(COND, TARGET, strict=True)]
    np.testing.assert_allclose(found.cond - COND, exact, atol=2e-4)
    chex.assert_trees_all_equal(found._replace(cond=COND), BATCH.forget)


@pytest.mark.slow
def test_the_value_is_the_least_of_the_ball():
    """In a scaled identity the ball stays a ball: the distance is shorter by its radius."""
    problem, matrix = robust(SEPARATION, attack()), 0.9 * REFERENCE
    got = jax.jit(problem.losses)(matrix, REFERENCE, KEY, BATCH, jnp.zeros(2))
    distance = np.linalg.norm(COND @ matrix.T - TARGET @ REFERENCE.T, axis=1)
    np.testing.assert_allclose(got.values, NATS * (distance - 1.35 * RADIUS) ** 2, rtol=1e-4)
    exact = [least(matrix, c, target) for c, target in zip(COND, TARGET, strict=True)]
    np.testing.assert_allclose(got.values, exact, rtol=1e-4)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_least_value():
    """Danskin: what the constraints add to the gradient, against differences of the exact least."""
    problem, weights = robust(SEPARATION, attack(steps=400)), jnp.array([0.3, 0.5])

    @jax.jit
    @jax.grad
    def slope(matrix, current):
        return lagrangian(problem, matrix, REFERENCE, KEY, BATCH, current, jnp.ones(2))[0]

    def least_sum(matrix):
        rows = [least(matrix, c, target) for c, target in zip(COND, TARGET, strict=True)]
        return sum(float(weights[i]) * row for i, row in zip(EACH, rows, strict=True))

    got = slope(SKEW, weights) - slope(SKEW, jnp.zeros(2))
    expected, width = np.zeros((2, 2)), 1e-4
    for place in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[place] = width
        centre = np.asarray(SKEW, float)
        expected[place] = (least_sum(centre + step) - least_sum(centre - step)) / (2 * width)
    # A row of eight, four of them kept, has the share 1/8 in the Lagrangian.
    np.testing.assert_allclose(got, -expected / 8, rtol=1e-3, atol=1e-3)


def test_no_derivative_goes_through_the_adversary_and_its_noise_is_its_own():
    seen = {}

    def adversary(params, reference, key, batch, *, axis_name=None):
        seen["adversary"] = key
        assert axis_name == "data"
        return batch + params

    def measured(params, reference, key, batch, current, *, axis_name=None):
        seen["problem"] = key
        assert axis_name == "data"
        return Losses(params * batch[None], batch[None], jnp.array([0]))

    problem = Problem(measured, 1.0, multipliers.non_negative(), "plain", fresh=measured)
    attacked = robust(problem, adversary)
    assert attacked.name == "robust plain"
    for evaluate in (attacked.losses, attacked.fresh):

        def objective(params, evaluate=evaluate):
            found = evaluate(params, 0.0, KEY, jnp.array(2.0), None, axis_name="data")
            return found.objective[0]

        # θ (2 + θ) at θ = 3, with the θ of the adversary held.
        assert jax.value_and_grad(objective)(3.0) == (15.0, 5.0)
        data = {name: jax.random.key_data(key).tolist() for name, key in seen.items()}
        assert data["problem"] == jax.random.key_data(KEY).tolist() != data["adversary"]
    assert robust(problem._replace(fresh=None), adversary).fresh is None


WEIGHTING = losses.TimeWeighting(jnp.array([0.1, 0.2, 0.1, 0.05, 0.2]), jnp.full(5, 0.2))
LIKELY = Batch(BATCH.kept, BATCH.forget._replace(target=None))
SAMPLES = Samples(COND + 2, COND, BASE, jnp.abs(COND), jnp.tile(jnp.arange(2), (4, 1)))
PLAIN = {
    "reverse_kl": (build(formulations.reverse_kl, **CHAIN), BATCH),
    "likelihood": (build(formulations.likelihood, jnp.square, **CHAIN), LIKELY),
    "forward_kl": (
        build(formulations.forward_kl, WEIGHTING),
        Batch(Images(TARGET, COND + 1), Images(TARGET, COND, EACH), Images(COND, BASE)),
    ),
    "distill_likelihood": (
        build(formulations.distill_likelihood, WEIGHTING),
        Batch(Images(TARGET, COND + 1), SAMPLES),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_without_a_radius_a_problem_is_the_plain_one(name):
    problem, batch = PLAIN[name]
    images = None if name == "reverse_kl" else STORED
    aim = "images" if name != "reverse_kl" else "trajectory"

    def at(problem):
        def value(matrix):
            return lagrangian(problem, matrix, REFERENCE, KEY, batch, [0.3, 0.2], jnp.ones(2))

        return jax.jit(jax.value_and_grad(value, has_aux=True))(SKEW)

    still = robust(problem, attack(aim=aim, images=images, radius=0.0, steps=3))
    chex.assert_trees_all_equal(at(still), at(problem))


def curved(params, x_t, t, cond):
    """A network without a closed form, whose conditions are a tree."""
    inside = jnp.tanh(jnp.einsum("nij,ijk->nk", cond["words"], params)) + cond["pooled"][:, None]
    return GAIN[t][:, None] * x_t + jnp.sin(3 * inside + x_t)


def tree(seed, rows):
    rng = np.random.default_rng(seed)
    words, pooled = rng.normal(size=(rows, 3, 2)), rng.normal(size=rows)
    return {"words": jnp.float32(words), "pooled": jnp.float32(pooled)}


WORDS = jnp.float32(np.random.default_rng(2).normal(size=(3, 2, 2)))


def norms(one, other):
    """Of the difference of two trees, each row's."""
    parts = jax.tree.map(lambda a, b: np.square(a - b).reshape(len(a), -1).sum(1), one, other)
    return np.sqrt(sum(jax.tree.leaves(parts)))


@pytest.mark.slow
@pytest.mark.parametrize("radius", [1e-3, 30.0])
def test_an_attack_never_leaves_the_ball(radius):
    """Neither in small steps nor in ones that are longer than it."""
    rows = 64
    cond, base, target = (tree(seed, rows) for seed in range(3))
    batch = Batch(None, Conditions(cond, base, target, jnp.zeros(rows, int)))
    for rate in (0.25, 3.0):
        adversary = jax.jit(attack(curved, radius=radius, steps=7, rate=rate))
        length = norms(adversary(WORDS, WORDS, KEY, batch).forget.cond, cond)
        assert length.max() <= radius * (1 + 1e-4) + 2e-6
        assert length.max() > 0.9 * radius


@pytest.mark.parametrize("aim", ["trajectory", "images"])
def test_steps_are_those_of_normalised_slopes_and_momentum(aim):
    """Whatever time step is drawn, and however large its slope is, by hand."""
    options = {"steps": 3, "rate": 0.3, "images": STORED if aim == "images" else None}
    found = jax.jit(attack(aim=aim, **options))(SKEW, REFERENCE, KEY, BATCH)
    matrix, goal = np.asarray(SKEW, float), np.asarray(TARGET @ REFERENCE.T, float)
    delta, velocity = np.zeros((2, 4, 2))
    for _ in range(3):
        slope = ((COND + delta) @ matrix.T - goal) @ matrix
        velocity = 0.9 * velocity + slope / np.linalg.norm(slope, axis=1, keepdims=True)
        along = velocity / np.linalg.norm(velocity, axis=1, keepdims=True)
        delta = delta - 0.3 * RADIUS * along
        delta *= np.minimum(1, RADIUS / np.linalg.norm(delta, axis=1, keepdims=True))
    np.testing.assert_allclose(found.forget.cond - COND, delta, atol=2e-6)


def test_an_attack_starts_at_the_condition():
    found = jax.jit(attack(rate=0.0, steps=1))(SKEW, REFERENCE, KEY, BATCH)
    chex.assert_trees_all_equal(found, BATCH)


@pytest.mark.slow
def test_more_steps_leave_no_defender_better_off():
    batch = repeated(BATCH, 16)._replace(kept=None)
    rows = list(zip(*map(np.asarray, (batch.forget.cond, batch.forget.target)), strict=True))
    values = []
    for steps in (1, 2, 4, 20):
        adversary = attack(aim="images", images=STORED, steps=steps)
        cond = np.asarray(jax.jit(adversary)(SKEW, REFERENCE, KEY, batch).forget.cond)
        values.append(np.mean([nats(SKEW, c, rows[row][1]) for row, c in enumerate(cond)]))
    exact = np.mean([least(SKEW, c, target) for c, target in rows[::16]])
    assert (np.diff(values) < 1e-3 * exact).all()
    assert values[0] > 1.1 * exact
    assert exact * (1 - 1e-5) < values[-1] < 1.01 * exact


@pytest.mark.parametrize("aim", ["trajectory", "images"])
def test_time_steps_are_drawn_by_their_part_of_the_path_kl_or_alike(aim):
    """Time step t moves coordinate t of the condition alone, and a long step all the way."""

    def each(scale, x_t, t, cond):
        there = jnp.take_along_axis(cond, t[:, None], axis=1)
        return GAIN[t][:, None] * x_t + scale * there

    rows, radius = 2000, 1e-3
    cond = jnp.tile(jnp.float32([0.5, 1.0, 0.3, 2.0, 1.5]), (rows, 1))
    batch = Batch(None, Conditions(cond, cond, 0 * cond, jnp.zeros(rows, int)))
    adversary = attack(
        each, aim=aim, images=STORED if aim == "images" else None, radius=radius, rate=1e3, steps=1
    )
    delta = np.asarray(jax.jit(adversary)(1.0, 1.0, KEY, batch).forget.cond - cond)
    moved = np.abs(delta) > 0.5 * radius
    assert (moved.sum(axis=1) == 1).all()
    parts = np.ones(5)
    for t, in_x_0, _, _, scale in chains.steps_of(chains.ALL):
        if aim == "trajectory":
            parts[t] = (in_x_0 * chains.SIGMA[t] / chains.ALPHA[t] * float(cond[0, t])) ** 2 / scale
    parts /= parts.sum()
    assert parts.max() > 0.3 or aim == "images"
    assert (np.abs(moved.mean(axis=0) - parts) < 4 * np.sqrt(parts * (1 - parts) / rows)).all()


@pytest.mark.slow
def test_a_row_of_two_targets_is_attacked_for_one_of_them():
    both = jnp.stack([TARGET, TARGET[::-1] - 1], axis=1)
    number = jnp.tile(jnp.arange(2), (4, 1))
    batch = repeated(Batch(None, Conditions(COND, BASE, both, number)), 16)
    found = jax.jit(attack())(SKEW, REFERENCE, KEY, batch).forget
    assert found.constraint.shape == (64,)
    assert 16 < int(found.constraint.sum()) < 48
    for row, c in enumerate(np.asarray(batch.forget.cond)):
        target = batch.forget.target[row, found.constraint[row]]
        np.testing.assert_array_equal(found.target[row], target)
        np.testing.assert_allclose(found.cond[row] - c, worst(SKEW, c, target), atol=5e-4)
    likely = batch._replace(forget=batch.forget._replace(target=None))
    adversary = jax.jit(attack(aim="images", images=STORED, steps=1))
    assert adversary(SKEW, None, KEY, likely).forget.constraint.shape == (64,)
    # Samples are normalised by their constraints, and so keep them.
    batch = PLAIN["distill_likelihood"][1]
    found = adversary(SKEW, None, KEY, batch)
    assert (norms(found.forget.cond, COND) > 0).all()
    chex.assert_trees_all_equal(found._replace(forget=found.forget._replace(cond=COND)), batch)


@pytest.mark.slow
def test_a_likelihood_is_bounded_where_it_is_largest():
    """By concept inversion: the noise of images that show the concept, and no target."""
    goals = jnp.float32([[0.0, 3.0], [-3.0, 0.0]])
    drawn = jax.random.normal(jax.random.key(3), (2, 4096, 2))
    images = goals[:, None] + jnp.sqrt(VARIANCE) * drawn
    problem = build(formulations.likelihood, lambda x: x @ goals.T, **CHAIN)
    adversary = attack(aim="images", images=images, steps=400, rate=0.02)
    attacked = robust(problem, adversary)
    matrix, batch = 0.9 * REFERENCE, repeated(LIKELY._replace(kept=None), 256)
    got = jax.jit(attacked.losses)(matrix, REFERENCE, KEY, batch, jnp.zeros(2))
    # Constraint m + i has the images of i.
    short = jax.jit(attack(aim="images", images=images, steps=2))
    one, other = (
        short(matrix, None, KEY, Batch(None, LIKELY.forget._replace(constraint=EACH + more)))
        for more in (0, 2)
    )
    np.testing.assert_array_equal(one.forget.cond, other.forget.cond)
    # What the chain makes of a mean of one, by numpy.
    shown = chains.moments(UNIT, 1)[1][0] - chains.moments(UNIT, 0)[1][0]
    for row, c in enumerate(np.asarray(COND)):
        goal = np.asarray(goals[EACH[row]])
        delta = worst(matrix, c, np.linalg.solve(REFERENCE, goal))
        expected = shown * goal @ (np.asarray(matrix) @ (c + delta))
        values = np.asarray(got.values[256 * row : 256 * (row + 1)])
        plain = shown * goal @ (np.asarray(matrix) @ c)
        assert abs(values.mean() - expected) < 4 * values.std() / 16
        assert values.mean() - plain > 6 * values.std() / 16


@pytest.mark.slow
def test_numbered_conditions_are_looked_up():
    table = jnp.concatenate([COND, BASE[:1], TARGET, COND + 1])
    forget = Conditions(jnp.arange(4), jnp.full(4, 4), jnp.arange(5, 9), EACH)
    numbered = Batch(Conditions(np.arange(9, 13), np.arange(9, 13)), forget)

    def either(matrix, x_t, t, cond):
        return apply(matrix, x_t, t, looked_up(table, cond))

    found, expected = (
        jax.jit(attack(either, table=given, steps=2))(SKEW, REFERENCE, KEY, batch)
        for given, batch in ((table, numbered), (None, BATCH))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    x_t, t = TARGET, jnp.arange(4)
    np.testing.assert_array_equal(
        either(SKEW, x_t, t, numbered.kept.cond), apply(SKEW, x_t, t, BATCH.kept.cond)
    )
    rows = looked_up(tree(0, 5), jnp.array([3, 0]))
    chex.assert_trees_all_equal(
        rows, jax.tree.map(lambda leaf: leaf[jnp.array([3, 0])], tree(0, 5))
    )
    for cond in (None, tree(1, 2), COND):
        assert looked_up(table, cond) is cond
    assert looked_up(None, EACH) is EACH


@pytest.mark.slow
def test_a_kept_start_has_its_own_law_and_constraint():
    batch = kept_starts(BATCH, rows=3, constraints=2)
    assert batch.kept is BATCH.kept
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[:4], batch.forget), BATCH.forget)
    starts = jax.tree.map(lambda leaf: leaf[4:], batch.forget)
    kept = BATCH.kept.cond[:3]
    chex.assert_trees_all_equal(starts, Conditions(kept, kept, TARGET[:3], jnp.array([2, 3, 2])))
    problem = robust(SEPARATION, attack())
    _, found = jax.jit(functools.partial(lagrangian, problem))(
        REFERENCE, REFERENCE, KEY, batch, jnp.zeros(4), jnp.ones(4)
    )
    values = [
        least(REFERENCE, c, target) for c, target in zip(kept, TARGET[:3], strict=True)
    ]  # fmt: skip
    expected = [(values[0] + values[2]) / 2, values[1]]
    np.testing.assert_allclose(found.values[2:], expected, rtol=1e-3)


def algorithm_of(adversary, axis_name=None):
    return primal_dual(
        robust(SEPARATION, adversary), optax.sgd(0.01), optax.sgd(0.01), axis_name=axis_name
    )


BOTH = Conditions(
    COND, BASE, jnp.stack([TARGET, TARGET - 1], axis=1), jnp.tile(jnp.arange(2), (4, 1))
)
on_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@on_devices
@pytest.mark.slow
def test_a_step_on_several_devices_is_the_whole_one():
    adversary = attack(aim="images", images=STORED, steps=3)
    chains.check_devices(
        functools.partial(algorithm_of, adversary),
        REFERENCE,
        repeated(BATCH._replace(forget=BOTH), 2),
        [30.0, 20.0],
    )


@pytest.mark.slow
@on_devices
def test_an_attack_on_several_devices_is_the_whole_one():
    adversary, batch = attack(steps=3), repeated(Batch(None, BOTH), 4)
    whole = jax.jit(adversary)(SKEW, REFERENCE, KEY, batch).forget
    spread = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
    parts = jax.pmap(
        functools.partial(adversary, axis_name="data"), "data", in_axes=(None, None, None, 0)
    )(SKEW, REFERENCE, KEY, spread).forget
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_step_compiles_once():
    algorithm = algorithm_of(attack(steps=3))
    step = jax.jit(algorithm.step)
    state = algorithm.init(SKEW, [1.0, 2.0])
    turned = jax.tree.map(lambda leaf: leaf[::-1], BATCH)
    for key, batch in zip(jax.random.split(KEY, 2), (BATCH, turned), strict=True):
        state, info = step(key, state, REFERENCE, batch)
        assert info.finite
    assert step._cache_size() == 1


@pytest.mark.slow
def test_a_threshold_is_reached_at_the_worst_condition():
    """The plain run reaches it at the condition alone, and an attack undoes it."""
    cond, kept = (jnp.tile(row, (3, 1)) for row in jnp.eye(2))
    forget = Conditions(cond, 0 * cond, cond, jnp.zeros(3, int))
    batch = Batch(Conditions(kept, kept), forget)
    threshold = NATS * 2.2**2

    def ends(problem):
        algorithm = primal_dual(problem, optax.sgd(0.02), optax.sgd(0.002))

        @jax.jit
        def go(state):
            def body(state, key):
                state, info = algorithm.step(key, state, REFERENCE, batch)
                return state, info.values[0]

            return jax.lax.scan(body, state, jax.random.split(KEY, 1500))

        state, values = go(algorithm.init(REFERENCE, [threshold]))
        return np.asarray(state.params), float(state.multipliers[0]), values

    c = np.array([1.0, 0.0])
    plain, _, _ = ends(SEPARATION)
    np.testing.assert_allclose(nats(plain, c, c), threshold, rtol=0.01)
    assert least(plain, c, c) < 0.9 * threshold
    attacked, multiplier, values = ends(robust(SEPARATION, attack(steps=10)))
    np.testing.assert_allclose(least(attacked, c, c), threshold, rtol=0.02)
    np.testing.assert_allclose(values[-100:].mean(), threshold, rtol=0.02)
    assert 0 < multiplier < 0.98
    # What is kept pays nothing for it.
    np.testing.assert_allclose(attacked[:, 1], [0.0, 1.5], atol=0.05)


IMAGES = {"aim": "images", "images": STORED}
POINTS = TrajectoryPoints(BATCH.forget, COND, EACH)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"radius": -0.1}, "radius and rate must be finite and at least 0, not -0.1 and 0.25"),
        ({"radius": np.inf}, "radius and rate must be finite"),
        ({"rate": -1.0}, "not 0.3 and -1.0"),
        ({"steps": 0}, "at least 1 step, not 0"),
        ({"aim": "words"}, "aim 'words' is not one of"),
        ({"aim": "images"}, "aim 'images' takes images"),
        ({"images": STORED}, "no other does; the aim is 'trajectory'"),
        ({**IMAGES, "shape": (3,)}, r"images must be \[constraints, images, 3\], not \[2, 6, 2\]"),
        ({**IMAGES, "images": STORED[:, :0]}, "images must be"),
        ({"points": 1}, "at least 2 steps, not 1"),
    ],
)
def test_wrong_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        attack(**options)


@pytest.mark.parametrize(
    ("options", "forget", "match"),
    [
        ({}, Conditions(EACH, EACH, EACH, EACH), "no ball around whole numbers"),
        ({}, Conditions(None, None, TARGET, EACH), "got Conditions without cond"),
        ({}, Conditions(COND, BASE, TARGET), "got Conditions without constraint"),
        ({}, POINTS, "got TrajectoryPoints without cond"),
        ({}, LIKELY.forget, "aim 'trajectory' is towards targets"),
        ({"table": tree(0, 3)["words"].astype(int)}, BATCH.forget._replace(cond=EACH), "no ball"),
    ],
)
def test_wrong_rows_are_refused(options, forget, match):
    with pytest.raises(ValueError, match=match):
        attack(**options)(SKEW, REFERENCE, KEY, Batch(None, forget))


@pytest.mark.parametrize(
    ("batch", "rows", "match"),
    [
        (BATCH, 5, "5 kept starts cannot be taken of 4 kept rows"),
        (BATCH, -1, "-1 kept starts"),
        (BATCH._replace(kept=None), 1, "not NoneType and Conditions"),
        (LIKELY, 1, "for separations"),
        (BATCH._replace(forget=BATCH.forget._replace(likelihood=EACH)), 1, "for separations"),
    ],
)
def test_wrong_kept_starts_are_refused(batch, rows, match):
    with pytest.raises(ValueError, match=match):
        kept_starts(batch, rows=rows, constraints=2)
