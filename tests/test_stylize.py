"""Style transfer: losses, gradients, minimisers, tiles, colours, and the app."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw_variables
from PIL import Image

from convnet import bundle as bundle_lib
from convnet import cli, models, stylize
from convnet.errors import ConvnetError, UsageError
from convnet.style import (
    colour,
    features,
    frames,
    minimize,
    objective,
    pictures,
    tiles,
    transfer,
)
from convnet.style.objective import Weights

CONTENT = ("base/block4/relu1",)
STYLE = tuple(f"base/block{n}/relu1" for n in range(1, 6))
WEIGHTS = Weights(content=2.0, style=3.0, tv=4.0)


def make_bundle(name, channels=3, **options):
    model = models.create(name, num_outputs=2, **options)
    rng = np.random.default_rng(0)
    shape = (32, 32, channels)
    variables = draw_variables(model, np.zeros((1, *shape), np.float32), rng)
    return bundle_lib.Bundle(
        architecture={"name": name, "num_outputs": 2, "options": options},
        task={"name": "classification", "positive": None},
        classes=("a", "b"),
        preprocessing={
            "input_shape": shape,
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.4,) * channels,
            "std": (0.3,) * channels,
        },
        provenance={},
        variables=variables,
    )


@pytest.fixture(scope="module")
def bundle():
    return make_bundle("vgg11", width=2, dense=(), gather="global", pool="average")


@pytest.fixture(scope="module")
def base(bundle):
    return features.create(bundle)


def smooth(shape, seed):
    """A picture, float32, whose values lie well within 0 and 1."""
    coarse = np.random.default_rng(seed).uniform(0.2, 0.8, (5, 7, 3))
    image = jax.image.resize(jnp.asarray(coarse, jnp.float32), (*shape, 3), "linear")
    return jnp.asarray(image)


def numpy_gram(array):
    flat = np.asarray(array, np.float64).reshape(-1, array.shape[-1])
    total = np.zeros((flat.shape[1],) * 2)
    for row in flat:
        total += np.outer(row, row)
    return total / flat.size


def numpy_terms(bundle, picture, content, style, relative):
    """The loss's terms from the whole network's taps, summed layer by layer."""

    def taps(x):
        inputs = (np.asarray(x)[None] - 0.4) / 0.3
        _, state = bundle.model().apply(bundle.variables, inputs, mutable=["taps"])
        return {
            n: np.asarray(a[0], np.float64)
            for n, a in models.taps(state["taps"]).items()
        }

    ours, kept, painted = taps(picture), taps(content), taps(style)
    terms = {"content": 0.0, "style": 0.0}
    for name in CONTENT:
        error = np.mean((ours[name] - kept[name]) ** 2)
        terms["content"] += error / np.mean(kept[name] ** 2) if relative else error
    for name in STYLE:
        wanted = numpy_gram(painted[name])
        error = np.mean((numpy_gram(ours[name]) - wanted) ** 2)
        terms["style"] += error / np.mean(wanted**2) / len(STYLE) if relative else error
    x = np.asarray(picture, np.float64)
    down, right = x[1:] - x[:-1], x[:, 1:] - x[:, :-1]
    tv = (down**2).mean() + (right**2).mean()
    return {"content": 2 * terms["content"], "style": 3 * terms["style"], "tv": 4 * tv}


@pytest.mark.parametrize("relative", [True, False])
def test_terms_agree_with_numpy(bundle, base, relative):
    picture, content, style = (smooth((64, 48), seed) for seed in range(3))
    evaluate = objective.Objective(
        base, content, style, (CONTENT, STYLE), WEIGHTS, relative
    )
    found = evaluate(picture)
    wanted = numpy_terms(bundle, picture, content, style, relative)
    assert found.terms.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name] > 0
        np.testing.assert_allclose(found.terms[name], wanted[name], rtol=1e-4)
    np.testing.assert_allclose(found.loss, sum(wanted.values()), rtol=1e-4)


def test_the_gradient_agrees_with_finite_differences(base):
    picture, content, style = (smooth((64, 48), seed) for seed in range(3))
    evaluate = objective.Objective(base, content, style, (CONTENT, STYLE), WEIGHTS)
    gradient = evaluate(picture).gradient
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal(picture.shape)
        # Along the gradient as well, or the derivative is lost in rounding.
        direction = jnp.asarray(noise / np.linalg.norm(noise), jnp.float32)
        direction += gradient / jnp.linalg.norm(gradient)
        step = 0.02
        high, low = (evaluate(picture + s * direction).loss for s in (step, -step))
        slope = (float(high) - float(low)) / (2 * step)
        np.testing.assert_allclose(slope, jnp.vdot(gradient, direction), rtol=0.02)


def test_nothing_behind_the_deepest_tap_is_computed(base):
    picture = smooth((64, 64), 0)
    taps = (("base/block2/relu1",), ("base/block1/relu1",))
    evaluate = objective.Objective(base, picture, picture, taps, WEIGHTS)
    arguments = (base.variables, picture, evaluate.targets)
    text = evaluate.run.lower(*arguments).compile().as_text()
    calls = [
        line
        for line in text.splitlines()
        if "dim_labels=" in line or "onednn$conv" in line
    ]
    # Two convolutions, and the gradient of each by its input.
    assert len(calls) == 4, calls


@pytest.mark.parametrize("relative", [True, False])
def test_tiles_give_the_loss_and_gradient_of_the_whole(base, relative):
    content, picture = (smooth((352, 320), seed) for seed in range(2))
    style = smooth((384, 352), 2)
    arguments = (base, content, style, (CONTENT, STYLE), WEIGHTS, relative)
    whole = objective.Objective(*arguments)(picture)
    tiled = tiles.TiledObjective(*arguments, size=320)
    assert len(tiled.cuts) == 2
    cut = tiled(picture)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-5)
    for name in whole.terms:
        np.testing.assert_allclose(cut.terms[name], whole.terms[name], rtol=1e-4)
    size = float(jnp.abs(whole.gradient).max())
    np.testing.assert_allclose(cut.gradient, whole.gradient, atol=1e-4 * size)


@pytest.mark.parametrize("side", [256, 1024, 1056, 1792, 1824, 4000])
def test_cores_cover_a_side_once_and_have_margins(side):
    seen = np.zeros(side, int)
    for tile in tiles.plan((side, 64), 1024):
        start, (low, high) = tile.start[0], tile.core[0]
        stop = min(start + 1024, side)
        seen[low:high] += 1
        assert low - start >= tiles.MARGIN or start == 0
        assert stop == side if high is None else stop - high >= tiles.MARGIN
    assert (seen == 1).all()


def quadratic(scale, target):
    def evaluate(x):
        loss = jnp.sum(scale * jnp.square(x - target))
        terms = {"content": loss, "style": 0.0 * loss, "tv": 0.0 * loss}
        return objective.Evaluation(loss, terms, 2 * scale * (x - target))

    return evaluate


@pytest.mark.parametrize(("name", "steps"), [("lbfgs", 60), ("adam", 400)])
def test_minimisers_find_the_minimum_on_the_box(name, steps):
    rng = np.random.default_rng(0)
    scale = jnp.asarray(np.exp(rng.uniform(-2, 2, (6, 5, 3))), jnp.float32)
    target = jnp.asarray(rng.uniform(-0.5, 1.5, (6, 5, 3)), jnp.float32)
    run = minimize.MINIMIZERS[name]
    found = list(run(quadratic(scale, target), jnp.full_like(target, 0.5), steps))
    counts = [step.evaluations for step in found]
    assert counts == list(range(1, len(found) + 1)) and counts[-1] <= steps
    last = found[-1].picture
    np.testing.assert_allclose(last, np.clip(target, 0, 1), atol=5e-3)
    if name == "lbfgs":
        losses = [step.terms["content"] for step in found]
        assert all(np.diff(losses) <= 0)


def test_a_transfer_is_repeated_bit_for_bit(base):
    content, style = (pictures.to_uint8(smooth((64, 64), seed)) for seed in range(2))

    def run(seed):
        settings = transfer.Settings(
            (CONTENT, STYLE), WEIGHTS, start="noise", seed=seed
        )
        plan = transfer.levels(content.shape, 64, 6, 2, 16)
        steps = list(transfer.Transfer(base, content, style, settings, plan))
        return steps, np.asarray(steps[-1].picture)

    steps, picture = run(0)
    assert picture.shape == (64, 64, 3) and steps[0].picture.shape == (32, 32, 3)
    assert [step.evaluations for step in steps] == list(range(1, 10))
    losses = [sum(step.terms.values()) for step in steps]
    assert losses[5] < 0.8 * losses[0]
    np.testing.assert_array_equal(picture, run(0)[1])
    assert np.abs(picture - run(1)[1]).max() > 0.01


def test_levels_double_and_their_steps_halve():
    plan = transfer.levels((400, 600, 3), 1500, 300, 0, 32)
    assert [(a.height, a.width) for a in plan] == [(250, 375), (500, 750), (992, 1504)]
    assert [a.evaluations for a in plan] == [300, 150, 75]
    assert [a.tiled for a in plan] == [False, False, True]
    (only,) = transfer.levels((400, 600, 3), 256, 300, 0, 32)
    assert (only.height, only.width) == (171, 256)


def test_taps_for_a_vgg_are_those_of_the_paper():
    base = features.create(make_bundle("vgg19", width=1, dense=(), gather="global"))
    content, style = features.choose(base)
    assert content == ("base/block4/relu2",)
    assert style == STYLE
    assert [base.strides()[name] for name in style] == [1, 2, 4, 8, 16]
    assert features.choose(base, ["base/block1/conv1"])[0] == ("base/block1/conv1",)


@pytest.mark.parametrize(
    ("name", "options", "content", "style"),
    [
        (
            "resnet18",
            {"width": 2, "stem": "imagenet"},
            "stage3/block1/relu",
            ["stem/relu", *(f"stage{n}/block1/relu1" for n in range(1, 5))],
        ),
        (
            "speednet",
            {},
            "group2/gelu2",
            ["stem/gelu", *(f"group{n}/gelu1" for n in (1, 2, 3))],
        ),
    ],
)
def test_taps_for_other_networks(name, options, content, style):
    base = features.create(make_bundle(name, **options))
    assert features.choose(base) == (
        (f"base/{content}",),
        tuple(f"base/{tap}" for tap in style),
    )


def test_wrong_layers_models_and_sizes_are_refused(base, bundle):
    with pytest.raises(UsageError, match=r"--style_layers.*nearest.*base/block2/relu1"):
        features.choose(base, (), ["base/block2/relu7"])
    with pytest.raises(UsageError, match="RGB"):
        features.create(make_bundle("cnn", channels=1))
    with pytest.raises(UsageError, match="too small"):
        base.shapes(16, 64)
    with pytest.raises(UsageError, match="no choice of pools"):
        features.create(make_bundle("resnet9", width=2), pool="average")
    pools = [
        features.create(bundle, pool)(base.variables, smooth((64, 64), 0))
        for pool in ("", "average", "max")
    ]
    assert (pools[0]["base/block1/pool"] == pools[1]["base/block1/pool"]).all()
    assert (pools[0]["base/block1/pool"] < pools[2]["base/block1/pool"]).any()


YIQ = np.linalg.inv(
    [[1, 0.956, 0.619], [1, -0.272, -0.647], [1, -1.106, 1.703]]
)  # another source's constants, of three digits


def test_only_the_luminance_changes():
    content = np.asarray(smooth((20, 30), 0)) * 0.2 + 0.4
    grey = np.random.default_rng(0).uniform(0.4, 0.6, (20, 30, 1)).astype(np.float32)
    result = colour.with_luminance(content, grey)
    np.testing.assert_allclose(colour.luminance(result), grey, atol=1e-5)
    np.testing.assert_allclose(result @ YIQ[1:].T, content @ YIQ[1:].T, atol=3e-3)
    # Where no colour has both, it is paler, and the luminance still right.
    bright = np.float32([[[1.0, 0.2, 0.1]]])
    result = colour.with_luminance(bright, np.float32([[[0.9]]]))
    np.testing.assert_allclose(colour.luminance(result), 0.9, atol=1e-5)
    assert result.max() <= 1
    before, after = ((x @ YIQ[1:].T).ravel() for x in (bright, result))
    assert np.dot(before, after) == pytest.approx(
        np.linalg.norm(before) * np.linalg.norm(after), rel=1e-3
    )


def test_colours_and_luminance_are_matched():
    rng = np.random.default_rng(0)
    mix = rng.uniform(-0.05, 0.05, (3, 3))
    content = (0.5 + rng.standard_normal((30, 40, 3)) @ mix).clip(0, 1)
    style = rng.uniform(0, 1, (50, 20, 3))
    moved = colour.matched_colours(style, content).reshape(-1, 3)
    flat = content.reshape(-1, 3)
    np.testing.assert_allclose(moved.mean(0), flat.mean(0), atol=1e-3)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(flat.T), atol=3e-4)
    grey = colour.matched_luminance(style[..., :1], content[..., :1])
    assert grey.mean() == pytest.approx(content[..., 0].mean(), abs=1e-5)
    assert grey.std() == pytest.approx(content[..., 0].std(), abs=1e-5)


def test_frames_of_an_earlier_run_go_away(tmp_path):
    for numbers in ([1, 2, 3], [5]):
        kept = frames.Frames(tmp_path / "a.png", "webp")
        for number in numbers:
            kept.add(number, np.full((600, 300, 3), 40 * number, np.uint8))
        kept.finish(np.zeros((600, 300, 3), np.uint8))
    assert [path.name for path in kept.folder.iterdir()] == ["000005.png"]
    with Image.open(kept.animation) as animation:
        assert animation.n_frames == 2 and animation.size == (256, 512)


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylize")
    bundle_lib.save(folder / "model.safetensors", bundle)
    for name, seed in (("content", 0), ("style", 1)):
        pixels = pictures.to_uint8(smooth((96, 64), seed))
        pictures.write(folder / f"{name}.png", pixels)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def arguments(folder, **flags):
    given = {
        "model": folder / "model.safetensors",
        "content": folder / "content.png",
        "style": folder / "style.png",
        "output": folder / "out.png",
        "size": 64,
        "steps": 6,
    } | flags
    return [f"--{name}={value}" for name, value in given.items()]


def test_the_app_writes_a_picture_and_frames(folder):
    command = [sys.executable, "-m", "convnet.stylize", *arguments(folder, every=2)]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--preserve_colour"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "content: base/block4/relu2" in done.stdout
    assert "43x64: 6 steps" in done.stdout and "after 6 steps" in done.stdout
    with Image.open(folder / "out.png") as image:
        result = np.asarray(image) / 255
    content = pictures.resize(
        np.asarray(Image.open(folder / "content.png")), result.shape[:2]
    )
    assert result.shape == (64, 43, 3)
    assert np.abs(result - content).max() > 0.02
    np.testing.assert_allclose(result @ YIQ[1:].T, content @ YIQ[1:].T, atol=0.02)
    names = sorted(path.name for path in (folder / "out_frames").iterdir())
    assert names == ["000002.png", "000004.png", "000006.png"]
    with Image.open(folder / "out_frames.gif") as animation:
        assert animation.n_frames >= 2


def run_app(given):
    stylize.main(cli.parse(["stylize", *given], stylize.define, ""))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"content": "nowhere.png"}, UsageError, "--content=nowhere.png: no such file"),
        ({"style": "{folder}/broken.png"}, ConvnetError, "broken.png: not an image"),
        ({"output": "a.tiff"}, UsageError, "want a name that ends in"),
        ({"output": "nowhere/a.png"}, UsageError, "folder that is there"),
        ({"model": "cifar11"}, UsageError, "did you mean 'cifar10'"),
        ({"style_layers": "block3"}, UsageError, "base/block3"),
        ({"size": 32}, UsageError, "too small"),
    ],
)
def test_what_is_wrong_is_said(folder, monkeypatch, flags, error, message):
    monkeypatch.setattr(stylize.mesh, "start", lambda cache: None)
    flags = {name: str(value).format(folder=folder) for name, value in flags.items()}
    with pytest.raises(error, match=message) as caught:
        run_app(arguments(folder, **flags))
    assert isinstance(caught.value, UsageError) == (error is UsageError)


def test_a_model_that_is_not_at_hand_is_explained(folder, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(stylize.mesh, "start", lambda cache: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    with pytest.raises(ConvnetError, match="--model also takes a file"):
        run_app(arguments(folder, model=stylize.VGG19))


def test_an_interrupted_transfer_leaves_the_picture_so_far(folder, monkeypatch):
    monkeypatch.setattr(stylize.mesh, "start", lambda cache: None)
    show = stylize.Progress.show

    def interrupt(self, step, *rest):
        show(self, step, *rest)
        if step == 3:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(stylize.Progress, "show", interrupt)
    output = folder / "interrupted.png"
    with pytest.raises(cli.Interrupted, match="after 3 of 6 steps") as caught:
        run_app(arguments(folder, output=output))
    assert caught.value.signum == 15
    with Image.open(output) as image:
        assert image.size == (43, 64)


def test_a_grey_start_stays_within_the_picture():
    noise = pictures.noise((40, 30, 3), 5)
    np.testing.assert_array_equal(noise, pictures.noise((40, 30, 3), 5))
    assert 0 <= noise.min() and noise.max() <= 1 and 0.08 < noise.std() < 0.12
