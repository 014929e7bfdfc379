"""Where the time of a train step goes: convolutions, matrix products, the rest.

usage: python -m benchmarks.kernels [--config=experiments/cifar10_speed.py]
           [--device=gpu] [--steps=25] [--config.KEY=VALUE ...] [--output=FILE.json]

Runs the experiment's compiled step under JAX's profiler and adds up its operations. On
a CPU several run at once, so that their times add up to more than the step's.
"""

import collections
import glob
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from benchmarks import ours
from benchmarks import table as table_lib
from benchmarks.table import Row, Table
from convnet import cli, prepare
from convnet.errors import UsageError

_MOST_SHOWN = 12


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    cli.define_config(values, argv)
    table_lib.define(values, peer_python=False)
    flags.DEFINE_integer(
        "steps", 1, "in one program; on a GPU 25 are usual", 1, flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Measures one step.

    Raises:
      ConvnetError: the experiment cannot be prepared.
    """
    if values.config is None:
        raise UsageError("--config is missing; try experiments/cifar10_speed.py")
    table_lib.start(values)
    it = prepare.prepare(values.config)
    it.state = prepare.initial_state(it)
    batch, data = ours.batch(it, 0, values.steps), it.split("train").data
    program = ours.compile_step(it, batch)

    def run() -> float:
        start = time.perf_counter()
        it.state, metrics = program(it.state, data, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    title = f"a train step of {values.config.model.name}, {values.device}"
    table = Table(values.output, title)
    run()
    seconds = statistics.median(run() for _ in range(values.repeats)) / values.steps
    table.add(Row("step", "ms", 1e3 * seconds))
    table.add(Row("step", "images/s", it.config.data.batch_size / seconds))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        found = list(operations(folder))
    kinds = kinds_of(program.compiled.as_text())
    by_kind: collections.Counter[str] = collections.Counter()
    by_name: collections.Counter[str] = collections.Counter()
    for operation, kernel, microseconds in found:
        kind = kinds.get(operation) or kind_of(f"{operation} {kernel}")
        by_kind[kind] += microseconds
        by_name[kernel if kind == "rest" else operation] += microseconds
    whole = sum(by_kind.values())
    for kind, microseconds in by_kind.most_common():
        table.add(Row(f"share/{kind}", "%", 100 * microseconds / whole))
    for name, microseconds in by_name.most_common(_MOST_SHOWN):
        table.add(Row(f"top/{name[:29]}", "ms", microseconds / 1e3 / values.steps))


def operations(folder: str) -> Iterator[tuple[str, str, float]]:
    """Yields (operation of the program, kernel, microseconds) from a trace."""
    (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
        and event["args"]["name"].startswith("Stream")
    }
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        here = (event.get("pid"), event.get("tid")) in streams or not streams
        if event.get("ph") == "X" and here and (operation or streams):
            yield operation or "", event["name"], event["dur"]


def kinds_of(program: str) -> dict[str, str]:
    """Returns the kind of each call and convolution of a compiled program."""
    pattern = r"%?([\w.\-]+) = [^\n]*? (convolution|dot|custom-call)\(([^\n]*)"
    kinds = {}
    for name, operation, rest in re.findall(pattern, program):
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        kinds[name] = kind_of(f"{operation} {target[1] if target else ''}")
    return kinds


def kind_of(words: str) -> str:
    """Returns "convolutions", "products" or "rest" for names of operations."""
    words = words.lower().replace("convert", "")
    if "conv" in words:
        return "convolutions"
    found = re.search(r"dot|matmul|gemm|cublas", words)
    return "products" if found else "rest"


if __name__ == "__main__":
    cli.run(main, define, __doc__)
