"""Predict: what goes in, what comes out, and what broken inputs do to the rest."""

import contextlib
import csv
import dataclasses
import inspect
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, softmax

from convnet import bundle as bundle_lib
from convnet import cli, decoders, inputs, models, predict, predict_output
from convnet import predict_stream as stream
from convnet.data.resize import Resize
from convnet.errors import ConvnetError, UsageError
from convnet.input_arrays import Wanted

CLASSES = ("cat", "dog", "=1+1")
SIZE = 8
OPTIONS = {"widths": (4,), "depth": 1, "gather": "flatten"}
WANTED = Wanted((SIZE, SIZE, 3), "uint8", Resize())


def make_bundle(task, classes, outputs, shape=(SIZE, SIZE, 3), dtype="uint8"):
    model = models.create("cnn", num_outputs=outputs, **OPTIONS)
    variables = model.init(jax.random.key(1), jnp.zeros((1, *shape)))
    inputs = jax.random.normal(jax.random.key(2), (64, *shape))
    centre = model.apply(variables, inputs).mean(0)
    # Larger than at the start, and centred, so that inputs get different answers.
    head = variables["params"]["head"]["logits"]
    head = {"kernel": 4 * head["kernel"], "bias": -4 * centre}
    return bundle_lib.Bundle(
        architecture={"name": "cnn", "num_outputs": outputs, "options": OPTIONS},
        task={"name": task, "positive": 0 if task == "binary" else None},
        classes=classes,
        preprocessing={
            "input_shape": shape,
            "input_dtype": dtype,
            "resize": "crop",
            "mean": (0.5,),
            "std": (0.25,),
        },
        provenance={},
        variables={"params": {**variables["params"], "head": {"logits": head}}},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of each kind: its bundle and its file."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "classes": make_bundle("classification", CLASSES, 3),
        "binary": make_bundle("binary", ("cat", "non-cat"), 1),
        "series": make_bundle("classification", CLASSES, 3, (16, 1), "float32"),
        "numbers": make_bundle("regression", (), 1),
    }
    for name, bundle in kinds.items():
        bundle_lib.save(folder / f"{name}.safetensors", bundle)
    return {n: (b, folder / f"{n}.safetensors") for n, b in kinds.items()}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(3).integers(0, 256, (23, SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def folder(tmp_path, pixels):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    # What an app does to its process is not for the one that the tests share.
    monkeypatch.setattr(predict.mesh, "start", lambda cache: None)


def run(*arguments):
    rest = []
    argv = ["predict", *map(str, arguments)]
    values = cli.parse(argv, predict.define, "", rest)
    return predict.main(values, rest)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logits(bundle, inputs):
    """Plain: normalised by hand, the network applied to everything at once."""
    normal = (np.asarray(inputs, np.float32) / 255 - 0.5) / 0.25
    if bundle.preprocessing["input_dtype"] == "float32":
        normal = (inputs - 0.5) / 0.25
    return np.asarray(
        bundle.model().apply(bundle.variables, jnp.asarray(normal, jnp.float32))
    )


@pytest.mark.parametrize("many", [4, 10_000])  # processes, and threads
def test_rows_are_what_the_network_says_in_the_order_of_the_names(
    saved, folder, pixels, tmp_path, monkeypatch, many
):
    monkeypatch.setattr(stream, "MANY", many)
    monkeypatch.setattr(stream, "batch_size", lambda *about: 5)  # the last one: 3
    bundle, model = saved["classes"]
    output = tmp_path / "rows.jsonl"
    assert run(f"--model={model}", folder, f"--output={output}", "--top=2") == 0
    rows, want = rows_of(output), softmax(logits(bundle, pixels), -1)
    assert [row["path"] for row in rows] == [
        str(folder / f"{index:02d}.png") for index in range(23)
    ]
    assert len({row["label"] for row in rows}) > 1
    for row, probabilities in zip(rows, want, strict=True):
        best = np.argsort(-probabilities)[:2]
        assert list(row) == ["path", "label", "probability", "top"]
        assert [label for label, _ in row["top"]] == [CLASSES[i] for i in best]
        np.testing.assert_allclose(
            [p for _, p in row["top"]], probabilities[best], rtol=1e-3, atol=1e-6
        )
        assert [row["label"], row["probability"]] == row["top"][0]


def test_find_gives_what_is_probable_enough_the_most_probable_first(
    saved, folder, pixels, tmp_path, capsys
):
    bundle, model = saved["classes"]
    want = softmax(logits(bundle, pixels), -1)[:, 1]
    level = float(np.sort(want)[-9]) - 1e-4  # nine are above, or more
    command = [f"--model={model}", folder, "--find=dog", f"--threshold={level:.5f}"]
    output = tmp_path / "rows.jsonl"
    assert run(*command, f"--output={output}") == 0
    rows = rows_of(output)
    assert len(rows) == (want >= level).sum() >= 9
    assert all(list(row) == ["path", "label", "probability"] for row in rows)
    assert {row["label"] for row in rows} == {"dog"}
    order = [int(os.path.basename(row["path"])[:2]) for row in rows]
    assert order == list(np.argsort(-want)[: len(rows)])
    assert f"23 read, {len(rows)} found, 0 could not" in capsys.readouterr().err
    assert run(*command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [[r["path"], f"dog {r['probability']:.2f}"] for r in rows]
    assert run(*command[:-1], "--threshold=1") == 0  # nothing is found
    assert capsys.readouterr().out == ""


def test_a_binary_model_knows_its_class_and_the_other(saved, folder, pixels, tmp_path):
    bundle, model = saved["binary"]
    want = expit(logits(bundle, pixels)[:, 0])
    output = tmp_path / "rows.jsonl"
    found = {}
    for name in ("cat", "non-cat"):
        run(f"--model={model}", folder, f"--find={name}", "--threshold=0",
            f"--output={output}")  # fmt: skip
        rows = sorted(rows_of(output), key=lambda row: row["path"])
        found[name] = np.array([row["probability"] for row in rows])
    np.testing.assert_allclose(found["cat"], want, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["non-cat"], 1 - want, rtol=1e-3, atol=1e-6)
    assert predict.class_names(("a", "b", "c"), 1) == ("not b", "b")


def test_a_regression_gives_numbers_and_refuses_classes(
    saved, folder, pixels, tmp_path
):
    bundle, model = saved["numbers"]
    output = tmp_path / "rows.csv"
    assert run(f"--model={model}", folder, f"--output={output}") == 0
    rows = list(csv.DictReader(output.read_text().splitlines()))
    want = logits(bundle, pixels)[:, 0]
    got = [float(row["prediction"]) for row in rows]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    for flag in ("--find=cat", f"--report={tmp_path / 'page.html'}"):
        with pytest.raises(UsageError, match="puts out numbers"):
            run(f"--model={model}", folder, flag)


def test_tta_averages_the_logits_of_six_views(saved, folder, pixels, tmp_path):
    bundle, model = saved["classes"]
    output = tmp_path / "rows.jsonl"
    run(f"--model={model}", folder, "--tta", f"--output={output}")
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    mean = 0
    for view, share in (
        (pixels, 0.25),
        (padded[:, :SIZE, :SIZE], 0.125),
        (padded[:, 2:, 2:], 0.125),
    ):
        mean += share * (logits(bundle, view) + logits(bundle, view[:, :, ::-1]))
    want = softmax(mean, -1).max(-1)
    got = [row["probability"] for row in rows_of(output)]
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_without_the_flag_a_model_predicts_as_it_was_evaluated(saved, folder, tmp_path):
    bundle, model = saved["classes"]
    flipping = tmp_path / "flipping.safetensors"
    bundle_lib.save(flipping, dataclasses.replace(bundle, views="flip_translate"))

    def found(name, *flags):
        output = tmp_path / "rows.jsonl"
        run(f"--model={name}", folder, *flags, f"--output={output}")
        return [row["probability"] for row in rows_of(output)]

    assert found(flipping) == found(model, "--tta") != found(model)
    assert found(flipping, "--notta") == found(model)


def make_hostile(folder):
    """Puts broken files between the good ones; returns their names."""
    good = (folder / "00.png").read_bytes()
    (folder / "00a-empty.png").write_bytes(b"")
    (folder / "00b-text.jpg").write_text("not a picture")
    (folder / "01-cut").write_bytes(good[: len(good) // 2])
    (folder / "02-nowhere.png").symlink_to("no-such-file")
    (folder / "03-itself.png").symlink_to("03-itself.png")
    (folder / "04-circle").symlink_to(folder)
    (folder / "05-broken.npz").write_bytes(b"PK\3\4 but no more")
    os.mkfifo(folder / "06-pipe.png")
    (folder / os.fsdecode(b"07-\xff\n.png")).write_bytes(b"")
    return [path.name for path in folder.iterdir() if "-" in path.name]


@pytest.mark.parametrize("many", [4, 10_000])
def test_broken_inputs_are_a_row_each_and_disturb_nothing(
    saved, folder, tmp_path, capfd, monkeypatch, many
):
    monkeypatch.setattr(stream, "MANY", many)
    monkeypatch.setattr(stream, "batch_size", lambda *about: 7)
    command = [f"--model={saved['classes'][1]}", folder]
    run(*command, f"--output={tmp_path / 'before.jsonl'}")
    broken = make_hostile(folder)
    assert len(broken) == 9
    assert run(*command, f"--output={tmp_path / 'after.jsonl'}") == 3
    rows = rows_of(tmp_path / "after.jsonl")
    assert [r for r in rows if "error" not in r] == rows_of(tmp_path / "before.jsonl")
    errors = {r["path"]: r["error"] for r in rows if "error" in r}
    assert sorted(errors) == sorted(str(folder / name) for name in broken)
    assert [r["path"] for r in rows] == sorted(r["path"] for r in rows)
    assert all(list(row) == ["path", "error"] for row in rows if "error" in row)
    assert "folder that it lies in" in errors[str(folder / "04-circle")]
    assert "symbolic links" in errors[str(folder / "03-itself.png")]
    said = capfd.readouterr().err
    assert said.count("cannot read") == 9
    assert "07-\\udcff\\n.png" in said
    assert "23 read, 9 could not be read" in said
    # A search lists them too, after what it found.
    assert run(*command, "--find=cat", f"--output={tmp_path / 'find.jsonl'}") == 3
    rows = rows_of(tmp_path / "find.jsonl")
    assert ["error" in row for row in rows] == [False] * (len(rows) - 9) + [True] * 9


def test_what_is_asked_wrongly_is_refused_before_the_model_is_read(folder, tmp_path):
    model = "--model=no-such-model"
    for arguments, message in (
        ([tmp_path / "absent.png"], "absent.png: no such file or folder"),
        ([f"{folder}/*.gif"], r"\*.gif: no file matches"),
        ([], "no PATH"),
        (["-", "-"], "only once"),
        ([folder, "--output=rows.txt"], "want a name in .jsonl or .csv"),
        ([folder, "--output=absent/rows.csv"], "no folder absent"),
        ([folder, "--report=absent/page.html"], "no folder absent"),
        ([folder, f"--report={folder}"], "a folder; want a file"),
        ([folder, "--threshold=1.5"], "threshold"),
        ([folder, "--top=0"], "top"),
        ([folder, "--fnid=cat"], "unknown flag --fnid.*did you mean 'find'"),
        ([folder], "no-such-model"),
    ):
        with pytest.raises(UsageError, match=message):
            run(model, *arguments)


def test_an_unknown_class_names_the_nearest(saved, folder, tmp_path):
    output = tmp_path / "rows.csv"
    output.write_text("kept")
    command = [f"--model={saved['classes'][1]}", folder, f"--output={output}"]
    for name, said in (("Cat", "nearest are cat"), ("dgo", "nearest are dog")):
        with pytest.raises(UsageError, match=f"{name}: .*{said}"):
            run(*command, f"--find={name}")
    with pytest.raises(UsageError, match="it knows cat, dog, =1"):
        run(*command, "--find=xyzzy")
    assert output.read_text() == "kept"


def found(*paths, wanted=WANTED):
    return [
        (r.path, r.error)
        for r in inputs.records(inputs.expand([*map(str, paths)]), wanted)
    ]


def test_folders_leave_out_hidden_files_and_notes_and_follow_links_once(tmp_path):
    for name in ("b/2.png", "b/c/1", "a.JPG", "b/notes.txt", ".x.png", "b/Thumbs.db",
                 ".hidden/1.png", "__MACOSX/a.png", "away/z.png"):  # fmt: skip
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "in/away").rename(tmp_path / "away")
    (tmp_path / "in/link").symlink_to(tmp_path / "away")
    (tmp_path / "in/link2").symlink_to(tmp_path / "away")
    names = [
        os.path.relpath(path, tmp_path / "in") for path, _ in found(tmp_path / "in")
    ]
    assert names == ["a.JPG", "b/2.png", "b/c/1", "link/z.png"]
    # What is named is read whatever it is called.
    assert found(tmp_path / "in/b/notes.txt") == [(f"{tmp_path}/in/b/notes.txt", "")]


def test_folders_may_be_nested_deeper_than_the_stack(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "1.png").write_bytes(b"x")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert found(tmp_path) == [(str(deep / "1.png"), "")]
    finally:
        sys.setrecursionlimit(before)


def test_patterns_are_expanded_and_nothing_comes_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p/1.png", "p/q/2.png", "p/q/3.gif", "p[1].png"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "wb").close()
    os.symlink("..", "p/up")
    everything = [("p/1.png", ""), ("p/q/2.png", ""), ("p/q/3.gif", "")]
    assert found("p/*.png") == everything[:1]
    assert found("**/*.png") == [*everything[:2], ("p[1].png", "")]
    assert found("p/**") == [
        *everything,
        ("p/up", "a link to a folder that it lies in"),
    ]
    assert found("p[1].png") == [("p[1].png", "")]


@pytest.mark.parametrize("end", [b"\n", b"\0", b"\r\n"])
def test_a_list_on_standard_input(tmp_path, monkeypatch, end):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/1.png").write_bytes(b"x")
    names = [b"a b.png", b"\xff.png", b"absent.png", bytes(tmp_path / "folder")]

    class Stdin:
        buffer = io.BytesIO(end.join([*names, b""]))

    monkeypatch.setattr(sys, "stdin", Stdin)
    got = [os.fsencode(path) for path, _ in found("-")]
    assert got == [*names[:3], bytes(tmp_path / "folder/1.png")]


def array_records(path, wanted=WANTED):
    return list(inputs.records([str(path)], wanted))


def test_arrays_give_a_record_for_each_row(saved, pixels, tmp_path):
    for name, array in {"c": pixels, "f": np.asfortranarray(pixels)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        records = array_records(tmp_path / f"{name}.npy")
        assert records[22].path == f"{tmp_path / name}.npy#22"
        np.testing.assert_array_equal([r.pixels for r in records], pixels)
    np.save(tmp_path / "one.npy", pixels[5])
    (record,) = array_records(tmp_path / "one.npy")
    assert record.path == str(tmp_path / "one.npy")
    labels = np.array([object()] * 23)
    np.savez_compressed(tmp_path / "a.npz", images=pixels, other=pixels, labels=labels)
    records = array_records(tmp_path / "a.npz")
    assert [r.path for r in records] == [f"{tmp_path}/a.npz#{i}" for i in range(23)]
    np.savez(tmp_path / "b.npz", x=pixels[:2], y=pixels[2:3], z=np.zeros(3))
    records = array_records(tmp_path / "b.npz")
    assert [r.path.rpartition("/")[2] for r in records] == [
        "b.npz#x:0", "b.npz#x:1", "b.npz#y:0",
    ]  # fmt: skip
    np.testing.assert_array_equal([r.pixels for r in records], pixels[:3])
    gray = Wanted((SIZE, SIZE, 1), "uint8", Resize())
    np.save(tmp_path / "gray.npy", pixels[..., 0])
    records = array_records(tmp_path / "gray.npy", gray)
    np.testing.assert_array_equal([r.pixels for r in records], pixels[..., :1])


def test_arrays_of_floats_go_through_the_network(saved, tmp_path):
    bundle, model = saved["series"]
    series = np.random.default_rng(0).normal(size=(6, 16, 1)).astype(">f8")
    np.save(tmp_path / "s.npy", series)
    output = tmp_path / "rows.jsonl"
    assert run(f"--model={model}", tmp_path / "s.npy", f"--output={output}") == 0
    want = softmax(logits(bundle, series), -1).max(-1)
    got = [row["probability"] for row in rows_of(output)]
    np.testing.assert_allclose(got, want, rtol=1e-3)
    # A number that is none has no probability, and JSON has no name for it.
    series[2, 3] = np.nan
    np.save(tmp_path / "s.npy", series)
    assert run(f"--model={model}", tmp_path / "s.npy", f"--output={output}") == 3
    assert [("error" in row) for row in rows_of(output)] == [i == 2 for i in range(6)]
    Image.new("RGB", (16, 1)).save(tmp_path / "p.png")
    run(f"--model={model}", tmp_path / "p.png", f"--output={output}")
    assert "want a .npy or .npz" in rows_of(output)[0]["error"]


class Trap:
    """Unpickled, it raises: a test sees that it never is."""

    def __reduce__(self):
        return (os._exit, (77,))


def test_arrays_that_do_not_fit_are_one_error_that_says_what_is_wanted(
    pixels, tmp_path
):
    def error(name, contents):
        (tmp_path / name).write_bytes(contents)
        *rows, last = array_records(tmp_path / name)
        assert all(not row.error for row in rows)
        assert last.path == str(tmp_path / name)
        return len(rows), last.error

    def npy(array):
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    def npz(**arrays):
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    wanted = "the model takes uint8 (n, 8, 8, 3)"
    said = f"is float64 (2, 8, 8, 3); {wanted}"
    assert error("a.npy", npy(np.zeros((2, 8, 8, 3)))) == (0, said)
    said = f"is uint8 (2, 9, 8, 3); {wanted}"
    assert error("b.npy", npy(np.zeros((2, 9, 8, 3), np.uint8))) == (0, said)
    said = f"holds x int64 (2), o object (1); {wanted}"
    assert error("c.npz", npz(x=np.arange(2), o=np.array([Trap()]))) == (0, said)
    assert "is object (1)" in error("d.npy", npy(np.array([Trap()])))[1]
    assert error("e.npz", npz()) == (0, f"holds no array; {wanted}")
    cut = "is cut off: 22 of 23 rows are there"
    assert error("f.npy", npy(pixels)[:-1])[1] == cut
    assert error("g.npy", b"")[0] == 0
    assert error("h.npy", b"\x93NUMPY\x01\x00")[0] == 0
    many = npy(pixels[:1]).replace(b"(1, 8, 8, 3)", b"(99999999999, 8, 8, 3)"[:22])
    assert error("i.npy", many)[0] == 0  # and takes no memory for them
    spoiled = bytearray(npz(images=pixels))
    spoiled[2000] ^= 255
    assert "CRC" in error("j.npz", bytes(spoiled))[1]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", "no array")
    assert error("k.npz", file.getvalue())[0] == 0


def test_csv_keeps_names_and_disarms_formulas(saved, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    good = (folder / "00.png").read_bytes()
    for path in folder.iterdir():
        path.unlink()
    names = [b"=cmd.png", b'a,"b\n.png', b"\xff.png"]
    for name in names:
        with open(name, "wb") as file:
            file.write(good)
    (folder / "-x.png").write_text("no picture")
    output = tmp_path / "rows.csv"
    model = saved["classes"][1]
    paths = ["--", "-x.png", *map(os.fsdecode, names)]
    assert run(f"--model={model}", f"--output={output}", *paths) == 3
    with open(output, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "path", "label", "probability", "label2", "probability2", "label3",
        "probability3", "error",
    ]  # fmt: skip
    assert [os.fsencode(row["path"]) for row in rows] == [
        b"./-x.png", b"./=cmd.png", *names[1:],
    ]  # fmt: skip
    assert rows[0]["label"] == "" and "not an image" in rows[0]["error"]
    assert {rows[1][f"label{n}"] for n in ("", 2, 3)} == {"cat", "dog", "'=1+1"}
    total = sum(float(rows[1][f"probability{n}"]) for n in ("", 2, 3))
    assert total == pytest.approx(1, abs=1e-5)


def test_lines_are_one_for_a_row_whatever_a_name_holds():
    shown = predict_output.shown
    assert shown("naïve 猫.png") == "naïve 猫.png"
    assert shown("a\tb\n\x1b[31m\udcff") == "a\\tb\\n\\x1b[31m\\udcff"
    assert shown("a\n\udcff", to_terminal=False) == "a\\n\udcff"


def test_records_are_read_only_as_far_ahead_as_the_network_needs():
    pulled = itertools.count()
    last = 0

    def endless():
        nonlocal last
        while True:
            last = next(pulled)
            yield inputs.Record(
                str(last), np.full((SIZE, SIZE, 3), last % 256, np.uint8)
            )

    def network(batch):
        return batch.astype(np.float32).mean((1, 2, 3))

    times = stream.Times()
    size = stream.batch_size(WANTED.shape, "cpu")
    batches = stream.predict(endless(), WANTED, network, "cpu", times)
    with contextlib.closing(batches):
        for number, (records, answers) in enumerate(itertools.islice(batches, 12)):
            paths = [str(number * size + i) for i in range(size)]
            assert [record.path for record in records] == paths
            np.testing.assert_array_equal(answers, [int(p) % 256 for p in paths])
            ahead = last - int(paths[-1])
            assert ahead <= max(stream.MANY, 12 * size)
    assert 0 < times.network <= times.total


def test_batches_are_small_for_large_inputs_and_never_padded_for_a_few():
    assert stream.batch_size((32, 32, 3), "cpu") == 500
    assert stream.batch_size((512, 512, 3), "cpu") == 8
    assert stream.batch_size((32, 32, 3), "gpu") == 4000
    shapes = []
    records = (inputs.Record("x", np.zeros((4, 4, 1), np.uint8)) for _ in range(3))
    wanted = Wanted((4, 4, 1), "uint8", Resize())
    network = lambda x: shapes.append(x.shape) or np.zeros(len(x))  # noqa: E731
    list(stream.predict(records, wanted, network, "cpu", stream.Times()))
    assert set(shapes) == {(3, 4, 4, 1)}


def test_a_decoding_process_that_dies_is_said():
    process = decoders.Process(WANTED)
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(ConvnetError, match="died .status -9. on one of 2 files from a"):
        process(["a", "b"])
    process.close()


def test_squares_only_are_resized(folder):
    wanted = Wanted((4, 6, 3), "uint8", Resize())
    with pytest.raises(ConvnetError, match="is 8x8 pixels; the model takes 6x4"):
        decoders.pixels(str(folder / "00.png"), wanted)


def app(*arguments, **options):
    command = [sys.executable, "-m", "convnet.predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, **options)


def test_the_app_prints_the_answer_and_the_status_says_what_was_read(
    saved, folder, pixels
):
    bundle, model = saved["binary"]
    bad = folder / "bad.png"
    bad.write_bytes(b"")
    # A list that names a file that has vanished; flags after the paths.
    listed = b"%b\nvanished.png\n" % bytes(folder / "01.png")
    done = app(folder / "00.png", bad, "-", f"--model={model}", input=listed)
    assert done.returncode == 3, done.stderr
    chances = expit(logits(bundle, pixels)[:2, 0])
    for line, chance in zip(done.stdout.decode().splitlines(), chances, strict=True):
        label, p = ("cat", chance) if chance > 0.5 else ("non-cat", 1 - chance)
        assert line.split("\t")[1] == f"{label} {p:.2f}"
    said = done.stderr.decode()
    assert f"cannot read {bad}: the file is empty" in said
    assert "cannot read vanished.png: No such file" in said
    assert "2 read, 2 could not be read" in said
    assert "images/s end to end" in said
    assert "Warning" not in said
    assert "Traceback" not in said


def test_the_app_refuses_a_path_that_is_not_there_and_obeys_ctrl_c(saved, tmp_path):
    done = app("--model=none", tmp_path / "absent.png")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"absent.png: no such file" in done.stderr
    # In the middle of a list that does not end.
    command = [sys.executable, "-m", "convnet.predict", f"--model={saved['binary'][1]}"]
    said = tmp_path / "said"
    with said.open("w") as errors:
        process = subprocess.Popen(
            [*command, "-"], stdin=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        process.stdin.write("absent.png\n" * 10_000)
        process.stdin.flush()
        until = time.monotonic() + 120
        while not said.stat().st_size and time.monotonic() < until:
            time.sleep(0.1)
        assert said.stat().st_size
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
    finally:
        process.kill()
        process.stdin.close()
        process.wait()
    lines = said.read_text().splitlines()
    assert (status, lines[-1]) == (130, "interrupted by SIGINT"), lines
    assert lines[0] == "cannot read absent.png: No such file or directory"
