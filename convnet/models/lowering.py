"""Forms of an operation that a backend runs faster than the plain one.

Each has the values and the gradients of the plain form, up to rounding; the tests
compare them. `plain()` switches them all off.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from convnet.models import kernel_gradient, parts, small_maps, winograd
from convnet.models.kernel_gradient import Pads

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# The least channels and features for tiles in float32, by the library that XLA calls;
# and for the kernel gradient alone, where that is oneDNN. Measured on an Intel Xeon.
_TILED = {"oneDNN": 256, "Eigen": 128}
_TILED_GRADIENT = 64
_PLAIN = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """What is traced within has the plain form of every operation.

    For exports and for comparisons with other implementations. A function that `jit`
    has already traced stays as it is.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether this is traced within `plain()`."""
    return _PLAIN.get()


def on(*backends: str) -> bool:
    """Whether the forms for one of these ("cpu", "gpu", "tpu") are wanted."""
    return jax.default_backend() in backends and not is_plain()


def convolve2d(
    x: jax.Array, kernel: jax.Array, stride: Sequence[int], pads: Sequence
) -> jax.Array:
    """Cross-correlates `x` (b, h, w, c) with `kernel` (kh, kw, c, features)."""
    stride, pads = tuple(stride), tuple(tuple(pair) for pair in pads)
    if on("gpu"):
        return _hold_gradient(_plain(x, kernel, stride, pads))
    if not on("cpu"):
        return _plain(x, kernel, stride, pads)
    sizes, window = x.shape[1:3], kernel.shape[:2]
    missing = [max(k - n, 0) for n, k in zip(sizes, window, strict=True)]
    shape = _shape(x, kernel, stride, pads)
    # The matrix is at most twice as large as the kernel.
    few = math.prod(sizes) * math.prod(shape) <= 2 * math.prod(window)
    if any(missing) and few and min(shape) > 0:
        return small_maps.convolve(x, kernel, stride, pads, shape)
    # From JAX 0.12 on convolutions on a CPU are oneDNN's.
    library = "Eigen" if jax.__version_info__ < (0, 12) else "oneDNN"
    if stride == (1, 1) and _tiles_pay(x, kernel, shape, _TILED[library]):
        # Transformed apart from the convolution: `Ahead` does it once.
        return _tiled(x, winograd.transform(kernel), pads)
    if library == "Eigen":
        return _plain(x, kernel, stride, pads)
    if any(missing):
        return _smaller(x, kernel, stride, pads, missing, shape)
    if stride == (1, 1):
        return _own_gradient(x, kernel, pads)
    if window == (1, 1) and not any(map(any, pads)):
        return _own_gradient(x[:, :: stride[0], :: stride[1]], kernel, pads)
    return _strided(x, kernel, stride, pads)


def _smaller(
    x: jax.Array,
    kernel: jax.Array,
    stride: tuple[int, ...],
    pads: Pads,
    missing: list[int],
    shape: list[int],
) -> jax.Array:
    """`convolve2d`, for maps that are smaller than the kernel.

    For those oneDNN has only its reference code, 50 times slower: they get zeros at
    their ends, and what the zeros add to the output is cut off.
    """
    # The barriers keep XLA from folding the zeros into the convolution's own padding,
    # here and, transposed, in the gradient.
    hold = lax.optimization_barrier
    x = hold(jnp.pad(x, [(0, 0), *((0, m) for m in missing), (0, 0)]))
    y = hold(convolve2d(x, kernel, stride, pads))
    return y[:, : shape[0], : shape[1]]


def _shape(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> list[int]:
    """The rows and columns of the output."""
    return [
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(x.shape[1:], pads, kernel.shape, stride, strict=False)
    ]


def _plain(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=_LAYOUT)


@jax.custom_vjp
def _hold_gradient(y: jax.Array) -> jax.Array:
    """`y`, whose gradient is computed once, as it is, before any use.

    The gradient of a pool that drops a row ends in zeros. XLA takes these into the
    padding of the convolutions behind it, which cuDNN then computes on larger maps
    (32x32 in place of 31x31, 8x8 of 7x7) and cuts, and writes the gradient twice.
    """
    return y


_hold_gradient.defvjp(
    lambda y: (y, None), lambda _, gradient: (lax.optimization_barrier(gradient),)
)


def _tiles_pay(
    x: jax.Array, kernel: jax.Array, shape: Sequence[int], least: int
) -> bool:
    """Whether a convolution with stride 1, or its gradient, is faster by tiles.

    Not in bfloat16: its products cost little beside copies, and the components would be
    rounded.
    """
    places, tiles = math.prod(shape), math.prod(-(-n // 2) for n in shape)
    return (
        kernel.shape[:2] == (3, 3)
        and x.dtype == kernel.dtype == jnp.float32
        and min(kernel.shape[2:]) >= least
        and min(shape) > 0
        # Of fewer places most of the time goes into the kernel, of which there are 16/9
        # as much: for 4 maps of 4x4 it took 1.5 to 2 times as long.
        and len(x) * places >= 256
        # Tiles reach over the ends of odd maps: too far for 3x3, where a gradient took
        # 1.05 to 1.2 times as long, and for single rows.
        and 16 * tiles <= 0.75 * 9 * places
        # A part is one example or more: of 26 MB it was 1.3 times as fast. Larger ones
        # take the more memory, and were not tried.
        and winograd.size(*kernel.shape[2:], shape) <= 4 * parts.PART
    )


def _turned_pads(window: Sequence[int], pads: Pads) -> Pads:
    """The pads with which the gradient is convolved with the turned kernel."""
    return tuple(
        (k - 1 - low, k - 1 - high) for k, (low, high) in zip(window, pads, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tiled(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """`_plain` with stride 1, of a transformed kernel; see `winograd`.

    That is kept for the backward pass: 16/9 of the memory of the kernel.
    """
    return winograd.convolve(x, kernel, pads)


def _tiled_forward(
    x: jax.Array, kernel: jax.Array, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return winograd.convolve(x, kernel, pads), (x, kernel)


def _tiled_backward(
    pads: Pads, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    gradient = lax.optimization_barrier(gradient)
    by_input = winograd.convolve(
        gradient, winograd.turn(kernel), _turned_pads((3, 3), pads)
    )
    return by_input, winograd.gradient_by_kernel(x, gradient, pads)


_tiled.defvjp(_tiled_forward, _tiled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _own_gradient(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """`_plain` with stride 1, whose gradients are computed in the way that is fast."""
    return _plain(x, kernel, (1, 1), pads)


def _forward(
    x: jax.Array, kernel: jax.Array, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(x, kernel, (1, 1), pads), (x, kernel)


def _backward(
    pads: Pads, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # Once: the parts below would each compute again what was fused into these. For
    # speednet in float32 241 images/s become 288.
    x, gradient = lax.optimization_barrier((x, gradient))
    # A convolution with the turned kernel. What automatic differentiation writes
    # instead, a kernel in another layout, makes XLA convert everything to float32
    # before oneDNN gets it.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    rest = _turned_pads(kernel.shape[:2], pads)
    by_input = _plain(gradient, turned, (1, 1), rest)
    if _tiles_pay(x, kernel, gradient.shape[1:3], _TILED_GRADIENT):
        by_components = winograd.gradient_by_kernel(x, gradient, pads)
        return by_input, winograd.transpose(by_components)
    return by_input, kernel_gradient.products(x, kernel, gradient, (1, 1), pads)


_own_gradient.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _strided(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    """`_plain`, whose gradients are those of `_unstrided`.

    The gradients of a convolution with a stride are convolutions with holes, for which
    XLA has no call to oneDNN and takes its own slow code, in float32.
    """
    return _plain(x, kernel, stride, pads)


def _strided_forward(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(x, kernel, stride, pads), (x, kernel)


def _strided_backward(
    stride: tuple[int, ...],
    pads: Pads,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel, gradient = lax.optimization_barrier((*saved, gradient))
    same = functools.partial(_unstrided, kernel=kernel, stride=stride, pads=pads)
    (by_input,) = jax.vjp(same, x)[1](gradient)
    return by_input, kernel_gradient.products(x, kernel, gradient, stride, pads)


_strided.defvjp(_strided_forward, _strided_backward)


def _unstrided(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, ...], pads: Pads
) -> jax.Array:
    """The same values with stride 1: blocks of stride x stride places are channels.

    The kernel is filled up with zeros to whole blocks: for 3x3 and stride 2, 16 numbers
    in the place of 9.
    """
    (sh, sw), (kh, kw) = stride, kernel.shape[:2]
    blocks = -(-kh // sh), -(-kw // sw)  # of the kernel
    shape = _shape(x, kernel, stride, pads)
    config = [(0, 0, 0)]
    for n, (low, _), s, places, block in zip(
        x.shape[1:], pads, stride, shape, blocks, strict=False
    ):
        config.append((low, (places - 1 + block) * s - n - low, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
    b, rows, columns, c = x.shape
    x = x.reshape(b, rows // sh, sh, columns // sw, sw, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows // sh, columns // sw, -1)
    missing = [(0, blocks[0] * sh - kh), (0, blocks[1] * sw - kw), (0, 0), (0, 0)]
    kernel = jnp.pad(kernel, missing)
    kernel = kernel.reshape(blocks[0], sh, blocks[1], sw, c, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*blocks, sh * sw * c, -1)
    return _own_gradient(x, kernel, ((0, 0), (0, 0)))
