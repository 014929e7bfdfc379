"""Convolutions of maps of few places, as products with a matrix."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convnet.models.kernel_gradient import Pads


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: tuple[int, ...],
    pads: Pads,
    shape: list[int],
) -> jax.Array:
    """Cross-correlates `x` (b, h, w, c) with `kernel` (kh, kw, c, features).

    `shape` has the rows and columns of the result. Each map is a vector.

    A map of 2x2 under a kernel of 3x3 has 16 pairs of an input and an output; filled up
    to 3x3 it has 81. Eigen, which JAX 0.10 calls, is slow there as well.
    """
    meetings = _meetings(x.shape[1:3], shape, kernel.shape[:2], stride, pads)
    matrix = _matrix(kernel, meetings)
    y = x.reshape(len(x), matrix.shape[0]) @ matrix
    return y.reshape(len(x), *shape, kernel.shape[-1])


def _meetings(
    sides: Sequence[int],
    shape: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    pads: Pads,
) -> tuple[tuple[int, ...], ...]:
    """For each place of the input, and of the output: the kernel's place, -1 for none.

    Places are counted row by row.
    """

    def meet(here: tuple[int, ...], there: tuple[int, ...]) -> int:
        i, j = (
            n - m * s + low
            for n, m, s, (low, _) in zip(here, there, stride, pads, strict=True)
        )
        inside = 0 <= i < window[0] and 0 <= j < window[1]
        return i * window[1] + j if inside else -1

    return tuple(
        tuple(meet(here, there) for there in np.ndindex(*shape))
        for here in np.ndindex(*sides)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _matrix(kernel: jax.Array, meetings: tuple[tuple[int, ...], ...]) -> jax.Array:
    """The matrix (h * w * c, rows * columns * features) of a convolution of a map."""
    # The last one, of no place, is zero.
    places = jnp.pad(kernel.reshape(-1, *kernel.shape[2:]), [(0, 1), (0, 0), (0, 0)])
    rows = [jnp.concatenate([places[i] for i in row], -1) for row in meetings]
    return jnp.concatenate(rows)


def _matrix_forward(
    kernel: jax.Array, meetings: tuple[tuple[int, ...], ...]
) -> tuple[jax.Array, jax.Array]:
    return _matrix(kernel, meetings), kernel


def _matrix_backward(
    meetings: tuple[tuple[int, ...], ...], kernel: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    kh, kw, c, features = kernel.shape
    gradient = gradient.reshape(len(meetings), c, -1, features).astype(jnp.float32)
    # Sums of slices. By itself JAX would add up whole kernels, zeros but for a place.
    places = [jnp.zeros((c, features), jnp.float32)] * (kh * kw)
    for here, row in enumerate(meetings):
        for there, place in enumerate(row):
            if place >= 0:
                places[place] += gradient[here, :, there]
    return (jnp.stack(places).reshape(kernel.shape).astype(kernel.dtype),)


_matrix.defvjp(_matrix_forward, _matrix_backward)
