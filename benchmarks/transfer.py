"""Images per second of transfer: frozen base and cached features against full training.

usage: python -m benchmarks.transfer [--models=cifar10] [--dtypes=float32]
           [--output=FILE.json]

Each model of `--models` (a model file, a workdir, a name) gets a new head on random
images of its own size, with SGD. "forward" is the base's forward pass alone: no step
that computes features can be faster. Steps on cached features are limited by what
surrounds them; the features themselves are computed once, at the speed of "forward".
"""

import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import table as table_lib
from benchmarks.ours import STEPS_TOGETHER, batch, compile_step, random_images
from benchmarks.table import Row, Table
from convnet import cli, prepare
from convnet import config as config_lib
from convnet import step as step_lib
from convnet.data.order import EvalOrder

BATCH = {"cpu": 128, "gpu": 512}  # images in a step
DTYPES = ("float32", "bfloat16")
# config.transfer of each way; "forward" is measured on the base that is frozen.
WAYS = {
    "full": {},
    "frozen": {"freeze": "base", "cache_features": "off"},
    "cached": {"freeze": "base", "cache_features": "on"},
}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values, peer_python=False)
    flags.DEFINE_string(
        "models", "cifar10", "model files, workdirs or names", flag_values=values
    )
    shown = ",".join(DTYPES)
    flags.DEFINE_string("dtypes", shown, f"of {shown}", flag_values=values)
    flags.DEFINE_integer(
        "batch", 0, "images in a step; 0: 128, on a GPU 512", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Measures model by model; the ways take turns."""
    dtypes = table_lib.choose(values.dtypes, DTYPES, "dtypes")
    table_lib.start(values)
    size = values.batch or BATCH[values.device]
    table = Table(values.output, f"transfer, {values.device}, {size} images in a step")
    for model in filter(None, values.models.split(",")):
        for dtype in dtypes:
            measure(table, model, dtype, size, values.repeats)


def measure(table: Table, model: str, dtype: str, size: int, repeats: int) -> None:
    """Adds the rows of one model in one precision."""
    sides = {way: Side(model, dtype, size, keys) for way, keys in WAYS.items()}
    measures = {way: side.train for way, side in sides.items()}
    measures["forward"] = sides["frozen"].forward
    measured = table_lib.interleave(
        [table_lib.per_second(size, one) for one in measures.values()], repeats
    )
    speed = dict(zip(measures, map(table_lib.median, measured), strict=True))
    case = f"{Path(model).stem}/{dtype}"
    for way, peer in (("frozen", "full"), ("cached", "full"), ("frozen", "forward")):
        name = {"full": "full training", "forward": "the forward pass alone"}[peer]
        row = Row(f"{case}/{way}", "images/s", speed[way], speed[peer], name)
        table.add(row)


class Side:
    """One way to train a model on random images, prepared as every run is."""

    def __init__(
        self, model: str, dtype: str, size: int, transfer: dict[str, str]
    ) -> None:
        from convnet import bundle

        side = bundle.load(model).preprocessing["input_shape"][0]
        with random_images(4 * size, side) as path:
            config = config_lib.default()
            config.init_from, config.model.dtype = model, dtype
            config.data.name, config.data.dir = "arrays", path
            config.data.batch_size, config.data.placement = size, "device"
            config.transfer.update(transfer)
            config.optimizer.lr, config.schedule.name = 1e-3, "constant"
            self._it = prepare.prepare(config)
            self._it.state = prepare.initial_state(self._it)
            self._split = self._it.split("train")
        self._together = 1 if jax.default_backend() == "cpu" else STEPS_TOGETHER
        self._done = 0
        self._compiled: dict[str, Any] = {}

    def train(self, steps: int) -> float:
        """Does `steps` train steps; returns seconds, on an accelerator their share."""
        it, split = self._it, self._split
        if "train" not in self._compiled:
            self._compiled["train"] = compile_step(it, self._next())
        dispatches = -(-steps // self._together)
        start = time.perf_counter()
        for _ in range(dispatches):
            it.state, metrics = self._compiled["train"](
                it.state, split.data, self._next()
            )
        jax.block_until_ready(metrics)
        share = steps / (dispatches * self._together)
        return share * (time.perf_counter() - start)

    def _next(self) -> Any:
        first, self._done = self._done, self._done + self._together
        return batch(self._it, first, self._done)

    def forward(self, steps: int) -> float:
        """Passes `steps` batches through the base; returns seconds."""
        it, split = self._it, self._split
        order = EvalOrder(split.examples, it.config.data.batch_size)
        variables = it.state.variables()
        start = time.perf_counter()
        for one in split.batches(lambda s: order(s % len(order)), 0, steps):
            if "forward" not in self._compiled:
                self._compiled["forward"] = it.compile(
                    extract, variables, split.data, one
                )
                start = time.perf_counter()
            found = self._compiled["forward"](variables, split.data, one)
        jax.block_until_ready(found)
        return time.perf_counter() - start


def extract(*args: Any, **options: Any) -> Any:
    """`step.extract_step` of the images as they are."""
    return step_lib.extract_step(*args, flipped=False, **options)


if __name__ == "__main__":
    cli.run(main, define, __doc__)
