"""What the layers of our networks are called in PyTorch's state dicts.

Each function takes the path of a layer, split into words and (word, number) where it
ends in one, and returns the module's name.
"""

import re
from collections.abc import Callable

from convnet.models.vgg import DEPTHS

SOURCES = ("torchvision", "timm")

_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
_FIRES = ((3, 4), (6, 7), (9, 10, 11, 12))
_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# By the kind of block, the names of each branch's convolutions.
_WINDOWS = ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "_pool")
_REDUCED = ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
_ROWS = ("1x1", "7x7_1 7x7_2 7x7_3")
_ROWS += ("7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", "_pool")
_REDUCED_AGAIN = ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")
_WIDE = ("1x1", "3x3_1 3x3_2a 3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b", "_pool")
_BRANCHES = (*[_WINDOWS] * 3, _REDUCED, *[_ROWS] * 4, _REDUCED_AGAIN, _WIDE, _WIDE)

Part = str | tuple[str, int]


def layer_name(arch: str, source: str, layer: str) -> str:
    """Returns the name of our layer "base/stem/conv" in the state dict of `source`.

    Args:
      arch: a name of `NAMES`.
      source: one of `SOURCES`.
      layer: the path without its collection and leaf.
    """
    parts: list[Part] = []
    for part in layer.split("/"):
        word, number = re.fullmatch(r"(.*?)(\d*)", part).groups()
        parts.append((word, int(number)) if number else word)
    name = _NETWORKS[arch](parts, source == "timm")
    if name is None:
        raise ValueError(f"{arch} of {source} has no name for the layer {layer}")
    return name


def _vgg(arch: str) -> Callable[[list[Part], bool], str | None]:
    name, _, norm = arch.partition("_")
    depths, modules = DEPTHS[name], 3 if norm else 2  # convolution, norm, ReLU

    def network(parts: list[Part], timm: bool) -> str | None:
        match parts:
            case ["base", ("block", i), (kind, j)]:
                convs, pools = sum(depths[: i - 1]) + j - 1, i - 1
                return f"features.{convs * modules + pools + (kind == 'norm')}"
            case ["head", ("dense", i)]:
                return f"pre_logits.fc{i}" if timm else f"classifier.{3 * i - 3}"
            case ["head", "logits"]:
                return "head.fc" if timm else "classifier.6"

    return network


def _resnet(parts: list[Part], timm: bool) -> str | None:
    del timm  # has torchvision's names
    match parts:
        case ["base", "stem", kind]:
            return {"conv": "conv1", "norm": "bn1"}[kind]
        case ["base", ("stage", s), ("block", b), (kind, i)]:
            return f"layer{s}.{b - 1}.{'conv' if kind == 'conv' else 'bn'}{i}"
        case ["base", ("stage", s), ("block", b), kind]:
            return f"layer{s}.{b - 1}.downsample.{int(kind == 'shortcut_norm')}"
        case ["head", "logits"]:
            return "fc"


def _squeezenet(parts: list[Part], timm: bool) -> str | None:
    del timm  # has none
    match parts:
        case ["base", "stem", "conv"]:
            return "features.0"
        case ["base", ("stage", s), ("fire", i), ("conv", n)]:
            kind = ("squeeze", "expand1x1", "expand3x3")[n - 1]
            return f"features.{_FIRES[s - 1][i - 1]}.{kind}"
        case ["head", "conv"]:
            return "classifier.1"


def _mobilenet(parts: list[Part], timm: bool) -> str | None:
    match parts:
        case ["base", "stem", kind] if timm:
            return {"conv": "conv_stem", "norm": "bn1"}[kind]
        case ["base", "stem", kind]:
            return f"features.0.{int(kind == 'norm')}"
        case ["base", ("stage", 8), kind] if timm:
            return {"conv": "conv_head", "norm": "bn2"}[kind]
        case ["base", ("stage", 8), kind]:
            return f"features.{1 + sum(_MOBILENET_BLOCKS)}.{int(kind == 'norm')}"
        case ["base", ("stage", s), ("block", b), (kind, i)] if timm:
            convs = ("conv_dw", "conv_pw") if s == 1 else None
            convs = convs or ("conv_pw", "conv_dw", "conv_pwl")
            name = f"bn{i}" if kind == "norm" else convs[i - 1]
            return f"blocks.{s - 1}.{b - 1}.{name}"
        case ["base", ("stage", s), ("block", b), (kind, i)]:
            at, last = sum(_MOBILENET_BLOCKS[: s - 1]) + b, 2 if s == 1 else 3
            if i < last:
                return f"features.{at}.conv.{i - 1}.{int(kind == 'norm')}"
            return f"features.{at}.conv.{i - 1 + (kind == 'norm')}"
        case ["head", "logits"]:
            return "classifier" if timm else "classifier.1"


def _inception(parts: list[Part], timm: bool) -> str | None:
    del timm  # has torchvision's names
    match parts:
        case ["base", "stem", (kind, i)]:
            return f"Conv2d_{_STEM[i - 1]}.{'conv' if kind == 'conv' else 'bn'}"
        case ["base", ("mixed", m), ("branch", b), (kind, i)]:
            name = _BRANCHES[m - 1][b - 1].split()[i - 1]
            kind = "conv" if kind == "conv" else "bn"
            return f"Mixed_{_MIXED[m - 1]}.branch{name}.{kind}"
        case ["aux", _, (kind, i)]:
            return f"AuxLogits.conv{i - 1}.{'conv' if kind == 'conv' else 'bn'}"
        case ["aux", "logits"]:
            return "AuxLogits.fc"
        case ["head", "logits"]:
            return "fc"


def _convnext(parts: list[Part], timm: bool) -> str | None:
    match parts:
        case ["base", "stem", kind]:
            return f"{'stem' if timm else 'features.0'}.{int(kind == 'norm')}"
        case ["base", ("downsample", i), kind]:
            place = f"stages.{i - 1}.downsample" if timm else f"features.{2 * i - 2}"
            return f"{place}.{int(kind == 'conv')}"
        case ["base", ("stage", s), ("block", b), kind]:
            if timm:
                names = {"conv": "conv_dw", "norm": "norm", "layer_scale": "gamma"}
                names |= {"expand": "mlp.fc1", "project": "mlp.fc2"}
                return f"stages.{s - 1}.blocks.{b - 1}.{names[kind]}"
            names = {"conv": "block.0", "norm": "block.2", "expand": "block.3"}
            names |= {"project": "block.5", "layer_scale": "layer_scale"}
            return f"features.{2 * s - 1}.{b - 1}.{names[kind]}"
        case ["base", "norm"]:
            return "head.norm" if timm else "classifier.0"
        case ["head", "logits"]:
            return "head.fc" if timm else "classifier.2"


_NETWORKS: dict[str, Callable[[list[Part], bool], str | None]] = {
    **{name + norm: _vgg(name + norm) for name in DEPTHS for norm in ("", "_bn")},
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), _resnet),
    "squeezenet1_1": _squeezenet,
    "mobilenet_v2": _mobilenet,
    "inception_v3": _inception,
    "convnext_tiny": _convnext,
}
NAMES = tuple(_NETWORKS)
