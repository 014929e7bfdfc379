"""What a transfer looks like on its way: frames, and an animation of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from convnet import files
from convnet.errors import ConvnetError, UsageError
from convnet.style import pictures

ANIMATIONS = ("gif", "webp")
# An animation is to be looked at, not printed: its longer side, in pixels.
_LONGEST = 512
_MILLISECONDS = 120
_LAST_MILLISECONDS = 2000


class Frames:
    """PNG files beside the output, and an animation when all are there.

    For `out.png` they are `out_frames/000050.png` and `out_frames.gif`. What an earlier
    run left in the folder is removed.

    Args:
      output: of the transfer.
      kind: one of `ANIMATIONS`.

    Raises:
      UsageError: there is a file where the folder should be.
      ConvnetError: the folder cannot be written to.
    """

    def __init__(self, output: Path, kind: str) -> None:
        self.folder = output.with_name(f"{output.stem}_frames")
        self.animation = output.with_name(f"{output.stem}_frames.{kind}")
        self._kind = kind
        self._paths: list[Path] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file; frames want a folder there")
        try:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob("[0-9]" * 6 + ".png"):
                path.unlink()
        except OSError as error:
            raise ConvnetError(f"{self.folder}: {error.strerror or error}") from error

    def add(self, number: int, pixels: np.ndarray) -> None:
        """Writes a frame, uint8 (h, w, 3)."""
        path = self.folder / f"{number:06d}.png"
        pictures.write(path, pixels)
        self._paths.append(path)

    def finish(self, pixels: np.ndarray) -> None:
        """Writes the animation, which ends in the finished picture."""
        scale = min(1.0, _LONGEST / max(pixels.shape[:2]))
        size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
        images = []
        for path in self._paths:
            with Image.open(path) as image:
                images.append(image.resize(size, Image.Resampling.LANCZOS))
        last = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        images.append(last)
        file = io.BytesIO()
        images[0].save(
            file,
            self._kind.upper(),
            save_all=True,
            append_images=images[1:],
            duration=[_MILLISECONDS] * (len(images) - 1) + [_LAST_MILLISECONDS],
            loop=0,
        )
        files.write(self.animation, file.getvalue())
