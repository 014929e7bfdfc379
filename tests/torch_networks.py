"""Networks in PyTorch with the public names of their state dicts, to compare with.

Needs torch and numpy alone. As a script it writes, for each case, random weights, two
inputs and PyTorch's logits for them:

    python tests/torch_networks.py FOLDER '[["vgg16", "timm", 224, {"width": 4}], ...]'

and `names.json`: for each architecture and source the shapes of its state dict at full
width.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

VGG = {"vgg11": "11222", "vgg13": "22222", "vgg16": "22333", "vgg19": "22444"}
RESNET = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
# The names that timm gives to these networks' modules are torchvision's.
SAME_IN_TIMM = ("resnet18", "resnet34", "resnet50", "resnet101", "inception_v3")


class Vgg(nn.Module):
    def __init__(self, name, k=1000, width=64, dense=4096, timm=False):
        super().__init__()
        name, _, norm = name.partition("_")
        layers, c = [], 3
        for times, depth in zip((1, 2, 4, 8, 8), VGG[name], strict=True):
            for _ in range(int(depth)):
                layers.append(nn.Conv2d(c, times * width, 3, padding=1))
                c = times * width
                layers += [nn.BatchNorm2d(c)] if norm else []
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.timm = timm
        if timm:
            fc1, fc2 = nn.Conv2d(c, dense, 7), nn.Conv2d(dense, dense, 1)
            self.pre_logits = nn.ModuleDict({"fc1": fc1, "fc2": fc2})
            self.head = nn.ModuleDict({"fc": nn.Linear(dense, k)})
        else:
            drop = nn.Dropout()
            first, second = nn.Linear(49 * c, dense), nn.Linear(dense, dense)
            parts = (first, nn.ReLU(), drop, second, nn.ReLU(), drop)
            self.classifier = nn.Sequential(*parts, nn.Linear(dense, k))

    def forward(self, x):
        x = self.features(x)
        if not self.timm:
            return self.classifier(F.adaptive_avg_pool2d(x, 7).flatten(1))
        x = self.pre_logits["fc2"](self.pre_logits["fc1"](x).relu()).relu()
        return self.head["fc"](x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, c, width, stride, bottleneck):
        super().__init__()
        out = 4 * width if bottleneck else width
        plan = [(c, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            plan = [(c, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        for i, (a, b, kernel, step) in enumerate(plan, 1):
            conv = nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.depth, self.downsample = len(plan), None
        if stride > 1 or c != out:
            conv = nn.Conv2d(c, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.depth else y
        return (y + (self.downsample(x) if self.downsample else x)).relu()


class ResNet(nn.Module):
    def __init__(self, name, k=1000, width=64):
        super().__init__()
        stages, bottleneck = RESNET[name]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c = width
        for s, blocks in enumerate(stages):
            layer = []
            for b in range(blocks):
                stride = 2 if s > 0 and b == 0 else 1
                layer.append(Residual(c, width * 2**s, stride, bottleneck))
                c = width * 2**s * (4 if bottleneck else 1)
            setattr(self, f"layer{s + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(c, k)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class Fire(nn.Module):
    def __init__(self, c, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(c, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNet(nn.Module):
    def __init__(self, k=1000, width=64):
        super().__init__()
        u = width // 4
        layers, c = [nn.Conv2d(3, width, 3, 2), nn.ReLU()], width
        for stage in ((1, 1), (2, 2), (3, 3, 4, 4)):
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for n in stage:
                layers.append(Fire(c, n * u, 4 * n * u))
                c = 8 * n * u
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(c, k, 1), nn.ReLU())

    def forward(self, x):
        return self.classifier(self.features(x)).mean((2, 3))


def conv_bn(c, out, kernel=1, stride=1, groups=1):
    pad = kernel // 2
    conv = nn.Conv2d(c, out, kernel, stride, pad, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out)


class Inverted(nn.Module):
    def __init__(self, c, out, stride, expand, timm):
        super().__init__()
        wide, names = c * expand, ("conv_pw", "conv_dw", "conv_pwl")
        plan = [conv_bn(c, wide), conv_bn(wide, wide, 3, stride, wide)]
        plan.append(conv_bn(wide, out))
        if expand == 1:
            plan, names = plan[1:], ("conv_dw", "conv_pw")
        self.order = plan
        self.residual = stride == 1 and c == out
        if timm:
            for i, (conv, norm) in enumerate(plan, 1):
                setattr(self, names[i - 1], conv)
                setattr(self, f"bn{i}", norm)
        else:
            parts = [nn.Sequential(*pair, nn.ReLU6()) for pair in plan[:-1]]
            self.conv = nn.Sequential(*parts, *plan[-1])

    def forward(self, x):
        y = x
        for i, (conv, norm) in enumerate(self.order, 1):
            y = norm(conv(y))
            y = F.relu6(y) if i < len(self.order) else y
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    def __init__(self, k=1000, width=32, timm=False):
        super().__init__()

        def scaled(c):
            c = c * width / 32
            near = max(8, int(c + 4) // 8 * 8)
            return near + 8 if near < 0.9 * c else near

        plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
        plan += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        c = scaled(32)
        first, stages = conv_bn(3, c, 3, 2), []
        for expand, out, blocks, stride in plan:
            stage = []
            for b in range(blocks):
                step = stride if b == 0 else 1
                stage.append(Inverted(c, scaled(out), step, expand, timm))
                c = scaled(out)
            stages.append(nn.Sequential(*stage))
        wide = scaled(1280 * max(1.0, 32 / width))
        last = conv_bn(c, wide)
        self.timm = timm
        if timm:
            self.conv_stem, self.bn1 = first
            self.blocks = nn.Sequential(*stages)
            self.conv_head, self.bn2 = last
            self.classifier = nn.Linear(wide, k)
        else:
            blocks = [block for stage in stages for block in stage]
            first = nn.Sequential(*first, nn.ReLU6())
            last = nn.Sequential(*last, nn.ReLU6())
            self.features = nn.Sequential(first, *blocks, last)
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(wide, k))

    def forward(self, x):
        if not self.timm:
            return self.classifier(self.features(x).mean((2, 3)))
        x = self.blocks(F.relu6(self.bn1(self.conv_stem(x))))
        x = F.relu6(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((2, 3)))


class Basic(nn.Module):
    def __init__(self, c, out, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Mixed(nn.Module):
    """`plan`: for each branch the names, widths, kernels of its convolutions; "a" and
    "b" at the end of a name are side by side. `pool`: width of the pool's convolution,
    0 for a reduction, whose last convolutions and pool stride."""

    def __init__(self, c, plan, pool):
        super().__init__()
        self.branches, self.reduces, self.out = [], not pool, 0
        for branch in plan:
            names, inner = [], c
            for n, (name, width, kernel) in enumerate(branch):
                kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
                stride = 2 if self.reduces and n == len(branch) - 1 else 1
                pad = (0, 0) if stride == 2 else tuple(k // 2 for k in kernel)
                conv = Basic(inner, width, kernel, stride, pad)
                setattr(self, f"branch{name}", conv)
                names.append(f"branch{name}")
                if not name.endswith("a"):
                    inner = width
            self.branches.append(names)
            self.out += inner + (inner if names[-1].endswith("b") else 0)
        if pool:
            self.branch_pool = Basic(c, pool)
        self.out += pool or c

    def forward(self, x):
        outs = []
        for names in self.branches:
            y = [x]
            for name in names:
                y.append(getattr(self, name)(y[-2 if name.endswith("b") else -1]))
            both = names[-1].endswith("b")
            outs += y[-2:] if both else y[-1:]
        if self.reduces:
            outs.append(F.max_pool2d(x, 3, 2))
        else:
            outs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1)))
        return torch.cat(outs, 1)


class Auxiliary(nn.Module):
    def __init__(self, c, a, b, k):
        super().__init__()
        self.conv0, self.conv1 = Basic(c, a), Basic(a, b, 5)
        self.fc = nn.Linear(b, k)

    def forward(self, x):
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, 3)))
        return self.fc(x.mean((2, 3)))


class InceptionV3(nn.Module):
    def __init__(self, k=1000, width=32, aux=False):
        super().__init__()

        def w(c):
            return c * width // 32

        stem = (("1a_3x3", 3, 32, 3, 2, 0), ("2a_3x3", 32, 32, 3, 1, 0))
        stem += (("2b_3x3", 32, 64, 3, 1, 1), ("3b_1x1", 64, 80, 1, 1, 0))
        stem += (("4a_3x3", 80, 192, 3, 1, 0),)
        for name, c, out, *rest in stem:
            setattr(self, f"Conv2d_{name}", Basic(c if c == 3 else w(c), w(out), *rest))
        row, column = (1, 7), (7, 1)

        def windows(pool):
            return [
                [("1x1", w(64), 1)],
                [("5x5_1", w(48), 1), ("5x5_2", w(64), 5)],
                [(f"3x3dbl_{i}", w(c), s) for i, c, s in ((1, 64, 1), (2, 96, 3))]
                + [("3x3dbl_3", w(96), 3)],
            ], w(pool)

        def lines(c):
            seven = [("7x7_1", c, 1), ("7x7_2", c, row), ("7x7_3", 192, column)]
            double = zip((1, column, row, column), (c,) * 4, strict=True)
            double = [(f"7x7dbl_{i}", n, s) for i, (s, n) in enumerate(double, 1)]
            plan = [[("1x1", 192, 1)], seven, [*double, ("7x7dbl_5", 192, row)]]
            return [[(n, w(c), s) for n, c, s in branch] for branch in plan], w(192)

        def reduced():
            double = [(f"3x3dbl_{i}", w(c), s) for i, c, s in ((1, 64, 1), (2, 96, 3))]
            return [[("3x3", w(384), 3)], [*double, ("3x3dbl_3", w(96), 3)]], 0

        def reduced_again():
            seven = [("7x7x3_1", 1), ("7x7x3_2", row), ("7x7x3_3", column)]
            seven = [(name, w(192), s) for name, s in (*seven, ("7x7x3_4", 3))]
            return [[("3x3_1", w(192), 1), ("3x3_2", w(320), 3)], seven], 0

        def wide():
            a, b = (1, 3), (3, 1)
            three = [("3x3_1", w(384), 1), ("3x3_2a", w(384), a), ("3x3_2b", w(384), b)]
            double = [("3x3dbl_1", w(448), 1), ("3x3dbl_2", w(384), 3)]
            double += [("3x3dbl_3a", w(384), a), ("3x3dbl_3b", w(384), b)]
            return [[("1x1", w(320), 1)], three, double], w(192)

        blocks = {"5b": windows(32), "5c": windows(64), "5d": windows(64)}
        blocks |= {"6a": reduced(), "6b": lines(128), "6c": lines(160)}
        blocks |= {"6d": lines(160), "6e": lines(192), "7a": reduced_again()}
        blocks |= {"7b": wide(), "7c": wide()}
        c = w(192)
        for name, (plan, pool) in blocks.items():
            block = Mixed(c, plan, pool)
            setattr(self, f"Mixed_{name}", block)
            c = block.out
            if name == "6e" and aux:
                self.AuxLogits = Auxiliary(c, w(128), w(768), k)
        self.names = [f"Mixed_{name}" for name in blocks]
        self.fc = nn.Linear(c, k)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x, self.aux = F.max_pool2d(x, 3, 2), None
        for name in self.names:
            x = getattr(self, name)(x)
            if name == "Mixed_6e" and hasattr(self, "AuxLogits") and x.shape[-1] > 16:
                self.aux = self.AuxLogits(x)
        return self.fc(x.mean((2, 3)))


class NormOfChannels(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, c, timm):
        super().__init__()
        conv = nn.Conv2d(c, c, 7, padding=3, groups=c)
        norm = nn.LayerNorm(c, eps=1e-6)
        dense = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.order = (conv, norm, *dense)
        if timm:
            self.conv_dw, self.norm = conv, norm
            self.mlp = nn.ModuleDict({"fc1": dense[0], "fc2": dense[1]})
            self.gamma = nn.Parameter(torch.ones(c))
        else:
            parts = (conv, nn.Identity(), norm, dense[0], nn.GELU(), dense[1])
            self.block = nn.Sequential(*parts)
            self.layer_scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        conv, norm, expand, project = self.order
        y = project(F.gelu(expand(norm(conv(x).permute(0, 2, 3, 1)))))
        scale = self.gamma if hasattr(self, "gamma") else self.layer_scale
        return x + scale.reshape(1, -1, 1, 1) * y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, k=1000, width=96, timm=False):
        super().__init__()

        def norm(c):
            return NormOfChannels(c, eps=1e-6)

        stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), norm(width))
        downs, stages, c = [nn.Identity()], [], width
        for i, blocks in enumerate((3, 3, 9, 3)):
            if i:
                downs.append(nn.Sequential(norm(c), nn.Conv2d(c, 2 * c, 2, 2)))
                c *= 2
            stages.append(
                nn.Sequential(*(ConvNeXtBlock(c, timm) for _ in range(blocks)))
            )
        self.timm = timm
        if timm:
            self.stem = stem
            pairs = zip(downs, stages, strict=True)
            pairs = ({"downsample": d, "blocks": s} for d, s in pairs)
            self.stages = nn.ModuleList(nn.ModuleDict(pair) for pair in pairs)
            self.head = nn.ModuleDict({"norm": norm(c), "fc": nn.Linear(c, k)})
        else:
            pairs = zip(downs[1:], stages[1:], strict=True)
            rest = [module for pair in pairs for module in pair]
            self.features = nn.Sequential(stem, stages[0], *rest)
            self.classifier = nn.Sequential(norm(c), nn.Flatten(), nn.Linear(c, k))

    def forward(self, x):
        if not self.timm:
            x = self.features(x)
            return self.classifier(x.mean((2, 3), keepdim=True))
        x = self.stem(x)
        for stage in self.stages:
            x = stage["blocks"](stage["downsample"](x))
        x = self.head["norm"](x.mean((2, 3), keepdim=True))
        return self.head["fc"](x.flatten(1))


def build(name, source="torchvision", **options):
    """The network as `source` names its modules."""
    timm = {"timm": source == "timm"}
    if name.startswith("vgg"):
        return Vgg(name, **options, **timm)
    if name.startswith("resnet"):
        return ResNet(name, **options)
    if name == "squeezenet1_1":
        return SqueezeNet(**options)
    if name == "mobilenet_v2":
        return MobileNetV2(**options, **timm)
    if name == "inception_v3":
        return InceptionV3(**options)
    return ConvNeXt(**options, **timm)


def randomize(network, seed=0):
    """Draws all weights and statistics; the signal keeps about its size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1 and value.shape[1:] != (1, 1):
                noise *= (2 / value[0].numel()) ** 0.5
            elif name.endswith("running_var"):
                noise = 1 + 0.3 * noise.abs()
            elif name.endswith(("weight", "scale", "gamma")):
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.2
            value.copy_(noise)
    return network.eval()


def run(name, source, side, options):
    """Weights, inputs (b, h, w, c) and logits, as arrays by their names."""
    network = randomize(build(name, source, **options))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = network(x).numpy()
    arrays = {n: v.numpy() for n, v in network.state_dict().items()}
    about = {"": x.permute(0, 2, 3, 1).numpy(), "logits": logits}
    if getattr(network, "aux", None) is not None:
        about["aux"] = network.aux.numpy()
    return arrays | {f"_{n or 'inputs'}": np.asarray(v) for n, v in about.items()}


def names():
    """The shapes of each state dict at full width, nothing allocated."""
    table = {}
    archs = [f"{name}{norm}" for name in VGG for norm in ("", "_bn")]
    archs += [*RESNET, "squeezenet1_1", "mobilenet_v2", "inception_v3", "convnext_tiny"]
    for arch in archs:
        for source in ("torchvision", "timm"):
            with torch.device("meta"):
                state = build(arch, source).state_dict()
            table[f"{arch} {source}"] = {n: list(v.shape) for n, v in state.items()}
    return table


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for i, case in enumerate(cases):
        np.savez(folder / f"{i}.npz", **run(*case))
    (folder / "names.json").write_text(json.dumps(names()))
