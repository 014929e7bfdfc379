"""Pillow's modes -> 8 bits of gray or of each colour, without transparency."""

import functools

import numpy as np
from PIL import Image, ImageFile

# 16-bit grayscale in either byte order.
_DEEP_GRAY = ("I;16", "I;16L", "I;16B", "I;16N")
_GRAY_STEPS = {"L;2": 85, "L;4": 17, "L": 1}  # by how much PNG's levels are spread


def correct_transparency(image: ImageFile.ImageFile) -> None:
    """Brings a PNG's transparent colour to the 8 bits that Pillow gives its pixels."""
    colour, stored = image.info.get("transparency"), image.tile[0].args
    if stored in _GRAY_STEPS and isinstance(colour, int):
        image.info["transparency"] = colour * _GRAY_STEPS[stored] & 255
    elif stored == "RGB;16B" and colour is not None:
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def to_8_bits(image: ImageFile.ImageFile, mode: str) -> Image.Image:
    """Loads an image of any Pillow mode -> "RGB" or "L"."""
    if image.mode in _DEEP_GRAY:
        return _deep_gray(image).convert(mode)
    if image.mode in ("I", "F"):
        raise ValueError(
            "32-bit pixels have no defined white; convert the image to 8 or 16 bits"
        )
    image.load()
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    over_white = Image.new("RGB", image.size, "white")
    over_white.paste(image, mask=image)
    return over_white.convert(mode)


def _deep_gray(image: ImageFile.ImageFile) -> Image.Image:
    """12 or 16 bits -> 8, to the nearest: 0 stays 0 and white becomes 255."""
    levels = _levels(4095 if image.tile[0].args[0] == "I;12" else 65535)
    transparent = image.info.get("transparency")
    if transparent is not None:  # a level of a PNG
        levels = levels.copy()
        levels[transparent] = 255
    return Image.fromarray(levels[np.asarray(image)])


@functools.cache
def _levels(white: int) -> np.ndarray:
    levels = (np.arange(65536) * 255 + white // 2) // white
    return np.minimum(levels, 255).astype(np.uint8)
