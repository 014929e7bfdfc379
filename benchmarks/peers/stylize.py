"""Style transfer as PyTorch's tutorial does it, on weights and pictures from a file."""

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import protocol


class Network(nn.Module):
    """Convolutions of VGG in blocks, each with ReLU; pools between the blocks.

    Args:
      arrays: `block1/conv1/kernel` (3, 3, c, features) and `/bias`, and so on; `mean`
        and `std`.
      wanted: names of taps, such as `block1/relu1`; nothing behind the deepest is
        computed.
      form: how maps lie in memory. Pictures are contiguous: L-BFGS wants it.
    """

    def __init__(
        self, arrays: Any, wanted: list[str], form: torch.memory_format
    ) -> None:
        super().__init__()
        self.form = form
        self.wanted = set(wanted)
        self.layers: list[tuple[str, Any]] = []
        self.register_buffer("mean", torch.tensor(arrays["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(arrays["std"]).view(1, -1, 1, 1))
        kernels = [name for name in arrays.files if name.endswith("/kernel")]
        last = "block1"
        for name in kernels:
            block, conv, _ = name.split("/")
            if block != last:
                self.layers.append((f"{last}/pool", nn.MaxPool2d(2)))
            kernel = torch.tensor(arrays[name]).permute(3, 2, 0, 1).contiguous()
            layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
            layer.weight = nn.Parameter(kernel, requires_grad=False)
            bias = torch.tensor(arrays[f"{block}/{conv}/bias"])
            layer.bias = nn.Parameter(bias, requires_grad=False)
            self.add_module(name.replace("/", "_"), layer)
            self.layers.append((f"{block}/{conv}", layer))
            self.layers.append((f"{block}/{conv.replace('conv', 'relu')}", nn.ReLU()))
            last = block
        names = [name for name, _ in self.layers]
        self.layers = self.layers[: 1 + max(names.index(name) for name in wanted)]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(1, 3, h, w), 0 to 1 -> the wanted taps."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=self.form)
        taps = {}
        for name, layer in self.layers:
            x = layer(x)
            if name in self.wanted:
                taps[name] = x
        return taps


def gram(features: torch.Tensor) -> torch.Tensor:
    """(1, c, h, w) -> (c, c), divided by c h w."""
    flat = features[0].flatten(1)
    return flat @ flat.T / flat.numel()


class Transfer:
    """The loss, and L-BFGS on it."""

    def build(
        self,
        path: str,
        device: str,
        content: list[str],
        style: list[str],
        weights: list[float],
        channels_last: bool,
    ) -> None:
        """Reads weights and pictures.

        Args:
          path: an .npz with what `Network` reads, and the pictures `content`, `style`,
            `noise`, float32 (h, w, 3).
          device: "cpu" or "gpu".
          content, style: names of taps.
          weights: of content and style.
          channels_last: how maps lie in memory.
        """
        arrays = np.load(path, allow_pickle=False)
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        form = torch.channels_last if channels_last else torch.contiguous_format
        self.network = Network(arrays, [*content, *style], form).to(self.device)
        self.network.to(memory_format=form)
        self.pictures = {
            name: torch.tensor(arrays[name], device=self.device)
            .permute(2, 0, 1)[None]
            .contiguous()
            for name in ("content", "style", "noise")
        }
        self.weights = weights
        with torch.no_grad():
            taps = self.network(self.pictures["content"])
            self.content = {name: taps[name] for name in content}
            taps = self.network(self.pictures["style"])
            self.style = {name: gram(taps[name]) for name in style}

    def loss(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted content and style losses."""
        taps, mse = self.network(picture), functional.mse_loss
        content = sum(mse(taps[name], wanted) for name, wanted in self.content.items())
        style = sum(
            mse(gram(taps[name]), wanted) for name, wanted in self.style.items()
        )
        return self.weights[0] * content, self.weights[1] * style

    @torch.no_grad()
    def losses(self, name: str) -> list[float]:
        """Content and style losses of a picture of the file."""
        return [term.item() for term in self.loss(self.pictures[name])]

    def run(self, evaluations: int) -> dict[str, float]:
        """Starts at the content; returns the loss of the result, and seconds."""
        picture = self.pictures["content"].clone().requires_grad_()
        solver = torch.optim.LBFGS([picture])
        used = 0

        def closure() -> torch.Tensor:
            nonlocal used
            with torch.no_grad():
                picture.clamp_(0, 1)
            solver.zero_grad()
            loss = sum(self.loss(picture))
            loss.backward()
            used += 1
            return loss

        began = time.perf_counter()
        while used < evaluations:
            group = solver.param_groups[0]
            group["max_iter"] = min(20, evaluations - used)
            group["max_eval"] = min(25, evaluations - used)
            solver.step(closure)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            loss = sum(self.loss(picture.clamp(0, 1))).item()
        return {"loss": loss, "seconds": seconds, "evaluations": used}


if __name__ == "__main__":
    protocol.keep_heap()
    transfer = Transfer()
    protocol.serve(
        {"build": transfer.build, "losses": transfer.losses, "run": transfer.run}
    )
