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
# The gradient of a kernel, in parts of the batch that stay in the cache: for maps of at
# least _LARGE places, so many images a part, and no more than _MOST parts, which only
# cost compile time. On two Zen 4 cores, at 32x32x64 and a batch of 128: 34 GFLOP/s
# whole and 110 in parts (float32), 116 and 191 (bfloat16); at 16x16 little is left.
_LARGE = 512
_CHUNK = {jnp.dtype("float32"): 16, jnp.dtype("bfloat16"): 32}
_MOST = 16


def convolve2d(
    x: jax.Array, kernel: jax.Array, stride: Sequence[int], pads: Sequence
) -> jax.Array:
    """Cross-correlates `x` (b, h, w, c) with `kernel` (kh, kw, c, features)."""
    stride, pads = tuple(stride), tuple(tuple(pair) for pair in pads)
    # From JAX 0.12 on convolutions on a CPU are oneDNN's.
    if jax.default_backend() != "cpu" or jax.__version_info__ < (0, 12):
        return _plain(x, kernel, stride, pads)
    if x.shape[1] * x.shape[2] >= _LARGE:
        return _chunked(x, kernel, stride, pads)
    return _small(x, kernel, stride, pads)


def _small(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    """`_plain`, for maps that may be smaller than the kernel.

    For those oneDNN has only its reference code, 50 times slower: they get zeros at
    their ends, and what the zeros add to the output is cut off.
    """
    sizes, window = x.shape[1:3], kernel.shape[:2]
    missing = [max(k - n, 0) for n, k in zip(sizes, window, strict=True)]
    if not any(missing):
        return _plain(x, kernel, stride, pads)
    shape = [
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(sizes, pads, window, stride, strict=True)
    ]
    # The barriers keep XLA from folding the zeros into the convolution's own padding,
    # here and, transposed, in the gradient.
    hold = lax.optimization_barrier
    x = hold(jnp.pad(x, [(0, 0), *((0, m) for m in missing), (0, 0)]))
    return hold(_plain(x, kernel, stride, pads))[:, : shape[0], : shape[1]]


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
