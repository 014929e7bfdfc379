"""`python -m convnet.main` as a user starts it: what it writes, resumes and refuses."""

import fcntl
import hashlib
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 120
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
CLOSED = "http://127.0.0.1:9"  # a proxy that is not there: no network
TIMEOUT = 300  # seconds; a run takes a few, but a machine may be busy

# Train: 100 pictures, one of them broken; test: 40, one of them broken.
EXPERIMENT = """
from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "folder"
    config.data.dir = "pictures"
    config.data.image_size = 16
    config.data.batch_size = 16
    config.data.placement = "stream"
    config.augment.flip = "random"
    config.augment.resized_crop = (0.5, 1.0)
    config.augment.brightness = 0.2
    config.model.widths = (4,)
    config.model.depth = 1
    config.model.norm = "batch"
    config.model.dropout = 0.2
    config.task.label_smoothing = 0.1
    config.optimizer.lr = 0.02
    config.optimizer.ema = 0.9
    config.train.steps = 120
    config.train.log_every = 1
    config.train.eval_every = 2.0
    config.checkpoint.every_steps = 10
    config.compilation_cache = "cache"
    return config
"""
DIGITS = (
    "--config=experiments/digits.py",
    "--config.data.batch_size=16",
    "--config.data.train_limit=64",
    "--config.data.test_limit=20",
    "--config.model.widths=(4,)",
    "--config.model.depth=1",
    "--config.train.steps=4",
    "--config.compilation_cache=cache",
)
# Compiles faster.
PLAIN = (
    *DIGITS,
    *(f"--config.augment.{name}=0.0" for name in ("rotate", "translate", "zoom")),
    "--config.model.norm=none",
    "--config.model.dropout=0.0",
    "--config.model.dense=()",
)
# What comes before the command: no file may grow over some 100 kB (a preexec_fn could
# deadlock, because the tests' process has JAX's threads); a terminal of its own.
FULL = ("sh", "-c", 'ulimit -f 200 && exec "$@"', "sh")
# Runs several commands in one process, since to import costs more than to refuse.
SEVERAL = """
import contextlib, io, json, runpy, sys, traceback
done = {}
for name, flags in json.load(sys.stdin).items():
    sys.argv = ["main.py", *flags]
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            runpy.run_module("convnet.main", run_name="__main__")
        except SystemExit as error:
            status = error.code
        except BaseException:
            status = traceback.print_exc()
    done[name] = (status, *(stream.getvalue() for stream in streams))
print(json.dumps(done))
"""
CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass
class Done:
    """A process that ended."""

    status: int
    out: str
    err: str


def environment(**more):
    hidden = ("CONVNET_TRACEBACK", "NPROC", "XLA_FLAGS")
    kept = {k: v for k, v in os.environ.items() if k not in hidden}
    return kept | {"PYTHONPATH": str(PROJECT)} | more


def start(folder, *flags, through=(), **options):
    return subprocess.Popen(
        [*through, sys.executable, "-m", "convnet.main", *flags],
        cwd=folder,
        env=environment(),
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return Done(process.returncode, out or "", err or "")


def run(folder, *flags, **options):
    return finish(start(folder, *flags, **options))


def rows(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def wait_for_step(process, workdir, step):
    end = time.monotonic() + TIMEOUT
    while not any(row["step"] >= step for row in rows(workdir)[-3:]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def train_steps(workdir):
    return [row["step"] for row in rows(workdir) if "train/loss" in row]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


def read_state(workdir, step):
    """The flat arrays of a checkpoint, read with Orbax alone."""
    path = workdir.absolute() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        return {name: np.asarray(leaf) for name, leaf in reader.restore(path).items()}


class Terminal:
    """A terminal of 40 lines of 120 characters, the only one of what it starts."""

    def __init__(self):
        self._screen, self._program = pty.openpty()
        size = struct.pack("HHHH", 40, 120, 0, 0)
        fcntl.ioctl(self._program, termios.TIOCSWINSZ, size)
        self._data = b""
        self._reader = threading.Thread(target=self._read)

    def __enter__(self):
        return self

    def start(self, folder, *flags):
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self._program)
        process = start(
            folder,
            *flags,
            **streams,
            start_new_session=True,
            through=(sys.executable, "-c", CONTROLLED),
        )
        os.close(self._program)
        self._reader.start()
        return process

    def press(self, keys):
        os.write(self._screen, keys)

    def _read(self):
        try:
            while data := os.read(self._screen, 1 << 16):
                self._data += data
        except OSError:  # Linux's way to say that the program has ended
            pass

    def __exit__(self, *unused):
        self._reader.join(TIMEOUT)
        os.close(self._screen)
        self.shown = self._data.decode()
        print(self.shown)  # which pytest shows where a test fails


def write_pictures(folder, rng):
    for split, count in (("train", 50), ("test", 20)):
        for name, brightness in (("day", 150), ("night", 50)):
            at = folder / split / name
            at.mkdir(parents=True)
            for i in range(count):
                shape = (16 + i % 3, 20, 3)
                pixels = rng.normal(brightness, 40, shape).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(at / f"{i:02}.png")
    (folder / "train/day/07.png").write_bytes(b"no picture")
    cut = folder / "test/night/03.png"
    cut.write_bytes(cut.read_bytes()[:200])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the user is: not the project's folder."""
    folder = tmp_path_factory.mktemp("main")
    write_pictures(folder / "pictures", np.random.default_rng(0))
    (folder / "sky.py").write_text(EXPERIMENT)
    return folder


@pytest.fixture(scope="module")
def first(folder):
    """A run that nothing disturbs, streamed by threads; its workdir is runs/sky."""
    done = run(folder, "--config=sky.py")
    assert done.status == 0, done
    return done


@pytest.fixture(scope="module")
def workdir(folder, first):
    return folder / "runs" / "sky"


@pytest.fixture(scope="module")
def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def test_result_and_metrics(workdir, result):
    types = {
        "step": int,
        "epochs": float,
        "test/accuracy": float,
        "test/loss": float,
        "test/calibration_error": float,
        "test/examples": int,
        "train/seconds": float,
        "compile/seconds": float,
        "train/images_per_second": float,
        "params/count": int,
        "params/sha256": str,
        "seed": int,
        "devices": int,
        "processes": int,
        "versions": dict,
        "config/sha256": str,
    }
    assert {name: type(result[name]) for name in types} == types
    assert (result["step"], result["epochs"]) == (STEPS, STEPS * 16 / 100)
    assert result["test/accuracy"] > 0.9
    assert result["train/seconds"] > 0 and result["compile/seconds"] > 0
    speed = STEPS * 16 / result["train/seconds"]
    assert result["train/images_per_second"] == pytest.approx(speed)
    assert re.fullmatch("[0-9a-f]{64}", result["config/sha256"])
    assert result["versions"]["python"].startswith("3.1")

    assert train_steps(workdir) == list(range(1, STEPS + 1))
    for row in rows(workdir):
        assert all(type(v) in (int, float) and math.isfinite(v) for v in row.values())
    last = rows(workdir)[-1]
    for name in ("test/accuracy", "test/loss", "test/examples"):
        assert last[name] == result[name]

    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["widths"] == [4] and config["model"]["kernel"] == 3
    assert len(config["data"]["mean"]) == 3, "the measured mean is written down"
    assert "<html" in (workdir / "report.html").read_text()
    assert (workdir / "model.safetensors").stat().st_size > 0


def test_params_hash_is_that_of_the_last_checkpoint(workdir, result):
    assert saved_steps(workdir)[-1] == STEPS
    state = read_state(workdir, STEPS)
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.split("/")[0] in ("params", "batch_stats", "ema"):
            leaf = state[name]
            digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
            digest.update(leaf.tobytes())
    assert digest.hexdigest() == result["params/sha256"]
    sizes = [leaf.size for name, leaf in state.items() if name.startswith("params/")]
    assert sum(sizes) == result["params/count"]
    assert any(name.startswith("ema/batch_stats/") for name in state)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tfrecords(path):
    """The records of a TFRecord file, each checked by its two masked CRCs."""

    def checked(data, masked):
        crc = crc32c(data)
        rotated = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert struct.unpack("<I", masked)[0] == rotated
        return data

    data, place = path.read_bytes(), 0
    while place < len(data):
        header = checked(data[place : place + 8], data[place + 8 : place + 12])
        end = place + 12 + struct.unpack("<Q", header)[0]
        yield checked(data[place + 12 : end], data[end : end + 4])
        place = end + 4


def check_tensorboard(workdir):
    """Compares what TensorBoard shows with metrics.jsonl."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        for record in tfrecords(path):
            event = event_pb2.Event.FromString(record)
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {k: v for k, v in found.items() if k[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    wanted = {
        (name, row["step"]): value
        for row in rows(workdir)
        for name, value in row.items()
        if name != "step"
    }
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-6)


def test_tensorboard_files_hold_the_metrics(workdir):
    check_tensorboard(workdir)


def test_plain_lines_where_there_is_no_terminal(first):
    assert not re.search("[\r\x1b]", first.out + first.err)
    lines = first.out.splitlines()
    assert any(re.match(rf"step \d+/{STEPS} .*\bloss \d", line) for line in lines)
    assert any(re.match(rf"step {STEPS}/{STEPS} .*test: ", line) for line in lines)


def test_broken_pictures_are_left_out_and_listed(first, workdir, result):
    assert result["test/examples"] == 39
    page = (workdir / "report.html").read_text()
    for name in ("train/day/07.png", "test/night/03.png"):
        assert name in page
        assert first.out.count(name) == 1


def test_a_finished_run_is_left_alone(folder, workdir, first):
    def content():
        files = [path for path in workdir.rglob("*") if path.is_file()]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = content()
    done = run(folder, "--config=sky.py")
    assert done.status == 0
    assert "finished" in done.out and str(STEPS) in done.out
    assert content() == before


@pytest.fixture(scope="module")
def interrupted(folder):
    """The same run in another workdir, stopped three times, its data fed in four ways.

    The keys that change from leg to leg do not change the result.
    """
    workdir = folder / "again"
    flags = ("--config=sky.py", "--workdir=again")
    legs = {}

    with Terminal() as terminal:
        process = terminal.start(
            folder, *flags, "--config.data.workers=2", "--config.train.eval_every=0.0"
        )
        wait_for_step(process, workdir, 6)
        terminal.press(b"\x03")
        done = finish(process)
    legs["ctrl_c"] = Done(done.status, terminal.shown, "")
    legs["ctrl_c_saved"] = saved_steps(workdir)

    at = max(train_steps(workdir)) + 8
    process = start(folder, *flags, "--config.checkpoint.keep=1")
    wait_for_step(process, workdir, at)
    process.terminate()
    legs["sigterm"] = finish(process)
    legs["sigterm_saved"] = saved_steps(workdir)

    at = max(train_steps(workdir)) + 8
    process = start(folder, *flags, "--config.data.placement=device")
    wait_for_step(process, workdir, at)
    process.kill()
    legs["sigkill"] = finish(process)

    legs["last"] = run(
        folder,
        *flags,
        "--config.train.eval_every=5.0",
        "--config.checkpoint.every_steps=1000",
    )
    return legs


def stopped(text):
    return int(re.search(rf"stopped at step (\d+) of {STEPS}, saved", text)[1])


def resumed(text):
    return int(re.search(r"resuming from step (\d+)", text)[1])


def test_ctrl_c_on_a_terminal(interrupted):
    done = interrupted["ctrl_c"]
    assert done.status == 130, done.out
    assert re.search(rf"\d+%\|.*\d+/{STEPS} ", done.out), "no bar"
    assert stopped(done.out) in interrupted["ctrl_c_saved"]
    assert "Traceback" not in done.out, done.out


def test_sigterm(interrupted):
    done = interrupted["sigterm"]
    assert done.status == 143, done
    assert resumed(done.out) == stopped(interrupted["ctrl_c"].out)
    assert stopped(done.err) in interrupted["sigterm_saved"]
    assert "Traceback" not in done.err, done.err


def test_stopped_killed_and_resumed_gives_the_same_weights(
    folder, interrupted, workdir, result
):
    assert interrupted["sigkill"].status == -signal.SIGKILL
    done = interrupted["last"]
    assert done.status == 0, done
    assert resumed(done.out) >= stopped(interrupted["sigterm"].err)
    again = json.loads((folder / "again" / "result.json").read_text())
    for name in ("params/sha256", "config/sha256", "test/loss", "test/examples"):
        assert again[name] == result[name]
    assert train_steps(folder / "again") == list(range(1, STEPS + 1))
    tested = [row["step"] for row in rows(folder / "again") if "test/loss" in row]
    assert tested == sorted(set(tested)) and tested[-1] == STEPS
    losses = {r["step"]: r["train/loss"] for r in rows(workdir) if "train/loss" in r}
    for row in rows(folder / "again"):
        if "train/loss" in row:
            assert row["train/loss"] == losses[row["step"]]
    check_tensorboard(folder / "again")


# name: (exit status, what the message says, flags), each in a workdir of its own.
REFUSED_AT_ONCE = {
    "unknown key": (
        2,
        ("optimizer.momentm", "did you mean 'optimizer.momentum'?"),
        (*DIGITS, "--config.optimizer.momentm=0.5"),
    ),
    "no such folder": (
        2,
        ("data.dir", "nowhere/pictures", "no such folder"),
        ("--config=sky.py", "--config.data.dir=nowhere/pictures"),
    ),
    "unknown dataset": (
        1,
        ("'cifar11' is not prepared", "did you mean 'cifar10'?", "data.dir"),
        (*DIGITS, "--config.data.name=cifar11", "--config.data.dir=empty"),
    ),
    "no network": (
        1,
        ("cannot download", "cifar-10-binary.tar.gz", "--config.data.dir"),
        (*DIGITS, "--config.data.name=cifar10", "--config.data.dir=empty"),
    ),
    "class without pictures": (
        1,
        ("lacking", "holds no images", "train/CLASS"),
        ("--config=sky.py", "--config.data.dir=lacking"),
    ),
    "workdir under a file": (
        1,
        ("--workdir=sky.py/run", "cannot be written"),
        (*DIGITS, "--workdir=sky.py/run"),
    ),
}
REFUSED_LATER = {
    "full disk": (
        1,
        ("checkpoint", "could not be written", "last good checkpoint"),
        (*PLAIN, "--config.model.dense=(1000,)"),
    ),
    "too high a learning rate": (
        1,
        (
            "the loss is nan at step 2;",
            "the last good checkpoint: of step 1",
            "optimizer.lr = 1e+30",
        ),
        (
            *PLAIN,
            "--config.optimizer.name=sgd",
            "--config.schedule.name=constant",
            "--config.optimizer.lr=1e30",
            "--config.checkpoint.every_steps=1",
        ),
    ),
    "too many broken pictures": (
        1,
        ("1 of 100 images", "data.max_bad_fraction = 0.005", "train/day/07.png"),
        ("--config=sky.py", "--config.data.max_bad_fraction=0.005"),
    ),
}
REFUSED = REFUSED_AT_ONCE | REFUSED_LATER


@pytest.fixture(scope="module")
def refused(folder):
    (folder / "empty").mkdir()
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (folder / "lacking" / name).mkdir(parents=True)
        if name != "train/b":
            Image.new("RGB", (16, 16)).save(folder / "lacking" / name / "1.png")
    flags = {
        name: (f"--workdir=refused/{name}", *given)
        for name, (_, _, given) in REFUSED.items()
    }
    later = [
        start(folder, *flags[name], through=FULL if name == "full disk" else ())
        for name in REFUSED_LATER
    ]
    at_once = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        input=json.dumps({name: flags[name] for name in REFUSED_AT_ONCE}),
        cwd=folder,
        env=environment(http_proxy=CLOSED, https_proxy=CLOSED),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    done = {name: Done(*one) for name, one in json.loads(at_once.stdout).items()}
    return done | dict(zip(REFUSED_LATER, map(finish, later), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, refused):
    status, fragments, _ = REFUSED[name]
    done = refused[name]
    assert done.status == status, done
    message = done.err[done.err.index("error: ") :]
    for fragment in fragments:
        assert fragment in message
    assert "Traceback" not in done.out + done.err
    assert len(message.splitlines()) <= (14 if name == "class without pictures" else 4)


def test_no_checkpoint_holds_nan(folder, refused):
    workdir = folder / "refused" / "too high a learning rate"
    assert saved_steps(workdir) == [1]
    state = read_state(workdir, 1)
    assert state and all(np.isfinite(leaf).all() for leaf in state.values())


def test_another_config_is_refused(folder, workdir, first):
    before = (workdir / "config.json").read_bytes()
    done = run(
        folder,
        "--config=sky.py",
        "--config.optimizer.lr=0.5",
        "--config.augment.flip=none",
    )
    assert done.status == 2
    assert "optimizer.lr: 0.02 there, 0.5 now" in done.err
    assert "augment.flip: 'random' there, 'none' now" in done.err
    assert len(done.err.splitlines()) == 4 and str(Path("runs/sky")) in done.err
    assert (workdir / "config.json").read_bytes() == before


def test_preview(folder):
    done = run(folder, *PLAIN, "--config.augment.flip=random", "--preview")
    assert done.status == 0, done
    with Image.open(folder / "runs/digits/preview.png") as sheet:
        sheet.load()
        # 16 pictures of 8x8, eight in a row, enlarged to 96x96.
        assert sheet.size == (8 * 96, 2 * 96)
        assert sheet.getextrema()[1] > 200
    assert os.listdir(folder / "runs/digits") == ["preview.png"]


def test_ctrl_c_while_modules_load(folder):
    command = [sys.executable, "-X", "importtime", "-m", "convnet.main", "--help"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.endswith("numpy.version\n"):
            break
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=TIMEOUT)[1].splitlines()
    assert process.returncode == 130, lines[-9:]
    assert [x for x in lines if "import time:" not in x] == ["interrupted by SIGINT"]


def test_help(folder):
    done = run(folder, "--help")
    assert (done.status, done.err) == (0, "")
    for name in ("--workdir", "--preview", "--config.optimizer.lr=0.1", "Trains an"):
        assert name in done.out


def test_importing_brings_nothing_that_is_slow_to_load():
    code = """
import json, sys
import convnet
found = [set(sys.modules)]
import convnet.main
found.append(set(sys.modules))
import convnet.train
found.append(set(sys.modules))
slow = ("tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "grain")
slower = [(*slow, "jax", "numpy", "flax", "optax"), slow, slow]
pairs = zip(found, slower)
print(json.dumps([[name for name in names if name in each] for each, names in pairs]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [[], [], []], done
