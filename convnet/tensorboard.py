"""TensorBoard's event files, without TensorFlow.

Written by hand around tensorboardX's protocol buffers: its own writer works in a
thread, whose failure (a full disk) nobody would see.
"""

import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2


class EventFile:
    """A new event file in `folder`; each event is on disk when the call returns.

    Points of `step` and later that older files of the folder hold are hidden, because a
    resumed run writes them again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = open(folder / f"{name}.{os.getpid()}", "wb", buffering=0)  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step, session_log=start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each named curve."""
        for name, value in values.items():
            self._write(step=step, summary=summary.scalar(name, value))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        # A TFRecord: length, its checksum, the data, their checksum.
        length = struct.pack("<Q", len(event))
        record = length + _masked(length) + event + _masked(event)
        while record:  # A disk that is almost full takes a part.
            record = record[self._file.write(record) :]


def _masked(data: bytes) -> bytes:
    """The CRC-32C of `data`, rotated and shifted as TFRecord wants it."""
    crc = crc32c(data)
    rotated = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)
