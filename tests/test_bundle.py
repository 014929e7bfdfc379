"""Model files: what is saved comes back, and what is wrong is refused."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from convnet import bundle as bundle_lib
from convnet import config as config_lib
from convnet import models, resolve
from convnet.errors import ConvnetError, UsageError

OPTIONS = {"widths": (4,), "depth": 1, "norm": "batch", "gather": "global"}


@pytest.fixture(scope="module")
def bundle() -> bundle_lib.Bundle:
    model = models.create("cnn", num_outputs=3, **OPTIONS)
    variables = model.init(jax.random.key(1), jnp.zeros((1, 6, 6, 1)))
    # Not the initial statistics, which would hide that they were not read.
    stats = jax.tree.map(lambda x: x + 0.25, variables["batch_stats"])
    return bundle_lib.Bundle(
        architecture={"name": "cnn", "num_outputs": 3, "options": OPTIONS},
        task={"name": "classification", "positive": None},
        classes=("cat", "dog", "<b>"),
        preprocessing={
            "input_shape": (6, 6, 1),
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.5,),
            "std": (0.25,),
        },
        provenance={"data": "none"},
        variables={"params": variables["params"], "batch_stats": stats},
    )


@pytest.fixture
def path(bundle, tmp_path):
    bundle_lib.save(tmp_path / "model.safetensors", bundle)
    return tmp_path / "model.safetensors"


def rewrite(path, change):
    """Applies `change(tensors, metadata)` to a model file."""
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


def test_a_saved_model_comes_back_whole(bundle, path):
    loaded = bundle_lib.load(path.parent)  # a workdir is as good as its file
    assert loaded.classes == bundle.classes
    assert loaded.preprocessing["mean"] == [0.5]
    jax.tree.map(np.testing.assert_array_equal, bundle.variables, loaded.variables)
    (path.parent / "plain").write_bytes(b"")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_the_probe_is_what_the_network_says_of_the_fixed_input(bundle):
    # Philox(0) is part of the format: these pixels must never change.
    pixels = np.random.Generator(np.random.Philox(0)).integers(0, 256, (2, 6, 6, 1))
    normal = (pixels / 255 - 0.5) / 0.25
    want = bundle.model().apply(bundle.variables, jnp.asarray(normal, jnp.float32))
    np.testing.assert_allclose(bundle.probe(), want, rtol=1e-4, atol=1e-5)


def test_weights_that_changed_are_refused_with_the_difference(path):
    def change(tensors, metadata):
        tensors["params/base/block1/conv1/kernel"] *= 1.05

    rewrite(path, change)
    with pytest.raises(ConvnetError, match=r"logits of its probe differ by 0\.\d+"):
        bundle_lib.load(path)


def test_renamed_and_missing_tensors_are_listed_on_both_sides(path):
    def change(tensors, metadata):
        tensors["params/head/other"] = tensors.pop("params/head/logits/bias")

    rewrite(path, change)
    with pytest.raises(
        ConvnetError, match="missing tensors .*logits/bias.*unexpected .*head/other"
    ):
        bundle_lib.load(path)


def test_a_transposed_tensor_is_refused_with_both_shapes(path):
    def change(tensors, metadata):
        name = "params/head/logits/kernel"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    rewrite(path, change)
    with pytest.raises(ConvnetError, match=r"logits/kernel.*\[3, 4\].*\[4, 3\]"):
        bundle_lib.load(path)


def test_other_files_are_refused_by_name(path, tmp_path):
    for name, content in {
        "pickle.pt": pickle.dumps({"a": 1}),
        "empty.safetensors": b"",
        "cut.safetensors": path.read_bytes()[:-7],
        "length.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "plain.safetensors": safetensors.numpy.save({"x": np.zeros(3)}),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvnetError, match=f"{name} is no convnet model file"):
            bundle_lib.load(tmp_path / name)
    with pytest.raises(UsageError, match="no such file"):
        bundle_lib.load(tmp_path / "absent.safetensors")


def test_a_failed_save_leaves_the_old_file(bundle, path, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        bundle_lib.save(path, dataclasses.replace(bundle, classes=("a", "b", "c")))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_configure_sets_what_is_the_models_to_say(bundle, path):
    config = config_lib.default()
    config.data.image_size = 99
    bundle_lib.configure(config, bundle_lib.load(path))
    assert config.model.name == "cnn"
    assert config.model.widths == (4,)
    assert config.data.image_size == 6
    assert config.data.std == (0.25,)
    resolve.validate(config)


def test_metadata_is_plain_json_with_the_labels(path):
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["convnet"])
    assert about["classes"] == ["cat", "dog", "<b>"]
    assert about["probe"]["shape"] == [2, 3]
