"""The cache of decoded images: what is decoded, what is served, what may go wrong.

Other processes import this file: slow imports stand where they are used.
"""

import ast
import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from convnet.data import cache, decode, source
from convnet.data.decode import DecodeError
from convnet.data.order import TrainOrder
from convnet.data.resize import Resize
from convnet.errors import UsageError

RNG = np.random.default_rng(0)
COUNT = 12


def picture(path, size=(23, 17)):
    """Writes a random picture, in the format of its name; (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for i in range(COUNT):
        picture(root / f"train/{'ab'[i % 2]}/{i:02}.jpg")
    for name in "ab":
        picture(root / f"test/{name}/0.png")
    return root


@pytest.fixture
def decoded(monkeypatch):
    """The ids of the images that were decoded."""
    ids = []
    genuine = decode.decode

    def counting(data, id, **options):
        ids.append(id)
        return genuine(data, id, **options)

    monkeypatch.setattr(decode, "decode", counting)
    return ids


CROP = Resize()


def load(root, store, size=8, how=CROP):
    data = SimpleNamespace(
        name="folder",
        dir=str(root),
        image_size=size,
        resize=how.rule,
        crop_fraction=how.crop_fraction,
        interpolation=how.interpolation,
        test_fraction=0.2,
        train_limit=0,
        test_limit=0,
        cache=str(store),
    )
    return source.load(data, seed=0).train


def inputs(records):
    return np.stack([record["input"] for record in records])


def read(records):
    return inputs(source.read(records, range(len(records))))


def entries(store):
    return sorted(path for path in store.rglob("*") if path.is_file())


def test_the_second_epoch_decodes_nothing(folder, tmp_path, decoded):
    import jax

    from convnet import mesh as mesh_lib
    from convnet.data import pipeline

    store = tmp_path / "made" / "when needed"
    mesh = mesh_lib.make(jax.device_count())
    order = TrainOrder(COUNT, 4, seed=0)

    def epoch(split, number):
        steps = COUNT // 4
        batches = split.batches(order, number * steps, (number + 1) * steps)
        return jax.device_get([batch["input"] for batch in batches])

    def streaming(store):
        train = load(folder, store)
        return pipeline.Streaming(train, mesh, pipeline.BadInputs(COUNT, 0), 0)

    plain, cached = streaming("none"), streaming(store)
    want = [epoch(plain, 0), epoch(plain, 1)]
    assert len(decoded) == 2 * COUNT
    decoded.clear()
    first = epoch(cached, 0)
    assert sorted(decoded) == sorted(cached._source[i]["id"] for i in range(COUNT))
    decoded.clear()
    second = epoch(cached, 1)
    again = epoch(streaming(store), 1)  # as the next run would
    assert decoded == []
    np.testing.assert_array_equal([first, second], want)
    np.testing.assert_array_equal(again, second)
    assert not entries(tmp_path / "none") and len(entries(store)) == COUNT


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_what_is_kept_is_what_was_decoded(tmp_path, decoded, kind, size):
    path = picture(tmp_path / f"a.{kind}")
    store = cache.create(str(tmp_path / "store"))
    for channels in (3, 1):
        options = {"size": size, "resize": Resize("pad"), "channels": channels}
        want = decode.decode(path.read_bytes(), "a", **options)
        del decoded[:]
        for data in (path, str(path), path.read_bytes()):
            got = store.decode(data, "a", **options)
            assert got.dtype == np.uint8 and got.flags.writeable
            np.testing.assert_array_equal(got, want)
            got[:] = 0  # Whoever changes what he got does not change the next one.
        assert len(decoded) == 1


def test_another_size_or_rule_is_another_entry(folder, tmp_path):
    store = tmp_path / "store"
    rules = ("crop", "squash", "pad")
    settings = [(9, Resize()), *((8, Resize(rule)) for rule in rules)]
    settings += [(8, Resize("crop", 0.5)), (8, Resize("crop", 1.0, "bicubic"))]
    for size, how in settings * 2:
        want = read(load(folder, "none", size, how))
        np.testing.assert_array_equal(read(load(folder, store, size, how)), want)
    assert len(entries(store)) == len(settings) * COUNT


def test_an_edited_picture_is_never_stale(folder, tmp_path, decoded):
    store = tmp_path / "store"
    train = load(folder, store)
    before = read(train)
    path = folder / train.files[3]
    status = path.stat()
    # The same length and time: only the bytes tell.
    content = path.read_bytes()
    picture(path)
    changed = path.read_bytes()
    size = max(len(content), len(changed))
    path.write_bytes(content.ljust(size, b"\0"))
    read(train)
    path.write_bytes(changed.ljust(size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    decoded.clear()
    after = read(train)
    assert decoded == [train.files[3]]
    np.testing.assert_array_equal(after, read(load(folder, "none")))
    assert [i for i in range(COUNT) if (after[i] != before[i]).any()] == [3]


def test_a_renamed_picture_and_a_copy_are_known(folder, tmp_path, decoded):
    store = tmp_path / "store"
    read(load(folder, store))
    decoded.clear()
    (folder / "train/a/00.jpg").rename(folder / "train/a/new.jpg")
    (folder / "train/b/copy.jpg").write_bytes((folder / "train/b/01.jpg").read_bytes())
    np.testing.assert_array_equal(read(load(folder, store)), read(load(folder, "none")))
    assert len(decoded) == COUNT + 1  # those without a cache
    assert len(entries(store)) == COUNT


def test_the_decoder_is_all_that_decode_imports_of_ours():
    folder = Path(decode.__file__).parent
    found, new = set(), {"decode.py"}
    while new:
        found |= new
        imported = set()
        for name in new:
            for node in ast.walk(ast.parse((folder / name).read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = [
                        node.module,
                        *(f"{node.module}.{a.name}" for a in node.names),
                    ]
                    imported |= {
                        n.rpartition(".")[2] + ".py"
                        for n in names
                        if n.startswith("convnet.data.")
                    }
        new = imported - found
        new = {name for name in new if (folder / name).is_file()}
    assert found == set(cache._DECODER_FILES)


def test_another_decoder_is_another_entry(tmp_path, decoded, monkeypatch):
    path = picture(tmp_path / "a.jpg")
    options = {"size": 8, "resize": Resize()}
    cache.create(str(tmp_path / "store")).decode(path, "a", **options)
    monkeypatch.setattr(cache.PIL, "__version__", "99.0")
    newer = cache.create(str(tmp_path / "store"))
    newer.decode(path, "a", **options)
    newer.decode(path, "a", **options)
    assert len(decoded) == 2


def cut(content):
    return content[:-1]


def flipped(content):
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


def turned(content):
    """Height and width changed places, in an entry whose pixels are whole."""
    return content[4:8] + content[:4] + content[8:]


@pytest.mark.parametrize(
    "damage",
    [cut, flipped, turned, lambda c: c + b"\0", lambda c: c[:3], lambda c: b""],
)
def test_a_damaged_entry_is_written_again(tmp_path, decoded, damage):
    path = picture(tmp_path / "a.jpg")
    store = cache.create(str(tmp_path / "store"))
    options = {"size": 0, "resize": Resize()}
    want = store.decode(path, "a", **options)
    (entry,) = entries(tmp_path / "store")
    whole = entry.read_bytes()
    assert damage(whole) != whole
    entry.write_bytes(damage(whole))
    for _ in range(2):
        np.testing.assert_array_equal(store.decode(path, "a", **options), want)
    assert len(decoded) == 2
    assert entry.read_bytes() == whole


def test_unreadable_images_are_not_kept(tmp_path, decoded):
    store = cache.create(str(tmp_path / "store"))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"no picture")
    for data in (path, path, tmp_path / "lost.jpg", tmp_path, b""):
        with pytest.raises(DecodeError) as error:
            store.decode(data, "a", size=8, resize=Resize())
        with pytest.raises(DecodeError) as plain:
            decode.decode(data, "a", size=8, resize=Resize())
        assert str(error.value) == str(plain.value)
    assert entries(tmp_path / "store") == []
    picture(path)
    assert store.decode(path, "a", size=8, resize=Resize()).shape == (8, 8, 3)


def test_a_huge_file_is_decoded_but_not_kept(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.jpg")
    monkeypatch.setattr(cache, "_MAX_FILE_BYTES", path.stat().st_size - 1)
    store = cache.create(str(tmp_path / "store"))
    got = store.decode(path, "a", size=8, resize=Resize())
    np.testing.assert_array_equal(
        got, decode.decode(path, "a", size=8, resize=Resize())
    )
    assert entries(tmp_path / "store") == []


def test_a_full_disk_is_one_warning(folder, tmp_path, monkeypatch, capsys):
    store = tmp_path / "store"
    train = load(folder, store)
    genuine = os.replace
    full = [OSError(28, "No space left on device")] * 3

    def replace(*paths):
        if len(entries(store)) > 4:
            raise full.pop()
        genuine(*paths)

    monkeypatch.setattr(os, "replace", replace)
    np.testing.assert_array_equal(read(train), read(load(folder, "none")))
    np.testing.assert_array_equal(read(train), read(load(folder, "none")))
    assert len(full) == 2 and len(entries(store)) == 4  # nothing half-written
    out = capsys.readouterr().out
    assert out.count("warning") == 1
    assert f"data.cache={store}: No space left on device" in out


def _read_in_process(train, barrier, results):
    barrier.wait()
    results.put(read(train))


def test_two_processes_share_a_folder(folder, tmp_path):
    train = load(folder, tmp_path / "store")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_read_in_process, args=(train, barrier, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    got = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    want = read(load(folder, "none"))
    np.testing.assert_array_equal(got, [want, want])
    assert len(entries(tmp_path / "store")) == COUNT


def test_threads_that_write_the_same_entry(tmp_path, decoded, monkeypatch):
    path = picture(tmp_path / "a.jpg")
    store = cache.create(str(tmp_path / "store"))
    together = threading.Barrier(4)
    genuine = os.replace
    monkeypatch.setattr(os, "replace", lambda *p: (together.wait(10), genuine(*p)))
    errors = []

    def one():
        try:
            store.decode(path, "a", size=8, resize=Resize())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(decoded) == 4 and store._writes
    assert len(entries(tmp_path / "store")) == 1


def test_a_cache_survives_pickling(folder, tmp_path, decoded):
    train = load(folder, tmp_path / "store")
    want = read(train)
    decoded.clear()
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(train))), want)
    assert decoded == []


def test_create(tmp_path, monkeypatch):
    assert cache.create("none") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.create("auto").folder == str(tmp_path / "xdg/convnet/images")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.create("auto").folder == str(tmp_path / "home/.cache/convnet/images")
    assert cache.create("~/mine").folder == str(tmp_path / "home/mine")
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "file/below"):
        with pytest.raises(UsageError, match=f"data.cache='.*{name}'.*another one"):
            cache.create(str(tmp_path / name))
