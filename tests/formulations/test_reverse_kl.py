import dataclasses
import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest

from jax_unlearn import losses, mixtures, multipliers, samplers, schedules, sharding
from jax_unlearn import minibatched as replay
from jax_unlearn.formulations import (
    ConditionBatch,
    Examples,
    Held,
    SampleBatch,
    Samples,
    Separated,
    reverse_kl,
)
from jax_unlearn.primal_dual import primal_dual

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
REFERENCE = chains.gaussian([0.0, 1.0, -0.7, 0.4], 0.5)
PARAMS = jax.tree.map(lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape), REFERENCE)
MULTIPLIERS = np.array([0.3, 0.2])
ON_POLICY = functools.partial(reverse_kl, chains.apply, chains.SCHEDULE, shape=(1,))


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def conditional_batch(repeat=1):
    """One kept condition; 2 and 3 are held to label 0 and moved from their own."""
    label = functools.partial(jnp.repeat, repeats=repeat)
    return ConditionBatch(
        kept=Held(label(jnp.array([1, 1])), label(jnp.array([1, 1]))),
        forget=Separated(
            cond=label(jnp.array([2, 3, 3])),
            base=label(jnp.array([0, 0, 0])),
            target=label(jnp.array([2, 3, 3])),
            constraint=label(jnp.array([0, 1, 1])),
        ),
    )


def conditional_values(params, along=None, times=chains.ALL):
    """Objective and values of that problem."""
    kl = functools.partial(chains.path_kl, params, reference=REFERENCE, along=along, times=times)
    held = 2 * kl(label=1, other=1) + kl(label=2, other=0) + 2 * kl(label=3, other=0)
    return held / 5, np.array([kl(label=2, other=2), kl(label=3, other=3)])


def several_batch():
    """Label 0 alone, two constraints on each trajectory."""
    zeros = jnp.zeros(3, int)
    each = jnp.tile(jnp.array([1, 2]), (3, 1))
    return ConditionBatch(None, Separated(zeros, zeros, each, each - 1))


def several_values(params, along=None, times=chains.ALL):
    kl = functools.partial(chains.path_kl, params, 0, REFERENCE, along=along, times=times)
    return kl(0), np.array([kl(1), kl(2)])


def averages(formulation, batch, count, params=PARAMS):
    """Means and standard errors of objective, two values and the gradient of the Lagrangian."""

    def lagrangian(params, key):
        got = formulation.losses(
            params, single(REFERENCE), key, batch, None, jnp.float32(MULTIPLIERS)
        )
        seen = jnp.zeros(2).at[got.index].add(1.0)
        values = jnp.zeros(2).at[got.index].add(got.constraint) / seen
        objective = got.objective.mean()
        total = objective - formulation.sign * jnp.float32(MULTIPLIERS) @ values
        return total, (objective, values)

    @jax.jit
    @jax.vmap
    def one(key):
        gradient, (objective, values) = jax.grad(lagrangian, has_aux=True)(single(params), key)
        flat = jnp.concatenate([gradient["gain"], gradient["bias"].ravel()])
        return jnp.concatenate([objective[None], values, flat])

    got = np.asarray(one(jax.random.split(KEY, count)), np.float64)
    return got.mean(axis=0), got.std(axis=0) / np.sqrt(count)


@pytest.mark.parametrize("estimator", ["pathwise", "stop_gradient"])
@pytest.mark.parametrize("case", ["conditional", "several"])
def test_values_and_gradient_against_exact_chains(estimator, case):
    """Path KLs are exact; "pathwise" is their derivative, "stop_gradient" that at given x_t."""
    batch, values = {
        "conditional": (conditional_batch(), conditional_values),
        "several": (several_batch(), several_values),
    }[case]

    def lagrangian(params, along=None):
        objective, constraint = values(params, along)
        return objective - MULTIPLIERS @ constraint

    total = chains.differences(lagrangian, PARAMS)
    partial = chains.differences(lambda params: lagrangian(params, along=PARAMS), PARAMS)
    expected, other = (total, partial) if estimator == "pathwise" else (partial, total)
    objective, constraint = values(PARAMS)
    mean, error = averages(ON_POLICY(estimator=estimator, steps=5), batch, 20_000)
    exact = np.concatenate([[objective], constraint, expected])
    assert (np.abs(mean - exact) < 4.5 * error + 1e-5).all()
    # The two differ by far more than the test's resolution.
    assert np.linalg.norm(total - partial) > 0.1 * np.linalg.norm(total)
    assert (np.abs(mean[3:] - other) > 10 * error[3:] + 1e-3).any()


def by_hand(params, points, targets, weights, bound):
    """Reverse mode through recorded chains of two coordinates, in float64 -> gradient, shares.

    Args:
      points: x_t at each step, [steps, 2].
      targets: labels of the reference that the chain is compared with.
      weights: of each comparison.
      bound: largest length of what comes back to a prediction from later steps, to its own.
    """
    gradient, later, shortened = jax.tree.map(np.zeros_like, params), np.zeros(2), []
    for x, (t, in_x_0, in_x, _, scale) in reversed(
        list(zip(points, chains.steps_of(chains.ALL), strict=True))
    ):
        prediction = params["gain"][t] * x + params["bias"][2, t]
        own, through_targets = np.zeros(2), np.zeros(2)
        for target, weight in zip(targets, weights, strict=True):
            theirs = REFERENCE["gain"][t] * x + REFERENCE["bias"][target, t]
            part = (in_x_0 * chains.SIGMA[t] / chains.ALPHA[t]) ** 2 / scale * (prediction - theirs)
            own += weight * part
            through_targets -= weight * part * REFERENCE["gain"][t]
        coming = -in_x_0 * chains.SIGMA[t] / chains.ALPHA[t] * later
        share = min(1.0, bound * np.linalg.norm(own) / max(np.linalg.norm(coming), 1e-300))
        shortened.append(share)
        total = own + share * coming
        gradient["gain"][t] += total @ x
        gradient["bias"][2, t] += total.sum()
        later = share * (in_x_0 / chains.ALPHA[t] + in_x) * later
        later = later + through_targets + total * params["gain"][t]
    return gradient, np.array(shortened)


@pytest.mark.parametrize(
    ("estimator", "bound"), [("bounded", 1.0), ("pathwise", np.inf), ("stop_gradient", 0.0)]
)
def test_gradient_of_a_trajectory_by_hand(estimator, bound):
    """ "bounded" shortens what comes from later steps; the others are its limits."""
    with jax.enable_x64(True):
        rng, rows = np.random.default_rng(2), 6
        params = jax.tree.map(lambda leaf: leaf + 0.4 * rng.normal(size=leaf.shape), REFERENCE)
        reference = jax.tree.map(jnp.asarray, REFERENCE)
        label = jnp.full(rows, 2)
        batch = ConditionBatch(None, Separated(label, 0 * label, label, 0 * label))
        formulation = ON_POLICY(estimator=estimator, steps=5, shape=(2,))

        def lagrangian(params):
            got = formulation.losses(params, reference, KEY, batch, None, jnp.zeros(1))
            return got.objective.mean() - 0.4 * got.constraint.mean()

        found = jax.grad(lagrangian)(jax.tree.map(jnp.asarray, params))
        visit = replay.trajectories(chains.apply, chains.SCHEDULE, shape=(2,), steps=5)
        points = np.asarray(visit(jax.tree.map(jnp.asarray, params), KEY, batch).x_t[1])
    each = [by_hand(params, points[:, row], (0, 2), (1.0, -0.4), bound) for row in range(rows)]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(one for one, _ in each))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    if estimator == "bounded":
        # Some are shortened and some are not; the last step has nothing after it.
        shares = np.array([share for _, share in each])
        assert 0.1 < (shares[:, 1:] < 1).mean() < 0.9


def test_a_sub_grid_has_its_own_variances_and_weights():
    schedule = dataclasses.replace(chains.SCHEDULE, spacing="linspace")
    times = tuple(schedules.timesteps(schedule, 3).tolist())
    assert times == (4, 2, 0)
    formulation = reverse_kl(chains.apply, schedule, shape=(1,), steps=3)
    mean, error = averages(formulation, conditional_batch(), 10_000)
    objective, constraint = conditional_values(PARAMS, times=times)
    exact = np.concatenate([[objective], constraint])
    assert (np.abs(mean[:3] - exact) < 4.5 * error[:3]).all()
    assert (error[:3] < 0.02 * exact).all()


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

    x_t, exact = jax.random.normal(KEY, (20_000, 1)), np.zeros(2)
    for (t, *_, variance), log_snr_s in zip(chains.steps_of(chains.ALL), following, strict=True):
        mean = step(PARAMS, 1, x_t, t, log_snr_s, 0.0)
        others = [step(REFERENCE, label, x_t, t, log_snr_s, 0.0) for label in (0, 2)]
        exact += [jnp.square(mean - other).mean() / (2 * variance) for other in others]
        noise = jax.random.normal(jax.random.key(t + 1), x_t.shape)
        x_t = step(PARAMS, 1, x_t, t, log_snr_s, noise)
    assert np.abs(x_t).max() < 0.61

    labels = [jnp.full(20_000, label) for label in (1, 0, 2)]
    batch = ConditionBatch(None, Separated(*labels, jnp.zeros(20_000, int)))
    formulation = reverse_kl(chains.apply, schedule, shape=(1,), steps=5)
    got = jax.jit(formulation.losses, static_argnums=4)(
        single(PARAMS), single(REFERENCE), KEY, batch, None, jnp.zeros(1)
    )
    found = np.array([got.objective.mean(), got.constraint.mean()])
    np.testing.assert_allclose(found, exact, rtol=0.04)
    unclipped = conditional_values(PARAMS)[0]
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
    exact = [float((jnp.exp(log_p) * (log_p - other)).sum()) for other in (log_q, log_1)]

    def reference(params, x_t, t, cond):
        both = (mixtures.denoiser(law, schedule)(x_t, t) for law in (q, q_1))
        return jnp.where(cond[:, None] == 0, *both)

    def model(params, x_t, t, cond):
        return mixtures.denoiser(p, schedule)(x_t, t)

    formulation = reverse_kl(
        model, schedule, shape=(1,), steps=100, reference_apply=reference, estimator="stop_gradient"
    )
    zeros = jnp.zeros(8000, int)
    batch = ConditionBatch(None, Separated(None, zeros, zeros + 1, zeros))
    got = jax.jit(
        lambda key: formulation.losses({}, {}, key, batch, None, jnp.zeros(1))
    )(KEY)  # fmt: skip
    for values, kl in zip((got.objective, got.constraint), exact, strict=True):
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
        lambda state, key: algorithm.step(key, state, batch), state, jax.random.split(key, steps)
    )


@pytest.mark.parametrize("estimator", ["pathwise", "stop_gradient"])
def test_primal_dual_reaches_the_exact_multiplier_at_every_threshold(estimator):
    """ε_p = ε_q + α (ε_q − ε_1), (1+α)² D = b, λ = α/(1+α), KL(p‖q) = α² D; one vmap."""
    gap, weights = equal_gains()
    distance = weights @ gap[1] ** 2
    thresholds = distance * np.array([1.3, 2.0, 3.0])
    batch = ConditionBatch(
        None, Separated(*(jnp.full(8, label) for label in (0, 0, 1)), jnp.zeros(8, int))
    )
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


@pytest.mark.parametrize("estimator", ["pathwise", "tilt"])
def test_the_step_stays_finite_at_the_edge_of_the_domain(estimator):
    """With thresholds out of reach λ sits at the cap; no update is lost and λ comes back."""
    zeros = jnp.zeros(8, int)
    batch = ConditionBatch(None, Separated(zeros, zeros, zeros + 1, zeros))
    batch = tilt_batch(512) if estimator == "tilt" else batch
    formulation = ON_POLICY(estimator=estimator, steps=5, weighting=WEIGHTING, margin=1e-3)
    algorithm = primal_dual(formulation, optax.adam(1e-2), optax.sgd(1.0))
    state = algorithm.init(single(REFERENCE), 1e4, multipliers=2.0)
    go = jax.jit(functools.partial(run, algorithm, steps=100))
    state, info = go(state, batch)
    assert info.finite.all()
    np.testing.assert_allclose(info.multipliers, 0.999, rtol=1e-5)
    state, info = go(state._replace(thresholds=jnp.array([-10.0])), batch)
    assert info.finite.all()
    assert state.multipliers[0] == 0


# Tilts of N(0, s²) by N(a, s²) and by (x − a)²/2 are Gaussian: their denoisers are linear.
VARIANCE, CENTRE = 0.5, 0.8
WEIGHTING = losses.TimeWeighting(jnp.array([1.0, 2.0, 1.0, 0.5, 2.0]), jnp.full(5, 0.2))


def tilt_batch(count, centre=CENTRE, seed=3):
    """Samples of label 0's N(0, s²) under it, with log-ratios to N(a, s²)."""
    x = np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(seed), (count, 1))
    ratio = ((x - centre) ** 2 - x**2) / (2 * VARIANCE)
    zeros = jnp.zeros(count, int)
    return SampleBatch(None, Samples(x, zeros, zeros, ratio[:, 0], zeros))


@pytest.mark.parametrize("control_variate", [False, True])
def test_reverse_kl_tilt_distils_the_closed_form(control_variate):
    """p_λ = N(−α a, s²), KL(p_λ‖q_1) = (1+α)² a²/2s² and KL(p_λ‖q) = α² a²/2s²."""
    current = 0.3
    alpha = current / (1 - current)
    formulation = reverse_kl(
        chains.apply,
        chains.SCHEDULE,
        estimator="tilt",
        weighting=WEIGHTING,
        control_variate=control_variate,
    )
    solved, constraint, diagnostics = chains.minimiser(
        formulation, single(REFERENCE), tilt_batch(100_000), [current]
    )
    exact = chains.gaussian([-alpha * CENTRE], VARIANCE)
    np.testing.assert_allclose(solved[0], exact["gain"], atol=0.035)
    np.testing.assert_allclose(solved[1], exact["bias"][0], atol=0.035)
    nats = CENTRE**2 / (2 * VARIANCE)
    assert constraint.mean() == pytest.approx((1 + alpha) ** 2 * nats, rel=0.03)
    assert diagnostics["tilt_kl"] == pytest.approx(alpha**2 * nats, rel=0.05)
    # E_q w² / (E_q w)² of this tilt is exp(α² a²/s²).
    assert diagnostics["ess"] == pytest.approx(np.exp(-(alpha**2) * 2 * nats), rel=0.05)


def test_tilt_of_a_conditional_model_uses_the_multiplier_of_each_condition():
    """A quarter of the rows is forgotten: λ N/N_1 = 4 λ acts there, and 1 on kept rows."""
    count, current = 40_000, 0.1
    alpha = 0.4 / (1 - 0.4)
    forget = tilt_batch(count).forget._replace(cond=jnp.full(count, 2))
    kept = Examples(jax.random.normal(KEY, (3 * count, 1)), jnp.full(3 * count, 1))
    formulation = reverse_kl(
        chains.apply, chains.SCHEDULE, estimator="tilt", weighting=WEIGHTING, shares=[0.25]
    )
    got = jax.jit(formulation.losses, static_argnums=4)(
        *[single(REFERENCE)] * 2, KEY, SampleBatch(kept, forget), None, jnp.float32([current])
    )
    nats = CENTRE**2 / (2 * VARIANCE)
    assert got.constraint.mean() == pytest.approx((1 + alpha) ** 2 * nats, rel=0.03)
    assert got.diagnostics["tilt_kl"] == pytest.approx(alpha**2 * nats / 4, rel=0.05)
    np.testing.assert_array_equal(got.objective[: 3 * count], 0)  # the reference itself
    assert got.objective.shape == (4 * count,)
    projected = formulation.project(jnp.array([0.9]))
    np.testing.assert_allclose(projected, [0.25 * 0.98], rtol=1e-6)


def test_control_variate_leaves_the_reference_alone_without_multipliers():
    formulation = reverse_kl(
        chains.apply, chains.SCHEDULE, estimator="tilt", weighting=WEIGHTING, control_variate=True
    )

    def objective(params):
        batch = tilt_batch(64)
        got = formulation.losses(params, single(REFERENCE), KEY, batch, None, jnp.zeros(1))
        return got.objective.sum()

    value, gradient = jax.jit(jax.value_and_grad(objective))(single(REFERENCE))
    assert abs(value) < 1e-5
    assert all(np.abs(leaf).max() < 1e-4 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("estimator", ["pathwise", "tilt"])
def test_sharded_batches_give_the_result_of_one_device(estimator):
    if estimator == "tilt":
        kept = Examples(jax.random.normal(KEY, (32, 1)), jnp.full(32, 1))
        batch, share = SampleBatch(kept, tilt_batch(16).forget), [0.3]
    else:
        batch, share = conditional_batch(repeat=8), [0.2, 0.4]

    def algorithm_of(axis_name):
        formulation = ON_POLICY(estimator=estimator, steps=5, weighting=WEIGHTING, shares=share)
        return primal_dual(formulation, optax.sgd(0.05), optax.sgd(0.01), axis_name=axis_name)

    alone, mesh = algorithm_of(None), sharding.data_mesh()
    ways = {
        "one": (sharding.jit_step(alone.step), batch),
        "jit": (sharding.jit_step(alone.step, mesh), sharding.shard_batch(batch, mesh)),
        "pmap": (
            sharding.pmap_step(algorithm_of("data").step),
            jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch),
        ),
    }
    ends = {}
    for name, (step, placed) in ways.items():
        state = alone.init(single(REFERENCE), jnp.full(len(share), 3.0), multipliers=0.1)
        for key in jax.random.split(KEY, 4):
            state, info = step(key, state, placed)
        ends[name] = jax.tree.map(np.asarray, (state.params, state.multipliers, info))
    for other in ("jit", "pmap"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            ends["one"],
            ends[other],
        )
    assert (np.abs(ends["one"][1] - 0.1) > 1e-3).any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"estimator": "esd"}, "esd"),
        ({"shape": (1,)}, "steps"),
        ({"steps": 5}, "shape"),
        ({"shape": (1,), "steps": 1}, "at least 2"),
        ({"shape": (1,), "steps": 6}, "1 to 5"),
        ({"estimator": "tilt"}, "weighting"),
        ({"shape": (1,), "steps": 5, "margin": 0.0}, "margin"),
        ({"shape": (1,), "steps": 5, "shares": [0.0]}, "shares"),
        ({"shape": (1,), "steps": 5, "shares": [1.5]}, "shares"),
    ],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        reverse_kl(chains.apply, chains.SCHEDULE, **options)


def test_zero_terminal_snr_is_refused_only_where_it_is_visited():
    schedule = schedules.noise_schedule(num_steps=10, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        reverse_kl(chains.apply, schedule, shape=(1,), steps=10)
    reverse_kl(chains.apply, schedule, shape=(1,), steps=5)


def test_bad_batches_are_refused():
    evaluate = ON_POLICY(steps=5).losses
    zeros = jnp.zeros(2, int)

    def losses_of(batch):
        evaluate(single(PARAMS), single(REFERENCE), KEY, batch, None, jnp.zeros(1))

    with pytest.raises(ValueError, match="one structure"):
        losses_of(ConditionBatch(None, Separated(zeros, None, zeros, zeros)))
    with pytest.raises(ValueError, match="counted"):
        losses_of(ConditionBatch(Held(None, None), Separated(None, None, None, zeros)))
    tilt = reverse_kl(chains.apply, chains.SCHEDULE, estimator="tilt", weighting=WEIGHTING)
    batch = tilt_batch(2)
    bad = batch._replace(forget=batch.forget._replace(values=jnp.zeros((2, 2))))
    with pytest.raises(ValueError, match="one shape"):
        tilt.losses(single(PARAMS), single(REFERENCE), KEY, bad, None, jnp.zeros(1))
