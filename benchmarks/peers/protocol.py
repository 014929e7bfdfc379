"""The peer's end of `benchmarks.peer.Peer`: commands in, answers out, a line each."""

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(commands: dict[str, Callable[..., Any]]) -> None:
    """Answers `[name, arguments]` with `{"answer": ...}` or `{"error": ...}`.

    Returns when the other side closes the pipe. Whatever else writes to standard output
    goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            reply = {"answer": commands[name](**arguments)}
        except Exception as error:  # Reported there, whatever it is.
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def keep_heap() -> None:
    """Tells glibc to keep freed memory, as `convnet.mesh.start` does for ours.

    PyTorch gains from it too: on two cores, 275 -> 317 images/s in a train step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # Other C libraries have none.
        for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):
            mallopt(parameter, value)
