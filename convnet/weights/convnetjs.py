"""ConvNetJS networks (Karpathy 2014), from a folder with a text file for each layer.

`layer1_conv.txt` and `layer10_fc.txt` are layers 1 and 10, counted from the input,
which is layer 0; ReLUs, pools and the softmax hold no numbers and have no files. The
first line has the sizes: filter width, filter height, input depth and filters of a
convolution, inputs and outputs of a dense layer. Then comes one number a line: the
weights, then a bias for each output.

A filter is stored by columns: x, then y, then depth. The inputs of a dense layer are
ordered by rows: y, x, depth.
"""

import dataclasses
import hashlib
import itertools
import math
import re
from pathlib import Path

import numpy as np

from convnet.bundle import Bundle
from convnet.errors import ConvnetError, UsageError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SIZES = {"conv": 4, "fc": 2}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer")
_CIFAR10 += ("dog", "frog", "horse", "ship", "truck")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One file: `weights` (outputs, *rest) and `bias` (outputs,), float32.

    `sizes` is the first line of the file, `number` the layer's place.
    """

    path: Path
    number: int
    kind: str
    sizes: tuple[int, ...]
    weights: np.ndarray
    bias: np.ndarray

    @property
    def inputs(self) -> int:
        """The depth of the input; of a dense layer, its length."""
        return self.sizes[-2]


def load(folder: Path, labels: tuple[str, ...] = ()) -> Bundle:
    """Reads a snapshot.

    What the files do not say is as in ConvNetJS's CIFAR-10 demonstration: convolutions
    are followed by a ReLU and keep the size of the map, pools take the largest of 2x2,
    inputs are squares with `value / 255 - 0.5`. Which layers are pools, and how large
    an input is, follows from the layers' numbers and the dense layer's inputs.

    Args:
      folder: that of the text files.
      labels: the classes' names; by default CIFAR-10's where the network fits them,
        "class 0" and so on otherwise.

    Raises:
      UsageError: no such folder; or the number of labels is wrong.
      ConvnetError: a file is missing, is malformed (names file and line), or does not
        fit its neighbour; or the network is none that `cnn` can express.
    """
    if not folder.is_dir():
        raise UsageError(f"--weights={folder}: no such folder; want that of a snapshot")
    layers = [_read(path, *about) for path, about in _files(folder)]
    convs = [layer for layer in layers if layer.kind == "conv"]
    dense = [layer for layer in layers if layer.kind == "fc"]
    pools = _check_order(folder, layers)
    depth, pool = _blocks(folder, convs, pools)
    shape = _input_shape(convs, dense[0], sum(pools))
    outputs = dense[-1].sizes[1]
    if outputs < 2:
        raise ConvnetError(f"{dense[-1].path}: line 1: {outputs} output; want classes")
    if labels and len(labels) != outputs:
        raise UsageError(
            f"{len(labels)} labels for the {outputs} outputs of {dense[-1].path}"
        )
    digest = {
        layer.path.name: hashlib.sha256(layer.path.read_bytes()).hexdigest()
        for layer in layers
    }
    return Bundle(
        architecture={
            "name": "cnn",
            "num_outputs": outputs,
            "options": {
                "widths": tuple(layer.sizes[3] for layer in convs[::depth]),
                "depth": depth,
                "kernel": convs[0].sizes[0],
                "pool": pool,
                "gather": "flatten",
                "dense": tuple(layer.sizes[1] for layer in dense[:-1]),
            },
        },
        task={"name": "classification", "positive": None},
        classes=labels or _labels(shape, outputs),
        preprocessing={
            "input_shape": shape,
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.5,),
            "std": (1.0,),
        },
        provenance={"source": "ConvNetJS snapshot", "files/sha256": digest},
        variables={"params": _params(convs, dense, depth)},
    )


def _files(folder: Path) -> list[tuple[Path, tuple[int, str]]]:
    found: dict[int, tuple[Path, tuple[int, str]]] = {}
    for path in sorted(folder.glob("layer*.txt")):
        match = re.fullmatch(r"layer(\d{1,4})_(\w+)\.txt", path.name)
        if not match or match[2] not in _SIZES:
            raise ConvnetError(
                f"{path}: want layerN_conv.txt or layerN_fc.txt, with N the layer's"
                " number"
            )
        number = int(match[1])
        if number in found:
            raise ConvnetError(f"{path} and {found[number][0].name} are the same layer")
        found[number] = path, (number, match[2])
    if not found:
        raise ConvnetError(f"{folder} has no layerN_conv.txt: no ConvNetJS snapshot")
    return [found[number] for number in sorted(found)]


def _read(path: Path, number: int, kind: str) -> Layer:
    try:
        lines = path.read_text("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise ConvnetError(f"{path} is no text of numbers: {error.reason}") from error
    sizes = (lines or [""])[0].split()
    if len(sizes) != _SIZES[kind] or not all(
        re.fullmatch(r"[1-9]\d{0,8}", size) for size in sizes
    ):
        what = "width, height, depth, filters" if kind == "conv" else "inputs, outputs"
        raise ConvnetError(
            f"{path}: line 1: {lines[:1]} are not the {_SIZES[kind]} sizes {what}"
        )
    sizes = tuple(map(int, sizes))
    count, outputs = math.prod(sizes), sizes[-1]
    for place, line in enumerate(lines[1:], 2):
        if not _NUMBER.fullmatch(line.strip()) or abs(float(line)) > 3e38:
            raise ConvnetError(f"{path}: line {place}: {line[:40]!r} is no number")
    found, wanted = len(lines) - 1, count + outputs
    if found != wanted:
        what = "the file ends" if found < wanted else "there is more"
        raise ConvnetError(
            f"{path}: line {min(found, wanted) + 2}: {what}; by its first line it has"
            f" {count} weights and {outputs} biases, but it has {found} numbers"
        )
    numbers = np.array([float(line) for line in lines[1:]], np.float32)
    weights = numbers[:count].reshape(outputs, *sizes[:-1])
    return Layer(path, number, kind, sizes, weights, numbers[count:])


def _check_order(folder: Path, layers: list[Layer]) -> list[bool]:
    """Checks each layer against the one before; which convolutions have a pool."""
    if layers[0].number != 1 or layers[0].kind != "conv":
        raise ConvnetError(f"{folder}: layer1_conv.txt, the first layer, is missing")
    if layers[-1].kind != "fc":
        raise ConvnetError(f"{folder}: layerN_fc.txt, the last layer, is missing")
    pools = []
    for layer, after in itertools.pairwise(layers):
        gap = after.number - layer.number
        if (layer.kind, after.kind) == ("fc", "conv"):
            raise ConvnetError(f"{after.path} is a convolution after a dense layer")
        if gap not in ((2, 3) if layer.kind == "conv" else (2,)):
            raise ConvnetError(
                f"{folder}: between {layer.path.name} and {after.path.name} a file is"
                " missing: only a ReLU and a pool, or a ReLU, can be in between"
            )
        if layer.kind == "conv":
            pools.append(gap == 3)
        wanted = layer.sizes[-1]
        if after.inputs != wanted and layer.kind == after.kind:
            raise ConvnetError(
                f"{after.path}: line 1: it has {after.inputs} inputs, but"
                f" {layer.path.name} has {wanted} outputs"
            )
    return pools


def _blocks(folder: Path, convs: list[Layer], pools: list[bool]) -> tuple[int, str]:
    """The convolutions in each block of a `cnn`, and its pool."""
    for layer in convs:
        width, height = layer.sizes[:2]
        if width != height or width % 2 == 0 or width != convs[0].sizes[0]:
            raise ConvnetError(
                f"{layer.path}: line 1: filters of {width}x{height}; want squares of an"
                " odd side, the same in all layers"
            )
    if not any(pools):
        return 1, "none"
    depth = pools.index(True) + 1
    regular = [(i + 1) % depth == 0 for i in range(len(pools))]
    widths = [layer.sizes[3] for layer in convs]
    if pools != regular or any(
        len(set(widths[i : i + depth])) > 1 for i in range(0, len(widths), depth)
    ):
        raise ConvnetError(
            f"{folder}: its convolutions and pools are not blocks of as many"
            " convolutions of as many filters, each with a pool at its end"
        )
    return depth, "max"


def _input_shape(convs: list[Layer], dense: Layer, pools: int) -> tuple[int, int, int]:
    filters = convs[-1].sizes[3]
    side = math.isqrt(dense.inputs // filters)
    if side * side * filters != dense.inputs:
        raise ConvnetError(
            f"{dense.path}: line 1: its {dense.inputs} inputs are no square map of the"
            f" {filters} filters of {convs[-1].path.name}"
        )
    return (side * 2**pools, side * 2**pools, convs[0].inputs)


def _labels(shape: tuple[int, int, int], outputs: int) -> tuple[str, ...]:
    if (shape, outputs) == ((32, 32, 3), len(_CIFAR10)):
        return _CIFAR10
    return tuple(f"class {number}" for number in range(outputs))


def _params(convs: list[Layer], dense: list[Layer], depth: int) -> dict:
    base: dict[str, dict] = {}
    for i, layer in enumerate(convs):
        # (f, x, y, d) -> (y, x, d, f)
        kernel = np.ascontiguousarray(layer.weights.transpose(2, 1, 3, 0))
        block = base.setdefault(f"block{i // depth + 1}", {})
        block[f"conv{i % depth + 1}"] = {"kernel": kernel, "bias": layer.bias}
    names = [f"dense{i}" for i in range(1, len(dense))] + ["logits"]
    head = {
        name: {"kernel": np.ascontiguousarray(layer.weights.T), "bias": layer.bias}
        for name, layer in zip(names, dense, strict=True)
    }
    return {"base": base, "head": head}
