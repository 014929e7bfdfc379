"""Keys, their checks, the hash of a config, and that something reads every key."""

import ast
import dataclasses
import functools
import itertools
import math
from pathlib import Path

import ml_collections
import pytest

from convnet import config as config_lib
from convnet import models, resolve
from convnet.errors import UsageError

PACKAGE = Path(config_lib.__file__).parent
INFRASTRUCTURE = [
    "data.dir",
    "data.placement",
    "data.workers",
    "data.cache",
    "data.max_bad_fraction",
    "train.log_every",
    "train.eval_every",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "mesh.data",
    "mesh.fsdp",
    "compilation_cache",
]


def config_with(**changes):
    config = config_lib.default()
    for name, value in changes.items():
        set_key(config, name.replace("__", "."), value)
    return config


def set_key(config, name, value):
    *parents, leaf = name.split(".")
    for parent in parents:
        config = config[parent]
    config[leaf] = value


def other_value(key):
    """A value of the key's type that is not its default."""
    default = key.default
    if default in (str, tuple, int, float, bool):
        empty = {str: "x", tuple: (3,), int: 3, float: 0.5, bool: True}[default]
        return key.choices[0] if key.choices else empty
    if key.choices:
        return next(choice for choice in key.choices if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return (0.5, 0.75) if isinstance(default, tuple) else "something else"


# Every declared key is read.


def reads_of(source, module):
    """What a module reads, as (section, leaf), where a config is read.

    `config.data.workers`, `data.workers` and, in task.py, `settings.workers` (its
    section goes by the module's name), and `getattr(settings, name)` or
    `config.data[name]`, which may read every name that the module holds as a string.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    strings = {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }

    def section(node):
        name = node.attr if isinstance(node, ast.Attribute) else None
        name = node.id if isinstance(node, ast.Name) else name
        name = "" if name in ("config", "_config") else name
        return {"settings": "" if module == "main" else module}.get(name, name)

    found = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add((section(node.value), node.attr))
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name):
            found |= {(section(node.value), string) for string in strings}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and isinstance(node.args[1], ast.Name)
        ):
            found |= {(section(node.args[0]), string) for string in strings}
    return found


@functools.cache
def reads_of_package():
    reads = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if path.name == "config.py":
            # The functions, without the table that declares the keys.
            source = source[source.index("def default()") :]
        reads |= reads_of(source, path.stem)
    return reads | {
        ("model", option) for name in models.NAMES for option in models.options(name)
    }


def unread(names):
    reads = reads_of_package()
    return [n for n in names if tuple(("." + n).split(".")[-2:]) not in reads]


def test_every_declared_key_is_read():
    assert unread(config_lib.KEYS) == []


def test_a_dead_key_is_noticed():
    dead = [
        "optimizer.amsgrad",
        "data.shuffle_buffer",
        "augment.solarize",
        "model.groups",
        "task.focal",
        "deterministic",
        # Names that other sections read.
        "checkpoint.batch_size",
        "train.lr",
        "schedule.momentum",
        "augment.label_smoothing",
        "epochs",
    ]
    assert unread([*config_lib.KEYS, *dead]) == dead


def test_every_option_of_a_model_is_a_key():
    options = {option for name in models.NAMES for option in models.options(name)}
    assert {f"model.{option}" for option in options} <= set(config_lib.KEYS)


# Keys.


def test_default_holds_every_key_and_is_locked():
    config = config_lib.default()
    values = config_lib.flatten(config)
    assert list(values) == list(config_lib.KEYS)
    for name, key in config_lib.KEYS.items():
        assert values[name] == (None if isinstance(key.default, type) else key.default)
    assert config_lib.changed(config) == {}
    resolve.validate(config)
    for node in (config, config.data, config.model):
        with pytest.raises(AttributeError, match="locked"):
            node.shuffle = 1


def test_two_defaults_share_nothing():
    config_with(optimizer__lr=7.0)
    assert config_lib.default().optimizer.lr == config_lib.KEYS["optimizer.lr"].default


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("data.batchsize", "data.batch_size"),
        ("optimiser.lr", "optimizer.lr"),
        ("model.drop_out", "model.dropout"),
        ("batch_size", "data.batch_size"),
        ("train.momentum", "optimizer.momentum"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UsageError) as error:
        resolve.check_key(name, "line 7")
    assert f"unknown config key {name!r} (line 7)" in str(error.value)
    assert f"did you mean {nearest!r}?" in str(error.value)


def test_an_unknown_key_without_a_near_one_suggests_nothing():
    with pytest.raises(UsageError) as error:
        resolve.check_key("zzzzqqq", "x")
    assert "did you mean" not in str(error.value)
    for name in config_lib.KEYS:
        resolve.check_key(name, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.lr", "fast"),
        ("data.batch_size", 12.5),
        ("data.name", 3),
        ("augment.trivial", "yes"),
        ("data.mean", 0.5),
        ("model.widths", 64),
        ("model.depth", "two"),
        ("model.pool", 2),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(TypeError):
        config = config_lib.default()
        set_key(config, name, value)


@pytest.mark.parametrize("name", [n for n, k in config_lib.KEYS.items() if k.choices])
def test_choices(name):
    key = config_lib.KEYS[name]
    value = key.choices[-1] + "x"
    config = config_lib.default()
    set_key(config, name, value)
    with pytest.raises(UsageError) as error:
        resolve.validate(config)
    assert f"{name} is {value!r}" in str(error.value)
    assert all(choice in str(error.value) for choice in key.choices)
    assert f"did you mean {key.choices[-1]!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("seed", (0, 7), (-1,)),
        ("data.batch_size", (1, 4096), (0, -1)),
        ("data.test_fraction", (0.0, 0.9), (-0.1, 0.91)),
        ("data.max_bad_fraction", (0.0, 1.0), (-0.01, 1.01)),
        ("data.workers", (0, 8), (-1,)),
        ("data.mean", ((-1.0, 0.5),), ((math.nan,), ("a",))),
        ("augment.erase", (0.0, 1.0), (1.5,)),
        ("augment.mixup", (0.0, 8.0), (-0.2,)),
        ("model.widths", ((8, 16),), ((8, 0), ("a,b",))),
        ("model.dropout", (0.0, 0.99), (1.0, -0.1)),
        ("optimizer.lr", (0.0, 100.0), (-0.1, math.nan)),
        ("optimizer.momentum", (0.0, 0.99), (1.0,)),
        ("optimizer.ema", (0.0, 0.9999), (1.0,)),
        ("optimizer.newton_schulz", (1, 5), (0,)),
        ("optimizer.rest_momentum", (0.0, 0.99), (1.0,)),
        ("optimizer.whiten_until", (0.0, 1.0), (1.01,)),
        ("optimizer.head_lr", (0.0, 1340.0), (-1.0,)),
        ("evaluate.tta_below", (0.0, 1.0), (1.01, -0.1)),
        ("train.steps_per_dispatch", (0, 100), (-1,)),
        ("schedule.steps", ((0.5, 0.75),), ((0.5, 1.5),)),
        ("train.log_every", (1, 1000), (0,)),
        ("checkpoint.keep", (1, 10), (0,)),
    ],
)
def test_ranges(name, good, bad):
    for value in good:
        config = config_lib.default()
        set_key(config, name, value)
        resolve.validate(config)
    for value in bad:
        config = config_lib.default()
        set_key(config, name, value)
        with pytest.raises(UsageError) as error:
            resolve.validate(config)
        assert f"{name} is {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__epochs": 0.0}, ["train.epochs", "train.steps"]),
        ({"augment__resized_crop": (0.5,)}, ["augment.resized_crop", "(0.5,)"]),
        ({"augment__resized_crop": (0.8, 0.5)}, ["augment.resized_crop"]),
        ({"augment__resized_crop": (0.0, 1.0)}, ["augment.resized_crop"]),
        (
            {"data__batch_size": 10, "optimizer__accumulate": 4},
            ["optimizer.accumulate is 4", "data.batch_size = 10"],
        ),
        ({"task__positive": "cat"}, ["task.positive", "'cat'", "binary"]),
        (
            {"task__name": "regression", "evaluate__tta_below": 0.9},
            ["evaluate.tta_below is 0.9", "regression"],
        ),
    ],
)
def test_values_that_do_not_go_together(changes, named):
    with pytest.raises(UsageError) as error:
        resolve.validate(config_with(**changes))
    assert all(part in str(error.value) for part in named)


def test_values_that_do_go_together():
    resolve.validate(
        config_with(
            train__epochs=0.0,
            train__steps=5,
            augment__resized_crop=(0.25, 1.0),
            data__batch_size=12,
            optimizer__accumulate=4,
            task__name="binary",
            task__positive="cat",
        )
    )


@pytest.mark.parametrize(
    ("model", "key", "value", "reader", "no_reader"),
    [
        ("cnn", "stem", "cifar", "resnet18", "vgg16"),
        ("resnet18", "widths", (8, 16), "cnn", "resnet34"),
        ("vgg16", "bn_momentum", 0.9, "vgg16_bn", "vgg11,"),
    ],
)
def test_a_model_key_that_the_model_does_not_read(model, key, value, reader, no_reader):
    config = config_with(model__name=model, **{f"model__{key}": value})
    for check in (resolve.validate, resolve.model_options):
        with pytest.raises(UsageError) as error:
            check(config)
        message = str(error.value)
        assert f"model.{key} is {value!r}, but {model} does not read it" in message
        readers = message.split("read by ")[1].rstrip(")") + ","
        assert f"{reader}," in readers and no_reader not in readers
        assert readers.count(",") == sum(key in models.options(n) for n in models.NAMES)


@pytest.mark.parametrize("model", models.NAMES)
def test_every_option_that_a_model_reads_can_be_set(model):
    config = config_with(model__name=model)
    for option, value in models.options(model).items():
        config.model[option] = value
    resolve.validate(config)
    assert resolve.model_options(config) == models.options(model)


# Experiments that return something else.


@pytest.mark.parametrize("returned", [None, {"seed": 1}, 3])
def test_get_config_that_returns_no_config(returned):
    with pytest.raises(UsageError, match="experiments/mine.py returned"):
        resolve.check_type(returned, "experiments/mine.py")


def test_get_config_that_returns_another_config():
    good = config_lib.default()
    assert resolve.check_type(good, "mine") is good
    with pytest.raises(UsageError, match="'seed'"):
        resolve.check_type(ml_collections.ConfigDict(), "mine")
    with good.unlocked():
        good.data.batchsize = 3
    with pytest.raises(UsageError, match=r"'data.batchsize' .*mine.*data.batch_size"):
        resolve.check_type(good, "mine")
    lacking = config_lib.default()
    with lacking.unlocked():
        del lacking.optimizer.lr
    with pytest.raises(UsageError, match="mine.*'optimizer.lr'"):
        resolve.check_type(lacking, "mine")


# The hash.


@pytest.mark.parametrize("name", config_lib.KEYS)
def test_only_keys_that_change_the_result_change_the_hash(name):
    config = config_lib.default()
    before = config_lib.sha256(config)
    set_key(config, name, other_value(config_lib.KEYS[name]))
    assert list(config_lib.changed(config)) == [name]
    assert (config_lib.sha256(config) == before) == (name in INFRASTRUCTURE)


def test_the_hash_survives_config_json():
    config = config_with(
        data__mean=(0.1, 0.2), data__std=(1.0, 2.0), model__widths=(8, 16)
    )
    saved = config_lib.to_dict(config)
    assert saved["model"]["widths"] == [8, 16] and saved["model"]["depth"] is None
    again = config_lib.default()
    for name in config_lib.KEYS:
        value = saved
        for part in name.split("."):
            value = value[part]
        if value is not None:
            set_key(again, name, tuple(value) if isinstance(value, list) else value)
    assert config_lib.sha256(again) == config_lib.sha256(config)
    assert len(config_lib.sha256(config)) == 64


# What is left open.


def measured(counter):
    next(counter)
    return (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("mean", "std", "want_mean", "want_std", "calls"),
    [
        ((), (), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 1),
        ((0.5,), (), (0.5,), (1.0, 2.0, 3.0), 1),
        ((), (0.5,), (0.1, 0.2, 0.3), (0.5,), 1),
        ((0.5,), (0.25,), (0.5,), (0.25,), 0),
        # A mean of zero is given, not open.
        ((0.0,), (0.25,), (0.0,), (0.25,), 0),
    ],
)
def test_resolve_fills_in_mean_and_std(mean, std, want_mean, want_std, calls):
    config = config_with(data__mean=mean, data__std=std)
    counter = itertools.count()
    resolve.resolve(config, lambda: measured(counter))
    assert config.data.mean == want_mean and config.data.std == want_std
    assert next(counter) == calls


def test_resolve_fills_in_the_options_that_the_model_reads():
    config = config_with(model__name="cnn", model__depth=5)
    resolve.resolve(config, lambda: ((0.0,), (1.0,)))
    options = models.options("cnn")
    for name in options:
        assert config.model[name] == (5 if name == "depth" else options[name])
    unread_by_cnn = {"stem", "width", "bn_momentum"} - set(options)
    assert unread_by_cnn and all(config.model[n] is None for n in unread_by_cnn)
    resolve.validate(config)


def test_an_option_spelled_out_is_the_same_config_as_one_left_open():
    configs = config_with(), config_with(model__depth=models.options("cnn")["depth"])
    for config in configs:
        resolve.resolve(config, lambda: ((0.0,), (1.0,)))
    assert len({config_lib.sha256(config) for config in configs}) == 1


@pytest.mark.parametrize(
    ("epochs", "steps", "examples", "batch", "want"),
    [
        (1.0, 0, 100, 10, 10),
        (1.0, 0, 101, 10, 11),
        (2.0, 0, 101, 10, 21),  # 20.2: epochs are not rounded one by one
        (0.001, 0, 100, 10, 1),
        (1.1, 0, 50_000, 500, 110),  # 110.00000000000001 in floating point
        (10.0, 7, 100, 10, 7),
        (0.0, 7, 100, 10, 7),
    ],
)
def test_total_steps(epochs, steps, examples, batch, want):
    config = config_with(
        train__epochs=epochs, train__steps=steps, data__batch_size=batch
    )
    assert resolve.total_steps(config, examples) == want


def test_describe_lists_every_key_with_default_and_meaning():
    lines = config_lib.describe().splitlines()
    for name, key in config_lib.KEYS.items():
        place = next(i for i, line in enumerate(lines) if f"--config.{name}=" in line)
        if not isinstance(key.default, type):
            assert lines[place] == f"  --config.{name}={key.default!r}"
        assert key.meaning in lines[place + 1]
        assert ("does not change" in lines[place + 1]) == (name in INFRASTRUCTURE)
        if key.choices:
            assert all(choice in lines[place + 2] for choice in key.choices)


def test_key_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_lib.KEYS["seed"].default = 1
