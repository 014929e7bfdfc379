"""What the methods of convnet.explain are worth: checks, and seconds for each.

usage: python -m benchmarks.explain --config=experiments/cifar10.py [--model=cifar10]
           [--images=16] [--peer_python=PATH] [--output=FILE.json]

The pictures are from the test split of the experiment's data. For each method:

- `s/image` for all of them together, after a first call that compiles.
- `randomized`: the rank correlation of its maps with those of the same network
  with kernels drawn anew (Adebayo et al. 2018). A method that explains the network has
  about 0, one that only shows edges about 1.
- `pointing game`: how often the largest value of its map lies on the object, which is
  pasted into a quarter of a plain canvas (Zhang et al. 2016). By chance it is 25 %.

`completeness` is by how much the shares of integrated gradients miss the difference of
the scores that they should add up to, the largest of all pictures. `difference` is the
largest between our Grad-CAM and one in PyTorch, in float64, of a small network with
the same weights, as a share of the largest value.
"""

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import table as table_lib
from benchmarks.table import Row, Table
from convnet import bundle as bundle_lib
from convnet import cli, models, resolve
from convnet.bundle import Bundle
from convnet.data import measure, source
from convnet.errors import UsageError
from convnet.explaining import attribution, layers
from convnet.explaining.answers import Answers
from convnet.explaining.network import Network
from convnet.explaining.study import METHODS, Finding, Study


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    table_lib.define(values, repeats=None)
    cli.define_config(values, argv)
    flags.DEFINE_string(
        "model", "cifar10", "a model file, a workdir, or a name", flag_values=values
    )
    flags.DEFINE_integer(
        "images", 16, "that are explained", lower_bound=4, flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Checks and measures every method."""
    if values.config is None:
        raise UsageError("--config is missing (--help shows the usage)")
    config = resolve.check_type(values.config, "--config")
    python = table_lib.start(values)
    bundle = bundle_lib.load_answering(values.model)
    bundle_lib.configure(config, bundle)
    test = source.load(config.data, config.seed).test
    images = np.stack([r["input"] for r in measure.spread(test, values.images)])
    table = Table(values.output, f"explaining {values.model}, {len(images)} images")
    if python:
        difference = torch_difference(python)
        table.add(Row("grad_cam, difference from PyTorch", "share", difference))
    network = Network(bundle)
    random = network.with_variables(randomized(bundle.variables))
    canvas, boxes = quarters(network, images)
    for method in METHODS:
        found, seconds = study(network, network, images, method)
        table.add(Row(method, "s/image", seconds / len(images)))
        if found.errors is not None:
            table.add(Row(f"{method}, completeness", "share", found.errors.max()))
        other = study(random, network, images, method)[0]
        table.add(Row(f"{method}, randomized", "rho", alike(found.heat, other.heat)))
        heat = study(network, network, canvas, method)[0].heat
        table.add(Row(f"{method}, pointing game", "%", 100 * hits(heat, boxes)))


def study(
    network: Network, answering: Network, images: np.ndarray, method: str
) -> tuple[Finding, float]:
    """Explains what `answering` says of images with one method, and clocks it."""
    x = answering.normalize(images)
    answers = Answers(answering.bundle, answering.outputs)
    logits = answering.logits(x)
    targets = [answers.target(answers.strongest(row)) for row in logits]
    layer = layers.last(layers.maps(network.shapes, network.rank))
    run = Study(network, answers, x, layer).run
    run(method, targets)
    began = time.perf_counter()
    found = run(method, targets)
    return found, time.perf_counter() - began


def randomized(variables: Any) -> Any:
    """Kernels drawn anew with the deviation that they had."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: np.ndarray) -> np.ndarray:
        if path[-1].key != "kernel":
            return leaf
        return (leaf.std() * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


def alike(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean rank correlation (Spearman's) of maps that are not flat."""
    from scipy.stats import spearmanr

    ranks = [
        spearmanr(a.ravel(), b.ravel()).statistic
        for a, b in zip(ours, theirs, strict=True)
        if a.std() > 0 and b.std() > 0
    ]
    return float(np.mean(ranks))


def quarters(
    network: Network, images: np.ndarray
) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """Shrinks pictures into a quarter of a canvas of the data's mean colour.

    Returns:
      uint8 (n, h, w, 3), and rows and columns of each picture's quarter.
    """
    half = images.shape[1] // 2
    mean = np.rint(255 * np.array(network.bundle.preprocessing["mean"]))
    canvas = np.empty_like(images)
    canvas[:] = mean.astype(np.uint8)
    boxes = []
    for place, image in enumerate(images):
        top, left = half * (place // 2 % 2), half * (place % 2)
        image = image[: 2 * half, : 2 * half]
        small = image.reshape(half, 2, half, 2, -1).mean((1, 3))
        canvas[place, top : top + half, left : left + half] = small
        boxes.append((slice(top, top + half), slice(left, left + half)))
    return canvas, boxes


def hits(heat: np.ndarray, boxes: Sequence[tuple[slice, slice]]) -> float:
    """How often the largest value lies in the box."""
    found = [np.unravel_index(one.argmax(), one.shape) for one in heat]
    return float(
        np.mean(
            [
                all(
                    part.start <= i < part.stop
                    for i, part in zip(place, box, strict=True)
                )
                for place, box in zip(found, boxes, strict=True)
            ]
        )
    )


def small_network() -> tuple[Network, np.ndarray]:
    """Two blocks of convolution, ReLU and pool, of random weights; three inputs."""
    shape = (12, 10, 3)
    options = {"widths": (6, 5), "depth": 1, "gather": "flatten"}
    model = models.create("cnn", num_outputs=4, **options)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    bundle = Bundle(
        architecture={"name": "cnn", "num_outputs": 4, "options": options},
        task={"name": "classification", "positive": None},
        classes=tuple("abcd"),
        preprocessing={
            "input_shape": shape,
            "input_dtype": "float32",
            "resize": "crop",
            "mean": (0.0,),
            "std": (1.0,),
        },
        provenance={},
        variables=jax.device_get(variables),
    )
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    return Network(bundle), x


def torch_maps(
    python: str, network: Network, x: np.ndarray, index: int
) -> dict[str, np.ndarray]:
    """What `benchmarks/peers/explain.py` finds for a network like `small_network`."""
    params = network.bundle.variables["params"]
    arrays = {"inputs": x, "baseline": np.zeros_like(x)}
    for i in (1, 2):
        conv = params["base"][f"block{i}"]["conv1"]
        arrays[f"kernel{i}"] = np.transpose(conv["kernel"], (3, 2, 0, 1))
        arrays[f"bias{i}"] = conv["bias"]
    head = params["head"]["logits"]
    arrays |= {"dense": head["kernel"], "bias3": head["bias"]}
    double = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    script = Path(__file__).with_name("peers") / "explain.py"
    with tempfile.TemporaryDirectory() as folder:
        given, found = (Path(folder) / f"{name}.npz" for name in ("in", "out"))
        np.savez(given, index=index, **double)
        subprocess.run([python, script, given, found], check=True, timeout=120)
        with np.load(found) as file:
            return dict(file)


def torch_difference(python: str) -> float:
    """The largest difference of Grad-CAM's maps, as a share of the largest value."""
    network, x = small_network()
    wanted = torch_maps(python, network, x, 1)["cam"]
    direction = np.tile(np.eye(4, dtype=np.float32)[1], (len(x), 1))
    maps, gradients = network.at_tap(x, direction, "base/block2/relu1")
    found = attribution.grad_cam(maps, gradients)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


if __name__ == "__main__":
    cli.run(main, define, __doc__)
