"""What an evaluation says of predictions that are made up here."""

import numpy as np
import pytest

from convnet import config as config_lib
from convnet import evaluate, prepare
from convnet.data.source import ArraySource
from convnet.errors import UsageError
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


# Views.

READABLE = np.array([i not in (2, 11) for i in range(21)])


class Split:
    """21 examples, two of which cannot be read."""

    examples, data = 21, {}

    def batches(self, order, start, stop):
        for step in range(start, stop):
            yield order(step)


def predict_with(tables, seen):
    """A predict step that looks up its answers, and notes what it was asked."""

    def predict(variables, data, batch, views="none"):
        index, weight = batch["index"], batch["weight"] * READABLE[batch["index"]]
        assert len(index) == 8  # what was compiled
        seen.append((views, index[weight > 0].tolist()))
        prediction = tables[views][index]
        loss = prediction.reshape(len(index), -1).sum(1)
        return {
            "index": index,
            "prediction": prediction,
            "label": index * 10,
            "weight": weight,
            "loss": loss,
        }

    return predict


def views_of(tables, views, below=1.0):
    config = config_lib.default()
    config.data.batch_size = 8
    config.evaluate.tta, config.evaluate.tta_below = views, below
    seen = []
    predict = predict_with(tables, seen)
    found = evaluate.predict_views(predict, None, Split(), config)
    again = [index for name, part in seen if name == views != "none" for index in part]
    once = [index for name, part in seen if name == "none" for index in part]
    # Every readable example exactly once, in the order of the data.
    assert once == found["index"].tolist() == np.flatnonzero(READABLE).tolist()
    np.testing.assert_array_equal(found["label"], found["index"] * 10)
    return found, again


@pytest.fixture
def tables():
    """Two classes; the first has 0.5 to 0.9 without views, and less than 0.1 with."""
    rng = np.random.default_rng(0)
    plain = rng.uniform(0.5, 0.9, 21)
    plain[5] = 0.75
    plain[6], plain[7] = 0.8, 0.7
    flipped = rng.uniform(0.0, 0.1, 21)
    return {
        name: np.stack([p, 1 - p], 1).astype(np.float32)
        for name, p in (("none", plain), ("flip", flipped))
    }


def test_without_views_there_is_one_pass(tables):
    found, again = views_of(tables, "none", below=0.5)
    assert again == []
    np.testing.assert_array_equal(found["prediction"], tables["none"][READABLE])


def test_views_of_every_example(tables):
    found, again = views_of(tables, "flip")
    assert again == found["index"].tolist()
    np.testing.assert_array_equal(found["prediction"], tables["flip"][READABLE])
    np.testing.assert_array_equal(found["loss"], tables["flip"][READABLE].sum(1))


@pytest.mark.parametrize("binary", [False, True])
def test_views_of_the_unsure_alone(tables, binary):
    if binary:  # the probability of one of two: 0.1 is as sure as 0.9
        tables = {name: table[:, 1] for name, table in tables.items()}
    found, again = views_of(tables, "flip", below=0.75)
    most = tables["none"].reshape(21, -1)
    most = np.maximum(most[:, 0], 1 - most[:, 0])
    unsure = most <= 0.75
    assert unsure[[5, 7]].all() and not unsure[6]
    assert 3 < (unsure & READABLE).sum() < 16
    assert again == np.flatnonzero(unsure & READABLE).tolist()
    shape = (21,) if binary else (21, 1)
    want = np.where(unsure.reshape(shape), tables["flip"], tables["none"])
    np.testing.assert_array_equal(found["prediction"], want[READABLE])


def test_no_second_pass_where_all_are_sure(tables):
    found, again = views_of(tables, "flip", below=0.4)
    assert again == []
    np.testing.assert_array_equal(found["prediction"], tables["none"][READABLE])


@pytest.mark.parametrize(
    ("shape", "views", "message"),
    [
        ((3, 4, 5, 1), "flip", r"a map of shape \(4, 5, 1\)"),
        ((1, 6, 1), "flip_translate", r"moves inputs by a pixel, .*\(1, 6, 1\)"),
    ],
)
def test_views_that_cannot_be_are_refused_before_the_run(
    shape, views, message, tmp_path
):
    x = np.zeros((8, *shape), np.float32)
    y = x[:, -1] if len(shape) > 3 else np.arange(8.0, dtype=np.float32)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    np.savez(tmp_path / "data.npz", **arrays)
    config = config_lib.default()
    config.data.name, config.data.dir = "arrays", str(tmp_path / "data.npz")
    config.data.batch_size = 4
    config.task.name = "regression"
    config.model.update(widths=(2,), depth=1, pool="none")
    config.model.gather = "time" if len(shape) > 3 else "global"
    config.evaluate.tta = views
    with pytest.raises(UsageError, match=message):
        prepare.prepare(config)
    config.evaluate.tta = "none"
    prepare.prepare(config)
