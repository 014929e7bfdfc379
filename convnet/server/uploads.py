"""A request's body -> files, within limits of size, number and time."""

import asyncio
import contextlib
from collections.abc import Iterator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message

_SECONDS = 60  # A body that has not arrived by then is refused.


class Refused(Exception):
    """A request that gets no answer: its status, the reason, when to try again."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


class Room:
    """A bounded amount of something; what does not fit is not let in.

    Attributes:
      held: how much is in now.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0

    @contextlib.contextmanager
    def hold(self, amount: int, retry_after: int) -> Iterator[None]:
        """Holds an amount within the `with` block.

        Raises:
          Refused: it does not fit now (503).
        """
        if self.held + amount > self.capacity:
            raise Refused(503, "the server is busy: the queue is full", retry_after)
        self.held += amount
        try:
            yield
        finally:
            self.held -= amount


def body_size(request: Request, limit: int) -> int:
    """Returns the bytes that the body may have: Content-Length, or the limit.

    Raises:
      Refused: more than the limit (413).
    """
    length = request.headers.get("content-length", "")
    size = int(length) if length.isdecimal() else limit
    if size > limit:
        raise _too_large(limit)
    return size


async def read(request: Request, limit: int, max_files: int) -> list[tuple[str, bytes]]:
    """Returns the names and contents of the files in the body.

    A body that is no form is one file, named by the query's `name`.

    Raises:
      Refused: too large or too many (413), malformed or empty (400), too slow (408).
      ClientDisconnect: the client has gone.
    """
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    limited = Request(request.scope, receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_SECONDS):
            if kind != "multipart/form-data":
                data = await limited.body()
                if not data:
                    raise Refused(400, "the body is empty: send a picture's bytes")
                return [(request.query_params.get("name", "picture"), data)]
            return await _files(limited, limit, max_files)
    except TimeoutError:
        raise Refused(408, f"the body took more than {_SECONDS} s") from None


async def _files(
    request: Request, limit: int, max_files: int
) -> list[tuple[str, bytes]]:
    # One more than allowed, so that this many are told from a malformed form.
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=max_files + 1, max_fields=100
    )
    parser.spool_max_size = limit + 1  # In memory: a container may have no disk.
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"not a multipart form: {error.message}") from None
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        uploads = [v for _, v in form.multi_items() if isinstance(v, UploadFile)]
        # A browser sends a nameless empty file where none was chosen.
        uploads = [u for u in uploads if u.filename or u.size]
        if not uploads:
            raise Refused(400, "the form has no file")
        if len(uploads) > max_files:
            raise Refused(413, f"more than {max_files} files in a request")
        return [(u.filename or "picture", await u.read()) for u in uploads]


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the request is larger than {limit / 1e6:g} MB")
