"""What `reproducible = True` costs: seconds of a train step, and the memory it takes.

usage: python -m benchmarks.reproducible [--experiments=digits,cifar10_cnn,cifar10]
           [--shards=8] [--output=FILE.json]

Whole steps, augmentation and optimizer included, of experiments as they ship, on random
inputs that lie in memory. The peer is the same step by default (`reproducible =
False`); the two take turns, and medians are reported: 1 / ratio is how many times
longer a reproducible step takes. `temporary` is what the compiled step allocates beyond
its arguments and results.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from benchmarks import ours
from benchmarks import table as table_lib
from benchmarks.table import Row, Table
from convnet import cli, prepare

PEER = "by default"


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values, peer_python=False)
    for name, default, meaning in (
        ("experiments", "digits,cifar10_cnn,cifar10", "names, in experiments/"),
        ("shards", "8", "virtual shards of a batch (mesh.shards)"),
    ):
        flags.DEFINE_string(name, default, meaning, flag_values=values)
    flags.DEFINE_integer(
        "steps", 10, "steps in a round", lower_bound=1, flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Measures one experiment after the other."""
    table_lib.start(values)
    table = Table(values.output, "A reproducible step beside one that is not")
    for name in values.experiments.split(","):
        plain = _Steps(name, 0)
        for shards in map(int, values.shards.split(",")):
            both = _Steps(name, shards), plain
            times: list[list[float]] = [[], []]
            for _ in range(values.repeats):
                for side, seconds in zip(both, times, strict=True):
                    seconds.append(1e3 * side.seconds(values.steps) / values.steps)
            case = f"{name}/shards_{shards}"
            numbers = [statistics.median(seconds) for seconds in times]
            table.add(Row(f"{case}/step", "ms", *numbers, PEER))
            numbers = [side.temporary_bytes / 2**20 for side in both]
            table.add(Row(f"{case}/temporary", "MiB", *numbers, PEER))


class _Steps:
    """The compiled train step of an experiment, and its state."""

    def __init__(self, name: str, shards: int) -> None:
        config = ours.experiment(name)
        config.reproducible = shards > 0
        config.mesh.shards = shards or config.mesh.shards
        config.compilation_cache = "none"
        with ours.random_images(4 * config.data.batch_size, 32) as data:
            if config.data.name != "digits":  # which ship
                config.data.name, config.data.dir = "arrays", data
            self._it = prepare.prepare(config)
            self._it.state = prepare.initial_state(self._it)
            self._split = self._it.split("train")
        self._batches = self._next()
        self._train = ours.compile_step(self._it, next(self._batches))
        about = self._train.compiled.memory_analysis()
        self.temporary_bytes = about.temp_size_in_bytes
        self.seconds(2)

    def _next(self) -> Iterator[Any]:
        order = self._it.train_order
        return self._split.batches(order, 0, 1 << 30)

    def seconds(self, steps: int) -> float:
        """Does so many steps; returns how long they took."""
        it = self._it
        start = time.perf_counter()
        for _ in range(steps):
            it.state, metrics = self._train(
                it.state, self._split.data, next(self._batches)
            )
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main, define, __doc__)
