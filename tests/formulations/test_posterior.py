"""Against the exact denoiser of the reweighted mixture, which p_λ is where h_i marks components."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn import losses, mixtures, schedules
from jax_unlearn.formulations import Examples, Points, PosteriorBatch, likelihood

SCHEDULE = schedules.noise_schedule(trained_betas=np.linspace(0.02, 0.6, 9))
LAW = mixtures.gaussian_mixture(
    [[-1.0, 0.3], [0.2, -0.4], [1.1, 0.6], [0.0, 1.5]],
    [0.1, 0.2, 0.15, 0.3],
    [0.4, 0.2, 0.25, 0.15],
)
FORGOTTEN = np.array([[1, 0, 1, 0], [0, 0, 0, 1]])
LAMBDAS = np.array([1.7, 0.6])
WEIGHTING = losses.TimeWeighting(jnp.linspace(1, 3, 9), jnp.full(9, 1 / 9))
COUNT, KEPT = 300, 100
KEY = jax.random.key(0)


def apply(log_weights, x_t, t, cond):
    """The exact denoiser of the mixture with the condition's own weights."""

    def one(x, time, weights):
        law = LAW._replace(log_weights=jax.nn.log_softmax(weights))
        return mixtures.predictions(law, x[None], SCHEDULE.log_snr[time]).epsilon[0]

    return jax.vmap(one)(x_t, t, log_weights[cond])


def points():
    """Points of q, with the closed forms of u and of its gradient by autodiff."""
    x_0 = mixtures.sample(LAW, jax.random.key(1), COUNT)
    t = jnp.arange(COUNT) % 9
    noise = jax.random.normal(jax.random.key(2), x_0.shape)
    x_t = schedules.add_noise(x_0=x_0, noise=noise, log_snr=SCHEDULE.log_snr[t])

    def posterior(x, time):
        return mixtures.responsibilities(LAW, x[None], SCHEDULE.log_snr[time])[0] @ FORGOTTEN.T

    _, sigma = schedules.alpha_sigma(SCHEDULE.log_snr[t], x_t)
    push = sigma[..., None] * jax.vmap(jax.jacobian(posterior))(x_t, t)
    zeros = jnp.zeros(COUNT, int)
    return Points(
        x_t, t, zeros, apply(LAW.log_weights[None], x_t, t, zeros), jax.vmap(posterior)(x_t, t),
        push, mixtures.responsibilities(LAW, x_0) @ FORGOTTEN.T,
        np.broadcast_to(np.arange(2), (COUNT, 2)),
    )  # fmt: skip


def losses_at(params, multipliers, kept=None, forget=None):
    formulation = likelihood(apply, SCHEDULE, estimator="posterior", weighting=WEIGHTING)
    reference = jnp.stack([LAW.log_weights, LAW.log_weights])
    batch = PosteriorBatch(kept, points() if forget is None else forget)
    return jax.jit(formulation.losses, static_argnums=4)(
        params, reference, KEY, batch, None, jnp.float32(multipliers)
    )


@pytest.mark.parametrize("lambdas", [LAMBDAS, [0.0, 0.0], [12.0, 0.3]])
def test_the_target_is_the_denoiser_of_p_lambda(lambdas):
    tilted = LAW.log_weights - np.asarray(lambdas) @ FORGOTTEN
    found = losses_at(jnp.stack([tilted, LAW.log_weights]), lambdas)
    assert found.objective.shape == (COUNT,)
    np.testing.assert_allclose(found.objective, 0, atol=1e-6)
    other = losses_at(jnp.stack([tilted + jnp.array([0, 0.5, 0, 0]), LAW.log_weights]), lambdas)
    assert other.objective.mean() > 1e-3


def test_kept_rows_share_the_batch_and_are_held_to_the_reference():
    """300 of 400 rows are forgotten: λ · 4/3 acts there."""
    kept = Examples(jax.random.normal(KEY, (KEPT, 2)), jnp.ones(KEPT, int))
    tilted = LAW.log_weights - LAMBDAS @ FORGOTTEN
    exact = losses_at(jnp.stack([tilted, LAW.log_weights]), 0.75 * LAMBDAS, kept)
    np.testing.assert_allclose(exact.objective, 0, atol=1e-6)
    moved = losses_at(
        jnp.stack([tilted, LAW.log_weights + jnp.array([1.0, 0, 0, 0])]), 0.75 * LAMBDAS, kept
    )
    assert moved.objective[:KEPT].mean() > 1e-3  # not held to itself
    np.testing.assert_allclose(moved.objective[KEPT:], 0, atol=1e-6)


def test_rows_are_weighted_by_time_and_values_by_p_lambda():
    found = losses_at(jnp.stack([LAW.log_weights] * 2), LAMBDAS)
    batch = points()
    target = apply((LAW.log_weights - LAMBDAS @ FORGOTTEN)[None], *batch[:3])
    squares = np.square(np.asarray(target) - np.asarray(batch.epsilon)).sum(axis=1)
    expected = 9 * np.linspace(1, 3, 9)[np.asarray(batch.t)] * squares
    np.testing.assert_allclose(found.objective, expected, rtol=1e-3, atol=1e-6)
    weights = np.exp(-np.asarray(batch.values, np.float64) @ LAMBDAS)
    weights /= weights.sum()
    np.testing.assert_allclose(
        found.constraint.reshape(COUNT, 2).mean(axis=0), weights @ np.asarray(batch.values),
        rtol=1e-4,
    )  # fmt: skip
    expected_kl = weights @ np.log(COUNT * weights)
    assert found.diagnostics["tilt_kl"] == pytest.approx(expected_kl, rel=1e-4)
    assert (found.index.reshape(COUNT, 2) == np.arange(2)).all()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="weighting"):
        likelihood(apply, SCHEDULE, estimator="posterior")
    batch = points()
    with pytest.raises(ValueError, match="one shape"):
        losses_at(LAW.log_weights[None], LAMBDAS, forget=batch._replace(values=batch.values[:, 0]))
