"""The models against NumPy: every layer, whole small networks, taps and counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax

from convnet import models
from convnet.models import layers
from convnet.models.cnn import ConvBase
from convnet.models.resnet import ResNetBase
from convnet.models.summary import summarize

RANKS = (1, 2, 3, 4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def numpy_conv(x, kernel, stride=1, padding="SAME", bias=0.0):
    """Cross-correlation in float64 from sliding windows, for any rank."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    rank, size = x.ndim - 2, kernel.shape[:-2]
    pads = []
    for n, k in zip(x.shape[1:-1], size, strict=True):
        if padding == "SAME":
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            pads.append((total // 2, total - total // 2))
        elif padding == "CIRCULAR":
            pads.append(((k - 1) // 2, k // 2))
        else:
            pads.append((0, 0) if padding == "VALID" else (padding, padding))
    mode = "wrap" if padding == "CIRCULAR" else "constant"
    x = np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)
    axes = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=axes)
    windows = windows[(slice(None), *[slice(None, None, stride)] * rank)]
    # b, *places, c, *size against *size, c, features
    over = tuple(range(rank + 1, windows.ndim))
    return np.tensordot(windows, kernel, (over, (rank, *range(rank)))) + bias


def numpy_pool(x, window, stride, padding, how):
    x = np.asarray(x, np.float64)
    rank = x.ndim - 2
    fill = -np.inf if how == "max" else 0.0
    x = np.pad(x, [(0, 0), *[(padding, padding)] * rank, (0, 0)], constant_values=fill)
    axes = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, (window,) * rank, axis=axes)
    windows = windows[(slice(None), *[slice(None, None, stride)] * rank)]
    over = tuple(range(rank + 2, windows.ndim))
    if how == "max":
        return windows.max(over)
    if how == "average":
        return windows.mean(over)
    return np.sqrt((windows**2).mean(over))


def numpy_norm(x, params, stats):
    scale = params["scale"] / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    return (x - stats["mean"]) * scale + params["bias"]


def draw_variables(model, x, rng, *args):
    """Variables in which nothing is zero or one, so that each of them matters."""

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return noise / np.sqrt(np.float32(np.prod(leaf.shape[:-1])))
        if kind == "var":
            return 1 + 0.3 * np.abs(noise)
        return 0.3 * noise + (kind == "scale")

    def init(x):
        return model.init(jax.random.key(0), x, *args)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, x))


def tapped(model, variables, x):
    """Logits and taps, compiled as one: a compiled network is quicker to test."""

    @jax.jit
    def run(variables, x):
        logits, state = model.apply(variables, x, mutable=["taps"])
        return logits, state["taps"]

    logits, taps = run(variables, x)
    return np.asarray(logits), models.taps(jax.tree.map(np.asarray, taps))


# Layers


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


def plain_pool(x, window, how):
    """The form in the books: one `reduce_window`."""
    rank = x.ndim - 2
    size = (1, *[window] * rank, 1)
    start, op = (-np.inf, lax.max) if how == "max" else (0.0, lax.add)
    y = lax.reduce_window(x, start, op, size, size, "VALID")
    return y if how == "max" else y / window**rank


@pytest.mark.parametrize("how", ["max", "average"])
@pytest.mark.parametrize("rank", RANKS)
def test_pool_and_its_gradient_are_the_plain_form(rank, how, rng):
    x = rng.standard_normal((2, *(7, 6, 5, 4)[:rank], 3)).astype(np.float32)
    pool = layers.POOLS[how]
    y, back = jax.vjp(lambda x: pool(x, 2), x)
    expected, expected_back = jax.vjp(lambda x: plain_pool(x, 2, how), x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
    weights = rng.standard_normal(y.shape).astype(np.float32)
    gradient, expected = back(weights)[0], expected_back(weights)[0]
    assert np.count_nonzero(expected)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["max", "average", "l2"])
@pytest.mark.parametrize(
    ("shape", "window", "stride", "padding"),
    [((7, 6), 3, 2, 1), ((7,), 3, 1, 0), ((5, 6, 7), 3, None, 0), ((5, 5), 2, 2, 1)],
)
def test_pools_are_numpys(how, shape, window, stride, padding, rng):
    # Below zero, so that a maximum over padding would show.
    x = -1 - rng.random((2, *shape, 3)).astype(np.float32)
    y = layers.POOLS[how](x, window, stride, padding)
    expected = numpy_pool(x, window, stride or window, padding, how)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_max_pool_of_bfloat16_has_a_gradient(rng):
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 3)), jnp.bfloat16)

    @jax.jit  # where lax must still see that this is a maximum
    def pool_and_back(x):
        y, back = jax.vjp(lambda x: layers.max_pool(x, 3, 2, 1), x)
        return y, back(jnp.ones_like(y))[0]

    y, gradient = pool_and_back(x)
    assert gradient.dtype == jnp.bfloat16
    assert np.asarray(gradient, np.float32).sum() == y.size


def test_l2_pool_has_a_gradient_everywhere(rng):
    x = rng.standard_normal((1, 4, 4, 2)).astype(np.float32)
    x[0, :2, :2, 0] = 0
    gradient = jax.grad(lambda x: layers.l2_pool(x, 2).sum())(x)
    norms = numpy_pool(x, 2, 2, 0, "l2").repeat(2, 1).repeat(2, 2)
    expected = np.divide(x, 4 * norms, out=np.zeros_like(norms), where=norms > 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_gather(rng):
    x = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    assert layers.gather(x, "flatten").shape == (2, 3 * 4 * 5 * 6)
    np.testing.assert_allclose(
        layers.gather(x, "global"), x.astype(np.float64).mean((1, 2, 3)), atol=1e-6
    )
    y = layers.gather(x, "time")
    assert y.shape == (2, 4, 5, 18)
    np.testing.assert_array_equal(y[1, 2, 3], x[1, :, 2, 3].ravel())


# Whole networks, recomputed in float64


def numpy_resnet(params, stats, x, stem, strides):
    def conv_norm(x, params, stats, conv, norm, stride):
        kernel = params[conv]["kernel"]
        x = numpy_conv(x, kernel, stride, kernel.shape[0] // 2)
        return numpy_norm(x, params[norm], stats[norm])

    p, s = params["stem"], stats["stem"]
    x = conv_norm(x, p, s, "conv", "norm", 2 if stem == "imagenet" else 1).clip(0)
    if stem == "imagenet":
        x = numpy_pool(x, 3, 2, 1, "max")
    for path, stride in strides.items():
        stage, block = path.split("/")
        p, s = params[stage][block], stats[stage][block]
        depth = sum(name.startswith("conv") for name in p)
        y = x
        for i in range(1, depth + 1):
            step = stride if p[f"conv{i}"]["kernel"].shape[0] == 3 and i < 3 else 1
            step = step if depth == 3 or i == 1 else 1
            y = conv_norm(y, p, s, f"conv{i}", f"norm{i}", step)
            y = y.clip(0) if i < depth else y
        if "shortcut_conv" in p:
            x = conv_norm(x, p, s, "shortcut_conv", "shortcut_norm", stride)
        x = (x + y).clip(0)
    return x.mean((1, 2))


@pytest.mark.parametrize(
    ("bottleneck", "stem", "projections"),
    [(False, "cifar", 1), (True, "imagenet", 2), (False, "imagenet", 1)],
)
def test_resnet_is_numpys(bottleneck, stem, projections, rng):
    base = ResNetBase((1, 2), bottleneck, width=3, stem=stem)
    x = rng.standard_normal((2, 13, 10, 3)).astype(np.float32)
    variables = draw_variables(base, x, rng)
    params, stats = variables["params"], variables["batch_stats"]
    strides = {"stage1/block1": 1, "stage2/block1": 2, "stage2/block2": 1}
    expected = numpy_resnet(params, stats, x, stem, strides)
    blocks = [params[name.split("/")[0]][name.split("/")[1]] for name in strides]
    assert sum("shortcut_conv" in block for block in blocks) == projections
    features = jax.jit(base.apply)(variables, x)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bottleneck", "last"), [(False, "norm2"), (True, "norm3")])
def test_only_the_last_scale_of_a_branch_starts_at_zero(bottleneck, last):
    base = ResNetBase((1, 1), bottleneck, width=2)
    x = jnp.zeros((1, 4, 4, 3))

    @jax.jit
    def init_scales():  # and nothing else: random numbers are slow to compile
        params = base.init(jax.random.key(0), x)["params"]
        flat = traverse_util.flatten_dict(params, sep="/")
        return {name: leaf for name, leaf in flat.items() if name.endswith("scale")}

    scales = init_scales()
    zero = {f"stage{i}/block1/{last}/scale" for i in (1, 2)}
    assert zero < set(scales)
    for name, scale in scales.items():
        np.testing.assert_array_equal(scale, 0 if name in zero else 1, name)


@pytest.fixture(scope="module")
def cnn():
    """A small network with all that a `cnn` can have, its variables and inputs."""
    rng = np.random.default_rng(1)
    model = models.create(
        "cnn",
        num_outputs=3,
        widths=(4, 5),
        depth=2,
        norm="batch",
        pool="average",
        dense=(7,),
        dropout=0.5,
        bn_momentum=0.7,
    )
    x = rng.standard_normal((4, 9, 8, 2)).astype(np.float32)
    return model, draw_variables(model, x, rng), x


def test_cnn_is_numpys(cnn):
    model, variables, x = cnn
    params, stats = variables["params"], variables["batch_stats"]["base"]
    y = x
    for block in ("block1", "block2"):
        p, s = params["base"][block], stats[block]
        for i in "12":
            assert set(p[f"conv{i}"]) == {"kernel"}  # batch norm has the bias
            y = numpy_conv(y, p[f"conv{i}"]["kernel"])
            y = numpy_norm(y, p[f"norm{i}"], s[f"norm{i}"]).clip(0)
        y = numpy_pool(y, 2, 2, 0, "average")
    y, head = y.reshape(4, -1), params["head"]
    y = (y @ head["dense1"]["kernel"] + head["dense1"]["bias"]).clip(0)
    y = y @ head["logits"]["kernel"] + head["logits"]["bias"]
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, y, rtol=1e-4, atol=1e-4)


def test_training_follows_the_dropout_key_and_moves_the_statistics(cnn):
    model, variables, x = cnn

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

    logits, state = train(1)
    np.testing.assert_array_equal(logits, train(1)[0])
    assert not np.allclose(logits, train(2)[0])

    kernel = variables["params"]["base"]["block1"]["conv1"]["kernel"]
    old = variables["batch_stats"]["base"]["block1"]["norm1"]["mean"]
    new = state["batch_stats"]["base"]["block1"]["norm1"]["mean"]
    expected = 0.7 * old + 0.3 * numpy_conv(x, kernel).mean((0, 1, 2))
    np.testing.assert_allclose(new, expected, atol=1e-5)


def test_dropout_scales_what_it_keeps():
    head = layers.Head(2, dropout=0.75)
    params = {"logits": {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2)}}
    x = np.ones((500, 2), np.float32)
    rngs = {"dropout": jax.random.key(0)}
    y = np.asarray(head.apply({"params": params}, x, True, rngs=rngs))
    assert set(np.unique(y)) == {0, 4}
    assert (y > 0).mean() == pytest.approx(0.25, abs=0.06)
    np.testing.assert_array_equal(head.apply({"params": params}, x), x)


@pytest.mark.parametrize("rank", RANKS)
def test_any_rank_is_blind_to_cyclic_shifts(rank, rng):
    """Periodic padding, a pool of two and a mean: a shift by two changes nothing."""
    model = models.create(
        "cnn", num_outputs=3, widths=(3,), depth=1, padding="CIRCULAR", gather="global"
    )
    x = rng.standard_normal((2, *(6, 4, 4, 4)[:rank], 2)).astype(np.float32)
    variables = draw_variables(model, x, rng)
    kernel = variables["params"]["base"]["block1"]["conv1"]["kernel"]
    assert kernel.shape == (*[3] * rank, 2, 3)
    logits, taps = tapped(model, variables, x)
    assert logits.shape == (2, 3)
    assert list(taps) == [
        *(f"base/block1/{name}" for name in ("conv1", "relu1", "pool")),
        "base/features",
        "head/logits",
    ]
    apply = jax.jit(model.apply)
    for axis in range(1, rank + 1):
        shifted = apply(variables, np.roll(x, 2, axis))
        np.testing.assert_allclose(shifted, logits, atol=1e-5)
        flipped = apply(variables, np.flip(x, axis))
        assert not np.allclose(flipped, logits, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
@pytest.mark.parametrize("rank", (1, 3, 4))
def test_deep_networks_take_any_rank(name, rank):
    extra = {"dense": (4,)} if name.startswith("vgg") else {"stem": "imagenet"}
    model = models.create(name, num_outputs=3, width=2, **extra)
    shapes = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x),
        jnp.zeros((2, *[32] * rank, 1)),
    )
    assert shapes[0].shape == (2, 3)
    ranks = {x.ndim - 2 for x in jax.tree.leaves(shapes[1]["params"]["base"])}
    assert ranks == {rank, -1}  # kernels and vectors


def test_a_map_is_forecast_from_a_series_of_maps(rng):
    model = models.create(
        "cnn", num_outputs=2, widths=(3,), depth=1, pool="none", gather="time"
    )
    x = rng.standard_normal((2, 3, 5, 4, 1)).astype(np.float32)
    variables = draw_variables(model, x, rng)
    logits, taps = tapped(model, variables, x)
    maps, head = taps["base/block1/relu1"], variables["params"]["head"]["logits"]
    at = maps[1, :, 2, 3].ravel() @ head["kernel"] + head["bias"]
    assert logits.shape == (2, 5, 4, 2)
    np.testing.assert_allclose(logits[1, 2, 3], at, rtol=1e-5, atol=1e-6)


def test_maps_too_small_to_pool_are_refused():
    model = models.create("cnn", num_outputs=2, widths=(2, 2, 2), depth=1)
    with pytest.raises(ValueError, match="block3: a map of 1 is too small"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6, 1)))


def test_inputs_without_or_with_five_spatial_axes_are_refused():
    model = models.create("cnn", num_outputs=2)
    for shape in ((4, 3), (1, 2, 2, 2, 2, 2, 1)):
        with pytest.raises(ValueError, match="one to four"):
            model.init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    "base",
    [
        partial(ConvBase, (8, 8), (1, 2), norm="batch"),
        partial(ResNetBase, (1, 1), False, 4, "imagenet"),
    ],
)
def test_bfloat16_is_close_and_gives_float32(base, rng):
    def model(dtype):
        return layers.Classifier(base(dtype=dtype), layers.Head(5, (6,), 0, dtype))

    x = rng.standard_normal((4, 12, 12, 3)).astype(np.float32)
    full, half = model(jnp.dtype("float32")), model(jnp.dtype("bfloat16"))
    variables = draw_variables(full, x, rng)
    shapes = jax.eval_shape(half.init, jax.random.key(0), x)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits, taps = tapped(half, variables, x)
    assert logits.dtype == jnp.float32
    assert taps.pop("head/logits").dtype == jnp.float32
    assert {tap.dtype for tap in taps.values()} == {jnp.dtype("bfloat16")}
    expected, _ = tapped(full, variables, x)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.03


# Taps


@pytest.mark.parametrize("name", models.NAMES)
def test_taps_come_in_network_order(name):
    small = {"width": 2, "dense": (2, 2), "stem": "imagenet"}
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
    taps, params = jax.eval_shape(run, jnp.zeros((1, 32, 32, 3)))
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


# Names, options, counts


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vgg11", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg16_bn", 138_365_992),
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    extra = {"stem": "imagenet"} if name.startswith("resnet") else {}
    model = models.create(name, num_outputs=1000, **extra)
    table = summarize(model, (1, 224, 224, 3)).splitlines()
    counts = [line.split()[-1].replace(",", "") for line in table]
    assert int(counts[-1]) == published
    assert max(map(len, table)) <= 80
    rows = [line.split() for line in table]
    layer_rows = [row for row in rows[2:-2] if len(row) == 3]
    assert sum(int(row[2].replace(",", "")) for row in layer_rows) == published


def test_a_table_shows_layers_shapes_and_counts():
    model = models.create("cnn", num_outputs=10, widths=(8,), depth=1, gather="global")
    rows = [line.split() for line in summarize(model, (16, 8, 6, 3)).splitlines()]
    assert rows == [
        ["layer", "output", "parameters"],
        ["-" * 37],
        ["input", "8x6x3"],
        ["base/block1/conv1", "8x6x8", "224"],
        ["base/block1/relu1", "8x6x8"],
        ["base/block1/pool", "4x3x8"],
        ["base/features", "8"],
        ["head/logits", "10", "90"],
        ["-" * 37],
        ["total", "314"],
    ]


@pytest.mark.parametrize("name", models.NAMES)
def test_every_option_is_accepted_and_read(name):
    defaults = models.options(name)
    default = models.create(name, num_outputs=2)
    assert models.create(name, num_outputs=2, **defaults) == default
    other = {
        "widths": (3, 3),
        "depth": 3,
        "kernel": 5,
        "pool": "l2",
        "gather": "global",
        "dense": (3,),
        "dropout": 0.25,
        "norm": "batch",
        "padding": "CIRCULAR",
        "width": 32,
        "stem": "imagenet",
        "bn_momentum": 0.5,
    }
    for option in defaults:
        changed = models.create(name, num_outputs=2, **{option: other[option]})
        assert changed != default, option


def test_lists_become_tuples():
    model = models.create("cnn", num_outputs=2, widths=[3, 4])
    assert isinstance(model.base, ConvBase)
    assert model.base.widths == (3, 4)
    hash(model)  # a static argument of jit


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5", {}, "unknown model 'resnet5': the nearest are .*resnet50"),
        ("zzz", {}, "unknown model 'zzz': the nearest are cnn, vgg11, .*resnet101"),
        ("resnet18", {"kernel": 3}, "resnet18 reads no option 'kernel': .*stem"),
        ("vgg16", {"bn_momentum": 0.9}, "vgg16 reads no option 'bn_momentum'"),
        ("cnn", {"pool": "min"}, "pool='min' must be one of max, average, l2, none"),
        ("cnn", {"widths": ()}, r"widths=\(\) must be"),
        ("cnn", {"widths": (8, 0)}, r"widths=\(8, 0\) must be"),
        ("cnn", {"dense": 8}, "dense=8 must be a tuple"),
        ("cnn", {"depth": 0}, "depth=0 must be a positive"),
        ("cnn", {"kernel": True}, "kernel=True must be a positive"),
        ("cnn", {"dropout": 1.0}, "dropout=1.0 must be a number from 0 to below 1"),
        ("cnn", {"dtype": "float16"}, "dtype='float16': choose float32 or bfloat16"),
        ("cnn", {"num_outputs": 0}, "num_outputs=0 must be a positive"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **{"num_outputs": 2, **options})
