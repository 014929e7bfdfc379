"""Units: what they can see, what they answer to most, and how layers are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from convnet import models
from convnet.errors import UsageError
from convnet.explaining import layers, neighbours, visualization
from convnet.explaining.receptive_field import ReceptiveField, receptive_fields
from convnet.models import lowering

NETWORKS = {
    "cnn, max pools": ("cnn", {"widths": (3, 3), "depth": 2}, (33, 30, 2)),
    "cnn, average pools": (
        "cnn",
        {"widths": (3, 3), "depth": 1, "pool": "average", "kernel": 4},
        (32, 27, 1),
    ),
    "series": ("cnn", {"widths": (3, 3, 3), "depth": 1, "kernel": 7}, (128, 1)),
    "weather": (
        "cnn",
        {
            "widths": (3, 3),
            "depth": 1,
            "pool": "none",
            "padding": "CIRCULAR",
            "gather": "time",
        },
        (4, 12, 16, 1),
    ),
    "resnet18": ("resnet18", {"width": 2, "stem": "imagenet"}, (96, 80, 3)),
    "resnet9": ("resnet9", {"width": 2}, (48, 48, 3)),
    "squeezenet": ("squeezenet1_1", {"width": 4}, (63, 67, 3)),
    "speednet": ("speednet", {"widths": (4, 4, 4)}, (40, 40, 3)),
}


def bounds(seen):
    """The box of the places that are seen, (*spatial) of booleans."""
    box = []
    for axis in range(seen.ndim):
        others = tuple(a for a in range(seen.ndim) if a != axis)
        places = np.flatnonzero(seen.any(others))
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)


@pytest.mark.parametrize("case", NETWORKS)
def test_arithmetic_and_gradients_agree_on_what_a_unit_sees(case):
    name, options, shape = NETWORKS[case]
    model = models.create(name, num_outputs=2, **options)
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 1, (8, *shape)).astype(np.float32)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jnp.zeros((1, *shape))
    )

    def positive(path, leaf):  # no activation then stops anything
        kind = path[-1].key
        if kind in ("mean", "bias"):
            return np.zeros(leaf.shape, np.float32)
        return rng.uniform(0.1, 1, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(positive, variables)
    fields = receptive_fields(model, variables, shape)

    def tapped(x):
        _, state = model.apply(variables, x, mutable=["taps"])
        return models.taps(state["taps"])

    taps = jax.eval_shape(tapped, x)
    maps = layers.maps({n: t.shape[1:] for n, t in taps.items()}, len(shape) - 1)
    assert set(maps) <= set(fields)  # every map has its field
    wanted = [tap for tap in maps if layers.kind(tap)][-3:] + maps[:1]
    units = {tap: [n // 2 for n in taps[tap].shape[1:-1]] for tap in wanted}

    def gradients(x):
        out, pull = jax.vjp(lambda x: {t: tapped(x)[t] for t in wanted}, x)
        zeros = {t: jnp.zeros_like(out[t]) for t in wanted}
        return {
            t: pull({**zeros, t: zeros[t].at[:, *units[t]].set(1.0)})[0] for t in wanted
        }

    with lowering.plain():
        found = jax.jit(gradients)(x)
    for tap in wanted:
        # Of a window the gradient of a max-pool goes to one place only, and to another
        # one in each input and channel.
        seen = (np.asarray(found[tap]) != 0).any((0, -1))
        assert bounds(seen) == fields[tap].box(units[tap], shape[:-1]), tap


def textbook(name, **options):
    model = models.create(name, num_outputs=2, **options)
    shape = (224, 224, 3)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jnp.zeros((1, *shape))
    )
    return receptive_fields(model, variables, shape)


def test_receptive_fields_are_those_of_the_textbooks():
    fields = textbook("vgg16", width=1, dense=(2,))
    assert fields["base/block1/conv2"].size == (5, 5)
    assert fields["base/block5/conv3"].size == (196, 196)
    assert fields["base/block5/pool"] == ReceptiveField(
        (212,) * 2, (32,) * 2, (-90,) * 2
    )
    assert "base/features" not in fields
    # Norms and dense layers over channels change nothing.
    fields = textbook("convnext_tiny", width=1)
    assert fields["base/stage1/block1/add"].size == (28, 28)  # 4 + 6 * 4
    assert fields["base/stage1/block3/gelu"].size == (76, 76)
    assert fields["base/downsample2/conv"].step == (8, 8)
    # Branches that meet again see what the widest of them sees.
    fields = textbook("inception_v3", width=1)
    assert fields["base/mixed1/concat"].step == (8, 8)
    sides = [f.size[0] for n, f in fields.items() if n.startswith("base/mixed1/b")]
    assert fields["base/mixed1/concat"].size[0] == max(sides)


def test_a_box_is_cut_to_the_input():
    field = ReceptiveField((5, 3), (2, 1), (-2, -1))
    assert field.box((0, 1), (8, 8)) == (slice(0, 3), slice(0, 3))
    assert field.box((3, 7), (8, 8)) == (slice(4, 8), slice(6, 8))


@pytest.mark.parametrize("shape", [(24, 32, 3), (48, 1)])
def test_optimisation_finds_what_a_unit_answers_to(shape):
    # Two units whose answers are known: a smooth pattern, and its opposite.
    waves = [np.sin(2 * np.pi * (np.arange(n) + 0.5) / n) for n in shape[:-1]]
    pattern = sum(np.meshgrid(*waves, indexing="ij"))[..., None]
    pattern = np.broadcast_to(pattern, shape).astype(np.float32)
    both = jnp.stack([pattern, -pattern])

    def unit(x):
        return jnp.sum(both * (2 * x - 1), tuple(range(1, x.ndim)))

    options = visualization.Options(steps=64, rate=0.02)
    found, answers = visualization.most_activating(unit, shape, 2, options)
    assert found.shape == (2, *shape) and 0 <= found.min() and found.max() <= 1
    np.testing.assert_allclose(answers, unit(found), rtol=1e-4)
    for one, wanted in zip(found, (pattern, -pattern), strict=True):
        assert np.corrcoef(one.ravel(), wanted.ravel())[0, 1] > 0.65  # it saturates
    again, _ = visualization.most_activating(unit, shape, 2, options)
    np.testing.assert_array_equal(found, again)


def test_the_nearest_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    queries, items = rng.standard_normal((3, 2, 5)), rng.standard_normal((40, 2, 5))
    items[7] = 3 * queries[1]
    batches = (
        (list(range(i, i + 9)[: 40 - i]), items[i : i + 9]) for i in range(0, 40, 9)
    )
    found = neighbours.nearest(queries, batches, 4)
    peer = NearestNeighbors(n_neighbors=4, metric="cosine")
    distance, index = peer.fit(items.reshape(40, -1)).kneighbors(queries.reshape(3, -1))
    assert [[item for _, item in row] for row in found] == index.tolist()
    similarity = np.array([[value for value, _ in row] for row in found])
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-5)
    assert found[1][0] == (pytest.approx(1), 7)


def test_layers_are_told_by_their_names():
    kinds = {
        "base/block1/conv2": "convolution",
        "base/stage1/block1/shortcut_conv": "convolution",
        "base/stem/whiten": "convolution",
        "base/group1/conv_pool1": "pooling",
        "base/pool": "pooling",
        "base/block1/relu1": "activation",
        "base/group1/gelu2": "activation",
        "base/block1/norm1": "",
        "base/stage1/block1/add": "",
        "base/features": "",
        "head/logits": "",
    }
    assert {name: layers.kind(name) for name in kinds} == kinds
    shapes = {
        "base/block1/conv1": (8, 8, 4),
        "base/block1/relu1": (8, 8, 4),
        "base/block1/pool": (4, 4, 4),
        "base/block2/norm1": (4, 4, 4),
        "base/block2/relu1": (4, 4, 4),
        "base/pool": (1, 1, 4),
        "base/features": (4,),
    }
    maps = layers.maps(shapes, 2)
    assert maps == list(shapes)[:5]
    assert layers.last(maps) == "base/block2/relu1"
    assert layers.last(maps[:4]) == "base/block2/norm1"
    blocks = [name for name, _ in layers.stages(maps, 5)]
    assert blocks == ["base/block1", "base/block2"]
    assert layers.stages(maps, 1) == [("base/block1", maps[:3])]
    assert layers.choose("block2/relu1", maps) == "base/block2/relu1"
    with pytest.raises(UsageError, match="several.*base/block1/relu1, base/block2"):
        layers.choose("relu1", maps)
    with pytest.raises(UsageError, match="no layer.*base/block1/conv1"):
        layers.choose("block1/cnv1", maps)
