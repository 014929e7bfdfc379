"""A run, from the state in which the workdir stands to the report."""

import json
from pathlib import Path
from typing import Any

import ml_collections

from convnet import config as config_lib
from convnet import finish, processes
from convnet import mesh as mesh_lib
from convnet.checkpoint import Checkpoints
from convnet.data import measure
from convnet.loop import Loop
from convnet.prepare import Run, initial_state, prepare
from convnet.workdir import Workdir


def run(config: ml_collections.ConfigDict, path: Path, command: str) -> dict[str, Any]:
    """Trains, evaluates and reports, going on from where the workdir stands.

    Args:
      config: the experiment; filled in as `prepare` does.
      path: the workdir.
      command: what the report shows as the way to reproduce the run.

    Returns:
      The content of result.json.

    Raises:
      ConvnetError: with the reason; what was done so far is kept.
      Interrupted: by a signal, after a checkpoint was saved.
    """
    workdir = Workdir(path, writes=processes.leads())
    workdir.adopt(config)
    it = prepare(config)
    workdir.check(config)
    data = measure.fingerprint(it.dataset) | it.plan.fingerprint()
    data |= it.recipe.task.fingerprint()
    workdir.check_data(data)
    processes.check_same(
        {"config": config_lib.sha256(config), "data": json.dumps(data)}
    )
    result = processes.tell(workdir.read_json("result.json"))
    if result is not None:
        print(f"{path} is finished (step {result['step']}); nothing to do")
        return result
    workdir.create()
    workdir.lock()
    workdir.write_json("config.json", config_lib.to_dict(config))
    workdir.write_json("data.json", data)
    if config.init_from:
        workdir.write_json("transfer.json", it.plan.to_dict())
    processes.wait()
    print(_heading(it, path))
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint.keep)
    try:
        it.state = initial_state(it)
        start = _resume(it, checkpoints)
        workdir.cut(start)
        if start < it.total_steps:
            Loop(it, start, checkpoints, workdir).run()
        checkpoints.wait()
        return finish.finish(it, workdir, command)
    finally:
        checkpoints.close()
        workdir.close()


def _heading(it: Run, path: Path) -> str:
    examples = f"{len(it.dataset.train):,} train, {len(it.dataset.test):,} test"
    return (
        f"{it.summary}\n"
        f"data: {it.config.data.name}, {examples};"
        f" {len(it.dataset.classes) or 'no'} classes\n"
        f"devices: {mesh_lib.describe(it.mesh)}\n"
        f"steps: {it.total_steps:,} of {it.config.data.batch_size} examples\n"
        f"workdir: {path}"
    )


def _resume(it: Run, checkpoints: Checkpoints) -> int:
    restored = checkpoints.restore(it.state)
    if restored is None:
        return 0
    it.state, about = restored
    it.train_seconds = about["train_seconds"]
    print(f"resuming from step {about['step']:,}")
    return about["step"]
