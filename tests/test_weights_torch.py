"""Checkpoints of torchvision and timm: the same logits as PyTorch's, or a refusal."""

import functools
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from convnet import models
from convnet.errors import ConvnetError, UsageError
from convnet.models import lowering
from convnet.weights import match, torch_names
from convnet.weights import torch as torch_weights

# Small, but structurally whole and at the network's own size.
CASES = [
    ("vgg11", "timm", 224, {"width": 4, "dense": 16, "k": 7}),
    ("vgg11_bn", "torchvision", 224, {"width": 4, "dense": 16, "k": 7}),
    ("resnet18", "torchvision", 224, {"width": 4, "k": 7}),
    ("resnet50", "torchvision", 224, {"width": 4, "k": 7}),
    ("squeezenet1_1", "torchvision", 224, {"width": 8, "k": 7}),
    ("mobilenet_v2", "torchvision", 224, {"width": 8, "k": 7}),
    ("mobilenet_v2", "timm", 224, {"width": 8, "k": 7}),
    ("inception_v3", "torchvision", 299, {"width": 4, "k": 7, "aux": True}),
    ("convnext_tiny", "torchvision", 224, {"width": 8, "k": 7}),
    ("convnext_tiny", "timm", 224, {"width": 8, "k": 7}),
]


def torch_python():
    if named := os.environ.get("CONVNET_PEER_PYTHON"):
        return named
    if importlib.util.find_spec("torch"):
        return sys.executable
    pytest.skip(
        "needs PyTorch: install torch here, or name a Python that has it in"
        " CONVNET_PEER_PYTHON"
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What PyTorch computes, from a process of its own: arrays of each case."""
    python, folder = torch_python(), tmp_path_factory.mktemp("reference")
    script = Path(__file__).with_name("torch_networks.py")
    command = [python, script, folder, json.dumps(CASES)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


@functools.cache
def compiled(architecture):
    about = json.loads(architecture)
    model = models.create(
        about["name"], num_outputs=about["num_outputs"], **about["options"]
    )

    @jax.jit
    def run(variables, x):
        with lowering.plain():
            logits, state = model.apply(variables, x, mutable=["taps"])
        return logits, models.taps(state["taps"]).get("aux/logits")

    return run


def write(path, arrays):
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    safetensors.numpy.save_file(arrays, path)
    return path


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    ("case", "name", "source"), [(i, *case[:2]) for i, case in enumerate(CASES)]
)
def test_logits_are_pytorchs(reference, case, name, source, tmp_path):
    arrays = dict(np.load(reference / f"{case}.npz"))
    inputs, logits = arrays.pop("_inputs"), arrays.pop("_logits")
    aux = arrays.pop("_aux", None)
    imported = torch_weights.load(write(tmp_path / "m.safetensors", arrays))
    architecture = imported.architecture
    assert (architecture["name"], imported.source) == (name, source)
    assert imported.input_shape == inputs.shape[1:]
    ours, ours_aux = compiled(json.dumps(architecture))(imported.variables, inputs)
    assert logits.shape == (2, 7)
    assert np.ptp(logits, 0).max() > 1e-3 * np.abs(logits).max()  # sees its input
    assert relative(ours, logits) < 1e-5
    assert (ours_aux is None) == (aux is None)
    if aux is not None:
        assert relative(ours_aux, aux) < 1e-5
    weights = {n for n in arrays if "num_batches" not in n}
    assert {row.theirs for row in imported.report} == weights


@pytest.mark.parametrize("name", torch_names.NAMES)
def test_names_and_shapes_at_full_width_are_pytorchs(reference, name):
    table = json.loads((reference / "names.json").read_text())
    for source in torch_names.SOURCES:
        theirs = {n: tuple(s) for n, s in table[f"{name} {source}"].items()}
        theirs = {n: s for n, s in theirs.items() if "num_batches" not in n}
        architecture, shape = torch_weights.deduce(name, source, theirs)
        assert architecture["num_outputs"] == 1000
        template = match.template(architecture, shape)
        rules = torch_weights.rules(name, source, template)
        assert {r.source: r.stored_shape(template[n]) for n, r in rules.items()} == (
            theirs
        )
        if name == "squeezenet1_1":
            break  # timm has none


# Without PyTorch: state dicts made from the rules, and what can be wrong with them


def state_dict(name, source, **options):
    """A state dict with the names of `source`, and the architecture."""
    about = {"name": name, "num_outputs": 3, "options": options}
    side = 299 if name == "inception_v3" else 224
    template = match.template(about, (side, side, 3))
    rules = torch_weights.rules(name, source, template)
    rng = np.random.default_rng(0)
    arrays = {
        rule.source: rng.standard_normal(rule.stored_shape(template[ours]), np.float32)
        for ours, rule in rules.items()
    }
    return arrays, about


@pytest.fixture(scope="module")
def resnet():
    return state_dict("resnet18", "torchvision", width=2, stem="imagenet")[0]


def test_the_first_dense_layer_has_its_rows_in_the_order_of_places(tmp_path):
    arrays, _ = state_dict("vgg11", "torchvision", width=2, dense=(5, 4))
    imported = torch_weights.load(write(tmp_path / "m.safetensors", arrays))
    assert imported.architecture["options"]["dense"] == (5, 4)
    head = imported.variables["params"]["head"]
    first = arrays["classifier.0.weight"]  # (5, 16 * 7 * 7)
    at = (2, 6, 11)  # row, column, channel
    np.testing.assert_array_equal(
        head["dense1"]["kernel"][(at[0] * 7 + at[1]) * 16 + at[2]],
        first[:, at[2] * 49 + at[0] * 7 + at[1]],
    )
    second = head["dense2"]["kernel"]
    np.testing.assert_array_equal(second, arrays["classifier.3.weight"].T)


def test_half_precision_wrappers_and_counters_are_no_obstacle(resnet, tmp_path):
    arrays = {f"module.{n}": a.astype(np.float16) for n, a in resnet.items()}
    arrays["module.bn1.num_batches_tracked"] = np.array(7)
    imported = torch_weights.load(write(tmp_path / "m.safetensors", arrays))
    assert imported.architecture["name"] == "resnet18"
    assert imported.architecture["options"]["width"] == 2
    kernel = imported.variables["params"]["head"]["logits"]["kernel"]
    assert kernel.dtype == np.float32
    expected = resnet["fc.weight"].T.astype(np.float16)
    np.testing.assert_array_equal(kernel, expected.astype(np.float32))


def renamed(arrays):
    arrays["layer2.0.conv1.wieght"] = arrays.pop("layer2.0.conv1.weight")


def transposed(arrays):
    arrays["fc.weight"] = arrays["fc.weight"].T


def headless(arrays):
    del arrays["fc.weight"], arrays["fc.bias"]


def another_stem(arrays):
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :, 2:5, 2:5]


@pytest.mark.parametrize(
    ("change", "arch", "message"),
    [
        (renamed, "", r"conv1\.weight +\| layer2\.0\.conv1\.wieght$"),
        (renamed, "resnet18", r"1 missing in the file +\| 1 there that have no place"),
        (transposed, "", r"fc\.weight is \[16, 3\], not \[3, 16\] \(transposed\?\)"),
        (headless, "", r"fc\.weight"),
        (another_stem, "", r"conv1\.weight is \[2, 3, 3, 3\], not \[2, 3, 7, 7\]"),
        (lambda arrays: None, "resnet34", r"names are those of resnet18"),
        (lambda arrays: None, "vgg16", r"names are those of resnet18"),
        (dict.clear, "", "names of no architecture"),
    ],
)
def test_a_wrong_file_is_refused(change, arch, message, resnet, tmp_path):
    arrays = dict(resnet)
    change(arrays)
    path = write(tmp_path / "m.safetensors", arrays)
    with pytest.raises(ConvnetError, match=rf"(?ms){path}.*{message}"):
        torch_weights.load(path, arch)


def test_another_source_than_named_is_refused(tmp_path):
    arrays, _ = state_dict("mobilenet_v2", "timm", width=8)
    path = write(tmp_path / "m.safetensors", arrays)
    with pytest.raises(ConvnetError, match=r"mobilenet_v2 \(timm\)"):
        torch_weights.load(path, "mobilenet_v2", "torchvision")
    with pytest.raises(ConvnetError, match=r"mobilenet_v2 \(timm\)"):
        torch_weights.load(path, "", "torchvision")
    assert torch_weights.load(path, "", "timm").source == "timm"


def test_what_is_missing_or_unexpected_may_be_allowed(resnet, tmp_path):
    arrays = dict(resnet)
    headless(arrays)
    arrays["extra.weight"] = np.zeros(3, np.float32)
    path = write(tmp_path / "m.safetensors", arrays)
    for allowed in ({"initial": True}, {"allow_unexpected": True}):
        with pytest.raises(ConvnetError, match="extra|fc.weight"):
            torch_weights.load(path, **allowed)
    imported = torch_weights.load(path, initial=True, allow_unexpected=True)
    fresh = {row.ours for row in imported.report if not row.theirs}
    assert fresh == {"params/head/logits/kernel", "params/head/logits/bias"}
    head = imported.variables["params"]["head"]["logits"]
    assert head["kernel"].shape == (16, 1000)
    stem = imported.variables["params"]["base"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(stem, arrays["conv1.weight"].transpose(2, 3, 1, 0))


def test_a_truncated_file_a_pickle_and_no_file_are_refused(resnet, tmp_path):
    path = write(tmp_path / "m.safetensors", resnet)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConvnetError, match="its tensors end at byte"):
        torch_weights.load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConvnetError, match="a Python pickle"):
        torch_weights.load(path)
    with pytest.raises(UsageError, match="no such file"):
        torch_weights.load(tmp_path / "none.safetensors")
    (tmp_path / "m.h5").touch()
    with pytest.raises(UsageError, match=r"want a \.safetensors"):
        torch_weights.load(tmp_path / "m.h5")
    with pytest.raises(UsageError, match="--arch=alexnet: want one of vgg11"):
        torch_weights.load(path, "alexnet")


def test_without_pytorch_its_own_files_name_the_way_out(tmp_path, monkeypatch):
    path = tmp_path / "m.pth"
    path.write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConvnetError, match="install torch, or take the .safetensors"):
        torch_weights.load(path)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pytorchs_own_files(resnet, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch in this environment")
    path = tmp_path / "m.pth"
    tensors = {n: torch.from_numpy(a.copy()) for n, a in resnet.items()}
    torch.save({"epoch": 3, "state_dict": tensors}, path)
    imported = torch_weights.load(path)
    kernel = imported.variables["params"]["head"]["logits"]["kernel"]
    np.testing.assert_array_equal(kernel, resnet["fc.weight"].T)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConvnetError, match="damaged"):
        torch_weights.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ConvnetError, match="no state dict"):
        torch_weights.load(path)
    path.write_bytes(pickle.dumps(Harmful(str(tmp_path / "made"))))
    with pytest.raises(ConvnetError, match="weights_only=True"):
        torch_weights.load(path)
    torch.save({"a": Harmful(str(tmp_path / "made"))}, path)
    with pytest.raises(ConvnetError, match="weights_only=True"):
        torch_weights.load(path)
    assert not (tmp_path / "made").exists()
