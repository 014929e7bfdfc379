"""Folders in which TFDS prepared a dataset: finding one, and what may be wrong."""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from convnet.data.source import BUILT_IN
from convnet.errors import ConvnetError, UsageError

DOWNLOADABLE = ("cifar10", "cifar100")
_INFO = "dataset_info.json"


def find(name: str, root: Path) -> Path | None:
    """The folder of the newest version that fits the name; None if there is none."""
    if (root / _INFO).is_file():
        return root
    base, _, version = name.partition(":")
    base, _, config = base.partition("/")
    if base in ("", ".", ".."):
        raise UsageError(f"data.name={name!r}: wanted the name of a dataset")
    parent = root if root.name == base else root / base
    infos = [*parent.glob(f"{config or '*'}/*/{_INFO}")]
    if not config:
        infos += parent.glob(f"*/{_INFO}")
    folders = [path.parent for path in infos]
    folders = [f for f in folders if re.fullmatch(r"\d+\.\d+\.\d+", f.name)]
    folders = [f for f in folders if version in ("", f.name)]
    if len({folder.parent for folder in folders}) > 1:
        names = ", ".join(sorted({f"{base}/{f.parent.name}" for f in folders}))
        raise ConvnetError(
            f"data.name={name!r}: several configurations, name one: {names}"
        )
    return max(folders, key=lambda f: [int(n) for n in f.name.split(".")], default=None)


def builder(directory: str) -> Any:
    """TFDS's read-only builder for a folder.

    Raises:
        ConvnetError: no prepared dataset, or in another file format than ArrayRecord.
    """
    import tensorflow_datasets as tfds

    try:
        found = tfds.builder_from_directory(directory)
        file_format = found.info.file_format
    except Exception as error:  # malformed JSON, unknown features, missing files
        raise ConvnetError(f"{directory}: not a prepared dataset: {error}") from None
    if file_format is None or file_format.value != "array_record":
        kind = file_format.value if file_format else "unknown"
        raise ConvnetError(
            f"{directory}: the file format is {kind}, wanted array_record; prepare it "
            "with tfds.builder(NAME, file_format='array_record').download_and_prepare()"
        )
    return found


def check_files(folder: Path, name: str, builder: Any, splits: Collection[str]) -> None:
    """Raises ConvnetError unless the folder holds this dataset, with all its files."""
    base = name.partition(":")[0].partition("/")[0]
    if builder.info.name != base:
        raise ConvnetError(
            f"{folder} holds {builder.info.name!r}, but data.name is {name!r}"
        )
    for split in builder.info.splits.values():
        for path in split.filepaths:
            if split.name in splits and not Path(path).is_file():
                raise ConvnetError(f"{path}: no such file; prepare {name} again")


def features(folder: Path, found: Any) -> tuple[str, str]:
    """Names of the image and of the class label.

    Raises:
        ConvnetError: there is none, or several, or the images are float32.
    """
    import tensorflow_datasets as tfds

    images = [k for k, v in found.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in found.items() if isinstance(v, tfds.features.ClassLabel)]
    for kind, keys, usual in (
        ("Image", images, "image"),
        ("ClassLabel", labels, "label"),
    ):
        if usual in keys:
            keys[:] = [usual]
        if len(keys) != 1:
            raise ConvnetError(
                f"{folder}: {len(keys)} features of kind {kind} among "
                f"{', '.join(found)}; wanted one, or one named {usual!r}"
            )
    if found[images[0]].np_dtype == np.float32:
        raise ConvnetError(
            f"{folder}: feature {images[0]!r} holds float32 images, wanted uint8"
        )
    return images[0], labels[0]


def not_prepared(name: str, root: Path) -> ConvnetError:
    """The error for a dataset that is not there: what is, and the way out."""
    prepared = sorted(
        {path.relative_to(root).parts[0] for path in root.glob(f"*/*/{_INFO}")}
        | {path.relative_to(root).parts[0] for path in root.glob(f"*/*/*/{_INFO}")}
    )
    known = [*BUILT_IN, *DOWNLOADABLE, *prepared]
    near = difflib.get_close_matches(name, known, n=1)
    return ConvnetError(
        f"data.name={name!r} is not prepared in {root} (found there: "
        f"{', '.join(prepared) or 'nothing'})"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f"\nSet data.dir to a folder that holds {name}/VERSION, or prepare it with"
        f" tfds.builder({name!r}, data_dir={str(root)!r},"
        " file_format='array_record').download_and_prepare()."
    )
