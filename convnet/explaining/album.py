"""Collects drawings: PNG files in a folder, and the same pictures for the page."""

import base64
import dataclasses
from pathlib import Path

import numpy as np

from convnet.explaining import drawing


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of the page: a data URI, its size, title, how to read it."""

    uri: str
    file: str
    width: int
    height: int
    title: str
    note: str


class Album:
    """Writes each drawing into `folder` (which is there) as NAME.png."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(
        self, name: str, picture: np.ndarray, title: str = "", note: str = ""
    ) -> Panel:
        """Adds a drawing uint8 (h, w, 3); `name` may name a folder in the folder."""
        file = self._folder / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(drawing.png(picture))
        data = base64.b64encode(drawing.webp(picture)).decode()
        height, width = picture.shape[:2]
        return Panel(
            f"data:image/webp;base64,{data}",
            f"{name}.png",
            width,
            height,
            title,
            note,
        )
