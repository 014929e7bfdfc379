"""Runs the attribution methods on some inputs, each for its own answer."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from convnet.explaining import attribution, texts
from convnet.explaining.answers import Answers, Target
from convnet.explaining.network import Network

METHODS = tuple(texts.TITLES)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a method found for n inputs.

    Attributes:
      heat: float32 (n, *spatial); more is more important.
      signed: whether negative values speak against the answer.
      values: float32 (n, *spatial, c), by channel, of the methods that look at pixels.
      errors: of completeness, (n,), of integrated gradients.
      steps: of integrated gradients, (n,).
    """

    heat: np.ndarray
    signed: bool
    values: np.ndarray | None = None
    errors: np.ndarray | None = None
    steps: np.ndarray | None = None


class Study:
    """Inputs, the answer to explain for each, and the network that gave it.

    Args:
      network: compiled.
      answers: of the same model file.
      x: normalised, (n, *spatial, c).
      layer: the tap that class activation maps are made from.
    """

    def __init__(
        self, network: Network, answers: Answers, x: np.ndarray, layer: str
    ) -> None:
        self._network = network
        self._answers = answers
        self._x = x
        self._layer = layer

    def run(self, method: str, targets: Sequence[Target]) -> Finding:
        """Applies one of `METHODS` to every input, with a target for each."""
        directions = np.stack([target.direction for target in targets])
        if method in ("grad_cam", "grad_cam++"):
            return self._class_activation(method, directions)
        if method == "occlusion":
            return self._occlusion(targets)
        if method == "guided_backprop":
            rule = attribution.guided
            values = self._network.gradient(self._x, directions, rule)
            return Finding(np.abs(values).max(-1), False, values)

        def gradient(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return self._network.gradient(points, directions[rows])

        if method == "smooth_grad":
            values = attribution.smooth_grad(gradient, self._x)
            return Finding(np.abs(values).max(-1), False, values)
        if method != "integrated_gradients":
            raise ValueError(f"unknown method {method!r}: want one of {METHODS}")
        # The baseline is the mean of the data: a plain grey picture, a flat series.
        values, errors, steps = attribution.integrated_gradients(
            gradient,
            lambda points: _dot(self._network.logits(points), directions),
            self._x,
            np.zeros_like(self._x),
        )
        return Finding(values.sum(-1), True, values, errors, steps)

    def _class_activation(self, method: str, directions: np.ndarray) -> Finding:
        tap, gradient = self._network.at_tap(self._x, directions, self._layer)
        plus = method == "grad_cam++"
        rule = attribution.grad_cam_plus_plus if plus else attribution.grad_cam
        heat = attribution.upsample(rule(tap, gradient), self._x.shape[1:-1])
        return Finding(heat, False)

    def _occlusion(self, targets: Sequence[Target]) -> Finding:
        directions = np.stack([target.direction for target in targets])

        def answer(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
            logits = self._network.logits(points)
            if not self._answers.labels:
                return _dot(logits, directions[rows])
            classes = np.array([target.index[0] for target in targets])
            return self._answers.probabilities(logits)[
                np.arange(len(rows)), classes[rows]
            ]

        spatial = self._x.shape[1:-1]
        window, stride = attribution.occlusion_windows(spatial)
        heat = attribution.occlusion(answer, self._x, 0.0, window, stride)
        return Finding(heat, True)


def _dot(logits: np.ndarray, directions: np.ndarray) -> np.ndarray:
    return (logits * directions).reshape(len(logits), -1).sum(-1)
