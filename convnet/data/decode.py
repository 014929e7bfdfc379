"""Bytes -> uint8 pixels: the only place that opens an image.

Every hostile or broken file ends here, as a `DecodeError` that names the record.
Supported are JPEG, PNG, WebP, GIF, BMP and TIFF, of an animation the first frame.
JPEGs are decoded by simplejpeg where it is installed and finds no fault in the file,
everything else by Pillow: both hold libjpeg-turbo, and their pixels are the same.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from convnet.data import headers
from convnet.data.headers import MAX_PIXELS
from convnet.data.modes import correct_transparency, to_8_bits
from convnet.data.resize import Resize, Stored, fit, resized
from convnet.errors import ConvnetError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: slower, the same pixels
    simplejpeg = None

# Named one by one, because Image.open tries plugin after plugin and hides why the
# right one refused.
_PLUGINS = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
FORMATS = tuple(_PLUGINS)
# Within the limit of pixels no format needs more: four channels of 16 bits.
MAX_BYTES = 8 * MAX_PIXELS
_TILE_TAGS = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
# EXIF orientations to be mirrored left to right, and upside down; from 5 on, the sides
# change places first.
_MIRRORED, _FLIPPED = (2, 3, 6, 7), (3, 4, 7, 8)
_LONGEST_REASON = 200
# What remains of a JPEG that is decoded at reduced scale, at least, in sides of the
# result: then the antialiased resize that follows gives nearly what it gives of the
# whole picture (docs/performance.md, "Input").
LEAST_LEFT = 1.15


class DecodeError(ConvnetError):
    """One image cannot be read: `id` names the record, `reason` says why, in a line."""

    def __init__(self, id: str, reason: str):
        # Decoders quote what they found in the file, which may be any characters.
        line = " ".join(reason.split())[:_LONGEST_REASON]
        reason = "".join(c if c.isprintable() else "?" for c in line)
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def decode(
    data: bytes | str | Path, id: str, *, size: int, resize: Resize, channels: int = 3
) -> np.ndarray:
    """Decodes one image.

    EXIF orientation is applied, palettes and CMYK are converted, transparency is laid
    over white, 16-bit grayscale is scaled to 8 bits, 16-bit colour keeps its high byte.
    A JPEG that is at least 2.3 times as large as needed is decoded at reduced scale.

    Args:
        data: the file's bytes, or its path.
        id: names the image in errors.
        size: side of the square result in pixels; 0 keeps the image as stored.
        resize: how, where size is not 0.
        channels: 3 (RGB) or 1 (luma of ITU-R BT.601).

    Returns:
        uint8 (h, w, channels), a fresh array; h = w = size unless size is 0.

    Raises:
        DecodeError: the image cannot be read, for whatever reason.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    data = _read(data, id)
    quick = _quick_jpeg(data, size, resize) if channels == 3 else None
    if quick is not None:
        pixels, stored = quick
        if size:
            return fit(pixels, size, resize, stored)
        return np.ascontiguousarray(pixels)
    image, orientation = _opened(data, id)
    try:
        (width, height), scale = image.size, 1
        if size and image.format == "JPEG":
            scale = _reduction(width, height, size, resize)
            image.draft(None, (max(1, width // scale), max(1, height // scale)))
        image = to_8_bits(image, mode)
    except Exception as error:  # Pillow's plugins raise almost anything
        raise DecodeError(id, _reason(error)) from None
    if orientation != 1:
        image = Image.fromarray(_upright(np.asarray(image), orientation))
    if size:
        stored = _stored(width, height, scale, orientation) if scale > 1 else None
        image = resized(image, size, resize, stored)
    return np.array(image).reshape(image.height, image.width, channels)


def shape(data: bytes | str | Path, id: str) -> tuple[int, int]:
    """Height and width in pixels that `decode` with size 0 gives, from the header.

    Raises:
        DecodeError: the header cannot be read.
    """
    image, orientation = _opened(_read(data, id), id)
    width, height = image.size
    return (width, height) if orientation >= 5 else (height, width)


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


def _read(data: bytes | str | Path, id: str) -> bytes:
    """The whole file: nothing that happens to it from here on matters."""
    if not isinstance(data, bytes):
        try:
            status = os.stat(data)
            # Opening a pipe could wait for ever.
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise DecodeError(id, "not a regular file")
            if status.st_size > MAX_BYTES:
                raise DecodeError(
                    id, f"{status.st_size:,} bytes, the limit is {MAX_BYTES:,}"
                )
            with open(data, "rb") as file:
                data = file.read()
        except (OSError, ValueError) as error:  # ValueError: a name that cannot exist
            raise DecodeError(id, _reason(error)) from None
    if not data:
        raise DecodeError(id, "the file is empty")
    return data


def _quick_jpeg(
    data: bytes, size: int, resize: Resize
) -> tuple[np.ndarray, Stored] | None:
    """A faultless JPEG's pixels, RGB and upright; None leaves the file to Pillow."""
    if simplejpeg is None or headers.kind(data) != "JPEG":
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        headers.check_size(width, height)
        headers.check_scans(data, width, height)
        scale = _reduction(width, height, size, resize) if size else 1
        # The smallest result that is not below these is the one wanted.
        least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=least[0], min_width=least[1], strict=True
        )
    except Exception:  # CMYK, or a fault: Pillow says which, or puts up with it
        return None
    orientation = headers.orientation(headers.jpeg_exif(data))
    stored = _stored(width, height, scale, orientation)
    return _upright(pixels, orientation), stored


def _opened(data: bytes, id: str) -> tuple[ImageFile.ImageFile, int]:
    """The image with only its header read, within the limits; its EXIF orientation."""
    kind = headers.kind(data)
    if kind is None:
        raise DecodeError(id, "not an image in " + ", ".join(FORMATS))
    try:
        exif = b""
        if kind == "PNG":
            data, exif = headers.png_pixels(data)
        image = _PLUGINS[kind](io.BytesIO(data))
        headers.check_size(*image.size)
        if kind == "JPEG":
            headers.check_scans(data, *image.size)
        elif kind == "PNG":
            correct_transparency(image)
        elif kind == "TIFF":
            # One tile is held in memory, whatever the size of the image.
            headers.check_size(*(image.tag_v2.get(tag, 1) for tag in _TILE_TAGS))
            areas = [(x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1), *_ in image.tile]
            if sum(areas) < image.width * image.height:
                raise ValueError("strips or tiles of the image are missing")
        # Pillow sets TIFFs upright by itself.
        if kind in ("JPEG", "WEBP"):
            exif = image.info.get("exif", b"")
    except Exception as error:  # see decode
        raise DecodeError(id, _reason(error)) from None
    return image, headers.orientation(exif)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _reduction(width: int, height: int, size: int, resize: Resize) -> int:
    """By how much to reduce a JPEG while it is decoded.

    From 8 pixels on, both decoders take the same scale.
    """
    side = max(width, height) if resize.rule == "pad" else min(width, height)
    whole = resize.whole(size)
    for scale in (8, 4, 2):
        if side >= LEAST_LEFT * whole * scale and min(width, height) >= 8:
            return scale
    return 1


def _stored(width: int, height: int, scale: int, orientation: int) -> Stored:
    """The picture, upright, of which a version at reduced scale was decoded.

    Its last pixels may lie in part beyond the picture: the first ones, once mirrored.
    """
    if orientation >= 5:
        width, height = height, width
    beyond = -width % scale / scale, -height % scale / scale
    mirrored = orientation in _MIRRORED, orientation in _FLIPPED
    start = beyond[0] * mirrored[0], beyond[1] * mirrored[1]
    return Stored((width, height), scale, start)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in _MIRRORED:
        pixels = pixels[:, ::-1]
    if orientation in _FLIPPED:
        pixels = pixels[::-1]
    return pixels
