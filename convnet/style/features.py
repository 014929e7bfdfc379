"""A network's taps as features of a picture of any size, and which of them to take."""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnet import models
from convnet import step as step_lib
from convnet.bundle import Bundle
from convnet.errors import ConvnetError, UsageError
from convnet.models.intermediates import network_order

# A side at which every network that we have works, and every stride shows.
_REFERENCE = 256
_ACTIVATIONS = re.compile(r"(relu|relu6|gelu|silu|swish|hard_?swish|elu|celu)\d*")
# In Gatys et al. five layers describe the style.
_MOST_STYLE_TAPS = 5


# Compared and hashed by identity, as `jit` wants it of a function.
@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The convolutional base of a model, whose taps are maps `(h', w', c)`.

    Attributes:
      base: the base alone, without the head.
      variables: the base's variables.
      mean, std: of the model's preprocessing, one number or one a channel.
      names: of the taps that are wanted.
    """

    base: nn.Module
    variables: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()

    def __call__(self, variables: Any, picture: jax.Array) -> dict[str, jax.Array]:
        """Returns the maps of a picture; `of_batch` without the batch."""
        maps = self.of_batch(variables, picture[None])
        return {name: array[0] for name, array in maps.items()}

    def of_batch(self, variables: Any, pictures: jax.Array) -> dict[str, jax.Array]:
        """Returns the maps (b, h', w', c) of `names`, float32; pure.

        The variables are an argument, so that they are not constants of what is
        compiled. What lies behind the deepest tap is not computed: under `jit` XLA
        removes it.

        Args:
          variables: those of the base.
          pictures: (b, h, w, 3), or (b, h, w, 1) for grey ones; floats, 0 to 1.
        """
        rgb = jnp.broadcast_to(pictures, (*pictures.shape[:3], 3))
        inputs = step_lib.normalize(rgb, self.mean, self.std)
        _, state = self.base.apply(variables, inputs, train=False, mutable=["taps"])
        taps = models.taps({"base": state["taps"]})
        wanted = self.names or tuple(name for name in taps if taps[name].ndim == 4)
        return {name: taps[name].astype(jnp.float32) for name in wanted}

    def only(self, *names: Sequence[str]) -> "Features":
        """Returns the same with these taps, given in one or several groups."""
        wanted = tuple(dict.fromkeys(itertools.chain(*names)))
        return dataclasses.replace(self, names=wanted)

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Returns the shapes (h', w', c) of the maps of a picture, in network order.

        Raises:
          UsageError: the picture is too small for the network.
        """
        picture = jax.ShapeDtypeStruct((height, width, 3), jnp.float32)
        try:
            maps = jax.eval_shape(self, self.variables, picture)
        except ValueError as error:
            raise UsageError(
                f"a picture of {width}x{height} is too small for the network: {error};"
                " take a larger one (--size, fewer --levels; of an experiment"
                " data.image_size, task.style_size)"
            ) from error
        order = sorted(maps, key=lambda name: network_order(name.split("/")))
        return {name: maps[name].shape for name in order}

    def strides(self) -> dict[str, int]:
        """Returns how many pixels apart the places of each map are, powers of two."""
        shapes = self.shapes(_REFERENCE, _REFERENCE)
        return {name: 2 ** _octave(shape) for name, shape in shapes.items()}


def create(
    bundle: Bundle, pool: str = "", dtype: str = "float32", origin: str = "--model"
) -> Features:
    """Makes features of a model.

    Args:
      bundle: any classifier of RGB images.
      pool: another kind of pool than the network was trained with, where it has the
        option: with "average" pictures get smoother (Gatys et al. 2016). "" keeps it.
      dtype: what the network computes in.
      origin: the flag or key that named the model.

    Raises:
      UsageError: the model takes no RGB images, has no such option, or paints itself.
    """
    if bundle.task["name"] == "style":
        raise UsageError(
            f"{origin}: it is a style network, which paints by itself, without"
            " another picture's style; want one that recognises things"
        )
    shape = tuple(bundle.preprocessing["input_shape"])
    if (
        len(shape) != 3
        or shape[-1] != 3
        or bundle.preprocessing["input_dtype"] != "uint8"
    ):
        raise UsageError(
            f"{origin}: it takes {bundle.preprocessing['input_dtype']} inputs of shape"
            f" {list(shape)}; style transfer needs a network for RGB images"
        )
    about = bundle.architecture
    options = dict(about["options"])
    if pool:
        if "pool" not in models.options(about["name"]):
            raise UsageError(f"--pool={pool}: {about['name']} has no choice of pools")
        options["pool"] = pool
    model = models.create(
        about["name"], num_outputs=about["num_outputs"], dtype=dtype, **options
    )
    variables = {
        collection: leaves["base"]
        for collection, leaves in bundle.variables.items()
        if "base" in leaves
    }
    mean, std = (tuple(bundle.preprocessing[name]) for name in ("mean", "std"))
    return Features(model.base, jax.device_put(variables), mean, std)


def choose(
    features: Features,
    content: str = "",
    style: str = "",
    prefix: str = "--",
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the taps for content and style: those named, or a choice of ours.

    Ours is that of Gatys et al. 2016, in words that fit any network: for the style the
    first activation at each resolution, up to five; for the content the second
    activation of the last resolution but one. For a VGG these are relu1_1 to relu5_1
    and relu4_2.

    Args:
      features: of the network.
      content: names, with commas; "" for ours.
      style: likewise.
      prefix: of content_layers and style_layers, the flags or keys that gave them.

    Raises:
      UsageError: an unknown tap, or one that is no map; names the nearest.
      ConvnetError: the network has no activations to choose from.
    """
    shapes = features.shapes(_REFERENCE, _REFERENCE)
    given = []
    for key, text in (("content_layers", content), ("style_layers", style)):
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        for name in names:
            if name not in shapes:
                near = _near(name, shapes)
                raise UsageError(f"{prefix}{key}: no layer {name!r}; {near}")
        given.append(names)
    if all(given):
        return tuple(given)
    octaves: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        if _ACTIVATIONS.fullmatch(name.rsplit("/", 1)[-1]):
            octaves.setdefault(_octave(shape), []).append(name)
    if not octaves:
        raise ConvnetError(
            "the network's layers have no names of activations: choose among"
            f" {', '.join(shapes)} with {prefix}content_layers and {prefix}style_layers"
        )
    levels = [octaves[octave] for octave in sorted(octaves)][:_MOST_STYLE_TAPS]
    middle = levels[-2] if len(levels) > 1 else levels[-1]
    ours = (middle[min(1, len(middle) - 1)],), tuple(level[0] for level in levels)
    return given[0] or ours[0], given[1] or ours[1]


def _octave(shape: Sequence[int]) -> int:
    """How often the sides of `_REFERENCE` are halved; unpadded borders do not count."""
    return max(0, round(math.log2(_REFERENCE / max(shape[:2]))))


def _near(name: str, shapes: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, shapes, 4, 0.5)
    near += [known for known in shapes if name in known and known not in near][:4]
    if near:
        return f"the nearest are {', '.join(near[:6])}"
    return f"it has {', '.join(shapes)}"
