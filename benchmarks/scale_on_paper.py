"""How a train step would scale to 8, 64 and 512 accelerators: computed, not measured.

usage: python -m benchmarks.scale_on_paper [--share=1.0] [--bytes] [--output=FILE.json]

Data parallel: each device computes a gradient for images of its own, and all are added.
docs/scaling.md has the formulas. All that goes in stands below, with where it is from.
A row's `ours` is the efficiency if no exchange hides behind the backward pass, its
`peer` if all hide that can: the truth lies between. `check/` rows are of runs whose
efficiency was published, which a note repeats. With --bytes what networks exchange is
compiled anew (`convnet.dry_run`), in about two minutes, and printed as well.
"""

import dataclasses
import math
from typing import Any

from absl import flags

from benchmarks import ours
from benchmarks.table import Row, Table
from convnet import cli, mesh
from convnet import config as config_lib

COUNTS = (8, 64, 512)
HIDDEN = "hidden where possible"
# Of a step without exchanges, the backward pass: two of the three products of a layer.
_BACKWARD = 2 / 3


@dataclasses.dataclass(frozen=True)
class Network:
    """What a data-parallel step exchanges.

    Attributes:
      bytes: that are added over all devices.
      waits: how many exchanges the next operation waits for (batch statistics).
    """

    bytes: float
    waits: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """What one device does alone.

    Attributes:
      network: its name in `NETWORKS`.
      images: in a step of one device.
      per_second: images.
      source: who measured it.
    """

    network: str
    images: int
    per_second: float
    source: str


@dataclasses.dataclass(frozen=True)
class Machines:
    """Nodes of several devices, and what lies between; bytes a second, one direction.

    Attributes:
      devices: in a node.
      inside: of a device, to the others in its node.
      outside: of a node, to the others.
      hop_inside, hop_outside: seconds that a small message takes.
      source: of the bandwidths.
    """

    devices: int
    inside: float
    outside: float
    source: str
    # NCCL's own table of latencies (src/graph/tuning.cc, protocol LL).
    hop_inside: float = 0.6e-6
    hop_outside: float = 5.0e-6
    base: float = 6.6e-6


# By --bytes, for eight devices.
NETWORKS = {
    "resnet50": Network(102_653_108, 203),
    "vgg16": Network(553_430_196, 1),
    "cifar10_cnn": Network(8_673_468, 1),
    "cifar10": Network(6_602_428, 30),
}

MEASURED = {
    "H100, ResNet-50": Speed(
        "resnet50", 256, 5595, "this project, one H100, bfloat16, images in memory"
    ),
    "2 CPU cores, cifar10_cnn": Speed(
        "cifar10_cnn", 128, 664, "this project, on 2 cores of Zen 4, a whole run"
    ),
}

PUBLISHED = {
    "A100, ResNet-50": Speed(
        "resnet50", 256, 2470, "NVIDIA DeepLearningExamples, PyTorch 21.03, AMP"
    ),
    "P100, ResNet-50": Speed(
        "resnet50", 64, 219, "TensorFlow benchmarks 2017, float32"
    ),
    "P100, VGG-16": Speed("vgg16", 64, 154, "TensorFlow benchmarks 2017, float32"),
    # 29 hours for 90 epochs on one such node.
    "P100, ResNet-50, 32 images": Speed(
        "resnet50", 32, 90 * 1_281_167 / (29 * 3600 * 8), "Goyal et al. 2017"
    ),
}

MACHINES = {
    "DGX-1": Machines(8, 80e9, 50e9, "vendor: NVLink 160 GB/s both ways, 4 x 100 Gb/s"),
    "DGX A100": Machines(
        8, 300e9, 200e9, "vendor: NVLink 600 GB/s both ways, 8 x 200 Gb/s"
    ),
    "DGX H100": Machines(
        8, 450e9, 400e9, "vendor: NVLink 900 GB/s both ways, 8 x 400 Gb/s"
    ),
    "Big Basin": Machines(8, 80e9, 6.25e9, "Goyal et al. 2017: NVLink, 50 Gb/s a node"),
    "25 GbE": Machines(4, 16e9, 3.125e9, "Horovod: 4 GPUs, 25 Gb/s; PCIe 3 assumed"),
    "10 GbE": Machines(
        1, 1.25e9, 1.25e9, "assumed: 10 Gb/s a node, 50 µs a hop", hop_outside=50e-6
    ),
}

# Which speeds on which machines are predicted.
CASES = (
    ("A100, ResNet-50", "DGX A100"),
    ("P100, VGG-16", "DGX-1"),
    ("H100, ResNet-50", "DGX H100"),
    ("2 CPU cores, cifar10_cnn", "10 GbE"),
)

# Speed, machines, from how many to how many devices, and the published efficiency. None
# of them has batch statistics over all devices.
CHECKS = (
    ("P100, ResNet-50, 32 images", "Big Basin", 8, 256, 0.90, "Goyal et al. 2017"),
    ("P100, VGG-16", "25 GbE", 1, 512, 0.68, "Horovod"),
    ("P100, VGG-16", "DGX-1", 1, 8, 1081 / (8 * 154), "TensorFlow"),
    ("P100, ResNet-50", "DGX-1", 1, 8, 1734 / (8 * 219), "TensorFlow"),
    ("A100, ResNet-50", "DGX A100", 1, 8, 16621 / (8 * 2470), "NVIDIA"),
)


def step_seconds(
    network: Network, speed: Speed, machines: Machines, devices: int, hides: bool
) -> float:
    """Returns how long a step takes on so many devices.

    An all-reduce goes over a ring in each node, in parts over a ring between nodes, and
    back; small ones over a tree between nodes.

    Args:
      network, speed, machines: what is exchanged, computed, and by what.
      devices: a multiple of a node's, or fewer.
      hides: whether the gradient is exchanged during the backward pass.
    """
    alone = speed.images / speed.per_second
    here = min(devices, machines.devices)
    nodes = devices // here
    inside = 2 * (here - 1) / here * network.bytes / machines.inside
    outside = 2 * (nodes - 1) / nodes * network.bytes / machines.outside
    exchange = inside + outside
    if hides:
        exchange = max(0.0, exchange - _BACKWARD * alone)
    hops = 2 * (here - 1) * machines.hop_inside
    hops += 2 * math.ceil(math.log2(nodes)) * machines.hop_outside
    waits = network.waits * (machines.base + hops) if devices > 1 else 0.0
    return alone + exchange + waits


def efficiency(
    network: Network,
    speed: Speed,
    machines: Machines,
    devices: int,
    hides: bool,
    start: int = 1,
) -> float:
    """Returns the share of `devices / start` times the rate of `start` devices."""
    first, last = (
        step_seconds(network, speed, machines, count, hides)
        for count in (start, devices)
    )
    return first / last


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    flags.DEFINE_string("output", None, "JSON file of the rows", flag_values=values)
    flags.DEFINE_float(
        "share",
        1.0,
        "of the vendors' bandwidths, that exchanges reach",
        lower_bound=0.01,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "bytes", False, "compile what networks exchange", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Prints the predictions, and what is known to compare them with."""
    table = Table(values.output, "Efficiency on n devices: on paper")
    speeds = PUBLISHED | MEASURED

    def row(
        name: str, key: str, on: str, devices: int, start: int, waits: bool
    ) -> None:
        speed, machines = speeds[key], MACHINES[on]
        network = NETWORKS[speed.network]
        if not waits:
            network = dataclasses.replace(network, waits=0)
        machines = dataclasses.replace(
            machines,
            inside=machines.inside * values.share,
            outside=machines.outside * values.share,
        )
        found = [
            100 * efficiency(network, speed, machines, devices, hides, start)
            for hides in (False, True)
        ]
        table.add(Row(name, "%", *found, HIDDEN))

    for key, on in CASES:
        speed, machines = speeds[key], MACHINES[on]
        seconds = speed.images / speed.per_second
        table.note(f"{key}: {speed.images} images in {1e3 * seconds:.4g} ms alone")
        table.note(f"  {speed.source}; {on}: {machines.source}")
        rate = machines.devices * speed.per_second
        table.note(f"  the input of a node: {rate:,.0f} images/s")
        for devices in COUNTS:
            row(f"{key}/{devices}", key, on, devices, 1, True)
    for key, on, start, stop, published, source in CHECKS:
        network = speeds[key].network
        row(f"check/{network}, {start} to {stop}", key, on, stop, start, False)
        table.note(f"{key} on {on}; published: {100 * published:.0f} % ({source})")
    if values.bytes:
        _compile(table)


def _compile(table: Table) -> None:
    """Prints what `NETWORKS` holds, and VGG-16's memory on three meshes."""
    mesh.pretend(8)
    for name in NETWORKS:
        need = _need(name, 8, 1)
        sizes = [exchange.bytes for exchange in need.exchanges]
        # The gradient comes in a few large ones.
        waits = sum(size < 1e-3 * sum(sizes) for size in sizes)
        table.note(f"{name}: Network({sum(sizes):_}, {waits})")
    for data, fsdp in ((1, 1), (8, 1), (1, 8)):
        need = _need("vgg16", data, fsdp)
        held = need.held["params"] + need.held["optimizer state"]
        table.add(Row(f"vgg16, AdamW, {data}x{fsdp}/held", "MB", held / 1e6))
        table.add(Row(f"vgg16, AdamW, {data}x{fsdp}/step", "MB", need.temporary / 1e6))
        sent = sum(exchange.sent for exchange in need.exchanges)
        table.add(Row(f"vgg16, AdamW, {data}x{fsdp}/sent", "MB", sent / 1e6))


def _need(name: str, data: int, fsdp: int) -> Any:
    from convnet import dry_run, prepare

    if name == "vgg16":
        config = config_lib.default()
        config.data.image_size = 224
        config.model.name, config.optimizer.name = "vgg16", "adamw"
    else:
        experiment = "imagenet_resnet50" if name == "resnet50" else name
        config = ours.experiment(experiment)
    large = config.data.image_size > 0
    config.data.mean, config.data.std = (0.5,), (0.5,)
    config.data.placement, config.data.workers = "stream", 0
    config.data.batch_size = 64 * data * fsdp
    config.mesh.data, config.mesh.fsdp = data, fsdp
    classes = 1000 if large else 10
    with ours.random_images(classes, 8 if large else 32, classes) as path:
        config.data.name, config.data.dir = "arrays", path
        return dry_run.measure(prepare.prepare(config), 64)


if __name__ == "__main__":
    cli.run(main, define, __doc__)
