"""Several processes of one run: how they talk. (How they meet and end: `together`.)

Each runs the same program (JAX's multi-controller model). JAX's runtime, whose service
lives in process 0, keeps a small store of keys and values, by which they tell each
other what is no array. All must call `tell`, `gather` and `wait` in the same order.
Process 0 prints, logs and writes; a run of one process is its own process 0, talks to
nobody, and pays nothing.
"""

import itertools
import json
import signal
import socket
from typing import Any, TypeVar

import jax

# JAX shows its client by no public name.
from jax._src import distributed
from jax.experimental import multihost_utils

from convnet.errors import UsageError

T = TypeVar("T")

_DAY = 24 * 3600 * 1000  # milliseconds
# JAX's runtime is one for a process, and so is the number of the next call.
_calls = itertools.count()


def several() -> bool:
    """Whether this is one process of several."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process prints, logs and writes: process 0."""
    return jax.process_index() == 0


def tell(value: T) -> T:
    """Returns the value (of JSON) of process 0, in all."""
    if not several():
        return value
    key = f"convnet/{next(_calls)}"
    if leads():
        client().key_value_set(key, json.dumps(value))
    return json.loads(client().blocking_key_value_get(key, _DAY))


def gather(value: T) -> list[T]:
    """Returns the values (of JSON) of all processes, in their order, in all."""
    if not several():
        return [value]
    key = f"convnet/{next(_calls)}"
    client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(client().blocking_key_value_get(f"{key}/{index}", _DAY))
        for index in range(jax.process_count())
    ]


def wait() -> None:
    """Waits until all processes are here."""
    if several():
        client().wait_at_barrier(f"convnet/{next(_calls)}", _DAY)


def check_same(about: dict[str, str]) -> None:
    """Makes sure that the processes do the same.

    Raises:
      UsageError: a value differs; names it.
    """
    first, *others = gather(about)
    for index, other in enumerate(others, 1):
        differ = [name for name in first if other[name] != first[name]]
        if differ:
            raise UsageError(
                f"process {index} has another {' and '.join(differ)} than process 0:"
                " all must run the same command, on the same files"
            )


def stop_signal(received: int | None, count: int) -> int | None:
    """Returns the signal after which all processes stop here, None to go on.

    JAX notes a SIGTERM to any process, and lets all stop at the same place.

    Args:
      received: by this process.
      count: of calls so far; all processes call in step.
    """
    if not several():
        return received
    if not multihost_utils.reached_preemption_sync_point(count):
        return None
    return received or signal.SIGTERM


def client() -> Any:
    """Returns JAX's client of the store, None where there is one process."""
    return distributed.global_state.client


def name(index: int | None = None) -> str:
    """Returns for example "process 1 of 4 on HOST"; the host of this one alone."""
    index = jax.process_index() if index is None else index
    host = f" on {socket.gethostname()}" if index == jax.process_index() else ""
    return f"process {index} of {jax.process_count()}{host}"
