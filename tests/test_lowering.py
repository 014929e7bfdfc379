"""Convolution's forms for a CPU, against SciPy and NumPy in float64 and XLA's own."""

import contextlib
import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend import core
from scipy import signal

from convnet import mesh, models
from convnet.models import kernel_gradient, lowering, parts

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# As a run compiles it, but fast rather than well.
COMPILER_OPTIONS = {
    **mesh.compiler_options(jax.default_backend()),
    "xla_backend_optimization_level": 0,
}
ONE_DNN = jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12)

# Batch, rows, columns; channels in and out; kernel, stride, and pads of each axis.
CASES = [
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
    # Few channels.
    ((19, 7, 6), (3, 2), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 7, 6), (1, 4), (5, 2), (2, 1), ((2, 0), (0, 1))),
    ((9, 6, 7), (4, 2), (2, 2), (1, 1), ((0, 0), (0, 0))),
    ((9, 5, 5), (2, 2), (1, 1), (1, 2), ((1, 1), (0, 0))),
    # Many more features than channels: only what is convolved is moved.
    ((9, 7, 6), (5, 20), (3, 2), (1, 1), ((1, 0), (2, 1))),
    # Maps that are smaller than the kernel, in one axis or in both.
    ((3, 2, 2), (5, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 1, 1), (2, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((3, 2, 5), (5, 2), (5, 5), (1, 1), ((2, 2), (2, 2))),
    ((3, 2, 2), (2, 2), (3, 3), (2, 2), ((1, 1), (1, 2))),
    # Places of the output that no place of the map reaches.
    ((4, 1, 2), (2, 3), (3, 3), (1, 1), ((3, 1), (1, 1))),
    # Too many places for a matrix, in both axes and with a stride.
    ((3, 4, 4), (2, 3), (5, 5), (1, 1), ((2, 2), (2, 2))),
    ((3, 2, 5), (2, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
]
# With enough places for tiles.
TILED = [
    ((16, 7, 6), (5, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((20, 6, 9), (3, 4), (3, 3), (1, 1), ((0, 0), (0, 0))),
    ((16, 5, 7), (2, 6), (3, 3), (1, 1), ((0, 1), (2, 0))),
    # The gradient by the input has negative pads.
    ((30, 5, 4), (5, 2), (3, 3), (1, 1), ((3, 4), (0, 3))),
    ((60, 2, 12), (3, 2), (3, 3), (1, 1), ((1, 1), (1, 1))),
]
IN_BFLOAT16 = [CASES[i] for i in (1, 3, 9, 11, 15, 16, 18)]


@pytest.fixture
def forms(monkeypatch):
    """The forms for a CPU from JAX 0.12 on, with several parts and products in each."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(parts, "PART", 12_000)
    monkeypatch.setattr(kernel_gradient, "_PLACES", 64)


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


@pytest.fixture
def tiled(monkeypatch):
    """Tiles wherever they can be."""
    monkeypatch.setattr(lowering, "_TILED", {"oneDNN": 1, "Eigen": 1})


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0)], ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_values_and_gradients_by_tiles(case, version, forms, tiled, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    check(case, "float32")
    (batch, *sides), channels, *_ = case
    assert by_tiles(gradients(batch, "float32", sides, *channels, case[-1])) == 3


@pytest.mark.parametrize("case", TILED, ids=str)
def test_a_kernels_gradient_by_tiles(case, forms, monkeypatch):
    """Of a convolution that is oneDNN's."""
    monkeypatch.setattr(lowering, "_TILED_GRADIENT", 1)
    check(case, "float32")
    (batch, *sides), channels, *_ = case
    assert by_tiles(gradients(batch, "float32", sides, *channels, case[-1])) == 1


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


def equations(jaxpr, name):
    """A program's equations of a primitive, also those of the programs inside it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            found.append(equation)
        for value in jax.tree.leaves(equation.params):
            if isinstance(value, core.ClosedJaxpr):
                found += equations(value.jaxpr, name)
    return found


convolutions = functools.partial(equations, name="conv_general_dilated")
products = functools.partial(equations, name="dot_general")


def gradients(
    batch,
    dtype="float32",
    sides=(16, 16),
    channels=64,
    features=64,
    pads=((1, 1), (1, 1)),
    stride=(1, 1),
    window=(3, 3),
):
    """The program of a convolution and its gradients by the input and the kernel."""
    x = jax.ShapeDtypeStruct((batch, *sides, channels), dtype)
    kernel = jax.ShapeDtypeStruct((*window, channels, features), dtype)

    def loss(x, kernel):
        y = lowering.convolve2d(x, kernel, stride, pads)
        return y.astype(jnp.float32).sum()

    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel).jaxpr


def by_tiles(program):
    """How many of its products are of 4x4 components."""
    return sum(
        product.invars[0].aval.shape[0] == 16
        and product.params["dimension_numbers"][1] == ((0,), (0,))
        for product in products(program)
    )


# Of 64 channels; with nearly five times as many features both factors are still moved.
@pytest.mark.parametrize(
    ("features", "widths"), [(64, (192, 192)), (256, (192, 768)), (512, (576, 512))]
)
@pytest.mark.parametrize("batch", [128, 500, 2000])
def test_what_a_kernels_gradient_lays_out_is_bounded(
    batch, features, widths, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    (product,) = products(gradients(batch, "bfloat16", features=features))
    left, right = (operand.aval for operand in product.invars)
    assert left.dtype == right.dtype == jnp.bfloat16
    assert (left.shape[-1], right.shape[-1]) == widths
    number, places, _ = left.shape
    # Several products: one sums over too many places to be fast.
    assert number > 1 and 1024 <= places <= 4096
    assert 3 << 20 <= 2 * (left.size + right.size) <= 20 << 20


@pytest.mark.parametrize(
    ("images", "wanted", "number"),
    [(2000, 20.0, 100), (2000, 18.0, 100), (500, 0.2, 500), (12, 50.0, 1), (7, 3.0, 1)],
)
def test_parts_are_equal(images, wanted, number):
    assert parts.divide(images, wanted) == number


def test_parts_are_summed_in_float32(forms, monkeypatch):
    """A part counts in full beside a sum that is 256 times as large."""
    monkeypatch.setattr(parts, "PART", 8 * 3 * 2 * (5 + 1) * 2)
    x = np.full((40, 2, 2, 5), 1 / 16, ml_dtypes.bfloat16)
    x[::5] = 32.0
    kernel = np.zeros((1, 1, 5, 1), ml_dtypes.bfloat16)
    ones = np.ones((40, 3, 2, 1), ml_dtypes.bfloat16)
    # Parts of 8 examples: 1024, and four times 2. In bfloat16, 1024 + 2 is 1024.
    assert ml_dtypes.bfloat16(1024) + ml_dtypes.bfloat16(2) == 1024
    # Without the row of zeros the arrays would be factors as they lie, and no parts.
    case = (None, None, None, (1, 1), ((1, 0), (0, 0)))
    *_, total = with_gradients(lowering.convolve2d, case, x, kernel, ones)
    assert np.asarray(total, np.float32).ravel().tolist() == [1024 + 4 * 2] * 5


@pytest.mark.skipif(not ONE_DNN, reason="needs a CPU and JAX 0.12: oneDNN")
@pytest.mark.parametrize("shape", [(128, 32, 16, 16), (64, 28, 6, 24)], ids=str)
def test_a_large_gradient_in_bfloat16(shape):
    """As a convolution it is wrong here on processors with matrix units."""
    batch, side, channels, features = shape
    window, pads = (3, 3), ((1, 1), (1, 1))
    case = ((batch, side, side), (channels, features), window, (1, 1), pads)
    arrays = draw(case, ml_dtypes.bfloat16)
    *_, found = with_gradients(lowering.convolve2d, case, *arrays)
    exact = numpy_gradients(*(a.astype(np.float32) for a in arrays), *case[3:])[1]
    largest = np.abs(exact).max()
    np.testing.assert_allclose(found.astype(np.float32), exact, atol=largest / 64)


def test_only_a_cpu_from_jax_0_12_on_takes_products(monkeypatch):
    for backend, version, want in (
        ("cpu", (0, 12, 0), 1),
        ("cpu", (0, 13, 1), 1),
        ("cpu", (0, 10, 2), 0),
        ("gpu", (0, 12, 0), 0),
        ("tpu", (0, 12, 0), 0),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "__version_info__", version)
        program = gradients(8, "bfloat16")
        assert len(products(program)) == want, (backend, version)
        # The convolution, its gradient by the input, and else by the kernel.
        assert len(convolutions(program)) == 3 - want
        with lowering.plain():
            assert not products(gradients(8, "bfloat16"))


@pytest.mark.parametrize(
    ("version", "widths", "number", "plain"),
    [
        # The convolution and both gradients, or that by the kernel alone, which is a
        # product or, of Eigen's, a convolution.
        ((0, 12, 0), (256, 256), 3, 0),
        ((0, 12, 0), (256, 128), 1, 2),
        ((0, 12, 0), (64, 64), 1, 2),
        ((0, 12, 0), (32, 256), 0, 2),
        ((0, 10, 2), (256, 256), 3, 0),
        ((0, 10, 2), (128, 256), 3, 0),
        ((0, 10, 2), (64, 64), 0, 3),
    ],
)
def test_what_is_computed_by_tiles(version, widths, number, plain, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", version)

    def found(batch, dtype="float32", side=8, **options):
        return by_tiles(gradients(batch, dtype, (side, side), *widths, **options))

    assert found(128) == found(4) == number
    assert len(convolutions(gradients(128, "float32", (8, 8), *widths))) == plain
    # Too few places, tiles that reach too far over the map, and bfloat16.
    assert found(3) == found(128, side=3) == found(128, "bfloat16") == 0
    # Strides and other kernels.
    assert found(128, stride=(2, 2)) == found(128, window=(5, 5)) == 0
    # A map that does not stay in the cache.
    assert found(1, side=200) == 0
    with lowering.plain():
        assert found(128) == 0
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert found(128) == 0


@pytest.mark.parametrize(
    ("side", "width", "images"),
    [
        # The convolution and its gradients, each of about 10 MB,
        (16, 256, [5, 5, 5]),
        # but not less than twice the sum that a kernel's gradient is: 34 MB.
        (4, 512, [40, 40, 120]),
    ],
)
def test_images_in_a_part_of_tiles(side, width, images, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    program = gradients(120, "float32", (side, side), width, width)
    tiles = [product.invars[0].aval.shape[1] for product in products(program)]
    assert [4 * n / side**2 for n in tiles] == images


def test_by_tiles_a_map_that_is_smaller_than_its_kernel_has_no_output(tiled, forms):
    x, kernel = jnp.ones((256, 1, 1, 2)), jnp.ones((3, 3, 2, 5))
    y = lowering.convolve2d(x, kernel, (1, 1), ((0, 0), (0, 0)))
    assert y.shape == (256, 0, 0, 5)


OVER_DEVICES = """
import functools, jax, re
from convnet import mesh
from convnet.models import lowering, parts

mesh.pretend(4)
lowering._TILED = {"oneDNN": 1, "Eigen": 1}
parts.PART = parts._PART_WITH_SLOW_LOOPS = 4 * 4 * (4 + 5) * 8 * 8 * 4
rows = jax.sharding.NamedSharding(mesh.make(16, 4), jax.P("data"))
x = jax.ShapeDtypeStruct((16, 8, 8, 4), "float32", sharding=rows)
kernel = jax.ShapeDtypeStruct((3, 3, 4, 5), "float32")
y = functools.partial(lowering.convolve2d, stride=(1, 1), pads=((1, 1), (1, 1)))
run = jax.jit(jax.grad(lambda k, x: (y(x, k) ** 2).sum()))
text = run.lower(kernel, x).compile().as_text()
print(sorted(set(re.findall("all-[a-z]+|permute|convolution", text))))
print(text.count(" while("), sorted(set(re.findall(r"f32\\[16,(\\d+),4\\]", text))))
"""


def test_each_device_computes_its_own_tiles():
    """Of four parts of the batch. Only the gradient, a sum, is exchanged."""
    done = subprocess.run(
        [sys.executable, "-c", OVER_DEVICES],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Loops for the convolution and its gradient, over the 16 tiles of one example.
    assert done.stdout.splitlines() == ["['all-reduce']", "2 ['16']"]


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


@pytest.mark.parametrize(
    ("sides", "filled"), [((2, 1), None), ((2, 2), None), ((2, 3), (3, 3))]
)
def test_no_small_map_meets_a_larger_kernel(forms, sides, filled):
    """oneDNN would take its reference code, 50 times slower."""
    x = jax.ShapeDtypeStruct((4, *sides, 2), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 5), jnp.float32)
    window = (1, 1), ((1, 1), (1, 1))
    program = jax.make_jaxpr(lambda x, k: lowering.convolve2d(x, k, *window))(x, kernel)
    found = [one.invars[0].aval.shape for one in convolutions(program.jaxpr)]
    # Without a convolution it is a product with a matrix.
    assert found == ([(4, *filled, 2)] if filled else [])
    assert program.out_avals[0].shape == (4, *sides, 5)


@pytest.mark.parametrize("side", [1, 2])
def test_a_map_that_is_smaller_than_an_unpadded_kernel_has_no_output(forms, side):
    x, kernel = jnp.ones((4, side, side, 2)), jnp.ones((3, 3, 2, 5))
    shapes = set()
    for form in (contextlib.nullcontext, lowering.plain):
        with form():
            no_pads = functools.partial(
                lowering.convolve2d, stride=(1, 1), pads=((0, 0), (0, 0))
            )
            shapes.add(jax.eval_shape(no_pads, x, kernel).shape)
    assert shapes == {(4, 0, 0, 5)}


# What is compiled.


@pytest.mark.skipif(not ONE_DNN, reason="needs a CPU and JAX 0.12: oneDNN")
@pytest.mark.parametrize("name", ["speednet", "cnn"])
def test_bfloat16_convolutions_stay_bfloat16(name):
    """All of oneDNN's, in the forward and in the backward pass."""
    norm = {"norm": "batch"} if name == "cnn" else {}
    model = models.create(
        name, num_outputs=2, dtype="bfloat16", widths=(16, 32, 32), **norm
    )
    x = jax.ShapeDtypeStruct((256, 26, 26, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, stats, x):
        found = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(found, x, train=True, mutable=["batch_stats"])
        return (logits**2).sum()

    lowered = jax.jit(jax.grad(loss)).lower(
        variables["params"], variables["batch_stats"], x
    )
    text = lowered.compile(mesh.compiler_options("cpu")).as_text()
    layers = 7 if name == "speednet" else 6
    for kind, least in (
        ("conv", 2 * layers - 1),  # Forward, and by the input of all but the first.
        ("matmul", layers - 1),  # By the kernel; speednet's first is not trained.
    ):
        calls = re.findall(rf"= \(?(\w+)\[.*custom-call.*onednn\${kind}", text)
        assert calls.count("bf16") >= least
        if kind == "conv":
            assert set(calls) == {"bf16"}
