"""Datasets as random-access records {input, label, id} and class names.

`load` dispatches on `data.name`; the other files of this folder read one kind each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convnet.errors import ConvnetError

BUILT_IN = ("digits", "folder", "arrays", "cylinder_bell_funnel", "advection_diffusion")


class Source(Protocol):
    """Random access to records; picklable and safe to share between threads.

    A source may also have `__getitems__(indices) -> list`, where reading many records
    at once is faster: it gives a record, or the `DecodeError` itself, for each index.
    `read` uses it where it exists.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record.

        Returns:
            "input": uint8 or float32 (*spatial, c); "label": an int32 scalar
            (classification) or a float32 array (regression); "id": str, unique within
            the split and stable from run to run.

        Raises:
            convnet.data.decode.DecodeError: the image is unreadable.
            IndexError: no such record.
        """
        ...


@dataclass(frozen=True)
class Dataset:
    """Two splits and the names of the classes (none for regression)."""

    train: Source
    test: Source
    classes: tuple[str, ...] = ()


class ArraySource:
    """Records that lie in memory; `inputs` and `labels` are open to whole-array use.

    Args:
        inputs: uint8 or float32 (n, *spatial, c).
        labels: int32 (n,) or float32 (n, ...).
        split: the ids are "SPLIT/INDEX".
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, split: str):
        self.inputs = inputs
        self.labels = labels
        self.split = split

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self.inputs))[index]
        label = self.labels[index]
        return {
            "input": self.inputs[index],
            "label": label if label.dtype == np.int32 else np.asarray(label),
            "id": f"{self.split}/{index}",
        }


class Spread:
    """`count` records of another source, evenly spaced over it.

    Not the first ones: folders are sorted by class.
    """

    def __init__(self, source: Source, count: int):
        self.source = source
        self.places = np.linspace(0, len(source) - 1, min(count, len(source)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.places[index])]

    def __getitems__(self, indices: Sequence[int]) -> list:
        return read(self.source, [int(self.places[i]) for i in indices])


def read(source: Source, indices: Sequence[int]) -> list:
    """Many records at once.

    Returns:
        For each index a record, or the `DecodeError` that reading it raised.
    """
    from convnet.data.decode import DecodeError

    if hasattr(source, "__getitems__"):
        return source.__getitems__(indices)
    records = []
    for index in indices:
        try:
            records.append(source[index])
        except DecodeError as error:
            records.append(error)
    return records


def load(data: Any, seed: int) -> Dataset:
    """Opens the dataset that the config's `data` section describes.

    Args:
        data: attributes name, dir, image_size, resize, crop_fraction, interpolation,
            test_fraction, train_limit, test_limit and cache, as in the config.
        seed: of the run; only the generated datasets depend on it.

    Raises:
        ConvnetError: the data is absent, malformed or inconsistent.
    """
    if data.name == "digits":
        dataset = _sized(digits(), data)
    elif data.name == "arrays":
        from convnet.data import arrays

        dataset = _sized(arrays.load(data.dir), data)
    elif data.name == "folder":
        from convnet.data import cache, folder

        dataset = folder.load(
            data.dir,
            data.image_size,
            _resize(data),
            data.test_fraction,
            cache.create(data.cache),
        )
    elif data.name in BUILT_IN:
        from convnet.data import generated

        dataset = _sized(generated.load(data.name, seed), data)
    else:
        from convnet.data import cache, prepared

        dataset = prepared.load(
            data.name,
            data.dir,
            data.image_size,
            _resize(data),
            cache.create(data.cache),
        )
    return Dataset(
        _limited(dataset.train, data.train_limit),
        _limited(dataset.test, data.test_limit),
        dataset.classes,
    )


def digits() -> Dataset:
    """The 8x8 handwritten digits that come inside scikit-learn, 1,437 and 360.

    The split is stratified and fixed. Pixels are stored in 17 steps, 0 to 16; they are
    spread over 0 to 255, which is exact (no two steps fall together).
    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    inputs = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    return Dataset(
        ArraySource(inputs[train], labels[train], "train"),
        ArraySource(inputs[test], labels[test], "test"),
        tuple(str(digit) for digit in range(10)),
    )


def _resize(data: Any) -> Any:
    """The config's rule, `convnet.data.resize.Resize`."""
    from convnet.data.resize import Resize

    return Resize(data.resize, data.crop_fraction, data.interpolation)


def _sized(dataset: Dataset, data: Any) -> Dataset:
    """Applies data.image_size to a dataset that lies in memory."""
    from convnet.data.resize import fit

    size, resize = data.image_size, _resize(data)
    shape, dtype = dataset.train.inputs.shape[1:], dataset.train.inputs.dtype
    if not size or (shape[:-1] == (size, size) and resize.whole(size) == size):
        return dataset
    if len(shape) != 3 or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise ConvnetError(
            f"data.image_size={size} resizes uint8 images (h, w, 1 or 3) only, and "
            f"{data.name!r} holds {dtype} {shape}; set it to 0"
        )
    train, test = (
        ArraySource(
            np.stack([fit(image, size, resize) for image in source.inputs]),
            source.labels,
            source.split,
        )
        for source in (dataset.train, dataset.test)
    )
    return Dataset(train, test, dataset.classes)


def _limited(source: Source, limit: int) -> Source:
    if not limit or limit >= len(source):
        return source
    return Spread(source, limit)
