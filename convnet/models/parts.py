"""Batches in parts, so that what a layer lays out of each stays in the cache."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

# Bytes: about so much is laid out at a time. Of 3, 5, 10 and 20 MB this was the best or
# near it, on two cores of an Intel Xeon.
PART = 10 << 20
# Before JAX 0.12 a loop costs more than the cache gains.
_PART_WITH_SLOW_LOOPS = 80 << 20


def divide(whole: int, wanted: float) -> int:
    """Into how many equal parts to divide, so that each has about `wanted` of all."""
    sizes = [n for n in range(1, whole + 1) if whole % n == 0]
    return whole // min(sizes, key=lambda n: max(n / wanted, wanted / n))


def total(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], size: int
) -> jax.Array:
    """Returns `function(*arrays)`, a float32 sum over the batch, computed in parts.

    Args:
      function: takes arrays with fewer examples, too; its result has the same shape.
      arrays: (b, ...) each.
      size: bytes that `function` lays out for an example.
    """
    result = jax.eval_shape(function, *arrays)
    # With each part the sum is read and written: a part is to be larger than that.
    wanted = max(_wanted(), 2 * result.size * result.dtype.itemsize) / size
    number = divide(len(arrays[0]), wanted)
    if number == 1:
        return function(*arrays)
    dealt = [_deal(a, number) for a in arrays]

    def add(i: jax.Array, sum_: jax.Array) -> jax.Array:
        part = (lax.dynamic_index_in_dim(a, i, 1, False) for a in dealt)
        return sum_ + function(*part)

    return lax.fori_loop(0, number, add, jnp.zeros(result.shape, result.dtype))


def each(
    function: Callable[[jax.Array], jax.Array], array: jax.Array, size: int
) -> jax.Array:
    """Returns `function(array)`, a result for each example, computed in parts.

    See `total`.
    """
    number = divide(len(array), _wanted() / size)
    if number == 1:
        return function(array)
    dealt = _deal(array, number)
    result = jax.eval_shape(function, array)

    def put(i: jax.Array, whole: jax.Array) -> jax.Array:
        part = function(lax.dynamic_index_in_dim(dealt, i, 1, False))
        return lax.dynamic_update_index_in_dim(whole, part, i, 1)

    empty = jnp.zeros((len(array) // number, number, *result.shape[1:]), result.dtype)
    return lax.fori_loop(0, number, put, empty).reshape(result.shape)


def _wanted() -> int:
    return PART if jax.__version_info__ >= (0, 12) else _PART_WITH_SLOW_LOOPS


def _deal(a: jax.Array, number: int) -> jax.Array:
    """Returns (b / number, number, ...): part i has every number-th example.

    So each device keeps its own where a part has as many for each. Else the batch is
    gathered on all of them. The number of parts must not depend on them: results would.
    """
    return a.reshape(-1, number, *a.shape[1:])
