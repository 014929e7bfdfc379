"""speednet: its parts against NumPy, its whitening from start to file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from convnet import bundle as bundle_lib
from convnet import config as config_lib
from convnet import loop, models, prepare, train
from convnet import step as step_lib
from convnet.errors import UsageError

WIDTHS = (8, 12, 16)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """XLA's lowest level: what is tested here is what is computed, not how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def images():
    """Smooth in space and from channel to channel, as pictures are; float32."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 25, 25, 3))
    for axis in (1, 2):
        x = x + np.roll(x, 1, axis) + 0.5 * np.roll(x, 2, axis)
    return (x + x.mean(-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(images):
    model = models.create("speednet", num_outputs=4, widths=WIDTHS)
    found = jax.jit(model.init)(jax.random.key(0), images)
    return jax.tree.map(np.asarray, found)


def patches_of(x):
    """(places, 4 c) of all 2x2 patches, float64."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(1, 2))
    return np.moveaxis(windows, 3, -1).reshape(-1, 4 * x.shape[-1]).astype(np.float64)


def test_the_parameters_are_as_many_as_airbenchs():
    model = models.create("speednet", num_outputs=10)
    x = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    # Kernels of 3x3 from 24 whitened channels, with a norm's bias after each; the
    # whitening's bias; a head without one.
    channels = [(24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)]
    wanted = sum(9 * c + 1 for c, width in channels for _ in range(width))
    wanted += 24 + 256 * 10
    counts = [leaf.size for leaf in jax.tree.leaves(shapes["params"])]
    assert sum(counts) == wanted == 1_971_352
    kernel = shapes["batch_stats"]["base"]["stem"]["whiten"]["kernel"]
    assert kernel.shape == (2, 2, 3, 24)
    names = traverse_util.flatten_dict(shapes["params"], sep="/")
    assert not any("whiten" in name and "kernel" in name for name in names)
    assert not any(name.endswith("scale") for name in names)


def numpy_speednet(variables, x):
    """Prediction in float64, layer by layer."""

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def conv(x, kernel, pad):
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        size = kernel.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))
        return np.einsum("bhwcij,ijcf->bhwf", windows, kernel, optimize=True)

    def pool(x, window):
        b, h, w, c = x.shape
        h, w = h // window, w // window
        x = x[:, : h * window, : w * window]
        return x.reshape(b, h, window, w, window, c).max((2, 4))

    def norm(x, name, group):
        s, p = stats[group][name], params[group][name]
        assert set(p) == {"bias"}
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-12) + p["bias"]

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = wide["params"]["base"], wide["batch_stats"]["base"]
    x = conv(x.astype(np.float64), stats["stem"]["whiten"]["kernel"], 0)
    x = gelu(x + params["stem"]["whiten"]["bias"])
    for group in ("group1", "group2", "group3"):
        x = pool(conv(x, params[group]["conv1"]["kernel"], 1), 2)
        x = gelu(norm(x, "norm1", group))
        x = conv(x, params[group]["conv2"]["kernel"], 1)
        x = gelu(norm(x, "norm2", group))
    # Each place of what is left is a feature; the rest of the map is dropped.
    features = pool(x, 3).reshape(len(x), -1)
    return features @ wide["params"]["head"]["logits"]["kernel"] / features.shape[1]


def test_logits_are_numpys(variables, rng):
    # 54 pixels: maps of 53, 26, 13 and 6 leave four places for the head.
    x = rng.standard_normal((2, 54, 30, 3)).astype(np.float32)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return np.float32(noise / np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(1 + noise**2 if path[-1].key == "var" else noise / 3)

    model = models.create("speednet", num_outputs=4, widths=WIDTHS)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    drawn = jax.tree_util.tree_map_with_path(draw, shapes)
    assert drawn["params"]["head"]["logits"]["kernel"].shape == (2 * 16, 4)
    found = jax.jit(model.apply)(drawn, x)
    np.testing.assert_allclose(found, numpy_speednet(drawn, x), rtol=1e-4, atol=1e-5)


# Whitening.


def test_the_whitening_whitens(variables, images):
    kernel = variables["batch_stats"]["base"]["stem"]["whiten"]["kernel"]
    assert kernel.shape == (2, 2, 3, 24) and kernel.dtype == np.float32
    flat = kernel.reshape(12, 24).astype(np.float64)
    np.testing.assert_array_equal(flat[:, 12:], -flat[:, :12])
    patches = patches_of(images)
    moments = patches.T @ patches / len(patches)
    white = flat[:, :12].T @ moments @ flat[:, :12]
    # Each eigenvalue v ends at v / (v + 0.0005).
    values = np.linalg.eigvalsh(moments)
    assert values[0] < 0.1 * values[-1]  # or else there was nothing to whiten
    np.testing.assert_allclose(np.diag(white), values / (values + 5e-4), atol=1e-4)
    np.testing.assert_allclose(white, np.diag(np.diag(white)), atol=1e-4)

    model = models.create("speednet", num_outputs=4, widths=WIDTHS)
    _, state = model.apply(variables, images, mutable=["taps"])
    out = np.asarray(models.taps(state["taps"])["base/stem/whiten"], np.float64)
    assert out.shape == (64, 24, 24, 24)
    out = out[..., :12].reshape(-1, 12)  # its bias is zero
    np.testing.assert_allclose(out.T @ out / len(out), np.eye(12), atol=2e-3)


def test_a_direction_without_variance_is_not_blown_up():
    """Grey pictures have one channel's worth of it: epsilon holds the others."""
    rng = np.random.default_rng(2)
    grey = np.repeat(rng.standard_normal((8, 9, 9, 1)), 3, -1).astype(np.float32)
    model = models.create("speednet", num_outputs=2, widths=(2,))
    found = jax.jit(model.init)(jax.random.key(0), grey)
    kernel = np.asarray(found["batch_stats"]["base"]["stem"]["whiten"]["kernel"])
    norms = np.sqrt((kernel.reshape(12, 24) ** 2).sum(0))
    assert np.isfinite(kernel).all()
    assert norms.max() == pytest.approx(5e-4**-0.5, rel=0.05)


def test_the_first_features_of_a_kernel_pass_the_input_on(variables):
    base = variables["params"]["base"]
    layers = {
        f"{group}/{conv}": base[group][conv]["kernel"]
        for group in ("group1", "group2", "group3")
        for conv in ("conv1", "conv2")
    }
    for name, kernel in layers.items():
        *_, c, features = kernel.shape
        passed = min(c, features)
        wanted = np.zeros((3, 3, c, passed))
        wanted[1, 1, range(passed), range(passed)] = 1
        np.testing.assert_array_equal(kernel[..., :passed], wanted, name)
        others = kernel[..., passed:]
        limit = 1 / np.sqrt(9 * c)
        assert np.abs(others).max(initial=0) <= limit, name
        if others.size:
            assert others.std() == pytest.approx(limit / np.sqrt(3), rel=0.1), name
            assert abs(others.mean()) < 0.1 * limit
    # Fewer features than channels, more, and as many: all three occur.
    assert base["group1"]["conv1"]["kernel"].shape[2:] == (24, 8)
    assert base["group2"]["conv1"]["kernel"].shape[2:] == (8, 12)


def test_the_head_starts_with_a_deviation_of_one():
    model = models.create("speednet", num_outputs=300, widths=(64,))
    x = jnp.zeros((1, 8, 8, 3))
    head = jax.jit(model.init)(jax.random.key(0), x)["params"]["head"]
    assert set(head["logits"]) == {"kernel"}
    assert np.std(head["logits"]["kernel"]) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1), r"images \(b, h, w, c\) of at least 2x2, .* \(1, 1, 1, 3\)"),
        ((1, 32), r"of at least 2x2, .* \(1, 1, 32, 3\)"),
        ((2, 2), "group1: a map of 1x1 is too small"),
        ((8, 8), "group3: a map of 1x1 is too small"),
        ((24, 23), "the last pool: a map of 2x2 is too small .* windows of 3"),
        ((32,), r"images \(b, h, w, c\) .* \(1, 32, 3\)"),
        ((32, 32, 8), r"images \(b, h, w, c\) .* \(1, 32, 32, 8, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape, message):
    model = models.create("speednet", num_outputs=2, widths=(2, 2, 2))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape, 3)))


# In a run.


def write_arrays(path, count=90, side=25):
    rng = np.random.default_rng(3)
    labels = np.arange(count) % 2
    x = rng.integers(0, 256, (count, side, side, 3))
    x[labels == 1] //= 2
    # Each example has a brightness of its own: which ones are seen does show.
    x = (x * np.linspace(0.2, 1, count)[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=x, y_train=labels, x_test=x[:20], y_test=labels[:20])
    return x


def config_of(path, **changes):
    config = config_lib.default()
    given = {
        "data.name": "arrays",
        "data.dir": str(path),
        "data.batch_size": 10,
        "data.mean": (0.25,),
        "data.std": (0.5,),
        "model.name": "speednet",
        "model.widths": WIDTHS,
        "optimizer.name": "muon",
        "optimizer.normalize": True,
        "optimizer.ema": 0.9,
        "train.steps": 3,
        "train.eval_every": 0.0,
    }
    config.update_from_flattened_dict(given | changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps: its workdir, the images, and both ends of its state."""
    folder = tmp_path_factory.mktemp("speednet")
    x = write_arrays(folder / "data.npz")
    states = []
    ended = loop.Loop.run

    def run(self):
        states.append(jax.device_get(self._it.state))
        ended(self)
        states.append(jax.device_get(self._it.state))

    with pytest.MonkeyPatch.context() as context:
        context.setattr(loop.Loop, "run", run)
        train.run(config_of(folder / "data.npz"), folder / "run", "command")
    return folder / "run", x, *states


def test_the_kernel_is_measured_once_and_never_changes(finished):
    _, x, start, end = finished
    kernels = [
        stats["base"]["stem"]["whiten"]["kernel"]
        for state in (start, end)
        for stats in (state.batch_stats, state.ema["batch_stats"])
    ]
    for kernel in kernels[1:]:
        np.testing.assert_array_equal(kernel, kernels[0])
    # All 90 examples, fewer than it may see.
    patches = patches_of((x / 255 - 0.25) / 0.5)
    moments = patches.T @ patches / len(patches)
    flat = kernels[0].reshape(12, 24)[:, :12].astype(np.float64)
    values = np.linalg.eigvalsh(moments)
    white = flat.T @ moments @ flat
    np.testing.assert_allclose(white, np.diag(values / (values + 5e-4)), atol=1e-3)
    # Everything else moved.
    for name, before in traverse_util.flatten_dict(start.params, sep="/").items():
        after = traverse_util.flatten_dict(end.params, sep="/")[name]
        assert not np.array_equal(before, after), name
        assert np.isfinite(after).all()
    norm = end.batch_stats["base"]["group1"]["norm1"]
    assert norm["mean"].any() and (norm["var"] != 1).any()


def test_the_kernel_lies_among_the_statistics_of_the_model_file(finished):
    workdir, x, _, end = finished
    bundle = bundle_lib.load(workdir)
    averaged = end.ema
    jax.tree.map(np.testing.assert_array_equal, bundle.variables, averaged)
    kernel = bundle.variables["batch_stats"]["base"]["stem"]["whiten"]["kernel"]
    assert kernel.any()
    inputs = ((x[:4] / 255 - 0.25) / 0.5).astype(np.float32)
    logits = numpy_speednet(averaged, inputs)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = bundle.predict_fn()(x[:4])
    np.testing.assert_allclose(found, chances, rtol=1e-4, atol=1e-5)
    bundle_lib.save(workdir / "again.safetensors", bundle)
    again = bundle_lib.load(workdir / "again.safetensors").variables
    jax.tree.map(np.testing.assert_array_equal, again, bundle.variables)


def test_evenly_spaced_examples_are_measured(tmp_path, monkeypatch):
    x = write_arrays(tmp_path / "data.npz", count=31, side=25)
    base = type(models.create("speednet", num_outputs=2).base)
    monkeypatch.setattr(base, "init_examples", 4)
    it = prepare.prepare(config_of(tmp_path / "data.npz"))
    state = prepare.initial_state(it)
    kernel = np.asarray(state.batch_stats["base"]["stem"]["whiten"]["kernel"])
    flat = kernel.reshape(12, 24)[:, :12].astype(np.float64)
    for rows, seen in (([0, 10, 20, 30], True), ([0, 1, 2, 3], False)):
        patches = patches_of((x[rows] / 255 - 0.25) / 0.5)
        white = flat.T @ (patches.T @ patches / len(patches)) @ flat
        near = np.abs(white - np.eye(12)).max() < 0.02
        assert near == seen


def test_a_run_on_inputs_that_are_too_small_names_their_shape(tmp_path):
    write_arrays(tmp_path / "data.npz", count=12, side=16)
    with pytest.raises(UsageError, match=r"the last pool: .*an input is \(16, 16, 3\)"):
        prepare.prepare(config_of(tmp_path / "data.npz"))


# Once the rate of the whitening's bias is 0: from step 2 of these 5.

BIAS = "base/stem/whiten/bias"
SETTLING = {"train.steps": 5, "optimizer.whiten_until": 0.4}


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    path = tmp_path_factory.mktemp("settling") / "data.npz"
    write_arrays(path)
    return path


def trained(path, stop, start=0, state=None, settles=True):
    it = prepare.prepare(config_of(path, **SETTLING))
    if not settles:
        it.later = {}
    it.state = state or prepare.initial_state(it)
    loop.Loop(it, start, None, None).replay(stop)
    return jax.device_get(it.state)


@pytest.fixture(scope="module")
def half(arrays):
    return trained(arrays, 3)


@pytest.fixture(scope="module")
def whole(arrays):
    return trained(arrays, 5)


def test_a_settled_bias_changes_no_other_number(arrays, half, whole):
    found, want = (
        traverse_util.flatten_dict(
            {"params": s.params, "stats": s.batch_stats, "ema": s.ema}, sep="/"
        )
        for s in (whole, trained(arrays, 5, settles=False))
    )
    assert found.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-5)
    assert (found[f"params/{BIAS}"] == want[f"params/{BIAS}"]).all()
    # Its average still moves towards it.
    before = half.ema["params"]["base"]["stem"]["whiten"]["bias"]
    after, bias = found[f"ema/params/{BIAS}"], found[f"params/{BIAS}"]
    assert (abs(after - bias) < 0.9 * abs(before - bias)).all()


def test_a_run_resumed_after_it_settled_ends_with_the_same_bits(arrays, half, whole):
    resumed = trained(arrays, 5, start=3, state=half)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_its_gradient_is_not_computed_any_more(arrays):
    it = prepare.prepare(config_of(arrays, **SETTLING))
    assert {start: it.later[start].settled.params for start in it.later} == {2: {BIAS}}
    state = prepare.initial_state(it)
    batch = next(it.split("train").batches(it.train_order, 0, 1))

    def operations(recipe):
        step = jax.jit(functools.partial(step_lib.train_step, recipe=recipe))
        compiled = step.lower(state, it.split("train").data, batch).compile()
        return compiled.cost_analysis()["flops"]

    # Ten maps of 24x24 through a kernel of 3x3 from 24 channels to 8, backwards.
    spared = 2 * 10 * 24 * 24 * 9 * 24 * WIDTHS[0]
    assert operations(it.recipe_of(1)) - operations(it.recipe_of(2)) > 0.8 * spared


def test_nothing_settles_where_all_moves_to_the_end(arrays):
    plain = config_of(arrays, **SETTLING | {"optimizer.name": "sgd"})
    late = config_of(arrays, **SETTLING | {"optimizer.whiten_until": 0.9})
    for config in (plain, late):
        assert prepare.prepare(config).later == {}
