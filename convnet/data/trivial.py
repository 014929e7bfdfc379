"""TrivialAugment (Müller & Hutter, ICCV 2021), the wide space, for a whole batch.

Each image gets one operation, drawn uniformly, at a strength drawn uniformly. Which
one is known only on the device, so every image goes through all of them: the
geometric ones are one matrix each and share a single warp, the others are a chain of
selections that the compiler fuses.
"""

import jax
import jax.numpy as jnp

from convnet.data import affine, colour

OPS = (
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "saturation",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
MAX_ANGLE = 135.0  # degrees
MAX_SHEAR = 0.99
MAX_SHIFT = 32.0  # pixels, whatever the size of the image, as in the paper
MAX_FACTOR = 0.99  # factors lie between 0.01 and 1.99
MIN_BITS = 2


def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """An operation, int32 (count,), and a signed strength in [-1, 1), float32."""
    op_key, strength_key = jax.random.split(key)
    op = jax.random.randint(op_key, (count,), 0, len(OPS))
    return op, jax.random.uniform(strength_key, (count,), minval=-1.0)


def geometry(op: jax.Array, strength: jax.Array) -> jax.Array:
    """The matrices (b, 3, 3) of the geometric operations, the identity for others."""

    def only(name: str, largest: float) -> jax.Array:
        return jnp.where(op == OPS.index(name), strength * largest, 0.0)

    return affine.matrix(
        angle=jnp.deg2rad(only("rotate", MAX_ANGLE)),
        shear_y=only("shear_y", MAX_SHEAR),
        shear_x=only("shear_x", MAX_SHEAR),
        shift_y=only("translate_y", MAX_SHIFT),
        shift_x=only("translate_x", MAX_SHIFT),
    )


def recolour(images: jax.Array, op: jax.Array, strength: jax.Array) -> jax.Array:
    """The operations on colours; images of a geometric one pass unchanged.

    `images` is float32 (b, h, w, c) in [0, 1], and clipped to it. `op` and `strength`
    are (b,) as from `draw`; operations without a direction take the strength's size.
    Saturation changes nothing unless there are 3 channels.
    """
    images = jnp.clip(images, 0, 1)
    size = jnp.abs(strength)

    def chosen(name: str) -> jax.Array:
        return colour.per_example(op == OPS.index(name), images)

    # Four of them are one blend, away from or towards four different images.
    base = jnp.where(chosen("brightness"), 0.0, images)
    base = jnp.where(chosen("contrast"), colour.mean_grey(images), base)
    base = jnp.where(chosen("sharpness"), colour.smooth(images), base)
    if images.shape[-1] == 3:
        base = jnp.where(chosen("saturation"), colour.grey(images), base)
    blended = colour.blend(base, images, 1 + MAX_FACTOR * strength)
    # Held apart: fused into one, XLA on a CPU repeats the histograms' work.
    result = jax.lax.optimization_barrier(jnp.clip(blended, 0, 1))

    bits = 8 - jnp.round((8 - MIN_BITS) * size).astype(jnp.int32)
    for name, changed in (
        ("auto_contrast", colour.auto_contrast(images)),
        ("equalize", colour.equalize(images)),
        ("posterize", colour.posterize(images, bits)),
        ("solarize", colour.solarize(images, 1 - size)),
    ):
        result = jnp.where(chosen(name), changed, result)
    return result
