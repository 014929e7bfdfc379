"""Rows of predictions -> lines for people, JSON lines, or CSV.

A row is a dict: {"path", "label", "probability", "top": [[label, p], ...]}, in a search
without "top"; {"path", "prediction"} of a regression; {"path", "error"}.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from convnet.errors import UsageError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".csv")


def kind_of(path: str) -> str:
    """Returns the suffix that says how a file of rows is written.

    Raises:
      UsageError: it says nothing, or there is no such folder.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in SUFFIXES:
        raise UsageError(f"--output={path}: want a name in {' or '.join(SUFFIXES)}")
    check_folder("output", path)
    return kind


def check_folder(flag: str, path: str) -> None:
    """Raises UsageError if a file cannot lie at `path`."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"--{flag}={path}: no folder {folder}")
    if os.path.isdir(path):
        raise UsageError(f"--{flag}={path}: a folder; want a file")


def shown(text: str, to_terminal: bool = True) -> str:
    """Returns a path or label as one piece of a line, with control characters escaped.

    A name that is not UTF-8 keeps its bytes, except on a terminal.
    """
    if text.isprintable():
        return text

    def escaped(sign: str) -> str:
        if sign.isprintable() or ("\udc80" <= sign <= "\udcff" and not to_terminal):
            return sign
        return sign.encode("unicode_escape").decode()

    return "".join(map(escaped, text))


class Writer:
    """Writes rows as they come; a context manager that owns the file.

    Args:
      path: the file; None for lines on standard output.
      kind: as `kind_of` returns it, None for lines.
      places: how many classes a row names at most; 0 for a regression.
    """

    def __init__(self, path: str | None, kind: str | None, places: int) -> None:
        self._file: TextIO = sys.stdout
        self._owned = path is not None
        terminal = path is None and sys.stdout.isatty()
        if path is not None:
            # Names that are not UTF-8 keep their bytes.
            self._file = open(path, "w", encoding="utf-8", errors="surrogateescape")
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="backslashreplace" if terminal else "surrogateescape"
            )
        formats: dict[str | None, Callable[[Row], str]] = {
            ".jsonl": _json,
            ".csv": lambda row: _csv(row, places),
            None: lambda row: _line(row, terminal),
        }
        self._format = formats[kind]
        if kind == ".csv":
            self._file.write(_cells(_csv_header(places)))

    def write(self, rows: list[Row]) -> None:
        """Writes rows, and sees to it that they are there for whoever reads."""
        self._file.write("".join(map(self._format, rows)))
        self._file.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._owned:
            self._file.close()


class Found:
    """Keeps what a search finds, and writes it, the most probable first, at the end.

    Args:
      writer: what is written to, in `finish`; inputs that cannot be read come last.
      threshold: the least probability.
    """

    def __init__(self, writer: Writer, threshold: float) -> None:
        self._writer = writer
        self._threshold = threshold
        self._kept: list[tuple[float, int, Row]] = []
        self._failed: list[Row] = []

    def write(self, rows: list[Row]) -> None:
        """Keeps those of the rows that are wanted."""
        for row in rows:
            if "error" in row:
                self._failed.append(row)
            elif row["probability"] >= self._threshold:
                self._kept.append((-row["probability"], len(self._kept), row))

    def finish(self) -> int:
        """Writes the rows; returns how many were found."""
        self._writer.write([row for *_, row in sorted(self._kept)] + self._failed)
        return len(self._kept)


def _json(row: Row) -> str:
    # ASCII: a name that is not UTF-8 comes back from its escapes (PEP 383).
    return json.dumps(row) + "\n"


def _line(row: Row, terminal: bool) -> str:
    """PATH, a tab, "cat 0.97", a tab, "dog 0.02": nothing for what cannot be read."""
    if "error" in row:
        return ""
    if "prediction" in row:
        answers = [json.dumps(row["prediction"])]
    else:
        top = row.get("top") or [[row["label"], row["probability"]]]
        answers = [f"{shown(label, terminal)} {p:.2f}" for label, p in top]
    return "\t".join([shown(row["path"], terminal), *answers]) + "\n"


def _csv_header(places: int) -> list[str]:
    if not places:
        return ["path", "prediction", "error"]
    more = [f"{name}{n}" for n in range(2, places + 1) for name in _NAMES]
    return ["path", *_NAMES, *more, "error"]


_NAMES = ("label", "probability")


def _csv(row: Row, places: int) -> str:
    path = row["path"]
    if path.startswith(_FORMULA):
        path = os.path.join(os.curdir, path)  # the same file
    if "prediction" in row:
        answers: list[Any] = [json.dumps(row["prediction"])]
    elif "error" in row:
        answers = []
    else:
        top = row.get("top") or [[row["label"], row["probability"]]]
        answers = [cell for label, p in top for cell in (_text(label), p)]
    answers += [""] * (max(2 * places, 1) - len(answers))
    return _cells([path, *answers, _text(row.get("error", ""))])


# What a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _text(text: str) -> str:
    return "'" + text if text.startswith(_FORMULA) else text


def _cells(cells: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
