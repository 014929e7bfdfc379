"""Several steps in one program: the same run as step by step."""

import json
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convnet import config as config_lib
from convnet import loop, prepare, train
from convnet.cli import Interrupted
from convnet.errors import ConvnetError
from convnet.workdir import Workdir

EXAMPLES, BATCH, STEPS = 40, 8, 14
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """XLA's lowest level: what is tested here is when a program runs, not how well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    rng = np.random.default_rng(0)
    labels = np.arange(EXAMPLES) % 2
    x = rng.integers(0, 256, (EXAMPLES, 6, 6, 1)) // (1 + labels[:, None, None, None])
    x = x.astype(np.uint8)
    arrays = {"x_train": x, "y_train": labels, "x_test": x[:13], "y_test": labels[:13]}
    np.savez(folder / "data.npz", **arrays)
    return folder


COMPILED = {}


def compile_once(self, function, *args, **options):
    """`Run.compile`, for which runs of one config are the same."""
    shapes = jax.tree.map(jax.typeof, args)
    name = getattr(function, "func", function).__name__
    key = (config_lib.sha256(self.config), name, str(shapes))
    if key not in COMPILED:
        COMPILED[key] = compile_each(self, function, *args, **options)
    return COMPILED[key]


compile_each = prepare.Run.compile


def run(folder, name, together, **changes):
    """A run with all that is random; how many steps each program had, and its result.

    An epoch has 5 steps, after which it is evaluated; every 7 it is saved.
    """
    config = config_lib.default()
    given = {
        "data.name": "arrays",
        "data.dir": str(folder / "data.npz"),
        "data.batch_size": BATCH,
        "augment.flip": "random",
        "augment.crop_pad": 1,
        "model.widths": (4,),
        "model.depth": 1,
        "model.norm": "batch",
        "model.dropout": 0.2,
        "optimizer.lr": 0.05,
        "optimizer.ema": 0.9,
        "train.steps": STEPS,
        "train.log_every": 3,
        "train.steps_per_dispatch": together,
        "checkpoint.every_steps": 7,
        "checkpoint.keep": 20,
    }
    config.update_from_flattened_dict(given | changes)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        count = loop.Loop._count

        def counted(self, steps, metrics):
            sizes.append(steps)
            count(self, steps, metrics)

        patch.setattr(loop.Loop, "_count", counted)
        patch.setattr(prepare.Run, "compile", compile_once)
        return sizes, train.run(config, folder / name, "command")


def lines(folder, name):
    rows = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def saved(folder, name, step):
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder / name / "checkpoints" / str(step) / "state")


@pytest.fixture(scope="module")
def single(folder):
    return run(folder, "single", 1, **{"train.log_every": 1})


@pytest.fixture(scope="module")
def by_four(folder):
    return run(folder, "by_four", 4)


def test_programs_end_where_something_is_due(single, by_four):
    assert single[0] == [1] * STEPS
    # Evaluated after 5, 10 and 14 steps, saved after 7 and 14.
    assert by_four[0] == [4, 1, 2, 1, 2, 2, 2]


def test_the_weights_are_the_same(folder, single, by_four):
    """Up to rounding: several steps are another program."""
    for key in ("step", "test/examples", "params/count"):
        assert single[1][key] == by_four[1][key]
    for step in (5, 7, 10, 14):
        one, four = saved(folder, "single", step), saved(folder, "by_four", step)
        assert one.keys() == four.keys() and len(one) > 15
        for name, leaf in one.items():
            np.testing.assert_allclose(
                four[name], leaf, rtol=1e-4, atol=1e-5, err_msg=f"{step} {name}"
            )


def test_a_replay_ends_where_it_should(folder, by_four, monkeypatch):
    """A checkpoint of an earlier start may lie between the ends of programs."""
    monkeypatch.setattr(prepare.Run, "compile", compile_once)
    workdir = Workdir(folder / "by_four")
    it = prepare.prepare(workdir.config())
    it.state = prepare.initial_state(it)
    loop.Loop(it, 0, None, workdir).replay(3)
    assert int(it.state.step) == 3


def check_lines(folder, name, steps):
    """Each line says what the steps since the one before it said one by one."""
    want = {row["step"]: row for row in lines(folder, "single") if "epoch" in row}
    assert list(want) == list(range(1, STEPS + 1))
    found = [row for row in lines(folder, name) if "epoch" in row]
    assert [row["step"] for row in found] == steps
    for before, row in zip([0, *steps], found, strict=False):
        alone = [want[step] for step in range(before + 1, row["step"] + 1)]
        assert row.keys() == alone[0].keys()
        assert row.pop("images_per_second") > 0 and 0 <= row.pop("input_wait") <= 1
        for key in ("train/loss", "train/accuracy", "train/objective"):
            mean = np.mean([one[key] for one in alone])
            assert row.pop(key) == pytest.approx(mean, rel=1e-4), key
        for key, value in row.items():
            assert value == pytest.approx(alone[-1][key], rel=1e-4), key


def test_lines_are_those_of_single_steps(folder, single, by_four):
    # Each multiple of 3, and wherever the state is saved.
    check_lines(folder, "by_four", [3, 5, 6, 7, 9, 10, 12, 14])
    tests = [
        [row for row in lines(folder, name) if "test/loss" in row]
        for name in ("single", "by_four")
    ]
    assert [row["step"] for row in tests[1]] == [5, 10, 14]
    for one, four in zip(*tests, strict=True):
        assert four == pytest.approx(one, rel=1e-4)


def test_lines_within_programs_and_across_them(folder, single):
    changes = {"checkpoint.every_steps": 0, "train.eval_every": 0.0}
    sizes, _ = run(folder, "by_six", 6, **changes, **{"train.log_every": 4})
    assert sizes == [6, 6, 2]
    check_lines(folder, "by_six", [4, 8, 12, 14])


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_resumed_run_ends_with_the_same_bits(folder, by_four, how):
    """Saved in time, after step 8, or thrown back from step 10 to step 7."""
    before = []
    with pytest.MonkeyPatch.context() as patch:
        after = loop.Loop._after_step

        def stop(self, steps, signals):
            before.append(steps)
            if self._done > 8 and how == "killed":
                raise MemoryError("the process is gone")
            if self._done > 7 and how == "interrupted":
                os.kill(os.getpid(), signal.SIGINT)
            after(self, steps, signals)

        patch.setattr(loop.Loop, "_after_step", stop)
        with pytest.raises(Interrupted if how == "interrupted" else MemoryError):
            run(folder, how, 4)
    done = 8 if how == "interrupted" else 7
    assert sum(before) == (8 if how == "interrupted" else 10)
    sizes, result = run(folder, how, 4)
    assert sum(sizes) == STEPS - done
    # The same programs as in one go, from there on.
    assert sizes == by_four[0][-len(sizes) :]
    assert result["params/sha256"] == by_four[1]["params/sha256"]
    if how == "interrupted":  # which adds a line, of the steps until then
        return
    for mine, other in zip(lines(folder, how), lines(folder, "by_four"), strict=True):
        for row in (mine, other):
            row.pop("images_per_second", None), row.pop("input_wait", None)
        assert mine == other


def test_a_loss_that_is_not_finite_is_named_by_its_step(folder):
    """It is the fourth of a program of five; the lines before it are written."""
    match = "loss is (nan|inf) at step [2-5]"
    with pytest.raises(ConvnetError, match=match) as error:
        run(folder, "nan", 5, **{"optimizer.lr": 1e30, "train.log_every": 1})
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    written = [row["step"] for row in lines(folder, "nan")]
    assert written == list(range(1, step))


@pytest.mark.parametrize(
    ("backend", "data", "asked", "examples", "want"),
    [
        ("cpu", True, 0, 100_000, 1),
        ("cpu", True, 7, 100_000, 7),
        ("cpu", False, 7, 100_000, 1),  # streamed
        ("gpu", True, 0, 250, 25),
        ("gpu", True, 0, 255, 25),
        ("tpu", True, 0, 100_000, 100),
        ("gpu", True, 0, 4, 1),
        ("gpu", True, 3, 100_000, 3),
        ("gpu", False, 0, 100_000, 1),
    ],
)
def test_how_many_go_together(backend, data, asked, examples, want, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = config_lib.default()
    config.data.batch_size, config.train.steps_per_dispatch = 10, asked
    it = SimpleNamespace(
        config=config, train_seconds=0.0, train_order=SimpleNamespace(examples=examples)
    )
    made = loop.Loop(it, 0, None, None)
    assert made._steps_together(SimpleNamespace(data=data)) == want


def test_what_is_under_way_is_waited_for_before_a_program_is_compiled(monkeypatch):
    """Its seconds are those of training, the compiler's are not."""
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", calls.append)
    it = SimpleNamespace(
        config=None,
        train_seconds=0.0,
        state="the state",
        recipe_of=lambda step: "a recipe",
        split=lambda name: SimpleNamespace(data={}),
        out_shardings=lambda: None,
        compile=lambda *args, **options: calls.append("compiled"),
    )
    made = loop.Loop(it, 0, None, None)
    made._clock = 0.0
    made._train(1, {})
    made._train(1, {})
    assert calls == ["the state", "compiled"]
