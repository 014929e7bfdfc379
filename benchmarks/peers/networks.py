"""The networks of `convnet.models`, layer for layer, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional

_VGG16 = (2, 2, 3, 3, 3)
_RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
_WIDTHS = (64, 256, 256)  # of speednet's groups


class SpeedNorm(nn.BatchNorm2d):
    """Batch norm that keeps 0.6 of the old statistics, with a bias and no scale."""

    def __init__(self, features: int) -> None:
        super().__init__(features, eps=1e-12, momentum=0.4)
        # Ones that are not trained: without a weight cuDNN's kernel is not used.
        self.weight.requires_grad = False


class SpeedNet(nn.Module):
    """airbench's network: whitening, three groups, a head without bias.

    After Jordan 2024, arXiv:2404.00498; the whitening kernel is not trained.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(24, 3, 2, 2))
        self.bias = nn.Parameter(torch.zeros(24))
        layers: list[nn.Module] = []
        channels = 24
        for width in _WIDTHS:
            layers += [_conv(channels, width), nn.MaxPool2d(2), SpeedNorm(width)]
            layers += [_gelu(), _conv(width, width), SpeedNorm(width), _gelu()]
            channels = width
        self.groups = nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten())
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, x: torch.Tensor, train_bias: bool = True) -> torch.Tensor:
        bias = self.bias if train_bias else self.bias.detach()
        kernel = self.kernel.to(x.dtype)
        x = functional.conv2d(x, kernel, bias.to(x.dtype))
        x = self.groups(functional.gelu(x, approximate="tanh"))
        return self.head(x) / x.shape[1]


def _conv(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


def _gelu() -> nn.GELU:
    return nn.GELU(approximate="tanh")


class Residual(nn.Module):
    """A block of torchvision's ResNet: two 3x3 convolutions, or 1x1, 3x3, 1x1."""

    def __init__(self, channels: int, width: int, stride: int, deep: bool) -> None:
        super().__init__()
        plan = [(width, 3, stride), (width, 3, 1)]  # features, kernel, stride
        if deep:
            plan = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        layers: list[nn.Module] = []
        last = channels
        for features, kernel, step in plan:
            layers.append(
                nn.Conv2d(last, features, kernel, step, kernel // 2, bias=False)
            )
            layers += [nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
            last = features
        self.branch = nn.Sequential(*layers[:-1])
        nn.init.zeros_(layers[-2].weight)
        self.shortcut = nn.Identity()
        if stride > 1 or channels != last:
            conv = nn.Conv2d(channels, last, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.branch(x) + self.shortcut(x))


def _resnet(name: str, width: int) -> nn.Module:
    stages, deep = _RESNETS[name]
    layers: list[nn.Module] = [_conv(3, width), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for i, blocks in enumerate(stages):
        features = width * 2**i
        for block in range(blocks):
            stride = 2 if i and not block else 1
            layers.append(Residual(channels, features, stride, deep))
            channels = 4 * features if deep else features
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers, *head)


def _vgg16(width: int, size: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for times, depth in zip((1, 2, 4, 8, 8), _VGG16, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, times * width, 3, padding=1), nn.ReLU()]
            channels = times * width
        layers.append(nn.MaxPool2d(2))
    features = channels * (size // 32) ** 2
    head: list[nn.Module] = [nn.Flatten()]
    for _ in range(2):
        head += [nn.Linear(features, 4096), nn.ReLU(), nn.Dropout(0.5)]
        features = 4096
    network = nn.Sequential(*layers, *head, nn.Linear(features, 10))
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def create(name: str, width: int, size: int) -> nn.Module:
    """Makes a network of `convnet.models` with 10 outputs.

    `width` is the features of the first stage (speednet's are fixed), `size` the side
    of the images.
    """
    if name == "speednet":
        return SpeedNet()
    return _vgg16(width, size) if name == "vgg16" else _resnet(name, width)


def parameters(network: nn.Module) -> int:
    """Returns how many numbers are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
