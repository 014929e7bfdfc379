"""Tasks: what the logits mean, what they are compared with, and what is counted.

The trainer knows nothing else of the problem: a task turns labels into targets, logits
into per-example losses, metrics and predictions, all pure functions of arrays.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convnet import losses, resolve
from convnet.data import pipeline
from convnet.data.source import Dataset
from convnet.errors import ConvnetError, UsageError


class Task(abc.ABC):
    """What tasks have in common; each has `name`, `num_outputs` and the methods below.

    Attributes:
      of_inputs: the inputs themselves are the targets, as training sees them (in units
        of `step.to_unit`, before normalisation); labels are ignored.
      held: arrays that do not train, such as another network's weights. They are too
        large to be constants of what is compiled: it is given them.
    """

    name: str
    num_outputs: int
    of_inputs = False
    held: Any = ()

    def holding(self, held: Any) -> "Task":
        """Returns the task with these arrays, laid out like `held`, in their place."""
        del held
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells `held` from others, when a run is resumed."""
        return {}

    @abc.abstractmethod
    def target(self, labels: jax.Array) -> jax.Array:
        """Labels (b, ...) as they are stored -> float32 (b, ...)."""

    @abc.abstractmethod
    def loss(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        """What is minimised, (b,)."""

    @abc.abstractmethod
    def metrics(self, logits: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        """What is reported, each (b,); one of them is "loss"."""

    @abc.abstractmethod
    def predict(self, logits: jax.Array) -> jax.Array:
        """What the logits mean, (b, ...)."""


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """One of k classes: softmax cross-entropy. Labels are int (b,)."""

    num_outputs: int
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    name = "classification"

    def target(self, labels: jax.Array) -> jax.Array:
        """(b,) -> one-hot float32 (b, k)."""
        return jax.nn.one_hot(labels, self.num_outputs)

    def loss(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        """(b, k), (b, k) -> (b,), with smoothing and weights: what is minimised."""
        weights = jnp.asarray(self.class_weights) if self.class_weights else None
        return losses.cross_entropy(logits, target, self.label_smoothing, weights)

    def metrics(self, logits: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        """Returns the plain loss and the accuracy of each example, both (b,)."""
        right = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
        return {
            "loss": losses.cross_entropy(logits, target),
            "accuracy": right.astype(jnp.float32),
        }

    def predict(self, logits: jax.Array) -> jax.Array:
        """(b, k) -> probabilities float32 (b, k)."""
        return jax.nn.softmax(logits.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Binary(Task):
    """One probability: that of class number `positive`. Labels are int (b,)."""

    positive: int
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    num_outputs = 1
    name = "binary"

    def target(self, labels: jax.Array) -> jax.Array:
        """(b,) -> float32 (b,): 1 for the positive class."""
        return (labels == self.positive).astype(jnp.float32)

    def loss(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        """(b, 1), (b,) -> (b,), with smoothing and weights: what is minimised."""
        weights = jnp.asarray(self.class_weights) if self.class_weights else None
        return losses.binary_cross_entropy(
            logits[:, 0], target, self.label_smoothing, weights
        )

    def metrics(self, logits: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        """Returns the plain loss and the accuracy at 0.5 of each example, both (b,)."""
        right = (logits[:, 0] > 0) == (target > 0.5)
        return {
            "loss": losses.binary_cross_entropy(logits[:, 0], target),
            "accuracy": right.astype(jnp.float32),
        }

    def predict(self, logits: jax.Array) -> jax.Array:
        """(b, 1) -> probability of the positive class, float32 (b,)."""
        return jax.nn.sigmoid(logits[:, 0].astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Numbers, series or maps: squared error. Labels are float32 (b, *label_shape)."""

    label_shape: tuple[int, ...]
    name = "regression"

    @property
    def num_outputs(self) -> int:
        """Outputs of the last dense layer: the label's channels, 1 for a number."""
        return self.label_shape[-1] if self.label_shape else 1

    def target(self, labels: jax.Array) -> jax.Array:
        """Returns the labels as they are."""
        return labels

    def loss(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        """(b, *shape), (b, *shape) -> (b,)."""
        return losses.squared_error(self.predict(logits), target)

    def metrics(self, logits: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        """Returns the squared error of each example, (b,)."""
        return {"loss": self.loss(logits, target)}

    def predict(self, logits: jax.Array) -> jax.Array:
        """Returns the outputs in the label's shape, float32 (b, *label_shape).

        Raises:
          ValueError: the model's output has another shape than the labels.
        """
        wanted = (logits.shape[0], *self.label_shape)
        if logits.shape != wanted and logits.shape != (*wanted, 1):
            raise ValueError(
                f"the model puts out {logits.shape[1:]}, the labels are"
                f" {self.label_shape}: see model.gather"
            )
        return logits.reshape(wanted).astype(jnp.float32)


def create(config: ml_collections.ConfigDict, dataset: Dataset) -> Task:
    """Returns the task that config.task names, for the classes or labels of the data.

    Raises:
      UsageError: a key of config.task does not fit the data's classes.
      ConvnetError: the data's labels are of the wrong kind.
    """
    settings = config.task
    if (settings.name == "style") != (config.model.name == "stylenet"):
        raise UsageError(
            f"task.name is {settings.name!r} and model.name {config.model.name!r}: a"
            " style is learnt by a 'stylenet', and nothing else is"
        )
    if settings.name == "style":
        from convnet.style import task as style  # it brings model files up

        return style.create(config, pipeline.first(dataset.train)["input"])
    wants_classes = settings.name != "regression"
    if wants_classes != bool(dataset.classes):
        kind = "classes" if dataset.classes else "numbers"
        raise UsageError(
            f"task.name is {settings.name!r}, but the labels of data.name ="
            f" {config.data.name!r} are {kind}"
        )
    if not wants_classes:
        return Regression(np.shape(pipeline.first(dataset.train)["label"]))
    classes = dataset.classes
    if len(classes) < 2:
        raise ConvnetError(f"{config.data.dir}: one class {classes}; want two or more")
    common = {
        "label_smoothing": settings.label_smoothing,
        "class_weights": tuple(settings.class_weights),
    }
    count = len(classes)
    if settings.name == "binary":
        count = 2
        if settings.positive not in classes:
            near = resolve.nearest(settings.positive, classes)
            raise UsageError(
                f"task.positive is {settings.positive!r}: want one of"
                f" {', '.join(classes)}{near}"
            )
    if settings.class_weights and len(settings.class_weights) != count:
        raise UsageError(
            f"task.class_weights has {len(settings.class_weights)} numbers, but there"
            f" are {count} classes"
        )
    if settings.name == "binary":
        positive = classes.index(settings.positive)
        if len(classes) == 2 and common["class_weights"]:
            # From the order of the classes to (negative, positive).
            weights = common["class_weights"]
            common["class_weights"] = (weights[1 - positive], weights[positive])
        return Binary(positive, **common)
    return Classification(count, **common)
