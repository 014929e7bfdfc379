import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from convnet import config as config_lib
from convnet import mesh, processor
from convnet.errors import UsageError

FUSION = "xla_cpu_experimental_ynn_fusion_type"


def test_the_users_own_flags_win(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = mesh.compiler_options.__wrapped__
    assert options("cpu")[FUSION] == "LIBRARY_FUSION_TYPE_REDUCE"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_foo=1 --{FUSION}=LIBRARY_FUSION_TYPE_DOT")
    left = options("cpu")
    assert FUSION not in left and left != {}
    assert options("gpu") == {}


def test_an_option_that_xla_refuses_is_left_out(monkeypatch):
    known = {"xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(mesh, "_CPU_OPTIONS", known | {"xla_cpu_no_such_option": 1})
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(processor, "has", lambda feature: False)
    assert mesh.compiler_options.__wrapped__("cpu") == known


@pytest.mark.parametrize("wide", [False, True])
def test_wide_vectors_where_the_processor_is_at_home_with_them(monkeypatch, wide):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(
        processor, "has", lambda feature: wide and feature == "avx512_bf16"
    )
    options = mesh.compiler_options.__wrapped__("cpu")
    assert options.get("xla_cpu_prefer_vector_width") == (512 if wide else None)


def test_features_of_the_processor_are_those_that_numpy_finds():
    found = np._core._multiarray_umath.__cpu_features__
    for ours, theirs in (("sse4_2", "SSE42"), ("avx2", "AVX2"), ("avx512f", "AVX512F")):
        if sys.platform == "linux":
            assert processor.has(ours) == found.get(theirs, False)
    assert not processor.has("")


def test_a_stack_of_batches_is_split_along_the_batch():
    found = mesh.make(len(jax.devices()) * 2)
    stack = {"index": np.arange(12 * len(jax.devices())).reshape(3, -1)}
    placed = mesh.put_batches(found, stack)["index"]
    np.testing.assert_array_equal(placed, stack["index"])
    assert placed.sharding.spec == jax.sharding.PartitionSpec(None, ("data", "fsdp"))


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    with pytest.raises(UsageError, match="6, which 4 devices .* a multiple of 4"):
        mesh.make(6)


def test_a_reproducible_run_has_the_same_number_of_threads_everywhere(monkeypatch):
    config = config_lib.default()
    monkeypatch.setenv("NPROC", "3")
    mesh.start("none", mesh.threads(config))
    assert os.environ["NPROC"] == "3"
    config.reproducible, config.mesh.shards = True, 4
    mesh.start("none", mesh.threads(config))
    assert os.environ["NPROC"] == "4"


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((512, 4096), (None, "fsdp")),  # the largest axis
        ((4096, 512), ("fsdp",)),
        ((256, 256), (None, "fsdp")),  # the last of several
        ((3, 3, 1026, 512), (None, None, None, "fsdp")),  # that can be shared evenly
        ((1023, 1025), ()),
        ((128, 64), ()),  # too small
    ],
)
def test_leaves_are_split_along_their_largest_even_axis(shape, spec):
    devices = np.array(jax.devices()[:1])
    fake = SimpleNamespace(shape={"data": 2, "fsdp": 4})
    real = jax.sharding.Mesh(devices.reshape(1, 1), ("data", "fsdp"))
    with pytest.MonkeyPatch.context() as patch:
        named = jax.sharding.NamedSharding
        patch.setattr(mesh, "NamedSharding", lambda _, spec: named(real, spec))
        found = mesh.sharded(fake, {"kernel": jax.ShapeDtypeStruct(shape, "float32")})
    assert found["kernel"].spec == jax.sharding.PartitionSpec(*spec)


HEAPS = """
import ctypes, threading
import jax, numpy
from convnet import mesh
mesh.start("none")
numpy.asarray(jax.jit(lambda x: x @ x)(numpy.ones((400, 400), numpy.float32)))
thread = threading.Thread(target=lambda: bytearray(100_000))
thread.start()
thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def test_all_threads_of_a_run_on_a_cpu_share_a_heap():
    # From a heap of its own a thread would get each large array as fresh pages.
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("not glibc")
    done = subprocess.run(
        [sys.executable, "-c", HEAPS],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("<heap nr=") == 1
