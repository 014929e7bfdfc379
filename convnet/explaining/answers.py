"""What a network answers, and which answer is explained."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from convnet.bundle import Bundle
from convnet.errors import UsageError
from convnet.predict import class_names
from convnet.resolve import nearest


@dataclasses.dataclass(frozen=True)
class Target:
    """One answer to explain: its name, and the direction (*outputs,) of its score.

    The score is the sum of logits * direction: a class's logit, or one output.
    `index` is the class's place among the labels, or the output's in the prediction.
    """

    label: str
    direction: np.ndarray
    index: tuple[int, ...]


class Answers:
    """The answers of a model file's network, whose logits have the shape `outputs`.

    Attributes:
      labels: the classes; of a binary model (negative, positive); () for numbers.
    """

    def __init__(self, bundle: Bundle, outputs: Sequence[int]) -> None:
        self._outputs = tuple(outputs)
        self._binary = bundle.task["name"] == "binary"
        self.labels = class_names(bundle.classes, bundle.task["positive"])

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits (n, *outputs) -> (n, labels), float64."""
        logits = np.asarray(logits, np.float64)
        if self._binary:
            logits = np.concatenate([np.zeros_like(logits), logits], -1)
        power = np.exp(logits - logits.max(-1, keepdims=True))
        return power / power.sum(-1, keepdims=True)

    def target(self, index: Sequence[int]) -> Target:
        """Returns a class by its place among the labels, or an output by its own."""
        index = tuple(index)
        if self._binary:
            sign = 1.0 if index == (1,) else -1.0
            direction = np.full(self._outputs, sign, np.float32)
            return Target(self.labels[index[0]], direction, index)
        direction = np.zeros(self._outputs, np.float32)
        direction[index] = 1
        if self.labels:
            return Target(self.labels[index[0]], direction, index)
        place = index[:-1] if len(index) > 1 and self._outputs[-1] == 1 else index
        what = "place" if len(index) > 1 else "output"
        return Target(f"{what} {', '.join(map(str, place))}", direction, index)

    def strongest(self, logits: np.ndarray) -> tuple[int, ...]:
        """Returns the most probable class, or the output with the largest size.

        Args:
          logits: of one input, (*outputs,).
        """
        if self.labels:
            return (int(self.probabilities(logits[None])[0].argmax()),)
        flat = int(np.abs(logits).argmax())
        return tuple(int(i) for i in np.unravel_index(flat, self._outputs))

    def named(self, name: str) -> tuple[int, ...]:
        """Returns the place of a class.

        Raises:
          UsageError: there is none of this name; names the nearest.
        """
        if not self.labels:
            raise UsageError(
                f"--class={name}: the model puts out numbers, it knows no classes;"
                " --at names an output"
            )
        if name not in self.labels:
            hint = nearest(name, self.labels) or "; it knows " + _some(self.labels)
            raise UsageError(f"--class={name}: the model knows no such class{hint}")
        return (self.labels.index(name),)

    def placed(self, text: str) -> tuple[int, ...]:
        """Returns the output that "3" or "12,20" names; a last axis of one is implied.

        Raises:
          UsageError: it names none.
        """
        if self.labels:
            raise UsageError(
                f"--at={text}: names an output of a model of numbers, and this one"
                " knows classes; use --class"
            )
        shape = "x".join(map(str, self._outputs))
        try:
            index = tuple(int(part) for part in text.split(","))
            if len(index) == len(self._outputs) - 1 and self._outputs[-1] == 1:
                index += (0,)
            # NumPy takes negative numbers and fewer of them.
            if len(index) != len(self._outputs) or min(index) < 0:
                raise IndexError
            np.empty(self._outputs, bool)[index]
        except (ValueError, IndexError) as error:
            raise UsageError(
                f"--at={text}: want an output of {shape}, such as"
                f" --at={','.join(str(side // 2) for side in self._outputs)}"
            ) from error
        return index


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
