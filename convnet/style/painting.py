"""Pictures through a style network: one pass each, at any size."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convnet import inputs, mesh
from convnet.bundle import Bundle
from convnet.data.resize import Resize
from convnet.errors import ConvnetError, UsageError
from convnet.input_arrays import Wanted
from convnet.style import colour, pictures

# Sides are filled up to a multiple of it, so that a folder has few shapes to compile.
_MULTIPLE = 32


def plan(content: str, output: str) -> list[tuple[str, Path, str]]:
    """Says what is painted, and where to: (picture, file, why it cannot be read).

    A folder's pictures keep their names and places; where the ending names no format
    that is written, .png is added.

    Args:
      content: a picture, or a folder with folders in it.
      output: a folder, which may have to be made; of a single picture also a file.

    Raises:
      UsageError: there is nothing to paint, or it would be painted over.
    """
    if not os.path.exists(content):
        raise UsageError(f"--content={content}: no such file or folder")
    target = Path(output).expanduser()
    single = not os.path.isdir(content)
    if single and target.suffix and not target.is_dir():
        file = pictures.check_output(output)
        if file.exists() and file.samefile(content):
            raise UsageError(f"--output={output}: would replace --content")
        return [(content, file, "")]
    if target.exists() and not target.is_dir():
        raise UsageError(f"--output={output}: a file; want a folder")
    root = Path(content).parent if single else Path(content)
    if not single and target.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"--output={output}: want a folder outside of --content")
    found = []
    for record in inputs.records([content], Wanted((1, 1, 3), "uint8", Resize())):
        name = os.path.relpath(record.path, root)
        if Path(name).suffix.lower() not in pictures.FORMATS:
            name += ".png"
        found.append((record.path, target / name, record.error))
    if not found:
        raise UsageError(f"--content={content}: no picture in there")
    if single and found[0][1].exists() and found[0][1].samefile(content):
        raise UsageError(f"--output={output}: would replace --content")
    return found


class Painter:
    """A style network as a function of pictures.

    Args:
      bundle: its model file.
      size: longer side of what is painted, in pixels.
      preserve_colour: keep the content's colours, and take the brightness alone.
      dtype: what the network computes in.
    """

    def __init__(
        self, bundle: Bundle, size: int, preserve_colour: bool, dtype: str
    ) -> None:
        self._size, self._preserve_colour = size, preserve_colour
        options = mesh.compiler_options(jax.default_backend())

        def run(variables: Any, inputs: jax.Array) -> jax.Array:
            return bundle.logits(variables, inputs, dtype)

        self._run = jax.jit(run, compiler_options=options)
        self._variables = jax.device_put(bundle.variables)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3), of any size -> uint8, its longer side as asked for."""
        content = pictures.resize(pixels, pictures.sides(pixels.shape, self._size))
        height, width = content.shape[:2]
        missing = [(0, -side % _MULTIPLE) for side in (height, width)]
        filled = np.pad(content, [*missing, (0, 0)], mode="symmetric")
        painted = self._run(self._variables, filled[None])
        painted = np.asarray(painted)[0, :height, :width]
        if self._preserve_colour:
            grey = colour.luminance(painted)
            painted = colour.with_luminance(content, grey)
        return pictures.to_uint8(painted)


def write(path: Path, pixels: np.ndarray) -> None:
    """Writes a picture, and makes its folder first.

    Raises:
      ConvnetError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConvnetError(f"{path.parent}: {error.strerror or error}") from error
    pictures.write(path, pixels)
