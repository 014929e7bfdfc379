"""Arrays from an .npz file: any spatial rank, any number of channels."""

from pathlib import Path

import numpy as np

from convnet.data.source import ArraySource, Dataset
from convnet.errors import ConvnetError, UsageError

_KEYS = ("x_train", "y_train", "x_test", "y_test", "classes")


def load(path: str) -> Dataset:
    """Reads an .npz with x_train, y_train, x_test, y_test and, optionally, classes.

    x is uint8, float32 or float64 (n, *spatial, c). Integer y (n,) are class indices,
    float y (n, ...) are regression targets. classes is a string array, one name for
    each index; without it the indices are the names.

    Raises:
        ConvnetError: names the file, the key, what was found and what is wanted.
    """
    if not path:
        raise UsageError("data.dir is empty: data.name='arrays' wants an .npz file")
    if not Path(path).expanduser().is_file():
        raise UsageError(f"data.dir={path!r}: no such file, wanted an .npz file")
    found = _read_npz(path)
    inputs = {s: _inputs(path, f"x_{s}", found) for s in ("train", "test")}
    labels = {s: _labels(path, f"y_{s}", found) for s in ("train", "test")}
    for side, what in ((inputs, "x"), (labels, "y")):
        train, test = side["train"], side["test"]
        if (train.shape[1:], train.dtype) != (test.shape[1:], test.dtype):
            raise ConvnetError(
                f"{path}: {what}_train is {_of(train)} but {what}_test is {_of(test)}; "
                "all but the first axis must agree"
            )
    for split in inputs:
        if len(inputs[split]) != len(labels[split]):
            raise ConvnetError(
                f"{path}: x_{split} holds {len(inputs[split])} examples but "
                f"y_{split} {len(labels[split])}; wanted one label for each"
            )
    return Dataset(
        ArraySource(inputs["train"], labels["train"], "train"),
        ArraySource(inputs["test"], labels["test"], "test"),
        _classes(path, found, labels),
    )


def _read_npz(path: str) -> dict[str, np.ndarray]:
    key = "it"
    try:
        with open(Path(path).expanduser(), "rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise ValueError("it holds one array, without names")
            found = {}
            for key in (key for key in _KEYS if key in content.files):
                found[key] = content[key]
            return found
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise ConvnetError(
            f"{path}: {key} cannot be read as .npz without pickles: {error}"
        ) from None


def _of(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _required(path: str, key: str, found: dict[str, np.ndarray]) -> np.ndarray:
    if key not in found:
        raise ConvnetError(
            f"{path}: no array {key!r}; found {', '.join(found) or 'none'}, "
            "wanted x_train, y_train, x_test and y_test"
        )
    array = found[key]
    if not array.size:
        raise ConvnetError(
            f"{path}: {key} is {_of(array)}, wanted at least one example"
        )
    return array


def _finite(path: str, key: str, array: np.ndarray) -> np.ndarray:
    """To float32, provided that every number is finite there."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if bad.any():
        raise ConvnetError(
            f"{path}: {key} holds NaN or infinite values in {bad.sum()} of {len(bad)} "
            f"examples, first in number {bad.argmax()}; wanted finite float32"
        )
    return array


def _inputs(path: str, key: str, found: dict[str, np.ndarray]) -> np.ndarray:
    array = _required(path, key, found)
    if array.ndim < 2 or array.dtype not in (np.uint8, np.float32, np.float64):
        raise ConvnetError(
            f"{path}: {key} is {_of(array)}, wanted uint8 or float32 (n, *spatial, c)"
        )
    return array if array.dtype == np.uint8 else _finite(path, key, array)


def _labels(path: str, key: str, found: dict[str, np.ndarray]) -> np.ndarray:
    array = _required(path, key, found)
    if array.dtype.kind == "f" and array.ndim:
        return _finite(path, key, array)
    if array.dtype.kind not in "iub" or array.ndim != 1:
        raise ConvnetError(
            f"{path}: {key} is {_of(array)}, wanted integers (n,) for classes or "
            "floats (n, ...) for regression"
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ConvnetError(
            f"{path}: {key} holds labels from {array.min()} to {array.max()}, "
            "wanted class indices from 0"
        )
    return array.astype(np.int32)


def _classes(
    path: str, found: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> tuple[str, ...]:
    if labels["train"].dtype != np.int32:
        return ()
    names = found.get("classes")
    if names is None:
        # More classes than examples is a column of something else, not of labels.
        limit, why = len(labels["train"]), "examples in x_train"
    elif names.dtype.kind == "U" and names.ndim == 1 and len(set(names)) == len(names):
        limit, why = len(names), "names in classes"
    else:
        raise ConvnetError(
            f"{path}: classes is {_of(names)}, wanted distinct strings (k,)"
        )
    for split, array in labels.items():
        if array.max() >= limit:
            raise ConvnetError(
                f"{path}: y_{split} holds the label {array.max()} (number "
                f"{array.argmax()}), wanted less than {limit}, the number of {why}"
            )
    if names is None:
        count = max(int(array.max()) for array in labels.values()) + 1
        return tuple(str(index) for index in range(count))
    return tuple(str(name) for name in names)
