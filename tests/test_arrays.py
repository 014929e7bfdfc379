"""Arrays from .npz files, good and bad."""

import numpy as np
import pytest

from convnet.data import arrays
from convnet.errors import ConvnetError, UsageError

RNG = np.random.default_rng(0)


def good(**changes):
    content = {
        "x_train": RNG.integers(0, 256, (6, 5, 4, 3), np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": RNG.integers(0, 256, (3, 5, 4, 3), np.uint8),
        "y_test": np.array([2, 1, 0]),
    }
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}


def save(tmp_path, **changes):
    path = tmp_path / "data.npz"
    np.savez(path, **good(**changes))
    return str(path)


def test_classification(tmp_path):
    content = good()
    np.savez(tmp_path / "data.npz", **content)
    dataset = arrays.load(str(tmp_path / "data.npz"))
    assert dataset.classes == ("0", "1", "2")
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        for i in range(len(source)):
            record = source[i]
            np.testing.assert_array_equal(record["input"], content[f"x_{split}"][i])
            assert record["label"] == content[f"y_{split}"][i]
            assert record["label"].dtype == np.int32 and record["id"] == f"{split}/{i}"
    with pytest.raises(IndexError):
        dataset.train[6]


def test_class_names(tmp_path):
    path = save(tmp_path, classes=np.array(["ant", "bee", "cow", "dog"]))
    assert arrays.load(path).classes == ("ant", "bee", "cow", "dog")


@pytest.mark.parametrize(
    "shape", [(7,), (9, 1), (4, 4, 2), (3, 4, 5, 1), (2, 2, 2, 2, 6)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_any_rank_and_number_of_channels(tmp_path, shape, dtype):
    x_train = RNG.uniform(0, 200, (6, *shape)).astype(dtype)
    x_test = RNG.uniform(0, 200, (3, *shape)).astype(dtype)
    dataset = arrays.load(save(tmp_path, x_train=x_train, x_test=x_test))
    record = dataset.train[5]["input"]
    assert record.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    np.testing.assert_array_equal(record, x_train[5].astype(record.dtype))


@pytest.mark.parametrize("shape", [(), (2,), (4, 3, 2)])
def test_regression(tmp_path, shape):
    y_train, y_test = RNG.normal(size=(6, *shape)), RNG.normal(size=(3, *shape))
    dataset = arrays.load(save(tmp_path, y_train=y_train, y_test=y_test))
    label = dataset.test[1]["label"]
    assert dataset.classes == ()
    assert isinstance(label, np.ndarray) and label.dtype == np.float32
    np.testing.assert_array_equal(label, y_test[1].astype(np.float32))


def nan(*shape):
    array = np.zeros(shape, np.float32)
    array.reshape(len(array), -1)[2, -1] = np.nan
    return array


F = np.float32
BAD = {
    "missing x_test": (dict(x_test=None), "no array 'x_test'; found x_train, y_train"),
    "missing y_train": (dict(y_train=None), "no array 'y_train'"),
    "lengths": (dict(y_test=np.arange(2)), "x_test holds 3 examples but y_test 2"),
    "int32 input": (
        dict(x_train=np.zeros((6, 5, 4, 3), np.int32)),
        r"x_train is int32 \(6, 5, 4, 3\), wanted uint8 or float32",
    ),
    "rank 1": (dict(x_train=np.zeros(6, F)), r"x_train is float32 \(6,\), wanted"),
    "rank 0": (dict(x_train=np.float32(1)), r"x_train is float32 \(\), wanted"),
    "empty": (dict(x_test=np.zeros((0, 5, 4, 3), np.uint8)), "at least one example"),
    "no pixels": (dict(x_test=np.zeros((3, 0, 4, 3), F)), "at least one example"),
    "nan": (
        dict(x_train=nan(6, 5, 4, 3), x_test=np.zeros((3, 5, 4, 3), F)),
        "x_train holds NaN or infinite values in 1 of 6 examples, first in number 2",
    ),
    "overflow": (
        dict(x_train=np.full((6, 2), 1e300), x_test=np.zeros((3, 2))),
        "x_train holds NaN or infinite values in 6 of 6",
    ),
    "nan target": (
        dict(y_train=nan(6), y_test=np.zeros(3)),
        "y_train holds NaN",
    ),
    "shapes": (
        dict(x_test=np.zeros((3, 5, 5, 3), np.uint8)),
        r"x_train is uint8 \(6, 5, 4, 3\) but x_test is uint8 \(3, 5, 5, 3\)",
    ),
    "dtypes": (dict(x_test=np.zeros((3, 5, 4, 3), F)), "but x_test is float32"),
    "kinds of label": (dict(y_test=np.zeros(3)), "y_train is int32.*y_test is float32"),
    "negative": (dict(y_test=np.array([0, -1, 1])), "y_test holds labels from -1 to 1"),
    "column": (
        dict(y_train=np.zeros((6, 1), int)),
        r"y_train is int64 \(6, 1\), wanted integers \(n,\)",
    ),
    "text labels": (dict(y_train=np.array(list("abcabc"))), "y_train is <U1"),
    "beyond the classes": (
        dict(classes=np.array(["a", "b"])),
        r"y_train holds the label 2 \(number 2\), wanted less than 2",
    ),
    "ids as labels": (
        dict(y_test=np.array([0, 90210, 1])),
        "y_test holds the label 90210 .*wanted less than 6",
    ),
    "classes twice": (dict(classes=np.array(["a", "b", "a"])), "distinct strings"),
    "classes numbers": (dict(classes=np.arange(3)), "classes is int64"),
    "pickled": (
        dict(y_train=np.array([0, 1, 2, 0, 1, None], object)),
        "y_train cannot be read as .npz without pickles: Object arrays",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(tmp_path, name):
    changes, message = BAD[name]
    path = save(tmp_path, **changes)
    with pytest.raises(ConvnetError, match=message) as caught:
        arrays.load(path)
    assert str(caught.value).startswith(path)


def test_no_npz_at_all(tmp_path):
    path = tmp_path / "data.npz"
    np.save(tmp_path / "one.npy", np.zeros(3))
    for content in (
        b"",
        b"text",
        b"PK\3\4damaged",
        (tmp_path / "one.npy").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(ConvnetError, match="data.npz: it cannot be read as .npz"):
            arrays.load(str(path))
    np.savez_compressed(path, **good())
    damaged = bytearray(path.read_bytes())
    damaged[200:260] = b"\0" * 60
    path.write_bytes(damaged)
    with pytest.raises(ConvnetError, match="x_train cannot be read"):
        arrays.load(str(path))
    with pytest.raises(UsageError, match="no such file"):
        arrays.load(str(tmp_path))
    with pytest.raises(UsageError, match="data.dir is empty"):
        arrays.load("")
