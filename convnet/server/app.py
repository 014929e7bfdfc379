"""The ASGI application: page, /predict, /healthz and /metrics."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convnet.data.decode import DecodeError
from convnet.predict_output import Row
from convnet.server import page, uploads
from convnet.server.batcher import Batcher, BatchError
from convnet.server.classifier import Classifier
from convnet.server.metrics import CONTENT_TYPE, Metrics
from convnet.server.uploads import Refused, Room

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TOP = 3  # Classes in an answer, unless the query says how many.


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
      queue: pictures that are decoded, wait or are classified at a time.
      megabytes: of a request's body.
      megapixels: of a picture.
      files: in a request.
      bodies: full-sized bodies that may be in memory at a time.
    """

    queue: int = 256
    megabytes: float = 32.0
    megapixels: float = 50.0
    files: int = 64
    bodies: int = 16


class Service:
    """All that lives as long as the server.

    Attributes:
      app: the ASGI application.
      failure: why the warm-up failed, None if it did not.
      lost: requests that were cut off at the end.

    Args:
      classifier: the model.
      title: its name, for the page.
      sizes: of the batches to compile.
      limits: see there.
      names: hosts under which a browser may reach the server, besides localhost and
        addresses.
      on_failure: called when the warm-up fails.
      on_ready: called when it is done, with its seconds.
    """

    def __init__(
        self,
        classifier: Classifier,
        title: str,
        sizes: tuple[int, ...],
        limits: Limits,
        names: frozenset[str] = frozenset(),
        on_failure: Callable[[], None] = lambda: None,
        on_ready: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.failure: Exception | None = None
        self.lost = 0
        self._classifier = classifier
        self._limits = limits
        self._sizes = sizes
        self._on_failure, self._on_ready = on_failure, on_ready
        self._max_files = min(limits.files, limits.queue)
        self._max_bytes = int(limits.megabytes * 1e6)
        self._pictures = Room(limits.queue)
        self._bytes = Room(limits.bodies * self._max_bytes)
        self._metrics = Metrics()
        self._batcher: Batcher | None = None
        self._decoders = ThreadPoolExecutor(
            max(2, min(8, os.cpu_count() or 1)), "decode"
        )
        self._title = title
        self._files = page.files(title, classifier, self._max_bytes, self._max_files)
        routes = [Route(path, self._static) for path in self._files]
        routes += [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/healthz", self._healthz),
            Route("/metrics", self._metrics_page),
        ]
        app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={Exception: _report},
        )
        self.app: ASGIApp = Guard(app, names)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._batcher = Batcher(
            self._classifier, self._classifier.shape, self._sizes, self._metrics
        )
        work = asyncio.create_task(self._work(self._batcher))
        yield
        work.cancel()
        self._batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _work(self, batcher: Batcher) -> None:
        start = time.perf_counter()
        try:
            await batcher.warm_up()
        except Exception as error:  # XLA's errors have no common public class.
            self.failure = error
            self._on_failure()
            return
        self._on_ready(time.perf_counter() - start)
        await batcher.run()

    @property
    def _ready(self) -> bool:
        return self._batcher is not None and self._batcher.ready

    async def _static(self, request: Request) -> Response:
        content, kind = self._files[request.url.path]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    async def _healthz(self, request: Request) -> Response:
        if self._ready:
            return JSONResponse({"status": "ready", "model": self._title})
        return JSONResponse({"status": "compiling"}, 503, {"Retry-After": "1"})

    async def _metrics_page(self, request: Request) -> Response:
        gauges = {
            "queue_pictures": (
                "Pictures that wait or are at work.",
                self._pictures.held,
            ),
            "queue_capacity": ("The most of them.", self._pictures.capacity),
            "upload_bytes": ("Memory that bodies may take.", self._bytes.held),
            "ready": ("1 when every batch size is compiled.", int(self._ready)),
        }
        return PlainTextResponse(
            self._metrics.text(gauges), headers={"Content-Type": CONTENT_TYPE}
        )

    async def _predict(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            response = await self._answer(request)
        except Refused as refused:
            headers = {}
            if refused.retry_after is not None:
                headers["Retry-After"] = str(refused.retry_after)
            response = JSONResponse({"error": refused.reason}, refused.status, headers)
        except ClientDisconnect:
            response = Response(status_code=499)  # Nobody sees it but the metrics.
        except asyncio.CancelledError:
            self.lost += 1
            raise
        self._metrics.request(response.status_code, time.perf_counter() - start)
        return response

    async def _answer(self, request: Request) -> Response:
        if not self._ready:
            raise Refused(503, "the model is being compiled", 1)
        top = self._top(request)
        size = uploads.body_size(request, self._max_bytes)
        with self._bytes.hold(size, self._retry_after()):
            files = await uploads.read(request, self._max_bytes, self._max_files)
            with self._pictures.hold(len(files), self._retry_after()):
                rows = await asyncio.gather(*(self._row(*f, top) for f in files))
        if len(rows) > 1:
            return JSONResponse([row for row, _ in rows])
        row, status = rows[0]
        return JSONResponse(row, status)

    def _top(self, request: Request) -> int:
        text = request.query_params.get("top", str(_TOP))
        if not text.isdecimal() or not 1 <= len(text) <= 9 or int(text) < 1:
            raise Refused(400, f"top={text[:20]}: want a number of classes from 1 on")
        return int(text)

    def _retry_after(self) -> int:
        """Seconds until about half of what is held now has been answered."""
        seconds = self._batcher.seconds_for(self._pictures.held) / 2
        return max(1, min(30, math.ceil(seconds)))

    async def _row(self, name: str, data: bytes, top: int) -> tuple[Row, int]:
        """Returns the answer for one file, and the status if it is the only one."""
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(
                self._decoders, self._decode, data, name
            )
            probabilities = await self._batcher.submit(pixels)
        except DecodeError as error:
            self._metrics.picture("unreadable")
            return {"path": name, "error": error.reason}, 422
        except BatchError as error:
            self._metrics.picture("failed")
            return {"path": name, "error": str(error)}, 500
        row = self._classifier.row(name, probabilities, top)
        self._metrics.picture("failed" if "error" in row else "classified")
        return row, 500 if "error" in row else 200

    def _decode(self, data: bytes, name: str) -> np.ndarray:
        start = time.perf_counter()
        try:
            pixels = int(self._limits.megapixels * 1e6)
            return self._classifier.decode(data, name, pixels)
        finally:
            self._metrics.decoded(time.perf_counter() - start)


class Guard:
    """Refuses what a foreign web page may try, and sets the headers of every answer.

    A page of another site can make a browser send requests to a server on this
    machine. It cannot read the answers, unless its own name points here (DNS
    rebinding): then the browser sends that name as the host.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers by itself, or hands the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        if not self._known(headers.get("host", "")):
            error = {"error": "this server does not go by that name: see --names"}
            app: ASGIApp = JSONResponse(error, 421)
        elif scope["method"] == "POST" and headers.get("sec-fetch-site") in (
            "cross-site",
            "same-site",
        ):
            app = JSONResponse({"error": "sent by a page of another site"}, 403)
        else:
            app = self._app
        await app(scope, receive, send_with_headers)

    def _known(self, host: str) -> bool:
        if host.startswith("["):
            name = host[1:].partition("]")[0]
        else:
            name = host.partition(":")[0].lower().rstrip(".")
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def _report(request: Request, error: Exception) -> Response:
    text = " ".join(str(error).split())
    line = f"{request.method} {request.url.path}: {type(error).__name__}: {text}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    return JSONResponse({"error": "an error in the server; it is in its log"}, 500)
