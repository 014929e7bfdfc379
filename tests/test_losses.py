"""Losses against scikit-learn, SciPy and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn.metrics import log_loss

from convnet import losses

B, K = 7, 5


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def one_hot(labels, k=K):
    return np.eye(k, dtype=np.float32)[labels]


def soft_targets(rng):
    targets = rng.random((B, K)).astype(np.float32)
    return targets / targets.sum(axis=1, keepdims=True)


def expected_cross_entropy(logits, targets, smoothing, weights):
    """The mix of two losses: against the targets and against the uniform."""
    log_p = special.log_softmax(logits.astype(np.float64), axis=1)
    loss = -(1 - smoothing) * (targets * log_p).sum(1) - smoothing * log_p.mean(1)
    return loss * (targets * weights).sum(1)


def expected_binary(logits, targets, smoothing, weights):
    x = logits.astype(np.float64)
    t = targets.astype(np.float64)
    loss = (1 - smoothing) * -(
        t * special.log_expit(x) + (1 - t) * special.log_expit(-x)
    )
    loss += smoothing * -(special.log_expit(x) + special.log_expit(-x)) / 2
    return loss * ((1 - t) * weights[0] + t * weights[1])


def central_difference(function, x, step=1e-5):
    """d(sum of function)/dx in float64, one coordinate at a time."""
    x = x.astype(np.float64)
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        delta = np.zeros_like(x)
        delta[place] = step
        gradient[place] = (function(x + delta) - function(x - delta)).sum() / (2 * step)
    return gradient


def test_cross_entropy_of_hard_labels_is_log_loss(rng):
    logits = rng.normal(0, 3, (B, K)).astype(np.float32)
    labels = rng.integers(0, K, B)
    ours = losses.cross_entropy(logits, one_hot(labels))
    assert ours.shape == (B,) and ours.dtype == jnp.float32
    probabilities = special.softmax(logits.astype(np.float64), axis=1)
    for i in range(B):
        expected = log_loss(
            labels[i : i + 1], probabilities[i : i + 1], labels=range(K)
        )
        np.testing.assert_allclose(ours[i], expected, rtol=1e-5)


def test_class_weights_of_hard_labels_are_sample_weights(rng):
    logits = rng.normal(0, 2, (B, K)).astype(np.float32)
    labels = rng.integers(0, K, B)
    weights = rng.uniform(0.5, 4, K)
    ours = losses.cross_entropy(logits, one_hot(labels), class_weights=tuple(weights))
    probabilities = special.softmax(logits.astype(np.float64), axis=1)
    expected = log_loss(
        labels, probabilities, labels=range(K), sample_weight=weights[labels]
    )
    np.testing.assert_allclose(ours.sum() / weights[labels].sum(), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_soft_targets(rng, smoothing):
    logits = rng.normal(0, 3, (B, K)).astype(np.float32)
    targets = soft_targets(rng)
    weights = rng.uniform(0.5, 4, K).astype(np.float32)

    def expected(x):
        return expected_cross_entropy(x, targets, smoothing, weights)

    def ours(x):
        return losses.cross_entropy(x, targets, smoothing, weights)

    np.testing.assert_allclose(ours(logits), expected(logits), rtol=1e-5)
    gradient = jax.grad(lambda x: ours(x).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(
        gradient, central_difference(expected, logits), rtol=1e-4, atol=1e-6
    )


def test_binary_cross_entropy_is_log_loss(rng):
    logits = rng.normal(0, 3, B).astype(np.float32)
    labels = np.array([0, 1, 0, 0, 1, 1, 0], np.float32)
    ours = losses.binary_cross_entropy(logits, labels)
    assert ours.shape == (B,) and ours.dtype == jnp.float32
    probabilities = special.expit(logits.astype(np.float64))
    expected = log_loss(labels.astype(int), probabilities, normalize=False)
    np.testing.assert_allclose(ours.sum(), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_of_soft_targets(rng, smoothing):
    logits = rng.normal(0, 3, B).astype(np.float32)
    logits[0] = 0.0
    targets = rng.random(B).astype(np.float32)
    weights = np.array([0.5, 3.0], np.float32)

    def expected(x):
        return expected_binary(x, targets, smoothing, weights)

    def ours(x):
        return losses.binary_cross_entropy(x, targets, smoothing, weights)

    np.testing.assert_allclose(ours(logits), expected(logits), rtol=1e-5)
    gradient = jax.grad(lambda x: ours(x).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(
        gradient, central_difference(expected, logits), rtol=1e-4, atol=1e-6
    )


def test_extreme_logits():
    logits = jnp.asarray([[1e4, -1e4], [1e4, -1e4], [-1e4, -1e4]])
    targets = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    np.testing.assert_allclose(
        losses.cross_entropy(logits, targets), [0, 2e4, np.log(2)], rtol=1e-6
    )
    gradient = jax.grad(lambda x: losses.cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(gradient, [[0, 0], [1, -1], [0, 0]], atol=1e-6)

    x = jnp.asarray([1e4, 1e4, -1e4, -1e4, 1e4])
    t = jnp.asarray([1.0, 0.0, 1.0, 0.0, 0.5])
    np.testing.assert_allclose(
        losses.binary_cross_entropy(x, t), [0, 1e4, 1e4, 0, 5e3], rtol=1e-6
    )
    gradient = jax.grad(lambda x: losses.binary_cross_entropy(x, t).sum())(x)
    np.testing.assert_allclose(gradient, [0, 1, -1, 0, 0.5], atol=1e-6)


def test_confident_and_right_keeps_its_small_loss():
    """log(1 - sigmoid(12)) through the probability has three digits in float32."""
    ours = losses.binary_cross_entropy(jnp.asarray([12.0]), jnp.asarray([1.0]))
    np.testing.assert_allclose(ours, [np.log1p(np.exp(-12.0))], rtol=1e-5)


def test_bfloat16_logits_give_float32_losses(rng):
    logits = jnp.asarray(rng.normal(0, 3, (B, K)), jnp.bfloat16)
    targets = one_hot(rng.integers(0, K, B))
    ours = losses.cross_entropy(logits, targets)
    assert ours.dtype == jnp.float32
    as_float64 = np.asarray(logits.astype(jnp.float32), np.float64)
    expected = expected_cross_entropy(as_float64, targets, 0.0, np.ones(K))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 2, 3)])
def test_squared_error(rng, shape):
    predictions, targets = rng.normal(size=(2, *shape)).astype(np.float32)
    ours = losses.squared_error(predictions, targets)
    expected = ((predictions - targets).astype(np.float64) ** 2).reshape(B, -1).mean(1)
    assert ours.shape == (B,) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    gradient = jax.grad(lambda p: losses.squared_error(p, targets).sum())(predictions)
    count = np.prod(shape[1:], dtype=int)
    np.testing.assert_allclose(gradient, 2 * (predictions - targets) / count, rtol=1e-5)


def test_shapes_are_not_broadcast():
    column, row = np.zeros((B, 1)), np.zeros(B)
    for loss in (losses.squared_error, losses.binary_cross_entropy):
        with pytest.raises(ValueError, match=r"\(7, 1\).*\(7,\)"):
            loss(column, row)
    with pytest.raises(ValueError, match=r"\(7, 5\).*\(7, 4\)"):
        losses.cross_entropy(np.zeros((B, 5)), np.zeros((B, 4)))
    with pytest.raises(ValueError, match=r"\(2,\).*each of the 5 classes"):
        losses.cross_entropy(np.zeros((B, 5)), np.zeros((B, 5)), 0.0, (1.0, 2.0))
