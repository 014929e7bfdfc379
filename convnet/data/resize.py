"""The rules by which images of any size become squares."""

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from convnet.errors import ConvnetError

RESIZE_RULES = ("crop", "squash", "pad")
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class Resize(NamedTuple):
    """How an image becomes a square.

    Attributes:
        rule: "crop" scales the short side to the square's and cuts out the centre,
            "squash" scales both sides, "pad" scales the long side and fills up with
            black.
        crop_fraction: share of the square's side, above 0 and up to 1, that is kept:
            the square is made that much larger, and its centre is cut out. 224 of 256
            pixels are 0.875, the usual view of ImageNet's networks.
        interpolation: "bilinear" or "bicubic", both with antialiasing.
    """

    rule: str = "crop"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, preprocessing: dict[str, Any]) -> "Resize":
        """What a model file says; of an old file, which says less, as it was then."""
        names = {"rule": "resize"} | {name: name for name in cls._fields[1:]}
        return cls(
            **{
                field: preprocessing[name]
                for field, name in names.items()
                if name in preprocessing
            }
        )

    def whole(self, size: int) -> int:
        """The side in pixels of the square of which the centre, `size`, is kept."""
        # As PyTorch's users round; 224 / 0.875 must not become 255.
        return math.floor(size / self.crop_fraction + 1e-6)


class Stored(NamedTuple):
    """The picture of which some pixels are a version at reduced scale.

    Attributes:
        size: its width and height in pixels.
        scale: how many of its pixels one pixel covers, along either side.
        start: x and y in the pixels at hand of its upper left corner: above 0 where
            the first pixel lies in part beyond it.
    """

    size: tuple[int, int]
    scale: int = 1
    start: tuple[float, float] = (0.0, 0.0)

    def box(self, region: tuple[float, ...]) -> tuple[float, ...]:
        """Left, top, right and bottom of a region, in the pixels at hand."""
        return tuple(
            start + side / self.scale
            for start, side in zip(self.start * 2, region, strict=True)
        )


def fit(
    pixels: np.ndarray, size: int, resize: Resize, stored: Stored | None = None
) -> np.ndarray:
    """Resizes pixels by the rules of `Resize`.

    Args:
        pixels: uint8 (h, w, 1 or 3).
        size: side of the result in pixels.
        resize: how.
        stored: the picture, where `pixels` hold it at reduced scale.

    Returns:
        uint8 (size, size, 1 or 3), a fresh array.

    Raises:
        ConvnetError: there is no such rule.
    """
    height, width, channels = pixels.shape
    stored = stored or Stored((width, height))
    if resize.whole(size) == size:
        (left, top, right, bottom), stored = _cut(resize, stored)
        pixels = pixels[top:bottom, left:right]
        if pixels.shape[:2] == (size, size):
            return pixels.copy()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image = resized(image, size, resize, stored)
    return np.array(image).reshape(size, size, channels)


def resized(
    image: Image.Image, size: int, resize: Resize, stored: Stored | None = None
) -> Image.Image:
    """Does what `fit` does to an image of mode "RGB" or "L"; may return it as it is."""
    stored, whole = stored or Stored(image.size), resize.whole(size)
    if whole > size:
        return _centre(image, size, whole, resize, stored)
    part, stored = _cut(resize, stored)
    if part != (0, 0, *image.size):
        image = image.crop(part)
    target = size, size
    if resize.rule == "pad":
        scale = size / max(stored.size)
        target = tuple(max(1, round(side * scale)) for side in stored.size)
    if image.size != target:
        box = stored.box((0, 0, *stored.size))
        image = image.resize(target, _FILTERS[resize.interpolation], box)
    if target == (size, size):
        return image
    result = Image.new(image.mode, (size, size))
    result.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
    return result


def _cut(resize: Resize, stored: Stored) -> tuple[tuple[int, ...], Stored]:
    """What to cut out of the pixels at hand, and what is stored of the part."""
    left, top, right, bottom = _region(*stored.size, resize)
    box = stored.box((left, top, right, bottom))
    part = (*map(math.floor, box[:2]), *map(math.ceil, box[2:]))
    start = box[0] - part[0], box[1] - part[1]
    return part, Stored((right - left, bottom - top), stored.scale, start)


def _centre(
    image: Image.Image, size: int, whole: int, resize: Resize, stored: Stored
) -> Image.Image:
    """The middle `size` pixels of the image scaled to a square of `whole` pixels.

    Only they are computed, from all pixels that the filter weighs for them: the same
    numbers as those of scaling the whole image and cutting out the centre.
    """
    if resize.rule == "pad":
        image = resized(image, whole, resize._replace(crop_fraction=1.0), stored)
        left = top = round((whole - size) / 2)
        return image.crop((left, top, left + size, top + size))
    scaled = whole, whole
    if resize.rule == "crop":
        short = min(stored.size)
        scaled = tuple(whole * side // short for side in stored.size)
    region = []
    for side, pixels in zip(stored.size, scaled, strict=True):
        start = round((pixels - size) / 2)
        region.append((start * side / pixels, (start + size) * side / pixels))
    (left, right), (top, bottom) = region
    box = stored.box((left, top, right, bottom))
    return image.resize((size, size), _FILTERS[resize.interpolation], box)


def _region(width: int, height: int, resize: Resize) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is scaled, in whole pixels.

    Cropping first keeps a 1 x 10,000 image from growing to size x 10,000 size.
    """
    if resize.rule not in RESIZE_RULES:
        raise ConvnetError(
            f"data.resize={resize.rule!r}: wanted one of {', '.join(RESIZE_RULES)}"
        )
    if resize.rule != "crop":
        return 0, 0, width, height
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short
