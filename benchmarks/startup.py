"""Seconds from the start of the program to the end of its first train step.

usage: python -m benchmarks.startup [--network=speednet] [--dtype=float32]
           [--peer_python=PATH] [--output=FILE.json]

Every repetition starts two programs on a side: the first with an empty cache of
compiled programs (`cold`), the second with what the first left there (`warm`). Phases:
import (the interpreter, the packages, the device), data, state (the initial weights),
trace, compile (or read from the cache, which on a CPU cannot hold programs that call
oneDNN), first_step. PyTorch's are fewer: its images and weights are both `state`, and
in eager mode, the default, nothing is compiled: one program is both cold and warm.

On two cores it takes about two minutes. `--peers=eager,compiled` compares with
`torch.compile` as well, whose tracing is part of `compile`: a minute more, or several,
for each repetition.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from absl import flags

from benchmarks import ours
from benchmarks import table as table_lib
from benchmarks.peer import PROJECT
from benchmarks.table import Row, Table
from benchmarks.train_step import DTYPES, NETWORKS, PEERS
from convnet import cli
from convnet.errors import ConvnetError

PHASES = ("import", "data", "state", "trace", "compile", "first_step", "total")
CACHES = ("cold", "warm")

Phases = dict[str, float | None]


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values)
    flags.DEFINE_enum("network", "speednet", NETWORKS, "network", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "precision", flag_values=values)
    shown = ",".join(PEERS)
    flags.DEFINE_string("peers", "eager", f"of {shown}", flag_values=values)
    for name, default, meaning in (
        ("batch", 128, "images in a step"),
        ("width", 64, "features of the first stage of ResNet and VGG"),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Starts ours and the peer's programs in turns.

    Raises:
      ConvnetError: one of ours failed.
    """
    peers = table_lib.choose(values.peers, PEERS, "peers")
    python = table_lib.peer_python(values)
    title = f"start, {values.network}, {values.dtype}, {values.device}"
    table = Table(values.output, title)
    arguments = {
        "network": values.network,
        "dtype": values.dtype,
        "batch": values.batch,
        "width": values.width,
    }
    platform = {"JAX_PLATFORMS": table_lib.PLATFORM[values.device]}
    with ours.random_images(4 * values.batch, 32) as path:
        mine = {**arguments, "path": path}
        sides = [_side(sys.executable, "benchmarks.startup_ours", mine, platform)]
        names = ["ours", *(peers if python else [])]
        for way in names[1:]:
            more = {"device": values.device, "compiled": way == "compiled"}
            caches = CACHES if way == "compiled" else CACHES[:1]
            module, its = "benchmarks.peers.startup", arguments | more
            side = _side(python, module, its, {}, caches)
            sides.append(_tolerant(side, f"PyTorch {way}", table))
        found = table_lib.interleave(sides, values.repeats)
    report(table, dict(zip(names, found, strict=True)))


def report(table: Table, found: dict[str, list[dict[str, Phases]]]) -> None:
    """Adds the medians, phase by phase, for each of the peer's ways."""
    for cache in CACHES:
        for way in [name for name in found if name != "ours"] or [None]:
            for phase in PHASES:
                medians = [
                    table_lib.median([one[cache][phase] for one in found.get(side, [])])
                    for side in ("ours", way)
                ]
                name = f"PyTorch {way}" if way else None
                table.add(Row(f"{cache}/{phase}", "s", *medians, name))


def _side(
    python: str,
    module: str,
    arguments: dict,
    environment: dict[str, str],
    caches: Sequence[str] = CACHES,
) -> Callable[[], dict[str, Phases]]:
    """Returns a side that starts a program for each of `caches`.

    What it finds for the last one holds for the others, too.
    """

    def cold_then_warm() -> dict[str, Phases]:
        with tempfile.TemporaryDirectory() as cache:
            found = [
                _start(python, module, {**arguments, "cache": cache}, environment)
                for _ in caches
            ]
        return {name: found[min(i, len(found) - 1)] for i, name in enumerate(CACHES)}

    return cold_then_warm


def _tolerant(
    side: Callable[[], dict[str, Phases]], name: str, table: Table
) -> Callable[[], dict[str, Phases]]:
    """Returns a side that, once it failed, says why and is not tried again."""
    nothing = {cache: dict.fromkeys(PHASES) for cache in CACHES}
    failed: list[ConvnetError] = []

    def once() -> dict[str, Phases]:
        if failed:
            return nothing
        try:
            return side()
        except ConvnetError as error:
            failed.append(error)
            table.note(f"{name}: {error}")
            return nothing

    return once


def _start(
    python: str, module: str, arguments: dict, environment: dict[str, str]
) -> Phases:
    """Runs a program that prints when each of its phases ended; returns durations.

    Raises:
      ConvnetError: it failed; with its last line.
    """
    begun = time.time()
    done = subprocess.run(
        [python, "-m", module, json.dumps(arguments)],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConvnetError(f"{python} -m {module} failed: {words[0]}")
    phases, last = dict.fromkeys(PHASES), begun
    for phase, ended in json.loads(done.stdout.splitlines()[-1]):
        phases[phase] = ended - last
        last = ended
    return {**phases, "total": last - begun}


if __name__ == "__main__":
    cli.run(main, define, __doc__)
