"""Ctrl-C while the modules of a program load, which takes a second or more."""

import os
import sys
from types import TracebackType


def quietly() -> None:
    """Makes Ctrl-C print one line and exit with 130, before `cli.run` sees to it."""
    sys.excepthook = _print


def _print(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted by SIGINT", file=sys.stderr, flush=True)
    # By itself Python would end as if the signal had killed it.
    os._exit(130)
