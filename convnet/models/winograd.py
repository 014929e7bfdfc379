"""Convolutions of 3x3 with stride 1 by tiles: 16 products in the place of 36.

Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016, "Fast
algorithms for convolutional neural networks" (arXiv:1509.09308): F(2x2, 3x3), and for
the gradient by the kernel F(3x3, 2x2), which is its transpose.

The result is cut into tiles of 2x2, each of which meets 4x4 places of the input. Sums
and differences of rows, and of columns, transform an operand to 4x4 components:
component 4 * j + i is number i along the rows' axis and j along the columns'. Those of
two operands are multiplied one by one, and sums of the products are the result. All
coefficients are 1, -1 and 1/2, so that rounding stays near that of the plain form.

Each step is held behind a barrier. XLA would otherwise fuse several: the steps before
would be computed again for every number that reads them, and of 16 components at a time
each number would first ask which it belongs to.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from convnet.models import parts
from convnet.models.kernel_gradient import Pads

_hold = lax.optimization_barrier


@jax.custom_vjp
def transform(kernel: jax.Array) -> jax.Array:
    """Returns the components (16, c, features) of a kernel (3, 3, c, features)."""
    flat = _transform(kernel.reshape(1, 3, 3, -1), _of_kernel)
    return flat.reshape(16, *kernel.shape[2:])


def transpose(gradient: jax.Array) -> jax.Array:
    """The transpose of `transform`: the gradient by a kernel of that by components."""
    columns = _transposed_of_kernel(gradient.reshape(4, 4, *gradient.shape[1:]))
    return _transposed_of_kernel(columns.swapaxes(0, 1))


transform.defvjp(lambda k: (transform(k), None), lambda _, g: (transpose(g),))


def turn(kernel: jax.Array) -> jax.Array:
    """Returns the components of the kernel with which a gradient is convolved.

    It is the one of these components (16, c, features) with both axes reversed and with
    channels and features exchanged.
    """
    turned = kernel.reshape(4, 4, *kernel.shape[1:])
    for axis in (0, 1):
        first, *middle, last = jnp.split(turned, 4, axis)
        turned = jnp.concatenate([last, *middle, first], axis)
    return turned.swapaxes(2, 3).reshape(16, kernel.shape[2], kernel.shape[1])


def convolve(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Cross-correlates `x` (b, h, w, c) with the kernel of these components."""
    *_, c, features = kernel.shape
    sides = [n + sum(pad) - 2 for n, pad in zip(x.shape[1:], pads, strict=False)]
    kernel = _hold(kernel)

    def one(x: jax.Array) -> jax.Array:
        tiles = _hold(_transform(_padded(x, pads, sides), _of_input))
        y = _hold(lax.dot_general(tiles, kernel, (((2,), (1,)), ((0,), (0,)))))
        rows, columns = (-(-n // 2) for n in sides)
        y = y.reshape(4, 4, len(x), rows, columns, features)
        y = _hold(jnp.stack(_of_result(y), 4))
        y = jnp.stack(_of_result(y), 2).reshape(len(x), 2 * rows, 2 * columns, features)
        return y[:, : sides[0], : sides[1]]

    return parts.each(one, x, size(c, features, sides))


def gradient_by_kernel(x: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """Returns the gradient (16, c, features) by the components of a kernel.

    Args:
      x: what was convolved (b, h, w, c).
      gradient: by the result (b, rows, columns, features).
      pads: of the convolution.
    """
    sides = gradient.shape[1:3]

    def one(x: jax.Array, gradient: jax.Array) -> jax.Array:
        if any(n % 2 for n in sides):  # Else it would be copied for nothing.
            gradient = _padded(gradient, [(0, 0), (0, 0)], sides)
        tiles = _transform(_padded(x, pads, sides), _of_input)
        left, right = _hold((tiles, _transform(gradient, _of_gradient)))
        return lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))

    laid_out = size(x.shape[-1], gradient.shape[-1], sides)
    return parts.total(one, (x, gradient), laid_out)


def size(c: int, features: int, sides: Sequence[int]) -> int:
    """Bytes of the components of an example, and of those of its result or gradient."""
    return 4 * (c + features) * sides[0] * sides[1] * 4


def _padded(x: jax.Array, pads: Sequence, sides: Sequence[int]) -> jax.Array:
    """Pads `x`, and further at the ends, where a result of odd `sides` has half a tile.

    Not by jnp.pad: of a convolution with more zeros than its kernel reaches over, the
    gradient by the input has fewer than none.
    """
    around = [
        (low, high + n % 2, 0) for (low, high), n in zip(pads, sides, strict=True)
    ]
    none = (0, 0, 0)
    return _hold(lax.pad(x, jnp.zeros((), x.dtype), [none, *around, none]))


def _transform(
    a: jax.Array, split: Callable[[jax.Array, int], list[jax.Array]]
) -> jax.Array:
    """Returns the components (16, tiles, c) of `a` (b, h, w, c)."""
    rows = _hold(jnp.stack(split(a, 1)))
    return jnp.stack(split(rows, 3)).reshape(16, -1, a.shape[-1])


def _of_input(x: jax.Array, axis: int) -> list[jax.Array]:
    last = x.shape[axis] - 3
    a, b, c, d = (lax.slice_in_dim(x, i, i + last, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, d - b]


def _of_kernel(kernel: jax.Array, axis: int) -> list[jax.Array]:
    a, b, c = jnp.split(kernel, 3, axis)
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _transposed_of_kernel(g: jax.Array) -> jax.Array:
    both, other = (g[1] + g[2]) / 2, (g[1] - g[2]) / 2
    return jnp.stack([g[0] + both, other, both + g[3]])


def _of_gradient(gradient: jax.Array, axis: int) -> list[jax.Array]:
    stop = gradient.shape[axis]
    a, b = (lax.slice_in_dim(gradient, i, stop, 2, axis) for i in range(2))
    return [a, a + b, a - b, b]


def _of_result(y: jax.Array) -> list[jax.Array]:
    return [y[0] + y[1] + y[2], y[1] - y[2] + y[3]]
