"""PyTorch's train step and inference, on the data and networks of the benchmarks."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.peers import memory, networks, protocol

Run = Callable[[torch.Tensor, torch.Tensor], Any]


class Side:
    """One network, which trains or infers by one of several ways.

    The images lie normalised, in the compute precision and channels last, in the
    device's memory; a batch is gathered from them by shuffled indices.
    """

    def __init__(
        self,
        network: str,
        dtype: str,
        batch: int,
        device: str,
        width: int,
        size: int,
        images: int,
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        if device == "gpu":
            # As XLA does, and cuDNN's convolutions by themselves.
            torch.set_float32_matmul_precision("high")
        self.dtype = getattr(torch, dtype)
        self.batch, self.images = batch, images
        self.model = networks.create(network, width, size)
        self.model.to(self.device, memory_format=torch.channels_last)
        pixels = torch.randn(images, size, size, 3, device=self.device)
        self.inputs = pixels.to(self.dtype)
        self.labels = torch.randint(10, (images,), device=self.device)
        self.ways: dict[str, Run] = {}
        self._order = torch.randperm(images, device=self.device)
        self._place = 0

    def prepare(self, mode: str, compiled: bool) -> str:
        """Makes the fastest way of `mode` ready; returns its name.

        For bfloat16 there are two, autocast and weights in bfloat16: what is faster
        when both run eagerly is taken, and compiled if asked to.
        """
        if (eager := f"{mode}/eager") not in self.ways:
            plain = self.dtype == torch.float32
            found = {}
            for kind in ("float32",) if plain else ("autocast", "weights"):
                self.make(mode, kind, compiled=False)
                self.run(eager, 1)
                seconds = min(self.run(eager, 1) for _ in range(2))
                found[kind] = (seconds, self.ways[eager])
            self.kind = min(found, key=lambda kind: found[kind][0])
            self.ways = {eager: found[self.kind][1]}
        return self.make(mode, self.kind, compiled=True) if compiled else eager

    def make(self, mode: str, kind: str, compiled: bool) -> str:
        """Makes a way; `kind` is float32, autocast or weights. Returns its name."""
        way = f"{mode}/{'compiled' if compiled else 'eager'}"
        self.ways[way] = self._way(mode, kind, compiled)
        return way

    def memory(self) -> int:
        """Returns the bytes that an eager train step takes while it runs."""
        way = self.prepare("train", compiled=False)
        self.run(way, 1)
        if self.device.type == "cpu":
            return memory.peak(lambda: self.run(way, 1))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(way, 1)
        return torch.cuda.max_memory_allocated() - before

    def run(self, way: str, steps: int) -> float:
        """Does `steps` steps; returns seconds."""
        step = self.ways[way]
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            index = self._next()
            # A view of (b, h, w, c): in memory, channels stay last.
            step(self.inputs[index].permute(0, 3, 1, 2), self.labels[index])
        self._wait()
        return time.perf_counter() - start

    def _next(self) -> torch.Tensor:
        if self._place + self.batch > self.images:
            self._order = torch.randperm(self.images, device=self.device)
            self._place = 0
        self._place += self.batch
        return self._order[self._place - self.batch : self._place]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _way(self, mode: str, kind: str, compiled: bool) -> Run:
        model = copy.deepcopy(self.model).train(mode == "train")
        if kind == "weights":
            # Batch norm computes in float32, as airbench's does.
            for module in model.modules():
                if not isinstance(module, torch.nn.BatchNorm2d):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(self.dtype)
        network = self._compile(model, mode) if compiled else model
        cast = torch.autocast(self.device.type, torch.bfloat16, kind == "autocast")
        if mode == "infer":
            return _inference(network, cast)
        return _training(network, model, cast)

    def _compile(self, model: torch.nn.Module, mode: str) -> Any:
        if self.device.type == "cuda":
            return torch.compile(model, mode="max-autotune")
        # Freezing folds the weights of inference into the layouts that oneDNN wants.
        options = {"freezing": True} if mode == "infer" else None
        return torch.compile(model, options=options)


def _training(network: Any, model: torch.nn.Module, cast: Any) -> Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-3, momentum=0.9, nesterov=True, fused=True)

    def step(inputs: torch.Tensor, labels: torch.Tensor) -> None:
        with cast:
            logits = network(inputs)
        functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _inference(network: Any, cast: Any) -> Run:
    def step(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), cast:
            logits = network(inputs)
        return functional.softmax(logits.float(), -1)

    return step


def main() -> None:
    """Serves one side at a time."""
    torch.backends.cudnn.benchmark = True
    sides: list[Side] = []

    def build(**arguments: Any) -> dict[str, Any]:
        protocol.keep_heap()
        sides.clear()
        torch.compiler.reset()
        sides.append(Side(**arguments))
        count = networks.parameters(sides[0].model)
        return {"parameters": count, "threads": torch.get_num_threads()}

    def prepare(mode: str, compiled: bool) -> dict[str, str]:
        way = sides[0].prepare(mode, compiled)
        return {"way": way, "kind": sides[0].kind}

    def run(way: str, steps: int) -> float:
        return sides[0].run(way, steps)

    def take(**arguments: Any) -> int:
        return Side(**arguments).memory()

    protocol.serve({"build": build, "prepare": prepare, "run": run, "memory": take})


if __name__ == "__main__":
    main()
