import dataclasses
import functools

import jax
import jax.numpy as jnp
import linear_chains as chains
import numpy as np
import optax
import pytest
from scipy import optimize

from jax_unlearn import baselines, duality, losses, mixtures, samplers, schedules
from jax_unlearn.problem import Batch, Conditions, Images

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
REFERENCE = chains.gaussian([0.0, 1.0, -0.7, 0.4], 0.5)
PARAMS = jax.tree.map(lambda leaf: leaf + 0.15 * RNG.normal(size=leaf.shape), REFERENCE)
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.0, 0.3])
WEIGHTING = losses.TimeWeighting(jnp.float32(WEIGHTS), jnp.array([0.3, 0.2, 0.2, 0.1, 0.2]))
KEPT, BASE, FORGOTTEN = (0.8, 1), (-0.3, 2), (-0.6, 3)  # an image of one pixel and its label
FISHER = jax.tree.map(lambda leaf: RNG.uniform(0.5, 2.0, leaf.shape), REFERENCE)


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def method(name, **options):
    return getattr(baselines, name)(chains.apply, chains.SCHEDULE, WEIGHTING, **options)


def examples(image, count):
    return Images(jnp.full((count, 1), image[0]), jnp.full(count, image[1]))


def batch_of(count, kept=True, base=True):
    return Batch(
        kept=examples(KEPT, count) if kept else None,
        forget=examples(FORGOTTEN, count)._replace(constraint=jnp.zeros(count, int)),
        base=examples(BASE, count) if base else None,
    )


def expected(params, image, mean=0.0, variance=1.0):
    """Σ_t w_t E(g x_t + b − ε)², x_t = α x + σ ε, for noise of this mean and variance."""
    x, label = image
    slope = params["gain"] * chains.SIGMA - 1
    offset = params["gain"] * chains.ALPHA * x + params["bias"][label]
    return WEIGHTS @ ((offset + slope * mean) ** 2 + slope**2 * variance)


def average(loss, batch, count, reference=None):
    """Means and standard errors of the loss and of its gradient."""

    @jax.jit
    @jax.vmap
    def one(key):
        value, gradient = jax.value_and_grad(loss)(single(PARAMS), reference, key, batch)
        return jnp.concatenate([value[None], gradient["gain"], gradient["bias"].ravel()])

    got = np.asarray(one(jax.random.split(KEY, count)), np.float64)
    return got.mean(axis=0), got.std(axis=0) / np.sqrt(count)


def check_average(loss, batch, exact, reference=None):
    mean, error = average(loss, batch, 20_000, reference)
    wanted = np.concatenate([[exact(PARAMS)], chains.differences(exact, PARAMS)])
    assert (np.abs(mean - wanted) < 4.5 * error + 1e-5).all()
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(wanted)


def test_naive_deletion_is_training_on_the_rest():
    check_average(
        method("naive_deletion"),
        batch_of(2),
        lambda params: 0.5 * (expected(params, KEPT) + expected(params, BASE)),
    )


@pytest.mark.parametrize("kept", [True, False])
def test_neg_grad_and_its_gradient_against_differences(kept):
    check_average(
        method("neg_grad", scale=0.7),
        batch_of(2, kept, base=False),
        lambda params: kept * expected(params, KEPT) - 0.7 * expected(params, FORGOTTEN),
    )


def test_selective_amnesia_is_both_means_and_the_penalty():
    def exact(params):
        moved = chains.flat(params) - chains.flat(REFERENCE)
        penalty = 0.5 * 3.0 * chains.flat(FISHER) @ moved**2
        return expected(params, BASE) + expected(params, KEPT) + penalty

    remembered = baselines.Remembered(single(REFERENCE), single(FISHER))
    # Twice as many kept rows as surrogates: each part is a mean of its own.
    batch = batch_of(2)._replace(kept=examples(KEPT, 4))
    check_average(method("selective_amnesia", strength=3.0), batch, exact, remembered)


def gradient_of(loss, batch):
    got = jax.jit(jax.grad(loss))(single(PARAMS), None, KEY, batch)
    return chains.flat(got)


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [1.0, np.inf])
@pytest.mark.parametrize(("estimator", "mixing"), [("importance", 0.3), ("two_term", 0.5)])
def test_siss_has_its_gradient(estimator, mixing, max_norm):
    """On very many rows g_x and g_a are those of the expectations, known in closed form."""
    loss = method("siss", norm=0.9, mixing=mixing, estimator=estimator, max_norm=max_norm)
    batch = batch_of(200_000, base=False)._replace(
        kept=Images(jnp.full((200_000, 1), KEPT[0]), jnp.full(200_000, FORGOTTEN[1]))
    )
    kept = (KEPT[0], FORGOTTEN[1])
    g_x, g_a = (
        chains.differences(functools.partial(expected, image=image), PARAMS)
        for image in (kept, FORGOTTEN)
    )
    exact = g_x - 0.9 * g_a / np.linalg.norm(g_a)
    assert 1.5 < np.linalg.norm(exact) < 10
    assert np.linalg.norm(g_x - g_a - exact) > 0.3
    exact *= min(1.0, max_norm / np.linalg.norm(exact))
    got = gradient_of(loss, batch)
    np.testing.assert_allclose(got, exact, atol=0.015 * np.linalg.norm(exact))
    value = jax.jit(loss)(single(PARAMS), None, KEY, batch)
    wanted = expected(PARAMS, kept) - 0.9 / np.linalg.norm(g_a) * expected(PARAMS, FORGOTTEN)
    assert value == pytest.approx(wanted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("x", "eta", "binds"), [(-0.6, 0.1, False), (3.0, 2.0, True)])
def test_erase_diff_takes_the_nearest_direction_that_forgets(x, eta, binds):
    """argmin ½‖d − g_r‖² with ⟨d, g_f⟩ ≥ η‖g_f‖², by a solver; uniform noise has mean 1/2."""
    kept, count = (x, FORGOTTEN[1]), 200_000
    g_r = chains.differences(functools.partial(expected, image=kept), PARAMS)
    g_f = chains.differences(
        functools.partial(expected, image=FORGOTTEN, mean=0.5, variance=1 / 12), PARAMS
    )
    solved = optimize.minimize(
        lambda d: 0.5 * ((d - g_r) ** 2).sum(),
        g_r + 5 * g_f,
        jac=lambda d: d - g_r,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda d: d @ g_f - eta * g_f @ g_f,
                     "jac": lambda d: g_f},
        options={"ftol": 1e-12},
    )  # fmt: skip
    assert solved.success
    batch = batch_of(count, base=False)._replace(kept=examples(kept, count))
    got = gradient_of(method("erase_diff", eta=eta), batch)
    np.testing.assert_allclose(got, solved.x, atol=0.015 * np.linalg.norm(solved.x))
    assert (np.linalg.norm(solved.x - g_r) > 0.05 * np.linalg.norm(g_r)) == binds


# A mixture and its first component, exact at every noise level.
SCHEDULE = schedules.noise_schedule("squaredcos_cap_v2", num_steps=40)
MIXTURE = mixtures.gaussian_mixture([[-1.5, 0.0], [1.0, 0.5], [0.0, 2.0]], [0.3, 0.4, 0.3])
CONCEPT = mixtures.select(MIXTURE, [0])


def family(strength, x_t, t, cond):
    """Label 0: the mixture's ε. Label 1: ε_q + a (ε_q − ε_c); a = −1 is the concept's own."""
    base, concept = (mixtures.denoiser(law, SCHEDULE)(x_t, t) for law in (MIXTURE, CONCEPT))
    return jnp.where(cond[:, None] == 0, base, base + strength * (base - concept))


def separated(count):
    ones = jnp.ones(count, int)
    return Conditions(ones, ones * 0, ones, ones * 0)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
def test_esd_regresses_on_the_composed_score_of_reverse_kl(eta):
    x_t, t = 2 * jax.random.normal(KEY, (40, 2)), jnp.arange(40)
    ones = jnp.ones(40, int)
    target = baselines.esd_target(family, -1.0, ones, null=0 * ones, strength=eta)(x_t, t)
    _, sigma = schedules.alpha_sigma(SCHEDULE.log_snr[t], x_t)
    s_q, s_c = (mixtures.score(law, x_t, SCHEDULE.log_snr[t]) for law in (MIXTURE, CONCEPT))
    np.testing.assert_allclose(target, -sigma * (s_q + eta * (s_q - s_c)), rtol=2e-4, atol=1e-4)
    composed = duality.compose_reverse_kl(
        mixtures.denoiser(MIXTURE, SCHEDULE), [mixtures.denoiser(CONCEPT, SCHEDULE)],
        [eta / (1 + eta)],
    )  # fmt: skip
    np.testing.assert_allclose(target, composed(x_t, t), rtol=2e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("key", [1, 2, 3])
def test_esd_is_stationary_at_the_composition_and_holds_trajectories_fixed(key):
    """Elsewhere the derivative is that of (a − η)² at given x_t: 2/(a − η) times the loss."""
    eta = 1.5
    loss = baselines.esd(family, SCHEDULE, shape=(2,), strength=eta, steps=10)
    of = jax.jit(lambda a: jax.value_and_grad(loss)(a, -1.0, jax.random.key(key), separated(32)))
    value, slope = of(eta)
    assert value < 1e-8
    assert abs(slope) < 1e-4
    value, slope = map(float, of(0.25))
    assert value > 0.01
    assert slope == pytest.approx(2 * value / (0.25 - eta), rel=1e-3)


def guided_lines(params, label, null, scale):
    """x_t = slope x_T + offset at each of the chain's times under guided DDIM, in numpy."""
    shift = params["bias"][null] + scale * (params["bias"][label] - params["bias"][null])
    return chains.ddim_lines(params["gain"], shift)[0]


def test_esd_sees_guided_states_of_the_trained_model_at_uniform_times():
    """The mean loss of a linear chain, exactly: every x_t is affine in normal noise."""
    eta, guidance, label, null = 1.2, 3.0, 2, 0
    total, quadratic = 0.0, []
    for t, slope, offset in guided_lines(PARAMS, label, null, guidance):
        q = REFERENCE["bias"][:, t]
        difference = PARAMS["gain"][t] - REFERENCE["gain"][t]
        shift = PARAMS["bias"][label, t] - (q[null] - eta * (q[label] - q[null]))
        quadratic.append((difference * offset + shift) ** 2 + (difference * slope) ** 2)
    total = np.mean(quadratic)
    loss = baselines.esd(
        chains.apply, chains.SCHEDULE, shape=(1,), strength=eta, guidance=guidance, steps=5
    )
    rows = jnp.full(16, label)
    batch = Conditions(rows, rows * 0 + null, rows, rows * 0)
    got = jax.jit(jax.vmap(lambda key: loss(single(PARAMS), single(REFERENCE), key, batch)))(
        jax.random.split(KEY, 20_000)
    )
    error = float(got.std()) / np.sqrt(got.size)
    assert abs(float(got.mean()) - total) < 4.5 * error
    assert error < 0.01 * total
    unguided = [offset for *_, offset in guided_lines(PARAMS, label, null, 1.0)]
    guided = [offset for *_, offset in guided_lines(PARAMS, label, null, guidance)]
    assert np.abs(np.subtract(unguided, guided)).max() > 0.5


@pytest.mark.parametrize("clip", [None, 0.8])
def test_partial_samples_are_states_of_the_whole_trajectory(clip):
    """At every count, compiled once, with as many network evaluations as the count says."""
    schedule = dataclasses.replace(SCHEDULE, clip_range=clip)
    predict = mixtures.denoiser(MIXTURE, schedule)
    x_start, evaluations = jax.random.normal(KEY, (6, 2)), []

    def counted(x_t, t):
        jax.debug.callback(lambda: evaluations.append(1))
        return predict(x_t, t)

    whole = samplers.sample(predict, schedule, KEY, x_start, steps=8)
    partial = jax.jit(
        lambda count: baselines.partial_sample(counted, schedule, x_start, steps=8, count=count)
    )
    for count in range(8):
        evaluations.clear()
        x_t, t = jax.block_until_ready(partial(count))
        jax.effects_barrier()
        assert len(evaluations) == count
        assert t == whole.t[count]
        np.testing.assert_allclose(x_t, whole.x[count], rtol=1e-5, atol=1e-5)
    assert partial._cache_size() == 1


def test_saliency_mask_is_the_larger_half():
    gradient = {"a": jnp.array([[3.0, -0.1], [0.0, -7.0]]), "b": jnp.array([0.2, -2.0, 0.15, 1.0])}
    mask = baselines.saliency_mask(gradient)
    np.testing.assert_array_equal(mask["a"], [[True, False], [False, True]])
    np.testing.assert_array_equal(mask["b"], [False, True, False, True])
    few = baselines.saliency_mask(gradient, share=0.25)
    assert few["a"].sum() == 2
    assert few["b"].sum() == 0
    # Where most gradients are zero it is still half, and never all.
    ties = baselines.saliency_mask({"a": jnp.zeros((3, 2)), "b": jnp.array([0.0, 5.0])})
    assert ties["b"][1]
    assert sum(int(leaf.sum()) for leaf in ties.values()) == 4


@pytest.mark.slow
def test_unmasked_weights_stay_bit_identical_and_the_others_take_plain_steps():
    params = {"a": jnp.float32(RNG.normal(size=(5, 4))), "b": jnp.float32(RNG.normal(size=7))}
    curvature = jax.tree.map(lambda leaf: jnp.float32(RNG.uniform(0.5, 2, leaf.shape)), params)

    def loss(params):
        return optax.tree.vdot(curvature, jax.tree.map(jnp.square, params))

    mask = baselines.saliency_mask(jax.grad(loss)(params))
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, weight_decay=0.3))
    optimizer = baselines.masked(plain, mask)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    # The oracle has no masks: it optimizes a vector of the chosen entries alone.
    chosen = np.concatenate([np.ravel(mask["a"]), np.ravel(mask["b"])])

    def entries(tree):
        return jnp.concatenate([tree["a"].ravel(), tree["b"]])[chosen]

    alone, alone_state = entries(params), plain.init(entries(params))
    moved, state = params, optimizer.init(params)
    for _ in range(6):
        moved, state = step(moved, state)
        updates, alone_state = plain.update(2 * entries(curvature) * alone, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    for name in params:
        still = ~np.asarray(mask[name])
        assert still.any()
        np.testing.assert_array_equal(moved[name][still], params[name][still])
    np.testing.assert_allclose(entries(moved), alone, rtol=1e-5)
    assert (np.abs(entries(moved) - entries(params)) > 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 4])
def test_fisher_of_a_linear_denoiser(draws):
    """E_x E[(mean of `draws` derivatives)²] at one time step, by Gauss-Hermite quadrature."""
    t, label, centre, deviation = 2, 1, 0.4, 0.7
    weighting = losses.TimeWeighting(WEIGHTING.weights, jax.nn.one_hot(t, chains.STEPS))
    nodes, mass = np.polynomial.hermite_e.hermegauss(12)
    mass = mass / mass.sum()
    x = (centre + deviation * nodes)[:, None]
    x_t = chains.ALPHA[t] * x + chains.SIGMA[t] * nodes
    residual = PARAMS["gain"][t] * x_t + PARAMS["bias"][label, t] - nodes
    exact = {}
    for name, derivative in (("gain", 2 * residual * x_t), ("bias", 2 * residual)):
        derivative = WEIGHTS[t] * derivative
        mean = derivative @ mass
        variance = derivative**2 @ mass - mean**2
        exact[name] = mass @ (mean**2 + variance / draws)
    count = 40_000
    images = centre + deviation * jax.random.normal(jax.random.key(5), (count, 1))
    got = jax.jit(
        lambda key: baselines.fisher(
            chains.apply, chains.SCHEDULE, weighting, single(PARAMS), key,
            Images(images, jnp.full(count, label)), draws=draws,
        )
    )(KEY)  # fmt: skip
    assert got["gain"][t] == pytest.approx(exact["gain"], rel=0.06)
    assert got["bias"][label, t] == pytest.approx(exact["bias"], rel=0.03)
    others = np.delete(chains.flat(got), [t, chains.STEPS * (1 + label) + t])
    np.testing.assert_array_equal(others, 0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["model", "noise"])
def test_concept_ablation_makes_the_condition_its_anchor(variant):
    """Of a family that runs from the anchor's denoiser (0) to the concept's (−1)."""
    count = 4096
    weighting = losses.time_weighting(losses.simple_weights(40, 2))
    loss = baselines.concept_ablation(
        family, SCHEDULE, weighting, variant=variant, preservation=0.0
    )
    ones = jnp.ones(count, int)
    batch = baselines.Anchored(mixtures.sample(MIXTURE, KEY, count), ones, 0 * ones)
    slope = jax.jit(jax.grad(loss))
    at = {a: float(slope(a, -1.0, KEY, batch)) for a in (0.0, -1.0)}
    minimiser = at[0.0] / (at[-1.0] - at[0.0])  # the loss is quadratic in a
    assert abs(minimiser) < (1e-6 if variant == "model" else 0.05)
    assert at[-1.0] < -0.01


@pytest.mark.parametrize("variant", ["model", "noise"])
def test_concept_ablation_holds_the_anchor_fixed_and_preserves_it(variant):
    count = 200_000
    anchor = (0.5, 1)
    images, labels = examples(anchor, count)[:2]
    batch = baselines.Anchored(images, labels * 0 + 3, labels)
    loss = method("concept_ablation", variant=variant, preservation=0.6)
    got = jax.jit(jax.grad(loss))(single(PARAMS), None, KEY, batch)
    exact = chains.unflat(chains.differences(lambda params: 0.6 * expected(params, anchor), PARAMS))
    scale = np.linalg.norm(exact["bias"])
    np.testing.assert_allclose(got["bias"][1], exact["bias"][1], atol=0.02 * scale)
    # 2 w (b_c − b_anchor) for "model", whose gains are shared; the noise's own for "noise".
    toward = {
        "model": 2 * WEIGHTS * (PARAMS["bias"][3] - PARAMS["bias"][1]),
        "noise": chains.unflat(
            chains.differences(lambda params: expected(params, (anchor[0], 3)), PARAMS)
        )["bias"][3],
    }[variant]
    np.testing.assert_allclose(got["bias"][3], toward, atol=0.02 * np.linalg.norm(toward))


STEPS = {
    "naive_deletion": {},
    "neg_grad": {"scale": 0.1},
    "siss": {"norm": 0.1},
    "erase_diff": {"eta": 0.5},
    "selective_amnesia": {"strength": 1.0},
    "concept_ablation": {},
    "esd": {"shape": (1,), "steps": 5},
}


@pytest.mark.parametrize("name", list(STEPS))
def test_steps_compile_once(name):
    reference, batch = single(REFERENCE), batch_of(4)
    if name == "esd":
        loss = baselines.esd(chains.apply, chains.SCHEDULE, **STEPS[name])
        batch = separated(4)
    else:
        loss = method(name, **STEPS[name])
    if name == "siss":
        batch = batch._replace(base=None)
    if name == "selective_amnesia":
        reference = baselines.Remembered(reference, single(FISHER))
    if name == "concept_ablation":
        images, labels = examples(KEPT, 4)[:2]
        batch = baselines.Anchored(images, labels * 0 + 3, labels)
    optimizer = optax.adam(1e-2)
    params, opt_state = single(PARAMS), optimizer.init(single(PARAMS))
    step = jax.jit(baselines.train_step(loss, optimizer))
    for key in jax.random.split(KEY, 5):
        params, opt_state, value = step(key, params, opt_state, reference, batch)
        assert np.isfinite(value)
    assert step._cache_size() == 1
    moved = chains.flat(params) - chains.flat(PARAMS)
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() > 1e-2


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="esd"):
        method("siss", norm=1.0, estimator="esd")
    with pytest.raises(ValueError, match="mixing"):
        method("siss", norm=1.0, mixing=1.0)
    with pytest.raises(ValueError, match="variant"):
        method("concept_ablation", variant="images")
    with pytest.raises(ValueError, match="share"):
        baselines.saliency_mask({"a": jnp.ones(2)}, share=0.0)
    with pytest.raises(ValueError, match="retain"):
        method("naive_deletion")(single(PARAMS), None, KEY, batch_of(2, False, False))
    with pytest.raises(ValueError, match="pairs"):
        method("siss", norm=1.0)(single(PARAMS), None, KEY, batch_of(2))
    remembered = baselines.Remembered(single(REFERENCE), single(FISHER))
    amnesia = method("selective_amnesia", strength=1.0)
    with pytest.raises(ValueError, match="surrogates"):
        amnesia(single(PARAMS), remembered, KEY, batch_of(2, base=False))
