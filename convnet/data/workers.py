"""What reads while the devices compute: threads, or processes and their signals."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Generator
from typing import Any

# Each holds a batch; what they do outside decoders, one at a time, limits them sooner.
_MAX_THREADS = 16
_SECONDS_AFTER_SIGTERM = 30
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def threads() -> int:
    """As many as this process may use cores."""
    # macOS has no affinity.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return min(len(allowed), _MAX_THREADS)


def started(dataset: Any) -> Generator[Any, None, None]:
    """Iterates over a dataset whose processes are born deaf to signals."""
    # It is started with the first process, and would leave the signals unblocked.
    multiprocessing.resource_tracker.ensure_running()
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        contextlib.closing(iter(dataset)) as batches,
    ):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            # This thread and what it starts are deaf; the main thread, which waits for
            # it, is not.
            first = pool.submit(lambda: list(itertools.islice(batches, 1)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from first.result()
        yield from batches


def start(worker: int, workers: int) -> None:
    """Leaves signals, which may reach every process, to the main one, and ends with it.

    Workers that a killed main process leaves behind would wait for it for ever, and
    what they share with it would stay in memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The main process may still want a batch before it saves.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
