"""Starting from another model: what is loaded, frozen, thawed, cached."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from scipy import special

from benchmarks import table as table_lib
from benchmarks import transfer as benchmark
from convnet import bundle as bundle_lib
from convnet import (
    checkpoint,
    cli,
    features,
    freezing,
    loop,
    main,
    models,
    optim,
    patterns,
    prepare,
    train,
    transfer,
)
from convnet import config as config_lib
from convnet import step as step_lib
from convnet.bundle import Bundle
from convnet.errors import ConvnetError, UsageError
from convnet.freezing import Frozen
from convnet.models import lowering
from convnet.step import Recipe
from convnet.task import Classification
from convnet.transfer_table import Leaf

EXAMPLES, BATCH, SHAPE, STEPS = 40, 8, (8, 8, 3), 8
OPTIONS = {"widths": [4, 6], "depth": 1, "norm": "batch", "dropout": 0.2}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.usefixtures("quick_compiler"),
]


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """XLA's lowest level: what is tested here is what is wired to what."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


COMPILED = {}


def compile_once(self, function, *args, recipe=None, **options):
    """`Run.compile`, for which runs of one config are the same."""
    shapes = jax.tree.map(jax.typeof, args)
    name = getattr(function, "func", function).__name__
    stage = [start for start, later in self.later.items() if later is recipe]
    keywords = getattr(function, "keywords", {})
    key = (config_lib.sha256(self.config), name, str(keywords), str(stage), str(shapes))
    if key not in COMPILED:
        COMPILED[key] = compile_each(self, function, *args, recipe=recipe, **options)
    return COMPILED[key]


compile_each = prepare.Run.compile


@functools.cache
def load_once(key, path, changed_at):
    return load_each(key, path)


load_each = transfer.load


@pytest.fixture(scope="module", autouse=True)
def once():
    """Programs are compiled, and models checked by their probes, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.Run, "compile", compile_once)
        patch.setattr(
            transfer,
            "load",
            lambda key, name: (
                load_once(key, name, Path(name).stat().st_mtime_ns)
                if Path(name).exists()
                else load_each(key, name)
            ),
        )
        yield


def random_variables(model, inputs, seed=0):
    """Variables that are nowhere zero or one: neither biases nor statistics."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    leaves = {
        path: rng.normal(size=leaf.shape).astype("f") / 3
        for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return traverse_util.unflatten_dict(
        {k: np.abs(v) if k[-1] == "var" else v for k, v in leaves.items()}
    )


def make_source(path, classes=("a", "b", "c"), name="cnn", options=OPTIONS, seed=0):
    """A model file of random weights."""
    model = models.create(name, num_outputs=len(classes), **options)
    bundle = Bundle(
        architecture={"name": name, "num_outputs": len(classes), "options": options},
        task={"name": "classification", "positive": None},
        classes=classes,
        preprocessing={
            "input_shape": list(SHAPE),
            "input_dtype": "uint8",
            "resize": "squash",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.2, 0.3],
        },
        provenance={},
        variables=random_variables(model, jnp.zeros((1, *SHAPE)), seed),
    )
    bundle_lib.save(path, bundle)
    return bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three classes, and data of two others."""
    folder = tmp_path_factory.mktemp("transfer")
    make_source(folder / "source.safetensors")
    rng = np.random.default_rng(0)
    labels = np.arange(EXAMPLES) % 2
    x = rng.integers(0, 160, (EXAMPLES, *SHAPE)) + 90 * labels[:, None, None, None]
    np.savez(
        folder / "data.npz",
        x_train=x.astype("u1"),
        y_train=labels,
        x_test=x[:13].astype("u1"),
        y_test=labels[:13],
        classes=np.array(["dark", "light"]),
    )
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return flat(bundle_lib.load(folder / "source.safetensors").variables)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def config_of(folder, **changes):
    config = config_lib.default()
    given = {
        "init_from": str(folder / "source.safetensors"),
        "data.name": "arrays",
        "data.dir": str(folder / "data.npz"),
        "data.batch_size": BATCH,
        "optimizer.lr": 0.05,
        "optimizer.weight_decay": 0.01,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.eval_every": 0.0,
    }
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(given)
    return config


def run(folder, name, **changes):
    return train.run(config_of(folder, **changes), folder / name, "command")


def take_steps(it, count):
    """Prepares the state and does so many steps; the state as a flat dict of arrays."""
    it.state = prepare.initial_state(it)
    split = it.split("train")
    for batch in split.batches(it.train_order, 0, count):
        step = it.compile(step_lib.train_step, it.state, split.data, batch)
        it.state, _ = step(it.state, split.data, batch)
    return checkpoint.flat(jax.device_get(it.state))


def saved(folder, name, step):
    """All leaves of a checkpoint by name, read with Orbax alone."""
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(folder / name / "checkpoints" / str(step) / "state")
    return {path: np.asarray(leaf) for path, leaf in found.items()}


# What a frozen part does.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "muon"])
def test_what_is_frozen_stays_as_it_is(folder, source, optimizer):
    changes = {"optimizer__name": optimizer, "optimizer__ema": 0.9}
    changes |= {"optimizer__clip_norm": 1.0, "augment__flip": "random"}
    it = prepare.prepare(config_of(folder, transfer__freeze="base", **changes))
    start = checkpoint.flat(jax.device_get(prepare.initial_state(it)))
    after = take_steps(it, 2)
    base = {path: leaf for path, leaf in source.items() if "/base/" in path}
    assert len(base) == 10 and sum("batch_stats" in path for path in base) == 4
    for path, leaf in base.items():
        assert after[path].tobytes() == leaf.tobytes(), path
        assert after[f"ema/{path}"].tobytes() == leaf.tobytes(), path
    for path in ("params/head/logits/kernel", "ema/params/head/logits/kernel"):
        assert not np.array_equal(after[path], start[path])
    states = [path for path in after if path.startswith("opt_state")]
    assert any("head" in path for path in states)
    assert not any("base" in path for path in states)


def test_without_freezing_the_base_and_its_statistics_learn(folder, source):
    after = take_steps(prepare.prepare(config_of(folder)), 1)
    for path, leaf in source.items():
        if "/base/" in path:
            assert after[path].shape == leaf.shape
            assert not np.array_equal(after[path], leaf), path


def recipe_of(model, frozen, task=None, accumulate=1):
    config = config_lib.default()
    optimizer = config.optimizer
    optimizer.lr, optimizer.momentum, optimizer.nesterov = 1.0, 0.0, False
    config.schedule.name = "constant"
    made, _ = optim.create(optimizer, config.schedule, 10)
    return Recipe(
        model,
        task or Classification(3),
        frozen.without(made),
        (0.0,),
        (1.0,),
        config.augment,
        seed=0,
        accumulate=accumulate,
        ema=0.0,
        frozen=frozen,
    )


def batch_of(count, shape=SHAPE, classes=3):
    rng = np.random.default_rng(1)
    return {
        "input": rng.normal(size=(count, *shape)).astype("f"),
        "label": (np.arange(count) % classes).astype("i4"),
        "index": np.arange(count, dtype="i4"),
        "epoch": np.zeros(count, "i4"),
        "weight": np.ones(count, "f"),
    }


def step_of(model, variables, paths, batch, accumulate=1):
    """What a step of plain gradient descent at rate 1 takes away, and the state."""
    collections = variables["params"], variables.get("batch_stats", {})
    frozen = Frozen.of(*collections, paths)
    recipe = recipe_of(model, frozen, accumulate=accumulate)
    state = step_lib.TrainState(
        jnp.zeros((), jnp.int32),
        *collections,
        recipe.optimizer.init(collections[0]),
        None,
    )
    step = jax.jit(functools.partial(step_lib.train_step, recipe=recipe))
    after, _ = step(state, {}, batch)
    gradient = jax.tree.map(lambda old, new: old - new, state.params, after.params)
    return {path: np.asarray(leaf) for path, leaf in flat(gradient).items()}, after


def test_the_heads_gradient_on_a_frozen_base():
    """In NumPy: softmax regression on the features of prediction."""
    model = models.create("cnn", num_outputs=3, widths=(4,), depth=1, norm="batch")
    batch = batch_of(6)
    variables = random_variables(model, batch["input"])
    paths = [path.split("/", 1)[1] for path in flat(variables) if "/base/" in path]
    found, after = step_of(model, variables, paths, batch)

    x = np.asarray(model.apply(variables, batch["input"], False, method=step_lib.base))
    layer = variables["params"]["head"]["logits"]
    errors = special.softmax(x @ layer["kernel"] + layer["bias"], -1)
    errors = (errors - np.eye(3)[batch["label"]]) / 6
    np.testing.assert_allclose(found["head/logits/kernel"], x.T @ errors, atol=1e-5)
    np.testing.assert_allclose(found["head/logits/bias"], errors.sum(0), atol=1e-5)
    assert all(not found[path].any() for path in found if path.startswith("base"))
    for path, leaf in flat(after.batch_stats).items():
        assert np.array_equal(leaf, flat(variables["batch_stats"])[path])


def test_the_gradient_of_what_trains_is_that_of_the_whole_network():
    """Also where the frozen part lies behind, or between."""
    accumulate = 2
    model = models.create("cnn", num_outputs=3, widths=(4, 5), depth=1)
    batch = batch_of(4)
    variables = random_variables(model, batch["input"])
    whole, _ = step_of(model, variables, [], batch, accumulate)
    for frozen in ("base/block1", "head", "*/bias"):
        paths = {p for p in whole if patterns.matches(frozen, p)}
        assert 0 < len(paths) < len(whole)
        found, _ = step_of(model, variables, paths, batch, accumulate)
        for path, leaf in whole.items():
            want = np.zeros_like(leaf) if path in paths else leaf
            np.testing.assert_allclose(found[path], want, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("resnet9", {"width": 4}, (16, 16, 3)),
        ("resnet18", {"width": 4}, (16, 16, 3)),
        ("vgg11_bn", {"width": 4, "dense": (5,)}, (32, 32, 3)),
        ("speednet", {"widths": (4, 4, 4)}, (32, 32, 3)),
    ],
)
def test_a_resting_network_is_that_of_prediction(name, options, shape):
    model = models.create(name, num_outputs=3, **options)
    inputs = jnp.asarray(batch_of(2, shape)["input"])
    variables = random_variables(model, inputs)
    paths = [path.split("/", 1)[1] for path in flat(variables)]
    frozen = Frozen.of(variables["params"], variables["batch_stats"], paths)

    @jax.jit
    def training(variables):
        with frozen.resting():
            return model.apply(
                variables,
                inputs,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )

    logits, after = training(variables)
    want = jax.jit(functools.partial(model.apply, train=False))(variables, inputs)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    for path, leaf in flat(after["batch_stats"]).items():
        assert np.array_equal(leaf, flat(variables["batch_stats"])[path]), path


def test_statistics_can_be_frozen_alone():
    model = models.create("cnn", num_outputs=3, widths=(4, 5), depth=1, norm="batch")
    batch = batch_of(4)
    variables = random_variables(model, batch["input"])
    stats = list(flat(variables["batch_stats"]))
    found, after = step_of(model, variables, stats[:2], batch)
    assert all(leaf.any() for leaf in found.values())
    for path, leaf in flat(after.batch_stats).items():
        same = np.array_equal(leaf, flat(variables["batch_stats"])[path])
        assert same == (path in stats[:2]), path


def convolutions(model, variables, paths, batch):
    frozen = Frozen.of(variables["params"], variables.get("batch_stats", {}), paths)
    recipe = recipe_of(model, frozen)
    state = jax.eval_shape(
        functools.partial(step_lib.create_state, recipe), batch["input"]
    )
    step = jax.jit(functools.partial(step_lib.train_step, recipe=recipe))
    return step.lower(state, {}, batch).as_text().count("stablehlo.convolution(")


def test_what_is_frozen_costs_nothing_backwards():
    """Convolutions in the program: forwards, by a kernel, by an input."""
    model = models.create("cnn", num_outputs=3, widths=(4, 5), depth=2, norm="batch")
    batch = batch_of(8)
    variables = random_variables(model, batch["input"])
    paths = [path.split("/", 1)[1] for path in flat(variables)]

    def count(pattern):
        frozen = [path for path in paths if patterns.matches(pattern, path)]
        return convolutions(model, variables, frozen, batch)

    assert count("base") == 4
    # The fast forms of a gradient are other numbers of convolutions.
    with lowering.plain():
        assert count("base") == 4
        assert count("base/block1") == 4 + 2 + 1
        assert count("nothing") == 4 + 4 + 3
        # The last layer's kernel is not differentiated, what lies before it is.
        assert count("base/block2/conv2") == 4 + 3 + 3


# The thaw.


THAW = {
    "transfer__freeze": "base",
    "transfer__thaw_epoch": 1.0,  # step 5
    "transfer__lr_scales": "base=0.5",
    "optimizer__name": "adamw",
    "optimizer__ema": 0.9,
    "augment__flip": "random",
    "checkpoint__every_steps": 1,
    "checkpoint__keep": STEPS,
}


@pytest.fixture(scope="module")
def thawed(folder):
    return run(folder, "thawed", **THAW)


def test_it_thaws_at_the_step_that_was_asked_for(folder, source, thawed):
    for step in (4, 5):
        for path, leaf in saved(folder, "thawed", step).items():
            if path in source and "/base/" in path:
                assert np.array_equal(leaf, source[path]), (step, path)
    after = saved(folder, "thawed", 6)
    for path, leaf in source.items():
        if "/base/" in path:
            assert not np.array_equal(after[path], leaf), path
    # Adam's first step is one of the rate's size, whatever the gradient: the rate is
    # that of the run's fifth step, and half of it in the base.
    schedule = optim.create_schedule(config_lib.default().schedule, 0.05, STEPS)
    for part, factor in (("base/block1/conv1", 0.5), ("head/logits", 1.0)):
        path = f"params/{part}/kernel"
        moved = np.abs(after[path] - saved(folder, "thawed", 5)[path])
        decay = 0.01 * np.abs(saved(folder, "thawed", 5)[path]).max()
        rate = factor * float(schedule(5))
        assert np.median(moved) == pytest.approx(rate, rel=float(0.02 + decay)), part


class Gone(Exception):
    """The process is gone."""


def stopped_and_resumed(folder, name, stop, **changes):
    """The sizes of the programs after the run was killed at `stop`, and its result."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        after, count = loop.Loop._after_step, loop.Loop._count

        def killed(self, steps, signals):
            after(self, steps, signals)
            if self._done >= stop:
                self._checkpoints.wait()
                raise Gone

        patch.setattr(loop.Loop, "_after_step", killed)
        with pytest.raises(Gone):
            run(folder, name, **changes)
        patch.setattr(loop.Loop, "_after_step", after)

        def counted(self, steps, metrics):
            sizes.append(steps)
            count(self, steps, metrics)

        patch.setattr(loop.Loop, "_count", counted)
        return sizes, run(folder, name, **changes)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_resumed_across_the_thaw_ends_with_the_same_bits(folder, thawed, stop):
    sizes, result = stopped_and_resumed(folder, f"stopped{stop}", stop, **THAW)
    assert sum(sizes) == STEPS - stop
    assert result["params/sha256"] == thawed["params/sha256"]


@pytest.mark.parametrize(("start", "sizes"), [(0, [4, 1, 3]), (4, [1, 3]), (5, [3])])
def test_no_program_of_several_steps_reaches_over_the_thaw(folder, start, sizes):
    changes = {"checkpoint__every_steps": 0, "train__steps_per_dispatch": 4}
    it = prepare.prepare(config_of(folder, **THAW | changes))
    made = loop.Loop(it, start, None, None)
    assert [steps for steps, _ in made._dispatches(made._it.total_steps)] == sizes


WHITE = "base/whiten/bias"


@pytest.mark.parametrize(
    ("thaw", "frozen", "settle", "stages"),
    [
        # (first step, whether the bias is frozen, whether it is settled)
        (0, True, 4, []),
        (0, False, 4, [(4, False, True)]),
        (4, True, 2, [(4, False, True)]),
        (2, True, 4, [(2, False, False), (4, False, True)]),
        (4, False, 2, [(2, False, True), (4, False, True)]),
        (4, False, 4, [(4, False, True)]),
        (4, True, 0, [(4, False, False)]),
    ],
)
def test_what_is_frozen_and_what_is_settled_at_each_step(thaw, frozen, settle, stages):
    """Of eight steps; a bias that is frozen settles only once it has thawed."""
    config = config_lib.default()
    config.optimizer.name = "muon"
    config.optimizer.whiten_until = settle / 8 if settle else 1.0
    paths = ["base/kernel", WHITE]
    leaves = tuple(Leaf("params", path, 4, True, True, 1.0) for path in paths)
    still = Frozen(frozenset(paths if frozen else paths[:1]))
    plan = transfer.Plan("a model", leaves, {}, still, thaw)
    make = functools.partial(
        Recipe,
        *(None, None),
        mean=(0.0,),
        std=(1.0,),
        augment=config.augment,
        seed=0,
        accumulate=1,
        ema=0.0,
    )
    first, later, _ = prepare._recipes(make, config, plan, 8, config.schedule)
    assert first.frozen == still and not first.settled.params
    found = [
        (start, WHITE in recipe.frozen.params, WHITE in recipe.settled.params)
        for start, recipe in later.items()
    ]
    assert found == stages


def test_a_thaw_after_the_end_is_none(folder):
    it = prepare.prepare(config_of(folder, **THAW | {"train__steps": 5}))
    assert it.later == {} and it.plan.thaw_step == 0
    paths = jax.tree_util.keystr
    state = prepare.initial_state(it)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert leaves and not any("base" in paths(path) for path, _ in leaves)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon"])
def test_an_optimizer_that_starts_late_has_the_rate_of_its_step(name):
    """Its fourth update is that of one whose schedule is constant at that rate."""
    config = config_lib.default()
    config.optimizer.name, config.optimizer.whiten_until = name, 0.9
    config.schedule.name = "linear"
    params = {"base": {"whiten": {"bias": jnp.ones(3)}, "kernel": jnp.eye(4) + 1.0}}
    grads = jax.tree.map(lambda x: x * 0.3, params)

    def last_of(start, updates):
        made, _ = optim.create(config.optimizer, config.schedule, 20, start)
        state = made.init(params)
        for _ in range(updates):
            found, state = made.update(grads, state, params)
        return found

    late, early = last_of(9, 1), last_of(0, 1)
    kernel, bias = (late["base"]["kernel"], late["base"]["whiten"]["bias"])
    np.testing.assert_allclose(kernel, early["base"]["kernel"] * 11 / 20, rtol=1e-5)
    # The whitening bias has stopped half way to 0.9 of the run.
    share = 1 - 9 / 18 if name == "muon" else 11 / 20
    np.testing.assert_allclose(bias, early["base"]["whiten"]["bias"] * share, rtol=1e-5)


def test_layer_wise_rates(folder, source):
    scales = "base=0.5,base/block2=0.1,*/bias=2"
    one, other = (
        take_steps(prepare.prepare(config_of(folder, transfer__lr_scales=text)), 1)
        for text in ("", scales)
    )
    for path, factor in {
        "params/base/block1/conv1/kernel": 0.5,
        "params/base/block2/conv1/kernel": 0.1,
        "params/base/block2/norm1/scale": 0.1,
        "params/base/block2/norm1/bias": 2.0,
    }.items():
        moved, scaled = (found[path] - source[path] for found in (one, other))
        np.testing.assert_allclose(scaled, factor * moved, rtol=1e-3, atol=1e-6)


# What is loaded, and the account of it.


def plan_of(folder, **changes):
    return prepare.prepare(config_of(folder, **changes)).plan


def new_of(plan):
    return {leaf.path for leaf in plan.leaves if not leaf.loaded}


def test_the_classes_decide_about_the_head(folder, tmp_path):
    logits = {"head/logits/kernel", "head/logits/bias"}
    plan = plan_of(folder)
    assert new_of(plan) == logits and len(plan.leaves) == 12
    for classes, new in (
        (("dark", "light"), set()),
        # As many, but others.
        (("cat", "dog"), logits),
    ):
        make_source(tmp_path / "other.safetensors", classes)
        other = str(tmp_path / "other.safetensors")
        assert new_of(plan_of(folder, init_from=other)) == new
        named = plan_of(folder, init_from=other, transfer__new="head/*/bias")
        assert new_of(named) == new | {"head/logits/bias"}


def test_what_is_new_starts_as_without_a_model(folder, source):
    it = prepare.prepare(config_of(folder, transfer__new="base/block2"))
    state = prepare.initial_state(it)
    fresh = prepare.prepare(
        config_of(
            folder,
            init_from="",
            model__widths=(4, 6),
            model__depth=1,
            model__norm="batch",
            model__dropout=0.2,
        )
    )
    fresh = flat(prepare.initial_state(fresh).variables())
    found = flat(state.variables())
    for path, leaf in found.items():
        want = source if "block1" in path else fresh
        assert np.array_equal(leaf, want[path]), path


@pytest.fixture(scope="module")
def tabled(folder):
    """A run from a model file of its own."""
    changes = {"init_from": str(folder / "mine.safetensors"), "train__steps": 1}
    changes |= {"transfer__freeze": "base/block1", "transfer__lr_scales": "base=0.1"}
    changes |= {"transfer__new": "base/block2/norm1"}
    make_source(folder / "mine.safetensors")
    run(folder, "table", **changes)
    return changes


def test_the_table_accounts_for_every_leaf(folder, tabled):
    text = (folder / "table/report.html").read_text()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:1]}
    # conv1, norm1 with scale, bias, mean, var.
    assert rows["base/block1"] == ["5", "5", str(4 * 27 + 16)]
    assert rows["base/block2"] == ["1", "4", "5", str(6 * 36 + 24), "0.1"]
    about = json.loads((folder / "table/transfer.json").read_text())
    assert about["init_from"] == tabled["init_from"]
    leaves = about["leaves"]
    assert leaves.keys() == {
        path for path in saved(folder, "table", 1) if path[:6] in ("params", "batch_")
    }
    kernel = leaves["params/base/block1/conv1/kernel"]
    assert kernel == {"origin": "loaded", "fate": "frozen", "lr_scale": 0.1}
    mean = leaves["batch_stats/base/block2/norm1/mean"]
    assert mean == {"origin": "new", "fate": "trained", "lr_scale": 1.0}


def test_other_weights_refuse_to_go_on(folder, tabled):
    result = json.loads((folder / "table/result.json").read_text())
    assert run(folder, "table", **tabled) == result
    make_source(folder / "mine.safetensors", seed=1)
    with pytest.raises(UsageError, match="they differ in init_from"):
        run(folder, "table", **tabled)


def test_preprocessing_comes_from_the_file_unless_it_is_set(folder):
    config = prepare.prepare(config_of(folder)).config
    assert config.model.widths == (4, 6) and config.model.norm == "batch"
    assert config.data.mean == (0.4, 0.5, 0.6) and config.data.std == (0.2, 0.2, 0.3)
    assert config.data.resize == "squash" and config.data.image_size == 8
    changes = {"data__mean": (0.1,), "data__image_size": 12, "model__dropout": 0.5}
    changes |= {"model__gather": "global", "data__resize": "pad"}
    it = prepare.prepare(config_of(folder, **changes))
    assert it.config.data.mean == (0.1,) and it.config.data.std == (0.2, 0.2, 0.3)
    assert it.config.data.resize == "pad" and it.example_shape == (12, 12, 3)
    assert it.recipe.model.head.dropout == 0.5
    assert new_of(it.plan) == {"head/logits/kernel", "head/logits/bias"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transfer__freeze": "bsae"}, ["transfer.freeze", "'bsae'", "mean 'base'?"]),
        (
            {"transfer__freeze": "base/blok1"},
            ["'base/blok1'", "mean 'base/block1'?", "head/logits"],
        ),
        ({"transfer__new": "base/block3"}, ["transfer.new", "'base/block2'?"]),
        ({"transfer__lr_scales": "base"}, ["lr_scales", "'base'", "PATH=FACTOR"]),
        ({"transfer__lr_scales": "base=0"}, ["'base=0'", "above 0"]),
        ({"transfer__lr_scales": "base=fast"}, ["'base=fast'"]),
        # Statistics have no rate.
        ({"transfer__lr_scales": "base/*/mean=0.1"}, ["'base/*/mean'"]),
        ({"transfer__freeze": "base,head"}, ["is new", "head/logits/bias and 1 more"]),
        ({"transfer__freeze": "base", "transfer__new": "base/block1"}, ["is new"]),
        ({"transfer__thaw_epoch": 1.0}, ["thaw_epoch is 1.0", "freeze is empty"]),
        (
            {"init_from": "", "transfer__freeze": "base"},
            ["'base'", "init_from is empty"],
        ),
        ({"init_from": "cifar11"}, ["init_from=cifar11", "did you mean 'cifar10'?"]),
        ({"model__name": "resnet9"}, ["'resnet9'", "holds a cnn"]),
        (
            {"model__widths": (4, 5)},
            [
                "base/block2/conv1/kernel  [3, 3, 4, 6]  [3, 3, 4, 5]",
                "base/block2/norm1/var     [6]           [5]",
                "transfer.new",
            ],
        ),
        (
            {"model__widths": (4, 6, 6)},
            ["base/block3/conv1/kernel  -            [3, 3, 6, 6]"],
        ),
        (
            {"model__widths": (4,)},
            ["base/block2/norm1/bias    [6]           -"],
        ),
        (
            {"transfer__cache_features": "on"},
            ["cache_features is 'on'", "the base trains"],
        ),
        (
            {
                "transfer__cache_features": "on",
                "transfer__freeze": "base",
                "augment__crop_pad": 1,
            },
            ["the augmentation never repeats"],
        ),
    ],
)
def test_what_does_not_go_together_is_refused(folder, changes, said):
    with pytest.raises(UsageError) as error:
        prepare.prepare(config_of(folder, **changes))
    for part in said:
        assert part in str(error.value)


def test_a_network_can_be_cut_or_prolonged_if_that_is_said(folder):
    plan = plan_of(folder, model__widths=(4, 5), transfer__new="base/block2")
    assert len(new_of(plan)) == 7
    plan = plan_of(folder, model__widths=(4,), transfer__new="base/block2")
    assert new_of(plan) == {"head/logits/kernel", "head/logits/bias"}


def test_everything_frozen_leaves_nothing_to_train(folder, tmp_path):
    make_source(tmp_path / "same.safetensors", ("dark", "light"))
    same = str(tmp_path / "same.safetensors")
    with pytest.raises(UsageError, match="nothing is left to train"):
        plan_of(folder, init_from=same, transfer__freeze="*")


def test_floats_for_a_model_of_pictures(folder, tmp_path):
    with np.load(folder / "data.npz") as found:
        arrays = {k: v.astype("f") if k[0] == "x" else v for k, v in found.items()}
    np.savez(tmp_path / "floats.npz", **arrays)
    changes = {"data__dir": str(tmp_path / "floats.npz")}
    with pytest.raises((UsageError, ConvnetError), match="float32"):
        plan_of(folder, **changes)


# The feature cache.


CACHED = {
    "transfer__freeze": "base",
    "augment__flip": "alternating",
    "optimizer__ema": 0.9,
    "train__eval_every": 1.0,
    "train__steps": 12,
}


@pytest.mark.parametrize(
    ("flip", "placement", "views"),
    [("none", "stream", "flip"), ("alternating", "device", "none")],
)
def test_cached_features_give_the_same_run(folder, flip, placement, views):
    # Dropout in the head, batches that end with padding, evaluations on the way.
    changes = CACHED | {"augment__flip": flip, "data__placement": placement}
    changes |= {"evaluate__tta": views}
    names = {how: f"{how}_{flip}_{placement}" for how in ("on", "off")}
    results = {
        how: run(folder, name, transfer__cache_features=how, **changes)
        for how, name in names.items()
    }
    for key in ("test/loss", "test/accuracy", "test/examples"):
        assert results["on"][key] == pytest.approx(results["off"][key], rel=1e-5)
    one, other = (saved(folder, name, 12) for name in names.values())
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(
            leaf, other[path], rtol=1e-4, atol=1e-5, err_msg=path
        )
    histories = [
        (folder / name / "metrics.jsonl").read_text().splitlines()
        for name in names.values()
    ]
    histories = [[json.loads(line) for line in lines] for lines in histories]
    assert len(histories[0]) == 12 + 3
    for row, other in zip(*histories, strict=True):
        keys = {"train/loss", "train/accuracy", "test/loss"} & row.keys()
        assert keys and all(row[k] == pytest.approx(other[k], rel=1e-4) for k in keys)


def test_the_cache_holds_both_sides_of_each_example(folder, source):
    it = prepare.prepare(config_of(folder, **CACHED))
    assert it.cached
    it.state = prepare.initial_state(it)
    split = it.split("train")
    bundle = bundle_lib.load(folder / "source.safetensors")
    found = np.asarray(split.data["features"])
    with np.load(folder / "data.npz") as data:
        x, labels = data["x_train"], data["y_train"]
    about = bundle.preprocessing
    for side, images in enumerate((x, x[:, :, ::-1])):
        normal = (images / 255.0 - about["mean"]) / np.array(about["std"])
        want = bundle.model().apply(
            bundle.variables,
            jnp.asarray(normal, jnp.float32),
            method=step_lib.base,
            train=False,
        )
        np.testing.assert_allclose(found[side], want, rtol=1e-4, atol=1e-4)
    assert np.array_equal(split.data["label"], labels)
    assert it.split("test").data["features"].shape[:2] == (1, 13)
    assert it.train_seconds > 0


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, True),
        ({"transfer__freeze": "base/block1"}, False),
        ({"transfer__thaw_epoch": 1.0}, False),
        ({"transfer__thaw_epoch": 99.0}, True),
        ({"transfer__cache_features": "off"}, False),
        ({"augment__flip": "random"}, False),
        ({"augment__brightness": 0.1}, False),
        ({"augment__resized_crop": (0.5, 1.0)}, False),
        # One epoch, of which each side is seen in part.
        ({"train__steps": 5}, False),
        ({"train__steps": 5, "transfer__cache_features": "on"}, True),
        ({"reproducible": True, "mesh__shards": 2}, False),
    ],
)
def test_when_features_are_cached(folder, changes, cached):
    it = prepare.prepare(config_of(folder, **CACHED | changes))
    assert it.cached == cached


def test_views_of_test_images_are_not_cached(folder):
    it = prepare.prepare(config_of(folder, evaluate__tta="flip", **CACHED))
    it.state = prepare.initial_state(it)
    assert "features" in it.split("train").data
    assert "input" in it.split("test").data


def test_features_that_do_not_fit_are_not_cached(folder, monkeypatch):
    # 2 sides of 40 examples with 24 features of 4 bytes.
    for limit, cached in ((2 * 40 * 24 * 4, True), (2 * 40 * 24 * 4 - 1, False)):
        monkeypatch.setattr(features.pipeline, "resident_bytes", lambda mesh: limit)  # noqa: B023
        config = config_of(folder, **CACHED, data__placement="stream")
        assert prepare.prepare(config).cached == cached


# Patterns and trees.


def test_patterns():
    path = "base/group1/norm2/scale"
    for pattern in ("base", "base/", "*", "base/group1", "*/norm*", path, "*/scale"):
        assert patterns.matches(pattern, path), pattern
    for pattern in ("group1", "bas", "base/group", "norm2", "BASE", "base/*/bias", ""):
        assert not patterns.matches(pattern, path), pattern


def test_split_and_merge():
    params = {"base": {"a": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}
    frozen = Frozen(frozenset(["base/a/kernel", "head/kernel"]))
    trained, rest = frozen.split(params)
    assert trained == {"base": {"a": {"bias": 2}}}
    assert freezing.merge(trained, rest) == params
    assert Frozen().split(params) == (params, {})


def test_layers_that_rest():
    params = {"base": {"a": {"n": {"scale": 0}}, "b": {"kernel": 0, "n": {"scale": 0}}}}
    stats = {"base": {"a": {"n": {"mean": 0, "var": 0}}, "b": {"n": {"mean": 0}}}}
    every = [*flat(params), *flat(stats)]

    def layers(paths):
        return Frozen.of(params, stats, paths).layers

    a = [path for path in every if path.startswith("base/a")]
    assert layers(a) == {("base", "a"), ("base", "a", "n")}
    most = [path for path in every if "b/kernel" not in path]
    assert layers(most) == {("base", "a"), ("base", "a", "n"), ("base", "b", "n")}
    assert layers(["base/a/n/mean"]) == frozenset()
    assert layers(every) >= {("base",), ("base", "b")}


# Programs.


def test_the_benchmark_compares_with_full_training_and_the_forward_pass(
    folder, monkeypatch, capsys
):
    measured = []

    def once(images, measure):
        measured.append(measure)
        return lambda: images / measure(1)

    monkeypatch.setattr(table_lib, "per_second", once)
    table = table_lib.Table(None, "transfer")
    benchmark.measure(table, str(folder / "source.safetensors"), "float32", 10, 1)
    frozen, cached, limit = table.rows
    assert frozen.case == limit.case == "source/float32/frozen"
    assert frozen.ours == limit.ours and frozen.peer == cached.peer
    assert all(row.ours > 0 and row.peer > 0 for row in table.rows)
    full, base, head, forward = (one.__self__._it for one in measured)
    assert base is forward and not (full.cached or base.cached) and head.cached
    assert not full.recipe.frozen.params and base.recipe.frozen.params
    assert "the forward pass alone" in capsys.readouterr().out


def test_cats_are_found_from_the_shipped_model(shared_data, tmp_path):
    """The experiment as it is, on its real pictures."""
    path = Path(__file__).parent.parent / "experiments/transfer_cat_vs_noncat.py"
    values = cli.parse(["main", f"--config={path}"], main.define, "")
    config = values.config
    config.data.dir = str(shared_data / "cat_vs_noncat")
    jax.config.update("jax_disable_most_optimizations", False)
    result = train.run(config, tmp_path / "run", "command")
    assert result["test/examples"] == 50
    assert result["test/accuracy"] >= 0.88
