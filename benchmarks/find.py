"""Images per second of predict: the network alone, decoding alone, and end to end.

usage: python -m benchmarks.find [--weights=FOLDER] [--batches=1000,12000]
           [--dtypes=float32,bfloat16] [--files=10000] [--peer_python=PATH]
           [--output=FILE.json]

The network is ConvNetJS's for CIFAR-10, with the weights of a snapshot or random ones.
`network/DTYPE/batch=N`: N images in memory, uint8 in, probabilities out, in the batches
that predict takes, against the fastest of PyTorch (eager, compiled) and ONNX Runtime
(float32), each at once or in the same batches, whichever is faster. The answers of the
two sides are compared. `decode` reads PNG files of 32x32 as predict does, without a
network; `end_to_end/png` is predict, against what decoding and the network allow where
they share the cores: 1 / (1 / decode + 1 / network).
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from benchmarks import table as table_lib
from benchmarks.peer import Peer, PeerError
from benchmarks.table import Row, Table
from convnet import bundle as bundle_lib
from convnet import cli, inputs, models, predict_stream
from convnet.data.resize import Resize
from convnet.decoders import Decoders, in_order
from convnet.errors import ConvnetError
from convnet.input_arrays import Wanted

DTYPES = ("float32", "bfloat16")
SIDE = 32
# The best figure of a program in C with AVX and OpenMP, on 2 cores (AMD Zen 4), 12,000
# images: a constant, measured elsewhere (1,300 to 1,560 images/s).
C_PROGRAM = 1560.0
# Relative to 1, the sum of probabilities.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
_OPTIONS = {"widths": (16, 20, 20), "depth": 1, "kernel": 5, "pool": "max"}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values)
    flags.DEFINE_string(
        "weights", None, "a ConvNetJS snapshot; random if not given", flag_values=values
    )
    flags.DEFINE_list(
        "batches", ["1000", "12000"], "images in memory", flag_values=values
    )
    shown = ",".join(DTYPES)
    flags.DEFINE_string("dtypes", shown, f"of {shown}", flag_values=values)
    flags.DEFINE_integer(
        "files",
        10_000,
        "PNG files; 0 leaves out what reads them",
        lower_bound=0,
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Measures the network alone, then what feeds it.

    Raises:
      ConvnetError: the two sides' answers differ.
    """
    dtypes = table_lib.choose(values.dtypes, DTYPES, "dtypes")
    python = table_lib.start(values)
    table = Table(values.output, f"predict, {values.device}")
    bundle = network(values.weights)
    kernels = _kernels(bundle)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype, batch in itertools.product(dtypes, map(int, values.batches)):
            rng = np.random.default_rng(0)
            images = rng.integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)
            np.savez(folder / "case.npz", images=images, **kernels)
            measure(table, bundle, dtype, images, python, folder, values)
        if values.files:
            end_to_end(table, bundle, folder, values.files, values.repeats)


def network(weights: str | None) -> bundle_lib.Bundle:
    """Returns the model, of a snapshot or with random weights."""
    if weights:
        from convnet.weights import convnetjs

        return convnetjs.load(Path(weights).expanduser())
    shape = (SIDE, SIDE, 3)
    options = {**_OPTIONS, "gather": "flatten", "dense": ()}
    model = models.create("cnn", num_outputs=10, **options)
    variables = model.init(jax.random.key(0), np.zeros((1, *shape), np.float32))
    return bundle_lib.Bundle(
        architecture={"name": "cnn", "num_outputs": 10, "options": options},
        task={"name": "classification", "positive": None},
        classes=tuple(f"class {index}" for index in range(10)),
        preprocessing={
            "input_shape": shape,
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.5,),
            "std": (1.0,),
        },
        provenance={},
        variables=variables,
    )


def _kernels(bundle: bundle_lib.Bundle) -> dict[str, np.ndarray]:
    params = bundle.variables["params"]
    layers = [params["base"][f"block{n}"]["conv1"] for n in (1, 2, 3)]
    return {
        f"{name}{index}": np.asarray(value)
        for index, layer in enumerate([*layers, params["head"]["logits"]])
        for name, value in layer.items()
    }


def measure(
    table: Table,
    bundle: bundle_lib.Bundle,
    dtype: str,
    images: np.ndarray,
    python: str | None,
    folder: Path,
    values: flags.FlagValues,
) -> None:
    """Adds the row of one case; the sides take turns."""
    count, case = len(images), f"network/{dtype}/batch={len(images)}"
    part = predict_stream.batch_size(images.shape[1:], jax.default_backend())
    predict = bundle.predict_fn(dtype)

    def ours(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            for place in range(0, count, part):
                np.asarray(predict(images[place : place + part]))
        return time.perf_counter() - start

    sides = {"": table_lib.per_second(count, ours)}
    ways = ["PyTorch", "PyTorch compiled"] + ["ONNX Runtime"] * (dtype == "float32")
    if python is None or values.device != "cpu":
        table.add(Row(case, "images/s", _medians(sides, values.repeats)[""]))
        return
    with Peer(python, "benchmarks.peers.find") as peer:
        wanted = np.asarray(predict(images[:part]))[:100]
        for way in ways:
            side = _peer_side(table, peer, way, dtype, part, folder, count, wanted)
            if side is not None:
                sides[way] = side
        medians = _medians(sides, values.repeats)
    own = medians.pop("")
    fastest = max(medians, key=medians.get, default=None)
    for way, rate in medians.items():
        table.note(f"{way}: {rate:,.0f} images/s")
    table.add(Row(case, "images/s", own, medians.get(fastest), fastest))
    if dtype == "float32" and count == 12_000:
        about = "C program, a constant from another day"
        table.add(Row("network/c_program", "images/s", own, C_PROGRAM, about))


def _medians(
    sides: dict[str, Callable[[], float]], repeats: int
) -> dict[str, float | None]:
    found = table_lib.interleave(list(sides.values()), repeats)
    return dict(zip(sides, map(table_lib.median, found), strict=True))


def _peer_side(
    table: Table,
    peer: Peer,
    way: str,
    dtype: str,
    part: int,
    folder: Path,
    count: int,
    wanted: np.ndarray,
) -> Callable[[], float] | None:
    try:
        path = str(folder / "case.npz")
        got = np.asarray(peer("build", way=way, path=path, dtype=dtype, part=part))
        side = table_lib.per_second(count, lambda n: peer("run", way=way, steps=n))
    except PeerError as error:
        table.note(f"{way}: {error}")
        return None
    difference = float(np.abs(got - wanted).max())
    if not difference < _TOLERANCE[dtype]:
        raise ConvnetError(
            f"{way}, {dtype}: probabilities differ by {difference:.2g}; the networks of"
            " the two sides are not the same"
        )
    return side


def end_to_end(
    table: Table, bundle: bundle_lib.Bundle, folder: Path, files: int, repeats: int
) -> None:
    """Adds `decode` and `end_to_end/png`; all three figures come from one round."""
    rng = np.random.default_rng(0)
    # As smooth as photographs are, so that the files are of their size.
    small = rng.integers(0, 256, (files, 8, 8, 3), np.uint8)
    pictures = folder / "pictures"
    pictures.mkdir()
    for index, image in enumerate(small):
        large = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        large.save(pictures / f"{index:06d}.png")
    wanted = Wanted((SIDE, SIDE, 3), "uint8", Resize())
    predict = bundle.predict_fn()
    part = predict_stream.batch_size(wanted.shape, jax.default_backend())
    images = rng.integers(0, 256, (part, SIDE, SIDE, 3), np.uint8)
    np.asarray(predict(images))

    def records() -> Iterator[inputs.Record]:
        return inputs.records([str(pictures)], wanted)

    def decode() -> float:
        with Decoders(wanted, part, predict_stream.cores(), processes=True) as decoders:
            # They have started once each has decoded a batch.
            first = [[next(records())]] * (4 * decoders.workers)
            list(in_order(iter(first), decoders.submit, decoders.workers))
            start = time.perf_counter()
            batches = predict_stream.chunks(records(), part)
            for _ in in_order(batches, decoders.submit, decoders.workers + 1):
                pass
            return files / (time.perf_counter() - start)

    def alone() -> float:
        start = time.perf_counter()
        for _ in range(0, files, part):
            np.asarray(predict(images))
        return files / (time.perf_counter() - start)

    def both() -> float:
        times = predict_stream.Times()
        backend = jax.default_backend()
        for _ in predict_stream.predict(records(), wanted, predict, backend, times):
            pass
        return files / times.total

    found = table_lib.interleave([decode, alone, both], repeats)
    decoding, computing, together = map(table_lib.median, found)
    limit = 1 / (1 / decoding + 1 / computing)
    table.add(Row("decode", "images/s", decoding))
    table.add(Row("network/float32/app", "images/s", computing))
    table.add(
        Row("end_to_end/png", "images/s", together, limit, "1/(1/decode + 1/network)")
    )


if __name__ == "__main__":
    cli.run(main, define, __doc__)
