"""VGG (Simonyan and Zisserman 2014, "Very deep convolutional networks").

Configurations A, B, D and E of table 1 in torchvision's layout: every convolution has a
bias, also before batch norm.
"""

from collections.abc import Sequence

from convnet.models import layers
from convnet.models.cnn import ConvBase
from convnet.models.layers import Dtype

# name: convolutions in each of the five blocks
DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def vgg(
    name: str,
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = 64,
    pool: str = "max",
    gather: str = "flatten",
    dense: Sequence[int] = (4096, 4096),
    dropout: float = 0.5,
) -> layers.Classifier:
    """One of `DEPTHS`, whose blocks are 1, 2, 4, 8 and 8 times `width` wide.

    Images of 224x224 leave a map of 7x7 for the head, as in the paper. For other sizes
    torchvision resizes the map to 7x7; here the first dense layer fits the map instead.
    """
    base = ConvBase(_widths(width), DEPTHS[name], pool=pool, gather=gather, dtype=dtype)
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))


def vgg_bn(
    name: str,
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = 64,
    pool: str = "max",
    gather: str = "flatten",
    dense: Sequence[int] = (4096, 4096),
    dropout: float = 0.5,
    bn_momentum: float = 0.9,
) -> layers.Classifier:
    """`vgg` with batch norm between each convolution and its ReLU."""
    base = ConvBase(
        _widths(width),
        DEPTHS[name],
        pool=pool,
        gather=gather,
        norm="batch",
        bn_momentum=bn_momentum,
        dtype=dtype,
    )
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))


def _widths(width: int) -> tuple[int, ...]:
    return tuple(times * width for times in (1, 2, 4, 8, 8))
