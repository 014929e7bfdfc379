"""The app: its page and files, what it refuses, and inputs of every kind."""

import base64
import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from report_page import Page
from scipy.special import softmax

from convnet import bundle as bundle_lib
from convnet import cli, explain, models
from convnet.errors import ConvnetError, UsageError
from convnet.explaining import contents, study, texts

CLASSES = ("cat", "<b>dog</b>", "bird")
SIZE = 16


def make_bundle(options, shape, dtype, classes, outputs, variables=None, positive=None):
    model = models.create("cnn", num_outputs=outputs, **options)
    if variables is None:
        variables = model.init(jax.random.key(1), jnp.zeros((1, *shape)))
    task = "binary" if positive is not None else "classification"
    return bundle_lib.Bundle(
        architecture={"name": "cnn", "num_outputs": outputs, "options": options},
        task={"name": task if classes else "regression", "positive": positive},
        classes=classes,
        preprocessing={
            "input_shape": shape,
            "input_dtype": dtype,
            "resize": "crop",
            "mean": (0.5,) if dtype == "uint8" else (0.0,),
            "std": (0.25,) if dtype == "uint8" else (1.0,),
        },
        provenance={},
        variables=variables,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    options = {"widths": (4, 4), "depth": 1, "gather": "flatten"}
    bundle = make_bundle(options, (SIZE, SIZE, 3), "uint8", CLASSES, 3)
    bundle_lib.save(path, bundle)
    return bundle, path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "train" / "some"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(7):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in range(7)]


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    # What an app does to its process is not for the one that the tests share.
    monkeypatch.setattr(explain.mesh, "start", lambda cache: None)


def run(*arguments):
    rest = []
    values = cli.parse(["explain", *map(str, arguments)], explain.define, "", rest)
    return explain.main(values, rest)


def read(folder):
    page = Page((folder / "explain.html").read_text("utf-8"))
    return page, json.loads((folder / "explain.json").read_text())


def test_a_page_of_everything_for_good_and_broken_pictures(model, pictures, tmp_path):
    bundle, path = model
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    output = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "convnet.explain", f"--model={path}"),
            *(str(pictures[0]), str(broken), str(pictures[1])),
            *(f"--output={output}", f"--train={tmp_path / 'train'}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stderr
    assert f"cannot read {broken}: " in done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout == f"page: {output / 'explain.html'}\n"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    page, data = read(output)
    # Self-contained: nothing is loaded, nothing runs, whatever a class is called.
    text = (output / "explain.html").read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "<script" not in text and "<b>dog" not in text
    first, error, second = (
        data["inputs"][0],
        data["inputs"][2],
        data["inputs"][1],
    )
    assert error == {"path": str(broken), "error": error["error"]}
    assert error["error"] in text
    # The answers are the network's.
    for row, picture in ((first, pictures[0]), (second, pictures[1])):
        assert row["path"] == str(picture)
        pixels = np.asarray(Image.open(picture), np.float32)[None]
        logits = bundle.model().apply(bundle.variables, (pixels / 255 - 0.5) / 0.25)
        want = softmax(np.asarray(logits)[0])
        assert dict(row["top"]) == pytest.approx(
            dict(zip(CLASSES, want.tolist(), strict=True)), rel=1e-3
        )
        assert row["explained"] == row["top"][0][0] == CLASSES[want.argmax()]
        assert row["integrated_gradients"]["completeness_error"] < 0.01
    # Every drawing is a PNG, and every picture of the page one of them.
    files = sorted(p.relative_to(output).as_posix() for p in output.rglob("*.png"))
    folder = first["folder"]
    assert {f"{folder}/{method}.png" for method in study.METHODS} <= set(files)
    for name in (
        "filters.png",
        f"{folder}/input.png",
        f"{folder}/base-block1-relu1.png",
        f"{folder}/nearest-6.png",
        "receptive_field/base-block2-pool.png",
        "optimized-head-logits/2.png",
    ):
        assert name in files, name
    uris = [attributes["src"] for attributes, _ in page.find("img")]
    assert len(uris) == len(files)
    for uri in uris:
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
        assert image.format == "WEBP" and min(image.size) >= 4
    drawn = np.asarray(Image.open(output / folder / "input.png"))
    times = len(drawn) // SIZE
    np.testing.assert_array_equal(
        drawn[::times, ::times], np.asarray(Image.open(pictures[0]))
    )
    # The picture itself lies in the training folder: nothing is nearer.
    assert "some/0.png" in text and "similarity 1.000" in text
    assert set(data["seconds"]) == {"answers", *texts.METHODS}
    # A convolution sees 3, the pool behind it 4, and the next one 2 more either side.
    assert data["receptive_fields"]["base/block2/conv1"] == "8×8"


def test_a_class_and_a_layer_are_chosen_and_a_page_is_replaced(
    model, pictures, tmp_path, capsys
):
    _, path = model
    output = tmp_path / "out"
    command = (f"--model={path}", pictures[0], f"--output={output}")
    chosen = ("--methods=grad_cam,feature_maps", "--layer=block1/relu1")
    assert run(*command, "--class=bird", *chosen) == 0
    page, data = read(output)
    assert data["layer"] == "base/block1/relu1"
    assert data["inputs"][0]["explained"] == "bird"
    assert set(data["seconds"]) == {"answers", "grad_cam", "feature_maps"}
    old = {p.name for p in output.rglob("*.png")}
    assert run(*command, "--methods=occlusion") == 0  # the old page goes
    assert "occlusion.png" in {p.name for p in output.rglob("*.png")}
    assert "grad_cam.png" in old - {p.name for p in output.rglob("*.png")}


def test_what_is_there_stays_when_a_run_fails(model, pictures, tmp_path, monkeypatch):
    _, path = model
    output = tmp_path / "out"
    command = (f"--model={path}", pictures[0], f"--output={output}")
    run(*command, "--methods=filters")
    before = (output / "explain.html").read_bytes()

    def full(*about):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(contents.sections, "filters", full)
    with pytest.raises(ConvnetError, match="cannot be written: No space left"):
        run(*command, "--methods=filters")
    monkeypatch.setattr(
        contents.sections, "filters", lambda *about: (_ for _ in ()).throw(SystemExit)
    )
    with pytest.raises(SystemExit):
        run(*command, "--methods=filters")
    assert (output / "explain.html").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "train"}


def test_wrong_usage_is_refused_with_the_nearest_name(model, pictures, tmp_path):
    _, path = model
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    m, o = f"--model={path}", f"--output={tmp_path / 'out'}"
    for arguments, message in {
        (o, pictures[0]): "--model is missing",
        (m, pictures[0]): "--output is missing",
        (m, o): "no PATH",
        (m, o, tmp_path / "no.png"): "no such file",
        (m, o, full): "no input in there",
        (m, f"--output={full}", pictures[0]): "holds other things",
        (m, f"--output={full / 'a' / 'b'}", pictures[0]): "no folder",
        (m, o, pictures[0], "--class=caat"): "did you mean 'cat'",
        (m, o, pictures[0], "--at=1"): "use --class",
        (m, o, pictures[0], "--layer=relu3"): "nearest are base/block",
        (m, o, pictures[0], "--methods=gradcam"): "nearest are grad_cam",
        (m, o, pictures[0], "--train=no"): "no such file",
        (m, o, pictures[0], "--train=experiments/x.py"): "no such file",
        (m, o, *pictures * 4): "more than 24 inputs",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            run(*arguments)
    assert not (tmp_path / "out").exists()


def test_of_a_series_the_part_that_decides_is_found(tmp_path, capsys):
    shape = (40, 1)
    options = {
        "widths": (2,), "depth": 1, "kernel": 3, "pool": "none", "gather": "flatten",
    }  # fmt: skip
    model = models.create("cnn", num_outputs=1, **options)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
    head = np.zeros((40, 2, 1), np.float32)
    head[20:25] = 1  # what lies elsewhere has no part in the answer
    params = variables["params"]
    logits = {"kernel": head.reshape(80, 1), "bias": np.zeros(1, np.float32)}
    params = {**params, "head": {"logits": logits}}
    bundle = make_bundle(
        options, shape, "float32", ("up", "down"), 1, {"params": params}, positive=1
    )
    bundle_lib.save(tmp_path / "m.safetensors", bundle)
    series = np.random.default_rng(0).standard_normal((2, 40, 1)).astype(np.float32)
    np.save(tmp_path / "series.npy", series)
    output = tmp_path / "out"
    run(f"--model={tmp_path / 'm.safetensors'}", tmp_path / "series.npy",
        f"--output={output}", "--class=up",
        "--methods=integrated_gradients,occlusion,grad_cam,feature_maps,filters,"
        "receptive_field")  # fmt: skip
    _, data = read(output)
    assert [row["path"][-2:] for row in data["inputs"]] == ["#0", "#1"]
    assert {row["explained"] for row in data["inputs"]} == {"up"}
    assert data["receptive_fields"] == {
        "base/block1/conv1": "3",
        "base/block1/relu1": "3",
    }
    network, answers, x = studied(bundle, series)
    targets = [answers.target(answers.named("down"))] * 2
    found = study.Study(network, answers, x, "base/block1/relu1")
    for method in ("integrated_gradients", "smooth_grad", "guided_backprop"):
        heat = np.abs(found.run(method, targets).heat)
        assert (heat[:, 19:26].max(1) > 0).all(), method
        assert heat[:, :19].max() == heat[:, 26:].max() == 0, method
    # Towards the other class, the score has the other sign.
    up, down = (
        found.run("integrated_gradients", [answers.target((i,))] * 2).heat
        for i in (0, 1)
    )
    np.testing.assert_allclose(up, -down, atol=1e-6)


def studied(bundle, stored):
    from convnet.explaining.answers import Answers
    from convnet.explaining.network import Network

    network = Network(bundle)
    return network, Answers(bundle, network.outputs), network.normalize(stored)


def test_of_a_forecast_the_past_places_that_matter_are_found(tmp_path):
    shape = (3, 12, 16, 1)
    options = {
        "widths": (3, 3), "depth": 1, "pool": "none", "padding": "CIRCULAR",
        "gather": "time",
    }  # fmt: skip
    bundle = make_bundle(options, shape, "float32", (), 1)
    bundle_lib.save(tmp_path / "m.safetensors", bundle)
    maps = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    np.savez(tmp_path / "maps.npz", inputs=maps)
    output = tmp_path / "out"
    run(f"--model={tmp_path / 'm.safetensors'}", tmp_path / "maps.npz",
        f"--output={output}", "--at=0,9",
        "--methods=integrated_gradients,feature_maps,receptive_field")  # fmt: skip
    _, data = read(output)
    (row,) = data["inputs"]
    assert row["explained"] == "place 0, 9"
    network, answers, x = studied(bundle, maps)
    forecast = bundle.model().apply(bundle.variables, maps)[0, 0, 9, 0]
    assert row["prediction"] == pytest.approx(float(forecast), rel=1e-4)
    assert (output / row["folder"] / "forecast.png").is_file()
    with pytest.raises(UsageError, match="want an output of 12x16x1"):
        answers.placed("12,3")
    with pytest.raises(UsageError, match="knows no classes"):
        answers.named("cat")
    found = study.Study(network, answers, x, "base/block2/relu1")
    heat = found.run("integrated_gradients", [answers.target((0, 9, 0))]).heat[0]
    # Two 3x3x3 convolutions on a torus see two places to every side.
    near = np.zeros(shape[:-1], bool)
    near[:, [10, 11, 0, 1, 2], 7:12] = True
    assert np.all(heat[~near] == 0) and (heat[near] != 0).mean() > 0.5


def test_what_has_no_finite_answer_is_left_out():
    class Network:
        def normalize(self, stored):
            return stored

        def logits(self, x):
            return np.array([[1.0, 2.0], [np.nan, 0.0], [0.0, -np.inf], [3.0, 4.0]])

    errors = [("old", "broken")]
    names, stored = explain.answered(Network(), list("abcd"), np.arange(4), errors)
    assert names == ["a", "d"] and stored.tolist() == [0, 3]
    assert [name for name, _ in errors] == ["old", "b", "c"]


def test_the_nearest_of_an_experiment_s_data(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 1), np.uint8)
    labels = np.arange(20) % 3
    data = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "data.npz", **data)
    options = {"widths": (4,), "depth": 1, "gather": "flatten"}
    bundle = make_bundle(options, (8, 8, 1), "uint8", ("0", "1", "2"), 3)
    bundle_lib.save(tmp_path / "m.safetensors", bundle)
    Image.fromarray(images[4, ..., 0]).save(tmp_path / "x.png")
    output = tmp_path / "out"
    command = (
        f"--model={tmp_path / 'm.safetensors'}", tmp_path / "x.png",
        f"--output={output}", "--methods=nearest",
        "--config=experiments/digits.py", "--config.data.name=arrays",
        f"--config.data.dir={tmp_path / 'data.npz'}",
    )  # fmt: skip
    assert run(*command) == 0
    page, _ = read(output)
    cards = [text for attributes, text in page.find("figure") if "similarity" in text]
    assert len(cards) == 6 and re.fullmatch(r"1\s+similarity 1.000", cards[0])
    nearest = np.asarray(Image.open(next(output.glob("*/nearest-1.png"))))
    np.testing.assert_array_equal(nearest[::28, ::28, 0], images[4, ..., 0])
    with pytest.raises(UsageError, match="--train and --config"):
        run(*command, f"--train={tmp_path}")
