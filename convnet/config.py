"""Every key of a config: its default, its meaning, and whether it changes the result.

An experiment is a Python file with `get_config()`, which takes `default()` and says
what differs. The config is a locked `ml_collections.ConfigDict`: an unknown key fails.
Keys that do not change the result (how fast, how often, where) are left out of
`config/sha256` and may differ when a run is resumed.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from convnet import models
from convnet.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its default value (which also sets its type), and what it means.

    `result` is False for a key that cannot change the trained weights. `choices` are
    the allowed strings; `low` and `high` bound a number, both inclusive. A default that
    is a type stands for a value of that type which the model chooses.
    """

    default: Any
    meaning: str
    result: bool = True
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = math.inf


KEYS: dict[str, Key] = {
    "seed": Key(0, "seed of the order, the augmentation, the dropout and the weights"),
    "data.name": Key(
        "digits",
        "digits, folder, arrays, cylinder_bell_funnel, advection_diffusion, or the name"
        " of a TFDS dataset (cifar10, cifar100, imagenet2012, ...)",
    ),
    "data.dir": Key("", "folder (or .npz file) that holds the data", result=False),
    "data.batch_size": Key(128, "examples in a step, over all devices", low=1),
    "data.image_size": Key(
        0, "side in pixels to which images are resized; 0: as they are stored"
    ),
    "data.resize": Key(
        "crop",
        "crop: short side to size, centre crop; squash: both sides; pad: long side",
        choices=("crop", "squash", "pad"),
    ),
    "data.mean": Key(
        (),
        "mean subtracted from the input, one number or one a channel, in units of the"
        " input (images: 0 to 1); (): measured on the training split",
        low=-math.inf,
    ),
    "data.std": Key((), "standard deviation that divides the input; (): measured"),
    "data.test_fraction": Key(
        0.2, "share for testing, of a folder that has no train and test", high=0.9
    ),
    "data.train_limit": Key(0, "use only n training examples, evenly spaced; 0: all"),
    "data.test_limit": Key(0, "use only n test examples, evenly spaced; 0: all"),
    "data.max_bad_fraction": Key(
        0.05,
        "share of unreadable images above which a run stops",
        result=False,
        high=1,
    ),
    "data.placement": Key(
        "auto",
        "device: the whole split lies in device memory; stream: read while training;"
        " auto: by size",
        result=False,
        choices=("auto", "device", "stream"),
    ),
    "data.workers": Key(
        0, "processes that read and decode when streaming; 0: threads", result=False
    ),
    "augment.flip": Key(
        "none",
        "mirror images at random, or alternately from epoch to epoch",
        choices=("none", "random", "alternating"),
    ),
    "augment.crop_pad": Key(0, "pad by n pixels (reflect), then crop at random"),
    "augment.resized_crop": Key(
        (), "(smallest, largest) share of the area, cropped and resized back"
    ),
    "augment.rotate": Key(0.0, "rotate by up to n degrees"),
    "augment.shear": Key(0.0, "shear by up to n degrees", high=80),
    "augment.zoom": Key(0.0, "zoom by a factor from 1-x to 1+x", high=0.99),
    "augment.translate": Key(0.0, "move by up to this share of the side", high=1),
    "augment.brightness": Key(0.0, "brightness factor from 1-x to 1+x"),
    "augment.contrast": Key(0.0, "contrast factor from 1-x to 1+x"),
    "augment.saturation": Key(0.0, "saturation factor from 1-x to 1+x"),
    "augment.erase": Key(0.0, "probability of erasing a rectangle", high=1),
    "augment.mixup": Key(0.0, "alpha of mixup's Beta distribution; 0: off"),
    "augment.cutmix": Key(0.0, "alpha of CutMix's Beta distribution; 0: off"),
    "augment.trivial": Key(False, "TrivialAugment: one random operation an image"),
    "model.name": Key("cnn", "the architecture", choices=models.NAMES),
    "model.dtype": Key("float32", "compute precision", choices=("float32", "bfloat16")),
    "model.widths": Key(tuple, "channels of each block", low=1),
    "model.depth": Key(int, "convolutions in a block", low=1),
    "model.kernel": Key(int, "side of the kernels", low=1),
    "model.pool": Key(
        str, "pooling after a block", choices=("max", "average", "l2", "none")
    ),
    "model.norm": Key(str, "normalisation", choices=("none", "batch")),
    "model.padding": Key(
        str, "edges: zeros, or wrapped around", choices=("SAME", "CIRCULAR")
    ),
    "model.gather": Key(
        str,
        "base to head: flatten; global average; time: time into channels, a map out",
        choices=("flatten", "global", "time"),
    ),
    "model.dense": Key(tuple, "widths of the hidden dense layers in the head", low=1),
    "model.dropout": Key(float, "dropout rate in the head", high=0.99),
    "model.width": Key(int, "channels of the first stage", low=1),
    "model.stem": Key(
        str,
        "first layer for small images, or for ImageNet's",
        choices=("cifar", "imagenet"),
    ),
    "model.bn_momentum": Key(
        float, "share of the old value in BatchNorm's running statistics", high=1
    ),
    "task.name": Key(
        "classification",
        "one of k classes; binary: one probability; regression: numbers or maps",
        choices=("classification", "binary", "regression"),
    ),
    "task.label_smoothing": Key(0.0, "share of the target spread evenly", high=0.99),
    "task.class_weights": Key((), "weight of each class in the loss; (): equal"),
    "task.positive": Key("", "binary: the class whose probability is learnt"),
    "optimizer.name": Key(
        "sgd", "the optimizer", choices=("sgd", "adamw", "lamb", "muon")
    ),
    "optimizer.lr": Key(0.1, "peak learning rate"),
    "optimizer.momentum": Key(0.9, "momentum, or beta1", high=0.9999),
    "optimizer.nesterov": Key(True, "Nesterov's momentum (sgd, muon)"),
    "optimizer.beta2": Key(0.999, "beta2 (adamw, lamb)", high=0.999999),
    "optimizer.weight_decay": Key(0.0, "weight decay; never on biases and norms"),
    "optimizer.clip_norm": Key(0.0, "clip the gradient's global norm; 0: off"),
    "optimizer.accumulate": Key(1, "microbatches in a step", low=1),
    "optimizer.ema": Key(
        0.0, "decay of the weights' moving average; 0: off", high=0.999999
    ),
    "schedule.name": Key(
        "cosine",
        "learning rate over the run",
        choices=("constant", "cosine", "one_cycle", "step"),
    ),
    "schedule.warmup": Key(0.0, "share of the steps that warm up linearly", high=1),
    "schedule.steps": Key(
        (), "step: shares of the run at which the rate drops", high=1
    ),
    "schedule.factor": Key(0.1, "step: factor of each drop"),
    "schedule.final": Key(
        0.0, "rate after the last step, as a share of the peak", high=1
    ),
    "train.epochs": Key(10.0, "passes over the training split"),
    "train.steps": Key(0, "steps instead of epochs; 0: by epochs"),
    "train.log_every": Key(50, "steps between two lines of metrics", False, low=1),
    "train.eval_every": Key(
        1.0, "epochs between two evaluations; 0: only at the end", result=False
    ),
    "checkpoint.every_steps": Key(
        0, "steps between two checkpoints; 0: at each evaluation", result=False
    ),
    "checkpoint.keep": Key(
        2, "newest checkpoints kept, besides the best", False, low=1
    ),
    "compilation_cache": Key(
        "auto", "folder of compiled programs; auto: the user's; none: off", result=False
    ),
}


def default() -> ml_collections.ConfigDict:
    """Returns a new locked config in which every key has its default."""
    config = ml_collections.ConfigDict()
    for name, key in KEYS.items():
        node = config
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict()
            node = node[parent]
        if isinstance(key.default, type):
            node[leaf] = config_dict.placeholder(key.default)
        else:
            node[leaf] = key.default
    return config.lock()


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns `{"data.name": "digits", ...}` in the order of declaration."""

    def get(name: str) -> Any:
        node = config
        for part in name.split("."):
            node = node[part]
        return node

    return {name: get(name) for name in KEYS}


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the nested dict of plain values that config.json holds."""
    return json.loads(json.dumps(config.to_dict()))


def changed(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the keys whose values differ from the defaults."""
    start = flatten(default())
    return {k: v for k, v in flatten(config).items() if v != start[k]}


def result_keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the keys that change the result, with plain values."""
    values = {k: v for k, v in flatten(config).items() if KEYS[k].result}
    return json.loads(json.dumps(values))


def sha256(config: ml_collections.ConfigDict) -> str:
    """Returns the hash of the keys that change the result."""
    return hashlib.sha256(
        json.dumps(result_keys(config), sort_keys=True).encode()
    ).hexdigest()


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
    if values["task.positive"] and values["task.name"] != "binary":
        raise UsageError(
            f"task.positive is {values['task.positive']!r}, but only task.name ="
            f" 'binary' reads it, and it is {values['task.name']!r}"
        )
    model_options(config)


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
    """Fills in what was left open: the model's own options, the data's mean and std.

    Args:
      config: changed in place.
      measure: returns mean and std of the data; called only where one is needed.
    """
    for key, value in model_options(config).items():
        config.model[key] = value
    if not (config.data.mean and config.data.std):
        mean, std = measure()
        config.data.mean = config.data.mean or mean
        config.data.std = config.data.std or std


def total_steps(config: ml_collections.ConfigDict, examples: int) -> int:
    """Returns the steps of the run: train.steps, or train.epochs rounded up."""
    if config.train.steps:
        return config.train.steps
    steps = config.train.epochs * examples / config.data.batch_size
    # Rounded first: 1.1 epochs of 50,000 in batches of 500 come to 110.00000000000001.
    return max(1, math.ceil(round(steps, 6)))


def describe() -> str:
    """Returns the table of all keys that --help prints."""
    lines = []
    for name, key in KEYS.items():
        note = "" if key.result else " [does not change the result]"
        shown = repr(key.default)
        if isinstance(key.default, type):
            shown = f"({key.default.__name__}; the model's own)"
        lines.append(f"  --config.{name}={shown}\n      {key.meaning}{note}")
        if key.choices:
            lines.append(f"      one of {', '.join(key.choices)}")
    return "\n".join(lines)
