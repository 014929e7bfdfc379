"""The folder of a run: what lies in it, written so that nothing is ever half there."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import ml_collections

from convnet import config as config_lib
from convnet.errors import ConvnetError, UsageError
from convnet.files import write
from convnet.tensorboard import EventFile


class Workdir:
    """config.json, data.json, metrics.jsonl, tensorboard/, result.json, their rules.

    Args:
      path: of the folder.
      writes: False for a process that leaves writing to another one.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self._events: EventFile | None = None
        self._lock: IO[str] | None = None

    def create(self) -> None:
        """Makes the folder.

        Raises:
          ConvnetError: it cannot be made or written to.
        """
        if not self._writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test.{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise ConvnetError(
                f"--workdir={self.path} cannot be written to: {error.strerror};"
                " choose another"
            ) from error

    def lock(self) -> None:
        """Keeps other processes from training here, for as long as this one lives.

        Raises:
          ConvnetError: another process trains here.
        """
        if not self._writes:
            return
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConvnetError(
                f"another process is training in {self.path}: wait for it, or choose"
                " another --workdir"
            ) from error
        except OSError:  # Some network file systems have no locks.
            pass

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the content of a JSON file of the folder, None if it is absent."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConvnetError(
                f"{path} cannot be read: {error}; remove the workdir or choose another"
            ) from error

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        if self._writes:
            write(self.path / name, json.dumps(content, indent=2) + "\n")

    def config(self) -> ml_collections.ConfigDict:
        """Returns the config of the run; keys younger than it have their defaults.

        Raises:
          UsageError: there is no run.
        """
        saved = self.read_json("config.json")
        if saved is None:
            raise UsageError(f"--workdir={self.path}: no run has begun there")
        config = config_lib.default()
        for name in config_lib.KEYS:
            *parents, leaf = name.split(".")
            node, there = config, saved
            for part in parents:
                node, there = node[part], there.get(part, {})
            if leaf in there:
                value = there[leaf]
                node[leaf] = tuple(value) if isinstance(value, list) else value
        return config

    def adopt(self, config: ml_collections.ConfigDict) -> None:
        """Fills the keys that the first run measured from its data: mean and std."""
        saved = self.read_json("config.json")
        for name in ("mean", "std"):
            if saved and not config.data[name]:
                config.data[name] = tuple(saved["data"][name])

    def check(self, config: ml_collections.ConfigDict) -> None:
        """Refuses to go on with a run that another config began.

        Raises:
          UsageError: names the keys that differ, with both values.
        """
        saved = self.read_json("config.json")
        if saved is None:
            return
        differ = []
        for name, value in config_lib.result_keys(config).items():
            node: Any = saved
            for part in name.split("."):
                node = node.get(part, "absent") if isinstance(node, dict) else "absent"
            if node != value:
                differ.append(f"  {name}: {node!r} there, {value!r} now")
        if differ:
            raise UsageError(
                f"{self.path} holds a run with another config:\n"
                + "\n".join(differ)
                + "\nchoose another --workdir, or the same values"
            )

    def check_data(self, found: dict[str, Any]) -> None:
        """Refuses to go on with a run on other data; `found` is its fingerprint.

        Raises:
          UsageError: names what differs.
        """
        saved = self.read_json("data.json")
        if saved is not None and saved != found:
            differ = [key for key in found if found[key] != saved.get(key)]
            raise UsageError(
                f"{self.path} holds a run on other data: they differ in"
                f" {', '.join(differ)}\nchoose another --workdir, or the same data"
            )

    def cut(self, step: int) -> None:
        """Cuts metrics.jsonl back to `step`, and the TensorBoard curves with it."""
        if not self._writes:
            return
        path = self.path / "metrics.jsonl"
        if path.exists():
            rows = [row for row in self.history() if row["step"] <= step]
            write(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._events = EventFile(self.path / "tensorboard", step + 1)

    def history(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl without a line that a kill cut short."""
        rows = []
        path = self.path / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl, and points to TensorBoard."""
        if not self._writes:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        assert self._events is not None, "cut() comes first"
        self._events.scalars(step, values)

    def close(self) -> None:
        """Closes the TensorBoard file and lets other runs train here."""
        for file in (self._events, self._lock):
            if file is not None:
                file.close()
