"""Decoded images on disk, so that an image is decoded once: `data.cache`.

The store is addressed by content, as git's is: an entry is named by the hash of the
file's bytes, of how they are decoded and of the decoder. So an edited picture or
another size is another entry, two copies of a picture share one, and runs and worker
processes share a folder without locks: whoever writes an entry writes the same. Nothing
is ever deleted; the folder may be at any time.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import secrets
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import features
from tqdm import tqdm

from convnet.data import decode as decode_lib
from convnet.data.resize import Resize
from convnet.errors import UsageError

_DECODER_FILES = ("decode.py", "headers.py", "modes.py", "resize.py")
# Height, width, channels and a checksum. Then the pixels.
_HEADER = struct.Struct("<IIII")
# What is larger is decoded from the file and not kept: no picture, but perhaps a film.
_MAX_FILE_BYTES = 256 << 20


class Cache:
    """A folder of decoded images, safe to share between threads, processes and runs.

    What is wrong with the folder is never an error: an entry that cannot be read, is
    cut short or fails its checksum is decoded and written again, and where writing
    fails (a full disk) one warning is printed and nothing more is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self._decoder = _decoder()
        self._writes = True

    def decode(
        self,
        data: bytes | str | Path,
        id: str,
        *,
        size: int,
        resize: Resize,
        channels: int = 3,
    ) -> np.ndarray:
        """As `decode.decode`, from the cache where it holds the image.

        Unreadable images are not kept: they are tried again, and fail again.

        Raises:
            DecodeError: the image cannot be read, for whatever reason.
        """
        options = {"size": size, "resize": resize, "channels": channels}
        content = _content(data)
        if content is None:
            return decode_lib.decode(data, id, **options)
        how = f"{self._decoder} {size} {resize} {channels}\n"
        key = hashlib.sha256(how.encode())
        key.update(content)
        name = key.hexdigest()
        path = os.path.join(self.folder, name[:2], name[2:])
        pixels = _read(path)
        if pixels is None:
            pixels = decode_lib.decode(content, id, **options)
            if self._writes:
                self._write(path, pixels)
        return pixels

    def _write(self, path: str, pixels: np.ndarray) -> None:
        # Not `files.write`: a lost entry costs a decoding, so nothing waits for the
        # disk; and threads, too, may write one entry at the same time.
        beside = f"{path}.{secrets.token_hex(8)}"
        header = _HEADER.pack(*pixels.shape, _checksum(pixels))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                with open(beside, "xb") as file:
                    file.write(header + pixels.tobytes())
                os.replace(beside, path)
            except BaseException:
                Path(beside).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._writes = False
            tqdm.write(
                f"warning: data.cache={self.folder}: {error.strerror or error}; images"
                " that it lacks are decoded each time"
            )


def create(setting: str) -> Cache | None:
    """Opens the cache that `data.cache` names.

    Args:
        setting: a folder; "auto" for the user's; "none" or "" for no cache.

    Raises:
        UsageError: the folder is a file, or cannot be made.
    """
    if setting in ("none", ""):
        return None
    folder = Path(setting).expanduser()
    if setting == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(base).expanduser() / "convnet" / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"data.cache={setting!r}: the folder {folder} cannot be made"
            f" ({error.strerror}); name another one, or none"
        ) from None
    return Cache(folder)


def _decoder() -> str:
    """Changes with all that may change the pixels: our code, and the libraries."""
    code = hashlib.sha256()
    for name in _DECODER_FILES:
        code.update(Path(__file__).with_name(name).read_bytes())
    versions = [PIL.__version__, features.version("libjpeg_turbo")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.append(importlib.metadata.version("simplejpeg"))
    return f"{code.hexdigest()} {versions}"


def _content(data: bytes | str | Path) -> bytes | None:
    """The file's bytes; None if it cannot be read (decoding says why) or is huge."""
    if isinstance(data, bytes):
        return data
    if not os.path.isfile(data):  # to open a pipe could wait for ever
        return None
    try:
        with open(data, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size <= _MAX_FILE_BYTES:
                return file.read()
    except OSError:
        pass
    return None


def _read(path: str) -> np.ndarray | None:
    """The pixels of an entry; None if it is absent, unreadable or damaged."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
            count = file.readinto(content)
    except OSError:
        return None
    if count != len(content) or count < _HEADER.size:
        return None
    h, w, c, checksum = _HEADER.unpack_from(content)
    if count != _HEADER.size + h * w * c:
        return None
    pixels = content[_HEADER.size :].reshape(h, w, c)
    return pixels if checksum == _checksum(pixels) else None


def _checksum(pixels: np.ndarray) -> int:
    return zlib.crc32(pixels, zlib.crc32(repr(pixels.shape).encode()))
