"""An import compared with the framework that the weights come from, where it is here.

The framework builds its own network, loads the same file with its own loader, and
prepares the same pictures its own way.
"""

from pathlib import Path
from typing import Any

import numpy as np

from convnet.bundle import Bundle
from convnet.weights import hub
from convnet.weights.importing import TIMM_NAMES
from convnet.weights.keras_layers import APPLICATIONS

# Relative to the largest logit.
TOLERANCE = 1e-3

_IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
_IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)
_ALPHAS = (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)


def compare(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Compares the logits of the probe's inputs, at the network's own size.

    Args:
      bundle: the import, with the preprocessing that it came with.
      path: the file of weights.

    Returns:
      {"with", "largest_difference", "relative"} or, where that is not possible,
      {"with": None, "why"}. Relative to the largest logit.
    """
    run = {"keras": _keras, "torchvision": _torchvision, "timm": _timm}
    try:
        framework, wanted = run[bundle.provenance["source"]](bundle, path)
    except ImportError as error:
        return {"with": None, "why": f"{error.name or error} is not installed"}
    except Exception as error:  # a framework may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"with": None, "why": text[:300]}
    difference = float(np.abs(bundle.probe() - wanted).max())
    scale = max(float(np.abs(wanted).max()), 1e-6)
    return {
        "with": framework,
        "largest_difference": difference,
        "relative": difference / scale,
    }


def _keras(bundle: Bundle, path: Path) -> tuple[str, np.ndarray]:
    import keras

    about, options = bundle.architecture, {}
    name = APPLICATIONS[about["name"]]
    if width := about["options"].get("width"):
        # Ours is a whole number; that of the public weights is not quite.
        near = min(_ALPHAS, key=lambda alpha: abs(32 * alpha - width))
        options["alpha"] = near if round(32 * near) == width else width / 32
    make = getattr(keras.applications, name)
    model = make(
        weights=None,
        input_shape=tuple(bundle.preprocessing["input_shape"]),
        classes=about["num_outputs"],
        classifier_activation=None,
        **options,
    )
    model.load_weights(path)
    # The functions that prepare inputs are in modules beside the networks.
    module = {"ResNet101": "resnet", "ConvNeXtTiny": "convnext"}.get(
        name, about["name"]
    )
    prepare = getattr(keras.applications, module).preprocess_input
    inputs = prepare(bundle.probe_inputs().astype(np.float32))
    logits = keras.ops.convert_to_numpy(model(inputs, training=False))
    return f"keras {keras.__version__} on {keras.backend.backend()}", logits


def _torchvision(bundle: Bundle, path: Path) -> tuple[str, np.ndarray]:
    import torchvision

    about, options = bundle.architecture, {}
    if about["name"] == "inception_v3":
        # As with the public weights: it takes inputs normalised as for the others.
        options = {"transform_input": True, "init_weights": False}
        options["aux_logits"] = about["options"]["aux"]
    model = torchvision.models.get_model(
        about["name"], weights=None, num_classes=about["num_outputs"], **options
    )
    inputs = bundle.probe_inputs().astype(np.float32) / 255
    logits = _torch_logits(model, path, (inputs - _IMAGENET_MEAN) / _IMAGENET_STD)
    return f"torchvision {torchvision.__version__}", logits


def _timm(bundle: Bundle, path: Path) -> tuple[str, np.ndarray]:
    import timm

    about = bundle.architecture
    names = {ours: theirs for theirs, ours in TIMM_NAMES.items()}
    config, options = hub.read_config(path.parent), {}
    name = config.get("architecture") or names.get(about["name"], about["name"])
    if about["name"] == "inception_v3":
        options["aux_logits"] = about["options"]["aux"]
    model = timm.create_model(
        name,
        num_classes=about["num_outputs"],
        in_chans=bundle.preprocessing["input_shape"][-1],
        **options,
    )
    mean, std = (
        np.array(bundle.preprocessing[key], np.float32) for key in ("mean", "std")
    )
    inputs = (bundle.probe_inputs().astype(np.float32) / 255 - mean) / std
    return f"timm {timm.__version__}", _torch_logits(model, path, inputs)


def _torch_logits(model: Any, path: Path, inputs: np.ndarray) -> np.ndarray:
    import torch

    from convnet.weights import torch as torch_weights

    state = torch_weights.read(path)
    model.load_state_dict({name: torch.from_numpy(v) for name, v in state.items()})
    with torch.no_grad():
        return model.eval()(torch.from_numpy(inputs.transpose(0, 3, 1, 2))).numpy()
