"""One bilinear warp per image, and the matrices that drive it."""

import jax
import jax.numpy as jnp

MAX_ASPECT = 4 / 3  # of a resized crop, either way (Szegedy et al. 2015)


def matrix(
    *,
    angle: jax.Array | float = 0.0,
    shear_y: jax.Array | float = 0.0,
    shear_x: jax.Array | float = 0.0,
    zoom: jax.Array | float = 1.0,
    shift_y: jax.Array | float = 0.0,
    shift_x: jax.Array | float = 0.0,
) -> jax.Array:
    """The matrix for `warp` that zooms, shears, rotates, then shifts the content.

    Arguments are floats or of one shape (b,). `angle` is in radians, positive is
    counter-clockwise as seen; `shear_x` moves a pixel to the right by that multiple
    of its depth below the centre, `shear_y` down by that multiple of its distance
    to the right of it; `zoom` above 1 magnifies; shifts are in pixels, down and to
    the right. Returns float32 (b, 3, 3), or (3, 3) for floats.
    """
    # `warp` asks where an output pixel comes from, so this is the inverse, written
    # out: undo the shift, the rotation, the shears and the zoom, in that order.
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_row = (-sin - shear_x * cos, cos - shear_x * sin)
    y_row = (cos - shear_y * x_row[0], sin - shear_y * x_row[1])
    entries = []
    for from_y, from_x in (y_row, x_row):
        offset = -(from_y * shift_y + from_x * shift_x)
        entries += [from_y / zoom, from_x / zoom, offset / zoom]
    return _stack(*entries)


def crop_matrix(
    top: jax.Array,
    left: jax.Array,
    height: jax.Array,
    width: jax.Array,
    image_shape: tuple[int, int],
) -> jax.Array:
    """The matrix for `warp` that stretches a box over the whole image.

    The box is given in pixels, fractions allowed, measured from the image's upper
    left corner: floats or (b,). Returns float32 (b, 3, 3), or (3, 3) for floats.
    """
    h, w = image_shape
    offset_y = top + height / 2 - h / 2
    offset_x = left + width / 2 - w / 2
    return _stack(height / h, 0.0, offset_y, 0.0, width / w, offset_x)


def draw_crop(
    key: jax.Array, b: int, image_shape: tuple[int, ...], scale: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top, left, height and width in pixels, each float32 (b,), of a resized crop.

    Its share of the area is uniform in `scale`, its aspect log-uniform from 3/4 to
    4/3, its place uniform. What would not fit is cut to the image, not drawn again.
    """
    h, w = image_shape
    area, aspect, top, left = jax.random.uniform(key, (b, 4)).T
    area = (scale[0] + (scale[1] - scale[0]) * area) * h * w
    aspect = MAX_ASPECT ** (2 * aspect - 1)
    height = jnp.minimum(jnp.sqrt(area / aspect), h)
    width = jnp.minimum(jnp.sqrt(area * aspect), w)
    return top * (h - height), left * (w - width), height, width


def compose(*matrices: jax.Array) -> jax.Array:
    """Of (b, 3, 3) matrices, the one that applies the first to the image first."""
    product, *rest = matrices
    for other in rest:
        # An accelerator's default precision would move corners by half a pixel.
        product = jnp.matmul(product, other, precision=jax.lax.Precision.HIGHEST)
    return product


def warp(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Samples each image at the places its matrix sends the output's pixels to.

    `images` is float32 (b, h, w, c); `matrices` is float32 (b, 3, 3) and maps
    (y, x, 1) of an output pixel to that of the input, both from the centre of the
    image, in pixels. Bilinear, without antialiasing. Returns the shape of `images`.

    What lies outside is the image mirrored at its border (SciPy's `reflect`): the
    network sees no frame of constant colour that would tell it the angle, and
    within half a pixel of the border, as in a resized crop, this is Pillow's rule.
    """
    b, h, w, c = images.shape
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - (h - 1) / 2
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - (w - 1) / 2
    rows = matrices[:, :2, :, None, None]
    source = rows[:, :, 0] * y + rows[:, :, 1] * x + rows[:, :, 2]
    row, down = _neighbours(source[:, 0], h)
    column, right = _neighbours(source[:, 1], w)

    # Whole pixels gathered from a flat image, batch kept as a batch axis so that a
    # batch spread over devices stays where it is.
    pixels = images.reshape(b, h * w, c)
    index = (row * w + column).reshape(b, h * w, 1)
    below, beside = (w if h > 1 else 0), (1 if w > 1 else 0)

    def gather(step: int) -> jax.Array:
        return jnp.take_along_axis(
            pixels, index + step, axis=1, mode="promise_in_bounds"
        )

    down, right = down.reshape(b, h * w, 1), right.reshape(b, h * w, 1)
    # Each tap is named once: XLA on a CPU repeats a gather that is used twice.
    upper = gather(0) * (1 - right) + gather(beside) * right
    lower = gather(below) * (1 - right) + gather(below + beside) * right
    return (upper * (1 - down) + lower * down).reshape(images.shape)


def _neighbours(position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Index of the pixel before each centred position, and the way to the next."""
    # Mirrored at the outer edge of the border pixels: a triangle wave of period 2n.
    edge = jnp.abs(position + size / 2) % (2 * size)
    position = jnp.clip(size - jnp.abs(edge - size) - 0.5, 0, size - 1)
    index = jnp.minimum(position.astype(jnp.int32), max(size - 2, 0))
    return index, position - index.astype(position.dtype)


def _stack(*entries: jax.Array | float) -> jax.Array:
    """Two rows of three entries, with a third row (0, 0, 1)."""
    entries = jnp.broadcast_arrays(*map(jnp.float32, (*entries, 0.0, 0.0, 1.0)))
    flat = jnp.stack(entries, axis=-1)
    return flat.reshape(*flat.shape[:-1], 3, 3)
