import dataclasses
import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import (
    formulations,
    lagrangian,
    mixtures,
    multipliers,
    samplers,
    schedules,
)
from jax_unlearn.formulations import reverse_kl
from jax_unlearn.primal_dual import primal_dual
from jax_unlearn.problem import Batch, Conditions, Images, Samples, TrajectoryPoints

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
REFERENCE = chains.gaussian([0.0, 1.0, -0.7, 0.4], 0.5)
PARAMS = jax.tree.map(lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape), REFERENCE)
THRESHOLDS = np.array([2.0, 3.0])
ON_POLICY = functools.partial(reverse_kl, chains.apply, chains.SCHEDULE, shape=(1,))
# Rows as (label, base, [(target, number of the constraint)]).
CONDITIONAL = [(1, 1, []), (1, 1, []), (2, 0, [(2, 0)]), (3, 0, [(3, 1)]), (3, 0, [(3, 1)])]
SEVERAL = [(0, 0, [(1, 0), (2, 1)])] * 3


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def conditional_batch(repeat=1):
    """`CONDITIONAL`: a kept condition; 2 and 3 are held to label 0 and moved from their own."""
    label = functools.partial(jnp.repeat, repeats=repeat)
    return Batch(
        kept=Conditions(label(jnp.array([1, 1])), label(jnp.array([1, 1]))),
        forget=Conditions(
            cond=label(jnp.array([2, 3, 3])),
            base=label(jnp.array([0, 0, 0])),
            target=label(jnp.array([2, 3, 3])),
            constraint=label(jnp.array([0, 1, 1])),
        ),
    )


def several_batch():
    """`SEVERAL`: label 0 alone, two constraints on each trajectory."""
    zeros = jnp.zeros(3, int)
    each = jnp.tile(jnp.array([1, 2]), (3, 1))
    return Batch(None, Conditions(zeros, zeros, each, each - 1))


def exact(rows, params, current, along=None, times=chains.ALL):
    """The mean over rows of the Lagrangian of each by itself; the objective; the values."""
    kl = functools.partial(chains.path_kl, params, reference=REFERENCE, along=along, times=times)
    lagrangians, held, values = [], [], ([], [])
    for label, base, constraints in rows:
        held.append(kl(label=label, other=base))
        lagrangians.append(held[-1])
        for target, i in constraints:
            values[i].append(kl(label=label, other=target))
            lagrangians[-1] += current[i] * (THRESHOLDS[i] - values[i][-1])
    return np.array([np.mean(lagrangians), np.mean(held), *map(np.mean, values)])


def averages(problem, batch, current, count):
    return chains.averages(problem, PARAMS, REFERENCE, batch, current, THRESHOLDS, count)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["pathwise", "stop_gradient"])
@pytest.mark.parametrize("case", ["conditional", "several"])
def test_values_and_gradient_against_exact_chains(estimator, case):
    """Path KLs are exact; "pathwise" is their derivative, "stop_gradient" that at given x_t."""
    batch, rows, current = {
        "conditional": (conditional_batch(), CONDITIONAL, [0.9, 0.7]),
        "several": (several_batch(), SEVERAL, [0.3, 0.2]),
    }[case]
    total, partial = (
        chains.differences(lambda params, x=along: exact(rows, params, current, x)[0], PARAMS)
        for along in (None, PARAMS)
    )
    expected, other = (total, partial) if estimator == "pathwise" else (partial, total)
    mean, error = averages(ON_POLICY(estimator=estimator, steps=5), batch, current, 20_000)
    wanted = np.concatenate([exact(rows, PARAMS, current), expected])
    assert (np.abs(mean - wanted) < 4.5 * error + 1e-5).all()
    # The two differ by far more than the test's resolution.
    assert np.linalg.norm(total - partial) > 0.1 * np.linalg.norm(total)
    assert (np.abs(mean[4:] - other) > 10 * error[4:] + 1e-3).any()


@pytest.mark.slow
def test_shares_are_the_parts_of_the_rows():
    kept = Conditions(jnp.array([1, 1]), jnp.array([1, 1]))
    cond = jnp.array([2, 3, 3, 2, 2])
    forget = Conditions(cond, 0 * cond, cond, jnp.array([0, 2, 2, 0, 0]))
    arguments = single(PARAMS), single(REFERENCE), KEY
    evaluate = jax.jit(ON_POLICY(steps=5).losses)
    got = evaluate(*arguments, Batch(kept, forget), jnp.zeros(3))
    np.testing.assert_allclose(got.share, [3 / 7, 0, 2 / 7], rtol=1e-6)
    got = evaluate(*arguments, several_batch(), jnp.zeros(2))
    np.testing.assert_array_equal(got.share, [1, 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "bound"), [("bounded", 1.0), ("pathwise", np.inf), ("stop_gradient", 0.0)]
)
def test_gradient_of_a_trajectory_by_hand(estimator, bound):
    """ "bounded" shortens what comes from later steps; the others are its limits."""
    with jax.enable_x64(True):
        rng, rows = np.random.default_rng(2), 6
        params = jax.tree.map(lambda leaf: leaf + 0.4 * rng.normal(size=leaf.shape), REFERENCE)
        reference, at = (jax.tree.map(jnp.asarray, tree) for tree in (REFERENCE, params))
        label = jnp.full(rows, 2)
        batch = Batch(None, Conditions(label, 0 * label, label, 0 * label))
        problem = ON_POLICY(estimator=estimator, steps=5, shape=(2,))

        def value(params):
            return lagrangian(problem, params, reference, KEY, batch, [0.4], [1.0])[0]

        found = jax.jit(jax.grad(value))(at)
        visit = formulations.sample_trajectories(chains.apply, chains.SCHEDULE, shape=(2,), steps=5)
        points = np.asarray(jax.jit(visit)(at, KEY, batch).forget.x_t)
    each = [
        chains.by_hand(params, REFERENCE, points[:, row], 2, (0, 2), (1.0, -0.4), bound)
        for row in range(rows)
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(one for one, _ in each))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    if estimator == "bounded":
        # Some are shortened and some are not; the last step has nothing after it.
        shares = np.array([share for _, share in each])
        assert 0.1 < (shares[:, 1:] < 1).mean() < 0.9


@pytest.mark.slow
def test_a_sub_grid_has_its_own_variances_and_weights():
    schedule = dataclasses.replace(chains.SCHEDULE, spacing="linspace")
    times = tuple(schedules.timesteps(schedule, 3).tolist())
    assert times == (4, 2, 0)
    problem = reverse_kl(chains.apply, schedule, shape=(1,), steps=3)
    mean, error = averages(problem, conditional_batch(), [0.0, 0.0], 10_000)
    wanted = exact(CONDITIONAL, PARAMS, [0.0, 0.0], times=times)
    assert (np.abs(mean[:4] - wanted) < 4.5 * error[:4]).all()
    assert (error[:4] < 0.02 * wanted).all()


@pytest.mark.slow
def test_clipped_chains_have_the_path_kl_of_their_steps():
    """Σ E‖μ_p − μ_q‖²/2v from the sampler's own steps, which clip x̂_0, along its own path."""
    schedule = dataclasses.replace(chains.SCHEDULE, clip_range=0.6)
    following = [*schedule.log_snr[jnp.array(chains.ALL[1:])], jnp.inf]

    def step(params, label, x_t, t, log_snr_s, noise):
        times, labels = jnp.full(len(x_t), t), jnp.full(len(x_t), label)
        return samplers.ddpm_step(
            chains.apply(single(params), x_t, times, labels),
            x_t=x_t,
            noise=noise,
            log_snr_t=schedule.log_snr[t],
            log_snr_s=log_snr_s,
            schedule=schedule,
        )

    x_t, expected = jax.random.normal(KEY, (20_000, 1)), np.zeros(2)
    for (t, *_, variance), log_snr_s in zip(chains.steps_of(chains.ALL), following, strict=True):
        mean = step(PARAMS, 1, x_t, t, log_snr_s, 0.0)
        others = [step(REFERENCE, label, x_t, t, log_snr_s, 0.0) for label in (0, 2)]
        expected += [jnp.square(mean - other).mean() / (2 * variance) for other in others]
        noise = jax.random.normal(jax.random.key(t + 1), x_t.shape)
        x_t = step(PARAMS, 1, x_t, t, log_snr_s, noise)
    assert np.abs(x_t).max() < 0.61

    labels = [jnp.full(20_000, label) for label in (1, 0, 2)]
    batch = Batch(None, Conditions(*labels, jnp.zeros(20_000, int)))
    problem = reverse_kl(chains.apply, schedule, shape=(1,), steps=5)
    got = jax.jit(problem.losses)(single(PARAMS), single(REFERENCE), KEY, batch, jnp.zeros(1))
    found = np.array([got.objective.mean(), got.values.mean()])
    np.testing.assert_allclose(found, expected, rtol=0.04)
    unclipped = exact(CONDITIONAL, PARAMS, [0.0, 0.0])[1]
    assert (np.abs(found - unclipped) > 0.1).all()


@pytest.mark.slow
def test_path_kl_of_exact_denoisers_is_the_kl_of_their_images():
    """Mixtures: E_p[log p/q] by quadrature, up to the discretisation into 100 steps."""
    schedule = schedules.noise_schedule(
        "squaredcos_cap_v2", num_steps=400, variance_type="fixed_geometric"
    )
    p = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.3, [0.3, 0.7])
    q = mixtures.gaussian_mixture([[-1.0], [1.0]], 0.3, [0.6, 0.4])
    q_1 = mixtures.gaussian_mixture([[-1.0]], 0.5)
    cells = mixtures.grid([(-6, 6)], 2000)
    log_p, log_q, log_1 = (mixtures.log_masses(law, cells) for law in (p, q, q_1))
    nats = [float((jnp.exp(log_p) * (log_p - other)).sum()) for other in (log_q, log_1)]

    def reference(params, x_t, t, cond):
        both = (mixtures.denoiser(law, schedule)(x_t, t) for law in (q, q_1))
        return jnp.where(cond[:, None] == 0, *both)

    def model(params, x_t, t, cond):
        return mixtures.denoiser(p, schedule)(x_t, t)

    problem = reverse_kl(
        model, schedule, shape=(1,), steps=100, reference_apply=reference, estimator="stop_gradient"
    )
    zeros = jnp.zeros(8000, int)
    batch = Batch(None, Conditions(None, zeros, zeros + 1, zeros))
    got = jax.jit(lambda key: problem.losses({}, {}, key, batch, jnp.zeros(1)))(KEY)
    for values, kl in zip((got.objective, got.values), nats, strict=True):
        error = float(values.std()) / np.sqrt(8000)
        assert abs(float(values.mean()) - kl) < 4 * error + 0.02 * kl
        assert error < 0.03 * kl


def equal_gains():
    """Chains of one gain: their path KLs do not depend on x, and p_λ is one of them."""
    gap = {label: REFERENCE["bias"][0] - REFERENCE["bias"][label] for label in (1, 2)}
    weights = np.array(
        [(a * chains.SIGMA[t] / chains.ALPHA[t]) ** 2 / (2 * scale)
         for t, a, _, _, scale in chains.steps_of(chains.ALL)][::-1]
    )  # fmt: skip
    return gap, weights


def run(algorithm, state, batch, steps, key=KEY):
    return jax.lax.scan(
        lambda state, key: algorithm.step(key, state, single(REFERENCE), batch),
        state,
        jax.random.split(key, steps),
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["pathwise", "stop_gradient"])
def test_primal_dual_reaches_the_exact_multiplier_at_every_threshold(estimator):
    """ε_p = ε_q + α (ε_q − ε_1), (1+α)² D = b, λ = α/(1+α), KL(p‖q) = α² D; one vmap."""
    gap, weights = equal_gains()
    distance = weights @ gap[1] ** 2
    thresholds = distance * np.array([1.3, 2.0, 3.0])
    batch = Batch(None, Conditions(*(jnp.full(8, label) for label in (0, 0, 1)), jnp.zeros(8, int)))
    algorithm = primal_dual(
        ON_POLICY(estimator=estimator, steps=5),
        optax.adam(optax.exponential_decay(0.02, 1000, 0.1)),
        multipliers.nu_pi(0.02 / distance, 0.1 / distance),
    )

    @jax.jit
    @jax.vmap
    def solve(threshold):
        return run(algorithm, algorithm.init(single(REFERENCE), threshold), batch, 2500)

    state, info = solve(jnp.float32(thresholds)[:, None])
    alpha = np.sqrt(thresholds / distance) - 1
    final = jax.tree.map(lambda leaf: np.asarray(leaf)[:, -200:].mean(axis=1), info)
    np.testing.assert_allclose(final.multipliers[:, 0], alpha / (1 + alpha), rtol=0.02)
    np.testing.assert_allclose(final.values[:, 0], thresholds, rtol=0.01)
    np.testing.assert_allclose(final.objective, alpha**2 * distance, rtol=0.03)
    bias = REFERENCE["bias"][0] + alpha[:, None] * gap[1]
    np.testing.assert_allclose(state.params["bias"][:, 0], bias, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "project", [multipliers.capped_simplex(1e-3), multipliers.box(0.999)], ids=["simplex", "box"]
)
def test_the_step_stays_finite_at_the_edge_of_the_domain(project):
    """With thresholds out of reach λ sits at the cap; no update is lost and λ comes back."""
    zeros = jnp.zeros(8, int)
    batch = Batch(None, Conditions(zeros, zeros, zeros + 1, zeros))
    algorithm = primal_dual(ON_POLICY(steps=5, project=project), optax.adam(1e-2), optax.sgd(1.0))
    state = algorithm.init(single(REFERENCE), 1e4, multipliers=2.0)
    go = jax.jit(functools.partial(run, algorithm, steps=100))
    state, info = go(state, batch)
    assert info.finite.all()
    np.testing.assert_allclose(info.multipliers, 0.999, rtol=1e-5)
    state, info = go(state._replace(thresholds=jnp.array([-10.0])), batch)
    assert info.finite.all()
    assert state.multipliers[0] == 0


def test_the_domain_of_conditions_is_shared_unless_each_has_its_own():
    """Of Σ λ_i ≤ 0.98, by default; of each λ_i ≤ 0.98 where the projection says so."""
    given = jnp.array([0.9, 0.9, -0.3])
    shared = ON_POLICY(steps=5).project(given)
    np.testing.assert_allclose(shared, [0.49, 0.49, 0.0], rtol=1e-6)
    own = ON_POLICY(steps=5, project=multipliers.box(0.98)).project(given)
    np.testing.assert_allclose(own, [0.9, 0.9, 0.0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_sharded_batches_give_the_result_of_one_device():
    batch = conditional_batch(repeat=8)

    def algorithm_of(axis_name):
        problem = ON_POLICY(steps=5, project=multipliers.box(0.98))
        return primal_dual(problem, optax.sgd(0.05), optax.sgd(0.01), axis_name=axis_name)

    chains.check_devices(algorithm_of, single(REFERENCE), batch, [3.0, 3.0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"estimator": "esd"}, "'esd' is not one of"),
        ({"estimator": "tilt"}, "'tilt' is not one of"),
        ({"steps": 1}, "at least 2"),
        ({"steps": 6}, "1 to 5"),
    ],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        reverse_kl(chains.apply, chains.SCHEDULE, **({"shape": (1,), "steps": 5} | options))


def test_zero_terminal_snr_is_refused_only_where_it_is_visited():
    schedule = schedules.noise_schedule(num_steps=10, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        reverse_kl(chains.apply, schedule, shape=(1,), steps=10)
    reverse_kl(chains.apply, schedule, shape=(1,), steps=5)


ZEROS = jnp.zeros(2, int)
ROWS = Conditions(ZEROS, ZEROS, ZEROS, ZEROS)
IMAGES = Images(jnp.zeros((2, 1)), ZEROS, ZEROS)


@pytest.mark.parametrize(
    ("batch", "word"),
    [
        (Batch(None, ROWS._replace(base=None)), "one structure"),
        (Batch(Conditions(None, None), Conditions(None, None, None, ZEROS)), "counted"),
        (Batch(None, ROWS._replace(constraint=None)), "number of their constraint"),
        (Batch(None, IMAGES), "got Images"),
        (Batch(None, Samples(*IMAGES[:2], ZEROS, jnp.zeros(2), ZEROS)), "got Samples"),
        (Batch(IMAGES, ROWS), "Images and Conditions"),
        (Batch(None, ROWS, IMAGES), "no base"),
        (Batch(ROWS, TrajectoryPoints(ROWS, jnp.zeros((2, 1)), ZEROS)), "stored points"),
        (Batch(None, TrajectoryPoints(ROWS, jnp.zeros((2, 1)), ZEROS), IMAGES), "no base"),
    ],
)
def test_bad_batches_are_refused(batch, word):
    arguments = single(PARAMS), single(REFERENCE), KEY, batch, jnp.zeros(1)
    evaluate = ON_POLICY(steps=5).losses
    with pytest.raises(ValueError, match=word):
        jax.eval_shape(lambda: evaluate(*arguments))
