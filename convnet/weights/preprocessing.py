"""What public networks expect of a picture, and the names of ImageNet's classes."""

from pathlib import Path
from typing import Any

from convnet.errors import ConvnetError
from convnet.weights import hub, keras
from convnet.weights.match import Imported

_LABELS = Path(__file__).with_name("imagenet_labels.txt")

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# To -1 ... 1.
_SIGNED = {"mean": (0.5,), "std": (0.5,)}
# Inputs of 0 to 255, the means of ImageNet's RGB subtracted.
_CAFFE = {
    "mean": (123.68 / 255, 116.779 / 255, 103.939 / 255),
    "std": (1 / 255,),
}
# The side that torchvision resizes to; 256 where nothing is said.
_TORCHVISION_SIDES = {"inception_v3": 342, "convnext_tiny": 236}
# Its second generation of weights, by which their files' SHA-256 begin (and their
# names end): resnet50, resnet101, mobilenet_v2.
_SECOND_GENERATION = {"11ad3fa6": 232, "cd907fc2": 232, "7ebf99e0": 232}
_CROP_MODES = {"center": "crop", "squash": "squash", "border": "pad"}


def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 names, in the order in which everybody's networks have them.

    That is the order of the WordNet numbers; the words are torchvision's.
    """
    return tuple(_LABELS.read_text("utf-8").splitlines())


def published(imported: Imported, sha256: str) -> dict[str, Any]:
    """Returns the preprocessing with which a network's public weights are evaluated.

    What was trained otherwise is not known here: the caller may say.

    Args:
      imported: the network.
      sha256: of the file of weights.

    Returns:
      A bundle's preprocessing. A photograph is resized to a somewhat larger square,
      and its centre cut out.

    Raises:
      ConvnetError: it takes no pictures with three channels.
    """
    source, name = imported.source, imported.architecture["name"]
    side, _, channels = imported.input_shape
    if channels != 3:
        raise ConvnetError(
            f"the network takes {channels} channels: no public one does; only timm's"
            " config.json beside the weights could say how its inputs are normalised"
        )
    constants, fraction, interpolation = _IMAGENET, 0.875, "bilinear"
    if name == "inception_v3" or (source, name) == ("keras", "mobilenet_v2"):
        constants = _SIGNED
    elif source == "keras" and name in keras.BGR:
        constants = _CAFFE
    if source == "torchvision":
        whole = _TORCHVISION_SIDES.get(name, 256)
        fraction = side / _SECOND_GENERATION.get(sha256[:8], whole)
    elif name == "convnext_tiny" or (source == "timm" and "vgg" not in name):
        interpolation = "bicubic"
    return _preprocessing(imported, "crop", fraction, interpolation, constants)


def configured(imported: Imported, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing that a config of timm's names.

    Args:
      imported: the network; its input_shape is replaced by the config's.
      config: as `hub.read_config` gives it.

    Raises:
      ValueError: the config contradicts itself, or names what is not known here.
    """
    about = hub.pretrained(config)
    size = about.get(
        "input_size", [imported.input_shape[-1], *imported.input_shape[:2]]
    )
    channels, height, width = size if _ints(size) and len(size) == 3 else (0, 0, 1)
    if height != width or channels != imported.input_shape[-1]:
        raise ValueError(
            f"its input_size is {size}; the network takes {imported.input_shape[-1]}"
            " channels, and we squares"
        )
    options = imported.architecture["options"]
    if options.get("gather") == "flatten" and height != imported.input_shape[0]:
        raise ValueError(
            f"its input_size is {size}, but the first dense layer is for inputs of"
            f" {imported.input_shape[0]}"
        )
    mode = about.get("crop_mode", "center")
    if mode not in _CROP_MODES:
        raise ValueError(f"its crop_mode is {mode!r}, which is not known")
    return _preprocessing(
        imported,
        _CROP_MODES[mode],
        about.get("crop_pct") or 0.875,
        about.get("interpolation") or "bicubic",
        {name: about.get(name) or values for name, values in _IMAGENET.items()},
    ) | {"input_shape": (height, width, channels)}


def _preprocessing(
    imported: Imported,
    resize: str,
    fraction: float,
    interpolation: str,
    constants: dict[str, Any],
) -> dict[str, Any]:
    return {
        "input_shape": imported.input_shape,
        "input_dtype": "uint8",
        "resize": resize,
        "crop_fraction": fraction,
        "interpolation": interpolation,
        **{name: tuple(values) for name, values in constants.items()},
    }


def _ints(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(n) is int for n in values)
