"""The convert app: other people's weights become a model file."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hub_server import Hub
from safetensors.numpy import load_file, save_file
from test_convnetjs import write

from convnet import bundle as bundle_lib
from convnet import cli, convert, models
from convnet.data.resize import Resize
from convnet.errors import ConvnetError, UsageError
from convnet.weights import comparing, match, preprocessing, torch


@pytest.fixture
def snapshot(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write(folder, {"layer1_conv": (3, 3, 1, 4), "layer4_fc": (36, 3)})
    return folder


def run(*arguments):
    values = cli.parse(["convert", *map(str, arguments)], convert.define, "")
    return convert.main(values)


def test_the_app_writes_a_model_file_and_says_what_is_in_it(snapshot, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\nthrée\n", "utf-8")
    output = tmp_path / "m.safetensors"
    command = [sys.executable, "-m", "convnet.convert", "--from=convnetjs"]
    command += [f"--weights={snapshot}", f"--output={output}", f"--labels={labels}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "base/block1/conv1 6x6x4 40" in table
    assert "total 151" in table
    for said in (
        "one, two, thrée",
        "probe: 6 logits",
        f"wrote {output}",
    ):
        assert said in done.stdout
    loaded = bundle_lib.load(output)
    assert loaded.classes == ("one", "two", "thrée")
    assert len(loaded.provenance["files/sha256"]["layer1_conv.txt"]) == 64
    assert np.asarray(loaded.variables["params"]["head"]["logits"]["kernel"]).shape == (
        36,
        3,
    )


def test_default_labels_are_said_to_be_the_default(shared_data, tmp_path, capsys):
    output = tmp_path / "m.safetensors"
    folder = shared_data / "convnetjs_cifar10" / "snapshot"
    run("--from=convnetjs", "--weights", folder, "--output", output)
    said = capsys.readouterr().out
    assert "labels (not given; so named by default): airplane, automobile" in said
    assert bundle_lib.load(output).classes[-1] == "truck"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"from": "caffe"}, "convnetjs"),
        ({"from": None}, "--from is missing"),
        ({"weights": "absent"}, "--weights=absent: no such folder"),
        ({"output": "absent/m.safetensors"}, "--output=absent/m.safetensors: want"),
        ({"labels": "absent.txt"}, "--labels=absent.txt: no such file"),
    ],
)
def test_wrong_flags_are_refused_by_name(snapshot, tmp_path, changed, message):
    given = {"from": "convnetjs", "weights": snapshot, "output": tmp_path / "m"}
    given = {k: v for k, v in (given | changed).items() if v is not None}
    with pytest.raises(UsageError, match=message):
        run(*(f"--{name}={value}" for name, value in given.items()))
    assert not (tmp_path / "m").exists()


def test_a_malformed_snapshot_leaves_no_file(snapshot, tmp_path):
    (snapshot / "layer4_fc.txt").unlink()
    with pytest.raises(ConvnetError, match="layerN_fc.txt, the last layer, is missing"):
        run("--from=convnetjs", "--weights", snapshot, "--output", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Weights by PyTorch's names: VGG-11 and SqueezeNet with few features.

SMALL = {
    "vgg11": {"width": 1, "dense": (4, 4)},
    "squeezenet1_1": {"width": 8},
}


def state_dict(arch, outputs, source="torchvision"):
    """Random tensors by the names of torchvision or timm."""
    options = models.options(arch) | SMALL[arch]
    architecture = {"name": arch, "num_outputs": outputs, "options": options}
    template = match.template(architecture, (224, 224, 3))
    rng = np.random.default_rng(0)
    return {
        rule.source: rng.normal(0, 0.3, rule.stored_shape(template[ours])).astype("f4")
        for ours, rule in torch.rules(arch, source, template).items()
    }


@pytest.fixture
def vgg(tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file(state_dict("vgg11", 3), path)
    return path


@pytest.fixture
def alone(monkeypatch):
    """No framework to compare with, whatever is installed."""
    monkeypatch.setattr(comparing, "compare", lambda *_: {"with": None, "why": "alone"})


CONFIG = {
    "architecture": "vgg11",
    "num_classes": 3,
    "label_names": ["ant", "bee", "cat"],
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "squash",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
    },
}


def test_a_model_of_the_hub_becomes_a_model_file(tmp_path):
    """As a person runs it: the hub is at HF_ENDPOINT, the cache under HF_HOME."""
    tensors = state_dict("vgg11", 3, "timm")
    served = Hub()
    files = {"model.safetensors": safetensors.numpy.save(tensors)}
    commit = served.add(
        "timm/vgg11.toy", files | {"config.json": json.dumps(CONFIG).encode()}
    )
    output = tmp_path / "m.safetensors"
    command = [sys.executable, "-m", "convnet.convert", "--from=timm"]
    command += ["--weights=hf://timm/vgg11.toy", f"--output={output}", "--accounting"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    served.close()
    assert (done.returncode, done.stderr) == (0, "")
    for said in (
        "params/base/block1/conv1/kernel  features.0.weight",
        "22 of 22 variables are from the file",
        "labels (config.json): ant, bee, cat",
        "pictures: squash to 248, the central 224 pixels, bicubic",
    ):
        assert said in done.stdout
    loaded = bundle_lib.load(output)
    kernel = loaded.variables["params"]["base"]["block1"]["conv1"]["kernel"]
    np.testing.assert_array_equal(
        kernel, tensors["features.0.weight"].transpose(2, 3, 1, 0)
    )
    about = loaded.preprocessing
    assert (about["mean"], about["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert Resize.of(about) == Resize("squash", 0.9, "bicubic")
    origin = loaded.provenance
    assert (origin["repository"], origin["revision"]) == ("timm/vgg11.toy", commit)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert (origin["file/sha256"], origin["source"]) == (digest, "timm")
    assert "--weights=hf://timm/vgg11.toy" in origin["command"]
    assert "with" in origin["compared"]


def test_labels_and_preprocessing_of_imagenet_by_default(tmp_path, capsys, alone):
    path, output = tmp_path / "s.safetensors", tmp_path / "m.safetensors"
    save_file(state_dict("squeezenet1_1", 1000), path)
    run("--from=torchvision", f"--weights={path}", f"--output={output}")
    said = capsys.readouterr().out
    assert "labels (ImageNet's, for 1,000 outputs): tench, goldfish" in said
    assert "pictures: crop to 256, the central 224 pixels, bilinear" in said
    assert "not compared with the original framework: alone" in said
    loaded = bundle_lib.load(output)
    assert loaded.classes[281] == "tabby" and loaded.classes[999] == "toilet tissue"
    assert loaded.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert loaded.provenance["compared"] == {"with": None, "why": "alone"}


def test_flags_say_what_the_file_does_not(tmp_path, alone):
    path, output = tmp_path / "s.safetensors", tmp_path / "m.safetensors"
    save_file(state_dict("squeezenet1_1", 2), path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    run(
        *("--from=torchvision", f"--weights={path}", f"--output={output}"),
        *(f"--labels={tmp_path / 'labels.txt'}", "--image_size=96", "--std=0.25"),
        *("--crop_fraction=0.75", "--interpolation=bicubic", "--mean=0.1,0.2,0.3"),
    )
    loaded = bundle_lib.load(output)
    assert loaded.classes == ("cat", "dog")
    about = loaded.preprocessing
    assert about["input_shape"] == [96, 96, 3]
    assert Resize.of(about) == Resize("crop", 0.75, "bicubic")
    assert (about["mean"], about["std"]) == ([0.1, 0.2, 0.3], [0.25])


def test_what_does_not_fit_is_listed_and_nothing_is_written(vgg, tmp_path, alone):
    output = tmp_path / "m.safetensors"
    tensors = load_file(vgg)
    tensors["conv2.bias"] = tensors.pop("features.3.bias")
    save_file(tensors, vgg)
    given = ("--from=torchvision", f"--weights={vgg}", f"--output={output}")
    with pytest.raises(ConvnetError) as error:
        run(*given)
    assert re.search(r"features.3.bias *\| conv2.bias", str(error.value))
    assert not output.exists()
    run(*given, "--allow_missing", "--allow_unexpected")
    assert bundle_lib.load(output).provenance["compared"]["with"] is None


@pytest.mark.parametrize("difference, good", [(1e-4, True), (2e-3, False)])
def test_logits_of_another_framework_must_agree(
    vgg, tmp_path, monkeypatch, capsys, difference, good
):
    def reference(bundle, path):
        logits = bundle.probe()
        return "toy 1.0", logits + difference * np.abs(logits).max()

    monkeypatch.setattr(comparing, "_torchvision", reference)
    output = tmp_path / "m.safetensors"
    given = ("--from=torchvision", f"--weights={vgg}", f"--output={output}")
    if good:
        run(*given)
        assert "compared with toy 1.0: the logits differ by 0.0001" in (
            capsys.readouterr().out
        )
        compared = bundle_lib.load(output).provenance["compared"]
        assert compared["with"] == "toy 1.0"
        assert compared["relative"] == pytest.approx(difference, rel=0.01)
    else:
        with pytest.raises(
            ConvnetError, match="not those of toy 1.0: they differ by 0.0"
        ):
            run(*given)
        assert not output.exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--labels={}/two.txt"], "2 labels for the 3 outputs"),
        (["--image_size=96"], "--image_size=96: the first dense layer is for .* 224"),
        (["--mean=red"], "--mean=red: want numbers"),
        (["--crop_fraction=2"], "crop_fraction"),
        (["--arch=alexnet"], "--arch=alexnet: want one of"),
        (["--from=keras", "--weights=hf://a/b"], "a model of timm's, not keras's"),
        (["--from=keras", "--weights={}"], "is a folder; want a file"),
        (["--from=keras", "--weights=x.h5"], "--weights=x.h5: no such file"),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(vgg, tmp_path, alone, more, message):
    (tmp_path / "two.txt").write_text("a\nb\n")
    given = ["--from=torchvision", f"--weights={vgg}", f"--output={tmp_path / 'm'}"]
    with pytest.raises(UsageError, match=message):
        run(*given, *(flag.format(tmp_path) for flag in more))
    assert not (tmp_path / "m").exists()


# The preprocessing of public weights.


def imported(source, arch, side=224, channels=3):
    architecture = {"name": arch, "num_outputs": 1000, "options": {}}
    return match.Imported({}, architecture, (side, side, channels), source, ())


@pytest.mark.parametrize(
    "source, arch, side, whole, interpolation, mean",
    [
        ("torchvision", "resnet50", 224, 256, "bilinear", 0.485),
        ("torchvision", "convnext_tiny", 224, 236, "bilinear", 0.485),
        ("torchvision", "inception_v3", 299, 342, "bilinear", 0.5),
        ("timm", "vgg16", 224, 256, "bilinear", 0.485),
        ("timm", "resnet50", 224, 256, "bicubic", 0.485),
        ("keras", "vgg16", 224, 256, "bilinear", 123.68 / 255),
        ("keras", "mobilenet_v2", 224, 256, "bilinear", 0.5),
        ("keras", "convnext_tiny", 224, 256, "bicubic", 0.485),
    ],
)
def test_published_preprocessing(source, arch, side, whole, interpolation, mean):
    about = preprocessing.published(imported(source, arch, side), "")
    resize = Resize.of(about)
    assert (resize.rule, resize.whole(side)) == ("crop", whole)
    assert (resize.interpolation, about["mean"][0]) == (interpolation, mean)


def test_the_second_generation_of_torchvision_is_known_by_its_hash():
    found = imported("torchvision", "resnet50")
    about = preprocessing.published(found, "11ad3fa6" + "0" * 56)
    assert Resize.of(about).whole(224) == 232


def test_other_channels_need_a_config():
    with pytest.raises(ConvnetError, match="takes 1 channels"):
        preprocessing.published(imported("timm", "resnet50", channels=1), "")
    about = {"input_size": [1, 96, 96], "mean": [0.3], "std": [0.2]}
    config = {"architecture": "resnet50", "pretrained_cfg": about}
    got = preprocessing.configured(imported("timm", "resnet50", channels=1), config)
    assert (got["input_shape"], got["mean"]) == ((96, 96, 1), (0.3,))
    for wrong in ([3, 96, 96], [1, 96, 64], "96", None):
        about["input_size"] = wrong
        with pytest.raises(ValueError, match="its input_size is"):
            preprocessing.configured(imported("timm", "resnet50", channels=1), config)


def test_imagenet_has_a_thousand_different_names():
    names = preprocessing.imagenet_labels()
    assert len(set(names)) == len(names) == 1000
    known = {0: "tench", 207: "golden retriever", 388: "giant panda", 517: "crane"}
    assert {n: names[n] for n in known} == known
