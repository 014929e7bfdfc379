"""The folder of a run: what lies in it, written so that nothing is ever half there."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import ml_collections

from convnet import config as config_lib
from convnet import resolve
from convnet.errors import ConvnetError, UsageError
from convnet.files import cannot_write, write
from convnet.tensorboard import EventFile

_ABSENT = object()


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
        try:
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115
        except OSError:  # A place where one can only read, as `verify` does.
            return
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
        """Returns the content of a JSON file of the folder, None if it is absent.

        Raises:
          ConvnetError: it is damaged.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise ValueError("it holds no names and values")
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        return content

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        if self._writes:
            write(self.path / name, json.dumps(content, indent=2) + "\n")

    def config(self) -> ml_collections.ConfigDict:
        """Returns the config of the run; keys younger than it have their defaults.

        Raises:
          UsageError: there is no run.
          ConvnetError: config.json is damaged.
        """
        saved = self.read_json("config.json")
        if saved is None:
            raise UsageError(f"--workdir={self.path}: no run has begun there")
        config = config_lib.default()
        try:
            for name, value in _present(saved).items():
                *parents, leaf = name.split(".")
                node = config
                for part in parents:
                    node = node[part]
                node[leaf] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise _damaged(self.path / "config.json", error) from error
        return config

    def younger_keys(self) -> set[str]:
        """Returns the names of the keys that did not exist when the run began."""
        saved = self.read_json("config.json") or {}
        return set(config_lib.KEYS) - set(_present(saved))

    def adopt(self, config: ml_collections.ConfigDict) -> None:
        """Fills the keys that the first run measured from its data: mean and std."""
        saved = self.read_json("config.json")
        for name in ("mean", "std"):
            if saved and not config.data[name]:
                config.data[name] = tuple(saved["data"][name])

    def check(self, config: ml_collections.ConfigDict) -> None:
        """Refuses to go on with a run that another config began.

        A key that is younger than the run counts as its default there.

        Args:
          config: of now, with all that `prepare` fills in.

        Raises:
          UsageError: names the keys that differ, with both values.
        """
        if self.read_json("config.json") is None:
            return
        there = self.config()
        if there.model.name == config.model.name:
            resolve.resolve(there, lambda: (config.data.mean, config.data.std))
        saved = config_lib.result_keys(there)
        differ = [
            f"  {name}: {saved[name]!r} there, {value!r} now"
            for name, value in config_lib.result_keys(config).items()
            if saved[name] != value
        ]
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
        rows = self._rows()
        kept = [row for row in rows if row is not None and row["step"] <= step]
        # Before each checkpoint a row is written.
        if step and (None in rows[:-1] or not kept or kept[-1]["step"] < step):
            print(
                f"warning: {path} is damaged: it lacks rows of steps 1 to {step}, and"
                " so do the curves of the report; training does not need them"
            )
        if rows:
            write(path, "".join(json.dumps(row) + "\n" for row in kept))
        folder = self.path / "tensorboard"
        try:
            self._events = EventFile(folder, step + 1)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def history(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl without a line that a kill cut short."""
        return [row for row in self._rows() if row is not None]

    def _rows(self) -> list[dict[str, Any] | None]:
        """The rows of metrics.jsonl, None for a line that cannot be read."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [_row(line) for line in lines]

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl, and points to TensorBoard.

        Raises:
          ConvnetError: they cannot be written.
        """
        if not self._writes:
            return
        assert self._events is not None, "cut() comes first"
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            path = self.path / "tensorboard"
            self._events.scalars(step, values)
        except OSError as error:
            raise cannot_write(path, error) from error

    def close(self) -> None:
        """Closes the TensorBoard file and lets other runs train here."""
        for file in (self._events, self._lock):
            if file is not None:
                file.close()


def _damaged(path: Path, error: Exception) -> ConvnetError:
    return ConvnetError(
        f"{path} cannot be read: {error}; nothing else is lost: remove this file, and"
        " run the command that began the run again"
    )


def _present(saved: dict[str, Any]) -> dict[str, Any]:
    """The known keys that config.json holds, by their dotted names."""
    found = {}
    for name in config_lib.KEYS:
        node: Any = saved
        for part in name.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            found[name] = node
    return found


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None
