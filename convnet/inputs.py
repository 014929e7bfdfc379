"""What a person names on a command line -> a stream of records to predict.

Files are read whatever their names end in, but `.npy` and `.npz` hold arrays. A folder
is read with all folders in it, in the order of the names: every file but hidden ones,
what file managers leave behind, and notes beside pictures (`SIDECARS`).
"""

import dataclasses
import glob
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from convnet import input_arrays
from convnet.errors import UsageError

STDIN = "-"
SIDECARS = (
    *(".txt", ".md", ".rst", ".pdf", ".html", ".htm", ".log", ".py", ".ipynb"),
    *(".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".safetensors"),
)
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")
_MAGIC = "*?["


@dataclasses.dataclass(frozen=True)
class Record:
    """One input.

    Attributes:
      path: as the output names it.
      pixels: the input itself where it came out of an array; None for a picture, which
        is still to be read from `path`.
      error: why it cannot be read, "" where nothing is known to be wrong.
    """

    path: str
    pixels: np.ndarray | None = None
    error: str = ""


def expand(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with patterns that no shell has expanded replaced.

    Raises:
      UsageError: a path does not exist, a pattern matches nothing, nothing is named, or
        standard input is named twice.
    """
    if not arguments:
        raise UsageError("no PATH: name pictures, folders, or - (--help shows more)")
    if arguments.count(STDIN) > 1:
        raise UsageError("- (standard input) can be read only once")
    paths = []
    for argument in arguments:
        if argument == STDIN or (argument and os.path.lexists(argument)):
            paths.append(argument)
        elif any(sign in argument for sign in _MAGIC):
            paths += _matches(argument)
        else:
            raise UsageError(f"{argument or repr('')}: no such file or folder")
    return paths


def records(paths: Sequence[str], wanted: input_arrays.Wanted) -> Iterator[Record]:
    """Yields the records behind paths (see `expand`), in order.

    Whatever cannot be read is a record with an error; nothing is raised for it.
    """
    for path in paths:
        for found in _lines() if path == STDIN else (path,):
            # Of a link that leads nowhere, the reader says so.
            files = _walk(found) if os.path.isdir(found) else (Record(found),)
            for record in files:
                if record.error or not input_arrays.is_array_file(record.path):
                    yield record
                    continue
                for name, row, error in input_arrays.rows(record.path, wanted):
                    yield Record(name, row, error)


def _matches(pattern: str) -> list[str]:
    """Returns what a pattern matches, sorted; nothing twice.

    `**` also matches folders, whose files it matches too, and follows links in circles.
    """
    real: dict[str, str] = {}
    found, seen, folders = [], set(), set()
    matches = glob.glob(pattern, recursive=True)
    for path in sorted(matches, key=lambda path: (path.count(os.sep), path)):
        path = path.rstrip(os.sep) or os.sep
        parent, name = os.path.split(path)
        if parent not in real:
            real[parent] = os.path.realpath(parent)
        if any(up in folders for up in _above(path)):
            continue
        place = os.path.join(real[parent], name)
        if os.path.isdir(path):
            folders.add(path)
            place = os.path.realpath(path)
        if place in seen:
            continue
        seen.add(place)
        found.append(path)
    if not found:
        raise UsageError(f"{pattern}: no file matches")
    return sorted(found)


def _above(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def _lines() -> Iterator[str]:
    """Yields the paths on standard input: a line each, or ended by nulls each."""
    rest, end = b"", b""
    while block := sys.stdin.buffer.read1(1 << 16):
        end = end or (b"\0" if b"\0" in block else b"\n" if b"\n" in block else b"")
        *whole, rest = (rest + block).split(end) if end else [rest + block]
        for line in whole:
            yield from _line(line, end)
    yield from _line(rest, end)


def _line(line: bytes, end: bytes) -> Iterator[str]:
    line = line if end == b"\0" else line.removesuffix(b"\r")
    if line:
        yield os.fsdecode(line)


def _walk(root: str) -> Iterator[Record]:
    """Yields the files under a folder. Links are followed, no folder is read twice."""
    # Not recursive: folders may be nested deeper than Python's stack.
    opened: list[tuple[str, Iterator[str], tuple[int, int]]] = []
    seen: set[tuple[int, int]] = set()
    around = {_identity(folder) for folder in _above(os.path.realpath(root))}

    def enter(folder: str) -> Iterator[Record]:
        try:
            identity = _identity(folder)
            names = iter(sorted(os.listdir(folder)))
        except OSError as error:
            yield Record(folder, error=error.strerror or str(error))
            return
        if identity in around or any(identity == i for *_, i in opened):
            yield Record(folder, error="a link to a folder that it lies in")
        elif identity not in seen:
            seen.add(identity)
            opened.append((folder, names, identity))

    yield from enter(root)
    while opened:
        folder, names, _ = opened[-1]
        name = next(names, None)
        if name is None:
            opened.pop()
        elif not name.startswith(".") and name.lower() not in _JUNK:
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                yield from enter(path)
            elif not name.lower().endswith(SIDECARS):
                yield Record(path)


def _identity(folder: str) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino
