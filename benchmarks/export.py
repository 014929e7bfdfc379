"""Exported models: do they predict the same, and how fast are they?

usage: python -m benchmarks.export [--models=cifar10,vgg16,resnet50] [--batches=1,32]
           [--peer_python=PATH] [--output=FILE.json]

A model is one that ships, a file, a workdir, or an architecture: that gets random
weights, 1,000 classes and 224x224 pixels. `MODEL/FORMAT/difference` is the largest
difference of a probability, as `convnet.export` finds it, against what it allows.
`MODEL/batch=N`: images in memory, uint8 in, probabilities out, by convnet against ONNX
Runtime with the exported file; `MODEL/stablehlo/batch=N` the exported StableHLO against
convnet. ONNX takes the packages of the extra "onnx"; ONNX Runtime is measured in the
peer's environment.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import table as table_lib
from benchmarks.peer import Peer, PeerError
from benchmarks.table import Row, Table
from convnet import bundle as bundle_lib
from convnet import cli, export, export_check, export_reader, models
from convnet.bundle import Bundle
from convnet.errors import ConvnetError, UsageError

_CLASSES, _SHAPE = 1000, (224, 224, 3)


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values)
    flags.DEFINE_list(
        "models",
        ["cifar10", "vgg16", "resnet50"],
        "model files, names of models that ship, or architectures",
        flag_values=values,
    )
    flags.DEFINE_list("batches", ["1", "32"], "images at a time", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures one model after the other.

    Raises:
      UsageError: there is no such model, or a batch is no number.
    """
    if not all(n.isdecimal() and int(n) for n in values.batches):
        raise UsageError(
            f"--batches={','.join(values.batches)}: want numbers from 1 on"
        )
    python = table_lib.start(values)
    table = Table(values.output, f"exports, {values.device}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer = None
        if python is not None and values.device == "cpu":
            peer = stack.enter_context(Peer(python, "benchmarks.peers.export"))
        for name in values.models:
            measure(table, name, folder, peer, values)


def model(name: str) -> Bundle:
    """Returns a model by its name; of an architecture with random weights."""
    if name not in models.NAMES:
        return bundle_lib.load(name)
    options = dict(models.options(name))
    if "stem" in options:
        options["stem"] = "imagenet"
    network = models.create(name, num_outputs=_CLASSES, **options)
    variables = jax.jit(network.init)(
        jax.random.key(0), np.zeros((1, *_SHAPE), np.float32)
    )
    rng = np.random.default_rng(0)
    # Statistics and vectors that are not all zero or one, so that each counts.
    variables = jax.tree.map(
        lambda v: (
            np.asarray(v) * rng.uniform(0.8, 1.2, v.shape).astype("f")
            + (v.ndim == 1) * rng.uniform(0, 0.1, v.shape).astype("f")
        ),
        variables,
    )
    return Bundle(
        architecture={"name": name, "num_outputs": _CLASSES, "options": options},
        task={"name": "classification", "positive": None},
        classes=tuple(f"class {index}" for index in range(_CLASSES)),
        preprocessing={
            "input_shape": _SHAPE,
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        provenance={"weights": "random"},
        variables=variables,
    )


def measure(
    table: Table, name: str, folder: Path, peer: Peer | None, values: flags.FlagValues
) -> None:
    """Adds the rows of one model; the sides take turns."""
    bundle = model(name)
    case = Path(name).name
    written = {}
    for kind in export.FORMATS:
        path = folder / f"model.{kind}"
        try:
            difference, _ = export.write(bundle, kind, path)
        except ConvnetError as error:
            table.note(f"{case}/{kind}: {error}")
            continue
        written[kind] = path
        limit = (export_check.TOLERANCE, "what is allowed")
        table.add(Row(f"{case}/{kind}/difference", "abs", difference, *limit))
    version = None
    if peer is not None and "onnx" in written:
        try:
            version = peer("load", path=str(written["onnx"]))
        except PeerError as error:
            table.note(f"ONNX Runtime: {error}")
    ours = bundle.predict_fn()
    loaded, _ = export_reader.load_stablehlo(str(written["stablehlo"]))
    for count in map(int, values.batches):
        shape = (count, *bundle.preprocessing["input_shape"])
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        sides = [table_lib.per_second(count, clock(ours, images))]
        sides.append(table_lib.per_second(count, clock(loaded, images)))
        if version is not None:
            np.save(folder / "images.npy", images)
            peer("images", path=str(folder / "images.npy"))
            sides.append(
                table_lib.per_second(count, lambda steps: peer("run", steps=steps))
            )
        found = table_lib.interleave(sides, values.repeats)
        own, again, *theirs = map(table_lib.median, found)
        against = (theirs[0], f"ONNX Runtime {version}") if theirs else ()
        table.add(Row(f"{case}/batch={count}", "images/s", own, *against))
        table.add(
            Row(f"{case}/stablehlo/batch={count}", "images/s", again, own, "convnet")
        )


def clock(
    predict: Callable[[Any], jax.Array], images: np.ndarray
) -> Callable[[int], float]:
    """Returns a function that predicts so often and returns the seconds."""

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            np.asarray(predict(images))
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    cli.run(main, define, __doc__)
