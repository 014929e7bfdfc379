"""How a train step's cost per image grows, and the memory that a step takes.

usage: python -m benchmarks.scaling [--network=resnet18] [--batch=64] [--width=16]
           [--dtype=float32] [--peer_python=PATH] [--output=FILE.json]

On two cores it takes about five minutes with the peer, most of them for compiling.

Cost per image with the number of images in memory (`images/N`), their side (`size/N`)
and the depth (`depth/NAME`); and, by the images in a step, the memory that it takes
while it runs, beyond weights, optimizer and data (`memory/batch_N`: what XLA plans, and
by how much the peer's process grows; on a CPU under Linux only). The network is
--network, as wide as --width says, the peer PyTorch in eager mode.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from benchmarks import table as table_lib
from benchmarks.ours import Side
from benchmarks.peer import Peer
from benchmarks.table import Row, Table
from benchmarks.train_step import DTYPES, NETWORKS, check
from convnet import cli
from convnet.errors import UsageError

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101")
_MEASURED = DEPTHS[:3]
PEER = "PyTorch eager"
# glibc gives back at once what is freed, so that all that a step takes is seen.
_HONEST_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values)
    for name, default, meaning in (
        ("counts", "1024,16384", "images in memory"),
        ("sizes", "16,32,64", "sides of the images, in pixels"),
        ("depths", ",".join(_MEASURED), f"networks, of {','.join(DEPTHS)}"),
        ("batches", "16,64,256", "images in a step, for its memory"),
    ):
        flags.DEFINE_string(name, default, f"{meaning}; none: ''", flag_values=values)
    for name, default, meaning in (
        ("batch", 64, "images in a step, for its cost"),
        ("width", 16, "features of the first stage"),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "network",
        "resnet18",
        NETWORKS,
        "network, where the depth is not what grows",
        flag_values=values,
    )
    flags.DEFINE_enum("dtype", "float32", DTYPES, "precision", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures one sequence after the other.

    Raises:
      UsageError: a value of a flag is no list of numbers, or names no network.
    """
    counts, sizes, batches = (
        _numbers(getattr(values, name), name) for name in ("counts", "sizes", "batches")
    )
    depths = table_lib.choose(values.depths, DEPTHS, "depths")
    python = table_lib.start(values)
    table = Table(values.output, f"scaling, {values.dtype}, {values.device}")
    usual = {
        "network": values.network,
        "dtype": values.dtype,
        "batch": values.batch,
        "width": values.width,
        "size": 32,
        "images": 4 * values.batch,
    }
    costs = {f"images/{n}": {"images": n} for n in counts}
    costs |= {f"size/{n}": {"size": n} for n in sizes}
    costs |= {f"depth/{name}": {"network": name} for name in depths}
    # What is `usual` is measured once.
    found: dict[tuple, list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        peer = None
        if python is not None:
            peer = stack.enter_context(Peer(python, "benchmarks.peers.train_step"))
        for case, grown in costs.items():
            arguments = {**usual, **grown}
            key = tuple(arguments.values())
            if key not in found:
                found[key] = cost(arguments, peer, values)
            table.add(_row(case, "ms/image", found[key]))
    for n in batches:
        arguments = {**usual, "batch": n, "images": 4 * n}
        memory(table, f"memory/batch_{n}", arguments, python, values.device)


def cost(
    arguments: dict[str, Any], peer: Peer | None, values: flags.FlagValues
) -> list[list[float]]:
    """Returns, for each side, milliseconds of a train step for each image in it."""
    batch, ours = arguments["batch"], Side(**arguments)
    sides = [_milliseconds(table_lib.per_second(batch, ours.train))]
    if peer is not None:
        built = peer("build", device=values.device, **arguments)
        check(arguments["network"], ours.parameters, built["parameters"])
        way = peer("prepare", mode="train", compiled=False)["way"]

        def run(steps: int) -> float:
            return peer("run", way=way, steps=steps)

        sides.append(_milliseconds(table_lib.per_second(batch, run)))
    return table_lib.interleave(sides, values.repeats)


def memory(
    table: Table, case: str, arguments: dict[str, Any], python: str | None, device: str
) -> None:
    """Adds a row: MiB of a train step, each side in a new process."""
    platform = {"JAX_PLATFORMS": table_lib.PLATFORM[device]}
    with Peer(sys.executable, "benchmarks.ours", _HONEST_HEAP | platform) as ours:
        found = [[ours("memory", **arguments) / 2**20]]
    if python is not None:
        with Peer(python, "benchmarks.peers.train_step", _HONEST_HEAP) as peer:
            taken = peer("memory", device=device, **arguments)
            found.append([taken / 2**20])
    table.add(_row(case, "MiB", found))


def _milliseconds(rate: Callable[[], float]) -> Callable[[], float]:
    return lambda: 1000 / rate()


def _row(case: str, unit: str, found: list[list[float]]) -> Row:
    medians = [table_lib.median(values) for values in found]
    return Row(case, unit, *medians, *([PEER] if len(found) > 1 else []))


def _numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise UsageError(f"--{flag}={text}: want whole numbers above 0, with commas")
    return found


if __name__ == "__main__":
    cli.run(main, define, __doc__)
