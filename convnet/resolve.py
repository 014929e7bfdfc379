"""Checking a config, and filling in what it leaves open."""

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections

from convnet import models
from convnet.config import KEYS, Key, flatten
from convnet.errors import UsageError

_STYLE_KEYS = [
    f"task.{name}"
    for name in (
        *("style_image", "style_size", "features", "content_layers", "style_layers"),
        *("content_weight", "style_weight", "tv_weight"),
    )
]


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Returns `; did you mean 'x'?`, or an empty string where nothing is near."""
    known = list(known)
    leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    found = difflib.get_close_matches(name, known, 1, 0.6) or [
        leaf[match]
        for match in difflib.get_close_matches(
            name.rsplit(".", 1)[-1], list(leaf), 1, 0.6
        )
    ]
    return f"; did you mean {found[0]!r}?" if found else ""


def check_key(name: str, where: str) -> None:
    """Raises UsageError if `name` is no key, naming the nearest one and the place."""
    if name not in KEYS:
        raise UsageError(
            f"unknown config key {name!r} ({where}){nearest(name, tuple(KEYS))}"
            " (--help lists all keys)"
        )


def check_type(config: Any, where: str) -> ml_collections.ConfigDict:
    """Returns `config` if get_config() of `where` returned one made by `default()`.

    Raises:
      UsageError: it returned something else, or has more keys or fewer.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise UsageError(
            f"get_config() of {where} returned {type(config).__name__}; want the"
            " convnet.config.default() that it changed"
        )
    names = set(_names(config))
    for name in sorted(names - set(KEYS)):
        check_key(name, f"get_config() of {where}")
    if missing := [name for name in KEYS if name not in names]:
        raise UsageError(
            f"get_config() of {where} returned a config without {missing[0]!r}; want"
            " the convnet.config.default() that it changed"
        )
    return config


def _names(node: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in node:
        if isinstance(node[name], ml_collections.ConfigDict):
            yield from _names(node[name], f"{prefix}{name}.")
        else:
            yield prefix + name


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every value and what must go together.

    Raises:
      UsageError: names the key, its value and what is allowed.
    """
    values = flatten(config)
    for name, value in values.items():
        _check_value(name, value, KEYS[name])
    if values["train.steps"] == 0 and values["train.epochs"] <= 0:
        raise UsageError("train.epochs and train.steps are both 0: set one of them")
    crop = values["augment.resized_crop"]
    if crop and (len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1):
        raise UsageError(
            f"augment.resized_crop is {crop}: want () or (smallest, largest) with"
            " 0 < smallest <= largest <= 1"
        )
    if values["data.batch_size"] % values["optimizer.accumulate"]:
        raise UsageError(
            f"optimizer.accumulate is {values['optimizer.accumulate']}, which does not"
            f" divide data.batch_size = {values['data.batch_size']}"
        )
    if values["reproducible"]:
        _check_shards(values)
    if values["schedule.name"] == "step" and not values["schedule.steps"]:
        raise UsageError(
            "schedule.name is 'step' and schedule.steps is (): name the shares of the"
            " run at which the rate drops, such as (0.5, 0.75)"
        )
    _check_task(values)
    # The model of init_from says which options there are.
    if not values["init_from"]:
        model_options(config)


def _check_task(values: dict[str, Any]) -> None:
    task = values["task.name"]
    if task in ("regression", "style"):
        for name in ("task.label_smoothing", "task.class_weights"):
            if values[name]:
                raise UsageError(
                    f"{name} is {values[name]}, but task.name = {task!r} does not read"
                    " it"
                )
        if values["evaluate.tta_below"] < 1:
            raise UsageError(
                f"evaluate.tta_below is {values['evaluate.tta_below']}, but task.name ="
                f" {task!r} has no probabilities to be unsure of"
            )
    own = {"task.positive": "binary", **dict.fromkeys(_STYLE_KEYS, "style")}
    for name, reader in own.items():
        if values[name] != KEYS[name].default and task != reader:
            raise UsageError(
                f"{name} is {values[name]!r}, but only task.name = {reader!r} reads it,"
                f" and it is {task!r}"
            )


def _check_shards(values: dict[str, Any]) -> None:
    shards, batch = values["mesh.shards"], values["data.batch_size"]
    if shards & (shards - 1):
        raise UsageError(f"mesh.shards is {shards}: want a power of two")
    if batch % (shards * values["optimizer.accumulate"]):
        raise UsageError(
            f"reproducible = True splits data.batch_size = {batch} into mesh.shards ="
            f" {shards} equal shards (of each of optimizer.accumulate ="
            f" {values['optimizer.accumulate']} microbatches): choose other numbers"
        )


def _check_value(name: str, value: Any, key: Key) -> None:
    if value is None:
        return
    if key.choices and value not in key.choices:
        raise UsageError(
            f"{name} is {value!r}: want one of {', '.join(key.choices)}"
            f"{nearest(str(value), key.choices)}"
        )
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, str):
            if isinstance(value, tuple):
                raise UsageError(f"{name} is {value!r}: want numbers")
        elif not key.low <= number <= key.high:
            raise UsageError(
                f"{name} is {value!r}: want a number from {key.low:g} to {key.high:g}"
            )


def model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns all options of the model that config.model names, set or its own.

    Raises:
      UsageError: a key is set which this model does not read.
    """
    name = config.model.name
    options = dict(models.options(name))
    for key, value in config.model.items():
        if key in ("name", "dtype") or value is None:
            continue
        if key not in options:
            readers = [n for n in models.NAMES if key in models.options(n)]
            raise UsageError(
                f"model.{key} is {value!r}, but {name} does not read it"
                f" (read by {', '.join(readers)})"
            )
        options[key] = value
    return options


def resolve(
    config: ml_collections.ConfigDict,
    measure: Callable[[], tuple[tuple[float, ...], tuple[float, ...]]],
) -> None:
    """Fills in what was left open: the model's options, views, the data's mean and std.

    Args:
      config: changed in place.
      measure: returns mean and std of the data; called only where one is needed.
    """
    for key, value in model_options(config).items():
        config.model[key] = value
    if config.evaluate.tta == "auto":
        config.evaluate.tta = "none"
    if not (config.data.mean and config.data.std):
        mean, std = measure()
        config.data.mean = config.data.mean or mean
        config.data.std = config.data.std or std


def total_steps(config: ml_collections.ConfigDict, examples: int) -> int:
    """Returns the steps of the run: train.steps, or train.epochs rounded up."""
    if config.train.steps:
        return config.train.steps
    return max(1, _steps(config, config.train.epochs, examples))


def thaw_step(config: ml_collections.ConfigDict, examples: int) -> int:
    """Returns the step from which on all trains; 0: none of the run's steps."""
    step = _steps(config, config.transfer.thaw_epoch, examples)
    return step if step < total_steps(config, examples) else 0


def _steps(config: ml_collections.ConfigDict, epochs: float, examples: int) -> int:
    # Rounded first: 1.1 epochs of 50,000 in batches of 500 come to 110.00000000000001.
    return math.ceil(round(epochs * examples / config.data.batch_size, 6))
