"""Datasets prepared by TFDS as ArrayRecord files, read without TensorFlow."""

import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convnet.data import decode, tfds_folder
from convnet.data.cache import Cache
from convnet.data.resize import Resize
from convnet.data.source import Dataset
from convnet.errors import ConvnetError

_SPLITS = ("train", "test", "validation")


class PreparedSource:
    """One split of a prepared dataset; files are opened at the first read.

    Args:
        directory: the folder of the version, with dataset_info.json.
        split: name of the split; the ids are "SPLIT/INDEX".
        image, label: the features' names.
        count: number of records.
        classes: number of classes; a record with another label counts as damaged.
        channels: 1 or 3.
        size, resize: as in `decode`.
        cache: holds decoded images.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        image: str,
        label: str,
        count: int,
        classes: int,
        channels: int,
        size: int,
        resize: Resize,
        cache: Cache | None,
    ):
        self.directory = directory
        self.split = split
        self.image = image
        self.label = label
        self.count = count
        self.classes = classes
        self.channels = channels
        self.size = size
        self.resize = resize
        self.decode = cache.decode if cache else decode.decode
        self.first: decode.FirstShape | None = None
        self._records = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._read_one(range(self.count)[index])
        if isinstance(example, decode.DecodeError):
            raise example
        return example

    def __getitems__(self, indices: Sequence[int]) -> list:
        """Reads a batch at once, see `Source`; faster than one by one."""
        indices = [range(self.count)[index] for index in indices]
        try:
            records = self._opened().__getitems__(indices)
        except Exception:  # a bad record fails the whole batch: find it
            return [self._read_one(index) for index in indices]
        return [self._example(*pair) for pair in zip(indices, records, strict=True)]

    def _read_one(self, index: int) -> dict[str, Any] | decode.DecodeError:
        records = self._opened()
        try:
            record = records[index]
        except Exception as error:  # array_record's errors have no class of their own
            return decode.DecodeError(self._id(index), f"unreadable record: {error}")
        return self._example(index, record)

    def labelled(self) -> bool:
        """Whether the first record has a label; competitions keep those of the test."""
        records = self._opened()
        try:
            _, label = self._parsed(records[0])
        except Exception:  # damaged: a bad record later, not a missing label
            return True
        return 0 <= label < self.classes

    def _id(self, index: int) -> str:
        return f"{self.split}/{index}"

    def _opened(self) -> Any:
        with self._lock:
            if self._records is None:
                import tensorflow_datasets as tfds

                builder = tfds_folder.builder(self.directory)
                _allow_open_files(len(builder.info.splits[self.split].filepaths))
                self._records = builder.as_data_source(
                    self.split,
                    deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                )
            return self._records

    def _parsed(self, record: bytes) -> tuple[bytes, int]:
        # Reading these two alone is ten times faster than TFDS's own way through all
        # features, and leaves the image to decode.py.
        from tensorflow_datasets.proto import tf_example_pb2

        features = tf_example_pb2.Example.FromString(record).features.feature
        image = features[self.image].bytes_list.value[0]
        return image, features[self.label].int64_list.value[0]

    def _example(
        self, index: int, record: bytes
    ) -> dict[str, Any] | decode.DecodeError:
        id = self._id(index)
        try:
            data, label = self._parsed(record)
        except Exception as error:  # protobuf's DecodeError, or a missing value
            return decode.DecodeError(id, f"the record is damaged: {error}")
        if not 0 <= label < self.classes:
            return decode.DecodeError(
                id, f"the label {label} is not one of the classes"
            )
        try:
            pixels = self.decode(
                data, id, size=self.size, resize=self.resize, channels=self.channels
            )
        except decode.DecodeError as error:
            return error
        if self.first is not None:
            self.first.check(pixels.shape, id)
        return {"input": pixels, "label": np.int32(label), "id": id}


def load(
    name: str, directory: str, size: int, resize: Resize, cache: Cache | None = None
) -> Dataset:
    """Opens a dataset of images and class labels that TFDS has prepared.

    Args:
        name: as TFDS names it: "cifar10", "NAME/CONFIG", "NAME:VERSION". Of several
            versions the newest is taken.
        directory: TFDS's data_dir, or the folder of the version itself; "" is
            ~/tensorflow_datasets. cifar10 and cifar100 are downloaded there if absent.
        size, resize: as in `decode`.
        cache: holds decoded images.

    Raises:
        ConvnetError: not prepared, not ArrayRecord, or no images with class labels.
    """
    root = Path(directory or "~/tensorflow_datasets").expanduser()
    found = tfds_folder.find(name, root)
    if found is None and name in tfds_folder.DOWNLOADABLE:
        from convnet.data import cifar

        cifar.prepare(name, str(root))
        found = tfds_folder.find(name, root)
    if found is None:
        raise tfds_folder.not_prepared(name, root)
    builder = tfds_folder.builder(str(found))
    tfds_folder.check_files(found, name, builder, _SPLITS)
    features = builder.info.features
    image, label = tfds_folder.features(found, features)

    def source(split: str) -> PreparedSource:
        return PreparedSource(
            str(found),
            split,
            image,
            label,
            builder.info.splits[split].num_examples,
            features[label].num_classes,
            1 if features[image].shape[-1] == 1 else 3,
            size,
            resize,
            cache,
        )

    splits = {s: source(s) for s in _SPLITS if s in builder.info.splits}
    usable = [s for s in splits if len(splits[s]) and splits[s].labelled()]
    if usable[:1] != ["train"] or len(usable) < 2:
        raise ConvnetError(
            f"{found}: the splits are {', '.join(builder.info.splits) or 'none'}, "
            f"those with labels {', '.join(usable) or 'none'}; wanted train, and test "
            "or validation"
        )
    train, test = splits["train"], splits[usable[1]]
    if not size:
        train.first = test.first = _first_shape(train)
    return Dataset(train, test, tuple(features[label].names))


def _first_shape(source: PreparedSource) -> decode.FirstShape | None:
    """The shape of the first readable image among the first 100."""
    for index in range(min(100, len(source))):
        try:
            example = source[index]
        except decode.DecodeError:
            continue
        return decode.FirstShape(example["input"].shape, example["id"])
    return None


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files where it is too low.

    array_record keeps every shard open; ImageNet's 1,024 exceed the usual limit.
    """
    wanted = 2 * count + 512  # train and test, and all else that the process opens
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard < wanted and hard != resource.RLIM_INFINITY:
        raise ConvnetError(
            f"{count} files have to be open at once, and the system's limit is {hard}; "
            f"raise it to {wanted} (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
