"""Model files: what is saved comes back, and what is wrong is refused."""

import dataclasses
import json
import os
import pickle
import random
import re
import resource
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from safetensors import safe_open

from convnet import bundle as bundle_lib
from convnet import bundle_metadata, models, resolve
from convnet import config as config_lib
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


def change_about(path, change):
    """Applies `change(about)` to the metadata of a model file."""

    def both(tensors, metadata):
        about = json.loads(metadata["convnet"])
        change(about)
        metadata["convnet"] = json.dumps(about)

    rewrite(path, both)


def test_bfloat16_storage_rounds_kernels_and_loads_as_float32(bundle, path):
    small = path.with_name("small.safetensors")
    bundle_lib.save(small, bundle, "bfloat16")
    loaded = bundle_lib.load(small)

    def check(before, after):
        rounded = np.asarray(before)
        if rounded.ndim > 1:
            rounded = rounded.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert after.dtype == np.float32
        np.testing.assert_array_equal(after, rounded)

    jax.tree.map(check, bundle.variables, loaded.variables)
    saved = 2 * sum(x.size for x in jax.tree.leaves(bundle.variables) if x.ndim > 1)
    header = [int.from_bytes(p.read_bytes()[:8], "little") for p in (path, small)]
    sizes = [p.stat().st_size for p in (path, small)]
    assert (sizes[0] - header[0]) - (sizes[1] - header[1]) == saved
    with pytest.raises(ValueError, match="storage='float16'"):
        bundle_lib.save(small, bundle, "float16")


def test_predict_fn_gives_probabilities(bundle):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 1)).astype(np.uint8)
    logits = np.asarray(bundle.logits(bundle.variables, jnp.asarray(images)))
    flipped = bundle.logits(bundle.variables, jnp.asarray(images[:, :, ::-1]))
    for views, want in {"none": logits, "flip": (logits + flipped) / 2}.items():
        want = np.exp(want) / np.exp(want).sum(-1, keepdims=True)
        got = bundle.predict_fn(views=views)(images)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        own = dataclasses.replace(bundle, views=views)
        np.testing.assert_array_equal(own.predict_fn()(images), got)
    binary = {
        "architecture": {**bundle.architecture, "num_outputs": 1},
        "task": {"name": "binary", "positive": 1},
    }
    model = models.create("cnn", num_outputs=1, **OPTIONS)
    variables = model.init(jax.random.key(1), jnp.zeros((1, 6, 6, 1)))
    binary = dataclasses.replace(bundle, variables=dict(variables), **binary)
    logits = np.asarray(binary.logits(binary.variables, jnp.asarray(images)))
    got = binary.predict_fn()(images)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-4)


def test_a_large_probe_is_thinned_out_and_comes_back():
    logits = np.random.default_rng(0).normal(size=(2, 100, 101)).astype(np.float32)
    probe = bundle_metadata.Probe.of(logits)
    np.testing.assert_array_equal(probe.logits, logits.ravel()[::3])
    about = {
        "architecture": {"name": "cnn", "num_outputs": 101, "options": {}},
        "task": {"name": "regression", "positive": None},
        "classes": (),
        "preprocessing": {
            "input_shape": (6, 1),
            "input_dtype": "float32",
            "resize": "crop",
            "mean": (0.0,),
            "std": (1.0,),
        },
        "provenance": {},
    }
    _, back = bundle_metadata.unpack(bundle_metadata.pack(about, probe))
    assert back.shape == (2, 100, 101)
    np.testing.assert_array_equal(back.logits, probe.logits)


def test_a_model_that_cannot_be_read_again_is_not_written(bundle, tmp_path):
    params = bundle.variables["params"]
    broken = {**bundle.variables, "params": jax.tree.map(lambda x: x * np.nan, params)}
    for change, message in (
        ({"variables": broken}, "logits that are no finite numbers"),
        ({"classes": ("cat", "dog")}, "2 classes and 3 outputs"),
    ):
        with pytest.raises(ConvnetError, match=f"m cannot be written: .*{message}"):
            bundle_lib.save(tmp_path / "m", dataclasses.replace(bundle, **change))
    assert not list(tmp_path.iterdir())


def test_a_name_is_a_file_a_workdir_or_a_shipped_model(path, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "cifar10.safetensors").write_bytes(path.read_bytes())
    monkeypatch.setattr(bundle_lib, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert bundle_lib.find(str(path)) == path
    assert bundle_lib.find(path.parent) == path
    assert bundle_lib.find("cifar10") == shipped / "cifar10.safetensors"
    # A folder of this name is meant only if there is a model in it.
    (tmp_path / "cifar10").mkdir()
    assert bundle_lib.find("cifar10") == shipped / "cifar10.safetensors"
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "cifra10": r"--model=cifra10: no such file; did you mean 'cifar10'\?; want",
        "shipped": "the folder has no model.safetensors .*ships with convnet .cifar10.",
        "model.safetensor": "did you mean 'model.safetensors'",
        "pipe": "no regular file",
        "": "--model=: ",
        "a\0b": "no such file",
        "x" * 5000: "no such file",
        "~nobody/x": "no such file",
    }.items():
        with pytest.raises(UsageError, match=message):
            bundle_lib.find(name)


@pytest.mark.parametrize(
    "start, name",
    [
        (b"PK\x03\x04" + b"\0" * 60, r"zip archive \(PyTorch"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
        (b"\x08\x08\x12\x07pytorch\x1a", "ONNX"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x93NUMPY\x01\0v\0", "NumPy"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "picture"),
        (b'{"a": 1}', "JSON or text"),
        (b"", "an empty file"),
        (b"\0\1\2", "unknown kind"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, start, name):
    (tmp_path / "m").write_bytes(start)
    with pytest.raises(ConvnetError, match=f"m is no convnet model file: .*{name}"):
        bundle_lib.load(tmp_path / "m")


def test_a_newer_format_asks_for_a_newer_convnet(path):
    rewrite(path, lambda _, metadata: metadata.update(format="convnet 2"))
    with pytest.raises(
        ConvnetError, match="format is '2', .* reads 1: a newer convnet"
    ):
        bundle_lib.load(path)


@pytest.fixture
def quick():
    """Fails a test that takes much processor time or memory."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    yield
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000


@pytest.mark.parametrize(
    "place, value, message",
    [
        (
            "architecture/options/widths",
            [10**9],
            "option 'widths' .* is .1000000000., more",
        ),
        ("architecture/options/widths", [10**400], "more than its tensors can fill"),
        ("architecture/options/depth", 1000, "more layers than 7 tensors are for"),
        ("architecture/options/widths", [4] * 10**5, "more than its tensors can fill"),
        ("architecture/options/widths", [5], r"conv1/kernel is float32\[3, 3, 1, 4\]"),
        ("architecture/options/norm", "none", "missing .*bias.* unexpected .*norm1"),
        ("architecture/options/oops", 1, "reads no option 'oops'"),
        ("architecture/options/dtype", "float64", "cannot be built: .*dtype"),
        ("architecture/name", "gpt", "unknown model 'gpt'"),
        ("architecture/num_outputs", 10**9, "3 classes and 1000000000 outputs"),
        ("architecture/num_outputs", True, "num_outputs is True .*want int"),
        ("architecture", [], r"architecture is \[\]; want a table"),
        ("preprocessing/input_shape", [10**6, 10**6, 1], "input_shape is .*values"),
        ("preprocessing/input_dtype", "uint16", "input_dtype is 'uint16'"),
        ("preprocessing/mean", [float("nan")], r"mean is \[nan\]"),
        ("preprocessing/std", [0.0], "want one number above 0"),
        ("preprocessing/crop_fraction", 1.5, "crop_fraction is 1.5: want .*0.1 to 1"),
        ("preprocessing/crop_fraction", float("nan"), "crop_fraction is nan"),
        ("preprocessing/crop_fraction", "0.9", "crop_fraction is '0.9' in prepro"),
        ("preprocessing/interpolation", "box", "'box': want one of bilinear, bicubic"),
        ("preprocessing/crop", 0.9, r"unknown fields \['crop'\] in preprocessing"),
        ("classes", ["\ud800", "a", "b"], "surrogates not allowed"),
        ("classes", [1, 2, 3], "want names"),
        ("task/positive", 1, "task 'classification' with positive 1"),
        ("probe/logits", [0.0] * 100_000, r"100000 logits for the shape \[2, 3\]"),
        ("probe/logits", [0.0] * 5 + [float("nan")], "no finite numbers"),
        ("probe/logits", [0.0] * 5 + [10**400], "no finite numbers"),
        ("probe/shape", [3, 2], "shape of its probe is .3, 2., .* puts out .2, 3."),
    ],
)
def test_hostile_metadata_is_refused_quickly(path, quick, place, value, message):
    def change(about):
        *nodes, leaf = place.split("/")
        for node in nodes:
            about = about[node]
        about[leaf] = value

    change_about(path, change)
    with pytest.raises(ConvnetError, match=message):
        bundle_lib.load(path)


def test_a_network_that_takes_all_memory_is_refused_quickly(path, quick):
    # Few weights, but maps of 5,600 x 5,600 x 512.
    model = models.create("cnn", num_outputs=3, **{**OPTIONS, "widths": (512,)})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6, 6, 1)))

    def change(tensors, metadata):
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
            tensors[name] = np.ones(leaf.shape, leaf.dtype)
        about = json.loads(metadata["convnet"])
        about["architecture"]["options"]["widths"] = [512]
        about["preprocessing"]["input_shape"] = [5600, 5600, 1]
        metadata["convnet"] = json.dumps(about)

    rewrite(path, change)
    with pytest.raises(ConvnetError, match=r"an array of 1\.3e\+11 bytes; up to 2e"):
        bundle_lib.load(path)


def test_deep_json_and_repeated_keys_are_refused(path, quick):
    for text, message in (
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "has a key twice"),
        ("7", "no JSON object"),
    ):
        rewrite(path, lambda _, metadata, text=text: metadata.update(convnet=text))
        with pytest.raises(ConvnetError, match=message):
            bundle_lib.load(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path, quick):
    file = tmp_path / "m"
    with open(file, "wb") as stream:
        stream.write((2**33).to_bytes(8, "little") + b"{")
        stream.truncate(2**34)  # Sparse: takes no space.
    with pytest.raises(ConvnetError, match="header has 8589934592 bytes; up to"):
        bundle_lib.load(file)


# What a damaged or a made-up number may be.
NUMBERS = [b"0", b"-1", b"3", b"2.5", b"65536", b"1000000000", b"9223372036854775807"]
NUMBERS += [b"1" + b"0" * 400, b"NaN", b"1e999", b"null", b"[]", b"{}", b'"a"', b"true"]


def damage(good, kind, draw):
    end = 8 + int.from_bytes(good[:8], "little")
    if kind == "bit":
        data = bytearray(good)
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
        return bytes(data)
    if kind == "cut":
        return good[: draw.randrange(len(good))]
    if kind == "length":
        length = draw.choice([0, 1, 2**62, 2**64 - 1, end, draw.randrange(2**16)])
        return length.to_bytes(8, "little") + good[8:]
    if kind == "swap":  # Two numbers of the header, among them sizes and places.
        runs = list(re.finditer(rb"\d+", good[8:end]))
        a, b = sorted(draw.sample(runs, 2), key=lambda run: run.start())
        header = good[8:end]
        header = b"".join(
            [header[: a.start()], b[0], header[a.end() : b.start()], a[0]]
            + [header[b.end() :]]
        )
    else:
        runs = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?|null", good[8:end]))
        run = draw.choice(runs)
        header = good[8:end]
        header = header[: run.start()] + draw.choice(NUMBERS) + header[run.end() :]
    return len(header).to_bytes(8, "little") + header + good[end:]


@pytest.mark.parametrize("kind", ["bit", "cut", "length", "swap", "number"])
def test_a_damaged_file_is_refused_or_says_the_same(bundle, path, quick, kind):
    good, draw = path.read_bytes(), random.Random(kind)
    refused = 0
    for _ in range(60):
        path.write_bytes(damage(good, kind, draw))
        try:
            loaded = bundle_lib.load(path)
        except ConvnetError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        # A letter of a label or of the provenance may differ; the network may not.
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, bundle.variables)
    assert refused >= 40
