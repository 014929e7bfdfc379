"""Several processes: one result, only the own records read, and how they end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from convnet import cli, main, prepare, processes, together, train
from convnet import mesh as mesh_lib
from convnet.checkpoint import Checkpoints, sha256
from convnet.data.order import Part, TrainOrder
from convnet.errors import UsageError

PROJECT = Path(__file__).resolve().parent.parent
OLD = jax.__version_info__ < (0, 12)
STEPS, BATCH = 12, 16  # one epoch, so that each picture belongs to one process
# It notes what is read, and at a given training picture sends itself a signal. That it
# then sleeps holds all of them up, until they have heard of the signal.
EXPERIMENT = """
import itertools, os, signal, time
from convnet import config as config_lib
from convnet.data.folder import FolderSource

PROCESS = os.environ.get("JAX_PROCESS_ID", "0")
VICTIM, AT, SIGNAL = os.environ.get("TEST_SIGNAL", "- 0 0").split()
LOG = open(f"{os.environ['TEST_LOG']}.{PROCESS}", "w", buffering=1)
COUNT, READ = itertools.count(1), FolderSource.__getitem__


def read(self, index):
    split, *_, name = self.files[index].split("/")
    LOG.write(f"{split} {name}\\n")
    if split == "train" and next(COUNT) == int(AT) and PROCESS == VICTIM:
        os.kill(os.getpid(), int(SIGNAL))
        time.sleep(3)
    return READ(self, index)


def get_config():
    FolderSource.__getitem__ = read
    config = config_lib.default()
    config.mesh.shards = 4
    config.data.name = "folder"
    config.data.dir = "pictures"
    config.data.mean, config.data.std = (0.5,), (0.25,)
    config.data.batch_size = 16
    config.data.placement = "stream"
    config.data.cache = "none"
    config.data.max_bad_fraction = 0.1
    config.augment.mixup = 0.2
    config.model.widths = (16,)  # wide enough for its kernels to share out threads
    config.model.depth = 1
    config.optimizer.lr = 0.01
    config.schedule.name = "constant"
    config.train.steps, config.train.epochs = 12, 0.0
    config.train.log_every = 4
    config.train.eval_every = 0.0
    config.checkpoint.every_steps = 4
    config.compilation_cache = "none"
    return config
"""
# With a layer that is large enough to be split.
PLAIN = "model.dense=(300,)", "mesh.fsdp=2", "data.workers=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures and the experiment."""
    folder = tmp_path_factory.mktemp("processes")
    random = np.random.default_rng(0)
    for split, count in (("train", STEPS * BATCH // 2), ("test", 10)):
        for label in "ab":
            place = folder / "pictures" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{label}{i:03}.png")
    (folder / "pictures/train/a/a007.png").write_bytes(b"no picture")
    (folder / "tiny.py").write_text(EXPERIMENT)
    return folder


def start(folder, count, workdir, *flags, sends="- 0 0"):
    """Starts a run of so many processes."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROJECT),
        "TEST_SIGNAL": sends,
        "TEST_LOG": str(folder / f"read-{workdir}-{count}"),
    }
    for name in ("NPROC", "XLA_FLAGS"):
        environment.pop(name, None)
    launcher = [str(PROJECT / "launch/multiprocess.py"), f"--processes={count}", "--"]
    return subprocess.Popen(
        [sys.executable, *launcher, "--config=tiny.py", f"--workdir={workdir}", *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def runs(folder):
    """An undisturbed run, and one that is stopped, killed, and ends in one process."""
    same = () if OLD else ("--config.reproducible",)
    alone = start(folder, 1, "alone", *same)
    plain = start(folder, 2, "plain", *(f"--config.{key}" for key in PLAIN))
    stopped = ended(start(folder, 2, "W", *same, sends=f"1 75 {int(signal.SIGTERM)}"))
    after_stop = steps_of(folder / "W")
    killed = ended(start(folder, 4, "W", *same, sends=f"2 45 {int(signal.SIGKILL)}"))
    return SimpleNamespace(
        stopped=stopped,
        after_stop=after_stop,
        killed=killed,
        last=ended(start(folder, 1, "W", *same)),
        alone=ended(alone),
        plain=ended(plain),
    )


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


def reads(folder, run, process, split):
    lines = (folder / f"read-{run}.{process}").read_text().split("\n")
    return [line.split()[1] for line in lines if line.startswith(split)]


def test_a_sigterm_to_one_stops_all_at_the_same_step(runs):
    done = runs.stopped
    assert done.status == 143, done.out + done.err
    found = re.findall(r"\[(\d)\] stopped at step (\d+) of 12, saved", done.out)
    assert sorted(found) == [(str(i), found[0][1]) for i in range(2)]
    assert 0 < int(found[0][1]) < STEPS and runs.after_stop[-1] == int(found[0][1])
    assert re.search(r"\[0\] devices: 2 x cpu \(cpu\) in 2 processes", done.out)
    # Process 0 alone prints.
    assert re.findall(r"\[(\d)\] steps: 12", done.out) == ["0"]


def test_one_that_is_killed_ends_the_others(runs):
    done = runs.killed
    assert done.status == 128 + signal.SIGKILL, done.out + done.err
    assert f"resuming from step {runs.after_stop[-1]}" in done.out
    assert "process 2 ended first, by SIGKILL" in done.err
    ends = re.findall(r"\[(\d)\] error: .*; the same command goes on from", done.out)
    assert sorted(ends) == ["0", "1", "3"], done.out


def test_another_number_of_processes_goes_on_to_the_same_result(folder, runs):
    assert runs.alone.status == runs.last.status == 0, runs.last.out + runs.last.err
    assert f"resuming from step {runs.after_stop[-1]}" in runs.last.out
    alone, last = result_of(folder / "alone"), result_of(folder / "W")
    assert last["processes"] == 1 and last["test/examples"] == 20
    if OLD:  # reproducible is for one device there
        assert_close(folder / "alone", folder / "W")
    else:
        assert last["params/sha256"] == alone["params/sha256"]
    lines = (folder / "W/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and {4, 8, STEPS} <= set(steps)


def test_each_reads_its_own_records(folder, runs):
    names = sorted(p.name for p in (folder / "pictures/train").rglob("*.png"))
    # All look at these, to tell one dataset from another.
    sample = {names[i] for i in np.linspace(0, len(names) - 1, 32).astype(int)}
    order = TrainOrder(len(names), BATCH, 0)
    for process in range(2):
        mine = [Part(order, process, 2)(step)["index"] for step in range(STEPS)]
        mine = {names[i] for i in np.concatenate(mine)}
        assert len(mine) == len(names) / 2
        seen = set(reads(folder, "W-2", process, "train"))
        # A good picture stands in for the broken one.
        assert len(seen) > 50 and seen - sample <= mine | {"a008.png"}


def assert_close(one, other):
    one, other = (load_file(path / "model.safetensors") for path in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-5)


def test_params_split_over_processes_agree_to_rounding(folder, runs, monkeypatch):
    assert runs.plain.status == 0, runs.plain.out + runs.plain.err
    result = result_of(folder / "plain")
    assert (result["devices"], result["processes"]) == (2, 2)
    assert (folder / "plain/report.html").read_text().count("a007.png") > 0
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TEST_LOG", str(folder / "read-here"))
    space = {}
    exec(EXPERIMENT, space)
    config = space["get_config"]()
    config.model.dense = (300,)
    config.mesh.data = 1
    train.run(config, Path("here"), "")
    assert result["test/examples"] == result_of(Path("here"))["test/examples"] == 20
    assert_close(Path("here"), Path("plain"))
    # What two processes saved is restored by one.
    it = prepare.prepare(config)
    checkpoints = Checkpoints(folder / "plain/checkpoints", 1)
    state, about = checkpoints.restore(prepare.initial_state(it))
    assert about["step"] == STEPS and sha256(state) == about["sha256"]
    assert any("fsdp" in str(s.spec) for s in jax.tree.leaves(split_of(state)))


def split_of(state):
    fake = SimpleNamespace(shape={"data": 1, "fsdp": 2})
    real = mesh_lib.make(BATCH, data=1)
    with pytest.MonkeyPatch.context() as patch:
        named = jax.sharding.NamedSharding
        patch.setattr(mesh_lib, "NamedSharding", lambda _, spec: named(real, spec))
        return mesh_lib.sharded(fake, state.params)


def test_a_process_of_its_own_joins_nobody(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", None)
    with together.joined(None):
        assert processes.leads() and processes.gather(3) == [3]
    with pytest.raises(UsageError, match="several processes need JAX_COORDINATOR"):
        with together.joined(True):
            pass
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here:1")
    with together.joined(False):
        pass
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UsageError, match="JAX_NUM_PROCESSES=two: want a number"):
        with together.joined(None):
            pass


def test_threads_are_fixed_before_the_processes_meet(monkeypatch):
    """JAX comes up when they do, and reads NPROC then."""
    flags = ["main", "--config=experiments/digits.py", "--config.reproducible"]
    values = cli.parse(flags, main.define, "")
    monkeypatch.setenv("NPROC", "1")
    met = []

    @contextlib.contextmanager
    def joined(wanted):
        met.append((wanted, os.environ["NPROC"]))
        yield

    monkeypatch.setattr(together, "joined", joined)
    monkeypatch.setattr(main, "_run", lambda *_: None)
    main.main(values)
    assert met == [(None, "8")]


@pytest.mark.parametrize(
    ("tasks", "a_node", "given"),
    [("2", "1(x2)", {"local_device_ids": []}), ("4", "2(x2)", {}), ("1", "1", None)],
)
def test_slurm_is_found(monkeypatch, tasks, a_node, given):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", a_node)
    assert together._found(None) == given
