import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn import divergences, mixtures, schedules
from jax_unlearn.likelihoods import posteriors

LINEAR = schedules.noise_schedule()
LAW = mixtures.gaussian_mixture(
    [[-1.0, 0.3], [0.2, -0.4], [1.1, 0.6]], [0.1, 0.2, 0.15], [0.5, 0.3, 0.2]
)
KEY = jax.random.key(0)


def apply(params, x_t, t, cond):
    """The exact denoiser of the component `cond`, one condition for all rows."""
    del params
    log_snr = LINEAR.log_snr[t[0]]
    each = jnp.stack(
        [mixtures.predictions(mixtures.select(LAW, [c]), x_t, log_snr).epsilon for c in range(3)]
    )
    return jnp.take_along_axis(each, cond[None, :, None], axis=0)[0]


def follow(x_0, times, key=KEY, **options):
    options = {
        "concepts": jnp.arange(3), "members": np.eye(3), "log_prior": LAW.log_weights, **options
    }  # fmt: skip
    return jax.jit(
        lambda x, t: posteriors.posterior_path(apply, None, LINEAR, key, x_0=x, times=t, **options)
    )(x_0, times)


def times_of(steps):
    weighting = posteriors.path_weighting(LINEAR)
    return posteriors.path_times(weighting, steps, np.random.default_rng(0))


def exact(path, times):
    """The components' posteriors at every point of a path, [steps, batch, 3]."""
    return np.stack(
        [
            mixtures.responsibilities(LAW, x, LINEAR.log_snr[t])
            for x, t in zip(path.x_t, times, strict=True)
        ]
    )


@pytest.mark.slow
def test_the_posterior_of_every_path_tends_to_that_of_its_points():
    x_0 = mixtures.sample(LAW, jax.random.key(1), 64)
    errors = []
    for steps in (4, 16, 64):
        times = times_of(steps)
        path = follow(x_0, times)
        wrong = np.abs(path.posterior - exact(path, times))
        errors.append(wrong.mean())
        np.testing.assert_allclose(
            np.exp(path.log_posterior), path.posterior[-1], rtol=1e-4, atol=1e-6
        )
    assert errors[0] < 0.02
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
    assert wrong.max() < 0.1  # no path is left out: 64 of them


def test_points_have_the_law_of_noised_images():
    times = times_of(6)
    path = follow(jnp.tile(jnp.array([[0.7, -0.2]]), (20_000, 1)), times)
    alpha, sigma = schedules.alpha_sigma(LINEAR.log_snr[times], jnp.zeros(6))
    expected = np.asarray(alpha)[:, None] * np.array([0.7, -0.2])
    np.testing.assert_allclose(path.x_t.mean(axis=1), expected, atol=0.03)
    np.testing.assert_allclose(
        path.x_t.std(axis=1), np.broadcast_to(np.asarray(sigma)[:, None], (6, 2)), rtol=0.02
    )
    assert (np.diff(LINEAR.log_snr[times]) > 0).all()


@pytest.mark.slow
def test_push_is_the_gradient_of_the_posterior():
    x_0 = mixtures.sample(LAW, jax.random.key(1), 8)
    sets = np.array([[1, 0, 1], [0, 1, 0]])
    times = times_of(100)
    path = follow(x_0, times, members=sets)
    for place in (50, 75, 99):
        log_snr = LINEAR.log_snr[times[place]]

        def posterior(x, log_snr=log_snr):
            return mixtures.responsibilities(LAW, x[None], log_snr)[0] @ sets.T

        _, sigma = schedules.alpha_sigma(log_snr, jnp.zeros(()))
        gradient = sigma * jax.vmap(jax.jacobian(posterior))(path.x_t[place])
        np.testing.assert_allclose(path.push[place], gradient, atol=0.015)
        assert np.abs(gradient).max() > 0.04
    np.testing.assert_allclose(path.posterior.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(path.push.sum(axis=2), 0, atol=1e-5)


def test_shares_of_a_mixture_are_found():
    x = mixtures.sample(LAW, jax.random.key(2), 20_000)
    equal = LAW._replace(log_weights=jnp.full(3, -np.log(3.0)))
    log_posterior = np.log(mixtures.responsibilities(equal, x))
    shares = posteriors.mixture_shares(log_posterior)
    np.testing.assert_allclose(shares, np.exp(LAW.log_weights), atol=0.015)
    # Stationary: each likelihood ratio to the mixture averages to 1.
    ratios = np.exp(log_posterior) / (np.exp(log_posterior) @ shares)[:, None]
    np.testing.assert_allclose(ratios.mean(axis=0), 1, atol=2e-3)
    few = posteriors.mixture_shares(np.log([[1.0, 1e-30]] * 9))
    np.testing.assert_allclose(few, [9.5 / 10, 0.5 / 10], rtol=1e-6)


def test_weighting_is_the_path_kl_of_fine_steps():
    weighting = posteriors.path_weighting(LINEAR)
    inside = np.asarray(LINEAR.log_snr) <= 4.0
    weights = np.asarray(weighting.weights)
    np.testing.assert_allclose(
        weights[inside], divergences.path_kl_weights(LINEAR, "fixed_geometric")[inside], rtol=0.02
    )
    assert (weights[~inside] == 0).all()
    np.testing.assert_allclose(weights.sum(), 0.5 * (4.0 - LINEAR.log_snr[-1]), rtol=5e-3)
    times = times_of(40)
    assert (np.diff(times) < 0).all()
    assert inside[times].all()
    coarse = schedules.noise_schedule(trained_betas=np.linspace(0.02, 0.6, 9))
    weighting = posteriors.path_weighting(coarse)
    possible = np.flatnonzero(weighting.probabilities)
    every = posteriors.path_times(weighting, len(possible), np.random.default_rng(1))
    np.testing.assert_array_equal(every, possible[::-1])
    for given in (0, len(possible) + 1):
        with pytest.raises(ValueError, match="steps must be"):
            posteriors.path_times(weighting, given, np.random.default_rng(1))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="members"):
        follow(jnp.zeros((2, 2)), times_of(3), members=np.eye(2))
    with pytest.raises(ValueError, match="prior"):
        follow(jnp.zeros((2, 2)), times_of(3), log_prior=np.zeros(2))
    with pytest.raises(ValueError, match="samples"):
        posteriors.mixture_shares(np.zeros((0, 3)))
    zero_snr = schedules.noise_schedule(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="not finite"):
        posteriors.path_weighting(zero_snr)
