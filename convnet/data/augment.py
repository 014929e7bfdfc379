"""Augmentation of a batch: a pure function of a key and a batch, under jit.

`apply` reads the settings in Python, so that what is off is not compiled. Each
operation draws from a key of its own, so that turning one on leaves the draws of the
others alone, and each draw depends on the key and the place in the batch only, not on
how many devices the batch is spread over. The draws of an operation and the operation
itself are apart: the functions below `apply` take their parameters as arguments.
"""

import enum
import math
from typing import Any

import jax
import jax.numpy as jnp

from convnet.data import affine, colour, mixing, trivial

ERASE_AREA = (0.02, 0.4)  # shares of the image (Zhong et al. 2017)
ERASE_MAX_ASPECT = 1 / 0.3


class _Stream(enum.IntEnum):
    """What is folded into the key for each operation. Only ever add at the end."""

    FLIP = 0
    CROP = 1
    RESIZED_CROP = 2
    ROTATE = 3
    SHEAR = 4
    ZOOM = 5
    TRANSLATE = 6
    BRIGHTNESS = 7
    CONTRAST = 8
    SATURATION = 9
    ERASE = 10
    MIXUP = 11
    CUTMIX = 12
    MIXUP_OR_CUTMIX = 13
    TRIVIAL = 14


def apply(key: jax.Array, batch: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The batch with its "input", and if it is mixed its "target", augmented.

    `batch` holds "input", float32 (b, *spatial, c), images in [0, 1]; "target",
    float32 (b, ...); for alternating flips "index", int32 (b,), and "epoch", int32.
    Other entries pass unchanged. `settings` has the keys of `augment` as attributes.
    Raises ValueError, when traced, for a setting that does not fit the input.
    """
    _check(settings, batch)
    inputs, b = batch["input"], len(batch["input"])

    numbers = jnp.arange(len(_Stream))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    # XLA on a CPU fuses a stage into each of the next one's uses of it, and computes it
    # that many times: without barriers, everything on takes 3 to 5 times as long.
    hold = jax.lax.optimization_barrier

    if settings.flip == "random":
        inputs = flip(inputs, jax.random.bernoulli(keys[_Stream.FLIP], shape=(b,)))
    elif settings.flip == "alternating":
        inputs = flip(inputs, alternating_flips(batch["index"], batch["epoch"]))
    if settings.crop_pad:
        shape = (b, inputs.ndim - 2)
        most = 2 * settings.crop_pad + 1
        offsets = jax.random.randint(keys[_Stream.CROP], shape, 0, most)
        inputs = hold(pad_and_crop(inputs, offsets, settings.crop_pad))

    # All that moves pixels by fractions is one matrix and one interpolation.
    matrices = _draw_matrices(keys, b, inputs.shape[1:3], settings)
    if settings.trivial:
        op, strength = trivial.draw(keys[_Stream.TRIVIAL], b)
        matrices.append(trivial.geometry(op, strength))
    if matrices:
        inputs = hold(affine.warp(inputs, affine.compose(*matrices)))

    for name, change in (
        ("brightness", colour.brightness),
        ("contrast", colour.contrast),
        ("saturation", colour.saturation),
    ):
        if spread := getattr(settings, name):
            factor_key = keys[_Stream[name.upper()]]
            inputs = hold(change(inputs, 1 + spread * _signed(factor_key, b)))
    if settings.trivial:
        inputs = hold(trivial.recolour(inputs, op, strength))
    if settings.erase:
        inputs = hold(_random_erase(keys[_Stream.ERASE], inputs, settings.erase))

    batch = {**batch, "input": inputs}
    if settings.mixup or settings.cutmix:
        keep, share = _draw_mix(keys, inputs, settings)
        batch["input"] = mixing.mix(inputs, keep)
        batch["target"] = mixing.mix(batch["target"], share)
    return batch


def flip(inputs: jax.Array, flipped: jax.Array) -> jax.Array:
    """Mirrors the last spatial axis (width; time of a series) where bool (b,) says."""
    mirrored = jnp.flip(inputs, axis=-2)
    return jnp.where(colour.per_example(flipped, inputs), mirrored, inputs)


def alternating_flips(index: jax.Array, epoch: jax.Array) -> jax.Array:
    """Which examples to flip so that two epochs in a row show both sides of each.

    In epoch 0 a hash of the example's index, int32 (b,), decides; from then on each
    example takes turns (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024). Bool (b,).
    """
    # Wellons' lowbias32: neighbouring indices fall on unrelated sides.
    x = index.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return (x + jnp.asarray(epoch).astype(jnp.uint32)) % 2 == 1


def pad_and_crop(inputs: jax.Array, offsets: jax.Array, pad: int) -> jax.Array:
    """Crops to the old size after padding every side by `pad` pixels of reflection.

    `offsets`, int32 (b, spatial rank), lie between 0 and 2 `pad`. `pad` must be less
    than each side, as the border's pixels are not repeated (NumPy's `reflect`).
    """
    b, *spatial, c = inputs.shape
    flat = jnp.zeros((b, *[1] * len(spatial)), jnp.int32)
    for axis, side in enumerate(spatial):
        # The padding is never made: its pixels are looked up where they come from.
        place = jnp.abs(offsets[:, axis, None] + jnp.arange(side) - pad)
        place = side - 1 - jnp.abs(side - 1 - place)
        shape = [b, *[1] * len(spatial)]
        shape[axis + 1] = side
        flat = flat * side + place.reshape(shape)
    pixels = inputs.reshape(b, math.prod(spatial), c)
    taken = jnp.take_along_axis(
        pixels, flat.reshape(b, -1, 1), axis=1, mode="promise_in_bounds"
    )
    return taken.reshape(inputs.shape)


def erase(
    images: jax.Array, start: jax.Array, stop: jax.Array, noise: jax.Array
) -> jax.Array:
    """Fills a box of each image (b, h, w, c) with noise (Zhong et al. 2017).

    `start` and `stop` are int32 (b, 2), the latter outside. `noise`, in [0, 1) and of
    a shape that broadcasts, is stretched to the extremes of each image, so that data
    of any range is filled with values it might have.
    """
    inside = mixing.box_mask(start, stop, images.shape[1:3])
    # One axis at a time: the first step runs along memory, many times faster on a CPU.
    low = jnp.min(jnp.min(images, axis=1, keepdims=True), axis=(2, 3), keepdims=True)
    high = jnp.max(jnp.max(images, axis=1, keepdims=True), axis=(2, 3), keepdims=True)
    return jnp.where(inside, low + (high - low) * noise, images)


def _signed(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0)


def _draw_matrices(
    keys: jax.Array, b: int, image_shape: tuple[int, ...], settings: Any
) -> list[jax.Array]:
    """Of the resized crop and of rotation, shear, zoom and shift, if they are on."""
    matrices = []
    if settings.resized_crop:
        key = keys[_Stream.RESIZED_CROP]
        box = affine.draw_crop(key, b, image_shape, settings.resized_crop)
        matrices.append(affine.crop_matrix(*box, image_shape))
    if settings.rotate or settings.shear or settings.zoom or settings.translate:
        turn = settings.rotate * _signed(keys[_Stream.ROTATE], b)
        lean = settings.shear * _signed(keys[_Stream.SHEAR], b)
        shift = settings.translate * _signed(keys[_Stream.TRANSLATE], b, 2)
        matrices.append(
            affine.matrix(
                angle=jnp.deg2rad(turn),
                shear_x=jnp.tan(jnp.deg2rad(lean)),
                zoom=1 + settings.zoom * _signed(keys[_Stream.ZOOM], b),
                shift_y=shift[:, 0] * image_shape[0],
                shift_x=shift[:, 1] * image_shape[1],
            )
        )
    return matrices


def _random_erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Draws for `erase`: area, aspect, place, and whether to erase at all."""
    b, h, w, c = images.shape
    box_key, noise_key = jax.random.split(key)
    chance, area, aspect, *place = jax.random.uniform(box_key, (b, 5)).T
    area = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area) * h * w
    aspect = ERASE_MAX_ASPECT ** (2 * aspect - 1)
    ratio = jnp.stack([aspect, 1 / aspect], axis=1)
    sides = jnp.array([h, w], jnp.float32)
    size = jnp.minimum(jnp.round(jnp.sqrt(area[:, None] * ratio)), sides)
    size = jnp.where(chance[:, None] < probability, size, 0.0)
    start = jnp.floor(jnp.stack(place, axis=1) * (sides - size + 1))
    # One field of noise for the batch: drawing one for each example would take ten
    # times as long as all the rest.
    noise = jax.random.uniform(noise_key, (h, w, c))
    stop = (start + size).astype(jnp.int32)
    return erase(images, start.astype(jnp.int32), stop, noise)


def _draw_mix(
    keys: jax.Array, inputs: jax.Array, settings: Any
) -> tuple[jax.Array, jax.Array]:
    """What to keep of each place of the inputs, and of each target.

    Drawn for each example rather than once a batch (both are in Zhang et al. 2017):
    a step then sees all strengths, so that its loss varies less. With both mixup and
    CutMix on, a fair coin decides for each example.
    """
    b, *spatial, _ = inputs.shape
    if settings.mixup:
        share = mixing.symmetric_beta(keys[_Stream.MIXUP], settings.mixup, b)
        keep = colour.per_example(share, inputs)
    if settings.cutmix:
        share_key, centre_key = jax.random.split(keys[_Stream.CUTMIX])
        cut = mixing.symmetric_beta(share_key, settings.cutmix, b)
        centre = jax.random.uniform(centre_key, (b, len(spatial)))
        start, stop, cut_share = mixing.cutmix_box(cut, centre, tuple(spatial))
        pasted = mixing.box_mask(start, stop, tuple(spatial))
        cut_keep = jnp.where(pasted, 0.0, 1.0)
        if not settings.mixup:
            return cut_keep, cut_share
        coin = jax.random.bernoulli(keys[_Stream.MIXUP_OR_CUTMIX], shape=(b,))
        keep = jnp.where(colour.per_example(coin, inputs), cut_keep, keep)
        share = jnp.where(coin, cut_share, share)
    return keep, share


def _check(settings: Any, batch: dict[str, Any]) -> None:
    """Raises ValueError naming the setting that does not fit the batch."""
    shape, target_shape = batch["input"].shape, batch["target"].shape
    if settings.flip not in ("none", "random", "alternating"):
        raise ValueError(
            f"augment.flip is {settings.flip!r}; "
            "it must be 'none', 'random' or 'alternating'"
        )
    if settings.crop_pad >= min(shape[1:-1]):
        raise ValueError(
            f"augment.crop_pad={settings.crop_pad} must be less than each side of the "
            f"input, whose shape is {shape}"
        )
    scale = settings.resized_crop
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(
            f"augment.resized_crop={tuple(scale)} must be the least and the greatest "
            "share of the area, such as (0.25, 1.0)"
        )
    if settings.saturation and shape[-1] != 3:
        raise ValueError(
            f"augment.saturation={settings.saturation} needs 3 channels; the shape of "
            f"the input is {shape}"
        )
    warps = ("resized_crop", "rotate", "shear", "zoom", "translate", "trivial")
    for name in (*warps, "erase"):
        if getattr(settings, name) and len(shape) != 4:
            raise ValueError(
                f"augment.{name}={getattr(settings, name)} needs 2 spatial dimensions; "
                f"the shape of the input is {shape}"
            )
    for name in ("flip", "crop_pad", *warps, "cutmix"):
        on = getattr(settings, name)
        if on and on != "none" and len(target_shape) > 2:
            raise ValueError(
                f"augment.{name}={on} would move the input but not its target, which "
                f"is a map of shape {target_shape}; turn it off"
            )
