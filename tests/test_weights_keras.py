"""Keras's files: the networks of keras.applications, and files that are not theirs.

The networks are made by Keras itself, on JAX, an eighth as wide so that they are quick.
"""

import functools
import io
import os
import types
import zipfile

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from convnet import models, step  # noqa: E402
from convnet.errors import ConvnetError, UsageError  # noqa: E402
from convnet.models import lowering  # noqa: E402
from convnet.weights import keras as keras_weights  # noqa: E402
from convnet.weights import keras_layers, preprocessing  # noqa: E402

CLASSES = 7
# The smallest inputs that the networks take.
SIDES = {"inception_v3": 75, "vgg16": 64}
MODULES = {"resnet101": "resnet", "resnet50": "resnet", "convnext_tiny": "convnext"}


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Keras on JAX, which leaves no file in the home."""
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["KERAS_HOME"] = str(tmp_path_factory.mktemp("keras"))
    return pytest.importorskip("keras")


def compiled(function):
    """Compiled in a hurry: what counts is not how fast it runs."""
    import jax

    quick = {"xla_backend_optimization_level": 0}
    quick["xla_llvm_disable_expensive_passes"] = True
    return jax.jit(function, compiler_options=quick)


def build(keras, monkeypatch, arch):
    """The network, an eighth as wide, with random weights and statistics."""
    import importlib

    name = MODULES.get(arch, arch)
    module = importlib.import_module(f"keras.src.applications.{name}")
    side = SIDES.get(arch, 32)
    options = {"weights": None, "classes": CLASSES, "classifier_activation": None}
    options["input_shape"] = (side, side, 3)
    if arch == "mobilenet_v2":
        make = functools.partial(keras.applications.MobileNetV2, alpha=0.35)
    elif arch == "convnext_tiny":
        widths = [8, 16, 32, 64]
        make = functools.partial(module.ConvNeXt, [3, 3, 9, 3], widths, name=arch)
    else:

        def conv(filters, *args, **kwargs):
            return keras.layers.Conv2D(filters // 8, *args, **kwargs)

        def dense(units, *args, **kwargs):
            units = 32 if units == 4096 else units
            return keras.layers.Dense(units, *args, **kwargs)

        narrow = types.SimpleNamespace(**vars(keras.layers))
        narrow.Conv2D, narrow.Dense = conv, dense
        monkeypatch.setattr(module, "layers", narrow)
        make = getattr(module, keras_layers.APPLICATIONS[arch])
    # Keras would compile an initialiser for each shape.
    with keras.StatelessScope(initialize_variables=False):
        model = make(**options)
    keras.backend.clear_session()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(draw(rng, variable.path.rsplit("/", 1)[-1], variable.shape))
    return model


def draw(rng, name, shape):
    if "variance" in name:
        return rng.uniform(0.5, 2, shape).astype(np.float32)
    if "gamma" in name or name == "variable":  # the latter of a LayerScale
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if "kernel" in name:
        fan_in = np.prod(shape[: 2 if "depthwise" in name else -1])
        return rng.normal(0, (1.5 / fan_in) ** 0.5, shape).astype(np.float32)
    return rng.normal(0, 0.2, shape).astype(np.float32)


def numbers(variables):
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    "arch", ["vgg16", "resnet50", "inception_v3", "mobilenet_v2", "convnext_tiny"]
)
def test_logits_are_those_of_keras(keras, monkeypatch, tmp_path, arch):
    import jax

    model = build(keras, monkeypatch, arch)
    side = model.input_shape[1]
    images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), np.uint8)
    module = getattr(keras.applications, MODULES.get(arch, arch))
    prepared = module.preprocess_input(images.astype(np.float32))
    want, _ = compiled(model.stateless_call)(
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
        prepared,
    )
    paths = [tmp_path / f"{arch}{end}" for end in (".weights.h5", ".h5", ".keras")]
    model.save_weights(paths[0])
    for path in paths[1:]:
        model.save(path)
    found = [keras_weights.load(path) for path in paths]
    for other in found[1:]:
        assert other.architecture == found[0].architecture
        jax.tree.map(np.testing.assert_array_equal, other.variables, found[0].variables)
    about = found[0].architecture
    assert (about["name"], about["num_outputs"]) == (arch, CLASSES)
    assert numbers(found[0].variables) == model.count_params()
    normal = preprocessing.published(found[0], "")
    ours = models.create(arch, num_outputs=CLASSES, **about["options"])

    def logits(variables, images):
        inputs = step.normalize(step.to_unit(images), normal["mean"], normal["std"])
        return ours.apply(variables, inputs, train=False)

    with lowering.plain():
        got = np.asarray(compiled(logits)(found[0].variables, images))
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def listed(keras, layers):
    """Keras's layers with variables: class, name, how many variables."""
    from keras.src.utils import naming

    for layer in layers:
        if isinstance(layer, keras.Sequential):
            yield tuple(listed(keras, layer.layers))
        elif layer.weights:
            kind = naming.to_snake_case(type(layer).__name__)
            yield kind, layer.name, len(layer.weights)


@pytest.mark.parametrize("arch", list(keras_layers.PLANS))
def test_plans_are_the_layers_of_keras_in_its_order(keras, arch):
    keras.backend.clear_session()
    # No weights are drawn: their shapes are all that is needed.
    with keras.StatelessScope(initialize_variables=False):
        model = getattr(keras.applications, keras_layers.APPLICATIONS[arch])(
            weights=None
        )

    def ours(layer):
        if not isinstance(layer, keras_layers.Layer):
            return tuple(map(ours, layer))
        count = len(keras_layers.FIELDS[layer.kind])
        return keras_layers.CLASSES[layer.kind], layer.name, count

    def kind(layer):
        return layer[0] if isinstance(layer[0], str) else "sequential"

    # Layers are numbered among those of their class.
    plan = [ours(layer) for layer in keras_layers.PLANS[arch]()]
    theirs = list(listed(keras, model.layers))
    assert sorted(plan, key=kind) == sorted(theirs, key=kind)


# Files without Keras: VGG-16 with one feature.


def arrays(arch="vgg16"):
    """Random arrays by the names of Keras 3, and by (layer, variable) in its order."""
    rng = np.random.default_rng(0)
    widths = [1] * 2 + [2] * 2 + [4] * 3 + [8] * 6
    shapes, before = [], 3
    for width in widths:
        shapes += [(3, 3, before, width), (width,)]
        before = width
    for rows, columns in ((8, 4), (4, 5), (5, 3)):
        shapes += [(rows, columns), (columns,)]
    names = [name for name in keras_layers.PLANS[arch]()]
    values = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return {
        (layer.name, field): values[2 * i + j]
        for i, layer in enumerate(names)
        for j, field in enumerate(("kernel", "bias"))
    }


def numbered(table):
    """By the names of `.weights.h5`."""
    counts, places, named = {"conv": 0, "dense": 0}, {}, {}
    for (layer, field), values in table.items():
        kind = "conv2d" if "conv" in layer else "dense"
        if layer not in places:
            number = counts.setdefault(kind, 0)
            counts[kind] += 1
            places[layer] = f"layers/{kind}_{number}" if number else f"layers/{kind}"
        named[f"{places[layer]}/vars/{int(field == 'bias')}"] = values
    return named


def write(path, named, **options):
    with h5py.File(path, "w") as file:
        for name, values in named.items():
            file.create_dataset(name, data=values, **options)
    return path


def kernels(variables):
    return variables["params"]["base"]["block1"]["conv1"]["kernel"]


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "vgg.weights.h5", numbered(arrays()))


def test_a_file_of_the_oldest_layout(good, tmp_path):
    short = {"kernel": "W", "bias": "b"}
    named = {
        f"{layer}/{layer}_{short[field]}_1:0": values
        for (layer, field), values in arrays().items()
    }
    old = keras_weights.load(write(tmp_path / "old.h5", named))
    new = keras_weights.load(good)
    np.testing.assert_array_equal(kernels(old.variables), kernels(new.variables))
    assert old.architecture == new.architecture
    assert {row.theirs for row in old.report} == set(named)


def test_unnamed_layers_are_counted_from_where_they_begin():
    from_one = [f"conv2d_{n}/conv2d_{n}/kernel:0" for n in (12, 9, 10)]
    found = dict(keras_weights._by_name(dict.fromkeys(from_one)))
    assert [found[name][0] for name in from_one] == ["conv2d_2", "conv2d", "conv2d_1"]
    renamed = dict(keras_weights._by_name({"Logits/Logits/kernel:0": None}))
    assert list(renamed.values()) == [("predictions", "kernel")]


def test_bgr_is_turned_once(good):
    found = keras_weights.load(good)
    stored = arrays()["block1_conv1", "kernel"]
    np.testing.assert_array_equal(kernels(found.variables), stored[:, :, ::-1])


def test_training_state_is_no_weight(good):
    with h5py.File(good, "a") as file:
        file["optimizer/vars/0"] = np.int64(3)
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    assert len(keras_weights.load(good).report) == 32


def renamed(named):
    named["layers/conv2d_77/vars/0"] = named.pop("layers/conv2d_7/vars/0")


def transposed(named):
    named["layers/dense/vars/0"] = named["layers/dense/vars/0"].T


def lost(named):
    del named["layers/dense_2/vars/1"]


@pytest.mark.parametrize(
    "change, wrong",
    [
        (renamed, r"layers/conv2d_7/vars/0 .*\| layers/conv2d_77/vars/0"),
        (transposed, r"layers/dense/vars/0 is \[4, 8\], not .* \(transposed\?\)"),
        (lost, "layers/dense_2/vars/1"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, change, wrong):
    named = numbered(arrays())
    change(named)
    with pytest.raises(ConvnetError, match=wrong):
        keras_weights.load(write(tmp_path / "x.h5", named))


def test_a_missing_head_may_be_allowed(tmp_path):
    named = {k: v for k, v in numbered(arrays()).items() if "dense_2" not in k}
    path = write(tmp_path / "notop.h5", named)
    with pytest.raises(ConvnetError, match="2 missing in the file"):
        keras_weights.load(path)
    found = keras_weights.load(path, initial=True)
    assert found.architecture["num_outputs"] == 1000
    fresh = [row.ours for row in found.report if not row.theirs]
    assert fresh == ["params/head/logits/bias", "params/head/logits/kernel"]
    assert found.variables["params"]["head"]["logits"]["kernel"].std() > 0
    hidden = found.variables["params"]["head"]["dense2"]["bias"]
    np.testing.assert_array_equal(hidden, arrays()["fc2", "bias"])


def test_leftover_tensors_may_be_allowed(tmp_path):
    named = numbered(arrays()) | {"layers/prelu/vars/0": np.ones(3, np.float32)}
    path = write(tmp_path / "more.h5", named)
    with pytest.raises(ConvnetError, match=r"1 there that have no place(.|\n)*prelu"):
        keras_weights.load(path)
    assert len(keras_weights.load(path, allow_unexpected=True).report) == 32


def test_another_architecture_is_refused(good):
    with pytest.raises(ConvnetError, match="missing in the file"):
        keras_weights.load(good, "vgg19")
    with pytest.raises(UsageError, match="--arch=vgg11: want one of vgg16"):
        keras_weights.load(good, "vgg11")


def test_unknown_layers_are_refused(tmp_path):
    path = write(tmp_path / "x.h5", {"layers/gru/vars/0": np.ones(3, np.float32)})
    with pytest.raises(ConvnetError, match="of none of the networks"):
        keras_weights.load(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path):
    import pickle

    path.write_bytes(pickle.dumps({"a": 1}))


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def squeezed(path):
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", content)


def compressed(path):
    write(path, {"layers/conv2d/vars/0": np.zeros((999, 999))}, compression="gzip")


def hollow(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", (10**6, 10**6), np.float32)


def elsewhere(path):
    write(path.with_name("other.h5"), {"x": np.ones(3, np.float32)})
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = h5py.ExternalLink("other.h5", "x")


def raw_elsewhere(path):
    with h5py.File(path, "w") as file:
        secret = [("/etc/hostname", 0, 4)]
        file.create_dataset("layers/conv2d/vars/0", (1,), "f4", external=secret)


def strings(path):
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = "text"


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "truncated file"),
        (pickled, "not HDF5"),
        (lambda path: path.write_bytes(b""), "not HDF5"),
        (other_zip, "zip archive without model.weights.h5"),
        (squeezed, "is compressed; save it with Keras"),
        (compressed, "is compressed, or lies in another file"),
        (hollow, "has no values"),
        (elsewhere, "it holds no weights"),
        (raw_elsewhere, "lies in another file"),
        (strings, "want floats"),
    ],
)
def test_other_files_are_refused(good, damage, message):
    damage(good)
    with pytest.raises(ConvnetError, match=message) as error:
        keras_weights.load(good)
    assert str(good) in str(error.value)


def test_every_cut_and_flip_of_a_file_is_an_error_or_loads(good):
    content = good.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        for place in rng.integers(0, min(len(content), 20_000), 4):
            changed[place] = rng.integers(256)
        good.write_bytes(changed[: rng.integers(len(content) // 2, len(content) + 1)])
        try:
            keras_weights.load(good)
        except ConvnetError:
            refused += 1
    assert refused > 40


def test_an_archive_is_read_in_memory(good, tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.write(good, "model.weights.h5")
    path = tmp_path / "vgg.keras"
    path.write_bytes(content.getvalue())
    found = keras_weights.load(path)
    np.testing.assert_array_equal(
        kernels(found.variables), kernels(keras_weights.load(good).variables)
    )
