"""decode against pixels worked out with NumPy, and against hostile files."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from convnet.data.decode import (
    LEAST_LEFT,
    MAX_PIXELS,
    DecodeError,
    decode,
    fit,
    shape,
)
from convnet.data.resize import Resize
from convnet.errors import ConvnetError

# Pillow warns of broken metadata and large claims; what counts is what decode does.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)
GRAY = RNG.integers(0, 256, (6, 9), np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(data: bytes, channels: int = 3) -> np.ndarray:
    return decode(data, "x", size=0, resize=Resize(), channels=channels)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without fine detail, which any good resize renders alike."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(3 * y / height + 1),
        np.cos(4 * x / width),
        np.sin(2 * y / height + x / width),
    ]
    return np.rint(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(RGB), format, **options)
    pixels = plain(data)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, RGB)
    assert pixels.flags.writeable and pixels.flags.c_contiguous


def test_jpeg_from_bytes_and_from_path(tmp_path):
    data = encoded(Image.fromarray(smooth(40, 60)), "JPEG", quality=95)
    (tmp_path / "x.jpg").write_bytes(data)
    pixels = plain(data)
    np.testing.assert_array_equal(plain(tmp_path / "x.jpg"), pixels)
    assert np.abs(pixels.astype(int) - smooth(40, 60)).max() < 12


def test_gray_to_rgb_and_rgb_to_luma():
    data = encoded(Image.fromarray(GRAY))
    np.testing.assert_array_equal(plain(data), np.repeat(GRAY[..., None], 3, -1))
    np.testing.assert_array_equal(plain(data, channels=1), GRAY[..., None])
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    pixels = plain(encoded(Image.fromarray(RGB)), channels=1)
    assert pixels.shape == (6, 9, 1)
    assert np.abs(pixels[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_to_the_nearest(format):
    deep = RNG.integers(0, 65536, (6, 9), np.uint16)
    deep[0, :2] = 0, 65535
    pixels = plain(encoded(Image.fromarray(deep), format))
    want = np.rint(deep.astype(float) * 255 / 65535)
    np.testing.assert_array_equal(pixels, np.repeat(want[..., None], 3, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_are_refused(dtype):
    data = encoded(Image.fromarray(GRAY.astype(dtype)), "TIFF")
    with pytest.raises(DecodeError, match="32-bit pixels have no defined white"):
        plain(data)


def test_bilevel():
    data = encoded(Image.fromarray(GRAY > 127))
    np.testing.assert_array_equal(plain(data)[..., 1], np.where(GRAY > 127, 255, 0))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette(format):
    indices = RNG.integers(0, 7, (6, 9), np.uint8)
    colours = RNG.integers(0, 256, (7, 3), np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours.tobytes())
    np.testing.assert_array_equal(plain(encoded(image, format)), colours[indices])
    # One colour transparent: it becomes white.
    seen = plain(encoded(image, format, transparency=3))
    colours[3] = 255
    np.testing.assert_array_equal(seen, colours[indices])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_over_white(mode):
    alpha = RNG.integers(0, 256, (6, 9, 1), np.uint8)
    colour = RGB if mode == "RGBA" else GRAY[..., None]
    image = Image.fromarray(np.concatenate([colour, alpha], -1), mode)
    want = 255 - (255.0 - colour) * (alpha / 255)
    pixels = plain(encoded(image))
    assert np.abs(pixels - np.broadcast_to(want, (6, 9, 3))).max() <= 1


def test_transparent_colour_of_an_rgb_png():
    data = encoded(Image.fromarray(RGB), transparency=tuple(map(int, RGB[2, 3])))
    want = RGB.copy()
    want[2, 3] = 255
    np.testing.assert_array_equal(plain(data), want)


def test_cmyk_jpeg():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0], ink[..., 3] = 255, 51  # full cyan, 20 % black
    image = Image.fromarray(ink, "CMYK")
    pixels = plain(encoded(image, "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - [0, 204, 204]).max() <= 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF"])
def test_first_frame(format):
    frames = [Image.new("RGB", (5, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **options
    )
    np.testing.assert_array_equal(plain(data)[0, 0], [255, 0, 0])


def test_multi_picture_jpeg():
    frames = [Image.new("RGB", (80, 64), c) for c in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert plain(data).shape == (64, 80, 3)
    small = decode(data, "x", size=8, resize=Resize("squash"))
    assert np.abs(small.astype(int) - [255, 0, 0]).max() <= 3


# What a viewer has to do with the stored rows to see the picture upright (EXIF 2.32).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = smooth(32, 48)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(stored), format, exif=exif, **options)
    want = UPRIGHT[orientation](stored)
    pixels = plain(data)
    assert pixels.shape == want.shape
    assert shape(data, "x") == want.shape[:2]
    tolerance = 12 if format == "JPEG" else 0
    assert np.abs(pixels.astype(int) - want).max() <= tolerance


def test_broken_exif_leaves_the_picture_readable():
    for block in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage!"):
        data = encoded(Image.fromarray(RGB), "JPEG", exif=block)
        assert plain(data).shape == RGB.shape


def antialiased(pixels: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Area average of the sampled region, on the unit square of the result."""
    height, width = pixels.shape[:2]
    if resize == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        pixels = pixels[top : top + short, left : left + short]
        height = width = short
    rows = pixels.reshape(size, height // size, size, width // size, 3)
    return rows.mean((1, 3))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("shape_", [(320, 480), (480, 320), (32, 64)])
def test_resize(format, resize, shape_):
    picture = smooth(*shape_)
    pixels = decode(
        encoded(Image.fromarray(picture), format), "x", size=16, resize=Resize(resize)
    )
    assert pixels.shape == (16, 16, 3)
    want = antialiased(picture, 16, resize)
    # The antialiasing filter is wider than a pixel, so edges differ a little.
    assert np.abs(pixels - want)[1:-1, 1:-1].max() < 6
    assert np.abs(pixels - want).mean() < 2


def test_pad():
    picture = np.full((20, 40, 3), 200, np.uint8)
    for turned, axis in ((picture, 0), (picture.swapaxes(0, 1), 1)):
        data = encoded(Image.fromarray(turned))
        pixels = decode(data, "x", size=16, resize=Resize("pad")).swapaxes(0, axis)
        np.testing.assert_array_equal(pixels[4:12], 200)
        assert not pixels[:4].any() and not pixels[12:].any()


def test_antialiasing_averages_fine_detail():
    board = np.indices((256, 256)).sum(0) % 2 * 255
    data = encoded(Image.fromarray(board.astype(np.uint8)))
    pixels = decode(data, "x", size=16, resize=Resize("squash"))
    assert np.abs(pixels.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_very_long_images_stay_small(resize):
    data = encoded(Image.new("RGB", (1, 60_000), "red"), "JPEG")
    assert decode(data, "x", size=64, resize=Resize(resize)).shape == (64, 64, 3)


def by_torchvision(image, whole, size, filter):
    """Resize(whole), CenterCrop(size), as torchvision's transforms do them."""
    short = min(image.size)
    scaled = image.resize([int(whole * side / short) for side in image.size], filter)
    left, top = (int(round((side - size) / 2)) for side in scaled.size)
    return np.asarray(scaled.crop((left, top, left + size, top + size)), int)


@pytest.mark.parametrize("shape_", [(300, 400), (401, 333), (37, 64), (256, 256)])
@pytest.mark.parametrize(
    "interpolation, filter",
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
@pytest.mark.parametrize("whole", [256, 232])
def test_central_crops_are_those_of_torchvision(shape_, interpolation, filter, whole):
    picture = RNG.integers(0, 256, (*shape_, 3), np.uint8)  # every edge shows
    want = by_torchvision(Image.fromarray(picture), whole, 224, filter)
    resize = Resize("crop", 224 / whole, interpolation)
    got = decode(encoded(Image.fromarray(picture)), "x", size=224, resize=resize)
    # Only rounding differs, once for each axis.
    assert np.abs(got - want).max() <= 2 and np.abs(got - want).mean() < 0.05
    np.testing.assert_array_equal(fit(picture, 224, resize), got)


def test_a_reduced_jpeg_is_cropped_as_the_whole_one():
    picture = Image.fromarray(smooth(1280, 960))
    resize = Resize("crop", 0.875, "bicubic")
    got = decode(encoded(picture, "JPEG"), "x", size=56, resize=resize)
    want = by_torchvision(picture, 64, 56, Image.Resampling.BICUBIC)
    assert np.abs(got - want).max() <= 3 and np.abs(got - want).mean() < 1


def detailed(height: int, width: int) -> np.ndarray:
    """A picture with as much detail, fine and coarse, as photographs: amplitudes 1/f.

    D. J. Field, Relations between the statistics of natural images and the response
    properties of cortical cells, 1987.
    """
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    waves = np.fft.rfft2(np.random.default_rng(3).normal(size=(height, width)))
    light = np.fft.irfft2(
        waves / np.maximum(np.hypot(y, x), 1 / width), (height, width)
    )
    tint = smooth(height, width) - 128.0
    pixels = 128 + 40 * light[..., None] / light.std() + 0.3 * tint
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


# Sides of which a part of a reduced pixel is left over at every scale, and at some.
@pytest.mark.parametrize("shape_", [(331, 257), (293, 368)])
@pytest.mark.parametrize("rule", ["crop", "squash", "pad"])
def test_a_reduced_jpeg_is_nearly_what_the_whole_one_gives(shape_, rule):
    """At least 36 dB; a shift by half a reduced pixel leaves less than 32."""
    picture, exif = Image.fromarray(detailed(*shape_)), Image.Exif()
    side = max(shape_) if rule == "pad" else min(shape_)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        data = encoded(picture, "JPEG", quality=90, exif=exif)
        whole = plain(data)
        for scale in (2, 4, 8):
            for resize in (Resize(rule), Resize(rule, 0.875, "bicubic")):
                size = int(side * resize.crop_fraction / scale / LEAST_LEFT)
                got = decode(data, "x", size=size, resize=resize)
                want = fit(whole, size, resize).astype(float)
                assert np.square(got - want).mean() < 255**2 / 10**3.6
                # It was reduced, so it is not the same.
                assert (got != want).any()


@pytest.mark.parametrize("rule", ["squash", "pad"])
def test_central_crops_of_the_other_rules(rule):
    data = encoded(Image.fromarray(smooth(60, 100)))
    whole = decode(data, "x", size=64, resize=Resize(rule)).astype(int)
    part = decode(data, "x", size=56, resize=Resize(rule, 0.875))
    assert np.abs(part - whole[4:60, 4:60]).max() <= 1


def test_interpolation_is_read_without_a_crop_too():
    picture = Image.fromarray(smooth(64, 64))
    for name, filter in (("bilinear", 2), ("bicubic", 3)):  # Pillow's numbers
        got = decode(encoded(picture), "x", size=24, resize=Resize("crop", 1.0, name))
        np.testing.assert_array_equal(got, np.asarray(picture.resize((24, 24), filter)))


def test_fit_equals_decode():
    data = encoded(Image.fromarray(smooth(30, 50)))
    want = decode(data, "x", size=16, resize=Resize())
    np.testing.assert_array_equal(fit(smooth(30, 50), 16, Resize()), want)
    assert fit(GRAY[..., None], 4, Resize("pad")).shape == (4, 4, 1)


def test_unknown_resize_rule_is_named():
    with pytest.raises(ConvnetError, match="data.resize='stretch'.*squash"):
        decode(encoded(Image.fromarray(RGB)), "x", size=4, resize=Resize("stretch"))


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x\x9c")


JPEG = encoded(Image.fromarray(smooth(64, 64)), "JPEG")
HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello, world\n" * 9, "not an image in JPEG, PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not an image",
    ),
    "truncated": (JPEG[:-60], "truncated"),
    "headless": (JPEG[:30], ""),
    "bomb": (png(100_000, 100_000), "pixels"),
    "smaller bomb": (png(10_000, 9_000), "pixels"),
    "no pixels": (png(50, 50), ""),
    "tiff": (b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40, ""),
    "gif": (b"GIF89a\xff\xff\xff\xff", ""),
    "webp": (b"RIFF\x20\0\0\0WEBPVP8 " + b"\0" * 20, ""),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("size", [0, 8])
def test_hostile_bytes(name, size, tmp_path):
    data, reason = HOSTILE[name]
    with pytest.raises(DecodeError) as caught:
        decode(data, name, size=size, resize=Resize())
    assert caught.value.id == name and reason in caught.value.reason
    assert " at 0x" not in str(caught.value)  # no memory address: the same in every run
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DecodeError) as from_path:
        decode(tmp_path / "x", name, size=size, resize=Resize())
    assert str(from_path.value) == str(caught.value)


def test_every_truncation_and_many_flips_end_as_decode_error():
    """Any damage gives pixels or DecodeError, never another exception."""
    rng = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded(Image.fromarray(RGB), format)
        damaged = [data[:n] for n in range(0, len(data), 7)]
        for _ in range(30):
            flipped = np.frombuffer(data, np.uint8).copy()
            flipped[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            damaged.append(flipped.tobytes())
        for attempt in damaged:
            try:
                assert plain(attempt).dtype == np.uint8
            except DecodeError as error:
                assert error.reason


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(DecodeError, match="lost: No such file"):
        decode(tmp_path / "lost", "lost", size=0, resize=Resize())
    with pytest.raises(DecodeError, match="dir: Is a directory"):
        decode(tmp_path, "dir", size=0, resize=Resize())


def test_limit_is_where_pillow_starts_to_warn():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_decode_error_survives_pickling():
    error = pickle.loads(pickle.dumps(DecodeError("a/b.png", "empty")))
    assert (error.id, error.reason, str(error)) == (
        "a/b.png",
        "empty",
        "a/b.png: empty",
    )
    assert isinstance(error, ConvnetError)
