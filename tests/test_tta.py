"""Test-time augmentation against views that NumPy makes by indices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnet import tta

SHAPES = {1: (7,), 2: (5, 6), 3: (3, 4, 5)}


def moved(x, by):
    """`x` (b, *spatial, c) moved by a pixel along each axis, its edge mirrored."""
    for axis in range(1, x.ndim - 1):
        places = np.abs(np.arange(x.shape[axis]) + by)
        last = x.shape[axis] - 1
        x = np.take(x, np.where(places > last, 2 * last - places, places), axis)
    return x


def mirrored(x):
    return x[..., ::-1, :]


def reference(apply, x, views):
    """As airbench94 says it: half for the image, half for its two translates."""
    both = lambda x: (apply(x) + apply(mirrored(x))) / 2  # noqa: E731
    if views == "none":
        return apply(x)
    if views == "flip":
        return both(x)
    return both(x) / 2 + (both(moved(x, -1)) + both(moved(x, 1))) / 4


@pytest.mark.parametrize("views", tta.VIEWS)
@pytest.mark.parametrize("rank", SHAPES)
def test_logits_are_the_mean_over_the_views(rank, views):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, *SHAPES[rank], 2))
    weights = rng.standard_normal((x[0].size, 3))

    def apply(x, module):
        return module.tanh(x.reshape(len(x), -1) @ weights / 4)

    ours = tta.logits(
        functools.partial(apply, module=jnp), jnp.asarray(x, jnp.float32), views
    )
    want = reference(functools.partial(apply, module=np), x, views)
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
    # The views do differ: no two ways of averaging agree.
    for other in tta.VIEWS:
        flat = reference(functools.partial(apply, module=np), x, other)
        assert np.allclose(ours, flat, rtol=1e-4) == (other == views)


@pytest.mark.parametrize(
    ("views", "shares"),
    [("none", [1]), ("flip", [0.5] * 2), ("flip_translate", [0.25] * 2 + [0.125] * 4)],
)
def test_each_view_is_seen_once_and_they_count_as_one(views, shares):
    seen = []

    def apply(x):
        seen.append(np.asarray(x))
        return jnp.full((len(x), 2), 10.0 ** len(seen))

    x = jnp.arange(2 * 4 * 4.0).reshape(2, 4, 4, 1)
    found = tta.logits(apply, x, views)
    assert len(seen) == len(shares)
    assert len({view.tobytes() for view in seen}) == len(seen)
    want = sum(share * 10.0**n for n, share in enumerate(shares, 1))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert sum(shares) == 1


def test_what_cannot_be_viewed_is_refused():
    x = jnp.zeros((2, 1, 8, 3))
    with pytest.raises(ValueError, match="views 'crop': want one of none, flip, flip_"):
        tta.logits(lambda x: x, x, "crop")
    with pytest.raises(ValueError, match=r"moves inputs by a pixel, .* \(1, 8, 3\)"):
        tta.logits(lambda x: x, x, "flip_translate")
    with pytest.raises(ValueError, match=r"predicted, a map of shape \(8, 3\): avera"):
        tta.logits(lambda x: x.mean(1), x, "flip")
    assert tta.logits(lambda x: x.mean(1), x, "none").shape == (2, 8, 3)


def test_views_are_traced_one_after_the_other():
    """Six calls of the network on a batch each, not one on six batches."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    shapes = []

    def apply(x):
        shapes.append(x.shape)
        return x.mean((1, 2))

    out = jax.eval_shape(lambda x: tta.logits(apply, x, "flip_translate"), x)
    assert shapes == [(2, 8, 8, 3)] * 6 and out.shape == (2, 3)
