import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jax_unlearn import duality, mixtures, quantification

LAW = mixtures.gaussian_mixture(
    [[-1.0, 0.3], [0.2, -0.4], [1.1, 0.6]], [0.1, 0.2, 0.15], [0.5, 0.3, 0.2]
)


def identity(values):
    return values


def exactly(shown, elsewhere):
    """A confusion that is known without error."""
    m = len(elsewhere)
    return quantification.Confusion(
        np.asarray(shown), np.asarray(elsewhere), np.zeros((m, m, m)), np.zeros((m, m))
    )


class Finite:
    """n cells, each of which shows a concept 1 … m or none, and a classifier of any kind."""

    def __init__(self, seed, m=3, n=40, sharpness=2.0):
        rng = np.random.default_rng(seed)
        self.given = special.softmax(sharpness * rng.normal(size=(m + 1, n)), axis=1)  # q(x|c)
        self.shares = rng.dirichlet(np.ones(m + 1))  # of none, and of each concept
        self.q = self.shares @ self.given
        self.posterior = self.shares[1:, None] * self.given[1:] / self.q
        # Blunt, and partial to some concepts: as far from the posterior as networks are.
        self.h = rng.uniform(0.5, 0.9, (m, 1)) * self.posterior + 0.2 * rng.uniform(size=(m, n))
        means = self.given @ self.h.T
        self.confusion = exactly(means[1:], means[0])
        self.inverse = np.linalg.inv(means[1:] - means[0])

    def calibrated(self):
        return np.asarray(quantification.calibrate(self.h.T, self.confusion)).T


@pytest.mark.parametrize("seed", range(4))
def test_means_are_shares_exactly_under_label_shift(seed):
    with jax.enable_x64(True):
        space = Finite(seed)
        calibrated = space.calibrated()
        for draw in np.random.default_rng(seed + 10).dirichlet(np.full(4, 0.5), 20):
            p = draw @ space.given
            np.testing.assert_allclose(calibrated @ p, draw[1:], atol=1e-12)
        # Nothing that is seen is a share without it, and single values are no probabilities.
        assert np.abs(space.h @ p - draw[1:]).max() > 0.02
        assert calibrated.min() < 0


@pytest.mark.parametrize("seed", range(4))
def test_a_calibrated_posterior_is_a_choice_of_h(seed):
    """The optimum under E_p[h̃] ≤ ε is q exp(−λᵀh̃)/Z, and the tilt by h with λ′ = (S − e)⁻¹ λ."""
    with jax.enable_x64(True):
        space = Finite(seed)
        calibrated, m = space.calibrated(), 3
        thresholds = np.random.default_rng(seed).uniform(0.3, 0.9, m) * (calibrated @ space.q)
        shift = 0.1 - calibrated.min(axis=1)
        found = duality.solve_likelihood(
            np.log(space.q), calibrated + shift[:, None], thresholds + shift
        )
        assert bool(found.attained)
        multipliers, p = np.asarray(found.multipliers), np.exp(found.log_p)
        assert (multipliers > 0).any()
        assert (calibrated @ p - thresholds <= 1e-9).all()
        np.testing.assert_allclose(multipliers * (calibrated @ p - thresholds), 0, atol=1e-8)
        for weights in (multipliers @ calibrated, (space.inverse @ multipliers) @ space.h):
            expected = special.log_softmax(np.log(space.q) - weights)
            np.testing.assert_allclose(found.log_p, expected, atol=1e-9)
        # No other p that meets the thresholds is nearer, of those about it.
        rng = np.random.default_rng(seed + 20)
        others = special.softmax(found.log_p + 0.05 * rng.normal(size=(500, len(p))), axis=1)
        others = others[(others @ calibrated.T <= thresholds).all(axis=1)]
        assert len(others) > 5
        prices = (others * (np.log(others) - np.log(space.q))).sum(axis=1)
        assert prices.min() > found.primal_value


@pytest.mark.parametrize("seed", range(4))
def test_shares_of_a_law_that_is_tilted_by_it_read_low(seed):
    space = Finite(seed)
    calibrated = space.calibrated()
    multipliers = np.random.default_rng(seed).uniform(0.5, 2.0, 3)
    p = special.softmax(np.log(space.q) - multipliers @ calibrated)
    shares = space.posterior @ p  # p is a function of the cell: concepts given it are q's
    assert multipliers @ (calibrated @ p) < multipliers @ shares - 1e-3
    # Samples reweighted by their concept instead: label shift, and no bias.
    left = space.shares * np.exp(-np.append(0.0, multipliers))
    left = left / left.sum()
    np.testing.assert_allclose(calibrated @ (left @ space.given), left[1:], atol=1e-5)


@pytest.mark.slow
def test_shares_are_those_of_the_joint_law_whatever_the_classifier():
    # Components 1 and 2 are concepts; p shows a quarter and a half as much of them as the mixture.
    x = np.asarray(mixtures.sample(LAW, jax.random.key(2), 200_000))
    truth = np.asarray(mixtures.responsibilities(LAW, x, jnp.inf))
    rng = np.random.default_rng(0)
    label = (rng.uniform(size=(len(x), 1)) < truth.cumsum(axis=1)).argmax(axis=1)
    blunt = np.exp(0.4 * np.log(truth)) / np.exp(0.4 * np.log(truth)).sum(axis=1, keepdims=True)
    h, labels = blunt[:, 1:], np.eye(3)[label][:, 1:]
    found = quantification.confusion(h[:100_000], labels[:100_000])
    left = np.array([1.0, 0.25, 0.5])
    weights = (truth * left).sum(axis=1)[100_000:]
    calibrated = np.asarray(quantification.calibrate(h[100_000:], found))
    shares = np.average(calibrated, axis=0, weights=weights)
    expected = np.array([0.5, 0.3, 0.2]) * left
    expected = (expected / expected.sum())[1:]
    np.testing.assert_allclose(shares, expected, atol=0.004)
    plain = np.average(h[100_000:], axis=0, weights=weights)
    assert np.abs(plain - expected).max() > 0.05
    # Of the samples that the confusion is of, the shares are those of the labels.
    own = np.asarray(quantification.calibrate(h[:100_000], found)).mean(axis=0)
    np.testing.assert_allclose(own, labels[:100_000].mean(axis=0), atol=1e-4)


def test_the_error_of_shares_has_that_of_the_confusion():
    # Repeated draws of the labelled samples, against the variance that each of them tells.
    rng = np.random.default_rng(1)

    def draw(count, shares):
        label = rng.choice(3, count, p=[1 - sum(shares), *shares])
        mean = np.array([[0.1, 0.05], [0.6, 0.1], [0.2, 0.7]])[label]
        return rng.beta(4 * mean, 4 * (1 - mean)), np.eye(3)[label][:, 1:]

    judged = draw(200_000, [0.05, 0.2])[0].mean(axis=0, keepdims=True)  # h̃ is affine
    found = [quantification.confusion(*draw(400, [0.3, 0.2])) for _ in range(400)]
    means = [np.asarray(quantification.calibrate(judged, one))[0] for one in found]
    told = np.mean([quantification.share_variance([0.05, 0.2], one) for one in found], axis=0)
    np.testing.assert_allclose(told, np.var(means, axis=0), rtol=0.3)
    np.testing.assert_allclose(np.mean(means, axis=0), [0.05, 0.2], atol=0.01)


def test_variance_of_one_share_is_that_of_rogan_and_gladen():
    # Decisions: 70 of 99 that show the concept, and 29 of 199 that do not, are found.
    h = np.repeat([1.0, 0.0, 1.0, 0.0], [70, 29, 29, 170])[:, None]
    labels = np.repeat([1.0, 0.0], [99, 199])[:, None]
    found = quantification.confusion(h, labels)
    sensitivity, false_positive = 71 / 100, 29 / 200  # with one of each that is judged rightly
    contrast = sensitivity - false_positive
    np.testing.assert_allclose(
        quantification.calibrate([[0.3]], found), [[(0.3 - false_positive) / contrast]], rtol=1e-5
    )
    share = 0.2
    expected = share**2 * sensitivity * (1 - sensitivity) / 99
    expected += (1 - share) ** 2 * false_positive * (1 - false_positive) / 199
    np.testing.assert_allclose(
        quantification.share_variance([share], found), [expected / contrast**2], rtol=1e-5
    )


def test_variance_is_the_delta_method_by_finite_differences():
    rng = np.random.default_rng(3)
    shown, elsewhere = np.eye(2) * 0.6 + 0.1 * rng.uniform(size=(2, 2)), np.array([0.1, 0.05])

    def covariance():
        root = 0.02 * rng.normal(size=(2, 2))
        return root @ root.T

    of_shown, of_elsewhere = np.stack([covariance(), covariance()]), covariance()
    shares = np.array([0.2, 0.3])
    mean = elsewhere + shares @ (shown - elsewhere)

    def estimate(shown, elsewhere):
        return (mean - elsewhere) @ np.linalg.inv(shown - elsewhere)

    step, expected = 1e-6, np.zeros(2)
    for covariances, place in ((of_shown[0], 0), (of_shown[1], 1), (of_elsewhere, None)):

        def moved(by, place=place):
            if place is None:
                return estimate(shown, elsewhere + by)
            return estimate(shown + np.eye(2)[:, [place]] * by, elsewhere)

        derivative = [(moved(by) - moved(-by)) / (2 * step) for by in step * np.eye(2)]
        expected += np.diag(np.transpose(derivative) @ covariances @ derivative)
    found = quantification.Confusion(shown, elsewhere, of_shown, of_elsewhere)
    np.testing.assert_allclose(quantification.share_variance(shares, found), expected, rtol=1e-6)


def test_a_calibrated_posterior_is_a_function_of_samples():
    known = exactly([[0.7, 0.1], [0.2, 0.6]], [0.1, 0.05])

    def h(x):
        return jax.nn.sigmoid(x @ jnp.array([[1.0, -0.5], [0.3, 2.0]]))

    calibrated = quantification.calibrated_posterior(h, known)
    x = np.random.default_rng(4).normal(size=(5, 2)).astype(np.float32)
    inverse = np.linalg.inv(known.shown - known.elsewhere)
    expected = (np.asarray(h(x), np.float64) - known.elsewhere) @ inverse
    np.testing.assert_allclose(jax.jit(calibrated)(x), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(calibrated(x), quantification.calibrate(h(x), known), rtol=1e-6)
    slope = jax.jacobian(h)(x).transpose(0, 2, 3, 1) @ inverse
    np.testing.assert_allclose(
        jax.jacobian(calibrated)(x).transpose(0, 2, 3, 1), slope, rtol=1e-4, atol=1e-6
    )


def test_decisions_are_values_too():
    known = exactly([[0.7]], [0.2])
    found = quantification.calibrate(np.array([[1], [0]]), known)
    assert jnp.issubdtype(found.dtype, jnp.floating)
    np.testing.assert_allclose(found, [[1.6], [-0.4]], rtol=1e-5)


def test_confusion_adds_one_sample_that_is_judged_rightly():
    found = quantification.confusion([[0.5, 0.1], [0.3, 0.3], [0.2, 0.0]], [[1, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(found.shown, [[0.75, 0.05], [0.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(found.elsewhere, [0.5 / 3, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([[0.5]], [[1, 0]], "expected values and labels"),
        ([0.5], [1], "expected values and labels"),
        ([[0.5]], [[0.5]], "labels must be 0 or 1"),
        ([[0.5, 0.1]], [[1, 1]], "labels must be 0 or 1, and name one"),
        ([[0.5]] * 200, [[1]] * 100 + [[0]] * 100, "finds them in 50 % .* and 50 % of all others"),
    ],
)
def test_confusion_refuses(values, labels, message):
    with pytest.raises(ValueError, match=message):
        quantification.confusion(values, labels)


@pytest.mark.parametrize(
    ("shown", "elsewhere", "message"),
    [
        ([[0.5, 0.1]], [0.1, 0.1], r"shown \[m, m\] and elsewhere \[m\], got \[1, 2\] and \[2\]"),
        ([0.5], [0.1], "shown .* got"),
        ([[0.5, 0.4], [0.5, 0.4]], [0.1, 0.1], "does not tell the concepts apart"),
        ([[np.nan]], [0.1], "not finite"),
    ],
)
def test_a_confusion_that_cannot_be_inverted_is_refused_at_once(shown, elsewhere, message):
    known = exactly(shown, elsewhere)
    for call in (
        lambda: quantification.calibrated_posterior(identity, known),
        lambda: quantification.calibrate(np.zeros((3, len(elsewhere))), known),
        lambda: quantification.share_variance(np.zeros(len(elsewhere)), known),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_values_that_do_not_fit_are_refused():
    known = exactly([[0.7, 0.1], [0.2, 0.6]], [0.1, 0.05])
    for values in (np.zeros((4, 1)), np.zeros(2), np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match=r"expected values \[n, 2\], got"):
            quantification.calibrated_posterior(identity, known)(values)
    with pytest.raises(ValueError, match=r"expected shares \[2\], got \[3\]"):
        quantification.share_variance(np.zeros(3), known)
