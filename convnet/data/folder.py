"""Image folders: train/CLASS/* and test/CLASS/*, or CLASS/* split by content."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convnet.data import decode as decode_lib
from convnet.data.cache import Cache
from convnet.data.decode import DecodeError, FirstShape
from convnet.data.resize import Resize
from convnet.data.source import Dataset
from convnet.errors import ConvnetError, UsageError

_TEST_NAMES = ("test", "val", "validation")
_JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_WANTED = (
    "Wanted: train/CLASS/* and test/CLASS/* (or val, validation) with the same classes,"
    " or CLASS/* with at least two classes; images lie directly in the class folders."
)
_CHECKED_AT_LOAD = 32  # files of each split whose sizes are compared at once


class FolderSource:
    """Images of class folders, sorted by class and name.

    Args:
        root: the folder that `files` are relative to.
        files: paths with forward slashes; they are also the records' ids.
        labels: int32 (n,), the index of each file's class.
        size, resize: as in `decode`.
        first: the shape that all images share when size is 0.
        cache: holds decoded images.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: np.ndarray,
        size: int,
        resize: Resize,
        first: FirstShape | None,
        cache: Cache | None,
    ):
        self.root = root
        self.files = tuple(files)
        self.labels = labels
        self.size = size
        self.resize = resize
        self.first = first
        self.decode = cache.decode if cache else decode_lib.decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        path, id = os.path.join(self.root, file), _printable(file)
        pixels = self.decode(path, id, size=self.size, resize=self.resize)
        if self.first is not None:
            self.first.check(pixels.shape, id)
        return {"input": pixels, "label": self.labels[index], "id": id}


def load(
    directory: str,
    size: int,
    resize: Resize,
    test_fraction: float,
    cache: Cache | None = None,
) -> Dataset:
    """Opens an image folder; every image becomes RGB.

    Without train and test folders the split follows the content: a file is a test
    image if the SHA-256 of its bytes, as a number from 0 to 1, is below
    `test_fraction`. So a renamed or an added file moves no other, and identical copies
    lie on the same side. A file that is no image counts as a bad image when it is read.

    Args:
        directory: the folder, `data.dir`.
        size, resize: as in `decode`.
        test_fraction: share of test images where the folder has no split of its own.
        cache: holds decoded images.

    Raises:
        ConvnetError: the layout is another, with what was found and what is wanted; or
            size is 0 and the images differ in size.
    """
    if not directory:
        raise UsageError(
            "data.dir is empty: data.name='folder' wants a folder of images"
        )
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UsageError(f"data.dir={directory!r}: no such folder")
    found = _folders(root)
    test_name = next((name for name in _TEST_NAMES if name in found), None)
    # A class may itself be named "train": then images lie in it, not folders.
    if any(_folders(root / name) for name in ("train", *_TEST_NAMES) if name in found):
        if "train" not in found or test_name is None:
            missing = "test (or val, validation)" if "train" in found else "train"
            raise _layout_error(root, f"there is no folder {missing}")
        classes, train = _class_files(root, "train")
        test_classes, test = _class_files(root, test_name)
        if classes != test_classes:
            raise _layout_error(root, _difference(classes, test_classes, test_name))
    else:
        classes, files = _class_files(root, "")
        train, test = _split(root, files, test_fraction)
        missing = set(range(len(classes))) - {label for _, label in train}
        if missing or not test:
            lacking = (
                f"class {classes[min(missing)]!r} no training" if missing else "no test"
            )
            raise ConvnetError(
                f"{directory}: data.test_fraction={test_fraction} leaves {lacking} "
                f"images of {len(files)}; change it, or make folders train and test"
            )
    first = None
    if not size:
        first = _first_shape(root, train + test)
        for split in (train, test):
            _check_some(root, split, first)
    sources = [
        FolderSource(
            str(root),
            [file for file, _ in split],
            np.array([label for _, label in split], np.int32),
            size,
            resize,
            first,
            cache,
        )
        for split in (train, test)
    ]
    return Dataset(*sources, tuple(_printable(name) for name in classes))


def _printable(name: str) -> str:
    """File names may hold bytes that are no text; ids and classes may not."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, sorted, without hidden files and well-known junk."""
    with os.scandir(folder) as entries:
        kept = (
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower() not in _JUNK
        )
        return sorted(kept, key=lambda entry: entry.name)


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False


def _is_image(entry: os.DirEntry) -> bool:
    """A regular file; or a link that leads nowhere, which is a bad image later.

    Pipes and devices are left out, because reading them could wait for ever.
    """
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:  # a loop of symbolic links
        return True


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if _is_dir(entry)]


def _class_files(root: Path, split: str) -> tuple[list[str], list[tuple[str, int]]]:
    """The classes of a split ("" for the root itself) and its (file, label) pairs."""
    entries = _entries(root / split)
    classes = [entry.name for entry in entries if _is_dir(entry)]
    where = split or "the folder"
    loose = [e.name for e in entries if e.name.lower().endswith(_IMAGE_SUFFIXES)]
    loose = [name for name in loose if name not in classes]
    if loose:
        raise _layout_error(root, f"images lie directly in {where}: {loose[0]}")
    if len(classes) < 2:
        raise _layout_error(root, f"{len(classes)} class folders in {where}")
    files = []
    for label, name in enumerate(classes):
        prefix = f"{split}/{name}" if split else name
        entries = _entries(root / prefix)
        deeper = [entry.name for entry in entries if _is_dir(entry)]
        if deeper:
            raise _layout_error(root, f"{prefix} holds a folder, {deeper[0]}")
        images = [f"{prefix}/{entry.name}" for entry in entries if _is_image(entry)]
        if not images:
            raise _layout_error(root, f"{prefix} holds no images")
        files += [(image, label) for image in images]
    return classes, files


def _split(
    root: Path, files: list[tuple[str, int]], test_fraction: float
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Splits by the hash of the content; reads every file once."""

    def is_test(item: tuple[str, int]) -> bool:
        try:
            with open(root / item[0], "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return False  # unreadable: a bad image of the training split
        return int.from_bytes(digest[:8]) / 2**64 < test_fraction

    with ThreadPoolExecutor(8) as pool:
        sides = list(pool.map(is_test, files))
    pairs = list(zip(files, sides, strict=True))
    return [f for f, test in pairs if not test], [f for f, test in pairs if test]


def _first_shape(root: Path, files: list[tuple[str, int]]) -> FirstShape | None:
    """The shape of the first readable image; None if there is none."""
    for file, _ in files:
        try:
            return FirstShape.of(str(root / file), _printable(file))
        except DecodeError:
            continue
    return None


def _check_some(
    root: Path, files: list[tuple[str, int]], first: FirstShape | None
) -> None:
    """Compares a few headers, so that most mixed folders fail before a run starts."""
    step = -(-len(files) // _CHECKED_AT_LOAD)
    for file, _ in files[::step] if first else []:
        try:
            other = FirstShape.of(str(root / file), _printable(file))
        except DecodeError:
            continue
        first.check(other.shape, other.id)


def _difference(train: list[str], test: list[str], test_name: str) -> str:
    parts = []
    for name, only in (
        ("train", sorted(set(train) - set(test))),
        (test_name, sorted(set(test) - set(train))),
    ):
        if only:
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            parts.append(f"only {name} has {', '.join(only[:5])}{more}")
    return "the classes differ: " + "; ".join(parts)


def _layout_error(root: Path, what: str) -> ConvnetError:
    return ConvnetError(
        "\n".join([f"{root}: {what}.", "Found:", *_tree(root, "  ", 3), _WANTED])
    )


def _tree(folder: Path, indent: str, depth: int) -> list[str]:
    """A short picture of a folder: at most 4 folders a level, files as a count."""
    try:
        entries = _entries(folder)
    except OSError as error:
        return [f"{indent}({error.strerror})"]
    folders = [entry.name for entry in entries if _is_dir(entry)]
    files = [entry.name for entry in entries if entry.name not in folders]
    lines = []
    for name in folders[:4]:
        lines.append(f"{indent}{_printable(name)}/")
        if depth > 1:
            lines += _tree(folder / name, indent + "  ", depth - 1)
    if len(folders) > 4:
        lines.append(f"{indent}... {len(folders) - 4} more folders")
    if files:
        lines.append(f"{indent}{len(files)} files, {_printable(files[0])} ...")
    return lines or [f"{indent}(empty)"]
