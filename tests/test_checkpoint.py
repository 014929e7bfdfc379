"""Checkpoints: bit for bit, the right ones kept, damage noticed, failures named."""

import errno
import hashlib
import json
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnet import checkpoint as checkpoint_lib
from convnet import mesh as mesh_lib
from convnet.checkpoint import Checkpoints
from convnet.errors import ConvnetError
from convnet.step import TrainState

# TensorStore, after an operation that failed: "Event loop is closed".
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

OPTIMIZER = optax.chain(
    optax.masked(optax.add_decayed_weights(0.1), {"base": True, "head": False}),
    optax.scale_by_adam(),
    optax.scale_by_schedule(lambda step: 0.1),
)


def make_state(seed, ema=True, size=64):
    random = np.random.default_rng(seed)

    def draw(*shape):
        # All bit patterns that occur: of either sign, subnormal, and negative zero.
        values = random.normal(size=shape).astype(np.float32)
        values.flat[:2] = -0.0, 1e-42
        return values

    params = {
        "base": {"conv": {"kernel": draw(3, 3, 2, size), "bias": draw(size)}},
        "head": {"kernel": draw(size, 3)},
    }
    batch_stats = {"base": {"norm": {"mean": draw(size), "var": draw(size)}}}
    opt_state = jax.tree.map(
        lambda x: draw(*x.shape) if x.dtype == np.float32 else np.full_like(x, seed),
        OPTIMIZER.init(params),
    )
    averaged = {"params": params, "batch_stats": batch_stats}
    averaged = jax.tree.map(lambda x: draw(*x.shape), averaged) if ema else None
    step = np.asarray(seed, np.int32)
    state = TrainState(step, params, batch_stats, opt_state, averaged)
    return mesh_lib.put_whole(mesh_lib.make(jax.device_count()), state)


def assert_same_bits(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert mine.sharding == other.sharding
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def opened(tmp_path):
    """Opens the folder of checkpoints, as each start of a run does."""
    managers = []

    def start(keep=2, folder=tmp_path / "checkpoints"):
        managers.append(Checkpoints(folder, keep))
        return managers[-1]

    yield start
    for manager in managers:
        manager.close()


def fill(checkpoints, *steps, score=None, **options):
    for step in steps:
        state = make_state(step, **options)
        checkpoints.save(step, state, {"best": step / 8, "train_seconds": 0.5}, score)
        checkpoints.wait()


# Round trip.


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip(opened, ema):
    state = make_state(7, ema)
    checkpoints = opened()
    about = {"best": 0.1, "train_seconds": 12.345678901234567}
    checkpoints.save(7, state, about, 0.5)
    checkpoints.wait()
    for again in (checkpoints, opened()):
        found, found_about = again.restore(make_state(0, ema))
        assert_same_bits(found, state)
        assert found_about.pop("sha256") == checkpoint_lib.sha256(state)
        assert found_about == {**about, "step": 7}


def test_best_may_be_unknown(opened):
    checkpoints = opened()
    checkpoints.save(1, make_state(1), {"best": None, "train_seconds": 0.0}, None)
    checkpoints.wait()
    assert checkpoints.restore(make_state(0))[1]["best"] is None


def test_nothing_to_restore(opened, tmp_path):
    assert opened().restore(make_state(0)) is None
    assert not (tmp_path / "corrupt").exists()


def test_a_state_that_is_donated_right_after_is_saved_as_it_was(opened):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = opened()
    state = make_state(3, size=30_000)
    want = jax.tree.map(lambda x: x, jax.device_get(jax.tree.map(jnp.copy, state)))
    checkpoints.save(3, state, {}, None)
    for _ in range(5):
        state = change(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    found, _ = checkpoints.restore(state)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


# Which are kept.


def test_the_newest_and_the_best_are_kept(opened, tmp_path):
    checkpoints = opened(keep=2)
    # Below zero, as the score of a regression is: minus its loss.
    for step, score in ((1, -0.9), (2, -0.1), (3, -0.8), (4, -0.7), (5, None)):
        fill(checkpoints, step, score=score)
    assert checkpoints.steps() == [2, 4, 5]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}
    checkpoints.close()
    # The next start knows the score of step 2.
    again = opened(keep=1)
    fill(again, 6, score=-0.5)
    assert again.steps() == [2, 6]
    fill(again, 7, score=-0.05)
    assert again.steps() == [7]


def test_a_damaged_score_does_not_stop_a_run(opened, tmp_path):
    for step in (1, 2):
        fill(opened(), step, score=step)
    (path,) = (tmp_path / "checkpoints" / "2" / "metrics").glob("metrics")
    assert b"2" in path.read_bytes()
    path.write_bytes(b"{")
    found, about = opened().restore(make_state(0))
    assert_same_bits(found, make_state(2))
    again = opened(keep=1)
    fill(again, 3)
    assert again.steps() == [1, 3]


def test_a_step_that_is_saved_already_stays(opened):
    checkpoints = opened()
    fill(checkpoints, 5)
    checkpoints.save(5, make_state(6), {}, None)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(make_state(0))[0], make_state(5))


# Damage.


def files(folder):
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -size(p))


def size(path):
    return path.stat().st_size


def large(folder):
    """The largest file, and what is nearly as large: TensorStore may leave a copy."""
    found = files(folder)
    return [path for path in found if size(path) > size(found[0]) // 2]


def flip_a_byte(folder):
    for path in large(folder):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


def shorten_a_file(folder):
    for path in large(folder):
        path.write_bytes(path.read_bytes()[: size(path) // 2])


def delete_a_file(folder):
    for path in large(folder):
        path.unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def change_what_is_said(folder):
    """Another state's values, each part whole in itself."""
    (about,) = (p for p in files(folder / "about") if b"sha256" in p.read_bytes())
    digest = checkpoint_lib.sha256(make_state(2)).encode()
    assert digest in about.read_bytes()
    about.write_bytes(about.read_bytes().replace(digest, b"0" * 64))


def change_a_number(folder):
    """Nothing of the state, and JSON as before."""
    path = folder / "about" / "metadata"
    assert b'"best": 0.25' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'"best": 0.25', b'"best": 0.35'))


def another_steps(folder):
    """Sound in itself, but not what its name says."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


def no_state(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        shorten_a_file,
        delete_a_file,
        empty,
        change_what_is_said,
        change_a_number,
        another_steps,
        no_state,
    ],
)
def test_a_damaged_checkpoint_is_set_aside(opened, tmp_path, capsys, damage):
    fill(opened(), 1, 2)
    damage(tmp_path / "checkpoints" / "2")
    damaged = [p.name for p in files(tmp_path / "checkpoints" / "2")]
    again = opened()
    capsys.readouterr()
    found, about = again.restore(make_state(0))
    assert_same_bits(found, make_state(1))
    assert about["step"] == 1 and about["best"] == 1 / 8
    printed = capsys.readouterr().out
    assert "warning: checkpoint 2 is corrupt" in printed
    assert str(tmp_path / "corrupt" / "2") in printed
    assert [p.name for p in files(tmp_path / "corrupt" / "2")] == damaged
    assert again.steps() == [1]


def test_what_is_no_checkpoint_is_left_alone(opened, tmp_path):
    fill(opened(), 1)
    folder = tmp_path / "checkpoints"
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "3").write_bytes(b"x")
    (folder / "lost+found").mkdir()
    shutil.copytree(folder / "1", folder / "1 (copy)")
    again = opened()
    assert again.steps() == [1]
    assert_same_bits(again.restore(make_state(0))[0], make_state(1))
    fill(again, 2)
    assert again.steps() == [1, 2]
    names = {".DS_Store", "3", "lost+found", "1 (copy)"}
    assert names < {p.name for p in folder.iterdir()}
    assert not (tmp_path / "corrupt").exists()


def test_an_older_checkpoint_says_less_of_itself(opened, tmp_path):
    fill(opened(), 1)
    path = tmp_path / "checkpoints" / "1" / "about" / "metadata"
    about = json.loads(path.read_text())
    del about[checkpoint_lib._SEAL]
    path.write_text(json.dumps(about))
    assert opened().restore(make_state(0))[1]["step"] == 1


def test_a_step_that_is_damaged_twice(opened, tmp_path):
    fill(opened(), 1, 2)
    delete_a_file(tmp_path / "checkpoints" / "2")
    again = opened()
    assert again.restore(make_state(0))[1]["step"] == 1
    # The run gets there again.
    fill(again, 2)
    assert_same_bits(again.restore(make_state(0))[0], make_state(2))
    empty(tmp_path / "checkpoints" / "2")
    assert opened().restore(make_state(0))[1]["step"] == 1
    assert files(tmp_path / "corrupt" / "2") == []


def test_no_flipped_byte_goes_unnoticed(opened, tmp_path):
    """Whichever byte of the weights changes: all comes back as it was, or nothing."""
    fill(opened(), 1, 2)
    newest = tmp_path / "checkpoints" / "2"
    shutil.copytree(newest, tmp_path / "whole")
    set_aside = 0
    for path in files(tmp_path / "whole" / "state")[:3]:
        for place in (0, size(path) // 3):
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", newest)
            data = bytearray(path.read_bytes())
            data[place] ^= 1
            (newest / path.relative_to(tmp_path / "whole")).write_bytes(data)
            found, about = opened().restore(make_state(0))
            assert_same_bits(found, make_state(about["step"]))
            set_aside += about["step"] == 1
    assert set_aside >= 3


def test_a_damaged_one_that_cannot_be_moved_is_named(opened, tmp_path, monkeypatch):
    fill(opened(), 1, 2)
    delete_a_file(tmp_path / "checkpoints" / "2")

    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shutil, "move", refuse)
    with pytest.raises(ConvnetError) as error:
        opened().restore(make_state(0))
    assert "checkpoint 2 is corrupt" in str(error.value)
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert "Read-only file system; move or remove it" in str(error.value)
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_all_damaged(opened, tmp_path, capsys):
    fill(opened(), 1, 2)
    for step in "12":
        delete_a_file(tmp_path / "checkpoints" / step)
    with pytest.raises(ConvnetError) as error:
        opened().restore(make_state(0))
    assert f"no checkpoint in {tmp_path / 'checkpoints'} can be read" in str(
        error.value
    )
    assert "run the same command again" in str(error.value)
    assert {p.name for p in (tmp_path / "corrupt").iterdir()} == {"1", "2"}
    assert capsys.readouterr().out.count("is corrupt") == 2


def test_what_a_kill_left_half_written_is_ignored(opened, tmp_path):
    checkpoints = opened()
    fill(checkpoints, 1)
    checkpoints.close()
    # Orbax writes beside the place, and renames.
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    delete_a_file(half)
    again = opened()
    assert again.steps() == [1]
    assert_same_bits(again.restore(make_state(0))[0], make_state(1))
    deadline = time.monotonic() + 30  # Orbax removes it in a thread
    while half.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not half.exists()


# A disk that is full.


@pytest.fixture
def small_disk():
    """Lets no file grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on):
        soft = 1 << 16 if on else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(False)


@pytest.mark.parametrize("good", [(), (1,)])
def test_a_failed_write_names_the_last_good_checkpoint(
    opened, small_disk, tmp_path, good
):
    checkpoints = opened()
    fill(checkpoints, *good, size=30_000)
    small_disk(True)
    with pytest.raises(ConvnetError) as error:
        fill(checkpoints, 2, size=30_000)
    small_disk(False)
    message = str(error.value)
    assert f"could not be written to {tmp_path / 'checkpoints'}" in message
    last = f"step {good[-1]}" if good else "none"
    assert f"the last good checkpoint is: {last};" in message
    assert checkpoints.steps() == list(good)
    if good:
        found, _ = checkpoints.restore(make_state(0, size=30_000))
        assert_same_bits(found, make_state(1, size=30_000))
    checkpoints.close()


# Hashes.


def independent_sha256(tree):
    leaves = {}

    def walk(node, path):
        if isinstance(node, dict):
            for name, child in node.items():
                walk(child, [*path, name])
        else:
            leaves["/".join(path)] = np.asarray(node)

    walk(tree, [])
    text = b""
    for path in sorted(leaves):
        leaf = leaves[path]
        text += f"{path} {tuple(leaf.shape)} {leaf.dtype.name}\n".encode()
        text += leaf.tobytes(order="C")
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("ema", [True, False])
def test_params_sha256(ema):
    state = make_state(3, ema)
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    tree |= {"ema": state.ema} if ema else {}
    assert checkpoint_lib.result_sha256(state) == independent_sha256(tree)


def test_leaves_go_by_their_paths():
    tree = {
        "b_1": {"kernel": np.ones((2, 3), np.float32)},
        "b": {"kernel": np.zeros((2, 3), np.float32), "bias": np.arange(3)},
        "b-1": np.asarray([3], np.int8),
        "B": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    flat = checkpoint_lib.flat(tree)
    assert list(flat) == ["B", "b-1", "b/bias", "b/kernel", "b_1/kernel"]
    assert flat["b/bias"] is tree["b"]["bias"]
    assert checkpoint_lib.sha256(tree) == independent_sha256(tree)


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.zeros((4, 1), np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.float32([0, 0, 0, 1e-45])},
        {"a": np.float32([0, 0, 0, -0.0])},
        {"a": {"a": np.zeros(4, np.float32)}},
    ],
    ids=str,
)
def test_the_hash_covers_path_shape_dtype_and_bits(other):
    tree = {"a": np.zeros(4, np.float32)}
    assert checkpoint_lib.sha256(tree) == independent_sha256(tree)
    assert checkpoint_lib.sha256(other) != checkpoint_lib.sha256(tree)


def test_params_sha256_leaves_out_what_is_not_the_result():
    state = make_state(3)
    digest = checkpoint_lib.result_sha256(state)
    other = make_state(4)
    for same in ({"step": other.step}, {"opt_state": other.opt_state}):
        assert checkpoint_lib.result_sha256(state.replace(**same)) == digest
    for name in ("params", "batch_stats", "ema"):
        changed = state.replace(**{name: getattr(other, name)})
        assert checkpoint_lib.result_sha256(changed) != digest
