"""Every key of a config: its default, its meaning, and whether it changes the result.

An experiment is a Python file with `get_config()`, which takes `default()` and says
what differs. The config is a locked `ml_collections.ConfigDict`: an unknown key fails.
Keys that do not change the result (how fast, how often, where) are left out of
`config/sha256` and may differ when a run is resumed.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection
from typing import Any

import ml_collections
from ml_collections import config_dict

from convnet import models


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
    "seed": Key(
        0, "of the order, the augmentation, the dropout and the weights", high=2**32 - 1
    ),
    "reproducible": Key(
        False,
        "the same bits on 1, 2, 4, ... devices and from any number of processes: the"
        " gradient is the sum over mesh.shards virtual shards, with BatchNorm over each"
        " (docs/reproducibility.md)",
    ),
    "init_from": Key(
        "",
        "the model whose weights a run starts from: a model file, a workdir, the name"
        " of a model that ships, or hf://NAME; it brings its architecture and"
        " preprocessing",
    ),
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
    "data.crop_fraction": Key(
        1.0,
        "resize to image_size divided by this, then cut out the centre; ImageNet's"
        " networks are used to 0.875",
        low=0.1,
        high=1,
    ),
    "data.interpolation": Key(
        "bilinear",
        "how images are resized, with antialiasing",
        choices=("bilinear", "bicubic"),
    ),
    "data.mean": Key(
        (),
        "mean subtracted from the input, one number or one a channel, in units of the"
        " input (images: 0 to 1); (): measured on the training split",
        low=-math.inf,
    ),
    "data.std": Key((), "standard deviation that divides it; (): measured", low=1e-9),
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
    "data.cache": Key(
        "none",
        "folder in which decoded images are kept, so that each is decoded once: an"
        " entry goes by the content of its file, and none is ever deleted; auto: the"
        " user's (~/.cache/convnet/images); none: off",
        result=False,
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
        float, "share of the old value in BatchNorm's running statistics", high=0.9999
    ),
    "model.variant": Key(
        str,
        "where published implementations differ (padding, epsilon, place of a stride):"
        " whose",
        choices=("torchvision", "keras"),
    ),
    "model.aux": Key(bool, "Inception: keep the auxiliary head, as a tap"),
    "task.name": Key(
        "classification",
        "one of k classes; binary: one probability; regression: numbers or maps; style:"
        " a network that paints pictures in the style of another (docs/stylize.md)",
        choices=("classification", "binary", "regression", "style"),
    ),
    "task.label_smoothing": Key(0.0, "share of the target spread evenly", high=0.99),
    "task.class_weights": Key(
        (), "weight of each class in the loss; binary with k > 2: (others, positive)"
    ),
    "task.positive": Key("", "binary: the class whose probability is learnt"),
    "task.style_image": Key("", "style: the picture whose style is learnt"),
    "task.style_size": Key(
        0, "style: longer side of that picture in pixels; 0: that of the inputs"
    ),
    "task.features": Key(
        "",
        "style: the network in whose layers pictures are compared: a model file, a"
        " workdir, the name of a model that ships, or hf://NAME",
    ),
    "task.content_layers": Key("", "style: its taps, with commas; '': chosen for it"),
    "task.style_layers": Key("", "style: its taps, with commas; '': chosen for it"),
    "task.content_weight": Key(1.0, "style: what the content counts in the loss"),
    "task.style_weight": Key(10.0, "style: what the style counts"),
    "task.tv_weight": Key(10.0, "style: what differences between neighbours count"),
    "transfer.new": Key(
        "",
        "with init_from: what starts anew, as paths with *, such as"
        " base/group3,base/*/norm*; in the head, all that does not fit always does",
    ),
    "transfer.freeze": Key(
        "", "with init_from: what does not train, as paths with *, such as base"
    ),
    "transfer.thaw_epoch": Key(
        0.0, "the epoch from which on what is frozen trains too; 0: never"
    ),
    "transfer.lr_scales": Key(
        "",
        "factors of the learning rate, such as base=0.1,base/group3=0.5; the last that"
        " names a layer counts",
    ),
    "transfer.cache_features": Key(
        "auto",
        "compute the features of a frozen base once; auto: where it is possible (no"
        " augmentation but alternating flips) and they fit",
        choices=("auto", "on", "off"),
    ),
    "optimizer.name": Key(
        "sgd", "the optimizer", choices=("sgd", "adamw", "lamb", "muon")
    ),
    "optimizer.lr": Key(0.1, "peak learning rate"),
    "optimizer.momentum": Key(0.9, "momentum, or beta1", high=0.9999),
    "optimizer.nesterov": Key(True, "Nesterov's momentum (sgd, muon)"),
    "optimizer.beta2": Key(0.999, "beta2 (adamw, lamb)", high=0.999999),
    "optimizer.weight_decay": Key(
        0.0, "weight decay; on biases and norms only where muon is the optimizer"
    ),
    "optimizer.clip_norm": Key(0.0, "clip the gradient's global norm; 0: off"),
    "optimizer.normalize": Key(
        False, "muon: kernels are kept at a norm of sqrt(features)"
    ),
    "optimizer.newton_schulz": Key(5, "muon: steps of the orthogonalisation", low=1),
    "optimizer.head_lr": Key(0.1, "muon: peak rate of the head, which SGD trains"),
    "optimizer.bias_lr": Key(0.1, "muon: peak rate of biases and norms, likewise"),
    "optimizer.rest_momentum": Key(
        0.85, "muon: momentum of what SGD trains", high=0.9999
    ),
    "optimizer.whiten_until": Key(
        0.375, "muon: share of the run in which a whitening layer's bias learns", high=1
    ),
    "optimizer.accumulate": Key(1, "microbatches in a step", low=1),
    "optimizer.ema": Key(
        0.0, "decay of the weights' moving average; 0: off", high=0.999999
    ),
    "schedule.name": Key(
        "cosine",
        "learning rate over the run",
        choices=("constant", "cosine", "linear", "one_cycle", "step"),
    ),
    "schedule.warmup": Key(0.0, "share of the steps that warm up linearly", high=0.99),
    "schedule.steps": Key(
        (), "step: shares of the run at which the rate drops", high=1
    ),
    "schedule.factor": Key(0.1, "step: factor of each drop"),
    "schedule.final": Key(
        0.0, "rate after the last step, as a share of the peak", high=1
    ),
    "train.epochs": Key(10.0, "passes over the training split"),
    "train.steps": Key(0, "steps instead of epochs; 0: by epochs"),
    "train.steps_per_dispatch": Key(
        0, "steps compiled into one program; 0: one on a CPU, else up to an epoch"
    ),
    "train.log_every": Key(50, "steps between two lines of metrics", False, low=1),
    "train.eval_every": Key(
        1.0, "epochs between two evaluations; 0: only at the end", result=False
    ),
    "evaluate.tta": Key(
        "auto",
        "average over views: the mirror image; that and moves by a pixel (six views);"
        " auto: as the model file says, of a new network none",
        choices=("auto", "none", "flip", "flip_translate"),
    ),
    "evaluate.tta_below": Key(
        1.0, "only where the most probable class has no more than this", high=1
    ),
    "checkpoint.every_steps": Key(
        0,
        "steps between checkpoints, besides those of evaluations",
        result=False,
    ),
    "checkpoint.keep": Key(
        2, "newest checkpoints kept, besides the best", False, low=1
    ),
    "mesh.shards": Key(
        8,
        "reproducible: virtual shards of a batch, a power of two; as many CPUs, or half"
        " as many other devices, can share them",
        low=2,
    ),
    "mesh.data": Key(
        0,
        "devices that hold the params whole, or a group of mesh.fsdp together, and"
        " share the batch; 0: all",
        result=False,
    ),
    "mesh.fsdp": Key(
        1,
        "devices that split the params and the optimizer's state among them, and share"
        " the batch",
        result=False,
        low=1,
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


def sha256(
    config: ml_collections.ConfigDict, without: Collection[str] = frozenset()
) -> str:
    """Returns the hash of the keys that change the result, `without` some of them."""
    values = {k: v for k, v in result_keys(config).items() if k not in without}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
