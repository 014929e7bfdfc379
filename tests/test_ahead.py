"""What is computed of weights alone is computed once, and changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnet import models
from convnet.ahead import Ahead
from convnet.models import lowering


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def counted(calls):
    """A function of an array that notes when the device computes it."""

    def note(x):
        calls.append(x.shape)
        return np.asarray(x) * 2

    return lambda x: jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_weights_are_prepared_once_for_all_shapes(rng):
    weights = {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}
    of_weights, of_inputs = [], []
    double, again = counted(of_weights), counted(of_inputs)
    run = Ahead(lambda w, x: again(x) @ double(w["kernel"]), weights)
    for rows in (5, 2, 5, 2, 7):
        x = rng.normal(size=(rows, 3)).astype(np.float32)
        np.testing.assert_allclose(run(x), 4 * x @ weights["kernel"], rtol=1e-5)
    assert of_weights == [(3, 4)]
    assert of_inputs == [(rows, 3) for rows in (5, 2, 5, 2, 7)]


def test_other_computations_of_a_weight_are_kept_apart(rng):
    w = rng.normal(size=(4,)).astype(np.float32)

    def function(w, x):
        # By a literal, a parameter of the operation, and an operand.
        return x * (w + 1.0), x * (w + 2.0), x * w[:2].sum(), x * w[2:].sum(), w, 3.0

    run = Ahead(function, w)
    for rows in (1, 2):
        x = rng.normal(size=(rows, 4)).astype(np.float32)
        found, want = run(x), function(w, x)
        assert len(found) == len(want)
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_constant_of_the_function_is_no_weight(rng):
    constant = jnp.asarray(rng.normal(size=(3,)).astype(np.float32))
    run = Ahead(lambda w, x: {"y": x + w * constant}, np.float32(2))
    np.testing.assert_allclose(run(np.ones(3, np.float32))["y"], 1 + 2 * constant)


def test_what_is_kept_is_no_larger_than_the_weights(rng):
    bias = rng.normal(size=(8,)).astype(np.float32)
    run = Ahead(lambda b, x: x + jnp.broadcast_to(jnp.exp(b), x.shape), bias)
    x = np.zeros((100, 8), np.float32)
    np.testing.assert_allclose(run(x), np.broadcast_to(np.exp(bias), x.shape), 1e-6)
    assert [kept.shape for kept in run._ready.values()] == [(8,)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_with_batch_norm(dtype, rng):
    options = {"norm": "batch", "widths": (4, 8), "depth": 1}
    model = models.create("cnn", num_outputs=3, dtype=dtype, **options)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply = lambda variables, x: model.apply(variables, x, train=False)  # noqa: E731
    run = Ahead(apply, jax.device_get(variables))
    tolerance = 1e-5 if dtype == "float32" else 0.05
    want = jax.jit(apply)(variables, x)
    np.testing.assert_allclose(run(x), want, rtol=tolerance, atol=tolerance)
    kinds = {kept.dtype for kept in run._ready.values() if kept.ndim == 4}
    # Batch norm is in the kernels, which are rounded; a shift lies as (1, 1, 1, c).
    kernels = {
        kept.dtype for kept in run._ready.values() if kept.ndim == 4 and len(kept) > 1
    }
    assert kernels == {jnp.dtype(dtype)} and kinds <= {jnp.dtype("float32")} | kernels


def test_the_matrix_of_a_small_map_is_made_once_for_all_shapes(rng, monkeypatch):
    """It is larger than the kernel, and comes from a function with its own gradient."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    run = Ahead(
        lambda w, x: lowering.convolve2d(x, w, (1, 1), ((1, 1), (1, 1))), kernel
    )
    for batch in (3, 2):
        x = rng.normal(size=(batch, 2, 2, 4)).astype(np.float32)
        with lowering.plain():
            want = lowering.convolve2d(x, kernel, (1, 1), ((1, 1), (1, 1)))
        np.testing.assert_allclose(run(x), want, rtol=1e-4, atol=1e-5)
    assert [one.shape for one in run._ready.values()] == [(2 * 2 * 4, 2 * 2 * 5)]


def test_a_kernel_is_transformed_once_for_all_shapes(rng, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(lowering, "_TILED", {"oneDNN": 1, "Eigen": 1})
    kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    run = Ahead(
        lambda w, x: lowering.convolve2d(x, 2 * w, (1, 1), ((1, 1), (1, 1))), kernel
    )
    for batch in (16, 20):
        x = rng.normal(size=(batch, 6, 5, 4)).astype(np.float32)
        with lowering.plain():
            want = lowering.convolve2d(x, 2 * kernel, (1, 1), ((1, 1), (1, 1)))
        np.testing.assert_allclose(run(x), want, rtol=1e-4, atol=1e-5)
    kept = [one.shape for one in run._ready.values()]
    assert kept == [(16, 4, 5)]
