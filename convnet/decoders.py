"""Pictures decoded beside the network: a few in threads, many in processes.

Pillow holds the interpreter's lock while it reads a header, so that threads do not
speed up small pictures; a process takes a fifth of a second to start.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convnet.data.decode import DecodeError, decode
from convnet.data.resize import Resize
from convnet.errors import ConvnetError
from convnet.input_arrays import Wanted
from convnet.inputs import Record

_LENGTH = struct.Struct("<Q")


def pixels(path: str, wanted: Wanted) -> np.ndarray:
    """Decodes the picture file to the model's input, uint8 (h, w, c).

    Raises:
      DecodeError: it cannot be read, or not to this shape.
    """
    if not wanted.pictures:
        raise DecodeError(path, f"the model takes {wanted}: want a .npy or .npz file")
    height, width, channels = wanted.shape
    size = height if height == width else 0
    found = decode(path, path, size=size, resize=wanted.resize, channels=channels)
    if found.shape != wanted.shape:
        raise DecodeError(
            path,
            f"is {found.shape[1]}x{found.shape[0]} pixels; the model takes"
            f" {width}x{height}, and resizes only to squares",
        )
    return found


def _batch(paths: Sequence[str], wanted: Wanted) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes n pictures: their pixels (n, h, w, c), and what is wrong by index."""
    out = np.zeros((len(paths), *wanted.shape), wanted.dtype)
    errors = {}
    for index, path in enumerate(paths):
        try:
            out[index] = pixels(path, wanted)
        except DecodeError as error:
            errors[index] = error.reason
    return out, errors


class Process:
    """A process that decodes batches of pictures, one at a time."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        package = str(Path(__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        about = [wanted.shape, wanted.dtype, wanted.resize]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "convnet.decoders", json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [package, inherited])),
                # NumPy's threads would only take time to start.
                "OPENBLAS_NUM_THREADS": "1",
            },
            # Ctrl-C in a terminal is for us: we end it.
            start_new_session=True,
        )

    def __call__(self, paths: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Decodes n pictures; see `_batch`.

        Raises:
          ConvnetError: the process died.
        """
        try:
            _send(self._process.stdin, json.dumps(paths).encode())
            errors = json.loads(_receive(self._process.stdout))
            out = np.empty((len(paths), *self._wanted.shape), self._wanted.dtype)
            _fill(self._process.stdout, memoryview(out).cast("B"))
        except (OSError, EOFError) as error:
            status = self._process.wait()
            raise ConvnetError(
                f"a decoding process died (status {status}) on one of {len(paths)}"
                f" files from {paths[0]} to {paths[-1]}"
            ) from error
        return out, {int(index): reason for index, reason in errors.items()}

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


def _send(file: BinaryIO, data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def _receive(file: BinaryIO) -> bytes:
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _fill(file: BinaryIO, out: memoryview) -> None:
    if file.readinto(out) < len(out):
        raise EOFError


def serve() -> None:
    """The process's side: batches of paths in, errors and pixels out, until the end."""
    shape, dtype, resize = json.loads(sys.argv[1])
    wanted = Wanted(tuple(shape), dtype, Resize(*resize))
    while True:
        try:
            paths = json.loads(_receive(sys.stdin.buffer))
        except EOFError:
            return
        out, errors = _batch(paths, wanted)
        _send(sys.stdout.buffer, json.dumps(errors).encode())
        sys.stdout.buffer.write(memoryview(out).cast("B"))
        sys.stdout.buffer.flush()


class Decoders:
    """Turns records into batches, several at the same time; a context manager.

    Args:
      wanted: what the model takes.
      batch_size: rows of the result, however few the records are.
      workers: batches at a time.
      processes: whether each has a process of its own.
    """

    def __init__(
        self, wanted: Wanted, batch_size: int, workers: int, processes: bool
    ) -> None:
        self.workers = workers
        self._wanted = wanted
        self._batch_size = batch_size
        self._threads = ThreadPoolExecutor(workers, "decode")
        self._processes = [Process(wanted) for _ in range(workers * processes)]
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def submit(self, records: list[Record]) -> Future:
        """Returns the future of the records, with their errors, and the batch.

        The batch is (batch_size, *shape): zeros where there is no readable record.
        """
        return self._threads.submit(self._decode, records)

    def _decode(self, records: list[Record]) -> tuple[list[Record], np.ndarray]:
        places = [
            place
            for place, record in enumerate(records)
            if record.pixels is None and not record.error
        ]
        found, errors = self._read([records[place].path for place in places])
        records = list(records)
        for index, reason in errors.items():
            place = places[index]
            records[place] = dataclasses.replace(records[place], error=reason)
        if len(found) == self._batch_size:
            return records, found
        batch = np.zeros((self._batch_size, *self._wanted.shape), self._wanted.dtype)
        batch[places] = found
        for place, record in enumerate(records):
            if record.pixels is not None:
                batch[place] = record.pixels
        return records, batch

    def _read(self, paths: list[str]) -> tuple[np.ndarray, dict[int, str]]:
        if not self._processes or not paths:
            return _batch(paths, self._wanted)
        process = self._idle.get()
        try:
            return process(paths)
        finally:
            self._idle.put(process)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        # What is under way ends with its process.
        for process in self._processes:
            process.close()
        self._threads.shutdown()


def in_order(
    items: Iterator[Any], submit: Callable[[Any], Future], ahead: int
) -> Iterator[Any]:
    """Yields the results of `submit` in the order of the items, `ahead` under way."""
    pending: collections.deque[Future] = collections.deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


if __name__ == "__main__":
    serve()
