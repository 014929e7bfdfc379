"""Whether a run that is killed (-9) and started again ends in the same bits.

usage: python -m benchmarks.kills [--cases=digits,cifar10,folder] [--kills=20]
           [--cifar10_dir=DIR] [--set=train.steps=20] [--output=FILE.json]

Each case is trained once undisturbed, as the program of its own that a user starts;
then again in another workdir, killed at random moments, and started again each time.
The moments are spread over start-up, training, evaluation, a checkpoint being written,
and the end (last evaluation, model file, report). Most kills take the whole process
group, every third the main process alone: then its loader workers must end by
themselves. `params/sha256`, the config's hash, and every number in metrics.jsonl but
the times must be those of the undisturbed run.

Exit status: 0 all are the same; 1 one differs, or a process was left over.
"""

import collections
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import kills_cases
from benchmarks import table as table_lib
from benchmarks.kills_cases import CASES, EVERY
from benchmarks.table import Row, Table
from convnet import cli
from convnet.errors import ConvnetError
from convnet.workdir import Workdir

PEER = "undisturbed"
_HASH = "params/sha256"
PHASES = ("save", "train", "start", "evaluate", "finish")
_POLL_SECONDS = 0.002
_LATER_SECONDS = 0.05  # a kill comes up to so long after its moment
_LONGEST_SECONDS = 600  # that anything may take
_ORPHANS_SECONDS = 20  # in which workers without a main process must be gone
_TIMES = ("images_per_second", "input_wait")


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    shown = ",".join(CASES)
    flags.DEFINE_string("output", None, "JSON file of the rows", flag_values=values)
    flags.DEFINE_string("cases", shown, f"of {shown}", flag_values=values)
    flags.DEFINE_string(
        "cifar10_dir",
        None,
        "where cifar10 lies as TFDS prepared it; by default it is downloaded",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "set", [], "KEY=VALUE of the config, as train.steps=20", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the moments", flag_values=values)
    flags.DEFINE_integer(
        "kills",
        20,
        "in all, shared among the cases",
        lower_bound=1,
        flag_values=values,
    )


def main(values: flags.FlagValues) -> int:
    """Runs one case after the other; returns the exit status, 0 or 1."""
    names = table_lib.choose(values.cases, tuple(CASES), "cases")
    table = Table(values.output, "killed (-9) and started again")
    fine = True
    for place, name in enumerate(names):
        kills = len(range(place, values.kills, len(names)))
        rng = random.Random(f"{values.seed} {name}")
        with tempfile.TemporaryDirectory() as folder:
            flags_of_run = [*CASES[name], *EVERY]
            flags_of_run += [f"--config.{override}" for override in values.set]
            if name == "folder":
                kills_cases.write_pictures(Path(folder) / "pictures")
                flags_of_run.append(f"--config.data.dir={folder}/pictures")
            if name == "cifar10" and values.cifar10_dir:
                data = Path(values.cifar10_dir).expanduser().absolute()
                flags_of_run.append(f"--config.data.dir={data}")
            fine &= _Case(table, name, Path(folder), flags_of_run, rng).run(kills)
    return 0 if fine else 1


@dataclasses.dataclass
class _Kill:
    """When to kill, and what came of it."""

    phase: str
    step: int  # that training must have reached
    alone: bool  # the main process, and not its group
    found: str = "too late"  # what was under way, as the workdir shows it


class _Case:
    """One configuration: the undisturbed run, the kills, the comparison."""

    def __init__(
        self,
        table: Table,
        name: str,
        folder: Path,
        arguments: list[str],
        rng: random.Random,
    ) -> None:
        self._table, self._name, self._rng = table, name, rng
        self._folder, self._arguments = folder, arguments
        self._whole = Workdir(folder / "undisturbed")
        self._killed = Workdir(folder / "killed")
        self._logs: list[Path] = []

    def run(self, count: int) -> bool:
        """Returns whether nothing was lost, and nothing left over."""
        seconds = self._undisturbed()
        start, left_over = time.monotonic(), 0
        kills = self._plan(count)
        for kill in kills:
            left_over += not self._start_and_kill(kill)
        self._end(self._start(self._killed))
        self._add("seconds", "s", time.monotonic() - start, seconds, PEER)
        return self._report(kills, left_over)

    def _report(self, kills: list[_Kill], left_over: int) -> bool:
        found = collections.Counter(kill.found for kill in kills)
        steps = map(self._resumed, self._logs[1:])
        resumed = ", ".join(str(step) for step in steps if step is not None)
        note = ", ".join(f"{n} {what}" for what, n in found.items())
        self._table.note(f"killed {note}; resumed from steps {resumed or None}")
        self._add("kills", "kills", len(kills) - found["too late"])
        self._add("kills/while_saving", "kills", found["saving"])
        self._add("kills/workers_left_over", "kills", left_over)
        fine = not left_over
        for what, content in (
            ("params", lambda workdir: workdir.read_json("result.json")[_HASH]),
            ("metrics", _numbers),
        ):
            same = content(self._killed) == content(self._whole)
            self._add(f"same_{what}", "%", 100.0 * same)
            fine &= same
        return fine

    def _add(self, name: str, *columns: Any) -> None:
        self._table.add(Row(f"{self._name}/{name}", *columns))

    def _undisturbed(self) -> float:
        """Trains once; returns the seconds, and notes those of start and end."""
        begun = time.monotonic()
        process = self._start(self._whole)
        self._wait(process, lambda: self._whole.history())
        self._start_seconds = time.monotonic() - begun
        self._wait(process, lambda: (self._whole.path / "model.safetensors").exists())
        last = time.monotonic()
        self._end(process)
        rows = self._whole.history()
        self._total = rows[-1]["step"]
        self._evaluated = [row["step"] for row in rows if "test/loss" in row]
        # The report, and as much before for the model file.
        self._finish_seconds = 2 * (time.monotonic() - last)
        return time.monotonic() - begun

    def _plan(self, count: int) -> list[_Kill]:
        """Kills of each phase, in the order of the steps at which they are due."""
        phases = [PHASES[i % len(PHASES)] for i in range(count)]
        self._rng.shuffle(phases)
        phases.sort(key="finish".__eq__)
        kills = []
        for place, phase in enumerate(phases):
            step = int((place + self._rng.random()) / count * self._total)
            kills.append(_Kill(phase, step, alone=place % 3 == 2))
        return kills

    def _start_and_kill(self, kill: _Kill) -> bool:
        """Kills a run at its moment; returns whether all its processes have ended."""
        before = len(self._killed.history())
        process = self._start(self._killed)
        due = {
            "start": lambda: True,
            "train": lambda: self._reached(kill.step),
            "evaluate": lambda: self._reached(kill.step, self._evaluated),
            "save": lambda: self._reached(kill.step) and self._saving(),
            "finish": lambda: (
                self._resumed(self._logs[-1]) == self._total
                or "test/loss" in (self._killed.history()[before:] or [{}])[-1]
                and self._reached(self._total)
            ),
        }
        self._wait(process, due[kill.phase])
        longest = {"start": self._start_seconds, "finish": self._finish_seconds}
        time.sleep(self._rng.uniform(0, longest.get(kill.phase, _LATER_SECONDS)))
        if process.poll() is None:
            (os.kill if kill.alone else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            kill.found = self._under_way(before)
        return self._gone(process.pid)

    def _reached(self, step: int, among: Sequence[int] = ()) -> bool:
        """Whether training has come to a step, or to one of these after it."""
        step = min((s for s in among if s >= step), default=step)
        rows = self._killed.history()
        return bool(rows) and rows[-1]["step"] >= step

    def _saving(self) -> bool:
        # Orbax writes beside the place, and renames.
        return any((self._killed.path / "checkpoints").glob("*tmp*"))

    def _under_way(self, before: int) -> str:
        rows = self._killed.history()
        if self._saving():
            return "saving"
        if len(rows) <= before:
            return "starting"
        last = rows[-1]
        if "test/loss" in last:
            return "finishing" if last["step"] == self._total else "training"
        return "evaluating" if last["step"] in self._evaluated else "training"

    def _gone(self, group: int) -> bool:
        end = time.monotonic() + _ORPHANS_SECONDS
        while _living(group):
            if time.monotonic() > end:
                self._table.note(f"{self._name}: processes were left over")
                os.killpg(group, signal.SIGKILL)
                return False
            time.sleep(0.05)
        return True

    def _start(self, workdir: Workdir) -> subprocess.Popen:
        self._logs.append(self._folder / f"{len(self._logs)}.log")
        with open(self._logs[-1], "w") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "convnet.main"),
                    *(*self._arguments, f"--workdir={workdir.path}"),
                ],
                cwd=cli.PROJECT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, process: subprocess.Popen, due: Callable[[], Any]) -> None:
        """Waits for a moment, or for the end of the process."""
        end = time.monotonic() + _LONGEST_SECONDS
        while not due() and process.poll() is None:
            if time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL)
                raise ConvnetError(f"{self._name}: nothing happens any more")
            time.sleep(_POLL_SECONDS)

    def _end(self, process: subprocess.Popen) -> None:
        """Waits for a run that ends by itself.

        Raises:
          ConvnetError: it fails.
        """
        self._wait(process, lambda: False)
        if process.returncode:
            text = self._logs[-1].read_text()
            raise ConvnetError(f"{self._name}: a run failed\n{text[-2000:]}")

    def _resumed(self, log: Path) -> int | None:
        found = re.search(r"resuming from step ([\d,]+)", log.read_text())
        return int(found[1].replace(",", "")) if found else None


def _numbers(workdir: Workdir) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without the times."""
    return [
        {name: value for name, value in row.items() if name not in _TIMES}
        for row in workdir.history()
    ]


def _living(group: int) -> bool:
    """Whether a process of this group runs; what waits for its parent has ended."""
    found = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True
    )
    rows = (line.split() for line in found.stdout.splitlines())
    return any(int(pgid) == group and "Z" not in stat for pgid, stat in rows)


if __name__ == "__main__":
    cli.run(main, define, __doc__)
