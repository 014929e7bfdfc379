"""Params and optimizer state split over devices: bytes, numbers, checkpoints."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from convnet import config as config_lib
from convnet import mesh as mesh_lib
from convnet import prepare
from convnet import step as step_lib
from convnet.checkpoint import Checkpoints, flat, sha256

PROJECT = Path(__file__).resolve().parent.parent
MESHES = ((1, 1), (8, 1), (1, 8), (2, 4))
# Parameters of VGG-16 for the 1,000 classes of ImageNet (Simonyan and Zisserman 2014).
VGG16 = 138_357_544


def config_of(folder, data, fsdp, **changes):
    config = config_lib.default()
    given = {
        "data.name": "arrays",
        "data.dir": str(folder / "data.npz"),
        "data.batch_size": 16,
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "optimizer.name": "adamw",
        "optimizer.lr": 0.003,
    }
    config.update_from_flattened_dict(given | changes)
    return config


def small(folder, data, fsdp):
    """A run whose hidden layer, 512 x 48, is split, and whose other leaves are not."""
    changes = {"model.widths": (8, 8), "model.depth": 1, "model.dense": (48,)}
    changes |= {"model.norm": "batch", "model.gather": "flatten", "optimizer.ema": 0.9}
    it = prepare.prepare(config_of(folder, data, fsdp, **changes))
    it.state = prepare.initial_state(it)
    return it


def trained(it, steps=3):
    split, train = it.split("train"), None
    for batch in split.batches(it.train_order, 0, steps):
        options = {"donate_argnums": 0, "out_shardings": it.out_shardings()}
        train = train or it.compile(
            step_lib.train_step, it.state, split.data, batch, **options
        )
        it.state, _ = train(it.state, split.data, batch)
    return it.state


def vgg_bytes(folder):
    """Bytes of VGG-16's state with AdamW on each device, nothing allocated."""
    it = prepare.prepare(config_of(folder, 1, 1, **{"model.name": "vgg16"}))
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8)
    recipe = it.recipe
    shapes = jax.eval_shape(lambda x: step_lib.create_state(recipe, x), inputs)
    found = {}
    for data, fsdp in MESHES:
        mesh = mesh_lib.make(16, data, fsdp)
        shardings = mesh_lib.sharded(mesh, shapes)
        sizes = jax.tree.map(
            lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            shapes,
            shardings,
        )
        found[f"{data}x{fsdp}"] = sum(jax.tree.leaves(sizes))
    return found


def on_eight_devices(folder):
    """Prints what the tests below look at, as JSON."""
    found = {"vgg": vgg_bytes(folder), "bytes": {}, "saved": {}, "restored": {}}
    states = {}
    for data, fsdp in MESHES:
        name = f"{data}x{fsdp}"
        it = small(folder, data, fsdp)
        start = flat(jax.device_get(it.state))
        state = trained(it)
        leaves = jax.tree.leaves(state)
        counts = {d: 0 for d in it.mesh.devices.flat}
        for shard in (s for leaf in leaves for s in leaf.addressable_shards):
            counts[shard.device] += shard.data.nbytes
        found["bytes"][name] = sorted(counts.values())
        checkpoints = Checkpoints(folder / name, keep=1)
        checkpoints.save(3, state, {}, None)
        checkpoints.wait(), checkpoints.close()
        found["saved"][name] = sha256(state)
        states[name] = flat(jax.device_get(state))
    for saved, (data, fsdp) in (("2x4", (1, 8)), ("1x8", (1, 1)), ("1x1", (2, 4))):
        checkpoints = Checkpoints(folder / saved, keep=1)
        like = small(folder, data, fsdp).state
        restored, _ = checkpoints.restore(like)
        checkpoints.close()
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, like)
        assert all(jax.tree.leaves(same))
        found["restored"][saved] = sha256(restored)
    for name, state in states.items():
        for path, leaf in state.items():
            want = states["1x1"][path]
            close = np.testing.assert_allclose
            close(leaf, want, rtol=2e-3, atol=2e-5, err_msg=f"{name} {path}")
    assert any(np.any(states["1x1"][path] != start[path]) for path in start)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)
    y = np.arange(48) % 10
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)]),
    }
    program = (
        "import sys, pathlib, test_fsdp;"
        "test_fsdp.on_eight_devices(pathlib.Path(sys.argv[1]))"
    )
    # It also compares the states after three steps on each mesh.
    process = subprocess.run(
        [sys.executable, "-c", program, folder],
        env=environment,
        check=True,
        timeout=600,
        stdout=subprocess.PIPE,
    )
    return json.loads(process.stdout.splitlines()[-1])


def test_bytes_of_vgg16_with_adamw_on_each_device(found):
    """With 10 classes: what is left of the published 138 M, three times."""
    params = VGG16 - 4097 * 1000 + 4097 * 10
    whole = 4 * 3 * params
    assert found["vgg"]["1x1"] == pytest.approx(whole, abs=100)
    assert found["vgg"]["8x1"] == found["vgg"]["1x1"]
    # An eighth, and the biases and first kernels whole.
    assert whole / 8 < found["vgg"]["1x8"] < 1.01 * whole / 8
    assert whole / 4 < found["vgg"]["2x4"] < 1.01 * whole / 4


def test_each_device_holds_its_share(found):
    split = 4 * 4 * 512 * 48  # params, two moments, average
    (whole,) = found["bytes"]["1x1"]
    assert found["bytes"]["8x1"] == [whole] * 8
    assert found["bytes"]["1x8"] == [whole - split * 7 // 8] * 8
    assert found["bytes"]["2x4"] == [whole - split * 3 // 4] * 8


def test_a_checkpoint_is_restored_on_another_mesh(found):
    for saved, restored in found["restored"].items():
        assert restored == found["saved"][saved]
