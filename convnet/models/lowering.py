"""Forms of an operation that a backend runs faster than the plain one.

Each has the values and the gradients of the plain form, up to rounding; the tests
compare them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Images whose part of the weight gradient is computed at once, so that it stays in the
# cache: measured best on two Zen 4 cores. More than _MOST parts only cost compile time.
_CHUNK = {jnp.dtype("float32"): 16, jnp.dtype("bfloat16"): 32}
_MOST = 16


def convolve2d(
    x: jax.Array, kernel: jax.Array, stride: Sequence[int], pads: Sequence
) -> jax.Array:
    """Cross-correlates `x` (b, h, w, c) with `kernel` (kh, kw, c, features)."""
    stride, pads = tuple(stride), tuple(tuple(pair) for pair in pads)
    # oneDNN, which JAX uses on a CPU from 0.12 on, computes the gradient of the kernel
    # of a large batch at half the speed of a small one's.
    if jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12):
        return _chunked(x, kernel, stride, pads)
    return _plain(x, kernel, stride, pads)


def _plain(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=_LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _chunked(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    """`_plain`, whose kernel gradient is summed in float32 over parts of the batch."""
    return _plain(x, kernel, stride, pads)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(x, kernel, stride, pads), (x, kernel)


def _backward(
    stride: tuple[int, ...],
    pads: Pads,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    by_input = jax.linear_transpose(lambda v: _plain(v, kernel, stride, pads), x)
    size = max(_CHUNK.get(x.dtype, 16), -(-len(x) // _MOST))
    total = jnp.zeros(kernel.shape, jnp.float32)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        by_kernel = jax.linear_transpose(
            functools.partial(_plain, part, stride=stride, pads=pads), kernel
        )
        (summand,) = by_kernel(gradient[start : start + size])
        total += summand.astype(jnp.float32)
    return by_input(gradient)[0], total.astype(kernel.dtype)


_chunked.defvjp(_forward, _backward)
