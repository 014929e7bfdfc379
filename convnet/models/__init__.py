"""Architectures by name.

`create("resnet18", num_outputs=10)` makes a Linen module:

    variables = model.init(key, inputs)           # {"params", "batch_stats"}, float32
    logits = model.apply(variables, inputs, train=False)
    logits, state = model.apply(variables, inputs, mutable=["taps"])
    taps(state["taps"])                           # {"base/stem/conv": ..., ...}
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from convnet.models.cnn import cnn
from convnet.models.convnext import convnext_tiny
from convnet.models.inception import inception_v3
from convnet.models.intermediates import taps
from convnet.models.layers import Classifier
from convnet.models.mobilenet import mobilenet_v2
from convnet.models.resnet import resnet, resnet9
from convnet.models.speednet import speednet
from convnet.models.squeezenet import squeezenet
from convnet.models.stylenet import stylenet
from convnet.models.vgg import vgg, vgg_bn

_CONSTRUCTORS: dict[str, Callable[..., Classifier]] = {
    "cnn": cnn,
    "vgg11": partial(vgg, "vgg11"),
    "vgg13": partial(vgg, "vgg13"),
    "vgg16": partial(vgg, "vgg16"),
    "vgg19": partial(vgg, "vgg19"),
    "vgg11_bn": partial(vgg_bn, "vgg11"),
    "vgg13_bn": partial(vgg_bn, "vgg13"),
    "vgg16_bn": partial(vgg_bn, "vgg16"),
    "vgg19_bn": partial(vgg_bn, "vgg19"),
    "resnet9": resnet9,
    "resnet18": partial(resnet, "resnet18"),
    "resnet34": partial(resnet, "resnet34"),
    "resnet50": partial(resnet, "resnet50"),
    "resnet101": partial(resnet, "resnet101"),
    "squeezenet1_1": squeezenet,
    "mobilenet_v2": mobilenet_v2,
    "inception_v3": inception_v3,
    "convnext_tiny": convnext_tiny,
    "speednet": speednet,
    "stylenet": stylenet,
}
NAMES = tuple(_CONSTRUCTORS)

__all__ = ["NAMES", "Classifier", "create", "options", "taps"]

_CHOICES = {
    "pool": ("max", "average", "l2", "none"),
    "gather": ("flatten", "global", "time"),
    "norm": ("none", "batch"),
    "padding": ("SAME", "CIRCULAR"),
    "stem": ("cifar", "imagenet"),
    "variant": ("torchvision", "keras"),
    "aux": (False, True),
}


def create(
    name: str, *, num_outputs: int, dtype: str = "float32", **options: Any
) -> Classifier:
    """Makes the architecture `name` with `num_outputs` logits.

    `dtype`, "float32" or "bfloat16", is what it computes in; parameters, batch
    statistics and logits are float32. For `options` see the function of this name.

    Raises ValueError for an unknown name, an option which this architecture does not
    read, or a value that is not allowed.
    """
    defaults = _lookup(name)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(
                f"{name} reads no option {option!r}: it reads {', '.join(defaults)}"
            )
        _check(name, option, value)
    _check(name, "num_outputs", num_outputs)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return _CONSTRUCTORS[name](num_outputs, jnp.dtype(dtype), **options)


def options(name: str) -> dict[str, Any]:
    """The options that the architecture `name` reads, and their defaults."""
    return _lookup(name)


def _lookup(name: str) -> dict[str, Any]:
    if name not in _CONSTRUCTORS:
        near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5) or NAMES
        raise ValueError(f"unknown model {name!r}: the nearest are {', '.join(near)}")
    parameters = inspect.signature(_CONSTRUCTORS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _check(name: str, option: str, value: Any) -> None:
    def positive(n: Any) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and n > 0

    if option in _CHOICES:
        good = value in _CHOICES[option]
        wanted = "one of " + ", ".join(map(str, _CHOICES[option]))
    elif option in ("widths", "dense"):
        good = isinstance(value, (tuple, list)) and all(map(positive, value))
        good = good and (option == "dense" or len(value) > 0)
        wanted = "a tuple of positive whole numbers" + (
            ", one for each block" if option == "widths" else ""
        )
    elif option in ("dropout", "bn_momentum"):
        good = isinstance(value, (int, float)) and 0 <= value < 1
        wanted = "a number from 0 to below 1"
    else:
        good, wanted = positive(value), "a positive whole number"
    if not good:
        raise ValueError(f"{name}: {option}={value!r} must be {wanted}")
