"""Images per second of a train step and of inference, against PyTorch.

usage: python -m benchmarks.train_step [--networks=speednet] [--dtypes=bfloat16]
           [--peer_python=PATH] [--output=FILE.json]

Both sides have the same networks (their parameters are counted and compared), random
32x32 images that lie in memory, shuffled batches, and SGD with momentum. Inference ends
in probabilities. PyTorch runs with channels last, fused SGD, the heap setting that we
use, and for bfloat16 either autocast or bfloat16 weights, whichever is faster.
"""

from collections.abc import Callable

from absl import flags

from benchmarks import table as table_lib
from benchmarks.ours import Side
from benchmarks.peer import Peer, PeerError
from benchmarks.table import Row, Table
from convnet import cli
from convnet.errors import ConvnetError

# Images in a step.
BATCH = {
    "cpu": {"speednet": 500, "resnet18": 128, "vgg16": 128},
    "gpu": {"speednet": 2000, "resnet18": 512, "vgg16": 512},
}
NETWORKS = tuple(BATCH["cpu"])
DTYPES = ("float32", "bfloat16")
MODES = ("train", "infer")
PEERS = ("eager", "compiled")


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values)
    for name, known in (
        ("networks", NETWORKS),
        ("dtypes", DTYPES),
        ("modes", MODES),
        ("peers", PEERS),
    ):
        shown = ",".join(known)
        flags.DEFINE_string(name, shown, f"of {shown}", flag_values=values)
    flags.DEFINE_integer(
        "batch", 0, "images in a step; 0: by network", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "width",
        64,
        "features of the first stage of ResNet and VGG",
        lower_bound=1,
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Measures network by network; ours and the peer's ways take turns.

    Raises:
      ConvnetError: the networks of the two sides differ.
    """
    networks = table_lib.choose(values.networks, NETWORKS, "networks")
    dtypes = table_lib.choose(values.dtypes, DTYPES, "dtypes")
    modes = table_lib.choose(values.modes, MODES, "modes")
    peers = table_lib.choose(values.peers, PEERS, "peers")
    python = table_lib.start(values)
    table = Table(values.output, f"train step and inference, {values.device}")
    for network in networks:
        for dtype in dtypes:
            batch = values.batch or BATCH[values.device][network]
            arguments = {
                "network": network,
                "dtype": dtype,
                "batch": batch,
                "width": values.width,
                "size": 32,
                "images": 4 * batch,
            }
            ours = Side(**arguments)
            if python is None:
                measure(table, ours, None, arguments, modes, [], values.repeats)
                continue
            with Peer(python, "benchmarks.peers.train_step") as peer:
                built = peer("build", device=values.device, **arguments)
                check(network, ours.parameters, built["parameters"])
                measure(table, ours, peer, arguments, modes, peers, values.repeats)


def check(network: str, ours: int, peer: int) -> None:
    """Raises ConvnetError if the two sides train different numbers of parameters."""
    if ours != peer:
        raise ConvnetError(
            f"{network}: ours trains {ours:,} parameters, the peer's {peer:,}; they are"
            " not the same network"
        )


def measure(
    table: Table,
    ours: Side,
    peer: Peer | None,
    arguments: dict,
    modes: list[str],
    peers: list[str],
    repeats: int,
) -> None:
    """Adds the rows of one network in one precision."""
    batch = arguments["batch"]
    for mode in modes:
        case = f"{arguments['network']}/{arguments['dtype']}/{mode}"
        sides = {"": table_lib.per_second(batch, getattr(ours, mode))}
        for way in peers:
            side = peer_side(table, peer, mode, way, batch)
            if side is not None:
                sides[way] = side
        found = table_lib.interleave(list(sides.values()), repeats)
        medians = dict(zip(sides, map(table_lib.median, found), strict=True))
        for way in peers or [None]:
            name = f"PyTorch {way}" if way else None
            row = Row(case, "images/s", medians[""], medians.get(way), name)
            table.add(row)


def peer_side(
    table: Table, peer: Peer, mode: str, way: str, batch: int
) -> Callable[[], float] | None:
    """Returns a side for `interleave`; None, and a line that says why, if it fails."""
    try:
        made = peer("prepare", mode=mode, compiled=way == "compiled")

        def run(steps: int) -> float:
            return peer("run", way=made["way"], steps=steps)

        side = table_lib.per_second(batch, run)
    except PeerError as error:
        table.note(f"PyTorch {way}, {mode}: {error}")
        return None
    if made["kind"] != "float32":
        table.note(f"PyTorch {way}, {mode}: bfloat16 by {made['kind']}")
    return side


if __name__ == "__main__":
    cli.run(main, define, __doc__)
