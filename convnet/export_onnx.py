"""A model as ONNX: what jax2onnx needs to know of ours, and what it leaves undone."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from convnet.bundle import Bundle
from convnet.errors import ConvnetError
from convnet.models import fused, layers, lowering

# ONNX Runtime 1.18 (2024) and later read it.
_OPSET = 21


def convert(bundle: Bundle, about: dict[str, Any]) -> bytes:
    """Returns the ONNX file: inputs as stored in, what is predicted out, any batch.

    Args:
      bundle: the model.
      about: goes into the metadata, each value as JSON.

    Raises:
      ConvnetError: the packages of the extra are not installed, or jax2onnx cannot
        convert an operation of the model.
    """
    jax2onnx = _jax2onnx()
    inputs = ("b", *bundle.preprocessing["input_shape"])
    wanted = jax.ShapeDtypeStruct(inputs, bundle.preprocessing["input_dtype"])

    # A new function: one that was traced before would not be plain.
    def predict(inputs: jax.Array) -> jax.Array:
        return bundle.predict(bundle.variables, inputs)

    try:
        with (
            _quiet(),
            _pools(),
            lowering.plain(),
            # jax2onnx 0.13 cannot read JAX 0.12's calls of jit within jit.
            jax.disable_jit(),
            nn.intercept_methods(_fold),
        ):
            model = jax2onnx.to_onnx(
                predict,
                [wanted],
                model_name=bundle.architecture["name"],
                opset=_OPSET,
                input_names=["inputs"],
                output_names=["outputs"],
            )
    except Exception as error:  # What it raises has no common class.
        raise ConvnetError(
            f"jax2onnx cannot convert {bundle.architecture['name']}:"
            f" {type(error).__name__}: {' '.join(str(error).split())[:300]};"
            " --format=stablehlo takes every model"
        ) from error
    # jax2onnx notes some shapes wrongly; readers infer them by themselves.
    del model.graph.value_info[:]
    model.producer_name = "convnet"
    for name, value in about.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    return model.SerializeToString()


def _jax2onnx() -> Any:
    try:
        import jax2onnx
        import onnxruntime  # noqa: F401 (the check needs it)
    except ModuleNotFoundError as error:
        raise ConvnetError(
            f"--format=onnx needs the package {error.name}: run launch/setup.sh onnx,"
            " or pip install 'convnet[onnx]'"
        ) from error
    return jax2onnx


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without jax2onnx's warnings, of which none is for the user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _pools() -> Iterator[None]:
    """Has jax2onnx convert `lax.reduce_window` by `_lower_pool`.

    Its own way takes the batch and the channels for spatial axes, and ONNX has pools
    for at most three.
    """
    from jax2onnx.plugins import plugin_system

    class Pool(plugin_system.PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            _lower_pool(ctx, eqn)

    # It reads its plugins at the first conversion, which must not undo this.
    plugin_system.import_all_plugins()
    registry = plugin_system.PLUGIN_REGISTRY
    names = ("reduce_window_max", "reduce_window_sum")
    before = {name: registry[name] for name in names}
    for name in names:
        plugin_system.register_primitive(jaxpr_primitive=name)(Pool)
    try:
        yield
    finally:
        registry.update(before)


def _fold(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Batch norm as one factor and one summand a channel, and its ReLU as a Relu.

    ONNX Runtime makes them a part of the convolution before. The variables are arrays
    here and not traced: they are closed over.
    """
    norm = context.module
    if not isinstance(norm, layers.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)

    def read(collection: str, name: str) -> np.ndarray:
        return np.asarray(norm.get_variable(collection, name), np.float64)

    def fold(x: jax.Array, train: bool, activation: str = "none") -> jax.Array:
        del train
        scale = 1 / np.sqrt(read("batch_stats", "var") + norm.epsilon)
        if norm.use_scale:
            scale *= read("params", "scale")
        bias = read("params", "bias") - read("batch_stats", "mean") * scale
        y = x.astype(np.float32) * np.float32(scale) + np.float32(bias)
        relu = activation == "relu"
        y = nn.relu(y) if relu else fused.activate(y, activation)
        return y.astype(norm.dtype)

    return fold(*args, **kwargs)


def _lower_pool(ctx: Any, eqn: Any) -> None:
    """Adds MaxPool, or AveragePool times its window, between two transpositions."""
    import onnx_ir as ir

    window, stride = eqn.params["window_dimensions"], eqn.params["window_strides"]
    dilations = {*eqn.params["base_dilation"], *eqn.params["window_dilation"]}
    if dilations != {1} or {window[0], window[-1]} != {1} or len(window) > 5:
        raise NotImplementedError(f"{eqn.primitive.name} over windows of {window}")
    pads = eqn.params["padding"][1:-1]
    last = len(window) - 1
    place = ctx.get_value_for_var(eqn.invars[0], name_hint=ctx.fresh_name("pool_in"))
    result = ctx.get_value_for_var(eqn.outvars[0], name_hint=ctx.fresh_name("pool"))
    batch = "b" if not isinstance(eqn.invars[0].aval.shape[0], int) else None

    def node(
        kind: str, *values: Any, name: str | None = None, **attributes: Any
    ) -> Any:
        output = name or ctx.fresh_name("pool")
        made = getattr(ctx.builder, kind)(*values, _outputs=[output], **attributes)
        made.type = ir.TensorType(ir.DataType.FLOAT)
        return made

    maximum = eqn.primitive.name == "reduce_window_max"
    counts = {} if maximum else {"count_include_pad": 1}
    x = node("Transpose", place, perm=(0, last, *range(1, last)))
    x = node(
        "MaxPool" if maximum else "AveragePool",
        x,
        kernel_shape=tuple(window[1:-1]),
        strides=tuple(stride[1:-1]),
        pads=[low for low, _ in pads] + [high for _, high in pads],
        **counts,
    )
    if not maximum:
        size = np.asarray(math.prod(window), np.float32)
        scale = ctx.builder.add_initializer_from_array(ctx.fresh_name("size"), size)
        x = node("Mul", x, scale)
    x = node("Transpose", x, name=result.name, perm=(0, *range(2, last + 1), 1))
    shape = eqn.outvars[0].aval.shape
    x.shape = ir.Shape([batch or shape[0], *map(int, shape[1:])])
    ctx.bind_value_for_var(eqn.outvars[0], x)
