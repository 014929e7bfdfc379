"""Tasks against NumPy, and which task a config makes."""

import numpy as np
import pytest
from scipy import special

from convnet import config as config_lib
from convnet import task as task_lib
from convnet.data.source import ArraySource, Dataset
from convnet.errors import ConvnetError, UsageError
from convnet.task import Binary, Classification, Regression

PETS = ("cat", "dog", "horse")


def dataset(classes=PETS, label_shape=()):
    dtype = np.float32 if not classes else np.int32
    labels = np.zeros((4, *label_shape), dtype)
    source = ArraySource(np.zeros((4, 2, 2, 1), np.uint8), labels, "train")
    return Dataset(source, source, classes)


def create(data, **changes):
    config = config_lib.default()
    for name, value in changes.items():
        config.task[name] = value
    return task_lib.create(config, data)


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(0)


# Classification.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 3.0)])
def test_classification(random, smoothing, weights):
    task = Classification(3, smoothing, weights)
    logits = random.normal(size=(5, 3)).astype(np.float32) * 3
    labels = np.array([0, 1, 2, 2, 1], np.int32)
    target = np.asarray(task.target(labels))
    np.testing.assert_array_equal(target, np.eye(3, dtype=np.float32)[labels])
    log_p = special.log_softmax(logits.astype(np.float64), axis=1)
    smooth = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    want = -(smooth * log_p).sum(1) * np.array(weights or (1, 1, 1))[labels]
    np.testing.assert_allclose(task.loss(logits, target), want, rtol=1e-5)
    metrics = task.metrics(logits, target)
    # Metrics are comparable between recipes: neither smoothing nor weights.
    plain = -log_p[np.arange(5), labels]
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(1) == labels)
    np.testing.assert_allclose(task.predict(logits), np.exp(log_p), rtol=1e-5)
    assert task.num_outputs == 3


def test_classification_of_mixed_targets(random):
    task = Classification(3, 0.0, (1.0, 2.0, 4.0))
    logits = random.normal(size=(2, 3)).astype(np.float32)
    target = np.array([[0.25, 0.75, 0], [0, 0.5, 0.5]], np.float32)
    log_p = special.log_softmax(logits.astype(np.float64), axis=1)
    want = -(target * log_p).sum(1) * (target @ [1.0, 2.0, 4.0])
    np.testing.assert_allclose(task.loss(logits, target), want, rtol=1e-5)
    right = logits.argmax(1) == [1, 1]
    np.testing.assert_array_equal(task.metrics(logits, target)["accuracy"], right)


# Binary.


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (0.5, 3.0)])
def test_binary(random, smoothing, weights):
    task = Binary(2, smoothing, weights)
    logits = random.normal(size=(6, 1)).astype(np.float32) * 2
    labels = np.array([2, 0, 1, 2, 2, 0], np.int32)
    positive = labels == 2
    target = np.asarray(task.target(labels))
    np.testing.assert_array_equal(target, positive.astype(np.float32))
    p = special.expit(logits[:, 0].astype(np.float64))
    smooth = (1 - smoothing) * positive + smoothing / 2
    want = -smooth * np.log(p) - (1 - smooth) * np.log(1 - p)
    want *= np.where(positive, *(weights or (1.0, 1.0))[::-1])
    np.testing.assert_allclose(task.loss(logits, target), want, rtol=1e-5)
    metrics = task.metrics(logits, target)
    plain = -np.log(np.where(positive, p, 1 - p))
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], (p > 0.5) == positive)
    np.testing.assert_allclose(task.predict(logits), p, rtol=1e-5)
    assert task.num_outputs == 1


# Regression.


@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (4, 1)])
def test_regression(random, shape):
    task = create(dataset((), shape), name="regression")
    assert task == Regression(shape)
    assert task.num_outputs == (shape[-1] if shape else 1)
    logits = random.normal(size=(5, *shape)).astype(np.float32)
    labels = random.normal(size=(5, *shape)).astype(np.float32)
    target = np.asarray(task.target(labels))
    np.testing.assert_array_equal(target, labels)
    want = ((logits.astype(np.float64) - labels) ** 2).reshape(5, -1).mean(1)
    # The last dense layer of a number, or a map of one channel, has an axis more.
    for outputs in (logits, logits[..., None]):
        np.testing.assert_allclose(task.loss(outputs, target), want, rtol=1e-5)
        np.testing.assert_array_equal(task.predict(outputs), logits)
        metrics = task.metrics(outputs, target)
        assert list(metrics) == ["loss"]
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("label_shape", "outputs"),
    [((4, 2), (5, 8)), ((4, 2), (5, 2, 4)), ((), (5, 2)), ((3,), (5, 1))],
)
def test_regression_refuses_outputs_of_another_shape(label_shape, outputs):
    task = Regression(label_shape)
    with pytest.raises(ValueError) as error:
        task.loss(np.zeros(outputs, np.float32), np.zeros((5, *label_shape)))
    message = str(error.value)
    assert str(outputs[1:]) in message and str(label_shape) in message
    assert "model.gather" in message


# Which task a config makes.


def test_create():
    assert create(dataset()) == Classification(3, 0.0, ())
    assert create(
        dataset(), label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0)
    ) == Classification(3, 0.1, (1.0, 2.0, 3.0))
    # One against all others: the data may have more than two classes.
    assert create(
        dataset(), name="binary", positive="dog", class_weights=(1.0, 2.0)
    ) == Binary(1, 0.0, (1.0, 2.0))


@pytest.mark.parametrize(("positive", "near"), [("Cat", "'cat'"), ("hrose", "'horse'")])
def test_an_unknown_positive_class_is_refused_with_the_nearest(positive, near):
    with pytest.raises(UsageError) as error:
        create(dataset(), name="binary", positive=positive)
    message = str(error.value)
    assert f"task.positive is {positive!r}" in message
    assert f"did you mean {near}?" in message
    assert all(name in message for name in PETS)


def test_a_positive_class_left_open_lists_the_classes():
    with pytest.raises(UsageError, match="task.positive is ''.*cat, dog, horse"):
        create(dataset(), name="binary")


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"class_weights": (1.0, 2.0)}, 3),
        ({"class_weights": (1.0, 2.0, 3.0), "name": "binary", "positive": "cat"}, 2),
    ],
)
def test_a_wrong_number_of_class_weights(changes, count):
    with pytest.raises(UsageError) as error:
        create(dataset(), **changes)
    weights = len(changes["class_weights"])
    assert f"task.class_weights has {weights} numbers" in str(error.value)
    assert f"are {count} classes" in str(error.value)


@pytest.mark.parametrize(
    ("name", "classes", "kind"),
    [
        ("regression", PETS, "classes"),
        ("classification", (), "numbers"),
        ("binary", (), "numbers"),
    ],
)
def test_labels_of_the_wrong_kind(name, classes, kind):
    with pytest.raises(UsageError) as error:
        create(dataset(classes), name=name)
    message = str(error.value)
    assert f"task.name is {name!r}" in message and f"are {kind}" in message
    assert "'digits'" in message


def test_a_style_wants_its_network_and_its_pictures():
    with pytest.raises(UsageError, match="task.name is 'style' and model.name 'cnn'"):
        create(dataset(), name="style")
    config = config_lib.default()
    config.task.name, config.model.name = "style", "stylenet"
    for name, value in (("style_image", "a.png"), ("features", "cifar10")):
        with pytest.raises(UsageError, match=f"task.{name} is ''"):
            task_lib.create(config, dataset())
        config.task[name] = value
    with pytest.raises(ConvnetError, match=r"uint8 \[2, 2, 1\]: want RGB pictures"):
        task_lib.create(config, dataset())


def test_one_class_is_not_enough():
    with pytest.raises(ConvnetError, match="one class .*'cat'"):
        create(dataset(("cat",)))
