import jax
import numpy as np
import pytest

from convnet import mesh
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
    assert mesh.compiler_options.__wrapped__("cpu") == known


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
