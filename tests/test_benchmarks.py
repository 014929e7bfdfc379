"""The benchmarks, at their smallest and without a peer; and what they compute."""

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scaling, startup, table, time_to_accuracy, train_step, turns
from benchmarks.peer import Peer, PeerError
from benchmarks.peers import memory
from benchmarks.table import Row, Table
from convnet import cli
from convnet import config as config_lib
from convnet.errors import ConvnetError, UsageError
from convnet.workdir import Workdir

PROJECT = Path(__file__).resolve().parent.parent

EXPERIMENT = """
from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "arrays"
    config.data.dir = "{data}"
    config.data.batch_size = 20
    config.data.mean = (0.5,)
    config.data.std = (0.25,)
    config.model.widths = (4,)
    config.model.depth = 1
    config.optimizer.lr = 0.05
    config.train.epochs = 2.0
    config.train.log_every = 2
    return config
"""

COMMANDS = {
    "train_step": [
        "--networks=speednet",
        "--dtypes=bfloat16",
        "--batch=8",
        "--repeats=1",
    ],
    "scaling": [
        *("--network=speednet", "--sizes=32", "--batches=4", "--counts="),
        *("--depths=", "--batch=4", "--repeats=1"),
    ],
    "startup": ["--batch=4", "--repeats=1"],
    "stylize": ["--size=32", "--evaluations=3", "--layers=tutorial", "--repeats=1"],
    "time_to_accuracy": ["--seeds=1", "--targets=90,100.5"],
    "kernels": ["--repeats=1"],
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The path of a config with data of its own."""
    folder = tmp_path_factory.mktemp("experiment")
    # Two classes that a brightness tells apart.
    labels = np.arange(200) % 2
    images = np.random.default_rng(0).integers(0, 100, (200, 8, 8, 3), np.uint8)
    images += (120 * labels).astype(np.uint8)[:, None, None, None]
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(folder / "data.npz", **arrays)
    experiment = folder / "tiny.py"
    experiment.write_text(EXPERIMENT.format(data=folder / "data.npz"))
    return experiment


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment):
    """Starts all of them at once: (rows, printed) by name."""
    folder = tmp_path_factory.mktemp("benchmarks")
    environment = {k: v for k, v in os.environ.items() if k != "CONVNET_PEER_PYTHON"}
    started = {}
    for name, arguments in COMMANDS.items():
        if name == "time_to_accuracy":
            arguments = [*arguments, f"--experiment={experiment}"]
        if name == "kernels":
            arguments = [*arguments, f"--config={experiment}"]
        output = f"--output={folder / name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", output, *arguments]
        started[name] = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    found = {}
    for name, process in started.items():
        printed = process.communicate(timeout=600)[0]
        assert process.returncode == 0, printed
        found[name] = json.loads((folder / f"{name}.json").read_text()), printed
    return found


def test_a_run_that_is_killed_while_it_saves_ends_in_the_same_bits(tmp_path):
    path = tmp_path / "kills.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.kills", f"--output={path}"),
            *("--cases=digits", "--kills=1", "--set=train.steps=12"),
            *("--set=model.widths=(4,)", "--set=model.depth=1", "--set=model.dense=()"),
            *(f"--set=augment.{x}=0.0" for x in ("translate", "rotate", "zoom")),
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done
    found = numbers(json.loads(path.read_text()))
    assert found["digits/kills"] == 1
    assert found["digits/same_params"] == found["digits/same_metrics"] == 100
    assert found["digits/kills/workers_left_over"] == 0


def numbers(rows):
    return {row["case"]: row["ours"] for row in rows}


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_follow_the_schema_and_a_line_says_how_to_make_a_peer(runs, name):
    rows, printed = runs[name]
    assert rows
    for row in rows:
        assert list(row) == ["case", "unit", "ours", "peer", "peer_name", "ratio"]
        assert row["peer"] is row["peer_name"] is row["ratio"] is None
        assert row["ours"] is None or row["ours"] > 0
        assert f"{row['case']} " in printed
    # The one of them that has no peer does not ask for it.
    assert ("pip install torch" in printed) == (name != "kernels")


def test_train_step_measures_both_modes(runs):
    rows, _ = runs["train_step"]
    found = numbers(rows)
    assert list(found) == ["speednet/bfloat16/train", "speednet/bfloat16/infer"]
    assert {row["unit"] for row in rows} == {"images/s"}


def test_cost_by_side_and_memory_are_measured(runs):
    rows, _ = runs["scaling"]
    found = numbers(rows)
    assert list(found) == ["size/32", "memory/batch_4"]
    assert rows[-1]["unit"] == "MiB" and 1 < found["memory/batch_4"] < 200


def test_phases_of_a_start_make_up_its_total(runs):
    found = numbers(runs["startup"][0])
    for cache in ("cold", "warm"):
        *phases, total = (
            seconds for case, seconds in found.items() if case.startswith(cache)
        )
        assert len(phases) == 6
        assert sum(phases) == pytest.approx(total, rel=1e-6)


def test_a_peer_that_fails_is_noted_once_and_not_started_again(capsys):
    calls = []

    def fails():
        calls.append(1)
        raise ConvnetError("no compiler")

    side = startup._tolerant(fails, "PyTorch compiled", Table(None, "title"))
    found = [side(), side()]
    startup.report(Table(None, "title"), {"ours": [], "compiled": found})
    printed = capsys.readouterr().out
    assert calls == [1] and printed.count("PyTorch compiled: no compiler") == 1
    assert "cold/compile" in printed and "warm/total" in printed


def test_a_transfer_is_measured_from_its_start_to_its_end(runs):
    found = numbers(runs["stylize"][0])
    assert list(found)[:2] == ["noise/content", "noise/style"]
    assert list(found)[2:] == ["loss after 3 evaluations", "evaluation"]


def test_time_to_accuracy_reaches_what_can_be_reached(runs):
    found = numbers(runs["time_to_accuracy"][0])
    assert found["seed_0/final_accuracy"] >= 90
    assert found["mean/to_100.5"] is found["mean/to_100.5/with_compilation"] is None
    # However long it takes, these are parts of each other.
    seconds, more = found["mean/to_90"], found["mean/to_90/with_compilation"]
    assert 0 < seconds < more and seconds <= found["mean/train"]
    assert found["seed_0/to_90"] == seconds


def test_a_step_is_divided_into_convolutions_and_the_rest(runs):
    found = numbers(runs["kernels"][0])
    shares = {case: value for case, value in found.items() if case.startswith("share/")}
    assert sum(shares.values()) == pytest.approx(100)
    assert shares["share/convolutions"] > 0


def test_a_curve_is_read_off_the_metrics():
    rows = [
        {"step": 10, "images_per_second": 50.0, "train/loss": 2.0},
        {"step": 20, "images_per_second": 100.0, "train/loss": 1.0},
        {"step": 20, "test/accuracy": 0.86},
        {"step": 30, "images_per_second": 25.0, "train/loss": 0.5},
        {"step": 30, "test/accuracy": 0.89},
    ]
    result = {"test/accuracy": 0.9, "compile/seconds": 7.0, "params/count": 5}
    curve = time_to_accuracy.curve(rows, 10, result)
    # Ten steps of ten images: 2 s, then 1 s, then 4 s.
    np.testing.assert_allclose(curve.points, [(3, 86), (7, 89), (7, 90)])
    assert curve.seconds_to(85) == pytest.approx(3)
    assert curve.seconds_to(85, compiling=True) == pytest.approx(10)
    assert curve.seconds_to(90) == pytest.approx(7)
    assert curve.seconds_to(91) is None


def test_a_run_of_ours_stands_still_between_its_epochs(tmp_path, experiment):
    path, limits = tmp_path / "run", ("train", "test")
    arguments = [f"--config={experiment}", f"--workdir={path}"]
    arguments += ["--config.train.eval_every=1"]
    arguments += [f"--config.data.{name}_limit=40" for name in limits]
    with turns.Run(arguments, {"JAX_PLATFORMS": "cpu"}) as run:
        for epoch in (1, 2):
            assert run.go_on()
            rows = Workdir(path).history()
            assert sum("test/accuracy" in row for row in rows) == epoch
            time.sleep(3)
            assert Workdir(path).history() == rows
        assert not run.go_on()
    result = Workdir(path).read_json("result.json")
    # The waiting is not on its clock: these are four steps of 20 small images.
    assert result["train/seconds"] < 3


def test_a_run_of_ours_that_fails_says_why(experiment):
    with turns.Run([f"--config={experiment}", "--config.nonsense=1"], {}) as run:
        with pytest.raises(ConvnetError, match="our run ended with 2: .*nonsense"):
            run.go_on()


def test_a_kept_run_of_another_config_is_not_taken_for_this_one(tmp_path, experiment):
    """The error has a line for each key that differs."""
    written = Workdir(tmp_path)
    kept = cli.parse(["", f"--config={experiment}"], cli.define_config, "").config
    kept.train.epochs = 3.0
    written.write_json("config.json", config_lib.to_dict(kept))
    flags = [f"--config={experiment}", f"--workdir={tmp_path}"]
    with turns.Run(flags, {"JAX_PLATFORMS": "cpu"}) as run:
        with pytest.raises(ConvnetError, match="(?s)another config.*train.epochs: 3.0"):
            run.go_on()


class FakePeer:
    """A peer of two epochs that notes when it is called."""

    def __init__(self, calls):
        self._calls = calls

    def __call__(self, command, **arguments):
        self._calls.append(command)
        return {
            "begin": {"seconds": 1.0, "parameters": 5, "epochs": 2},
            "epoch": {"seconds": 2.0, "accuracy": 0.5},
            "evaluate": 0.75,
        }[command]


@pytest.mark.parametrize(
    ("turns_of_ours", "order"),
    [
        (2, "begin ours epoch ours epoch ours evaluate"),
        (0, "begin ours epoch epoch evaluate"),  # It was there already.
        (3, "begin ours epoch ours epoch ours ours evaluate"),
    ],
)
def test_sides_take_turns_by_epochs(monkeypatch, tmp_path, turns_of_ours, order):
    calls = []

    class Stub:
        def __init__(self, arguments, environment):
            self._left = turns_of_ours

        def go_on(self):
            calls.append("ours")
            self._left -= 1
            return self._left >= 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(time_to_accuracy, "Run", Stub)
    written = Workdir(tmp_path)
    written.write_json("config.json", {"data": {"batch_size": 10}})
    result = {"test/accuracy": 0.9, "compile/seconds": 7.0, "params/count": 5}
    written.write_json("result.json", result)
    config = config_lib.default()
    values = types.SimpleNamespace(device="cpu", peer_compiled=None)
    peer = FakePeer(calls)
    ours, other = time_to_accuracy.train([], tmp_path, 0, peer, config, values)
    assert " ".join(calls) == order
    assert ours.points == ((0.0, 90.0),)
    assert other.points == ((2.0, 50.0), (4.0, 50.0), (4.0, 75.0))


def test_means_need_every_run(capsys):
    def curve(seconds):
        return time_to_accuracy.Curve(((seconds, 90.0),), 1.0, 5)

    ours, peers = [curve(2.0), curve(4.0)], [curve(9.0), curve(3.0)]
    peers[1] = time_to_accuracy.Curve(((3.0, 80.0),), 1.0, 5)
    rows = Table(None, "title")
    time_to_accuracy.add_rows(rows, "mean/", ours, peers, [75, 90])
    found = {row.case: row for row in rows.rows}
    assert found["mean/to_75"].ours == 3 and found["mean/to_75"].peer == 6
    assert found["mean/to_75"].ratio == 2
    assert found["mean/to_75/with_compilation"].ratio == 7 / 4
    assert found["mean/to_90"].peer is found["mean/to_90"].ratio is None
    assert "peer: 1 of 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("unit", "ours", "peer", "ratio"),
    [
        ("images/s", 30.0, 20.0, 1.5),
        ("%", 90.0, 60.0, 1.5),
        ("s", 2.0, 3.0, 1.5),
        ("ms/image", 3.0, 2.0, 2 / 3),
        ("MiB", 100.0, 50.0, 0.5),
        ("s", None, 3.0, None),
        ("s", 2.0, None, None),
    ],
)
def test_a_ratio_above_one_means_that_ours_is_better(unit, ours, peer, ratio):
    assert Row("case", unit, ours, peer, "peer").ratio == ratio


def test_sides_take_turns():
    order = []
    sides = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    found = table.interleave(sides, 3)
    assert "".join(order) == "abccbaabc"
    assert found == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]


def test_a_repetition_is_long_enough_to_measure():
    asked = []

    def measure(steps):
        asked.append(steps)
        return 0.1 * steps

    rate = table.per_second(32, measure)
    assert rate() == pytest.approx(320) and asked == [1, 1, 5]


def test_the_file_holds_every_row_so_far(tmp_path, capsys):
    path = tmp_path / "rows.json"
    rows = Table(str(path), "title")
    assert json.loads(path.read_text()) == []
    rows.add(Row("case", "s", 2.0, 3.0, "peer"))
    row = {"case": "case", "unit": "s", "ours": 2.0, "peer": 3.0}
    assert json.loads(path.read_text()) == [{**row, "peer_name": "peer", "ratio": 1.5}]
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        *("case", "s", "2", "3", "1.5", "peer")
    ]


@pytest.fixture
def program(tmp_path):
    """A peer of our own, and the environment in which it is found."""
    (tmp_path / "program.py").write_text(
        "import os\n"
        "from benchmarks.peers import protocol\n"
        "def add(a, b):\n"
        "    print('printed')\n"
        "    return a + b\n"
        "protocol.serve({'add': add, 'exit': lambda: os._exit(3),\n"
        "    'threads': lambda: os.environ['OMP_NUM_THREADS']})\n"
    )
    return "program", {"PYTHONPATH": str(tmp_path)}


def test_a_peer_answers_fails_and_ends(program, monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    with Peer(sys.executable, *program) as peer:
        assert peer("add", a=1, b=2) == 3
        with pytest.raises(PeerError, match="'add': TypeError"):
            peer("add", a=1, b="x")
        assert peer("add", a=3, b=4) == 7
        assert peer("threads") == "3"
        with pytest.raises(PeerError, match="the peer ended"):
            peer("exit")
        with pytest.raises(PeerError, match="the peer ended"):
            peer("add", a=1, b=2)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="PyTorch is here"
)
def test_a_peer_without_pytorch_says_so():
    with Peer(sys.executable, "benchmarks.peers.airbench") as peer:
        with pytest.raises(PeerError, match="No module named 'torch'"):
            peer("load", path="x", device="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_seen_after_it_is_freed():
    def take():
        # Fresh pages, whatever memory the process has kept.
        with mmap.mmap(-1, 32 << 20) as pages:
            for start in range(0, len(pages), 4096):
                pages[start] = 1

    assert memory.peak(take) == pytest.approx(32 << 20, rel=0.2)


@pytest.mark.parametrize(
    ("app", "argument", "message"),
    [
        (train_step, "--networks=speedenet", "known are speednet, resnet18, vgg16"),
        (train_step, "--peer_python=/nowhere/python", "/nowhere/python"),
        (scaling, "--sizes=8,x", "--sizes=8,x: want whole numbers"),
        (time_to_accuracy, "--targets=ninety", "--targets=ninety"),
        (time_to_accuracy, "--experiment=nowhere.py", "nowhere.py: no such file"),
    ],
)
def test_a_wrong_flag_is_refused(app, argument, message):
    values = cli.parse(["benchmark", argument], app.define, "usage")
    with pytest.raises(UsageError) as error:
        app.main(values)
    assert message in str(error.value)


def test_networks_that_differ_are_refused():
    with pytest.raises(ConvnetError, match="ours trains 1,000 parameters"):
        train_step.check("vgg16", 1000, 1001)
