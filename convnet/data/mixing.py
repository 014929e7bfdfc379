"""Mixing each example with another of its batch: mixup, CutMix, and their draws."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from convnet.data import colour


def mix(values: jax.Array, keep: jax.Array) -> jax.Array:
    """keep * values + (1 - keep) * the values of the partner.

    The partner is the example before it in the batch, the last for the first. `keep`
    is (b,), or of as many axes as `values`.
    """
    if keep.ndim == 1:
        keep = colour.per_example(keep, values)
    # A shift by one: everyone's partner is someone else, also in the middle of an
    # odd batch, and over devices only one example crosses each border.
    partner = jnp.roll(values, 1, axis=0)
    # How a program brings partners over the border is not to change the rounding.
    keep, values, partner = jax.lax.optimization_barrier((keep, values, partner))
    return keep * values + (1 - keep) * partner


def symmetric_beta(key: jax.Array, alpha: float, count: int) -> jax.Array:
    """Draws float32 (count,) from Beta(alpha, alpha).

    By the inverse of the distribution function, exact at 1024 quantiles and linear
    between them: `jax.random.beta` loops until it accepts, in every step, and takes
    over a second to compile.
    """
    from scipy.special import betaincinv

    knots = betaincinv(alpha, alpha, np.linspace(0, 1, 1025)).astype(np.float32)
    place = 1024 * jax.random.uniform(key, (count,))
    before = place.astype(jnp.int32)
    low, high = jnp.asarray(knots)[before], jnp.asarray(knots)[before + 1]
    return low + (high - low) * (place - jnp.floor(place))


def cutmix_box(
    share: jax.Array, centre: jax.Array, spatial: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The box to paste of a partner, and the share of the image that remains.

    `share` (b,) is the share to keep before the box is clipped at the border, `centre`
    (b, rank) the box's middle in [0, 1) of each side. Returns start and stop, int32
    (b, rank), and the share that is really kept, float32 (b,). Yun et al., 2019.
    """
    sides = jnp.array(spatial)
    root = (1 - share[:, None]) ** (1 / len(spatial))
    size = jnp.floor(root * sides.astype(jnp.float32)).astype(jnp.int32)
    middle = jnp.floor(centre * sides.astype(jnp.float32)).astype(jnp.int32)
    start = middle - size // 2
    stop = jnp.minimum(start + size, sides)
    start = jnp.maximum(start, 0)
    return start, stop, 1 - jnp.prod(stop - start, axis=1) / math.prod(spatial)


def box_mask(start: jax.Array, stop: jax.Array, spatial: tuple[int, ...]) -> jax.Array:
    """True from `start` to before `stop`, int32 (b, rank): bool (b, *spatial, 1)."""
    inside = jnp.ones((), bool)
    for axis, side in enumerate(spatial):
        shape = [1] * (len(spatial) + 2)
        shape[axis + 1] = side
        place = jnp.arange(side).reshape(shape)
        first, end = start[:, axis], stop[:, axis]
        inside &= place >= first.reshape(-1, *[1] * (len(shape) - 1))
        inside &= place < end.reshape(-1, *[1] * (len(shape) - 1))
    return inside
