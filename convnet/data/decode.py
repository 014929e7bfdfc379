"""Bytes -> uint8 pixels: the only place that opens an image.

Every hostile or broken file ends here, as a `DecodeError` that names the record.
Supported are JPEG, PNG, WebP, GIF, BMP and TIFF, of an animation the first frame.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from convnet.errors import ConvnetError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow warns from this size on. With the same limit, every image that it would
# warn about is refused, and no warning filter (a global) needs to change.
MAX_PIXELS = 89_478_485
RESIZE_RULES = ("crop", "squash", "pad")
_ORIENTATION = 0x0112  # the EXIF tag; what each value takes to set the image upright:
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# 16-bit grayscale in either byte order.
_DEEP_GRAY = ("I;16", "I;16L", "I;16B", "I;16N")


class DecodeError(ConvnetError):
    """One image cannot be read: `id` names the record, `reason` says why."""

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def decode(
    data: bytes | str | Path, id: str, *, size: int, resize: str, channels: int = 3
) -> np.ndarray:
    """Decodes one image.

    EXIF orientation is applied, palettes and CMYK are converted, transparency is laid
    over white, 16-bit grayscale is scaled to 8 bits.

    Args:
        data: the file's bytes, or its path.
        id: names the image in errors.
        size: side of the square result in pixels; 0 keeps the image as stored.
        resize: "crop" scales the short side to `size` and cuts out the centre,
            "squash" scales both sides, "pad" scales the long side and fills up with
            black. All scale with antialiasing (bilinear).
        channels: 3 (RGB) or 1 (luma of ITU-R BT.601).

    Returns:
        uint8 (h, w, channels), a fresh array; h = w = size unless size is 0.

    Raises:
        DecodeError: the image cannot be read, for whatever reason.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    with _opened(data, id) as image:
        try:
            if size:
                _draft(image, size, resize)
            image.load()
            pixels = _to_8_bits(_upright(image), mode)
        except Exception as error:  # Pillow's plugins raise almost anything
            raise DecodeError(id, _reason(error)) from None
    if size:
        pixels = _resized(pixels, size, resize)
    return np.array(pixels).reshape(pixels.height, pixels.width, channels)


def shape(data: bytes | str | Path, id: str) -> tuple[int, int]:
    """Height and width in pixels that `decode` with size 0 gives, from the header.

    Raises:
        DecodeError: the header cannot be read.
    """
    with _opened(data, id) as image:
        width, height = image.size
        # From 5 on the sides change places; Pillow does that for TIFF by itself.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if turned else (height, width)


@dataclass(frozen=True)
class FirstShape:
    """The shape that all images of a dataset share when none is resized."""

    shape: tuple[int, ...]
    id: str

    @classmethod
    def of(cls, data: bytes | str | Path, id: str) -> "FirstShape":
        return cls((*shape(data, id), 3), id)

    def check(self, other: tuple[int, ...], id: str) -> None:
        """Raises ConvnetError, naming both images, if `other` differs."""
        if other != self.shape:
            raise ConvnetError(
                f"images differ in size: {self.id} is {_size(self.shape)}, {id} is "
                f"{_size(other)}; set data.image_size to resize all of them"
            )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def fit(pixels: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Resizes uint8 (h, w, 1 or 3) by the rules of `decode`, to (size, size, c)."""
    channels = pixels.shape[-1]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return np.array(_resized(image, size, resize)).reshape(size, size, channels)


def _opened(data: bytes | str | Path, id: str) -> Image.Image:
    """The image with only its header read, checked against the limit of pixels."""
    if isinstance(data, bytes):
        empty = not data
    else:
        try:
            empty = os.path.getsize(data) == 0
        except OSError as error:
            raise DecodeError(id, error.strerror or str(error)) from None
    if empty:
        raise DecodeError(id, "the file is empty")
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        image = Image.open(file, formats=FORMATS)
    except Exception as error:  # see decode
        raise DecodeError(id, _reason(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS or not width * height:
        image.close()
        raise DecodeError(id, f"{width}x{height} pixels, the limit is {MAX_PIXELS:,}")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own text holds a memory address, or repeats the path.
        return "not an image in " + ", ".join(FORMATS)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more pixels than the limit of {MAX_PIXELS:,}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _draft(image: Image.Image, size: int, resize: str) -> None:
    """Lets the JPEG decoder reduce by 2, 4 or 8 while twice the target remains.

    The antialiased resize that follows then still averages at least 2x2 pixels.
    """
    if image.format in ("JPEG", "MPO"):
        side = max(image.size) if resize == "pad" else min(image.size)
        width, height = (max(1, 2 * size * length // side) for length in image.size)
        image.draft(None, (width, height))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is absent or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return value if value in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the EXIF block anew, which may fail.
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode -> "RGB" or "L"."""
    if image.mode in _DEEP_GRAY:
        # 65535 -> 255 and 0 -> 0, to the nearest.
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            "32-bit pixels have no defined white; convert the image to 8 or 16 bits"
        )
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image.Image, size: int, resize: str) -> Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    bilinear = Image.Resampling.BILINEAR
    if resize == "squash":
        return image.resize((size, size), bilinear)
    if resize == "crop":
        # Cropping first keeps a 1 x 10,000 image from growing to size x 10,000 size.
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        return image.resize((size, size), bilinear, box=box)
    if resize == "pad":
        scale = size / max(width, height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        result = Image.new(image.mode, (size, size))
        corner = (size - inner[0]) // 2, (size - inner[1]) // 2
        result.paste(image.resize(inner, bilinear), corner)
        return result
    raise ConvnetError(
        f"data.resize={resize!r}: wanted one of {', '.join(RESIZE_RULES)}"
    )
