"""A published file, fetched once: continued, checked by size and hash, shared.

The folder and lock helpers are here too, since whoever fetches must write.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from convnet.errors import ConvnetError

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18  # bytes


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file: its name, address, length in bytes and hex digest."""

    file: str
    url: str
    size: int
    sha256: str


class _DownloadError(Exception):
    """Why an archive could not be had, as a phrase."""


def obtain(archive: Archive, folder: Path) -> Path:
    """Returns `folder/archive.file`, downloaded unless it lies there whole.

    What an interrupted download left in `archive.file + ".part"` is continued if the
    server can. Hold `exclusive` around this: two writers would mix their bytes.

    Raises:
      ConvnetError: of two lines, what failed and what to do, where the archive cannot
        be had; of one line, where `folder` cannot be read or written.
    """
    path = folder / archive.file
    part = path.with_name(path.name + ".part")
    found = ""
    with accessing(path):
        if path.is_file():
            wrong = _wrong(archive, path)
            if not wrong:
                return path
            found = f"; {path} {wrong}"
        try:
            _download(archive, part)
            wrong = _wrong(archive, part)
            if wrong:
                part.unlink()
                raise _DownloadError(f"what came {wrong}")
        except _DownloadError as e:
            raise ConvnetError(
                f"cannot download {archive.url}: {e}{found}\n"
                f"put the archive {archive.file} into {folder}, or prepare the dataset "
                "on another machine and set --config.data.dir"
            ) from e
        part.replace(path)
    return path


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, or raises a ConvnetError that says why not."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ConvnetError(
                f"{part}: is a file where a folder should be; move it away, or name "
                "another folder with --config.data.dir"
            )
    with accessing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def accessing(path: Path) -> Iterator[None]:
    """Turns what the system (or ArrayRecordWriter: RuntimeError) refuses into a
    ConvnetError that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConvnetError(
            f"{getattr(e, 'filename', None) or path}: {reason}; make room or give "
            "access, or name another folder with --config.data.dir"
        ) from e


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock on a file; the system releases it however this process ends."""
    with contextlib.ExitStack() as stack:
        with accessing(path):
            file = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path}: waiting for another process", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wrong(archive: Archive, path: Path) -> str:
    """What tells the file from the published archive, or ""."""
    size = path.stat().st_size
    if size != archive.size:
        return f"has {size:,} bytes instead of {archive.size:,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        return f"has the SHA-256 {digest} instead of {archive.sha256}"
    return ""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as e:
        e.close()
        raise _DownloadError(f"the server answered {e.code} {e.reason}") from e
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = str(getattr(e, "reason", e)) or type(e).__name__
        raise _DownloadError(" ".join(reason.split())) from e


def _download(archive: Archive, part: Path) -> None:
    """Completes `part`, from where it ends if the server can."""
    from tqdm import tqdm

    done = part.stat().st_size if part.exists() else 0
    if done >= archive.size:
        done = 0
    with contextlib.ExitStack() as stack:
        with _network():
            headers = {"Range": f"bytes={done}-"} if done else {}
            request = urllib.request.Request(archive.url, headers=headers)
            response = stack.enter_context(
                urllib.request.urlopen(request, timeout=_TIMEOUT)
            )
        start = response.headers.get("Content-Range", "")
        if response.status != 206 or not start.startswith(f"bytes {done}-"):
            done = 0  # the whole file comes
        if response.length not in (None, archive.size - done):
            raise _DownloadError(
                f"the server offers {done + response.length:,} bytes instead of "
                f"{archive.size:,}"
            )
        print(f"downloading {archive.url} to {part.parent}", file=sys.stderr)
        out = stack.enter_context(part.open("ab" if done else "wb"))
        bar = tqdm(
            total=archive.size,
            initial=done,
            unit="B",
            unit_scale=True,
            disable=None,  # where stderr is no terminal
        )
        stack.enter_context(bar)
        while done <= archive.size:
            with _network():
                chunk = response.read(_CHUNK)
            if not chunk:
                break
            out.write(chunk)
            bar.update(len(chunk))
            done += len(chunk)
    if done < archive.size:
        raise _DownloadError(f"it ended after {done:,} of {archive.size:,} bytes")
