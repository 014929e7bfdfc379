"""Convolutions of 3x3 by tiles, with 16 products in the place of 36.

Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016, "Fast
algorithms for convolutional neural networks" (arXiv:1509.09308): F(2x2, 3x3), and for
the gradient by the kernel F(3x3, 2x2), which is its transpose. The result is cut into
tiles of 2x2, each of which meets 4x4 places of the input. Sums and differences of
columns, then rows, make 4x4 parts of either operand; part by part these are multiplied,
and sums of the 4x4 products are the result. All factors are 1 or 1/2, so that rounding
stays near that of the plain form.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from convnet.models import parts

Pads = tuple[tuple[int, int], ...]
Split = Callable[[jax.Array, int], list[jax.Array]]


def factors(kernel: jax.Array) -> jax.Array:
    """Returns the parts (16, c, features) of a kernel (3, 3, c, features)."""
    flat = kernel.reshape(1, 3, 3, -1)
    return _apart(flat, _of_kernel).reshape(16, *kernel.shape[2:])


def convolve(x: jax.Array, factors: jax.Array, pads: Pads) -> jax.Array:
    """Cross-correlates `x` (b, h, w, c), stride 1, with the kernel of these factors."""
    *_, c, features = factors.shape
    sides = _sides(x, pads)
    factors = lax.optimization_barrier(factors)

    def one(x: jax.Array) -> jax.Array:
        tiles = lax.optimization_barrier(_apart(_padded(x, pads), _of_input))
        y = lax.dot_general(tiles, factors, (((2,), (1,)), ((0,), (0,))))
        y = lax.optimization_barrier(y)
        rows, columns = (-(-n // 2) for n in sides)
        y = y.reshape(4, 4, len(x), rows, columns, features)
        y = lax.optimization_barrier(jnp.stack(_of_result(y), 4))
        y = jnp.stack(_of_result(y), 2).reshape(len(x), 2 * rows, 2 * columns, features)
        return y[:, : sides[0], : sides[1]]

    return parts.each(one, x, _tile_bytes(x, c + features, sides))


def kernel_gradient(x: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """Returns the gradient (3, 3, c, features) by the kernel of `convolve`.

    Args:
      x: what was convolved (b, h, w, c).
      gradient: by the result (b, rows, columns, features).
      pads: of the convolution.
    """
    sides, width = gradient.shape[1:3], x.shape[-1] + gradient.shape[-1]
    odd = [(0, n % 2) for n in sides]

    def one(x: jax.Array, gradient: jax.Array) -> jax.Array:
        if any(map(any, odd)):
            gradient = jnp.pad(gradient, [(0, 0), *odd, (0, 0)])
        factors = _apart(_padded(x, pads), _of_input), _apart(gradient, _of_gradient)
        left, right = lax.optimization_barrier(factors)
        return lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))

    total = parts.total(one, (x, gradient), _tile_bytes(x, width, sides))
    columns = _of_total(total.reshape(4, 4, *total.shape[1:]))
    return _of_total(columns.swapaxes(0, 1))


def _tile_bytes(x: jax.Array, width: int, sides: tuple[int, ...]) -> int:
    """Bytes of the parts of an example's tiles: 4 numbers for each of `width`."""
    return 4 * width * sides[0] * sides[1] * x.dtype.itemsize


def _sides(x: jax.Array, pads: Pads) -> tuple[int, ...]:
    return tuple(n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True))


def _padded(x: jax.Array, pads: Pads) -> jax.Array:
    odd = [n % 2 for n in _sides(x, pads)]
    around = [(low, high + o, 0) for (low, high), o in zip(pads, odd, strict=True)]
    # Not jnp.pad: of a convolution with more zeros than its kernel reaches over, the
    # gradient by the input has fewer than none.
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    return lax.optimization_barrier(x)


def _apart(a: jax.Array, split: Split) -> jax.Array:
    """Returns the 4x4 parts (16, tiles, c) of `a` (b, h, w, c); by columns, by rows."""
    # Two stacks, each computed once: in one of 16 parts XLA would ask for each number
    # which part it is of.
    rows = lax.optimization_barrier(jnp.stack(split(a, 1)))
    rows = rows.reshape(-1, *rows.shape[2:])
    return jnp.stack(split(rows, 2)).reshape(16, -1, a.shape[-1])


def _of_input(x: jax.Array, axis: int) -> list[jax.Array]:
    last = x.shape[axis] - 3
    a, b, c, d = (lax.slice_in_dim(x, i, i + last, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, d - b]


def _of_kernel(kernel: jax.Array, axis: int) -> list[jax.Array]:
    a, b, c = jnp.split(kernel, 3, axis)
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _of_gradient(gradient: jax.Array, axis: int) -> list[jax.Array]:
    stop = gradient.shape[axis]
    a, b = (lax.slice_in_dim(gradient, i, stop, 2, axis) for i in range(2))
    return [a, a + b, a - b, b]


def _of_result(y: jax.Array) -> list[jax.Array]:
    return [y[0] + y[1] + y[2], y[1] - y[2] + y[3]]


def _of_total(total: jax.Array) -> jax.Array:
    both, other = (total[1] + total[2]) / 2, (total[1] - total[2]) / 2
    return jnp.stack([total[0] + both, other, both + total[3]])
