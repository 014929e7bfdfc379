"""Published architectures: their parts against NumPy, their counts, what they take."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import numpy_conv

from convnet import models
from convnet.models import layers, lowering, pooling


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("rank", (1, 2, 3, 4))
@pytest.mark.parametrize(
    ("groups", "features", "stride", "padding"),
    [(4, 4, 1, 1), (4, 4, 2, "SAME"), (4, 4, 2, 3), (4, 8, 2, 1), (2, 8, 1, "VALID")],
)
def test_groups_of_channels_have_their_own_features(
    rank, groups, features, stride, padding, rng
):
    x = rng.standard_normal((2, *(7, 6, 5, 4)[:rank], 4)).astype(np.float32)
    c, f = 4 // groups, features // groups  # of a group
    kernel = rng.standard_normal((*[3] * rank, c, features)).astype(np.float32)
    expected = np.concatenate(
        [
            numpy_conv(
                x[..., i * c : (i + 1) * c],
                kernel[..., i * f : (i + 1) * f],
                stride,
                padding,
            )
            for i in range(groups)
        ],
        -1,
    )
    conv = layers.Conv(features, 3, stride, padding, use_bias=False, groups=groups)

    def apply(x, kernel):
        return conv.apply({"params": {"kernel": kernel}}, x)

    @jax.jit
    def run(x, kernel, weights):
        y, back = jax.vjp(apply, x, kernel)
        with lowering.plain():  # XLA's own form and its gradients
            _, plain_back = jax.vjp(apply, x, kernel)
        return y, back(weights), plain_back(weights)

    weights = rng.standard_normal(expected.shape).astype(np.float32)
    y, gradients, plain = run(x, kernel, weights)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for gradient, want in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-4)


def windows(side, window, stride, padding, ceil):
    """The places of an axis in each window, padding left out."""
    found, start = [], -padding
    while start + window <= side + padding or (
        ceil and start < side and start - stride + window < side + padding
    ):
        found.append([i for i in range(start, start + window) if 0 <= i < side])
        start += stride
    return found


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(3, 2, 0), (3, 2, 1), (2, 2, 0), (2, 3, 0)]
)
def test_pools_have_the_windows_of_pytorch(window, stride, padding, ceil, rng):
    for side in range(4, 10):
        x = -1 - rng.random((2, side, 3)).astype(np.float32)
        wins = windows(side, window, stride, padding, ceil)
        largest = np.stack([x[:, w].max(1) for w in wins], 1)
        y = pooling.max_pool(x, window, stride, padding, ceil=ceil)
        np.testing.assert_array_equal(y, largest)
        if not ceil:
            mean = np.stack([x[:, w].mean(1) for w in wins], 1)
            y = pooling.average_pool(x, window, stride, padding, count_padding=False)
            np.testing.assert_allclose(y, mean, rtol=1e-6)


def shapes(model, inputs):
    def run(x):
        variables = model.init(jax.random.key(0), x)
        logits, state = model.apply(variables, x, mutable=["taps"])
        return logits, variables, state["taps"]

    found = jax.eval_shape(run, jax.ShapeDtypeStruct(inputs, jnp.float32))
    return *found[:2], models.taps(found[2])


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("squeezenet1_1", {}, 1_235_496),
        ("mobilenet_v2", {}, 3_504_872),
        ("inception_v3", {"aux": True}, 27_161_264),
        ("inception_v3", {"variant": "keras"}, 23_817_352),
        ("convnext_tiny", {}, 28_589_128),
        ("resnet50", {"stem": "imagenet", "variant": "keras"}, 25_583_592),
    ],
)
def test_parameter_counts_are_the_published_ones(name, options, published):
    model = models.create(name, num_outputs=1000, **options)
    side = 299 if name == "inception_v3" else 224
    logits, variables, _ = shapes(model, (2, side, side, 3))
    assert logits.shape == (2, 1000)
    counts = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
    assert sum(counts) == published


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "convnext_tiny"])
@pytest.mark.parametrize("rank", (1, 3, 4))
def test_any_rank_in_bfloat16(name, rank):
    model = models.create(name, num_outputs=3, width=8, dtype="bfloat16")
    logits, variables, taps = shapes(model, (2, *[32] * rank, 1))
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    ranks = {x.ndim - 2 for x in jax.tree.leaves(variables["params"]["base"])}
    assert {rank, -1} <= ranks <= {rank, -1, 0}  # kernels, vectors, dense
    assert taps.pop("head/logits").dtype == jnp.float32
    assert {tap.dtype for tap in taps.values()} == {jnp.dtype("bfloat16")}


def test_maps_shrink_as_published():
    expected = {
        "squeezenet1_1": [111, 55, 27, 13],
        "mobilenet_v2": [112, 56, 28, 14, 7],
        "convnext_tiny": [56, 28, 14, 7],
        "inception_v3": [149, 147, 73, 71, 35, 17, 8],
    }
    for name, sides in expected.items():
        side = 299 if name == "inception_v3" else 224
        taps = shapes(models.create(name, num_outputs=2), (1, side, side, 3))[2]
        maps = {n: t for n, t in taps.items() if t.ndim == 4 and "head" not in n}
        seen = [tap.shape[1] for name, tap in maps.items() if "/branch" not in name]
        assert [side for side, _ in itertools.groupby(seen)] == sides


def test_inception_says_which_images_it_takes():
    model = models.create("inception_v3", num_outputs=2, width=2)
    for shape in ((1, 74, 80, 3), (1, 80, 3), (1, 80, 80, 80, 3)):
        with pytest.raises(ValueError, match="at least 75 pixels a side"):
            shapes(model, shape)
    assert shapes(model, (1, 75, 80, 3))[0].shape == (1, 2)
    model = models.create("inception_v3", num_outputs=2, width=2, aux=True)
    with pytest.raises(ValueError, match="auxiliary head .* 299x299"):
        shapes(model, (1, 298, 299, 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {"variant": "keras"}),
        ("vgg11_bn", {"dense": ()}),
        ("mobilenet_v2", {}),
        ("inception_v3", {"variant": "keras"}),
    ],
)
def test_norms_within_convolutions_give_the_plain_logits(name, options):
    model = models.create(name, num_outputs=3, width=8, **options)
    side = 96 if name == "inception_v3" else 32
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, side, side, 3)), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    # Nothing is 0 or 1, as it is after `init`.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.uniform(0.5, 1.5, leaf.shape)
            if leaf.ndim == 1
            else rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])),
            jnp.float32,
        ),
        variables,
    )
    with lowering.plain():
        plain = model.apply(variables, x)
    assert np.ptp(plain) > 0.1 * np.abs(plain).max()
    np.testing.assert_allclose(
        model.apply(variables, x), plain, atol=1e-5 * float(np.abs(plain).max())
    )
