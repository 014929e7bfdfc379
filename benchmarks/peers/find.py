"""The ConvNetJS CIFAR-10 network in PyTorch and in ONNX Runtime: uint8 images in,
probabilities out."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.peers import protocol

Run = Callable[[np.ndarray], np.ndarray]


class Network(nn.Module):
    """Three times convolution, ReLU and pool, then a dense layer.

    Args:
      weights: `kernel0` (h, w, c, features), `bias0`, ... of three convolutions, and
        `kernel3` (inputs, outputs), `bias3`, whose inputs are in the order h, w, c.
      dtype: what it computes in.
    """

    def __init__(self, weights: dict[str, np.ndarray], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        blocks = []
        for index in range(3):
            kernel = torch.from_numpy(weights[f"kernel{index}"]).permute(3, 2, 0, 1)
            features, inputs, side, _ = kernel.shape
            conv = nn.Conv2d(inputs, features, side, padding=side // 2)
            conv.weight.data = kernel.contiguous()
            conv.bias.data = torch.from_numpy(weights[f"bias{index}"])
            blocks += [conv, nn.ReLU(), nn.MaxPool2d(2)]
        self.base = nn.Sequential(*blocks)
        kernel = torch.from_numpy(weights["kernel3"])
        self.head = nn.Linear(*kernel.shape)
        self.head.weight.data = kernel.T.contiguous()
        self.head.bias.data = torch.from_numpy(weights["bias3"])
        self.to(dtype, memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (b, h, w, c) -> float32 probabilities (b, k)."""
        x = images.permute(0, 3, 1, 2).to(self.dtype) / 255 - 0.5
        x = self.base(x).permute(0, 2, 3, 1).flatten(1)
        return self.head(x).float().softmax(-1)


def in_torch(weights: dict[str, np.ndarray], dtype: str, compiled: bool) -> Run:
    """Returns PyTorch's way, with channels last."""
    network = Network(weights, getattr(torch, dtype)).eval()
    call = torch.compile(network) if compiled else network

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return call(torch.from_numpy(images)).numpy()

    return run


def in_onnx(weights: dict[str, np.ndarray]) -> Run:
    """Returns ONNX Runtime's way, float32, with all its optimisations."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    held, nodes = [], []

    def constant(name: str, value: np.ndarray) -> str:
        array = np.ascontiguousarray(value, value.dtype)
        held.append(numpy_helper.from_array(array, name))
        return name

    def node(kind: str, output: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    x = node("Cast", "float", "images", to=TensorProto.FLOAT)
    x = node("Div", "unit", x, constant("scale", np.float32(255)))
    x = node("Sub", "normal", x, constant("mean", np.float32(0.5)))
    x = node("Transpose", "first", x, perm=[0, 3, 1, 2])
    for index in range(3):
        kernel = weights[f"kernel{index}"].transpose(3, 2, 0, 1)
        names = (
            constant(f"kernel{index}", kernel),
            constant(f"bias{index}", weights[f"bias{index}"]),
        )
        pads = [kernel.shape[2] // 2] * 4
        x = node("Conv", f"conv{index}", x, *names, pads=pads)
        x = node("Relu", f"relu{index}", x)
        x = node("MaxPool", f"pool{index}", x, kernel_shape=[2, 2], strides=[2, 2])
    x = node("Transpose", "last", x, perm=[0, 2, 3, 1])
    x = node("Flatten", "flat", x)
    names = constant("kernel3", weights["kernel3"]), constant("bias3", weights["bias3"])
    x = node("Gemm", "logits", x, *names)
    node("Softmax", "probabilities", x, axis=-1)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["b", 10])],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images})[0]


def main() -> None:
    """Serves one way at a time."""
    protocol.keep_heap()
    ways: dict[str, tuple[Run, np.ndarray, int]] = {}

    def in_parts(run: Run, images: np.ndarray, part: int) -> np.ndarray:
        parts = [run(images[i : i + part]) for i in range(0, len(images), part)]
        return np.concatenate(parts)

    def timed(run: Run, images: np.ndarray, part: int) -> float:
        start = time.perf_counter()
        in_parts(run, images, part)
        return time.perf_counter() - start

    def build(way: str, path: str, dtype: str, part: int) -> list[list[float]]:
        """Makes a way ready, on all images at once or on parts, whichever is faster.

        Returns the probabilities of the first images.
        """
        with np.load(path) as file:
            arrays = dict(file)
        images = arrays.pop("images")
        if way == "ONNX Runtime":
            run = in_onnx(arrays)
        else:
            run = in_torch(arrays, dtype, compiled=way == "PyTorch compiled")
        times = {}
        for size in (part, len(images)):
            times[size] = min(timed(run, images, size) for _ in range(3))
        ways[way] = run, images, min(times, key=times.get)
        return run(images[:part])[:100].tolist()

    def run(way: str, steps: int) -> float:
        return sum(timed(*ways[way]) for _ in range(steps))

    def clear() -> None:
        ways.clear()
        torch.compiler.reset()

    protocol.serve({"build": build, "run": run, "clear": clear})


if __name__ == "__main__":
    main()
