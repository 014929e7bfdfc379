"""The convert app: a snapshot becomes a model file that the other apps take."""

import subprocess
import sys

import numpy as np
import pytest
from test_convnetjs import write

from convnet import bundle as bundle_lib
from convnet import cli, convert
from convnet.errors import ConvnetError, UsageError


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
