"""The gradient by virtual shards: what it is, and its bits on 1, 2, 4 and 8 devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnet import config as config_lib
from convnet import gradient, prepare, resolve
from convnet import mesh as mesh_lib
from convnet import step as step_lib
from convnet.checkpoint import sha256
from convnet.errors import UsageError
from convnet.freezing import Frozen
from convnet.task import Classification

PROJECT = Path(__file__).resolve().parent.parent
K, BATCH = 3, 16
OLD = jax.__version_info__ < (0, 12)


class Normed(nn.Module):
    """A convolution, BatchNorm, dropout, a head."""

    norm: bool = True

    @nn.compact
    def __call__(self, inputs, train):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(inputs)
        if self.norm:
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.5)
            x = norm(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dropout(0.0, deterministic=not train)(x)
        return nn.Dense(K, name="head")(x)


def batch_of():
    random = np.random.default_rng(0)
    label = random.integers(0, K, BATCH)
    weight = np.ones(BATCH, np.float32)
    weight[[1, 5, 6]] = 0
    return {
        "input": random.normal(size=(BATCH, 5, 5, 2)).astype(np.float32),
        "target": np.eye(K, dtype=np.float32)[label],
        "weight": weight,
    }


def recipe_of(model, shards, accumulate=1):
    return SimpleNamespace(
        model=model,
        task=Classification(K),
        frozen=Frozen(),
        accumulate=accumulate,
        shards=shards,
        mesh=mesh_lib.make(BATCH, data=1),
    )


@functools.cache
def variables_of(model):
    zeros = jnp.zeros((1, 5, 5, 2))
    return model.init(jax.random.key(1), zeros, train=False)


def found(model, shards, accumulate=1):
    variables = variables_of(model)
    recipe = recipe_of(model, shards, accumulate)
    run = jax.jit(
        lambda params, stats, batch: gradient.of_batch(
            recipe, (params, {}), stats, batch, jax.random.key(2), False
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return run(variables["params"], variables.get("batch_stats", {}), batch_of())


def assert_close(one, other):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, other
    )


def test_without_batch_norm_shards_change_rounding_alone():
    model = Normed(norm=False)
    assert_close(found(model, 4), found(model, 0))


def test_batch_norm_is_over_each_shard_of_its_own():
    """Against a plain loop over slices, each normalised by its own statistics."""
    model = Normed()
    variables, batch = variables_of(model), batch_of()
    grads, stats = [], []
    for start in range(0, BATCH, 4):
        rows = {k: v[start : start + 4] for k, v in batch.items()}

        def loss(params, rows=rows):
            logits, updated = model.apply(
                {**variables, "params": params}, rows["input"], True, mutable=True
            )
            log_p = jax.nn.log_softmax(logits)
            losses = -(log_p * rows["target"]).sum(-1) * rows["weight"]
            return losses.sum() / batch["weight"].sum(), updated["batch_stats"]

        one, updated = jax.grad(loss, has_aux=True)(variables["params"])
        grads.append(one), stats.append(updated)
    want = jax.tree.map(lambda *x: sum(x), *grads)
    want_stats = jax.tree.map(lambda *x: sum(x) / 4, *stats)
    got, got_stats, sums = found(model, 4)
    assert_close((got, got_stats), (want, want_stats))
    assert set(sums) == {"objective", "loss", "accuracy"}
    whole, _, _ = found(model, 0)
    assert not np.allclose(got["conv"]["kernel"], whole["conv"]["kernel"], rtol=1e-3)


def test_an_accelerator_loops_over_its_shards(monkeypatch):
    unrolled = found(Normed(), 8, accumulate=2)
    devices = np.array([[SimpleNamespace(platform="gpu")]], object)
    mesh = mesh_lib.make(BATCH, data=1)
    recipe = recipe_of(Normed(), 8, 2)
    recipe.mesh = SimpleNamespace(devices=devices, size=1)
    shard_map = jax.shard_map
    monkeypatch.setattr(
        jax, "shard_map", lambda f, **options: shard_map(f, **{**options, "mesh": mesh})
    )
    variables = variables_of(Normed())
    params, stats = variables["params"], variables["batch_stats"]
    run = functools.partial(gradient.of_batch, recipe, dropout=jax.random.key(2))
    traced = jax.make_jaxpr(lambda b: run((params, {}), stats, b, cached=False))
    assert "scan" in str(traced(batch_of()))
    looped = jax.jit(lambda b: run((params, {}), stats, b, cached=False))(batch_of())
    assert_close(looped, unrolled)


def test_neighbours_are_added_first():
    big = jnp.float32(2**24)  # to which 1 is too small to be added
    # From left to right it would be 0, each with the one half the list away 2.
    assert gradient._tree_sum([jnp.float32(1), big, jnp.float32(1), -big]) == 1


def test_settings_that_do_not_go_together(monkeypatch):
    config = config_lib.default()
    config.reproducible = True
    config.mesh.shards = 12
    with pytest.raises(UsageError, match="mesh.shards is 12: want a power of two"):
        resolve.validate(config)
    config.mesh.shards, config.data.batch_size = 8, 20
    with pytest.raises(UsageError, match="batch_size = 20 into mesh.shards = 8"):
        resolve.validate(config)
    devices = [SimpleNamespace(platform="gpu")] * 4
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UsageError, match="on 1, 2, 4, ... 2 devices .* not on 4 times"):
        mesh_lib.make(16, shards=4)
    with pytest.raises(UsageError, match="not on 1 times mesh.fsdp = 2: choose"):
        mesh_lib.make(16, data=1, fsdp=2, shards=16)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(UsageError, match="on 2 devices needs JAX 0.12"):
        mesh_lib.make(16, data=2, shards=4)
    with pytest.raises(UsageError, match="mesh.data = 64 times mesh.fsdp = 1 asks"):
        mesh_lib.make(64, data=64)


def test_a_gpu_is_made_to_repeat_itself():
    options = mesh_lib.compiler_options.__wrapped__
    wanted = options("gpu", reproducible=True)
    assert set(wanted) == {"xla_gpu_deterministic_ops", "xla_gpu_autotune_level"}
    assert options("gpu") == {}
    # XLA knows both names, also where there is no GPU.
    jax.jit(lambda x: x + 1, compiler_options=wanted).lower(0.0).compile()


# Several devices.

EVERYTHING = {
    "reproducible": True,
    "data.batch_size": 64,
    "augment.flip": "random",
    "augment.crop_pad": 2,
    "augment.rotate": 10.0,
    "augment.brightness": 0.2,
    "augment.erase": 0.3,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "model.widths": (4,),
    "model.depth": 1,
    "model.norm": "batch",
    "model.dropout": 0.3,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.01,
    "optimizer.ema": 0.9,
    "optimizer.accumulate": 2,
    "optimizer.clip_norm": 0.5,
}
HALF = {
    "reproducible": True,
    "mesh.shards": 4,
    "optimizer.accumulate": 2,
    "data.batch_size": 16,
    "model.widths": (4,),
    "model.depth": 1,
    "model.norm": "batch",
    "model.dtype": "bfloat16",
    "optimizer.name": "muon",
}


def hash_after_steps(folder, settings, data, steps=3):
    """Trains on the first devices of this process; the hash of all of the state."""
    config = config_lib.default()
    given = {"data.name": "arrays", "data.dir": folder, "mesh.data": data}
    config.update_from_flattened_dict(settings | given)
    it = prepare.prepare(config)
    it.state = prepare.initial_state(it)
    split, train = it.split("train"), None
    for batch in split.batches(it.train_order, 0, steps):
        train = train or it.compile(
            step_lib.train_step,
            it.state,
            split.data,
            batch,
            out_shardings=mesh_lib.replicated(it.mesh),
        )
        it.state, _ = train(it.state, split.data, batch)
    return sha256(it.state)


def print_hashes(folder, cases):
    """The hashes of [settings, devices of the mesh] as JSON."""
    print(json.dumps([hash_after_steps(folder, *case) for case in json.loads(cases)]))


def hashes(folder, devices, *cases):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "8",  # as `mesh.threads` has it
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)]),
    }
    program = "import sys, test_gradient; test_gradient.print_hashes(*sys.argv[1:])"
    command = [sys.executable, "-c", program, folder, json.dumps(cases)]
    process = subprocess.run(
        command, env=environment, check=True, timeout=600, stdout=subprocess.PIPE
    )
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.skipif(OLD, reason="needs JAX 0.12")
def test_one_hash_on_1_2_4_and_8_devices(tmp_path):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (96, 8, 8, 3)).astype(np.uint8)
    y = np.arange(96) % 10
    path = tmp_path / "data.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    alone = hashes(path, 1, (EVERYTHING, 1), (HALF, 1))
    several = ((EVERYTHING, n) for n in (2, 4, 8)), ((HALF, n) for n in (1, 2))
    found = hashes(path, 8, *several[0], *several[1])
    assert alone[0] != alone[1]
    assert found == [alone[0]] * 3 + [alone[1]] * 2
