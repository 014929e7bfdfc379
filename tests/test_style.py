"""Style transfer: losses, gradients, minimisers, tiles and colours."""

import jax.numpy as jnp
import numpy as np
import pytest
from style_pictures import YIQ, small_vgg, smooth

from convnet import models
from convnet.style import (
    colour,
    features,
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


@pytest.fixture(scope="module")
def bundle():
    return small_vgg()


@pytest.fixture(scope="module")
def base(bundle):
    return features.create(bundle)


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
    # The Gram matrix of the whole is one sum over 112,640 places, in float32.
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-3)
    for name in whole.terms:
        np.testing.assert_allclose(cut.terms[name], whole.terms[name], rtol=1e-3)
    size = float(jnp.abs(whole.gradient).max())
    np.testing.assert_allclose(
        cut.gradient, whole.gradient, rtol=1e-3, atol=1e-3 * size
    )


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


def test_waves_of_every_length_are_minimised_alike():
    """A loss as steep along fine waves as those of networks are."""
    size, rng = 32, np.random.default_rng(0)
    frequencies = [2 * np.pi * np.fft.fftfreq(size)] * 2
    steep = 4 - 2 * np.cos(frequencies[0])[:, None] - 2 * np.cos(frequencies[1])
    coarse = np.fft.fft2(rng.standard_normal((size, size, 1)), axes=(0, 1))
    coarse = np.fft.ifft2(coarse / (0.1 + steep[..., None]), axes=(0, 1)).real
    target = jnp.asarray(0.5 + 0.4 * coarse / np.abs(coarse).max(), jnp.float32)

    def evaluate(x):
        error = x - target
        around = sum(jnp.roll(error, s, a) for s in (1, -1) for a in (0, 1))
        gradient = 0.02 * error + 4 * error - around
        loss = 0.5 * jnp.vdot(error, gradient)
        terms = {"content": loss, "style": 0.0 * loss, "tv": 0.0 * loss}
        return objective.Evaluation(loss, terms, gradient)

    start = jnp.full_like(target, 0.5)
    *_, last = minimize.lbfgs(evaluate, start, 12)
    assert last.terms["content"] < 0.005 * float(evaluate(start).loss)


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


def test_a_grey_start_stays_within_the_picture():
    noise = pictures.noise((40, 30, 3), 5)
    np.testing.assert_array_equal(noise, pictures.noise((40, 30, 3), 5))
    assert 0 <= noise.min() and noise.max() <= 1 and 0.08 < noise.std() < 0.12
