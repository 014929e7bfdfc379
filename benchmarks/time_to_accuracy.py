"""Seconds of training until CIFAR-10's test images are right, against PyTorch.

usage: python -m benchmarks.time_to_accuracy [--data_dir=FOLDER] [--seeds=N]
           [--epochs=N] [--peer_python=PATH] [--output=FILE.json]

Ours is `python -m convnet.main` with the experiment; the peer trains airbench94's
recipe, written in PyTorch, on the same decoded images. Both are evaluated after every
epoch, and in the end once more by the experiment's test-time augmentation (for which
the last epoch counts). Seconds are those of training alone, and once more with
compilation (and initialisation) added; evaluation never counts. The two sides take
turns, epoch by epoch, so that a slow hour of the machine is one for both (except where
--workdir holds a run of ours); rows of one seed come as soon as it is done, means over
the seeds last. Of both sides the first run compiles everything; later ones find what
can be kept (on a GPU all of it), so that the rows of seed 0 are those of a first run.

The targets 92, 93 and 94 % are for the original images. On a copy of CIFAR-10 stored as
JPEG they are out of reach; a target that no evaluation reached has no number.
"""

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import table as table_lib
from benchmarks.peer import Peer
from benchmarks.table import Row, Table
from benchmarks.turns import Run
from convnet import cli
from convnet.data import source
from convnet.data.decode import DecodeError
from convnet.errors import UsageError
from convnet.workdir import Workdir

TARGETS = "85,88,90,92,93,94"
PEER = "PyTorch"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
      points: (seconds of training, accuracy in %) after each epoch, and in the end.
      compilation: seconds of compilation and initialisation.
      parameters: how many numbers were trained.
    """

    points: tuple[tuple[float, float], ...]
    compilation: float
    parameters: int

    def seconds_to(self, target: float, compiling: bool = False) -> float | None:
        """Returns the seconds until an evaluation reached `target` %, None if none."""
        extra = self.compilation if compiling else 0.0
        for seconds, accuracy in self.points:
            if accuracy >= target:
                return seconds + extra
        return None


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values, repeats=None)
    for name, default, meaning in (
        ("experiment", "experiments/cifar10_speed.py", "our side"),
        ("data_dir", "", "data.dir of the experiment, if not its own"),
        ("targets", TARGETS, "accuracies in %"),
        ("workdir", "", "folder to keep our runs in; a finished one is not repeated"),
    ):
        flags.DEFINE_string(name, default, meaning, flag_values=values)
    flags.DEFINE_integer("seeds", 5, "runs, from seed 0", 1, flag_values=values)
    flags.DEFINE_float(
        "epochs", None, "of both sides, instead of the experiment's", flag_values=values
    )
    flags.DEFINE_integer(
        "limit", 0, "use only n images of each split; 0: all", 0, flag_values=values
    )
    flags.DEFINE_bool(
        "peer_compiled",
        None,
        "compile the peer's network; by default on a GPU",
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Trains both sides for every seed.

    Raises:
      ConvnetError: a run failed.
    """
    try:
        targets = [float(target) for target in values.targets.split(",")]
    except ValueError as error:
        raise UsageError(f"--targets={values.targets}: {error}") from error
    arguments = [f"--config={values.experiment}", *_overrides(values)]
    config = cli.parse(["", *arguments], cli.define_config, "").config
    python = table_lib.peer_python(values)
    title = f"seconds to accuracy: {values.experiment}, {values.device}"
    table = Table(values.output, title)
    ours: list[Curve] = []
    peers: list[Curve] = []
    with contextlib.ExitStack() as stack:
        folder = values.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        workdir = Path(folder).expanduser().resolve()
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        peer = None
        if python is not None:
            peer = stack.enter_context(Peer(python, "benchmarks.peers.airbench"))
            _load(peer, config, values.device)
        for seed in range(values.seeds):
            path = workdir / f"seed_{seed}"
            cached = [*arguments, f"--config.compilation_cache={cache}"]
            curve, other = train(cached, path, seed, peer, config, values)
            ours.append(curve)
            if other is not None:
                peers.append(other)
                counts = curve.parameters, other.parameters
                if seed == 0 and counts[0] != counts[1]:
                    table.note(
                        "two networks: of {:,} and {:,} parameters".format(*counts)
                    )
            add_rows(table, f"seed_{seed}/", ours[-1:], peers[-1:], targets)
    add_rows(table, "mean/", ours, peers, targets)


def _overrides(values: flags.FlagValues) -> list[str]:
    overrides = ["--config.train.eval_every=1"]
    if values.data_dir:
        overrides.append(f"--config.data.dir={values.data_dir}")
    if values.epochs:
        overrides.append(f"--config.train.epochs={values.epochs}")
    if values.limit:
        for split in ("train", "test"):
            overrides.append(f"--config.data.{split}_limit={values.limit}")
    return overrides


def _load(peer: Peer, config: Any, device: str) -> None:
    """Gives the peer our decoded images."""
    dataset = source.load(config.data, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        path, arrays = f"{folder}/images.npz", {}
        for name in ("train", "test"):
            split = getattr(dataset, name)
            records = source.read(split, range(len(split)))
            for record in records:
                if isinstance(record, DecodeError):
                    raise record
            arrays[f"x_{name}"] = np.stack([record["input"] for record in records])
            arrays[f"y_{name}"] = np.stack([record["label"] for record in records])
        np.savez(path, **arrays)
        peer("load", path=path, device=device)


def train(
    arguments: list[str],
    path: Path,
    seed: int,
    peer: Peer | None,
    config: Any,
    values: flags.FlagValues,
) -> tuple[Curve, Curve | None]:
    """Trains both sides in turns, ours in the workdir `path`.

    Raises:
      ConvnetError: a side failed.
    """
    arguments = [f"--workdir={path}", f"--config.seed={seed}", *arguments]
    environment = {"JAX_PLATFORMS": table_lib.PLATFORM[values.device]}
    other = None if peer is None else PeerRun(peer, config, seed, values)
    with Run(arguments, environment) as run:
        while run.go_on():
            if other is not None:
                other.epoch()
    workdir = Workdir(path)
    batch = workdir.read_json("config.json")["data"]["batch_size"]
    ours = curve(workdir.history(), batch, workdir.read_json("result.json"))
    return ours, other and other.curve()


def curve(rows: list[dict[str, Any]], batch: int, result: dict[str, Any]) -> Curve:
    """Reads a run off its metrics.jsonl and result.json.

    A line of training gives the rate since the last such line; from it come the seconds
    of training, without evaluations, checkpoints and compilation.
    """
    points, seconds, step = [], 0.0, 0
    for row in rows:
        if "images_per_second" in row:
            seconds += (row["step"] - step) * batch / row["images_per_second"]
            step = row["step"]
        if "test/accuracy" in row:
            points.append((seconds, 100 * row["test/accuracy"]))
    points.append((seconds, 100 * result["test/accuracy"]))
    return Curve(tuple(points), result["compile/seconds"], result["params/count"])


class PeerRun:
    """The peer's run, with as many epochs and images in a step as ours."""

    def __init__(
        self, peer: Peer, config: Any, seed: int, values: flags.FlagValues
    ) -> None:
        compiled = values.peer_compiled
        self._peer, self._views = peer, config.evaluate.tta
        self._begun = peer(
            "begin",
            seed=seed,
            epochs=config.train.epochs,
            batch=config.data.batch_size,
            compiled=values.device == "gpu" if compiled is None else compiled,
        )
        self._points: list[tuple[float, float]] = []
        self._seconds = 0.0

    def epoch(self) -> None:
        """Has it train and evaluate its next epoch, if one is left."""
        if self._done():
            return
        epoch = self._peer("epoch")
        self._seconds += epoch["seconds"]
        self._points.append((self._seconds, 100 * epoch["accuracy"]))

    def curve(self) -> Curve:
        """Has it do the epochs that are left, if any; returns the whole run."""
        while not self._done():
            self.epoch()
        last = self._peer("evaluate", views=self._views)
        points = (*self._points, (self._seconds, 100 * last))
        return Curve(points, self._begun["seconds"], self._begun["parameters"])

    def _done(self) -> bool:
        return len(self._points) == self._begun["epochs"]


def add_rows(
    table: Table,
    prefix: str,
    ours: Sequence[Curve],
    peers: Sequence[Curve],
    targets: Sequence[float],
) -> None:
    """Adds the final accuracy, and for each target the seconds, without and with
    compilation; each a mean over runs, with their spread in a line below."""
    name = PEER if peers else None

    def add(case: str, unit: str, measure: Callable[[Curve], float | None]) -> None:
        sides = [[measure(run) for run in runs] for runs in (ours, peers)]
        means = [mean(side) for side in sides]
        table.add(Row(prefix + case, unit, *means, name))
        if len(ours) > 1:
            table.note("; ".join(map(spread, ("ours", "peer"), sides)))

    add("final_accuracy", "%", lambda run: run.points[-1][1])
    add("train", "s", lambda run: run.points[-1][0])
    for target in targets:
        case = f"to_{target:g}"
        add(case, "s", lambda run, target=target: run.seconds_to(target))
        add(
            f"{case}/with_compilation",
            "s",
            lambda run, target=target: run.seconds_to(target, compiling=True),
        )


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean; None if there is none for some run, which did not get there."""
    if not values or None in values:
        return None
    return statistics.fmean(values)


def spread(side: str, values: Sequence[float | None]) -> str:
    """Returns for example "ours 93.9 to 94.1, deviation 0.05, 5 of 5 runs"."""
    found = [value for value in values if value is not None]
    text = f"{side}: {len(found)} of {len(values)} runs"
    if len(found) > 1:
        deviation = statistics.stdev(found)
        text += f", {min(found):.4g} to {max(found):.4g}, deviation {deviation:.2g}"
    return text


if __name__ == "__main__":
    cli.run(main, define, __doc__)
