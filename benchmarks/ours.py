"""Our side of the benchmarks: a run on random images, prepared as every run is."""

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.peers import protocol
from convnet import cli, finish, prepare, step
from convnet import config as config_lib
from convnet.data.order import EvalOrder
from convnet.errors import UsageError

# In one program, on an accelerator; a run has up to an epoch's.
STEPS_TOGETHER = 25


@contextlib.contextmanager
def random_images(images: int, size: int, classes: int = 10) -> Iterator[str]:
    """Writes an .npz of random training images (and as many labels); gives its path."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        inputs = rng.integers(0, 256, (images, size, size, 3), np.uint8)
        labels = rng.integers(0, classes, images)
        labels[:classes] = np.arange(classes)
        np.savez(
            path, x_train=inputs, y_train=labels, x_test=inputs[:10], y_test=labels[:10]
        )
        yield str(path)


def experiment(name: str) -> ml_collections.ConfigDict:
    """Returns the config of experiments/NAME.py.

    Raises:
      UsageError: there is none.
    """
    path = cli.PROJECT / "experiments" / f"{name}.py"
    if not path.is_file():
        raise UsageError(f"--experiments names {name}: there is no {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def config(
    path: str, network: str, dtype: str, batch: int, width: int
) -> ml_collections.ConfigDict:
    """Returns the config of a benchmark: resident data, no augmentation, plain SGD.

    `width` is that of the first stage; speednet has its own.
    """
    it = config_lib.default()
    it.data.name, it.data.dir = "arrays", path
    it.data.batch_size = batch
    it.data.placement = "device"
    it.data.mean, it.data.std = (0.5,), (0.25,)
    it.model.name, it.model.dtype = network, dtype
    if network != "speednet":
        it.model.width = width
    it.optimizer.name, it.optimizer.lr = "sgd", 1e-3
    it.schedule.name = "constant"
    it.compilation_cache = "none"
    return it


def batch(it: prepare.Run, start: int, stop: int) -> Any:
    """Returns the batch of steps start .. stop - 1, stacked if they are several."""
    split = it.split("train")
    if stop - start > 1:
        return split.stack(it.train_order, start, stop)
    return next(split.batches(it.train_order, start, stop))


def compile_step(it: prepare.Run, batch: Any) -> Any:
    """Compiles the train step, or several in one program, for such a batch."""
    return it.compile(
        step.train_step if batch["index"].ndim == 1 else step.train_steps,
        it.state,
        it.split("train").data,
        batch,
        donate_argnums=0,
        out_shardings=it.out_shardings(),
    )


class Side:
    """One network, which trains and infers as `python -m convnet.main` does."""

    def __init__(
        self,
        network: str,
        dtype: str,
        batch: int,
        width: int,
        size: int,
        images: int,
    ) -> None:
        """Prepares a run on `images` random images (10 at least) of `size` x `size`."""
        with random_images(max(images, 10), size) as path:
            self._it = prepare.prepare(config(path, network, dtype, batch, width))
            self._it.state = prepare.initial_state(self._it)
            self._split = self._it.split("train")
        leaves = jax.tree.leaves(self._it.state.params)
        self.parameters = sum(leaf.size for leaf in leaves)
        self._done = 0
        self._together = 1 if jax.default_backend() == "cpu" else STEPS_TOGETHER
        self._compiled: Any = None
        self._predict: Any = None

    def train(self, steps: int) -> float:
        """Does `steps` train steps; returns seconds.

        On an accelerator it does whole dispatches, and returns the share of `steps`.
        """
        it, split = self._it, self._split
        if self._compiled is None:
            self._compiled = compile_step(it, self._next())
        dispatches = -(-steps // self._together)
        start = time.perf_counter()
        for _ in range(dispatches):
            it.state, metrics = self._compiled(it.state, split.data, self._next())
        jax.block_until_ready(metrics)
        share = steps / (dispatches * self._together)
        return share * (time.perf_counter() - start)

    def _next(self) -> Any:
        first, self._done = self._done, self._done + self._together
        return batch(self._it, first, self._done)

    def infer(self, steps: int) -> float:
        """Predicts `steps` batches as the run's model file does; returns seconds."""
        it, split = self._it, self._split
        if self._predict is None:
            made = finish.to_bundle(it, {}, "")
            self._predict = made.predict_fn(it.config.model.dtype)
        order = EvalOrder(split.examples, it.config.data.batch_size)
        start = time.perf_counter()
        outputs = [
            self._predict(split.data["input"][order(step % len(order))["index"]])
            for step in range(steps)
        ]
        jax.block_until_ready(outputs)
        return time.perf_counter() - start

    def memory(self) -> int:
        """Returns the bytes that a train step takes while it runs: XLA's own plan."""
        self.train(1)
        return self._compiled.compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    # In a process of its own, which no earlier measurement has filled.
    protocol.serve({"memory": lambda **arguments: Side(**arguments).memory()})
