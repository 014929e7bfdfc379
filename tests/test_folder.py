"""Image folders: layouts, splits by content, and what is wrong with a folder."""

import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from convnet.data import folder
from convnet.data.decode import DecodeError
from convnet.data.resize import Resize
from convnet.data.source import read
from convnet.errors import ConvnetError, UsageError

RNG = np.random.default_rng(0)


def picture(path, size=(6, 5)):
    """Writes one random PNG (width, height) and returns its pixels."""
    pixels = RNG.integers(0, 256, (*size[::-1], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
    return pixels


def load(root, size=0, test_fraction=0.2):
    return folder.load(str(root), size, Resize(), test_fraction)


def ids(source):
    return [source[i]["id"] for i in range(len(source))]


def two_splits(root, test="test"):
    return {
        name: picture(root / name)
        for name in (
            "train/dog/b.png",
            "train/dog/a.png",
            "train/cat/c.png",
            f"{test}/cat/d.png",
            f"{test}/dog/e.png",
        )
    }


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_train_and_test_folders(tmp_path, test):
    pictures = two_splits(tmp_path, test)
    dataset = load(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert ids(dataset.train) == [
        "train/cat/c.png",
        "train/dog/a.png",
        "train/dog/b.png",
    ]
    assert ids(dataset.test) == [f"{test}/cat/d.png", f"{test}/dog/e.png"]
    for source in (dataset.train, dataset.test):
        for i in range(len(source)):
            record = source[i]
            np.testing.assert_array_equal(record["input"], pictures[record["id"]])
            assert record["label"] == ("dog" in record["id"])
            assert record["label"].dtype == np.int32


def test_resizes(tmp_path):
    for name in ("train/a/1", "train/b/2", "test/a/3", "test/b/4"):
        picture(tmp_path / name, (int(RNG.integers(5, 90)), 40))
    dataset = load(tmp_path, size=8)
    assert {r["input"].shape for r in read(dataset.train, [0, 1])} == {(8, 8, 3)}


def test_junk_is_skipped_and_other_files_are_bad_images(tmp_path):
    two_splits(tmp_path)
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", ".hidden.png"):
        (tmp_path / "train/cat" / name).write_bytes(b"junk")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "train/labels.csv").write_text("a,b")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "train/cat/notes.txt").write_text("no picture")
    (tmp_path / "train/dog/empty.png").write_bytes(b"")
    os.symlink(tmp_path / "nowhere", tmp_path / "train/dog/lost.png")
    os.symlink(tmp_path / "train/dog/loop.png", tmp_path / "train/dog/loop.png")
    os.mkfifo(tmp_path / "train/dog/pipe.png")
    train = load(tmp_path).train
    records = read(train, range(len(train)))
    bad = {r.id: r.reason for r in records if isinstance(r, DecodeError)}
    assert set(bad) == {
        "train/cat/notes.txt",
        "train/dog/empty.png",
        "train/dog/lost.png",
        "train/dog/loop.png",
    }
    assert bad["train/dog/lost.png"] == "No such file or directory"
    assert len(records) == 3 + 4
    with pytest.raises(DecodeError, match="notes.txt: not an image"):
        train[1]


def test_links_are_followed_and_loops_end(tmp_path):
    picture(tmp_path / "store/x.png")
    two_splits(tmp_path / "data")
    os.symlink(tmp_path / "store/x.png", tmp_path / "data/train/cat/x.png")
    assert len(load(tmp_path / "data").train) == 4
    os.symlink(tmp_path / "data", tmp_path / "data/train/cat/again")
    with pytest.raises(ConvnetError, match="train/cat holds a folder, again"):
        load(tmp_path / "data")


def flat(root, count=60):
    for label in ("x", "y"):
        for i in range(count):
            picture(root / label / f"{i:03}.png")


def by_content(dataset):
    """Which side each picture lies on, by its pixels."""
    return {
        source[i]["input"].tobytes(): side
        for side, source in (("train", dataset.train), ("test", dataset.test))
        for i in range(len(source))
    }


def test_split_by_content_is_the_documented_hash(tmp_path):
    flat(tmp_path)
    dataset = load(tmp_path, test_fraction=0.3)
    want = sorted(
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.glob("*/*")
        if int(hashlib.sha256(path.read_bytes()).hexdigest()[:16], 16) < 0.3 * 2**64
    )
    assert ids(dataset.test) == want
    assert len(dataset.train) + len(dataset.test) == 120
    assert 0.15 < len(want) / 120 < 0.45


def test_split_survives_renaming_adding_and_copying(tmp_path):
    flat(tmp_path)
    before = by_content(load(tmp_path))
    for path in sorted(tmp_path.glob("x/*")):
        path.rename(path.with_name(f"renamed-{path.stem}.jpeg"))
    for i in range(20):
        picture(tmp_path / "y" / f"added-{i}.png")
    copied = sorted(tmp_path.glob("y/0*"))[:10]
    for path in copied:
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    dataset = load(tmp_path)
    after = by_content(dataset)
    assert {key: after[key] for key in before} == before
    assert len(dataset.train) + len(dataset.test) == 120 + 20 + 10
    # No picture on both sides, although ten of them exist twice.
    assert len(after) == 140


def test_split_that_leaves_nothing_is_refused(tmp_path):
    flat(tmp_path, 3)
    with pytest.raises(ConvnetError, match="test_fraction=0.0 leaves no test images"):
        load(tmp_path, test_fraction=0.0)
    with pytest.raises(ConvnetError, match="leaves class 'x' no training images of 6"):
        load(tmp_path, test_fraction=1.0)


def test_a_class_may_be_named_train(tmp_path):
    for label in ("train", "bus"):
        for i in range(20):
            picture(tmp_path / label / f"{i}.png")
    assert load(tmp_path).classes == ("bus", "train")


def top_level_images(root):
    two_splits(root)
    picture(root / "train/loose.png")


def deeper(root):
    two_splits(root)
    picture(root / "train/cat/tabby/z.png")


def no_test(root):
    picture(root / "train/a/1.png")
    picture(root / "train/b/1.png")


def no_train(root):
    picture(root / "val/a/1.png")
    picture(root / "val/b/1.png")


def other_classes(root):
    two_splits(root)
    (root / "test/dog").rename(root / "test/wolf")


def empty_class(root):
    two_splits(root)
    (root / "train/eel").mkdir()
    (root / "train/eel/.DS_Store").write_bytes(b"")


def only_files(root):
    picture(root / "a.png")


def one_class(root):
    picture(root / "images/a.png")


def nothing(root):
    root.mkdir(exist_ok=True)


LAYOUTS = {
    top_level_images: "images lie directly in train: loose.png",
    deeper: "train/cat holds a folder, tabby",
    no_test: r"there is no folder test \(or val, validation\)",
    no_train: "there is no folder train",
    other_classes: "classes differ: only train has dog; only test has wolf",
    empty_class: "train/eel holds no images",
    only_files: "images lie directly in the folder: a.png",
    one_class: "1 class folders in the folder",
    nothing: "0 class folders",
}


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_wrong_layouts_show_what_was_found(tmp_path, make):
    make(tmp_path)
    with pytest.raises(ConvnetError, match=LAYOUTS[make]) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path)) and "Wanted: train/CLASS/*" in text
    top = [name for name in os.listdir(tmp_path) if (tmp_path / name).is_dir()]
    assert all(f"  {name}/" in text for name in top)


def test_shown_tree_is_short(tmp_path):
    for i in range(50):
        picture(tmp_path / f"train/c{i:02}/deep/x.png")
    with pytest.raises(ConvnetError, match="46 more folders") as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) < 20


def test_missing_folder_and_empty_setting(tmp_path):
    with pytest.raises(UsageError, match="data.dir='.*lost': no such folder"):
        load(tmp_path / "lost")
    with pytest.raises(UsageError, match="data.dir is empty"):
        load("")


def test_different_sizes_without_image_size(tmp_path):
    two_splits(tmp_path)
    picture(tmp_path / "test/dog/e.png", (7, 5))
    wanted = "train/cat/c.png is 6x5, test/dog/e.png is 7x5; set data.image_size"
    with pytest.raises(ConvnetError, match=wanted):
        load(tmp_path)
    assert len(load(tmp_path, size=4).test) == 2


def test_different_size_that_the_first_look_misses(tmp_path):
    for i in range(100):
        picture(tmp_path / "train/a" / f"{i:03}.png")
    for name in ("train/b/x", "test/a/x", "test/b/x"):
        picture(tmp_path / name)
    picture(tmp_path / "train/a/050.png", (9, 9))
    train = load(tmp_path).train
    with pytest.raises(ConvnetError, match="train/a/000.png is 6x5, train/a/050.png"):
        [train[i] for i in range(len(train))]


def test_source_survives_pickling(tmp_path):
    pictures = two_splits(tmp_path)
    train = pickle.loads(pickle.dumps(load(tmp_path).train))
    np.testing.assert_array_equal(train[0]["input"], pictures["train/cat/c.png"])


def test_names_that_are_no_text(tmp_path):
    two_splits(tmp_path)
    source = os.fsencode(tmp_path / "train/cat/c.png")
    os.rename(source, source.replace(b"c.png", b"\xff.png"))
    record = load(tmp_path).train[0]
    assert record["id"] == r"train/cat/\xff.png"
    record["id"].encode()


def test_shared_folders(shared_data):
    dataset = folder.load(str(shared_data / "cat_vs_noncat"), 0, Resize(), 0.2)
    assert (len(dataset.train), len(dataset.test)) == (209, 50)
    assert dataset.classes == ("cat", "non-cat")
    assert dataset.train[208]["input"].shape == (64, 64, 3)
    labels = [int(dataset.train[i]["label"]) for i in range(209)]
    assert np.bincount(labels).tolist() == [
        len(list((shared_data / "cat_vs_noncat/train" / c).iterdir()))
        for c in dataset.classes
    ]
    dataset = folder.load(str(shared_data / "cats_and_dogs"), 64, Resize(), 0.2)
    assert (len(dataset.train), len(dataset.test)) == (2000, 1000)
    assert dataset.test[999]["input"].shape == (64, 64, 3)
    with pytest.raises(ConvnetError, match="images differ in size.*data.image_size"):
        folder.load(str(shared_data / "cats_and_dogs"), 0, Resize(), 0.2)
