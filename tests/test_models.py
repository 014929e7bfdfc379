"""Whole networks against NumPy; names, options and counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from numpy_layers import (
    draw_variables,
    numpy_conv,
    numpy_norm,
    numpy_pool,
    small_cnn,
    tapped,
)

from convnet import models
from convnet.models import layers
from convnet.models.cnn import ConvBase
from convnet.models.resnet import ResNetBase
from convnet.models.summary import summarize

RANKS = (1, 2, 3, 4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def cnn():
    return small_cnn()


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
        "width": 24,
        "stem": "imagenet",
        "bn_momentum": 0.5,
        "variant": "keras",
        "aux": True,
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
        ("resnet50", {"variant": "tf"}, "'tf' must be one of torchvision, keras"),
        ("inception_v3", {"aux": "yes"}, "aux='yes' must be one of False, True"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **{"num_outputs": 2, **options})
