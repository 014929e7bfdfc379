"""Pools and their gradients against NumPy and the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy_layers import numpy_pool

from convnet.models import lowering, pooling


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("rank", (1, 2, 3, 4))
def test_average_pool_and_its_gradient_are_the_plain_form(rank, rng):
    x = rng.standard_normal((2, *(7, 6, 5, 4)[:rank], 3)).astype(np.float32)
    size = (1, *[2] * rank, 1)

    def plain(x):
        """The form in the books: one `reduce_window`."""
        return lax.reduce_window(x, 0.0, lax.add, size, size, "VALID") / 2**rank

    @jax.jit
    def run(x, weights):
        found = []
        for pool in (lambda x: pooling.average_pool(x, 2), plain):
            y, back = jax.vjp(pool, x)
            found.append((y, back(weights)[0]))
        return found

    weights = rng.standard_normal((2, *(3, 3, 2, 2)[:rank], 3)).astype(np.float32)
    for ours, expected in zip(*run(x, weights), strict=True):
        assert np.count_nonzero(expected)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["max", "average", "l2"])
@pytest.mark.parametrize(
    ("shape", "window", "stride", "padding"),
    [((7, 6), 3, 2, 1), ((7,), 3, 1, 0), ((5, 6, 7), 3, None, 0), ((5, 5), 2, 2, 1)],
)
def test_pools_are_numpys(how, shape, window, stride, padding, rng):
    # Below zero, so that a maximum over padding would show.
    x = -1 - rng.random((2, *shape, 3)).astype(np.float32)
    y = pooling.POOLS[how](x, window, stride, padding)
    expected = numpy_pool(x, window, stride or window, padding, how)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_max_pool_of_bfloat16_has_a_gradient(rng):
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 3)), jnp.bfloat16)

    @jax.jit  # where lax must still see that this is a maximum
    def pool_and_back(x):
        y, back = jax.vjp(lambda x: pooling.max_pool(x, 3, 2, 1), x)
        return y, back(jnp.ones_like(y))[0]

    y, gradient = pool_and_back(x)
    assert gradient.dtype == jnp.bfloat16
    assert np.asarray(gradient, np.float32).sum() == y.size


def test_l2_pool_has_a_gradient_everywhere(rng):
    x = rng.standard_normal((1, 4, 4, 2)).astype(np.float32)
    x[0, :2, :2, 0] = 0
    gradient = jax.grad(lambda x: pooling.l2_pool(x, 2).sum())(x)
    norms = numpy_pool(x, 2, 2, 0, "l2").repeat(2, 1).repeat(2, 2)
    expected = np.divide(x, 4 * norms, out=np.zeros_like(norms), where=norms > 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_gather(rng):
    x = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    assert pooling.gather(x, "flatten").shape == (2, 3 * 4 * 5 * 6)
    np.testing.assert_allclose(
        pooling.gather(x, "global"), x.astype(np.float64).mean((1, 2, 3)), atol=1e-6
    )
    y = pooling.gather(x, "time")
    assert y.shape == (2, 4, 5, 18)
    np.testing.assert_array_equal(y[1, 2, 3], x[1, :, 2, 3].ravel())


# Windows beside each other: a form of its own.


def numpy_max_pool(x, window):
    """Values, and the place within its tile of the first of the largest."""
    rank = x.ndim - 2
    places = [side // window for side in x.shape[1:-1]]
    x = x[(slice(None), *(slice(n * window) for n in places))]
    x = x.reshape(len(x), *(n for p in places for n in (p, window)), x.shape[-1])
    x = np.moveaxis(x, range(2, 2 * rank + 1, 2), range(-rank, 0))
    x = x.reshape(*x.shape[:-rank], -1)
    return x.max(-1), x.argmax(-1)


def numpy_max_pool_gradient(shape, window, first, gradient):
    by_x = np.zeros(shape, np.float64)
    for place in np.ndindex(*first.shape):
        within = np.unravel_index(first[place], [window] * (len(shape) - 2))
        spatial = [window * p + w for p, w in zip(place[1:-1], within, strict=True)]
        by_x[(place[0], *spatial, place[-1])] += gradient[place]
    return by_x


def check_max_pool(x, window, rng):
    want, first = numpy_max_pool(x, window)
    gradient = rng.standard_normal(want.shape).astype(np.float32)
    want_back = numpy_max_pool_gradient(x.shape, window, first, gradient)

    def both(x, gradient):
        y, back = jax.vjp(lambda x: pooling.max_pool(x, window), x)
        return y, back(gradient)[0]

    ours = jax.jit(both)(x, gradient)
    with lowering.plain():
        plain = jax.jit(lambda *given: both(*given))(x, gradient)
    for y, found in (ours, plain):
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(found, want_back)


@pytest.mark.parametrize(
    ("spatial", "window"),
    [
        ((7,), 2),
        ((9,), 3),
        ((6, 4), 2),
        ((7, 5), 2),
        ((8, 10), 3),
        ((3, 3), 3),
        ((5, 4, 7), 2),
        ((3, 6, 4), 3),
        ((4, 2, 3, 5), 2),
    ],
)
def test_max_pool_is_numpys(spatial, window, rng):
    """With ties, and below zero, where a maximum over padding would show."""
    x = -1.0 - rng.integers(0, 4, (4, *spatial, 3))
    check_max_pool(x.astype(np.float32), window, rng)


def test_the_last_of_many_places_in_a_tile(rng):
    """More than a signed byte can number."""
    x = np.arange(13 * 12, dtype=np.float32).reshape(1, 13, 12, 1)
    check_max_pool(x, 12, rng)


def test_max_pool_keeps_bfloat16(rng):
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 3)), jnp.bfloat16)
    y, back = jax.vjp(jax.jit(lambda x: pooling.max_pool(x, 2)), x)
    (gradient,) = back(jnp.full(y.shape, 3, jnp.bfloat16))
    assert y.dtype == gradient.dtype == jnp.bfloat16
    want, first = numpy_max_pool(np.asarray(x, np.float32), 2)
    np.testing.assert_array_equal(np.asarray(y, np.float32), want)
    want = numpy_max_pool_gradient(x.shape, 2, first, np.full(y.shape, 3.0))
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), want)


@pytest.mark.parametrize("place", range(4))
def test_a_nan_passes_through_a_pool_and_shows(place):
    """It must not lose against a number: the loss has to show it."""
    tile = [1.0, 2.0, 3.0, 4.0]
    tile[place] = np.nan
    x = jnp.asarray(tile).reshape(1, 2, 2, 1)
    assert np.isnan(pooling.max_pool(x, 2)).all()
    with lowering.plain():
        assert np.isnan(pooling.max_pool(x, 2)).all()
    minus = jnp.full((1, 2, 2, 1), -jnp.inf)
    y, back = jax.vjp(lambda x: pooling.max_pool(x, 2), minus)
    assert np.isneginf(y).all()
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0].ravel(), [1, 0, 0, 0])
