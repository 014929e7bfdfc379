"""airbench94's recipe with Muon in PyTorch: the peer of `time_to_accuracy`.

After Jordan 2024, arXiv:2404.00498, and airbench94_muon: one triangular schedule that
only falls, Muon for the kernels, SGD for biases and head, label smoothing 0.2, flips
that alternate from epoch to epoch, moves by up to two pixels, six views in the end.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import networks, protocol

_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2470, 0.2435, 0.2616)
_MUON_LR, _BIAS_LR, _HEAD_LR = 0.24, 0.053, 0.67
_WHITEN_EPOCHS = 3  # after which the whitening's bias stays
_SHIFT = 2  # pixels


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Three Newton-Schulz steps towards the nearest orthogonal matrix."""
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, on kernels of the norm sqrt(features)."""

    def __init__(self, kernels: list[nn.Parameter]) -> None:
        super().__init__(kernels, {"lr": _MUON_LR, "momentum": 0.6})

    @torch.no_grad()
    def step(self) -> None:
        """One update by Nesterov's momentum."""
        for group in self.param_groups:
            for kernel in group["params"]:
                state, gradient = self.state[kernel], kernel.grad
                if not state:
                    state["buffer"] = torch.zeros_like(gradient)
                buffer = state["buffer"]
                buffer.mul_(group["momentum"]).add_(gradient)
                ahead = gradient.add(buffer, alpha=group["momentum"])
                kernel.mul_(math.sqrt(len(kernel)) / kernel.norm())
                update = orthogonal(ahead.reshape(len(kernel), -1))
                kernel.add_(update.view_as(kernel), alpha=-group["lr"])


def initialise(network: networks.SpeedNet, images: torch.Tensor) -> None:
    """Starts anew: identity kernels, whitening of the patches of `images` (b c h w)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight.data[: module.in_channels])
    head = network.head.weight.data
    head /= head.std()
    network.bias.data.zero_()
    patches = functional.unfold(images.float(), 2).transpose(1, 2).reshape(-1, 12)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    kernel = (vectors / torch.sqrt(values + 5e-4)).T.reshape(12, 3, 2, 2)
    network.kernel.copy_(torch.cat([kernel, -kernel]))


class Training:
    """One run, epoch by epoch.

    On a CPU float32 weights compute in bfloat16 by autocast; on a GPU weights are
    float16, as published.

    Args:
      path: an .npz with x_train, y_train, x_test, y_test; x uint8 (n, 32, 32, 3).
      device: "cpu" or "gpu".
    """

    def __init__(self, path: str, device: str) -> None:
        self.gpu = device == "gpu"
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.dtype = torch.float16 if self.gpu else torch.bfloat16
        arrays = np.load(path, allow_pickle=False)
        self.train, self.test = (self._images(arrays[f"x_{s}"]) for s in _SPLITS)
        self.labels, self.answers = (
            torch.tensor(arrays[f"y_{s}"], dtype=torch.int64, device=self.device)
            for s in _SPLITS
        )
        self.network = networks.SpeedNet(int(self.labels.max()) + 1)
        self.network.to(self.device, memory_format=torch.channels_last)
        if self.gpu:
            for module in self.network.modules():
                if not isinstance(module, nn.BatchNorm2d):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(self.dtype)
        self.forward: Any = self.network

    def _images(self, pixels: np.ndarray) -> torch.Tensor:
        images = torch.tensor(pixels, device=self.device).permute(0, 3, 1, 2) / 255
        mean, std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (_MEAN, _STD)
        )
        return ((images - mean) / std).to(self.dtype).contiguous(memory_format=_LAST)

    def begin(
        self, seed: int, epochs: float, batch: int, compiled: bool
    ) -> dict[str, Any]:
        """Starts a run anew.

        Returns:
          `seconds` of compilation and initialisation, `parameters`, `epochs` to run.
        """
        start = self._now()
        torch.manual_seed(seed)
        self.batch = min(batch, len(self.train))
        self.per_epoch = len(self.train) // self.batch
        self.steps = math.ceil(epochs * self.per_epoch)
        self.done = self.epoch = 0
        if compiled and self.forward is self.network:
            mode = "max-autotune" if self.gpu else "default"
            self.forward = torch.compile(self.network, mode=mode)
        self._optimizers()
        if self.gpu or compiled:
            self._warm_up()
        initialise(self.network, self.train[:5000])
        self._optimizers()
        flip = torch.rand(len(self.train), device=self.device) < 0.5
        flipped = torch.where(flip.view(-1, 1, 1, 1), self.train.flip(-1), self.train)
        self.padded = functional.pad(flipped, (_SHIFT,) * 4, "reflect")
        return {
            "seconds": self._now() - start,
            "parameters": networks.parameters(self.network),
            "epochs": math.ceil(self.steps / self.per_epoch),
        }

    def _optimizers(self) -> None:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        head, bias = self.network.head.weight, self.network.bias
        kernels = [p for p in parameters if p.ndim == 4]
        norms = [p for p in parameters if p.ndim == 1 and p is not bias]
        decay = 2e-6 * self.batch
        groups = [
            {"params": p, "lr": lr, "weight_decay": decay / lr}
            for p, lr in (([bias], _BIAS_LR), (norms, _BIAS_LR), ([head], _HEAD_LR))
        ]
        sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=True)
        self.optimizers = [sgd, Muon(kernels)]
        # (group, its first learning rate, the steps until it is zero)
        whiten = _WHITEN_EPOCHS * self.per_epoch
        groups = sgd.param_groups + self.optimizers[1].param_groups
        self.rates = [
            (group, group["lr"], whiten if place == 0 else self.steps)
            for place, group in enumerate(groups)
        ]

    def _warm_up(self) -> None:
        """Compiles (or, on a GPU, chooses) all that a run needs."""
        for train_bias in (True, False):
            for _ in range(3):
                self._step(
                    self.train[: self.batch], self.labels[: self.batch], train_bias
                )
        self.evaluate("none")
        self.evaluate("flip_translate")

    def run_epoch(self) -> dict[str, float]:
        """Trains an epoch and evaluates.

        Returns:
          `seconds` of training alone, and `accuracy`, 0 to 1.
        """
        start = self._now()
        images = self._moved()
        order = torch.randperm(len(images), device=self.device)
        whiten = _WHITEN_EPOCHS * self.per_epoch
        for place in range(min(self.per_epoch, self.steps - self.done)):
            for group, rate, last in self.rates:
                group["lr"] = rate * max(1 - self.done / last, 0.0)
            index = order[place * self.batch : (place + 1) * self.batch]
            inputs = images[index].contiguous(memory_format=_LAST)
            self._step(inputs, self.labels[index], self.done < whiten)
            self.done += 1
        self.epoch += 1
        seconds = self._now() - start
        return {"seconds": seconds, "accuracy": self.evaluate("none")}

    def _moved(self) -> torch.Tensor:
        """Returns the epoch's images: each moved at random, all mirrored if odd."""
        side = self.train.shape[-1]
        shifts = torch.randint(2 * _SHIFT + 1, (len(self.train), 2), device=self.device)
        images = torch.empty_like(self.train)
        for y in range(2 * _SHIFT + 1):
            for x in range(2 * _SHIFT + 1):
                here = (shifts[:, 0] == y) & (shifts[:, 1] == x)
                images[here] = self.padded[here, :, y : y + side, x : x + side]
        return images.flip(-1) if self.epoch % 2 else images

    def _step(
        self, inputs: torch.Tensor, labels: torch.Tensor, train_bias: bool
    ) -> None:
        self.network.train()
        with self._cast():
            logits = self.forward(inputs, train_bias)
        loss = functional.cross_entropy(
            logits.float(), labels, label_smoothing=0.2, reduction="sum"
        )
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, views: str) -> float:
        """Returns the accuracy, 0 to 1, with logits averaged over `views`."""
        self.network.eval()
        right = 0
        with self._cast():
            for images, labels in zip(
                self.test.split(2000), self.answers.split(2000), strict=True
            ):
                logits = sum(
                    share * self.forward(view, True).float()
                    for view, share in _views(images, views)
                )
                right += (logits.argmax(1) == labels).sum().item()
        return right / len(self.test)

    def _cast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=not self.gpu)

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


_SPLITS = ("train", "test")
_LAST = torch.channels_last


def _views(images: torch.Tensor, kind: str) -> Iterator[tuple[torch.Tensor, float]]:
    """Yields views and their shares: mirrored, and moved by one pixel."""
    if kind == "none":
        yield images, 1.0
        return
    moves = [(images, 0.25)] if kind == "flip_translate" else [(images, 0.5)]
    if kind == "flip_translate":
        side = images.shape[-1]
        padded = functional.pad(images, (1,) * 4, "reflect")
        for start in (0, 2):
            stop = start + side
            moves.append((padded[:, :, start:stop, start:stop], 0.125))
    for view, share in moves:
        yield view.contiguous(memory_format=_LAST), share
        yield view.flip(-1).contiguous(memory_format=_LAST), share


def main() -> None:
    """Serves one training at a time."""
    protocol.keep_heap()
    torch.backends.cudnn.benchmark = True
    held: list[Training] = []

    def load(path: str, device: str) -> int:
        held[:] = [Training(path, device)]
        return len(held[0].train)

    protocol.serve(
        {
            "load": load,
            "begin": lambda **arguments: held[0].begin(**arguments),
            "epoch": lambda: held[0].run_epoch(),
            "evaluate": lambda views: held[0].evaluate(views),
        }
    )


if __name__ == "__main__":
    main()
