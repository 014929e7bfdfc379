"""What is measured of a dataset before a run: mean and deviation, a fingerprint."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from convnet.data import pipeline
from convnet.data.source import Dataset, Source

_MEASURED_EXAMPLES = 1024


def mean_and_std(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measures each channel's mean and standard deviation.

    Returns:
      Two tuples of c numbers, in units of `step.to_unit` (images: 0 to 1), rounded to 4
      digits, from up to 1,024 evenly spaced examples: the same on every path.
    """
    means, squares = [], []
    for record in spread(source, _MEASURED_EXAMPLES):
        values = record["input"].reshape(-1, record["input"].shape[-1])
        values = values.astype(np.float64)
        if record["input"].dtype == np.uint8:
            values /= 255
        means.append(values.mean(0))
        squares.append(np.square(values).mean(0))
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 0))
    # A channel that never varies must not be divided by zero.
    return (
        tuple(round(float(x), 4) for x in mean),
        tuple(round(max(float(x), 1e-3), 4) for x in std),
    )


def spread(source: Source, count: int) -> Iterator[dict[str, Any]]:
    """Yields `count` evenly spaced records; good ones stand in for unreadable ones."""
    indices = np.linspace(0, len(source) - 1, min(len(source), count)).astype(int)
    for start in range(0, len(indices), 32):
        part = indices[start : start + 32]
        order = {"index": part, "weight": np.ones(len(part), np.float32)}
        batch, _ = pipeline.read_batch(source, order)
        for inputs, label in zip(batch["input"], batch["label"], strict=True):
            yield {"input": inputs, "label": label}


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Returns what tells datasets apart: sizes, classes, a hash of samples."""
    found: dict[str, Any] = {"classes": list(dataset.classes)}
    for name in ("train", "test"):
        source, digest = getattr(dataset, name), hashlib.sha256()
        for record in spread(source, 32):
            for value in (record["input"], record["label"]):
                digest.update(np.ascontiguousarray(value).tobytes())
        found[name] = {"examples": len(source), "sample/sha256": digest.hexdigest()}
    return found
