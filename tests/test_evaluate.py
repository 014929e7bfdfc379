"""What an evaluation says of predictions that are made up here."""

import numpy as np
import pytest

from convnet import evaluate
from convnet.data.source import ArraySource
from convnet.task import Binary, Classification, Regression


def source(inputs, labels):
    return ArraySource(inputs, labels, "test")


def test_means_count_examples_and_sum_in_float64():
    losses = np.full(10_000_001, 0.1, np.float32)
    losses[0] = 1e6  # in float32 the tenths after it would be lost
    found = evaluate.means(
        {"index": np.arange(len(losses)), "loss": losses, "label": losses}
    )
    assert found["examples"] == 10_000_001
    want = losses.astype(np.float64).mean()
    assert found["loss"] == pytest.approx(want, rel=1e-12)
    assert set(found) == {"loss", "examples"}


def test_mistakes_are_the_wrong_answers_worst_first():
    inputs = np.zeros((4, 2, 2, 3), np.uint8)
    labels = np.array([0, 1, 2, 1], np.int32)
    probabilities = np.array(
        [[0.9, 0.1, 0], [0.6, 0.4, 0], [0.05, 0.9, 0.05], [0.1, 0.8, 0.1]], np.float32
    )
    own = probabilities[np.arange(4), labels]
    predicted = {
        "index": np.array([3, 2, 1, 0])[::-1],
        "label": labels,
        "prediction": probabilities,
        "loss": -np.log(own),
        "accuracy": (probabilities.argmax(1) == labels).astype(np.float32),
    }
    found = evaluate.mistakes(Classification(3), predicted, source(inputs, labels))
    assert [(m.id, m.label, m.predicted) for m in found] == [
        ("test/2", 2, 1),
        ("test/1", 1, 0),
    ]
    assert found[0].probability == pytest.approx(0.9)
    assert found[0].image.shape == (2, 2, 3)


def test_a_binary_mistake_has_the_probability_of_what_was_answered():
    inputs = np.zeros((2, 5, 1), np.float32)
    labels = np.array([0, 1], np.int32)
    task = Binary(positive=0)
    predicted = {
        "index": np.arange(2),
        "label": labels,
        "prediction": np.array([0.2, 0.7], np.float32),
        "loss": np.array([1.6, 1.2]),
        "accuracy": np.zeros(2),
    }
    found = evaluate.mistakes(task, predicted, source(inputs, labels))
    assert [(m.label, m.predicted) for m in found] == [(1, 0), (0, 1)]
    assert [m.probability for m in found] == pytest.approx([0.8, 0.7])
    assert found[0].series.shape == (5, 1)
    answers = evaluate.evaluation(task, predicted, {})
    np.testing.assert_array_equal(answers.labels, [1, 0])


def test_baselines_are_persistence_for_maps_and_the_mean_otherwise():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((6, 3, 4, 5, 1)).astype(np.float32)
    labels = rng.standard_normal((6, 4, 5, 1)).astype(np.float32)
    found = evaluate.baselines(Regression((4, 5, 1)), source(inputs, labels))
    want = np.mean((inputs[:, -1] - labels) ** 2)
    assert found == {"persistence": pytest.approx(want)}
    numbers = labels[:, 0, 0, 0]
    found = evaluate.baselines(Regression(()), source(inputs, numbers))
    assert found == {"mean": pytest.approx(numbers.var())}
    assert evaluate.baselines(Classification(2), source(inputs, numbers)) == {}
