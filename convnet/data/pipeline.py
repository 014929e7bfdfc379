"""(seed, step) -> batch, by two paths: from device memory, or streamed from the host.

Which examples make up step s is a pure function of (seed, s) (`order.py`); there is
no iterator state. Both paths put the same batch on the devices: the resident path sends
only the indices and gathers inside the compiled step, the streaming path reads, decodes
and sends the examples. `step.materialize` is where they meet.

A batch on the devices holds `index` int32 (b,), `epoch` int32 (b,), `weight` float32
(b,) and, when streamed, `input` (b, *spatial, c) and `label` (b, ...).
"""

import collections
import concurrent.futures
import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from convnet import mesh as mesh_lib
from convnet import processes as processes_lib
from convnet.data import source as source_lib
from convnet.data import workers as workers_lib
from convnet.data.decode import DecodeError
from convnet.data.order import HostBatch, Order, Part
from convnet.data.source import Source
from convnet.errors import ConvnetError

Bad = dict[int, tuple[str, str]]  # index -> (id, reason)

_CPU_RESIDENT_BYTES = 2 << 30


class BadInputs:
    """The unreadable images met so far; too many stop the run."""

    def __init__(self, examples: int, max_fraction: float) -> None:
        self.found: Bad = {}
        self._examples = examples
        self._max_fraction = max_fraction

    def add(self, found: Bad) -> None:
        """Notes and logs new ones.

        Raises:
          ConvnetError: the share exceeds data.max_bad_fraction; lists them.
        """
        for index, (name, reason) in found.items():
            if index not in self.found:
                self.found[index] = (name, reason)
                tqdm.write(f"warning: {name}: {reason}; a good image stands in")
        if len(self.found) > self._max_fraction * self._examples:
            shown = [f"  {n}: {r}" for n, r in list(self.found.values())[:20]]
            more = len(self.found) - len(shown)
            shown += [f"  ... and {more} more"] if more > 0 else []
            raise ConvnetError(
                f"{len(self.found)} of {self._examples} images cannot be read, more"
                f" than data.max_bad_fraction = {self._max_fraction:g} allows:\n"
                + "\n".join(shown)
                + "\nmend or remove them, or raise data.max_bad_fraction"
            )

    def share(self) -> None:
        """Adds what the other processes met; all call together.

        Raises:
          ConvnetError: as `add`, in all of them.
        """
        for found in processes_lib.gather([(i, *bad) for i, bad in self.found.items()]):
            self.add({index: (name, reason) for index, name, reason in found})

    def listed(self) -> list[tuple[str, str]]:
        """Returns (id, reason) of each, in the order of the data."""
        return [self.found[index] for index in sorted(self.found)]


def read_batch(source: Source, batch: HostBatch) -> tuple[HostBatch, Bad]:
    """Adds `input` and `label` to an order's batch.

    For an unreadable image the next good one of the split stands in, with weight 0.

    Returns:
      The batch, and the unreadable ones.
    """
    records = source_lib.read(source, batch["index"])
    weight, bad = batch["weight"].copy(), {}
    for row, index in enumerate(batch["index"]):
        if isinstance(records[row], DecodeError):
            weight[row] = 0
            records[row], passed = _stand_in(source, int(index))
            bad |= passed
    return {
        **batch,
        "weight": weight,
        "input": np.stack([record["input"] for record in records]),
        "label": np.stack([record["label"] for record in records]),
    }, bad


def _stand_in(source: Source, index: int) -> tuple[dict[str, Any], Bad]:
    bad: Bad = {}
    for offset in range(len(source)):
        place = (index + offset) % len(source)
        try:
            return source[place], bad
        except DecodeError as error:
            bad[place] = (error.id, error.reason)
    listed = "\n".join(f"  {n}: {r}" for n, r in list(bad.values())[:20])
    raise ConvnetError(f"none of the {len(source)} images can be read:\n{listed}")


class Resident:
    """A split that lies in device memory, whole, on every device.

    Of several processes each reads a part, and has the rest from the others' devices.

    Attributes:
      data: `input` (n, ...), `label` (n, ...), `weight` (n,) on the devices.
    """

    def __init__(self, source: Source, mesh: Mesh, bad: BadInputs) -> None:
        self.examples = len(source)
        self.bad = bad
        self._mesh = mesh
        count, processes = len(source), jax.process_count()
        if processes == 1:
            self.data = mesh_lib.put_whole(mesh, _read(source, bad, 0, count))
            return
        each = -(-count // mesh.size) * mesh.size // processes
        part = _read(source, bad, each * jax.process_index(), each)
        self.data = mesh_lib.put_parts(mesh, part, count)

    def batches(self, order: Order, start: int, stop: int) -> Iterator[Any]:
        """Yields the device batches of steps start .. stop - 1."""
        mine = _part(order)
        for step in range(start, stop):
            yield mesh_lib.put_batch(self._mesh, mine(step))

    def stack(self, order: Order, start: int, stop: int) -> dict[str, Any]:
        """Returns the device batches of steps start .. stop - 1 as one, (steps, b)."""
        batches = [_part(order)(step) for step in range(start, stop)]
        stacked = {k: np.stack([batch[k] for batch in batches]) for k in batches[0]}
        return mesh_lib.put_batches(self._mesh, stacked)


def _read(source: Source, bad: BadInputs, start: int, count: int) -> HostBatch:
    """Reads so many records from `start` on; what is past the end is zero."""
    stop = min(start + count, len(source))
    chunks = [np.arange(i, min(i + 256, stop)) for i in range(start, stop, 256)]

    def load(index: np.ndarray) -> tuple[HostBatch, Bad]:
        return read_batch(source, {"index": index, "weight": np.ones(len(index), "f")})

    example = first(source)
    data: HostBatch = {
        name: np.zeros((count, *np.shape(value)), np.asarray(value).dtype)
        for name, value in (
            ("input", example["input"]),
            ("label", example["label"]),
            ("weight", np.float32(0)),
        )
    }
    # Threads, because decoders release the interpreter's lock.
    with (
        concurrent.futures.ThreadPoolExecutor(workers_lib.threads()) as pool,
        tqdm(
            total=max(stop - start, 0),
            desc="reading",
            unit=" examples",
            delay=2,
            disable=None,  # where there is no terminal
        ) as bar,
    ):
        for index, (chunk, found) in zip(chunks, pool.map(load, chunks), strict=True):
            bad.add(found)
            for name, values in data.items():
                values[index - start] = chunk[name]
            bar.update(len(index))
    return data


class Streaming:
    """A split that is read, decoded and sent while the devices compute.

    Of several processes each reads the part of a batch that its devices hold.

    Attributes:
      data: empty; the batches carry the examples.
    """

    data: HostBatch = {}

    def __init__(
        self, source: Source, mesh: Mesh, bad: BadInputs, workers: int
    ) -> None:
        self.examples = len(source)
        self.bad = bad
        self._source = source
        self._mesh = mesh
        self._workers = workers

    def batches(self, order: Order, start: int, stop: int) -> Iterator[Any]:
        """Yields the device batches of steps start .. stop - 1."""
        import grain
        from absl import flags

        # Grain reads absl's global flags, and our entry points have flags of their own.
        flags.FLAGS.mark_as_parsed()
        steps = grain.MapDataset.range(start, stop).map(
            functools.partial(_load_step, self._source, _part(order))
        )
        threads = 1 if self._workers else workers_lib.threads()
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=threads + 2
        )
        dataset = steps.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(self._workers), workers_lib.start
        )
        # One batch ahead: its copy to the device overlaps with the step before.
        ahead: collections.deque[Any] = collections.deque()
        # An error's traceback would keep Grain's iterator, and its processes, alive.
        with contextlib.closing(workers_lib.started(dataset)) as batches:
            for batch, found in batches:
                self.bad.add(found)
                ahead.append(self._put(batch))
                if len(ahead) > 1:
                    yield ahead.popleft()
        if self._workers:
            # Grain's own exceptions hold the last batches, which are shared memory.
            gc.collect()
        yield from ahead

    def _put(self, batch: HostBatch) -> dict[str, Any]:
        if self._workers:
            # Out of the memory shared with the workers, where a CPU would leave it:
            # what still lies there when the process ends is a leak.
            batch = {name: np.array(value) for name, value in batch.items()}
        return mesh_lib.put_batch(self._mesh, batch)


def _part(order: Order) -> Order:
    """What this process reads: its workers do not know that it is one of several."""
    return Part(order, jax.process_index(), jax.process_count())


def _load_step(source: Source, order: Order, step: int) -> tuple[HostBatch, Bad]:
    return read_batch(source, order(step))


Split = Resident | Streaming


def first(source: Source) -> dict[str, Any]:
    """Returns the first record that can be read: its shapes are those of all."""
    return _stand_in(source, 0)[0]


def create(source: Source, data: ml_collections.ConfigDict, mesh: Mesh) -> Split:
    """Returns the split on the path that data.placement names or, "auto", that fits."""
    bad = BadInputs(len(source), data.max_bad_fraction)
    if data.placement == "stream" or (
        data.placement == "auto" and not _fits(source, mesh)
    ):
        return Streaming(source, mesh, bad, data.workers)
    return Resident(source, mesh, bad)


def _fits(source: Source, mesh: Mesh) -> bool:
    return len(source) * first(source)["input"].nbytes <= resident_bytes(mesh)


def resident_bytes(mesh: Mesh) -> int:
    """Returns how much of a split may lie on a device: a quarter of its memory."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return _CPU_RESIDENT_BYTES
    return (device.memory_stats() or {}).get("bytes_limit", 8 << 30) // 4
