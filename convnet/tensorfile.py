"""Safetensors files from anywhere: the table is checked before a tensor is read.

A file is 8 bytes of length, so many bytes of JSON (name -> dtype, shape, place), then
the tensors, gapless. Nothing is allocated for a header that is too long or for a tensor
that does not lie in the file, and no code in a file is ever run.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

# A parsed header takes some twenty times its length.
MOST_HEADER = 4 * 2**20
# The entry of the metadata that holds the `seal`.
SEAL = "sha256"
_MOST_TENSORS = 10_000

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
}
# What people point at by mistake, by the first bytes.
_OTHERS = (
    (rb"PK[\x03\x05\x07]", "a zip archive (PyTorch, Keras or .npz)"),
    (rb"\x80[\x00-\x05]", "a Python pickle (an old PyTorch file?)"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)"),
    (rb"\x08[\x01-\x14][\x12\x1a\x22\x2a\x3a\x42]", "an ONNX model"),
    (rb"GGUF", "a GGUF file"),
    (rb"....TFL3", "a TensorFlow Lite model"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"version https://git-lfs", "a Git LFS pointer: the file itself is not here"),
    (rb"(?i)\s*<(!doctype html|html|head|body)", "an HTML page (a failed download?)"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd", "a compressed file: unpack it"),
    (rb".{257}ustar", "a tar archive: unpack it"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", "a picture"),
    (rb"\s*[{\[]", "JSON or text"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` in bytes from the begin of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Table:
    """The header of a file: what is in it, and the free text beside it."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_table(file: BinaryIO) -> Table:
    """Reads and checks the header of an open file.

    Raises:
      ValueError: it is no safetensors file (says what it is, if that can be told), or
        its header contradicts itself or the file's size.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > max(size, MOST_HEADER):
        raise ValueError(f"it is {_name(start)}")
    if length > MOST_HEADER:
        raise ValueError(f"its header has {length} bytes; up to {MOST_HEADER} are read")
    if length > size - 8:
        raise ValueError(
            f"it is cut off: a header of {length} bytes in a file of {size}"
        )
    file.seek(8)
    header = parse_json(file.read(length), "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its __metadata__ is not a table of strings")
    if len(header) > _MOST_TENSORS:
        raise ValueError(
            f"it names {len(header)} tensors; up to {_MOST_TENSORS} are read"
        )
    return Table(_entries(header, 8 + length, size), metadata)


def read(file: BinaryIO, entry: Entry) -> np.ndarray:
    """Reads one tensor of a file whose table was checked.

    Raises:
      ValueError: the file became shorter meanwhile.
    """
    file.seek(entry.start)
    values = np.fromfile(file, entry.dtype, math.prod(entry.shape))
    return values.reshape(entry.shape)


def seal(metadata: Mapping[str, str], tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Returns the SHA-256 of all that a file says and holds, but of the seal itself.

    Args:
      metadata: of the file; its entry `SEAL` is left out.
      tensors: names and values, in any order that is always the same.
    """
    said = {name: text for name, text in metadata.items() if name != SEAL}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, values in tensors:
        about = [name, str(values.dtype), list(values.shape)]
        digest.update(json.dumps(about).encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object that may come from anywhere.

    Raises:
      ValueError: it is no JSON, no object, nested too deeply, or names a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError(f"{what} has a key twice")
        return table

    try:
        table = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{what} is no JSON object")
    return table


def shorten(values: Iterable[Any], most: int = 6) -> str:
    """Returns a list of values for a message: the first few, and how many more."""
    values = list(values)
    text = ", ".join(repr(value)[:80] for value in values[:most])
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"[{text}{more}]"


def _name(start: bytes) -> str:
    if not start:
        return "an empty file"
    for pattern, name in _OTHERS:
        if re.match(pattern, start, re.DOTALL):
            return name
    return f"a file of an unknown kind, which begins with {start[:8]!r}"


def _entries(header: dict[str, Any], begin: int, size: int) -> dict[str, Entry]:
    places = {}
    for name, about in header.items():
        shown = repr(name)[:80]
        try:
            dtype, shape = about["dtype"], about["shape"]
            start, stop = about["data_offsets"]
            if not isinstance(shape, list) or len(shape) > 8:
                raise ValueError
            if any(
                type(n) is not int or not 0 <= n < 2**63 for n in [*shape, start, stop]
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"tensor {shown} has no proper dtype, shape and data_offsets"
            ) from None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(
                f"tensor {shown} has dtype {str(dtype)[:20]!r}; {', '.join(_DTYPES)}"
                " are read"
            )
        entry = Entry(np.dtype(_DTYPES[dtype]), tuple(shape), begin + start)
        if stop - start != math.prod(shape) * entry.dtype.itemsize:
            raise ValueError(
                f"tensor {shown} is {entry}, but has {stop - start} bytes of data"
            )
        places[name] = (start, stop, entry)
    # Without gaps and overlaps, the tensors together are no larger than the file.
    end = 0
    for start, stop, _ in sorted(places.values(), key=lambda place: place[:2]):
        if start != end:
            raise ValueError(
                f"a tensor begins at byte {start} of the data, where {end} is next"
            )
        end = stop
    if begin + end != size:
        raise ValueError(
            f"its tensors end at byte {begin + end}, the file at byte {size}"
        )
    return {name: entry for name, (_, _, entry) in places.items()}
