"""load: the built-in datasets, the limits, resizing, and what importing costs."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from convnet.data import source
from convnet.errors import ConvnetError


def settings(**changes):
    values = {
        "name": "digits",
        "dir": "",
        "image_size": 0,
        "resize": "crop",
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "test_fraction": 0.2,
        "train_limit": 0,
        "test_limit": 0,
        "cache": "none",
    }
    return SimpleNamespace(**(values | changes))


@pytest.fixture(scope="module")
def digits():
    return source.load(settings(), seed=0)


def test_digits_hold_every_image_once_and_lossless(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.classes == tuple("0123456789")
    record = digits.train[0]
    assert record["input"].shape == (8, 8, 1) and record["input"].dtype == np.uint8
    assert record["label"].dtype == np.int32 and record["id"] == "train/0"
    inputs = np.concatenate([digits.train.inputs, digits.test.inputs])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    assert inputs.min() == 0 and inputs.max() == 255
    images, want = load_digits(return_X_y=True)
    steps = np.rint(inputs.reshape(-1, 64) / 255 * 16)
    ours = np.concatenate([steps, labels[:, None]], 1)
    theirs = np.concatenate([images, want[:, None]], 1)
    np.testing.assert_array_equal(
        ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)]
    )


def test_digits_split_is_stratified_and_independent_of_the_seed(digits):
    train, test = (np.bincount(s.labels) for s in (digits.train, digits.test))
    assert np.abs(test - (train + test) * 360 / 1797).max() <= 1
    other = source.load(settings(), seed=1)
    np.testing.assert_array_equal(other.test.inputs, digits.test.inputs)


def test_limits_keep_evenly_spaced_records(digits):
    dataset = source.load(settings(train_limit=5, test_limit=400), 0)
    assert (len(dataset.train), len(dataset.test)) == (5, 360)
    ids = [record["id"] for record in source.read(dataset.train, range(5))]
    assert ids == [f"train/{i}" for i in (0, 359, 718, 1077, 1436)]


def test_limit_of_a_folder_source(shared_data):
    folder = str(shared_data / "cat_vs_noncat")
    whole = source.load(settings(name="folder", dir=folder), 0)
    few = source.load(settings(name="folder", dir=folder, train_limit=7), 0)
    assert (len(few.train), len(few.test)) == (7, 50)
    few = pickle.loads(pickle.dumps(few.train))
    # Sorted by class, the first seven would be one class.
    ids = [record["id"] for record in source.read(few, range(7))]
    assert ids == [whole.train[34 * i + 2 * i // 3]["id"] for i in range(7)]
    assert {id.split("/")[1] for id in ids} == {"cat", "non-cat"}
    with pytest.raises(IndexError):
        few[7]


def test_images_in_memory_are_resized(digits):
    dataset = source.load(settings(image_size=16), 0)
    record = dataset.train[3]["input"]
    assert record.shape == (16, 16, 1)
    want = ndimage.zoom(
        digits.train[3]["input"][..., 0].astype(float),
        2,
        order=1,
        mode="nearest",
        grid_mode=True,
    )
    assert np.abs(record[..., 0] - want).max() <= 1
    assert source.load(settings(image_size=8), 0).train[3]["input"].shape == (8, 8, 1)


def test_series_cannot_be_resized(tmp_path):
    x, y = np.zeros((4, 9, 2), np.float32), np.arange(4) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = settings(name="arrays", dir=str(tmp_path / "a.npz"))
    assert source.load(data, 0).train[0]["input"].shape == (9, 2)
    data.image_size = 8
    with pytest.raises(
        ConvnetError, match=r"image_size=8 .*'arrays' holds float32 \(9"
    ):
        source.load(data, 0)


def test_generated_follow_the_seed():
    data = settings(name="cylinder_bell_funnel")
    first, again, other = (source.load(data, seed) for seed in (0, 0, 1))
    record = first.train[2]["input"]
    np.testing.assert_array_equal(record, again.train[2]["input"])
    assert not np.array_equal(record, other.train[2]["input"])


def test_array_source_survives_pickling(digits):
    again = pickle.loads(pickle.dumps(digits))
    np.testing.assert_array_equal(again.test[7]["input"], digits.test[7]["input"])
    assert digits.test[-1]["id"] == "test/359"


def test_importing_is_light():
    heavy = "tensorflow", "tensorflow_datasets", "array_record", "sklearn", "PIL", "jax"
    program = (
        "import sys, convnet.data.source\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
