import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.neighbors import NearestNeighbors

from jax_unlearn.metrics import cosine_similarity, nearest_neighbours, reconstruct
from jax_unlearn.schedules import alpha_sigma, noise_schedule


def test_cosine_similarity_agrees_with_sklearn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20, 6))
    np.testing.assert_allclose(
        cosine_similarity(x, y), 1 - paired_cosine_distances(x, y), atol=1e-6
    )
    assert cosine_similarity(jnp.zeros(3), jnp.ones(3)) == 0
    with pytest.raises(ValueError, match="one by one"):
        cosine_similarity(x, y[:1])


@pytest.mark.parametrize("k", [1, 5, 50])
def test_nearest_neighbours_agree_with_sklearn(k):
    rng = np.random.default_rng(1)
    queries, bank = rng.normal(size=(12, 8)), rng.normal(size=(50, 8))
    similarity, index = nearest_neighbours(queries, bank, k=k)
    distance, expected = NearestNeighbors(metric="cosine").fit(bank).kneighbors(queries, k)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-6)


def test_nearest_neighbours_refuse_wrong_arguments():
    with pytest.raises(ValueError, match="1 to 4"):
        nearest_neighbours(jnp.ones((3, 2)), jnp.ones((4, 2)), k=5)
    with pytest.raises(ValueError, match=r"\[n, d\] and \[m, d\]"):
        nearest_neighbours(jnp.ones((3, 2)), jnp.ones((4, 3)))


MEAN, SCALE = 0.7, 0.4


def _gaussian_epsilon(schedule):
    """The exact ε̂ of data N(MEAN, SCALE²): σ (x_t − α MEAN) / (α² SCALE² + σ²)."""

    def predict(x_t, t):
        alpha, sigma = alpha_sigma(schedule.log_snr[t], x_t)
        return sigma * (x_t - alpha * MEAN) / (jnp.square(alpha * SCALE) + jnp.square(sigma))

    return predict


def _flow(schedule, x_0, noise, start):
    """The probability flow keeps a Gaussian's quantiles: x_0 = MEAN + SCALE (x_t − mean)/sd."""
    alpha, sigma = (np.float64(v) for v in alpha_sigma(schedule.log_snr[start], jnp.float32(0)))
    deviation = np.sqrt((alpha * SCALE) ** 2 + sigma**2)
    return MEAN + SCALE * (alpha * x_0 + sigma * noise - alpha * MEAN) / deviation


def test_reconstruction_converges_to_the_probability_flow():
    schedule = noise_schedule("linear", num_steps=2000, beta_start=5e-5, beta_end=0.01)
    rng = np.random.default_rng(2)
    x_0, noise = rng.normal(size=(2, 5, 3))
    expected = _flow(schedule, x_0, noise, 1500)
    run = jax.jit(
        lambda steps: reconstruct(
            _gaussian_epsilon(schedule), schedule, x_0, noise, start=1500, steps=steps
        ),
        static_argnums=0,
    )
    errors = [np.abs(run(steps) - expected).max() for steps in (12, 50, 200, 1501)]
    assert errors[3] < 2e-3
    # Of first order: four times the steps, about a quarter of the error.
    for coarse, fine in zip(errors[:2], errors[1:3], strict=True):
        assert 2.5 < coarse / fine < 6


def test_one_step_is_the_denoisers_estimate():
    schedule = noise_schedule("squaredcos_cap_v2", num_steps=100, prediction_type="v_prediction")
    x_0, noise = np.random.default_rng(3).normal(size=(2, 4, 2, 2, 1)).astype(np.float32)
    alpha, sigma = alpha_sigma(schedule.log_snr[60], jnp.asarray(x_0))
    result = reconstruct(
        lambda x_t, t: 0.5 * x_t + t[:, None, None, None] / 100,
        schedule,
        x_0,
        noise,
        start=60,
        steps=1,
    )
    x_t = alpha * x_0 + sigma * noise
    np.testing.assert_allclose(result, (x_t - sigma * (0.5 * x_t + 0.6)) / alpha, rtol=1e-5)


def test_the_true_noise_gives_the_image_back():
    schedule = noise_schedule("squaredcos_cap_v2", num_steps=100, final_alpha_cumprod_one=True)
    x_0, noise = np.random.default_rng(4).normal(size=(2, 4, 3)).astype(np.float32)
    for steps in (1, 7, 81):
        result = reconstruct(lambda x_t, t: noise, schedule, x_0, noise, start=80, steps=steps)
        np.testing.assert_allclose(result, x_0, atol=1e-4)


@pytest.mark.parametrize(
    ("start", "steps", "match"), [(100, 5, "start must be"), (10, 12, "1 to 11"), (10, 0, "1 to")]
)
def test_reconstruct_refuses_wrong_times(start, steps, match):
    schedule = noise_schedule("linear", num_steps=100)
    with pytest.raises(ValueError, match=match):
        reconstruct(
            lambda x_t, t: x_t,
            schedule,
            jnp.ones((1, 2)),
            jnp.ones((1, 2)),
            start=start,
            steps=steps,
        )


def test_reconstruct_refuses_noise_of_another_shape():
    schedule = noise_schedule("linear", num_steps=100)
    with pytest.raises(ValueError, match="shape of the images"):
        reconstruct(
            lambda x_t, t: x_t, schedule, jnp.ones((2, 2)), jnp.ones((1, 2)), start=5, steps=2
        )
