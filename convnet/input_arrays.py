"""Rows of `.npy` and `.npz` files, a block at a time: no file is held in memory."""

import dataclasses
import math
import os
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from convnet.data.resize import Resize

_BLOCK = 1 << 20  # bytes
# Arrays of these names are the inputs, whatever else an archive holds.
_NAMES = ("images", "inputs", "input")

Row = tuple[str, np.ndarray | None, str]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The input that a model takes: `shape` without the batch, `dtype` as stored."""

    shape: tuple[int, ...]
    dtype: str
    resize: Resize

    @property
    def pictures(self) -> bool:
        """Whether picture files can be decoded to it."""
        return (
            self.dtype == "uint8" and len(self.shape) == 3 and self.shape[-1] in (1, 3)
        )

    def __str__(self) -> str:
        return f"{self.dtype} (n, {', '.join(map(str, self.shape))})"


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in a file: what its header says.

    `lead` is the shape of its rows taken together: (n,), or () for a single input.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    def lead(self, wanted: Wanted) -> tuple[int, ...] | None:
        """Returns (n,) for n inputs, () for one, None for no input of the model."""
        fits = self.dtype == np.uint8
        if wanted.dtype != "uint8":
            fits = self.dtype.kind == "f"
        shapes = [wanted.shape]
        if wanted.shape[-1] == 1:
            shapes.append(wanted.shape[:-1])
        for shape in shapes if fits else ():
            if self.shape[1:] == shape:
                return self.shape[:1]
        return () if fits and self.shape in shapes else None

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"


def is_array_file(path: str) -> bool:
    """Whether the name says that a file holds arrays."""
    return path.lower().endswith((".npy", ".npz"))


def rows(path: str, wanted: Wanted) -> Iterator[Row]:
    """Yields (name, input, "") for each row, or (name, None, error).

    What is wrong with the whole file comes last, under the name `path`.

    Names are `path#index`; `path#array:index` where an archive holds several arrays of
    inputs; `path` where the array is one input. A float32 model takes floats of any
    width.
    """
    try:
        if not os.path.isfile(path):
            os.stat(path)  # says what is wrong, unless it is something else
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            if path.lower().endswith(".npz"):
                with zipfile.ZipFile(file) as archive:
                    yield from _members(path, archive, wanted)
            else:
                yield from _rows(path, path, file, _header(file), wanted)
    except Exception as error:  # zipfile and zlib raise almost anything
        reason = error.strerror if isinstance(error, OSError) else ""
        yield path, None, reason or str(error) or type(error).__name__


def _members(path: str, archive: zipfile.ZipFile, wanted: Wanted) -> Iterator[Row]:
    arrays = {}
    for member in archive.namelist():
        if member.endswith(".npy"):
            with archive.open(member) as file:
                arrays[member.removesuffix(".npy")] = _header(file)
    named = [name for name in arrays if name in _NAMES]
    chosen = named or [n for n, a in arrays.items() if a.lead(wanted) is not None]
    if not chosen:
        held = ", ".join(f"{name} {array}" for name, array in arrays.items())
        raise ValueError(f"holds {held or 'no array'}; the model takes {wanted}")
    for name in chosen:
        prefix = path if len(chosen) == 1 else f"{path}#{name}"
        with archive.open(name + ".npy") as file:
            yield from _rows(path, prefix, file, _header(file), wanted)


def _header(file: Any) -> _Array:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"NumPy's format {version[0]}.{version[1]} is not known")
    # Of Python objects this is all that is read: they fit no model.
    return _Array(*readers[version](file))


def _rows(
    path: str, prefix: str, file: BinaryIO, array: _Array, wanted: Wanted
) -> Iterator[Row]:
    lead = array.lead(wanted)
    if lead is None:
        raise ValueError(f"is {array}; the model takes {wanted}")
    if lead == ():
        array = dataclasses.replace(array, shape=(1, *array.shape))
    start = 0
    for block in _blocks(file, array):
        with np.errstate(over="ignore"):
            block = block.astype(wanted.dtype, copy=False).reshape(-1, *wanted.shape)
        for index, row in enumerate(block, start):
            separator = "#" if prefix == path else ":"
            name = path if lead == () else f"{prefix}{separator}{index}"
            # A network may answer to such a row as if nothing were wrong.
            good = row.dtype == np.uint8 or np.isfinite(row).all()
            yield (
                (name, row, "")
                if good
                else (name, None, "not all its numbers are finite")
            )
        start += len(block)


def _blocks(file: BinaryIO, array: _Array) -> Iterator[np.ndarray]:
    row_shape, count = array.shape[1:], array.shape[0]
    row_bytes = math.prod(row_shape) * array.dtype.itemsize
    # An array in Fortran's order has its rows spread over the whole file.
    step = count if array.fortran else max(1, _BLOCK // row_bytes)
    for start in range(0, count, max(1, step)):
        n = min(step, count - start)
        data = file.read(n * row_bytes)
        if len(data) < n * row_bytes:
            whole = start + len(data) // row_bytes
            raise ValueError(f"is cut off: {whole} of {count} rows are there")
        order = "F" if array.fortran else "C"
        yield np.frombuffer(data, array.dtype).reshape((n, *row_shape), order=order)
