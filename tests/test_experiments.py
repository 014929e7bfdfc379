"""Every shipped experiment, shrunk, end to end; small problems that it must learn."""

import ast
import importlib
import importlib.util
import io
import json
import math
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from convnet import bundle, cli, main, models, resolve, train
from convnet import config as config_lib
from convnet.errors import ConvnetError

EXPERIMENTS = sorted((Path(main.__file__).parent.parent / "experiments").glob("*.py"))
TRAIN, TEST = 40, 16  # examples, of each dataset below
STEPS, BATCH = 3, 8
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
_CONNECTOR = "tensorflow_datasets.core.features."

# What each experiment reads: folder of the data, if it needs one, and its classes.
DATA = {
    "cat_vs_noncat": ("cat_vs_noncat", ("cat", "non-cat")),
    "cats_vs_dogs": ("cats_and_dogs", ("cats", "dogs")),
    "cifar10": ("tfds", tuple(f"class{i}" for i in range(10))),
    "cifar100": ("tfds", tuple(f"class{i}" for i in range(100))),
    "cifar10_cnn": ("tfds", tuple(f"class{i}" for i in range(10))),
    "cifar10_speed": ("tfds", tuple(f"class{i}" for i in range(10))),
    "cifar10_vgg16": ("tfds", tuple(f"class{i}" for i in range(10))),
    "digits": (None, tuple("0123456789")),
    "folder": ("flowers", ("daisy", "rose", "tulip")),
    "imagenet_resnet50": ("tfds", tuple(f"class{i}" for i in range(5))),
    "style_transfer": ("cats_and_dogs", ()),
    "timeseries": (None, ("cylinder", "bell", "funnel")),
    "transfer_cat_vs_noncat": ("cat_vs_noncat", ("cat", "non-cat")),
    "transfer_cats_vs_dogs": ("cats_and_dogs", ("cats", "dogs")),
    "transfer_folder": ("flowers", ("daisy", "rose", "tulip")),
    "weather": (None, ()),
}


def get_config(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def encoded(rng, shape, kind):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, kind)
    return file.getvalue()


def write_prepared(folder, classes, splits, kind, shapes, dimensions):
    """A dataset of random pictures as TFDS would prepare it, one shard a split."""
    rng = np.random.default_rng(0)
    name = folder.parent.name
    folder.mkdir(parents=True)
    infos = []
    for split, count in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for i in range(count):
            record = tf_example_pb2.Example()
            feature = record.features.feature
            image = encoded(rng, shapes[i % len(shapes)], kind)
            feature["image"].bytes_list.value.append(image)
            feature["label"].int64_list.value.append(i % classes)
            writer.write(record.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append(
            {
                "filepathTemplate": template,
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(count)],
            }
        )
    info = {"fileFormat": "array_record", "name": name, "version": folder.name}
    (folder / "dataset_info.json").write_text(json.dumps({**info, "splits": infos}))
    features = {
        "image": {
            "pythonClassName": _CONNECTOR + "image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": dimensions}},
        },
        "label": {
            "pythonClassName": _CONNECTOR + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(classes)},
        },
    }
    top = {"pythonClassName": _CONNECTOR + "features_dict.FeaturesDict"}
    top["featuresDict"] = {"features": features}
    (folder / "features.json").write_text(json.dumps(top))
    labels = "".join(f"class{i}\n" for i in range(classes))
    (folder / "label.labels.txt").write_text(labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small random stand-ins for the datasets that have to be brought along."""
    root = tmp_path_factory.mktemp("data")
    splits = {"train": TRAIN, "test": TEST}
    fixed = "PNG", [(32, 32, 3)], ["32", "32", "3"]
    write_prepared(root / "tfds/cifar10/3.0.2", 10, splits, *fixed)
    write_prepared(root / "tfds/cifar100/3.0.2", 100, splits, *fixed)
    sizes = [(40, 64, 3), (90, 50, 3), (33, 32, 3)]
    # Its test split has no labels; TFDS calls the one with labels validation.
    splits = {"train": TRAIN, "validation": TEST}
    open_size = "JPEG", sizes, ["-1", "-1", "3"]
    write_prepared(root / "tfds/imagenet2012/5.1.0", 5, splits, *open_size)
    rng = np.random.default_rng(1)
    for name in ("cat_vs_noncat", "cats_vs_dogs", "folder"):
        folder, classes = DATA[name]
        for split, count in (("train", TRAIN), ("test", TEST)):
            for i in range(count):
                path = root / folder / split / classes[i % len(classes)] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(rng, sizes[i % 3], "JPEG"))
    write_model(root / "model.safetensors")
    return root


def write_model(path):
    """A small model of three other classes, for what starts from a model."""
    options = {"widths": [4, 4], "depth": 1, "norm": "batch"}
    model = models.create("cnn", num_outputs=3, **options)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), "f"))
    bundle.save(
        path,
        bundle.Bundle(
            architecture={"name": "cnn", "num_outputs": 3, "options": options},
            task={"name": "classification", "positive": None},
            classes=("a", "b", "c"),
            preprocessing={
                "input_shape": [32, 32, 3],
                "input_dtype": "uint8",
                "resize": "crop",
                "mean": [0.5],
                "std": [0.25],
            },
            provenance={},
            variables=variables,
        ),
    )


def shrink(config):
    """Narrow layers, small pictures, few examples; the structure stays."""
    config.data.batch_size = BATCH
    config.data.train_limit, config.data.test_limit = TRAIN, TEST
    config.data.image_size = min(config.data.image_size, 32)
    config.data.workers = 0
    config.train.steps, config.train.log_every = STEPS, 1
    config.train.eval_every = 0.0
    config.checkpoint.every_steps, config.checkpoint.keep = 1, STEPS
    if config.init_from:  # a model that is small already
        return config
    options = models.options(config.model.name)
    for name in {"widths", "dense"} & options.keys():
        config.model[name] = (4,) * len(config.model[name] or options[name])
    if "width" in options:
        config.model.width = 4
    return config


def kernels(workdir, step):
    """The kernels of a checkpoint, by name, read with Orbax alone."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore(path)
    pattern = re.compile(r"params/.*kernel")
    return {k: np.asarray(v) for k, v in state.items() if pattern.fullmatch(k)}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """XLA's lowest level: what is tested here is what is wired to what."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def shallow(monkeypatch):
    """Deep networks with fewer layers, for they compile slowly."""
    # By import_module, since convnet.models has a function of the same name.
    stages = importlib.import_module("convnet.models.resnet").STAGES
    depths = importlib.import_module("convnet.models.vgg").DEPTHS
    for name, (_, bottleneck) in stages.items():
        monkeypatch.setitem(stages, name, ((1, 1), bottleneck))
    for name, depth in depths.items():
        monkeypatch.setitem(depths, name, (1,) * len(depth))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_trains(path, data, shallow, tmp_path):
    config = shrink(get_config(path))
    folder, classes = DATA[path.stem]
    if folder:
        config.data.dir = str(data / folder)
    if config.init_from:
        config.init_from = str(data / "model.safetensors")
    if config.task.features:
        config.task.features = str(data / "model.safetensors")
    result = train.run(config, tmp_path / "run", "command")

    assert result["step"] == STEPS
    assert result["epochs"] == pytest.approx(STEPS * BATCH / TRAIN)
    assert result["test/examples"] == TEST
    assert math.isfinite(result["test/loss"])
    named = config.task.name in ("classification", "binary")
    assert ("test/accuracy" in result) == named
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("train/loss") for line in lines]
    assert len(losses) == STEPS + 1 and all(map(math.isfinite, losses[:STEPS]))

    before, after = (kernels(tmp_path / "run", step) for step in (1, STEPS))
    assert len(before) >= 2
    for name, kernel in before.items():
        frozen = config.transfer.freeze == "base" and "/base/" in name
        assert np.array_equal(kernel, after[name]) == frozen, f"{name} does not train"

    with safetensors.safe_open(tmp_path / "run/model.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["convnet"])
    assert about["classes"] == list(classes)
    outputs = {"regression": 1, "binary": 1, "style": 3}
    wanted = outputs.get(config.task.name, len(classes))
    assert about["architecture"]["num_outputs"] == wanted
    page = (tmp_path / "run/report.html").read_text()
    # Of many classes it shows the worst.
    assert sum(name in page for name in classes) >= min(len(classes), 10)


def assigned(path):
    """Keys and values of each `config.KEY = VALUE`."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            key = ast.unparse(node.targets[0]).removeprefix("config.")
            found[key] = ast.literal_eval(node.value)
    return found


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_says_what_differs_from_the_defaults(path):
    found = assigned(path)
    assert len(found) >= 5
    config, start = get_config(path), config_lib.flatten(config_lib.default())
    resolve.validate(config)
    # A name may be repeated: it says which kind the keys below it belong to.
    idle = [k for k, v in found.items() if v == start[k] and not k.endswith(".name")]
    assert not idle, "these are the defaults"
    values = config_lib.flatten(config)
    assert {k: values[k] for k in found} == found
    assert set(config_lib.changed(config)) <= set(found)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_commands_in_the_header_parse(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    text = header.replace("\\\n", " ")
    programs = r"(?:python -m convnet\.main|launch/local\.sh)"
    lines = re.findall(rf"^\s*(?:\$ )?{programs}( .*)$", text, re.MULTILINE)
    assert lines, "no command"
    for line in lines:
        values = cli.parse(["main", *shlex.split(line)], main.define, "")
        assert Path(values["config"].config_filename) == path
        resolve.validate(values.config)


def waves(rng, count):
    """Series (n, 32, 2) of three frequencies at any phase, in noise."""
    labels = np.arange(count) % 3
    time = np.linspace(0, 2 * np.pi, 32)[None, :, None]
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 2))
    series = np.sin(np.array([2, 4, 7])[labels][:, None, None] * time + phase)
    return (series + 0.2 * rng.standard_normal(series.shape)).astype("f"), labels


def stripes(rng, count):
    """Pictures (n, 8, 8, 1), uint8, with stripes across or along."""
    labels = np.arange(count) % 2
    shift = rng.integers(0, 4, (count, 1, 1))
    across = np.broadcast_to((np.arange(8)[:, None] + shift) // 2 % 2, (count, 8, 8))
    along = across.swapaxes(1, 2)
    pictures = np.where(labels[:, None, None] == 0, across, along) * 120
    return (pictures + rng.integers(0, 100, pictures.shape)).astype("u1")[..., None]


def ramps(rng, count):
    """Volumes (n, 4, 4, 4, 1) of noise on a slope, which is the label."""
    slope = rng.standard_normal(count)
    volumes = slope[:, None, None, None] * np.linspace(-1, 1, 4)[:, None, None]
    volumes = volumes + 0.5 * rng.standard_normal((count, 4, 4, 4))
    return volumes[..., None].astype("f"), slope.astype("f")


def learn(folder, arrays, depth=1, **changes):
    np.savez(folder / "data.npz", **arrays)
    config = config_lib.default()
    given = {
        "data.name": "arrays",
        "data.dir": str(folder / "data.npz"),
        "data.batch_size": 32,
        **({"model.depth": depth} if depth else {}),
        "optimizer.name": "adamw",
        "optimizer.lr": 0.02,
        "train.steps": 60,
        "train.eval_every": 0.0,
    }
    config.update_from_flattened_dict(given | changes)
    return train.run(config, folder / "run", "command")


def test_learns_classes_of_series(tmp_path):
    rng = np.random.default_rng(0)
    (x, y), (x_test, y_test) = waves(rng, 240), waves(rng, 90)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    keys = {"model.widths": (8,), "model.kernel": 5, "model.gather": "global"}
    assert learn(tmp_path, arrays, **keys)["test/accuracy"] > 0.9


def test_learns_one_probability(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": stripes(rng, 160), "x_test": stripes(rng, 60)}
    arrays |= {"y_train": np.arange(160) % 2, "y_test": np.arange(60) % 2}
    arrays["classes"] = np.array(["across", "along"])
    keys = {"task.name": "binary", "task.positive": "across", "model.widths": (8,)}
    assert learn(tmp_path, arrays, **keys)["test/accuracy"] > 0.9


def test_learns_a_number_from_volumes(tmp_path):
    rng = np.random.default_rng(0)
    (x, y), (x_test, y_test) = ramps(rng, 240), ramps(rng, 80)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    keys = {"task.name": "regression", "model.widths": (8,)}
    assert learn(tmp_path, arrays, **keys)["test/loss"] < 0.5 * np.var(y_test)


def tiles(rng, count):
    """Pictures (n, 32, 32, 3), uint8: stripes across or along, reddish or bluish."""
    labels = np.arange(count) % 4
    shift = rng.integers(0, 8, (count, 1, 1))
    across = (np.arange(32)[:, None] + shift) // 4 % 2
    across = np.broadcast_to(across, (count, 32, 32))
    pattern = np.where(labels[:, None, None] < 2, across, across.swapaxes(1, 2))
    colour = np.where(labels[:, None] % 2 == 0, (100, 60, 20), (20, 60, 100))
    pictures = 40 + pattern[..., None] * 50 + colour[:, None, None, :]
    return (pictures + rng.integers(0, 60, pictures.shape)).astype("u1"), labels


def test_the_quick_recipe_learns(tmp_path):
    """cifar10_speed.py as it is, on a small network and few pictures."""
    rng = np.random.default_rng(0)
    (x, y), (x_test, y_test) = tiles(rng, 200), tiles(rng, 60)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    (path,) = (path for path in EXPERIMENTS if path.stem == "cifar10_speed")
    changes = config_lib.changed(get_config(path))
    changes |= {
        "data.name": "arrays",
        "data.batch_size": 25,
        "model.widths": (8, 16, 16),
        # As many times the published rates as the batch has pictures.
        "optimizer.head_lr": 0.67 * 25,
        "optimizer.bias_lr": 0.053 * 25,
        "train.epochs": 3.0,
        "train.steps": 0,
    }
    result = learn(tmp_path, arrays, depth=None, **changes)
    assert result["step"] == 24
    assert result["test/accuracy"] > 0.9


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_weights_that_overflow_are_neither_saved_nor_a_result(tmp_path):
    # One step: its loss is finite, and no later one shows what it left behind.
    arrays = {"x_train": np.ones((8, 4, 1), "f"), "x_test": np.ones((8, 4, 1), "f")}
    arrays |= {"y_train": np.arange(8) % 2, "y_test": np.arange(8) % 2}
    keys = {"data.batch_size": 8, "model.widths": (2,), "train.steps": 1}
    with pytest.raises(ConvnetError, match="not finite at step 1; .*checkpoint: none"):
        learn(tmp_path, arrays, **keys, **{"optimizer.lr": 1e39})
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/result.json").exists()
