"""The model file: weights, architecture, labels and preprocessing in one safetensors.

Its metadata also holds where the weights come from, and a probe: the logits for a fixed
generated input, which loading computes again and compares. A file whose weights arrive
slightly wrong is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from convnet import models
from convnet import step as step_lib
from convnet.errors import ConvnetError, UsageError
from convnet.files import write

_FORMAT = "convnet 1"
# Relative to the largest logit: what another device or XLA may change, and no more.
_PROBE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained model and all that is needed to use it.

    Attributes:
      architecture: {"name", "num_outputs", "options"}: the arguments of models.create.
      task: {"name", "positive"}: "classification", "binary" or "regression"; `positive`
        is the number of the positive class (binary) or None.
      classes: names, in the order of the outputs; empty for regression.
      preprocessing: {"input_shape", "input_dtype", "resize", "mean", "std"}.
      provenance: where the weights come from; free of form.
      variables: {"params": ..., "batch_stats": ...}, float32.
    """

    architecture: dict[str, Any]
    task: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    provenance: dict[str, Any]
    variables: dict[str, Any]

    def model(self, dtype: str = "float32") -> nn.Module:
        """Returns the Linen module, computing in `dtype`."""
        return models.create(
            self.architecture["name"],
            num_outputs=self.architecture["num_outputs"],
            dtype=dtype,
            **self.architecture["options"],
        )

    def probe(self) -> np.ndarray:
        """Returns the logits for the probe input, float32 at the highest precision."""
        about = self.preprocessing
        shape = (2, *about["input_shape"])
        values = np.random.Generator(np.random.Philox(0)).integers(0, 256, shape)
        if about["input_dtype"] == "uint8":
            inputs = jnp.asarray(values, jnp.uint8)
        else:
            inputs = jnp.asarray(values / 127.5 - 1.0, jnp.float32)

        def logits(variables: Any, inputs: jax.Array) -> jax.Array:
            normal = step_lib.normalize(
                step_lib.to_unit(inputs), tuple(about["mean"]), tuple(about["std"])
            )
            return self.model().apply(variables, normal, train=False)

        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(logits)(self.variables, inputs))


def save(path: Path, bundle: Bundle) -> None:
    """Writes the model file, beside its place first."""
    tensors = {
        name: np.ascontiguousarray(leaf)
        for name, leaf in _flatten(jax.device_get(bundle.variables)).items()
    }
    about = {f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle)}
    del about["variables"]
    probe = bundle.probe()
    about["probe"] = {"shape": probe.shape, "logits": probe.ravel().tolist()}
    metadata = {"format": _FORMAT, "convnet": json.dumps(about)}
    write(path, safetensors.numpy.save(tensors, metadata))


def load(path: Path) -> Bundle:
    """Reads a model file, or that of a workdir, and checks it by its probe.

    Raises:
      UsageError: there is no such file.
      ConvnetError: it is no model file, a tensor is missing, unexpected or of another
        shape, or the probe's logits differ; says which, and by how much.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"--model={path}: no such file; want a model file or workdir")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        about = json.loads(metadata["convnet"])
        probe = about.pop("probe")
        bundle = Bundle(
            **{**about, "classes": tuple(about["classes"])},
            variables=traverse_util.unflatten_dict(tensors, sep="/"),
        )
        _check_leaves(bundle, tensors)
        wanted = np.asarray(probe["logits"], np.float32).reshape(probe["shape"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise ConvnetError(f"{path} is no convnet model file: {e}") from e
    got = bundle.probe()
    scale = max(float(np.abs(wanted).max()), 1e-6)
    error = float(np.abs(got - wanted).max()) / scale if got.size else 0.0
    if got.shape != wanted.shape or not error <= _PROBE_TOLERANCE:
        raise ConvnetError(
            f"{path}: the logits of its probe differ by {error:.2g} of the largest;"
            f" {_PROBE_TOLERANCE:g} is allowed: the weights are not those saved"
        )
    return bundle


def configure(config: ml_collections.ConfigDict, bundle: Bundle) -> None:
    """Sets the keys that are the model's to say: architecture, input, task."""
    about = bundle.preprocessing
    for key in config.model:
        if key not in ("name", "dtype"):
            config.model[key] = None
    config.task.positive, config.task.class_weights = "", ()
    config.model.name = bundle.architecture["name"]
    for name, value in bundle.architecture["options"].items():
        config.model[name] = tuple(value) if isinstance(value, list) else value
    config.data.mean = tuple(about["mean"])
    config.data.std = tuple(about["std"])
    config.data.resize = about["resize"]
    h, w = (*about["input_shape"], 0)[:2]
    if len(about["input_shape"]) == 3 and h == w and about["input_dtype"] == "uint8":
        config.data.image_size = h
    config.task.name = bundle.task["name"]
    if bundle.task["positive"] is not None:
        config.task.positive = bundle.classes[bundle.task["positive"]]


def _flatten(variables: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")


def _check_leaves(bundle: Bundle, tensors: dict[str, np.ndarray]) -> None:
    shape = (1, *bundle.preprocessing["input_shape"])
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    wanted = _flatten(jax.eval_shape(bundle.model().init, jax.random.key(0), inputs))
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}")
    for name, leaf in wanted.items():
        found = tensors[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise ValueError(
                f"tensor {name} is {found.dtype}{list(found.shape)}, want"
                f" {leaf.dtype}{list(leaf.shape)}"
            )
