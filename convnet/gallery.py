"""A page of predicted pictures, the most probable first, that needs no network.

Everything is in the one file: a threshold slider with counts, a choice of class, and
thumbnails. The browser makes cards as they are scrolled to.
"""

import base64
import hashlib
import heapq
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from convnet import files
from convnet.data import decode as decode_lib
from convnet.data.resize import Resize, fit

LIMIT = 10_000  # pictures in a page
# In a search, so many are shown even if fewer are found: the slider goes both ways.
_AROUND = 500
_SIDE = 112  # pixels of a thumbnail
_BARS = 50  # of the histogram


@dataclass(order=True)
class _Picture:
    """A picture in the heap; of two that are as probable the earlier one stays."""

    probability: float
    order: int
    path: str
    label: int
    thumbnail: bytes | None = None


class Gallery:
    """Keeps the most probable pictures, in bounded memory, and writes their page.

    Args:
      title: of the page.
      classes: the names that a picture's label is an index into.
      resize: as in `decode`; thumbnails show what the network saw.
      threshold: where the slider stands at first.
      searched: the class that was searched for, "" where every picture has its own.
    """

    def __init__(
        self,
        title: str,
        classes: Sequence[str],
        resize: Resize,
        threshold: float,
        searched: str,
    ) -> None:
        self._about = {
            "title": title,
            "classes": list(classes),
            "threshold": threshold,
            "searched": searched,
        }
        self._resize = resize
        self._heap: list[_Picture] = []
        self._counts = np.zeros(_BARS, np.int64)
        self._total = 0

    def add(
        self, path: str, label: int, probability: float, pixels: np.ndarray | None
    ) -> None:
        """Adds a picture; `pixels` where it lies in no picture file of its own."""
        self._total += 1
        self._counts[min(int(probability * _BARS), _BARS - 1)] += 1
        picture = _Picture(probability, -self._total, path, label)
        if len(self._heap) == LIMIT and picture < self._heap[0]:
            return
        if pixels is not None:
            picture.thumbnail = _array_thumbnail(pixels)
        if len(self._heap) < LIMIT:
            heapq.heappush(self._heap, picture)
        else:
            heapq.heapreplace(self._heap, picture)

    def write(self, path: str) -> None:
        """Reads the pictures again, for their thumbnails, and writes the page.

        Raises:
          ConvnetError: the page cannot be written.
        """
        pictures = sorted(self._heap, reverse=True)
        if self._about["searched"]:
            level = self._about["threshold"]
            count = sum(picture.probability >= level for picture in pictures)
            pictures = pictures[: max(count, _AROUND)]
        folder = os.path.dirname(os.path.abspath(path))
        with ThreadPoolExecutor() as threads:
            made = threads.map(lambda p: self._row(p, folder), pictures)
            page = self._page(list(made))
        # A file name need not be text: what UTF-8 cannot hold is shown as an escape.
        files.write(Path(path), page.encode("utf-8", "backslashreplace"))

    def _row(self, picture: _Picture, folder: str) -> list:
        """[path, label, probability, thumbnail, link]: "" for what there is not."""
        thumbnail, link = picture.thumbnail, ""
        if thumbnail is None:
            thumbnail = _file_thumbnail(picture.path, self._resize)
            # Relative, so that the page can be moved together with the pictures.
            link = quote(
                os.path.relpath(os.fsencode(picture.path), os.fsencode(folder))
            )
        return [
            picture.path,
            picture.label,
            picture.probability,
            base64.b64encode(thumbnail).decode(),
            link,
        ]

    def _page(self, rows: list[list]) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        script = environment.get_template("gallery.js").render()
        # Only this script may run, whatever a class name or a path contains.
        digest = hashlib.sha256(script.encode()).digest()
        data = {
            **self._about,
            "rows": rows,
            "histogram": self._counts.tolist(),
            "total": self._total,
        }
        # Inside <script>, only "<" could end the element.
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return environment.get_template("gallery.html").render(
            **self._about,
            shown=len(rows),
            total=self._total,
            data=Markup(text.replace("<", "\\u003c")),
            script=Markup(script),
            script_hash=base64.b64encode(digest).decode(),
        )


def _file_thumbnail(path: str, resize: Resize) -> bytes:
    """A WebP of the picture, b"" if it cannot be read any more."""
    try:
        side = min(_SIDE, *decode_lib.shape(path, path))
        return _webp(decode_lib.decode(path, path, size=side, resize=resize))
    except decode_lib.DecodeError:
        return b""


def _array_thumbnail(pixels: np.ndarray) -> bytes:
    """A WebP of a row of an array, b"" if it is no picture."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        return b""
    side = min(_SIDE, *pixels.shape[:2])
    return _webp(fit(pixels, side, Resize()))


def _webp(pixels: np.ndarray) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    file = io.BytesIO()
    # Small ones are shown enlarged.
    quality = 90 if max(image.size) <= 64 else 75
    image.convert("RGB").save(file, "webp", quality=quality, method=2)
    return file.getvalue()
