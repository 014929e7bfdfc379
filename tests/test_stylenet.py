"""Fast style transfer: the network, its task, and the app that paints with it."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy_layers import draw_variables, numpy_conv, tapped
from PIL import Image
from style_pictures import small_vgg, smooth
from test_style import CONTENT, STYLE, WEIGHTS, numpy_terms
from test_stylize import run_app

from convnet import bundle as bundle_lib
from convnet import cli, evaluate, explain, models, predict, stylize
from convnet.errors import UsageError
from convnet.models import layers, lowering
from convnet.style import colour, features, objective, painting, pictures
from convnet.style.task import Style


@pytest.fixture(scope="module")
def network():
    model = models.create("stylenet", num_outputs=3, width=2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 13, 10, 3)).astype(np.float32)
    return model, draw_variables(model, x, rng), x


def numpy_stylenet(params, x):
    """In float64, from the paper's description."""

    def convolve(x, layer, stride=1):
        edge = len(layer["kernel"]) // 2
        x = np.pad(x, [(0, 0), (edge,) * 2, (edge,) * 2, (0, 0)], mode="reflect")
        bias = layer.get("bias", 0.0)
        return numpy_conv(x, layer["kernel"], stride, "VALID", bias)

    def normalize(x, layer):
        spread = np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
        return (x - x.mean((1, 2), keepdims=True)) / spread * layer["scale"] + layer[
            "bias"
        ]

    def stage(x, part, stride=1):
        x = convolve(x, part["conv"], stride)
        return np.maximum(normalize(x, part["norm"]), 0)

    base, sizes = params["base"], []
    x = stage(np.asarray(x, np.float64), base["stem"])
    for name in ("stage1", "stage2"):
        sizes.append(x.shape[1:3])
        x = stage(x, base[name], 2)
    for block in (base["stage3"][f"block{i}"] for i in range(1, 6)):
        y = np.maximum(normalize(convolve(x, block["conv1"]), block["norm1"]), 0)
        x = x + normalize(convolve(y, block["conv2"]), block["norm2"])
    for name in ("stage4", "stage5"):
        h, w = sizes.pop()
        x = stage(np.kron(x, np.ones((1, 2, 2, 1)))[:, :h, :w], base[name])
    return 0.5 + 0.5 * np.tanh(convolve(x, params["head"]["conv"]))


@pytest.mark.parametrize("plain", [False, True])
def test_the_network_is_that_of_the_paper(network, plain, monkeypatch):
    model, variables, x = network
    if plain:
        monkeypatch.setattr(lowering, "is_plain", lambda: True)
    painted, taps = tapped(model, variables, x)
    assert painted.shape == x.shape and painted.dtype == np.float32
    assert taps["base/stage2/relu"].shape == (2, 4, 3, 8)
    assert list(taps)[-1] == "head/picture"
    wanted = numpy_stylenet(variables["params"], x)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(painted, wanted, atol=2e-4)


def test_normalisation_has_the_gradient_of_its_plain_form(network):
    x = network[2]
    norm = layers.InstanceNorm()
    variables = draw_variables(norm, x, np.random.default_rng(1), False)

    def gradient():
        def loss(variables, x):
            return (norm.apply(variables, x, True, "relu")[..., 0] ** 3).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(variables, x)

    ours = gradient()
    with lowering.plain():
        plain = gradient()
    for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_the_loss_of_each_picture_agrees_with_numpy():
    bundle = small_vgg()
    base = features.create(bundle).only(CONTENT, STYLE)
    style = smooth((64, 64), 9)
    maps = base.only(STYLE)(base.variables, style)
    grams = {name: objective.gram(array) for name, array in maps.items()}
    held = {"variables": base.variables, "grams": grams}
    task = Style(base, CONTENT, WEIGHTS, "", held)
    painted, wanted = (
        np.stack([smooth((64, 48), seed) for seed in seeds])
        for seeds in ((0, 1), (2, 3))
    )
    # The arrays are given to what is compiled.
    run = jax.jit(lambda held: task.holding(held).metrics(painted, wanted))
    found = run(held)
    for i in range(2):
        terms = numpy_terms(bundle, painted[i], wanted[i], style, True)
        for name, value in terms.items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-4)
        np.testing.assert_allclose(found["loss"][i], sum(terms.values()), rtol=1e-4)
    other = run({**held, "grams": jax.tree.map(np.zeros_like, grams)})
    assert np.all(other["style"] != found["style"])
    np.testing.assert_array_equal(other["content"], found["content"])
    picture = np.float32([[[[-0.1, 0.5, 1.2]]]])
    assert task.predict(picture).tolist() == [[[[0, 128, 255]]]]


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylenet")
    bundle = dataclasses.replace(
        small_vgg(),
        architecture={"name": "stylenet", "num_outputs": 3, "options": {"width": 2}},
        task={"name": "style", "positive": None},
        classes=(),
        variables=network[1],
    )
    bundle_lib.save(folder / "model.safetensors", bundle)
    for name, shape in (("a.png", (96, 64)), ("b.PNG", (40, 80)), ("in/c.gif", (9, 9))):
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures.to_uint8(smooth(shape, 0))).save(path)
    (folder / "pictures/broken.png").write_bytes(b"no picture")
    return folder


def test_a_folder_is_painted(network, folder, monkeypatch, capsys):
    monkeypatch.setattr(stylize.mesh, "start", lambda cache: None)
    out = folder / "painted"
    given = [f"--model={folder / 'model.safetensors'}", "--size=64"]
    given += [f"--content={folder / 'pictures'}", f"--output={out}"]
    values = cli.parse(["stylize", *given], stylize.define, "")
    assert stylize.main(values) == 3
    said = capsys.readouterr()
    assert "painted 3 of 4 pictures" in said.out and "broken.png: not an" in said.err
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == ["a.png", "b.PNG", "in/c.gif.png"]
    read = [pictures.read("content", str(out / name)) for name in files]
    assert [pixels.shape for pixels in read] == [(64, 43, 3), (32, 64, 3), (64, 64, 3)]
    # Of sides that are not filled up, what the network says and nothing else.
    picture = pictures.read("content", str(folder / "pictures/b.PNG"))
    content = pictures.resize(picture, (32, 64))
    wanted = numpy_stylenet(network[1]["params"], (content[None] - 0.4) / 0.3)[0]
    assert np.abs(read[1].astype(int) - pictures.to_uint8(wanted)).max() <= 1


def test_a_picture_is_filled_up_and_cut_and_may_keep_its_colours():
    shapes = []

    class Negative:
        variables = {}

        def logits(self, variables, inputs, dtype):
            shapes.append(inputs.shape)
            return 1 - inputs

    picture = pictures.to_uint8(smooth((50, 70), 0))
    negative = painting.Painter(Negative(), 70, False, "float32")(picture)
    np.testing.assert_array_equal(negative, 255 - picture)
    kept = painting.Painter(Negative(), 70, True, "float32")(picture)
    assert shapes == [(1, 64, 96, 3)] * 2
    grey, wanted = (colour.luminance(x / 255) for x in (kept, 255 - picture))
    np.testing.assert_allclose(grey, wanted, atol=0.01)
    assert np.abs(kept.astype(int) - negative).max() > 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"style": "{folder}/pictures/a.png"}, "it is a style network"),
        ({"steps": 3}, "--steps is for transfers that optimise"),
        ({"model": "cifar10"}, "--style is missing: --model=cifar10 is no network"),
        ({"model": stylize.VGG19}, "--style is missing"),
        ({"output": "{folder}/pictures/new"}, "outside of --content"),
        ({"content": "{folder}/pictures/a.png", "output": "{folder}/pictures"}, "repl"),
        ({"output": "{folder}/model.safetensors"}, "a file; want a folder"),
        ({"content": "nowhere"}, "--content=nowhere: no such file or folder"),
    ],
)
def test_what_does_not_go_with_a_style_network_is_refused(
    folder, monkeypatch, flags, message
):
    monkeypatch.setattr(stylize.mesh, "start", lambda cache: None)
    given = {
        "model": folder / "model.safetensors",
        "content": folder / "pictures/a.png",
        "output": folder / "new.png",
    }
    if "output" in flags and "content" not in flags:
        given["content"] = folder / "pictures"
    given |= {name: str(value).format(folder=folder) for name, value in flags.items()}
    with pytest.raises(UsageError, match=message):
        run_app([f"--{name}={value}" for name, value in given.items()])
    assert not (folder / "new.png").exists()


def test_other_apps_say_that_it_has_no_answers(folder, monkeypatch):
    model, picture = folder / "model.safetensors", str(folder / "pictures/a.png")
    for app in (predict, explain):
        monkeypatch.setattr(app.mesh, "start", lambda *unused: None)
        given = [f"--model={model}", f"--output={folder / 'answers'}"]
        if app is predict:
            given[1] += ".csv"
        values = cli.parse([app.__name__, *given, picture], app.define, "", [])
        with pytest.raises(UsageError, match="style network.*convnet.stylize"):
            app.main(values, [picture])
    given = [f"--model={model}", "--config=experiments/digits.py"]
    values = cli.parse(["evaluate", *given], evaluate.define, "")
    with pytest.raises(UsageError, match="want the experiment that trained it"):
        evaluate.main(values)
