"""Weights of torchvision and timm: state dicts in .safetensors or PyTorch's own files.

Read without code from the file ever being run: a safetensors file by `tensorfile`, a
.pth only through `torch.load(weights_only=True)`.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convnet import models, tensorfile
from convnet.errors import ConvnetError, UsageError
from convnet.weights import match, torch_names
from convnet.weights.match import Imported, Rule, Shape
from convnet.weights.torch_names import layer_name as _module

# How often BatchNorm saw a batch: PyTorch needs it for averages without a momentum.
_IGNORE = (r".*\bnum_batches_tracked",)
_SIDES = {"inception_v3": 299}
_SUFFIXES = (".pth", ".pt", ".bin")
# What training scripts and parallel modules wrap around the state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIX = "module."
_OIHW, _OI = (2, 3, 1, 0), (1, 0)


def load(
    path: Path,
    arch: str = "",
    source: str = "",
    *,
    initial: bool = False,
    allow_unexpected: bool = False,
) -> Imported:
    """Reads a checkpoint of torchvision or timm.

    The number of outputs, the width, and whether there is an auxiliary head follow from
    the tensors.

    Args:
      path: a .safetensors, or where PyTorch is installed a .pth, .pt or .bin.
      arch: one of `torch_names.NAMES`; "": by the names of the tensors.
      source: "torchvision" or "timm", whose names the file has; "": whose they are.
      initial: variables that the file lacks keep their initial values.
      allow_unexpected: tensors without a place are left out.

    Raises:
      UsageError: no such file, architecture or source.
      ConvnetError: the file cannot be read, or is not that architecture's; says what
        is missing, unexpected, or of another shape.
    """
    for name, value, known in (
        ("arch", arch, torch_names.NAMES),
        ("from", source, torch_names.SOURCES),
    ):
        if value and value not in known:
            raise UsageError(f"--{name}={value}: want one of {', '.join(known)}")
    tensors = read(path)
    arch, source, hint = _identify(path, tensors, arch, source)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture, input_shape = deduce(arch, source, shapes)
    template = match.template(architecture, input_shape)
    variables, rows = match.match(
        path,
        template,
        tensors,
        rules(arch, source, template),
        ignore=_IGNORE,
        initial=match.initial(architecture, input_shape) if initial else None,
        allow_unexpected=allow_unexpected,
        hint=hint,
    )
    return Imported(variables, architecture, input_shape, source, rows)


def rules(arch: str, source: str, template: Mapping[str, Shape]) -> dict[str, Rule]:
    """Returns where each variable of a template lies in the state dict of `source`."""
    return {ours: _rule(arch, source, ours, template) for ours in template}


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a state dict by their names, in the file's own dtypes.

    Raises:
      UsageError: no such file, or of another kind by its name.
      ConvnetError: it is damaged, holds no state dict, or PyTorch is not installed.
    """
    if not path.is_file():
        raise UsageError(f"--weights={path}: no such file")
    if path.suffix not in (".safetensors", *_SUFFIXES):
        raise UsageError(
            f"--weights={path}: want a .safetensors, or a {', '.join(_SUFFIXES)} of"
            " PyTorch"
        )
    if path.suffix == ".safetensors":
        try:
            with open(path, "rb") as file:
                table = tensorfile.read_table(file).tensors
                tensors = {n: tensorfile.read(file, e) for n, e in table.items()}
        except (OSError, ValueError, MemoryError) as error:
            raise ConvnetError(f"{path} is no safetensors file: {error}") from error
    else:
        tensors = _read_torch(path)
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {n.removeprefix(_PREFIX): t for n, t in tensors.items()}
    return tensors


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ConvnetError(
            f"{path} is PyTorch's own kind of file, and PyTorch is not installed here:"
            " install torch, or take the .safetensors of the same weights"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch raises whatever it comes to
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConvnetError(
            f"{path} is refused by torch.load(weights_only=True): it is damaged, or"
            f" holds more than tensors, such as pickled code: {reason}"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in found.items()
    ):
        raise ConvnetError(f"{path} holds no state dict, a table of tensors by names")
    arrays = {}
    for name, value in found.items():
        value = value.detach()
        if value.is_floating_point():
            value = value.to(torch.float32)
        arrays[name] = value.numpy()
    return arrays


def _rule(arch: str, source: str, ours: str, template: Mapping[str, Shape]) -> Rule:
    collection, *layer, leaf = ours.split("/")
    shape, module = template[ours], "/".join(layer)
    name = _module(arch, source, module)
    if layer[-1] == "layer_scale":
        stored = (*shape, 1, 1) if source == "torchvision" else ()
        return Rule(name, stored=stored)
    if collection == "batch_stats":
        return Rule(f"{name}.running_{leaf}")
    if leaf == "bias":
        return Rule(f"{name}.bias")
    name = f"{name}.weight"
    if leaf == "scale":
        return Rule(name)
    if len(shape) == 4:
        return Rule(name, _OIHW)
    if not arch.startswith("vgg") or layer[-1] == "logits":
        return Rule(name, _OI)
    # The first dense layer sees a map: by places, then channels here; in PyTorch by
    # channels, then places. timm's dense layers are convolutions over the whole map.
    inputs, outputs = shape
    channels = inputs
    if layer[-1] == "dense1":
        channels = max(
            s[-1] for path, s in template.items() if path.startswith("params/base/")
        )
    side = math.isqrt(inputs // channels)
    view = (outputs, channels, side, side)
    stored = view if source == "timm" else (outputs, inputs)
    return Rule(name, _OIHW, stored, view)


def deduce(
    arch: str, source: str, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Any], Shape]:
    """Returns the architecture that the shapes of a state dict speak of, and its input.

    Where they say nothing, the network's own defaults stand.
    """

    def features(layer: str, default: int) -> int:
        # Of the bias, which stays right where a kernel is transposed.
        shape = shapes.get(_module(arch, source, layer) + ".bias", ())
        return shape[0] if len(shape) == 1 and shape[0] > 0 else default

    options = models.options(arch)
    if arch.startswith("vgg"):
        dense = enumerate(options["dense"], 1)
        options["dense"] = tuple(features(f"head/dense{i}", n) for i, n in dense)
    elif arch.startswith("resnet"):
        options["stem"] = "imagenet"
    elif arch == "inception_v3":
        options["aux"] = any(name.startswith("AuxLogits.") for name in shapes)
    first, last = _ends(arch)
    options["width"] = features(first, options["width"])
    conv = _module(arch, source, first.replace("norm", "conv"))
    kernel = shapes.get(f"{conv}.weight", ())
    known = len(kernel) == 4 and kernel[0] == options["width"] and kernel[1] > 0
    about = {"name": arch, "num_outputs": features(last, 1000), "options": options}
    side = _SIDES.get(arch, 224)
    return about, (side, side, kernel[1] if known else 3)


def _identify(
    path: Path, tensors: Mapping[str, Any], arch: str, source: str
) -> tuple[str, str, str]:
    """The architecture and the source, and a hint where the file looks like another."""
    names = {n for n in tensors if not any(re.fullmatch(p, n) for p in _IGNORE)}

    def likeness(arch: str, source: str) -> float:
        expected = _expected(arch, source)
        return len(names & expected) / len(names | expected)

    if arch:
        sources = [source] if source else torch_names.SOURCES
        likely = max(sources, key=lambda s: likeness(arch, s))
        if likeness(arch, likely) == 1:
            return arch, likely, ""
    ranked = [
        (likeness(a, s), a, s)
        for a in torch_names.NAMES
        for s in torch_names.SOURCES
        if names & {_module(a, s, end) + ".bias" for end in _ends(a)}
    ]
    best, near, of = max(ranked, key=lambda r: r[0], default=(0.0, "", ""))
    hint = f"Its names are those of {near} ({of})." if best > 0.8 else ""
    if arch:
        return arch, likely, "" if (near, of) == (arch, likely) else hint
    if best < 0.5:
        raise ConvnetError(
            f"{path} has the names of no architecture that is known; want one of"
            f" {', '.join(torch_names.NAMES)}; it has {tensorfile.shorten(names)}"
        )
    if source and likeness(near, source) < best:
        return near, source, hint
    return near, source or of, ""


def _ends(arch: str) -> tuple[str, str]:
    """The first and the last layer of a network that has a bias."""
    firsts = {"vgg": "block1/conv1", "inc": "stem/norm1"}
    firsts |= {"res": "stem/norm", "mob": "stem/norm"}
    head = "head/conv" if arch == "squeezenet1_1" else "head/logits"
    return f"base/{firsts.get(arch[:3], 'stem/conv')}", head


@functools.cache
def _template(arch: str) -> dict[str, Shape]:
    return match.template(*deduce(arch, "torchvision", {}))


@functools.cache
def _expected(arch: str, source: str) -> frozenset[str]:
    """The names of the weights in a state dict."""
    return frozenset(r.source for r in rules(arch, source, _template(arch)).values())
