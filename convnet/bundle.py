"""The model file: weights, architecture, labels and preprocessing in one safetensors.

Its metadata also holds where the weights come from, and a probe: the logits for a fixed
generated input, which loading computes again and compares. A file whose weights arrive
slightly wrong is refused. A file may come from anywhere: everything in it is checked
before memory is taken for it (`tensorfile`, `bundle_metadata`, `bundle_check`).
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from convnet import (
    bundle_check,
    bundle_metadata,
    mesh,
    models,
    resolve,
    tensorfile,
    tta,
)
from convnet import config as config_lib
from convnet import step as step_lib
from convnet import task as task_lib
from convnet.ahead import Ahead
from convnet.bundle_metadata import Probe
from convnet.data.resize import Resize
from convnet.errors import ConvnetError, UsageError
from convnet.files import write

# Models that come with the package: NAME.safetensors for --model=NAME.
SHIPPED = Path(__file__).parent / "shipped"
STORAGES = ("float32", "bfloat16")

_FILE = "model.safetensors"
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
      preprocessing: {"input_shape", "input_dtype", "resize", "crop_fraction",
        "interpolation", "mean", "std"}; crop_fraction and interpolation may be missing.
      provenance: where the weights come from; free of form.
      variables: {"params": ..., "batch_stats": ...}, float32.
      views: one of `tta.VIEWS`: what a prediction is averaged over, unless the caller
        says otherwise. A trained model predicts as its test accuracy was measured.
    """

    architecture: dict[str, Any]
    task: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    provenance: dict[str, Any]
    variables: dict[str, Any]
    views: str = "none"

    def model(self, dtype: str = "float32") -> nn.Module:
        """Returns the Linen module, computing in `dtype`."""
        return models.create(
            self.architecture["name"],
            num_outputs=self.architecture["num_outputs"],
            dtype=dtype,
            **self.architecture["options"],
        )

    def logits(
        self,
        variables: Any,
        inputs: jax.Array,
        dtype: str = "float32",
        views: str = "none",
    ) -> jax.Array:
        """Inputs as they are stored (b, *spatial, c) -> float32 logits; pure.

        `views` is one of `tta.VIEWS`, over which the logits are averaged.
        """
        about, model = self.preprocessing, self.model(dtype)
        normal = step_lib.normalize(
            step_lib.to_unit(inputs), tuple(about["mean"]), tuple(about["std"])
        )
        return tta.logits(partial(model.apply, variables, train=False), normal, views)

    def predict(
        self,
        variables: Any,
        inputs: jax.Array,
        dtype: str = "float32",
        views: str | None = None,
    ) -> jax.Array:
        """Inputs as they are stored (b, *spatial, c) -> what is predicted; pure.

        That is float32 probabilities (b, k); with the task "binary" that of the
        positive class (b,); for regression the outputs themselves. `views` is one of
        `tta.VIEWS`, by default the model's own.
        """
        logits = self.logits(variables, inputs, dtype, views or self.views)
        if self.task["name"] == "classification":
            return task_lib.Classification(logits.shape[-1]).predict(logits)
        if self.task["name"] == "binary":
            return task_lib.Binary(self.task["positive"]).predict(logits)
        return logits

    def predict_fn(
        self, dtype: str = "float32", views: str | None = None
    ) -> Callable[[Any], jax.Array]:
        """Returns `predict` as a compiled function of the inputs alone.

        What it computes of the weights alone, it computes once.
        """
        options = mesh.compiler_options(jax.default_backend())
        predict = partial(self.predict, dtype=dtype, views=views)
        return Ahead(predict, self.variables, options)

    def probe(self) -> np.ndarray:
        """Returns the logits for the probe input: plain float32, highest precision.

        Raises:
          ValueError: the network is too large to be tried.
        """
        shape = (2, *self.preprocessing["input_shape"])
        dtype = self.preprocessing["input_dtype"]
        run = bundle_check.compiled(
            self.logits, self.variables, jax.ShapeDtypeStruct(shape, dtype)
        )
        return np.asarray(run(self.variables, jnp.asarray(self.probe_inputs())))

    def probe_inputs(self) -> np.ndarray:
        """Returns two inputs as stored (2, *spatial, c): noise, always the same."""
        shape = (2, *self.preprocessing["input_shape"])
        values = np.random.Generator(np.random.Philox(0)).integers(0, 256, shape)
        if self.preprocessing["input_dtype"] == "float32":
            values = values / 127.5 - 1.0
        return values.astype(self.preprocessing["input_dtype"])


def save(path: Path, bundle: Bundle, storage: str = "float32") -> None:
    """Writes the model file, beside its place first.

    Args:
      path: the file.
      bundle: what is saved.
      storage: "bfloat16" halves the file: kernels are rounded to it, vectors (biases,
        scales, statistics) are not. The probe is that of the rounded weights.

    Raises:
      ConvnetError: the file cannot be written, or could not be read again: the probe
        is not finite, or something in the bundle is of the wrong kind.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: want one of {', '.join(STORAGES)}")
    tensors = {
        name: np.ascontiguousarray(
            leaf,
            jnp.bfloat16 if storage == "bfloat16" and leaf.ndim > 1 else np.float32,
        )
        for name, leaf in _flatten(jax.device_get(bundle.variables)).items()
    }
    stored = dataclasses.replace(bundle, variables=_unflatten(tensors))
    about = {f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle)}
    del about["variables"]
    try:
        metadata = bundle_metadata.pack(about, Probe.of(stored.probe()))
    except (TypeError, ValueError) as error:
        raise ConvnetError(f"{path} cannot be written: {error}") from error
    metadata[tensorfile.SEAL] = tensorfile.seal(metadata, sorted(tensors.items()))
    write(path, safetensors.numpy.save(tensors, metadata))


def find(name: str | Path) -> Path:
    """Returns the model file that --model names.

    Args:
      name: a model file, a workdir with one, or the name of a model that ships with the
        package, looked for in this order.

    Raises:
      UsageError: there is none; says where it was looked for, and what is near.
    """
    path = Path(os.path.expanduser(name))
    # os.path's answer is no where a path cannot be one: too long, or with a null.
    if str(name) and os.path.isfile(path):
        return path
    if str(name) and os.path.isfile(path / _FILE):
        return path / _FILE
    shipped = {p.stem: p for p in sorted(SHIPPED.glob("*.safetensors"))}
    if str(name) in shipped:
        return shipped[str(name)]
    if os.path.isdir(path):
        why = f"the folder has no {_FILE} (a run writes it when it is finished)"
    else:
        why = "it is no regular file" if os.path.exists(path) else "no such file"
        why += resolve.nearest(path.name, [*_near(path), *shipped])
    names = ", ".join(shipped) or "none"
    raise UsageError(
        f"--model={name}: {why}; want a model file, a workdir, or the name of a model"
        f" that ships with convnet ({names})"
    )


def load(name: str | Path) -> Bundle:
    """Reads the model file that `find` finds, and checks it by its probe.

    Raises:
      UsageError: there is no such file.
      ConvnetError: it is no model file, a tensor is missing, unexpected, or of another
        shape or dtype, or the probe's logits differ; says which, and by how much.
    """
    path = find(name)
    try:
        with open(path, "rb") as file:
            table = tensorfile.read_table(file)
            about, wanted = bundle_metadata.unpack(table.metadata)
            bundle_check.check_tensors(Bundle(**about, variables={}), table.tensors)
            tensors = {
                name: tensorfile.read(file, entry)
                for name, entry in table.tensors.items()
            }
        bundle = Bundle(**about, variables=_unflatten(tensors))
        got = Probe.of(bundle.probe())
    except (OSError, ValueError, MemoryError, jax.errors.JaxRuntimeError) as error:
        raise ConvnetError(f"{path} is no convnet model file: {error}") from error
    if got.shape != wanted.shape:
        raise ConvnetError(
            f"{path}: the shape of its probe is {list(wanted.shape)}, but the network"
            f" puts out {list(got.shape)}"
        )
    scale = max(float(np.abs(wanted.logits).max()), 1e-6)
    error = float(np.abs(got.logits - wanted.logits).max()) / scale
    if not error <= _PROBE_TOLERANCE:
        raise ConvnetError(
            f"{path}: the logits of its probe differ by {error:.2g} of the largest;"
            f" {_PROBE_TOLERANCE:g} is allowed: the weights are not those saved"
        )
    return bundle


def load_answering(name: str | Path) -> Bundle:
    """`load`, for apps that ask a network what it makes of an input.

    Raises:
      UsageError: also if it is a style network, which has no answers.
    """
    bundle = load(name)
    if bundle.task["name"] == "style":
        raise UsageError(
            f"--model={name} is a style network, which paints pictures and has no"
            " answers; python -m convnet.stylize runs it"
        )
    return bundle


def is_sealed(path: Path) -> bool | None:
    """Whether a model file is, to the last bit, what was saved; None: it does not say.

    Raises:
      ValueError: it is no safetensors file.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        table = tensorfile.read_table(file)
        if tensorfile.SEAL not in table.metadata:
            return None
        tensors = (
            (name, tensorfile.read(file, entry))
            for name, entry in sorted(table.tensors.items())
        )
        seal = tensorfile.seal(table.metadata, tensors)
    return seal == table.metadata[tensorfile.SEAL]


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
    resize = Resize.of(about)
    config.data.resize = resize.rule
    config.data.crop_fraction = resize.crop_fraction
    config.data.interpolation = resize.interpolation
    h, w = (*about["input_shape"], 0)[:2]
    if len(about["input_shape"]) == 3 and h == w and about["input_dtype"] == "uint8":
        config.data.image_size = h
    # It is trained: nothing is to be loaded or frozen.
    config.init_from = ""
    config.transfer.update(config_lib.default().transfer)
    config.task.name = bundle.task["name"]
    if bundle.task["positive"] is not None:
        config.task.positive = bundle.classes[bundle.task["positive"]]


def _flatten(variables: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")


def _unflatten(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    floats = {name: np.asarray(leaf, np.float32) for name, leaf in tensors.items()}
    return traverse_util.unflatten_dict(floats, sep="/")


def _near(path: Path) -> list[str]:
    """Names beside a file that is not there, of which one may be meant."""
    try:
        return [p.name for p in path.parent.iterdir()][:1000]
    except (OSError, ValueError):
        return []
