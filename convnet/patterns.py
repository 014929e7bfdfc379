"""Patterns that name parts of a network: paths with `*` for anything.

"base" is all of the base, "base/group3" a layer of it, "base/*/norm*" every norm.
"""

import fnmatch
import math
from collections.abc import Collection

from convnet import resolve
from convnet.errors import UsageError
from convnet.freezing import above


def parse(text: str) -> list[str]:
    """Splits "base/stem, base/*/norm*"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a leaf, or a layer that it lies in."""
    return any(fnmatch.fnmatchcase(name, pattern.rstrip("/")) for name in _names(path))


def select(key: str, patterns: list[str], paths: Collection[str]) -> set[str]:
    """Returns the leaves that patterns name.

    Args:
      key: of the config, for the error.
      patterns: any number.
      paths: of all leaves.

    Raises:
      UsageError: a pattern names nothing; says what is near.
    """
    found = set()
    for pattern in patterns:
        named = {path for path in paths if matches(pattern, path)}
        if not named:
            names = {name for path in paths for name in _names(path)}
            parts = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise UsageError(
                f"{key} names {pattern!r}, and nothing in the network is called that"
                f"{resolve.nearest(pattern, sorted(names))}"
                f" (its parts are {', '.join(parts)})"
            )
        found |= named
    return found


def factors(key: str, text: str, paths: Collection[str]) -> dict[str, float]:
    """Reads "base=0.1,base/group3=0.5": a factor for each leaf, from the last entry.

    Raises:
      UsageError: an entry is not of this form, or names nothing.
    """
    found: dict[str, float] = {}
    for entry in parse(text):
        pattern, _, number = entry.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not pattern or not 0 < factor < math.inf:
            raise UsageError(
                f"{key} holds {entry!r}: want PATH=FACTOR with a factor above 0, such"
                " as base=0.1"
            )
        found |= dict.fromkeys(select(key, [pattern], paths), factor)
    return found


def _names(path: str) -> list[str]:
    return [*above(path)[1:], path]
