"""Recomputes what a workdir or a model file claims, and prints what holds.

usage: python -m convnet.verify --workdir=runs/digits [--replay=1000]
       python -m convnet.verify --model=M

Of a workdir: that the config and the data are those it was trained with, that every
checkpoint has the content it was saved with, that result.json and the model file
belong to the last one, and that training from the checkpoint before (or from the
start) leads to it again, bit for bit. Nothing in the workdir is changed. Of a model
file: that it is whole and gives the logits that it was saved with.

Exit status: 0 all of it holds; 1 something does not.
"""

from pathlib import Path
from typing import Any

from absl import flags

from convnet import cli, mesh
from convnet import config as config_lib
from convnet.errors import ConvnetError, UsageError
from convnet.workdir import Workdir


class Findings:
    """What was looked at, printed line by line."""

    def __init__(self) -> None:
        self.held = self.failed = 0

    def add(self, what: str, holds: bool, how: str) -> None:
        """Prints and counts one claim."""
        self.held += holds
        self.failed += not holds
        print(f"{'ok' if holds else 'FAILED':<8}{what}: {how}", flush=True)

    def skip(self, what: str, why: str) -> None:
        """Prints what could not be looked at."""
        print(f"{'-':<8}{what}: {why}", flush=True)


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    del argv
    flags.DEFINE_string("workdir", None, "folder of a run", flag_values=values)
    flags.DEFINE_string(
        "model",
        None,
        "a model file, or the name of a model that ships",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "replay",
        1000,
        "most steps that are trained again",
        lower_bound=0,
        flag_values=values,
    )


def main(values: flags.FlagValues) -> int:
    """Verifies what the flags name; returns the exit status, 0 or 1.

    Raises:
      UsageError: not one of --workdir and --model is given, or there is no such run.
      ConvnetError: the run's data cannot be read, or a process trains in the workdir.
    """
    if bool(values.workdir) == bool(values.model):
        raise UsageError("want one of --workdir and --model (--help shows the usage)")
    findings = Findings()
    if values.model:
        mesh.start("auto")
        verify_model(findings, values.model)
    else:
        workdir = Workdir(Path(values.workdir).expanduser())
        config = workdir.config()
        mesh.start(config.compilation_cache, mesh.threads(config))
        verify_workdir(findings, workdir, config, values.replay)
    total = findings.held + findings.failed
    print(f"{findings.held} of {total} claims hold")
    return 1 if findings.failed else 0


def verify_model(findings: Findings, name: str | Path) -> Any:
    """Verifies a model file; returns its Bundle, None if it cannot be read."""
    # After `start`, because this brings JAX up.
    from convnet import bundle as bundle_lib

    path = bundle_lib.find(name)
    try:
        bundle = bundle_lib.load(path)
    except ConvnetError as error:
        findings.add("model file", False, str(error))
        return None
    # `load` lets pass what no prediction depends on.
    sealed = bundle_lib.is_sealed(path)
    says = {
        True: "is what was saved, to the last bit, and gives its probe's logits",
        False: "gives its probe's logits, but was changed after it was saved",
        None: "gives its probe's logits (it holds no hash of itself)",
    }
    findings.add("model file", sealed is not False, f"{path.name} {says[sealed]}")
    return bundle


def verify_workdir(
    findings: Findings, workdir: Workdir, config: Any, most: int
) -> None:
    """Verifies a run; `most` is how many steps may be trained again."""
    from convnet import checkpoint as checkpoint_lib
    from convnet.data import measure
    from convnet.prepare import initial_state, prepare

    result = workdir.read_json("result.json")
    it = prepare(config)
    if result is None:
        findings.skip("result.json", "the run is not finished")
    else:
        digest = config_lib.sha256(config, without=workdir.younger_keys())
        same = digest == result["config/sha256"]
        findings.add("config", same, _compared(same, "hash", "result.json's"))
    data = measure.fingerprint(it.dataset) | it.plan.fingerprint()
    same = data == workdir.read_json("data.json")
    findings.add("data", same, _compared(same, "fingerprint", "data.json's"))
    workdir.lock()
    folder = workdir.path / "checkpoints"
    if not folder.is_dir():
        findings.add("checkpoints", result is None, "there are none")
        return
    try:
        checkpoints = checkpoint_lib.Checkpoints(folder, keep=None)
    except ValueError as error:  # Orbax reads all scores.
        findings.add("checkpoints", False, f"a file metrics/metrics is broken: {error}")
        return
    try:
        it.state = initial_state(it)
        states = {0: it.state} | _read(findings, checkpoints, it.state)
        _verify_last(findings, workdir, result, states)
        _replay(findings, it, checkpoints, workdir, states, most)
    finally:
        checkpoints.close()
        workdir.close()


def _compared(same: bool, what: str, whose: str) -> str:
    return f"its {what} is {whose}" if same else f"its {what} is not {whose}"


def _read(findings: Findings, checkpoints: Any, like: Any) -> dict[int, Any]:
    """The states of all checkpoints that are whole, by step."""
    states = {}
    for step in checkpoints.steps():
        try:
            states[step], _ = checkpoints.read(step, like)
            why = "its content has the hash that it was saved with"
        except Exception as error:  # Whatever a damaged file can raise.
            why = " ".join(str(error).split())[:200]
        findings.add(f"checkpoint {step}", step in states, why)
    return states


def _verify_last(
    findings: Findings,
    workdir: Workdir,
    result: dict[str, Any] | None,
    states: dict[int, Any],
) -> None:
    """Compares result.json and the model file with the last checkpoint."""
    from convnet import checkpoint as checkpoint_lib

    if result is None:
        return
    state = states.get(result["step"])
    if state is None:
        findings.add("result", False, f"step {result['step']} has no whole checkpoint")
        return
    same = checkpoint_lib.result_sha256(state) == result["params/sha256"]
    whose = f"that of checkpoint {result['step']}"
    findings.add("result", same, _compared(same, "params/sha256", whose))
    bundle = verify_model(findings, workdir.path / "model.safetensors")
    if bundle is not None:
        hashes = [
            checkpoint_lib.sha256(v) for v in (bundle.variables, state.variables())
        ]
        same = hashes[0] == hashes[1]
        findings.add("model's weights", same, _compared(same, "hash", whose))


def _replay(
    findings: Findings,
    it: Any,
    checkpoints: Any,
    workdir: Workdir,
    states: dict[int, Any],
    most: int,
) -> None:
    """Trains from the checkpoint before the last one, or from the start, to it."""
    from convnet import checkpoint as checkpoint_lib
    from convnet.loop import Loop

    if len(states) < 2:
        findings.skip("replay", "there is no whole checkpoint")
        return
    *_, before, last = sorted(states)
    what = f"replay of steps {before + 1:,} to {last:,}"
    if last - before > most:
        findings.skip(what, f"more than --replay={most}")
        return
    wanted = checkpoint_lib.sha256(states[last])
    it.state = states[before]
    Loop(it, before, checkpoints, workdir).replay(last)
    same = checkpoint_lib.sha256(it.state) == wanted
    how = "the same state, bit for bit"
    findings.add(what, same, how if same else "another state" + _versions(workdir))


def _versions(workdir: Workdir) -> str:
    """What is newer or older than when the run was finished, as a remark."""
    from convnet import finish

    saved = (workdir.read_json("result.json") or {}).get("versions", {})
    now = finish.versions()
    differ = [f"{k} {saved[k]} then, {now[k]} now" for k in saved if saved[k] != now[k]]
    return f" ({'; '.join(differ)})" if differ else ""


if __name__ == "__main__":
    cli.run(main, define, __doc__)
