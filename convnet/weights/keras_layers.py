"""The layers of keras.applications, in Keras's order, and where each is with us."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

# The variables of each kind of layer, in Keras's order and by our names.
FIELDS = {
    "conv": ("kernel", "bias"),
    "conv without bias": ("kernel",),
    "depthwise": ("kernel",),
    "norm": ("scale", "bias", "mean", "var"),
    "norm without scale": ("bias", "mean", "var"),
    "layer_norm": ("scale", "bias"),
    "dense": ("kernel", "bias"),
    "layer_scale": ("scale",),
}
CLASSES = {
    "conv": "conv2d",
    "conv without bias": "conv2d",
    "depthwise": "depthwise_conv2d",
    "norm": "batch_normalization",
    "norm without scale": "batch_normalization",
    "layer_norm": "layer_normalization",
    "dense": "dense",
    "layer_scale": "layer_scale",
}


class Layer(NamedTuple):
    """A layer of Keras's.

    Attributes:
      name: its name in Keras.
      kind: a key of `FIELDS`.
      ours: the path of the same layer with us.
    """

    name: str
    kind: str
    ours: str


# A tuple is a Sequential model within the model.
Plan = list[Layer | tuple[Layer, ...]]


def layers(plan: Plan) -> Iterator[Layer]:
    """Yields all layers, those within others too."""
    for item in plan:
        yield from [item] if isinstance(item, Layer) else item


def _vgg(blocks: tuple[int, ...]) -> Plan:
    plan: Plan = [
        Layer(f"block{i}_conv{j}", "conv", f"base/block{i}/conv{j}")
        for i, depth in enumerate(blocks, 1)
        for j in range(1, depth + 1)
    ]
    heads = {"fc1": "dense1", "fc2": "dense2", "predictions": "logits"}
    return plan + [Layer(name, "dense", f"head/{ours}") for name, ours in heads.items()]


def _resnet(stages: tuple[int, ...]) -> Plan:
    plan: Plan = [
        Layer("conv1_conv", "conv", "base/stem/conv"),
        Layer("conv1_bn", "norm", "base/stem/norm"),
    ]
    for i, blocks in enumerate(stages, 1):
        for j in range(1, blocks + 1):
            # Keras orders layers by how far they are from the output: the shortcut
            # comes beside the last convolution.
            for n in (1, 2, 0, 3) if j == 1 else (1, 2, 3):
                theirs, ours = f"conv{i + 1}_block{j}_{n}", f"base/stage{i}/block{j}"
                conv, norm = f"conv{n}", f"norm{n}"
                if n == 0:
                    conv, norm = "shortcut_conv", "shortcut_norm"
                plan.append(Layer(f"{theirs}_conv", "conv", f"{ours}/{conv}"))
                plan.append(Layer(f"{theirs}_bn", "norm", f"{ours}/{norm}"))
    return [*plan, Layer("predictions", "dense", "head/logits")]


# For each convolution of each branch, how many steps it is from the block's end; that
# of 1x3 and 3x1, side by side, has one step more, which is shorter.
_A = ((0,), (1, 0), (2, 1, 0), (0,))
_B = ((0,), (2, 1, 0))
_C = ((0,), (2, 1, 0), (4, 3, 2, 1, 0), (0,))
_D = ((1, 0), (3, 2, 1, 0))
_E = ((0,), (1.3, 0.3, 0.3), (2.3, 1.3, 0.3, 0.3), (0,))


def _inception() -> Plan:
    # Convolutions have no names of their own, and are numbered as they are made; but in
    # the model, layers are ordered by how far they are from the output.
    ordered = [f"base/stem/{{}}{n}" for n in range(1, 6)]
    numbers = {path: n for n, path in enumerate(ordered)}
    for i, block in enumerate((_A,) * 3 + (_B,) + (_C,) * 4 + (_D,) + (_E,) * 2, 1):
        steps = {
            f"base/mixed{i}/branch{b}/{{}}{n}": far
            for b, branch in enumerate(block, 1)
            for n, far in enumerate(branch, 1)
        }
        numbers |= {path: len(numbers) + n for n, path in enumerate(steps)}
        ordered += sorted(steps, key=lambda path: -steps[path])
    plan: Plan = []
    for path in ordered:
        end = f"_{numbers[path]}" if numbers[path] else ""
        plan.append(Layer(f"conv2d{end}", "conv without bias", path.format("conv")))
        norm = path.format("norm")
        plan.append(Layer(f"batch_normalization{end}", "norm without scale", norm))
    return [*plan, Layer("predictions", "dense", "head/logits")]


def _mobilenet() -> Plan:
    plan: Plan = [
        Layer("Conv1", "conv without bias", "base/stem/conv"),
        Layer("bn_Conv1", "norm", "base/stem/norm"),
    ]
    number = 0
    for i, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
        for j in range(1, blocks + 1):
            start = f"block_{number}_" if number else "expanded_conv_"
            parts = ["expand", "depthwise", "project"][0 if number else 1 :]
            for n, part in enumerate(parts, 1):
                kind = "depthwise" if part == "depthwise" else "conv without bias"
                ours = f"base/stage{i}/block{j}"
                plan.append(Layer(start + part, kind, f"{ours}/conv{n}"))
                plan.append(Layer(f"{start}{part}_BN", "norm", f"{ours}/norm{n}"))
            number += 1
    return [
        *plan,
        Layer("Conv_1", "conv without bias", "base/stage8/conv"),
        Layer("Conv_1_bn", "norm", "base/stage8/norm"),
        Layer("predictions", "dense", "head/logits"),
    ]


def _convnext(name: str, stages: tuple[int, ...]) -> Plan:
    plan: Plan = []
    for i, blocks in enumerate(stages):
        if i == 0:
            conv = Layer(f"{name}_stem_conv", "conv", "base/stem/conv")
            norm = Layer(f"{name}_stem_layernorm", "layer_norm", "base/stem/norm")
            plan.append((conv, norm))
        else:
            theirs, ours = f"{name}_downsampling", f"base/downsample{i + 1}"
            conv = Layer(f"{theirs}_conv_{i - 1}", "conv", f"{ours}/conv")
            norm = f"{theirs}_layernorm_{i - 1}"
            plan.append((Layer(norm, "layer_norm", f"{ours}/pre_norm"), conv))
        for j in range(blocks):
            theirs = f"{name}_stage_{i}_block_{j}"
            ours = f"base/stage{i + 1}/block{j + 1}"
            plan += [
                Layer(f"{theirs}_depthwise_conv", "conv", f"{ours}/conv"),
                Layer(f"{theirs}_layernorm", "layer_norm", f"{ours}/norm"),
                Layer(f"{theirs}_pointwise_conv_1", "dense", f"{ours}/expand"),
                Layer(f"{theirs}_pointwise_conv_2", "dense", f"{ours}/project"),
                Layer(f"{theirs}_layer_scale", "layer_scale", f"{ours}/layer_scale"),
            ]
    return [
        *plan,
        Layer(f"{name}_head_layernorm", "layer_norm", "base/norm"),
        Layer(f"{name}_head_dense", "dense", "head/logits"),
    ]


# By our names.
PLANS: dict[str, Callable[[], Plan]] = {
    "vgg16": lambda: _vgg((2, 2, 3, 3, 3)),
    "vgg19": lambda: _vgg((2, 2, 4, 4, 4)),
    "resnet50": lambda: _resnet((3, 4, 6, 3)),
    "resnet101": lambda: _resnet((3, 4, 23, 3)),
    "inception_v3": _inception,
    "mobilenet_v2": _mobilenet,
    "convnext_tiny": lambda: _convnext("convnext_tiny", (3, 3, 9, 3)),
}
# The names of the same networks in keras.applications.
APPLICATIONS = {
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "resnet50": "ResNet50",
    "resnet101": "ResNet101",
    "inception_v3": "InceptionV3",
    "mobilenet_v2": "MobileNetV2",
    "convnext_tiny": "ConvNeXtTiny",
}
