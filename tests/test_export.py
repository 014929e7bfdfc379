"""Exports: files that predict what the model does, without convnet."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy_layers import draw_variables, numpy_conv, numpy_norm, numpy_pool

from convnet import bundle as bundle_lib
from convnet import cli, export, export_check, models
from convnet.errors import ConvnetError, UsageError

SHAPE = (9, 9, 3)
OPTIONS = {"widths": (4,), "depth": 1, "norm": "batch", "gather": "global"}
CLASSES = ("cat", "dog", "café")


def make(
    name="cnn", options=OPTIONS, classes=CLASSES, positive=None, shape=SHAPE, views=None
):
    """A bundle in which no variable is zero or one."""
    task = "regression" if not classes else "classification"
    task = "binary" if positive is not None else task
    outputs = len(classes) if task == "classification" else 1
    model = models.create(name, num_outputs=outputs, **options)
    inputs = np.zeros((2, *shape), np.float32)
    variables = draw_variables(model, inputs, np.random.default_rng(0))
    return bundle_lib.Bundle(
        architecture={"name": name, "num_outputs": outputs, "options": options},
        task={"name": task, "positive": positive},
        classes=classes,
        preprocessing={
            "input_shape": shape,
            "input_dtype": "uint8" if classes else "float32",
            "resize": "crop",
            "mean": (0.4,),
            "std": (0.25,),
        },
        provenance={"data": "none"},
        variables=variables,
        views=views or "none",
    )


@pytest.fixture(scope="module")
def bundle():
    return make()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (5, *SHAPE), np.uint8)


def by_numpy(bundle, images):
    """The network in float64."""
    base = bundle.variables["params"]["base"]["block1"]
    stats = bundle.variables["batch_stats"]["base"]["block1"]["norm1"]
    head = bundle.variables["params"]["head"]["logits"]
    x = (images / 255.0 - 0.4) / 0.25
    x = numpy_norm(numpy_conv(x, base["conv1"]["kernel"]), base["norm1"], stats)
    x = numpy_pool(np.maximum(x, 0), 2, 2, 0, "max").mean((1, 2))
    logits = x @ np.asarray(head["kernel"], np.float64) + head["bias"]
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def run(*arguments):
    values = cli.parse(["export", *map(str, arguments)], export.define, "")
    return export.main(values)


def as_documented(kind, path, images, folder):
    """Runs the lines that `--help` shows, where there is no convnet."""
    blocks = [b for b in export.__doc__.split("\n\n") if b.startswith("    ")]
    lines = blocks[export.FORMATS.index(kind)].replace("FILE", path.name)
    code = "\n".join(line[4:] for line in lines.splitlines())
    np.save(folder / "images.npy", images)
    code = f"import numpy\nimages = numpy.load('images.npy')\n{code}\n"
    code += "numpy.save('found.npy', probabilities)\nassert about\n"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npy")


def test_stablehlo_from_the_command_line(bundle, images, tmp_path):
    model, output = tmp_path / "m.safetensors", tmp_path / "m.stablehlo"
    bundle_lib.save(model, bundle)
    command = [sys.executable, "-m", "convnet.export", f"--model={model}"]
    command += ["--format=stablehlo", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {output}" in done.stdout
    assert "input: uint8 (b, 9, 9, 3)" in done.stdout
    assert "output: float32 (b, 3), the probability of each class" in done.stdout
    assert "4 cuts of 2 photographs" in done.stdout and "largest diff" in done.stdout
    assert 'zipfile.ZipFile("m.stablehlo")' in done.stdout
    with zipfile.ZipFile(output) as file:
        about = json.loads(file.read("about.json"))
        exported = jax.export.deserialize(bytearray(file.read("function")))
    assert about["classes"] == list(CLASSES)
    assert (
        about["preprocessing"]["mean"] == [0.4] and about["input"]["dtype"] == "uint8"
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    # The file holds no paths of this machine.
    for folder in (Path(export.__file__).parent, sys.prefix):
        assert str(folder).encode() not in exported.mlir_module_serialized
    found = as_documented("stablehlo", output, images, tmp_path)
    np.testing.assert_allclose(found, by_numpy(bundle, images), atol=1e-5)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("cat", "dog"), "positive": 1, "views": "flip_translate"},
        {"classes": (), "shape": (12, 2)},
    ],
    ids=["binary with views", "regression of a series"],
)
def test_other_tasks_as_stablehlo(changes, tmp_path):
    bundle = make(**changes)
    output = tmp_path / "model"
    difference, _ = export.write(bundle, "stablehlo", output)
    assert difference < 1e-5
    inputs, _ = export_check.examples(bundle)
    with zipfile.ZipFile(output) as file:
        exported = jax.export.deserialize(bytearray(file.read("function")))
    wanted = bundle.predict_fn()(inputs)
    np.testing.assert_allclose(exported.call(inputs), wanted, atol=1e-5)
    meaning = export.describe(bundle)["output"]["meaning"]
    wanted = "the probability of 'dog'" if bundle.classes else "what is predicted"
    assert meaning == wanted


def test_examples_are_photographs_in_the_model_s_shape():
    large, small = make(shape=(224, 200, 3)), make(shape=(8, 8, 1))
    for bundle in (large, small):
        inputs, _ = export_check.examples(bundle)
        assert inputs.shape == (7, *bundle.preprocessing["input_shape"])
        assert inputs.dtype == np.uint8
    inputs, _ = export_check.examples(large)
    # Neighbours in a photograph are alike; in noise they differ by 85 in the mean.
    steps = np.abs(np.diff(inputs.astype(int), axis=2)).mean((1, 2, 3))
    assert (steps[:4] < 30).all() and (steps[4:] > 80).all()
    # The cut out of the middle is not scaled.
    from sklearn.datasets import load_sample_image

    middle = load_sample_image("china.jpg")[101:325, 220:420]
    np.testing.assert_array_equal(inputs[1], middle)


def test_a_file_that_predicts_something_else_is_not_left(bundle, tmp_path, monkeypatch):
    output = tmp_path / "model"
    output.write_bytes(b"before")
    other = jax.tree.map(lambda leaf: leaf * 1.01, bundle.variables)
    content = export.stablehlo(
        bundle_lib.Bundle(**{**vars(bundle), "variables": other})
    )
    monkeypatch.setattr(export, "stablehlo", lambda bundle: content)
    with pytest.raises(ConvnetError, match="differs by 0.0.*1e-05 is allowed"):
        export.write(bundle, "stablehlo", output)
    assert output.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_cannot_be_loaded_is_not_left(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "stablehlo", lambda bundle: b"no zip")
    with pytest.raises(ConvnetError, match="cannot run this stablehlo.*zip"):
        export.write(bundle, "stablehlo", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "--model is missing"),
        ({"format": None}, "--format is missing"),
        ({"format": "tflite"}, "stablehlo|onnx"),
        ({"output": None}, "--output is missing"),
        ({"output": "absent/m"}, "--output=absent/m: want a file in a folder"),
        ({"model": "cifra10"}, "did you mean 'cifar10'"),
    ],
)
def test_wrong_flags_are_refused_by_name(changed, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": "cifar10", "format": "stablehlo", "output": "m"} | changed
    with pytest.raises(UsageError) as error:
        run(*(f"--{k}={v}" for k, v in given.items() if v is not None))
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_with_its_command(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ConvnetError, match=r"jax2onnx.*pip install 'convnet\[onnx\]'"):
        export.write(bundle, "onnx", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class TestOnnx:
    """Where the packages of the extra are installed."""

    @pytest.fixture(autouse=True)
    def extra(self):
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")

    def test_it_predicts_and_knows_its_labels(self, bundle, images, tmp_path):
        import onnx

        export.write(bundle, "onnx", tmp_path / "m.onnx")
        model = onnx.load(tmp_path / "m.onnx")
        onnx.checker.check_model(model, full_check=True)
        # Batch norm is folded into what ONNX Runtime makes a part of the convolution.
        kinds = {node.op_type for node in model.graph.node}
        assert "Sqrt" not in kinds and "Relu" in kinds
        held = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        assert held["classes"] == list(CLASSES)
        sides = [model.graph.input[0], model.graph.output[0]]
        shapes = [
            [d.dim_param or d.dim_value for d in side.type.tensor_type.shape.dim]
            for side in sides
        ]
        assert shapes == [["b", *SHAPE], ["b", 3]]
        found = as_documented("onnx", tmp_path / "m.onnx", images, tmp_path)
        np.testing.assert_allclose(found, by_numpy(bundle, images), atol=1e-5)

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "resnet18", "options": {"width": 4, "stem": "imagenet"}},
            {
                "name": "speednet",
                "options": {},
                "classes": ("cat", "dog"),
                "positive": 0,
                "views": "flip",
            },
            {"name": "vgg11_bn", "options": {"dense": (8,)}},
            {"classes": (), "shape": (12, 2)},
        ],
        ids=["padded pool", "binary with views", "flatten", "series"],
    )
    def test_networks_and_tasks(self, changes, tmp_path):
        changes = {"shape": (32, 32, 3)} | changes
        difference, _ = export.write(make(**changes), "onnx", tmp_path / "m.onnx")
        assert difference < 1e-5

    @pytest.mark.parametrize("how", ["max", "average"])
    def test_pools_with_stride_and_padding(self, how):
        import jax2onnx
        import onnxruntime

        from convnet import export_onnx
        from convnet.models import lowering, pooling

        pool = pooling.POOLS[how]
        wanted = jax.ShapeDtypeStruct(("b", 7, 6, 2), np.float32)
        with export_onnx._quiet(), export_onnx._pools(), lowering.plain():
            model = jax2onnx.to_onnx(lambda x: pool(x, 3, 2, 1), [wanted])
        x = np.random.default_rng(0).normal(size=(3, 7, 6, 2)).astype(np.float32)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        found = session.run(None, {session.get_inputs()[0].name: x})[0]
        np.testing.assert_allclose(found, numpy_pool(x, 3, 2, 1, how), atol=1e-6)

    def test_what_cannot_be_converted_is_said(self, bundle, tmp_path, monkeypatch):
        import jax2onnx

        def fail(*args, **options):
            raise NotImplementedError("no plugin for cbrt")

        monkeypatch.setattr(jax2onnx, "to_onnx", fail)
        with pytest.raises(ConvnetError, match="cannot convert cnn.*no plugin for"):
            export.write(bundle, "onnx", tmp_path / "m.onnx")
        assert list(tmp_path.iterdir()) == []
