"""Convolution's forms for a CPU, against SciPy and NumPy in float64 and XLA's own."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend import core
from scipy import signal

from convnet import mesh, models, processor
from convnet.models import lowering

PROJECT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# As a run compiles it, but fast rather than well.
COMPILER_OPTIONS = {
    **mesh.compiler_options(jax.default_backend()),
    "xla_backend_optimization_level": 0,
}
ONE_DNN = jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12)

# Batch, rows, columns; channels in and out; kernel, stride, and pads of each axis.
CASES = [
    # Parts of 8: the batch is their multiple, a little more, or less than one.
    ((16, 7, 5), (5, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((19, 5, 6), (6, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 5, 7), (5, 4), (3, 3), (1, 2), ((0, 1), (2, 0))),
    ((9, 7, 6), (5, 2), (5, 5), (1, 1), ((2, 2), (2, 2))),
    ((9, 8, 7), (5, 2), (5, 3), (2, 1), ((1, 2), (0, 1))),
    ((10, 4, 4), (5, 6), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((10, 5, 4), (5, 2), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((9, 5, 4), (5, 2), (4, 2), (1, 1), ((1, 2), (0, 1))),
    # More zeros than the window reaches over: the turned form has negative pads.
    ((9, 5, 4), (5, 2), (1, 1), (1, 1), ((1, 1), (1, 1))),
    ((9, 5, 4), (5, 2), (3, 3), (1, 1), ((3, 4), (0, 3))),
    ((9, 5, 4), (5, 2), (3, 3), (2, 2), ((3, 3), (3, 3))),
    # So few channels that the kernel's gradient is a product with patches.
    ((19, 7, 6), (3, 2), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 7, 6), (1, 4), (5, 2), (2, 1), ((2, 0), (0, 1))),
    ((9, 6, 7), (4, 2), (2, 2), (1, 1), ((0, 0), (0, 0))),
    ((9, 5, 5), (2, 2), (1, 1), (1, 2), ((1, 1), (0, 0))),
    # Many more features than channels: a product for each place, or row, of the kernel.
    ((9, 7, 6), (5, 12), (3, 2), (1, 1), ((1, 0), (2, 1))),
    # Maps that are smaller than the kernel, in one axis or in both.
    ((3, 2, 2), (5, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 1, 1), (2, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((3, 2, 5), (5, 2), (5, 5), (1, 1), ((2, 2), (2, 2))),
    ((3, 2, 2), (2, 2), (3, 3), (2, 2), ((1, 1), (1, 2))),
]
IN_BFLOAT16 = [CASES[i] for i in (1, 3, 9, 11, 15, 16)]


@pytest.fixture
def forms(monkeypatch):
    """The forms for a CPU from JAX 0.12 on, with parts of 8 examples."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(lowering, "_PLACES", {np.dtype(d): 1 for d in DTYPES.values()})
    monkeypatch.setattr(processor, "has", lambda feature: False)


def draw(case, dtype):
    (batch, *sides), (channels, features), window, stride, pads = case
    random = np.random.default_rng(0)
    out = [
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(sides, pads, window, stride, strict=True)
    ]
    shapes = (
        (batch, *sides, channels),
        (*window, channels, features),
        (batch, *out, features),
    )
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


def scipy_convolution(x, kernel, stride, pads):
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    out = [
        sum(
            signal.correlate(image[..., c], kernel[..., c, f], "valid")
            for c in range(kernel.shape[2])
        )[:: stride[0], :: stride[1]]
        for image in x
        for f in range(kernel.shape[3])
    ]
    out = np.stack(out).reshape(len(x), kernel.shape[3], *out[0].shape)
    return np.moveaxis(out, 1, -1)


def numpy_gradients(x, kernel, gradient, stride, pads):
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    by_padded, by_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    rows, columns = gradient.shape[1:3]
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            down = slice(i, i + stride[0] * (rows - 1) + 1, stride[0])
            right = slice(j, j + stride[1] * (columns - 1) + 1, stride[1])
            place = padded[:, down, right]
            by_kernel[i, j] = np.einsum("bhwc,bhwf->cf", place, gradient)
            by_padded[:, down, right] += gradient @ kernel[i, j].T
    (top, _), (left, _) = pads
    h, w = x.shape[1:3]
    return by_padded[:, top : top + h, left : left + w], by_kernel


def with_gradients(function, case, x, kernel, gradient):
    """Value and both gradients, compiled."""

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(x, kernel, gradient):
        out, vjp = jax.vjp(lambda x, k: function(x, k, *case[3:]), x, kernel)
        return out, *vjp(gradient)

    return run(x, kernel, gradient)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in CASES),
        *((case, "bfloat16") for case in IN_BFLOAT16),
    ],
    ids=str,
)
def test_values_and_gradients(case, dtype, forms):
    check(case, dtype)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 4, 15)], ids=str)
def test_with_matrix_units_kernels_gradients_are_products(case, forms, monkeypatch):
    monkeypatch.setattr(processor, "has", lambda feature: True)
    monkeypatch.setattr(lowering, "_PRODUCTS", {np.dtype(DTYPES["bfloat16"]): 1})
    # What else there is would fail.
    monkeypatch.setattr(lowering, "_in_parts", None)
    check(case, "bfloat16")


def check(case, dtype):
    arrays = draw(case, DTYPES[dtype])
    found = with_gradients(lowering.convolve2d, case, *arrays)
    x, kernel, gradient = (array.astype(np.float64) for array in arrays)
    want = [
        scipy_convolution(x, kernel, *case[3:]),
        *numpy_gradients(x, kernel, gradient, *case[3:]),
    ]
    # The sums have up to a few hundred terms of size 1.
    tolerance = 3e-5 if dtype == "float32" else 2e-2
    for ours, exact in zip(found, want, strict=True):
        assert ours.dtype == DTYPES[dtype] and ours.shape == exact.shape
        ours = np.asarray(ours, np.float64)
        np.testing.assert_allclose(ours, exact, rtol=tolerance, atol=tolerance * 5)


def test_the_reference_is_right():
    """The gradients above are those of SciPy's values, by finite differences."""
    case = CASES[4]
    x, kernel, gradient = (array.astype(np.float64) for array in draw(case, np.float32))
    by_x, by_kernel = numpy_gradients(x, kernel, gradient, *case[3:])
    random = np.random.default_rng(1)
    for array, slope in ((x, by_x), (kernel, by_kernel)):
        towards = random.normal(size=array.shape)
        values = []
        for sign in (1, -1):
            array += sign * 1e-4 * towards
            values.append((scipy_convolution(x, kernel, *case[3:]) * gradient).sum())
            array -= sign * 1e-4 * towards
        difference = (values[0] - values[1]) / 2e-4
        np.testing.assert_allclose((slope * towards).sum(), difference, rtol=1e-6)


# Which form is taken.


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


def parts(batch, dtype="float32", channels=5, side=4):
    """How many examples each convolution that makes a kernel contracts."""
    x = jax.ShapeDtypeStruct((batch, side, side, channels), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, 6), dtype)

    def loss(x, kernel):
        y = lowering.convolve2d(x, kernel, (1, 1), ((1, 1), (1, 1)))
        return y.astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    sizes = []
    for equation in convolutions(program.jaxpr):
        # Its output has as many places as a window; the others have a batch first.
        if sorted(equation.outvars[0].aval.shape) == sorted((3, 3, channels, 6)):
            axis = equation.params["dimension_numbers"].lhs_spec[1]
            sizes.append(equation.invars[0].aval.shape[axis])
    return sizes


@pytest.mark.parametrize(
    ("batch", "dtype", "side", "want"),
    [
        (13, "float32", 4, [13]),
        # About 4,096 places a part, or 8,192 that are half as large.
        (37, "float32", 16, [16, 16, 5]),
        (37, "bfloat16", 16, [32, 5]),
        (300, "float32", 4, [256, 44]),
        # At least 8 examples, and no more than 16 parts.
        (20, "float32", 64, [8, 8, 4]),
        (300, "float32", 32, [19] * 15 + [15]),
        (1024, "bfloat16", 32, [64] * 16),
    ],
)
def test_the_batch_is_split(batch, dtype, side, want, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert parts(batch, dtype, side=side) == want
    assert parts(batch, dtype, channels=3, side=side) == []  # one product instead
    with lowering.plain():
        assert parts(batch, dtype, side=side) == [batch]


def test_parts_are_summed_in_float32(forms):
    """A part counts in full beside a sum that is 256 times as large."""
    x = np.full((40, 2, 2, 5), 1 / 16, ml_dtypes.bfloat16)
    x[:8] = 32.0
    kernel = np.zeros((1, 1, 5, 1), ml_dtypes.bfloat16)
    ones = np.ones((40, 2, 2, 1), ml_dtypes.bfloat16)
    # Parts of 8 examples: 1024, and four times 2. In bfloat16, 1024 + 2 is 1024.
    assert ml_dtypes.bfloat16(1024) + ml_dtypes.bfloat16(2) == 1024
    case = (None, None, None, (1, 1), ((0, 0), (0, 0)))
    *_, total = with_gradients(lowering.convolve2d, case, x, kernel, ones)
    assert np.asarray(total, np.float32).ravel().tolist() == [1024 + 4 * 2] * 5


def test_only_a_cpu_from_jax_0_12_on_takes_them(monkeypatch):
    for backend, version, want in (
        ("cpu", (0, 12, 0), 3),
        ("cpu", (0, 13, 1), 3),
        ("cpu", (0, 10, 2), 1),
        ("gpu", (0, 12, 0), 1),
        ("tpu", (0, 12, 0), 1),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "__version_info__", version)
        assert len(parts(37, side=16)) == want, (backend, version)


def test_on_a_gpu_a_gradient_is_computed_before_its_convolutions(monkeypatch):
    """Else XLA computes them on maps with the zeros that a pool's gradient ends in."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = (None, None, None, (1, 1), ((1, 1), (1, 1)))
    x, kernel, gradient = draw(CASES[0], np.float32)
    _, *found = with_gradients(lowering.convolve2d, case, x, kernel, gradient)
    for ours, want in zip(
        found, numpy_gradients(x, kernel, gradient, *case[3:]), strict=True
    ):
        np.testing.assert_allclose(ours, want, atol=1e-4)
    program = jax.make_jaxpr(
        lambda *a: jax.vjp(lambda x, k: lowering.convolve2d(x, k, *case[3:]), *a[:2])[
            1
        ](a[2])
    )(x, kernel, gradient)
    held = [e for e in program.eqns if e.primitive.name == "optimization_barrier"]
    assert [v.aval.shape for e in held for v in e.outvars] == [gradient.shape]


def test_no_small_map_meets_a_larger_kernel(forms):
    """oneDNN would take its reference code, 50 times slower."""
    x = jax.ShapeDtypeStruct((4, 2, 1, 2), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 5), jnp.float32)
    window = (1, 1), ((1, 1), (1, 1))
    program = jax.make_jaxpr(lambda x, k: lowering.convolve2d(x, k, *window))(x, kernel)
    (found,) = convolutions(program.jaxpr)
    assert found.invars[0].aval.shape == (4, 3, 3, 2)
    assert program.out_avals[0].shape == (4, 2, 1, 5)


# What is compiled.

MANY_PARTS = """
import jax, numpy as np
from convnet import mesh
from convnet.models import lowering

lowering._PLACES = {np.dtype("float32"): 1}
lowering._LEAST, lowering._MOST = 1, 40
convolve = lambda x, k: lowering.convolve2d(x, k, (1, 1), ((1, 1), (1, 1)))
run = jax.jit(
    lambda x, k, g: jax.vjp(convolve, x, k)[1](g)[1],
    compiler_options=mesh.compiler_options("cpu"),
)
x = np.ones((40, 8, 8, 8), np.float32)
print(run(x, np.ones((3, 3, 8, 8), np.float32), x)[1, 1].sum())
"""


def test_more_than_32_parts_do_not_end_the_process():
    """oneDNN can add 32 arrays to a convolution, and aborts where XLA fuses more."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", MANY_PARTS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The middle of the window meets every place: 40 * 8 * 8, for 8 by 8 channels.
    assert float(done.stdout) == 40 * 8 * 8 * 8 * 8


@pytest.mark.skipif(not ONE_DNN, reason="needs a CPU and JAX 0.12: oneDNN")
@pytest.mark.parametrize("name", ["speednet", "cnn"])
def test_bfloat16_convolutions_stay_bfloat16(name):
    """All of oneDNN's, in the forward and in the backward pass."""
    norm = {"norm": "batch"} if name == "cnn" else {}
    model = models.create(
        name, num_outputs=2, dtype="bfloat16", widths=(8, 16, 16), **norm
    )
    x = jax.ShapeDtypeStruct((8, 26, 26, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, stats, x):
        found = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(found, x, train=True, mutable=["batch_stats"])
        return (logits**2).sum()

    lowered = jax.jit(jax.grad(loss)).lower(
        variables["params"], variables["batch_stats"], x
    )
    text = lowered.compile(mesh.compiler_options("cpu")).as_text()
    calls = re.findall(r"= \(?(\w+)\[.*custom-call.*onednn\$conv", text)
    layers = 7 if name == "speednet" else 6
    # Forward, by the input and by the kernel; the first layer has only the first.
    assert len(calls) >= 3 * layers - 2
    assert set(calls) == {"bf16"}
