"""Trains an experiment, evaluates it and writes a report.

usage: python -m convnet.main --config=experiments/digits.py [--workdir=runs/digits]
           [--config.optimizer.lr=0.1 ...]

The run goes on from its newest checkpoint if the workdir has one.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from convnet import interrupt

if __name__ == "__main__":
    interrupt.quietly()  # While what follows loads.

from absl import flags

from convnet import cli, mesh, resolve, together
from convnet.errors import UsageError


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    cli.define_config(values, argv)
    flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run: checkpoints, metrics, report; by default runs/EXPERIMENT",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "compile a train step for the mesh, on CPU devices that are made up, print what"
        " it needs, and stop",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "devices",
        None,
        "--dry_run: devices there are; by default as many as the config's mesh names",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "memory_gb",
        80.0,
        "--dry_run: memory of a device, in 10^9 bytes",
        lower_bound=0.001,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "preview",
        False,
        "write WORKDIR/preview.png, a sheet of augmented images, and stop",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "find_lr",
        False,
        "try growing learning rates for up to 100 steps, write WORKDIR/find_lr.png and"
        " .json, suggest one, and stop",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "distributed",
        None,
        "whether this is one process of several; by default it is where"
        " JAX_COORDINATOR_ADDRESS is set, or where Slurm, Cloud TPU or Kubernetes has"
        " started several",
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Trains, previews the augmentation, tests learning rates, or a mesh.

    Raises:
      ConvnetError: the run cannot go on, with the reason.
    """
    if values.config is None:
        raise UsageError(
            "--config is missing; for example --config=experiments/digits.py"
        )
    experiment = Path(values["config"].config_filename).stem
    workdir = Path(values.workdir or f"runs/{experiment}").expanduser()
    settings = resolve.check_type(values.config, experiment)
    mesh.fix_threads(mesh.threads(settings))
    # One process draws, looks for a learning rate, or compiles for others.
    alone = values.preview or values.find_lr or values.dry_run
    with together.joined(False if alone else values.distributed):
        _run(values, settings, workdir)


def _run(values: flags.FlagValues, settings: Any, workdir: Path) -> None:
    if values.dry_run:
        mesh.pretend(values.devices or max(settings.mesh.data, 1) * settings.mesh.fsdp)
    elif values.devices or values["memory_gb"].present:
        name = "devices" if values.devices else "memory_gb"
        raise UsageError(f"--{name} is for --dry_run, which is missing")
    mesh.start(settings.compilation_cache, mesh.threads(settings))
    # After `start`, because this is what brings JAX up.
    from convnet import dry_run, find_lr, prepare, preview, train

    if values.preview:
        path = workdir / "preview.png"
        count = preview.write_contact_sheet(prepare.prepare(settings), path)
        print(f"{count} augmented images: {path}")
        return
    if values.dry_run:
        print(dry_run.run(settings, values.memory_gb))
        return
    if values.find_lr:
        find_lr.run(settings, workdir)
        return
    command = shlex.join(["python", "-m", "convnet.main", *sys.argv[1:]])
    result = train.run(settings, workdir, command)
    for name, value in result.items():
        if name.startswith("test/") or name.endswith("seconds"):
            print(f"{name}: {value:.6g}")
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, define, __doc__)
