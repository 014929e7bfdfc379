"""Pictures as float arrays (h, w, c), 0 to 1: read, resized, written."""

import io
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convnet import files
from convnet.data.decode import decode
from convnet.data.resize import Resize
from convnet.errors import UsageError

# What a picture is written as, and the options of Pillow's writer.
FORMATS = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
# Of the noise to start from: grey with a tenth of the range as standard deviation.
_NOISE = 0.1


def read(flag: str, path: str) -> np.ndarray:
    """Returns a picture file's pixels, uint8 (h, w, 3).

    Raises:
      UsageError: there is no such file; names the flag.
      DecodeError: it is no readable picture.
    """
    if not os.path.exists(path):
        raise UsageError(f"--{flag}={path}: no such file")
    return decode(Path(path), path, size=0, resize=Resize())


def check_output(path: str) -> Path:
    """Returns where a picture may be written.

    Raises:
      UsageError: the folder is not there, or the ending names no format.
    """
    output = Path(path).expanduser()
    if output.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--output={path}: want a name that ends in {', '.join(FORMATS)}"
        )
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output={path}: want a file in a folder that is there")
    return output


def sides(shape: tuple[int, ...], size: int, multiple: int = 1) -> tuple[int, int]:
    """Returns height and width of a picture whose longer side is made `size` pixels.

    Both are rounded to a multiple of `multiple`.
    """
    scale = size / max(shape[:2])
    height, width = (
        max(1, round(side * scale / multiple)) * multiple for side in shape[:2]
    )
    return height, width


def resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) -> float32 (*shape, 3), 0 to 1, by Lanczos with antialiasing."""
    if pixels.shape[:2] != tuple(shape):
        image = Image.fromarray(pixels)
        pixels = np.asarray(image.resize(shape[::-1], Image.Resampling.LANCZOS))
    return pixels.astype(np.float32) / 255


def enlarge(picture: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Floats (h, w, c) -> (*shape, c), within 0 and 1."""
    larger = jax.image.resize(picture, (*shape, picture.shape[-1]), "cubic")
    return jnp.clip(larger, 0, 1)


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns grey noise, float32 of this shape: the same for a seed everywhere."""
    rng = np.random.Generator(np.random.Philox(seed))
    values = 0.5 + _NOISE * rng.standard_normal(shape)
    return np.clip(values, 0, 1).astype(np.float32)


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """Floats (h, w, 3), 0 to 1 -> uint8, to the nearest."""
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 (h, w, 3), in the format of the ending; whole or not at all."""
    format, options = FORMATS[path.suffix.lower()]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    files.write(path, file.getvalue())
