"""Attribution methods: against PyTorch, against closed forms, and sanity checks."""

import importlib.util
import os
import sys

import jax
import numpy as np
import pytest
from numpy_layers import draw_variables

from benchmarks.explain import alike, hits, quarters, randomized, torch_maps
from convnet import bundle as bundle_lib
from convnet import models
from convnet.explaining import attribution, layers
from convnet.explaining.answers import Answers
from convnet.explaining.network import Network
from convnet.explaining.study import METHODS, Study


def make_network(options, shape, outputs, seed=0, **about):
    model = models.create("cnn", num_outputs=outputs, **options)
    rng = np.random.default_rng(seed)
    variables = draw_variables(model, np.zeros((1, *shape), np.float32), rng)
    bundle = bundle_lib.Bundle(
        architecture={"name": "cnn", "num_outputs": outputs, "options": options},
        task={"name": "classification", "positive": None},
        classes=tuple(f"class {i}" for i in range(outputs)),
        preprocessing={
            "input_shape": shape,
            "input_dtype": "float32",
            "resize": "crop",
            "mean": (0.0,),
            "std": (1.0,),
        },
        provenance={},
        variables=variables,
    )
    return Network(bundle)


@pytest.fixture(scope="module")
def torch_python():
    """A Python that has PyTorch, ours or that of the benchmarks' peers."""
    if importlib.util.find_spec("torch"):
        return sys.executable
    named = os.environ.get("CONVNET_PEER_PYTHON")
    if not named:
        pytest.skip("needs PyTorch: no torch here, and CONVNET_PEER_PYTHON is not set")
    return named


@pytest.fixture(scope="module")
def small():
    """A network with max pools, inputs, and the class to explain."""
    shape = (12, 10, 3)
    options = {"widths": (6, 5), "depth": 1, "gather": "flatten"}
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    return make_network(options, shape, 4), x, 1


def directions(network, rows, index):
    return np.tile(np.eye(network.outputs[0], dtype=np.float32)[index], (rows, 1))


def test_methods_are_those_of_an_independent_implementation(small, torch_python):
    network, x, index = small
    peer = torch_maps(torch_python, network, x, index)

    wanted = directions(network, len(x), index)
    maps, gradients = network.at_tap(x, wanted, "base/block2/relu1")
    cam = attribution.grad_cam(maps, gradients)
    np.testing.assert_allclose(cam, peer["cam"], rtol=1e-4, atol=1e-5)
    resized = attribution.upsample(cam, x.shape[1:3])
    np.testing.assert_allclose(resized, peer["upsampled"], rtol=1e-4, atol=1e-5)
    plus = attribution.grad_cam_plus_plus(maps, gradients)
    assert np.all(plus.max((1, 2)) > 0)
    np.testing.assert_allclose(
        plus / plus.max((1, 2), keepdims=True),
        # The peer keeps the exponential of the score, one factor for the map.
        peer["plus"] / peer["plus"].max((1, 2), keepdims=True),
        rtol=1e-3,
        atol=1e-4,
    )
    guided = network.gradient(x, wanted, attribution.guided)
    np.testing.assert_allclose(guided, peer["guided"], rtol=1e-4, atol=1e-5)
    found, errors, _ = attribution.integrated_gradients(
        lambda points, rows: network.gradient(points, wanted[rows]),
        lambda points: network.logits(points)[:, index],
        x,
        np.zeros_like(x),
    )
    assert errors.max() < 0.01
    close = np.abs(found - peer["integrated"]).max()
    assert close < 0.01 * np.abs(peer["integrated"]).max()


def test_integrated_gradients_are_complete_and_exact_where_that_is_known():
    rng = np.random.default_rng(0)
    x, baseline = rng.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    weights = rng.standard_normal(x.shape[1:]).astype(np.float32)

    def score(points):  # of degree three: the middles of 32 steps miss it by 2e-4
        return (weights * points**3).reshape(len(points), -1).sum(1)

    found, errors, steps = attribution.integrated_gradients(
        lambda points, rows: 3 * weights * points**2, score, x, baseline
    )
    np.testing.assert_allclose(
        found, weights * (x**3 - baseline**3), rtol=2e-3, atol=5e-3
    )
    total = found.reshape(3, -1).sum(1)
    difference = score(x) - score(baseline)
    np.testing.assert_allclose(np.abs(total / difference - 1), errors, atol=1e-5)
    assert (errors <= 0.005).all() and steps.min() == 32
    # A rise from 0 to 1 close to the end: the number of steps must double, and where
    # even the last doubling misses the tolerance, the error says so.
    sharp = np.ones((1, 1, 1), np.float32)
    width = 1 / 50
    _, errors, steps = attribution.integrated_gradients(
        lambda points, rows: (points > 1 - width) / np.float32(width),
        lambda points: np.maximum(points[:, 0, 0] - 1 + width, 0) / width,
        sharp,
        np.zeros_like(sharp),
    )
    assert steps[0] == 1024 and 0.005 < errors[0] < 0.03


def test_smooth_grad_is_the_mean_gradient_of_noisy_copies():
    x = np.stack([np.zeros((40, 50, 1)), np.linspace(0, 4, 2000).reshape(40, 50, 1)])
    x = x.astype(np.float32)
    seen = []

    def gradient(points, rows):
        seen.append((points, rows))
        return points

    found = attribution.smooth_grad(gradient, x, noise=0.25, samples=16)
    np.testing.assert_array_equal(found[0], 0)  # without range there is no noise
    deviation = (found[1] - x[1]).std()
    assert 0.9 < deviation / (0.25 * 4 / 4) < 1.1  # of 16 draws' mean
    points = np.concatenate([p for p, _ in seen])
    rows = np.concatenate([r for _, r in seen])
    assert len(points) == 32
    assert 0.95 < (points[rows == 1] - x[1]).std() / (0.25 * 4) < 1.05


@pytest.mark.parametrize("spatial", [(11,), (7, 10), (4, 5, 6)])
def test_occlusion_gives_every_place_the_mean_drop_of_its_windows(spatial):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, *spatial, 2)).astype(np.float32)
    weights = rng.standard_normal((2, *spatial, 2)).astype(np.float32)
    window = tuple(min(3, side) for side in spatial)

    def answer(points, rows):
        return (points * weights[rows]).reshape(len(points), -1).sum(1)

    found = attribution.occlusion(answer, x, 0.5, window, (2,) * len(spatial))
    total, count = np.zeros(x.shape[:-1]), np.zeros(spatial)
    starts = [
        sorted({*range(0, side - k + 1, 2), side - k})
        for side, k in zip(spatial, window, strict=True)
    ]
    for corner in np.stack(np.meshgrid(*starts), -1).reshape(-1, len(spatial)):
        box = tuple(slice(i, i + k) for i, k in zip(corner, window, strict=True))
        inside = (slice(None), *box)
        drop = ((x[inside] - 0.5) * weights[inside]).reshape(2, -1).sum(1)
        total[inside] += drop.reshape(-1, *[1] * len(spatial))
        count[box] += 1
    assert count.min() >= 1
    np.testing.assert_allclose(found, total / count, rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_what_a_network_says(small):
    network, x, index = small
    points = np.random.default_rng(5).standard_normal((40, *network.shape))
    model, variables = network.bundle.model(), network.bundle.variables
    plain = model.apply(variables, points.astype(np.float32))
    assert network.batch_size == 32
    np.testing.assert_allclose(network.logits(points), plain, rtol=1e-4, atol=1e-4)
    wanted = np.random.default_rng(6).standard_normal((40, 4)).astype(np.float32)
    gradient = jax.grad(lambda p: (model.apply(variables, p) * wanted).sum())
    np.testing.assert_allclose(
        network.gradient(points, wanted),
        gradient(points.astype(np.float32)),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.fixture(scope="module")
def shipped(shared_data):
    """The model that ships, and pictures of CIFAR-10 that it is sure of."""
    network = Network(bundle_lib.load("cifar10"))
    with np.load(shared_data / "convnetjs_cifar10" / "images_0.npz") as file:
        images = file["images"][:48]
    return network, images


def test_random_weights_change_the_maps(shipped):
    network, images = shipped
    x = network.normalize(images[:8])
    answers = Answers(network.bundle, network.outputs)
    targets = [answers.target(answers.strongest(row)) for row in network.logits(x)]
    other = network.with_variables(randomized(network.bundle.variables))
    layer = layers.last(layers.maps(network.shapes, 2))
    # Guided back-propagation is the one that Adebayo et al. found wanting.
    for method in METHODS[:-1]:
        count = 2 if method == "integrated_gradients" else 4  # 300 gradients each
        ours, theirs = (
            Study(net, answers, x[:count], layer).run(method, targets[:count]).heat
            for net in (network, other)
        )
        assert alike(ours, theirs) < 0.5, method


def test_maps_point_at_the_object(shipped):
    network, images = shipped
    canvas, boxes = quarters(network, images[:16])
    x = network.normalize(canvas)
    answers = Answers(network.bundle, network.outputs)
    targets = [answers.target(answers.strongest(row)) for row in network.logits(x)]
    studied = Study(network, answers, x, "base/group3/gelu2")
    for method, least in (("grad_cam", 0.6), ("grad_cam++", 0.7), ("occlusion", 0.8)):
        heat = studied.run(method, targets).heat
        assert hits(heat, boxes) >= least, method  # chance: 0.25
