"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from tqdm import tqdm

from convnet.cli import Interrupted

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar over the steps, or a line every ten seconds where there is no terminal."""

    def __init__(self, start: int, total: int) -> None:
        self._total = total
        self._shown = 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=total, unit="step", smoothing=0.1)

    def advance(self, steps: int) -> None:
        """Counts steps."""
        if self._bar is not None:
            self._bar.update(steps)

    def log(self, step: int, row: dict[str, float], seconds_left: float) -> None:
        """Shows the newest training metrics."""
        text = f"loss {row['train/loss']:.4f}"
        if "train/accuracy" in row:
            text += f"  accuracy {row['train/accuracy']:.1%}"
        text += f"  {row['images_per_second']:,.0f} images/s"
        text += f"  waiting {row['input_wait']:.0%}"
        self.show(step, f"epoch {row['epoch']:.1f}  {text}", seconds_left)

    def show(self, step: int, text: str, seconds_left: float) -> None:
        """Shows where a step stands: beside the bar, or as a line of its own."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            minutes, seconds = divmod(round(seconds_left), 60)
            self.line(
                f"step {step}/{self._total}  {text}  left {minutes}:{seconds:02d}"
            )

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


class Signals:
    """Notes SIGINT and SIGTERM instead of dying, so that a run can save first.

    A second signal ends at once. As a context manager it puts the old handlers back.

    Args:
      several: whether this is one process of several: then JAX takes SIGTERM, tells
        the others, and takes SIGINT as one.
    """

    def __init__(self, several: bool = False) -> None:
        self.received: int | None = None
        self._several = several
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        handled = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        for signum in handled:
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Interrupted(signum, "interrupted twice: stopped without saving")
        self.received = signum
        # Not print: a handler may interrupt the bar in the middle of its own writing.
        os.write(2, b"\nstopping after this step; once more stops at once\n")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
