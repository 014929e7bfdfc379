"""ConvNetJS snapshots: every layer against the original's, and what is malformed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnet import models
from convnet.errors import ConvnetError, UsageError
from convnet.models import lowering
from convnet.weights import convnetjs

# The reference's layers 1 to 10.
TAPS = [f"base/block{b}/{t}" for b in (1, 2, 3) for t in ("conv1", "relu1", "pool")]
TAPS.append("head/logits")


@pytest.fixture(scope="module")
def cifar10(shared_data):
    return convnetjs.load(shared_data / "convnetjs_cifar10" / "snapshot")


def reference(shared_data, number):
    return np.load(shared_data / "convnetjs_cifar10" / f"reference_0{number}.npz")


@pytest.fixture(scope="module")
def layers(cifar10, shared_data):
    """The taps of the plain network in float32, and the probabilities, as NumPy."""
    images = np.load(shared_data / "convnetjs_cifar10" / "images_0.npz")["images"]
    model = cifar10.model()

    def run(inputs):
        _, state = model.apply(cifar10.variables, inputs, mutable=["taps"])
        return models.taps(state["taps"])

    with jax.default_matmul_precision("highest"), lowering.plain():
        inputs = jnp.asarray(images[1:4] / 255 - 0.5, jnp.float32)
        taps = jax.jit(run)(inputs)
    probabilities = jax.nn.softmax(taps["head/logits"])
    return {k: np.asarray(v) for k, v in taps.items()}, np.asarray(probabilities)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_layer_is_the_originals(layers, shared_data, number):
    want = reference(shared_data, number)
    taps, probabilities = layers
    for place, name in enumerate(TAPS, 1):
        layer = want[f"layer{place:02}"]
        got = taps[name][number - 1].reshape(layer.shape)
        limit = 2e-6 * np.abs(layer).max()
        np.testing.assert_allclose(got, layer, rtol=0, atol=limit, err_msg=name)
    layer = want["layer11"].ravel()
    np.testing.assert_allclose(probabilities[number - 1], layer, rtol=0, atol=1e-6)


def test_fast_layers_classify_as_the_original_does(cifar10, shared_data):
    data = np.load(shared_data / "convnetjs_cifar10" / "images_0.npz")
    got = np.asarray(cifar10.predict_fn()(data["images"]))
    for number in (1, 2, 3):
        want = reference(shared_data, number)["layer11"].ravel()
        np.testing.assert_allclose(got[number], want, rtol=0, atol=1e-5)
    # Measured: 783 of these 1,000; the reference network has 79.1 % of 4,000.
    right = int(np.sum(got.argmax(1) == data["labels"]))
    assert abs(right - 783) <= 1
    labels = shared_data / "tfds" / "cifar10" / "3.0.2" / "label.labels.txt"
    assert list(cifar10.classes) == labels.read_text().split()


# Snapshots that are made up, and a network in NumPy that is written from the format.


def write(folder, sizes):
    """Writes layers {"layer1_conv": (w, h, d, n), ...}; returns them as arrays."""
    random = np.random.default_rng(3)
    made = {}
    for name, size in sizes.items():
        weights = random.normal(size=np.prod(size)) / np.sqrt(np.prod(size[:-1]))
        bias = random.normal(size=size[-1])
        numbers = [f"{x:.20f}" for x in [*weights, *bias]]
        text = "\n".join([" ".join(map(str, size)), *numbers])
        (folder / f"{name}.txt").write_text(text + "\n")
        made[name] = weights, bias
    return made


def original(made, sizes, x):
    """ConvNetJS by hand, of one input (h, w, c) in float64: plain loops."""
    names = list(sizes)
    for name, after in zip(names, [*names[1:], None], strict=True):
        (weights, bias), size = made[name], sizes[name]
        number = int(name[5:].split("_")[0])
        if name.endswith("fc"):
            x = weights.reshape(size[1], size[0]) @ x.ravel() + bias
            x = np.maximum(x, 0) if after else x
            continue
        w, h, d, n = size
        h_in, w_in = x.shape[:2]
        padded = np.pad(x, ((h // 2, h // 2), (w // 2, w // 2), (0, 0)))
        y = np.zeros((h_in, w_in, n))
        for f in range(n):
            for fx in range(w):
                for fy in range(h):
                    for fd in range(d):
                        weight = weights[((f * w + fx) * h + fy) * d + fd]
                        y[..., f] += weight * padded[fy : fy + h_in, fx : fx + w_in, fd]
        x = np.maximum(y + bias, 0)
        if int(after[5:].split("_")[0]) - number == 3:
            x = x.reshape(h_in // 2, 2, w_in // 2, 2, n).max((1, 3))
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


NETWORKS = {
    "one block": {"layer1_conv": (3, 3, 1, 4), "layer4_fc": (36, 3)},
    "blocks of two, a hidden layer": {
        "layer1_conv": (3, 3, 2, 4),
        "layer3_conv": (3, 3, 4, 4),
        "layer6_conv": (3, 3, 4, 5),
        "layer8_conv": (3, 3, 5, 5),
        "layer11_fc": (20, 7),
        "layer13_fc": (7, 2),
    },
    "no pool": {
        "layer1_conv": (5, 5, 3, 2),
        "layer3_conv": (5, 5, 2, 3),
        "layer5_fc": (48, 10),
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_are_read_as_they_are_written(name, tmp_path):
    sizes = NETWORKS[name]
    made = write(tmp_path, sizes)
    bundle = convnetjs.load(tmp_path)
    shape = (2, *bundle.preprocessing["input_shape"])
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    want = [original(made, sizes, image / 255 - 0.5) for image in images]
    got = bundle.predict_fn()(images)
    np.testing.assert_allclose(got, want, atol=2e-6)
    outputs = sizes[list(sizes)[-1]][1]
    assert bundle.classes == tuple(f"class {i}" for i in range(outputs))


@pytest.fixture
def snapshot(tmp_path):
    write(tmp_path, {"layer1_conv": (3, 3, 1, 4), "layer4_fc": (36, 3)})
    return tmp_path


def edit(path, line, text):
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "file, line, text, message",
    [
        ("layer1_conv.txt", 7, "0.5x", r"layer1_conv.txt: line 7: '0.5x' is no number"),
        ("layer1_conv.txt", 7, "nan", "line 7: 'nan' is no number"),
        ("layer1_conv.txt", 7, "1_0", "line 7: '1_0' is no number"),
        ("layer1_conv.txt", 7, "1e99", "line 7: '1e99' is no number"),
        ("layer1_conv.txt", 7, "", "line 7: '' is no number"),
        ("layer1_conv.txt", 41, "1\n2", r"line 42: there is more; .* 36 .* 4 .* 41"),
        ("layer1_conv.txt", 1, "3 3 4", "line 1: .*'3 3 4'.* 4 sizes"),
        ("layer1_conv.txt", 1, "3 -3 1 4", "line 1: .* 4 sizes"),
        ("layer1_conv.txt", 1, "3 3 1 99", "line 42: the file ends; .* 891 weights"),
        ("layer1_conv.txt", 1, "9 1 1 4", "line 1: filters of 9x1; want squares"),
        ("layer1_conv.txt", 7, "é", "layer1_conv.txt is no text of numbers"),
        (
            "layer4_fc.txt",
            1,
            "2 37",
            "layer4_fc.txt: line 1: its 2 inputs .* 4 filters",
        ),
        ("layer4_fc.txt", 1, "110 1", "line 1: its 110 inputs are no square map"),
    ],
)
def test_malformed_files_are_named_with_their_line(snapshot, file, line, text, message):
    edit(snapshot / file, line, text)
    with pytest.raises(ConvnetError, match=message):
        convnetjs.load(snapshot)


def test_cut_file_is_named_with_the_line_where_it_ends(snapshot):
    path = snapshot / "layer1_conv.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:30]))
    with pytest.raises(ConvnetError, match="line 31: the file ends; .* 29 numbers"):
        convnetjs.load(snapshot)
    path.write_text("")
    with pytest.raises(ConvnetError, match=r"layer1_conv.txt: line 1: \[\] are not"):
        convnetjs.load(snapshot)


def test_missing_files_and_files_that_do_not_fit_are_named(tmp_path):
    sizes = NETWORKS["blocks of two, a hidden layer"]
    write(tmp_path, sizes)
    for gone, message in {
        "layer1_conv": "layer1_conv.txt, the first layer, is missing",
        "layer3_conv": "between layer1_conv.txt and layer6_conv.txt a file is missing",
        "layer11_fc": "between layer8_conv.txt and layer13_fc.txt a file is missing",
    }.items():
        path = tmp_path / f"{gone}.txt"
        text = path.read_text()
        path.unlink()
        with pytest.raises(ConvnetError, match=message):
            convnetjs.load(tmp_path)
        path.write_text(text)
    (tmp_path / "layer13_fc.txt").unlink()
    write(tmp_path, {"layer3_conv": (3, 3, 6, 4)})
    with pytest.raises(
        ConvnetError, match=r"layer3_conv.*6 inputs, but layer1.* 4 out"
    ):
        convnetjs.load(tmp_path)
    write(tmp_path, {"layer3_conv": (3, 3, 4, 6), "layer6_conv": (3, 3, 6, 5)})
    with pytest.raises(ConvnetError, match="not blocks of as many convolutions"):
        convnetjs.load(tmp_path)
    (tmp_path / "layer01_conv.txt").write_text("")
    with pytest.raises(ConvnetError, match="same layer"):
        convnetjs.load(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        convnetjs.load(tmp_path / "absent")


def test_one_output_is_no_classifier(snapshot):
    write(snapshot, {"layer4_fc": (36, 1)})
    with pytest.raises(ConvnetError, match="layer4_fc.txt: line 1: 1 output; want"):
        convnetjs.load(snapshot)


def test_labels_are_counted(snapshot):
    assert convnetjs.load(snapshot, ("a", "b", "c")).classes == ("a", "b", "c")
    with pytest.raises(UsageError, match="2 labels for the 3 outputs of .*layer4_fc"):
        convnetjs.load(snapshot, ("a", "b"))
