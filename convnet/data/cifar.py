"""CIFAR-10 and CIFAR-100 from their makers' archives, prepared as TFDS stores them.

TFDS prepares these datasets with TensorFlow; here the same examples (same ids, same
order, lossless PNG) become ArrayRecord files without it, which TFDS then reads as its
own. Datasets: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images",
2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import hashlib
import io
import shutil
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

from convnet.data import download
from convnet.errors import ConvnetError

VERSION = "3.0.2"  # of TFDS's cifar10 and cifar100, whose records these are

_HOME = "https://www.cs.toronto.edu/~kriz/"
_IMAGE_BYTES = 3 * 32 * 32  # channels, rows, columns
_LABEL_FILE_BYTES = 1 << 16  # far above any list of 100 names


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What an archive holds. `splits` maps a split to its files and the most examples
    one file holds; `labels` maps a feature to its file of names and their number, in
    the order of the bytes that precede each image."""

    archive: download.Archive
    folder: str
    splits: dict[str, tuple[tuple[str, ...], int]]
    labels: dict[str, tuple[str, int]]


# Sizes and hashes are those that TFDS records in its url_checksums.
_LAYOUTS = {
    "cifar10": _Layout(
        archive=download.Archive(
            file="cifar-10-binary.tar.gz",
            url=_HOME + "cifar-10-binary.tar.gz",
            size=170_052_171,
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        folder="cifar-10-batches-bin",
        splits={
            "train": (tuple(f"data_batch_{i}.bin" for i in range(1, 6)), 10_000),
            "test": (("test_batch.bin",), 10_000),
        },
        labels={"label": ("batches.meta.txt", 10)},
    ),
    "cifar100": _Layout(
        archive=download.Archive(
            file="cifar-100-binary.tar.gz",
            url=_HOME + "cifar-100-binary.tar.gz",
            size=168_513_733,
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
        folder="cifar-100-binary",
        splits={"train": (("train.bin",), 50_000), "test": (("test.bin",), 10_000)},
        labels={
            "coarse_label": ("coarse_label_names.txt", 20),
            "label": ("fine_label_names.txt", 100),
        },
    ),
}

NAMES = tuple(_LAYOUTS)


def prepare(
    name: str,
    data_dir: str | Path,
    *,
    url: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
) -> Path:
    """Makes `data_dir/name/3.0.2` unless it is there, and returns it.

    The archive is taken from `data_dir/downloads` where it lies there whole, else
    downloaded to it; an interrupted download is continued by the next call. Nothing
    appears under the returned path before all of it is written. Processes that call
    this at once wait for the first.

    Args:
      name: "cifar10" or "cifar100".
      data_dir: the TFDS data directory.
      url, size, sha256: an archive other than the published one: address, length in
        bytes, hex digest.

    Raises:
      ConvnetError: no archive (two lines: what failed, what to do), an archive that
        is not what it should be, or a path that cannot be written.
    """
    layout = _LAYOUTS[name]
    given = {"url": url, "size": size, "sha256": sha256}
    archive = dataclasses.replace(
        layout.archive, **{k: v for k, v in given.items() if v is not None}
    )
    data_dir = Path(data_dir).expanduser()
    target = data_dir / name / VERSION
    if (target / "dataset_info.json").is_file():
        return target
    downloads = data_dir / "downloads"
    download.make_folder(downloads)
    download.make_folder(target.parent)
    with download.exclusive(downloads / f".{name}.lock"):
        if (target / "dataset_info.json").is_file():  # made while we waited
            return target
        if target.exists():
            raise ConvnetError(
                f"{target}: is there, but holds no dataset_info.json; move it away, "
                f"so that {name} can be prepared in its place"
            )
        rows, names = _read(layout, download.obtain(archive, downloads))
        # With the lock held, whatever lies here was left by a run that died.
        work = target.with_name(f".{VERSION}.incomplete")
        with download.accessing(work):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                _write(name, layout, rows, names, work)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _read(
    layout: _Layout, path: Path
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Reads the expected members in one pass; nothing is unpacked onto the disk.

    Returns, for each split, uint8 rows (n, labels + 3072), and for each label feature
    its names.
    """
    limits = {}  # most bytes a member may have
    row_bytes = len(layout.labels) + _IMAGE_BYTES
    for files, most in layout.splits.values():
        limits.update({file: most * row_bytes for file in files})
    limits.update({file: _LABEL_FILE_BYTES for file, _ in layout.labels.values()})
    contents = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                if folder != layout.folder or file not in limits:
                    continue
                if not member.isreg() or file in contents:
                    raise ValueError(f"{member.name} is no plain file, or there twice")
                if member.size > limits[file]:
                    raise ValueError(
                        f"{member.name} has {member.size:,} bytes, "
                        f"more than {limits[file]:,}"
                    )
                contents[file] = tar.extractfile(member).read()
        missing = sorted(limits.keys() - contents.keys())
        if missing:
            raise ValueError(f"{missing[0]} is not in {layout.folder}")
        names = {}
        for feature, (file, count) in layout.labels.items():
            names[feature] = contents[file].decode().split()
            if len(names[feature]) != count:
                raise ValueError(f"{file} has {len(names[feature])} names, not {count}")
        rows = {}
        for split, (files, _) in layout.splits.items():
            for file in files:
                if not contents[file] or len(contents[file]) % row_bytes:
                    raise ValueError(
                        f"{file} has {len(contents[file]):,} bytes, "
                        f"which is no multiple of {row_bytes:,}"
                    )
            joined = b"".join(contents.pop(file) for file in files)
            rows[split] = np.frombuffer(joined, np.uint8).reshape(-1, row_bytes)
            for i, (feature, (_, count)) in enumerate(layout.labels.items()):
                if rows[split][:, i].max() >= count:
                    raise ValueError(f"a {feature} of {split} is not below {count}")
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as e:
        raise ConvnetError(f"{path}: is no archive of {layout.folder}: {e}") from e
    return rows, names


def _write(
    name: str,
    layout: _Layout,
    rows: dict[str, np.ndarray],
    names: dict[str, list[str]],
    folder: Path,
) -> None:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    from tqdm import tqdm

    features = tfds.features.FeaturesDict(
        {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
        | {f: tfds.features.ClassLabel(names=n) for f, n in names.items()}
    )
    serializer = ExampleSerializer(features.get_serialized_info())
    infos = []
    print(f"preparing {name} in {folder.parent / VERSION}", file=sys.stderr)
    bar = tqdm(total=sum(map(len, rows.values())), unit=" images", disable=None)
    with bar:
        for split, split_rows in rows.items():
            path = folder / f"{name}-{split}.array_record-00000-of-00001"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            num_bytes = 0
            for index in _order(split, len(split_rows)):
                row = split_rows[index]
                image = row[len(names) :].reshape(3, 32, 32).transpose(1, 2, 0)
                png = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(image)).save(png, "png")
                record = {"id": f"{split}_{index:05d}", "image": png.getvalue()}
                record |= {feature: int(row[i]) for i, feature in enumerate(names)}
                example = serializer.get_tf_example(features.encode_example(record))
                # Without this flag the order of a record's fields is left open.
                encoded = example.SerializeToString(deterministic=True)
                writer.write(encoded)
                num_bytes += len(encoded)
                bar.update()
            writer.close()
            infos.append(tfds.core.SplitInfo(split, [len(split_rows)], num_bytes))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=VERSION,
        check_data=False,  # which takes TensorFlow
        description=f"{layout.folder}: 32x32 colour images, stored as PNG.",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        supervised_keys=("image", "label"),
    )


def _order(split: str, count: int) -> list[int]:
    """The order in which TFDS stores the examples: by salted hash of their index."""

    def key(index: int) -> bytes:
        text = f"{split}{index}".encode()
        return hashlib.md5(text, usedforsecurity=False).digest()

    return sorted(range(count), key=key)
