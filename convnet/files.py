"""Files that are whole or not there."""

import os
from pathlib import Path

from convnet.errors import ConvnetError


def write(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place, then renames it there.

    Raises:
      ConvnetError: it cannot be written; what was there before still is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        beside.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> ConvnetError:
    """Returns the error of a file that cannot be written."""
    return ConvnetError(
        f"{path} cannot be written: {error.strerror or error}; make room, and run the"
        " same command again"
    )
