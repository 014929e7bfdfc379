"""Fused normalisation, activation and pooling against NumPy and the plain forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from convnet.models import fused, layers, lowering, pooling

PROJECT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 3, 4)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
EPSILON = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """XLA's lowest level: what is tested here is what is computed, not how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["cpu"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


def numpy_activate(x, activation):
    """Values and slopes, float64."""
    if activation == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    if activation == "relu6":
        return x.clip(0, 6), ((x > 0) & (x < 6)).astype(x.dtype)
    if activation == "gelu":
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
        t = np.tanh(inner)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope
    return x, np.ones_like(x)


def numpy_batch_norm(x, scale, bias, gradient, activation):
    """Value, statistics, and the gradients by x, scale and bias, float64."""
    x, gradient = x.astype(np.float64), gradient.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    normal = (x - mean) / np.sqrt(var + EPSILON)
    y, slope = numpy_activate(normal * scale + bias, activation)
    g = gradient * slope
    by_normal = g * scale
    # Of a mean and a variance that depend on every x (Ioffe and Szegedy 2015).
    by_x = by_normal - by_normal.mean(axes) - normal * (by_normal * normal).mean(axes)
    by_x = by_x / np.sqrt(var + EPSILON)
    return y, mean, var, by_x, (g * normal).sum(axes), g.sum(axes)


def fused_batch_norm(x, scale, bias, gradient, activation):
    @jax.jit
    def run(x, scale, bias, gradient):
        def norm(x, scale, bias):
            y, *stats = fused.batch_norm(x, scale, bias, EPSILON, activation)
            return y, stats

        y, back, stats = jax.vjp(norm, x, scale, bias, has_aux=True)
        return y, *stats, *back(gradient)

    return run(x, scale, bias, gradient)


def draw(rng, shape, dtype, mean=0.5):
    x = (mean + 1.5 * rng.standard_normal(shape)).astype(dtype)
    scale = (1 + 0.5 * rng.standard_normal(shape[-1])).astype(np.float32)
    bias = rng.standard_normal(shape[-1]).astype(np.float32)
    return x, scale, bias, rng.standard_normal(shape).astype(dtype)


def assert_near(found, want, tolerance, name=""):
    """To a share of the largest: what is subtracted from each other rounds by that."""
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    error = np.abs(found - want).max() / np.abs(want).max()
    assert error < tolerance, (name, error)


NAMES = ("y", "mean", "var", "by x", "by scale", "by bias")


@pytest.mark.parametrize("backend", ["cpu", "gpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_batch_norm_is_numpys(activation, dtype, rng):
    given = draw(rng, (6, 5, 7, 4), DTYPES[dtype])
    found = fused_batch_norm(*given, activation)
    want = numpy_batch_norm(*given, activation)
    kinds = [DTYPES[dtype], np.float32, np.float32, DTYPES[dtype], *[np.float32] * 2]
    for name, kind, ours, exact in zip(NAMES, kinds, found, want, strict=True):
        assert ours.dtype == kind and ours.shape == exact.shape, name
        rounded = dtype == "bfloat16" and name not in ("mean", "var")
        assert_near(ours, exact, 1e-2 if rounded else 2e-6, name)


@pytest.mark.parametrize("rank", RANKS)
def test_batch_norm_takes_any_rank(rank, rng):
    given = draw(rng, (3, *(5, 4, 3, 2)[:rank], 2), np.float32)
    found = fused_batch_norm(*given, "gelu")
    for name, *pair in zip(NAMES, found, numpy_batch_norm(*given, "gelu"), strict=True):
        assert_near(*pair, 3e-6, name)


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_a_mean_that_is_large_against_the_spread_costs_few_digits(activation, rng):
    """In float32 numbers near 10,000 are 0.001 apart; a square of them is 8 apart."""
    given = draw(rng, (16, 8, 8, 3), np.float32, mean=1e4)
    found = fused_batch_norm(*given, activation)
    want = numpy_batch_norm(*given, activation)
    for name, *pair in zip(NAMES, found, want, strict=True):
        assert_near(*pair, 1e-2, name)
    assert_near(found[1], want[1], 3e-6)


def test_no_gradient_passes_through_the_statistics(rng):
    x, scale, bias, _ = draw(rng, (4, 3, 3, 2), np.float32)

    def statistics(x, scale, bias):
        _, mean, var = fused.batch_norm(x, scale, bias, EPSILON, "relu")
        return (mean + 2 * var).sum()

    for gradient in jax.grad(statistics, (0, 1, 2))(x, scale, bias):
        np.testing.assert_array_equal(gradient, 0)


def test_the_gradient_of_the_reference_is_right(rng):
    """By finite differences of its values."""
    x, scale, bias, gradient = draw(rng, (3, 4, 2), np.float64)
    for activation in fused.ACTIVATIONS:
        *_, by_x, by_scale, by_bias = numpy_batch_norm(
            x, scale, bias, gradient, activation
        )
        places = ((x, by_x), (scale, by_scale), (bias, by_bias))
        for number, (array, slope) in enumerate(places):
            towards = rng.standard_normal(array.shape)
            values = []
            for sign in (1, -1):
                moved = [x, scale.astype(np.float64), bias.astype(np.float64)]
                moved[number] = array + sign * 1e-6 * towards
                y = numpy_batch_norm(*moved, gradient, activation)[0]
                values.append((y * gradient).sum())
            difference = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose((slope * towards).sum(), difference, rtol=1e-5)


# The layers that use them, against themselves in the plain form.


class Network(nn.Module):
    """Norm and activation, GELU and pool, without a convolution."""

    activation: str
    use_scale: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train=True):
        norm = layers.BatchNorm(
            0.7, use_scale=self.use_scale, dtype=self.dtype, name="norm"
        )
        x = layers.normalize_and_activate(self, norm, x, train, self.activation, "act")
        return pooling.max_pool(layers.gelu(x), 2)


def run_network(model, x, weights, train=True, plain=False, **collections):
    """Gradients by the params, x and the perturbations; value and new collections."""
    c = x.shape[-1:]
    params = {"bias": jnp.full(c, 0.25)}
    if model.use_scale:
        params["scale"] = jnp.full(c, 1.25)
    stats = {"mean": jnp.full(c, 0.5), "var": jnp.full(c, 1.5)}
    mutable = ["batch_stats"] + ["taps"] * collections.pop("taps", False)

    def run(params, x, collections):
        given = {"params": {"norm": params}, "batch_stats": {"norm": stats}}
        given |= collections
        y, state = model.apply(given, x, train, mutable=mutable)
        return (y.astype(jnp.float32) * weights).sum(), (y, state)

    # Not cached: what is traced depends on the context.
    traced = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
    if not plain:
        return traced(params, x, collections)
    with lowering.plain():
        return traced(params, x, collections)


@pytest.mark.parametrize(
    ("use_scale", "train"), [(True, True), (False, True), (True, False)]
)
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_layers_agree_with_their_plain_form(activation, use_scale, train, rng):
    x = (3 + 2 * rng.standard_normal((4, 6, 5, 3))).astype(np.float32)
    weights = rng.standard_normal((4, 3, 2, 3)).astype(np.float32)
    model = Network(activation, use_scale)
    ours = run_network(model, x, weights, train)
    plain = run_network(model, x, weights, train, plain=True)
    assert set(ours[0][0]) == ({"scale", "bias"} if use_scale else {"bias"})
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True
    ):
        assert np.any(np.asarray(other)), path
        assert_near(mine, other, 3e-6, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_tapped_and_perturbed_is_the_same(activation, dtype, rng):
    x = rng.standard_normal((4, 6, 4, 3)).astype(DTYPES[dtype])
    weights = rng.standard_normal((4, 3, 2, 3)).astype(np.float32)
    model = Network(activation, dtype=dtype)
    tolerance = 5e-6 if dtype == "float32" else 2e-2
    grads, (y, state) = run_network(model, x, weights)
    tapped_grads, (tapped, tapped_state) = run_network(model, x, weights, taps=True)
    taps = tapped_state.pop("taps")
    assert set(taps) == {"norm", "act"}
    assert taps["norm"].dtype == taps["act"].dtype == DTYPES[dtype]
    wide = np.asarray(taps["norm"], np.float64)
    assert_near(taps["act"], numpy_activate(wide, activation)[0], tolerance)
    assert_near(tapped, y, tolerance)
    for pair in zip(
        jax.tree.leaves((grads, state)),
        jax.tree.leaves((tapped_grads, tapped_state)),
        strict=True,
    ):
        assert_near(*pair, tolerance)

    # Looked at between norm and activation, and only behind them.
    zeros = jnp.zeros(x.shape, jnp.float32)
    both = {"norm": zeros, "act": zeros}
    by_both = run_network(model, x, weights, perturbations=both)
    by_one = run_network(model, x, weights, perturbations={"act": zeros})
    assert_near(by_both[1][0], y, tolerance)
    assert_near(by_one[1][0], y, tolerance)
    act, norm = (by_both[0][2]["perturbations"][name] for name in ("act", "norm"))
    assert_near(by_one[0][2]["perturbations"]["act"], act, tolerance)
    slope = numpy_activate(wide, activation)[1]
    assert_near(norm, np.asarray(act, np.float64) * slope, tolerance)
    for pair in zip(
        jax.tree.leaves(by_both[0][:2]), jax.tree.leaves(grads[:2]), strict=True
    ):
        assert_near(*pair, tolerance)


def test_a_perturbation_moves_what_follows(rng):
    x = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    weights = np.ones((2, 2, 2, 3), np.float32)
    model = Network("relu")
    _, (_, state) = run_network(model, x, weights, taps=True)
    moved = {"norm": jnp.full(x.shape, 0.5)}
    _, (y, _) = run_network(model, x, weights, perturbations=moved)
    act = np.maximum(np.asarray(state["taps"]["norm"], np.float64) + 0.5, 0)
    act = numpy_activate(act, "gelu")[0].reshape(2, 2, 2, 2, 2, 3).max((2, 4))
    np.testing.assert_allclose(y, act, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_numpys(dtype):
    x = np.linspace(-9, 9, 1001).astype(DTYPES[dtype])
    wide = x.astype(np.float64)
    value, slope = numpy_activate(wide, "gelu")
    weights = np.linspace(1, 2, 1001).astype(DTYPES[dtype])
    y, back = jax.vjp(layers.gelu, jnp.asarray(x))
    (gradient,) = back(jnp.asarray(weights))
    assert y.dtype == gradient.dtype == x.dtype
    # Far below zero 1 + tanh is a small difference of numbers near 1.
    tolerance = 5e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(
        np.asarray(y, np.float64), value, rtol=tolerance, atol=tolerance
    )
    want = slope * weights.astype(np.float64)
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), want, rtol=tolerance, atol=tolerance
    )
    # The tails are those of the identity and of zero, not NaN.
    far = jnp.asarray([-1e18, -100.0, 100.0, 1e18], DTYPES[dtype])
    slopes = jax.grad(lambda x: layers.gelu(x).astype(jnp.float32).sum())(far)
    np.testing.assert_array_equal(np.asarray(slopes, np.float32), [0, 0, 1, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_bias_is_a_float32_sum(dtype, rng):
    y = rng.normal(size=(40, 9, 9, 3)).astype(dtype)
    bias = rng.normal(size=3).astype(np.float32)
    gradient = (1 + rng.random(size=y.shape)).astype(dtype)
    out, vjp = jax.vjp(jax.jit(fused.add_bias), y, bias)
    by_y, by_bias = vjp(gradient)
    assert out.dtype == by_y.dtype == dtype and by_bias.dtype == np.float32
    want = y.astype(np.float32) + bias.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(out, want.astype(dtype))
    np.testing.assert_array_equal(by_y, gradient)
    # Of about 5,000; summed in bfloat16 it would be off by a hundredth.
    want = gradient.astype(np.float64).sum((0, 1, 2))
    np.testing.assert_allclose(by_bias, want, rtol=1e-5)
