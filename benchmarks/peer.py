"""The other side of a comparison: a program in a Python of its own, kept alive."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from convnet.errors import ConvnetError

PROJECT = Path(__file__).resolve().parent.parent
HOW_TO = (
    "no peer: make an environment for it, with torch's build for your device,\n"
    "  python3.11 -m venv .venv-peer && .venv-peer/bin/pip install torch numpy pillow\n"
    "and pass --peer_python=.venv-peer/bin/python (or set CONVNET_PEER_PYTHON)"
)


def _threads() -> str:
    # As convnet.mesh.start counts them. macOS has no affinity.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return os.environ.get("NPROC") or str(len(allowed))


class PeerError(ConvnetError):
    """The peer could not do what it was asked to; the message says why."""


class Peer:
    """A subprocess that takes commands and answers them, one at a time.

    It waits on a pipe between its turns, so that the cores are ours meanwhile; it has
    as many threads as we have. Use it in a `with` statement.

        with Peer(python, "benchmarks.peers.train_step") as peer:
            seconds = peer("run", mode="train", steps=3)["seconds"]

    Args:
      python: the interpreter.
      module: what it runs, with `protocol.serve`; from the project's root.
      environment: variables set for it, besides ours.
    """

    def __init__(
        self, python: str, module: str, environment: dict[str, str] | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile("w+")
        self._name = f"{python} -m {module}"
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        inherited["OMP_NUM_THREADS"] = _threads()
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=PROJECT,
            env={**inherited, **(environment or {})},
        )

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Has a command done.

        Raises:
          PeerError: it failed there, or the process ended.
        """
        try:
            self._process.stdin.write(json.dumps([command, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the peer ended ({self._name}): {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"the peer failed in {command!r}: {reply['error'][:500]}")
        return reply["answer"]

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # It ended by itself.
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
