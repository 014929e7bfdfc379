"""A run of `convnet.main` that stands still between its epochs, for another's turn."""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.peer import PROJECT
from convnet.errors import ConvnetError
from convnet.workdir import Workdir

_TURN = "the next turn, please"


class Run:
    """`python -m convnet.main`, an epoch at a time.

    It waits before its start and after each evaluation, off its own clock of training.
    Use it in a `with` statement: what is not done at its end is killed.

    Args:
      arguments: of `convnet.main`, which evaluate after every epoch.
      environment: variables set for it.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.turns", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )

    def go_on(self) -> bool:
        """Has it go on to its next evaluation; False if it came to its end.

        Raises:
          ConvnetError: it failed.
        """
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # It ended: so does its output.
            pass
        if any(line.strip() == _TURN for line in self._process.stdout):
            return True
        code = self._process.wait()
        if code:
            raise ConvnetError(f"our run ended with {code}: {self._last_words()}")
        return False

    def _last_words(self) -> str:
        """The error, which may have several lines; else the last line."""
        self._log.seek(0)
        printed = "\n" + self._log.read().strip()
        start = printed.rfind("\nerror: ")
        start = printed.rfind("\n") if start < 0 else start
        return printed[start + 1 :] or "no message"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            try:
                pipe.close()
            except BrokenPipeError:
                pass


def main() -> None:
    """Runs `convnet.main` with the arguments of this program, in turns."""
    log = Workdir.log

    def wait(self: Workdir, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        if any(name.startswith("test/") for name in values):
            print(_TURN, flush=True)
            _await_turn()

    Workdir.log = wait
    _await_turn()
    runpy.run_module("convnet.main", run_name="__main__")


def _await_turn() -> None:
    if not sys.stdin.readline():
        raise SystemExit("error: the benchmark has ended")


if __name__ == "__main__":
    main()
