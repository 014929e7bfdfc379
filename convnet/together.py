"""Several processes of one run: how they meet, and how they end together.

None can go on without the others, which would wait in a collective for ever. So each
has a thread that says "alive", and ends the process when another has failed or died.
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

# JAX shows what it detects by no public name.
from jax._src import clusters

from convnet import cli, processes
from convnet.errors import ConvnetError, UsageError

# Seconds. A process counts as lost when it was silent for so long. JAX would end this
# one too, with a stack trace, and some time between half of its limit and the whole.
_EVERY, _SILENT, _JAX_SILENT = 2.0, 30.0, 120
_TO_MEET = 300
# A training loop hangs when nothing has happened for so long, or for ten times as long
# as ever before. Who waits for others gives the others time to say so first.
_STILL, _WAITS_LONGER = 60.0, 10.0
# What a loop is doing (`watched`).
ANYTHING, STARTING, WAITING = "", "waiting for its first step", "waiting for the others"
_FAILED, _ALIVE = "convnet/failed", "convnet/alive"
# What JAX raises where another process has gone away.
_LOST = re.compile(
    r"gloo|nccl|socket|connection|unavailable|heartbeat|coordination|preempted", re.I
)
_AGAIN = "the same command goes on from the last checkpoint"
# Of the thread that ends the process.
_ending = threading.Lock()


@contextlib.contextmanager
def joined(wanted: bool | None) -> Iterator[None]:
    """Joins the processes of the run, and leaves them when the block ends.

    An error in the block ends the process, with the status that it earned, and the
    others with its reason: they may be waiting where they can raise nothing.

    Args:
      wanted: whether there are others; None: if a launcher or the cluster says so.

    Raises:
      UsageError: they are wanted and nothing says where they are.
      ConvnetError: they cannot be reached.
    """
    given = _found(wanted)
    if given is None:
        yield
        return
    _initialize(given)
    if not processes.several():
        yield
        jax.distributed.shutdown()
        return
    watch = _Watch()
    if not processes.leads():
        print(
            f"{processes.name()}: process 0 prints and writes",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, cli.Interrupted) and error.agreed):
            _ending.acquire()
            status, reason = _explained(error)
            _fail(reason)
            _leave(status)
        watch.stop()
        jax.distributed.shutdown()
        raise
    watch.stop()
    jax.distributed.shutdown()


@contextlib.contextmanager
def watched(doing: Callable[[], tuple[Any, str]]) -> Iterator[None]:
    """Ends all processes if the block, a loop, hangs.

    Args:
      doing: returns a value that changes with each round, and what the loop is doing:
        ANYTHING, which may take any time, STARTING, which shows how long a step takes,
        WAITING, or something else.
    """
    if not processes.several():
        yield
        return
    over = threading.Event()

    def run() -> None:
        last, since, longest = doing(), time.monotonic(), 0.0
        while not over.wait(1.0):
            now, age = doing(), time.monotonic() - since
            if now != last:
                longest = longest if last[1] == ANYTHING else max(longest, age)
                last, since = now, time.monotonic()
                continue
            limit = max(_STILL, 10 * longest)
            if now[1] == WAITING:
                limit += _WAITS_LONGER
            if now[1] not in (ANYTHING, STARTING) and age > limit:
                _end(f"{processes.name()} hangs: for {age:.0f} s it has been {now[1]}")

    thread = threading.Thread(target=run, daemon=True, name="convnet hangs")
    thread.start()
    try:
        yield
    finally:
        over.set()


def _found(wanted: bool | None) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, None for a process of its own.

    JAX finds its way under Slurm, Open MPI, Cloud TPU and Kubernetes.
    """
    if wanted is False:
        return None
    given = {}
    # JAX itself reads the first of these alone.
    for name, argument, kind in (
        ("JAX_COORDINATOR_ADDRESS", "coordinator_address", str),
        ("JAX_NUM_PROCESSES", "num_processes", int),
        ("JAX_PROCESS_ID", "process_id", int),
    ):
        if value := os.environ.get(name):
            try:
                given[argument] = kind(value)
            except ValueError as error:
                raise UsageError(f"{name}={value}: want a number") from error
    cluster = _cluster()
    if not (wanted or "coordinator_address" in given or cluster is not None):
        return None
    if cluster is None and len(given) < 3:
        raise UsageError(
            "several processes need JAX_COORDINATOR_ADDRESS (host:port of process 0),"
            " JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment, or a launcher"
            " that JAX knows (Slurm, Open MPI, Cloud TPU, Kubernetes), and there is"
            f" {', '.join(given) or 'nothing of it'}; --nodistributed runs one process"
        )
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if re.fullmatch(r"1(\(x\d+\))?", tasks):
        # JAX takes one device for each task; the only one of a node has them all.
        given["local_device_ids"] = []
    return given


def _cluster() -> Any:
    """The cluster that JAX detects, None where it has one process or there is none."""
    try:
        for cluster in clusters.ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster if cluster.get_process_count() > 1 else None
    except Exception:  # A pod that belongs to no job, metadata that cannot be had.
        pass
    return None


def _initialize(given: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=_TO_MEET,
            heartbeat_timeout_seconds=_JAX_SILENT,
            shutdown_timeout_seconds=60,
        )
        jax.devices()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConvnetError(
            f"the processes of this run did not meet within {_TO_MEET} s: {reason}"
        ) from error


class _Watch:
    """Says "alive", and ends the process when another has failed or is silent."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        # Of process 0 a call hangs, when it is stopped: another thread has to notice.
        for task in (self._talk, self._listen):
            threading.Thread(target=task, daemon=True, name="convnet watch").start()

    def stop(self) -> None:
        """The processes part in peace."""
        self._over.set()

    def _talk(self) -> None:
        client, index = processes.client(), jax.process_index()
        for beat in itertools.count():
            try:
                key = f"{_ALIVE}/{index}"
                client.key_value_set(key, str(beat), allow_overwrite=True)
                reason = _failure()
                alive = client.key_value_dir_get(_ALIVE) if index == 0 else []
            except Exception as error:
                reason = f"process 0 is gone ({_first_line(error)})"
            if self._over.is_set():
                return
            if reason:
                _end(reason)
            self._hear(0, str(beat))
            for key, value in alive:
                self._hear(int(key.rsplit("/", 1)[1]), value)
            if self._over.wait(_EVERY):
                return

    def _hear(self, index: int, beat: str) -> None:
        if self._heard.get(index, ("", 0))[0] != beat:
            self._heard[index] = beat, time.monotonic()

    def _listen(self) -> None:
        while not self._over.wait(_EVERY):
            for index, (_, when) in list(self._heard.items()):
                if time.monotonic() - when > _SILENT:
                    _end(
                        f"{processes.name(index)} has not answered for {_SILENT:.0f} s:"
                        " it was killed or stopped, or its machine is lost"
                    )


def _failure() -> str:
    """What the first process to fail has said, "" if none has."""
    try:
        return processes.client().key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise


def _fail(reason: str) -> None:
    """Tells the others, unless one has failed before."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        processes.client().key_value_set(_FAILED, reason)


def _explained(error: BaseException) -> tuple[int, str]:
    """Prints the error; returns the exit status, and what the others shall print."""
    text = str(error)
    if isinstance(error, (RuntimeError, ValueError)) and _LOST.search(text):
        try:
            reason = _failure()
        except Exception:
            reason = "process 0 is gone"
        reason = reason or f"another process is gone ({_first_line(error)})"
        print(f"error: {reason}; {_AGAIN}", file=sys.stderr)
        return 1, reason
    status = cli.explain(error)
    if status is None:
        traceback.print_exception(error)
    return status or 1, f"{processes.name()} failed: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _end(reason: str) -> None:
    """Ends this process, and by its word the others."""
    _ending.acquire()
    print(f"error: {reason}; {_AGAIN}", file=sys.stderr)
    # It would wait for a process 0 that is stopped.
    teller = threading.Thread(target=_fail, args=(reason,), daemon=True)
    teller.start()
    teller.join(_EVERY)
    _leave(1)


def _leave(status: int) -> None:
    """Ends the process from any thread, without waiting for anybody."""
    if processes.leads():
        time.sleep(2 * _EVERY)  # With it goes the service, by which others hear why.
    for child in multiprocessing.active_children():
        child.terminate()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
