"""Forms of an operation that a backend runs faster than the plain one.

Each has the values and the gradients of the plain form, up to rounding; the tests
compare them. `plain()` switches them all off.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from convnet import processor

Pads = tuple[tuple[int, int], ...]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# The gradient of a kernel, in parts of the batch that stay in the cache: about so many
# places of the map a part, at least _LEAST images, at most _MOST parts, each of which
# costs compile time. On two Zen 4 cores, whole and in parts, GFLOP/s: 36 and 153 for
# 128 images of 32x32x64 in float32 (bfloat16: 185 and 278), 66 and 141 for 500 of
# 15x15, 64 to 256 channels (142 and 363); at 4x4x512 the whole batch is best.
_PLACES = {jnp.dtype("float32"): 4096, jnp.dtype("bfloat16"): 8192}
_LEAST = 8
_MOST = 16
# With so few channels (the image's own), the gradient of the kernel is one product with
# the patches: 8 ms instead of 25 for 128 images of 32x32, 3 channels to 64.
_FEW_CHANNELS = 4
# Where the features are so many times the channels, float32 gains from one product for
# each place of the kernel: 277 ms become 217 for 500 of 15x15, 64 to 256 channels.
_MANY_FEATURES = 2
# So does, from so many channels on, a processor with matrix units (Intel's AMX, which
# Xeons have from the fourth generation on): products are several times as fast there as
# a convolution with the batch as channels. For 500 of 15x15, 64 to 256 channels, 273 ms
# become 75 in bfloat16; with 24 channels 113 would become 208. In float32, for which
# there are no such units, 218 ms become 122 for 500 of 7x7, 256 to 256 channels; with
# 64 to 64 of 15x15 58 would become 73. On a map of _LARGE places half as many channels
# do: 136 ms become 103 for 128 of 32x32, 64 to 64.
_PRODUCTS = {jnp.dtype("float32"): 128, jnp.dtype("bfloat16"): 32}
_LARGE = 512
# In bfloat16, where the features are many, one product for each row of the kernel takes
# less: for 2,000 of 15x15, 64 to 256 channels, 231 ms against 321 and, in parts, 562.
# With fewer channels parts are better, if the batch has no more places than this: 24 to
# 64 channels of 31x31 take 86 in place of 98 ms for 500, 578 in place of 367 for 2,000.
_MOST_IN_PARTS = 1 << 20

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
    # From JAX 0.12 on convolutions on a CPU are oneDNN's.
    if not on("cpu") or jax.__version_info__ < (0, 12):
        return _plain(x, kernel, stride, pads)
    sizes, window = x.shape[1:3], kernel.shape[:2]
    missing = [max(k - n, 0) for n, k in zip(sizes, window, strict=True)]
    if any(missing):
        return _smaller(x, kernel, stride, pads, missing)
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
) -> jax.Array:
    """`convolve2d`, for maps that are smaller than the kernel.

    For those oneDNN has only its reference code, 50 times slower: they get zeros at
    their ends, and what the zeros add to the output is cut off.
    """
    shape = [
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(x.shape[1:], pads, kernel.shape, stride, strict=False)
    ]
    # The barriers keep XLA from folding the zeros into the convolution's own padding,
    # here and, transposed, in the gradient.
    hold = lax.optimization_barrier
    x = hold(jnp.pad(x, [(0, 0), *((0, m) for m in missing), (0, 0)]))
    y = hold(convolve2d(x, kernel, stride, pads))
    return y[:, : shape[0], : shape[1]]


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
    rest = tuple(
        (k - 1 - low, k - 1 - high)
        for k, (low, high) in zip(kernel.shape, pads, strict=False)
    )
    by_input = _plain(gradient, turned, (1, 1), rest)
    return by_input, _kernel_gradient(x, kernel, pads, gradient)


def _kernel_gradient(
    x: jax.Array, kernel: jax.Array, pads: Pads, gradient: jax.Array
) -> jax.Array:
    """The kernel's gradient in the form that is fast for such arrays."""
    channels, features = kernel.shape[2:]
    places = gradient.shape[1] * gradient.shape[2]
    products = _products_pay(x.dtype, channels, places)
    many = features > _MANY_FEATURES * channels
    large = processor.has("amx_bf16") and len(x) * places > _MOST_IN_PARTS
    form = _in_parts
    if channels <= _FEW_CHANNELS:
        form = _from_patches
    elif many and x.dtype == jnp.bfloat16 and (products or large):
        form = _by_row
    elif products or (many and x.dtype == jnp.float32):
        form = _by_place
    return form(x, kernel, pads, gradient)


def _products_pay(dtype: jnp.dtype, channels: int, places: int) -> bool:
    """Whether a product for each place of the kernel is the fast form; see above."""
    least = _PRODUCTS[dtype]
    if dtype == jnp.float32 and places >= _LARGE:
        least //= 2
    return processor.has("amx_bf16") and channels >= least


def _in_parts(
    x: jax.Array, kernel: jax.Array, pads: Pads, gradient: jax.Array
) -> jax.Array:
    """The kernel's gradient, summed in float32 over parts of the batch."""
    rows, columns = gradient.shape[1:3]
    size = max(_PLACES[x.dtype] // (rows * columns), _LEAST, -(-len(x) // _MOST))
    total = jnp.zeros(kernel.shape, jnp.float32)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        by_kernel = jax.linear_transpose(
            functools.partial(_plain, part, stride=(1, 1), pads=pads), kernel
        )
        (summand,) = by_kernel(gradient[start : start + size])
        # Without the barrier XLA makes all additions a part of one convolution, and
        # oneDNN ends the process where they are more than 32.
        total += lax.optimization_barrier(summand).astype(jnp.float32)
    return total.astype(kernel.dtype)


def _from_patches(
    x: jax.Array, kernel: jax.Array, pads: Pads, gradient: jax.Array
) -> jax.Array:
    """The kernel's gradient as one product, (kh * kw * c, places) by (places, f)."""
    kh, kw, c, features = kernel.shape
    rows, columns = gradient.shape[1:3]
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    patches = [
        x[:, i : i + rows, j : j + columns] for i in range(kh) for j in range(kw)
    ]
    flat = jnp.concatenate(patches, -1).reshape(-1, kh * kw * c)
    return jnp.dot(flat.T, gradient.reshape(-1, features)).reshape(kernel.shape)


def _by_place(
    x: jax.Array,
    kernel: jax.Array,
    pads: Pads,
    gradient: jax.Array,
    stride: tuple[int, ...] = (1, 1),
) -> jax.Array:
    """The kernel's gradient, a product (c, places) by (places, f) for each place."""
    (kh, kw, c, features), (sh, sw) = kernel.shape, stride
    down, right = (
        (n - 1) * s + 1 for n, s in zip(gradient.shape[1:], stride, strict=False)
    )
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    flat = gradient.reshape(-1, features)
    products = []
    for i in range(kh):
        for j in range(kw):
            moved = x[:, i : i + down : sh, j : j + right : sw].reshape(-1, c)
            # Copied once; within the product it would be gathered again and again.
            products.append(jnp.dot(lax.optimization_barrier(moved).T, flat))
    return jnp.stack(products).reshape(kernel.shape)


def _by_row(
    x: jax.Array, kernel: jax.Array, pads: Pads, gradient: jax.Array
) -> jax.Array:
    """The kernel's gradient, a product (kw * c, places) by (places, f) for each row."""
    kh, kw, c, features = kernel.shape
    columns = gradient.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), pads[1], (0, 0)])
    wide = jnp.concatenate([x[:, :, j : j + columns] for j in range(kw)], -1)
    rows = kernel.reshape(kh, 1, kw * c, features)
    wide = lax.optimization_barrier(wide)
    return _by_place(wide, rows, (pads[0], (0, 0)), gradient).reshape(kernel.shape)


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
    same = functools.partial(_unstrided, stride=stride, pads=pads)
    by_input, by_kernel = jax.vjp(same, x, kernel)[1](gradient)
    if _products_pay(x.dtype, x.shape[-1], gradient.shape[1] * gradient.shape[2]):
        by_kernel = _by_place(x, kernel, pads, gradient, stride)
    return by_input, by_kernel


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
    shape = [
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(x.shape[1:], pads, kernel.shape, stride, strict=False)
    ]
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
