"""What the benchmarks share: flags, rows, the printed table, and the JSON file.

The file is a list of {"case", "unit", "ours", "peer", "peer_name", "ratio"}; `ratio` is
above 1 where we are better. It is written again after every row, so that a run that is
stopped leaves what it had measured.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks.peer import HOW_TO
from convnet import files, mesh
from convnet.errors import UsageError

PLATFORM = {"cpu": "cpu", "gpu": "cuda"}  # JAX's names of --device


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; None where there is none.

    In units that end in "/s" or "%" more is better, in all others (s, ms/image, MiB)
    less.
    """

    case: str
    unit: str
    ours: float | None
    peer: float | None = None
    peer_name: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better we are than the peer."""
        if not self.ours or not self.peer:
            return None
        more = self.unit.endswith(("/s", "%"))
        return self.ours / self.peer if more else self.peer / self.ours


class Table:
    """Prints rows as they come, and keeps them in a JSON file.

    Args:
      output: the file, None for none.
      title: printed above the table.
    """

    def __init__(self, output: str | None, title: str) -> None:
        self._path = Path(output).expanduser() if output else None
        if self._path and not self._path.parent.is_dir():
            raise UsageError(f"--output={output}: no folder {self._path.parent}")
        self.rows: list[Row] = []
        columns = ("case", "unit", "ours", "peer", "ratio", "peer's name")
        print(f"{title}\n\n{_line(*columns)}\n{'-' * 88}", flush=True)
        self._write()

    def add(self, row: Row) -> None:
        """Prints a row and writes the file."""
        self.rows.append(row)
        numbers = (_short(row.ours), _short(row.peer), _short(row.ratio))
        print(_line(row.case, row.unit, *numbers, row.peer_name or ""), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Prints a line between the rows."""
        print(f"  {text}", flush=True)

    def _write(self) -> None:
        if self._path:
            rows = [{**dataclasses.asdict(r), "ratio": r.ratio} for r in self.rows]
            files.write(self._path, json.dumps(rows, indent=2) + "\n")


def _line(*columns: str) -> str:
    case, unit, ours, peer, ratio, name = columns
    return f"{case:<34} {unit:<9}{ours:>9}{peer:>9}{ratio:>9}  {name}".rstrip()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def define(
    values: flags.FlagValues, repeats: int | None = 5, peer_python: bool = True
) -> None:
    """Defines the common flags.

    `repeats` None leaves --repeats out, `peer_python` False --peer_python: some peers
    need no Python of their own.
    """
    flags.DEFINE_string("output", None, "JSON file of the rows", flag_values=values)
    flags.DEFINE_enum(
        "device", "cpu", ["cpu", "gpu"], "what both sides run on", flag_values=values
    )
    if peer_python:
        flags.DEFINE_string(
            "peer_python",
            os.environ.get("CONVNET_PEER_PYTHON") or None,
            "the peer's Python interpreter; CONVNET_PEER_PYTHON if not given",
            flag_values=values,
        )
    if repeats is not None:
        flags.DEFINE_integer(
            "repeats",
            repeats,
            "rounds in which the sides take turns; medians are reported",
            lower_bound=1,
            flag_values=values,
        )


def start(values: flags.FlagValues) -> str | None:
    """Brings JAX up on the device; returns the peer's interpreter, None without one.

    Raises:
      UsageError: there is no such device, or no such interpreter.
    """
    python = peer_python(values) if "peer_python" in values else None
    # Two programs share the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", PLATFORM[values.device])
    try:
        mesh.start("none")
    except RuntimeError as error:
        raise UsageError(
            f"--device={values.device}: JAX finds none ({str(error).splitlines()[0]})"
        ) from error
    return python


def peer_python(values: flags.FlagValues) -> str | None:
    """Returns the peer's interpreter; without one, prints how to make it.

    Raises:
      UsageError: there is no such interpreter.
    """
    if not values.peer_python:
        print(HOW_TO)
        return None
    # Not resolved: a link in a virtual environment is what makes it that environment.
    found = shutil.which(os.path.expanduser(values.peer_python))
    if found is None:
        raise UsageError(f"--peer_python={values.peer_python}: no such program")
    return os.path.abspath(found)


def interleave(sides: Sequence[Callable[[], Any]], repeats: int) -> list[list[Any]]:
    """Measures the sides in turns, so that what disturbs the machine hits them alike.

    Args:
      sides: each measures once and returns what it found.
      repeats: rounds; every other one goes backwards.

    Returns:
      The `repeats` findings of each side.
    """
    found: list[list[Any]] = [[] for _ in sides]
    places = list(range(len(sides)))
    for _ in range(repeats):
        for place in places:
            found[place].append(sides[place]())
        places.reverse()
    return found


def median(values: Sequence[float | None]) -> float | None:
    """Returns the median, None where there are no values or one of them is None."""
    if not values or None in values:
        return None
    return statistics.median(values)


def per_second(images: int, measure: Callable[[int], float]) -> Callable[[], float]:
    """Returns a side for `interleave`, in images/s.

    Args:
      images: in a step.
      measure: does so many steps and returns the seconds that they took.

    The first two calls warm up; a repetition then has enough steps for half a second.
    """
    measure(1)
    steps = max(1, math.ceil(0.5 / max(measure(1), 1e-4)))
    return lambda: images * steps / measure(steps)


def choose(text: str, known: Sequence[str], flag: str) -> list[str]:
    """Splits the value of a flag such as --dtypes=float32,bfloat16.

    Raises:
      UsageError: one is not known.
    """
    wanted: list[Any] = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UsageError(f"--{flag}: no {name!r}; known are {', '.join(known)}")
    return wanted
