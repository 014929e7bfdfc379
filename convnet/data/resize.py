"""The rules by which images of any size become squares."""

import numpy as np
from PIL import Image

from convnet.errors import ConvnetError

RESIZE_RULES = ("crop", "squash", "pad")


def fit(pixels: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Resizes pixels by the rules of `decode`.

    Args:
        pixels: uint8 (h, w, 1 or 3).
        size, resize: as in `decode`.

    Returns:
        uint8 (size, size, 1 or 3), a fresh array.

    Raises:
        ConvnetError: there is no such rule.
    """
    height, width, channels = pixels.shape
    left, top, right, bottom = _region(width, height, resize)
    pixels = pixels[top:bottom, left:right]
    if pixels.shape[:2] == (size, size):
        return pixels.copy()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return np.array(resized(image, size, resize)).reshape(size, size, channels)


def resized(image: Image.Image, size: int, resize: str) -> Image.Image:
    """Does what `fit` does to an image of mode "RGB" or "L"; may return it as it is."""
    region = _region(*image.size, resize)
    if region != (0, 0, *image.size):
        image = image.crop(region)
    target = size, size
    if resize == "pad":
        scale = size / max(image.size)
        target = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    if target == (size, size):
        return image
    result = Image.new(image.mode, (size, size))
    result.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
    return result


def _region(width: int, height: int, resize: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is scaled, in whole pixels.

    Cropping first keeps a 1 x 10,000 image from growing to size x 10,000 size.
    """
    if resize not in RESIZE_RULES:
        raise ConvnetError(
            f"data.resize={resize!r}: wanted one of {', '.join(RESIZE_RULES)}"
        )
    if resize != "crop":
        return 0, 0, width, height
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short
