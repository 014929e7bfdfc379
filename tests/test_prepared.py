"""Prepared TFDS datasets: written here record by record, and the shared CIFAR-10."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from convnet.data import cifar, prepared
from convnet.data.decode import DecodeError
from convnet.data.resize import Resize
from convnet.data.source import read
from convnet.errors import ConvnetError, UsageError

RNG = np.random.default_rng(0)
_CONNECTOR = "tensorflow_datasets.core.features."


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


def example(image, label):
    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(image)
    record.features.feature["label"].int64_list.value.append(label)
    record.features.feature["note"].bytes_list.value.append(b"ignored")
    return record.SerializeToString()


def write(
    folder,
    splits,
    shape=("5", "4", "3"),
    file_format="array_record",
    image=True,
    shards=2,
):
    """A dataset in TFDS's layout; each split a list of (image bytes, label)."""
    folder.mkdir(parents=True)
    name = next(
        p.name for p in folder.parents if "." not in p.name and "-" not in p.name
    )
    infos = []
    for split, records in splits.items():
        parts = [records[i::shards] for i in range(shards)]
        for i, part in enumerate(parts):
            path = folder / f"{name}-{split}.array_record-{i:05}-of-{shards:05}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record in part:
                writer.write(record if isinstance(record, bytes) else example(*record))
            writer.close()
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(part)) for part in parts],
            }
        )
    info = {
        "fileFormat": file_format,
        "name": name,
        "splits": infos,
        "version": folder.name,
    }
    features = {
        "note": {"pythonClassName": _CONNECTOR + "text_feature.Text", "text": {}},
        "label": {
            "pythonClassName": _CONNECTOR + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "2"},
        },
    }
    if image:
        features["image"] = {
            "pythonClassName": _CONNECTOR + "image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": list(shape)}},
        }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": _CONNECTOR + "features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    (folder / "label.labels.txt").write_text("no\nyes\n")


def pictures(count, channels=3):
    return RNG.integers(0, 256, (count, 5, 4, channels), np.uint8)


def labelled(images):
    return [(png(image), i % 2) for i, image in enumerate(images)]


def load(root, name="toy", size=0):
    return prepared.load(name, str(root), size, Resize("squash"))


def in_file_order(items, shards=2):
    return [item for i in range(shards) for item in items[i::shards]]


@pytest.mark.parametrize("channels", [1, 3])
def test_reads_what_was_written(tmp_path, channels):
    train, test = pictures(7, channels), pictures(4, channels)
    splits = {"train": labelled(train), "test": labelled(test)}
    write(tmp_path / "toy/1.0.0", splits, ("5", "4", str(channels)))
    dataset = load(tmp_path)
    assert dataset.classes == ("no", "yes")
    for split, source, images in (
        ("train", dataset.train, train),
        ("test", dataset.test, test),
    ):
        assert len(source) == len(images)
        batch = read(source, np.arange(len(source)))
        for i, want in enumerate(in_file_order(list(enumerate(images)))):
            for record in (source[i], batch[i]):
                np.testing.assert_array_equal(record["input"], want[1])
                assert record["label"] == want[0] % 2
                assert record["label"].dtype == np.int32
                assert record["id"] == f"{split}/{i}"
    with pytest.raises(IndexError):
        dataset.train[7]
    assert load(tmp_path, size=8).test[0]["input"].shape == (8, 8, channels)


def test_finds_versions_configurations_and_direct_folders(tmp_path):
    splits = {"train": labelled(pictures(3)), "test": labelled(pictures(2))}
    longer = splits | {"train": labelled(pictures(5))}
    write(tmp_path / "toy/2.0.0", splits)
    write(tmp_path / "toy/10.0.0", longer)
    assert len(load(tmp_path).train) == 5
    assert len(load(tmp_path, "toy:2.0.0").train) == 3
    assert len(load(tmp_path / "toy/2.0.0").train) == 3
    assert len(load(tmp_path / "toy").train) == 5
    write(tmp_path / "set/small-a/1.0.0", splits)
    assert len(load(tmp_path, "set").train) == 3
    write(tmp_path / "set/large-a/1.0.0", longer)
    with pytest.raises(ConvnetError, match="set/large-a, set/small-a"):
        load(tmp_path, "set")
    assert len(load(tmp_path, "set/large-a").train) == 5
    with pytest.raises(ConvnetError, match="holds 'toy', but data.name is 'other'"):
        load(tmp_path / "toy/2.0.0", "other")
    with pytest.raises(UsageError, match="data.name='../x'"):
        load(tmp_path, "../x")


def test_validation_stands_in_for_a_test_split_without_labels(tmp_path):
    unlabelled = [(png(image), -1) for image in pictures(3)]
    splits = {"train": labelled(pictures(3)), "test": unlabelled}
    write(tmp_path / "toy/1.0.0", splits)
    with pytest.raises(ConvnetError, match="splits are train, test, those with labels"):
        load(tmp_path)
    splits["validation"] = labelled(pictures(4))
    write(tmp_path / "toy/1.1.0", splits)
    assert load(tmp_path).test[0]["id"] == "validation/0"


def test_bad_records_spare_the_others(tmp_path):
    records = labelled(pictures(6))
    records[1] = (b"no image", 0)
    records[2] = b"no example"
    records[3] = (records[3][0][:-30], 1)
    records[4] = (records[4][0], 7)
    write(tmp_path / "toy/1.0.0", {"train": records, "test": records[:1]}, shards=1)
    train = load(tmp_path).train
    results = read(train, range(6))
    bad = {r.id: r.reason for r in results if isinstance(r, DecodeError)}
    assert list(bad) == ["train/1", "train/2", "train/3", "train/4"]
    assert bad["train/1"].startswith("not an image in JPEG")
    assert bad["train/2"].startswith("the record is damaged")
    assert bad["train/4"] == "the label 7 is not one of the classes"
    with pytest.raises(DecodeError, match="train/3: .*truncated"):
        train[3]


def test_damaged_file_ends_as_decode_errors(tmp_path):
    splits = {"train": labelled(pictures(40)), "test": labelled(pictures(2))}
    write(tmp_path / "toy/1.0.0", splits)
    path = tmp_path / "toy/1.0.0/toy-train.array_record-00001-of-00002"
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    train = load(tmp_path).train
    results = read(train, range(40))
    assert not any(isinstance(record, DecodeError) for record in results[:20])
    bad = [record for record in results[20:] if isinstance(record, DecodeError)]
    assert bad and bad[0].id.startswith("train/")


def test_incomplete_or_foreign_datasets(tmp_path):
    splits = {"train": labelled(pictures(3)), "test": labelled(pictures(2))}
    write(tmp_path / "lost/1.0.0", splits)
    (tmp_path / "lost/1.0.0/lost-test.array_record-00001-of-00002").unlink()
    with pytest.raises(
        ConvnetError, match="00001-of-00002: no such file; prepare lost"
    ):
        load(tmp_path, "lost")
    write(tmp_path / "old/1.0.0", splits, file_format="tfrecord")
    with pytest.raises(ConvnetError, match="format is tfrecord, wanted array_record"):
        load(tmp_path, "old")
    write(tmp_path / "text/1.0.0", splits, image=False)
    with pytest.raises(ConvnetError, match="0 features of kind Image among"):
        load(tmp_path, "text")
    write(tmp_path / "depth/1.0.0", splits)
    features = tmp_path / "depth/1.0.0/features.json"
    content = features.read_text().replace('"3"', '"1"').replace("uint8", "float32")
    features.write_text(content)
    with pytest.raises(ConvnetError, match="'image' holds float32 images"):
        load(tmp_path, "depth")
    write(tmp_path / "broken/1.0.0", splits)
    (tmp_path / "broken/1.0.0/dataset_info.json").write_text("{")
    with pytest.raises(ConvnetError, match="broken/1.0.0: not a prepared dataset"):
        load(tmp_path, "broken")


def test_different_sizes_without_image_size(tmp_path):
    records = labelled(pictures(3)) + [(png(np.zeros((6, 4, 3), np.uint8)), 1)]
    splits = {"train": records, "test": labelled(pictures(2))}
    write(tmp_path / "toy/1.0.0", splits, ("-1", "-1", "3"), shards=1)
    train = load(tmp_path).train
    with pytest.raises(
        ConvnetError, match="train/0 is 4x5, train/3 is 4x6; set data.im"
    ):
        read(train, range(4))


def test_unprepared_name_shows_the_near_one(tmp_path):
    write(tmp_path / "flowers/1.0.0", {"train": labelled(pictures(2))})
    with pytest.raises(ConvnetError) as caught:
        load(tmp_path, "flower")
    text = str(caught.value)
    assert f"not prepared in {tmp_path} (found there: flowers)" in text
    assert "did you mean 'flowers'?" in text and "download_and_prepare" in text
    with pytest.raises(ConvnetError, match="did you mean 'digits'"):
        load(tmp_path, "digts")


def test_cifar_is_prepared_on_demand(tmp_path, monkeypatch):
    def prepare(name, data_dir):
        splits = {"train": labelled(pictures(3)), "test": labelled(pictures(2))}
        write(tmp_path / "cifar10/3.0.2", splits)
        assert (name, data_dir) == ("cifar10", str(tmp_path))

    monkeypatch.setattr(cifar, "prepare", prepare)
    assert len(load(tmp_path, "cifar10").train) == 3


def test_survives_pickling_and_threads(tmp_path):
    images = pictures(64)
    splits = {"train": labelled(images), "test": labelled(images[:2])}
    write(tmp_path / "toy/1.0.0", splits, shards=1)
    train = load(tmp_path).train
    train[0]  # opened, and still it can be pickled
    again = pickle.loads(pickle.dumps(train))
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda i: read(again, [i, 63 - i]), range(64)))
    for i, (low, high) in enumerate(batches):
        np.testing.assert_array_equal(low["input"], images[i])
        np.testing.assert_array_equal(high["input"], images[63 - i])


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    splits = {"train": labelled(pictures(150)), "test": labelled(pictures(2))}
    write(tmp_path / "toy/1.0.0", splits, shards=150)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        already = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (already + 60, limits[1]))
        records = read(load(tmp_path).train, range(150))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not any(isinstance(record, DecodeError) for record in records)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with pytest.raises(ConvnetError, match="150 files have to be open .* limit is 64"):
        load(tmp_path)


def test_tensorflow_stays_out(tmp_path):
    """In a process where importing TensorFlow fails loudly, as if it were installed."""
    splits = {"train": labelled(pictures(3)), "test": labelled(pictures(2))}
    write(tmp_path / "toy/1.0.0", splits)
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('imported')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from convnet.data import prepared, resize\n"
        "dataset = prepared.load('toy', sys.argv[1], 0, resize.Resize())\n"
        "print(dataset.train[0]['input'].shape, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("(5, 4, 3) False\n", "")


def test_shared_cifar10(shared_data):
    dataset = load(shared_data / "tfds", "cifar10")
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    assert dataset.classes[3] == "cat"
    file = shared_data / "tfds/cifar10/3.0.2/cifar10-test.array_record-00000-of-00001"
    reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0")
    examples = [tf_example_pb2.Example.FromString(r) for r in reader.read_all()]
    images = [e.features.feature["image"].bytes_list.value[0] for e in examples]
    for i in (0, 5, 9_999):
        want = np.asarray(Image.open(io.BytesIO(images[i])).convert("RGB"))
        np.testing.assert_array_equal(dataset.test[i]["input"], want)
    labels = [int(record["label"]) for record in read(dataset.test, range(10_000))]
    assert np.bincount(labels).tolist() == [1000] * 10
    stored = [e.features.feature["label"].int64_list.value[0] for e in examples]
    assert labels == stored
