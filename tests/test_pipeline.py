"""Which examples make up a step, and that both paths give the devices the same ones.

Grain's workers import this file: slow imports stand where they are used.
"""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

import jax
import numpy as np
import pytest

from convnet import mesh as mesh_lib
from convnet.data import measure, pipeline, source
from convnet.data.decode import DecodeError
from convnet.data.order import EvalOrder, TrainOrder
from convnet.data.pipeline import BadInputs, Resident, Streaming
from convnet.errors import ConvnetError


def images(count, shape=(3, 2, 3), dtype=np.uint8):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, *shape)).astype(dtype)


class Flaky:
    """A source some of whose images cannot be read."""

    def __init__(self, count, bad=()):
        self.inputs = images(count)
        self.bad = frozenset(bad)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if index in self.bad:
            raise DecodeError(f"img/{index}.jpg", f"cut short at {index}")
        label = np.int32(index)
        return {"input": self.inputs[index], "label": label, "id": f"img/{index}.jpg"}


class FlakyAtOnce(Flaky):
    """The same, reading many at once."""

    def __getitems__(self, indices):
        def read(index):
            try:
                return self[index]
            except DecodeError as error:
                return error

        return [read(index) for index in indices]


class Process:
    """Labels that say which process read them."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        value = np.full((2, 1), index, np.float32)
        return {"input": value, "label": np.int32(os.getpid()), "id": str(index)}


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make(jax.device_count())


def bad_inputs(data, most=1.0):
    return BadInputs(len(data), most)


def splits(data, mesh, workers=0):
    """The split on either path."""
    return (
        Resident(data, mesh, bad_inputs(data)),
        Streaming(data, mesh, bad_inputs(data), workers),
    )


def read_all(split, order, start, stop):
    """The batches as the compiled step sees them, on the host."""
    from convnet import step as step_lib

    batches = split.batches(order, start, stop)
    return [jax.device_get(step_lib.materialize(split.data, b)) for b in batches]


# Orders.


@pytest.mark.parametrize(
    ("examples", "batch"), [(10, 4), (12, 4), (10, 10), (7, 25), (10, 1), (1, 3)]
)
def test_train_order_takes_every_example_once_an_epoch(examples, batch):
    order = TrainOrder(examples, batch, seed=3)
    epochs = 6
    steps = [order(step) for step in range(-(-epochs * examples // batch))]
    for one in steps:
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
            "index": ((batch,), np.int32),
            "epoch": ((batch,), np.int32),
            "weight": ((batch,), np.float32),
        }
        assert (one["weight"] == 1).all()
    index = np.concatenate([one["index"] for one in steps])[: epochs * examples]
    epoch = np.concatenate([one["epoch"] for one in steps])[: epochs * examples]
    np.testing.assert_array_equal(epoch, np.repeat(np.arange(epochs), examples))
    for n in range(epochs):
        np.testing.assert_array_equal(np.sort(index[epoch == n]), np.arange(examples))


def test_train_order_depends_on_seed_and_step_only():
    order = TrainOrder(50, 8, seed=3)
    forwards = [order(step)["index"] for step in range(20)]
    again = TrainOrder(50, 8, seed=3)
    for step in reversed(range(20)):
        np.testing.assert_array_equal(again(step)["index"], forwards[step])
        # Whoever changes a batch does not change the next one.
        again(step)["index"][:] = 0


def test_seeds_and_epochs_are_shuffled_differently():
    orders = [
        tuple(TrainOrder(50, 50, seed)(step)["index"])
        for seed in (0, 1, 2, 2**40)
        for step in (0, 1, 2)
    ]
    assert len(set(orders)) == 12
    assert tuple(range(50)) not in orders
    # Not a rotation or a mirror image either: neighbours are others.
    pairs = [set(itertools.pairwise(order)) for order in orders]
    common = max(len(a & b) for a, b in itertools.combinations(pairs, 2))
    assert common < 10


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = TrainOrder(30, 5, seed=1), TrainOrder(30, 15, seed=1)
    three = np.concatenate([small(step)["index"] for step in (3, 4, 5)])
    np.testing.assert_array_equal(three, large(1)["index"])


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 16])
def test_eval_order_counts_every_example_once(examples):
    order = EvalOrder(examples, 8)
    assert len(order) == {1: 1, 7: 1, 8: 1, 9: 2, 16: 2}[examples]
    batches = [order(step) for step in range(len(order))]
    assert all(len(b["index"]) == len(b["weight"]) == 8 for b in batches)
    index = np.concatenate([b["index"] for b in batches])
    weight = np.concatenate([b["weight"] for b in batches])
    assert set(weight) <= {0.0, 1.0}
    np.testing.assert_array_equal(index[weight == 1], np.arange(examples))
    assert (index < examples).all()
    assert all((b["epoch"] == 0).all() for b in batches)


# Both paths.


@pytest.mark.parametrize("kind", ["images", "series", "maps"])
def test_both_paths_give_the_examples_of_the_order(mesh, kind):
    inputs = {
        "images": images(300),
        "series": images(23, (5, 2), np.float32),
        "maps": images(23, (2, 3, 4, 1), np.float32),
    }[kind]
    labels = {
        "images": np.arange(300, dtype=np.int32),
        "series": np.arange(23, dtype=np.float32),
        "maps": images(23, (3, 4, 1), np.float32),
    }[kind]
    data = source.ArraySource(inputs, labels, "train")
    for order in (TrainOrder(len(inputs), 16, 5), EvalOrder(len(inputs), 16)):
        for split in splits(data, mesh):
            assert split.examples == len(inputs)
            # From the middle, as a run that goes on.
            batches = read_all(split, order, 1, 4)
            assert len(batches) == 3
            for step, batch in enumerate(batches, 1):
                want = order(step)
                rows = want["index"]
                want |= {"input": inputs[rows], "label": labels[rows]}
                assert batch.keys() == want.keys()
                for name, value in want.items():
                    assert batch[name].dtype == value.dtype, name
                    np.testing.assert_array_equal(batch[name], value)


def test_a_resident_batch_sends_only_what_selects(mesh):
    split = Resident(Flaky(20), mesh, bad_inputs(Flaky(20)))
    (batch,) = split.batches(TrainOrder(20, 4, 0), 0, 1)
    assert batch.keys() == {"index", "epoch", "weight"}
    assert split.data["input"].shape == (20, 3, 2, 3)
    assert split.data["input"].sharding.is_fully_replicated


def test_threads_keep_the_order(mesh):
    class Slow(Flaky):
        threads = set()

        def __getitem__(self, index):
            self.threads.add(threading.get_ident())
            # The earlier ones take longer.
            time.sleep(0.02 if index < 8 else 0)
            return super().__getitem__(index)

    data = Slow(32)
    split = Streaming(data, mesh, bad_inputs(data), 0)
    batches = read_all(split, EvalOrder(32, 2), 0, 16)
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(32))
    assert len(data.threads) > 1 and threading.get_ident() not in data.threads


def terminate_children(over):
    while not over.wait(0.05):
        for child in multiprocessing.active_children():
            child.terminate()


def test_workers_are_processes_and_give_the_same_batches(mesh):
    data = Process()
    order = TrainOrder(6, 2, seed=0)
    split = Streaming(data, mesh, bad_inputs(data), workers=2)
    # They are told to end as soon as they exist: Slurm tells all processes of a task.
    reading = threading.Event()
    threading.Thread(target=terminate_children, args=(reading,), daemon=True).start()
    batches = read_all(split, order, 1, 5)
    reading.set()
    for step, batch in enumerate(batches, 1):
        want = order(step)
        for name, value in want.items():
            np.testing.assert_array_equal(batch[name], value)
        np.testing.assert_array_equal(batch["input"][:, 0, 0], want["index"])
    processes = {int(label) for batch in batches for label in batch["label"]}
    assert len(processes) == 2 and os.getpid() not in processes
    assert multiprocessing.active_children() == []
    # Nothing is left that the processes shared: a thread of Grain's frees it.
    deadline = time.monotonic() + 20
    while shared_memory.SharedMemory in {type(thing) for thing in gc.get_objects()}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_leaving_early_ends_the_readers(mesh):
    data = Flaky(64)
    split = Streaming(data, mesh, bad_inputs(data), 0)
    batches = split.batches(TrainOrder(64, 2, 0), 0, 10_000)
    next(batches)
    batches.close()
    assert multiprocessing.active_children() == []
    assert list(split.batches(TrainOrder(64, 2, 0), 0, 1))


# Unreadable images.


ORPHANS = """
import multiprocessing, os, time
from convnet.data import workers

def work(started):
    workers.start(0, 1)
    started.send(os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=work, args=(there,), daemon=True).start()
    print(here.recv(), flush=True)
    time.sleep(60)
"""


def test_a_worker_outlives_sigterm_but_not_the_main_process(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    main = subprocess.Popen(
        [sys.executable, tmp_path / "orphans.py"],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(main.stdout.readline())
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(worker, 0)
    main.kill()
    main.communicate()
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):  # of the group: nobody is left
        while time.monotonic() < deadline:
            os.killpg(main.pid, 0)
            time.sleep(0.02)


@pytest.mark.parametrize("kind", [Flaky, FlakyAtOnce])
def test_a_good_image_stands_in_and_the_others_keep_their_places(mesh, kind):
    data = kind(20, bad=(3, 4, 11, 19))
    stands_in = {3: 5, 4: 5, 11: 12, 19: 0}
    found = []
    for split in splits(data, mesh):
        batches = read_all(split, EvalOrder(20, 8), 0, 3)
        found.append(batches)
        index = np.concatenate([batch["index"] for batch in batches])
        np.testing.assert_array_equal(index[:20], np.arange(20))
        label = np.concatenate([batch["label"] for batch in batches])[:20]
        want = [stands_in.get(i, i) for i in range(20)]
        np.testing.assert_array_equal(label, want)
        inputs = np.concatenate([batch["input"] for batch in batches])[:20]
        np.testing.assert_array_equal(inputs, data.inputs[want])
        weight = np.concatenate([batch["weight"] for batch in batches])
        good = [float(i < 20 and i not in stands_in) for i in range(24)]
        np.testing.assert_array_equal(weight, good)
        assert split.bad.listed() == [
            (f"img/{i}.jpg", f"cut short at {i}") for i in sorted(stands_in)
        ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_both_paths_agree_while_training(mesh):
    data = Flaky(20, bad=(0, 7, 8))
    order = TrainOrder(20, 6, seed=2)
    resident, streaming = (read_all(s, order, 0, 10) for s in splits(data, mesh))
    jax.tree.map(np.testing.assert_array_equal, resident, streaming)
    total = sum(batch["weight"].sum() for batch in resident)
    assert total == 60 - 3 * 3  # Three epochs.


def test_the_order_of_a_run_does_not_depend_on_bad_images(mesh):
    order = TrainOrder(20, 6, seed=2)
    both = [
        read_all(Resident(d, mesh, bad_inputs(d)), order, 0, 7)
        for d in (Flaky(20), Flaky(20, bad=(0, 7, 8)))
    ]
    for good, flaky in zip(*both, strict=True):
        keep = flaky["weight"] == 1
        assert 0 < keep.sum()
        for name in good:
            np.testing.assert_array_equal(good[name][keep], flaky[name][keep])


def test_each_bad_image_is_announced_once(mesh, capsys):
    data = Flaky(8, bad=(2,))
    split = Streaming(data, mesh, bad_inputs(data), 0)
    read_all(split, TrainOrder(8, 4, 0), 0, 8)
    assert capsys.readouterr().out.count("img/2.jpg: cut short at 2") == 1
    assert split.bad.listed() == [("img/2.jpg", "cut short at 2")]


@pytest.mark.parametrize("path", [0, 1])
def test_as_many_as_allowed(mesh, path):
    data = Flaky(40, bad=(1, 2))
    for most, allowed in ((0.05, True), (0.049, False)):
        bad = BadInputs(40, most)

        def read(bad=bad):
            if path == 0:
                return Resident(data, mesh, bad)
            split = Streaming(data, mesh, bad, 0)
            return read_all(split, EvalOrder(40, 8), 0, 5)

        if allowed:
            read()
            continue
        with pytest.raises(ConvnetError) as error:
            read()
        message = str(error.value)
        assert "2 of 40 images cannot be read" in message
        assert "data.max_bad_fraction = 0.049" in message
        for i in (1, 2):
            assert f"  img/{i}.jpg: cut short at {i}\n" in message


def test_a_long_list_is_cut():
    found = {i: (f"img/{i}", "broken") for i in range(25)}
    with pytest.raises(ConvnetError) as error:
        BadInputs(100, 0.1).add(found)
    message = str(error.value)
    assert message.count(": broken") == 20 and "... and 5 more" in message


def test_none_can_be_read(mesh):
    data = Flaky(30, bad=range(30))
    for attempt in (
        lambda: Resident(data, mesh, bad_inputs(data)),
        lambda: pipeline.first(data),
        lambda: measure.mean_and_std(data),
        lambda: read_all(
            Streaming(data, mesh, bad_inputs(data), 0), EvalOrder(30, 8), 0, 1
        ),
    ):
        with pytest.raises(ConvnetError) as error:
            attempt()
        message = str(error.value)
        assert "none of the 30 images can be read" in message
        assert "img/0.jpg: cut short at 0" in message


def test_first_is_the_first_that_can_be_read():
    assert pipeline.first(Flaky(4))["id"] == "img/0.jpg"
    assert pipeline.first(Flaky(4, bad=(0, 1)))["id"] == "img/2.jpg"


# Mean and standard deviation.


def test_measure_of_images():
    data = source.ArraySource(images(50), np.zeros(50, np.int32), "train")
    mean, std = measure.mean_and_std(data)
    unit = images(50).astype(np.float64) / 255
    np.testing.assert_allclose(mean, unit.mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(std, unit.std((0, 1, 2)), atol=5.1e-5)
    assert all(type(x) is float and x == round(x, 4) for x in (*mean, *std))


def test_measure_of_floats_in_their_own_unit():
    random = np.random.default_rng(1)
    series = random.normal([100, -3], [20, 0.5], (40, 7, 2)).astype(np.float32)
    # A channel that never varies can still be divided by.
    series = np.concatenate([series, np.full((40, 7, 1), 5, np.float32)], axis=-1)
    data = source.ArraySource(series, np.zeros(40, np.float32), "train")
    mean, std = measure.mean_and_std(data)
    wide = series.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 1)), atol=5.1e-5)
    np.testing.assert_allclose(std[:2], wide.std((0, 1))[:2], atol=5.1e-5)
    assert std[2] == 0.001


def test_measure_takes_evenly_spaced_examples_of_a_large_split(monkeypatch):
    monkeypatch.setattr(measure, "_MEASURED_EXAMPLES", 5)
    # Sorted by class, as folders are.
    values = np.repeat([0, 0, 0, 1, 1], 20).astype(np.float32).reshape(100, 1, 1)
    read = []

    class Counted(source.ArraySource):
        def __getitem__(self, index):
            read.append(int(index))
            return super().__getitem__(index)

    data = Counted(values, np.zeros(100, np.int32), "train")
    assert measure.mean_and_std(data) == ((0.4,), (round(0.24**0.5, 4),))
    assert read == [0, 24, 49, 74, 99]


def test_measure_passes_over_unreadable_images():
    whole, flaky = (
        measure.mean_and_std(Flaky(60)),
        measure.mean_and_std(Flaky(60, bad=(7,))),
    )
    np.testing.assert_allclose(whole, flaky, atol=0.02)


# Which path.


@pytest.mark.parametrize(
    ("placement", "limit", "want"),
    [
        ("device", 0, Resident),
        ("stream", 1 << 30, Streaming),
        # 10 images of 18 bytes.
        ("auto", 180, Resident),
        ("auto", 179, Streaming),
    ],
)
def test_create_chooses_by_placement_and_size(
    mesh, monkeypatch, placement, limit, want
):
    from convnet import config as config_lib

    monkeypatch.setattr(pipeline, "_CPU_RESIDENT_BYTES", limit)
    config = config_lib.default()
    config.data.placement = placement
    config.data.max_bad_fraction = 0.1
    # The size is that of the first image that can be read.
    split = pipeline.create(Flaky(10, bad=(0,)), config.data, mesh)
    assert type(split) is want
    assert len(read_all(split, EvalOrder(10, 4), 0, 3)) == 3
    assert split.bad.listed() == [("img/0.jpg", "cut short at 0")]
