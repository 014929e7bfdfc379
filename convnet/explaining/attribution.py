"""Which part of an input spoke for an answer: attribution methods.

Inputs `x` are normalised, float32 (n, *spatial, c), with any number of spatial axes.
`gradient(x, rows)` is the gradient of a score with respect to `x`, of its shape, where
`rows` (m,) says which example each of the m inputs belongs to.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convnet.explaining import layers

Gradient = Callable[[np.ndarray, np.ndarray], np.ndarray]
_STEPS = 32  # of the first try of integrated gradients
_MOST_STEPS = 1024
# By the number of axes: a window's share of a side, and strides in a window. One axis
# is cheap, four are dear.
_WINDOWS = {1: (6, 4), 2: (6, 2), 3: (8, 2), 4: (4, 1)}
_NUMBERS = 1 << 24  # in the inputs made at once, to bound memory


def grad_cam(activations: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Selvaraju et al. 2017, "Grad-CAM", arXiv:1610.02391.

    Args:
      activations: a feature map (n, *places, c).
      gradients: of the score with respect to it, of the same shape.

    Returns:
      (n, *places), at least 0: the channels' sum, each weighted with the mean of its
      gradient over all places, where it is positive.
    """
    weights = gradients.mean(_places(activations), keepdims=True)
    return np.maximum((weights * activations).sum(-1), 0)


def grad_cam_plus_plus(activations: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Chattopadhay et al. 2018, "Grad-CAM++", arXiv:1710.11063; see `grad_cam`.

    Equation 19, for which the score passes an exponential: its derivative is one factor
    for the whole map, and left out. Several objects, and parts of one, count alike.
    """
    axes = _places(activations)
    square = np.square(gradients)
    total = activations.sum(axes, keepdims=True)
    divisor = 2 * square + total * square * gradients
    safe = np.where(divisor == 0, 1, divisor)
    alpha = np.where(divisor == 0, 0, square / safe)
    weights = (alpha * np.maximum(gradients, 0)).sum(axes, keepdims=True)
    return np.maximum((weights * activations).sum(-1), 0)


def _places(maps: np.ndarray) -> tuple[int, ...]:
    return tuple(range(1, maps.ndim - 1))


def upsample(maps: np.ndarray, spatial: Sequence[int]) -> np.ndarray:
    """Interpolates maps (n, *places) linearly to (n, *spatial), centres on centres."""
    shape = (len(maps), *spatial)
    return np.asarray(jax.image.resize(jnp.asarray(maps), shape, "linear"))


def guided(path: str, x: jax.Array) -> jax.Array:
    """The rule of guided back-propagation, for `Network.gradient`.

    Springenberg et al. 2014, "Striving for simplicity", arXiv:1412.6806: behind each
    activation the gradient passes only where both it and the activation are positive.
    For a ReLU that is theirs; for a smooth activation it is what comes nearest.
    """
    return _only_positive(x) if layers.kind(path) == "activation" else x


@jax.custom_vjp
def _only_positive(x: jax.Array) -> jax.Array:
    return x


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


def _backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((x > 0) & (gradient > 0), gradient, 0),)


_only_positive.defvjp(_forward, _backward)


def integrated_gradients(
    gradient: Gradient,
    score: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    baseline: np.ndarray,
    tolerance: float = 0.005,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sundararajan, Taly and Yan 2017, arXiv:1703.01365.

    The gradient is averaged along the straight line from `baseline` to `x`, at the
    middles of equal steps, whose number doubles for the inputs whose attributions are
    not complete yet.

    Args:
      gradient: see above.
      score: of n inputs, one for each example: (n,).
      x: inputs.
      baseline: the input that says nothing, of the shape of `x` or broadcast to it.
      tolerance: the largest error of completeness to stop at.

    Returns:
      Attributions of the shape of `x`; the error of completeness (n,), by how much
      their sum misses score(x) - score(baseline), relative to it; the steps (n,).
    """
    baseline = np.broadcast_to(baseline, x.shape)
    wanted = score(x) - score(baseline)
    found = np.zeros(x.shape, np.float32)
    error, taken = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
    steps, left = _STEPS, np.arange(len(x))
    while len(left) and steps <= _MOST_STEPS:
        path = x[left] - baseline[left]
        mean = _mean_along(gradient, baseline[left], path, left, steps)
        found[left] = path * mean
        missed = np.abs((path * mean).reshape(len(left), -1).sum(1) - wanted[left])
        error[left] = missed / np.maximum(np.abs(wanted[left]), 1e-6)
        taken[left] = steps
        steps, left = 2 * steps, left[error[left] > tolerance]
    return found, error, taken


def _mean_along(
    gradient: Gradient,
    start: np.ndarray,
    path: np.ndarray,
    rows: np.ndarray,
    steps: int,
) -> np.ndarray:
    """The mean gradient on the way from `start` to `start + path`, in float64."""
    total = np.zeros(start.shape, np.float64)
    at_once = max(1, _NUMBERS // start.size)
    for first in range(0, steps, at_once):
        places = (np.arange(first, min(first + at_once, steps)) + 0.5) / steps
        places = places.astype(np.float32).reshape(-1, *[1] * start.ndim)
        points = (start + places * path).reshape(-1, *start.shape[1:])
        slopes = gradient(points, np.tile(rows, len(places)))
        total += slopes.reshape(len(places), *start.shape).sum(0, dtype=np.float64)
    return total / steps


def smooth_grad(
    gradient: Gradient,
    x: np.ndarray,
    noise: float = 0.15,
    samples: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """Smilkov et al. 2017, "SmoothGrad", arXiv:1706.03825.

    The mean gradient over `samples` copies of each input with Gaussian noise, whose
    standard deviation is `noise` times the input's own range. Of the shape of `x`.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(x.shape, np.float64)
    axes = tuple(range(1, x.ndim))
    scale = noise * (x.max(axes, keepdims=True) - x.min(axes, keepdims=True))
    at_once = max(1, _NUMBERS // x.size)
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        draws = rng.standard_normal((count, *x.shape), np.float32)
        points = (x + scale * draws).reshape(-1, *x.shape[1:])
        slopes = gradient(points, np.tile(np.arange(len(x)), count))
        total += slopes.reshape(count, *x.shape).sum(0, dtype=np.float64)
    return (total / samples).astype(np.float32)


def occlusion(
    answer: Callable[[np.ndarray, np.ndarray], np.ndarray],
    x: np.ndarray,
    fill: np.ndarray | float,
    window: Sequence[int],
    stride: Sequence[int],
) -> np.ndarray:
    """Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2.

    Args:
      answer: `answer(inputs, rows)` (m,) of m inputs; see `gradient` above.
      x: inputs.
      fill: what a window is covered with, broadcast to (*window, c).
      window: places a side.
      stride: from one window to the next; there is always one at each end.

    Returns:
      (n, *spatial): by how much covering a place lowers the answer, the mean over all
      windows that cover it.
    """
    spatial = x.shape[1:-1]
    boxes = list(windows(spatial, window, stride))
    whole = answer(x, np.arange(len(x)))
    total, count = np.zeros(x.shape[:-1]), np.zeros(spatial)
    at_once = max(1, _NUMBERS // x.size)
    for first in range(0, len(boxes), at_once):
        part = boxes[first : first + at_once]
        points = np.tile(x, (len(part), *[1] * (x.ndim - 1)))
        points = points.reshape(len(part), *x.shape)
        for covered, box in zip(points, part, strict=True):
            covered[(slice(None), *box)] = fill
        rows = np.tile(np.arange(len(x)), len(part))
        answers = answer(points.reshape(-1, *x.shape[1:]), rows)
        for drop, box in zip(whole - answers.reshape(len(part), -1), part, strict=True):
            total[(slice(None), *box)] += drop.reshape(-1, *[1] * len(spatial))
            count[box] += 1
    return (total / count).astype(np.float32)


def windows(
    spatial: Sequence[int], window: Sequence[int], stride: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Yields boxes of `window` places, `stride` apart, that cover all of `spatial`."""
    starts = []
    for side, size, step in zip(spatial, window, stride, strict=True):
        last = max(side - size, 0)
        starts.append([*range(0, last, step), last])
    for corner in itertools.product(*starts):
        yield tuple(slice(i, i + k) for i, k in zip(corner, window, strict=True))


def occlusion_windows(
    spatial: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns window and stride that suit a network's input: about a sixth of it."""
    share, parts = _WINDOWS[len(spatial)]
    window = tuple(max(1, round(side / share)) for side in spatial)
    return window, tuple(max(1, math.ceil(size / parts)) for size in window)
