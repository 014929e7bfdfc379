"""The app of style transfer: which layers it takes, what it writes and refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from style_pictures import YIQ, make_bundle, small_vgg, smooth

from convnet import bundle as bundle_lib
from convnet import cli, stylize
from convnet.errors import ConvnetError, UsageError
from convnet.style import features, frames, pictures

STYLE = tuple(f"base/block{n}/relu1" for n in range(1, 6))


@pytest.fixture(scope="module")
def bundle():
    return small_vgg()


@pytest.fixture(scope="module")
def base(bundle):
    return features.create(bundle)


def test_taps_for_a_vgg_are_those_of_the_paper():
    base = features.create(make_bundle("vgg19", width=1, dense=(), gather="global"))
    content, style = features.choose(base)
    assert content == ("base/block4/relu2",)
    assert style == STYLE
    assert [base.strides()[name] for name in style] == [1, 2, 4, 8, 16]
    assert features.choose(base, "base/block1/conv1")[0] == ("base/block1/conv1",)


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
        features.choose(base, "", "base/block2/relu7")
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
