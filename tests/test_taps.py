"""Intermediates: their names, their order, and gradients with respect to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from numpy_layers import small_cnn, tapped

from convnet import models
from convnet.models import layers


@pytest.fixture(scope="module")
def cnn():
    return small_cnn()


@pytest.mark.parametrize("name", models.NAMES)
def test_taps_come_in_network_order(name):
    small = {"width": 2, "dense": (2, 2), "stem": "imagenet", "aux": True}
    small = {key: small[key] for key in small if key in models.options(name)}
    model = models.create(name, num_outputs=2, **small)
    called = []

    def run(x):
        variables = model.init(jax.random.key(0), x)
        assert set(variables) <= {"params", "batch_stats"}
        _, state = model.apply(variables, x, mutable=["taps"])
        called.extend(traverse_util.flatten_dict(state["taps"], sep="/"))
        return state["taps"], variables["params"]

    # What eval_shape returns is sorted by letter, as from any compiled function; the
    # dictionary inside is in the order of the calls.
    side = 299 if name == "inception_v3" else 32
    taps, params = jax.eval_shape(run, jnp.zeros((1, side, side, 3)))
    assert list(models.taps(taps)) == called
    layer_paths = {path[:-1] for path in traverse_util.flatten_dict(params)}
    assert {"/".join(path) for path in layer_paths} <= set(called)


def test_taps_are_what_passed_through(cnn):
    model, variables, x = cnn
    logits, taps = tapped(model, variables, x)
    np.testing.assert_array_equal(logits, taps["head/logits"])
    untapped = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, untapped, rtol=1e-5, atol=1e-5)
    shapes = {name: tap.shape for name, tap in taps.items()}
    assert shapes["base/block1/conv2"] == (4, 9, 8, 4)
    assert shapes["base/block2/pool"] == (4, 2, 2, 5)
    assert shapes["base/features"] == (4, 20)
    assert shapes["head/dense1"] == shapes["head/relu1"] == (4, 7)
    relus = [name for name in taps if "relu" in name]
    assert len(relus) == 5
    for name in relus:
        before = name.replace("relu", "norm" if "base" in name else "dense")
        np.testing.assert_array_equal(taps[name], np.maximum(taps[before], 0))
        assert np.any(taps[before] < 0)


def test_a_second_call_overwrites_taps():
    head, x = layers.Head(2), np.ones((3, 2), np.float32)
    params = {"logits": {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2)}}
    _, state = head.apply({"params": params}, x, mutable=["taps"])
    _, state = head.apply({"params": params, **state}, 2 * x, mutable=["taps"])
    np.testing.assert_array_equal(state["taps"]["logits"], 2 * x)


def test_a_perturbation_gives_the_gradient_of_a_tap(cnn):
    model, variables, x = cnn
    _, taps = tapped(model, variables, x)

    def output(perturbations):
        nested = traverse_util.unflatten_dict(perturbations, sep="/")
        return model.apply({**variables, "perturbations": nested}, x)[:, 1].sum()

    names = ("head/relu1", "base/block2/pool")
    zeros = {name: jnp.zeros_like(taps[name]) for name in names}
    gradient = jax.jit(jax.grad(output))(zeros)
    head = variables["params"]["head"]
    last = np.tile(head["logits"]["kernel"][:, 1], (4, 1))
    np.testing.assert_allclose(gradient["head/relu1"], last, rtol=1e-6)
    hidden = (last * (taps["head/dense1"] > 0)) @ head["dense1"]["kernel"].T
    expected = hidden.reshape(4, 2, 2, 5)
    np.testing.assert_allclose(gradient["base/block2/pool"], expected, atol=1e-5)
