"""The account of every leaf of a network that starts from another one."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the network.

    Attributes:
      collection: "params" or "batch_stats".
      path: such as "base/stem/conv/kernel".
      size: how many numbers it has.
      loaded: whether it comes from the file, or is new.
      frozen: whether it stays as it is.
      scale: factor of the learning rate.
    """

    collection: str
    path: str
    size: int
    loaded: bool
    frozen: bool
    scale: float


def draw(leaves: Sequence[Leaf], thaws: bool) -> str:
    """Counts leaves by the part of the network, two layers deep, that they lie in.

    Batch statistics that follow the data count as trained. "rate" is the factor of the
    learning rate, the least and the greatest where they differ, of what ever trains:
    all, if what is frozen `thaws`.
    """
    parts: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        *layers, _ = leaf.path.split("/")
        parts.setdefault("/".join(layers[:2]), []).append(leaf)
    rows = [("leaves of", "loaded", "new", "frozen", "trained", "numbers", "rate")]
    rows += [_row(part, inside, thaws) for part, inside in parts.items()]
    rows.append(_row("total", leaves, thaws))
    lines = aligned(rows, "<>>>>>>")
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _row(part: str, leaves: Sequence[Leaf], thaws: bool) -> tuple[str, ...]:
    loaded = sum(leaf.loaded for leaf in leaves)
    frozen = sum(leaf.frozen for leaf in leaves)
    counts = loaded, len(leaves) - loaded, frozen, len(leaves) - frozen
    numbers = f"{sum(leaf.size for leaf in leaves):,}"
    params = [leaf for leaf in leaves if leaf.collection == "params"]
    rates = sorted({leaf.scale for leaf in params if thaws or not leaf.frozen})
    rate = "-".join(f"{rate:g}" for rate in dict.fromkeys([*rates[:1], *rates[-1:]]))
    return part, *(str(count or "") for count in counts), numbers, rate


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Returns rows of cells as lines; `sides` holds < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
