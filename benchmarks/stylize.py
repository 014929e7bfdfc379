"""Style transfer against PyTorch's tutorial: the losses, and seconds an evaluation.

usage: python -m benchmarks.stylize [--size=256] [--evaluations=60] [--layers=gatys]
           [--model=M] [--peer_python=PATH] [--output=FILE.json]

Both sides have the same VGG-19, pictures (scikit-learn's two photographs, square) and
losses. `noise/...` are those of a picture of noise, which should be equal. Then both
start at the content: `loss` is that of the picture after so many evaluations of loss
and gradient, values clamped to 0 and 1. PyTorch runs its L-BFGS as the tutorial does,
without a line search. Compilation is not part of the seconds.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import table as table_lib
from benchmarks.peer import Peer
from benchmarks.table import Row, Table
from convnet import bundle as bundle_lib
from convnet import cli, models
from convnet.style import features as features_lib
from convnet.style import minimize, pictures
from convnet.style.objective import Objective, Weights

# Names of taps without "base/", for content and for style.
LAYERS = {
    "tutorial": (
        ["block2/conv2"],
        [f"block{b}/conv{c}" for b, c in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))],
    ),
    "gatys": (["block4/relu2"], [f"block{b}/relu1" for b in range(1, 6)]),
}
WEIGHTS = (1.0, 1e6)  # the tutorial's


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values, repeats=3)
    for name, default, least, about in (
        ("size", 256, 32, "side of the pictures"),
        ("evaluations", 60, 2, "of loss and gradient"),
    ):
        flags.DEFINE_integer(
            name, default, about, lower_bound=least, flag_values=values
        )
    flags.DEFINE_enum(
        "layers", "gatys", list(LAYERS), "which taps are compared", flag_values=values
    )
    flags.DEFINE_string(
        "model", None, "a VGG; random weights if not given", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Measures both sides."""
    python = table_lib.start(values)
    bundle = bundle_lib.load(values.model) if values.model else random_vgg19()
    names = LAYERS[values.layers]
    ours = Ours(bundle, names, values.size)
    table = Table(values.output, f"style transfer, {values.layers} layers")
    count, repeats = values.evaluations, values.repeats
    if python is None:
        report(table, ours, None, count, [ours.measure(count, repeats)])
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        Peer(python, "benchmarks.peers.stylize") as peer,
    ):
        path = Path(folder) / "transfer.npz"
        np.savez(path, **ours.arrays())
        build = {
            "path": str(path),
            "device": values.device,
            "content": names[0],
            "style": names[1],
            "weights": WEIGHTS,
        }
        peer("build", channels_last=True, **build)
        sides = [lambda: ours.run(count), lambda: peer("run", evaluations=count)]
        found = table_lib.interleave(sides, repeats)
        report(table, ours, peer, count, found)


class Ours:
    """Our side: the objective, and L-BFGS on it."""

    def __init__(
        self, bundle: bundle_lib.Bundle, names: tuple[list[str], list[str]], size: int
    ) -> None:
        from sklearn.datasets import load_sample_image

        self._bundle = bundle
        self.pictures = {
            name: pictures.resize(square(load_sample_image(file)), (size, size))
            for name, file in (("content", "china.jpg"), ("style", "flower.jpg"))
        }
        self.pictures["noise"] = pictures.noise((size, size, 3), 0)
        taps = tuple(tuple(f"base/{name}" for name in group) for group in names)
        features = features_lib.create(bundle)
        content, style = (jnp.asarray(self.pictures[n]) for n in ("content", "style"))
        weights = Weights(*WEIGHTS, tv=0.0)
        taps = features_lib.choose(features, *map(",".join, taps))
        self._evaluate = Objective(features, content, style, taps, weights, False)
        self._start = content

    def arrays(self) -> dict[str, np.ndarray]:
        """Weights, preprocessing and pictures, for the peer."""
        about = self._bundle.preprocessing
        blocks = self._bundle.variables["params"]["base"]
        arrays = {
            f"{block}/{conv}/{name}": leaf
            for block, convs in sorted(blocks.items())
            for conv, leaves in sorted(convs.items())
            for name, leaf in leaves.items()
        }
        constants = {name: np.float32(about[name]) for name in ("mean", "std")}
        return jax.device_get(arrays) | constants | self.pictures

    def losses(self, name: str) -> list[float]:
        """Content and style losses of one of the pictures."""
        terms = self._evaluate(jnp.asarray(self.pictures[name])).terms
        return [float(terms["content"]), float(terms["style"])]

    def run(self, evaluations: int) -> dict[str, float]:
        """Starts at the content; returns the loss of the result, and seconds."""
        began = time.perf_counter()
        *_, step = minimize.lbfgs(self._evaluate, self._start, evaluations)
        return {
            "loss": sum(step.terms.values()),
            "seconds": time.perf_counter() - began,
            "evaluations": step.evaluations,
        }

    def measure(self, evaluations: int, repeats: int) -> list[dict[str, float]]:
        """Runs several times."""
        return [self.run(evaluations) for _ in range(repeats)]


def report(
    table: Table, ours: Ours, peer: Peer | None, count: int, found: list[Any]
) -> None:
    """Adds the rows; `found` holds what each side's runs returned."""
    name = "PyTorch, tutorial" if peer else None
    noise = [
        ours.losses("noise"),
        peer("losses", name="noise") if peer else (None,) * 2,
    ]
    for term, *both in zip(("content", "style"), *noise, strict=True):
        table.add(Row(f"noise/{term}", "loss", *both, name))
    for case, unit, value in (
        (f"loss after {count} evaluations", "loss", lambda run: run["loss"]),
        ("evaluation", "s", lambda run: run["seconds"] / run["evaluations"]),
    ):
        sides = [table_lib.median([value(run) for run in runs]) for runs in found]
        table.add(
            Row(case, unit, *itertools.islice(itertools.chain(sides, [None]), 2), name)
        )


def square(pixels: np.ndarray) -> np.ndarray:
    """Cuts out the centre, (side, side, 3)."""
    side = min(pixels.shape[:2])
    top, left = ((n - side) // 2 for n in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def random_vgg19() -> bundle_lib.Bundle:
    """Returns a VGG-19 with He's initialisation; its head is small and is not used."""
    options = {"dense": (), "gather": "global"}
    model = models.create("vgg19", num_outputs=2, **options)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return bundle_lib.Bundle(
        architecture={"name": "vgg19", "num_outputs": 2, "options": options},
        task={"name": "classification", "positive": None},
        classes=("a", "b"),
        preprocessing={
            "input_shape": (224, 224, 3),
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        provenance={},
        variables=variables,
    )


if __name__ == "__main__":
    cli.run(main, define, __doc__)
