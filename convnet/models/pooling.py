"""Pooling: the one place where it lives.

All take arrays `(b, *spatial, c)` with one to four spatial axes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnet.models import fused, lowering

Array = jax.Array


def max_pool(
    x: Array,
    window: int,
    stride: int | None = None,
    padding: int = 0,
    ceil: bool = False,
) -> Array:
    """The largest value in each window of `window` per axis; padding never wins.

    `stride` is the window's size unless given. What does not fill a window at the end
    of an axis is dropped, here and in the other pools; with `ceil` it is a window of
    its own. The gradient goes to the first of equals.
    """
    _check_fits(x, window, padding)
    stride = stride or window
    if ceil:
        # As many places as PyTorch has: no window begins beyond the end.
        places = [
            min(-(-(n + 2 * padding - window) // stride), (n + padding - 1) // stride)
            for n in x.shape[1:-1]
        ]
        ends = [
            max(place * stride + window - n - padding, 0)
            for place, n in zip(places, x.shape[1:-1], strict=True)
        ]
        return _reduce_window(x, -np.inf, lax.max, window, stride, padding, ends)
    if stride == window and padding == 0 and not lowering.is_plain():
        return fused.max_pool(x, window)
    return _reduce_window(x, -np.inf, lax.max, window, stride, padding)


def average_pool(
    x: Array,
    window: int,
    stride: int | None = None,
    padding: int = 0,
    count_padding: bool = True,
) -> Array:
    """The mean of each window; see `max_pool`.

    The zeros of the padding count, as in PyTorch; without `count_padding` the mean is
    over the values of the map alone, as in Keras.
    """
    _check_fits(x, window, padding)
    y = x.astype(jnp.float32)
    if stride in (None, window) and padding == 0:
        tiles, within = _tiles(y, window)
        y = jnp.mean(tiles, within)
    else:
        sums = partial(_reduce_window, start=0.0, op=lax.add)
        sums = partial(sums, window=window, stride=stride or window, padding=padding)
        count = window ** (x.ndim - 2)
        if padding and not count_padding:
            count = sums(jnp.ones((1, *x.shape[1:-1], 1), y.dtype))
        y = sums(y) / count
    return y.astype(x.dtype)


def l2_pool(
    x: Array, window: int, stride: int | None = None, padding: int = 0
) -> Array:
    """The root of the mean square of each window, with gradient 0 at 0."""
    square = average_pool(jnp.square(x.astype(jnp.float32)), window, stride, padding)
    # Both sides of a `where` are differentiated: the root must not see the zero.
    some = square > 0
    root = jnp.sqrt(jnp.where(some, square, 1.0))
    return jnp.where(some, root, 0.0).astype(x.dtype)


POOLS = {"max": max_pool, "average": average_pool, "l2": l2_pool}


def _check_fits(x: Array, window: int, padding: int) -> None:
    if min(x.shape[1:-1]) + 2 * padding < window:
        raise ValueError(
            f"a map of {'x'.join(map(str, x.shape[1:-1]))} is too small for a pool with"
            f" windows of {window}: use larger inputs, fewer blocks, or no pooling"
        )


def _tiles(x: Array, window: int) -> tuple[Array, tuple[int, ...]]:
    """`x` with each spatial axis split into places and window; the window's axes."""
    spatial = x.shape[1:-1]
    places = [n // window for n in spatial]
    if any(n % window for n in spatial):
        x = x[(slice(None), *(slice(p * window) for p in places))]
    split = [n for p in places for n in (p, window)]
    within = tuple(range(2, 2 * len(places) + 1, 2))
    return x.reshape(x.shape[0], *split, x.shape[-1]), within


def _reduce_window(
    x: Array,
    start: float,
    op: Callable,
    window: int,
    stride: int,
    padding: int,
    ends: Sequence[int] = (),
) -> Array:
    rank = x.ndim - 2
    size, steps = (1, *[window] * rank, 1), (1, *[stride] * rank, 1)
    pads = [(0, 0), *((padding, end) for end in ends or [padding] * rank), (0, 0)]
    # A NumPy scalar of the array's dtype: with any other, lax does not see which
    # operation this is, and cannot differentiate it.
    return lax.reduce_window(x, np.array(start, x.dtype), op, size, steps, pads)


def global_average(x: Array) -> Array:
    """The mean over all spatial axes, `(b, *spatial, c) -> (b, c)`."""
    axes = tuple(range(1, x.ndim - 1))
    return jnp.mean(x.astype(jnp.float32), axes).astype(x.dtype)


def gather(x: Array, how: str) -> Array:
    """Makes features for the head out of the last map `(b, *spatial, c)`.

    "flatten": `(b, prod(spatial) * c)`. "global": `(b, c)`, the mean over all places.
    "time": `(b, *spatial[1:], spatial[0] * c)`, all steps of the first axis side by
    side at each place, so that the head forecasts a map from a series of maps.
    """
    if how == "global":
        return global_average(x)
    if how == "time":
        x = jnp.moveaxis(x, 1, -2)
        return x.reshape(*x.shape[:-2], -1)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
