"""Augmentations against NumPy, SciPy and Pillow, and the statistics of their draws."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from convnet.data import affine, augment, colour, mixing, trivial

OFF = {
    "flip": "none",
    "crop_pad": 0,
    "resized_crop": (),
    "rotate": 0.0,
    "shear": 0.0,
    "zoom": 0.0,
    "translate": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "trivial": False,
}
# Each operation on, at a setting that changes nearly every example.
ON = {
    "flip": "random",
    "crop_pad": 3,
    "resized_crop": (0.2, 0.6),
    "rotate": 40.0,
    "shear": 20.0,
    "zoom": 0.4,
    "translate": 0.3,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.5,
    "erase": 0.9,
    "mixup": 1.0,
    "cutmix": 1.0,
    "trivial": True,
}
LEVEL = 1 / 255
# Compiled as a whole: one operation after another takes far longer.
warp = jax.jit(affine.warp)
matrix = jax.jit(affine.matrix)
draw_crop = jax.jit(affine.draw_crop, static_argnums=(1, 2, 3))
pad_and_crop = jax.jit(augment.pad_and_crop, static_argnums=2)
equalize = jax.jit(colour.equalize)
symmetric_beta = jax.jit(mixing.symmetric_beta, static_argnums=(1, 2))


def settings(**changes):
    return SimpleNamespace(**{**OFF, **changes})


def batch_of(inputs, epoch=0):
    b = len(inputs)
    return {
        "input": jnp.asarray(inputs, jnp.float32),
        "target": jax.nn.one_hot(jnp.arange(b) % 5, 5),
        "weight": jnp.ones(b),
        "index": jnp.arange(b, dtype=jnp.int32),
        "epoch": jnp.int32(epoch),
    }


def augmented(inputs, seed=0, **changes):
    step = jax.jit(lambda key, batch: augment.apply(key, batch, settings(**changes)))
    return np.asarray(step(jax.random.key(seed), batch_of(inputs))["input"])


@pytest.fixture(scope="module")
def pictures():
    """Six smooth, coloured uint8 pictures, neither square nor of an even side."""
    noise = np.random.default_rng(0).random((6, 17, 22, 3))
    soft = scipy.ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 0))
    low, high = soft.min((1, 2), keepdims=True), soft.max((1, 2), keepdims=True)
    spread = np.linspace(0.4, 1.0, 6)[:, None, None, None]
    return np.round((soft - low) / (high - low) * 240 * spread + 5).astype(np.uint8)


@pytest.fixture(scope="module")
def images(pictures):
    return pictures.astype(np.float32) / 255


# Geometry


@pytest.mark.parametrize("shape", [(4, 9, 2), (4, 5, 6, 3), (4, 3, 4, 5, 1)])
def test_flip_mirrors_the_last_spatial_axis_where_told(shape):
    inputs = np.random.default_rng(1).random(shape, np.float32)
    flipped = np.array([True, False, False, True])
    expected = inputs.copy()
    expected[flipped] = expected[flipped][..., ::-1, :]
    np.testing.assert_array_equal(augment.flip(inputs, flipped), expected)


def test_alternating_flips_take_turns_and_begin_at_random():
    index = np.arange(20_000, dtype=np.int32)
    first, second, third = (
        np.asarray(augment.alternating_flips(index, jnp.int32(e))) for e in range(3)
    )
    np.testing.assert_array_equal(second, ~first)
    np.testing.assert_array_equal(third, first)
    # Fair, and neighbours (and every other, and every fourth) fall independently.
    assert scipy.stats.binomtest(int(first.sum()), index.size).pvalue > 1e-3
    for step in (1, 2, 4):
        same = int((first[step:] == first[:-step]).sum())
        assert scipy.stats.binomtest(same, index.size - step).pvalue > 1e-3


def test_apply_alternates_by_index_not_by_place(images):
    batch = batch_of(images)
    batch["index"] = batch["index"][::-1]
    config, key = settings(flip="alternating"), jax.random.key(0)
    for epoch in (0, 1):
        out = augment.apply(key, {**batch, "epoch": jnp.int32(epoch)}, config)
        flipped = augment.alternating_flips(np.arange(6)[::-1], epoch)
        np.testing.assert_array_equal(out["input"], augment.flip(images, flipped))


@pytest.mark.parametrize("spatial", [(9,), (7, 8), (4, 5, 6)])
def test_pad_and_crop_is_numpys_reflection(spatial):
    rng = np.random.default_rng(2)
    inputs = rng.random((5, *spatial, 2), np.float32)
    pad = 3
    offsets = rng.integers(0, 2 * pad + 1, (5, len(spatial)))
    offsets[0], offsets[1] = 0, 2 * pad
    out = pad_and_crop(inputs, jnp.asarray(offsets), pad)
    for image, place, cropped in zip(inputs, offsets, np.asarray(out), strict=True):
        padded = np.pad(image, [(pad, pad)] * len(spatial) + [(0, 0)], "reflect")
        window = tuple(
            slice(o, o + side) for o, side in zip(place, spatial, strict=True)
        )
        np.testing.assert_array_equal(cropped, padded[window])


def test_a_series_is_flipped_and_shifted():
    series = np.random.default_rng(6).random((40, 9, 2), np.float32)
    out = augmented(series, flip="random", crop_pad=3)
    found = []
    for example, result in zip(series, out, strict=True):
        for turned in (False, True):
            padded = np.pad(
                example[::-1] if turned else example, [(3, 3), (0, 0)], "reflect"
            )
            windows = [np.array_equal(padded[o : o + 9], result) for o in range(7)]
            found += [(turned, o) for o in np.flatnonzero(windows)]
    assert len(found) == len(series)
    assert len(set(found)) > 8  # both sides, and many of the shifts


def test_warp_is_scipys_affine_transform(images):
    angle = np.deg2rad([0, 30, -75, 135, 10, -10])
    shear = np.array([0, 0.3, -0.5, 0, 0.99, 0.1])
    zoom = np.array([1, 0.5, 1.7, 1, 1, 0.9])
    shift = np.array([[0, 0], [3, -2.5], [0, 9], [30, 1], [-4, 0.5], [0, 0]])
    matrices = matrix(
        angle=jnp.asarray(angle),
        shear_x=jnp.asarray(shear),
        zoom=jnp.asarray(zoom),
        shift_y=jnp.asarray(shift[:, 0]),
        shift_x=jnp.asarray(shift[:, 1]),
    )
    out = np.asarray(warp(jnp.asarray(images), matrices))
    np.testing.assert_allclose(out[0], images[0], atol=1e-6)
    centre = (np.array(images.shape[1:3]) - 1) / 2
    for i, image in enumerate(images):
        cos, sin = np.cos(angle[i]), np.sin(angle[i])
        rotation = np.array([[cos, -sin], [sin, cos]])  # of (y, x), y down
        forward = rotation @ np.array([[1, 0], [shear[i], 1]]) * zoom[i]
        inverse = np.linalg.inv(forward)
        offset = centre - inverse @ (centre + shift[i])
        for channel in range(3):
            expected = scipy.ndimage.affine_transform(
                image[..., channel].astype(np.float64),
                inverse,
                offset,
                order=1,
                mode="reflect",
            )
            np.testing.assert_allclose(out[i, ..., channel], expected, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "data"),
    [
        # Pillow's matrix, for (x, y) of pixels from the upper left corner, y down.
        ({"shear_x": 0.25}, lambda y, x: (1, -0.25, 0.25 * y, 0, 1, 0)),
        ({"shear_y": 0.25}, lambda y, x: (1, 0, 0, -0.25, 1, 0.25 * x)),
        ({"shift_x": 2.0}, lambda y, x: (1, 0, -2, 0, 1, 0)),
        ({"shift_y": -3.0}, lambda y, x: (1, 0, 0, 0, 1, 3)),
        ({"zoom": 2.0}, lambda y, x: (0.5, 0, x / 2, 0, 0.5, y / 2)),
    ],
)
def test_directions_of_the_warp_are_pillows(pictures, images, change, data):
    h, w = images.shape[1:3]
    out = warp(jnp.asarray(images[:1]), matrix(**change)[None])
    expected = Image.fromarray(pictures[0]).transform(
        (w, h), Image.Transform.AFFINE, data(h / 2, w / 2), Image.Resampling.BILINEAR
    )
    inner = np.s_[6:-6, 6:-6]  # Pillow fills what lies outside with black
    difference = np.asarray(out)[0] - np.asarray(expected) / 255
    np.testing.assert_allclose(difference[inner], 0, atol=1.01 * LEVEL)


def test_rotation_is_counter_clockwise_as_pillows(pictures):
    square = pictures[0, :17, :17]
    out = warp(
        jnp.asarray(square[None] / 255, jnp.float32),
        matrix(angle=jnp.deg2rad(jnp.array([30.0]))),
    )
    expected = Image.fromarray(square).rotate(30, Image.Resampling.BILINEAR)
    inner = np.s_[4:-4, 4:-4]
    difference = np.asarray(out)[0] - np.asarray(expected) / 255
    np.testing.assert_allclose(difference[inner], 0, atol=1.01 * LEVEL)


def test_resized_crop_is_pillows_resize_of_the_box(pictures, images):
    b, h, w = images.shape[:3]
    top, left = np.array([0, 1.5, 4, 6.25, 0, 2]), np.array([0, 3, 9.5, 1, 10, 0])
    height, width = np.array([h, 8, 13, 5.5, 9, 15]), np.array([w, 8, 12.5, 9, 12, 22])
    boxes = [jnp.asarray(v, jnp.float32) for v in (top, left, height, width)]
    matrices = affine.crop_matrix(*boxes, (h, w))
    out = np.asarray(warp(jnp.asarray(images), matrices))
    for i in range(b):
        box = (left[i], top[i], left[i] + width[i], top[i] + height[i])
        expected = Image.fromarray(pictures[i]).resize(
            (w, h), Image.Resampling.BILINEAR, box=box
        )
        np.testing.assert_allclose(out[i], np.asarray(expected) / 255, atol=2 * LEVEL)


def test_composed_matrices_are_warps_one_after_another():
    # On a plane that is linear in y and x, bilinear sampling is exact away from the
    # border, so that one warp must equal two.
    y, x = np.mgrid[:41, :41]
    plane = jnp.asarray((0.3 * y + 0.5 * x)[None, ..., None], jnp.float32)
    first = matrix(angle=jnp.array([0.3]), shift_x=jnp.array([2.0]))
    second = matrix(zoom=jnp.array([1.5]), shear_y=jnp.array([0.2]))
    once = warp(plane, affine.compose(first, second))
    twice = warp(warp(plane, first), second)
    inner = np.s_[:, 12:-12, 12:-12]
    np.testing.assert_allclose(once[inner], twice[inner], atol=1e-3)
    other = warp(warp(plane, second), first)
    assert np.abs(other[inner] - once[inner]).max() > 0.1


def test_a_single_row_can_be_warped():
    row = jnp.arange(8, dtype=jnp.float32).reshape(1, 1, 8, 1)
    out = warp(row, matrix(shift_x=jnp.array([2.0])))
    np.testing.assert_allclose(out.ravel(), [1, 0, 0, 1, 2, 3, 4, 5], atol=1e-6)


# Colours


def against_pillow(pictures, ours, pillows, tolerance=1.01 * LEVEL):
    ours = np.clip(np.asarray(ours), 0, 1)
    for i, picture in enumerate(pictures):
        expected = np.asarray(pillows(Image.fromarray(picture), i)) / 255
        np.testing.assert_allclose(ours[i], expected, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "enhance", "tolerance"),
    [
        (colour.brightness, ImageEnhance.Brightness, 1.01 * LEVEL),
        # Pillow rounds greys to whole levels before it scales the distance to them.
        (colour.contrast, ImageEnhance.Contrast, 1.6 * LEVEL),
        (colour.saturation, ImageEnhance.Color, 2.1 * LEVEL),
    ],
)
def test_factors_are_pillows(pictures, images, change, enhance, tolerance):
    factors = np.array([0.0, 0.3, 0.9, 1.0, 1.4, 1.99], np.float32)
    against_pillow(
        pictures,
        change(jnp.asarray(images), jnp.asarray(factors)),
        lambda picture, i: enhance(picture).enhance(factors[i]),
        tolerance,
    )


@pytest.mark.parametrize("spatial", [(16,), (3, 4, 5)])
def test_factors_scale_data_of_any_rank_and_range(spatial):
    inputs = np.random.default_rng(5).normal(2, 9, (3, *spatial, 2))
    factors = np.array([0.5, 1.0, 1.7]).reshape(3, *[1] * (len(spatial) + 1))
    mean = inputs.mean(tuple(range(1, inputs.ndim)), keepdims=True)
    ours, by = jnp.asarray(inputs, jnp.float32), jnp.asarray(factors.ravel())
    np.testing.assert_allclose(
        colour.brightness(ours, by), inputs * factors, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        colour.contrast(ours, by), mean + factors * (inputs - mean), atol=1e-4
    )


def test_smooth_is_pillows_filter(pictures, images):
    against_pillow(
        pictures,
        colour.smooth(jnp.asarray(images)),
        lambda picture, i: picture.filter(ImageFilter.SMOOTH),
    )


def test_auto_contrast_is_pillows(pictures, images):
    flat = np.full_like(pictures[:1], 77)
    both = np.concatenate([pictures, flat])
    against_pillow(
        both,
        colour.auto_contrast(jnp.asarray(both / np.float32(255))),
        lambda picture, i: ImageOps.autocontrast(picture),
    )


def test_equalize_is_pillows():
    rng = np.random.default_rng(3)
    # Enough pixels for Pillow to do something, a dark one, few levels, one level.
    pictures = np.stack(
        [
            rng.integers(0, 256, (31, 33, 3)),
            rng.beta(2, 8, (31, 33, 3)) * 255,
            rng.integers(0, 4, (31, 33, 3)) * 60,
            np.full((31, 33, 3), 9),
        ]
    ).astype(np.uint8)
    out = equalize(jnp.asarray(pictures / np.float32(255)))
    against_pillow(pictures, out, lambda p, i: ImageOps.equalize(p), 1e-6)
    few = pictures[:, :8, :8]  # fewer pixels than levels: left as they are
    out = equalize(jnp.asarray(few / np.float32(255)))
    against_pillow(few, out, lambda p, i: ImageOps.equalize(p), 1e-6)


def test_posterize_and_solarize_are_pillows(pictures, images):
    bits = np.array([1, 2, 3, 5, 7, 8])
    against_pillow(
        pictures,
        colour.posterize(jnp.asarray(images), jnp.asarray(bits)),
        lambda picture, i: ImageOps.posterize(picture, int(bits[i])),
        1e-6,
    )
    threshold = np.array([0, 50, 100, 128, 200, 256])
    against_pillow(
        pictures,
        # Between two levels, so that rounding does not decide.
        colour.solarize(jnp.asarray(images), jnp.asarray((threshold - 0.5) / 255)),
        lambda picture, i: ImageOps.solarize(picture, int(threshold[i])),
        1e-6,
    )


# TrivialAugment


@jax.jit
def one_for_all(images, op, strength):
    moved = affine.warp(images, trivial.geometry(op, strength))
    return trivial.recolour(moved, op, strength)


def trivially(images, name, strength):
    op = jnp.full(len(images), trivial.OPS.index(name))
    return one_for_all(jnp.asarray(images), op, jnp.full(len(images), strength))


@pytest.mark.parametrize(
    ("name", "strength", "pillows", "tolerance"),
    [
        ("identity", 0.7, lambda p: p, 1e-6),
        ("auto_contrast", 0.7, ImageOps.autocontrast, 1.01 * LEVEL),
        ("equalize", -0.7, ImageOps.equalize, 1e-6),
        ("solarize", -0.5, lambda p: ImageOps.solarize(p, 128), 1e-6),
        ("posterize", 0.5, lambda p: ImageOps.posterize(p, 5), 1e-6),
        ("posterize", -1.0, lambda p: ImageOps.posterize(p, 2), 1e-6),
        ("saturation", 0.5, lambda p: ImageEnhance.Color(p).enhance(1.495), 0.008),
        ("contrast", -1.0, lambda p: ImageEnhance.Contrast(p).enhance(0.01), 0.008),
        ("brightness", 0.5, lambda p: ImageEnhance.Brightness(p).enhance(1.495), 0.004),
        ("sharpness", 1.0, lambda p: ImageEnhance.Sharpness(p).enhance(1.99), 0.008),
    ],
)
def test_trivial_colours_are_pillows(
    pictures, images, name, strength, pillows, tolerance
):
    out = trivially(images, name, strength)
    against_pillow(pictures, out, lambda picture, i: pillows(picture), tolerance)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("rotate", {"angle": np.deg2rad(-135 * 0.4)}),
        ("shear_x", {"shear_x": -0.99 * 0.4}),
        ("shear_y", {"shear_y": -0.99 * 0.4}),
        ("translate_x", {"shift_x": -32 * 0.4}),
        ("translate_y", {"shift_y": -32 * 0.4}),
    ],
)
def test_trivial_geometry_moves_and_does_not_recolour(images, name, parameter):
    matrices = jnp.tile(matrix(**parameter), (len(images), 1, 1))
    expected = warp(jnp.asarray(images), matrices)
    assert np.abs(expected - images).max() > 0.1
    np.testing.assert_allclose(trivially(images, name, -0.4), expected, atol=1e-5)


def test_trivial_draws_every_operation_alike():
    op, strength = map(np.asarray, trivial.draw(jax.random.key(0), 14_000))
    assert scipy.stats.chisquare(np.bincount(op, minlength=14)).pvalue > 1e-3
    assert len(np.bincount(op)) == len(trivial.OPS) == 14
    assert scipy.stats.kstest(strength, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(op, strength)[0, 1]) < 0.03


def test_trivial_works_for_any_number_of_channels(images):
    out = augmented(np.tile(images[..., :2], (8, 1, 1, 1)), trivial=True)
    assert out.min() >= 0 and out.max() <= 1 and np.isfinite(out).all()
    grey = images[:, :, :, :1]
    np.testing.assert_array_equal(trivially(grey, "saturation", 0.9), grey)


# Erasing and mixing


def test_erase_fills_the_box_within_the_range_of_the_image():
    rng = np.random.default_rng(4)
    images = rng.normal(3.0, 5.0, (2, 9, 8, 3)).astype(np.float32)
    start, stop = np.array([[2, 1], [0, 0]]), np.array([[5, 8], [0, 0]])
    noise = rng.random((9, 8, 3), np.float32)
    out = augment.erase(jnp.asarray(images), start, stop, noise)
    expected = images.copy()
    low, high = images[0].min(), images[0].max()
    expected[0, 2:5, 1:8] = low + (high - low) * noise[2:5, 1:8]
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_random_erasing_draws_the_papers_boxes():
    images = np.full((1000, 24, 30, 1), 0.25, np.float32)
    images[:, 0, 0], images[:, -1, -1] = 0.0, 1.0  # the range of the noise
    erased = augmented(images, erase=0.4) != images
    hit = erased.reshape(1000, -1).sum(1) > 0
    assert scipy.stats.binomtest(int(hit.sum()), 1000, 0.4).pvalue > 1e-3
    area, aspect, above = [], [], []
    for mask in erased[hit][..., 0]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        # A full rectangle, but for a corner that chance may leave as it was.
        assert mask.sum() >= height * width - 2
        area.append(height * width / 720)
        aspect.append(height / width)
        above.append(rows[0] / max(24 - height, 1))
    assert 0.015 < min(area) < 0.04 and 0.35 < max(area) <= 0.42
    assert abs(np.mean(area) - 0.205) < 0.02
    assert abs(np.mean(np.log(aspect))) < 0.1 and max(aspect) < 4.6
    assert abs(np.mean(above) - 0.5) < 0.06


def test_mix_blends_with_the_example_before():
    values = np.arange(5, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    keep = np.array([1, 0, 0.25, 0.5, 1], np.float32)
    out = np.asarray(mixing.mix(jnp.asarray(values), jnp.asarray(keep)))
    for i in range(5):
        expected = keep[i] * values[i] + (1 - keep[i]) * values[i - 1]
        np.testing.assert_allclose(out[i], expected)


@pytest.mark.parametrize("spatial", [(12,), (7, 10), (4, 5, 6)])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_are_mixed_by_what_is_left_of_the_inputs(name, spatial):
    # Each example is a constant, its place in the batch: the mean of its input says
    # how much is left, and so must a target that is that place.
    b = 40
    place = np.arange(b, dtype=np.float32)
    batch = batch_of(np.broadcast_to(place.reshape(b, *[1] * 4)[..., 0], (b, 1, 1, 1)))
    shape = (b, *[1] * len(spatial), 1)
    batch["input"] = jnp.broadcast_to(place.reshape(shape), (b, *spatial, 2))
    batch["target"] = jnp.asarray(place)
    out = augment.apply(jax.random.key(1), batch, settings(**{name: 1.0}))
    inputs = np.asarray(out["input"])
    mean = inputs.reshape(b, -1).mean(1)
    np.testing.assert_allclose(mean, out["target"], atol=1e-4)
    partner = np.roll(place, 1)
    whole = (inputs == place.reshape(shape)) | (inputs == partner.reshape(shape))
    assert whole.all() == (name == "cutmix")
    assert np.abs(mean - place).max() > 0.5


def test_cutmix_boxes_have_the_area_asked_for_and_are_clipped():
    share = jnp.array([0.75, 0.75, 0.0, 1.0])
    centre = jnp.array([[0.5, 0.5], [0.0, 0.999], [0.5, 0.5], [0.3, 0.3]])
    start, stop, kept = mixing.cutmix_box(share, centre, (8, 12))
    np.testing.assert_array_equal(start[:3], [[2, 3], [0, 8], [0, 0]])
    np.testing.assert_array_equal(stop[:3], [[6, 9], [2, 12], [8, 12]])
    np.testing.assert_allclose(kept, [1 - 24 / 96, 1 - 8 / 96, 0, 1], atol=1e-6)
    mask = np.asarray(mixing.box_mask(start, stop, (8, 12)))
    np.testing.assert_allclose(1 - mask.mean((1, 2, 3)), kept, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_follows_beta(alpha):
    draws = np.asarray(symmetric_beta(jax.random.key(2), alpha, 20_000))
    assert draws.min() >= 0 and draws.max() <= 1
    # Not closer to 1, where a float32 is too coarse for what a small alpha puts there.
    grid = np.linspace(0.001, 0.999, 999)
    empirical = np.searchsorted(np.sort(draws), grid, side="right") / draws.size
    distance = np.abs(empirical - scipy.stats.beta(alpha, alpha).cdf(grid)).max()
    assert distance < scipy.stats.kstwo(draws.size).isf(1e-3)


def test_mixup_and_cutmix_share_the_batch_by_a_coin():
    b = 600
    inputs = np.broadcast_to(np.arange(b).reshape(b, 1, 1, 1), (b, 6, 6, 1))
    both = augmented(inputs, mixup=1.0, cutmix=1.0)
    mixup, cutmix = augmented(inputs, mixup=1.0), augmented(inputs, cutmix=1.0)
    by_mixup = np.isclose(both, mixup).all((1, 2, 3))
    by_cutmix = np.isclose(both, cutmix).all((1, 2, 3))
    assert (by_mixup | by_cutmix).all()
    only = int((by_mixup & ~by_cutmix).sum())
    assert scipy.stats.binomtest(only, b).pvalue > 1e-3


# Draws


def test_flips_and_crops_are_drawn_evenly():
    b, pad = 4000, 2
    ramp = np.arange(6.0)[:, None] * 10 + np.arange(6.0)
    inputs = np.broadcast_to(ramp[..., None], (b, 6, 6, 1))
    flipped = augmented(inputs, flip="random")[:, 0, 0, 0] == 5
    assert scipy.stats.binomtest(int(flipped.sum()), b).pvalue > 1e-3
    # An inner pixel tells the offset: nothing is reflected into it.
    inner = augmented(inputs, crop_pad=pad)[:, 2, 2, 0]
    counts = np.unique(inner, return_counts=True)
    places = np.add.outer(np.arange(5) * 10, np.arange(5)).ravel()
    np.testing.assert_array_equal(counts[0], places)
    assert scipy.stats.chisquare(counts[1]).pvalue > 1e-3


def test_resized_crops_are_drawn_from_scale_and_aspect():
    h, w = 100, 100
    key, scale = jax.random.key(5), (0.2, 0.5)
    boxes = draw_crop(key, 5000, (h, w), scale)
    top, left, height, width = (np.asarray(v, np.float64) for v in boxes)
    area = scipy.stats.uniform(0.2, 0.3)
    assert scipy.stats.kstest(height * width / h / w, area.cdf).pvalue > 1e-3
    limit = np.log(4 / 3)
    aspect = scipy.stats.uniform(-limit, 2 * limit)
    assert scipy.stats.kstest(np.log(width / height), aspect.cdf).pvalue > 1e-3
    assert scipy.stats.kstest(top / (h - height), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(left / (w - width), "uniform").pvalue > 1e-3


def test_whole_crops_stay_inside_the_image():
    boxes = draw_crop(jax.random.key(6), 500, (20, 50), (0.9, 1.0))
    top, left, height, width = map(np.asarray, boxes)
    assert (top >= 0).all() and (top + height <= 20 + 1e-4).all()
    assert (left >= 0).all() and (left + width <= 50 + 1e-4).all()


def test_warps_and_factors_are_drawn_up_to_their_settings():
    b = 2000
    # Planes of y and x show the matrix in their slopes and in their middle.
    y, x = np.mgrid[-10:11, -10:11].astype(np.float32)
    plane = np.broadcast_to(np.stack([y, x], -1), (b, 21, 21, 2))

    def slopes(**changes):
        out = augmented(plane, **changes)[:, 9:12, 9:12]
        return (out[:, 2, 1] - out[:, 0, 1]) / 2, (out[:, 1, 2] - out[:, 1, 0]) / 2

    def spans(draws, low, high):
        uniform = scipy.stats.uniform(low, high - low)
        # Single precision may step over the limits.
        assert low - 1e-3 < draws.min() and draws.max() < high + 1e-3
        assert scipy.stats.kstest(draws, uniform.cdf).pvalue > 1e-3

    by_y, _ = slopes(rotate=25.0)
    spans(np.rad2deg(np.arctan2(by_y[:, 1], by_y[:, 0])), -25, 25)
    by_y, _ = slopes(shear=25.0)
    spans(np.rad2deg(np.arctan(by_y[:, 1])), -25, 25)
    by_y, by_x = slopes(zoom=0.3)
    spans(1 / by_y[:, 0], 0.7, 1.3)
    np.testing.assert_allclose(by_y[:, 0], by_x[:, 1], atol=1e-4)
    middle = augmented(plane, translate=0.2)[:, 10, 10]
    spans(middle[:, 0], -4.2, 4.2)
    spans(middle[:, 1], -4.2, 4.2)
    assert abs(np.corrcoef(middle.T)[0, 1]) < 0.1

    colours = np.broadcast_to(np.float32([[[0.2, 0.4, 0.6]]]), (b, 1, 2, 3))
    spans(augmented(colours, brightness=0.4)[:, 0, 0, 1] / 0.4, 0.6, 1.4)
    out = augmented(colours, saturation=0.4)[:, 0, 0]
    spans((out[:, 2] - out[:, 0]) / 0.4, 0.6, 1.4)
    pair = np.broadcast_to(np.float32([[[0.2], [0.4]]]), (b, 1, 2, 1))
    out = augmented(pair, contrast=0.4)
    spans((out[:, 0, 1, 0] - out[:, 0, 0, 0]) / 0.2, 0.6, 1.4)


@pytest.fixture(scope="module")
def everything():
    return jax.jit(lambda key, batch: augment.apply(key, batch, SimpleNamespace(**ON)))


def test_the_same_key_gives_the_same_batch(everything, images):
    batch = batch_of(images)
    first = everything(jax.random.key(0), batch)
    again = everything(jax.random.key(0), batch)
    other = everything(jax.random.key(1), batch)
    for name in ("input", "target"):
        np.testing.assert_array_equal(first[name], again[name])
        assert np.abs(np.asarray(first[name]) - np.asarray(other[name])).max() > 0.1
    for name in ("weight", "index", "epoch"):
        np.testing.assert_array_equal(first[name], batch[name])
    assert first["input"].shape == images.shape
    assert first["input"].dtype == first["target"].dtype == jnp.float32


def test_nothing_on_changes_nothing(images):
    batch = batch_of(images)
    out = augment.apply(jax.random.key(0), batch, settings())
    assert all(out[name] is batch[name] for name in batch)


def drawn(b, **changes):
    """The first four of each array that is drawn from `jax.random`, as lists."""
    seen = []

    def spy(draw):
        def spied(*args, **kwargs):
            out = draw(*args, **kwargs)
            seen.append(out.ravel()[:4].astype(jnp.float32))
            return out

        return spied

    def draws(batch):
        with pytest.MonkeyPatch.context() as patch:
            for kind in ("uniform", "randint", "bernoulli"):
                patch.setattr(jax.random, kind, spy(getattr(jax.random, kind)))
            augment.apply(jax.random.key(4), batch, settings(**changes))
        return seen  # and nothing else, so that no more is compiled

    batch = batch_of(np.zeros((b, 8, 8, 3)))
    return [np.asarray(values).tolist() for values in jax.jit(draws)(batch)]


@pytest.fixture(scope="module")
def drawn_together():
    return drawn(4, **ON)


@pytest.mark.parametrize("name", list(ON))
def test_turning_one_on_leaves_the_draws_of_the_others(drawn_together, name):
    alone = drawn(4, **{name: ON[name]})
    assert alone and all(values in drawn_together for values in alone)


def test_no_two_operations_share_their_draws(drawn_together):
    assert len({tuple(values) for values in drawn_together}) == len(drawn_together)


def test_draws_do_not_depend_on_the_size_of_the_batch(drawn_together):
    assert drawn(7, **ON) == drawn_together


SHARDED = """
import json, sys
import jax, numpy as np
from types import SimpleNamespace
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from convnet.data import augment
config = SimpleNamespace(**json.loads(sys.argv[1]))
mesh = Mesh(np.array(jax.devices()), ("data",))
with np.load(sys.argv[2], allow_pickle=False) as file:
    batch = {
        name: jax.device_put(v, NamedSharding(mesh, P("data") if v.ndim else P()))
        for name, v in file.items()
    }
key = jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))
out = jax.jit(lambda key, batch: augment.apply(key, batch, config))(key, batch)
assert len(batch["input"].sharding.device_set) == 2
np.savez(sys.argv[2], **out)
"""


def test_draws_do_not_depend_on_the_number_of_devices(everything, images, tmp_path):
    batch = batch_of(images)
    path = tmp_path / "batch.npz"
    np.savez(path, **batch)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
        " --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, json.dumps(ON), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = everything(jax.random.key(0), batch)
    with np.load(path, allow_pickle=False) as spread:
        for name in ("input", "target"):
            np.testing.assert_allclose(spread[name], alone[name], atol=1e-4)


# What does not fit


@pytest.mark.parametrize(
    "name", ["resized_crop", "rotate", "shear", "zoom", "translate", "erase", "trivial"]
)
@pytest.mark.parametrize("spatial", [(16,), (4, 5, 6)])
def test_what_needs_two_dimensions_says_so(name, spatial):
    with pytest.raises(ValueError, match=rf"augment\.{name}=.*2 spatial dimensions"):
        augmented(np.zeros((2, *spatial, 3)), **{name: ON[name]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": "vertical"}, "augment.flip is 'vertical'"),
        ({"crop_pad": 4}, "augment.crop_pad=4 must be less"),
        ({"saturation": 0.2}, "augment.saturation=0.2 needs 3 channels"),
        ({"resized_crop": (0.5, 2.0)}, r"augment.resized_crop=\(0.5, 2.0\)"),
        ({"resized_crop": (0.5,)}, r"augment.resized_crop=\(0.5,\)"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        augmented(np.zeros((2, 4, 6, 2)), **changes)


@pytest.mark.parametrize("name", ["flip", "crop_pad", "rotate", "cutmix"])
def test_a_map_as_target_is_not_torn_from_its_input(name):
    batch = batch_of(np.zeros((2, 8, 8, 3)))
    batch["target"] = jnp.zeros((2, 8, 8, 1))
    with pytest.raises(ValueError, match=rf"augment\.{name}=.*target"):
        augment.apply(jax.random.key(0), batch, settings(**{name: ON[name]}))
    out = augment.apply(jax.random.key(0), batch, settings(mixup=1.0))
    assert out["target"].shape == (2, 8, 8, 1)
