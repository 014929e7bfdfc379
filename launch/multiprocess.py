"""Trains with several processes on this machine.

usage: python launch/multiprocess.py --processes=N [--devices=N] -- FLAGS

Each is `python -m convnet.main FLAGS`. The devices are split among them: of a machine
with GPUs those that CUDA_VISIBLE_DEVICES names, or all; without, N devices of the CPU
(by default one for each process), and the cores. Each line of theirs is shown after the
number of its process. When one fails the others are ended, and what it said last is
shown. Ctrl-C and SIGTERM go to all: they save and stop.

Exit status: that of the first process to fail (128 + n for signal n), else 0.
"""

import argparse
import collections
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

# Seconds that the others have to end by themselves: after one was killed, which they
# have to find out, and after one has told them why it failed.
KILLED, FAILED = 40.0, 10.0
TAIL = 20


def main() -> int:
    """Starts the processes, waits, and returns the exit status."""
    mine, theirs = arguments(sys.argv[1:])
    environments = environment(mine.processes, mine.devices)
    command = [sys.executable, "-m", "convnet.main", *theirs]
    started = [Process(i, command, env) for i, env in enumerate(environments)]
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        for process in started:
            process.send(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, forward)
    first = None
    while any(process.popen.poll() is None for process in started):
        time.sleep(0.1)
        if first is None:
            first = next((p for p in started if p.popen.poll()), None)
            told = first is not None and first.popen.returncode > 0
            killing = time.monotonic() + (FAILED if told else KILLED)
        elif time.monotonic() > killing:
            for process in started:
                process.send(signal.SIGKILL)
    for process in started:
        process.reader.join()
    first = first or next((p for p in started if p.popen.returncode), None)
    if first is None:
        return 0
    status = first.popen.returncode
    if not received:
        how = f"status {status}" if status > 0 else signal.Signals(-status).name
        print(f"process {first.index} ended first, by {how}:", file=sys.stderr)
        print(*first.tail, sep="\n", file=sys.stderr)
    return status if status > 0 else 128 - status


class Process:
    """A process of the run, whose lines are shown as they come."""

    def __init__(self, index: int, command: list[str], env: dict[str, str]) -> None:
        self.index = index
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.popen = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A terminal's Ctrl-C comes from here alone.
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def send(self, signum: int) -> None:
        """Sends a signal, if the process still lives."""
        if self.popen.poll() is None:
            self.popen.send_signal(signum)

    def _read(self) -> None:
        for line in self.popen.stdout:
            self.tail.append(line.rstrip("\n"))
            print(f"[{self.index}] {self.tail[-1]}", flush=True)


def arguments(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns our flags, and those of `convnet.main`, which follow `--`."""
    parser = argparse.ArgumentParser(
        usage=__doc__.split("usage: ")[1].splitlines()[0], description=__doc__
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=0)
    at = given.index("--") if "--" in given else len(given)
    mine, theirs = parser.parse_args(given[:at]), given[at + 1 :]
    if not theirs:
        parser.error("the flags of convnet.main are missing: ... -- --config=...")
    if mine.processes < 1:
        parser.error(f"--processes={mine.processes}: want 1 or more")
    return mine, theirs


def environment(processes: int, devices: int) -> list[dict[str, str]]:
    """Returns each process's environment: where the others are, and its devices."""
    gpus = visible_gpus()
    gpus = gpus[: devices or len(gpus)]
    devices = len(gpus) or devices or processes
    if devices % processes:
        sys.exit(f"error: {processes} processes cannot share {devices} devices evenly")
    each = devices // processes
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0))
    found = []
    for index in range(processes):
        env = dict(os.environ, PYTHONUNBUFFERED="1")
        if processes > 1:
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            env["JAX_NUM_PROCESSES"] = str(processes)
            env["JAX_PROCESS_ID"] = str(index)
        if gpus:
            mine = gpus[index * each : (index + 1) * each]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        else:
            flag = f"--xla_force_host_platform_device_count={each}"
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
            env.setdefault("NPROC", str(max(1, cores // processes)))
        found.append(env)
    return found


def visible_gpus() -> list[str]:
    """Returns the names of NVIDIA's GPUs that JAX may use here."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return listed.stdout.split() if listed.returncode == 0 else []


if __name__ == "__main__":
    sys.exit(main())
