"""Pictures of many requests -> batches of a few fixed sizes, one at a time.

While the device works on a batch, the pictures that arrive wait for the next one: the
busier the server, the larger the batches, and nobody waits on an idle device.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from convnet.server.metrics import Metrics

# uint8 (b, h, w, c) -> float32 (b, ...).
Compute = Callable[[np.ndarray], np.ndarray]


class BatchError(Exception):
    """The device failed on a batch; the message says how."""


class Batcher:
    """Runs `compute` in one thread of its own.

    Made and used in one event loop.

    Args:
      compute: called with batches of one of the `sizes` only, padded with zeros.
      shape: (h, w, c) of a picture.
      sizes: compiled by `warm_up`.
      metrics: counts the batches.
    """

    def __init__(
        self,
        compute: Compute,
        shape: tuple[int, int, int],
        sizes: Sequence[int],
        metrics: Metrics,
    ) -> None:
        self._compute = compute
        self._shape = shape
        self._sizes = sorted(sizes)
        self._metrics = metrics
        # Seconds that a batch of each size takes, of those that are compiled.
        self._seconds: dict[int, float] = {}
        self._waiting: collections.deque[tuple[np.ndarray, asyncio.Future]] = (
            collections.deque()
        )
        self._arrived = asyncio.Event()
        self._device = ThreadPoolExecutor(1, "device")

    @property
    def ready(self) -> bool:
        """Whether all sizes are compiled."""
        return len(self._seconds) == len(self._sizes)

    def seconds_for(self, pictures: int) -> float:
        """Returns about how long the device takes for so many pictures."""
        per_picture = (self._seconds[size] / size for size in self._seconds)
        return pictures * min(per_picture, default=1.0)

    async def warm_up(self) -> None:
        """Compiles every size and measures it."""
        loop = asyncio.get_running_loop()
        for size in self._sizes:
            seconds = await loop.run_in_executor(self._device, self._measure, size)
            self._seconds[size] = seconds

    def _measure(self, size: int) -> float:
        pixels = np.zeros((size, *self._shape), np.uint8)
        self._compute(pixels)  # Compiles.
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self._compute(pixels)
            times.append(time.perf_counter() - start)
        return min(times)

    async def submit(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the network's answer for one picture uint8 (h, w, c).

        Raises:
          BatchError: the device failed.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Answers what is submitted, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            taken = self._take()
            if not self._waiting:
                self._arrived.clear()
            if not taken:
                continue
            pixels = [picture for picture, _ in taken]
            try:
                answers = await loop.run_in_executor(self._device, self._batch, pixels)
            except Exception as error:  # XLA's errors have no common public class.
                text = " ".join(str(error).split())[:200]
                failed = BatchError(f"the model failed: {type(error).__name__}: {text}")
                answers = [failed] * len(taken)
            for (_, future), answer in zip(taken, answers, strict=True):
                if future.done():  # Nobody waits for it any more.
                    continue
                if isinstance(answer, BatchError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _take(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        """Takes the next pictures: as many as answer the most of them per second."""
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        count = len(self._waiting)
        size = max(self._sizes, key=lambda size: min(size, count) / self._seconds[size])
        return [self._waiting.popleft() for _ in range(min(size, count))]

    def _batch(self, pictures: list[np.ndarray]) -> Sequence[np.ndarray]:
        count = len(pictures)
        size = next(size for size in self._sizes if size >= count)
        pixels = np.zeros((size, *self._shape), np.uint8)
        np.stack(pictures, out=pixels[:count])
        start = time.perf_counter()
        answers = self._compute(pixels)[:count]
        self._metrics.batch(size, count, time.perf_counter() - start)
        return answers

    def close(self) -> None:
        """Lets the thread end after the batch that it is working on."""
        self._device.shutdown(wait=False, cancel_futures=True)
