"""The methods of convnet.explain in PyTorch, in float64, to compare with.

    python benchmarks/peers/explain.py IN.npz OUT.npz

IN holds inputs (n, h, w, c) and baseline, the parameters of conv - ReLU - max-pool -
conv - ReLU - max-pool - dense, and the class to explain. Written from the papers.
"""

import sys

import numpy as np
import torch
from torch.nn import functional as F

DATA = {name: torch.tensor(array) for name, array in np.load(sys.argv[1]).items()}


class GuidedReLU(torch.autograd.Function):
    """Only what is positive, on the way there and on the way back."""

    @staticmethod
    def forward(ctx, x):
        """ReLU."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        """The gradient, where it and the input are positive."""
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (x > 0)


def network(x, relu=torch.relu):
    """x (n, c, h, w) -> the score of the class, and the last feature map."""
    x = relu(F.conv2d(x, DATA["kernel1"], DATA["bias1"], padding="same"))
    x = F.max_pool2d(x, 2)
    maps = relu(F.conv2d(x, DATA["kernel2"], DATA["bias2"], padding="same"))
    flat = F.max_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(1)
    return (flat @ DATA["dense"] + DATA["bias3"])[:, int(DATA["index"])], maps


def nhwc(x):
    """(n, c, h, w) -> a NumPy array (n, h, w, c)."""
    return x.permute(0, 2, 3, 1).detach().numpy()


def at_input(x, relu=torch.relu):
    """The gradient of the score at x (n, c, h, w)."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, relu)[0].sum(), x)
    return gradient


x = DATA["inputs"].permute(0, 3, 1, 2)
baseline = DATA["baseline"].permute(0, 3, 1, 2)
score, maps = network(x.requires_grad_())
(gradient,) = torch.autograd.grad(score.sum(), maps)
weights = gradient.mean((2, 3), keepdim=True)
cam = F.relu((weights * maps).sum(1))
# Grad-CAM++ with the exponential of the score, as in the paper: the derivatives of
# exp(S), where S is linear in the map.
power = torch.exp(score)[:, None, None, None]
first, second, third = (power * gradient**n for n in (1, 2, 3))
divisor = 2 * second + maps.sum((2, 3), keepdim=True) * third
alpha = torch.where(divisor != 0, second / divisor, torch.zeros_like(divisor))
weights = (alpha * F.relu(first)).sum((2, 3), keepdim=True)
plus = F.relu((weights * maps).sum(1))
steps = 400
total = torch.zeros_like(x)
for step in range(steps):
    total += at_input(baseline + (step + 0.5) / steps * (x - baseline))
np.savez(
    sys.argv[2],
    cam=cam.detach().numpy(),
    upsampled=F.interpolate(
        cam[:, None], x.shape[2:], mode="bilinear", align_corners=False
    )[:, 0].detach().numpy(),
    plus=plus.detach().numpy(),
    guided=nhwc(at_input(x, GuidedReLU.apply)),
    integrated=nhwc((x - baseline) * total / steps),
)  # fmt: skip
