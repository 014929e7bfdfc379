"""What devices send each other in a step, read off its compiled program."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter"),
    *("collective-permute", "all-to-all", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective operation of a step.

    Attributes:
      kind: one of `KINDS`.
      bytes: of what each device reduces, or has gathered, or passes on.
      devices: how many take part in one group.
    """

    kind: str
    bytes: int
    devices: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends, if it goes round a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.devices - 1) / self.devices


def find(text: str, devices: int) -> Iterator[Exchange]:
    """Yields the exchanges of a compiled program.

    Args:
      text: of the optimised HLO.
      devices: that run it.
    """
    kinds = "|".join(KINDS)
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        match = re.match(
            rf"\s*(?:ROOT )?%?\S+ = (\([^=]*?\)|[^\s=(]+) ({kinds})(-start)?\(", line
        )
        if match:
            result, kind, starts = match.groups()
            group = _group(line, devices)
            sizes = [
                _size(*found) for found in re.findall(r"(\w+)\[([\d,]*)\]", result)
            ]
            size = sum(sizes)
            # Those that only begin here name their operands as well.
            if starts and kind == "all-gather":
                size = size * group // (group + 1)
            if starts and kind == "collective-permute":
                size = max(sizes)
            if kind == "reduce-scatter":
                size *= group
            yield Exchange(kind, size, group)


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
    return math.ceil(bits * math.prod(int(n) for n in shape.split(",") if n) / 8)


def _group(line: str, devices: int) -> int:
    """How many devices are in a group, in each of the ways that HLO writes it."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # A part of an axis is written 'name':(before)size.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[name]) for name, part in used)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    return devices
