"""The dry run: bytes, exchanges and batches, against counts made in other ways."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convnet import config as config_lib
from convnet import dry_run, exchanges
from convnet.exchanges import Exchange

PROJECT = Path(__file__).resolve().parent.parent
CASES = {"plain": (8, 1, "none"), "normed": (8, 1, "batch"), "split": (2, 4, "none")}
WIDTHS, SIDE, BATCH = (8, 16), 16, 32


def on_eight_devices(folder):
    """Prints what the tests below look at, as JSON."""
    import jax

    from convnet import mesh, prepare

    mesh.pretend(8)
    found = {}
    for name, (data, fsdp, norm) in CASES.items():
        config = config_lib.default()
        config.update_from_flattened_dict(
            {
                "data.name": "arrays",
                "data.dir": str(folder / "data.npz"),
                "data.placement": "stream" if name == "plain" else "device",
                "data.batch_size": BATCH,
                "model.widths": WIDTHS,
                "model.depth": 1,
                "model.dense": (64,),
                "model.gather": "flatten",
                "model.norm": norm,
                "optimizer.name": "adamw",
                "mesh.data": data,
                "mesh.fsdp": fsdp,
            }
        )
        it = prepare.prepare(config)
        need = dry_run.measure(it, BATCH // 8)
        state = prepare.initial_state(it)
        counts = {
            part: sum(
                leaf.addressable_shards[0].data.nbytes
                for leaf in jax.tree.leaves(getattr(state, part))
            )
            for part in ("params", "opt_state", "batch_stats")
        }
        leaves = [leaf.nbytes for leaf in jax.tree.leaves(state.params)]
        found[name] = {
            "held": need.held,
            "flops": need.flops,
            "temporary": need.temporary,
            "exchanges": [(e.kind, e.bytes, e.devices) for e in need.exchanges],
            "counts": counts,
            "leaves": leaves,
        }
    print(json.dumps(found))


def child(arguments, folder, **options):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry_run")
    x, y = np.zeros((40, SIDE, SIDE, 3), np.uint8), np.arange(40) % 10
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    program = (
        "import sys, pathlib, test_dry_run;"
        "test_dry_run.on_eight_devices(pathlib.Path(sys.argv[1]))"
    )
    done = child(["-c", program, folder], folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def total(case, kind):
    return sum(size for name, size, _ in case["exchanges"] if name == kind)


def test_bytes_are_those_of_a_state_that_is_really_there(found):
    for case in found.values():
        held, counts = case["held"], case["counts"]
        assert held["params"] == counts["params"]
        assert held["optimizer state"] == counts["opt_state"]
        assert held.get("batch statistics", 0) == counts["batch_stats"]
    assert found["split"]["held"]["params"] < sum(found["split"]["leaves"]) / 2


def test_the_batch_is_streamed_or_gathered_from_the_resident_split(found):
    each, row = BATCH // 8, SIDE * SIDE * 3
    # index, epoch, weight and label take four bytes each.
    assert found["plain"]["held"]["batch"] == each * (row + 16)
    assert "data" not in found["plain"]["held"]
    assert found["normed"]["held"]["batch"] == each * 12
    assert found["normed"]["held"]["data"] == 40 * (row + 8)


def test_what_data_parallel_devices_reduce_is_the_gradient(found):
    gradient = sum(found["plain"]["leaves"])
    # And the metrics: a few scalars.
    assert gradient < total(found["plain"], "all-reduce") <= gradient + 64
    assert {kind for kind, *_ in found["plain"]["exchanges"]} == {"all-reduce"}
    assert {devices for *_, devices in found["plain"]["exchanges"]} == {8}
    # BatchNorm over the global batch: mean and variance, and their gradients.
    normed = total(found["normed"], "all-reduce") - sum(found["normed"]["leaves"])
    statistics = 2 * 4 * sum(WIDTHS)
    assert 64 < normed <= 64 + 3 * statistics


def test_devices_that_split_the_params_gather_them(found):
    split = [size for size in found["split"]["leaves"] if size >= 4 << 14]
    assert len(split) == 1
    assert total(found["split"], "all-gather") == sum(split)
    groups = {d for kind, _, d in found["split"]["exchanges"] if kind == "all-gather"}
    assert groups == {4}


def test_arithmetic_is_that_of_the_layers(found):
    macs, side, channels = [], SIDE, 3
    for width in WIDTHS:
        macs.append(side * side * 9 * channels * width)
        side, channels = side // 2, width
    macs += [side * side * channels * 64, 64 * 10]
    # Forwards, by the kernel and by the input; the first layer needs no gradient by it.
    want = 2 * (3 * sum(macs) - macs[0]) * BATCH // 8
    assert want < found["plain"]["flops"] < 1.3 * want


def test_exchanges_in_every_notation_of_hlo():
    text = """
  %a = f32[10,3]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %b = (f32[4]{0}, /*index=1*/bf16[6]{0}) all-reduce-start(%x), replica_groups=[2,4]
  %c = (f32[4]{0}, bf16[6]{0}) all-reduce-done(%b)
  %d = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %e = f32[5]{0} reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
  %f = (s8[9]{0}, s8[9]{0}, u32[], u32[]) collective-permute-start(%x)
  ROOT %g = pred[7]{0} all-to-all(%x), replica_groups=mesh['d'=8], z=(8) {'d':(1)2}
  %h = f32[2]{0} fusion(%x), metadata={op_name="f32[2] all-reduce(y)"}
"""
    assert list(exchanges.find(text, 8)) == [
        Exchange("all-reduce", 120, 4),
        Exchange("all-reduce", 28, 4),
        Exchange("all-gather", 256, 4),
        Exchange("reduce-scatter", 80, 4),
        Exchange("collective-permute", 9, 8),
        Exchange("all-to-all", 7, 2),
    ]
    ring = Exchange("all-reduce", 800, 8), Exchange("all-gather", 800, 8)
    assert [one.sent for one in ring] == [1400, 700]
    assert Exchange("collective-permute", 9, 8).sent == 9


@pytest.mark.parametrize("limit", [0, 130, 1_000, 1e6, 1e9])
@pytest.mark.parametrize("unit", [1, 6])
def test_the_largest_batch_is_the_largest(limit, unit):
    def size(batch):
        return 100 + 30 * batch + int(20 * math.sqrt(batch))

    batch, needed = dry_run.largest_batch(size, limit, unit, 3 * unit)
    if not batch:
        assert needed == size(unit) > limit
        return
    assert needed == size(batch) <= limit < size(2 * batch)
    assert math.log2(batch / unit).is_integer()


def test_the_app_prints_it_and_leaves_nothing_behind(tmp_path):
    arguments = ["-m", "convnet.main", "--config=experiments/timeseries.py"]
    changes = ["--dry_run", "--devices=2", "--memory_gb=0.02"]
    small = ["--config.model.widths=(8,)", "--config.model.depth=1"]
    small += ["--config.compilation_cache=none"]
    done = child([*arguments, *changes, *small], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 x 1 devices (data x fsdp)" in done.stdout
    assert "all-reduce" in done.stdout and "fits into 0.02 GB" in done.stdout
    assert not list(tmp_path.iterdir())


def test_its_flags_need_it(tmp_path):
    arguments = ["-m", "convnet.main", "--config=experiments/digits.py"]
    done = child([*arguments, "--devices=8"], tmp_path)
    assert done.returncode == 2
    assert "--devices is for --dry_run" in done.stderr
