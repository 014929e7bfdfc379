"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

import collections
import threading
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the histogram of request times, in seconds.
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters since the start; safe to change from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[int] = collections.Counter()
        self._pictures: collections.Counter[str] = collections.Counter(
            {"classified": 0, "unreadable": 0, "failed": 0}
        )
        self._batches: collections.Counter[int] = collections.Counter()
        self._batched = 0
        self._device_seconds = 0.0
        self._decode_seconds = 0.0
        self._request_seconds = 0.0
        self._buckets = [0] * len(_BOUNDS)

    def request(self, status: int, seconds: float) -> None:
        """Counts an answered request to /predict."""
        with self._lock:
            self._requests[status] += 1
            self._request_seconds += seconds
            for place, bound in enumerate(_BOUNDS):
                self._buckets[place] += seconds <= bound

    def picture(self, result: str) -> None:
        """Counts a picture: "classified", "unreadable", or "failed" on the device."""
        with self._lock:
            self._pictures[result] += 1

    def decoded(self, seconds: float) -> None:
        """Adds the time that a thread took to decode a picture."""
        with self._lock:
            self._decode_seconds += seconds

    def batch(self, size: int, pictures: int, seconds: float) -> None:
        """Counts a batch of this size, so many places of it filled."""
        with self._lock:
            self._batches[size] += 1
            self._batched += pictures
            self._device_seconds += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Returns the page.

        Args:
          gauges: name without "convnet_" -> (help, value), as they are now.
        """
        lines: list[str] = []

        def add(name: str, kind: str, about: str, samples: Mapping[str, float]) -> None:
            lines.append(f"# HELP convnet_{name} {about}")
            lines.append(f"# TYPE convnet_{name} {kind}")
            lines.extend(f"convnet_{name}{k} {v}" for k, v in samples.items())

        def labelled(name: str, counter: Mapping) -> dict[str, float]:
            return {f'{{{name}="{k}"}}': v for k, v in sorted(counter.items())}

        with self._lock:
            add(
                "requests_total",
                "counter",
                "Answered requests to /predict, by HTTP status.",
                labelled("status", self._requests),
            )
            buckets = dict(zip(map(str, _BOUNDS), self._buckets, strict=True))
            count = self._requests.total()
            histogram = {
                f'_bucket{{le="{k}"}}': v
                for k, v in (buckets | {"+Inf": count}).items()
            }
            add(
                "request_seconds",
                "histogram",
                "Time from a request's header to its answer.",
                {**histogram, "_sum": self._request_seconds, "_count": count},
            )
            add(
                "pictures_total",
                "counter",
                "Pictures, by what became of them.",
                labelled("result", self._pictures),
            )
            add(
                "batches_total",
                "counter",
                "Batches that the device worked on, by size with padding.",
                labelled("size", self._batches),
            )
            for name, about, value in (
                ("batched_pictures_total", "Pictures in batches.", self._batched),
                ("device_seconds_total", "Time in batches.", self._device_seconds),
                (
                    "decode_seconds_total",
                    "Time that threads spent decoding.",
                    self._decode_seconds,
                ),
            ):
                add(name, "counter", about, {"": value})
        for name, (about, value) in gauges.items():
            add(name, "gauge", about, {"": value})
        return "\n".join(lines) + "\n"
