"""Images per second from a folder of pictures to the device, against PyTorch.

usage: python -m benchmarks.input [--data=DIR] [--sizes=96,224] [--workers=2]
           [--peer_python=PATH] [--output=FILE.json]

Ours is the streaming path: files -> decoded, cropped batches, shuffled, uint8, in the
device's memory; by threads or by worker processes, without a cache and with one that
holds every image. The peer is PyTorch's DataLoader with as many worker processes, whose
batches stay on the host: with torchvision's transforms for evaluation, written with
Pillow, and with the same up to uint8. "decode alone" is a plain loop over files that
lie in memory, on one core.

"share waiting" is the share of the time in which a training run of cats_vs_dogs.py, its
data streamed, waits for its input; the other side is what we allow.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from benchmarks import table as table_lib
from benchmarks.peer import PROJECT, Peer
from benchmarks.table import Row, Table
from convnet import cli
from convnet import config as config_lib
from convnet.data.order import TrainOrder
from convnet.errors import ConvnetError, UsageError

CATS_AND_DOGS = PROJECT.parent / "shared" / "data" / "cats_and_dogs"
CIFAR10 = PROJECT.parent / "shared" / "data" / "tfds"
CIFAR10_IMAGES = 10_000
# Above what either side has read ahead when its turn comes, for each process.
BATCHES_AHEAD = 8
MAX_WAITING = 0.05
PEERS = {"float32": "DataLoader", "uint8": "DataLoader, uint8"}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values)
    integer = functools.partial(flags.DEFINE_integer, lower_bound=0, flag_values=values)
    flags.DEFINE_string(
        "data", str(CATS_AND_DOGS), "a folder of pictures", flag_values=values
    )
    flags.DEFINE_string(
        "cifar10",
        str(CIFAR10),
        "TFDS's folder that holds cifar10; empty: not measured",
        flag_values=values,
    )
    flags.DEFINE_list("sizes", ["96", "224"], "sides in pixels", flag_values=values)
    integer("images", 2000, "read of the folder, evenly spaced; 0: all")
    integer("workers", os.cpu_count() or 1, "processes on either side")
    integer("batch", 64, "images in a batch")
    integer("train_steps", 48, "of the run that is watched; 0: none")


def main(values: flags.FlagValues) -> None:
    """Measures size by size; all sides take turns.

    Raises:
      UsageError: a folder is not there.
    """
    data = Path(values.data).expanduser()
    if not data.is_dir():
        raise UsageError(
            f"--data={values.data}: no such folder; name one as data.dir wants it, with"
            " a folder for each class"
        )
    if not all(size.isdecimal() for size in values.sizes) or values.workers < 1:
        raise UsageError("--sizes wants whole numbers, --workers at least 1")
    python = table_lib.start(values)
    table = Table(values.output, f"input, {values.workers} processes")
    for size in map(int, values.sizes):
        measure(table, f"{data.name}/{size}", data, size, values.images, values, python)
    cifar10 = Path(values.cifar10).expanduser()
    if values.cifar10 and (cifar10 / "cifar10").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            write_files(cifar10, Path(folder))
            measure(table, "cifar10/32", Path(folder), 32, 0, values, python)
    elif values.cifar10:
        table.note(f"no cifar10 in {cifar10}: not measured (--cifar10)")
    if values.train_steps:
        waiting = share_waiting(data, values.train_steps)
        case = f"{data.name}/share waiting"
        table.add(Row(case, "share", waiting, MAX_WAITING, "what we allow"))


def write_files(directory: Path, folder: Path) -> None:
    """Writes the first training images of CIFAR-10 as a folder of pictures."""
    import tensorflow_datasets as tfds

    records = tfds.data_source(
        "cifar10",
        split=f"train[:{CIFAR10_IMAGES}]",
        data_dir=directory,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    for place, record in enumerate(records):
        # A folder wants test images too, of every class.
        for split in ("train", "test") if place < 100 else ("train",):
            path = folder / split / str(record["label"]) / str(place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record["image"])


def measure(
    table: Table,
    case: str,
    data: Path,
    size: int,
    images: int,
    values: flags.FlagValues,
    python: str | None,
) -> None:
    """Adds the rows of one folder in one size."""
    cores = os.cpu_count() or 1
    workers, busy = values.workers, min(values.workers, cores)
    with tempfile.TemporaryDirectory() as store:
        config = settings(data, size, images)
        plain = open_train(config)
        config.data.cache = store
        cached = open_train(config)
        ours = {
            "threads": (plain, 0),
            "threads/cached": (cached, 0),
            f"workers={workers}": (plain, workers),
            f"workers={workers}/cached": (cached, workers),
        }
        streams = {
            name: stream(source, count, values.batch)
            for name, (source, count) in ours.items()
        }
        steps = max(1, len(plain) // values.batch)
        before = BATCHES_AHEAD * max(workers, cores)
        fill = read_all(cached)
        table.note(f"{case}: the cache was filled in {fill:.1f} s")
        sides: dict[str, Callable[[], float]] = {
            name: functools.partial(rate, batches, before, steps, values.batch)
            for name, batches in streams.items()
        }
        sides["alone"] = alone(plain)
        if python is None:
            found = table_lib.interleave(list(sides.values()), values.repeats)
        else:
            with Peer(python, "benchmarks.peers.input") as peer:
                sides |= peer_sides(peer, plain, size, values.batch, workers, before)
                found = table_lib.interleave(list(sides.values()), values.repeats)
                peer("close")
        for batches in streams.values():
            batches.close()
    median = dict(zip(sides, map(table_lib.median, found), strict=True))
    for name in ours:
        for way, peer_name in (PEERS if python else {None: None}).items():
            row = Row(
                f"{case}/{name}", "images/s", median[name], median.get(way), peer_name
            )
            table.add(row)
    for name in ("threads", f"workers={workers}"):
        over = cores if name == "threads" else busy
        core = median[name] / over
        for way, peer_name in (PEERS if python else {}).items():
            its = median[way] / busy
            table.add(Row(f"{case}/{name}", "img/core/s", core, its, peer_name))
        row = Row(f"{case}/{name}", "img/core/s", core, median["alone"], "decode alone")
        table.add(row)


def settings(data: Path, size: int, images: int) -> ml_collections.ConfigDict:
    """Returns the config of a folder's images."""
    config = config_lib.default()
    config.data.name = "folder"
    config.data.dir = str(data)
    config.data.image_size = size
    config.data.train_limit = images
    return config


def open_train(config: ml_collections.ConfigDict) -> Any:
    """Opens the training split."""
    from convnet.data import source as source_lib

    return source_lib.load(config.data, config.seed).train


def stream(source: Any, workers: int, batch: int) -> Iterator[Any]:
    """Returns an endless iterator of batches on the devices."""
    import jax

    from convnet import mesh as mesh_lib
    from convnet.data import pipeline

    mesh = mesh_lib.make(batch)
    bad = pipeline.BadInputs(len(source), 1.0)
    split = pipeline.Streaming(source, mesh, bad, workers)
    order = TrainOrder(len(source), batch, seed=0)
    for one in split.batches(order, 0, 1 << 40):
        yield jax.block_until_ready(one)


def rate(batches: Iterator[Any], before: int, steps: int, batch: int) -> float:
    """Takes `before` batches, then `steps`; returns images/s of the latter."""
    for _ in range(before):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * batch / (time.perf_counter() - start)


def read_all(source: Any) -> float:
    """Reads every image once; returns the seconds."""
    from convnet.data import source as source_lib

    start = time.perf_counter()
    source_lib.read(source, range(len(source)))
    return time.perf_counter() - start


def alone(source: Any, count: int = 500) -> Callable[[], float]:
    """Returns a side: images/s of decoding files that lie in memory, on one core."""
    from convnet.data.decode import decode
    from convnet.data.resize import Resize

    paths, size = files(source)[0][:: max(1, len(source) // count)], folder(source).size
    contents = [Path(path).read_bytes() for path in paths]

    def once() -> float:
        start = time.perf_counter()
        for content in contents:
            decode(content, "", size=size, resize=Resize())
        return len(contents) / (time.perf_counter() - start)

    return once


def folder(source: Any) -> Any:
    """Returns the folder's own source, of which some may have been taken."""
    return getattr(source, "source", source)


def files(source: Any) -> tuple[list[str], list[int]]:
    """Returns the paths and labels of a folder's images."""
    whole = folder(source)
    places = map(int, getattr(source, "places", range(len(source))))
    pairs = [(whole.files[i], int(whole.labels[i])) for i in places]
    return [os.path.join(whole.root, f) for f, _ in pairs], [k for _, k in pairs]


def peer_sides(
    peer: Peer, source: Any, size: int, batch: int, workers: int, before: int
) -> dict[str, Callable[[], float]]:
    """Opens the peer's loaders; returns their sides, in images/s."""
    paths, labels = files(source)
    steps = max(1, len(paths) // batch)

    def side(way: str) -> float:
        return steps * batch / peer("run", way=way, before=before, steps=steps)

    for way in PEERS:
        peer(
            "open",
            way=way,
            files=paths,
            labels=labels,
            size=size,
            batch=batch,
            workers=workers,
        )
    return {way: functools.partial(side, way) for way in PEERS}


def share_waiting(data: Path, steps: int, every: int = 8) -> float:
    """Trains `cats_vs_dogs.py` with streamed data; returns the median share of waiting.

    The first lines, while buffers fill and programs load, are left out.

    Raises:
      ConvnetError: the run failed.
    """
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            *(sys.executable, "-m", "convnet.main"),
            "--config=experiments/cats_vs_dogs.py",
            f"--workdir={workdir}",
            f"--config.data.dir={data}",
            "--config.data.placement=stream",
            "--config.data.test_limit=64",
            f"--config.train.steps={steps}",
            f"--config.train.log_every={every}",
            "--config.train.eval_every=0.0",
        ]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        if done.returncode:
            raise ConvnetError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "input_wait" in row]
    return table_lib.median([row["input_wait"] for row in rows[1:] or rows])


if __name__ == "__main__":
    cli.run(main, define, __doc__)
