"""Weights of keras.applications, from Keras 3's files or the older `.h5`.

Four layouts are read: `NAME.weights.h5` and the archive `NAME.keras` of Keras 3, where
layers go by their class and number (`layers/conv2d_3/vars/0`); and `NAME.h5` with the
weights or with the whole model, where layers go by their names. Keras need not be
installed, and nothing but arrays of floats is read from a file.
"""

import collections
import io
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convnet import models
from convnet.errors import ConvnetError, UsageError
from convnet.weights import match
from convnet.weights.keras_layers import CLASSES, FIELDS, PLANS, Layer, Plan, layers
from convnet.weights.match import Imported, Rule

_ARCHIVED = "model.weights.h5"
_MOST_OBJECTS = 20_000
# What trains a network, or draws random numbers in it, is no part of it.
_NOT_WEIGHTS = re.compile(r"(optimizer|optimizer_weights)/.*|.*seed_generator.*")
# How variables are called in the older files.
_FIELDS = {
    "kernel": "kernel",
    "depthwise_kernel": "kernel",
    "W": "kernel",
    "bias": "bias",
    "b": "bias",
    "beta": "bias",
    "gamma": "scale",
    "moving_mean": "mean",
    "running_mean": "mean",
    "moving_variance": "var",
    "running_std": "var",
}
# MobileNetV2's last layer in the files that were published.
_RENAMED = {"Logits": "predictions"}
# Trained on BGR, of which the means (0 to 255) are subtracted.
BGR = ("vgg16", "vgg19", "resnet50", "resnet101")


def load(
    path: Path, arch: str = "", *, initial: bool = False, allow_unexpected: bool = False
) -> Imported:
    """Reads a network of keras.applications.

    The result takes RGB: for networks that were trained on BGR, the input channels of
    the first kernel are turned round.

    Args:
      path: the file.
      arch: one of `keras_layers.PLANS`; "": found by what the file holds.
      initial: leaves that the file lacks keep the values of a fresh model.
      allow_unexpected: tensors of the file may be left over.

    Raises:
      UsageError: no such file or architecture.
      ConvnetError: it is no file of Keras's, is damaged, or holds another network;
        lists what is missing, left over, or of another shape.
    """
    import h5py

    if arch and arch not in PLANS:
        raise UsageError(f"--arch={arch}: want one of {', '.join(PLANS)}")
    if not path.is_file():
        raise UsageError(f"--weights={path}: no such file")
    try:
        with h5py.File(_open(path), "r") as file:
            tensors = _tensors(file)
    except Exception as error:  # libhdf5's errors come as almost any class
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConvnetError(f"{path} is no file of Keras's weights: {text}") from error
    return _load(path, tensors, arch, initial, allow_unexpected)


def _open(path: Path) -> Path | io.BytesIO:
    """The HDF5 file itself, out of an archive if need be."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(8)
        if start != b"\x89HDF\r\n\x1a\n":
            raise ValueError(f"it begins with {start!r}, which is not HDF5")
        return path
    with zipfile.ZipFile(path) as archive:
        if _ARCHIVED not in archive.namelist():
            raise ValueError(f"it is a zip archive without {_ARCHIVED}")
        # Keras does not compress: what is read is no larger than the file.
        if archive.getinfo(_ARCHIVED).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its {_ARCHIVED} is compressed; save it with Keras")
        return io.BytesIO(archive.read(_ARCHIVED))


def _tensors(file: Any) -> dict[str, np.ndarray]:
    """The arrays by name; links to elsewhere are not followed."""
    import h5py

    found: dict[str, Any] = {}
    count = 0

    def visit(name: str, item: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_OBJECTS:
            raise ValueError(f"it has more than {_MOST_OBJECTS:,} groups and datasets")
        name = name.removeprefix("model_weights/")
        if not isinstance(item, h5py.Dataset) or _NOT_WEIGHTS.fullmatch(name):
            return
        if item.dtype.kind != "f" or item.shape is None:
            raise ValueError(f"{name[:80]} is {item.dtype}; want floats")
        # Keras does not compress. So the arrays are no larger than the file.
        if item.is_virtual or item.external or item.chunks:
            raise ValueError(f"{name[:80]} is compressed, or lies in another file")
        if item.id.get_storage_size() != item.nbytes:
            raise ValueError(f"{name[:80]} has no values")
        found[name] = item

    file.visititems(visit)
    if not found:
        raise ValueError("it holds no weights")
    if sum(item.nbytes for item in found.values()) > file.id.get_filesize():
        raise ValueError("its arrays overlap")
    return {name: item[()] for name, item in found.items()}


def _load(
    path: Path,
    tensors: dict[str, np.ndarray],
    arch: str,
    initial: bool,
    unexpected: bool,
) -> Imported:
    arch = arch or _recognise(path, tensors)
    plan = PLANS[arch]()
    sources = _sources(plan, tensors)
    shapes = {
        ours: tensors[source].shape
        for ours, source in sources.items()
        if source in tensors and tensors[source].size and tensors[source].shape
    }
    first = next(layers(plan))
    options = _options(arch, shapes, _ours(first, "kernel"))
    side = 299 if arch == "inception_v3" else 224
    if rows := shapes.get("params/head/dense1/kernel"):
        # Of VGG: the last map has a 32nd of the input's side, and 8 times its width.
        side = 32 * max(1, math.isqrt(rows[0] // (8 * options["width"])))
    outputs = shapes.get("params/head/logits/bias", (1000,))[0]
    architecture = {"name": arch, "num_outputs": outputs, "options": options}
    input_shape = (side, side, 3)
    # Of a depthwise kernel, (h, w, c, 1) in the file.
    axes = {
        _ours(layer, "kernel"): (0, 1, 3, 2)
        for layer in layers(plan)
        if layer.kind == "depthwise"
    }
    variables, report = match.match(
        path,
        match.template(architecture, input_shape),
        tensors,
        {ours: Rule(source, axes.get(ours, ())) for ours, source in sources.items()},
        initial=match.initial(architecture, input_shape) if initial else None,
        allow_unexpected=unexpected,
    )
    if arch in BGR:
        _turn(variables, first)
    return Imported(variables, architecture, input_shape, "keras", report)


def _ours(layer: Layer, field: str) -> str:
    collection = "batch_stats" if field in ("mean", "var") else "params"
    return f"{collection}/{layer.ours}/{field}"


def _options(
    arch: str, shapes: dict[str, tuple[int, ...]], first: str
) -> dict[str, Any]:
    """What the shapes say of the network; where they say nothing, its defaults."""
    options = models.options(arch)
    if first in shapes:
        options["width"] = shapes[first][-1]
    if "variant" in options:
        options["variant"] = "keras"
        options["bn_momentum"] = 0.999 if arch == "mobilenet_v2" else 0.99
    if arch in ("vgg16", "vgg19"):
        dense = (shapes.get(f"params/head/dense{i}/bias", (4096,))[0] for i in (1, 2))
        options["dense"] = tuple(dense)
    elif arch in ("resnet50", "resnet101"):
        options["stem"] = "imagenet"
    elif arch == "mobilenet_v2":
        # The stem is rounded to 8 features. Its width is 32 for a last of 320.
        last = shapes.get("batch_stats/base/stage7/block1/norm3/mean", (320,))[0]
        options["width"] = max(1, round(last / 10))
    return options


def _turn(variables: dict[str, Any], first: Layer) -> None:
    """BGR -> RGB in the first kernel (h, w, 3, features)."""
    node = variables["params"]
    for name in first.ours.split("/"):
        node = node[name]
    node["kernel"] = np.ascontiguousarray(node["kernel"][:, :, ::-1])


def _recognise(path: Path, tensors: dict[str, np.ndarray]) -> str:
    """The architecture whose tensors are most like those of the file."""
    shares = {}
    for arch, plan in PLANS.items():
        wanted = set(_sources(plan(), tensors).values())
        shares[arch] = len(wanted & set(tensors)) / len(wanted | set(tensors))
    best = max(shares, key=shares.get)
    if shares[best] < 0.5:
        raise ConvnetError(
            f"{path}: its {len(tensors)} tensors (such as {next(iter(tensors))!r}) are"
            f" of none of the networks that can be imported: {', '.join(PLANS)};"
            " --arch compares them with one"
        )
    return best


def _sources(plan: Plan, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """For each leaf of ours the name of a tensor, in the file's layout."""
    if any(name.startswith("layers/") for name in tensors):
        return dict(_by_number(plan, "layers/"))
    found = {key: name for name, key in _by_name(tensors)}
    return {
        _ours(layer, field): found.get(
            (layer.name, field), f"{layer.name}/{layer.name}/{field}"
        )
        for layer in layers(plan)
        for field in FIELDS[layer.kind]
    }


def _by_number(plan: Plan, prefix: str) -> Iterator[tuple[str, str]]:
    """Keras 3: the class of a layer and its number among those, then the variable's."""
    counts: collections.Counter[str] = collections.Counter()
    for item in plan:
        kind = CLASSES[item.kind] if isinstance(item, Layer) else "sequential"
        place = prefix + (f"{kind}_{counts[kind]}" if counts[kind] else kind)
        counts[kind] += 1
        if isinstance(item, Layer):
            for number, field in enumerate(FIELDS[item.kind]):
                yield _ours(item, field), f"{place}/vars/{number}"
        else:
            yield from _by_number(list(item), f"{place}/layers/")


def _by_name(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The older files: (tensor, (layer, field)); unnamed layers counted from 0."""
    split = {name: name.split("/")[-2:] for name in tensors if "/" in name}
    numbers: dict[str, set[int]] = collections.defaultdict(set)
    unnamed = re.compile(r"(conv2d|batch_normalization)(?:_(\d{1,9}))?")
    for layer, _ in split.values():
        if found := unnamed.fullmatch(layer):
            numbers[found[1]].add(int(found[2] or 0))
    for name, (layer, variable) in split.items():
        variable = variable.partition(":")[0]
        # "block1_conv1_W_1" of the oldest.
        variable = re.sub(r"_\d+$", "", variable.removeprefix(f"{layer}_"))
        field = _FIELDS.get(variable, "scale")
        if found := unnamed.fullmatch(layer):
            place = sorted(numbers[found[1]]).index(int(found[2] or 0))
            layer = f"{found[1]}_{place}" if place else found[1]
        yield name, (_RENAMED.get(layer, layer), field)
