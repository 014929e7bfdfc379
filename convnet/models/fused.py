"""Normalisation, activation and pooling with backward passes of their own.

Automatic differentiation keeps several arrays of the size of the map for each of them,
and the step's time beside its convolutions goes into moving those. Here the backward
pass starts from what the forward pass was given. Values and gradients are those of the
plain forms, up to rounding.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnet.models import lowering

ACTIVATIONS = ("none", "relu", "relu6", "gelu")

_ROOT = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def activate(x: jax.Array, activation: str) -> jax.Array:
    """Returns `x` (float32) after one of `ACTIVATIONS`; "gelu" is its tanh form."""
    if activation == "relu":
        return jnp.maximum(x, 0)
    if activation == "relu6":
        return jnp.clip(x, 0, 6)
    if activation == "gelu":
        return 0.5 * x * (1 + jnp.tanh(_ROOT * (x + _CUBE * x * x * x)))
    return x


def _slope(x: jax.Array, activation: str) -> jax.Array:
    if activation == "relu":
        return (x > 0).astype(x.dtype)
    if activation == "relu6":
        return ((x > 0) & (x < 6)).astype(x.dtype)
    t = jnp.tanh(_ROOT * (x + _CUBE * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _ROOT * (1 + 3 * _CUBE * x * x)


def _hold(values: Any) -> Any:
    """On a CPU: the values, each computed once and kept, before what reads them.

    A pass that reads what another reads would otherwise share with it a float32 copy,
    and one that reads a fused result would compute that again.
    """
    return lax.optimization_barrier(values) if lowering.on("cpu") else values


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Hendrycks and Gimpel 2016, arXiv:1606.08415, in the form with tanh."""
    return activate(x.astype(jnp.float32), "gelu").astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # One axis: XLA's vectors would not fill rows of 24 channels.
    flat, gradient = _hold((x.reshape(len(x), -1), gradient.reshape(len(x), -1)))
    slope = _slope(flat.astype(jnp.float32), "gelu")
    by_x = (gradient.astype(jnp.float32) * slope).astype(x.dtype).reshape(x.shape)
    # Else it is computed again within the sum for the bias before it, and slowly.
    return (lax.optimization_barrier(by_x),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds float32 `bias` (c,) to `y` (..., c), in the dtype of `y`.

    The gradient of the bias is summed in float32.
    """
    return y + bias.astype(y.dtype)


def _bias_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gradient = _hold(gradient)
    axes = tuple(range(gradient.ndim - 1))
    return gradient, gradient.astype(jnp.float32).sum(axes)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), None), _bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, activation: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation in training, and the activation that follows it.

    Args:
      x: (..., c), of any float dtype; the statistics are computed in float32.
      scale, bias: float32 (c,).
      epsilon: added to the variance.
      activation: one of `ACTIVATIONS`.

    Returns:
      The result in the dtype of `x`; mean and biased variance, float32 (c,), through
      which no gradient passes.
    """
    return _norm_forward(x, scale, bias, epsilon, activation)[0]


def _norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, activation: str
) -> tuple:
    axes, wide = tuple(range(x.ndim - 1)), jnp.float32
    x = _hold(x)
    mean = jnp.mean(x.astype(wide), axes)
    x, mean = _hold((x, mean))
    # Not mean(x^2) - mean(x)^2, which loses all digits where the mean is large.
    variance = jnp.mean(jnp.square(x.astype(wide) - mean), axes)
    root = lax.rsqrt(variance + epsilon)
    x, mean, root = _hold((x, mean, root))
    y = activate((x.astype(wide) - mean) * (root * scale) + bias, activation)
    return (y.astype(x.dtype), mean, variance), (x, mean, root, scale, bias)


def _norm_backward(
    epsilon: float, activation: str, saved: tuple, gradients: tuple
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del epsilon
    x, mean, root, scale, bias = saved
    axes, wide = tuple(range(x.ndim - 1)), jnp.float32
    count = x.size // x.shape[-1]
    x, g, mean, factor = _hold((x, gradients[0], mean, root * scale))
    if activation != "none":
        slope = _slope((x.astype(wide) - mean) * factor + bias, activation)
        g = g.astype(wide) * slope
        if lowering.on("cpu"):
            # Kept, as the map is: a tanh costs more than a pass.
            g = g.astype(x.dtype)
    x, g, mean = _hold((x, g, mean))
    by_bias = g.astype(wide).sum(axes)
    x, g, mean, by_bias = _hold((x, g, mean, by_bias))
    by_scale = (g.astype(wide) * (x.astype(wide) - mean)).sum(axes) * root
    x, g, mean, by_bias, by_scale = _hold((x, g, mean, by_bias, by_scale))
    off = (x.astype(wide) - mean) * (root * by_scale / count)
    by_x = factor * (g.astype(wide) - by_bias / count - off)
    return by_x.astype(x.dtype), by_scale, by_bias


batch_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, window: int) -> jax.Array:
    """The largest value of each tile of `window` per axis of `x` (b, *spatial, c).

    What does not fill a tile is dropped. The gradient goes to the first of equals. On a
    CPU a bfloat16 NaN counts as beyond the infinity of its sign.
    """
    return _pool_forward(x, window)[0]


def _pool_forward(x: jax.Array, window: int) -> tuple[jax.Array, tuple]:
    kind = np.min_scalar_type(window ** (x.ndim - 2) - 1)
    # XLA compares bfloat16 in float32, with a conversion there and back. As integers
    # ConvNetJS's network goes through 28,900 images/s instead of 22,200.
    integers = x.dtype == jnp.bfloat16 and lowering.on("cpu")
    y, which = None, None
    for number, place in enumerate(_offsets(x.ndim - 2, window)):
        part = x[_tile(x.shape, window, place)]
        if integers:
            part = _swap(lax.bitcast_convert_type(part, jnp.int16))
        if number == 0:
            y, which = part, jnp.zeros(part.shape, kind)
        else:
            which = jnp.where(part > y, kind.type(number), which)
            y = jnp.maximum(y, part)
    if integers:
        y = lax.bitcast_convert_type(_swap(y), jnp.bfloat16)
    return y, (which, x.shape)


def _swap(bits: jax.Array) -> jax.Array:
    """int16 in the order of the bfloat16 whose bits they hold, and back again."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def _offsets(rank: int, window: int) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for _ in range(rank):
        places = [(*place, i) for place in places for i in range(window)]
    return places


def _tile(shape: tuple[int, ...], window: int, place: tuple[int, ...]) -> tuple:
    stops = [side // window * window for side in shape[1:-1]]
    within = [slice(i, s, window) for i, s in zip(place, stops, strict=True)]
    return (slice(None), *within, slice(None))


def _pool_backward(window: int, saved: tuple, gradient: jax.Array) -> tuple[jax.Array]:
    which, shape = saved
    gradient = _hold(gradient)
    spatial = shape[1:-1]
    rank = len(spatial)
    # Each tile's places in order: axes (1, window) for each spatial axis.
    numbers = jnp.arange(window**rank, dtype=which.dtype).reshape([window] * rank)
    for axis in range(rank):
        numbers = jnp.expand_dims(numbers, 2 * axis)
    numbers = numbers[None, ..., None]
    wide = lambda a: jnp.expand_dims(a, tuple(2 * i + 2 for i in range(rank)))  # noqa: E731
    spread = jnp.where(wide(which) == numbers, wide(gradient), 0)
    spread = spread.reshape(
        shape[0], *(side // window * window for side in spatial), shape[-1]
    )
    missing = [(0, side % window) for side in spatial]
    return (jnp.pad(spread, [(0, 0), *missing, (0, 0)]),)


max_pool.defvjp(_pool_forward, _pool_backward)
