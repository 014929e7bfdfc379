"""The train and predict steps against NumPy, and on several devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from convnet import config as config_lib
from convnet import mesh as mesh_lib
from convnet import optim
from convnet import step as step_lib
from convnet.data.order import TrainOrder
from convnet.models import layers, pooling
from convnet.step import Recipe
from convnet.task import Classification, Regression

PROJECT = Path(__file__).resolve().parent.parent
K, SHAPE, MEAN, STD = 3, (4, 2, 2), (0.5, 0.25), (0.25, 0.5)


class Linear(nn.Module):
    """Softmax regression."""

    @nn.compact
    def __call__(self, inputs, train):
        return nn.Dense(K, name="head")(inputs.reshape(len(inputs), -1))


class Noise(nn.Module):
    """A bias on dropped-out ones: its gradient shows what was dropped."""

    @nn.compact
    def __call__(self, inputs, train):
        dropped = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(inputs), 64)))
        return dropped + self.param("bias", nn.initializers.zeros, (64,))


class Small(nn.Module):
    """All that a network has: convolution, batch statistics, dropout, a head."""

    @nn.compact
    def __call__(self, inputs, train):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(inputs)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(K, name="head")(x)


@functools.cache
def recipe_of(model=None, task=None, accumulate=1, ema=0.0, seed=0, **augment):
    """A recipe, the same object for the same arguments, so that `compiled` knows it."""
    settings = config_lib.default().augment
    for name, value in augment.items():
        settings[name] = value
    optimizer, _ = optim.create(
        SimpleNamespace(
            name="sgd",
            lr=0.3,
            momentum=0.8,
            nesterov=False,
            beta2=0.999,
            weight_decay=0.01,
            clip_norm=0.0,
        ),
        SimpleNamespace(name="constant", warmup=0.0, steps=(), factor=0.1, final=0.0),
        total_steps=10,
    )
    return Recipe(
        model or Linear(),
        task or Classification(K),
        optimizer,
        MEAN,
        STD,
        settings,
        seed,
        accumulate,
        ema,
    )


def split_of(examples=24):
    random = np.random.default_rng(0)
    return {
        "input": random.integers(0, 256, (examples, *SHAPE)).astype(np.uint8),
        "label": random.integers(0, K, examples).astype(np.int32),
        "weight": np.ones(examples, np.float32),
    }


def batch_of(step, examples=24, size=8):
    return TrainOrder(examples, size, seed=1)(step)


def streamed(step, data):
    """The batch as the streaming path sends it."""
    batch = batch_of(step)
    rows = batch["index"]
    weight = batch["weight"] * data["weight"][rows]
    return {
        **batch,
        "input": data["input"][rows],
        "label": data["label"][rows],
        "weight": weight,
    }


_COMPILED = {}


def compiled(function, recipe, **options):
    key = (function, id(recipe), *options)
    # Compiled fast rather than well.
    options["compiler_options"] = {"xla_backend_optimization_level": 0}
    if key not in _COMPILED:
        step = functools.partial(function, recipe=recipe)
        _COMPILED[key] = jax.jit(step, **options)
    return _COMPILED[key]


def initial(recipe):
    """The state before the first step, by one compiled program as in a run."""
    return compiled(create_state, recipe)(jnp.zeros((1, *SHAPE), jnp.uint8))


def create_state(inputs, recipe):
    return step_lib.create_state(recipe, inputs)


def train(recipe, data, steps=3, batches=None):
    """Some steps from the start; returns the state and each step's metrics."""
    state = initial(recipe)
    step = compiled(step_lib.train_step, recipe)
    metrics = []
    for number in range(steps):
        batch = batches[number] if batches else batch_of(number)
        state, found = step(state, data, batch)
        metrics.append(found)
    return jax.device_get(state), jax.device_get(metrics)


def assert_close(found, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        found,
        want,
    )


# Against NumPy.


def normalized(inputs):
    return ((inputs / 255 - MEAN) / STD).reshape(len(inputs), -1)


def reference(params, data, batches, ema=0.0):
    """Softmax regression by SGD with momentum and decay, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    momentum = {name: np.zeros_like(value) for name, value in params.items()}
    average, metrics = dict(params), []
    for step, batch in enumerate(batches):
        rows = batch["index"]
        weight = batch["weight"] * data["weight"][rows]
        x, labels = normalized(data["input"][rows]), data["label"][rows]
        log_p = special.log_softmax(x @ params["kernel"] + params["bias"], axis=1)
        losses = -log_p[np.arange(len(x)), labels]
        total = max(weight.sum(), 1)
        by_logits = (np.exp(log_p) - np.eye(K)[labels]) * weight[:, None] / total
        grads = {"kernel": x.T @ by_logits, "bias": by_logits.sum(0)}
        metrics.append(
            {
                "objective": (losses * weight).sum() / total,
                "loss": (losses * weight).sum(),
                "accuracy": ((log_p.argmax(1) == labels) * weight).sum(),
                "count": weight.sum(),
                "grad_norm": np.sqrt(sum((g**2).sum() for g in grads.values())),
            }
        )
        grads["kernel"] = grads["kernel"] + 0.01 * params["kernel"]
        for name in params:
            momentum[name] = 0.8 * momentum[name] + grads[name]
            params[name] = params[name] - 0.3 * momentum[name]
        decay = min(ema, (1 + step) / (10 + step))
        average = {n: decay * average[n] + (1 - decay) * params[n] for n in params}
    return params, average, metrics


def test_steps_agree_with_numpy():
    data = split_of()
    data["weight"][[2, 3, 5, 7, 11]] = 0
    recipe = recipe_of(ema=0.15)
    batches = [batch_of(step) for step in range(5)]
    batches[1]["weight"][:] = 0  # A step in which nothing counts.
    start = initial(recipe)
    state, metrics = train(recipe, data, 5, batches)
    want = reference(start.params["head"], data, batches, ema=0.15)
    assert_close(state.params["head"], want[0])
    assert_close(state.ema["params"]["head"], want[1])
    assert_close(metrics, want[2], rtol=1e-4)
    assert metrics[1]["count"] == 0 and metrics[1]["grad_norm"] == 0
    assert state.step == 5 and state.batch_stats == {}
    # 0.15 is the smaller one from the second step on: both branches were taken.
    assert 1 / 10 < 0.15 < 2 / 11


def test_create_state():
    plain = initial(recipe_of(Small()))
    assert plain.ema is None and plain.step == 0 and plain.step.dtype == jnp.int32
    assert plain.variables() == {
        "params": plain.params,
        "batch_stats": plain.batch_stats,
    }
    averaged = initial(recipe_of(Small(), ema=0.9))
    jax.tree.map(np.testing.assert_array_equal, averaged.ema, plain.variables())
    assert averaged.variables() is averaged.ema
    # Buffers of their own: the state is donated.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(averaged)]
    assert len(set(pointers)) == len(pointers)
    other = initial(recipe_of(Small(), seed=1))
    assert (other.params["conv"]["kernel"] != plain.params["conv"]["kernel"]).any()


class Measured(nn.Module):
    """A network whose first layer is measured on the inputs of `init`."""

    init_examples = 3

    @nn.compact
    def __call__(self, inputs, train):
        mean = self.variable("batch_stats", "mean", lambda: inputs.mean((0, 1, 2)))
        return nn.Dense(K, name="head")((inputs - mean.value).mean((1, 2)))


def test_the_state_is_made_from_normalized_inputs():
    recipe = recipe_of(Measured())
    images = split_of()["input"][:3]
    state = compiled(create_state, recipe)(images)
    want = normalized(images).reshape(-1, 2).mean(0)
    np.testing.assert_allclose(state.batch_stats["mean"], want, rtol=1e-5)
    whole = layers.Classifier(Measured(), Linear())
    assert step_lib.init_examples(recipe_of(whole)) == 3
    assert step_lib.init_examples(recipe_of(layers.Classifier(Small(), Linear()))) == 1


def test_batch_statistics_and_their_average():
    data = split_of()
    recipe = recipe_of(Small(), ema=0.5)
    state, _ = train(recipe, data, 1)
    start = initial(recipe)
    rows = batch_of(0)["index"]
    normal = (data["input"][rows] / 255 - MEAN) / STD
    conv = nn.Conv(4, (3, 3), use_bias=False)
    out = np.asarray(
        conv.apply({"params": start.params["conv"]}, normal.astype(np.float32)),
        np.float64,
    )
    mean, var = 0.1 * out.mean((0, 1, 2)), 0.9 + 0.1 * out.var((0, 1, 2))
    found = state.batch_stats["norm"]
    assert_close([found["mean"], found["var"]], [mean, var], rtol=1e-4)
    averaged = state.ema["batch_stats"]["norm"]
    # In the first step the average keeps a tenth.
    assert_close(
        [averaged["mean"], averaged["var"]], [0.9 * mean, 0.1 + 0.9 * var], rtol=1e-4
    )


def test_several_steps_in_one_program():
    data = split_of()
    data["weight"][[2, 3, 5]] = 0
    recipe = recipe_of(Small(), ema=0.5, accumulate=2, flip="random", brightness=0.5)
    one, metrics = train(recipe, data, 5)
    batches = [batch_of(number) for number in range(5)]
    stack = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
    start = initial(recipe)
    found, several = compiled(step_lib.train_steps, recipe)(start, data, stack)
    assert found.step == 5
    assert_close(jax.device_get(found), one, rtol=1e-4)
    assert several.keys() == metrics[0].keys()
    for name, values in several.items():
        assert values.shape == (5,)
        want = [step[name] for step in metrics]
        np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-6)


# What must not matter.


def test_microbatches_agree_with_the_whole():
    data = split_of()
    data["weight"][[2, 3, 5]] = 0
    whole = train(recipe_of(ema=0.15), data)
    assert_close(train(recipe_of(accumulate=4, ema=0.15), data), whole)


def test_rows_of_weight_zero_do_not_influence_the_params():
    data = split_of()
    zero = [2, 3, 5, 7, 11]
    data["weight"][zero] = 0
    recipe = recipe_of(ema=0.15)
    state, metrics = train(recipe, data)
    garbage = {name: value.copy() for name, value in data.items()}
    garbage["input"][zero] = 255 - garbage["input"][zero]
    garbage["label"][zero] = (garbage["label"][zero] + 1) % K
    other, other_metrics = train(recipe, garbage)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    jax.tree.map(np.testing.assert_array_equal, metrics, other_metrics)
    # And they do count where their weight is 1.
    garbage["weight"][zero] = 1
    counted, _ = train(recipe, garbage)
    difference = counted.params["head"]["kernel"] - state.params["head"]["kernel"]
    assert np.abs(difference).max() > 0.01


def test_uint8_and_float_inputs_and_both_paths_agree():
    data = split_of()
    data["weight"][[2, 3, 5]] = 0
    recipe = recipe_of(ema=0.15)
    resident = train(recipe, data)
    batches = [streamed(step, data) for step in range(3)]
    jax.tree.map(np.testing.assert_array_equal, train(recipe, {}, 3, batches), resident)
    unit = {**data, "input": data["input"].astype(np.float32) / np.float32(255)}
    assert_close(train(recipe, unit), resident)


def test_to_unit_and_normalize():
    every = np.arange(256, dtype=np.uint8)
    unit = np.asarray(step_lib.to_unit(jnp.asarray(every)))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, every / 255.0, rtol=1e-6)
    floats = np.float16([-2, 300])
    np.testing.assert_array_equal(step_lib.to_unit(jnp.asarray(floats)), [-2, 300])
    inputs = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    for mean, std in ((MEAN, STD), ((0.5,), (0.25,))):
        want = (inputs.astype(np.float64) - mean) / std
        found = step_lib.normalize(jnp.asarray(inputs), mean, std)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


# Randomness.


def test_key_streams_differ():
    keys = [
        tuple(jax.random.key_data(recipe_of(seed=seed).key(stream, step)).tolist())
        for seed in (0, 1)
        for stream in (0, 1, 2)
        for step in (0, 1, 2, 1000)
    ]
    assert len(set(keys)) == len(keys)
    traced = jax.jit(lambda step: jax.random.key_data(recipe_of().key(1, step)))
    assert tuple(traced(1000).tolist()) == keys[7]


def test_dropout_differs_between_microbatches_and_steps():
    """Two examples, one in each microbatch; a gradient counts those that were kept."""
    task = Regression((64,))
    data = {
        "input": np.zeros((2, *SHAPE), np.uint8),
        "label": np.zeros((2, 64), np.float32),
        "weight": np.ones(2, np.float32),
    }
    batch = {
        "index": np.arange(2, dtype=np.int32),
        "epoch": np.zeros(2, np.int32),
        "weight": np.ones(2, np.float32),
    }

    recipe = recipe_of(Noise(), task, accumulate=2)
    start = initial(recipe)

    def kept(step):
        state = start.replace(step=jnp.asarray(step, jnp.int32))
        state, _ = compiled(step_lib.train_step, recipe)(state, data, batch)
        # lr * (mean over 2 examples of 2 * 2 * kept / 64)
        count = np.asarray(state.params["bias"]) / (-0.3 * 2 / 64)
        np.testing.assert_allclose(count, np.rint(count), atol=1e-4)
        return np.rint(count).astype(int).tolist()

    # 1 where one of the two was dropped: never, if both had the same mask.
    assert set(kept(0)) == set(kept(1)) == {0, 1, 2}
    assert kept(0) == kept(0) != kept(1)


def test_augmented_depends_on_the_step_and_not_on_the_microbatches():
    data = split_of()
    batch = batch_of(0)
    settings = {"flip": "random", "contrast": 0.5}

    def augmented(step=0, **options):
        recipe = recipe_of(**settings, **options)
        return jax.device_get(compiled(step_lib.augmented, recipe)(step, data, batch))

    first = augmented()
    assert first["input"].shape == (8, *SHAPE) and first["input"].dtype == np.float32
    assert first["target"].shape == (8, K) and first["weight"].shape == (8,)
    jax.tree.map(np.testing.assert_array_equal, first, augmented(accumulate=4))
    jax.tree.map(np.testing.assert_array_equal, first, augmented())
    assert (augmented(step=1)["input"] != first["input"]).any()


def test_augmented_without_augmentation_is_the_data():
    data = split_of()
    batch = batch_of(2)
    seen = compiled(step_lib.augmented, recipe_of())(2, data, batch)
    rows = batch["index"]
    np.testing.assert_allclose(seen["input"], data["input"][rows] / 255, rtol=1e-6)
    np.testing.assert_array_equal(seen["target"], np.eye(K)[data["label"][rows]])


# Prediction.


def test_predict_step_agrees_with_numpy():
    data = split_of()
    data["weight"][[2, 3]] = 0
    # Neither augmentation nor smoothing touches what is measured.
    task = Classification(K, label_smoothing=0.2, class_weights=(1.0, 2.0, 3.0))
    recipe = recipe_of(task=task, brightness=0.9)
    state = initial(recipe)
    predict = compiled(step_lib.predict_step, recipe)
    batch = batch_of(0)
    found = predict(state.variables(), data, batch)
    rows = batch["index"]
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params["head"])
    logits = normalized(data["input"][rows]) @ head["kernel"] + head["bias"]
    log_p, labels = special.log_softmax(logits, axis=1), data["label"][rows]
    want = {
        "index": rows,
        "prediction": np.exp(log_p),
        "label": labels,
        "weight": data["weight"][rows],
        "loss": -log_p[np.arange(8), labels],
        "accuracy": (log_p.argmax(1) == labels).astype(float),
    }
    assert_close(dict(found), want, rtol=1e-4)
    again = predict(state.variables(), {}, streamed(0, data))
    jax.tree.map(np.testing.assert_array_equal, dict(again), dict(found))


def test_predict_step_averages_the_logits_of_its_views():
    data = split_of()
    data["weight"][[2, 3]] = 0
    recipe = recipe_of()
    state, batch = initial(recipe), batch_of(0)
    images = data["input"][batch["index"]]
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params["head"])

    def logits_of(images):
        return normalized(images) @ head["kernel"] + head["bias"]

    # (4, 2) pixels, moved by one and mirrored at the edge.
    up, down = (
        images[:, [1, 2, 3, 2]][:, :, [1, 0]],
        images[:, [1, 0, 1, 2]][:, :, ::-1],
    )
    both = [logits_of(x) + logits_of(x[:, :, ::-1]) for x in (images, up, down)]
    want = {"flip": both[0] / 2, "flip_translate": both[0] / 4 + sum(both[1:]) / 8}
    for views, logits in want.items():
        step = functools.partial(step_lib.predict_step, views=views)
        found = compiled(step, recipe)(state.variables(), data, batch)
        log_p = special.log_softmax(logits, axis=1)
        labels = data["label"][batch["index"]]
        np.testing.assert_allclose(found["prediction"], np.exp(log_p), rtol=1e-4)
        loss = -log_p[np.arange(8), labels]
        np.testing.assert_allclose(found["loss"], loss, rtol=1e-4)
        np.testing.assert_array_equal(found["weight"], data["weight"][batch["index"]])
    assert not np.allclose(want["flip"], want["flip_translate"])


def test_predict_step_uses_running_statistics():
    recipe = recipe_of(Small())
    data = split_of()
    state = initial(recipe)
    predict = compiled(step_lib.predict_step, recipe)
    batch = batch_of(0)
    whole = predict(state.variables(), data, batch)["prediction"]
    # An example's prediction does not depend on what else is in its batch.
    other = {**batch, "index": np.where(np.arange(8) < 4, batch["index"], 0)}
    found = predict(state.variables(), data, other)["prediction"]
    np.testing.assert_allclose(found[:4], whole[:4], rtol=1e-6)
    np.testing.assert_array_equal(found[4], found[5])


# Several devices.


def several_steps():
    """Steps with all that is random, on all devices of this process; what comes out."""
    mesh = mesh_lib.make(16)
    recipe = recipe_of(
        Small(), accumulate=2, ema=0.9, flip="random", crop_pad=1, brightness=0.5
    )
    data = split_of()
    data["weight"][[2, 3, 5]] = 0
    placed = mesh_lib.put_whole(mesh, data)
    everywhere = mesh_lib.replicated(mesh)
    create = compiled(create_state, recipe, out_shardings=everywhere)
    step = compiled(
        step_lib.train_step, recipe, donate_argnums=0, out_shardings=everywhere
    )
    state, metrics = create(jnp.asarray(data["input"][:1])), []
    for number in range(3):
        batch = mesh_lib.put_batch(mesh, batch_of(number, size=16))
        state, found = step(state, placed, batch)
        metrics.append(found)
    predict = compiled(step_lib.predict_step, recipe)
    predicted = predict(state.variables(), placed, batch)
    leaves = jax.tree_util.tree_leaves_with_path((state, metrics, predicted))
    shards = [shard.data.shape for shard in batch["index"].addressable_shards]
    return {"shards": np.asarray(shards)} | {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves
    }


class Ours(nn.Module):
    """The layers with backward passes of their own."""

    @nn.compact
    def __call__(self, inputs):
        x = layers.Conv(6, use_bias=False, name="conv")(inputs)
        norm = layers.BatchNorm(name="norm")
        x = layers.normalize_and_activate(self, norm, x, True, "gelu", "gelu")
        return pooling.max_pool(x, 2)


def gradients_of_layers():
    """Value, statistics and gradients, the batch on all devices of this process."""
    random = np.random.default_rng(3)
    mesh = mesh_lib.make(16)
    shapes = {"x": (16, 6, 6, 5), "weights": (16, 3, 3, 6)}
    batch = {name: random.normal(size=shape) for name, shape in shapes.items()}
    batch = {name: value.astype(np.float32) for name, value in batch.items()}
    params = {
        "conv": {"kernel": random.normal(size=(3, 3, 5, 6)).astype(np.float32)},
        "norm": {name: np.full(6, 1.5, np.float32) for name in ("scale", "bias")},
    }
    stats = {"norm": {name: np.ones(6, np.float32) for name in ("mean", "var")}}

    @functools.partial(
        jax.jit,
        out_shardings=mesh_lib.replicated(mesh),
        compiler_options=mesh_lib.compiler_options("cpu"),
    )
    def run(params, batch):
        def loss(params, x):
            given = {"params": params, "batch_stats": stats}
            y, state = Ours().apply(given, x, mutable=["batch_stats"])
            return (y * batch["weights"]).mean(), state

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, batch["x"])

    found = run(mesh_lib.put_whole(mesh, params), mesh_lib.put_batch(mesh, batch))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(found))
    assert len(leaves) == 7 and all(np.any(leaf) for _, leaf in leaves)
    return {"layers" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def save_several_steps(path):
    np.savez(path, **several_steps(), **gradients_of_layers())


def test_eight_devices_agree_with_one(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)]),
    }
    path = tmp_path / "eight.npz"
    program = "import sys, test_step; test_step.save_several_steps(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, path], env=environment, check=True, timeout=300
    )
    with np.load(path, allow_pickle=False) as file:
        eight = dict(file)
    one = several_steps() | gradients_of_layers()
    assert eight.pop("shards").tolist() == [[2]] * 8
    assert (
        one.pop("shards").tolist() == [[16 // jax.device_count()]] * jax.device_count()
    )
    assert eight.keys() == one.keys() and len(one) > 30
    for name, value in one.items():
        np.testing.assert_allclose(
            eight[name], value, rtol=2e-5, atol=2e-6, err_msg=name
        )
