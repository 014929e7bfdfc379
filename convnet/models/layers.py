"""Convolution, pooling and normalisation: the one place where each of them lives.

All take arrays `(b, *spatial, c)` with one to four spatial axes. Parameters and
statistics are float32 whatever dtype a layer computes in.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from convnet.models import lowering
from convnet.models.intermediates import tap, tapped

Array = jax.Array
Dtype = Any

# He, Zhang, Ren and Sun 2015, "Delving deep into rectifiers", equation 10: the variance
# of the activations is kept from layer to layer when each layer is followed by a ReLU.
he_init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def convolve(
    x: Array,
    kernel: Array,
    stride: int | Sequence[int] = 1,
    padding: str | int = "SAME",
) -> Array:
    """Cross-correlates `x` `(b, *spatial, c)` with `kernel` `(*k, c, features)`.

    `padding` is "SAME", "VALID", "CIRCULAR" (the axes are periodic; an even kernel
    looks one further ahead than back, as in SAME), or the number of zeros at either end
    of each axis. The last is how PyTorch pads: at stride 2 it differs from SAME, which
    puts the odd zero at the end.
    """
    rank = x.ndim - 2
    size, stride = kernel.shape[:-2], _per_axis(stride, rank)
    if padding == "CIRCULAR":
        around = [((k - 1) // 2, k // 2) for k in size]
        x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode="wrap")
        padding = "VALID"
    if isinstance(padding, int):
        pads = [(padding, padding)] * rank
    else:
        pads = lax.padtype_to_pads(x.shape[1:-1], size, stride, padding)
    if rank == 2:
        return lowering.convolve2d(x, kernel, stride, pads)
    if rank <= 3:
        axes = "DHW"[-rank:]
        layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return lax.conv_general_dilated(
            x, kernel, stride, pads, dimension_numbers=layout
        )
    # cuDNN stops at three spatial axes. The window of the first axis becomes channels,
    # and each of its places an example of its own.
    x = jnp.pad(x, [(0, 0), pads[0]] + [(0, 0)] * rank)
    places = (x.shape[1] - size[0]) // stride[0] + 1
    stop = (places - 1) * stride[0] + 1
    x = jnp.concatenate(
        [x[:, i : i + stop : stride[0]] for i in range(size[0])], axis=-1
    )
    kernel = jnp.moveaxis(kernel, 0, -3)  # (*k[1:], k[0], c, features)
    kernel = kernel.reshape(*size[1:], -1, kernel.shape[-1])
    b, t = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, 0), *pads[1:], (0, 0)])
    y = convolve(x.reshape(b * t, *x.shape[2:]), kernel, stride[1:], "VALID")
    return y.reshape(b, t, *y.shape[1:])


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    result = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(result) != rank:
        raise ValueError(f"{result} has {len(result)} numbers for {rank} spatial axes")
    return result


class Conv(nn.Module):
    """A convolution `(b, *spatial, c) -> (b, *spatial', features)` in `dtype`.

    Parameters, float32: `kernel` `(*k, c, features)`, He's initialisation, and with
    `use_bias` a `bias` `(features,)` of zeros. See `convolve` for `padding`.
    """

    features: int
    kernel: int | Sequence[int] = 3
    stride: int | Sequence[int] = 1
    padding: str | int = "SAME"
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = _per_axis(self.kernel, x.ndim - 2)
        shape = (*size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_init, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = convolve(x, kernel, self.stride, self.padding)
        if self.use_bias:
            zeros, shape = nn.initializers.zeros, (self.features,)
            bias = self.param("bias", zeros, shape, jnp.float32)
            y = y + bias.astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy 2015).

    Computed in float32, returned in `dtype`. The collection `batch_stats` keeps `mean`
    and the biased variance `var`: `new = momentum * old + (1 - momentum) * batch`.
    PyTorch's momentum is one minus ours, and the variance it keeps is the unbiased one.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    scale_init: Callable[..., Array] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        c = x.shape[-1:]
        scale = self.param("scale", self.scale_init, c, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, c, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, c, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, c, jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mu = jnp.mean(x, axes)
            # Not mean(x^2) - mean(x)^2, which saves a pass over the array and loses all
            # digits where the mean is large against the spread.
            sigma2 = jnp.mean(jnp.square(x - mu), axes)
            if not self.is_initializing():
                m = self.momentum
                mean.value = m * mean.value + (1 - m) * mu
                var.value = m * var.value + (1 - m) * sigma2
        else:
            mu, sigma2 = mean.value, var.value
        y = (x - mu) * (scale * lax.rsqrt(sigma2 + self.epsilon)) + bias
        return y.astype(self.dtype)


def max_pool(
    x: Array, window: int, stride: int | None = None, padding: int = 0
) -> Array:
    """The largest value in each window of `window` per axis; padding never wins.

    `stride` is the window's size unless given. What does not fill a window at the end
    of an axis is dropped, here and in the other pools.

    Windows that do not overlap are a reshape and a maximum, which a CPU runs faster
    than `reduce_window`. The gradient of a tie is then shared among the equals; where
    windows overlap, it goes to the first.
    """
    _check_fits(x, window, padding)
    if stride in (None, window) and padding == 0:
        tiles, within = _tiles(x, window)
        return jnp.max(tiles, within)
    return _reduce_window(x, -np.inf, lax.max, window, stride or window, padding)


def average_pool(
    x: Array, window: int, stride: int | None = None, padding: int = 0
) -> Array:
    """The mean of each window, in which zeros of the padding count; see `max_pool`."""
    _check_fits(x, window, padding)
    y = x.astype(jnp.float32)
    if stride in (None, window) and padding == 0:
        tiles, within = _tiles(y, window)
        y = jnp.mean(tiles, within)
    else:
        y = _reduce_window(y, 0.0, lax.add, window, stride or window, padding)
        y = y / window ** (x.ndim - 2)
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
    x: Array, start: float, op: Callable, window: int, stride: int, padding: int
) -> Array:
    rank = x.ndim - 2
    size, steps = (1, *[window] * rank, 1), (1, *[stride] * rank, 1)
    pads = [(0, 0), *[(padding, padding)] * rank, (0, 0)]
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


class Head(nn.Module):
    """Dense layers with ReLU and dropout, then float32 logits `(..., num_outputs)`.

    Dropout (Srivastava et al. 2014) follows each hidden layer, as in VGG; without
    hidden layers it acts on the features.
    """

    num_outputs: int
    dense: Sequence[int] = ()
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def drop(x: Array, name: str) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train, name=name)(x)

        if not self.dense:
            x = drop(x, "dropout")
        for i, width in enumerate(self.dense, 1):
            dense = nn.Dense(
                width, dtype=self.dtype, kernel_init=he_init, name=f"dense{i}"
            )
            x = tap(self, f"relu{i}", nn.relu(tapped(self, dense, x)))
            x = drop(x, f"dropout{i}")
        logits = nn.Dense(self.num_outputs, dtype=jnp.float32, name="logits")
        return tapped(self, logits, x)


class Classifier(nn.Module):
    """A convolutional base, which ends in features, and a dense head on top of it.

    Variables, float32: params `{"base", "head"}`, and with batch norm batch_stats
    `{"base"}`. Inputs are normalised floats `(b, *spatial, c)`. Logits are float32,
    `(b, num_outputs)`, or a map of them where the base gathers "time".
    """

    base: nn.Module
    head: nn.Module

    def __call__(self, inputs: Array, train: bool = False) -> Array:
        if not 3 <= inputs.ndim <= 6:
            raise ValueError(
                f"inputs of shape {inputs.shape} are not (b, *spatial, c) with one to"
                " four spatial axes"
            )
        return self.head(self.base(inputs, train), train)
