"""An evaluation's statistics against scikit-learn, NumPy's roots and plain loops."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from convnet import metrics


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (1, 1), (3, 10), (9341, 10000)])
@pytest.mark.parametrize("z", [1.96, 2.5])
def test_wilson_solves_the_score_equation(successes, n, z):
    # The bounds are where |share - p| = z sqrt(p (1 - p) / n).
    share = successes / n
    roots = np.roots([1 + z * z / n, -2 * share - z * z / n, share * share])
    assert metrics.wilson(successes, n, z) == pytest.approx(sorted(roots), abs=1e-12)


def test_wilson_at_the_edges():
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.wilson(0, 50)[0] == 0.0
    assert metrics.wilson(50, 50)[1] == 1.0
    for successes in (-1, 6):
        with pytest.raises(ValueError, match=f"0..5, got {successes}"):
            metrics.wilson(successes, 5)


@pytest.fixture
def answers():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 6, 500)
    guesses = np.where(rng.random(500) < 0.6, labels, rng.integers(0, 6, 500))
    return labels, guesses, rng.integers(0, 4, 500)


def test_confusion_counts_rows_as_truth(answers):
    labels, guesses, weights = answers
    found = metrics.confusion(labels, guesses, 8)
    assert found.dtype == np.int64
    expected = reference.confusion_matrix(labels, guesses, labels=range(8))
    np.testing.assert_array_equal(found, expected)
    expected = reference.confusion_matrix(
        labels, guesses, labels=range(8), sample_weight=weights
    )
    np.testing.assert_array_equal(
        metrics.confusion(labels, guesses, 8, weights), expected
    )


def test_confusion_ignores_what_weighs_nothing_and_refuses_other_strangers():
    labels, guesses = np.array([0, -1, 1]), np.array([1, 99, 1])
    found = metrics.confusion(labels, guesses, 2, np.array([True, False, True]))
    np.testing.assert_array_equal(found, [[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="outside 0..1"):
        metrics.confusion(labels, guesses, 2)
    with pytest.raises(ValueError, match="whole numbers"):
        metrics.confusion(labels, guesses, 2, np.array([1.0, 0.0, 1.0]))


def test_per_class_against_scikit_learn(answers):
    labels, guesses, _ = answers
    rows = metrics.per_class(metrics.confusion(labels, guesses, 6))
    precision, recall, _, count = reference.precision_recall_fscore_support(
        labels, guesses, labels=range(6)
    )
    np.testing.assert_allclose([row["precision"] for row in rows], precision)
    np.testing.assert_allclose([row["recall"] for row in rows], recall)
    assert [row["count"] for row in rows] == count.tolist()
    for row in rows:
        low, high = row["interval"]
        assert 0 <= low < row["recall"] < high <= 1


def test_per_class_of_an_absent_class():
    rows = metrics.per_class(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]]))
    assert math.isnan(rows[2]["recall"]) and rows[2]["interval"] == (0.0, 1.0)
    assert math.isnan(rows[1]["precision"]) and rows[1]["recall"] == 0.0


def test_calibration_against_a_loop():
    rng = np.random.default_rng(0)
    confidences = np.concatenate([rng.random(400), [0.0, 1.0, 0.2, 0.4, 1.0000001]])
    correct = rng.random(len(confidences)) < confidences**2
    bins = 5
    members = [[] for _ in range(bins)]
    for c, right in zip(confidences, correct, strict=True):
        inside = [
            i for i in range(bins) if i / bins < min(c, 1.0) <= (i + 1) / bins
        ] or [0]
        members[inside[0]].append((min(c, 1.0), right))
    expected = sum(
        abs(sum(r for _, r in m) / len(m) - sum(c for c, _ in m) / len(m)) * len(m)
        for m in members
    ) / len(confidences)
    found = metrics.calibration(confidences, correct, bins)
    assert found["ece"] == pytest.approx(expected, abs=1e-12)
    assert [row["count"] for row in found["bins"]] == [len(m) for m in members]
    for row, m in zip(found["bins"], members, strict=True):
        assert row["accuracy"] == pytest.approx(np.mean([r for _, r in m]))
        assert row["confidence"] == pytest.approx(np.mean([c for c, _ in m]))


def test_calibration_of_little_and_of_nonsense():
    found = metrics.calibration(np.array([0.9]), np.array([True]))
    assert len(found["bins"]) == 15 and found["ece"] == pytest.approx(0.1)
    assert math.isnan(found["bins"][0]["accuracy"]) and not found["bins"][0]["count"]
    assert math.isnan(metrics.calibration(np.zeros(0), np.zeros(0, bool))["ece"])
    with pytest.raises(ValueError, match="finite"):
        metrics.calibration(np.array([0.5, np.nan]), np.array([True, True]))


def test_average_precision_is_the_mean_precision_at_each_hit():
    rng = np.random.default_rng(1)
    labels, probabilities = rng.random(200) < 0.3, rng.random(200)
    hits, precisions = 0, []
    for rank, i in enumerate(np.argsort(-probabilities), start=1):
        if labels[i]:
            hits += 1
            precisions.append(hits / rank)
    found = metrics.average_precision(labels.astype(np.int32), probabilities)
    assert found == pytest.approx(np.mean(precisions))
    assert math.isnan(metrics.average_precision(np.zeros(4), np.ones(4)))


@pytest.mark.parametrize("shape", [(40,), (40, 3), (9, 4, 5, 2)])
def test_regression_against_scikit_learn(shape):
    rng = np.random.default_rng(2)
    labels = (rng.normal(size=shape) * 3 + 100).astype(np.float32)
    guesses = (labels + rng.normal(size=shape)).astype(np.float32)
    outputs = shape[-1] if len(shape) > 1 else 1
    flat = [np.float64(a).reshape(-1, outputs) for a in (labels, guesses)]
    found = metrics.regression(labels, guesses)
    assert found["mse"] == pytest.approx(reference.mean_squared_error(*flat))
    assert found["rmse"] == pytest.approx(math.sqrt(found["mse"]))
    pooled = reference.r2_score(*flat, multioutput="variance_weighted")
    assert found["r2"] == pytest.approx(pooled)
    each = reference.r2_score(*flat, multioutput="raw_values")
    np.testing.assert_allclose([row["r2"] for row in found["outputs"]], each)
    each = reference.mean_squared_error(*flat, multioutput="raw_values")
    np.testing.assert_allclose([row["mse"] for row in found["outputs"]], each)


def test_regression_of_a_constant_and_of_nothing():
    found = metrics.regression(np.full(5, 2.0), np.full(5, 3.0))
    assert found["mse"] == 1.0 and math.isnan(found["r2"])
    assert math.isnan(metrics.regression(np.zeros((0, 2)), np.zeros((0, 2)))["mse"])
    with pytest.raises(ValueError, match="labels"):
        metrics.regression(np.zeros((4, 1)), np.zeros(4))
