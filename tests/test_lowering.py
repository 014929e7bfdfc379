"""The chunked convolution against XLA's own and against SciPy and NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend import core
from scipy import signal

from convnet.models import lowering

# batch, side, channels in and out, kernel, stride, padding
CASES = [
    (1, 5, 2, 3, 3, 1, 1),
    (37, 5, 2, 3, 3, 1, 1),
    (37, 6, 3, 2, 3, 2, 1),
    (33, 6, 2, 2, 3, 2, 0),
    (19, 4, 3, 4, 1, 1, 0),
    (35, 5, 2, 2, 1, 2, 0),
    (17, 7, 2, 2, 5, 1, 1),
    (34, 7, 1, 2, 5, 2, 0),
    # Maps that are smaller than the kernel.
    (3, 2, 2, 3, 3, 1, 1),
    (33, 1, 2, 3, 3, 1, 1),
    (3, 2, 3, 2, 5, 1, 2),
    (3, 2, 2, 2, 3, 2, 1),
]
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def draw(case, dtype):
    batch, side, channels, features, kernel, stride, pad = case
    random = np.random.default_rng(0)
    out = (side + 2 * pad - kernel) // stride + 1
    shapes = (
        (batch, side, side, channels),
        (kernel, kernel, channels, features),
        (batch, out, out, features),
    )
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


def scipy_convolution(x, kernel, stride, pad):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = [
        sum(
            signal.correlate(image[..., c], kernel[..., c, f], "valid")
            for c in range(kernel.shape[2])
        )[::stride, ::stride]
        for image in x
        for f in range(kernel.shape[3])
    ]
    out = np.stack(out).reshape(len(x), kernel.shape[3], *out[0].shape)
    return np.moveaxis(out, 1, -1)


def numpy_gradients(x, kernel, gradient, stride, pad):
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    by_padded, by_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    rows, columns = (stride * n for n in gradient.shape[1:3])
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            place = np.s_[:, i : i + rows : stride, j : j + columns : stride]
            by_kernel[i, j] = np.einsum("bhwc,bhwf->cf", padded[place], gradient)
            by_padded[place] += gradient @ kernel[i, j].T
    side = x.shape[1]
    return by_padded[:, pad : pad + side, pad : pad + side], by_kernel


def with_gradients(functions, case, x, kernel, gradient):
    """Values and both gradients of each function."""
    stride, pad = case[5:]
    window = ((stride,) * 2, ((pad, pad),) * 2)

    # Compiled fast rather than well.
    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(x, kernel, gradient):
        found = []
        for function in functions:
            out, vjp = jax.vjp(lambda x, k, f=function: f(x, k, *window), x, kernel)
            found.append((out, *vjp(gradient)))
        return found

    return run(x, kernel, gradient)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in CASES),
        *((case, "bfloat16") for case in CASES if case[0] == 37),
    ],
    ids=str,
)
def test_values_and_gradients(case, dtype):
    x, kernel, gradient = draw(case, DTYPES[dtype])
    forms = (lowering._chunked, lowering._small, lowering._plain)
    *ours, plain = with_gradients(forms, case, x, kernel, gradient)
    wide = [array.astype(np.float64) for array in (x, kernel, gradient)]
    want = [scipy_convolution(*wide[:2], *case[5:]), *numpy_gradients(*wide, *case[5:])]
    # The sums have up to a few hundred terms of size 1.
    tolerance = 3e-5 if dtype == "float32" else 2e-2
    for mine, xla, exact in zip(
        [*ours[0], *ours[1]], [*plain, *plain], [*want, *want], strict=True
    ):
        assert mine.dtype == xla.dtype == DTYPES[dtype] and mine.shape == exact.shape
        mine, xla = (np.asarray(array, np.float64) for array in (mine, xla))
        np.testing.assert_allclose(mine, exact, rtol=tolerance, atol=tolerance * 5)
        np.testing.assert_allclose(mine, xla, rtol=tolerance, atol=tolerance * 5)


def test_the_reference_is_right():
    """The gradients above are those of SciPy's values, by finite differences."""
    case = (2, 5, 2, 2, 3, 2, 1)
    x, kernel, gradient = (array.astype(np.float64) for array in draw(case, np.float32))
    by_x, by_kernel = numpy_gradients(x, kernel, gradient, 2, 1)
    random = np.random.default_rng(1)
    for array, slope in ((x, by_x), (kernel, by_kernel)):
        towards = random.normal(size=array.shape)
        values = []
        for sign in (1, -1):
            array += sign * 1e-4 * towards
            values.append((scipy_convolution(x, kernel, 2, 1) * gradient).sum())
            array -= sign * 1e-4 * towards
        difference = (values[0] - values[1]) / 2e-4
        np.testing.assert_allclose((slope * towards).sum(), difference, rtol=1e-6)


def convolutions(jaxpr):
    """The convolutions of a program, also of the programs inside it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(equation)
        for value in equation.params.values():
            if isinstance(value, core.ClosedJaxpr):
                found += convolutions(value.jaxpr)
    return found


def traced(function, batch, dtype):
    """The convolutions in the gradient by the kernel of a batch."""
    x = jax.ShapeDtypeStruct((batch, 4, 4, 2), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 5), dtype)

    def loss(x, kernel):
        return function(x, kernel, (1, 1), ((1, 1), (1, 1))).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    # Those that make a kernel: forward and by the input, an axis is as long as a batch.
    return [
        equation
        for equation in convolutions(program.jaxpr)
        if batch not in equation.outvars[0].aval.shape
    ]


@pytest.mark.parametrize(
    ("batch", "dtype", "parts"),
    [
        (13, "float32", [13]),
        (37, "float32", [16, 16, 5]),
        (37, "bfloat16", [32, 5]),
        (128, "float32", [16] * 8),
        # No more than 16 parts: 300 / 16 is 18.75.
        (300, "float32", [19] * 15 + [15]),
        (1024, "bfloat16", [64] * 16),
    ],
)
def test_the_batch_is_split(batch, dtype, parts):
    found = traced(lowering._chunked, batch, jnp.dtype(dtype))
    sizes = []
    for equation in found:
        # A batch is contracted: it is the axis that both operands share.
        left, right = (set(v.aval.shape) for v in equation.invars)
        (size,) = (left & right) - {4, 3, 2, 5} or {5}
        sizes.append(size)
    assert sizes == parts
    assert len(traced(lowering._plain, batch, jnp.dtype(dtype))) == 1


def test_parts_are_summed_in_float32():
    """A part counts in full beside a sum that is 256 times as large."""
    x = np.full((160, 2, 2, 1), 1 / 32, ml_dtypes.bfloat16)
    x[:32] = 8.0
    kernel = np.zeros((1, 1, 1, 1), ml_dtypes.bfloat16)
    # Parts of 32 examples: 1024, and four times 4. In bfloat16, 1024 + 4 is 1024.
    assert ml_dtypes.bfloat16(1024) + ml_dtypes.bfloat16(4) == 1024
    case = (160, 2, 1, 1, 1, 1, 0)
    ((_, _, total),) = with_gradients(
        [lowering._chunked], case, x, kernel, np.ones_like(x)
    )
    assert np.asarray(total).item() == 1024 + 4 * 4


def test_only_a_cpu_from_jax_0_12_on_takes_the_chunked_form(monkeypatch):
    monkeypatch.setattr(lowering, "_LARGE", 16)  # the maps below have 16 places
    count = functools.partial(traced, lowering.convolve2d, 37, jnp.dtype("float32"))
    for backend, version, parts in (
        ("cpu", (0, 12, 0), 3),
        ("cpu", (0, 13, 1), 3),
        ("cpu", (0, 10, 2), 1),
        ("gpu", (0, 12, 0), 1),
        ("tpu", (0, 12, 0), 1),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "__version_info__", version)
        assert len(count()) == parts, (backend, version)


def test_only_large_maps_are_split(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    for large, parts in ((16, 3), (17, 1)):
        monkeypatch.setattr(lowering, "_LARGE", large)
        found = traced(lowering.convolve2d, 37, jnp.dtype("float32"))
        assert len(found) == parts


def test_no_small_map_meets_a_larger_kernel(monkeypatch):
    """oneDNN would take its reference code, 50 times slower."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    x = jax.ShapeDtypeStruct((4, 2, 1, 2), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 5), jnp.float32)
    window = (1, 1), ((1, 1), (1, 1))
    program = jax.make_jaxpr(lambda x, k: lowering.convolve2d(x, k, *window))(x, kernel)
    (found,) = convolutions(program.jaxpr)
    assert found.invars[0].aval.shape == (4, 3, 3, 2)
    assert program.out_avals[0].shape == (4, 2, 1, 5)
