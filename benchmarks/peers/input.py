"""PyTorch's DataLoader on files, with torchvision's usual transforms for evaluation."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers import protocol

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Pictures(Dataset):
    """Files of pictures, decoded, resized, cropped and made tensors (3, h, w).

    The steps are those of torchvision's Resize, CenterCrop, ToTensor and Normalize; or,
    to `uint8`, without the last two: the device could do them.
    """

    def __init__(
        self, files: list[str], labels: list[int], size: int, uint8: bool
    ) -> None:
        self.files, self.labels, self.size, self.uint8 = files, labels, size, uint8

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        size, (width, height) = self.size, image.size
        if width <= height:
            shape = size, int(size * height / width)
        else:
            shape = int(size * width / height), size
        if shape != image.size:
            image = image.resize(shape, Image.Resampling.BILINEAR)
        left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        if shape != (size, size):
            image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if not self.uint8:
            pixels = pixels.float().div_(255).sub_(MEAN).div_(STD)
        return pixels, self.labels[index]


class Sides:
    """One loader for each way, all of them open, with workers that stay."""

    def __init__(self) -> None:
        self._batches: dict[str, Iterator[Any]] = {}

    def open(
        self,
        way: str,
        files: list[str],
        labels: list[int],
        size: int,
        batch: int,
        workers: int,
    ) -> None:
        """Starts a loader of shuffled batches, full ones only."""
        loader = DataLoader(
            Pictures(files, labels, size, uint8=way == "uint8"),
            batch,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=workers > 0,
        )

        def forever() -> Iterator[Any]:
            while True:
                yield from loader

        self._batches[way] = forever()

    def run(self, way: str, before: int, steps: int) -> float:
        """Takes `before` batches, then `steps`; returns the seconds of the latter."""
        batches = self._batches[way]
        for _ in range(before):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return time.perf_counter() - start

    def close(self) -> None:
        """Ends all loaders and their workers."""
        self._batches.clear()


if __name__ == "__main__":
    sides = Sides()
    protocol.serve({"open": sides.open, "run": sides.run, "close": sides.close})
