"""Every layer against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw_variables, numpy_conv, numpy_norm

from convnet.models import layers


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("rank", "stride", "padding", "kernel"),
    [
        (1, 1, "SAME", 3),
        (1, 3, "CIRCULAR", 4),
        (2, 1, "VALID", 3),
        (2, 2, "SAME", 3),
        (2, 2, 1, 3),
        (2, 2, 3, 7),
        (2, 1, "CIRCULAR", 3),
        (2, 2, "CIRCULAR", 2),
        (3, 2, 1, 3),
        (3, 1, "CIRCULAR", 3),
        (4, 1, "SAME", 3),
        (4, 2, 1, 3),
        (4, 2, "SAME", 2),
        (4, 1, "CIRCULAR", 3),
        (4, 3, "VALID", 2),
    ],
)
def test_convolution_is_numpys(rank, stride, padding, kernel, rng):
    x = rng.standard_normal((2, *(6, 5, 4, 3)[:rank], 2)).astype(np.float32)
    layer = layers.Conv(3, kernel, stride, padding)
    params = draw_variables(layer, x, rng)
    expected = numpy_conv(x, params["params"]["kernel"], stride, padding)
    expected = expected + params["params"]["bias"]
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=1e-4)


def test_kernel_need_not_be_square(rng):
    x = rng.standard_normal((1, 6, 5, 2)).astype(np.float32)
    layer = layers.Conv(3, (1, 3), use_bias=False)
    params = draw_variables(layer, x, rng)
    kernel = params["params"]["kernel"]
    assert kernel.shape == (1, 3, 2, 3)
    np.testing.assert_allclose(layer.apply(params, x), numpy_conv(x, kernel), atol=1e-4)
    with pytest.raises(ValueError, match="2 numbers for 1 spatial"):
        layer.init(jax.random.key(0), x[0])


def test_kernels_start_with_hes_variance():
    x = jnp.zeros((1, 8, 8, 32))
    params = jax.jit(layers.Conv(64, 3).init)(jax.random.key(0), x)
    kernel = np.asarray(params["params"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)
    assert not np.any(params["params"]["bias"])


def test_batch_norm_is_numpys(rng):
    # The mean is large against the spread: a variance of two moments would be wrong.
    x = (1000 + 0.1 * rng.standard_normal((4, 5, 6, 3))).astype(np.float32)
    layer = layers.BatchNorm(momentum=0.8)
    variables = draw_variables(layer, x, rng, False)
    params, stats = variables["params"], variables["batch_stats"]

    x64 = x.astype(np.float64)
    mean, var = x64.mean((0, 1, 2)), x64.var((0, 1, 2))
    y, state = layer.apply(variables, x, True, mutable=["batch_stats"])
    expected = numpy_norm(x64, params, {"mean": mean, "var": var})
    np.testing.assert_allclose(y, expected, atol=5e-3)
    new = state["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.8 * stats["mean"] + 0.2 * mean, rtol=1e-6)
    np.testing.assert_allclose(new["var"], 0.8 * stats["var"] + 0.2 * var, rtol=1e-4)

    y, state = layer.apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, numpy_norm(x64, params, stats), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(state["batch_stats"]["mean"], stats["mean"])


def test_batch_norm_in_bfloat16_keeps_float32_statistics(rng):
    x = (8 + rng.standard_normal((64, 16, 16, 2))).astype(jnp.bfloat16)
    layer = layers.BatchNorm(momentum=0.0, dtype=jnp.bfloat16)
    variables = draw_variables(layer, x, rng, True)
    y, state = layer.apply(variables, x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    stats = state["batch_stats"]
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    x64 = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats["mean"], x64.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], x64.var((0, 1, 2)), rtol=1e-4)
