"""Depthwise convolutions as products and sums, place by place of the kernel.

For a CPU, where XLA has only slow code for them: on two Zen 4 cores 49 ms in the place
of 470 for 16 maps of 56x56x144 and 3x3, the gradients included 0.34 s in that of 2.5.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnet.models import lowering

Pads = Sequence[tuple[int, int]]

# Each place of a kernel is a product to compile: 7x7 are many, 7x7x7 too many.
_MOST_PLACES = 64


def pays(window: Sequence[int]) -> bool:
    """Whether this is the form to take for a kernel of `window` places per axis."""
    return lowering.on("cpu") and math.prod(window) <= _MOST_PLACES


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    """Cross-correlates each channel of `x` with a kernel of its own; summed in float32.

    Args:
      x: (b, *spatial, c).
      kernel: (*k, 1, c).
      stride: for each axis.
      pads: zeros before and after each axis.

    Returns:
      (b, *spatial', c), in the dtype of `x`.
    """
    return _forward(x, kernel, stride, pads)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    weights = kernel.astype(jnp.float32)
    total = sum(
        part * weights[place]
        for place, part in _parts(x, kernel.shape[:-2], stride, pads)
    )
    return total.astype(x.dtype), (x, kernel)


def _parts(
    x: jax.Array, window: tuple[int, ...], stride: tuple[int, ...], pads: Pads
) -> list[tuple[tuple[int, ...], jax.Array]]:
    """For each place of the kernel what it is multiplied with, in float32."""
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    counts = [
        (n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], window, stride, strict=True)
    ]
    parts = []
    for place in np.ndindex(*window):
        spatial = [
            slice(i, i + (n - 1) * s + 1, s)
            for i, n, s in zip(place, counts, stride, strict=True)
        ]
        parts.append((place, x[(slice(None), *spatial)].astype(jnp.float32)))
    return parts


def _backward(
    stride: tuple[int, ...],
    pads: Pads,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    window = kernel.shape[:-2]
    wide = gradient.astype(jnp.float32)
    products = [part * wide for _, part in _parts(x, window, stride, pads)]
    sums = []
    # A row of the kernel in one pass: for 7x7 24 ms, with a pass for each place 139.
    for i in range(0, len(products), window[-1]):
        sums += _sums(products[i : i + window[-1]])
    by_kernel = jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)
    # A convolution of the gradient, zeros between its places, with the turned kernel.
    config = [(0, 0, 0)]
    for n, places, k, s, (low, _) in zip(
        x.shape[1:-1], gradient.shape[1:-1], window, stride, pads, strict=True
    ):
        before, spread = k - 1 - low, (places - 1) * s + 1
        config.append((before, n + k - 1 - before - spread, s - 1))
    zero = jnp.zeros((), gradient.dtype)
    spread = lax.pad(gradient, zero, [*config, (0, 0, 0)])
    turned = jnp.flip(kernel, range(len(window)))
    none, ones = ((0, 0),) * len(window), (1,) * len(window)
    return _forward(spread, turned, ones, none)[0], by_kernel


def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """The sum of each over all axes but the last, in one loop over all of them."""

    def add(a: tuple, b: tuple) -> tuple:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = (np.float32(0),) * len(arrays)
    return lax.reduce(tuple(arrays), zeros, add, tuple(range(arrays[0].ndim - 1)))


convolve.defvjp(_forward, _backward)
