"""Training examples to find an input's neighbours in."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from convnet import bundle as bundle_lib
from convnet import decoders, inputs, predict_stream, resolve
from convnet.bundle import Bundle
from convnet.data import source as source_lib
from convnet.data.decode import DecodeError
from convnet.errors import UsageError
from convnet.explaining.contents import Collection
from convnet.input_arrays import Wanted
from convnet.inputs import Record

Features = Callable[[np.ndarray], np.ndarray]


def files(paths: Sequence[str], wanted: Wanted) -> Collection:
    """The pictures and arrays under some folders; named by the folder they lie in."""

    def batches(features: Features) -> Iterator[tuple[list[Any], np.ndarray]]:
        found = predict_stream.predict(
            inputs.records(paths, wanted),
            wanted,
            features,
            jax.default_backend(),
            predict_stream.Times(),
        )
        for records, rows in found:
            good = [i for i, record in enumerate(records) if not record.error]
            if good:
                yield [records[i] for i in good], rows[good]

    def look_up(record: Record) -> tuple[np.ndarray, str]:
        folder, name = os.path.split(record.path)
        label = os.path.basename(folder)
        if record.pixels is not None:
            return record.pixels, name
        return decoders.pixels(record.path, wanted), f"{label}/{name}"

    return Collection(batches, look_up)


def experiment(
    config: Any, wanted: Wanted, bundle: Bundle, batch_size: int
) -> Collection:
    """The training split of an experiment's data; named by class or id.

    Raises:
      UsageError: the data are not of the model's shape.
      ConvnetError: the data cannot be used.
    """
    config = resolve.check_type(config, "--config")
    _configure(config, bundle)
    dataset = source_lib.load(config.data, config.seed)
    train = dataset.train
    first = train[0]["input"]
    if first.shape != wanted.shape or str(first.dtype) != wanted.dtype:
        raise UsageError(
            f"--config: its data hold {first.dtype} {list(first.shape)}; the model"
            f" takes {wanted.dtype} {list(wanted.shape)} (see data.image_size)"
        )

    def batches(features: Features) -> Iterator[tuple[list[Any], np.ndarray]]:
        for start in range(0, len(train), batch_size):
            rows = range(start, min(start + batch_size, len(train)))
            found = {
                row: record["input"]
                for row, record in zip(rows, source_lib.read(train, rows), strict=True)
                if not isinstance(record, DecodeError)
            }
            if found:
                yield list(found), features(np.stack(list(found.values())))

    def look_up(row: int) -> tuple[np.ndarray, str]:
        record = train[row]
        name = record["id"]
        if dataset.classes:
            name = dataset.classes[int(record["label"])]
        return record["input"], name

    return Collection(batches, look_up)


def _configure(config: ml_collections.ConfigDict, bundle: Bundle) -> None:
    bundle_lib.configure(config, bundle)
    resolve.validate(config)
