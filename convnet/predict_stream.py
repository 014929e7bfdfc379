"""Records -> predictions: pictures are decoded while the network computes."""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from convnet.decoders import Decoders, in_order
from convnet.input_arrays import Wanted
from convnet.inputs import Record

# From so many pictures on it pays to start processes that decode.
MANY = 512
# Numbers in the inputs of a batch on a CPU: 500 images of 32x32, for which the arrays
# between a small network's layers stay near. On two Zen 4 cores ConvNetJS's network
# goes through 14,500 images/s in batches of 250, 16,000 of 500, 11,700 of 1,000; in
# bfloat16 22,900, 24,500, 25,900. Accelerators want more to do.
_NUMBERS = 500 * 32 * 32 * 3
_ACCELERATOR_FACTOR = 8


@dataclasses.dataclass
class Times:
    """Seconds: `setup` to compile, `network` in which the network computed, `total`."""

    setup: float = 0.0
    network: float = 0.0
    total: float = 0.0


def batch_size(shape: tuple[int, ...], platform: str) -> int:
    """Returns the number of inputs of `shape` in a batch."""
    fitting = _NUMBERS // math.prod(shape)
    if platform == "cpu":
        return min(max(fitting, 8), 1000)
    return min(max(fitting * _ACCELERATOR_FACTOR, 64), 4000)


def predict(
    records: Iterator[Record],
    wanted: Wanted,
    network: Callable[[np.ndarray], Any],
    platform: str,
    times: Times,
) -> Iterator[tuple[list[Record], np.ndarray]]:
    """Yields batches of records and the network's answers (n, ...), in order.

    Memory does not depend on the number of records: a few batches are under way.

    Args:
      records: records that cannot be read come out with their error, and an answer
        that means nothing.
      wanted: the input that the network takes.
      network: compiled; inputs as they are stored (b, *shape) -> answers (b, ...).
      platform: "cpu", "gpu" or "tpu".
      times: added to while predictions are made.
    """
    head = list(itertools.islice(records, MANY))
    if not head:
        return
    size = batch_size(wanted.shape, platform)
    if len(head) < MANY:
        size = min(size, len(head))
    pictures = sum(record.pixels is None and not record.error for record in head)
    decoders = Decoders(wanted, size, cores(), processes=pictures > MANY // 2)

    def compute(
        decoded: tuple[list[Record], np.ndarray],
    ) -> tuple[list[Record], np.ndarray]:
        found, batch = decoded
        start = time.perf_counter()
        answers = np.asarray(network(batch))
        times.network += time.perf_counter() - start
        return found, answers[: len(found)]

    # A thread of its own, so that its time is the network's and nothing else's.
    device = ThreadPoolExecutor(1, "device")
    with decoders, device:
        start = time.perf_counter()
        np.asarray(network(np.zeros((size, *wanted.shape), wanted.dtype)))
        ready = time.perf_counter()
        times.setup += ready - start
        batches = chunks(itertools.chain(head, records), size)
        decoded = in_order(batches, decoders.submit, decoders.workers + 1)
        try:
            for answer in in_order(
                decoded, lambda batch: device.submit(compute, batch), 2
            ):
                times.total = time.perf_counter() - ready
                yield answer
            times.total = time.perf_counter() - ready
        finally:
            device.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    # macOS has no affinity.
    return len(
        getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    )


def chunks(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    """Yields lists of `size` records, the last one shorter."""
    while chunk := list(itertools.islice(records, size)):
        yield chunk
