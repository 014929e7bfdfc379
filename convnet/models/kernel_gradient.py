"""The gradient of a convolution by its kernel, as matrix products.

oneDNN has a primitive for it, which XLA does not call. What automatic differentiation
writes instead, a convolution with the batch as channels, is up to twice as slow, and on
processors with matrix units (Intel's AMX) wrong in bfloat16 for 8 images of 24x24 or
more: oneDNN's fault with such windows.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from convnet.models import parts

Pads = tuple[tuple[int, int], ...]

# Places of the map in a product, about. One product over all of a part is slow: 28 ms
# against 12 for (256, 98000) by (98000, 256) in bfloat16.
_PLACES = 2048


def products(
    x: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    stride: tuple[int, int],
    pads: Pads,
) -> jax.Array:
    """Returns the gradient by `kernel`, in its dtype; summed in float32.

    Args:
      x: what was convolved (b, h, w, c).
      kernel: (kh, kw, c, features), of which only the shape counts.
      gradient: by the result (b, rows, columns, features).
      stride, pads: of the convolution.
    """
    kh, kw, c, features = kernel.shape
    # Each place of the kernel moves `x` against the gradient. Moving both, `x` by
    # columns and the gradient by rows, copies less, unless the features are many; its
    # products are nearer to squares, which is worth a quarter more copies.
    width, of_both = kh * kw * c + features, kw * c + kh * features
    both = stride == (1, 1) and min(kh, kw) > 1 and of_both <= 1.25 * width
    width = of_both if both else width
    size = gradient.shape[1] * gradient.shape[2] * width * x.dtype.itemsize
    # A kernel of one place moves nothing: the arrays are factors as they lie.
    still = (kh, kw) == stride == (1, 1) and not any(map(any, pads))

    def one(x: jax.Array, gradient: jax.Array) -> jax.Array:
        if both:
            left, right = _moved_by_both(x, gradient, (kh, kw), pads)
        else:
            sides = gradient.shape[1:3]
            left, right = _moved_by_x(x, (kh, kw), sides, stride, pads), gradient
        n = parts.divide(len(x) * left.shape[1], _PLACES / left.shape[2])
        # Laid out once; within a product it would be gathered again and again.
        left, right = lax.optimization_barrier((left, right))
        left, right = (a.reshape(n, -1, a.shape[-1]) for a in (left, right))
        product = lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))
        return product.astype(jnp.float32).sum(0)

    total = one(x, gradient) if still else parts.total(one, (x, gradient), size)
    if both:
        total = total.reshape(kw, c, kh, features).transpose(2, 0, 1, 3)
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _moved_by_x(
    x: jax.Array,
    window: tuple[int, int],
    sides: tuple[int, int],
    stride: tuple[int, int],
    pads: Pads,
) -> jax.Array:
    """Returns (b, *sides, kh * kw * c): what each place of the kernel meets."""
    down, right = ((n - 1) * s + 1 for n, s in zip(sides, stride, strict=True))
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    moved = [
        x[:, i : i + down : stride[0], j : j + right : stride[1]]
        for i, j in itertools.product(*map(range, window))
    ]
    return jnp.concatenate(moved, -1)


def _moved_by_both(
    x: jax.Array, gradient: jax.Array, window: tuple[int, int], pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns factors (b, h, columns, kw * c) and (b, h, columns, kh * f)."""
    (kh, kw), h, columns = window, x.shape[1], gradient.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), pads[1], (0, 0)])
    # Rows that no place of the kernel reaches are cut off: `lax.pad` by less than none.
    over, none = (kh - 1 - pads[0][0], kh - 1 - pads[0][1], 0), (0, 0, 0)
    zero = jnp.zeros((), gradient.dtype)
    gradient = lax.pad(gradient, zero, [none, over, none, none])
    # Held and stacked, the copies are loops without branches: at the borders of the
    # map, and between the parts that lie side by side.
    x, gradient = lax.optimization_barrier((x, gradient))
    left = jnp.stack([x[:, :, j : j + columns] for j in range(kw)], 3)
    right = jnp.stack([gradient[:, i : i + h] for i in reversed(range(kh))], 3)
    left, right = (a.reshape(*a.shape[:3], -1) for a in (left, right))
    return left, right
