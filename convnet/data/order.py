"""Which examples make up a step: pure functions of (seed, step), or of the step."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

HostBatch = dict[str, np.ndarray]
Order = Callable[[int], HostBatch]


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """The order of training: an endless sequence of shuffled epochs, cut into batches.

    Each example comes exactly once in an epoch; a batch may reach into the next one.
    """

    examples: int
    batch_size: int
    seed: int

    def __call__(self, step: int) -> HostBatch:
        """Returns `index`, `epoch` int32 (b,) and `weight` float32 (b,) of a step."""
        place = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epoch = place // self.examples
        index = np.empty(self.batch_size, np.int32)
        for one in np.unique(epoch):
            here = epoch == one
            shuffled = _permutation(self.seed, int(one), self.examples)
            index[here] = shuffled[place[here] % self.examples]
        weight = np.ones(self.batch_size, np.float32)
        return {"index": index, "epoch": epoch.astype(np.int32), "weight": weight}


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(examples).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows that one process of several holds of an order's batches."""

    order: Order
    process: int
    processes: int

    def __call__(self, step: int) -> HostBatch:
        """Returns the part of the batch of a step."""
        batch = self.order(step)
        each = len(batch["index"]) // self.processes
        rows = slice(self.process * each, (self.process + 1) * each)
        return {name: values[rows] for name, values in batch.items()}


@dataclasses.dataclass(frozen=True)
class EvalOrder:
    """Every example once, in order; the last batch is padded with weight 0."""

    examples: int
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def __call__(self, step: int) -> HostBatch:
        """Returns `index`, `epoch` int32 (b,) and `weight` float32 (b,) of a batch."""
        place = step * self.batch_size + np.arange(self.batch_size)
        return {
            "index": np.where(place < self.examples, place, 0).astype(np.int32),
            "epoch": np.zeros(self.batch_size, np.int32),
            "weight": (place < self.examples).astype(np.float32),
        }
